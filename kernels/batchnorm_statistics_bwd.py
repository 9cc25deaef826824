"""Gradients of a frozen BatchNorm with its input's statistics.

The formulas and the memory traffic are in :mod:`dfkd_fast.kernels.batchnorm_statistics`. The kernel is elementwise. It
reads x only for dvar, for dweight, or to recompute the activation's mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batchnorm_statistics import (
    ACTIVATIONS,
    Norm,
    activation_mask,
    align,
    as_maps,
    choose_config,
    expand_channels,
    load_channels,
    load_scale,
    offset,
    pointers,
    program_tiles,
    rows_and_channels,
    split_work,
    tile_config,
    tile_start,
    with_common_stride,
)
from dfkd_fast.kernels.common import cast, cdiv, launch, traffic
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "statistics_backward", "unpack"]


@config.heuristic("batchnorm_statistics_backward", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
def _config(arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """Like forward, but with two maps to read. In float32 with a residual, prefetching would make ptxas spill."""
    return tile_config(dtype, 2, 1 if sizes["residual"] and dtype == torch.float32 else 2, sizes)


@triton.jit
def unpack(packed, NCHW: tl.constexpr, BLOCK_P: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr):
    """The inverse of ``pack`` in the forward's module."""
    packed = packed.to(tl.int32)
    if NCHW:
        bits = (packed[:, None, :, :] >> tl.arange(0, 8)[None, :, None, None]) & 1
        bits = tl.reshape(bits, [BLOCK_C, UNROLL, BLOCK_P])
    else:
        bits = (packed[:, :, :, None] >> tl.arange(0, 8)[None, None, None, :]) & 1
        bits = tl.reshape(bits, [BLOCK_P, UNROLL, BLOCK_C])
    return bits != 0


