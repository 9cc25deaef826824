"""The distillation loss on logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.custom_op import fused_op, unsupported_reason
from dfkd_fast.reference import distillation_kl as reference

__all__ = ["distillation_kl"]


def _allocate(a: Tensor, b: Tensor, temperature: float, squared: bool, reduction: str) -> tuple[Tensor, Tensor]:
    """Allocate KL(softmax(a) || softmax(b)) and five values per row for backward (see kernels/distillation_kl.py)."""
    shape = a.shape if reduction == "none" else ()
    return a.new_empty(shape, dtype=torch.float32), a.new_empty((5, a.shape[0]), dtype=torch.float32)


_fused = fused_op("distillation_kl", _allocate, triton=("distillation_kl.forward", "distillation_kl.backward"))


def _triton(student_logits: Tensor, teacher_logits: Tensor, *, direction: str, **options: Any) -> Tensor:
    sides = (teacher_logits, student_logits) if direction == "forward" else (student_logits, teacher_logits)
    return _fused["triton"](*sides, **options)


register("distillation_kl", "reference", reference.distillation_kl)
register("distillation_kl", "triton", _triton, lambda *logits, **options: unsupported_reason(*logits))


def distillation_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    reduction: Literal["batchmean", "sum", "mean", "none"] = "batchmean",
    squared: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Compute the KL divergence of softened class probabilities (paper, Eq. 2; Hinton et al., arXiv:1503.02531).

    With p = softmax(teacher / temperature) and q = softmax(student / temperature)::

        "forward"  KL(p || q) = sum over classes of p (log p - log q)
        "reverse"  KL(q || p) = sum over classes of q (log q - log p)

    A class whose leading factor (p, or q if reverse) is 0 contributes 0, as ``0 log 0 = 0``. Classes masked in both
    tensors with logits of minus infinity therefore have no effect; torch's ``kl_div`` gives NaN for them.

    Args:
        student_logits: (N, classes), float16, bfloat16, float32 or float64; N may be 0.
        teacher_logits: (N, classes), any floating dtype.
        temperature: greater than 0.
        direction: "forward" or "reverse".
        reduction: as in ``torch.nn.functional.kl_div``: "batchmean" divides the sum by N, "mean" by N times classes,
            both NaN if N = 0; "none" returns the terms of the sum, (N, classes).
        squared: multiply by temperature squared, so that the size of the gradients hardly depends on the temperature.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar or (N, classes), float32 (float64 if an input is). Differentiable with respect to both tensors.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor, or temperature is not a number.
        ValueError: shapes or devices do not match, temperature is not positive, or an option is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("student_logits", student_logits, ("N", "classes"))
    count, classes = student_logits.shape
    like = ("student_logits", student_logits)
    require_tensor("teacher_logits", teacher_logits, ("N", "classes"), like, N=count, classes=classes)
    require_number("temperature", temperature, above=0)
    require_choice("direction", direction, ("forward", "reverse"))
    require_choice("reduction", reduction, ("batchmean", "sum", "mean", "none"))
    options = {"temperature": temperature, "direction": direction, "reduction": reduction, "squared": bool(squared)}
    return dispatch("distillation_kl", backend, student_logits, teacher_logits, **options)
