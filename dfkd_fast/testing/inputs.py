"""Random inputs with difficult shapes, memory layouts and magnitudes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "MAP_SHAPES", "Layout", "extreme", "random", "with_layout"]

Layout = Literal["contiguous", "channels_last", "strided", "transposed", "offset"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""Memory layouts of :func:`with_layout`."""

MAP_SHAPES: dict[str, tuple[int, int, int, int]] = {
    "plain": (2, 8, 4, 4),
    "odd": (3, 7, 5, 3),
    "one channel": (2, 1, 3, 2),
    "three channels": (2, 3, 4, 5),
    "one position": (3, 8, 1, 1),
    "one row": (2, 5, 1, 7),
    "one sample": (1, 6, 3, 3),
    "one element": (1, 1, 1, 1),
    "empty batch": (0, 5, 3, 2),
}
"""Shapes (N, C, H, W) of feature maps, by the property that they test."""


def random(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
    shift: float = 0.0,
    requires_grad: bool = False,
) -> Tensor:
    """Return normally distributed values. A seed gives the same values in every dtype (up to rounding) and layout.

    Args:
        *shape: shape of the tensor.
        dtype: dtype of the tensor; values are drawn in float64 on the CPU, then rounded.
        layout: memory layout, see :func:`with_layout`.
        device: device of the tensor.
        seed: seed of the generator.
        scale: standard deviation.
        shift: mean.
        requires_grad: whether the tensor requires a gradient.

    Raises:
        ValueError: the layout does not apply to the shape.
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return with_layout((values * scale + shift).to(dtype).to(device), layout).requires_grad_(requires_grad)


def with_layout(x: Tensor, layout: Layout) -> Tensor:
    """Return a detached copy of x in another memory layout.

    Args:
        x: a tensor of any floating dtype.
        layout: ``contiguous``; ``channels_last`` (four dimensions); ``strided``, every other element of a buffer along
            each dimension, with NaN in between to expose kernels that ignore strides; ``transposed``, the last two
            dimensions swapped in memory; ``offset``, contiguous from the second element of a buffer, and so misaligned.

    Raises:
        ValueError: the layout does not apply to the shape.
    """
    x = x.detach()
    if layout == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        if x.ndim != 4:
            raise ValueError(f"layout 'channels_last' needs four dimensions, got shape {tuple(x.shape)}")
        return x.clone(memory_format=torch.channels_last)
    if layout == "strided":
        buffer = x.new_full([2 * size for size in x.shape], torch.nan)
        return buffer[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
    if layout == "transposed":
        if x.ndim < 2:
            raise ValueError(f"layout 'transposed' needs two dimensions, got shape {tuple(x.shape)}")
        return x.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    if layout == "offset":
        return x.new_full([x.numel() + 1], torch.nan)[1:].view(x.shape).copy_(x)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def extreme(rows: int, columns: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return finite values of shape (rows, columns) that overflow or underflow a naive exponential, sum or square.

    Rows cycle through six kinds: spread, equal, one large element, one large negative element, denormal, zero.
    """
    largest = min(torch.finfo(dtype).max, 1e30) / 8
    spread = random(rows, columns, dtype=torch.float64, seed=seed)
    x = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        kind = row % 6
        if kind == 0:
            x[row] = spread[row].clamp(-4, 4) * 1e3
        elif kind == 1:
            x[row] = largest
        elif kind in (2, 3):
            x[row, row % columns] = largest if kind == 2 else -largest
        elif kind == 4:
            x[row] = spread[row] * torch.finfo(dtype).tiny
    return x.to(dtype)
