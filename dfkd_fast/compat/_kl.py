"""KL divergence of softened class probabilities, as the projects write it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.compat._checks import alike, floating, positive

__all__ = ["covered", "kl_div", "softened_kl"]


def covered(student: Any, teacher: Any, temperature: Any, reduction: Any = "batchmean") -> bool:
    """Whether :func:`dfkd_fast.ops.distillation_kl` computes it: logits (N, classes) of one shape, T above zero."""
    return (
        floating(student, 2)
        and floating(teacher, 2)
        and alike(student, teacher)
        and positive(temperature)
        and reduction in ("batchmean", "sum", "mean", "none")
    )


def softened_kl(student: Tensor, teacher: Tensor, temperature: Any, reduction: Any, *, squared: bool = True) -> Tensor:
    """KL(teacher || student) along dimension 1.

    Args:
        student: (N, classes, ...) logits.
        teacher: likewise.
        temperature: of both softmaxes.
        reduction: as that of ``torch.nn.functional.kl_div``.
        squared: times temperature squared.
    """
    if covered(student, teacher, temperature, reduction):
        return ops.distillation_kl(student, teacher, temperature=temperature, reduction=reduction, squared=squared)
    log_q = F.log_softmax(student / temperature, dim=1)
    loss = kl_div(log_q, F.softmax(teacher / temperature, dim=1), reduction)
    return loss * temperature**2 if squared else loss


def kl_div(log_q: Tensor, p: Tensor, reduction: Any) -> Tensor:
    """That of PyTorch, which warns of its "mean"; here it is what a caller of the originals has asked for."""
    if reduction == "mean":
        return F.kl_div(log_q, p, reduction="none").mean()
    return F.kl_div(log_q, p, reduction=reduction)
