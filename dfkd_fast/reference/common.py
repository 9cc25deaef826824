"""Functions shared by the reference implementations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contiguous", "match_memory_format", "pointwise", "upcast"]


def upcast(x: Tensor) -> Tensor:
    """Cast to float32, unless x is float64."""
    return x if x.dtype == torch.float64 else x.float()


def contiguous(vectors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cast the vectors of a BatchNorm; PyTorch's kernels on the CPU ignore their strides, for example in backward."""
    return [None if vector is None else vector.to(dtype).contiguous() for vector in vectors]


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each position of x (N, in, H, W) by a matrix (out, in), in the autocast dtype or that of x.

    Uses a convolution, which reads and writes channels-last maps directly.
    """
    return F.conv2d(x, weight.to(x.dtype)[:, :, None, None])


def match_memory_format(y: Tensor, x: Tensor) -> Tensor:
    """Make y channels-last if x is, because an intermediate map with one channel loses the format."""
    if x.stride(1) == 1 and y.stride(1) != 1:
        return y.contiguous(memory_format=torch.channels_last)
    return y
