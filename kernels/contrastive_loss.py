"""NT-Xent over 2N vectors without their similarity matrix: matrix product and exponential fused, forward and backward.

Each vector v_i of D dimensions is scaled exactly by a power of two: y_i = 2^k_i v_i. With r_i = 1 / |y_i|, or 0 for a
zero vector, and the temperature tau::

    s_ij = (y_i . y_j) r_i r_j log2(e) / tau          L_i = log2(sum over j != i of 2^s_ij)
    loss_i = log(2) (L_i - s_{i, partner of i})

The product multiplies y in the input dtype and is scaled in float32, so the tensor cores run at full rate and the
similarities lose no precision. Without normalization k = 0 and r = 1.

Gradient, with g_i the gradient of loss_i, or 0 if v_i is not an anchor. In the kernels, row i is in tile ``a``, and
column j is in tile ``b``::

    w_ij = g_i 2^(s_ij - L_i) + g_j 2^(s_ij - L_j) - [j is the partner of i] (g_i + g_j)        w_ii = 0
    G_i = sum over j of w_ij y_j r_j / tau        d v_i = 2^k_i r_i (G_i - (G_i . u_i) u_i)     u_i = r_i y_i

With CROSS, the sum of anchor i is over the vectors of the other tensor, and j takes only their values.

w is rounded to the dtype of y for the second product. The partner's weight is a difference of nearly equal values and
stays in float32. If the last N vectors are not anchors, forward skips their rows, and backward multiplies them only by
the anchors. With M = 2N, forward takes M^2 D operations and backward 3 M^2 D, or 2 M^2 D and 4 M^2 D if all vectors are
anchors. With CROSS, forward takes half of that, and backward 2 M^2 D.

Tiles need masks if their columns include rows of the same program (j = i), partners of these rows, or the end of the
vectors: a first loop computes them, and a second loop without masks computes the others. For cosines, |s| is at most
log2(e) / tau. If this bound is small (``BOUNDED``), the sum of exponentials needs no running maximum, and w_ij needs
one exponential: 2^s_ij (g_i 2^-L_i + g_j 2^-L_j).

Memory traffic with two-byte inputs: forward 6MD bytes (read v, write and read y); backward 10MD (as forward, and read y
again and write dv) + 8MD per chunk of columns (write and read float32 partial sums); row statistics take 20 M bytes.
Each block of rows reads all of y again, from L2. If there are few blocks of rows, their columns are split into chunks,
which a second kernel merges in a fixed order. Up to ``SMALL`` vectors and dimensions (64 in float32), one launch does
everything: 2MD bytes forward, 4MD backward.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    sum_partials,
    traffic,
)
from dfkd_fast.kernels.config import Launch

__all__ = [
    "column_tiles",
    "dtype_and_width",
    "forward",
    "is_bounded",
    "matrix",
    "prepare",
    "small_launch",
    "tiles_per_program",
]


def _fits(arch: int, dim: int, m: int, n: int, stages: int) -> bool:
    """Whether tiles of m rows and, per stage, n columns with all ``dim`` 16-bit dimensions fit in shared memory."""
    return 2 * dim * (m + stages * n) + 2 * m * n <= config.shared_memory(arch)


@config.heuristic("contrastive_loss", BLOCK_M=(32, 128), BLOCK_N=(32, 128), num_stages=(2, 4))
def _config(arch: int, dtype: torch.dtype, *, dim: int) -> Launch:
    """Up to 256 dimensions, a tile holds all of them if it fits. In float32 it holds 32: more spill."""
    if dtype == torch.float32:
        return Launch(tile={"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": min(dim, 32)}, num_warps=8)
    for n in (128, 64):
        if dim <= 256 and _fits(arch, dim, 128, n, 2):
            return Launch(tile={"BLOCK_M": 128, "BLOCK_N": n, "BLOCK_D": dim}, num_warps=8)
    return Launch(tile={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": min(dim, 64)}, num_warps=8, num_stages=3)


@config.heuristic("contrastive_loss_backward", BLOCK_M=(32, 128), BLOCK_N=(32, 128), num_stages=(2, 4))
def _config_backward(arch: int, dtype: torch.dtype, *, dim: int) -> Launch:
    """Like forward. A program sums BLOCK_O dimensions of the gradient: all of them if they fit in registers."""
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
    """For the kernels that process whole rows."""
    return Launch(tile={"ROWS": max(1, 2048 // dim), "BLOCK": dim}, num_warps=max(4, min(16, dim // 512)))


@config.heuristic("contrastive_loss_small")
def _config_small(arch: int, dtype: torch.dtype, *, rows: int, dim: int) -> Launch:
    """One program holds all vectors."""
    return Launch(tile={"ROWS": rows, "BLOCK": dim}, num_warps=4 if rows * max(rows, dim) <= 64 * 64 else 8)


@config.heuristic("contrastive_loss_small_backward", BLOCK_M=(16, 64))
def _config_small_backward(arch: int, dtype: torch.dtype, *, rows: int, dim: int) -> Launch:
    """Each program holds all vectors and computes BLOCK_M rows of the gradients."""
    m, warps = (16, 2) if rows == 16 else (32, 4) if rows * max(rows, dim) <= 64 * 64 else (16, 8)
    return Launch(tile={"ROWS": rows, "BLOCK": dim, "BLOCK_M": min(m, rows)}, num_warps=warps)


SMALL = 128
"""The most vectors, and the most dimensions, that one launch handles; float32: 64."""

# Up to this bound of |s|, differences of similarities are within +-96, and sums of 2^(s_ij - s_ik) over any number of
# vectors neither overflow nor underflow in float32.
_BOUND = 48.0

_LOG_2 = tl.constexpr(math.log(2))
# With this factor of w, softmax weights of a million vectors are normal in float16, and a weight of 2 is finite.
_WEIGHT_SCALE = tl.constexpr(2.0**14)
_LOWEST = tl.constexpr(-3.0e38)


class Matrix(NamedTuple):
    """A matrix (N, D) as the kernels take it; all fields are None if there is none."""

    data: Any
    stride_n: Any
    stride_d: Any


@triton.jit
def _load_rows(first, second, offs_m, offs_d, count, dim):
    """Rows of the 2N vectors, N of ``first`` and then N of ``second``, in float32; zero outside."""
    row = offs_m.to(tl.int64)[:, None]
    column = offs_d.to(tl.int64)[None, :]
    mask_d = (offs_d < dim)[None, :]
    in_first = (offs_m < count)[:, None] & mask_d
    in_second = ((offs_m >= count) & (offs_m < 2 * count))[:, None] & mask_d
    a = tl.load(first.data + (row * first.stride_n + column * first.stride_d), mask=in_first, other=0.0)
    at = second.data + ((row - count) * second.stride_n + column * second.stride_d)
    return a.to(tl.float32) + tl.load(at, mask=in_second, other=0.0).to(tl.float32)


@triton.jit
def _ilogb(x):
    """floor(log2(x)) for x >= 0; 0 for 0."""
    denormal = x < 1.1754943508222875e-38
    bits = tl.where(denormal, x * 16777216.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == 0, 0, (bits >> 23) - tl.where(denormal, 151, 127))


@triton.jit
def _ldexp(x, k):
    """Rows of x times 2^k, in two steps because 2^k may overflow float32."""
    half = k >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((k - half + 127) << 23).to(tl.float32, bitcast=True)
    return x * first[:, None] * second[:, None]


@triton.jit
def _normalize(x, NORMALIZE: tl.constexpr):
    """y, r and k of whole rows."""
    if NORMALIZE:
        abs_max = tl.max(tl.abs(x), 1)
        k = -_ilogb(abs_max)
        y = _ldexp(x, k)
        return y, tl.where(abs_max == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(y * y, 1)))), k
    else:
        return x, tl.full([x.shape[0]], 1.0, tl.float32), tl.zeros([x.shape[0]], tl.int32)


# --- any number of vectors


@traffic(
    writes="y_ptr row_stats_ptr",
    parts={
        "row_stats_ptr": lambda a: 0.2 if a["lse_ptr"] is None else 1.0 if a["BOUNDED"] else 0.8,
        "grad_output_ptr": lambda a: a["ELEMENTWISE"],
        "grad_scale_ptr": lambda a: a["ELEMENTWISE"],
    },
)
@triton.jit
def _prepare_kernel(
    first,  # Matrix, [N, D]
    second,  # Matrix, [N, D]
    y_ptr,  # [stats_stride, width], zeros from row 2N on
    row_stats_ptr,  # [5, stats_stride]: r; for backward k, h = g / grad_scale, L, _WEIGHT_SCALE h 2^-L r if BOUNDED
    lse_ptr,  # [num_anchors], L; None in forward
    grad_output_ptr,  # [num_anchors] or scalar; None in forward
    grad_scale_ptr,  # scalar, divides g: w is rounded, so g must be near one; None in forward
    count, num_anchors, dim, width, stats_stride, grad_output_stride,
    NORMALIZE: tl.constexpr, ELEMENTWISE: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK)
    vectors, inv_norm, k = _normalize(_load_rows(first, second, offs_m, offs_d, count, dim), NORMALIZE)
    at = y_ptr + (offs_m.to(tl.int64)[:, None] * width + offs_d[None, :])
    tl.store(at, cast(vectors, y_ptr.dtype.element_ty), mask=(offs_d < width)[None, :])
    row_stats_ptr += offs_m
    tl.store(row_stats_ptr, inv_norm)
    if lse_ptr is not None:
        tl.store(row_stats_ptr + stats_stride, k.to(tl.float32))
        mask = offs_m < num_anchors
        if ELEMENTWISE:
            g = tl.load(grad_output_ptr + offs_m.to(tl.int64) * grad_output_stride, mask=mask, other=0.0)
            scale = tl.load(grad_scale_ptr)
            g = tl.where(scale == 0, 0.0, tl.div_rn(g, scale))
        else:
            g = tl.where(mask, 1.0, 0.0)
        lse = tl.load(lse_ptr + offs_m, mask=mask, other=float("inf"))
        tl.store(row_stats_ptr + 2 * stats_stride, g)
        tl.store(row_stats_ptr + 3 * stats_stride, lse)
        if BOUNDED:
            tl.store(row_stats_ptr + 4 * stats_stride, g * tl.exp2(-lse) * (inv_norm * _WEIGHT_SCALE))


@triton.jit
def _load_tile(y_ptr, row, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of y, which is padded and needs no mask."""
    base = y_ptr + (row.to(tl.int64) * width + column)
    return tl.load(base + (tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :]))


