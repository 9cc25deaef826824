"""BatchNorm with residual and activation in plain PyTorch. Formulas: :func:`dfkd_fast.ops.batch_norm_act`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.collectives import Group, differentiable_all_gather
from dfkd_fast.reference.batchnorm_statistics import channel_statistics
from dfkd_fast.reference.common import contiguous, one_format, upcast

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
    fork: bool,
    group: Group | None = None,
) -> Any:
    """Normalize x (N, C, ...), add the residual and activate; in training, update the running statistics."""
    vectors = (running_mean, running_var, weight, bias)
    # F.batch_norm requires vectors of one dtype: that of x, or float32 for half precision.
    dtype = torch.promote_types(x.dtype, torch.float32)
    if {v.dtype for v in vectors if v is not None} == {x.dtype}:
        dtype = x.dtype
    mean, var, scale, shift = contiguous(vectors, dtype)
    # For channels-last maps with few channels, PyTorch's kernel for CPUs is up to 60 times slower.
    copied = x.device.type == "cpu" and x.ndim == 4 and x.stride(1) == 1 < x.shape[1] < 8
    given = x.contiguous() if copied else one_format(x)
    if group is None:
        y = F.batch_norm(given, mean, var, scale, shift, training, momentum, eps)
    else:
        y = _normalize(given, mean, var, scale, shift, momentum, eps, group)
    if copied:  # vmap does not support y.contiguous(memory_format=torch.channels_last)
        y = y.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
    for buffer, updated in ((running_mean, mean), (running_var, var)):
        if buffer is None or updated is None or not training:
            continue
        if buffer.dtype != dtype or not buffer.is_contiguous():
            buffer.copy_(updated)
    if residual is not None:
        y = one_format((y + residual).to(x.dtype))
    if activation != "none":  # in place if the backward then still knows the sign
        in_place = activation == "relu" or negative_slope > 0
        y = F.relu(y, in_place) if activation == "relu" else F.leaky_relu(y, negative_slope, in_place)
    return (y, y) if fork else y


def _normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Group,
) -> Tensor:
    """``F.batch_norm`` in training, with the statistics of all processes of a group."""
    upcast_x, shape = upcast(x), (1, -1, *[1] * (x.ndim - 2))
    means, variances = differentiable_all_gather(torch.stack(channel_statistics(x)), group).unbind(1)
    mean = means.mean(0)
    var = (variances + (means - mean).square()).mean(0)
    count = group.size * x.numel() // x.shape[1]
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.mul_(1 - momentum).add_(new, alpha=momentum)
    y = (upcast_x - mean.view(shape)) * (var + eps).rsqrt().view(shape)
    y = y if weight is None else y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)
