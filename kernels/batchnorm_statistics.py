"""A frozen BatchNorm that also computes its input's statistics, or only the statistics, in one pass over the features.

With the running mean r_m and variance r_v, the weight w, the bias b and the M = N H W values x of a channel::

    y = act((x - r_m) w / sqrt(r_v + eps) + b + residual)      m = sum(x) / M      v = sum((x - m)^2) / M

In the gradient, dy, dm and dv are the gradients of y, m and v. The mask is 1 where the activation's derivative is one,
else 0. Backward recomputes the mask from x. With a residual, forward saves the mask as one bit per element, because
reading the residual again would cost 16 to 32 times as much. Backward needs no reduction for dx::

    dx = mask dy w / sqrt(r_v + eps) + dm / M + 2 dv (x - m) / M      d residual = mask dy

Statistics. A tile has BLOCK_P x UNROLL positions and BLOCK_C channels. BLOCK_P and BLOCK_C are distributed over the
threads and UNROLL is within a thread, so the loop over tiles needs no exchange between threads. For each channel, each
of the BLOCK_P rows keeps a running mean K and the sum of squared deviations M2. It merges the next values x by their
deviations from K (Chan, Golub & LeVeque). ``count`` includes these values::

    first = sum(x - K)    second = sum((x - K)^2)    K += first / count    M2 += second - first^2 / count

``first^2 / count`` is at most half of ``second``, so the subtraction cancels at most one bit. In the first tile, K is
the tile's own mean and ``first`` is only rounding error. At the end, each program merges its rows by the same rule, and
a second kernel merges the programs' results in a fixed order, for all layers of a network in one launch.

Memory traffic with 2-byte elements: forward 4 bytes per element, 6 1/8 with a residual; backward 6 bytes, 8 1/8 with a
residual. The statistics without y take 2 bytes forward and 4 bytes backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import (
    INTERPRETED,
    MAX_LAYERS,
    architecture,
    cast,
    cdiv,
    launch,
    next_power_of_2,
    num_sms,
    select,
    traffic,
)
from dfkd_fast.kernels.config import Launch

__all__ = [
    "ACTIVATIONS",
    "Map",
    "Norm",
    "activation_mask",
    "align",
    "as_maps",
    "choose_config",
    "expand_channels",
    "expand_rows",
    "forward",
    "load_channels",
    "load_scale",
    "merge",
    "merge_chunks",
    "num_parts",
    "offset",
    "pack",
    "partial_statistics",
    "pointers",
    "program_tiles",
    "rows_and_channels",
    "split_work",
    "statistics",
    "tile_config",
    "tile_start",
    "with_common_stride",
]

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}


def tile_config(dtype: torch.dtype, unroll: int, stages: int, sizes: dict[str, int], num_warps: int = 4) -> Launch:
    """Returns a tile that gives each thread ``unroll`` vectors of 16 bytes per map.

    Args:
        dtype: dtype of the maps.
        unroll: number of vectors per thread, fewer if there are few positions.
        stages: number of stages of the loop's software pipeline.
        sizes: "channels", "positions", "nchw" and "alignment", as :func:`choose_config` passes them.
        num_warps: number of warps per program.
    """
    channels, positions = sizes["channels"], sizes["positions"]
    elements = num_warps * 32 * 16 // dtype.itemsize
    if sizes["alignment"] == 1:
        # Without vector loads each element needs an address: too many registers to unroll or to prefetch.
        unroll, stages, elements = 1, 1, elements // 2
    if sizes["nchw"]:
        block_p = min(max(positions, 16), elements // 8)
        block_c = max(8, min(elements // block_p, channels))
    else:
        block_c = max(8, min(channels, 64))
        block_p = max(8, elements // block_c)
    unroll = max(1, min(unroll, positions // block_p))
    return Launch(
        tile={"UNROLL": unroll, "BLOCK_P": block_p, "BLOCK_C": block_c, "LOOP_STAGES": stages},
        num_warps=num_warps,
        num_stages=1,
    )


@config.heuristic("batchnorm_statistics", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
@config.heuristic("channel_statistics", UNROLL=(1, 8), BLOCK_P=(8, 512), LOOP_STAGES=(1, 3))
def _config(arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """Prefetches the next tile, with few enough registers for four programs per multiprocessor."""
    few = sizes["residual"] or (arch == 80 and dtype == torch.float16)  # where four vectors need a stack
    return tile_config(dtype, 2 if few else 4, 2, sizes)


class Map(NamedTuple):
    """A feature map as a kernel argument, with its strides in elements."""

    ptr: Any  # [N, C, positions]
    stride_n: Any
    stride_p: Any
    stride_c: Any


class Norm(NamedTuple):
    """The parameters of a BatchNorm as a kernel argument."""

    running_mean: Any  # [C]
    running_var: Any  # [C]
    weight: Any  # [C] or None
    bias: Any  # [C] or None
    eps: Any


@triton.jit
def expand_channels(v, NCHW: tl.constexpr):
    """Reshape (BLOCK_C) to the three dimensions of a tile."""
    return v[:, None, None] if NCHW else v[None, None, :]


@triton.jit
def expand_rows(v, NCHW: tl.constexpr):
    """Reshape (BLOCK_P) to the three dimensions of a tile."""
    return v[None, None, :] if NCHW else v[:, None, None]


@triton.jit
def align(x, ALIGNMENT: tl.constexpr):
    """Returns x and lets the compiler know that ALIGNMENT divides x, so that it can vectorize loads and stores."""
    return x // ALIGNMENT * ALIGNMENT if ALIGNMENT > 1 else x


@triton.jit
def pointers(m, row, col, NCHW: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to a tile's elements in the first sample of a map."""
    if NCHW:
        return m.ptr + row * m.stride_p + col * align(m.stride_c, ALIGNMENT)
    return m.ptr + row * align(m.stride_p, ALIGNMENT) + col * m.stride_c


