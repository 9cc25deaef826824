"""2x2 max pooling with uint8 argmax codes, and unpooling: the inverse that moves values back to their positions.

A window is (n, c, i, j), and its four elements are k = 2 dy + dx at (2 i + dy, 2 j + dx)::

    pool:    y = max over k of x_k,  code = the first k with the maximum (of NaNs the last, as in PyTorch)
             with relu, y = max(0, y); if y is 0, code = 4: k = 0 for unpool and gather, no gradient of x
    unpool:  out_k = y if k = code mod 4, else 0
    gather:  y = x_k for k = code mod 4

The gradient of pool is unpool of grad_output, except that code 4 places nothing. The gradient of unpool is gather. Only
the code is saved.

Memory traffic of each of the three: 5 b + 1 bytes per window for elements of b bytes. gather needs only one of the four
elements, but a 32-byte sector holds channels with different codes, so it reads all of them.

A tile has BLOCK_N windows along the axis with adjacent elements in memory (channels, or j for contiguous maps) and
BLOCK_M windows along all other axes. Index divisions are therefore per vector and not per element. unpool writes each
element of ``out`` once, including the zeros of an odd last row and column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import architecture, cast, cdiv, launch, next_power_of_2, traffic
from dfkd_fast.kernels.config import Launch

__all__ = ["gather", "pool", "unpool"]


@config.heuristic("max_pool2x2", BLOCK_M=(1, 4096))
@config.heuristic("max_unpool2x2", BLOCK_M=(1, 4096))
@config.heuristic("max_unpool2x2_backward", BLOCK_M=(1, 4096))
def _config(arch: int, dtype: torch.dtype, *, inner: int) -> Launch:
    """One 16-byte vector per thread and tensor: the four elements of a window are four loads in flight.

    ``inner``, the number of windows that are adjacent in memory, is a power of two up to 64.
    """
    return Launch(tile={"BLOCK_M": max(1, 128 * (16 // dtype.itemsize) // inner), "BLOCK_N": inner})


@triton.jit
def _windows(outer, sizes, NHWC: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """n, c, i, j and mask of this program's windows, which broadcast to (BLOCK_M, BLOCK_N).

    ``sizes`` are (channels, height, width) in windows, and ``outer`` is the number of windows along the outer axes.
    """
    channels, height, width = sizes
    inner = channels if NHWC else width
    tiles = tl.cdiv(inner, BLOCK_N)
    pid = tl.program_id(0)
    offs_n = ((pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    offs_m = ((pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    # The comparison is in units of vectors, so that the compiler knows that a vector has one mask.
    mask = (offs_m < outer) & (offs_n // VECTOR < inner // VECTOR)
    offs_n = offs_n.to(tl.int64)
    if NHWC:
        c = offs_n
        j = offs_m % width
        rest = offs_m // width
        i = rest % height
        n = rest // height
    else:
        j = offs_n
        i = offs_m % height
        rest = offs_m // height
        c = rest % channels
        n = rest // channels
    return n, c, i, j, mask


@triton.jit
def _offset(n, c, i, j, strides, VECTOR: tl.constexpr):
    """Offsets into a tensor; ``VECTOR`` divides the part that does not depend on c."""
    offs = n * strides[0] + i * strides[2] + j * strides[3]
    if VECTOR > 1:
        offs = tl.multiple_of(offs, [1, VECTOR])
    return offs + c * strides[1]


@traffic(writes="y_ptr code_ptr", parts={"x_ptr": lambda a: 4 * a["y_ptr"].numel() / a["x_ptr"].numel()})
@triton.jit
def _pool_kernel(
    x_ptr,  # [N, C, H, W]
    y_ptr,  # [N, C, H // 2, W // 2]
    code_ptr,  # [N, C, H // 2, W // 2], strides of y
    outer,
    sizes,  # (C, H // 2, W // 2)
    x_strides,  # (n, c, h, w)
    y_strides,  # (n, c, h, w)
    RELU: tl.constexpr,
    NHWC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n, c, i, j, mask = _windows(outer, sizes, NHWC, VECTOR, BLOCK_M, BLOCK_N)
    best = tl.load(x_ptr + _offset(n, c, 2 * i, 2 * j, x_strides, VECTOR), mask=mask, other=0.0).to(tl.float32)
    code = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in tl.static_range(1, 4):
        offs = _offset(n, c, 2 * i + k // 2, 2 * j + k % 2, x_strides, VECTOR)
        value = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        code = tl.where(better, k, code)
    if RELU:
        # The same code as with a ReLU before the comparison, unless all four values become zero.
        zero = best <= 0
        best = tl.where(zero, 0.0, best)
        code = tl.where(zero, 4, code)
    offs = _offset(n, c, i, j, y_strides, VECTOR)
    tl.store(y_ptr + offs, cast(best, y_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + offs, code.to(tl.uint8), mask=mask)


@traffic(writes="out_ptr")
@triton.jit
def _unpool_kernel(
    y_ptr,  # [N, C, h, w]
    code_ptr,  # [N, C, h, w]
    out_ptr,  # [N, C, H, W]
    outer,
    sizes,  # (C, ceil(H / 2), ceil(W / 2))
    y_size,  # (h, w)
    out_size,  # (H, W)
    y_strides,  # (n, c, h, w)
    code_strides,  # (n, c, h, w)
    out_strides,  # (n, c, h, w)
    GRADIENT: tl.constexpr,
    NHWC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n, c, i, j, mask = _windows(outer, sizes, NHWC, VECTOR, BLOCK_M, BLOCK_N)
    mask_y = mask & (i < y_size[0]) & (j < y_size[1])
    value = tl.load(y_ptr + _offset(n, c, i, j, y_strides, VECTOR), mask=mask_y, other=0.0)
    code = tl.load(code_ptr + _offset(n, c, i, j, code_strides, VECTOR), mask=mask_y, other=0).to(tl.int32)
    if not GRADIENT:
        code = code & 3
    for k in tl.static_range(4):
        row = 2 * i + k // 2
        col = 2 * j + k % 2
        offs = _offset(n, c, row, col, out_strides, VECTOR)
        mask_out = mask & (row < out_size[0]) & (col < out_size[1])
        tl.store(out_ptr + offs, tl.where(code == k, value, 0.0), mask=mask_out)


@traffic(writes="y_ptr", parts={"x_ptr": lambda a: 4 * a["y_ptr"].numel() / a["x_ptr"].numel()})
@triton.jit
def _gather_kernel(
    x_ptr,  # [N, C, H, W]
    code_ptr,  # [N, C, H // 2, W // 2]
    y_ptr,  # [N, C, H // 2, W // 2]
    outer,
    sizes,  # (C, H // 2, W // 2)
    x_strides,  # (n, c, h, w)
    code_strides,  # (n, c, h, w)
    y_strides,  # (n, c, h, w)
    NHWC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n, c, i, j, mask = _windows(outer, sizes, NHWC, VECTOR, BLOCK_M, BLOCK_N)
    code = tl.load(code_ptr + _offset(n, c, i, j, code_strides, VECTOR), mask=mask, other=0).to(tl.int32) & 3
    value = tl.load(x_ptr + _offset(n, c, 2 * i, 2 * j, x_strides, VECTOR), mask=mask, other=0.0)
    for k in tl.static_range(1, 4):
        offs = _offset(n, c, 2 * i + k // 2, 2 * j + k % 2, x_strides, VECTOR)
        value = tl.where(code == k, tl.load(x_ptr + offs, mask=mask, other=0.0), value)
    tl.store(y_ptr + _offset(n, c, i, j, y_strides, VECTOR), value, mask=mask)


def _launch(
    kernel: str,
    function: object,
    tensors: Sequence[Tensor],
    strides: Sequence[tuple[int, ...]],
    result: Tensor,
    windows: tuple[int, int],
    *sizes: tuple[int, int],
    **constants: bool,
) -> None:
    """Launch a kernel over height x width windows per map.

    Args:
        kernel: Name of the heuristic.
        function: The kernel. Its arguments are ``tensors``, the number of windows along the outer axes, (channels,
            height, width) in windows, ``sizes`` and ``strides``.
        tensors: Tensors of the kernel.
        strides: Strides of the tensors, (n, c, h, w) each.
        result: The tensor whose memory format decides which windows are adjacent.
        windows: Height and width in windows.
        *sizes: Arguments after the kernel's own ``sizes``: ``y_size`` and ``out_size`` of unpool.
        **constants: Compile-time constants of the kernel.
    """
    count, channels = result.shape[:2]
    nhwc = result.stride(1) == 1 and channels > 1
    if nhwc:
        inner, outer = channels, count * windows[0] * windows[1]
        vector = math.gcd(8, channels, *(stride for n, _, h, w in strides for stride in (n, h, w)))
    else:
        # Adjacent elements of a row belong to different columns of windows, so there are no vectors.
        inner, outer, vector = windows[1], count * channels * windows[0], 1
    chosen = config.choose(kernel, architecture(result), result.dtype, inner=min(next_power_of_2(inner), 64))
    launch(
        function,
        (cdiv(inner, chosen.tile["BLOCK_N"]) * cdiv(outer, chosen.tile["BLOCK_M"]),),
        *tensors,
        outer,
        (channels, *windows),
        *sizes,
        *strides,
        config=chosen,
        NHWC=nhwc,
        VECTOR=vector,
        **constants,
    )


def pool(x: Tensor, relu: bool, y: Tensor, code: Tensor) -> None:
    """2x2 max pooling.

    Args:
        x: (N, C, H, W), any strides.
        relu: Whether to apply ReLU.
        y: Output, (N, C, H // 2, W // 2) in the dtype of x.
        code: Output, uint8, with the shape and strides of y.
    """
    windows = (y.shape[2], y.shape[3])
    _launch("max_pool2x2", _pool_kernel, (x, y, code), (x.stride(), y.stride()), y, windows, RELU=relu)


def unpool(y: Tensor, code: Tensor, height: int, width: int, channels_last: bool, gradient: bool, out: Tensor) -> None:
    """Moves values to the positions in ``code``, and writes zeros elsewhere.

    Args:
        y: (N, C, h, w), any strides.
        code: uint8, same shape as y, any strides.
        height: 2 h or 2 h + 1.
        width: 2 w or 2 w + 1.
        channels_last: Memory format of ``out``. Not read here: the strides of ``out`` show it.
        gradient: Whether code 4, a maximum that ReLU set to zero, places nothing. Otherwise code 4 is position 0.
        out: Output, (N, C, height, width) in the dtype of y. Every element is written.
    """
    _launch(
        "max_unpool2x2",
        _unpool_kernel,
        (y, code, out),
        (y.stride(), code.stride(), out.stride()),
        out,
        (cdiv(height, 2), cdiv(width, 2)),
        (y.shape[2], y.shape[3]),
        (height, width),
        GRADIENT=gradient,
    )


def gather(x: Tensor, code: Tensor, channels_last: bool, y: Tensor) -> None:
    """Reads values from the positions in ``code``: the gradient of :func:`unpool`.

    Args:
        x: (N, C, 2 h or 2 h + 1, 2 w or 2 w + 1), any strides.
        code: uint8, (N, C, h, w), any strides.
        channels_last: Memory format of y. Not read here: the strides of y show it.
        y: Output, (N, C, h, w) in the dtype of x.
    """
    windows = (y.shape[2], y.shape[3])
    strides = (x.stride(), code.stride(), y.stride())
    _launch("max_unpool2x2_backward", _gather_kernel, (x, code, y), strides, y, windows)
