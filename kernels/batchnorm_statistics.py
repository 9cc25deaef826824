"""A frozen BatchNorm with its input's statistics, and the statistics alone: one pass over the maps each way.

With the stored mean r_m and variance r_v, the affine w and b, over M = N H W values of a channel::

    y = act((x - r_m) w / sqrt(r_v + eps) + b + residual)      m = sum(x) / M      v = sum((x - m)^2) / M
    dx = [passes] dy w / sqrt(r_v + eps) + dm / M + 2 dv (x - m) / M               d residual = [passes] dy

so that backward needs no reduction. Whether the activation passes is recomputed from x; with a residual it is a bit an
element, packed along the channels, since reading the residual again would cost 16 to 32 times that.

Statistics. A tile is (slots, repeats, channels), or (channels, repeats, slots) where positions lie together. Slots and
channels are laid over the threads of a program, so that a sum over the repeats stays within a thread and the loop over
tiles has no exchange between threads. Each slot keeps mean K and sum of squared deviations of the values that it has
seen, and takes in further ones by their deviations from K (Chan, Golub & LeVeque; how many there are follows from the
sizes)::

    first = sum(x - K)    second = sum((x - K)^2)    K += first / count    squares += second - first^2 / count

which subtracts at most half of ``second``, and in the first tile, where K is that tile's own mean, nothing but
rounding. Slots are merged by the same rule at the end, programs by a second kernel in a fixed order.

Memory traffic, 2-byte elements: forward 4 B an element, with a residual 6 1/8; backward 6 B, with a residual 8 1/8;
statistics alone 2 B, and 4 B back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import INTERPRETED, architecture, cast, cdiv, launch, next_power_of_2, num_sms
from dfkd_fast.kernels.config import Launch

__all__ = [
    "ACTIVATIONS",
    "Strides",
    "channel_tile",
    "distance",
    "division",
    "flattened",
    "forward",
    "gain_of",
    "known",
    "layout_of",
    "match_memory_format",
    "on_channels",
    "on_slots",
    "passes",
    "per_channel",
    "place_of",
    "pointers",
    "statistics",
]

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}


def channel_tile(dtype: torch.dtype, repeats: int, stages: int, sizes: dict[str, int]) -> Launch:
    """A tile that gives each of 128 threads ``repeats`` vectors of 16 bytes of each map."""
    channels, positions = sizes["channels"], sizes["positions"]
    elements = 128 * 16 // dtype.itemsize
    if sizes["unit"] == 1:
        # No vectors: each element has an address, so repeats would not fit and nothing can be fetched ahead.
        repeats, stages, elements = 1, 1, elements // 2
    if sizes["planes"]:
        slots = min(max(positions, 16), elements // 8)
        block = max(8, min(elements // slots, channels))
    else:
        block = max(8, min(channels, 64))
        slots = max(8, elements // block)
    tile = {"REPEATS": max(1, min(repeats, positions // slots)), "SLOTS": slots, "CHANNELS": block, "STAGES": stages}
    return Launch(tile=tile, num_stages=1)


@config.heuristic("batchnorm_statistics", REPEATS=(1, 8), SLOTS=(8, 512), STAGES=(1, 3))
@config.heuristic("channel_statistics", REPEATS=(1, 8), SLOTS=(8, 512), STAGES=(1, 3))
def _config(arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """The next tile is fetched ahead, and what a thread holds leaves room for four programs per multiprocessor."""
    return channel_tile(dtype, 2 if sizes["residual"] else 4, 2, sizes)


@triton.jit
def on_channels(v, PLANES: tl.constexpr):
    """(channels) as a tile of one slot and one repeat."""
    return v[:, None, None] if PLANES else v[None, None, :]


@triton.jit
def on_slots(v, PLANES: tl.constexpr):
    """(slots) as a tile of one channel and one repeat."""
    return v[None, None, :] if PLANES else v[:, None, None]


@triton.jit
def known(number, UNIT: tl.constexpr):
    """A number that UNIT divides, such that the compiler knows: else it finds no vectors."""
    return number // UNIT * UNIT if UNIT > 1 else number


@triton.jit
def pointers(base, row, column, along, across, PLANES: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to a tile's elements in the first sample, (row, column) with their strides along and across."""
    if PLANES:
        return base + row * along + column * known(across, UNIT)
    return base + row * known(along, UNIT) + column * across


