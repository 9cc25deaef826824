"""KL divergence of two softmaxes: forward and backward in one pass over the logits each.

With p and q the softmaxes of the rows a and b over the temperature, d = log p - log q and g the upstream gradient::

    terms = temperature^2 p d                     row = sum of p d
    db = temperature (q sum(g p) - g p)           da = temperature p (g (d + 1) - sum(g p (d + 1)))

which for one g a row is ``temperature g (q - p)`` and ``temperature g p (d - row)``. Saved are five numbers a row: each
side's maximum and logarithm of the sum of exponentials, apart because their sum would lose the digits of the second for
large logits, and ``row``.

Memory traffic: both logits read once each way, each gradient written once. Rows longer than a tile are read again, from
cache where they fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import architecture, cast, cdiv, exp, launch, next_power_of_2, num_sms, sum_of
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward"]


@config.heuristic("distillation_kl", ROWS=(1, 64))
def _config(arch: int, dtype: torch.dtype, *, classes: int) -> Launch:
    """A row is in registers up to 4,096 classes; eight logits of each side per thread: with more, ptxas spills."""
    block = max(16, min(classes, 4096))
    return Launch(tile={"ROWS": max(1, 1024 // block), "BLOCK": block}, num_warps=max(4, min(16, block // 256)))


@config.heuristic("distillation_kl_alone", ROWS=(1, 256))
def _config_alone(arch: int, dtype: torch.dtype, *, classes: int) -> Launch:
    """One program for all rows. Where rows are read in pieces, 16 warps spill on sm_90."""
    block = max(16, min(classes, 4096))
    return Launch(tile={"ROWS": max(1, 4096 // block), "BLOCK": block}, num_warps=16 if classes <= 4096 else 8)


@triton.jit
def _logits(base, rows, columns, rows_in, columns_in, stride_row, stride_column, temperature):
    """A tile of logits over the temperature, minus infinity outside."""
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    x = tl.load(base + at, mask=rows_in[:, None] & columns_in[None, :], other=float("-inf"))
    return tl.div_rn(x.to(tl.float32), temperature)


@triton.jit
def _online(largest, total, x):
    """Running maximum and sum of exponentials below it, a further tile taken in."""
    top = tl.maximum(largest, tl.max(x, 1))
    # A row that was all minus infinity so far has nothing to rescale.
    safe = tl.where(top == float("-inf"), 0.0, top)
    return top, total * exp(largest - safe, tl.float32) + tl.sum(exp(x - safe[:, None], tl.float32), 1)


@triton.jit
def _log_softmax(x, largest, log_total):
    return (x - largest[:, None]) - log_total[:, None]


@triton.jit
def _terms(log_p, log_q):
    """The terms p (log p - log q), with 0 log 0 = 0."""
    p = exp(log_p, tl.float32)
    return tl.where(p == 0, 0.0, p * (log_p - log_q))


@triton.jit
def _forward_kernel(
    a,
    b,
    out,
    saved,
    count,
    classes,
    a_row,
    a_column,
    b_row,
    b_column,
    temperature,
    scale,
    ELEMENTWISE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inside = tl.zeros([ROWS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        rows_in = rows < count
        top_a = tl.full([ROWS], float("-inf"), tl.float32)
        top_b = tl.full([ROWS], float("-inf"), tl.float32)
        total_a = tl.zeros([ROWS], tl.float32)
        total_b = tl.zeros([ROWS], tl.float32)
        row = tl.zeros([ROWS], tl.float32)
        columns = tl.arange(0, BLOCK)
        x = _logits(a, rows, columns, rows_in, columns < classes, a_row, a_column, temperature)
        y = _logits(b, rows, columns, rows_in, columns < classes, b_row, b_column, temperature)
        top_a, total_a = _online(top_a, total_a, x)
        top_b, total_b = _online(top_b, total_b, y)
        if not WHOLE:
            for start in range(BLOCK, classes, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                x = _logits(a, rows, columns, rows_in, columns < classes, a_row, a_column, temperature)
                y = _logits(b, rows, columns, rows_in, columns < classes, b_row, b_column, temperature)
                top_a, total_a = _online(top_a, total_a, x)
                top_b, total_b = _online(top_b, total_b, y)
        log_a = tl.log(total_a)
        log_b = tl.log(total_b)
        if WHOLE:
            terms = _terms(_log_softmax(x, top_a, log_a), _log_softmax(y, top_b, log_b))
            row = tl.sum(terms, 1)
            if ELEMENTWISE:
                at = rows.to(tl.int64)[:, None] * classes + columns[None, :]
                tl.store(out + at, terms * scale, mask=rows_in[:, None] & (columns < classes)[None, :])
        else:
            for start in range(0, classes, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                x = _logits(a, rows, columns, rows_in, columns < classes, a_row, a_column, temperature)
                y = _logits(b, rows, columns, rows_in, columns < classes, b_row, b_column, temperature)
                terms = _terms(_log_softmax(x, top_a, log_a), _log_softmax(y, top_b, log_b))
                row += tl.sum(terms, 1)
                if ELEMENTWISE:
                    at = rows.to(tl.int64)[:, None] * classes + columns[None, :]
                    tl.store(out + at, terms * scale, mask=rows_in[:, None] & (columns < classes)[None, :])
        tl.store(saved + rows, top_a, mask=rows_in)
        tl.store(saved + count + rows, log_a, mask=rows_in)
        tl.store(saved + 2 * count + rows, top_b, mask=rows_in)
        tl.store(saved + 3 * count + rows, log_b, mask=rows_in)
        tl.store(saved + 4 * count + rows, row, mask=rows_in)
        inside += tl.where(rows_in, row, 0.0)
    if not ELEMENTWISE:
        tl.store(out + tl.program_id(0), tl.sum(inside) * scale)


@triton.jit
def _backward_kernel(
    grad_output,
    a,
    b,
    saved,
    da,
    db,
    count,
    classes,
    a_row,
    a_column,
    b_row,
    b_column,
    da_row,
    da_column,
    db_row,
    db_column,
    grad_output_row,
    grad_output_column,
    temperature,
    scale,
    ELEMENTWISE: tl.constexpr,
    NEEDS_GRAD_A: tl.constexpr,
    NEEDS_GRAD_B: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows_in = rows < count
    top_a = tl.load(saved + rows, mask=rows_in, other=0.0)
    log_a = tl.load(saved + count + rows, mask=rows_in, other=0.0)
    top_b = tl.load(saved + 2 * count + rows, mask=rows_in, other=0.0)
    log_b = tl.load(saved + 3 * count + rows, mask=rows_in, other=0.0)
    row = tl.load(saved + 4 * count + rows, mask=rows_in, other=0.0)
    if ELEMENTWISE:
        # Sums over the row of g p and of g p (d + 1).
        sum_p = tl.zeros([ROWS], tl.float32)
        sum_d = tl.zeros([ROWS], tl.float32)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = rows_in[:, None] & (columns < classes)[None, :]
            x = _logits(a, rows, columns, rows_in, columns < classes, a_row, a_column, temperature)
            y = _logits(b, rows, columns, rows_in, columns < classes, b_row, b_column, temperature)
            log_p = _log_softmax(x, top_a, log_a)
            at = rows.to(tl.int64)[:, None] * grad_output_row + columns.to(tl.int64)[None, :] * grad_output_column
            g = tl.load(grad_output + at, mask=inside, other=0.0)
            p = tl.where(inside, exp(log_p, tl.float32), 0.0)
            sum_p += tl.sum(g * p, 1)
            sum_d += tl.sum(g * (_terms(log_p, _log_softmax(y, top_b, log_b)) + p), 1)
    else:
        whole = tl.load(grad_output)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = rows_in[:, None] & (columns < classes)[None, :]
        x = _logits(a, rows, columns, rows_in, columns < classes, a_row, a_column, temperature)
        y = _logits(b, rows, columns, rows_in, columns < classes, b_row, b_column, temperature)
        log_p = _log_softmax(x, top_a, log_a)
        log_q = _log_softmax(y, top_b, log_b)
        p = exp(log_p, tl.float32)
        terms = _terms(log_p, log_q)
        if ELEMENTWISE:
            at = rows.to(tl.int64)[:, None] * grad_output_row + columns.to(tl.int64)[None, :] * grad_output_column
            g = tl.load(grad_output + at, mask=inside, other=0.0)
            to_a = g * (terms + p) - p * sum_d[:, None]
            to_b = exp(log_q, tl.float32) * sum_p[:, None] - g * p
        else:
            to_a = whole * (terms - p * row[:, None])
            to_b = whole * (exp(log_q, tl.float32) - p)
        if NEEDS_GRAD_A:
            at = rows.to(tl.int64)[:, None] * da_row + columns.to(tl.int64)[None, :] * da_column
            tl.store(da + at, cast(to_a * scale, da.dtype.element_ty), mask=inside)
        if NEEDS_GRAD_B:
            at = rows.to(tl.int64)[:, None] * db_row + columns.to(tl.int64)[None, :] * db_column
            tl.store(db + at, cast(to_b * scale, db.dtype.element_ty), mask=inside)


def _scale(temperature: float, squared: bool, reduction: str, count: int, classes: int) -> float:
    """What the sum of the terms is multiplied by."""
    over = {"batchmean": count, "mean": count * classes}.get(reduction, 1)
    return (temperature**2 if squared else 1.0) / over


def forward(
    a: Tensor, b: Tensor, temperature: float, squared: bool, reduction: str, out: Tensor, saved: Tensor
) -> None:
    """KL(softmax(a) || softmax(b)).

    Args:
        a: (N, classes) logits, any strides.
        b: likewise.
        temperature: above 0.
        squared: as the op's.
        reduction: likewise.
        out: float32, a scalar, or (N, classes), contiguous, for "none".
        saved: (5, N), float32, for :func:`backward`.
    """
    count, classes = a.shape
    if count == 0:
        # As torch's mean of nothing.
        out.fill_(float("nan") if reduction in ("batchmean", "mean") else 0.0)
        return
    elementwise = reduction == "none"
    width = next_power_of_2(classes)
    # Few logits are one program's work, and then its sum needs no second launch.
    alone = not elementwise and count * width <= 2**15
    kernel = "distillation_kl_alone" if alone else "distillation_kl"
    chosen = config.choose(kernel, architecture(a), a.dtype, classes=width)
    programs = 1 if alone else min(cdiv(count, chosen.tile["ROWS"]), 4 * num_sms(a))
    scale = _scale(temperature, squared, reduction, count, classes)
    parts = out if programs == 1 or elementwise else out.new_empty(programs)
    launch(
        _forward_kernel,
        (programs,),
        a,
        b,
        parts,
        saved,
        count,
        classes,
        *a.stride(),
        *b.stride(),
        temperature,
        scale,
        config=chosen,
        ELEMENTWISE=elementwise,
        WHOLE=classes <= chosen.tile["BLOCK"],
    )
    if parts is not out:
        sum_of(parts, out)


def backward(
    grad_output: Tensor,
    a: Tensor,
    b: Tensor,
    temperature: float,
    squared: bool,
    reduction: str,
    saved: Tensor,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    """Gradients of :func:`forward`.

    Args:
        grad_output: gradient of ``out``, of its shape, any strides.
        a: as in forward, like all up to ``saved``.
        b: (N, classes).
        temperature: above 0.
        squared: the op's.
        reduction: the op's.
        saved: (5, N).
        da: (N, classes) in the dtype of a; None if it is not needed.
        db: (N, classes) in the dtype of b, or None.
    """
    count, classes = a.shape
    chosen = config.choose("distillation_kl", architecture(a), a.dtype, classes=next_power_of_2(classes))
    elementwise = reduction == "none"
    launch(
        _backward_kernel,
        (cdiv(count, chosen.tile["ROWS"]),),
        grad_output,
        a,
        b,
        saved,
        da,
        db,
        count,
        classes,
        *a.stride(),
        *b.stride(),
        *(da.stride() if da is not None else (0, 0)),
        *(db.stride() if db is not None else (0, 0)),
        *(grad_output.stride() if elementwise else (0, 0)),
        temperature,
        _scale(temperature, squared, reduction, max(count, 1), classes) / temperature,
        config=chosen,
        ELEMENTWISE=elementwise,
        NEEDS_GRAD_A=da is not None,
        NEEDS_GRAD_B=db is not None,
    )
