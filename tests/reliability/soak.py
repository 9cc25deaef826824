"""Repeats rounds and calls in one process: memory, objects, open files, threads and time per round must stay flat."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_fast.config import TeachConfig
from dfkd_fast.engine import distill, evaluate, export, teach
from dfkd_fast.models import extract, load_weights, save_weights

from .. import tiny
from .harness import Tally

ROUNDS = 2000
LIMITS = {"rss_kib": 4096, "objects": 200, "files": 0, "threads": 0}
"""Largest growth from the second to the last quarter of the samples."""
SLOWDOWN = 1.5
"""Largest ratio of CPU time per round in the last quarter to that in the second one."""


class _Samples:
    """What the process holds after each repetition."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        gc.collect()
        gc.freeze()  # so that counting skips what exists before
        self._cpu = time.process_time()

    def take(self) -> None:
        used = time.process_time() - self._cpu
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        counts = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
        self.rows.append((pages * os.sysconf("SC_PAGE_SIZE") / 1024, len(gc.get_objects()), *counts, used))
        self._cpu = time.process_time()

    def judge(self, tally: Tally, kind: str) -> None:
        """Count the repetitions of a kind as flat or lost."""
        gc.unfreeze()
        values, quarter = np.array(self.rows), len(self.rows) // 4
        if quarter < 2:
            tally.count(kind, "too few for a verdict", times=len(values))
            return
        early, late = values[quarter : 2 * quarter], values[-quarter:]
        growth = dict(zip(LIMITS, np.median(late, 0) - np.median(early, 0), strict=False))
        slopes = np.polyfit(np.arange(len(values) - quarter), values[quarter:], 1)[0]
        facts = {f"{name}_per_repetition": round(slope, 4) for name, slope in zip(LIMITS, slopes, strict=False)}
        facts["slowdown"] = float(np.quantile(late[:, 4], 0.25) / np.quantile(early[:, 4], 0.25))
        tally.facts[kind] = {**facts, "seconds_cpu": float(np.median(values[:, 4]))}
        grown = [f"{name} grew by {value:.0f}" for name, value in growth.items() if value > LIMITS[name]]
        if facts["slowdown"] > SLOWDOWN and quarter > 10:
            grown.append(f"the CPU time grew by a factor of {facts['slowdown']:.2f}")
        if grown:
            tally.lose(kind, f"{', '.join(grown)} in {len(values)} repetitions: {tally.facts[kind]}")
        else:
            tally.count(kind, "flat", times=len(values))


class _TimeIsOver(Exception):
    pass


def _rounds(tally: Tally, kind: str, share: float, **changes: Any) -> None:
    samples = _Samples()

    def listen(completed: int, *_: Any) -> None:
        samples.take()
        if tally.left(share) < 0 and completed > 16:
            raise _TimeIsOver

    out = tally.folder / "rounds"
    config = tiny.config(out, epochs=ROUNDS // 5, rounds_per_epoch=5, checkpoint_every=3, **changes)
    with contextlib.suppress(_TimeIsOver):
        distill(tiny.teacher(), tiny.network(), config, data=tiny.data(), progress=listen)
    shutil.rmtree(out)
    samples.judge(tally, kind)


def _calls(tally: Tally, kind: str, share: float, call: Callable[[Path], object]) -> None:
    out = tally.folder / "calls"
    call(out)  # imports and caches
    samples = _Samples()
    while len(samples.rows) < 8 or tally.left(share) > 0:
        shutil.rmtree(out, ignore_errors=True)
        call(out)
        samples.take()
    samples.judge(tally, kind)


def _weights(out: Path) -> None:
    save_weights(tiny.network(), out / "weights.safetensors")
    load_weights(tiny.network(), out / "weights.safetensors")


CALLS: dict[str, Callable[[Path], object]] = {
    "distill": lambda out: tiny.run(out, epochs=1, rounds_per_epoch=1),
    "teach": lambda out: teach(
        tiny.network(), tiny.data(), TeachConfig(epochs=1, batch_size=10, device="cpu", out=str(out)), progress=False
    ),
    "evaluate": lambda _: evaluate(tiny.network(), tiny.data().test, num_classes=tiny.CLASSES),
    "extract": lambda _: extract(tiny.network(), image_size=tiny.SIZE, statistics=True),
    "save and load weights": _weights,
    "export": lambda out: export(tiny.network(), out, image_size=tiny.SIZE),
}


def run(tally: Tally) -> None:
    """Divide the time between rounds of one run and calls of each function."""
    _rounds(tally, "rounds", 0.5)
    for index, (name, call) in enumerate(CALLS.items(), 1):
        _calls(tally, f"calls of {name}", 0.5 + 0.5 * index / len(CALLS), call)
