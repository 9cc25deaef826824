"""Spatial attention gating in plain PyTorch. Formulas: :func:`dfkd_fast.ops.spatial_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast.reference.common import match_memory_format, pointwise, upcast

__all__ = ["spatial_attention"]


def spatial_attention(
    features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, form: str
) -> Tensor:
    """Gate features (N, C, H, W) by the softmax of weight (C, K) times hidden (N, K, H, W) plus bias (C,)."""
    if form == "channel":
        logits = upcast(pointwise(hidden, weight))
        if bias is not None:
            logits = logits + upcast(bias)[:, None, None]
        gate = scale * logits.softmax(1)
    else:
        if bias is not None:
            # The softmax does not depend on the bias, and leaving the bias out keeps precision. Its gradient is exactly
            # zero: the product of 0 and an infinite gradient would be NaN.
            weight = torch.where(torch.zeros_like(weight, dtype=torch.bool), bias[:, None], weight)
        logits = upcast(pointwise(hidden, weight))
        softmax = logits.flatten(2).softmax(-1).view_as(logits)
        positions = logits.shape[2] * logits.shape[3]
        gate = (scale * positions if form == "spatial_mean1" else scale) * softmax
    f = upcast(features)
    if f.device.type == "cpu":  # PyTorch multiplies maps of two formats slowly there
        gate = match_memory_format(gate, features)
    # f * (1 + gate) would lose most digits of a small gate.
    return match_memory_format((f + f * gate).to(features.dtype), features)
