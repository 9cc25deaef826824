"""BatchNorm with residual and activation in plain PyTorch. Formulas: :func:`dfkd_fast.ops.batch_norm_act`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["batch_norm_act"]


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    training: bool,
) -> Tensor:
    """Normalize x (N, C, ...), add the residual and activate; in training, update the running statistics."""
    vectors = (running_mean, running_var, weight, bias)
    dtypes = {v.dtype for v in vectors if v is not None}
    if dtypes not in ({x.dtype}, {torch.float32}) or (x.dtype == torch.float64 and torch.float32 in dtypes):
        # F.batch_norm requires vectors of one dtype.
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = tuple(None if v is None else v.to(dtype) for v in vectors)
    y = F.batch_norm(x, *vectors, training, momentum, eps)
    if training:
        for given, updated in zip((running_mean, running_var), vectors, strict=False):
            if given is not None and given is not updated:
                given.copy_(updated)
    if residual is not None:
        y = (y + residual).to(x.dtype)
    if activation == "relu":
        return F.relu(y)
    return F.leaky_relu(y, negative_slope) if activation == "leaky_relu" else y
