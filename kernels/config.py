"""Launch configurations: frozen choices by kernel, architecture, dtype and shape.

A rule gives the candidates for a kernel, the best guess first. :func:`choose` takes the entry of ``tuned.json`` for
exactly this kernel, architecture, dtype and shape, where ``dfkd-fast bench --tune`` measured one, and else the first
candidate. Nothing is tuned while a program runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

__all__ = ["Launch", "asked", "candidates", "choose", "forced", "key", "rule", "shared_memory"]

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        tile: the kernel's compile-time sizes, by the names of its arguments.
        num_warps: of a program.
        num_stages: of the software pipeline of its loops.
    """

    tile: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


Rule = Callable[..., list[Launch]]
_RULES: dict[str, Rule] = {}
_forced: dict[str, Launch] = {}
Asked = tuple[str, int, torch.dtype, dict[str, int]]
_asked: list[Asked] | None = None


def rule(kernel: str) -> Callable[[Rule], Rule]:
    """Register a rule: a function of (arch, dtype, **sizes) that gives candidates, the best guess first."""

    def register(function: Rule) -> Rule:
        _RULES[kernel] = function
        return function

    return register


def shared_memory(arch: int) -> int:
    """Bytes of shared memory that one block may use on an architecture (90 for sm_90).

    From the CUDA C++ programming guide's table of technical specifications; the smallest for those not in it.
    """
    kilobytes = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
    return 1024 * kilobytes.get(arch, 64)


def key(kernel: str, arch: int, dtype: torch.dtype, sizes: dict[str, int]) -> str:
    """The name of a choice in ``tuned.json``."""
    listed = ",".join(f"{name}={size}" for name, size in sorted(sizes.items()))
    return f"{kernel}/sm_{arch}/{str(dtype).removeprefix('torch.')}/{listed}"


@functools.cache
def _tuned() -> dict[str, dict[str, Any]]:
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else {}


def candidates(kernel: str, arch: int, dtype: torch.dtype, **sizes: int) -> list[Launch]:
    """What a tuning run tries."""
    return _RULES[kernel](arch, dtype, **sizes)


