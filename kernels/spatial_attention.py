"""The gate of the spatial attention modules: a narrow product, its softmax and the gating, forward and backward.

A sample is P positions by C features f; h are the K narrow maps. Per position and channel::

    l = w h (+ b)        s = softmax(l)        out = f + scale s f

over the positions of each channel (``spatial``; a bias cancels there and is left out) or over the channels at each
position. With g the upstream gradient::

    q = scale g f      D = sum of s q over the softmax      dl = s (q - D)
    df = g + g scale s      dh = w^T dl      dw = sum over positions of dl h      db = sum over positions of dl

The product is narrow and cheap, features are wide: so logits are computed anew wherever they are needed, never written,
and never rounded. Saved are the maximum and the sum of exponentials of each channel; over channels nothing is.

positions, forward: a program takes a chunk of a sample, first for its maximum, then for its sum of exponentials; chunks
    are merged, then tiles are gated. f is read once, h once from memory and twice from cache: 4PC + 2PK bytes in a
    two-byte type.
positions, backward: a pass over f and g for D, one for the gradients, which takes the samples in reverse to find in
    cache what was read last: 10PC bytes at most. Nearer to 6PC come groups of samples, each small enough for the cache,
    that take turns (``MEGABYTES``), at two or three launches a group.
channels: one pass each way; with more of them than ``BLOCK_C``, sums along them come first, by a kernel of their own.

dw is summed in registers over the tiles of a program, and over programs by a kernel in a fixed order. With channels in
excess of ``BLOCK_C`` it takes a launch of its own: dh wants all channels of a tile in a program, dw all tiles of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import (
    architecture,
    cast,
    cdiv,
    divide,
    dot,
    exp,
    launch,
    next_power_of_2,
    num_sms,
    precision,
)
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward"]

_MERGE = Launch(tile={"CHUNKS": 16, "BLOCK": 64})
_SUM = Launch(tile={"ROWS": 128, "BLOCK": 32}, num_warps=8)


def _tile(m: int, c: int, k: int, positions: int, each: int, stages: int, **launcher: int) -> Launch:
    """Tiles of ``c`` channels by about ``each`` elements per thread; of ``m`` positions or more, if there are."""
    warps = 4 if c <= 64 else 8
    block = max(16, min(max(m, min(64, 32 * warps * each // c)), positions))
    tile = {"BLOCK_M": block, "BLOCK_C": c, "BLOCK_K": k, **launcher}
    return Launch(tile=tile, num_warps=min(16, max(warps, block * c // (32 * each))), num_stages=stages)


def _block_k(arch: int, dtype: torch.dtype, hidden: int) -> int:
    """Narrow maps of a tile: fewer where products read both sides from registers, and few outside tensor cores."""
    return max(16, min(hidden, (64 if arch // 10 == 9 else 32) if dtype.itemsize == 2 else 16))


def _roomy(dtype: torch.dtype, hidden: int, vectors: int) -> bool:
    """Whether a thread has room for many elements: products in tensor cores, and one address per eight elements."""
    return dtype.itemsize == 2 and hidden <= 32 and bool(vectors)


@config.heuristic("spatial_attention_statistics", TILES=(4, 64), BLOCK_M=(16, 128), num_stages=(1, 4))
@config.heuristic("spatial_attention_slopes", TILES=(4, 64), BLOCK_M=(16, 128), num_stages=(1, 4))
def _config_sums(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int
) -> Launch:
    """Sums along positions. A program has up to ``TILES``; with fewer, more chunks are left to merge."""
    m, each, stages = (64, 16, 3) if dtype.itemsize == 2 else (32, 8, 2)
    block_k = _block_k(arch, dtype, hidden)
    return _tile(m, max(16, min(channels, 64)), block_k, positions, each, stages, TILES=16)


@config.heuristic("spatial_attention_gate", BLOCK_M=(16, 128))
@config.heuristic("spatial_attention_rows", BLOCK_M=(16, 128))
def _config_gate(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int
) -> Launch:
    """For a softmax over channels, all of them are in a tile, up to 256."""
    block = max(16, channels if over_channels and channels <= 256 else min(channels, 64))
    each = 32 if _roomy(dtype, hidden, vectors) else 8 if dtype.itemsize == 2 else 16
    return _tile(16, block, _block_k(arch, dtype, hidden), positions, each, 2)


@config.heuristic("spatial_attention_gradients", BLOCK_M=(16, 128), PROGRAMS=(1, 8), num_stages=(1, 3))
def _config_gradients(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int
) -> Launch:
    """All channels of a position are in a tile, up to 256; up to 128 where products read the weight from registers.

    ``PROGRAMS`` run per multiprocessor, and each writes a gradient of the weight. One round of sums and gradients goes
    over ``MEGABYTES`` of maps, 0 for all there are.
    """
    halves = dtype.itemsize == 2
    from_shared = halves and arch // 10 in (9, 10)
    most = 256 if from_shared else 64 if halves and over_channels else 128
    block = max(16, channels if channels <= most else 64)
    if _roomy(dtype, hidden, vectors):
        each = 32 if block != 128 and not over_channels else 16 if from_shared or not over_channels else 8
    else:
        each = 8 if halves or block == channels else 4
    programs = max(1, min(3, 256 // block))
    stages = 1 if each == 4 else 2
    block_k = _block_k(arch, dtype, hidden)
    return _tile(16, block, block_k, positions, each, stages, PROGRAMS=programs, MEGABYTES=0)


class Map(NamedTuple):
    """A feature map as kernels take it: data and strides, None where it is channels-last without gaps.

    Then addresses follow from the number of channels, and the compiler knows how far vectors are aligned.
    """

    data: Any
    sample: Any
    position: Any
    channel: Any


_NO_MAP = Map(None, None, None, None)


class Operands(NamedTuple):
    """What the kernels have in common; None where one has no use for it."""

    features: Any
    hidden: Any
    bias: Any
    samples: Any
    positions: Any
    scale: Any
    grad_output: Any = _NO_MAP
    saved: Any = None
    slopes: Any = None


@triton.jit
def _place(tile, positions, BLOCK_M: tl.constexpr):
    """Sample and first position of a tile, of all samples' tiles in turn, and which of its positions exist."""
    tiles = tl.cdiv(positions, BLOCK_M)
    first = tl.cast(tile % tiles, tl.int64) * BLOCK_M
    return tl.cast(tile // tiles, tl.int64), first, first + tl.arange(0, BLOCK_M) < positions


@triton.jit
def _inside(exists, channel, CHANNELS: tl.constexpr):
    """Which elements of a tile exist: no comparison along channels where all of them do."""
    if CHANNELS // channel.shape[0] * channel.shape[0] == CHANNELS:
        return exists[:, None]
    else:
        return exists[:, None] & (channel < CHANNELS)[None, :]


@triton.jit
def _pointers(m, sample, position, channel, positions, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile (position, channel) of a map, from the first position. Within a dense one 32 bits suffice."""
    row = tl.arange(0, BLOCK_M)
    if m.position is None:
        return m.data + (sample * positions + position) * CHANNELS + (row[:, None] * CHANNELS + channel[None, :])
    else:
        at = (position + row) * m.position
        return m.data + sample * m.sample + at[:, None] + channel.to(tl.int64)[None, :] * m.channel


@triton.jit
def _load(m, sample, position, exists, channel, positions, CHANNELS: tl.constexpr, EVICTION: tl.constexpr):
    """That tile, zero outside."""
    at = _pointers(m, sample, position, channel, positions, CHANNELS, exists.shape[0])
    return tl.load(at, mask=_inside(exists, channel, CHANNELS), other=0.0, eviction_policy=EVICTION)


@triton.jit
def _store(m, value, sample, position, inside, channel, positions, CHANNELS: tl.constexpr):
    """Its counterpart, from float32."""
    at = _pointers(m, sample, position, channel, positions, CHANNELS, inside.shape[0])
    tl.store(at, cast(value, m.data.dtype.element_ty), mask=inside)


@triton.jit
def _weight(weight, channel, k, C: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr):
    """A tile (k, channel) of the weight (C, K), zero outside, in the type of the products."""
    inside = (k < K)[:, None] & (channel < C)[None, :]
    return cast(tl.load(weight + channel[None, :] * K + k[:, None], mask=inside, other=0.0).to(tl.float32), dtype)


@triton.jit
def _logits(
    h, w, x, weight, sample, position, exists, channel, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Logits (position, channel), from the first narrow maps h and weights w of a tile, and all further ones."""
    logits = dot(h, w, tl.zeros([h.shape[0], w.shape[1]], tl.float32), PRECISION)
    for start in range(h.shape[1], K, h.shape[1]):
        k = start + tl.arange(0, h.shape[1])
        more = _load(x.hidden, sample, position, exists, k, x.positions, K, "")
        logits = dot(more, _weight(weight, channel, k, C, K, h.dtype), logits, PRECISION)
    return logits


@triton.jit
def _over_channels(logits, x, channel, C: tl.constexpr):
    """Logits whose softmax runs along channels: with the bias, and minus infinity beyond the last channel."""
    if x.bias is not None:
        logits += tl.load(x.bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    if C // channel.shape[0] * channel.shape[0] != C:
        logits = tl.where((channel < C)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _softmax(logits, x, sample, position, exists, channel, C: tl.constexpr, FORM: tl.constexpr):
    """The softmax of a tile, 0 at positions that do not exist.

    FORM says where maximum and sum come from: "positions", saved by channel; "channels", saved by position; "whole",
    this tile itself, which holds all channels.
    """
    dtype: tl.constexpr = x.hidden.data.dtype.element_ty
    if FORM == "whole":
        e = exp(logits - tl.max(logits, 1)[:, None], dtype)
        s = e * divide(1.0, tl.sum(e, 1), dtype)[:, None]
    elif FORM == "channels":
        row = tl.arange(0, exists.shape[0])
        top = tl.load(x.saved + sample * x.positions + position + row, mask=exists, other=0.0)
        total = tl.load(x.saved + (x.samples + sample) * x.positions + position + row, mask=exists, other=1.0)
        s = exp(logits - top[:, None], dtype) * divide(1.0, total, dtype)[:, None]
    else:
        top = tl.load(x.saved + sample * C + channel, mask=channel < C, other=0.0)
        total = tl.load(x.saved + (x.samples + sample) * C + channel, mask=channel < C, other=1.0)
        s = exp(logits - top[None, :], dtype) * divide(1.0, total, dtype)[None, :]
    return tl.where(exists[:, None], s, 0.0)


# --- softmax over positions: sums along them


@triton.jit
def _chunk(row, chunks, each, positions, BLOCK_M: tl.constexpr):
    """First and last tile of a chunk."""
    tiles = tl.cdiv(positions, BLOCK_M)
    first = row % chunks * each
    return row // chunks * tiles + first, row // chunks * tiles + tl.minimum(first + each, tiles)


@triton.jit
def _tile_logits(w, x, weight, tile, channel, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_M: tl.constexpr):  # fmt: skip
    """Logits of a tile, minus infinity at positions that do not exist."""
    sample, position, exists = _place(tile, x.positions, BLOCK_M)
    h = _load(x.hidden, sample, position, exists, tl.arange(0, w.shape[0]), x.positions, K, "")
    logits = _logits(h, w, x, weight, sample, position, exists, channel, C, K, PRECISION)
    return tl.where(exists[:, None], logits, float("-inf"))


@triton.jit
def _statistics_kernel(
    x, weight, parts, chunks, each, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maximum of the logits and sum of exponentials below it, a chunk of ``each`` tiles and channel."""
    row = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = _chunk(row, chunks, each, x.positions, BLOCK_M)
    dtype: tl.constexpr = x.hidden.data.dtype.element_ty
    w = _weight(weight, channel, tl.arange(0, BLOCK_K), C, K, dtype)
    # One number a place of the tile until the end: that spares a reduction across threads in each tile.
    top = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    for tile in range(first, last):
        top = tl.maximum(top, _tile_logits(w, x, weight, tile, channel, C, K, PRECISION, BLOCK_M))
    largest = tl.max(top, 0)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(first, last):
        logits = _tile_logits(w, x, weight, tile, channel, C, K, PRECISION, BLOCK_M)
        total += exp(logits - largest[None, :], dtype)
    wide = row.to(tl.int64)
    tl.store(parts + wide * C + channel, largest, mask=channel < C)
    tl.store(parts + (x.samples * chunks + wide) * C + channel, tl.sum(total, 0), mask=channel < C)


@triton.jit(do_not_specialize=["first_sample"])
def _merge_kernel(
    parts, merged, first_sample, samples, chunks, MAXIMA: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The chunks' sums to those of a sample; with MAXIMA, these come first, and sums are of exponentials below them."""
    sample = (first_sample + tl.program_id(0)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    if MAXIMA:
        top = tl.full([CHUNKS, BLOCK], float("-inf"), tl.float32)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)
            inside = (chunk < chunks)[:, None] & (channel < C)[None, :]
            at = (sample * chunks + chunk)[:, None] * C + channel[None, :]
            top = tl.maximum(top, tl.load(parts + at, mask=inside, other=float("-inf")))
        largest = tl.max(top, 0)
        tl.store(merged + sample * C + channel, largest, mask=channel < C)
    total = tl.zeros([CHUNKS, BLOCK], tl.float32)
    sums = samples if MAXIMA else 0
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (channel < C)[None, :]
        at = ((sums + sample) * chunks + chunk)[:, None] * C + channel[None, :]
        part = tl.load(parts + at, mask=inside, other=0.0)
        if MAXIMA:
            at = (sample * chunks + chunk)[:, None] * C + channel[None, :]
            part *= exp(tl.load(parts + at, mask=inside, other=float("-inf")) - largest[None, :], tl.float32)
        total += tl.where(inside, part, 0.0)
    tl.store(merged + (sums + sample) * C + channel, tl.sum(total, 0), mask=channel < C)


@triton.jit(do_not_specialize=["first_sample"])
def _slopes_kernel(
    x, weight, parts, first_sample, chunks, each, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D, the sum of s q over positions, a chunk and channel."""
    row = first_sample * chunks + tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = _chunk(row, chunks, each, x.positions, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w = _weight(weight, channel, k, C, K, x.hidden.data.dtype.element_ty)
    slope = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(first, last):
        sample, position, exists = _place(tile, x.positions, BLOCK_M)
        g = _load(x.grad_output, sample, position, exists, channel, x.positions, C, "").to(tl.float32)
        f = _load(x.features, sample, position, exists, channel, x.positions, C, "").to(tl.float32)
        h = _load(x.hidden, sample, position, exists, k, x.positions, K, "")
        logits = _logits(h, w, x, weight, sample, position, exists, channel, C, K, PRECISION)
        # Rounded as for q - D, where a share of nearly 1 leaves little of the two.
        slope += _softmax(logits, x, sample, position, exists, channel, C, "positions") * (x.scale * (g * f))
    tl.store(parts + row.to(tl.int64) * C + channel, tl.sum(slope, 0), mask=channel < C)


# --- softmax over more channels than a program takes at once: sums along them


@triton.jit
def _rows_kernel(
    x, weight, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of exponentials and, where there is an upstream gradient, D of each position."""
    sample, position, exists = _place(tl.program_id(0), x.positions, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    h = _load(x.hidden, sample, position, exists, k, x.positions, K, "")
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        w = _weight(weight, channel, k, C, K, h.dtype)
        logits = _logits(h, w, x, weight, sample, position, exists, channel, C, K, PRECISION)
        logits = _over_channels(logits, x, channel, C)
        top = tl.maximum(largest, tl.max(logits, 1))
        e = exp(logits - top[:, None], h.dtype)
        below = exp(largest - top, h.dtype)
        total = total * below + tl.sum(e, 1)
        if x.grad_output.data is not None:
            g = _load(x.grad_output, sample, position, exists, channel, x.positions, C, "").to(tl.float32)
            f = _load(x.features, sample, position, exists, channel, x.positions, C, "").to(tl.float32)
            slope = slope * below + tl.sum(e * (g * f), 1)
        largest = top
    row = tl.arange(0, BLOCK_M)
    tl.store(x.saved + sample * x.positions + position + row, largest, mask=exists)
    tl.store(x.saved + (x.samples + sample) * x.positions + position + row, total, mask=exists)
    if x.grad_output.data is not None:
        tl.store(x.slopes + sample * x.positions + position + row, slope * divide(x.scale, total, h.dtype), mask=exists)


# --- tiles of features


@triton.jit
def _gate_kernel(
    x, weight, out, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The result, tile by tile."""
    channel = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample, position, exists = _place(tl.program_id(0) // tl.cdiv(C, BLOCK_C), x.positions, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    f = _load(x.features, sample, position, exists, channel, x.positions, C, "").to(tl.float32)
    h = _load(x.hidden, sample, position, exists, k, x.positions, K, "")
    w = _weight(weight, channel, k, C, K, h.dtype)
    logits = _logits(h, w, x, weight, sample, position, exists, channel, C, K, PRECISION)
    if FORM != "positions":
        logits = _over_channels(logits, x, channel, C)
    s = _softmax(logits, x, sample, position, exists, channel, C, FORM)
    # Not f * (1 + gate): next to 1 a gate of 1e-6 would lose most of its digits.
    y = f + f * (x.scale * s)
    _store(out, y, sample, position, _inside(exists, channel, C), channel, x.positions, C)


@triton.jit
def _logits_gradient(logits, x, df, sample, position, exists, channel, C: tl.constexpr, FORM: tl.constexpr):
    """dl of a tile; df, where wanted, is written on the way, by the first of the programs that share the tile."""
    # Read here for the last time: what else is in cache is worth more.
    g = _load(x.grad_output, sample, position, exists, channel, x.positions, C, "evict_first").to(tl.float32)
    f = _load(x.features, sample, position, exists, channel, x.positions, C, "evict_first").to(tl.float32)
    s = _softmax(logits, x, sample, position, exists, channel, C, FORM)
    if df.data is not None:
        inside = _inside(exists, channel, C) & (tl.program_id(2) == 0)
        _store(df, g + g * (x.scale * s), sample, position, inside, channel, x.positions, C)
    q = x.scale * (g * f)
    if FORM == "whole":
        return s * (q - tl.sum(s * q, 1)[:, None])
    elif FORM == "channels":
        at = sample * x.positions + position + tl.arange(0, exists.shape[0])
        return s * (q - tl.load(x.slopes + at, mask=exists, other=0.0)[:, None])
    else:
        return s * (q - tl.load(x.slopes + sample * C + channel, mask=channel < C, other=0.0)[None, :])


@triton.jit(do_not_specialize=["first_tile", "first_part"])
def _gradients_kernel(
    x, weight, df, dh, parts, first_tile, first_part, count, each, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, FORM: tl.constexpr,
    NEEDS_GRAD_W: tl.constexpr, NEEDS_GRAD_B: tl.constexpr, IN_TURN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of ``each`` of ``count`` tiles from ``first_tile`` on.

    Axes of the grid: tiles; blocks of channels, of which with IN_TURN each program takes all; blocks of narrow maps,
    for the gradients of h and w.
    """
    program = tl.program_id(0)
    # The last sample first: it is what the pass before has left in cache.
    first = first_tile + (tl.num_programs(0) - 1 - program) * each
    k = tl.arange(0, BLOCK_K)
    own = tl.program_id(2) * BLOCK_K + k
    dtype: tl.constexpr = x.hidden.data.dtype.element_ty
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = _weight(weight, channel, k, C, K, dtype)
    w_own = _weight(weight, channel, own, C, K, dtype) if K > BLOCK_K else w
    dw = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(first, tl.minimum(first + each, first_tile + count)):
        sample, position, exists = _place(tile, x.positions, BLOCK_M)
        h = _load(x.hidden, sample, position, exists, k, x.positions, K, "")
        product = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
        for start in range(0, C if IN_TURN else BLOCK_C, BLOCK_C):
            if IN_TURN:
                channel = start + tl.arange(0, BLOCK_C)
                w = _weight(weight, channel, k, C, K, dtype)
                w_own = _weight(weight, channel, own, C, K, dtype) if K > BLOCK_K else w
            logits = _logits(h, w, x, weight, sample, position, exists, channel, C, K, PRECISION)
            if FORM != "positions":
                logits = _over_channels(logits, x, channel, C)
            dl = _logits_gradient(logits, x, df, sample, position, exists, channel, C, FORM)
            if dh.data is not None:
                product = dot(w_own, tl.trans(cast(dl, dtype)), product, PRECISION)
            if NEEDS_GRAD_W:
                h_own = _load(x.hidden, sample, position, exists, own, x.positions, K, "") if K > BLOCK_K else h
                dw = dot(tl.trans(cast(dl, dtype)), h_own, dw, PRECISION)
            if NEEDS_GRAD_B:
                db += dl
        if dh.data is not None:
            _store(dh, tl.trans(product), sample, position, _inside(exists, own, K), own, x.positions, K)
    # A row of parts has the gradient of the weight, then that of the bias, whichever are wanted.
    WEIGHTS: tl.constexpr = C * K if NEEDS_GRAD_W else 0
    row = parts + (first_part + program).to(tl.int64) * (WEIGHTS + (C if NEEDS_GRAD_B else 0))
    if NEEDS_GRAD_W:
        tl.store(row + channel[:, None] * K + own[None, :], dw, mask=(channel < C)[:, None] & (own < K)[None, :])
    if NEEDS_GRAD_B:
        tl.store(row + WEIGHTS + channel, tl.sum(db, 0), mask=(channel < C) & (tl.program_id(2) == 0))


@triton.jit
def _sum_parts_kernel(
    parts, dw, db, count, WEIGHTS: tl.constexpr, RESULTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up rows of WIDTH: the first WEIGHTS numbers for the weight, those to RESULTS for the bias, 0 beyond WIDTH."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (at < WIDTH)[None, :]
        total += tl.load(parts + row.to(tl.int64)[:, None] * WIDTH + at[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if WEIGHTS > 0:
        tl.store(dw + at, cast(result, dw.dtype.element_ty), mask=at < WEIGHTS)
    if RESULTS > WEIGHTS:
        tl.store(db + at - WEIGHTS, cast(result, db.dtype.element_ty), mask=(at >= WEIGHTS) & (at < RESULTS))


def _flat(x: Tensor) -> Tensor:
    """x, or a copy, whose positions follow each other at one distance."""
    if x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def _map(x: Tensor) -> Map:
    samples, channels, height, width = x.shape
    sample, channel, row, column = x.stride()
    position = column if width > 1 else row
    dense = (channels == 1 or channel == 1) and (height * width == 1 or position == channels)
    if dense and (samples == 1 or sample == height * width * channels):
        return Map(x, None, None, None)
    return Map(x, sample, position, channel)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self, features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, form: str
    ) -> None:
        self.features, self.hidden, self.weight = _flat(features), _flat(hidden), weight.contiguous()
        self.samples, self.channels, height, width = features.shape
        self.positions = height * width
        self.over_channels = form == "channel"
        self.constants = {"C": self.channels, "K": weight.shape[1], "PRECISION": precision(hidden.dtype)}
        factor = float(scale * self.positions if form == "spatial_mean1" else scale)
        bias = bias.contiguous() if bias is not None and self.over_channels else None
        maps = _map(self.features), _map(self.hidden)
        self.operands = Operands(*maps, bias, self.samples, self.positions, factor)

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
            vectors=int(self.operands.features.position is None and self.channels % 8 == 0),
        )

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, chosen: Launch, **constants: Any) -> None:
        """Launch a kernel that takes the operands, with its own sizes: the rest of the tile is the launcher's."""
        tile = {name: size for name, size in chosen.tile.items() if name.startswith("BLOCK")}
        constants |= self.constants
        launch(kernel, grid, self.operands, self.weight, *arguments, config=replace(chosen, tile=tile), **constants)

    def chunks(self, chosen: Launch, samples: int) -> tuple[int, int]:
        """How many chunks the positions of a sample make, and of how many tiles: enough of them to fill the device."""
        tiles = cdiv(self.positions, chosen.tile["BLOCK_M"])
        beside = samples * cdiv(self.channels, chosen.tile["BLOCK_C"])
        each = cdiv(tiles, max(num_sms(self.features) // beside, cdiv(tiles, chosen.tile["TILES"])))
        return cdiv(tiles, each), each

    def merge(self, parts: Tensor, merged: Tensor, first: int, samples: int, chunks: int, *, maxima: bool) -> None:
        """Merge the chunks of some samples."""
        grid = (samples, cdiv(self.channels, _MERGE.tile["BLOCK"]))
        arguments = (parts, merged, first, self.samples, chunks)
        launch(_merge_kernel, grid, *arguments, config=_MERGE, MAXIMA=maxima, C=self.channels)

    def slopes(self, chosen: Launch, group: int, first: int, samples: int) -> None:
        """Sum up the slopes of some samples, which come in groups of so many."""
        chunks, each = self.chunks(chosen, group)
        slopes = self.operands.slopes
        parts = slopes if chunks == 1 else slopes.new_empty((self.samples * chunks, self.channels))
        grid = (samples * chunks * cdiv(self.channels, chosen.tile["BLOCK_C"]),)
        self.launch(_slopes_kernel, grid, parts, first, chunks, each, chosen=chosen)
        if chunks > 1:
            self.merge(parts, slopes, first, samples, chunks, maxima=False)

    def softmax_of(self, chosen: Launch) -> str:
        """Where a kernel has its softmax from, see ``_softmax``; sums along the rows are made where it needs them."""
        if not self.over_channels:
            return "positions"
        if self.channels <= chosen.tile["BLOCK_C"]:
            return "whole"
        sums = self.weight.new_empty((3, self.samples, self.positions), dtype=torch.float32)
        self.operands = self.operands._replace(saved=sums, slopes=sums[2])
        chosen = self.choose("rows")
        self.launch(_rows_kernel, (self.samples * cdiv(self.positions, chosen.tile["BLOCK_M"]),), chosen=chosen)
        return "channels"


def forward(
    features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, form: str, out: Tensor,
    saved: Tensor,
) -> None:  # fmt: skip
    """The gated features.

    Args:
        features: (N, C, H, W).
        hidden: (N, K, H, W), in the type of the products.
        weight: (C, K).
        bias: (C,) or None.
        scale: factor of the softmax.
        form: as the op's.
        out: like features, any strides.
        saved: (2, N, C), float32, for :func:`backward`; unused by form "channel".
    """
    if features.shape[0] == 0:
        return
    call = _Call(features, hidden, weight, bias, scale, form)
    if not call.over_channels:
        chosen = call.choose("statistics")
        chunks, each = call.chunks(chosen, call.samples)
        parts = saved if chunks == 1 else saved.new_empty((2, call.samples * chunks, call.channels))
        grid = (call.samples * chunks * cdiv(call.channels, chosen.tile["BLOCK_C"]),)
        call.launch(_statistics_kernel, grid, parts, chunks, each, chosen=chosen)
        if chunks > 1:
            call.merge(parts, saved, 0, call.samples, chunks, maxima=True)
        call.operands = call.operands._replace(saved=saved)
    chosen = call.choose("gate")
    where = call.softmax_of(chosen)
    result = out if _flat(out) is out else torch.empty_like(out, memory_format=torch.contiguous_format)
    grid = (call.samples * cdiv(call.positions, chosen.tile["BLOCK_M"]) * cdiv(call.channels, chosen.tile["BLOCK_C"]),)
    call.launch(_gate_kernel, grid, _map(result), chosen=chosen, FORM=where)
    if result is not out:
        out.copy_(result)


def backward(
    grad_output: Tensor, features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, form: str,
    saved: Tensor, df: Tensor | None, dh: Tensor | None, dw: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of :func:`forward`.

    Args:
        grad_output: gradient of ``out``, any strides.
        features: as in forward, like all up to ``saved``.
        hidden: (N, K, H, W).
        weight: (C, K).
        bias: (C,) or None.
        scale: factor of the softmax.
        form: the op's.
        saved: (2, N, C).
        df: of the shape of features, without gaps; None if it is not needed.
        dh: of the shape of hidden, without gaps, or None.
        dw: of the shape of weight, contiguous, or None.
        db: (C,), or None.
    """
    call = _Call(features, hidden, weight, bias, scale, form)
    call.operands = call.operands._replace(grad_output=_map(_flat(grad_output)), saved=saved)
    chosen = call.choose("gradients")
    tiles = cdiv(call.positions, chosen.tile["BLOCK_M"])
    wide = cdiv(call.channels, chosen.tile["BLOCK_C"])
    narrow = 1 if dh is None and dw is None else cdiv(call.constants["K"], chosen.tile["BLOCK_K"])
    weights = 0 if dw is None else dw.numel()
    width = weights + (call.channels if db is not None and call.over_channels else 0)
    sums = {"NEEDS_GRAD_W": weights > 0, "NEEDS_GRAD_B": width > weights, "IN_TURN": False}
    maps = tuple(_NO_MAP if m is None else _map(m) for m in (df, dh))
    passes = [(maps, sums)] if df is not None or dh is not None or width else []
    if dh is not None and wide > 1:
        passes = [(maps, {"NEEDS_GRAD_W": False, "NEEDS_GRAD_B": False, "IN_TURN": True})]
        passes += [((_NO_MAP, _NO_MAP), sums)] if width else []
    group = max(call.samples, 1)
    if chosen.tile["MEGABYTES"] and not call.over_channels:
        a_position = 2 * call.channels * call.features.itemsize + call.constants["K"] * call.hidden.itemsize
        group = min(group, max(1, (chosen.tile["MEGABYTES"] << 20) // (a_position * call.positions)))
    each = cdiv(group * tiles, max(1, chosen.tile["PROGRAMS"] * num_sms(grad_output) // (wide * narrow)))
    groups = [(first, min(group, call.samples - first)) for first in range(0, call.samples, group) if passes]
    parts = saved.new_empty((sum(cdiv(samples * tiles, each) for _, samples in groups), width))
    softmax = call.softmax_of(chosen) if groups else ""
    if softmax == "positions":
        call.operands = call.operands._replace(slopes=saved.new_empty((call.samples, call.channels)))
    done = 0
    for first, samples in groups:
        if softmax == "positions" and (dh is not None or width > 0):
            call.slopes(call.choose("slopes"), group, first, samples)
        programs = cdiv(samples * tiles, each)
        for (to_f, to_h), constants in passes:
            grid = (programs, 1 if constants["IN_TURN"] else wide, narrow)
            numbers = (first * tiles, done, samples * tiles, each)
            call.launch(_gradients_kernel, grid, to_f, to_h, parts, *numbers, chosen=chosen, FORM=softmax, **constants)
        done += programs
    results = weights + (0 if db is None else call.channels)
    if results:
        count = cdiv(results, _SUM.tile["BLOCK"])
        sizes = {"WEIGHTS": weights, "RESULTS": results, "WIDTH": width}
        launch(_sum_parts_kernel, (count,), parts, dw, db, done, config=_SUM, **sizes)
