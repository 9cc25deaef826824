"""Losses of mdistiller (megvii-research/mdistiller, ``distillers/KD.py`` and ``distillers/AT.py``)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import covered, softened_kl, stage_distance

__all__ = ["COVERAGE", "at_loss", "kd_loss", "single_stage_at_loss"]

COVERAGE = (
    Case("kd_loss", "logits (N, classes) of one shape", "distillation_kl"),
    Case("kd_loss", "other shapes", None),
    Case("single_stage_at_loss", "always", None),
    Case("at_loss", "always", None),
)


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) times temperature squared, summed over dimension 1, mean over all others.

    Args:
        logits_student: (N, classes).
        logits_teacher: likewise.
        temperature: of both softmaxes.
    """
    if covered(logits_student, logits_teacher, temperature):
        return softened_kl(logits_student, logits_teacher, temperature, "batchmean")
    # Of more dimensions than two "batchmean" would be another mean.
    return softened_kl(logits_student, logits_teacher, temperature, "none").sum(1).mean()


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """Attention transfer of one stage (N, C, H, W); channels and heights may differ, p is the features' power."""
    return stage_distance(f_s, f_t, p)


def at_loss(g_s: Iterable[Tensor], g_t: Iterable[Tensor], p: float) -> Tensor | int:
    """Attention transfer summed over stages, paired in order; 0 where there are none."""
    return sum(single_stage_at_loss(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t, strict=False))