@traffic(
    writes="dx dresidual dweight_ptr dbias_ptr",
    parts={
        "mean_ptr": lambda a: a["dvar_ptr"] is not None,
        "norm.running_mean": lambda a: a["x"] is not None,
    },
)
@triton.jit
def _backward_kernel(
    dy,  # Map or None
    more_dy,  # Map that is added to dy, or None
    x,  # Map; None if it is not read
    mask,  # Map [N, ceil(C / 8), positions], uint8; None to recompute the mask
    dx,  # Map or None
    dresidual,  # Map or None
    norm,  # Norm; its vectors are None without dy
    dmean_ptr,  # [C] or None
    dvar_ptr,  # [C] or None
    grad_output_ptr,  # [], factor of dmean and dvar, or None for 1
    mean_ptr,  # [C]; may be None without dvar
    dweight_ptr,  # [chunks, C] or None
    dbias_ptr,  # [chunks, C] or None
    num_iters,  # samples if BY_SAMPLE, else tiles
    positions,
    channels,
    inv_count,  # 1 / (samples * positions)
    ACTIVATION: tl.constexpr,
    NCHW: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    AXIS: tl.constexpr = 1 if NCHW else 0
    ROWS: tl.constexpr = BLOCK_P * UNROLL
    if NCHW:
        positions = align(positions, ALIGNMENT)
    else:
        channels = align(channels, ALIGNMENT)
    block, chunk, tiles, begin, step = program_tiles(positions, channels, BY_SAMPLE, ROWS, BLOCK_C)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    row, col = rows_and_channels(offs_c, NCHW, UNROLL, BLOCK_P)
    if x is not None:
        x_ptrs = pointers(x, row, col, NCHW, ALIGNMENT)
    if dy is not None:
        dy_ptrs = pointers(dy, row, col, NCHW, ALIGNMENT)
        if more_dy is not None:
            more_ptrs = pointers(more_dy, row, col, NCHW, ALIGNMENT)
        scale = load_scale(norm.running_var, norm.weight, offs_c, mask_c, norm.eps, NCHW)
        if x is not None:
            running_mean = load_channels(norm.running_mean, offs_c, mask_c, NCHW)
        if norm.bias is not None:
            bias = load_channels(norm.bias, offs_c, mask_c, NCHW)
    if dx is not None:
        dx_ptrs = pointers(dx, row, col, NCHW, ALIGNMENT)
    if grad_output_ptr is not None:
        inv_count *= tl.load(grad_output_ptr).to(tl.float32)
    if dmean_ptr is not None:
        dmean = load_channels(dmean_ptr, offs_c, mask_c, NCHW) * inv_count
    if dvar_ptr is not None:
        dvar = load_channels(dvar_ptr, offs_c, mask_c, NCHW) * (2 * inv_count)
        mean = load_channels(mean_ptr, offs_c, mask_c, NCHW)
    if dresidual is not None:
        dresidual_ptrs = pointers(dresidual, row, col, NCHW, ALIGNMENT)
    if mask is not None:
        offs_byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        mask_byte = expand_channels(offs_byte * 8 < channels, NCHW)
        mask_ptrs = pointers(mask, row, expand_channels(offs_byte, NCHW).to(tl.int64), NCHW, 1)
    dweight = tl.zeros([BLOCK_C, BLOCK_P] if NCHW else [BLOCK_P, BLOCK_C], tl.float32)
    dbias = tl.zeros_like(dweight)
    if dweight_ptr is not None:
        rstd = load_scale(norm.running_var, None, offs_c, mask_c, norm.eps, NCHW)

    for i in tl.range(begin, num_iters, step, num_stages=LOOP_STAGES):
        sample, first = tile_start(i, chunk, tiles, BY_SAMPLE, ROWS)
        mask_p = first + row < positions
        inside = mask_p & expand_channels(mask_c, NCHW)
        if x is not None:
            v = tl.load(x_ptrs + offset(x, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        if dy is not None:
            g = tl.load(dy_ptrs + offset(dy, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            if more_dy is not None:
                ptrs = more_ptrs + offset(more_dy, sample, first, NCHW, ALIGNMENT)
                g += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            if mask is not None:
                ptrs = mask_ptrs + offset(mask, sample, first, NCHW, 1)
                packed = tl.load(ptrs, mask=mask_p & mask_byte, other=0)
                g = tl.where(unpack(packed, NCHW, BLOCK_P, UNROLL, BLOCK_C), g, 0.0)
            elif ACTIVATION > 0:
                # The same expression as in forward, so that both round alike.
                z = (v - running_mean) * scale
                if norm.bias is not None:
                    z += bias
                g = tl.where(activation_mask(z, ACTIVATION), g, 0.0)
            if dresidual is not None:
                ptrs = dresidual_ptrs + offset(dresidual, sample, first, NCHW, ALIGNMENT)
                tl.store(ptrs, cast(g, dresidual.ptr.dtype.element_ty), mask=inside)
            if dweight_ptr is not None:
                dweight += tl.sum(g * ((v - running_mean) * rstd), 1)
            if dbias_ptr is not None:
                dbias += tl.sum(g, 1)
        if dx is not None:
            if dy is not None:
                out = g * scale
                if dmean_ptr is not None:
                    out += dmean
                if dvar_ptr is not None:
                    out += dvar * (v - mean)
            elif dvar_ptr is not None:
                out = dvar * (v - mean)
                if dmean_ptr is not None:
                    out += dmean
            else:
                out = tl.broadcast_to(dmean, inside.shape)
            ptrs = dx_ptrs + offset(dx, sample, first, NCHW, ALIGNMENT)
            tl.store(ptrs, cast(out, dx.ptr.dtype.element_ty), mask=inside)

    offs = chunk.to(tl.int64) * channels + offs_c
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs, tl.sum(dweight, AXIS), mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs, tl.sum(dbias, AXIS), mask=mask_c)


@traffic(writes="out_ptr")
@triton.jit
def _sum_rows_kernel(
    x_ptr,  # [rows, C]
    out_ptr,  # [C]
    rows,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        offs = offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :]
        acc += tl.load(x_ptr + offs, mask=(offs_m < rows)[:, None] & (offs_c < channels)[None, :], other=0.0)
    tl.store(out_ptr + offs_c, cast(tl.sum(acc, 0), out_ptr.dtype.element_ty), mask=offs_c < channels)


def backward(
    dy: Tensor | None,
    more_dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    mean: Tensor | None,
    mask: Tensor | None,
    residual_dtype: torch.dtype | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    grad_output: Tensor | None = None,
) -> None:
    """Gradients of :func:`dfkd_fast.kernels.batchnorm_statistics.forward`.

    Args:
        dy: Gradient of y, any strides; None for zero.
        more_dy: Another gradient of y, which is added to ``dy``; None for zero.
        dmean: Gradient of mean, (C,); None for zero.
        dvar: Gradient of var, (C,); None for zero.
        x: (N, C, ...), any strides.
        running_mean: (C,); may be None without dy.
        running_var: (C,); may be None without dy.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: As in forward.
        activation: As in forward.
        mean: (C,), float32, the merged mean of x; may be None without dvar.
        mask: From forward; None to recompute it from x.
        residual_dtype: Dtype of the residual, or None.
        dx: Output, shape of x, contiguous or channels-last; None if it is not needed.
        dweight: Output, (C,), any floating dtype; None if it is not needed.
        dbias: Output, (C,), any floating dtype; None if it is not needed.
        dresidual: Output, shape of x, contiguous or channels-last; None if it is not needed.
        grad_output: Scalar factor of dmean and dvar; None for 1.
    """
    channels = x.shape[1]
    if x.numel() == 0 or dy is None:
        for out in (dweight, dbias, dresidual):
            if out is not None:
                out.zero_()
        dweight = dbias = dresidual = None
    map_grad = dx if dx is not None else dresidual
    if x.numel() == 0 or (map_grad is None and dweight is None and dbias is None):
        return
    if dx is None:
        dmean = dvar = None
    like = map_grad if map_grad is not None else dy
    assert like is not None
    reads_x = dvar is not None or dweight is not None or (dy is not None and activation != "none" and mask is None)
    read = with_common_stride(x, like) if reads_x else None
    dy, more_dy = (None if each is None else with_common_stride(each, like) for each in (dy, more_dy))
    vectors = (None if v is None or dy is None else v.contiguous() for v in (running_mean, running_var, weight, bias))
    dmean, dvar = (None if v is None else v.contiguous() for v in (dmean, dvar))
    samples, positions, maps = as_maps(x, (dy, more_dy, read, mask, dx, dresidual))
    # The first map decides between NCHW and NHWC: outputs come first, because they are dense.
    by_priority = [maps[i] for i in (4, 5, 0, 1, 2)]
    more = dresidual is not None or more_dy is not None
    chosen, constants = choose_config("batchnorm_statistics_backward", x, samples, positions, by_priority, more)
    programs = 4 if dweight is not None or dbias is not None else 16
    blocks, chunks, num_iters = split_work(x, chosen, samples, positions, programs)
    parts = [None if out is None else x.new_empty((chunks, channels), dtype=torch.float32) for out in (dweight, dbias)]
    launch(
        _backward_kernel,
        (blocks * chunks,),
        *maps,
        Norm._make((*vectors, eps)),
        dmean,
        dvar,
        grad_output,
        mean,
        *parts,
        num_iters,
        positions,
        channels,
        1 / (samples * positions),
        config=chosen,
        ACTIVATION=ACTIVATIONS[activation],
        **constants,
    )
    for part, out in zip(parts, (dweight, dbias), strict=True):
        if part is not None and out is not None:
            tile = Launch(tile={"BLOCK_M": 32, "BLOCK_C": 32})
            launch(_sum_rows_kernel, (cdiv(channels, 32),), part, out, chunks, channels, config=tile)


def statistics_backward(
    dmean: Tensor | None, dvar: Tensor | None, x: Tensor, mean: Tensor, dx: Tensor, grad_output: Tensor | None = None
) -> None:
    """Gradient of only the statistics. The arguments are those of :func:`backward`."""
    norm = (None, None, None, None, 1.0, "none")
    backward(None, None, dmean, dvar, x, *norm, mean, None, None, dx, None, None, None, grad_output)
