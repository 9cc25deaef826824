"""What the references share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["match_memory_format", "pointwise", "upcast"]


def upcast(x: Tensor) -> Tensor:
    """The type of sums, exponentials and products: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix (out, in) applied to each position of (N, in, H, W), in the autocast type, else in that of x.

    A convolution rather than a matmul, because it reads and writes channels-last maps as they lie.
    """
    return F.conv2d(x, weight.to(x.dtype)[:, :, None, None])


def match_memory_format(y: Tensor, x: Tensor) -> Tensor:
    """y, channels-last if x is. A map with one channel on the way fits both formats, and the format gets lost there."""
    if x.stride(1) == 1 and y.stride(1) != 1:
        return y.contiguous(memory_format=torch.channels_last)
    return y