@triton.jit
def distance(sample, first, stride, along, PLANES: tl.constexpr, UNIT: tl.constexpr):
    """How far a tile lies from the first: by sample and by row."""
    return sample * known(stride, UNIT) + first * (along if PLANES else known(along, UNIT))


@triton.jit
def place_of(turn, chunk, per_sample, SAMPLES: tl.constexpr, ROWS: tl.constexpr):
    """Sample and first row of a tile: a program goes from sample to sample with its rows, or along all rows."""
    # Not .to: in the interpreter a loop's variable is a plain number.
    wide = tl.full([], 0, tl.int64) + turn
    sample = wide if SAMPLES else tl.full([], 0, tl.int64)
    first = ((chunk % per_sample).to(tl.int64) if SAMPLES else wide) * ROWS
    return sample, first


@triton.jit
def per_channel(base, at, inside, PLANES: tl.constexpr):
    """One number a channel."""
    return on_channels(tl.load(base + at, mask=inside, other=0.0).to(tl.float32), PLANES)


@triton.jit
def gain_of(running_var, weight, at, inside, eps, PLANES: tl.constexpr):
    """w / sqrt(r_v + eps). Correctly rounded, since it is computed once a channel."""
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(running_var + at, mask=inside, other=1.0).to(tl.float32) + eps))
    if weight is not None:
        inverse *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    return on_channels(inverse, PLANES)


@triton.jit
def passes(z, ACTIVATION: tl.constexpr):
    """Where the activation's derivative is one; NaN passes, as in PyTorch."""
    stops = z <= 0
    if ACTIVATION == 2:
        stops = stops | (z >= 6)
    return ~stops


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION > 0:
        z = tl.where(z <= 0, 0.0, z)
    if ACTIVATION == 2:
        z = tl.where(z >= 6, 6.0, z)
    return z


