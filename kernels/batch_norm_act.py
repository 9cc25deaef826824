"""A BatchNorm in training mode with the residual and activation that follow it: two launches forward, two backward.

With the weight w, the bias b and the M = N H W values x of a channel, of mean m and biased variance v::

    xhat = (x - m) / sqrt(v + eps)      z = w xhat + b + residual      y = act(z)

Backward recomputes z from x. With a residual, forward saves its sign as one bit per element instead, because reading
the residual again would cost 16 to 32 times as much. With the gradient dy of y::

    g = dy act'(z) = d residual      db = sum(g)      dw = sum(g xhat)
    dx = w / sqrt(v + eps) (g - db / M - xhat dw / M)

Both directions need sums over all values of a channel before they can write. The first launch computes them per chunk
of positions: mean, squared deviations and count in forward (:mod:`dfkd_fast.kernels.batchnorm_statistics`), the sums of
g and g xhat in backward. Each program of the second launch merges the chunks of its channels in a fixed order, so that
all programs get the same result in every run. The programs of the first chunk also write the results per channel. The
second launch visits the tiles in reverse order, because the last ones of the first launch may still be in the L2 cache.
On several processes, a collective runs between both launches, and the chunks are those of the processes.

Memory traffic with 2-byte elements: forward 6 bytes per element, 8 1/8 with a residual; backward 10 bytes, 12 1/4 with
a residual. Merging reads 8 bytes per channel and chunk in each program. Programs of eight warps keep both few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batchnorm_statistics import (
    activation_mask,
    align,
    as_maps,
    choose_config,
    expand_channels,
    load_channels,
    merge_chunks,
    offset,
    pack,
    partial_statistics,
    pointers,
    program_tiles,
    rows_and_channels,
    split_work,
    tile_config,
    tile_start,
    with_common_stride,
)
from dfkd_fast.kernels.batchnorm_statistics_bwd import unpack
from dfkd_fast.kernels.common import cast, launch, next_power_of_2, traffic
from dfkd_fast.kernels.config import Launch

__all__ = [
    "backward",
    "backward_synchronized",
    "forward",
    "forward_synchronized",
    "gradient_sums",
    "merge_rows",
    "merge_statistics",
]


@config.heuristic("batch_norm_act_statistics", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
def _statistics_config(arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """Reads one map. One program per multiprocessor prefetches 32 KiB."""
    return tile_config(dtype, 4, 3, sizes, num_warps=8)


@config.heuristic("batch_norm_act", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
@config.heuristic("batch_norm_act_sums", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
@config.heuristic("batch_norm_act_backward", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
def _config(arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """Reads up to three maps. Each prefetches 16 KiB per program, or 8 KiB where more needs a stack."""
    return tile_config(dtype, 2, 2 if arch == 120 and dtype == torch.float16 else 3, sizes, num_warps=8)


@triton.jit
def _load_scale(rstd, weight_ptr, offs, mask, NCHW: tl.constexpr):
    """rstd w, where rstd is not yet expanded."""
    if weight_ptr is not None:
        rstd *= tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return expand_channels(rstd, NCHW)


@triton.jit
def _mask_pointers(mask, block, channels, row, NCHW: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to the bytes of a tile in the first sample, and which of them exist."""
    offs = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    ptrs = pointers(mask, row, expand_channels(offs, NCHW).to(tl.int64), NCHW, 1)
    return ptrs, expand_channels(offs * 8 < channels, NCHW)


