"""Launch configurations: from each kernel's heuristic, or from a measurement.

The heuristics are at the top of the kernels' files. ``dfkd-fast bench --tune`` writes faster configurations to
``tuned.json``. :func:`choose` uses the file's entry for exactly this kernel, architecture, dtype and shape. If there is
none, it uses the heuristic. Nothing is tuned while a program runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

__all__ = ["Launch", "asked", "candidates", "choose", "forced", "heuristic", "key", "shared_memory"]

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        tile: the kernel's compile-time sizes, by the names of its arguments.
        num_warps: number of warps per program.
        num_stages: number of stages of the software pipeline of the kernel's loops.
    """

    tile: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


Asked = tuple[str, int, torch.dtype, dict[str, int]]
_RULES: dict[str, Callable[..., list[Launch]]] = {}
_forced: dict[str, Launch] = {}
_asked: list[Asked] | None = None


def _variations(first: Launch, limits: dict[str, tuple[int, int]]) -> Iterator[Launch]:
    yield first
    values = {**first.tile, "num_warps": first.num_warps, "num_stages": first.num_stages}
    for name, (least, most) in limits.items():
        now = values[name]
        for value in (now - 1, now + 1) if name.lower().endswith("stages") else (now // 2, now * 2):
            if least <= value <= most:
                more = {"tile": first.tile | {name: value}} if name in first.tile else {name: value}
                yield replace(first, **more)


def heuristic(kernel: str, **limits: tuple[int, int]) -> Callable[[Callable[..., Launch]], Callable[..., Launch]]:
    """Register a function of (arch, dtype, **sizes) that gives a kernel's configuration.

    Args:
        kernel: name for :func:`choose`.
        **limits: the values that a tuning run may change, with the least and the greatest that the kernel supports.
            A run halves or doubles one value at a time, or changes a number of stages by one. Warps may always change.
    """
    limits = {"num_warps": (1, 16), **limits}

    def register(function: Callable[..., Launch]) -> Callable[..., Launch]:
        _RULES[kernel] = functools.cache(
            lambda arch, dtype, **sizes: [*_variations(function(arch, dtype, **sizes), limits)]
        )
        return function

    return register


def shared_memory(arch: int) -> int:
    """Bytes of shared memory that one block may use on an architecture (90 for sm_90).

    Source: the CUDA C++ programming guide, technical specifications. Other architectures get the smallest value.
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
    """The configurations that a tuning run tries. The first is the heuristic's choice."""
    return _RULES[kernel](arch, dtype, **sizes)


def choose(kernel: str, arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """The configuration to launch with.

    Args:
        kernel: name of a heuristic.
        arch: architecture of the device, 90 for sm_90.
        dtype: dtype of the main operands.
        **sizes: the heuristic's arguments. Each combination has its own entry in ``tuned.json``, so callers round sizes
            that vary from call to call to powers of two.
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
    """Makes ``choose`` return ``launch`` for a kernel, or for only one choice if ``kernel`` is its :func:`key`."""
    _forced[kernel] = launch
    try:
        yield
    finally:
        del _forced[kernel]


@contextmanager
def asked() -> Iterator[list[Asked]]:
    """Records the arguments of each call of ``choose``, in order, for tuning."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def entry(launch: Launch, why: str) -> dict[str, Any]:
    """The entry of ``tuned.json`` for a configuration, with the reason for the choice."""
    return {**asdict(launch), "why": why}
