"""2 x 2 max pooling and its inverse in plain PyTorch. See :func:`dfkd_fast.ops.max_pool2x2`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["max_pool2x2", "max_unpool2x2", "memory_format"]


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of results for maps x: channels-last if x is, even with gaps.

    Maps with one channel or one position fit both formats. Their strides decide, as in PyTorch.
    """
    channels_last = x.stride(1) == 1 and x.stride(3) >= x.shape[1]
    return torch.channels_last if channels_last else torch.contiguous_format


def _with_format(y: Tensor, form: torch.memory_format) -> Tensor:
    # y.contiguous would return a map that fits both formats unchanged, possibly with strides of the other format.
    return y if memory_format(y) == form else y.clone(memory_format=form)


def max_pool2x2(x: Tensor, *, relu: bool) -> tuple[Tensor, Tensor]:
    """Return the maximum of each 2 x 2 window of x (N, C, H, W) and its code."""
    y, index = F.max_pool2d(F.relu(x) if relu else x, 2, return_indices=True)
    width = x.shape[3]
    code = (2 * (index // width % 2) + index % width % 2).to(torch.uint8)
    if relu:
        code = code.masked_fill(y <= 0, 4)
    form = memory_format(x)
    return _with_format(y, form), _with_format(code, form)


def max_unpool2x2(y: Tensor, code: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Place y (N, C, h, w) in (N, C, H, W) at the positions given by code, and zeros elsewhere."""
    height, width = y.shape[2:]
    positions = torch.arange(4, dtype=torch.uint8, device=y.device).view(2, 1, 2)
    # (N, C, h, 2, w, 2): one of the four copies of each element is kept.
    here = (code & 3)[:, :, :, None, :, None] == positions
    out = torch.where(here, y[:, :, :, None, :, None], 0).flatten(4, 5).flatten(2, 3)
    if output_size != (2 * height, 2 * width):
        out = F.pad(out, (0, output_size[1] - 2 * width, 0, output_size[0] - 2 * height))
    return _with_format(out, memory_format(y))
