"""The gate of the spatial attention modules: a matrix product, a softmax and the gating, forward and backward.

A sample has P positions with C features f and K hidden channels h; K is small. With the weight w and the bias b::

    l = w h (+ b)        s = softmax(l)        out = f + scale s f

The softmax runs over the positions of each channel (forms "spatial" and "spatial_mean1"; b cancels and is ignored) or
over the channels of each position (form "channel"). Gradient, with g the gradient of out::

    q = scale g f      delta = sum of s q over the softmax      dl = s (q - delta)
    df = g + scale g s      dh = w^T dl      dw = sum over positions of dl h      db = sum over positions of dl

With a small K the product is cheap compared with reading the features. So the logits are recomputed wherever they are
needed, and are neither written to memory nor rounded. A softmax over positions saves only the maximum and the sum of
exponentials of each channel for backward; a softmax over channels saves nothing.

Memory traffic in a two-byte dtype:

softmax over positions, forward: a program computes the maximum and the sum of exponentials of a chunk of a sample in
    one pass. The chunks are merged, then the tiles are gated. f is read once and h twice, once from cache:
    4PC + 2PK bytes.
softmax over positions, backward: one pass over f and g computes delta, a second the gradients. The second reads the
    samples in reverse order and finds the last ones in cache: at most 10PC bytes. If both passes alternate between
    groups of samples that fit in cache (``MEGABYTES``), this is nearly 6PC, with two or three launches per group.
softmax over channels: one pass, 4PC + 2PK bytes forward and 6PC + 4PK backward. If there are more than ``BLOCK_C``
    channels, another kernel first computes the statistics over them and reads h again, in backward also f and g.

dw is summed in registers over the tiles of a program, and over programs by a kernel in a fixed order. With more than
``BLOCK_C`` channels, dw needs a separate launch: a program for dh loops over all channels of a tile, but a program for
dw loops over tiles of the same channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batchnorm_statistics import activation_mask
from dfkd_fast.kernels.common import (
    architecture,
    cast,
    cdiv,
    divide,
    dot,
    exp,
    fma,
    launch,
    next_power_of_2,
    num_sms,
    precision,
    traffic,
)
from dfkd_fast.kernels.config import Launch

__all__ = [
    "NO_MAP",
    "Map",
    "Norm",
    "backward",
    "forward",
    "load_norm",
    "load_tile",
    "load_weight",
    "mask_tile",
    "normalize",
    "store_tile",
]

_MERGE = Launch(tile={"CHUNKS": 16, "BLOCK": 64})
_REDUCE = Launch(tile={"ROWS": 128, "BLOCK": 32}, num_warps=8)


def _tile(m: int, c: int, k: int, positions: int, per_thread: int, stages: int, **launcher: int) -> Launch:
    """Tiles of ``c`` channels, about ``per_thread`` elements per thread and, if possible, ``m`` positions or more."""
    warps = 4 if c <= 64 else 8
    block = max(16, min(max(m, min(64, 32 * warps * per_thread // c)), positions))
    tile = {"BLOCK_M": block, "BLOCK_C": c, "BLOCK_K": k, **launcher}
    return Launch(tile=tile, num_warps=min(16, max(warps, block * c // (32 * per_thread))), num_stages=stages)


def _block_k(arch: int, dtype: torch.dtype, hidden: int) -> int:
    """Hidden channels per tile: fewer if products read both operands from registers, and 16 without tensor cores."""
    return max(16, min(hidden, (64 if arch // 10 == 9 else 32) if dtype.itemsize == 2 else 16))


def _fits_large_tiles(dtype: torch.dtype, hidden: int, vectors: int) -> bool:
    """Whether 32 elements per thread fit in registers: with tensor cores and vector loads, which need few addresses."""
    return dtype.itemsize == 2 and hidden <= 32 and bool(vectors)


@config.heuristic("spatial_attention_statistics", TILES=(4, 64), BLOCK_M=(16, 128), num_stages=(1, 4))
@config.heuristic("spatial_attention_delta", TILES=(4, 64), BLOCK_M=(16, 128), num_stages=(1, 4))
def _config_sums(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int,
    norm: int,
) -> Launch:  # fmt: skip
    """Sums over positions. A program processes up to ``TILES`` tiles; fewer leave more chunks to merge."""
    m, per_thread, stages = (64, 16, 3) if dtype.itemsize == 2 else (32, 8, 2)
    block_k = _block_k(arch, dtype, hidden)
    most = 64 if dtype.itemsize == 2 or vectors else 32 if arch < 100 else 16  # more spills with unaligned float32
    return _tile(m, max(16, min(channels, most)), block_k, positions, per_thread, stages, TILES=16)


@config.heuristic("spatial_attention_gate", BLOCK_M=(16, 128))
@config.heuristic("spatial_attention_rows", BLOCK_M=(16, 128))
def _config_gate(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int,
    norm: int,
) -> Launch:  # fmt: skip
    """For a softmax over channels, a tile holds all channels if there are at most 256."""
    block = max(16, channels if over_channels and channels <= 256 else min(channels, 64))
    per_thread = 32 if _fits_large_tiles(dtype, hidden, vectors) else 8 if dtype.itemsize == 2 else 16
    return _tile(16, block, _block_k(arch, dtype, hidden), positions, per_thread, 2)


@config.heuristic("spatial_attention_gradients", BLOCK_M=(16, 128), PROGRAMS=(1, 8), num_stages=(1, 3))
def _config_gradients(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int,
    norm: int,
) -> Launch:  # fmt: skip
    """A tile holds all channels of a position: up to 256, or 64 or 128 if products read the weight from registers.

    ``PROGRAMS`` programs run per SM, and each writes one partial gradient of the weight. delta and the gradients are
    computed in turn for groups of samples of ``MEGABYTES``; 0 puts all samples in one group.
    """
    half_precision = dtype.itemsize == 2
    from_shared = half_precision and arch // 10 in (9, 10)
    most = 256 if from_shared else 64 if half_precision and over_channels else 128
    block = max(16, channels if channels <= most else 64)
    if _fits_large_tiles(dtype, hidden, vectors):
        per_thread = 32 if block != 128 and not over_channels else 16 if from_shared or not over_channels else 8
        if norm and block < channels and not from_shared:
            per_thread = 16  # the channels' parameters need registers
    else:
        per_thread = 8 if half_precision or block == channels >= 64 else 4  # more spills
    programs = max(1, min(3, 256 // block))
    stages = 1 if per_thread == 4 else 2
    block_k = _block_k(arch, dtype, hidden)
    return _tile(16, block, block_k, positions, per_thread, stages, PROGRAMS=programs, MEGABYTES=0)


class Map(NamedTuple):
    """A feature map as a kernel argument.

    Strides are None if it is contiguous in channels-last order: the compiler then derives the addresses' alignment from
    the number of channels. All fields are None if there is no such map.
    """

    data: Any
    stride_n: Any
    stride_p: Any
    stride_c: Any


NO_MAP = Map(None, None, None, None)


class Norm(NamedTuple):
    """A BatchNorm and a leaky ReLU that a kernel applies to the features; all fields are None if there are none."""

    mean_ptr: Any  # [C]
    rstd_ptr: Any  # [C]
    weight_ptr: Any  # [C] or None
    bias_ptr: Any  # [C] or None
    slope: Any  # of the activation for values <= 0


NO_NORM = Norm(None, None, None, None, None)


class Arguments(NamedTuple):
    """Arguments that the kernels share. Those that a kernel does not use may be None."""

    features: Any  # Map, [N, P, C]
    hidden: Any  # Map, [N, P, K]
    bias_ptr: Any  # [C]
    samples: Any
    positions: Any
    scale: Any
    grad_output: Any = NO_MAP  # Map, [N, P, C]
    stats_ptr: Any = None  # row_max and row_sum, [2, N, C], or [2, N, P] for a softmax over channels
    delta_ptr: Any = None  # [N, C] or [N, P]
    norm: Any = NO_NORM  # of the features


def _stats_part(a: Any) -> float:
    """The fraction of ``stats_ptr`` that :func:`_softmax` reads."""
    return {"tile": 0.0, "channels": 2 / 3, "positions": 1.0}[a["STATS"]]


@triton.jit
def locate(tile, positions, BLOCK_M: tl.constexpr):
    """Sample and first position of a tile, counted over all samples, and the mask of its positions."""
    tiles = tl.cdiv(positions, BLOCK_M)
    first = tl.cast(tile % tiles, tl.int64) * BLOCK_M
    return tl.cast(tile // tiles, tl.int64), first, first + tl.arange(0, BLOCK_M) < positions


@triton.jit
def mask_tile(mask_m, offs_c, CHANNELS: tl.constexpr):
    """The mask of a tile, without a comparison if the blocks divide the channels."""
    if CHANNELS // offs_c.shape[0] * offs_c.shape[0] == CHANNELS:
        return mask_m[:, None]
    else:
        return mask_m[:, None] & (offs_c < CHANNELS)[None, :]


@triton.jit
def _pointers(m, sample, position, offs_c, positions, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pointers to a tile (position, channel) of a map. Offsets within a contiguous tile need only 32 bits."""
    offs_m = tl.arange(0, BLOCK_M)
    if m.stride_p is None:
        return m.data + (sample * positions + position) * CHANNELS + (offs_m[:, None] * CHANNELS + offs_c[None, :])
    else:
        rows = m.data + sample * m.stride_n + (position + offs_m) * m.stride_p
        return rows[:, None] + offs_c.to(tl.int64)[None, :] * m.stride_c