def choose(kernel: str, arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """The configuration to launch with.

    Args:
        kernel: a rule's name.
        arch: of the device, 90 for sm_90.
        dtype: of the main operands.
        **sizes: what the rule goes by. Each different set of them is a choice of its own, so sizes that vary from call
            to call come rounded to powers of two.
    """
    if _asked is not None:
        _asked.append((kernel, arch, dtype, sizes))
    if _forced:
        launch = _forced.get(kernel) or _forced.get(key(kernel, arch, dtype, sizes))
        if launch is not None:
            return launch
    tuned = _tuned()
    if tuned:
        entry = tuned.get(key(kernel, arch, dtype, sizes))
        if entry is not None:
            return Launch(tile=entry["tile"], num_warps=entry["num_warps"], num_stages=entry["num_stages"])
    return _RULES[kernel](arch, dtype, **sizes)[0]


@contextmanager
def forced(kernel: str, launch: Launch) -> Iterator[None]:
    """Inside, ``choose(kernel, ...)`` is ``launch``; for tuning, which tries candidates in turn.

    ``kernel`` may be a choice's :func:`key`: then it is for that choice alone.
    """
    _forced[kernel] = launch
    try:
        yield
    finally:
        del _forced[kernel]


@contextmanager
def asked() -> Iterator[list[Asked]]:
    """Inside, what ``choose`` is asked for is written down, in order; for tuning, which has to know it."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def entry(launch: Launch, why: str) -> dict[str, Any]:
    """A choice as it stands in ``tuned.json``, with the reason for it."""
    return {**asdict(launch), "why": why}


# --- distillation_kl


@rule("distillation_kl")
def _distillation_kl(arch: int, dtype: torch.dtype, *, classes: int) -> list[Launch]:
    """``classes`` is a power of two. A row in registers up to 4,096 classes, beyond that in pieces of that size.

    Eight logits of each side a thread: with sixteen, ptxas spills where columns need masks.
    """
    block = max(16, min(classes, 4096))
    warps = max(4, min(16, block // 256))
    rows = max(1, 1024 // block)
    tried = ((rows, warps), (2 * rows, 2 * warps), (rows, warps // 2), (max(1, rows // 2), warps))
    return [Launch(tile={"ROWS": r, "BLOCK": block}, num_warps=w) for r, w in dict.fromkeys(tried) if w <= 16]


@rule("distillation_kl_alone")
def _distillation_kl_alone(arch: int, dtype: torch.dtype, *, classes: int) -> list[Launch]:
    """One program for all rows, as large as registers allow: what it waits for is memory, tile after tile.

    Eight logits of each side a thread here too: 256 a warp. With 32 warps, ptxas spills.
    """
    block = max(16, min(classes, 4096))
    return [Launch(tile={"ROWS": max(1, 256 * warps // block), "BLOCK": block}, num_warps=warps) for warps in (16, 8)]


# --- high_order_attention, high_order_attention_mse


def _high_order(tried: list[tuple[int, int, int, int, int]], hidden: int) -> list[Launch]:
    return [
        Launch(tile={"BLOCK_M": m, "BLOCK_C": c, "BLOCK_K": max(16, min(k, hidden))}, num_warps=w, num_stages=s)
        for m, c, k, w, s in tried
    ]


def _high_order_split(
    arch: int, dtype: torch.dtype, order: int, gates: int, ragged: int
) -> list[tuple[int, int, int, int, int]]:
    """Tiles of the form in which no program has all channels.

    Four factors at once, or addresses that are not vectors of channels, leave room for smaller ones alone.
    """
    if dtype == torch.float32:
        tried = [(32, 32, 32, 4, 2), (32, 32, 16, 4, 2), (32, 16, 16, 4, 2)]
        if order > 3 or (ragged and arch >= 100):
            return [(16, 16, 16, 4, 2)]
        return tried[(arch >= 100) * (1 + (gates > 1)) :]
    if order > 3 or ragged:
        return [(32, 32, 16, 4, 2), (64, 32, 16, 4, 2), (64, 64, 16, 8, 2)]
    stages = 3 if arch == 90 else 2
    tried = [(64, 64, 32, 4, stages), (64, 64, 64, 4, 2), (128, 64, 32, 8, stages), (64, 128, 32, 8, 2)]
    if 100 <= arch < 120:
        tried = [tried[3], *tried[:3]]
    return tried if gates == 1 else [(64, 32, 32, 4, 2), *tried]


@rule("high_order_attention")
def _high_order_attention(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, ragged: int
) -> list[Launch]:
    """A program with all channels spills where it keeps more gates, or where addresses are not vectors of channels.

    ``channels`` and ``hidden`` are powers of two; ``gates`` is the number of sigmoids; ``ragged`` says that rows of
    channels are no whole vectors.
    """
    whole = max(16, channels)
    tried = _high_order_split(arch, dtype, order, gates, ragged)
    if dtype != torch.float32 and order <= 3 and not ragged:
        if whole <= 64:
            tried = [(128, whole, 16, 8, 2), (64, whole, 16, 4, 2), *tried]
        elif whole == 128 or (whole == 256 and gates == 1):
            tried = [(64, whole, 16, 8, 2), *tried]
    return _high_order(tried, hidden)


@rule("high_order_attention_backward")
def _high_order_attention_backward(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, ragged: int
) -> list[Launch]:
    """As forward; 256 channels spill, and so does more than one gate."""
    whole = max(16, channels)
    tried = _high_order_split(arch, dtype, order, gates, ragged)
    if dtype != torch.float32 and order <= 3 and gates == 1 and not ragged:
        if whole <= 64:
            tried = [(64, whole, 16, 4, 2), (128, whole, 16, 8, 2), *tried]
        elif whole == 128:
            tried = [(64, whole, 16, 8, 2), *tried]
    return _high_order(tried, hidden)


@rule("high_order_attention_weights")
def _high_order_attention_weights(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, ragged: int
) -> list[Launch]:
    """The gradients of the weights: BLOCK_C channels by BLOCK_K hidden units, BLOCK_M positions a step."""
    stages = 3 if arch == 90 else 2
    if dtype == torch.float32:
        tried = [(32, 32, 32, 4, 2), (32, 64, 32, 4, 2), (16, 32, 32, 4, 2)]
    elif ragged or arch == 100:
        tried = [(32, 64, 32, 4, 2), (32, 32, 32, 4, 2), (64, 64, 64, 8, 2)]
    else:
        tried = [(64, 64, 64, 4, stages), (64, 128, 64, 8, stages), (128, 64, 64, 4, 2), (64, 64, 128, 8, stages)]
    return _high_order([(m, max(16, min(c, channels)), k, w, s) for m, c, k, w, s in tried], hidden)


# --- spatial_attention


def _spatial_attention(
    sizes: tuple[int, int, int], wanted: list[tuple[int, int, dict[str, int]]], at_least: int = 16
) -> list[Launch]:
    """Tiles of at most so many elements a thread.

    Args:
        sizes: channels and narrow maps of a tile, and positions of a sample; powers of two.
        wanted: elements a thread, stages, and what the launcher goes by, of each candidate.
        at_least: positions of a tile, for which there are more warps if need be.
    """
    channels, narrow, positions = sizes
    found = []
    for each, stages, launcher in wanted:
        warps = 4 if channels <= 64 else 8
        block = max(at_least, min(64, 32 * warps * each // channels))
        block = max(16, min(block, positions))
        warps = min(16, max(warps, block * channels // (32 * each)))
        tile = {"BLOCK_M": block, "BLOCK_C": channels, "BLOCK_K": narrow, **launcher}
        launch = Launch(tile=tile, num_warps=warps, num_stages=stages)
        if launch not in found:
            found.append(launch)
    return found


def _spatial_attention_room(dtype: torch.dtype, hidden: int, vectors: int) -> bool:
    """Whether a thread has room for many elements: products in tensor cores, and an address for each eight."""
    return dtype.itemsize == 2 and hidden <= 32 and bool(vectors)


def _spatial_attention_narrow(arch: int, dtype: torch.dtype, hidden: int) -> int:
    """Narrow maps of a tile: fewer where products read both sides from registers, and few outside tensor cores."""
    most = 64 if arch // 10 == 9 else 32
    return max(16, min(hidden, most if dtype.itemsize == 2 else 16))


@rule("spatial_attention_statistics")
@rule("spatial_attention_slopes")
def _spatial_attention_sums(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int
) -> list[Launch]:
    """Sums along positions. ``TILES``, of a program at most: with fewer, more chunks are left to merge."""
    halves = dtype.itemsize == 2
    sizes = max(16, min(channels, 64)), _spatial_attention_narrow(arch, dtype, hidden), positions
    each = 16 if halves else 8
    stages = 3 if halves else 2
    tried = [(each, stages, 16), (each, stages, 8), (each, 5 - stages, 16), (each, stages, 32), (each, stages + 1, 16)]
    if _spatial_attention_room(dtype, hidden, vectors):
        tried += [(32, 3, 16), (32, 3, 8)]
    wanted = [(each, stages, {"TILES": tiles}) for each, stages, tiles in tried]
    return _spatial_attention(sizes, wanted, at_least=64 if halves else 32)


@rule("spatial_attention_gate")
@rule("spatial_attention_rows")
def _spatial_attention_gate(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int
) -> list[Launch]:
    """A softmax over channels wants all of them in a tile, if they are up to 256."""
    block = max(16, channels if over_channels and channels <= 256 else min(channels, 64))
    each = 32 if _spatial_attention_room(dtype, hidden, vectors) else 8 if dtype.itemsize == 2 else 16
    sizes = block, _spatial_attention_narrow(arch, dtype, hidden), positions
    return _spatial_attention(sizes, [(each, 2, {}), (each // 2, 2, {}), (each // 4, 2, {})])


@rule("spatial_attention_gradients")
def _spatial_attention_gradients(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, positions: int, over_channels: int, vectors: int
) -> list[Launch]:
    """All channels of a position in a tile, if they are up to 256.

    Where products read the weight from registers, not from shared memory, fewer channels fit.

    ``PROGRAMS`` of a multiprocessor, each of which writes a gradient of the weight; ``MEGABYTES`` of maps that one
    round of sums and gradients goes over, 0 for all there are.
    """
    halves = dtype.itemsize == 2
    from_shared = halves and arch // 10 in (9, 10)
    most = 256 if from_shared else 64 if halves and over_channels else 128
    block = max(16, channels if channels <= most else 64)
    if _spatial_attention_room(dtype, hidden, vectors):
        each = 32 if block != 128 and not over_channels else 16 if from_shared or not over_channels else 8
    else:
        each = 8 if halves or block == channels else 4
    narrow = _spatial_attention_narrow(arch, dtype, hidden)
    # As many as run at once: more of them only add to the sums.
    n = max(1, min(3, 256 // block))
    stages = 1 if each == 4 else 2
    tried = (
        (each, stages, n, 0),
        (each, 3, n, 0),
        (each, stages, 2 * n, 0),
        (each // 2, 2, n, 0),
        (each, stages, n, 28),
        (each, 3 - stages, n, 0),
    )
    wanted = [
        (each, stages, {"PROGRAMS": programs, "MEGABYTES": megabytes}) for each, stages, programs, megabytes in tried
    ]
    return _spatial_attention((block, narrow, positions), wanted)


# --- contrastive_loss


def _contrastive_tiles(arch: int, dtype: torch.dtype, dim: int, tried: list[tuple[int, int, int, int]]) -> list[Launch]:
    """Rows, columns, warps and stages of each candidate whose tiles of all ``dim`` dimensions fit in shared memory."""
    found = []
    for m, n, warps, stages in tried:
        if 2 * dim * (m + stages * n) + 2 * m * n <= shared_memory(arch):
            tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": dim}
            found.append(Launch(tile=tile, num_warps=warps, num_stages=stages))
    return found


@rule("contrastive_loss")
def _contrastive_loss(arch: int, dtype: torch.dtype, *, dim: int) -> list[Launch]:
    """``dim`` is a power of two. Up to 256 dimensions a tile holds them all, and rows stay where they are.

    float32 is multiplied without tensor cores, and there a long step takes more registers than there are.
    """
    if dtype == torch.float32:
        step = min(dim, 32)
        tried = [(64, 32, 8), (64, 64, 4), (128, 64, 8)]
        return [
            Launch(tile={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": step}, num_warps=warps, num_stages=2)
            for m, n, warps in tried
        ]
    if dim > 256:
        tried = [(128, 128, 8), (128, 64, 4), (64, 128, 4)]
        return [
            Launch(tile={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": 64}, num_warps=warps, num_stages=3)
            for m, n, warps in tried
        ]
    tried_whole = [
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 4, 3),
        (64, 128, 4, 3),
        (128, 64, 8, 2),
        (64, 64, 4, 2),
    ]
    return _contrastive_tiles(arch, dtype, dim, tried_whole)


@rule("contrastive_loss_backward")
def _contrastive_loss_backward(arch: int, dtype: torch.dtype, *, dim: int) -> list[Launch]:
    """As above; BLOCK_O dimensions of the gradient a program, all of them where their sums fit in registers."""
    if dtype == torch.float32:
        step, outputs = min(dim, 32), min(dim, 128)
        tried = [(64, 32, 8), (64, 64, 8), (32, 32, 4)]
        return [
            Launch(tile={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": step, "BLOCK_O": outputs}, num_warps=warps)
            for m, n, warps in tried
        ]
    if dim > 256:
        tried = [(128, 64, 8), (64, 64, 4)]
        return [
            Launch(tile={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": 64, "BLOCK_O": 128}, num_warps=warps, num_stages=2)
            for m, n, warps in tried
        ]
    wanted = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)]
    found = _contrastive_tiles(arch, dtype, dim, wanted)
    return [replace(each, tile=each.tile | {"BLOCK_O": dim}) for each in found]


@rule("contrastive_loss_rows")
def _contrastive_loss_rows(arch: int, dtype: torch.dtype, *, dim: int) -> list[Launch]:
    """For the kernels that take whole rows one by one: ``dim`` is a power of two."""
    warps = max(4, min(16, dim // 512))
    return [Launch(tile={"ROWS": max(1, each // dim), "BLOCK": dim}, num_warps=warps) for each in (2048, 4096, 1024)]


@rule("contrastive_loss_small")
def _contrastive_loss_small(arch: int, dtype: torch.dtype, *, rows: int, dim: int) -> list[Launch]:
    """All vectors in one program; both sizes are powers of two."""
    warps = 4 if rows * max(rows, dim) <= 64 * 64 else 8
    return [Launch(tile={"ROWS": rows, "BLOCK": dim}, num_warps=each) for each in (warps, 2 * warps)]


@rule("contrastive_loss_small_backward")
def _contrastive_loss_small_backward(arch: int, dtype: torch.dtype, *, rows: int, dim: int) -> list[Launch]:
    """As above, each program with all vectors and BLOCK_M rows of the gradients."""
    tried = [(16, 8), (32, 8), (64, 8), (16, 4)] if rows * max(rows, dim) > 64 * 64 else [(32, 4), (16, 2), (64, 8)]
    if rows == 16:
        tried = [(16, 2), (16, 1)]
    return [Launch(tile={"ROWS": rows, "BLOCK": dim, "BLOCK_M": min(m, rows)}, num_warps=warps) for m, warps in tried]


# --- batchnorm_statistics, channel_statistics


def _channel_tiles(
    dtype: torch.dtype,
    channels: int,
    positions: int,
    planes: int,
    unit: int,
    wanted: Sequence[tuple[int, int, int, int]],
) -> list[Launch]:
    """Tiles that give each thread ``repeats`` vectors of 16 bytes of each map.

    Args:
        dtype: of the elements.
        channels: a power of two.
        positions: a power of two.
        planes: whether positions lie together rather than channels.
        unit: 1 where there are no vectors: there every element has its own address, so that repeats would not fit and
            nothing can be fetched ahead.
        wanted: repeats, channels at most, warps and stages of each candidate. With planes the channels are what is
            left by the positions.
    """
    found = []
    for repeats, at_most, warps, stages in wanted:
        elements = 32 * warps * 16 // dtype.itemsize
        if unit == 1:
            repeats, stages, elements = 1, 1, elements // 2
        if planes:
            slots = min(max(positions, 16), elements // 8)
            block = max(8, min(elements // slots, channels))
        else:
            block = max(8, min(channels, at_most))
            slots = max(8, elements // block)
        fitting = max(1, min(repeats, positions // slots))
        tile = {"REPEATS": fitting, "SLOTS": slots, "CHANNELS": block, "STAGES": stages}
        launch = Launch(tile=tile, num_warps=warps, num_stages=1)
        if launch not in found:
            found.append(launch)
    return found


@rule("batchnorm_statistics")
def _batchnorm_statistics(
    arch: int, dtype: torch.dtype, *, channels: int, positions: int, planes: int, unit: int, residual: int
) -> list[Launch]:
    """Sizes are powers of two; ``positions`` counts all samples' unless they have to be taken one by one.

    The next tile is fetched while one is worked on, and what a thread holds leaves room for four blocks a processor.
    """
    wanted = [(4, 64, 4, 2), (4, 64, 4, 1), (2, 64, 4, 2), (2, 64, 8, 2), (2, 64, 4, 3), (2, 128, 4, 2)]
    if residual:
        wanted = [(2, 64, 4, 2), (2, 64, 4, 1), (4, 64, 4, 1), (2, 64, 8, 2), (2, 64, 4, 3), (2, 128, 4, 2)]
    return _channel_tiles(dtype, channels, positions, planes, unit, wanted)


@rule("channel_statistics")
def _channel_statistics(
    arch: int, dtype: torch.dtype, *, channels: int, positions: int, planes: int, unit: int, residual: int
) -> list[Launch]:
    """As above, with nothing written and so more to read at once."""
    wanted = [(4, 64, 4, 2), (4, 64, 4, 1), (8, 64, 4, 1), (4, 64, 8, 2), (4, 128, 4, 2)]
    return _channel_tiles(dtype, channels, positions, planes, unit, wanted)


@rule("batchnorm_statistics_backward")
def _batchnorm_statistics_backward(
    arch: int, dtype: torch.dtype, *, channels: int, positions: int, planes: int, unit: int, residual: int
) -> list[Launch]:
    """As above; two maps are read. In float32 with a residual, what is fetched ahead made ptxas spill eight bytes."""
    wanted = [(2, 64, 4, 2), (2, 64, 4, 1), (4, 64, 4, 1), (1, 64, 4, 2), (2, 64, 8, 2), (2, 128, 4, 2)]
    if residual and dtype == torch.float32:
        wanted = [(2, 64, 4, 1), (1, 64, 4, 2), (2, 64, 8, 1), (4, 64, 4, 1)]
    return _channel_tiles(dtype, channels, positions, planes, unit, wanted)


# --- statistics_distance


@rule("statistics_distance")
def _statistics_distance(arch: int, dtype: torch.dtype, *, channels: int) -> list[Launch]:
    """``channels`` is a power of two. All are in registers up to 4,096, more are read in pieces of that size.

    One program has them all, and waits for memory and for its own barriers alone: few channels a thread, few warps.
    """
    block = max(32, min(channels, 4096))
    warps = max(1, min(8, block // 128))
    tried = (warps, max(1, warps // 2), 2 * warps)
    return [Launch(tile={"BLOCK": block}, num_warps=each) for each in dict.fromkeys(tried) if 32 * each <= block]


# --- max_pool2x2, max_unpool2x2


@rule("max_pool2x2")
@rule("max_unpool2x2")
@rule("max_unpool2x2_backward")
def _max_pool2x2(arch: int, dtype: torch.dtype, *, inside: int) -> list[Launch]:
    """``inside``, windows that are neighbours in memory, is a power of two up to 64.

    A vector of 16 bytes a thread and tensor is the best guess: the four elements of a window are four loads in flight
    already, and with more windows a thread, code has a layout of its own and goes through shared memory.
    """
    vector = 16 // dtype.itemsize
    return [
        Launch(tile={"OUTER": max(1, 32 * warps * each // inside), "INNER": inside}, num_warps=warps)
        for warps, each in ((4, vector), (8, vector), (2, vector), (4, 2 * vector), (8, 2 * vector))
    ]
