"""The distillation loss on logits: the public function."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import distillation_kl as reference

__all__ = ["distillation_kl"]


def _allocate_forward(a: Tensor, b: Tensor, temperature: float, squared: bool, reduction: str) -> tuple[Tensor, Tensor]:
    shape = a.shape if reduction == "none" else ()
    return a.new_empty(shape, dtype=torch.float32), a.new_empty((5, a.shape[0]), dtype=torch.float32)


def _launch_forward(*arguments: Any) -> None:
    from dfkd_fast.kernels import distillation_kl as kernels

    kernels.forward(*arguments)


def _allocate_backward(
    upstream: Tensor,
    a: Tensor,
    b: Tensor,
    saved: Tensor,
    temperature: float,
    squared: bool,
    reduction: str,
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(a) if want_a else a.new_empty(0),
        torch.empty_like(b) if want_b else b.new_empty(0),
    )


def _launch_backward(*arguments: Any) -> None:
    from dfkd_fast.kernels import distillation_kl as kernels

    kernels.backward(*arguments)


_forward = operator(
    "distillation_kl(Tensor a, Tensor b, float temperature, bool squared, str reduction) -> (Tensor, Tensor)",
    _allocate_forward,
    _launch_forward,
)
_backward = operator(
    "distillation_kl_backward(Tensor upstream, Tensor a, Tensor b, Tensor saved, float temperature, bool squared, "
    "str reduction, bool want_a, bool want_b) -> (Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


class _DistillationKL(FusedFunction):
    """KL(softmax(a) || softmax(b)), and what backward needs of it."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, temperature: float, squared: bool, reduction: str) -> tuple[Tensor, Tensor]:
        return _forward(a, b, temperature, squared, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, b, ctx.temperature, ctx.squared, ctx.reduction = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(a, b, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        a, b, saved = ctx.saved_tensors
        want_a, want_b, *_ = ctx.needs_input_grad
        da, db = _backward(upstream, a, b, saved, ctx.temperature, ctx.squared, ctx.reduction, want_a, want_b)
        gradients = no_second_derivative(
            "distillation_kl", (da if want_a else None, db if want_b else None), upstream, a, b
        )
        return *gradients, None, None, None


def _triton(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    direction: str,
    reduction: str,
    squared: bool,
) -> Tensor:
    a, b = (teacher_logits, student_logits) if direction == "forward" else (student_logits, teacher_logits)
    return _DistillationKL.apply(a, b, float(temperature), squared, reduction)[0]


def _served(student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> str | None:
    return unserved(student_logits, teacher_logits)


register("distillation_kl", "reference", reference.distillation_kl)
register("distillation_kl", "triton", _triton, _served)


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
    return dispatch(
        "distillation_kl",
        backend,
        student_logits,
        teacher_logits,
        temperature=temperature,
        direction=direction,
        reduction=reduction,
        squared=bool(squared),
    )
