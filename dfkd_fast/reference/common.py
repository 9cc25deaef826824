"""Functions shared by the reference implementations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contiguous", "match_memory_format", "one_format", "pointwise", "suggested_format", "upcast"]


def upcast(x: Tensor) -> Tensor:
    """Cast to float32, unless x is float64."""
    return x if x.dtype == torch.float64 else x.float()


def contiguous(vectors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cast the vectors of a BatchNorm; PyTorch's kernels on the CPU ignore their strides, for example in backward."""
    return [None if vector is None else vector.to(dtype).contiguous() for vector in vectors]


def suggested_format(x: Tensor) -> torch.memory_format | None:
    """Return the channels-last format if PyTorch's norms would regard the strides of x as channels-last, else None."""
    if x.ndim not in (4, 5) or x.shape[1] == 1 or all(size == 1 for size in x.shape[2:]):
        return None
    lower = 0
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if x.stride(dim) < lower:
            return None
        lower = x.stride(dim) * max(x.shape[dim], 1)
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def one_format(x: Tensor) -> Tensor:
    """Copy maps on the CPU that are channels-last except for the strides of sizes of 1.

    PyTorch's BatchNorm regards such maps as contiguous in one place and as channels-last in another, and computes wrong
    gradients.
    """
    if x.device.type != "cpu" or x.ndim not in (4, 5) or x.is_contiguous() or suggested_format(x) is not None:
        return x
    expected = 1
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if x.shape[dim] != 1 and x.stride(dim) != expected:
            return x
        expected *= x.shape[dim]
    return x.clone(memory_format=torch.contiguous_format)


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
