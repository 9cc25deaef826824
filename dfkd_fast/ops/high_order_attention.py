"""Mixed high-order attention: the public function and the map alone."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_tensor
from dfkd_fast.reference import high_order_attention as reference

__all__ = ["high_order_attention", "high_order_attention_map"]

register("high_order_attention", "reference", reference.high_order_attention)
register("high_order_attention_map", "reference", reference.high_order_attention_map)


def high_order_attention(
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    *,
    mode: Literal["joint", "per_order"] = "joint",
    backend: str | None = None,
) -> Tensor:
    """Features gated by a polynomial of themselves: ``y = A * x`` (paper, section 3.3; Chen et al., ICCV 2019).

    Order r multiplies r linear maps of each position's features, and a sigmoid of the rectified products is the gate::

        z_r = prod over i = 1..r of proj_{r,i} x           l_r = out_r relu(z_r)
        A   = sigmoid(sum over r of l_r)                    "joint" (the paper's figure 3)
        A   = mean over r of sigmoid(l_r)                   "per_order" (Chen et al.)

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        proj_weight: (R(R+1)/2, K, C), any floating dtype, factors ordered (1, 1), (2, 1), (2, 2), (3, 1), ...
        out_weight: (R, C, K), any floating dtype.
        mode: one sigmoid over all orders, or the mean of one an order.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        y, (N, C, H, W), in the dtype and memory format of x. The two matrix products run in the autocast type, without
        autocast in that of x; products of maps and the sigmoid in float32 (float64 for float64). Differentiable in all
        three tensors.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices that do not agree, an unknown mode or backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    _check(x, proj_weight, out_weight, mode)
    return dispatch("high_order_attention", backend, x, proj_weight, out_weight, mode=mode)


def high_order_attention_map(
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    *,
    mode: Literal["joint", "per_order"] = "joint",
    backend: str | None = None,
) -> Tensor:
    """The gate A of :func:`high_order_attention` alone, each value in [0, 1].

    Args:
        x: (N, C, H, W).
        proj_weight: (R(R+1)/2, K, C).
        out_weight: (R, C, K).
        mode: as there.
        backend: as there.

    Returns:
        A, (N, C, H, W), in the dtype and memory format of x. Differentiable in all three tensors.

    Raises:
        TypeError: as there.
        ValueError: as there.
        RuntimeError: as there.
    """
    _check(x, proj_weight, out_weight, mode)
    return dispatch("high_order_attention_map", backend, x, proj_weight, out_weight, mode=mode)


def _check(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str) -> None:
    require_tensor("x", x, ("N", "C", "H", "W"))
    require_tensor("out_weight", out_weight, ("R", "C", "K"), ("x", x), C=x.shape[1])
    order, _, hidden = out_weight.shape
    require_tensor(
        "proj_weight",
        proj_weight,
        ("R(R+1)/2", "K", "C"),
        ("x", x),
        **{"R(R+1)/2": order * (order + 1) // 2, "K": hidden, "C": x.shape[1]},
    )
    require_choice("mode", mode, ("joint", "per_order"))
