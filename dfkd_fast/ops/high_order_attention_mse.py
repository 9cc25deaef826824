"""The error of attended features to a target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.custom_op import fused_op, unsupported_reason
from dfkd_fast.ops.high_order_attention import new_gradient, product_weights, require_arguments, unsupported_order
from dfkd_fast.reference import high_order_attention_mse as reference

__all__ = ["high_order_attention_mse"]


def _allocate(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, mode: str) -> Tensor:
    """The error; backward recomputes the attended features from x."""
    return x.new_empty((), dtype=torch.float32)


_fused = fused_op(
    "high_order_attention_mse",
    _allocate,
    constants=("target",),
    new_gradient=new_gradient,
    triton=("high_order_attention_mse.forward", "high_order_attention_mse.backward"),
)


def _triton(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, *, mode: str) -> Tensor:
    return _fused["triton"](x, *product_weights(x, proj_weight, out_weight), target, mode)


def _unsupported(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, *, mode: str) -> str | None:
    return unsupported_reason(x, target) or unsupported_order(out_weight)


register("high_order_attention_mse", "reference", reference.high_order_attention_mse)
register("high_order_attention_mse", "triton", _triton, _unsupported)


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
