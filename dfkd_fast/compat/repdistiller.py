"""Losses of RepDistiller (HobbitLong/RepDistiller, ``distiller_zoo/KD.py`` and ``distiller_zoo/AT.py``)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import activation_map, softened_kl, stage_distance

__all__ = ["COVERAGE", "Attention", "DistillKL"]

COVERAGE = (
    Case("DistillKL", "two (N, classes) tensors of logits", "distillation_kl"),
    Case("DistillKL", "other shapes", None),
    Case("Attention", "always", None),
)


class DistillKL(nn.Module):
    """Distillation loss on logits (Hinton et al., arXiv:1503.02531).

    Args:
        T: temperature of both softmaxes.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """Compute KL(teacher || student) times T squared, mean over N, of logits (N, classes), any floating dtype.

        Raises:
            RuntimeError: the shapes cannot be broadcast.
        """
        return softened_kl(y_s, y_t, self.T, "batchmean")


class Attention(nn.Module):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017).

    Args:
        p: power of the features; the attention of a position is the mean of these powers over channels.
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Iterable[Tensor], g_t: Iterable[Tensor]) -> list[Tensor]:
        """Return one loss per pair of stages (N, C, H, W), any floating dtype, of student and teacher.

        Raises:
            RuntimeError: the batch sizes of a pair differ.
        """
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Compute the loss of one pair of stages, as in :meth:`forward`; channels and heights may differ."""
        return stage_distance(f_s, f_t, self.p)

    def at(self, f: Tensor) -> Tensor:
        """Return the attention of features (N, C, H, W) as unit rows (N, H W)."""
        return activation_map(f, self.p)
