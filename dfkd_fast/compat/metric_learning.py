"""Contrastive losses and ``SelfSupervisedLoss`` of pytorch-metric-learning 2.9, which must be installed.

The classes extend those of the library. An op computes ``SelfSupervisedLoss(loss)(embeddings, ref_emb)``; the library
computes all other calls, such as those with labels, pairs, distances, reducers or regularizers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.compat import Case
from dfkd_fast.compat._common import matching, positive

try:
    from pytorch_metric_learning import distances, losses, reducers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dfkd_fast.compat.metric_learning extends pytorch-metric-learning: pip install pytorch-metric-learning",
        name=error.name,
    ) from error

__all__ = ["COVERAGE", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]

COVERAGE = (
    Case("SelfSupervisedLoss", "`symmetric=True`, wraps `NTXentLoss` with its defaults", "contrastive_loss"),
    Case("SelfSupervisedLoss", "`symmetric=True`, wraps `SupConLoss` with its defaults", "contrastive_loss"),
    Case("SelfSupervisedLoss", "`symmetric=False`", None),
    Case("SelfSupervisedLoss", "wraps another loss", None),
    Case("SelfSupervisedLoss", "a temperature below about 0.03 (`NTXentLoss`) or 0.1 (`SupConLoss`)", None),
    Case("SelfSupervisedLoss", "wraps a loss with another distance, reducer or regularizer", None),
    Case("NTXentLoss", "labels or pairs", None),
    Case("SupConLoss", "labels or pairs", None),
)


def _plain(loss: Any, reducer: type) -> bool:
    """Whether a loss uses cosine similarity and the given reducer, without statistics or regularizer."""
    distance = loss.distance
    recorded = (part.collect_stats for part in (loss, distance, loss.reducer))
    return (
        type(distance) is distances.CosineSimilarity
        and (distance.p, distance.power, distance.normalize_embeddings) == (2, 1, True)
        and type(loss.reducer) is reducer
        and loss.embedding_regularizer is None
        and not any(recorded)
    )


class NTXentLoss(losses.NTXentLoss):
    """NT-Xent loss (Chen et al., ICML 2020); arguments and errors are those of the library's class."""

    def covers(self, count: int) -> bool:
        """Whether :meth:`of_views` equals the original for ``count`` samples.

        The original adds exp(-87), the smallest normal float32 number, to each probability. Probabilities are at least
        exp(-2 / temperature) / (2 count); if this bound is above exp(-70), the addition has no effect.
        """
        return (
            _plain(self, reducers.MeanReducer)
            and positive(self.temperature)
            and 2 * count < math.exp(70 - 2 / self.temperature)
        )

    def of_views(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Compute the loss, a scalar, of two views (N, dim)."""
        return ops.contrastive_loss(embeddings, ref_emb, temperature=self.temperature, symmetric=True)


class SupConLoss(losses.SupConLoss):
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020), mean over nonzero losses, as the library's class."""

    def covers(self, count: int) -> bool:
        """Whether :meth:`of_views` equals the original for ``count`` samples.

        At low temperatures many losses are tiny, and rounding decides which are greater than zero.
        """
        reducer = self.reducer
        return (
            _plain(self, reducers.AvgNonZeroReducer)
            and (reducer.low, reducer.high) == (0, None)
            and positive(self.temperature)
            and self.temperature >= 0.1
        )

    def of_views(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Compute the loss, a scalar, of two views (N, dim)."""
        values = ops.contrastive_loss(
            embeddings, ref_emb, temperature=self.temperature, symmetric=True, reduction="none"
        )
        counted = values > 0
        return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """Applies a loss to two views of a batch, as the library's class; rows of equal index are positives."""

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Compute the loss of two views (N, dim), any floating dtype; the library's errors apply."""
        # isinstance would accept subclasses, which may compute something else.
        if (
            self.symmetric
            and type(self.loss) in (NTXentLoss, SupConLoss)
            and matching(embeddings, ref_emb)
            and embeddings.dtype == ref_emb.dtype
            and embeddings.shape[0] > 0
            and self.loss.covers(embeddings.shape[0])
        ):
            return self.loss.of_views(embeddings, ref_emb)
        return super().forward(embeddings, ref_emb)
