"""The largest of each 2 x 2 with a byte that says which it was, and the inverse: values back to where they came from.

Windows are numbered by (n, c, i, j), the four elements of one by their place k = 2 dy + dx at (2 i + dy, 2 j + dx)::

    pool:    y = max over k of x_k,  code = the first k that reaches it (of several NaN the last, as in PyTorch)
             with relu y = max(0, y), and where that is 0, code = 4: place 0 of four zeros, and no gradient
    unpool:  out_k = y [k = code mod 4]
    gather:  y = sum over k of x_k [k = code mod 4]

The gradient of pool is unpool of the upstream gradient, but for code 4, which places nothing; that of unpool is gather.
So nothing is kept but the code.

Memory traffic of all three, a window, for elements of b bytes: 5 b + 1. gather needs one element of the four, but a
sector of 32 bytes holds channels whose windows were won at different places, so that it reads all.

A tile is a block of windows along the axis whose elements are neighbours in memory (channels, or j for contiguous
maps) by a block of windows along all others. So the divisions that tell positions apart are done once a vector, not
once an element, and each element of ``out`` is written once, the zeros of a last odd row and column included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import architecture, cast, cdiv, launch, next_power_of_2
from dfkd_fast.kernels.config import Launch

__all__ = ["gather", "pool", "unpool"]


@config.heuristic("max_pool2x2", OUTER=(1, 4096))
@config.heuristic("max_unpool2x2", OUTER=(1, 4096))
@config.heuristic("max_unpool2x2_backward", OUTER=(1, 4096))
def _config(arch: int, dtype: torch.dtype, *, inside: int) -> Launch:
    """A vector of 16 bytes per thread and tensor: the elements of a window are four loads in flight already.

    ``inside``, windows that are neighbours in memory, is a power of two up to 64.
    """
    return Launch(tile={"OUTER": max(1, 128 * (16 // dtype.itemsize) // inside), "INNER": inside})


@triton.jit
def _windows(
    outside,
    channels,
    height,
    width,
    CHANNELS_INSIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    """Of each window of this program's tile n, c, i and j, that broadcast to (OUTER, INNER), and whether it is one."""
    inside = channels if CHANNELS_INSIDE else width
    tiles = tl.cdiv(inside, INNER)
    program = tl.program_id(0)
    inner = ((program % tiles) * INNER + tl.arange(0, INNER))[None, :]
    outer = ((program // tiles).to(tl.int64) * OUTER + tl.arange(0, OUTER))[:, None]
    # In whole vectors, so that the compiler sees that a vector is inside or not.
    exists = (outer < outside) & (inner // VECTOR < inside // VECTOR)
    inner = inner.to(tl.int64)
    if CHANNELS_INSIDE:
        c = inner
        j = outer % width
        rest = outer // width
        i = rest % height
        n = rest // height
    else:
        j = inner
        i = outer % height
        rest = outer // height
        c = rest % channels
        n = rest // channels
    return n, c, i, j, exists


@triton.jit
def _offset(n, c, i, j, stride_n, stride_c, stride_h, stride_w, VECTOR: tl.constexpr):
    """Of elements in a tensor; ``VECTOR`` divides what does not come from c."""
    position = n * stride_n + i * stride_h + j * stride_w
    if VECTOR > 1:
        position = tl.multiple_of(position, [1, VECTOR])
    return position + c * stride_c


@triton.jit
def _pool_kernel(
    x,
    y,
    code,
    outside,
    channels,
    height,
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    RELU: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    n, c, i, j, exists = _windows(outside, channels, height, width, CHANNELS_INSIDE, VECTOR, OUTER, INNER)
    best = tl.load(x + _offset(n, c, 2 * i, 2 * j, x_n, x_c, x_h, x_w, VECTOR), mask=exists, other=0.0).to(tl.float32)
    winner = tl.zeros([OUTER, INNER], tl.int32)
    for k in tl.static_range(1, 4):
        at = _offset(n, c, 2 * i + k // 2, 2 * j + k % 2, x_n, x_c, x_h, x_w, VECTOR)
        value = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        winner = tl.where(better, k, winner)
    if RELU:
        # The same winner as with a ReLU before the comparison, unless all four become zeros.
        dead = best <= 0
        best = tl.where(dead, 0.0, best)
        winner = tl.where(dead, 4, winner)
    at = _offset(n, c, i, j, y_n, y_c, y_h, y_w, VECTOR)
    tl.store(y + at, cast(best, y.dtype.element_ty), mask=exists)
    tl.store(code + at, winner.to(tl.uint8), mask=exists)


@triton.jit
def _unpool_kernel(
    y,
    code,
    out,
    outside,
    channels,
    height,
    width,
    out_height,
    out_width,
    y_n,
    y_c,
    y_h,
    y_w,
    code_n,
    code_c,
    code_h,
    code_w,
    out_n,
    out_c,
    out_h,
    out_w,
    GRADIENT: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    n, c, i, j, exists = _windows(
        outside, channels, (out_height + 1) // 2, (out_width + 1) // 2, CHANNELS_INSIDE, VECTOR, OUTER, INNER
    )
    whole = exists & (i < height) & (j < width)
    value = tl.load(y + _offset(n, c, i, j, y_n, y_c, y_h, y_w, VECTOR), mask=whole, other=0.0)
    at = _offset(n, c, i, j, code_n, code_c, code_h, code_w, VECTOR)
    place = tl.load(code + at, mask=whole, other=0).to(tl.int32)
    if not GRADIENT:
        place = place & 3
    for k in tl.static_range(4):
        row = 2 * i + k // 2
        column = 2 * j + k % 2
        at = _offset(n, c, row, column, out_n, out_c, out_h, out_w, VECTOR)
        inside = exists & (row < out_height) & (column < out_width)
        tl.store(out + at, tl.where(place == k, value, 0.0), mask=inside)


@triton.jit
def _gather_kernel(
    x,
    code,
    y,
    outside,
    channels,
    height,
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    code_n,
    code_c,
    code_h,
    code_w,
    y_n,
    y_c,
    y_h,
    y_w,
    CHANNELS_INSIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    n, c, i, j, exists = _windows(outside, channels, height, width, CHANNELS_INSIDE, VECTOR, OUTER, INNER)
    at = _offset(n, c, i, j, code_n, code_c, code_h, code_w, VECTOR)
    place = tl.load(code + at, mask=exists, other=0).to(tl.int32) & 3
    value = tl.load(x + _offset(n, c, 2 * i, 2 * j, x_n, x_c, x_h, x_w, VECTOR), mask=exists, other=0.0)
    for k in tl.static_range(1, 4):
        at = _offset(n, c, 2 * i + k // 2, 2 * j + k % 2, x_n, x_c, x_h, x_w, VECTOR)
        value = tl.where(place == k, tl.load(x + at, mask=exists, other=0.0), value)
    tl.store(y + _offset(n, c, i, j, y_n, y_c, y_h, y_w, VECTOR), value, mask=exists)


def _launch(
    kernel: str,
    function: object,
    tensors: Sequence[Tensor],
    strides: Sequence[tuple[int, ...]],
    result: Tensor,
    windows: tuple[int, int],
    *sizes: int,
    **constants: bool,
) -> None:
    """Launch a kernel over height x width windows of each map.

    Args:
        kernel: name of the rule for it.
        function: the kernel; takes ``tensors``, how many windows there are but for those side by side in a tile, C,
            ``sizes`` and ``strides``.
        tensors: its arguments.
        strides: its arguments, four a tensor.
        result: the one of the tensors whose layout decides what lies side by side.
        windows: height and width in windows.
        *sizes: its arguments.
        **constants: likewise.
    """
    count, channels = result.shape[:2]
    channels_inside = result.stride(1) == 1 and channels > 1
    if channels_inside:
        inside, outside = channels, count * windows[0] * windows[1]
        vector = math.gcd(8, channels, *(stride for n, _, h, w in strides for stride in (n, h, w)))
    else:
        # Every other element of a row is of the same window's row: there is no vector to speak of.
        inside, outside, vector = windows[1], count * channels * windows[0], 1
    chosen = config.choose(kernel, architecture(result), result.dtype, inside=min(next_power_of_2(inside), 64))
    launch(
        function,
        (cdiv(inside, chosen.tile["INNER"]) * cdiv(outside, chosen.tile["OUTER"]),),
        *tensors,
        outside,
        channels,
        *sizes,
        *itertools.chain(*strides),
        config=chosen,
        CHANNELS_INSIDE=channels_inside,
        VECTOR=vector,
        **constants,
    )


def pool(x: Tensor, relu: bool, y: Tensor, code: Tensor) -> None:
    """The largest of each 2 x 2.

    Args:
        x: (N, C, H, W), any strides.
        relu: compare max(0, x).
        y: (N, C, H // 2, W // 2) in the dtype of x.
        code: uint8, of the shape and strides of y.
    """
    windows = (y.shape[2], y.shape[3])
    strides = (x.stride(), y.stride())
    _launch("max_pool2x2", _pool_kernel, (x, y, code), strides, y, windows, *windows, RELU=relu)


def unpool(y: Tensor, code: Tensor, height: int, width: int, channels_last: bool, gradient: bool, out: Tensor) -> None:
    """Values to their places, zeros elsewhere.

    Args:
        y: (N, C, h, w), any strides.
        code: uint8, of the shape of y, any strides.
        height: 2 h or 2 h + 1.
        width: 2 w or 2 w + 1.
        channels_last: the layout of ``out``.
        gradient: whether code 4, a winner that a ReLU stopped, places nothing; else it is place 0.
        out: (N, C, height, width) in the dtype of y; every element is written.
    """
    _launch(
        "max_unpool2x2",
        _unpool_kernel,
        (y, code, out),
        (y.stride(), code.stride(), out.stride()),
        out,
        (cdiv(height, 2), cdiv(width, 2)),
        *(y.shape[2], y.shape[3], height, width),
        GRADIENT=gradient,
    )


def gather(x: Tensor, code: Tensor, channels_last: bool, y: Tensor) -> None:
    """Values from their places: the gradient of :func:`unpool`.

    Args:
        x: (N, C, 2 h or 2 h + 1, 2 w or 2 w + 1), any strides.
        code: uint8, (N, C, h, w), any strides.
        channels_last: the layout of y.
        y: of that shape, in the dtype of x.
    """
    windows = (y.shape[2], y.shape[3])
    strides = (x.stride(), code.stride(), y.stride())
    _launch("max_unpool2x2_backward", _gather_kernel, (x, code, y), strides, y, windows, *windows)
