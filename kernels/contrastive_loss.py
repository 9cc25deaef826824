"""NT-Xent over 2N vectors without their similarity matrix: a fused product and exponential, forward and backward.

With y_i = 2^k_i v_i the rows scaled by a power of two, which rounds nothing, and r_i = 1 / |y_i| (0 for a zero row)::

    s_ij = (y_i . y_j) r_i r_j log2(e) / tau          L_i = log2(sum over j != i of 2^s_ij)
    loss_i = log(2) (L_i - s_{i, partner of i})

The product takes the rows in the type they came in, since they are exact in it, and is scaled in float32 afterwards:
the tensor cores' full rate costs no digit of the similarities. Without normalisation k = 0 and r = 1.

Backward, one kernel over the rows a of all 2N vectors, with g the upstream gradient of an anchor (0 for what is none)::

    w_ab = g_a 2^(s_ab - L_a) + g_b 2^(s_ab - L_b) - [b is the partner of a] (g_a + g_b)        w_aa = 0
    G_a = sum over b of w_ab y_b r_b / tau        d v_a = 2^k_a r_a (G_a - (G_a . u_a) u_a)     u_a = r_a y_a

w is rounded to the type of y for the second product, but for the partner's, whose difference of nearly equal numbers is
kept in float32. Where the positives are no anchors their rows meet the anchors alone. With M = 2N: M^2 D operations
forward and 3 M^2 D backward; with all as anchors 2 and 4.

A tile with the anchor itself, its partner or the end of the vectors in it needs masks and is taken first, by its own
loop; the loop over all others has none. Cosines bound s, and then (``BOUNDED``) sums of exponentials need no running
maximum, and one exponential serves w_ab: 2^s_ab (g_a 2^-L_a + g_b 2^-L_b).

Memory: the scaled copy of the vectors, numbers by the row, and backward their gradients in float32. Few rows have
their columns split over programs; partial sums are merged by a second kernel in a fixed order. Up to ``SMALL``
vectors, one launch each way does all.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import (
    INTERPRETED,
    architecture,
    cast,
    cdiv,
    dot,
    launch,
    next_power_of_2,
    num_sms,
    precision,
    sum_of,
)
from dfkd_fast.kernels.config import Launch

__all__ = ["bounded", "forward", "prepared", "shape", "small_launch", "tiles_a_program"]


def _fits(arch: int, dim: int, m: int, n: int, stages: int) -> bool:
    """Whether tiles of all ``dim`` dimensions, in 16 bits, fit in shared memory."""
    return 2 * dim * (m + stages * n) + 2 * m * n <= config.shared_memory(arch)


@config.heuristic("contrastive_loss", BLOCK_M=(32, 128), BLOCK_N=(32, 128), num_stages=(2, 4))
def _config(arch: int, dtype: torch.dtype, *, dim: int) -> Launch:
    """Up to 256 dimensions a tile holds them all, if it fits. float32 has no tensor cores: longer steps spill."""
    if dtype == torch.float32:
        return Launch(tile={"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": min(dim, 32)}, num_warps=8)
    for n in (128, 64):
        if dim <= 256 and _fits(arch, dim, 128, n, 2):
            return Launch(tile={"BLOCK_M": 128, "BLOCK_N": n, "BLOCK_D": dim}, num_warps=8)
    return Launch(tile={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": min(dim, 64)}, num_warps=8, num_stages=3)


@config.heuristic("contrastive_loss_backward", BLOCK_M=(32, 128), BLOCK_N=(32, 128), num_stages=(2, 4))
def _config_backward(arch: int, dtype: torch.dtype, *, dim: int) -> Launch:
    """As forward; BLOCK_O dimensions of the gradient per program, all of them if their sums fit in registers."""
    if dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": min(dim, 32), "BLOCK_O": min(dim, 128)}
        return Launch(tile=tile, num_warps=8)
    if dim > 256:
        return Launch(tile={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_O": 128}, num_warps=8)
    m, n, warps = (128, 64, 8) if _fits(arch, dim, 128, 64, 2) else (64, 32, 4)
    stages = 3 if _fits(arch, dim, m, n, 3) else 2
    return Launch(tile={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": dim, "BLOCK_O": dim}, num_warps=warps, num_stages=stages)


@config.heuristic("contrastive_loss_rows", ROWS=(1, 128))
def _config_rows(arch: int, dtype: torch.dtype, *, dim: int) -> Launch:
    """For the kernels that take whole rows one by one."""
    return Launch(tile={"ROWS": max(1, 2048 // dim), "BLOCK": dim}, num_warps=max(4, min(16, dim // 512)))


@config.heuristic("contrastive_loss_small")
def _config_small(arch: int, dtype: torch.dtype, *, rows: int, dim: int) -> Launch:
    """All vectors in one program."""
    return Launch(tile={"ROWS": rows, "BLOCK": dim}, num_warps=4 if rows * max(rows, dim) <= 64 * 64 else 8)


@config.heuristic("contrastive_loss_small_backward", BLOCK_M=(16, 64))
def _config_small_backward(arch: int, dtype: torch.dtype, *, rows: int, dim: int) -> Launch:
    """Each program has all vectors and BLOCK_M rows of the gradients."""
    m, warps = (16, 2) if rows == 16 else (32, 4) if rows * max(rows, dim) <= 64 * 64 else (16, 8)
    return Launch(tile={"ROWS": rows, "BLOCK": dim, "BLOCK_M": min(m, rows)}, num_warps=warps)


SMALL = 128
"""Vectors, and dimensions, up to which one launch does all."""

# Below this bound of |s|, sums of 2^(2 s) over any number of vectors are far from the ends of float32.
_BOUND = 48.0

_LOG_2 = tl.constexpr(math.log(2))
# Keeps weights of a softmax over a million vectors among float16's normal numbers, and a weight of two below its end.
_LIFT = tl.constexpr(2.0**14)
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _rows(first, second, rows, columns, count, dim, first_row, first_column, second_row, second_column):
    """Rows of ``first`` and, from row ``count`` on, of ``second``, in float32; zero outside."""
    row = rows.to(tl.int64)[:, None]
    column = columns.to(tl.int64)[None, :]
    inside = (columns < dim)[None, :]
    in_first = (rows < count)[:, None]
    in_second = ((rows >= count) & (rows < 2 * count))[:, None]
    a = tl.load(first + (row * first_row + column * first_column), mask=in_first & inside, other=0.0)
    b = tl.load(second + ((row - count) * second_row + column * second_column), mask=in_second & inside, other=0.0)
    return a.to(tl.float32) + b.to(tl.float32)


@triton.jit
def _exponent(x):
    """floor(log2(x)) for x >= 0; 0 for 0."""
    denormal = x < 1.1754943508222875e-38
    bits = tl.where(denormal, x * 16777216.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == 0, 0, (bits >> 23) - tl.where(denormal, 151, 127))


@triton.jit
def _times_power(x, k):
    """Rows of x times 2^k, by halves: 2^k itself may not exist in float32."""
    half = k >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((k - half + 127) << 23).to(tl.float32, bitcast=True)
    return x * first[:, None] * second[:, None]


@triton.jit
def _inverse(square, largest):
    """Inverse length, and 0 for rows of zeros."""
    return tl.where(largest == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(square)))


@triton.jit
def _scaled(x, NORMALIZE: tl.constexpr):
    """y, r and k of whole rows."""
    if NORMALIZE:
        largest = tl.max(tl.abs(x), 1)
        k = -_exponent(largest)
        y = _times_power(x, k)
        return y, _inverse(tl.sum(y * y, 1), largest), k
    else:
        return x, tl.full([x.shape[0]], 1.0, tl.float32), tl.zeros([x.shape[0]], tl.int32)


@triton.jit
def _gain(grad_output, unit, rows, inside, stride, ELEMENTWISE: tl.constexpr):
    """g over its unit, 0 for what is no anchor: of the order of one, since it is rounded with the weights."""
    if ELEMENTWISE:
        g = tl.load(grad_output + rows.to(tl.int64) * stride, mask=inside, other=0.0)
        largest = tl.load(unit)
        return tl.where(largest == 0, 0.0, tl.div_rn(g, largest))
    else:
        return tl.where(inside, 1.0, 0.0)


# --- any number of vectors


@triton.jit
def _prepare_kernel(
    first,
    second,
    vectors,
    numbers,
    saved,
    grad_output,
    unit,
    count,
    anchors,
    dim,
    width,
    padded,
    first_row,
    first_column,
    second_row,
    second_column,
    grad_output_row,
    NORMALIZE: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y; and five numbers a row: r, and for backward k, g over its unit, L, and g 2^-L r."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x = _rows(first, second, rows, columns, count, dim, first_row, first_column, second_row, second_column)
    y, inverse, k = _scaled(x, NORMALIZE)
    at = vectors + (rows.to(tl.int64)[:, None] * width + columns[None, :])
    tl.store(at, cast(y, vectors.dtype.element_ty), mask=(columns < width)[None, :])
    numbers += rows
    tl.store(numbers, inverse)
    if saved is not None:
        tl.store(numbers + padded, k.to(tl.float32))
        inside = rows < anchors
        gain = _gain(grad_output, unit, rows, inside, grad_output_row, ELEMENTWISE)
        level = tl.load(saved + rows, mask=inside, other=float("inf"))
        tl.store(numbers + 2 * padded, gain)
        tl.store(numbers + 3 * padded, level)
        if BOUNDED:
            tl.store(numbers + 4 * padded, gain * tl.exp2(-level) * (inverse * _LIFT))


@triton.jit
def _tile(vectors, row, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of y, which has rows and columns to spare."""
    base = vectors + (row.to(tl.int64) * width + column)
    return tl.load(base + (tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :]))