@triton.jit
def offset(m, sample, first, NCHW: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Offset of a tile from the first tile of a map."""
    return sample * align(m.stride_n, ALIGNMENT) + first * (m.stride_p if NCHW else align(m.stride_p, ALIGNMENT))


@triton.jit
def program_tiles(positions, channels, BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channel block and chunk of this program, tiles per sample, and the first iteration and the step of its loop."""
    # Channel blocks vary fastest, so that concurrent programs read whole rows.
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    tiles = tl.cdiv(positions, ROWS) if BY_SAMPLE else 1
    return tl.program_id(0) % blocks, chunk, tiles, chunk // tiles, tl.num_programs(0) // blocks // tiles


@triton.jit
def rows_and_channels(offs_c, NCHW: tl.constexpr, UNROLL: tl.constexpr, BLOCK_P: tl.constexpr):
    """Row and channel of each element of a tile."""
    row = tl.arange(0, UNROLL)[None, :, None] * BLOCK_P + expand_rows(tl.arange(0, BLOCK_P), NCHW)
    return row.to(tl.int64), expand_channels(offs_c, NCHW).to(tl.int64)


@triton.jit
def tile_start(i, chunk, tiles, BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr):
    """Sample and first position of the tile of iteration i.

    With BY_SAMPLE, a chunk has the same positions in each sample and i is the sample. Otherwise there is one sample and
    i is the tile.
    """
    # ``.to`` would fail in the interpreter, where the loop variable is an int.
    i = tl.full([], 0, tl.int64) + i
    sample = i if BY_SAMPLE else tl.full([], 0, tl.int64)
    first = ((chunk % tiles).to(tl.int64) if BY_SAMPLE else i) * ROWS
    return sample, first


@triton.jit
def load_channels(ptr, offs, mask, NCHW: tl.constexpr):
    """Load one value per channel."""
    return expand_channels(tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32), NCHW)


@triton.jit
def load_scale(running_var, weight, offs, mask, eps, NCHW: tl.constexpr):
    """w / sqrt(r_v + eps). Root and quotient are correctly rounded, as they are computed only once per channel."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.load(running_var + offs, mask=mask, other=1.0).to(tl.float32) + eps))
    if weight is not None:
        rstd *= tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
    return expand_channels(rstd, NCHW)


@triton.jit
def activation_mask(z, ACTIVATION: tl.constexpr):
    """Whether the activation's derivative is one. It is one for NaN, as in PyTorch."""
    zero = z <= 0
    if ACTIVATION == 2:
        zero = zero | (z >= 6)
    return ~zero


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION > 0:
        z = tl.where(z <= 0, 0.0, z)
    if ACTIVATION == 2:
        z = tl.where(z >= 6, 6.0, z)
    return z


