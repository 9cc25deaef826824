"""Gradients of NT-Xent without its similarity matrix: see :mod:`dfkd_fast.kernels.contrastive_loss`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels import contrastive_loss as shared
from dfkd_fast.kernels.common import architecture, cast, cdiv, dot, launch, next_power_of_2, num_sms, precision, traffic
from dfkd_fast.kernels.config import Launch
from dfkd_fast.kernels.contrastive_loss import (
    _WEIGHT_SCALE,
    _columns,
    _dot_transposed,
    _is_excluded,
    _ldexp,
    _load_normalized,
    _load_tile,
    _masked_ranges,
    _masked_tile,
    _products,
    _unmasked_tile,
)

__all__ = ["backward"]


@triton.jit
def _masked_weights(s, g, lse, g_b, lse_b, inv_norm_b, is_partner, is_excluded):
    """_WEIGHT_SCALE w_ij r_j, zero in excluded columns; and the weight of the partner without these factors."""
    p_a = tl.exp2(s - lse[:, None])
    p_b = tl.exp2(s - lse_b[None, :])
    partner = tl.sum(tl.where(is_partner, (p_a - 1) * g[:, None] + (p_b - 1) * g_b[None, :], 0.0), 1)
    w = (p_a * g[:, None] + p_b * g_b[None, :]) * (inv_norm_b * _WEIGHT_SCALE)[None, :]
    return tl.where(is_excluded, 0.0, w), partner


@triton.jit
def _grad_rows(acc, partner_weight, u, u_partner, inv_norm, k, factor, NORMALIZE: tl.constexpr):
    """Gradient of v from the sum of weighted vectors and the partner's weight."""
    acc = acc * (1.0 / _WEIGHT_SCALE) + partner_weight[:, None] * u_partner
    if NORMALIZE:
        acc = (acc - tl.sum(acc * u, 1)[:, None] * u) * inv_norm[:, None]
        return _ldexp(acc * factor, k)  # in the other order, the gradients of short vectors could overflow
    return acc * factor


@triton.jit
def _store_rows(da, db, value, offs_m, offs_d, count, dim):
    """Writes rows of both gradients, the counterpart of :func:`_load_rows`. Skips a gradient that is None."""
    row = offs_m.to(tl.int64)[:, None]
    column = offs_d.to(tl.int64)[None, :]
    mask_d = (offs_d < dim)[None, :]
    if da.data is not None:
        at = da.data + (row * da.stride_n + column * da.stride_d)
        tl.store(at, cast(value, da.data.dtype.element_ty), mask=(offs_m < count)[:, None] & mask_d)
    if db.data is not None:
        at = db.data + ((row - count) * db.stride_n + column * db.stride_d)
        mask = ((offs_m >= count) & (offs_m < 2 * count))[:, None] & mask_d
        tl.store(at, cast(value, db.data.dtype.element_ty), mask=mask)