@triton.jit
def _dot_transposed(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b^T."""
    # On a GPU the product of two vectors does not depend on their place in a tile. In numpy's matmul it does, so the
    # interpreter sums elementwise as far as it can: its tensors have at most 2^20 elements.
    if INTERPRETED and a.shape[0] * b.shape[0] * a.shape[1] <= 2**20:
        return acc + tl.sum(a.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :], 2)
    else:
        return dot(a, tl.trans(b), acc, PRECISION)


@triton.jit
def _products(
    a, b, y_ptr, row, column, width, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    """y_i . y_j for M rows i and N columns j: from tiles ``a`` and ``b``, or without them in steps of D dimensions."""
    acc = tl.zeros([M, N], tl.float32)
    if a is None:
        for start in range(0, width, D):
            a_step = _load_tile(y_ptr, row, start, width, M, D)
            b_step = _load_tile(y_ptr, column, start, width, N, D)
            acc = _dot_transposed(a_step, b_step, acc, PRECISION)
        return acc
    else:
        return _dot_transposed(a, b, acc, PRECISION)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _columns(side, count, CROSS: tl.constexpr):
    """The first column and the end of the columns of a side's rows."""
    if CROSS:
        return (1 - side) * count, (2 - side) * count
    else:
        return 0 * count, 2 * count


@triton.jit
def _masked_ranges(row, partner, begin, end, limit, M: tl.constexpr, N: tl.constexpr):
    """The tiles in [begin, end) that need masks: three ranges in ascending order, each as first tile and length.

    They contain the M columns from ``row`` on, the M columns from ``partner`` on, and the tile in whose interior
    ``limit`` is, if any. With CROSS, ``row`` is the first column, in whose tile others can be before it.
    """
    near, far = tl.minimum(row, partner), tl.maximum(row, partner)
    start_0 = _clamp(near // N, begin, end)
    end_0 = _clamp((near + M - 1) // N + 1, start_0, end)
    start_1 = _clamp(far // N, end_0, end)
    end_1 = _clamp((far + M - 1) // N + 1, start_1, end)
    start_2 = _clamp(limit // N, end_1, end)
    end_2 = _clamp(tl.cdiv(limit, N), start_2, end)
    return start_0, end_0 - start_0, start_1, end_1 - start_1, start_2, end_2 - start_2


@triton.jit
def _masked_tile(i, start_0, count_0, start_1, count_1, start_2):
    """The i-th tile inside the ranges."""
    last = start_2 + (i - count_0 - count_1)
    return tl.where(i < count_0, start_0 + i, tl.where(i < count_0 + count_1, start_1 + (i - count_0), last))


@triton.jit
def _unmasked_tile(i, start_0, count_0, start_1, count_1, start_2, count_2):
    """The i-th tile outside the ranges."""
    tile = i + tl.where(i >= start_0, count_0, 0)
    tile += tl.where(tile >= start_1, count_1, 0)
    return tile + tl.where(tile >= start_2, count_2, 0)


@triton.jit
def _store_loss(out_ptr, lse_ptr, row_max, row_sum, positive, offs_m, mask, scale, ELEMENTWISE: tl.constexpr):
    """Writes the losses of a program's anchors or their sum, and L."""
    log_sum = tl.log2(row_sum)
    tl.store(lse_ptr + offs_m, row_max + log_sum, mask=mask)
    # Subtract first: the loss is exactly 0 if the partner is the only term of the sum.
    loss = ((row_max - positive) + log_sum) * _LOG_2
    if ELEMENTWISE:
        tl.store(out_ptr + offs_m, loss, mask=mask)
    else:
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.where(mask, loss, 0.0)) * scale)


def without_padding(row_stats: float) -> dict[str, Any]:
    """The parts of y and row_stats that a kernel reads; ``row_stats`` is the number of rows of row_stats."""
    rows = {"y_ptr": 1.0, "row_stats_ptr": row_stats / 5}
    return {name: lambda a, part=part: part * 2 * a["count"] / a["y_ptr"].shape[0] for name, part in rows.items()}


@traffic(
    writes="partials_ptr out_ptr lse_ptr",
    parts={
        **without_padding(1),
        "out_ptr": lambda a: a["partials_ptr"] is None,
        "lse_ptr": lambda a: a["partials_ptr"] is None,
    },
)
@triton.jit
def _forward_kernel(
    y_ptr,  # [stats_stride, width]
    row_stats_ptr,  # [5, stats_stride]
    out_ptr,  # [num_anchors], or without ELEMENTWISE [programs]
    lse_ptr,  # [num_anchors]
    partials_ptr,  # [chunks, 3, num_anchors], row_max, row_sum and positive; None for one chunk
    count, num_anchors, width, tiles_per_program, scale_log2, scale,
    CROSS: tl.constexpr, ELEMENTWISE: tl.constexpr, BOUNDED: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(count, BLOCK_M)
    side = tl.program_id(0) // blocks
    local = (tl.program_id(0) - side * blocks) * BLOCK_M
    row, partner = side * count + local, (1 - side) * count + local
    offs = tl.arange(0, BLOCK_M)
    offs_m = row + offs
    mask_m = local + offs < count
    offs_n = tl.arange(0, BLOCK_N)
    low, limit = _columns(side, count, CROSS)
    begin = low // BLOCK_N + tl.program_id(1) * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, tl.cdiv(limit, BLOCK_N))
    start_0, count_0, start_1, count_1, start_2, count_2 = _masked_ranges(
        low if CROSS else row, partner, begin, end, limit, BLOCK_M, BLOCK_N
    )
    masked = count_0 + count_1 + count_2

    a = _load_tile(y_ptr, row, 0, BLOCK_D, BLOCK_M, BLOCK_D) if RESIDENT else None
    inv_norm = tl.load(row_stats_ptr + offs_m)
    positive = tl.zeros([BLOCK_M], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.zeros([BLOCK_M], tl.float32) + (-scale_log2 if BOUNDED else _LOWEST)
    for i in tl.range(0, masked, num_stages=1):
        column = _masked_tile(i, start_0, count_0, start_1, count_1, start_2) * BLOCK_N
        b = _load_tile(y_ptr, column, 0, BLOCK_D, BLOCK_N, BLOCK_D) if RESIDENT else None
        s = _products(a, b, y_ptr, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        # The factor is symmetric in i and j, so backward computes the same bits of s_ij in either order. This matters
        # because s - L cancels if L is large.
        s *= (inv_norm[:, None] * tl.load(row_stats_ptr + column + offs_n)[None, :]) * scale_log2
        j = (column + offs_n)[None, :]
        s = tl.where((j == offs_m[:, None]) | (j < low) | (j >= limit), float("-inf"), s)
        positive += tl.sum(tl.where(j == (partner + offs)[:, None], s, 0.0), 1)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(s - new_max[:, None]), 1)
        row_max = new_max
    row_scale = inv_norm * scale_log2
    for i in range(begin, end - masked):
        column = _unmasked_tile(i, start_0, count_0, start_1, count_1, start_2, count_2) * BLOCK_N
        b = _load_tile(y_ptr, column, 0, BLOCK_D, BLOCK_N, BLOCK_D) if RESIDENT else None
        s = _products(a, b, y_ptr, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        inv_norm_b = tl.load(row_stats_ptr + column + offs_n)
        if BOUNDED:
            s = (s * inv_norm_b[None, :]) * row_scale[:, None]
        else:
            s *= (inv_norm[:, None] * inv_norm_b[None, :]) * scale_log2
            new_max = tl.maximum(row_max, tl.max(s, 1))
            row_sum *= tl.exp2(row_max - new_max)
            row_max = new_max
        row_sum += tl.sum(tl.exp2(s - row_max[:, None]), 1)

    if partials_ptr is not None:
        at = partials_ptr + tl.program_id(1).to(tl.int64) * (3 * num_anchors) + offs_m
        tl.store(at, row_max, mask=mask_m)
        tl.store(at + num_anchors, row_sum, mask=mask_m)
        tl.store(at + 2 * num_anchors, positive, mask=mask_m)
    else:
        _store_loss(out_ptr, lse_ptr, row_max, row_sum, positive, offs_m, mask_m, scale, ELEMENTWISE)


@traffic(writes="out_ptr lse_ptr")
@triton.jit
def _merge_kernel(
    partials_ptr,  # [chunks, 3, num_anchors]
    out_ptr,  # [num_anchors], or without ELEMENTWISE [programs]
    lse_ptr,  # [num_anchors]
    num_anchors, chunks, scale, ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = offs_m < num_anchors
    row_max = tl.full([ROWS], _LOWEST, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    positive = tl.zeros([ROWS], tl.float32)
    at = partials_ptr + offs_m
    for _ in range(0, chunks):
        chunk_max = tl.load(at, mask=mask, other=0.0)
        new_max = tl.maximum(row_max, chunk_max)
        row_sum *= tl.exp2(row_max - new_max)
        row_sum += tl.load(at + num_anchors, mask=mask, other=1.0) * tl.exp2(chunk_max - new_max)
        positive += tl.load(at + 2 * num_anchors, mask=mask, other=0.0)
        row_max = new_max
        at += 3 * num_anchors
    _store_loss(out_ptr, lse_ptr, row_max, row_sum, positive, offs_m, mask, scale, ELEMENTWISE)


# --- few vectors, one launch


@triton.jit
def _load_normalized(first, second, offs_m, offs_d, count, dim, NORMALIZE: tl.constexpr):
    """y in the dtype of the product, r and k."""
    y, inv_norm, k = _normalize(_load_rows(first, second, offs_m, offs_d, count, dim), NORMALIZE)
    if first.data.dtype.element_ty == second.data.dtype.element_ty:
        return cast(y, first.data.dtype.element_ty), inv_norm, k
    else:
        return y, inv_norm, k


@triton.jit
def _is_excluded(i, j, count, CROSS: tl.constexpr):
    """Whether vector j is not in the sum of anchor i, for vectors in [0, 2 count)."""
    if CROSS:
        return (i < count) == (j < count)
    else:
        return i == j


@traffic(writes="out_ptr lse_ptr")
@triton.jit
def _small_forward_kernel(
    first,  # Matrix, [N, D]
    second,  # Matrix, [N, D]
    out_ptr,  # [num_anchors] or scalar
    lse_ptr,  # [num_anchors]
    count, num_anchors, dim, scale_log2, scale,
    CROSS: tl.constexpr, NORMALIZE: tl.constexpr, ELEMENTWISE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, ROWS)
    y, inv_norm, _k = _load_normalized(first, second, offs_m, tl.arange(0, BLOCK), count, dim, NORMALIZE)
    s = _dot_transposed(y, y, tl.zeros([ROWS, ROWS], tl.float32), PRECISION)
    s *= (inv_norm[:, None] * inv_norm[None, :]) * scale_log2
    j = tl.arange(0, ROWS)[None, :]
    s = tl.where(_is_excluded(offs_m[:, None], j, count, CROSS) | (j >= 2 * count), float("-inf"), s)
    partner = tl.where(offs_m < count, offs_m + count, offs_m - count)
    positive = tl.sum(tl.where(j == partner[:, None], s, 0.0), 1)
    row_max = tl.maximum(tl.max(s, 1), _LOWEST)
    row_sum = tl.sum(tl.exp2(s - row_max[:, None]), 1)
    _store_loss(out_ptr, lse_ptr, row_max, row_sum, positive, offs_m, offs_m < num_anchors, scale, ELEMENTWISE)


# --- launchers


def matrix(x: Tensor | None) -> Matrix:
    """A matrix, or None, as a kernel argument."""
    return Matrix(None, None, None) if x is None else Matrix(x, *x.stride())


def dtype_and_width(first: Tensor, second: Tensor) -> tuple[torch.dtype, int]:
    """dtype and row length of y: D padded to a power of two up to 256, and to a multiple of 128 above."""
    dim = first.shape[1]
    dtype = first.dtype if first.dtype == second.dtype else torch.float32
    return dtype, max(16, next_power_of_2(dim)) if dim <= 256 else 128 * cdiv(dim, 128)


def small_launch(kernel: str, first: Tensor, dtype: torch.dtype) -> Launch | None:
    """The configuration of a kernel that handles all vectors in one launch, or None if they are too many."""
    count, dim = first.shape
    most = SMALL if dtype != torch.float32 else min(SMALL, 64)
    if max(2 * count, dim) > most:
        return None
    sizes = {"rows": max(16, next_power_of_2(2 * count)), "dim": max(16, next_power_of_2(dim))}
    return config.choose(kernel, architecture(first), dtype, **sizes)


def is_bounded(scale_log2: float, normalize: bool) -> bool:
    """Whether 2^s can be summed without a running maximum: for cosines at temperatures of at least 0.0301."""
    return normalize and scale_log2 <= _BOUND


def column_tiles(count: int, block_n: int, symmetric: bool, cross: bool) -> list[int]:
    """The number of column tiles that the rows of each side need; those of the second side for backward."""
    starts, ends = (count if cross else 0, 0), (2 * count, 2 * count if symmetric and not cross else count)
    return [cdiv(end, block_n) - start // block_n for start, end in zip(starts, ends, strict=True)]


def tiles_per_program(blocks: int, tiles: list[int], available: int) -> int:
    """The number of column tiles that one program processes.

    Args:
        blocks: blocks of rows per side (``first`` or ``second``).
        tiles: column tiles that the rows of each side need.
        available: SMs of the device.
    """
    longest = max(tiles)
    if blocks * len(tiles) >= 2 * available:
        return longest

    def time(length: int) -> int:
        programs = blocks * sum(cdiv(each, length) for each in tiles)
        # A program start costs as much as two tiles, the merge kernel as much as four.
        return cdiv(programs, available) * (length + 2) + (4 if length < longest else 0)

    return min((cdiv(longest, chunks) for chunks in range(1, 33)), key=time)


def prepare(
    first: Tensor, second: Tensor, normalize: bool, *, bounded: bool = False, lse: Tensor | None = None,
    grad_output: Tensor | None = None, grad_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes y and row_stats with :func:`_prepare_kernel`, padded with zero rows to whole tiles."""
    count, dim = first.shape
    dtype, width = dtype_and_width(first, second)
    padded = 128 * (cdiv(2 * count, 128) + 1)
    y = first.new_empty((padded, width), dtype=dtype)
    row_stats = first.new_empty((5, padded), dtype=torch.float32)
    elementwise = grad_output is not None and grad_output.ndim == 1
    stride = grad_output.stride(0) if elementwise and grad_output is not None else 0
    num_anchors = 0 if lse is None else lse.shape[0]
    chosen = config.choose("contrastive_loss_rows", architecture(first), dtype, dim=next_power_of_2(width))
    launch(
        _prepare_kernel,
        (cdiv(padded, chosen.tile["ROWS"]),),
        *(matrix(first), matrix(second), y, row_stats, lse, grad_output, grad_scale),
        *(count, num_anchors, dim, width, padded, stride),
        config=chosen,
        NORMALIZE=normalize,
        ELEMENTWISE=elementwise,
        BOUNDED=bounded,
    )
    return y, row_stats


def forward(
    first: Tensor, second: Tensor, temperature: float, symmetric: bool, negatives: str, normalize: bool, reduction: str,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Computes the contrastive loss.

    Args:
        first: (N, D), any strides.
        second: (N, D), any strides.
        temperature: positive.
        symmetric: see :func:`dfkd_fast.ops.contrastive_loss`.
        negatives: see there.
        normalize: see there.
        reduction: see there.
        out: float32, a scalar, or (num_anchors,) for "none".
        lse: (num_anchors,), float32, the logarithm to base 2 of each anchor's sum, for :func:`backward`.
    """
    count, dim = first.shape
    if count == 0:
        # The values are those of torch's mean and sum of an empty tensor.
        out.fill_(float("nan") if reduction == "mean" else 0.0)
        return
    dtype, width = dtype_and_width(first, second)
    num_anchors = lse.shape[0]
    elementwise = reduction == "none"
    scale = 1 / num_anchors if reduction == "mean" else 1.0
    scale_log2 = math.log2(math.e) / temperature
    small = small_launch("contrastive_loss_small", first, dtype)
    if small is not None:
        launch(
            _small_forward_kernel,
            (1,),
            *(matrix(first), matrix(second), out, lse, count, num_anchors, dim, scale_log2, scale),
            config=small,
            CROSS=negatives == "cross",
            NORMALIZE=normalize,
            ELEMENTWISE=elementwise,
            PRECISION=precision(dtype),
        )
        return
    y, row_stats = prepare(first, second, normalize)
    chosen = config.choose("contrastive_loss", architecture(first), dtype, dim=next_power_of_2(width))
    blocks = cdiv(count, chosen.tile["BLOCK_M"])
    sides = 2 if symmetric else 1
    cross = negatives == "cross"
    tiles = column_tiles(count, chosen.tile["BLOCK_N"], symmetric, cross)[:sides]
    length = tiles_per_program(blocks, tiles, num_sms(first))
    chunks = cdiv(max(tiles), length)
    partials = None if chunks == 1 else first.new_empty((chunks, 3, num_anchors), dtype=torch.float32)
    sums = blocks * sides if chunks == 1 else cdiv(num_anchors, 128)
    direct = elementwise or sums == 1
    losses = out if direct else out.new_empty(sums)
    kernel_scale = scale if direct else 1.0
    launch(
        _forward_kernel,
        (blocks * sides, chunks),
        *(y, row_stats, losses, lse, partials, count, num_anchors, width, length, scale_log2, kernel_scale),
        config=chosen,
        CROSS=cross,
        ELEMENTWISE=elementwise,
        BOUNDED=is_bounded(scale_log2, normalize),
        RESIDENT=chosen.tile["BLOCK_D"] == width,
        PRECISION=precision(dtype),
    )
    if partials is not None:
        merge = Launch(tile={"ROWS": 128})
        arguments = (partials, losses, lse, num_anchors, chunks, kernel_scale)
        launch(_merge_kernel, (sums,), *arguments, config=merge, ELEMENTWISE=elementwise)
    if not direct:
        sum_partials(losses, out, scale)