@triton.jit
def merge_statistics(
    means_ptr,  # [chunks, C]
    m2_ptr,  # [chunks, C]
    count_ptr,  # [chunks]
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    momentum,
    eps,
    chunks,
    channels,
    offs_c,
    writes,  # whether this program writes mean and rstd and updates the running statistics
    BLOCK_M: tl.constexpr,
):
    """Mean and ``1 / sqrt(var + eps)`` of channels, merged from chunks."""
    mask_c = offs_c < channels
    mean, m2, total = merge_chunks(means_ptr, m2_ptr, count_ptr, chunks, channels, offs_c, mask_c, BLOCK_M)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, total) + eps))
    if writes:
        tl.store(mean_ptr + offs_c, mean, mask=mask_c)
        tl.store(rstd_ptr + offs_c, rstd, mask=mask_c)
        if running_mean_ptr is not None:
            old = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            new = momentum * mean + (1 - momentum) * old
            tl.store(running_mean_ptr + offs_c, cast(new, running_mean_ptr.dtype.element_ty), mask=mask_c)
        if running_var_ptr is not None:
            old = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            new = momentum * tl.div_rn(m2, total - 1) + (1 - momentum) * old
            tl.store(running_var_ptr + offs_c, cast(new, running_var_ptr.dtype.element_ty), mask=mask_c)
    return mean, rstd