@triton.jit
def load_tile(m, sample, position, mask_m, offs_c, positions, CHANNELS: tl.constexpr, EVICTION: tl.constexpr):
    """A tile of a map, zero outside."""
    ptrs = _pointers(m, sample, position, offs_c, positions, CHANNELS, mask_m.shape[0])
    return tl.load(ptrs, mask=mask_tile(mask_m, offs_c, CHANNELS), other=0.0, eviction_policy=EVICTION)


@triton.jit
def store_tile(m, value, sample, position, mask, offs_c, positions, CHANNELS: tl.constexpr):
    """Writes a float32 tile of a map."""
    ptrs = _pointers(m, sample, position, offs_c, positions, CHANNELS, mask.shape[0])
    tl.store(ptrs, cast(value, m.data.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(weight_ptr, offs_c, offs_k, C: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr):
    """A tile (k, channel) of the weight (C, K), zero outside, in the dtype of the products."""
    mask = (offs_k < K)[:, None] & (offs_c < C)[None, :]
    w = tl.load(weight_ptr + offs_c[None, :] * K + offs_k[:, None], mask=mask, other=0.0)
    return cast(w.to(tl.float32), dtype)


@triton.jit
def load_norm(norm, offs_c, C: tl.constexpr):
    """Mean, scale and bias of channels, zero outside."""
    mask = offs_c < C
    mean = tl.load(norm.mean_ptr + offs_c, mask=mask, other=0.0)
    scale = tl.load(norm.rstd_ptr + offs_c, mask=mask, other=0.0)
    if norm.weight_ptr is not None:
        scale *= tl.load(norm.weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    bias = tl.zeros_like(mean)
    if norm.bias_ptr is not None:
        bias = tl.load(norm.bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit
def normalize(x, mean, scale, bias):
    """The normalized tile (position, channel) and where the derivative of a leaky ReLU of it is one."""
    z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    return z, activation_mask(z, 1)


@triton.jit
def _load_features(args, sample, position, mask_m, offs_c, C: tl.constexpr, EVICTION: tl.constexpr):
    """A tile of f in float32. With a norm, it is arbitrary at positions outside."""
    f = load_tile(args.features, sample, position, mask_m, offs_c, args.positions, C, EVICTION).to(tl.float32)
    if args.norm.mean_ptr is not None:
        mean, scale, bias = load_norm(args.norm, offs_c, C)
        z, positive = normalize(f, mean, scale, bias)
        f = tl.where(positive, z, z * args.norm.slope)
    return f


@triton.jit
def _logits(
    h, w, args, weight_ptr, sample, position, mask_m, offs_c,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits (position, channel) of a tile. h and w are its first block of K; this loads the other blocks."""
    logits = dot(h, w, tl.zeros([h.shape[0], w.shape[1]], tl.float32), PRECISION)
    for start in range(h.shape[1], K, h.shape[1]):
        offs_k = start + tl.arange(0, h.shape[1])
        more = load_tile(args.hidden, sample, position, mask_m, offs_k, args.positions, K, "")
        logits = dot(more, load_weight(weight_ptr, offs_c, offs_k, C, K, h.dtype), logits, PRECISION)
    return logits


@triton.jit
def _channel_logits(logits, args, offs_c, C: tl.constexpr):
    """Logits for a softmax over channels: with the bias, and minus infinity outside."""
    if args.bias_ptr is not None:
        logits += tl.load(args.bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    if C // offs_c.shape[0] * offs_c.shape[0] != C:
        logits = tl.where((offs_c < C)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _softmax(logits, args, sample, position, mask_m, offs_c, C: tl.constexpr, STATS: tl.constexpr):
    """The softmax of a tile, zero outside.

    STATS says where maximum and sum come from: "positions", stored per channel; "channels", stored per position;
    "tile", from the tile, which holds all channels.
    """
    dtype: tl.constexpr = args.hidden.data.dtype.element_ty
    if STATS == "tile":
        e = exp(logits - tl.max(logits, 1)[:, None], dtype)
        s = e * divide(1.0, tl.sum(e, 1), dtype)[:, None]
    elif STATS == "channels":
        offs_m = tl.arange(0, mask_m.shape[0])
        stats_ptr = args.stats_ptr + sample * args.positions + position + offs_m
        row_max = tl.load(stats_ptr, mask=mask_m, other=0.0)
        stats_ptr = args.stats_ptr + (args.samples + sample) * args.positions + position + offs_m
        row_sum = tl.load(stats_ptr, mask=mask_m, other=1.0)
        s = exp(logits - row_max[:, None], dtype) * divide(1.0, row_sum, dtype)[:, None]
    else:
        row_max = tl.load(args.stats_ptr + sample * C + offs_c, mask=offs_c < C, other=0.0)
        row_sum = tl.load(args.stats_ptr + (args.samples + sample) * C + offs_c, mask=offs_c < C, other=1.0)
        s = exp(logits - row_max[None, :], dtype) * divide(1.0, row_sum, dtype)[None, :]
    return tl.where(mask_m[:, None], s, 0.0)


# --- softmax over positions: statistics


@triton.jit
def _chunk_tiles(chunk, chunks, length, positions, BLOCK_M: tl.constexpr):
    """First tile of a chunk, counted over all samples, and the one after its last."""
    tiles = tl.cdiv(positions, BLOCK_M)
    first = chunk % chunks * length
    return chunk // chunks * tiles + first, chunk // chunks * tiles + tl.minimum(first + length, tiles)


@traffic(reads="args.hidden weight_ptr", writes="stats_ptr")
@triton.jit
def _statistics_kernel(
    args,  # Arguments
    weight_ptr,  # [C, K]
    stats_ptr,  # [2, N * chunks, C]: row_max and row_sum of each chunk
    chunks, length, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    offs_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = _chunk_tiles(chunk, chunks, length, args.positions, BLOCK_M)
    dtype: tl.constexpr = args.hidden.data.dtype.element_ty
    w = load_weight(weight_ptr, offs_c, tl.arange(0, BLOCK_K), C, K, dtype)
    # Elementwise over tiles, so that the reduction across threads is needed only once. The initial maximum is float32's
    # lowest number, because the difference of two infinities would be NaN.
    tile_max = tl.full([BLOCK_M, BLOCK_C], -3.4028234663852886e38, tl.float32)
    tile_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(first, last):
        sample, position, mask_m = locate(tile, args.positions, BLOCK_M)
        h = load_tile(args.hidden, sample, position, mask_m, tl.arange(0, BLOCK_K), args.positions, K, "")
        logits = _logits(h, w, args, weight_ptr, sample, position, mask_m, offs_c, C, K, PRECISION)
        logits = tl.where(mask_m[:, None], logits, float("-inf"))
        # Either the sum or the new term is rescaled, so one exponential is enough.
        grows = logits > tile_max
        e = exp(-tl.abs(logits - tile_max), dtype)
        tile_sum = fma(e, tl.where(grows, tile_sum, 1.0), tl.where(grows, 1.0, tile_sum))
        tile_max = tl.maximum(tile_max, logits)
    row_max = tl.max(tile_max, 0)
    row_sum = tl.sum(tile_sum * exp(tile_max - row_max[None, :], dtype), 0)
    chunk = chunk.to(tl.int64)
    tl.store(stats_ptr + chunk * C + offs_c, row_max, mask=offs_c < C)
    tl.store(stats_ptr + (args.samples * chunks + chunk) * C + offs_c, row_sum, mask=offs_c < C)


@traffic(writes="merged_ptr")
@triton.jit(do_not_specialize=["first_sample"])
def _merge_kernel(
    partials_ptr,  # with MAXIMA [2, N * chunks, C], row_max and row_sum; else [N * chunks, C], delta
    merged_ptr,  # with MAXIMA [2, N, C], else [N, C]
    first_sample, samples, chunks,
    MAXIMA: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the chunks of each sample. With MAXIMA, sums are of exponentials relative to their chunk's maximum."""
    sample = (first_sample + tl.program_id(0)).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_max = tl.zeros([BLOCK], tl.float32)
    if MAXIMA:
        chunk_max = tl.full([CHUNKS, BLOCK], float("-inf"), tl.float32)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)
            mask = (chunk < chunks)[:, None] & (offs_c < C)[None, :]
            offs = (sample * chunks + chunk)[:, None] * C + offs_c[None, :]
            chunk_max = tl.maximum(chunk_max, tl.load(partials_ptr + offs, mask=mask, other=float("-inf")))
        row_max = tl.max(chunk_max, 0)
        tl.store(merged_ptr + sample * C + offs_c, row_max, mask=offs_c < C)
    acc = tl.zeros([CHUNKS, BLOCK], tl.float32)
    sums_row = samples if MAXIMA else 0
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & (offs_c < C)[None, :]
        offs = ((sums_row + sample) * chunks + chunk)[:, None] * C + offs_c[None, :]
        partial = tl.load(partials_ptr + offs, mask=mask, other=0.0)
        if MAXIMA:
            offs = (sample * chunks + chunk)[:, None] * C + offs_c[None, :]
            chunk_max = tl.load(partials_ptr + offs, mask=mask, other=float("-inf"))
            partial *= exp(chunk_max - row_max[None, :], tl.float32)
        acc += tl.where(mask, partial, 0.0)
    tl.store(merged_ptr + (sums_row + sample) * C + offs_c, tl.sum(acc, 0), mask=offs_c < C)


@traffic(reads="args.features args.norm args.hidden args.grad_output args.stats_ptr weight_ptr", writes="delta_ptr")
@triton.jit(do_not_specialize=["first_sample"])
def _delta_kernel(
    args,  # Arguments
    weight_ptr,  # [C, K]
    delta_ptr,  # [N * chunks, C]: delta of each chunk
    first_sample, chunks, length, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    chunk = first_sample * chunks + tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    offs_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = _chunk_tiles(chunk, chunks, length, args.positions, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    w = load_weight(weight_ptr, offs_c, offs_k, C, K, args.hidden.data.dtype.element_ty)
    delta = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(first, last):
        sample, position, mask_m = locate(tile, args.positions, BLOCK_M)
        g = load_tile(args.grad_output, sample, position, mask_m, offs_c, args.positions, C, "").to(tl.float32)
        f = _load_features(args, sample, position, mask_m, offs_c, C, "")
        h = load_tile(args.hidden, sample, position, mask_m, offs_k, args.positions, K, "")
        logits = _logits(h, w, args, weight_ptr, sample, position, mask_m, offs_c, C, K, PRECISION)
        # q is computed exactly as in _logits_gradient: if s is nearly 1, q - delta cancels, and different rounding
        # errors would remain.
        delta += _softmax(logits, args, sample, position, mask_m, offs_c, C, "positions") * (args.scale * (g * f))
    tl.store(delta_ptr + chunk.to(tl.int64) * C + offs_c, tl.sum(delta, 0), mask=offs_c < C)


# --- softmax over more channels than a tile holds: statistics


@traffic(
    writes="args.stats_ptr args.delta_ptr",
    parts={
        "args.stats_ptr": lambda a: 2 / 3,
        "args.delta_ptr": lambda a: a["args"].grad_output.data is not None,
        "args.features": lambda a: a["args"].grad_output.data is not None,
        "args.norm": lambda a: a["args"].grad_output.data is not None,
    },
)
@triton.jit
def _rows_kernel(
    args,  # Arguments
    weight_ptr,  # [C, K]
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """row_max and row_sum of each position and, if there is a grad_output, delta."""
    sample, position, mask_m = locate(tl.program_id(0), args.positions, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    h = load_tile(args.hidden, sample, position, mask_m, offs_k, args.positions, K, "")
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        w = load_weight(weight_ptr, offs_c, offs_k, C, K, h.dtype)
        logits = _logits(h, w, args, weight_ptr, sample, position, mask_m, offs_c, C, K, PRECISION)
        logits = _channel_logits(logits, args, offs_c, C)
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        e = exp(logits - new_max[:, None], h.dtype)
        rescale = exp(row_max - new_max, h.dtype)
        row_sum = row_sum * rescale + tl.sum(e, 1)
        if args.grad_output.data is not None:
            g = load_tile(args.grad_output, sample, position, mask_m, offs_c, args.positions, C, "").to(tl.float32)
            f = _load_features(args, sample, position, mask_m, offs_c, C, "")
            delta = delta * rescale + tl.sum(e * (g * f), 1)
        row_max = new_max
    offs_m = tl.arange(0, BLOCK_M)
    offs = sample * args.positions + position + offs_m
    tl.store(args.stats_ptr + offs, row_max, mask=mask_m)
    tl.store(args.stats_ptr + (args.samples + sample) * args.positions + position + offs_m, row_sum, mask=mask_m)
    if args.grad_output.data is not None:
        tl.store(args.delta_ptr + offs, delta * divide(args.scale, row_sum, h.dtype), mask=mask_m)


# --- gated features and gradients


@traffic(writes="out", parts={"args.stats_ptr": _stats_part, "args.delta_ptr": lambda a: 0})
@triton.jit
def _gate_kernel(
    args,  # Arguments
    weight_ptr,  # [C, K]
    out,  # Map, [N, P, C]
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, STATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample, position, mask_m = locate(tl.program_id(0) // tl.cdiv(C, BLOCK_C), args.positions, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    f = _load_features(args, sample, position, mask_m, offs_c, C, "")
    h = load_tile(args.hidden, sample, position, mask_m, offs_k, args.positions, K, "")
    w = load_weight(weight_ptr, offs_c, offs_k, C, K, h.dtype)
    logits = _logits(h, w, args, weight_ptr, sample, position, mask_m, offs_c, C, K, PRECISION)
    if STATS != "positions":
        logits = _channel_logits(logits, args, offs_c, C)
    s = _softmax(logits, args, sample, position, mask_m, offs_c, C, STATS)
    # Not f * (1 + gate): added to 1, a gate of 1e-6 would lose most of its precision.
    y = f + f * (args.scale * s)
    store_tile(out, y, sample, position, mask_tile(mask_m, offs_c, C), offs_c, args.positions, C)


@triton.jit
def _logits_gradient(logits, args, df, sample, position, mask_m, offs_c, C: tl.constexpr, STATS: tl.constexpr):
    """dl of a tile. The first of the programs that share the tile also writes df unless it is None."""
    # This is usually the last read of g and f, so the cache evicts them first.
    g = load_tile(args.grad_output, sample, position, mask_m, offs_c, args.positions, C, "evict_first").to(tl.float32)
    f = _load_features(args, sample, position, mask_m, offs_c, C, "evict_first")
    s = _softmax(logits, args, sample, position, mask_m, offs_c, C, STATS)
    if df.data is not None:
        mask = mask_tile(mask_m, offs_c, C) & (tl.program_id(2) == 0)
        store_tile(df, g + g * (args.scale * s), sample, position, mask, offs_c, args.positions, C)
    q = args.scale * (g * f)
    if STATS == "tile":
        return s * (q - tl.sum(s * q, 1)[:, None])
    elif STATS == "channels":
        offs = sample * args.positions + position + tl.arange(0, mask_m.shape[0])
        return s * (q - tl.load(args.delta_ptr + offs, mask=mask_m, other=0.0)[:, None])
    else:
        return s * (q - tl.load(args.delta_ptr + sample * C + offs_c, mask=offs_c < C, other=0.0)[None, :])


@traffic(
    writes="df dh partials_ptr",
    parts={
        "args.stats_ptr": _stats_part,
        "args.delta_ptr": lambda a: a["STATS"] != "tile",
        "partials_ptr": lambda a: a["NEEDS_GRAD_W"] or a["NEEDS_GRAD_B"],
    },
)
@triton.jit(do_not_specialize=["first_tile", "first_row"])
def _gradients_kernel(
    args,  # Arguments
    weight_ptr,  # [C, K]
    df,  # Map, [N, P, C], or None
    dh,  # Map, [N, P, K], or None
    partials_ptr,  # [programs, width]: per row dw and then db, as far as they are needed
    first_tile, first_row, num_tiles, length, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    STATS: tl.constexpr, NEEDS_GRAD_W: tl.constexpr, NEEDS_GRAD_B: tl.constexpr, LOOP_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the ``num_tiles`` tiles from ``first_tile`` on, of which each program processes ``length``.

    Axes of the grid: tiles; blocks of channels, or with LOOP_C one program for all of them; blocks of hidden channels,
    for the gradients of h and w.
    """
    pid = tl.program_id(0)
    # Last samples first: the previous pass left them in cache.
    first = first_tile + (tl.num_programs(0) - 1 - pid) * length
    offs_k = tl.arange(0, BLOCK_K)
    offs_out = tl.program_id(2) * BLOCK_K + offs_k
    dtype: tl.constexpr = args.hidden.data.dtype.element_ty
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = load_weight(weight_ptr, offs_c, offs_k, C, K, dtype)
    w_out = load_weight(weight_ptr, offs_c, offs_out, C, K, dtype) if K > BLOCK_K else w
    dw = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(first, tl.minimum(first + length, first_tile + num_tiles)):
        sample, position, mask_m = locate(tile, args.positions, BLOCK_M)
        h = load_tile(args.hidden, sample, position, mask_m, offs_k, args.positions, K, "")
        acc = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
        for start in range(0, C if LOOP_C else BLOCK_C, BLOCK_C):
            if LOOP_C:
                offs_c = start + tl.arange(0, BLOCK_C)
                w = load_weight(weight_ptr, offs_c, offs_k, C, K, dtype)
                w_out = load_weight(weight_ptr, offs_c, offs_out, C, K, dtype) if K > BLOCK_K else w
            logits = _logits(h, w, args, weight_ptr, sample, position, mask_m, offs_c, C, K, PRECISION)
            if STATS != "positions":
                logits = _channel_logits(logits, args, offs_c, C)
            dl = _logits_gradient(logits, args, df, sample, position, mask_m, offs_c, C, STATS)
            if dh.data is not None:
                acc = dot(w_out, tl.trans(cast(dl, dtype)), acc, PRECISION)
            if NEEDS_GRAD_W:
                h_out = h
                if K > BLOCK_K:
                    h_out = load_tile(args.hidden, sample, position, mask_m, offs_out, args.positions, K, "")
                dw = dot(tl.trans(cast(dl, dtype)), h_out, dw, PRECISION)
            if NEEDS_GRAD_B:
                db += dl
        if dh.data is not None:
            mask = mask_tile(mask_m, offs_out, K)
            store_tile(dh, tl.trans(acc), sample, position, mask, offs_out, args.positions, K)
    W_SIZE: tl.constexpr = C * K if NEEDS_GRAD_W else 0
    row = partials_ptr + (first_row + pid).to(tl.int64) * (W_SIZE + (C if NEEDS_GRAD_B else 0))
    if NEEDS_GRAD_W:
        mask = (offs_c < C)[:, None] & (offs_out < K)[None, :]
        tl.store(row + offs_c[:, None] * K + offs_out[None, :], dw, mask=mask)
    if NEEDS_GRAD_B:
        tl.store(row + W_SIZE + offs_c, tl.sum(db, 0), mask=(offs_c < C) & (tl.program_id(2) == 0))


@traffic(writes="dw_ptr db_ptr")
@triton.jit
def _reduce_kernel(
    partials_ptr,  # [num_rows, WIDTH]
    dw_ptr,  # [W_SIZE], or None
    db_ptr,  # [SIZE - W_SIZE], or None; zeros are written beyond WIDTH
    num_rows, W_SIZE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial gradients of weight and bias."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (offs < WIDTH)[None, :]
        acc += tl.load(partials_ptr + row.to(tl.int64)[:, None] * WIDTH + offs[None, :], mask=mask, other=0.0)
    result = tl.sum(acc, 0)
    if W_SIZE > 0:
        tl.store(dw_ptr + offs, cast(result, dw_ptr.dtype.element_ty), mask=offs < W_SIZE)
    if SIZE > W_SIZE:
        mask = (offs >= W_SIZE) & (offs < SIZE)
        tl.store(db_ptr + offs - W_SIZE, cast(result, db_ptr.dtype.element_ty), mask=mask)


# --- launchers


def _with_common_stride(x: Tensor) -> Tensor:
    """x if its positions have a common stride, else a contiguous or channels-last copy."""
    if x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def as_map(x: Tensor) -> Map:
    """A map as a kernel argument."""
    samples, channels, height, width = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    stride_p = stride_w if width > 1 else stride_h
    dense = (channels == 1 or stride_c == 1) and (height * width == 1 or stride_p == channels)
    if dense and (samples == 1 or stride_n == height * width * channels):
        return Map(x, None, None, None)
    return Map(x, stride_n, stride_p, stride_c)


class _Call:
    """Arguments, configurations and launches of one forward or backward call."""

    def __init__(
        self,
        features: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        form: str,
        norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float],
    ) -> None:
        self.features, self.hidden = _with_common_stride(features), _with_common_stride(hidden)
        self.weight = weight.contiguous()
        self.samples, self.channels, height, width = features.shape
        self.positions = height * width
        self.over_channels = form == "channel"
        self.constants = {"C": self.channels, "K": weight.shape[1], "PRECISION": precision(hidden.dtype)}
        factor = float(scale * self.positions if form == "spatial_mean1" else scale)
        bias = bias.contiguous() if bias is not None and self.over_channels else None
        self.args = Arguments(as_map(self.features), as_map(self.hidden), bias, self.samples, self.positions, factor)
        if norm[0] is not None:
            vectors = [None if v is None else v.contiguous() for v in norm[:4]]
            self.args = self.args._replace(norm=Norm._make((*vectors, norm[4])))

    def choose(self, kernel: str) -> Launch:
        """The configuration of a kernel."""
        return config.choose(
            f"spatial_attention_{kernel}",
            architecture(self.hidden),
            torch.promote_types(self.features.dtype, self.hidden.dtype),
            channels=next_power_of_2(self.channels),
            hidden=next_power_of_2(self.constants["K"]),
            positions=next_power_of_2(self.positions),
            over_channels=int(self.over_channels),
            vectors=int(self.args.features.stride_p is None and self.channels % 8 == 0),
            norm=int(self.args.norm.mean_ptr is not None),
        )

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, chosen: Launch, **constants: Any) -> None:
        """Launches a kernel with the shared arguments. Only the BLOCK sizes of the tile are passed to it."""
        tile = {name: size for name, size in chosen.tile.items() if name.startswith("BLOCK")}
        constants |= self.constants
        launch(kernel, grid, self.args, self.weight, *arguments, config=replace(chosen, tile=tile), **constants)

    def chunks(self, chosen: Launch, samples: int) -> tuple[int, int]:
        """The number of chunks per sample that fills the device, and their length in tiles."""
        tiles = cdiv(self.positions, chosen.tile["BLOCK_M"])
        programs = samples * cdiv(self.channels, chosen.tile["BLOCK_C"])
        length = cdiv(tiles, max(num_sms(self.features) // programs, cdiv(tiles, chosen.tile["TILES"])))
        return cdiv(tiles, length), length

    def merge(self, partials: Tensor, merged: Tensor, first: int, samples: int, chunks: int, *, maxima: bool) -> None:
        """Merges the chunks of ``samples`` samples from ``first`` on."""
        grid = (samples, cdiv(self.channels, _MERGE.tile["BLOCK"]))
        arguments = (partials, merged, first, self.samples, chunks)
        launch(_merge_kernel, grid, *arguments, config=_MERGE, MAXIMA=maxima, C=self.channels)

    def compute_delta(self, chosen: Launch, group: int, first: int, samples: int) -> None:
        """Computes delta of ``samples`` samples from ``first`` on. ``group`` is the size of a full group."""
        chunks, length = self.chunks(chosen, group)
        delta = self.args.delta_ptr
        partials = delta if chunks == 1 else delta.new_empty((self.samples * chunks, self.channels))
        grid = (samples * chunks * cdiv(self.channels, chosen.tile["BLOCK_C"]),)
        self.launch(_delta_kernel, grid, partials, first, chunks, length, chosen=chosen)
        if chunks > 1:
            self.merge(partials, delta, first, samples, chunks, maxima=False)

    def prepare_stats(self, chosen: Launch) -> str:
        """Returns STATS of :func:`_softmax` for a kernel, and computes statistics over channels if it needs them."""
        if not self.over_channels:
            return "positions"
        if self.channels <= chosen.tile["BLOCK_C"]:
            return "tile"
        stats = self.weight.new_empty((3, self.samples, self.positions), dtype=torch.float32)
        self.args = self.args._replace(stats_ptr=stats, delta_ptr=stats[2])
        chosen = self.choose("rows")
        self.launch(_rows_kernel, (self.samples * cdiv(self.positions, chosen.tile["BLOCK_M"]),), chosen=chosen)
        return "channels"


def forward(
    features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, form: str,
    mean: Tensor | None, rstd: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    negative_slope: float, out: Tensor, row_stats: Tensor,
) -> None:  # fmt: skip
    """Computes the gated features.

    Args:
        features: (N, C, H, W), any strides. All tensors are float16, bfloat16 or float32; their dtypes may differ.
            With ``mean``, f is a leaky ReLU of the normalized features.
        hidden: (N, K, H, W), any strides, in the dtype of the matrix product.
        weight: (C, K).
        bias: (C,) or None; used only by form "channel".
        scale: factor of the softmax.
        form: "spatial", "spatial_mean1" or "channel"; see :func:`dfkd_fast.ops.spatial_attention`.
        mean: (C,), float32, or None if f are the features. Then the other arguments of the norm are not used.
        rstd: (C,), float32, ``1 / sqrt(var + eps)``.
        norm_weight: (C,) or None.
        norm_bias: (C,) or None.
        negative_slope: of the leaky ReLU.
        out: (N, C, H, W), any strides; written.
        row_stats: (2, N, C), float32; written with each channel's maximum and sum of exponentials, for
            :func:`backward`. Unused by form "channel".
    """
    if features.shape[0] == 0:
        return
    call = _Call(features, hidden, weight, bias, scale, form, (mean, rstd, norm_weight, norm_bias, negative_slope))
    if not call.over_channels:
        chosen = call.choose("statistics")
        chunks, length = call.chunks(chosen, call.samples)
        partials = row_stats if chunks == 1 else row_stats.new_empty((2, call.samples * chunks, call.channels))
        grid = (call.samples * chunks * cdiv(call.channels, chosen.tile["BLOCK_C"]),)
        call.launch(_statistics_kernel, grid, partials, chunks, length, chosen=chosen)
        if chunks > 1:
            call.merge(partials, row_stats, 0, call.samples, chunks, maxima=True)
        call.args = call.args._replace(stats_ptr=row_stats)
    chosen = call.choose("gate")
    stats = call.prepare_stats(chosen)
    has_common_stride = _with_common_stride(out) is out
    result = out if has_common_stride else torch.empty_like(out, memory_format=torch.contiguous_format)
    grid = (call.samples * cdiv(call.positions, chosen.tile["BLOCK_M"]) * cdiv(call.channels, chosen.tile["BLOCK_C"]),)
    call.launch(_gate_kernel, grid, as_map(result), chosen=chosen, STATS=stats)
    if result is not out:
        out.copy_(result)


def backward(
    grad_output: Tensor, features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, form: str,
    mean: Tensor | None, rstd: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    negative_slope: float, row_stats: Tensor,
    df: Tensor | None, dh: Tensor | None, dw: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    """Computes the gradients of :func:`forward`.

    Args:
        grad_output: (N, C, H, W), gradient of ``out``, any strides.
        features: (N, C, H, W), as in forward.
        hidden: (N, K, H, W), as in forward.
        weight: (C, K).
        bias: (C,) or None.
        scale: factor of the softmax.
        form: as in forward.
        mean: as in forward, like the other arguments of the norm.
        rstd: as in forward.
        norm_weight: as in forward.
        norm_bias: as in forward.
        negative_slope: as in forward.
        row_stats: (2, N, C), from forward.
        df: (N, C, H, W), gradient of f in the dtype of features, contiguous or channels-last; None if it is not needed.
        dh: (N, K, H, W), in the dtype of hidden, contiguous or channels-last; None if it is not needed.
        dw: (C, K), in the dtype of weight, contiguous; None if it is not needed.
        db: (C,), in the dtype of bias; zero unless form is "channel"; None if it is not needed.
    """
    call = _Call(features, hidden, weight, bias, scale, form, (mean, rstd, norm_weight, norm_bias, negative_slope))
    call.args = call.args._replace(grad_output=as_map(_with_common_stride(grad_output)), stats_ptr=row_stats)
    chosen = call.choose("gradients")
    tiles = cdiv(call.positions, chosen.tile["BLOCK_M"])
    blocks_c = cdiv(call.channels, chosen.tile["BLOCK_C"])
    blocks_k = 1 if dh is None and dw is None else cdiv(call.constants["K"], chosen.tile["BLOCK_K"])
    w_size = 0 if dw is None else dw.numel()
    width = w_size + (call.channels if db is not None and call.over_channels else 0)
    sums = {"NEEDS_GRAD_W": w_size > 0, "NEEDS_GRAD_B": width > w_size, "LOOP_C": False}
    maps = tuple(NO_MAP if m is None else as_map(m) for m in (df, dh))
    passes = [(maps, sums)] if df is not None or dh is not None or width else []
    if dh is not None and blocks_c > 1:
        passes = [(maps, {"NEEDS_GRAD_W": False, "NEEDS_GRAD_B": False, "LOOP_C": True})]
        passes += [((NO_MAP, NO_MAP), sums)] if width else []
    group = max(call.samples, 1)
    if chosen.tile["MEGABYTES"] and not call.over_channels:
        row_bytes = 2 * call.channels * call.features.itemsize + call.constants["K"] * call.hidden.itemsize
        group = min(group, max(1, (chosen.tile["MEGABYTES"] << 20) // (row_bytes * call.positions)))
    length = cdiv(group * tiles, max(1, chosen.tile["PROGRAMS"] * num_sms(grad_output) // (blocks_c * blocks_k)))
    groups = [(first, min(group, call.samples - first)) for first in range(0, call.samples, group) if passes]
    partials = row_stats.new_empty((sum(cdiv(samples * tiles, length) for _, samples in groups), width))
    stats = call.prepare_stats(chosen) if groups else ""
    if stats == "positions":
        call.args = call.args._replace(delta_ptr=row_stats.new_empty((call.samples, call.channels)))
    first_row = 0
    for first, samples in groups:
        if stats == "positions" and (dh is not None or width > 0):
            call.compute_delta(call.choose("delta"), group, first, samples)
        programs = cdiv(samples * tiles, length)
        for (df_map, dh_map), constants in passes:
            grid = (programs, 1 if constants["LOOP_C"] else blocks_c, blocks_k)
            arguments = (df_map, dh_map, partials, first * tiles, first_row, samples * tiles, length)
            call.launch(_gradients_kernel, grid, *arguments, chosen=chosen, STATS=stats, **constants)
        first_row += programs
    size = w_size + (0 if db is None else call.channels)
    if size:
        sizes = {"W_SIZE": w_size, "SIZE": size, "WIDTH": width}
        launch(
            _reduce_kernel, (cdiv(size, _REDUCE.tile["BLOCK"]),), partials, dw, db, first_row, config=_REDUCE, **sizes
        )
