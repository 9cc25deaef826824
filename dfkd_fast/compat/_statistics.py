"""Statistics of a BatchNorm's input, and their distance to the stored ones (Yin et al., CVPR 2020, Eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.compat._checks import floating

__all__ = ["distance", "input_distance", "input_statistics"]


def input_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,), of maps (N, C, H, W); other shapes raise what they raise in PyTorch."""
    if floating(x, 4):
        return ops.channel_statistics(x)
    return x.mean([0, 2, 3]), x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False)


def _stored(value: Any, x: Tensor) -> bool:
    """One number a channel of x, on its device."""
    return floating(value, 1) and value.shape[0] == x.shape[1] and value.device == x.device


def input_distance(x: Tensor, running_mean: Any, running_var: Any, *, moved: bool = False) -> Tensor:
    """Distance of the statistics of maps (N, C, H, W) to the stored ones, (C,); errors as above.

    Args:
        x: the maps.
        running_mean: the stored means, detached here.
        running_var: likewise.
        moved: whether the stored are first taken to the type and device of the maps' own.
    """
    if floating(x, 4) and _stored(running_mean, x) and _stored(running_var, x):
        return ops.statistics_distance(x, running_mean, running_var)
    mean, var = input_statistics(x)
    running_mean, running_var = running_mean.detach(), running_var.detach()
    if moved:
        running_mean, running_var = running_mean.to(mean), running_var.to(var)
    return distance(running_mean, running_var, mean, var)


def distance(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Euclidean distance of the variances plus that of the means."""
    return torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)
