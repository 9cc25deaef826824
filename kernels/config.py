"""Launch configurations: frozen choices by kernel, architecture, dtype and shape.

A rule gives the candidates for a kernel, the best guess first. :func:`choose` takes the entry of ``tuned.json`` for
exactly this kernel, architecture, dtype and shape, where ``dfkd-fast bench --tune`` measured one, and else the first
candidate. Nothing is tuned while a program runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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


# --- high_order_attention, high_order_attention_mse


# --- spatial_attention


# --- contrastive_loss


# --- batchnorm_statistics, channel_statistics


# --- max_pool2x2, max_unpool2x2


@rule("max_pool2x2")
@rule("max_unpool2x2")
@rule("max_unpool2x2_backward")
def _max_pool2x2(arch: int, dtype: torch.dtype, *, inside: int) -> list[Launch]:
    """``inside`` is a power of two up to 256: windows that are neighbours in memory. Eight a thread: 16 bytes of two."""
    inner = max(1, min(inside, 64))
    return [
        Launch(tile={"OUTER": max(1, size // inner), "INNER": inner}, num_warps=warps)
        for size, warps in ((1024, 4), (2048, 8), (2048, 4), (512, 4), (512, 2))
    ]
