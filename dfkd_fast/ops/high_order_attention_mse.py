"""Mean squared error between features gated by high-order attention and a target."""

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
    """Allocate the error. Backward recomputes the gated features from x."""
    return x.new_empty((), dtype=torch.float32)


_fused = fused_op(
    "high_order_attention_mse",
    _allocate,
    constants=("target",),
    new_gradient=new_gradient,
    triton=("high_order_attention_mse.forward", "high_order_attention_mse.backward"),
)


register("high_order_attention_mse", "reference", reference.high_order_attention_mse)
register(
    "high_order_attention_mse",
    "triton",
    lambda x, proj, out, target, *, mode: _fused["triton"](x, *product_weights(x, proj, out), target, mode),
    lambda x, proj, out, target, *, mode: unsupported_reason(x, target) or unsupported_order(out),
)


def high_order_attention_mse(
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    target: Tensor,
    *,
    mode: Literal["joint", "per_order"] = "joint",
    backend: str | None = None,
) -> Tensor:
    """Compute the mean squared error of ``high_order_attention`` to a target: one stage of L_MHAD (paper, Eq. 7).

    With A the gate of :func:`~dfkd_fast.ops.high_order_attention`, where R and K are defined::

        mean over all elements of (A * x - target)^2

    where ``A * x`` is not rounded to the dtype of x. Fused backends never write ``A * x`` to memory.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        proj_weight: (R(R+1)/2, K, C), any floating dtype.
        out_weight: (R, C, K), any floating dtype.
        target: (N, C, H, W), any floating dtype; must not require a gradient.
        mode: "joint" or "per_order", as in :func:`~dfkd_fast.ops.high_order_attention`.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar, float32 (float64 if x is), NaN if N = 0. Differentiable with respect to x and both weights.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor.
        ValueError: shapes or devices do not match, target requires a gradient, or mode or backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_arguments(x, proj_weight, out_weight, mode)
    n, channels, height, width = x.shape
    require_tensor("target", target, ("N", "C", "H", "W"), ("x", x), N=n, C=channels, H=height, W=width)
    if target.requires_grad:
        raise ValueError("target requires a gradient, which this op does not compute: pass target.detach()")
    return dispatch("high_order_attention_mse", backend, x, proj_weight, out_weight, target, mode=mode)
