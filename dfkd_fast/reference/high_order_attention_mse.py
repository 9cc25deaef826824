"""Error of gated features in plain PyTorch. Formulas: :func:`dfkd_fast.ops.high_order_attention_mse`."""

from __future__ import annotations

from torch import Tensor

from dfkd_fast.reference.common import upcast
from dfkd_fast.reference.high_order_attention import attention

__all__ = ["high_order_attention_mse"]


def high_order_attention_mse(
    x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, *, mode: str
) -> Tensor:
    """Return the mean of ``(A * x - target)^2`` for x and target (N, C, H, W)."""
    attended = upcast(x) * attention(x, proj_weight, out_weight, mode)
    return (attended - target.to(attended.dtype)).square().mean()
