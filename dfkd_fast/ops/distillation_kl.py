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
    """KL(softmax(a) || softmax(b)), and five numbers per row for backward."""
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
    """KL divergence between the softened class probabilities, times temperature squared (paper, Eq. 2; Hinton et al.).

    With p = softmax(teacher / temperature) and q = softmax(student / temperature)::

        "forward"  KL(p || q) = sum over classes of p (log p - log q)
        "reverse"  KL(q || p) = sum over classes of q (log q - log p)

    A class whose first probability is zero adds zero, whatever the second is (``0 log 0 = 0``), so classes masked with
    logits of minus infinity on both sides drop out, where torch's ``kl_div`` gives NaN.

    Args:
        student_logits: (N, classes), float16, bfloat16, float32 or float64; N may be 0.
        teacher_logits: (N, classes), any floating dtype.
        temperature: above 0.
        direction: which of the two.
        reduction: as ``torch.nn.functional.kl_div``: "batchmean" divides the sum by N, "mean" by N times classes, both
            NaN for N = 0; "none" is (N, classes), the terms of the sum.
        squared: times temperature squared, which keeps gradients of one size; False leaves that out.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar or (N, classes), in float32 (float64 where an input is). Differentiable in both tensors.

    Raises:
        TypeError: an argument is no floating-point tensor, or temperature is no number.
        ValueError: shapes or devices that do not agree, temperature <= 0, an unknown direction, reduction or backend.
        RuntimeError: the backend asked for cannot serve these arguments.
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
