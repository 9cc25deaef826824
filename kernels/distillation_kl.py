"""KL divergence between two softmaxes, in one pass over the logits in forward and in backward.

With the logits ``a`` and ``b``, and p and q the softmaxes of the rows of ``a / temperature`` and ``b / temperature``::

    d = log p - log q      loss = temperature^2 p d      row_kl = sum of p d over the row

Gradient, with g the gradient of the elements of the loss::

    db = temperature (q sum(g p) - g p)      da = temperature p (g (d + 1) - sum(g p (d + 1)))

If g is the same for the whole row, these are ``temperature g (q - p)`` and ``temperature g p (d - row_kl)``. Five
values per row are saved: row_kl and, for both inputs, the maximum row_max and log(row_sum), where row_sum is the sum of
exponentials relative to row_max. For large logits, row_max + log(row_sum) would lose the digits of the logarithm.

Memory traffic per class and row, for logits of s bytes: forward reads 2 s bytes. Backward reads 2 s bytes and writes s
bytes per gradient. Rows that are longer than a tile are read twice, from cache if they fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import (
    architecture,
    cast,
    cdiv,
    exp,
    launch,
    next_power_of_2,
    num_sms,
    sum_partials,
    traffic,
)
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward"]


@config.heuristic("distillation_kl", BLOCK_M=(1, 64))
def _config(arch: int, dtype: torch.dtype, *, classes: int) -> Launch:
    """Up to 4,096 classes, a row stays in registers, with eight logits of each input per thread; more would spill."""
    block = max(16, min(classes, 4096))
    return Launch(tile={"BLOCK_M": max(1, 1024 // block), "BLOCK_N": block}, num_warps=max(4, min(16, block // 256)))


@config.heuristic("distillation_kl_one_program", BLOCK_M=(1, 256))
def _config_one_program(arch: int, dtype: torch.dtype, *, classes: int) -> Launch:
    """One program for all rows. If a row takes several tiles, 16 warps spill on sm_90."""
    block = max(16, min(classes, 4096))
    return Launch(tile={"BLOCK_M": max(1, 4096 // block), "BLOCK_N": block}, num_warps=16 if classes <= 4096 else 8)


@triton.jit
def _offsets(offs_m, offs_n, strides):
    """Offsets (BLOCK_M, BLOCK_N) into a matrix."""
    return offs_m.to(tl.int64)[:, None] * strides[0] + offs_n.to(tl.int64)[None, :] * strides[1]


@triton.jit
def _load_logits(ptr, offs_m, offs_n, mask, strides, temperature):
    """Load a tile of logits divided by the temperature, with minus infinity outside the mask."""
    x = tl.load(ptr + _offsets(offs_m, offs_n, strides), mask=mask, other=float("-inf"))
    return tl.div_rn(x.to(tl.float32), temperature)


@triton.jit
def _online_softmax(row_max, row_sum, x):
    """Update the running maximum and the running sum of exponentials with another tile."""
    new_max = tl.maximum(row_max, tl.max(x, 1))
    # If all logits so far are minus infinity, there is nothing to rescale.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    row_sum = row_sum * exp(row_max - safe_max, tl.float32) + tl.sum(exp(x - safe_max[:, None], tl.float32), 1)
    return new_max, row_sum


@triton.jit
def _log_softmax(x, row_max, log_sum):
    return (x - row_max[:, None]) - log_sum[:, None]


@triton.jit
def _terms(log_p, log_q):
    """p (log p - log q), with 0 log 0 = 0."""
    p = exp(log_p, tl.float32)
    return tl.where(p == 0, 0.0, p * (log_p - log_q))


@traffic(writes="out_ptr row_stats_ptr")
@triton.jit
def _forward_kernel(
    a_ptr,  # [N, classes]
    b_ptr,  # [N, classes]
    out_ptr,  # [N, classes] contiguous if ELEMENTWISE, else [programs]
    row_stats_ptr,  # [5, N]: row_max and log(row_sum) of ``a``, then both of ``b``, then row_kl
    num_rows,
    classes,
    a_strides,  # (row, class)
    b_strides,  # (row, class)
    temperature,
    scale,
    ELEMENTWISE: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    acc = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_rows
        row_max_a = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_max_b = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum_a = tl.zeros([BLOCK_M], tl.float32)
        row_sum_b = tl.zeros([BLOCK_M], tl.float32)
        row_kl = tl.zeros([BLOCK_M], tl.float32)
        offs_n = tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_n < classes)[None, :]
        a = _load_logits(a_ptr, offs_m, offs_n, mask, a_strides, temperature)
        b = _load_logits(b_ptr, offs_m, offs_n, mask, b_strides, temperature)
        row_max_a, row_sum_a = _online_softmax(row_max_a, row_sum_a, a)
        row_max_b, row_sum_b = _online_softmax(row_max_b, row_sum_b, b)
        if not WHOLE_ROW:
            for start in range(BLOCK_N, classes, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                mask = mask_m[:, None] & (offs_n < classes)[None, :]
                a = _load_logits(a_ptr, offs_m, offs_n, mask, a_strides, temperature)
                b = _load_logits(b_ptr, offs_m, offs_n, mask, b_strides, temperature)
                row_max_a, row_sum_a = _online_softmax(row_max_a, row_sum_a, a)
                row_max_b, row_sum_b = _online_softmax(row_max_b, row_sum_b, b)
        log_sum_a = tl.log(row_sum_a)
        log_sum_b = tl.log(row_sum_b)
        if WHOLE_ROW:
            terms = _terms(_log_softmax(a, row_max_a, log_sum_a), _log_softmax(b, row_max_b, log_sum_b))
            row_kl = tl.sum(terms, 1)
            if ELEMENTWISE:
                offs = offs_m.to(tl.int64)[:, None] * classes + offs_n[None, :]
                tl.store(out_ptr + offs, terms * scale, mask=mask)
        else:
            for start in range(0, classes, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                mask = mask_m[:, None] & (offs_n < classes)[None, :]
                a = _load_logits(a_ptr, offs_m, offs_n, mask, a_strides, temperature)
                b = _load_logits(b_ptr, offs_m, offs_n, mask, b_strides, temperature)
                terms = _terms(_log_softmax(a, row_max_a, log_sum_a), _log_softmax(b, row_max_b, log_sum_b))
                row_kl += tl.sum(terms, 1)
                if ELEMENTWISE:
                    offs = offs_m.to(tl.int64)[:, None] * classes + offs_n[None, :]
                    tl.store(out_ptr + offs, terms * scale, mask=mask)
        tl.store(row_stats_ptr + offs_m, row_max_a, mask=mask_m)
        tl.store(row_stats_ptr + num_rows + offs_m, log_sum_a, mask=mask_m)
        tl.store(row_stats_ptr + 2 * num_rows + offs_m, row_max_b, mask=mask_m)
        tl.store(row_stats_ptr + 3 * num_rows + offs_m, log_sum_b, mask=mask_m)
        tl.store(row_stats_ptr + 4 * num_rows + offs_m, row_kl, mask=mask_m)
        acc += tl.where(mask_m, row_kl, 0.0)
    if not ELEMENTWISE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(acc) * scale)


@traffic(writes="da_ptr db_ptr")
@triton.jit
def _backward_kernel(
    grad_output_ptr,  # [N, classes] if ELEMENTWISE, else []
    a_ptr,  # [N, classes]
    b_ptr,  # [N, classes]
    row_stats_ptr,  # [5, N]
    da_ptr,  # [N, classes] or None
    db_ptr,  # [N, classes] or None
    num_rows,
    classes,
    a_strides,  # (row, class)
    b_strides,  # (row, class)
    da_strides,  # (row, class) or None
    db_strides,  # (row, class) or None
    grad_output_strides,  # (row, class) or None
    temperature,
    scale,
    ELEMENTWISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    row_max_a = tl.load(row_stats_ptr + offs_m, mask=mask_m, other=0.0)
    log_sum_a = tl.load(row_stats_ptr + num_rows + offs_m, mask=mask_m, other=0.0)
    row_max_b = tl.load(row_stats_ptr + 2 * num_rows + offs_m, mask=mask_m, other=0.0)
    log_sum_b = tl.load(row_stats_ptr + 3 * num_rows + offs_m, mask=mask_m, other=0.0)
    row_kl = tl.load(row_stats_ptr + 4 * num_rows + offs_m, mask=mask_m, other=0.0)
    if ELEMENTWISE:
        # Row sums of g p and of g p (d + 1).
        sum_gp = tl.zeros([BLOCK_M], tl.float32)
        sum_gpd = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, classes, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < classes)[None, :]
            a = _load_logits(a_ptr, offs_m, offs_n, mask, a_strides, temperature)
            b = _load_logits(b_ptr, offs_m, offs_n, mask, b_strides, temperature)
            log_p = _log_softmax(a, row_max_a, log_sum_a)
            g = tl.load(grad_output_ptr + _offsets(offs_m, offs_n, grad_output_strides), mask=mask, other=0.0)
            p = tl.where(mask, exp(log_p, tl.float32), 0.0)
            sum_gp += tl.sum(g * p, 1)
            sum_gpd += tl.sum(g * (_terms(log_p, _log_softmax(b, row_max_b, log_sum_b)) + p), 1)
    else:
        grad_output = tl.load(grad_output_ptr)
    for start in range(0, classes, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (offs_n < classes)[None, :]
        a = _load_logits(a_ptr, offs_m, offs_n, mask, a_strides, temperature)
        b = _load_logits(b_ptr, offs_m, offs_n, mask, b_strides, temperature)
        log_p = _log_softmax(a, row_max_a, log_sum_a)
        log_q = _log_softmax(b, row_max_b, log_sum_b)
        p = exp(log_p, tl.float32)
        terms = _terms(log_p, log_q)
        if ELEMENTWISE:
            g = tl.load(grad_output_ptr + _offsets(offs_m, offs_n, grad_output_strides), mask=mask, other=0.0)
            da = g * (terms + p) - p * sum_gpd[:, None]
            db = exp(log_q, tl.float32) * sum_gp[:, None] - g * p
        else:
            da = grad_output * (terms - p * row_kl[:, None])
            db = grad_output * (exp(log_q, tl.float32) - p)
        if da_ptr is not None:
            offs = _offsets(offs_m, offs_n, da_strides)
            tl.store(da_ptr + offs, cast(da * scale, da_ptr.dtype.element_ty), mask=mask)
        if db_ptr is not None:
            offs = _offsets(offs_m, offs_n, db_strides)
            tl.store(db_ptr + offs, cast(db * scale, db_ptr.dtype.element_ty), mask=mask)


def _scale(temperature: float, squared: bool, reduction: str, num_rows: int, classes: int) -> float:
    """Factor of the sum of the terms p d."""
    divisor = {"batchmean": num_rows, "mean": num_rows * classes}.get(reduction, 1)
    return (temperature**2 if squared else 1.0) / divisor


def forward(
    a: Tensor, b: Tensor, temperature: float, squared: bool, reduction: str, out: Tensor, saved: Tensor
) -> None:
    """KL(softmax(a / temperature) || softmax(b / temperature)).

    Args:
        a: (N, classes) logits, any strides.
        b: (N, classes) logits, any strides.
        temperature: Greater than 0.
        squared: Whether to multiply by temperature^2.
        reduction: "batchmean", "mean", "sum" or "none".
        out: float32; a scalar, or for "none" (N, classes) and contiguous.
        saved: (5, N), float32, for :func:`backward`.
    """
    num_rows, classes = a.shape
    if num_rows == 0:
        # The values are those of torch's mean and sum of an empty tensor.
        out.fill_(float("nan") if reduction in ("batchmean", "mean") else 0.0)
        return
    elementwise = reduction == "none"
    width = next_power_of_2(classes)
    # For few logits, one program avoids a second launch for the sum.
    one_program = not elementwise and num_rows * width <= 2**15
    kernel = "distillation_kl_one_program" if one_program else "distillation_kl"
    chosen = config.choose(kernel, architecture(a), a.dtype, classes=width)
    programs = 1 if one_program else min(cdiv(num_rows, chosen.tile["BLOCK_M"]), 4 * num_sms(a))
    scale = _scale(temperature, squared, reduction, num_rows, classes)
    parts = out if programs == 1 or elementwise else out.new_empty(programs)
    launch(
        _forward_kernel,
        (programs,),
        a,
        b,
        parts,
        saved,
        num_rows,
        classes,
        a.stride(),
        b.stride(),
        temperature,
        scale,
        config=chosen,
        ELEMENTWISE=elementwise,
        WHOLE_ROW=classes <= chosen.tile["BLOCK_N"],
    )
    if parts is not out:
        sum_partials(parts, out)


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
        grad_output: Gradient of ``out``, same shape, any strides.
        a: As in forward.
        b: As in forward.
        temperature: As in forward.
        squared: As in forward.
        reduction: As in forward.
        saved: (5, N), float32, from forward.
        da: Output, (N, classes) in the dtype of a; None if it is not needed.
        db: Output, (N, classes) in the dtype of b; None if it is not needed.
    """
    num_rows, classes = a.shape
    chosen = config.choose("distillation_kl", architecture(a), a.dtype, classes=next_power_of_2(classes))
    elementwise = reduction == "none"
    launch(
        _backward_kernel,
        (cdiv(num_rows, chosen.tile["BLOCK_M"]),),
        grad_output,
        a,
        b,
        saved,
        da,
        db,
        num_rows,
        classes,
        a.stride(),
        b.stride(),
        None if da is None else da.stride(),
        None if db is None else db.stride(),
        grad_output.stride() if elementwise else None,
        temperature,
        _scale(temperature, squared, reduction, max(num_rows, 1), classes) / temperature,
        config=chosen,
        ELEMENTWISE=elementwise,
    )