@triton.jit
def pack(mask, NCHW: tl.constexpr, BLOCK_P: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pack the bits of eight channels into a byte, the first channel in the lowest bit."""
    bits = tl.where(mask, 1, 0)
    if NCHW:
        bits = tl.reshape(bits, [BLOCK_C // 8, 8, UNROLL, BLOCK_P]) << tl.arange(0, 8)[None, :, None, None]
        packed = tl.sum(bits, 1)
    else:
        bits = tl.reshape(bits, [BLOCK_P, UNROLL, BLOCK_C // 8, 8]) << tl.arange(0, 8)[None, None, None, :]
        packed = tl.sum(bits, 3)
    return packed.to(tl.uint8)


@triton.jit
def _sum(x, AXIS: tl.constexpr):
    """Sum a matrix along an axis. The interpreter adds rows one by one, so there two steps are more accurate."""
    if INTERPRETED and AXIS == 0:
        return tl.sum(tl.sum(tl.reshape(x, [8, x.shape[0] // 8, x.shape[1]]), 1), 0)
    else:
        return tl.sum(x, AXIS)


@triton.jit
def _merge_moments(count, total, mean, m2, AXIS: tl.constexpr):
    """Merge the means and sums of squared deviations of groups along an axis; ``total`` is the sum of the counts."""
    # The pivot is near the mean and has only 16 significant bits, so that differences from it are exact for
    # half-precision values. Otherwise all differences would round the same way and bias the mean.
    pivot = ((_sum(count * mean, AXIS) / total).to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    delta = mean - tl.expand_dims(pivot, AXIS)
    first = _sum(count * delta, AXIS)
    shift = tl.div_rn(first, total)
    return pivot + shift, _sum(m2 + count * delta * delta, AXIS) - first * shift


@triton.jit
def _row_counts(first, positions, row, BLOCK_P: tl.constexpr, UNROLL: tl.constexpr):
    """Number of positions that each of the BLOCK_P rows has in the tile that starts at ``first``."""
    return tl.minimum(tl.maximum((positions - first - row + (BLOCK_P - 1)) // BLOCK_P, 0), UNROLL).to(tl.float32)


@traffic(writes="y mask mean_ptr m2_ptr count_ptr")
@triton.jit
def _forward_kernel(
    x,  # Map
    y,  # Map; None to compute only the statistics
    residual,  # Map or None
    mask,  # Map [N, ceil(C / 8), positions], uint8, or None
    norm,  # Norm; None to compute only the statistics
    mean_ptr,  # [programs, C]; [C] if ONE_CHUNK
    m2_ptr,  # [programs, C]; with ONE_CHUNK the variances [C]
    count_ptr,  # [programs]
    chunks,  # programs per channel block that have tiles; further ones have a count of 0
    num_iters,  # samples if BY_SAMPLE, else tiles
    positions,
    channels,
    ACTIVATION: tl.constexpr,
    NCHW: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
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
    block, chunk, tiles, begin, _ = program_tiles(positions, channels, BY_SAMPLE, ROWS, BLOCK_C)
    step = chunks // tiles
    has_tiles = begin < step
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    row, col = rows_and_channels(offs_c, NCHW, UNROLL, BLOCK_P)
    x_ptrs = pointers(x, row, col, NCHW, ALIGNMENT)
    if y is not None:
        y_ptrs = pointers(y, row, col, NCHW, ALIGNMENT)
        running_mean = load_channels(norm.running_mean, offs_c, mask_c, NCHW)
        scale = load_scale(norm.running_var, norm.weight, offs_c, mask_c, norm.eps, NCHW)
        if norm.bias is not None:
            bias = load_channels(norm.bias, offs_c, mask_c, NCHW)
        if residual is not None:
            residual_ptrs = pointers(residual, row, col, NCHW, ALIGNMENT)
    if mask is not None:
        offs_byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        mask_byte = expand_channels(offs_byte * 8 < channels, NCHW)
        mask_ptrs = pointers(mask, row, expand_channels(offs_byte, NCHW).to(tl.int64), NCHW, 1)

    mean = tl.zeros([BLOCK_C, BLOCK_P] if NCHW else [BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros_like(mean)
    num_tiles = 0.0  # number of tiles processed so far
    block_rows = tl.arange(0, BLOCK_P)
    block_rows = block_rows[None, :] if NCHW else block_rows[:, None]
    for i in tl.range(begin, tl.where(has_tiles, num_iters, 0), step, num_stages=LOOP_STAGES):
        sample, first = tile_start(i, chunk, tiles, BY_SAMPLE, ROWS)
        mask_p = first + row < positions
        inside = mask_p & expand_channels(mask_c, NCHW)
        v = tl.load(x_ptrs + offset(x, sample, first, NCHW, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        if y is not None:
            z = (v - running_mean) * scale
            if norm.bias is not None:
                z += bias
            if residual is not None:
                ptrs = residual_ptrs + offset(residual, sample, first, NCHW, ALIGNMENT)
                z += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            ptrs = y_ptrs + offset(y, sample, first, NCHW, ALIGNMENT)
            tl.store(ptrs, cast(_activate(z, ACTIVATION), y.ptr.dtype.element_ty), mask=inside)
            if mask is not None:
                ptrs = mask_ptrs + offset(mask, sample, first, NCHW, 1)
                packed = pack(activation_mask(z, ACTIVATION), NCHW, BLOCK_P, UNROLL, BLOCK_C)
                tl.store(ptrs, packed, mask=mask_p & mask_byte)

        # All tiles of a program have the same number of rows, except that without BY_SAMPLE the last may have fewer.
        count = _row_counts(first, positions, block_rows, BLOCK_P, UNROLL)
        if i == begin:
            mean = tl.sum(v, 1) / tl.maximum(count, 1.0)
        delta = tl.where(mask_p, v - tl.expand_dims(mean, 1), 0.0)
        delta_sum = tl.sum(delta, 1)
        shift = delta_sum * (1.0 / tl.maximum(num_tiles * (count if BY_SAMPLE else UNROLL) + count, 1.0))
        mean += shift
        m2 += tl.sum(delta * delta, 1) - delta_sum * shift
        num_tiles += 1.0

    full_tiles = (num_iters - 1 - begin) // step
    _, first = tile_start(begin + full_tiles * step, chunk, tiles, BY_SAMPLE, ROWS)
    last = _row_counts(first, positions, block_rows, BLOCK_P, UNROLL)
    last_rows = tl.minimum(positions - first, ROWS).to(tl.float32)
    full_tiles = full_tiles.to(tl.float32)
    count = full_tiles * (last if BY_SAMPLE else UNROLL) + last
    total = tl.where(has_tiles, full_tiles * (last_rows if BY_SAMPLE else ROWS) + last_rows, 0.0)
    merged_mean, merged_m2 = _merge_moments(count, tl.maximum(total, 1.0), mean, m2, AXIS)
    merged_m2 = tl.where(merged_m2 < 0, 0.0, merged_m2)
    if ONE_CHUNK:
        tl.store(mean_ptr + offs_c, merged_mean, mask=mask_c)
        tl.store(m2_ptr + offs_c, tl.div_rn(merged_m2, total), mask=mask_c)
    else:
        offs = chunk.to(tl.int64) * channels + offs_c
        tl.store(mean_ptr + offs, merged_mean, mask=mask_c)
        tl.store(m2_ptr + offs, merged_m2, mask=mask_c)
        tl.store(count_ptr + chunk, total)


@triton.jit
def merge_chunks(means_ptr, m2_ptr, count_ptr, chunks, channels, offs_c, mask_c, BLOCK_M: tl.constexpr):
    """Mean and sum of squared deviations of channels and their count, merged from [chunks, C] in a fixed order."""
    total = 0.0
    mean = tl.zeros_like(offs_c).to(tl.float32)
    m2 = tl.zeros_like(mean)
    for start in range(0, chunks, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        offs = offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :]
        mask = (offs_m < chunks)[:, None] & mask_c[None, :]
        counts = tl.load(count_ptr + offs_m, mask=offs_m < chunks, other=0.0)
        count = tl.sum(counts, 0)
        block_mean, block_m2 = _merge_moments(
            counts[:, None],
            tl.maximum(count, 1.0),
            tl.load(means_ptr + offs, mask=mask, other=0.0),
            tl.load(m2_ptr + offs, mask=mask, other=0.0),
            0,
        )
        delta = block_mean - mean
        weight = count / tl.maximum(total + count, 1.0)
        m2 += block_m2 + delta * (total * weight * delta)  # without overflow for the first chunks, whose total is 0
        mean += delta * weight
        total += count
    return mean, m2, total


@traffic(writes="means variances")
@triton.jit
def _merge_kernel(
    parts,  # one [2, chunks, C] per layer: means and sums of squared deviations
    counts,  # one [chunks] per layer
    means,  # one [C] per layer
    variances,  # one [C] per layer
    chunks,  # one number per layer
    channels,  # one number per layer
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    layer = tl.program_id(1)
    rows, columns = select(chunks, layer), select(channels, layer)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if tl.program_id(0) * BLOCK_C < columns:
        mask_c = offs_c < columns
        means_ptr = select(parts, layer)
        m2_ptr = means_ptr + tl.full([], 1, tl.int64) * rows * columns
        mean, m2, total = merge_chunks(means_ptr, m2_ptr, select(counts, layer), rows, columns, offs_c, mask_c, BLOCK_M)
        tl.store(select(means, layer) + offs_c, mean, mask=mask_c)
        tl.store(select(variances, layer) + offs_c, tl.div_rn(m2, total), mask=mask_c)


Strides = tuple[int, int, int]


def _strides(x: Tensor) -> Strides | None:
    """Strides of (N, C, ...) per sample, position and channel; None if the positions have no common stride."""
    stride_p, size = 0, 1
    for dim in range(x.ndim - 1, 1, -1):
        if x.shape[dim] == 1:
            continue
        if size == 1:
            stride_p = x.stride(dim)
        elif x.stride(dim) != stride_p * size:
            return None
        size *= x.shape[dim]
    return x.stride(0), stride_p, x.stride(1)


def with_common_stride(x: Tensor, y: Tensor | None) -> Tensor:
    """Returns x if its positions have a common stride, else a copy in the memory format of y, or contiguous."""
    if _strides(x) is not None:
        return x
    return x.contiguous() if y is None else torch.empty_like(y, dtype=x.dtype).copy_(x)


def as_maps(x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[int, int, list[Map | None]]:
    """Prepares maps for a kernel. Samples and positions become one dimension if all strides allow it.

    Args:
        x: (N, C, ...), for the sizes.
        tensors: Maps with the N and the positions of x, each with one stride for all positions; None stays None.

    Returns:
        The number of samples, the number of positions per sample, and the maps.
    """
    samples, positions = x.shape[0], x[0, 0].numel()
    strides = [None if t is None else _strides(t) for t in tensors]
    if positions == 1:
        strides = [None if s is None else (0, s[0], s[2]) for s in strides]
        samples, positions = 1, samples
    elif samples == 1 or all(s is None or s[0] == positions * s[1] for s in strides):
        strides = [None if s is None else (0, s[1], s[2]) for s in strides]
        samples, positions = 1, samples * positions
    maps = [None if t is None or s is None else Map(t, *s) for t, s in zip(tensors, strides, strict=True)]
    return samples, positions, maps


def choose_config(
    kernel: str, x: Tensor, samples: int, positions: int, maps: Sequence[Map | None], residual: bool
) -> tuple[Launch, dict[str, Any]]:
    """Returns the launch configuration, and the constants that describe the memory layout.

    Args:
        kernel: Name of the heuristic.
        x: (N, C, ...), for sizes, dtype and device.
        samples: As returned by :func:`as_maps`.
        positions: As returned by :func:`as_maps`.
        maps: The maps of full size; None is ignored. The first one decides between NCHW and NHWC.
        residual: Whether the kernel reads a residual or writes its gradient.
    """
    used = [m for m in maps if m is not None]
    nchw = used[0].stride_c != 1 and used[0].stride_p == 1 and positions > 1
    channels = x.shape[1]
    sizes = [
        positions if nchw else channels,
        *(s for m in used for s in (m.stride_n, m.stride_c if nchw else m.stride_p)),
    ]
    alignment = 8 if all(size % 8 == 0 for size in sizes) else 1
    chosen = config.choose(
        kernel,
        architecture(x),
        x.dtype,
        channels=min(next_power_of_2(channels), 1024),
        positions=min(next_power_of_2(positions), 4096),
        nchw=int(nchw),
        alignment=alignment,
        residual=int(residual),
    )
    return chosen, {"NCHW": nchw, "BY_SAMPLE": samples > 1, "ALIGNMENT": alignment}


def split_work(x: Tensor, chosen: Launch, samples: int, positions: int, programs: int) -> tuple[int, int, int]:
    """Splits the tiles over a grid of (channel blocks, chunks).

    With several samples, a chunk consists of tiles at the same positions of different samples, so that all of them have
    the same number of positions. All chunks have about the same number of iterations: one, if there are few tiles.

    Args:
        x: (N, C, ...), for sizes and device.
        chosen: The launch configuration.
        samples: As returned by :func:`as_maps`.
        positions: As returned by :func:`as_maps`.
        programs: Target number of programs per multiprocessor.

    Returns:
        The number of channel blocks, the number of chunks, and the end of the kernel's loop: the number of samples or,
        for one sample, of tiles.
    """
    blocks = cdiv(x.shape[1], chosen.tile["BLOCK_C"])
    tiles = cdiv(positions, chosen.tile["UNROLL"] * chosen.tile["BLOCK_P"])
    num_iters, per_sample = (samples, tiles) if samples > 1 else (tiles, 1)
    parallel = blocks * per_sample
    chunks = num_iters
    if num_iters * parallel > 2 * programs * num_sms(x):
        chunks = cdiv(num_iters, cdiv(num_iters * parallel, programs * num_sms(x)))
    return blocks, chunks * per_sample, num_iters


def partial_statistics(kernel: str, x: Tensor, programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes statistics of chunks of x, for :func:`merge_chunks`.

    Args:
        kernel: Name of the heuristic.
        x: (N, C, ...), not empty, with one stride for all positions.
        programs: Target number of programs per multiprocessor.

    Returns:
        Means and sums of squared deviations, (chunks, C), and counts, (chunks,), float32.
    """
    channels = x.shape[1]
    samples, positions, maps = as_maps(x, (x, None, None, None))
    chosen, constants = choose_config(kernel, x, samples, positions, maps, False)
    blocks, chunks, num_iters = split_work(x, chosen, samples, positions, programs)
    means, m2 = x.new_empty((2, chunks, channels), dtype=torch.float32)
    counts = x.new_empty(chunks, dtype=torch.float32)
    arguments = (*maps, None, means, m2, counts, chunks, num_iters, positions, channels)
    options = {"ACTIVATION": 0, "ONE_CHUNK": False, **constants}
    launch(_forward_kernel, (blocks * chunks,), *arguments, config=chosen, **options)
    return means, m2, counts


def num_parts(x: Tensor) -> int:
    """Number of chunks for which :func:`forward` has results.

    It depends only on the number of channels and the device, so that the shapes of results do not depend on the launch
    configuration: enough for as many programs as :func:`split_work` aims at with 64 channels per program.
    """
    return max(1, (4 * num_sms(x)) // cdiv(x.shape[1], 64))


def _forward(
    x: Tensor,
    norm: Norm | None,
    activation: str,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    counts: Tensor | None = None,
) -> None:
    """Computes mean and variance, (C,). With ``counts``, (rows,), computes means and sums, (rows, C), to be merged."""
    channels = x.shape[1]
    if x.numel() == 0:
        for out in (mean, var) if counts is None else (mean, var, counts):
            out.fill_(float("nan"))
        return
    samples, positions, maps = as_maps(x, (x, y, residual, mask))
    kernel = "channel_statistics" if y is None else "batchnorm_statistics"
    chosen, constants = choose_config(kernel, x, samples, positions, maps[:3], residual is not None)
    blocks, chunks, num_iters = split_work(x, chosen, samples, positions, 4)
    rows = chunks
    parts: tuple[Tensor, Tensor, Tensor] = (mean, var, mean)
    if counts is not None:
        tiles = cdiv(positions, chosen.tile["UNROLL"] * chosen.tile["BLOCK_P"]) if samples > 1 else 1
        rows = len(counts)
        if tiles <= rows:
            chunks, parts = min(chunks, rows // tiles * tiles), (mean, var, counts)
        else:
            # Too many tiles per sample: merge here, and return the result as a chunk of one value.
            for out in (mean, var, counts):
                out.zero_()
            counts[:1].fill_(1)
            mean, var, counts, rows = mean[0], var[0], None, chunks
            parts = (mean, var, mean)
    merges = counts is None and chunks > 1
    if merges:
        partial = x.new_empty((2, chunks, channels), dtype=torch.float32)
        parts = (*partial, x.new_empty(chunks, dtype=torch.float32))
    launch(
        _forward_kernel,
        (blocks * rows,),
        *maps,
        norm,
        *parts,
        chunks,
        num_iters,
        positions,
        channels,
        config=chosen,
        ACTIVATION=ACTIVATIONS[activation],
        ONE_CHUNK=counts is None and chunks == 1,
        **constants,
    )
    if merges:
        merge([partial], [parts[2]], mean, var)


def merge(parts: Sequence[Tensor], counts: Sequence[Tensor], *results: Tensor) -> None:
    """Merges the statistics of chunks, for all layers in one launch.

    Args:
        parts: Means and sums of squared deviations, (2, chunks, C) per layer, float32, contiguous.
        counts: (chunks,) per layer, float32; may be 0.
        *results: Outputs, mean and variance of each layer, (C,), float32.
    """
    for first in range(0, len(parts), MAX_LAYERS):
        group = tuple(parts[first : first + MAX_LAYERS])
        given = results[2 * first : 2 * (first + MAX_LAYERS)]
        chunks, channels = zip(*(each.shape[1:] for each in group), strict=True)
        block_m = min(max(next_power_of_2(max(chunks)), 16), 512)
        launch(
            _merge_kernel,
            (cdiv(max(channels), 8), len(group)),
            group,
            tuple(counts[first : first + MAX_LAYERS]),
            tuple(given[0::2]),
            tuple(given[1::2]),
            tuple(chunks),
            tuple(channels),
            config=Launch(tile={"BLOCK_M": block_m, "BLOCK_C": 8}, num_warps=8 if block_m > 128 else 4),
        )


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
    parts: Tensor,
    counts: Tensor,
    mask: Tensor,
) -> None:
    """Normalizes and activates x, and computes statistics of chunks of x, for :func:`merge`.

    Args:
        x: (N, C, ...), any strides.
        running_mean: (C,), any floating dtype.
        running_var: (C,), any floating dtype.
        weight: (C,), any floating dtype, or None.
        bias: (C,), any floating dtype, or None.
        eps: Number that is added to the running variance.
        activation: Key of ``ACTIVATIONS``.
        keep_mask: Whether to write ``mask``.
        residual: Same shape as x, any strides, or None.
        y: Same shape as x, contiguous or channels-last.
        parts: Means and sums of squared deviations, (2, :func:`num_parts`, C), float32, contiguous.
        counts: (:func:`num_parts`,), float32.
        mask: (N, ceil(C / 8), positions), uint8, with one stride for all positions. The bit of an element is set if
            the activation's derivative is one.
    """
    vectors = (None if v is None else v.contiguous() for v in (running_mean, running_var, weight, bias))
    residual = None if residual is None else with_common_stride(residual, y)
    kept = mask if keep_mask else None
    norm = Norm._make((*vectors, eps))
    _forward(with_common_stride(x, y), norm, activation, residual, y, kept, parts[0], parts[1], counts)


def statistics(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Computes only the statistics of x.

    Args:
        x: (N, C, ...), any strides.
        mean: (C,), float32.
        var: (C,), float32.
    """
    _forward(with_common_stride(x, None), None, "none", None, None, None, mean, var)
