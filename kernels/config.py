"""Launch configurations: a heuristic per kernel, or what was measured.

Each kernel's file has its heuristic at the top. :func:`choose` takes the entry of ``tuned.json`` for exactly this
kernel, architecture, dtype and shape, if ``dfkd-fast bench --tune`` measured one to be faster, and else the heuristic.
Nothing is tuned while a program runs.
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
        num_warps: per program.
        num_stages: of the software pipeline of its loops.
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
        **limits: the sizes that a tuning run may change, with the least and the greatest value that the kernel takes.
            Each is halved and doubled in turn, stages are one fewer and one more, and so are warps halved and doubled.
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
    """What a tuning run tries, the heuristic's choice first."""
    return _RULES[kernel](arch, dtype, **sizes)


def choose(kernel: str, arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """The configuration to launch with.

    Args:
        kernel: name of a heuristic.
        arch: of the device, 90 for sm_90.
        dtype: of the main operands.
        **sizes: the heuristic's arguments. Each set of them is a choice, so sizes that vary from call to call come
            rounded to powers of two.
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
    """Inside, ``choose(kernel, ...)`` is ``launch``; for only one choice where ``kernel`` is its :func:`key`."""
    _forced[kernel] = launch
    try:
        yield
    finally:
        del _forced[kernel]


@contextmanager
def asked() -> Iterator[list[Asked]]:
    """Inside, the arguments of ``choose`` are recorded, in order; for tuning."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def entry(launch: Launch, why: str) -> dict[str, Any]:
    """A choice as it stands in ``tuned.json``, with the reason for it."""
    return {**asdict(launch), "why": why}