@traffic(writes="grad_scale_ptr")
@triton.jit
def _abs_max_kernel(
    grad_output_ptr,  # [num_anchors]
    grad_scale_ptr,  # scalar
    num_anchors, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    abs_max = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_anchors, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        g = tl.load(grad_output_ptr + offs.to(tl.int64) * stride, mask=offs < num_anchors, other=0.0)
        abs_max = tl.maximum(abs_max, tl.abs(g))
    tl.store(grad_scale_ptr, tl.max(abs_max))


@traffic(writes="partials_ptr partner_weights_ptr", parts=shared.without_padding(4))
@triton.jit
def _backward_kernel(
    y_ptr,  # [stats_stride, width]
    row_stats_ptr,  # [5, stats_stride]
    partials_ptr,  # [chunks, num_rows, width], sums of _WEIGHT_SCALE w_ij y_j r_j
    partner_weights_ptr,  # [chunks, num_rows]
    count, width, stats_stride, tiles_per_program, first_side, num_rows, scale_log2,
    SYMMETRIC: tl.constexpr, CROSS: tl.constexpr, BOUNDED: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Weighted sums of vectors, and the partner's weight, over the columns of one program.

    The main loop fills the registers, so another kernel computes the gradients from the sums.
    """
    if RESIDENT:
        width = BLOCK_D
    blocks = tl.cdiv(count, BLOCK_M)
    side = first_side + tl.program_id(0) // blocks
    local = (tl.program_id(0) % blocks) * BLOCK_M
    row, partner = side * count + local, (1 - side) * count + local
    offset = tl.program_id(2) * BLOCK_O
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    low, limit = _columns(side, count, CROSS)
    if not SYMMETRIC:
        limit = tl.where(side == 0, limit, count)
    begin = low // BLOCK_N + tl.program_id(1) * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, tl.cdiv(limit, BLOCK_N))
    begin = tl.minimum(begin, end)
    start_0, count_0, start_1, count_1, start_2, count_2 = _masked_ranges(
        low if CROSS else row, partner, begin, end, limit, BLOCK_M, BLOCK_N
    )
    masked = count_0 + count_1 + count_2

    a = _load_tile(y_ptr, row, 0, width, BLOCK_M, BLOCK_D) if RESIDENT else None
    inv_norm = tl.load(row_stats_ptr + row + offs_m)
    g = tl.load(row_stats_ptr + 2 * stats_stride + row + offs_m)
    lse = tl.load(row_stats_ptr + 3 * stats_stride + row + offs_m)
    partner_weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for i in tl.range(0, masked, num_stages=1):
        column = _masked_tile(i, start_0, count_0, start_1, count_1, start_2) * BLOCK_N
        b = _load_tile(y_ptr, column, offset, width, BLOCK_N, BLOCK_O)
        s = _products(a, b, y_ptr, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        stats_b = row_stats_ptr + column + offs_n
        inv_norm_b, g_b = tl.load(stats_b), tl.load(stats_b + 2 * stats_stride)
        s *= (inv_norm[:, None] * inv_norm_b[None, :]) * scale_log2
        j = (column + offs_n)[None, :]
        is_partner = (j == (partner + offs_m)[:, None]) & (j < limit)
        is_excluded = is_partner | (j == (row + offs_m)[:, None]) | (j < low) | (j >= limit)
        lse_b = tl.load(stats_b + 3 * stats_stride)
        w, weight = _masked_weights(s, g, lse, g_b, lse_b, inv_norm_b, is_partner, is_excluded)
        partner_weight += weight
        acc = dot(cast(w, y_ptr.dtype.element_ty), b, acc, PRECISION)
    g_exp = g * tl.exp2(-lse) * _WEIGHT_SCALE
    row_scale = inv_norm * scale_log2
    for i in range(begin, end - masked):
        column = _unmasked_tile(i, start_0, count_0, start_1, count_1, start_2, count_2) * BLOCK_N
        b = _load_tile(y_ptr, column, offset, width, BLOCK_N, BLOCK_O)
        s = _products(a, b, y_ptr, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        stats_b = row_stats_ptr + column + offs_n
        inv_norm_b = tl.load(stats_b)
        if BOUNDED:
            s = (s * inv_norm_b[None, :]) * row_scale[:, None]
            w = tl.exp2(s) * (g_exp[:, None] * inv_norm_b[None, :] + tl.load(stats_b + 4 * stats_stride)[None, :])
        else:
            s *= (inv_norm[:, None] * inv_norm_b[None, :]) * scale_log2
            w = tl.exp2(s - lse[:, None]) * g[:, None]
            lse_b, g_b = tl.load(stats_b + 3 * stats_stride), tl.load(stats_b + 2 * stats_stride)
            w += tl.exp2(s - lse_b[None, :]) * g_b[None, :]
            w *= (inv_norm_b * _WEIGHT_SCALE)[None, :]
        acc = dot(cast(w, y_ptr.dtype.element_ty), b, acc, PRECISION)

    at = tl.program_id(1).to(tl.int64) * num_rows + (row - first_side * count + offs_m)
    mask = (local + offs_m < count) & (begin < end)
    offs_o = offset + tl.arange(0, BLOCK_O)
    tl.store(partials_ptr + (at[:, None] * width + offs_o[None, :]), acc, mask=mask[:, None])
    tl.store(partner_weights_ptr + at, partner_weight, mask=mask & (tl.program_id(2) == 0))


@traffic(writes="da db", parts=shared.without_padding(2))
@triton.jit
def _reduce_kernel(
    y_ptr,  # [stats_stride, width]
    row_stats_ptr,  # [5, stats_stride]
    grad_scale_ptr,  # scalar
    da,  # Matrix, [N, D] or None
    db,  # Matrix, [N, D] or None
    partials_ptr,  # [chunks, num_rows, width]
    partner_weights_ptr,  # [chunks, num_rows]
    count, dim, width, stats_stride, first_side, num_rows, chunks_a, chunks_b, scale,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of each row in a fixed order and computes its gradient."""
    blocks = tl.cdiv(count, ROWS)
    side = first_side + tl.program_id(0) // blocks
    local = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    row, partner = (side * count + local).to(tl.int64), ((1 - side) * count + local).to(tl.int64)
    offs_d = tl.arange(0, BLOCK)
    mask = (local < count)[:, None] & (offs_d < width)[None, :]
    at = row - first_side * count
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    partner_weight = tl.zeros([ROWS], tl.float32)
    for _ in range(0, tl.where(side == 0, chunks_a, chunks_b)):
        acc += tl.load(partials_ptr + (at[:, None] * width + offs_d[None, :]), mask=mask, other=0.0)
        partner_weight += tl.load(partner_weights_ptr + at, mask=local < count, other=0.0)
        at += num_rows
    inv_norm = tl.load(row_stats_ptr + row)
    u = tl.load(y_ptr + (row[:, None] * width + offs_d[None, :]), mask=mask, other=0.0)
    u_partner = tl.load(y_ptr + (partner[:, None] * width + offs_d[None, :]), mask=mask, other=0.0)
    u = u.to(tl.float32) * inv_norm[:, None]
    u_partner = u_partner.to(tl.float32) * tl.load(row_stats_ptr + partner)[:, None]
    k = tl.load(row_stats_ptr + stats_stride + row).to(tl.int32)
    grad = _grad_rows(acc, partner_weight, u, u_partner, inv_norm, k, tl.load(grad_scale_ptr) * scale, NORMALIZE)
    row = tl.where(local < count, row, 2 * count)
    _store_rows(da, db, grad, row, offs_d, count, dim)


@traffic(writes="da db")
@triton.jit
def _small_backward_kernel(
    grad_output_ptr,  # [num_anchors] or scalar
    first,  # Matrix, [N, D]
    second,  # Matrix, [N, D]
    lse_ptr,  # [num_anchors]
    da,  # Matrix, [N, D] or None
    db,  # Matrix, [N, D] or None
    count, num_anchors, dim, grad_output_stride, scale_log2, scale,
    CROSS: tl.constexpr, NORMALIZE: tl.constexpr, ELEMENTWISE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_M rows of the gradients."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK)
    a, inv_norm, k = _load_normalized(first, second, offs_m, offs_d, count, dim, NORMALIZE)
    b, inv_norm_b, _k = _load_normalized(first, second, offs_n, offs_d, count, dim, NORMALIZE)
    s = _dot_transposed(a, b, tl.zeros([BLOCK_M, ROWS], tl.float32), PRECISION)
    s *= (inv_norm[:, None] * inv_norm_b[None, :]) * scale_log2
    mask_m, mask_n = offs_m < num_anchors, offs_n < num_anchors
    if ELEMENTWISE:
        g = tl.load(grad_output_ptr + offs_m.to(tl.int64) * grad_output_stride, mask=mask_m, other=0.0)
        g_b = tl.load(grad_output_ptr + offs_n.to(tl.int64) * grad_output_stride, mask=mask_n, other=0.0)
        grad_scale = tl.max(tl.abs(g_b))
        g = tl.where(grad_scale == 0, 0.0, tl.div_rn(g, grad_scale))
        g_b = tl.where(grad_scale == 0, 0.0, tl.div_rn(g_b, grad_scale))
    else:
        grad_scale = tl.load(grad_output_ptr)
        g = tl.where(mask_m, 1.0, 0.0)
        g_b = tl.where(mask_n, 1.0, 0.0)
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
    lse_b = tl.load(lse_ptr + offs_n, mask=mask_n, other=float("inf"))
    is_partner = offs_n[None, :] == tl.where(offs_m < count, offs_m + count, offs_m - count)[:, None]
    is_excluded = is_partner | _is_excluded(offs_m[:, None], offs_n[None, :], count, CROSS)
    is_excluded = is_excluded | (offs_n >= 2 * count)[None, :]
    w, partner_weight = _masked_weights(s, g, lse, g_b, lse_b, inv_norm_b, is_partner, is_excluded)
    acc = dot(cast(w, b.dtype), b, tl.zeros([BLOCK_M, BLOCK], tl.float32), PRECISION)
    partner, inv_norm_partner, _k = _load_normalized(second, first, offs_m, offs_d, count, dim, NORMALIZE)
    u = a.to(tl.float32) * inv_norm[:, None]
    u_partner = partner.to(tl.float32) * inv_norm_partner[:, None]
    grad = _grad_rows(acc, partner_weight, u, u_partner, inv_norm, k, grad_scale * scale, NORMALIZE)
    _store_rows(da, db, grad, offs_m, offs_d, count, dim)


def backward(
    grad_output: Tensor, first: Tensor, second: Tensor, temperature: float, symmetric: bool, negatives: str,
    normalize: bool, reduction: str, lse: Tensor, da: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    """Computes the gradients of :func:`dfkd_fast.kernels.contrastive_loss.forward`.

    Args:
        grad_output: gradient of ``out``, of its shape, any strides.
        first: (N, D), as in forward.
        second: (N, D), as in forward.
        temperature: positive.
        symmetric: see :func:`dfkd_fast.ops.contrastive_loss`.
        negatives: see there.
        normalize: see there.
        reduction: see there.
        lse: (num_anchors,), float32, from forward.
        da: (N, D), in the dtype of ``first``; None if it is not needed.
        db: (N, D), in the dtype of ``second``; None if it is not needed.
    """
    count, dim = first.shape
    sides = (da is not None) + (db is not None)
    if count == 0 or sides == 0:
        return
    dtype, width = shared.dtype_and_width(first, second)
    num_anchors = lse.shape[0]
    elementwise, cross = grad_output.ndim == 1, negatives == "cross"
    scale = 1 / temperature / (num_anchors if reduction == "mean" else 1)
    scale_log2 = math.log2(math.e) / temperature
    gradients = (shared.matrix(da), shared.matrix(db))
    small = shared.small_launch("contrastive_loss_small_backward", first, dtype)
    if small is not None:
        launch(
            _small_backward_kernel,
            (cdiv(small.tile["ROWS"], small.tile["BLOCK_M"]),),
            *(grad_output, shared.matrix(first), shared.matrix(second), lse, *gradients),
            *(count, num_anchors, dim, grad_output.stride(0) if elementwise else 0, scale_log2, scale),
            config=small,
            CROSS=cross,
            NORMALIZE=normalize,
            ELEMENTWISE=elementwise,
            PRECISION=precision(dtype),
        )
        return
    grad_scale = grad_output
    if elementwise:
        grad_scale = grad_output.new_empty(())
        abs_max = Launch(tile={"BLOCK": 4096}, num_warps=8)
        launch(_abs_max_kernel, (1,), grad_output, grad_scale, num_anchors, grad_output.stride(0), config=abs_max)
    bounded = shared.is_bounded(scale_log2, normalize)
    y, row_stats = shared.prepare(
        first, second, normalize, bounded=bounded, lse=lse, grad_output=grad_output, grad_scale=grad_scale
    )
    chosen = config.choose("contrastive_loss_backward", architecture(first), dtype, dim=next_power_of_2(width))
    first_side = 0 if da is not None else 1
    blocks = cdiv(count, chosen.tile["BLOCK_M"])
    outputs = cdiv(width, chosen.tile["BLOCK_O"])
    tiles = shared.column_tiles(count, chosen.tile["BLOCK_N"], symmetric, cross)
    needed = tiles[first_side : first_side + sides]
    length = shared.tiles_per_program(blocks * outputs, needed, num_sms(first))
    chunks = cdiv(max(needed), length)
    num_rows = sides * count
    partials = first.new_empty((chunks, num_rows, width), dtype=torch.float32)
    partner_weights = first.new_empty((chunks, num_rows), dtype=torch.float32)
    stats_stride = row_stats.shape[1]
    launch(
        _backward_kernel,
        (blocks * sides, chunks, outputs),
        *(y, row_stats, partials, partner_weights),
        *(count, width, stats_stride, length, first_side, num_rows, scale_log2),
        config=chosen,
        SYMMETRIC=symmetric,
        CROSS=cross,
        BOUNDED=bounded,
        RESIDENT=chosen.tile["BLOCK_D"] == width,
        PRECISION=precision(dtype),
    )
    merge = config.choose("contrastive_loss_rows", architecture(first), dtype, dim=next_power_of_2(width))
    launch(
        _reduce_kernel,
        (sides * cdiv(count, merge.tile["ROWS"]),),
        *(y, row_stats, grad_scale, *gradients, partials, partner_weights),
        *(count, dim, width, stats_stride, first_side, num_rows, *(cdiv(each, length) for each in tiles), scale),
        config=merge,
        NORMALIZE=normalize,
    )
