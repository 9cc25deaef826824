"""pytorch-metric-learning's contrastive losses, and the wrapper that pairs two views (2.9, ``losses``).

The classes are those of pytorch-metric-learning, which must be installed, with one call of theirs computed by an op:
``SelfSupervisedLoss(loss)(embeddings, ref_emb)``. Everything else, labels, pairs, distances, reducers and regularisers,
is the library's own code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.compat import Case
from dfkd_fast.compat._common import alike, floating, positive

try:
    from pytorch_metric_learning import distances, losses, reducers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dfkd_fast.compat.metric_learning extends pytorch-metric-learning: pip install pytorch-metric-learning",
        name=error.name,
    ) from error

__all__ = ["COVERAGE", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]

COVERAGE = (
    Case("SelfSupervisedLoss", "symmetric, of NTXentLoss with its defaults", "contrastive_loss"),
    Case("SelfSupervisedLoss", "symmetric, of SupConLoss with its defaults", "contrastive_loss"),
    Case("SelfSupervisedLoss", "not symmetric", None),
    Case("SelfSupervisedLoss", "of another loss", None),
    Case("SelfSupervisedLoss", "of a temperature so low that the original loses digits", None),
    Case("SelfSupervisedLoss", "of a loss with another distance, reducer or regulariser", None),
    Case("NTXentLoss", "labels or pairs", None),
    Case("SupConLoss", "labels or pairs", None),
)


def _plain(loss: Any, reducer: type) -> bool:
    """Whether a loss takes the cosine, averages as it does by default, and records and adds nothing."""
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
    """Normalised temperature-scaled cross entropy: each positive pair against the anchor's negatives."""

    def covers(self, count: int) -> bool:
        """Whether :meth:`of_views` gives what the original gives for so many samples.

        There the smallest normal number of float32, exp(-87), is added to each probability, so that no loss is above
        87. A probability is at least exp(-2 / temperature) / (2 count): above exp(-70) nothing can be seen of it.
        """
        return (
            _plain(self, reducers.MeanReducer)
            and positive(self.temperature)
            and 2 * count < math.exp(70 - 2 / self.temperature)
        )

    def of_views(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Two views (N, dim), each a positive of the other, to a scalar."""
        return ops.contrastive_loss(embeddings, ref_emb, temperature=self.temperature, symmetric=True)


class SupConLoss(losses.SupConLoss):
    """Supervised contrastive loss: the mean over an anchor's positives, then over anchors whose loss is above zero."""

    def covers(self, count: int) -> bool:
        """Whether :meth:`of_views` gives what the original gives for so many samples.

        Which losses are above zero is a matter of rounding where they are tiny, as they often are at low temperatures.
        """
        reducer = self.reducer
        return (
            _plain(self, reducers.AvgNonZeroReducer)
            and (reducer.low, reducer.high) == (0, None)
            and positive(self.temperature)
            and self.temperature >= 0.1
        )

    def of_views(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Two views (N, dim), each a positive of the other, to a scalar."""
        values = ops.contrastive_loss(
            embeddings, ref_emb, temperature=self.temperature, symmetric=True, reduction="none"
        )
        counted = values > 0
        return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """A loss of two views of a batch, of which row i of the one belongs to row i of the other."""

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Two views (N, dim) to what the wrapped loss gives for them."""
        # Not isinstance: a class that extends these may compute something else.
        ours = self.symmetric and type(self.loss) in (NTXentLoss, SupConLoss)
        if (
            ours
            and floating(embeddings, 2)
            and floating(ref_emb, 2)
            and alike(embeddings, ref_emb)
            and embeddings.dtype == ref_emb.dtype
            and embeddings.shape[0] > 0
            and self.loss.covers(embeddings.shape[0])
        ):
            return self.loss.of_views(embeddings, ref_emb)
        return super().forward(embeddings, ref_emb)
