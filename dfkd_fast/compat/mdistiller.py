"""Losses of mdistiller (megvii-research/mdistiller, ``distillers/KD.py`` and ``distillers/AT.py``)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import covered, softened_kl, stage_distance

__all__ = ["COVERAGE", "at_loss", "kd_loss", "single_stage_at_loss"]

COVERAGE = (
    Case("kd_loss", "two (N, classes) tensors of logits", "distillation_kl"),
    Case("kd_loss", "other shapes", None),
    Case("single_stage_at_loss", "always", None),
    Case("at_loss", "always", None),
)


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Compute KL(teacher || student) times temperature squared, summed over classes (Hinton et al., arXiv:1503.02531).

    Args:
        logits_student: (N, classes, ...), any floating dtype; the mean is over all dimensions except classes.
        logits_teacher: same shape as logits_student.
        temperature: temperature of both softmaxes.

    Raises:
        RuntimeError: the shapes cannot be broadcast.
    """
    if covered(logits_student, logits_teacher, temperature):
        return softened_kl(logits_student, logits_teacher, temperature, "batchmean")
    # With more than two dimensions, "batchmean" would divide only by N.
    return softened_kl(logits_student, logits_teacher, temperature, "none").sum(1).mean()


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """Compute attention transfer for one stage (Zagoruyko and Komodakis, ICLR 2017).

    Args:
        f_s: the student's features (N, C, H, W), any floating dtype.
        f_t: the teacher's features (N, C, H, W); C and H may differ.
        p: power of the features.

    Raises:
        RuntimeError: the batch sizes differ.
    """
    return stage_distance(f_s, f_t, p)


def at_loss(g_s: Iterable[Tensor], g_t: Iterable[Tensor], p: float) -> Tensor | int:
    """Return the sum of :func:`single_stage_at_loss` over pairs of stages, with the same errors; 0 without pairs."""
    return sum(single_stage_at_loss(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t, strict=False))
