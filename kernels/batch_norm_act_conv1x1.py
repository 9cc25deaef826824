"""A BatchNorm in training mode, a leaky ReLU and a narrow 1 x 1 convolution, without writing the activated map.

With the mean m and the biased variance v of a channel's M = N H W values x, the parameters w and b of the BatchNorm,
and the weight W (K, C) and the bias c of the convolution::

    xhat = (x - m) / sqrt(v + eps)      f = leaky_relu(w xhat + b)      a = W f + c

K is small. Only a is written; whoever needs f recomputes it from x, as :mod:`dfkd_fast.kernels.spatial_attention` does.
Backward takes the gradient da of a and df, the gradient of f from all other uses of f::

    g = (df + W^T da) leaky_relu'(w xhat + b)      db = sum(g)      dw = sum(g xhat)
    dx = w / sqrt(v + eps) (g - db / M - xhat dw / M)      dW = sum(da f^T)      dc = sum(da)

Forward has two launches: the statistics of chunks of x (:mod:`dfkd_fast.kernels.batchnorm_statistics`), and a kernel
in which each program merges them, normalizes tiles of x and multiplies them by W. Backward has three: each program of
the first computes all sums over its tiles, the second adds them in a fixed order, and the third computes dx. The second
pass over x visits the tiles in reverse order, because the last ones of the first pass may still be in the L2 cache.

Memory traffic with 2-byte elements, per element of x: forward 4 bytes and K / C of 2 bytes to write a; backward 10
bytes and K / C of 4 bytes to read da twice. A tile of forward holds all channels. The maps are channels-last.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batch_norm_act import merge_rows, merge_statistics
from dfkd_fast.kernels.batchnorm_statistics import partial_statistics, tile_config
from dfkd_fast.kernels.common import (
    architecture,
    cast,
    cdiv,
    dot,
    launch,
    next_power_of_2,
    num_sms,
    precision,
    traffic,
)
from dfkd_fast.kernels.config import Launch
from dfkd_fast.kernels.spatial_attention import (
    NO_MAP,
    Map,
    Norm,
    load_norm,
    load_tile,
    load_weight,
    mask_tile,
    normalize,
    store_tile,
)

__all__ = ["backward", "forward"]

_REDUCE = Launch(tile={"ROWS": 128, "BLOCK": 32}, num_warps=8)


@config.heuristic("batch_norm_act_conv1x1_statistics", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
def _statistics_config(arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """Reads one map. One program per multiprocessor prefetches 32 KiB."""
    return tile_config(dtype, 4, 3, sizes, num_warps=8)


def _tile(channels: int, hidden: int, per_thread: int, stages: int, programs: int) -> Launch:
    """Tiles of about ``per_thread`` elements per thread; ``programs`` run per multiprocessor."""
    block_c = max(16, channels)
    warps = 4 if block_c <= 64 else 8
    block_m = max(16, min(64, 32 * warps * per_thread // block_c))
    tile = {"BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_K": max(16, hidden)}
    return Launch(tile={**tile, "LOOP_STAGES": stages, "PROGRAMS": programs}, num_warps=warps, num_stages=1)


@config.heuristic("batch_norm_act_conv1x1", BLOCK_M=(16, 128), LOOP_STAGES=(1, 4), PROGRAMS=(1, 8))
def _config(arch: int, dtype: torch.dtype, *, channels: int, hidden: int, vectors: int) -> Launch:
    """A tile holds all channels. Prefetches 16 KiB per program."""
    return _tile(channels, hidden, 32 if dtype.itemsize == 2 else 16, 3, 2)


def _weight_in_registers(arch: int, dtype: torch.dtype) -> bool:
    """Whether products read the weight from registers. Tiles of backward then have fewer channels."""
    return dtype.itemsize == 2 and arch // 10 not in (9, 10)


@config.heuristic("batch_norm_act_conv1x1_sums", BLOCK_M=(16, 128), LOOP_STAGES=(1, 4), PROGRAMS=(1, 8))
def _config_sums(arch: int, dtype: torch.dtype, *, channels: int, hidden: int, vectors: int) -> Launch:
    """Keeps two sums per element of the tile. Each program writes one row of partial sums."""
    per_thread = 16 if dtype.itemsize == 2 and vectors else 8
    if _weight_in_registers(arch, dtype):
        return _tile(min(channels, 64 if hidden <= 16 else 32), hidden, per_thread if hidden <= 16 else 8, 2, 2)
    return _tile(channels, hidden, per_thread, 3, 2)


@config.heuristic("batch_norm_act_conv1x1_backward", BLOCK_M=(16, 128), LOOP_STAGES=(1, 4), PROGRAMS=(1, 8))
def _config_backward(arch: int, dtype: torch.dtype, *, channels: int, hidden: int, vectors: int) -> Launch:
    """Prefetches 32 KiB per program."""
    per_thread = 32 if dtype.itemsize == 2 and vectors else 16 if vectors else 8
    return _tile(min(channels, 64) if _weight_in_registers(arch, dtype) else channels, hidden, per_thread, 3, 2)


@triton.jit
def _positions(tile, positions, BLOCK_M: tl.constexpr):
    """First position of a tile, and the mask of its positions."""
    first = tl.cast(tile, tl.int64) * BLOCK_M
    return first, first + tl.arange(0, BLOCK_M) < positions


@traffic(writes="reduced mean_ptr rstd_ptr", updates="running_mean_ptr running_var_ptr")
@triton.jit
def _forward_kernel(
    x,  # Map, [P, C]
    reduced,  # Map, [P, K]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    conv_weight_ptr,  # [K, C]
    conv_bias_ptr,  # [K] or None
    means_ptr,  # [chunks, C]
    m2_ptr,  # [chunks, C]
    count_ptr,  # [chunks]
    mean_ptr,  # [C]
    rstd_ptr,  # [C]
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    momentum, eps, slope, chunks, tiles, positions,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mean, scale = merge_statistics(
        means_ptr, m2_ptr, count_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, chunks, C,
        offs_c, pid == 0, CHUNKS,
    )  # fmt: skip
    bias = tl.zeros_like(mean)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    dtype: tl.constexpr = reduced.data.dtype.element_ty
    w = load_weight(conv_weight_ptr, offs_k, offs_c, K, C, dtype)
    conv_bias = tl.zeros([BLOCK_K], tl.float32)
    if conv_bias_ptr is not None:
        conv_bias = tl.load(conv_bias_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    for i in tl.range(pid, tiles, tl.num_programs(0), num_stages=LOOP_STAGES):
        first, mask_m = _positions(tiles - 1 - i, positions, BLOCK_M)
        v = load_tile(x, 0, first, mask_m, offs_c, positions, C, "").to(tl.float32)
        z, positive = normalize(v, mean, scale, bias)
        f = cast(tl.where(positive, z, z * slope), dtype)
        a = dot(f, w, tl.zeros([BLOCK_M, BLOCK_K], tl.float32), PRECISION) + conv_bias[None, :]
        store_tile(reduced, a, 0, first, mask_tile(mask_m, offs_k, K), offs_k, positions, K)


@triton.jit
def _activation_gradient(
    df, da, w, first, mask_m, offs_c, offs_k, positive, slope, positions,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g of a tile, and da. ``w`` is a tile (k, channel)."""
    g = tl.zeros(positive.shape, tl.float32)
    if df.data is not None:
        g = load_tile(df, 0, first, mask_m, offs_c, positions, C, "").to(tl.float32)
    grad = tl.zeros([positive.shape[0], w.shape[0]], w.dtype)
    if da.data is not None:
        grad = load_tile(da, 0, first, mask_m, offs_k, positions, K, "")
        g = dot(grad, w, g, PRECISION)
    return tl.where(positive, g, g * slope), grad