@traffic(writes="y mask mean_ptr rstd_ptr", updates="running_mean_ptr running_var_ptr")
@triton.jit
def _normalize_kernel(
    x,  # Map
    y,  # Map
    residual,  # Map or None
    mask,  # Map [N, ceil(C / 8), positions], uint8, or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    means_ptr,  # [chunks, C]
    m2_ptr,  # [chunks, C]
    count_ptr,  # [chunks]
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    momentum,
    eps,
    slope,  # of the activation for z <= 0; None for 0
    chunks,
    num_iters,  # samples if BY_SAMPLE, else tiles
    positions,
    channels,
    ACTIVATION: tl.constexpr,  # whether there is one
    NCHW: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_P * UNROLL
    if NCHW:
        positions = align(positions, ALIGNMENT)
    else:
        channels = align(channels, ALIGNMENT)
    block, chunk, tiles, begin, step = program_tiles(positions, channels, BY_SAMPLE, ROWS, BLOCK_C)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels

    mean_c, rstd = merge_statistics(
        means_ptr, m2_ptr, count_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, chunks,
        channels, offs_c, chunk == 0, BLOCK_M,
    )  # fmt: skip
    mean = expand_channels(mean_c, NCHW)
    scale = _load_scale(rstd, weight_ptr, offs_c, mask_c, NCHW)
    if bias_ptr is not None:
        bias = load_channels(bias_ptr, offs_c, mask_c, NCHW)
    row, col = rows_and_channels(offs_c, NCHW, UNROLL, BLOCK_P)
    x_ptrs = pointers(x, row, col, NCHW, ALIGNMENT)
    y_ptrs = pointers(y, row, col, NCHW, ALIGNMENT)
    if residual is not None:
        residual_ptrs = pointers(residual, row, col, NCHW, ALIGNMENT)
    if mask is not None:
        mask_ptrs, mask_byte = _mask_pointers(mask, block, channels, row, NCHW, BLOCK_C)
    for i in tl.range(begin, num_iters, step, num_stages=LOOP_STAGES):
        sample, first = tile_start(num_iters - 1 - i, chunk, tiles, BY_SAMPLE, ROWS)
        mask_p = first + row < positions
        inside = mask_p & expand_channels(mask_c, NCHW)
        v = tl.load(x_ptrs + offset(x, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        z = (v - mean) * scale
        if bias_ptr is not None:
            z += bias
        if residual is not None:
            ptrs = residual_ptrs + offset(residual, sample, first, NCHW, ALIGNMENT)
            z += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION:
            positive = activation_mask(z, 1)
            if mask is not None:
                packed = pack(positive, NCHW, BLOCK_P, UNROLL, BLOCK_C)
                tl.store(mask_ptrs + offset(mask, sample, first, NCHW, 1), packed, mask=mask_p & mask_byte)
            z = tl.where(positive, z, 0.0 if slope is None else z * slope)
        ptrs = y_ptrs + offset(y, sample, first, NCHW, ALIGNMENT)
        tl.store(ptrs, cast(z, y.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_gradient(
    g,  # gradient of y
    centered,  # x - m; read if packed is None
    scale,
    bias,  # or None
    packed,  # bits of the mask, or None
    slope,
    NCHW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of z."""
    if packed is not None:
        positive = unpack(packed, NCHW, BLOCK_P, UNROLL, BLOCK_C)
    else:
        # The same expression as in forward, so that both round alike.
        z = centered * scale
        if bias is not None:
            z += bias
        positive = activation_mask(z, 1)
    return tl.where(positive, g, 0.0 if slope is None else g * slope)


@traffic(writes="dbias_ptr dweight_ptr")
@triton.jit
def _backward_sums_kernel(
    dy,  # Map
    more_dy,  # Map that is added to dy, or None
    x,  # Map
    mask,  # Map [N, ceil(C / 8), positions], uint8; None to recompute it
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    slope,  # of the activation for z <= 0; None for 0
    dbias_ptr,  # [chunks, C]
    dweight_ptr,  # [chunks, C]
    num_iters,  # samples if BY_SAMPLE, else tiles
    positions,
    channels,
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
    dy_ptrs = pointers(dy, row, col, NCHW, ALIGNMENT)
    if more_dy is not None:
        more_ptrs = pointers(more_dy, row, col, NCHW, ALIGNMENT)
    x_ptrs = pointers(x, row, col, NCHW, ALIGNMENT)
    if mask is not None:
        mask_ptrs, mask_byte = _mask_pointers(mask, block, channels, row, NCHW, BLOCK_C)
    mean = load_channels(mean_ptr, offs_c, mask_c, NCHW)
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
    scale = _load_scale(rstd, weight_ptr, offs_c, mask_c, NCHW)
    bias = None if bias_ptr is None else load_channels(bias_ptr, offs_c, mask_c, NCHW)
    dbias = tl.zeros([BLOCK_C, BLOCK_P] if NCHW else [BLOCK_P, BLOCK_C], tl.float32)
    dweight = tl.zeros_like(dbias)
    for i in tl.range(begin, num_iters, step, num_stages=LOOP_STAGES):
        sample, first = tile_start(i, chunk, tiles, BY_SAMPLE, ROWS)
        mask_p = first + row < positions
        inside = mask_p & expand_channels(mask_c, NCHW)
        g = tl.load(dy_ptrs + offset(dy, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        if more_dy is not None:
            ptrs = more_ptrs + offset(more_dy, sample, first, NCHW, ALIGNMENT)
            g += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x_ptrs + offset(x, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        centered = v - mean
        if ACTIVATION:
            packed = None
            if mask is not None:
                packed = tl.load(mask_ptrs + offset(mask, sample, first, NCHW, 1), mask=mask_p & mask_byte, other=0)
            g = _activation_gradient(g, centered, scale, bias, packed, slope, NCHW, BLOCK_P, UNROLL, BLOCK_C)
        dbias += tl.sum(g, 1)
        dweight += tl.sum(g * centered, 1)
    offs = chunk.to(tl.int64) * channels + offs_c
    tl.store(dbias_ptr + offs, tl.sum(dbias, AXIS), mask=mask_c)
    tl.store(dweight_ptr + offs, tl.sum(dweight, AXIS) * rstd, mask=mask_c)


@traffic(
    writes="dx dresidual dbias_ptr dweight_ptr",
    parts={name: lambda a: a["num_iters"] > 0 for name in ("dy", "more_dy", "x", "mask", "dx", "dresidual")},
)
@triton.jit
def _backward_kernel(
    dy,  # Map
    more_dy,  # Map that is added to dy, or None
    x,  # Map; None without dx
    mask,  # Map [N, ceil(C / 8), positions], uint8; None to recompute it
    dx,  # Map or None
    dresidual,  # Map or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    slope,  # of the activation for z <= 0; None for 0
    dbias_parts_ptr,  # [chunks, C]; None if only dresidual is needed
    dweight_parts_ptr,  # [chunks, C]; None if only dresidual is needed
    dbias_ptr,  # [C] or None
    dweight_ptr,  # [C] or None
    chunks,
    inv_count,  # 1 / (samples * positions)
    num_iters,  # samples if BY_SAMPLE, else tiles; 0 without dx and dresidual
    positions,
    channels,
    ACTIVATION: tl.constexpr,
    NCHW: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_P * UNROLL
    if NCHW:
        positions = align(positions, ALIGNMENT)
    else:
        channels = align(channels, ALIGNMENT)
    block, chunk, tiles, begin, step = program_tiles(positions, channels, BY_SAMPLE, ROWS, BLOCK_C)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
    if dbias_parts_ptr is not None:
        dbias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dweight = tl.zeros_like(dbias)
        for start in range(0, chunks, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            offs = offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :]
            mask_m = (offs_m < chunks)[:, None] & mask_c[None, :]
            dbias += tl.load(dbias_parts_ptr + offs, mask=mask_m, other=0.0)
            dweight += tl.load(dweight_parts_ptr + offs, mask=mask_m, other=0.0)
        dbias_c = tl.sum(dbias, 0)
        dweight_c = tl.sum(dweight, 0)
        if chunk == 0:
            if dbias_ptr is not None:
                tl.store(dbias_ptr + offs_c, cast(dbias_c, dbias_ptr.dtype.element_ty), mask=mask_c)
            if dweight_ptr is not None:
                tl.store(dweight_ptr + offs_c, cast(dweight_c, dweight_ptr.dtype.element_ty), mask=mask_c)
        g_mean = expand_channels(dbias_c * inv_count, NCHW)
        slope_mean = expand_channels(dweight_c * inv_count * rstd, NCHW)

    row, col = rows_and_channels(offs_c, NCHW, UNROLL, BLOCK_P)
    dy_ptrs = pointers(dy, row, col, NCHW, ALIGNMENT)
    if more_dy is not None:
        more_ptrs = pointers(more_dy, row, col, NCHW, ALIGNMENT)
    if x is not None:
        x_ptrs = pointers(x, row, col, NCHW, ALIGNMENT)
    if dx is not None:
        dx_ptrs = pointers(dx, row, col, NCHW, ALIGNMENT)
    if dresidual is not None:
        dresidual_ptrs = pointers(dresidual, row, col, NCHW, ALIGNMENT)
    if mask is not None:
        mask_ptrs, mask_byte = _mask_pointers(mask, block, channels, row, NCHW, BLOCK_C)
    mean = load_channels(mean_ptr, offs_c, mask_c, NCHW)
    scale = _load_scale(rstd, weight_ptr, offs_c, mask_c, NCHW)
    bias = None if bias_ptr is None else load_channels(bias_ptr, offs_c, mask_c, NCHW)
    for i in tl.range(begin, num_iters, step, num_stages=LOOP_STAGES):
        sample, first = tile_start(num_iters - 1 - i, chunk, tiles, BY_SAMPLE, ROWS)
        mask_p = first + row < positions
        inside = mask_p & expand_channels(mask_c, NCHW)
        g = tl.load(dy_ptrs + offset(dy, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        if more_dy is not None:
            ptrs = more_ptrs + offset(more_dy, sample, first, NCHW, ALIGNMENT)
            g += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        centered = None
        if x is not None:
            v = tl.load(x_ptrs + offset(x, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
            centered = v - mean
        if ACTIVATION:
            packed = None
            if mask is not None:
                packed = tl.load(mask_ptrs + offset(mask, sample, first, NCHW, 1), mask=mask_p & mask_byte, other=0)
            g = _activation_gradient(g, centered, scale, bias, packed, slope, NCHW, BLOCK_P, UNROLL, BLOCK_C)
        if dresidual is not None:
            ptrs = dresidual_ptrs + offset(dresidual, sample, first, NCHW, ALIGNMENT)
            tl.store(ptrs, cast(g, dresidual.ptr.dtype.element_ty), mask=inside)
        if dx is not None:
            out = scale * (g - g_mean - centered * slope_mean)
            ptrs = dx_ptrs + offset(dx, sample, first, NCHW, ALIGNMENT)
            tl.store(ptrs, cast(out, dx.ptr.dtype.element_ty), mask=inside)


def merge_rows(chosen: Launch, chunks: int) -> int:
    """Returns how many chunks a program merges at once: 16 values per thread, or fewer."""
    most = chosen.num_warps * 512 // chosen.tile["BLOCK_C"]
    return max(min(next_power_of_2(chunks), most), 16)


def _slope(activation: str, negative_slope: float) -> float | None:
    return negative_slope if activation == "leaky_relu" else None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    keep_mask: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor,
    statistics: Tensor | None = None,
) -> None:
    """Normalizes x by its own statistics, adds the residual and activates.

    Args:
        x: (N, C, ...), any strides.
        weight: (C,), any floating dtype, or None.
        bias: (C,), any floating dtype, or None.
        residual: Same shape as x, any strides, or None.
        running_mean: (C,), any floating dtype, updated in place; or None.
        running_var: (C,), any floating dtype, updated in place by the unbiased variance; or None.
        momentum: Weight of the new statistics in the running statistics.
        eps: Number that is added to the variance.
        activation: "none", "relu" or "leaky_relu".
        negative_slope: Slope of leaky ReLU for negative values.
        keep_mask: Whether to write ``mask``.
        y: Same shape as x, contiguous or channels-last.
        mean: (C,), float32.
        rstd: (C,), float32, ``1 / sqrt(var + eps)``.
        mask: (N, ceil(C / 8), positions), uint8, with one stride for all positions. The bit of an element is set if the
            activation's argument is positive.
        statistics: (P, 2, C), float32, means and biased variances of P processes that have as many values as x; None
            for those of x.
    """
    if x.numel() == 0:
        return
    x = with_common_stride(x, y)
    if statistics is None:
        parts = partial_statistics("batch_norm_act_statistics", x, 1)
    else:
        count = x.numel() // x.shape[1]
        means, variances = statistics.unbind(1)
        parts = means.contiguous(), variances * count, means.new_full((len(means),), count)
    residual = None if residual is None else with_common_stride(residual, y)
    samples, positions, maps = as_maps(x, (x, y, residual, mask if keep_mask else None))
    chosen, constants = choose_config("batch_norm_act", x, samples, positions, maps[:3], residual is not None)
    blocks, chunks, num_iters = split_work(x, chosen, samples, positions, 2)
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    running = [None if v is None else v.contiguous() for v in (running_mean, running_var)]
    launch(
        _normalize_kernel,
        (blocks * chunks,),
        *maps,
        weight,
        bias,
        *parts,
        mean,
        rstd,
        *running,
        momentum,
        eps,
        _slope(activation, negative_slope),
        parts[0].shape[0],
        num_iters,
        positions,
        x.shape[1],
        config=chosen,
        ACTIVATION=activation != "none",
        BLOCK_M=merge_rows(chosen, parts[0].shape[0]),
        **constants,
    )
    for given, updated in zip((running_mean, running_var), running, strict=True):
        if given is not None and updated is not None and updated is not given:
            given.copy_(updated)


def forward_synchronized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    statistics: Tensor,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    keep_mask: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor,
) -> None:
    """:func:`forward` with statistics, in the order of the operator's arguments."""
    norm = (x, weight, bias, residual, running_mean, running_var, momentum, eps, activation, negative_slope)
    forward(*norm, keep_mask, y, mean, rstd, mask, statistics)


def backward(
    dy: Tensor,
    more_dy: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_dtype: torch.dtype | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    sums: Tensor | None = None,
    processes: int = 1,
) -> None:
    """Gradients of :func:`forward`.

    Args:
        dy: Gradient of y, any strides.
        more_dy: Another gradient of y, which is added; None for zero.
        x: As in forward.
        weight: As in forward.
        bias: As in forward.
        mean: From forward.
        rstd: From forward.
        mask: From forward; None to recompute it from x.
        activation: As in forward.
        negative_slope: As in forward.
        residual_dtype: Dtype of the residual, or None.
        dx: Output, shape of x, contiguous or channels-last; None if it is not needed.
        dweight: Output, (C,), any floating dtype; None if it is not needed.
        dbias: Output, (C,), any floating dtype; None if it is not needed.
        dresidual: Output, shape of x, contiguous or channels-last; None if it is not needed.
        sums: (2, C), float32, the sums of g and g xhat over all processes, for dx only; None computes them.
        processes: Number of processes in ``sums``.
    """
    if x.numel() == 0:
        for out in (dweight, dbias):
            if out is not None:
                out.zero_()
        return
    like = dx if dx is not None else dresidual
    x, dy = with_common_stride(x, like), with_common_stride(dy, like)
    more_dy = None if more_dy is None else with_common_stride(more_dy, like)
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    vectors = (weight, bias, mean, rstd, _slope(activation, negative_slope))
    parts: tuple[Tensor | None, ...] = (None, None)
    chunks = 0
    if sums is not None:
        parts, chunks = sums.unbind(0), 1
    elif dx is not None or dweight is not None or dbias is not None:
        samples, positions, maps = as_maps(x, (dy, more_dy, x, mask))
        by_priority = [maps[i] for i in (2, 0, 1)]
        chosen, constants = choose_config(
            "batch_norm_act_sums", x, samples, positions, by_priority, more_dy is not None
        )
        blocks, chunks, num_iters = split_work(x, chosen, samples, positions, 1)
        parts = tuple(x.new_empty((2, chunks, x.shape[1]), dtype=torch.float32))
        arguments = (*maps, *vectors, *parts, num_iters, positions, x.shape[1])
        constants["ACTIVATION"] = activation != "none"
        launch(_backward_sums_kernel, (blocks * chunks,), *arguments, config=chosen, **constants)

    samples, positions, maps = as_maps(x, (dy, more_dy, None if dx is None else x, mask, dx, dresidual))
    by_priority = [maps[i] for i in (4, 5, 2, 0, 1)]  # the first one decides between NCHW and NHWC
    more = dresidual is not None or more_dy is not None
    chosen, constants = choose_config("batch_norm_act_backward", x, samples, positions, by_priority, more)
    blocks, programs, num_iters = split_work(x, chosen, samples, positions, 2)
    constants["ACTIVATION"] = activation != "none"
    if like is None:  # only merge the sums
        programs, num_iters, constants["BY_SAMPLE"], constants["ACTIVATION"] = 1, 0, False, False
    launch(
        _backward_kernel,
        (blocks * programs,),
        *maps,
        *vectors,
        *parts,
        dbias,
        dweight,
        chunks,
        1 / (samples * positions * processes),
        num_iters,
        positions,
        x.shape[1],
        config=chosen,
        BLOCK_M=merge_rows(chosen, chunks),
        **constants,
    )


def gradient_sums(
    dy: Tensor,
    more_dy: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_dtype: torch.dtype | None,
    sums: Tensor,
) -> None:
    """The gradients dbias and dweight of :func:`backward` as the rows of ``sums``, (2, C), float32."""
    saved = (x, weight, bias, mean, rstd, mask)
    backward(dy, more_dy, *saved, activation, negative_slope, residual_dtype, None, sums[1], sums[0], None)


def backward_synchronized(
    dy: Tensor,
    more_dy: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    processes: int,
    activation: str,
    negative_slope: float,
    residual_dtype: torch.dtype | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
) -> None:
    """:func:`backward` with sums, in the order of the operator's arguments."""
    saved = (x, weight, bias, mean, rstd, mask)
    options = (activation, negative_slope, residual_dtype)
    backward(dy, more_dy, *saved, *options, dx, None, None, dresidual, sums, processes)