@triton.jit
def _product(a, b, products, PRECISION: tl.constexpr):
    """products + a b^T. A card gives the same bits for two vectors wherever in a tile they are, and numpy does not."""
    # The interpreter, too, takes no tile of more than 2^20 numbers.
    if INTERPRETED and a.shape[0] * b.shape[0] * a.shape[1] <= 2**20:
        return products + tl.sum(a.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :], 2)
    else:
        return dot(a, tl.trans(b), products, PRECISION)


@triton.jit
def _products(vectors, row, column, width, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """y_a . y_b for M rows by N columns, D dimensions a step."""
    products = tl.zeros([M, N], tl.float32)
    for start in range(0, width, D):
        a = _tile(vectors, row, start, width, M, D)
        b = _tile(vectors, column, start, width, N, D)
        products = _product(a, b, products, PRECISION)
    return products


@triton.jit
def _within(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _runs(row, partner, begin, end, limit, M: tl.constexpr, N: tl.constexpr):
    """Which tiles of [begin, end) need masks: three runs, in order, each by its first tile and length.

    They hold the M columns from ``row`` and from ``partner`` on, and those from ``limit`` on.
    """
    near, far = tl.minimum(row, partner), tl.maximum(row, partner)
    start_0 = _within(near // N, begin, end)
    end_0 = _within((near + M - 1) // N + 1, start_0, end)
    start_1 = _within(far // N, end_0, end)
    end_1 = _within((far + M - 1) // N + 1, start_1, end)
    start_2 = _within(limit // N, end_1, end)
    end_2 = _within(tl.cdiv(limit, N), start_2, end)
    return start_0, end_0 - start_0, start_1, end_1 - start_1, start_2, end_2 - start_2


@triton.jit
def _masked(i, start_0, count_0, start_1, count_1, start_2):
    """The i-th tile in the runs."""
    last = start_2 + (i - count_0 - count_1)
    return tl.where(i < count_0, start_0 + i, tl.where(i < count_0 + count_1, start_1 + (i - count_0), last))


@triton.jit
def _plain(i, start_0, count_0, start_1, count_1, start_2, count_2):
    """The tile that takes the i-th place once the runs are left out."""
    tile = i + tl.where(i >= start_0, count_0, 0)
    tile += tl.where(tile >= start_1, count_1, 0)
    return tile + tl.where(tile >= start_2, count_2, 0)


@triton.jit
def _store_loss(out, saved, top, total, positive, anchor, inside, scale, ELEMENTWISE: tl.constexpr):
    """The losses of a program's anchors or their sum, and L."""
    above = tl.log2(total)
    tl.store(saved + anchor, top + above, mask=inside)
    # The difference first: where the partner is all there is to the sum, exactly nothing is left of it.
    loss = ((top - positive) + above) * _LOG_2
    if ELEMENTWISE:
        tl.store(out + anchor, loss, mask=inside)
    else:
        tl.store(out + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0)) * scale)


@triton.jit
def _forward_kernel(
    vectors,
    numbers,
    out,
    saved,
    parts,
    count,
    anchors,
    width,
    span,
    scale_log2,
    scale,
    ELEMENTWISE: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK_M)
    side = tl.program_id(0) // blocks
    local = (tl.program_id(0) - side * blocks) * BLOCK_M
    row, partner = side * count + local, (1 - side) * count + local
    lane = tl.arange(0, BLOCK_M)
    anchor = row + lane
    rows_in = local + lane < count
    columns = tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, tl.cdiv(2 * count, BLOCK_N))
    start_0, count_0, start_1, count_1, start_2, count_2 = _runs(row, partner, begin, end, 2 * count, BLOCK_M, BLOCK_N)
    masked = count_0 + count_1 + count_2

    if RESIDENT:
        a = _tile(vectors, row, 0, BLOCK_D, BLOCK_M, BLOCK_D)
    inverse = tl.load(numbers + anchor)
    positive = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + (-scale_log2 if BOUNDED else _LOWEST)
    for i in tl.range(0, masked, num_stages=1):
        column = _masked(i, start_0, count_0, start_1, count_1, start_2) * BLOCK_N
        if RESIDENT:
            b = _tile(vectors, column, 0, BLOCK_D, BLOCK_N, BLOCK_D)
            s = _product(a, b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        else:
            s = _products(vectors, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        # Alike from either side, so that backward finds the same to the bit: L has no digits to spare if large.
        s *= (inverse[:, None] * tl.load(numbers + column + columns)[None, :]) * scale_log2
        j = (column + columns)[None, :]
        s = tl.where((j == anchor[:, None]) | (j >= 2 * count), float("-inf"), s)
        positive += tl.sum(tl.where(j == (partner + lane)[:, None], s, 0.0), 1)
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    bent = inverse * scale_log2
    for i in range(begin, end - masked):
        column = _plain(i, start_0, count_0, start_1, count_1, start_2, count_2) * BLOCK_N
        if RESIDENT:
            b = _tile(vectors, column, 0, BLOCK_D, BLOCK_N, BLOCK_D)
            s = _product(a, b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        else:
            s = _products(vectors, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        inverse_b = tl.load(numbers + column + columns)
        if BOUNDED:
            s = (s * inverse_b[None, :]) * bent[:, None]
        else:
            s *= (inverse[:, None] * inverse_b[None, :]) * scale_log2
            higher = tl.maximum(top, tl.max(s, 1))
            total *= tl.exp2(top - higher)
            top = higher
        total += tl.sum(tl.exp2(s - top[:, None]), 1)

    if parts is not None:
        at = parts + tl.program_id(1).to(tl.int64) * (3 * anchors) + anchor
        tl.store(at, top, mask=rows_in)
        tl.store(at + anchors, total, mask=rows_in)
        tl.store(at + 2 * anchors, positive, mask=rows_in)
    else:
        _store_loss(out, saved, top, total, positive, anchor, rows_in, scale, ELEMENTWISE)


@triton.jit
def _merge_kernel(parts, out, saved, anchors, chunks, scale, ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr):
    anchor = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = anchor < anchors
    top = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    positive = tl.zeros([ROWS], tl.float32)
    at = parts + anchor
    for _ in range(0, chunks):
        here = tl.load(at, mask=inside, other=0.0)
        higher = tl.maximum(top, here)
        total *= tl.exp2(top - higher)
        total += tl.load(at + anchors, mask=inside, other=1.0) * tl.exp2(here - higher)
        positive += tl.load(at + 2 * anchors, mask=inside, other=0.0)
        top = higher
        at += 3 * anchors
    _store_loss(out, saved, top, total, positive, anchor, inside, scale, ELEMENTWISE)


# --- few vectors, one launch


@triton.jit
def _vectors(
    first,
    second,
    rows,
    columns,
    count,
    dim,
    first_row,
    first_column,
    second_row,
    second_column,
    NORMALIZE: tl.constexpr,
):
    """y in the type that is multiplied, and r and k."""
    x = _rows(first, second, rows, columns, count, dim, first_row, first_column, second_row, second_column)
    y, inverse, k = _scaled(x, NORMALIZE)
    if first.dtype.element_ty == second.dtype.element_ty:
        return cast(y, first.dtype.element_ty), inverse, k
    else:
        return y, inverse, k


@triton.jit
def _small_forward_kernel(
    first,
    second,
    out,
    saved,
    count,
    anchors,
    dim,
    first_row,
    first_column,
    second_row,
    second_column,
    scale_log2,
    scale,
    NORMALIZE: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, ROWS)
    y, inverse, _k = _vectors(
        first,
        second,
        i,
        tl.arange(0, BLOCK),
        count,
        dim,
        first_row,
        first_column,
        second_row,
        second_column,
        NORMALIZE,
    )
    s = _product(y, y, tl.zeros([ROWS, ROWS], tl.float32), PRECISION)
    s *= (inverse[:, None] * inverse[None, :]) * scale_log2
    j = tl.arange(0, ROWS)[None, :]
    s = tl.where((j == i[:, None]) | (j >= 2 * count), float("-inf"), s)
    partner = tl.where(i < count, i + count, i - count)
    positive = tl.sum(tl.where(j == partner[:, None], s, 0.0), 1)
    top = tl.maximum(tl.max(s, 1), _LOWEST)
    total = tl.sum(tl.exp2(s - top[:, None]), 1)
    _store_loss(out, saved, top, total, positive, i, i < anchors, scale, ELEMENTWISE)


# --- launches


def shape(first: Tensor, second: Tensor) -> tuple[torch.dtype, int]:
    """Type of y, and its row length: a power of two, or of more than 256 dimensions a multiple of 128."""
    dim = first.shape[1]
    dtype = first.dtype if first.dtype == second.dtype else torch.float32
    return dtype, max(16, next_power_of_2(dim)) if dim <= 256 else 128 * cdiv(dim, 128)


def small_launch(kernel: str, first: Tensor, dtype: torch.dtype) -> Launch | None:
    """How one launch does all; None where it does not."""
    count, dim = first.shape
    most = SMALL if dtype != torch.float32 else min(SMALL, 64)
    if max(2 * count, dim) > most:
        return None
    sizes = {"rows": max(16, next_power_of_2(2 * count)), "dim": max(16, next_power_of_2(dim))}
    return config.choose(kernel, architecture(first), dtype, **sizes)


def bounded(scale_log2: float, normalize: bool) -> bool:
    """Whether 2^s can be summed as it is: for cosines over a temperature of 0.03 and more."""
    return normalize and scale_log2 <= _BOUND


def tiles_a_program(blocks: int, tiles: list[int], available: int) -> int:
    """How many tiles of columns a program takes.

    Args:
        blocks: of rows, on each side.
        tiles: of columns, that the rows of each side have to do with.
        available: programs at a time.
    """
    longest = max(tiles)
    if blocks * len(tiles) >= 2 * available:
        return longest

    def time(span: int) -> int:
        programs = blocks * sum(cdiv(each, span) for each in tiles)
        # Two tiles' time to start a program, and four for the kernel that merges.
        return cdiv(programs, available) * (span + 2) + (4 if span < longest else 0)

    return min((cdiv(longest, chunks) for chunks in range(1, 33)), key=time)


def prepared(
    first: Tensor,
    second: Tensor,
    normalize: bool,
    *,
    bounded: bool = False,
    saved: Tensor | None = None,
    grad_output: Tensor | None = None,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the numbers of each row, zeros after the last for a tile to end in; see :func:`_prepare_kernel`."""
    count, dim = first.shape
    dtype, width = shape(first, second)
    padded = 128 * (cdiv(2 * count, 128) + 1)
    vectors = first.new_empty((padded, width), dtype=dtype)
    numbers = first.new_empty((5, padded), dtype=torch.float32)
    elementwise = grad_output is not None and grad_output.ndim == 1
    chosen = config.choose("contrastive_loss_rows", architecture(first), dtype, dim=next_power_of_2(width))
    launch(
        _prepare_kernel,
        (cdiv(padded, chosen.tile["ROWS"]),),
        first,
        second,
        vectors,
        numbers,
        saved,
        grad_output,
        unit,
        count,
        0 if saved is None else saved.shape[0],
        dim,
        width,
        padded,
        *first.stride(),
        *second.stride(),
        grad_output.stride(0) if elementwise and grad_output is not None else 0,
        config=chosen,
        NORMALIZE=normalize,
        ELEMENTWISE=elementwise,
        BOUNDED=bounded,
    )
    return vectors, numbers


def forward(
    first: Tensor,
    second: Tensor,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    out: Tensor,
    saved: Tensor,
) -> None:
    """The contrastive loss.

    Args:
        first: (N, D), any strides.
        second: likewise.
        temperature: above 0.
        symmetric: as the op's.
        normalize: likewise.
        reduction: likewise.
        out: float32, a scalar, or one value an anchor for "none".
        saved: float32, one value an anchor, for :func:`backward`.
    """
    count, dim = first.shape
    if count == 0:
        # As torch's mean of nothing.
        out.fill_(float("nan") if reduction == "mean" else 0.0)
        return
    dtype, width = shape(first, second)
    anchors = saved.shape[0]
    elementwise = reduction == "none"
    scale = 1 / anchors if reduction == "mean" else 1.0
    scale_log2 = math.log2(math.e) / temperature
    small = small_launch("contrastive_loss_small", first, dtype)
    if small is not None:
        sizes = (count, anchors, dim, *first.stride(), *second.stride())
        launch(
            _small_forward_kernel,
            (1,),
            *(first, second, out, saved, *sizes, scale_log2, scale),
            config=small,
            NORMALIZE=normalize,
            ELEMENTWISE=elementwise,
            PRECISION=precision(dtype),
        )
        return
    vectors, numbers = prepared(first, second, normalize)
    chosen = config.choose("contrastive_loss", architecture(first), dtype, dim=next_power_of_2(width))
    blocks = cdiv(count, chosen.tile["BLOCK_M"])
    sides = 2 if symmetric else 1
    tiles = cdiv(2 * count, chosen.tile["BLOCK_N"])
    span = tiles_a_program(blocks, [tiles] * sides, num_sms(first))
    chunks = cdiv(tiles, span)
    parts = None if chunks == 1 else first.new_empty((chunks, 3, anchors), dtype=torch.float32)
    sums = blocks * sides if chunks == 1 else cdiv(anchors, 128)
    direct = elementwise or sums == 1
    losses = out if direct else out.new_empty(sums)
    inner = scale if direct else 1.0
    launch(
        _forward_kernel,
        (blocks * sides, chunks),
        vectors,
        numbers,
        losses,
        saved,
        parts,
        count,
        anchors,
        width,
        span,
        scale_log2,
        inner,
        config=chosen,
        ELEMENTWISE=elementwise,
        BOUNDED=bounded(scale_log2, normalize),
        RESIDENT=chosen.tile["BLOCK_D"] == width,
        PRECISION=precision(dtype),
    )
    if parts is not None:
        merge = Launch(tile={"ROWS": 128})
        arguments = (parts, losses, saved, anchors, chunks, inner)
        launch(_merge_kernel, (sums,), *arguments, config=merge, ELEMENTWISE=elementwise)
    if not direct:
        sum_of(losses, out, scale)
