"""Losses and hook of CPSC-DFKD (RoryShao/CPSC-DFKD, ``metric/loss.py`` and ``metric/DeepInversion.py``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import input_distance, softened_kl
from dfkd_fast.compat._contrast import SupervisedContrast
from dfkd_fast.compat.deepinversion import DeepInversionFeatureHook as _FeatureHook

__all__ = ["COVERAGE", "DeepInversionFeatureHook", "SupConLoss", "kdloss"]

COVERAGE = (
    Case("kdloss", "logits (N, classes) of one shape", "distillation_kl"),
    Case("kdloss", "other shapes", None),
    Case("SupConLoss", 'two views, no labels, no mask, contrast_mode "all"', "contrastive_loss"),
    Case("SupConLoss", 'two views, no labels, no mask, contrast_mode "one"', "contrastive_loss"),
    Case("SupConLoss", "labels", None),
    Case("SupConLoss", "mask", None),
    Case("SupConLoss", "another number of views", None),
    Case("DeepInversionFeatureHook", "maps (N, C, H, W)", "statistics_distance"),
)


class SupConLoss(SupervisedContrast):
    """Supervised contrastive loss; without labels and mask that of SimCLR.

    The features are compared as they are: CPSC-DFKD does not normalise them.

    Args:
        temperature: of the similarities.
        contrast_mode: "all" views are anchors, or the first "one".
        base_temperature: the loss is scaled by temperature / base_temperature.
        device: kept, and not needed: everything is computed where the features are.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        device: str = "cuda:0",
    ) -> None:
        super().__init__(temperature, contrast_mode, base_temperature)
        self.device = device

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Features (N, views, ...), and labels (N,) or a mask (N, N) of positives, to a scalar.

        Raises:
            ValueError: fewer than three dimensions; labels and mask; labels of another number; an unknown mode.
            IndexError: N = 0.
        """
        return self.contrast(features, labels, mask, reduction="mean")[0]


def kdloss(y: Tensor, teacher_scores: Tensor) -> Tensor:
    """KL(teacher || student) of logits (N, classes) without a temperature, summed over classes, mean over N."""
    return softened_kl(y, teacher_scores, 1, "batchmean")


class DeepInversionFeatureHook(_FeatureHook):
    """As that of :mod:`dfkd_fast.compat.deepinversion`, with the stored statistics in the type of the batch's."""

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.r_feature = input_distance(input[0], module.running_mean, module.running_var, moved=True)