@triton.jit
def _packed(passes, PLANES: tl.constexpr, SLOTS: tl.constexpr, REPEATS: tl.constexpr, CHANNELS: tl.constexpr):
    """Eight channels' bits as one byte, the first the lowest."""
    bits = tl.where(passes, 1, 0)
    if PLANES:
        bits = tl.reshape(bits, [CHANNELS // 8, 8, REPEATS, SLOTS]) << tl.arange(0, 8)[None, :, None, None]
        octets = tl.sum(bits, 1)
    else:
        bits = tl.reshape(bits, [SLOTS, REPEATS, CHANNELS // 8, 8]) << tl.arange(0, 8)[None, None, None, :]
        octets = tl.sum(bits, 3)
    return octets.to(tl.uint8)


@triton.jit
def _total(x, AXIS: tl.constexpr):
    """The sum along an axis of two. The interpreter adds rows up one by one, and so less exactly than threads do."""
    if INTERPRETED and AXIS == 0:
        return tl.sum(tl.sum(tl.reshape(x, [8, x.shape[0] // 8, x.shape[1]]), 1), 0)
    else:
        return tl.sum(x, AXIS)


@triton.jit
def _merged(count, total, mean, squares, AXIS: tl.constexpr):
    """Mean and sum of squared deviations of several groups along an axis as those of one of ``total`` values."""
    # Near the mean, with few enough digits that differences from it are exact for half-precision values: else they are
    # rounded alike, and the mean is off by that.
    near = ((_total(count * mean, AXIS) / total).to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    away = mean - tl.expand_dims(near, AXIS)
    rest = _total(count * away, AXIS)
    share = tl.div_rn(rest, total)
    return near + share, _total(squares + count * away * away, AXIS) - rest * share


@triton.jit
def _rows(first, positions, slot, SLOTS: tl.constexpr, REPEATS: tl.constexpr):
    """How many of a tile's rows there are in each slot, when the tile begins with row ``first``."""
    return tl.minimum(tl.maximum((positions - first - slot + (SLOTS - 1)) // SLOTS, 0), REPEATS).to(tl.float32)


@triton.jit
def _forward_kernel(
    x,
    y,
    residual,
    mask,
    running_mean,
    running_var,
    weight,
    bias,
    means,
    spreads,
    counts,
    turns,
    per_sample,
    positions,
    channels,
    eps,
    x_n,
    x_p,
    x_c,
    y_n,
    y_p,
    y_c,
    residual_n,
    residual_p,
    residual_c,
    mask_n,
    mask_p,
    mask_c,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    SAMPLES: tl.constexpr,
    DIRECT: tl.constexpr,
    UNIT: tl.constexpr,
    REPEATS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    AXIS: tl.constexpr = 1 if PLANES else 0
    if PLANES:
        positions = known(positions, UNIT)
    else:
        channels = known(channels, UNIT)
    # Blocks of channels first, so that whole rows are read at one time.
    blocks = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    begin = chunk // per_sample
    step = tl.num_programs(0) // blocks // per_sample
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    channel_in = channel < channels
    column = on_channels(channel, PLANES).to(tl.int64)
    row = (tl.arange(0, REPEATS)[None, :, None] * SLOTS + on_slots(tl.arange(0, SLOTS), PLANES)).to(tl.int64)
    x = pointers(x, row, column, x_p, x_c, PLANES, UNIT)
    if y is not None:
        y = pointers(y, row, column, y_p, y_c, PLANES, UNIT)
        shift = per_channel(running_mean, channel, channel_in, PLANES)
        gain = gain_of(running_var, weight, channel, channel_in, eps, PLANES)
        if bias is not None:
            offset = per_channel(bias, channel, channel_in, PLANES)
        if residual is not None:
            residual = pointers(residual, row, column, residual_p, residual_c, PLANES, UNIT)
    if mask is not None:
        octet = block * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
        octet_in = on_channels(octet * 8 < channels, PLANES)
        mask = pointers(mask, row, on_channels(octet, PLANES).to(tl.int64), mask_p, mask_c, PLANES, 1)

    mean = tl.zeros([CHANNELS, SLOTS] if PLANES else [SLOTS, CHANNELS], tl.float32)
    spread = tl.zeros_like(mean)
    before = 0.0
    slot = tl.arange(0, SLOTS)
    slot = slot[None, :] if PLANES else slot[:, None]
    for turn in tl.range(begin, turns, step, num_stages=STAGES):
        sample, first = place_of(turn, chunk, per_sample, SAMPLES, SLOTS * REPEATS)
        row_in = first + row < positions
        inside = row_in & on_channels(channel_in, PLANES)
        v = tl.load(x + distance(sample, first, x_n, x_p, PLANES, UNIT), mask=inside, other=0.0).to(tl.float32)
        if y is not None:
            z = (v - shift) * gain
            if bias is not None:
                z += offset
            if residual is not None:
                at = residual + distance(sample, first, residual_n, residual_p, PLANES, UNIT)
                z += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            at = y + distance(sample, first, y_n, y_p, PLANES, UNIT)
            tl.store(at, cast(_activated(z, ACTIVATION), y.dtype.element_ty), mask=inside)
            if mask is not None:
                at = mask + distance(sample, first, mask_n, mask_p, PLANES, 1)
                tl.store(at, _packed(passes(z, ACTIVATION), PLANES, SLOTS, REPEATS, CHANNELS), mask=row_in & octet_in)

        # All tiles of a program have as many rows but the last, or, sample by sample, all of them.
        fresh = _rows(first, positions, slot, SLOTS, REPEATS)
        if turn == begin:
            mean = tl.sum(v, 1) / tl.maximum(fresh, 1.0)
        away = tl.where(row_in, v - tl.expand_dims(mean, 1), 0.0)
        sums = tl.sum(away, 1)
        share = sums * (1.0 / tl.maximum(before * (fresh if SAMPLES else REPEATS) + fresh, 1.0))
        mean += share
        spread += tl.sum(away * away, 1) - sums * share
        before += 1.0

    further = (turns - 1 - begin) // step
    _, first = place_of(begin + further * step, chunk, per_sample, SAMPLES, SLOTS * REPEATS)
    fresh = _rows(first, positions, slot, SLOTS, REPEATS)
    rows = tl.minimum(positions - first, SLOTS * REPEATS).to(tl.float32)
    further = further.to(tl.float32)
    count = further * (fresh if SAMPLES else REPEATS) + fresh
    total = further * (rows if SAMPLES else SLOTS * REPEATS) + rows
    whole, spread = _merged(count, total, mean, spread, AXIS)
    spread = tl.where(spread < 0, 0.0, spread)
    if DIRECT:
        tl.store(means + channel, whole, mask=channel_in)
        tl.store(spreads + channel, tl.div_rn(spread, total), mask=channel_in)
    else:
        at = chunk.to(tl.int64) * channels + channel
        tl.store(means + at, whole, mask=channel_in)
        tl.store(spreads + at, spread, mask=channel_in)
        tl.store(counts + chunk, total)


@triton.jit
def _merge_kernel(means, spreads, counts, mean, var, chunks, channels, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_in = channel < channels
    count = 0.0
    whole = tl.zeros([CHANNELS], tl.float32)
    spread = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        at = chunk.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = (chunk < chunks)[:, None] & channel_in[None, :]
        each = tl.load(counts + chunk, mask=chunk < chunks, other=0.0)
        further = tl.sum(each, 0)
        own, within = _merged(
            each[:, None],
            further,
            tl.load(means + at, mask=inside, other=0.0),
            tl.load(spreads + at, mask=inside, other=0.0),
            0,
        )
        away = own - whole
        share = further / (count + further)
        spread += within + away * away * count * share
        whole += away * share
        count += further
    tl.store(mean + channel, whole, mask=channel_in)
    tl.store(var + channel, tl.div_rn(spread, count), mask=channel_in)


Strides = tuple[int, int, int]


def _strides(x: Tensor) -> Strides | None:
    """Strides of (N, C, ...) by sample, position and channel; None where no one stride leads through the positions."""
    along, size = 0, 1
    for dim in range(x.ndim - 1, 1, -1):
        if x.shape[dim] == 1:
            continue
        if size == 1:
            along = x.stride(dim)
        elif x.stride(dim) != along * size:
            return None
        size *= x.shape[dim]
    return x.stride(0), along, x.stride(1)


def match_memory_format(x: Tensor, y: Tensor) -> Tensor:
    """x where its strides serve, else a copy laid out as y, which is contiguous or channels-last."""
    return x if _strides(x) is not None else torch.empty_like(y, dtype=x.dtype).copy_(x)


def flattened(x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[int, int, list[Strides]]:
    """Samples and positions a sample, and each tensor's strides, with samples and positions as one where all allow it.

    Args:
        x: (N, C, ...), for the sizes.
        tensors: of its N and positions, each with one stride through them; strides of None are zeros.
    """
    samples, positions = x.shape[0], x[0, 0].numel()
    found = [None if t is None else _strides(t) for t in tensors]
    if positions == 1:
        one = [None if s is None else (0, s[0], s[2]) for s in found]
    elif samples == 1 or all(s is None or s[0] == positions * s[1] for s in found):
        one = [None if s is None else (0, s[1], s[2]) for s in found]
    else:
        return samples, positions, [s or (0, 0, 0) for s in found]
    return 1, samples * positions, [s or (0, 0, 0) for s in one]


def _unit(planes: bool, fastest: int, strides: Sequence[Strides]) -> int:
    """A divisor of the fastest dimension's size and of the other dimensions' strides."""
    numbers = [fastest, *(s[0] for s in strides), *(s[2 if planes else 1] for s in strides)]
    return 8 if all(number % 8 == 0 for number in numbers) else 1


def layout_of(
    kernel: str, x: Tensor, samples: int, positions: int, strides: Sequence[Strides], residual: bool
) -> tuple[Launch, dict[str, Any]]:
    """The configuration, and the constants that say how the maps lie.

    Args:
        kernel: name of the rule.
        x: for sizes, dtype and device.
        samples: as in :func:`flattened`.
        positions: likewise.
        strides: of all maps; those of the first decide.
        residual: whether there is one, or its gradient.
    """
    planes = strides[0][2] != 1 and strides[0][1] == 1 and positions > 1
    channels = x.shape[1]
    unit = _unit(planes, positions if planes else channels, strides)
    chosen = config.choose(
        kernel,
        architecture(x),
        x.dtype,
        channels=min(next_power_of_2(channels), 1024),
        positions=min(next_power_of_2(positions), 4096),
        planes=int(planes),
        unit=unit,
        residual=int(residual),
    )
    return chosen, {"PLANES": planes, "SAMPLES": samples > 1, "UNIT": unit}


def division(x: Tensor, chosen: Launch, samples: int, positions: int, programs: int) -> tuple[int, int, int, int]:
    """How a grid of (blocks of channels, chunks) shares the tiles: blocks, chunks, turns and tiles a sample.

    A chunk takes every ``chunks / per_sample``-th of ``turns``: rows of a tile, or, where samples have to be taken one
    by one, the same rows of different samples, so that all of its tiles are equally full. All chunks have about as many
    turns; one each if there are few.

    Args:
        x: for sizes and device.
        chosen: the tile.
        samples: as in :func:`flattened`.
        positions: likewise.
        programs: wanted of each processor.
    """
    blocks = cdiv(x.shape[1], chosen.tile["CHANNELS"])
    tiles = cdiv(positions, chosen.tile["REPEATS"] * chosen.tile["SLOTS"])
    turns, per_sample = (samples, tiles) if samples > 1 else (tiles, 1)
    alike = blocks * per_sample
    lanes = turns
    if turns * alike > 2 * programs * num_sms(x):
        lanes = cdiv(turns, cdiv(turns * alike, programs * num_sms(x)))
    return blocks, lanes * per_sample, turns, per_sample


def _forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> None:
    channels = x.shape[1]
    if x.shape[0] == 0:
        mean.fill_(float("nan"))
        var.fill_(float("nan"))
        return
    samples, positions, strides = flattened(x, (x, y, residual, mask))
    kernel = "channel_statistics" if y is None else "batchnorm_statistics"
    maps = [s for s, t in zip(strides, (x, y, residual), strict=False) if t is not None]
    chosen, constants = layout_of(kernel, x, samples, positions, maps, residual is not None)
    blocks, chunks, turns, per_sample = division(x, chosen, samples, positions, 4)
    direct = chunks == 1
    parts = (mean, var, mean)
    if not direct:
        parts = (*x.new_empty((2, chunks, channels), dtype=torch.float32), x.new_empty(chunks, dtype=torch.float32))
    launch(
        _forward_kernel,
        (blocks * chunks,),
        x,
        y,
        residual,
        mask,
        *(norm or (None, None, None, None)),
        *parts,
        turns,
        per_sample,
        positions,
        channels,
        eps,
        *(number for s in strides for number in s),
        config=chosen,
        ACTIVATION=ACTIVATIONS[activation],
        DIRECT=direct,
        **constants,
    )
    if not direct:
        rows = min(max(next_power_of_2(chunks), 16), 512)
        together = Launch(tile={"CHUNKS": rows, "CHANNELS": 8}, num_warps=8 if rows > 128 else 4)
        launch(_merge_kernel, (cdiv(channels, 8),), *parts, mean, var, chunks, channels, config=together)


def forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    keep_mask: bool,
    residual: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    mask: Tensor,
) -> None:
    """The activated norm of x and the statistics of x.

    Args:
        x: (N, C, ...), any strides.
        running_mean: (C,), any floating dtype, as the next three.
        running_var: (C,).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: as the op's.
        activation: as the op's.
        keep_mask: whether to fill ``mask``.
        residual: of the shape of x, any strides, or None.
        y: of the shape of x, contiguous or channels-last.
        mean: (C,), float32.
        var: (C,), float32.
        mask: (N, ceil(C / 8), positions), uint8, one stride through the positions.
    """
    norm = tuple(None if v is None else v.contiguous() for v in (running_mean, running_var, weight, bias))
    residual = None if residual is None else match_memory_format(residual, y)
    kept = mask if keep_mask else None
    _forward(match_memory_format(x, y), norm, eps, activation, residual, y, kept, mean, var)  # type: ignore[arg-type]


def statistics(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """The statistics of x alone.

    Args:
        x: (N, C, ...), any strides.
        mean: (C,), float32.
        var: (C,), float32.
    """
    _forward(x if _strides(x) is not None else x.contiguous(), None, 1.0, "none", None, None, None, mean, var)
