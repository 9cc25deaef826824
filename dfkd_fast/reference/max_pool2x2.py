"""Pooling to the largest of 2 x 2 and its inverse in plain PyTorch. Formulas: :func:`dfkd_fast.ops.max_pool2x2`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["max_pool2x2", "max_unpool2x2", "memory_format"]


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of what is made from maps x: channels-last where x is, gaps between its elements allowed.

    A map with one channel or one position fits both formats. Its strides tell all the same, as they do inside PyTorch.
    """
    channels_last = x.stride(1) == 1 and x.stride(3) >= x.shape[1]
    return torch.channels_last if channels_last else torch.contiguous_format


def _laid_out(y: Tensor, form: torch.memory_format) -> Tensor:
    # Not y.contiguous: it returns a map that fits both formats as it is, under strides of the other one.
    return y if memory_format(y) == form else y.clone(memory_format=form)


def max_pool2x2(x: Tensor, *, relu: bool) -> tuple[Tensor, Tensor]:
    """The largest of each 2 x 2 of (N, C, H, W), and which of the four it is."""
    y, index = F.max_pool2d(F.relu(x) if relu else x, 2, return_indices=True)
    width = x.shape[3]
    code = (2 * (index // width % 2) + index % width % 2).to(torch.uint8)
    if relu:
        code = code.masked_fill(y <= 0, 4)
    form = memory_format(x)
    return _laid_out(y, form), _laid_out(code, form)


def max_unpool2x2(y: Tensor, code: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) to the places in (N, C, H, W) that code names, zeros elsewhere."""
    height, width = y.shape[2:]
    places = torch.arange(4, dtype=torch.uint8, device=y.device).view(2, 1, 2)
    # (N, C, h, 2, w, 2): each element four times, of which one stays.
    here = (code & 3)[:, :, :, None, :, None] == places
    out = torch.where(here, y[:, :, :, None, :, None], 0).flatten(4, 5).flatten(2, 3)
    if output_size != (2 * height, 2 * width):
        out = F.pad(out, (0, output_size[1] - 2 * width, 0, output_size[0] - 2 * height))
    return _laid_out(out, memory_format(y))
