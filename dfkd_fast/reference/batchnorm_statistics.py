"""BatchNorm with batch statistics in plain PyTorch. Formulas: :func:`dfkd_fast.ops.batchnorm_statistics`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.reference.common import contiguous, one_format, upcast

__all__ = ["batchnorm_statistics", "channel_statistics"]


def batchnorm_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str,
    residual: Tensor | None,
    fork: bool,
) -> tuple[Tensor, ...]:
    """Normalize x (N, C, ...) with running statistics; also return its mean and biased variance."""
    upcast_x = upcast(x)
    mean, var, scale, shift = contiguous((running_mean, running_var, weight, bias), upcast_x.dtype)
    y = F.batch_norm(one_format(upcast_x), mean, var, scale, shift, training=False, eps=eps)
    if residual is not None:
        y = y + residual
    if activation == "relu":
        y = y.relu()
    elif activation == "relu6":
        y = F.relu6(y)
    y = y.to(x.dtype)
    return (*([y] * (1 + fork)), *channel_statistics(upcast_x))


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of each channel of (N, C, ...)."""
    upcast_x = upcast(x)
    # Two passes, because E[x^2] - E[x]^2 cancels. torch.var_mean is ten times slower on the CPU.
    others = [dim for dim in range(x.ndim) if dim != 1]
    mean = upcast_x.mean(others, keepdim=True)
    return mean.flatten(), (upcast_x - mean).square().mean(others)
