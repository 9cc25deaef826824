"""Gradients of NT-Xent without its similarity matrix: see :mod:`dfkd_fast.kernels.contrastive_loss`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels import contrastive_loss as shared
from dfkd_fast.kernels.common import architecture, cast, cdiv, dot, launch, next_power_of_2, num_sms, precision
from dfkd_fast.kernels.config import Launch
from dfkd_fast.kernels.contrastive_loss import (
    _LIFT,
    _masked,
    _plain,
    _product,
    _products,
    _runs,
    _tile,
    _times_power,
    _vectors,
)

__all__ = ["backward"]


@triton.jit
def _tangent(total, pair, u, partner, inverse, k, factor, NORMALIZE: tl.constexpr):
    """Gradient of v from the sum of weighted vectors and the partner's weight."""
    total = total * (1.0 / _LIFT) + pair[:, None] * partner
    if NORMALIZE:
        total = (total - tl.sum(total * u, 1)[:, None] * u) * inverse[:, None]
        total = _times_power(total, k)
    return total * factor


@triton.jit
def _store_rows(da, db, value, rows, columns, count, dim, da_row, da_column, db_row, db_column):
    """Rows of both gradients, as :func:`_rows` counts them; a gradient that is None is left out."""
    row = rows.to(tl.int64)[:, None]
    column = columns.to(tl.int64)[None, :]
    inside = (columns < dim)[None, :]
    if da is not None:
        at = da + (row * da_row + column * da_column)
        tl.store(at, cast(value, da.dtype.element_ty), mask=(rows < count)[:, None] & inside)
    if db is not None:
        at = db + ((row - count) * db_row + column * db_column)
        mask = ((rows >= count) & (rows < 2 * count))[:, None] & inside
        tl.store(at, cast(value, db.dtype.element_ty), mask=mask)


