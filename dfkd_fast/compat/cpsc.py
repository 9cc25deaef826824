"""Losses and hooks of CPSC-DFKD (RoryShao/CPSC-DFKD, ``metric/loss.py`` and ``metric/DeepInversion.py``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import input_distance, softened_kl
from dfkd_fast.compat._contrast import SupervisedContrast
from dfkd_fast.compat.deepinversion import DeepInversionFeatureHook as _FeatureHook

__all__ = ["COVERAGE", "DeepInversionFeatureHook", "SupConLoss", "kdloss"]

COVERAGE = (
    Case("kdloss", "two (N, classes) tensors of logits", "distillation_kl"),
    Case("kdloss", "other shapes", None),
    Case("SupConLoss", 'two views, no labels, no mask, contrast_mode "all"', "contrastive_loss"),
    Case("SupConLoss", 'two views, no labels, no mask, contrast_mode "one"', "contrastive_loss"),
    Case("SupConLoss", "labels", None),
    Case("SupConLoss", "mask", None),
    Case("SupConLoss", "another number of views", None),
    Case("DeepInversionFeatureHook", "maps (N, C, H, W)", "statistics_distance"),
)


class SupConLoss(SupervisedContrast):
    """Supervised contrastive loss (Khosla et al., 2020); without labels and mask, the loss of SimCLR.

    The features are not normalized, as in CPSC-DFKD.

    Args:
        temperature: temperature of the similarities.
        contrast_mode: "all" uses all views as anchors, "one" the first.
        base_temperature: the loss is scaled by temperature / base_temperature.
        device: unused; the loss is computed on the features' device.
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
        """Compute the loss, a scalar, of floating-point features (N, views, ...) and labels (N,) or a mask (N, N).

        Raises:
            ValueError: features have fewer than three dimensions, both labels and mask are given, the number of labels
                is not N, or the mode is unknown.
            IndexError: N = 0.
        """
        return self.contrast(features, labels, mask, reduction="mean")[0]


def kdloss(y: Tensor, teacher_scores: Tensor) -> Tensor:
    """Compute KL(teacher || student) of logits (N, classes), any floating dtype, with temperature 1 and mean over N.

    Raises:
        RuntimeError: the shapes cannot be broadcast.
        IndexError: the logits have fewer than two dimensions.
    """
    return softened_kl(y, teacher_scores, 1, "batchmean")


class DeepInversionFeatureHook(_FeatureHook):
    """DeepInversion's hook of the same name, but it casts running statistics to the dtype of the batch statistics."""

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.r_feature = input_distance(input[0], module.running_mean, module.running_var, moved=True)