@traffic(writes="partials_ptr", parts={"df": lambda a: a["NEEDS_SUMS"]})
@triton.jit
def _sums_kernel(
    x,  # Map, [P, C]
    df,  # Map, [P, C], or None
    da,  # Map, [P, K], or None
    norm,  # Norm
    conv_weight_ptr,  # [K, C]
    partials_ptr,  # [programs, width]: per row dW and dc, and then db and dw, as far as they are needed
    tiles, positions, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_CONV: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mean, scale, bias = load_norm(norm, offs_c, C)
    dtype: tl.constexpr = conv_weight_ptr.dtype.element_ty if da.data is None else da.data.dtype.element_ty
    w = tl.trans(load_weight(conv_weight_ptr, offs_k, offs_c, K, C, dtype))
    dbias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    dconv_weight = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    dconv_bias = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i in tl.range(pid, tiles, tl.num_programs(0), num_stages=LOOP_STAGES):
        first, mask_m = _positions(i, positions, BLOCK_M)
        v = load_tile(x, 0, first, mask_m, offs_c, positions, C, "").to(tl.float32)
        z, positive = normalize(v, mean, scale, bias)
        if NEEDS_SUMS:
            g, grad = _activation_gradient(
                df, da, w, first, mask_m, offs_c, offs_k, positive, norm.slope, positions, C, K, PRECISION
            )
            dbias += g
            dweight += g * (v - mean[None, :])
        else:
            grad = load_tile(da, 0, first, mask_m, offs_k, positions, K, "")
        if NEEDS_CONV:
            # After the last position, z is -mean * scale + bias, which may be infinite in dtype: 0 * inf would be NaN.
            f = cast(tl.where(mask_m[:, None], tl.where(positive, z, z * norm.slope), 0.0), dtype)
            dconv_weight = dot(tl.trans(f), grad, dconv_weight, PRECISION)
            dconv_bias += grad.to(tl.float32)
    CONV: tl.constexpr = (C + 1) * K if NEEDS_CONV else 0
    row = partials_ptr + pid.to(tl.int64) * (CONV + (2 * C if NEEDS_SUMS else 0))
    if NEEDS_CONV:
        mask = (offs_c < C)[:, None] & (offs_k < K)[None, :]
        tl.store(row + offs_k[None, :] * C + offs_c[:, None], dconv_weight, mask=mask)
        tl.store(row + C * K + offs_k, tl.sum(dconv_bias, 0), mask=(offs_k < K) & (tl.program_id(1) == 0))
    if NEEDS_SUMS:
        rstd = tl.load(norm.rstd_ptr + offs_c, mask=offs_c < C, other=0.0)
        tl.store(row + CONV + offs_c, tl.sum(dbias, 0), mask=offs_c < C)
        tl.store(row + CONV + C + offs_c, tl.sum(dweight, 0) * rstd, mask=offs_c < C)


@triton.jit
def _store_part(ptr, value, offs, first: tl.constexpr, size: tl.constexpr):
    """Writes the elements of a row from ``first`` on to a tensor, which may be None."""
    if ptr is not None:
        mask = (offs >= first) & (offs < first + size)
        tl.store(ptr + offs - first, cast(value, ptr.dtype.element_ty), mask=mask)


@traffic(writes="dconv_weight_ptr dconv_bias_ptr dbias_ptr dweight_ptr sums_ptr")
@triton.jit
def _reduce_kernel(
    partials_ptr,  # [num_rows, CONV + SUMS]
    dconv_weight_ptr,  # [K, C] or None
    dconv_bias_ptr,  # [K] or None
    dbias_ptr,  # [C] or None
    dweight_ptr,  # [C] or None
    sums_ptr,  # [2, C]: db and dw in float32, or None
    num_rows, C: tl.constexpr, K: tl.constexpr, CONV: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums. CONV is (C + 1) K or 0, and SUMS is 2 C or 0."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (offs < CONV + SUMS)[None, :]
        acc += tl.load(partials_ptr + row.to(tl.int64)[:, None] * (CONV + SUMS) + offs[None, :], mask=mask, other=0.0)
    result = tl.sum(acc, 0)
    if CONV > 0:
        _store_part(dconv_weight_ptr, result, offs, 0, C * K)
        _store_part(dconv_bias_ptr, result, offs, C * K, K)
    if SUMS > 0:
        _store_part(dbias_ptr, result, offs, CONV, C)
        _store_part(dweight_ptr, result, offs, CONV + C, C)
        _store_part(sums_ptr, result, offs, CONV, SUMS)


@traffic(writes="dx")
@triton.jit
def _backward_kernel(
    x,  # Map, [P, C]
    df,  # Map, [P, C], or None
    da,  # Map, [P, K], or None
    dx,  # Map, [P, C]
    norm,  # Norm
    conv_weight_ptr,  # [K, C]
    sums_ptr,  # [2, C]
    inv_count,  # 1 / positions
    tiles, positions, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mean, scale, bias = load_norm(norm, offs_c, C)
    dtype: tl.constexpr = conv_weight_ptr.dtype.element_ty if da.data is None else da.data.dtype.element_ty
    w = tl.trans(load_weight(conv_weight_ptr, offs_k, offs_c, K, C, dtype))
    g_mean = tl.load(sums_ptr + offs_c, mask=offs_c < C, other=0.0) * inv_count
    slope_mean = tl.load(sums_ptr + C + offs_c, mask=offs_c < C, other=0.0) * inv_count
    slope_mean *= tl.load(norm.rstd_ptr + offs_c, mask=offs_c < C, other=0.0)
    for i in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=LOOP_STAGES):
        first, mask_m = _positions(tiles - 1 - i, positions, BLOCK_M)
        v = load_tile(x, 0, first, mask_m, offs_c, positions, C, "").to(tl.float32)
        _, positive = normalize(v, mean, scale, bias)
        g, _ = _activation_gradient(
            df, da, w, first, mask_m, offs_c, offs_k, positive, norm.slope, positions, C, K, PRECISION
        )
        out = scale[None, :] * (g - g_mean[None, :] - (v - mean[None, :]) * slope_mean[None, :])
        store_tile(dx, out, 0, first, mask_tile(mask_m, offs_c, C), offs_c, positions, C)


def _map(x: Tensor | None) -> Map:
    """A channels-last map as a kernel argument."""
    return NO_MAP if x is None else Map(x.contiguous(memory_format=torch.channels_last), None, None, None)


def _choose(kernel: str, x: Tensor, hidden: int) -> Launch:
    return config.choose(
        kernel,
        architecture(x),
        x.dtype,
        channels=next_power_of_2(x.shape[1]),
        hidden=next_power_of_2(hidden),
        vectors=int(x.shape[1] % 8 == 0),
    )


def _grid(x: Tensor, chosen: Launch) -> tuple[Launch, tuple[int, int], int, int]:
    """The configuration without PROGRAMS, the grid (programs, channel blocks), the number of tiles and of positions."""
    tile = {name: size for name, size in chosen.tile.items() if name != "PROGRAMS"}
    positions = x.numel() // x.shape[1]
    tiles = cdiv(positions, tile["BLOCK_M"])
    blocks = cdiv(x.shape[1], tile["BLOCK_C"])
    grid = cdiv(tiles, cdiv(tiles * blocks, chosen.tile["PROGRAMS"] * num_sms(x))), blocks
    return replace(chosen, tile=tile), grid, tiles, positions


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
    dtype: torch.dtype,
    reduced: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Normalizes x by its own statistics, activates it and applies the convolution.

    Args:
        x: (N, C, H, W), channels-last.
        weight: (C,), any floating dtype, or None.
        bias: (C,), any floating dtype, or None.
        running_mean: (C,), any floating dtype, updated in place; or None.
        running_var: (C,), any floating dtype, updated in place by the unbiased variance; or None.
        conv_weight: (K, C), any floating dtype.
        conv_bias: (K,), any floating dtype, or None.
        momentum: Weight of the new statistics in the running statistics.
        eps: Number that is added to the variance.
        negative_slope: Slope of the leaky ReLU for negative values.
        dtype: Dtype of ``reduced`` and of the matrix product.
        reduced: (N, K, H, W), channels-last.
        mean: (C,), float32.
        rstd: (C,), float32, ``1 / sqrt(var + eps)``.
    """
    if x.numel() == 0:
        return
    channels, hidden = x.shape[1], conv_weight.shape[0]
    parts = partial_statistics("batch_norm_act_conv1x1_statistics", x, 1)
    chosen, grid, tiles, positions = _grid(x, _choose("batch_norm_act_conv1x1", x, hidden))
    vectors = [None if v is None else v.contiguous() for v in (weight, bias, conv_weight, conv_bias)]
    running = [None if v is None else v.contiguous() for v in (running_mean, running_var)]
    launch(
        _forward_kernel,
        grid,
        _map(x),
        _map(reduced),
        *vectors,
        *parts,
        mean,
        rstd,
        *running,
        momentum,
        eps,
        negative_slope,
        parts[0].shape[0],
        tiles,
        positions,
        config=chosen,
        C=channels,
        K=hidden,
        PRECISION=precision(dtype),
        CHUNKS=merge_rows(chosen, parts[0].shape[0]),
    )
    for given, updated in zip((running_mean, running_var), running, strict=True):
        if given is not None and updated is not None and updated is not given:
            given.copy_(updated)


def backward(
    da: Tensor | None,
    df: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    negative_slope: float,
    conv_bias_dtype: torch.dtype | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dconv_weight: Tensor | None,
    dconv_bias: Tensor | None,
) -> None:
    """Gradients of :func:`forward`.

    Args:
        da: (N, K, H, W), gradient of ``reduced``, any strides; None for zero.
        df: (N, C, H, W), gradient of the activated map from all other uses, any strides; None for zero.
        x: As in forward.
        weight: As in forward.
        bias: As in forward.
        conv_weight: As in forward.
        mean: From forward.
        rstd: From forward.
        negative_slope: As in forward.
        conv_bias_dtype: Dtype of ``conv_bias``, or None.
        dx: Output, (N, C, H, W), channels-last; None if it is not needed.
        dweight: Output, (C,), any floating dtype; None if it is not needed.
        dbias: Output, (C,), any floating dtype; None if it is not needed.
        dconv_weight: Output, (K, C), any floating dtype; None if it is not needed.
        dconv_bias: Output, (K,), any floating dtype; None if it is not needed.
    """
    if x.numel() == 0:
        for out in (dweight, dbias, dconv_weight, dconv_bias):
            if out is not None:
                out.zero_()
        return
    channels, hidden = conv_weight.shape[1], conv_weight.shape[0]
    maps = (_map(x), _map(df), _map(da))
    norm = Norm(mean, rstd, *(None if v is None else v.contiguous() for v in (weight, bias)), negative_slope)
    conv_weight = conv_weight.contiguous()
    constants = {"C": channels, "K": hidden, "PRECISION": precision(conv_weight.dtype if da is None else da.dtype)}
    if da is None:
        for out in (dconv_weight, dconv_bias):
            if out is not None:
                out.zero_()
        dconv_weight = dconv_bias = None
    needs_conv = dconv_weight is not None or dconv_bias is not None
    needs_sums = dx is not None or dweight is not None or dbias is not None
    sums = None if dx is None else x.new_empty((2, channels), dtype=torch.float32)
    if needs_conv or needs_sums:
        chosen, grid, tiles, positions = _grid(x, _choose("batch_norm_act_conv1x1_sums", x, hidden))
        sizes = {"CONV": (channels + 1) * hidden if needs_conv else 0, "SUMS": 2 * channels if needs_sums else 0}
        partials = x.new_empty((grid[0], sum(sizes.values())), dtype=torch.float32)
        needs = {"NEEDS_CONV": needs_conv, "NEEDS_SUMS": needs_sums}
        shared = (*maps, norm, conv_weight, partials, tiles, positions)
        launch(_sums_kernel, grid, *shared, config=chosen, **needs, **constants)
        outputs = (partials, dconv_weight, dconv_bias, dbias, dweight, sums)
        blocks = (cdiv(partials.shape[1], _REDUCE.tile["BLOCK"]),)
        launch(_reduce_kernel, blocks, *outputs, grid[0], config=_REDUCE, C=channels, K=hidden, **sizes)
    if dx is not None:
        chosen, grid, tiles, positions = _grid(x, _choose("batch_norm_act_conv1x1_backward", x, hidden))
        arguments = (*maps, _map(dx), norm, conv_weight, sums, 1 / positions, tiles, positions)
        launch(_backward_kernel, grid, *arguments, config=chosen, **constants)
