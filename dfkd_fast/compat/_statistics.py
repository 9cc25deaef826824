"""Statistics of a BatchNorm's input, and their distance to the stored ones (Yin et al., CVPR 2020, Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.compat._checks import floating

__all__ = ["distance", "input_statistics"]


def input_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,), of maps (N, C, H, W); other shapes raise what they raise in PyTorch."""
    if floating(x, 4):
        return ops.channel_statistics(x)
    return x.mean([0, 2, 3]), x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False)


def distance(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Euclidean distance of the variances plus that of the means."""
    return torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)
