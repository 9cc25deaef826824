"""The error of attended features to a target: the public function."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.high_order_attention import (
    allocate_gradients,
    product_weights,
    require_arguments,
    unserved_order,
)
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import high_order_attention_mse as reference

__all__ = ["high_order_attention_mse"]


def _allocate(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, mode: str) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _launch(*arguments: Any) -> None:
    from dfkd_fast.kernels import high_order_attention_mse as kernels

    kernels.forward(*arguments)


def _allocate_backward(
    upstream: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    target: Tensor,
    mode: str,
    want_x: bool,
    want_proj: bool,
    want_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_gradients(x, proj_weight, out_weight, want_x, want_proj, want_out)


def _launch_backward(*arguments: Any) -> None:
    from dfkd_fast.kernels import high_order_attention_mse as kernels

    kernels.backward(*arguments)


_forward = operator(
    "high_order_attention_mse(Tensor x, Tensor proj_weight, Tensor out_weight, Tensor target, str mode) -> Tensor",
    _allocate,
    _launch,
)
_backward = operator(
    "high_order_attention_mse_backward(Tensor upstream, Tensor x, Tensor proj_weight, Tensor out_weight, "
    "Tensor target, str mode, bool want_x, bool want_proj, bool want_out) -> (Tensor, Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


class _HighOrderAttentionMSE(FusedFunction):
    """The error; backward computes the maps anew from x."""

    @staticmethod
    def forward(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, mode: str) -> Tensor:
        return _forward(x, proj_weight, out_weight, target, mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.mode = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        wanted = ctx.needs_input_grad[:3]
        computed = _backward(upstream, *ctx.saved_tensors, ctx.mode, *wanted)
        gradients = [g if want else None for g, want in zip(computed, wanted, strict=True)]
        return *no_second_derivative("high_order_attention_mse", gradients, upstream, *ctx.saved_tensors), None, None


def _triton(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, *, mode: str) -> Tensor:
    return _HighOrderAttentionMSE.apply(x, *product_weights(x, proj_weight, out_weight), target, mode)


def _served(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, *, mode: str) -> str | None:
    return unserved(x, target) or unserved_order(out_weight)


register("high_order_attention_mse", "reference", reference.high_order_attention_mse)
register("high_order_attention_mse", "triton", _triton, _served)


def high_order_attention_mse(
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    target: Tensor,
    *,
    mode: Literal["joint", "per_order"] = "joint",
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of ``high_order_attention(x, ...)`` to a target: one stage of L_MHAD (paper, Eq. 7).

    With A the gate of :func:`~dfkd_fast.ops.high_order_attention`::

        mean over all elements of (A * x - target)^2

    where ``A * x`` is not rounded to the dtype of x. Fused backends never write it, forward or backward.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        proj_weight: (R(R+1)/2, K, C), any floating dtype.
        out_weight: (R, C, K), any floating dtype.
        target: (N, C, H, W), any floating dtype: a constant, which gets no gradient.
        mode: as there.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar, in float32 (float64 where x is), NaN for N = 0. Differentiable in x and both weights.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices that do not agree, a target that requires a gradient, an unknown mode or backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_arguments(x, proj_weight, out_weight, mode)
    n, channels, height, width = x.shape
    require_tensor("target", target, ("N", "C", "H", "W"), ("x", x), N=n, C=channels, H=height, W=width)
    if target.requires_grad:
        raise ValueError("target requires a gradient, but is a constant here and would get none: pass target.detach()")
    return dispatch("high_order_attention_mse", backend, x, proj_weight, out_weight, target, mode=mode)