@triton.jit
def _largest_kernel(grad_output, unit, anchors, stride, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, anchors, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(grad_output + at.to(tl.int64) * stride, mask=at < anchors, other=0.0)
        largest = tl.maximum(largest, tl.abs(g))
    tl.store(unit, tl.max(largest))


@triton.jit
def _backward_kernel(
    vectors,
    numbers,
    parts,
    pairs,
    count,
    width,
    padded,
    span,
    first_side,
    rows,
    scale_log2,
    SYMMETRIC: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Weighted sums of vectors and the partner's weight, of the columns of one program.

    What follows from the sums is another kernel's: beside a loop that fills the registers there is no room for it.
    """
    if RESIDENT:
        width = BLOCK_D
    blocks = tl.cdiv(count, BLOCK_M)
    side = first_side + tl.program_id(0) // blocks
    local = (tl.program_id(0) % blocks) * BLOCK_M
    row, partner = side * count + local, (1 - side) * count + local
    offset = tl.program_id(2) * BLOCK_O
    lane = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    limit = 2 * count
    if not SYMMETRIC:
        limit = tl.where(side == 0, limit, count)
    end = tl.minimum((tl.program_id(1) + 1) * span, tl.cdiv(limit, BLOCK_N))
    begin = tl.minimum(tl.program_id(1) * span, end)
    start_0, count_0, start_1, count_1, start_2, count_2 = _runs(row, partner, begin, end, limit, BLOCK_M, BLOCK_N)
    masked = count_0 + count_1 + count_2

    if RESIDENT:
        a = _tile(vectors, row, 0, width, BLOCK_M, BLOCK_D)
    inverse = tl.load(numbers + row + lane)
    gain = tl.load(numbers + 2 * padded + row + lane)
    level = tl.load(numbers + 3 * padded + row + lane)
    pair = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for i in tl.range(0, masked, num_stages=1):
        column = _masked(i, start_0, count_0, start_1, count_1, start_2) * BLOCK_N
        b = _tile(vectors, column, offset, width, BLOCK_N, BLOCK_O)
        if RESIDENT:
            s = _product(a, b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        else:
            s = _products(vectors, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        at = numbers + column + columns
        inverse_b, gain_b = tl.load(at), tl.load(at + 2 * padded)
        s *= (inverse[:, None] * inverse_b[None, :]) * scale_log2
        to_a = tl.exp2(s - level[:, None])
        to_b = tl.exp2(s - tl.load(at + 3 * padded)[None, :])
        j = (column + columns)[None, :]
        paired = (j == (partner + lane)[:, None]) & (j < limit)
        w = (to_a - 1) * gain[:, None] + (to_b - 1) * gain_b[None, :]
        pair += tl.sum(tl.where(paired, w, 0.0), 1)
        w = (to_a * gain[:, None] + to_b * gain_b[None, :]) * (inverse_b * _LIFT)[None, :]
        w = tl.where(paired | (j == (row + lane)[:, None]) | (j >= limit), 0.0, w)
        total = dot(cast(w, vectors.dtype.element_ty), b, total, PRECISION)
    share = gain * tl.exp2(-level) * _LIFT
    bent = inverse * scale_log2
    for i in range(begin, end - masked):
        column = _plain(i, start_0, count_0, start_1, count_1, start_2, count_2) * BLOCK_N
        b = _tile(vectors, column, offset, width, BLOCK_N, BLOCK_O)
        if RESIDENT:
            s = _product(a, b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        else:
            s = _products(vectors, row, column, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        at = numbers + column + columns
        inverse_b = tl.load(at)
        if BOUNDED:
            s = (s * inverse_b[None, :]) * bent[:, None]
            w = tl.exp2(s) * (share[:, None] * inverse_b[None, :] + tl.load(at + 4 * padded)[None, :])
        else:
            s *= (inverse[:, None] * inverse_b[None, :]) * scale_log2
            w = tl.exp2(s - level[:, None]) * gain[:, None]
            w += tl.exp2(s - tl.load(at + 3 * padded)[None, :]) * tl.load(at + 2 * padded)[None, :]
            w *= (inverse_b * _LIFT)[None, :]
        total = dot(cast(w, vectors.dtype.element_ty), b, total, PRECISION)

    at = tl.program_id(1).to(tl.int64) * rows + (row - first_side * count + lane)
    keep = (local + lane < count) & (begin < end)
    outputs = offset + tl.arange(0, BLOCK_O)
    tl.store(parts + (at[:, None] * width + outputs[None, :]), total, mask=keep[:, None])
    tl.store(pairs + at, pair, mask=keep & (tl.program_id(2) == 0))


@triton.jit
def _finish_kernel(
    vectors,
    numbers,
    unit,
    da,
    db,
    parts,
    pairs,
    count,
    dim,
    width,
    padded,
    first_side,
    rows,
    chunks_a,
    chunks_b,
    scale,
    da_row,
    da_column,
    db_row,
    db_column,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up what the programs of a row found, in order."""
    blocks = tl.cdiv(count, ROWS)
    side = first_side + tl.program_id(0) // blocks
    local = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    row, partner = (side * count + local).to(tl.int64), ((1 - side) * count + local).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = (local < count)[:, None] & (columns < width)[None, :]
    at = row - first_side * count
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    pair = tl.zeros([ROWS], tl.float32)
    for _ in range(0, tl.where(side == 0, chunks_a, chunks_b)):
        total += tl.load(parts + (at[:, None] * width + columns[None, :]), mask=inside, other=0.0)
        pair += tl.load(pairs + at, mask=local < count, other=0.0)
        at += rows
    inverse = tl.load(numbers + row)
    u = tl.load(vectors + (row[:, None] * width + columns[None, :]), mask=inside, other=0.0)
    v = tl.load(vectors + (partner[:, None] * width + columns[None, :]), mask=inside, other=0.0)
    u = u.to(tl.float32) * inverse[:, None]
    v = v.to(tl.float32) * tl.load(numbers + partner)[:, None]
    k = tl.load(numbers + padded + row).to(tl.int32)
    gradient = _tangent(total, pair, u, v, inverse, k, tl.load(unit) * scale, NORMALIZE)
    row = tl.where(local < count, row, 2 * count)
    _store_rows(da, db, gradient, row, columns, count, dim, da_row, da_column, db_row, db_column)


@triton.jit
def _small_backward_kernel(
    grad_output,
    first,
    second,
    saved,
    da,
    db,
    count,
    anchors,
    dim,
    first_row,
    first_column,
    second_row,
    second_column,
    da_row,
    da_column,
    db_row,
    db_column,
    grad_output_row,
    scale_log2,
    scale,
    NORMALIZE: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the gradients, BLOCK_M a program."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    a, inverse, k = _vectors(
        first, second, i, columns, count, dim, first_row, first_column, second_row, second_column, NORMALIZE
    )
    b, inverse_b, _k = _vectors(
        first, second, j, columns, count, dim, first_row, first_column, second_row, second_column, NORMALIZE
    )
    s = _product(a, b, tl.zeros([BLOCK_M, ROWS], tl.float32), PRECISION)
    s *= (inverse[:, None] * inverse_b[None, :]) * scale_log2
    if ELEMENTWISE:
        g = tl.load(grad_output + i.to(tl.int64) * grad_output_row, mask=i < anchors, other=0.0)
        g_b = tl.load(grad_output + j.to(tl.int64) * grad_output_row, mask=j < anchors, other=0.0)
        unit = tl.max(tl.abs(g_b))
        gain = tl.where(unit == 0, 0.0, tl.div_rn(g, unit))
        gain_b = tl.where(unit == 0, 0.0, tl.div_rn(g_b, unit))
    else:
        unit = tl.load(grad_output)
        gain = tl.where(i < anchors, 1.0, 0.0)
        gain_b = tl.where(j < anchors, 1.0, 0.0)
    to_a = tl.exp2(s - tl.load(saved + i, mask=i < anchors, other=float("inf"))[:, None])
    to_b = tl.exp2(s - tl.load(saved + j, mask=j < anchors, other=float("inf"))[None, :])
    paired = j[None, :] == tl.where(i < count, i + count, i - count)[:, None]
    w = (to_a - 1) * gain[:, None] + (to_b - 1) * gain_b[None, :]
    pair = tl.sum(tl.where(paired, w, 0.0), 1)
    w = (to_a * gain[:, None] + to_b * gain_b[None, :]) * (inverse_b * _LIFT)[None, :]
    w = tl.where(paired | (j[None, :] == i[:, None]) | (j >= 2 * count)[None, :], 0.0, w)
    total = dot(cast(w, b.dtype), b, tl.zeros([BLOCK_M, BLOCK], tl.float32), PRECISION)
    v, inverse_v, _k = _vectors(
        second, first, i, columns, count, dim, second_row, second_column, first_row, first_column, NORMALIZE
    )
    u = a.to(tl.float32) * inverse[:, None]
    v = v.to(tl.float32) * inverse_v[:, None]
    gradient = _tangent(total, pair, u, v, inverse, k, unit * scale, NORMALIZE)
    _store_rows(da, db, gradient, i, columns, count, dim, da_row, da_column, db_row, db_column)


def backward(
    grad_output: Tensor,
    first: Tensor,
    second: Tensor,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    saved: Tensor,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    """Gradients of :func:`forward`.

    Args:
        grad_output: gradient of ``out``, of its shape, any strides.
        first: as in forward, like all up to ``saved``.
        second: (N, D).
        temperature: above 0.
        symmetric: the op's.
        normalize: the op's.
        reduction: the op's.
        saved: float32, one value per anchor.
        da: (N, D), in the dtype of ``first``; None if it is not needed.
        db: (N, D), in the dtype of ``second``, or None.
    """
    count, dim = first.shape
    sides = (da is not None) + (db is not None)
    if count == 0 or sides == 0:
        return
    dtype, width = shared.shape(first, second)
    anchors = saved.shape[0]
    elementwise = grad_output.ndim == 1
    scale = 1 / temperature / (anchors if reduction == "mean" else 1)
    scale_log2 = math.log2(math.e) / temperature
    results = (da, db)
    strides = [step for d in results for step in ((0, 0) if d is None else d.stride())]
    small = shared.small_launch("contrastive_loss_small_backward", first, dtype)
    if small is not None:
        launch(
            _small_backward_kernel,
            (cdiv(small.tile["ROWS"], small.tile["BLOCK_M"]),),
            grad_output,
            first,
            second,
            saved,
            *results,
            count,
            anchors,
            dim,
            *first.stride(),
            *second.stride(),
            *strides,
            grad_output.stride(0) if elementwise else 0,
            scale_log2,
            scale,
            config=small,
            NORMALIZE=normalize,
            ELEMENTWISE=elementwise,
            PRECISION=precision(dtype),
        )
        return
    unit = grad_output
    if elementwise:
        unit = grad_output.new_empty(())
        largest = Launch(tile={"BLOCK": 4096}, num_warps=8)
        launch(_largest_kernel, (1,), grad_output, unit, anchors, grad_output.stride(0), config=largest)
    bounded = shared.bounded(scale_log2, normalize)
    vectors, numbers = shared.prepared(
        first, second, normalize, bounded=bounded, saved=saved, grad_output=grad_output, unit=unit
    )
    chosen = config.choose("contrastive_loss_backward", architecture(first), dtype, dim=next_power_of_2(width))
    first_side = 0 if da is not None else 1
    blocks = cdiv(count, chosen.tile["BLOCK_M"])
    outputs = cdiv(width, chosen.tile["BLOCK_O"])
    tiles = [cdiv((2 if symmetric or side == 0 else 1) * count, chosen.tile["BLOCK_N"]) for side in (0, 1)]
    needed = tiles[first_side : first_side + sides]
    span = shared.tiles_a_program(blocks * outputs, needed, num_sms(first))
    chunks = cdiv(max(needed), span)
    rows = sides * count
    parts = first.new_empty((chunks, rows, width), dtype=torch.float32)
    pairs = first.new_empty((chunks, rows), dtype=torch.float32)
    launch(
        _backward_kernel,
        (blocks * sides, chunks, outputs),
        vectors,
        numbers,
        parts,
        pairs,
        count,
        width,
        numbers.shape[1],
        span,
        first_side,
        rows,
        scale_log2,
        config=chosen,
        SYMMETRIC=symmetric,
        BOUNDED=bounded,
        RESIDENT=chosen.tile["BLOCK_D"] == width,
        PRECISION=precision(dtype),
    )
    merge = config.choose("contrastive_loss_rows", architecture(first), dtype, dim=next_power_of_2(width))
    launch(
        _finish_kernel,
        (sides * cdiv(count, merge.tile["ROWS"]),),
        vectors,
        numbers,
        unit,
        *results,
        parts,
        pairs,
        count,
        dim,
        width,
        numbers.shape[1],
        first_side,
        rows,
        *(cdiv(each, span) for each in tiles),
        scale,
        *strides,
        config=merge,
        NORMALIZE=normalize,
    )
