"""Mixed high-order attention in plain PyTorch. Formulas: :func:`dfkd_fast.ops.high_order_attention`."""

from __future__ import annotations

from functools import reduce
from operator import mul

import torch
from torch import Tensor

from dfkd_fast.reference.common import match_memory_format, pointwise, upcast

__all__ = ["attention", "high_order_attention", "high_order_attention_map"]


def high_order_attention(x: Tensor, proj_weight: Tensor, out_weight: Tensor, *, mode: str) -> Tensor:
    """Return ``A * x`` for x (N, C, H, W), proj_weight (R(R+1)/2, K, C) and out_weight (R, C, K)."""
    return match_memory_format((upcast(x) * attention(x, proj_weight, out_weight, mode)).to(x.dtype), x)


def high_order_attention_map(x: Tensor, proj_weight: Tensor, out_weight: Tensor, *, mode: str) -> Tensor:
    """Return the gate A."""
    return match_memory_format(attention(x, proj_weight, out_weight, mode).to(x.dtype), x)


def attention(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str) -> Tensor:
    """Return the gate A in float32, or float64 for float64."""
    factors, order = proj_weight.shape[0], out_weight.shape[0]
    # One matrix product with stacked rows computes all projections.
    projected = pointwise(x, proj_weight.flatten(0, 1))
    maps = upcast(projected).chunk(factors, dim=1)
    rectified = []
    for r in range(1, order + 1):
        first = r * (r - 1) // 2
        # The factors are multiplied in turn, because the gradient of torch.prod searches for zeros.
        rectified.append(reduce(mul, maps[first : first + r]).relu().to(projected.dtype))
    if mode == "joint":
        # One matrix product with stacked columns also sums over the orders r.
        return upcast(pointwise(torch.cat(rectified, dim=1), out_weight.transpose(0, 1).flatten(1))).sigmoid()
    gates = [upcast(pointwise(each, out)).sigmoid() for each, out in zip(rectified, out_weight.unbind(), strict=True)]
    return sum(gates[1:], gates[0]) / order
