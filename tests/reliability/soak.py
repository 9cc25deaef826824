"""Repeats rounds and calls in one process: memory, objects, open files, threads and CPU time must stay flat."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_fast.engine import distill, evaluate, export
from dfkd_fast.models import extract, load_weights, save_weights

from .. import tiny
from .harness import Tally

ROUNDS, BLOCK = 2010, 15  # a block has five checkpoints and three evaluations with pictures
GROWTH = {"rss_kib": 4096, "objects": 64, "files": 0, "threads": 0}  # from the second to the last quarter of samples
# More growth per call: torch.export keeps the symbolic shapes of each graph, and safetensors 0.8 bytes of each tensor.
MORE = {"export": (1024, 2500, 0, 0, 0), "load_weights": (5, 0, 0, 0, 0)}


class _Samples:
    """What the process holds after each repetition."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        gc.collect()
        gc.freeze()  # so that only newer objects are counted
        self._cpu = time.process_time()

    def take(self) -> None:
        used = time.process_time() - self._cpu
        gc.collect()
        kib = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
        held = (len(gc.get_objects()), *(len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")))
        self.rows.append((kib, *held, used))
        self._cpu = time.process_time()

    def judge(self, tally: Tally, kind: str, repeated: int = 1) -> None:
        """Count the repetitions as flat or lost. Each sample is of ``repeated`` of them."""
        gc.unfreeze()
        values, quarter, times = np.array(self.rows), len(self.rows) // 4, repeated * len(self.rows)
        if quarter < 2:
            return tally.count(kind, "too few to compare", times=times)
        early, late = np.median(values[quarter : 2 * quarter], 0), np.median(values[-quarter:], 0)
        facts = {name: float(growth) for name, growth in zip(GROWTH, late - early, strict=False)}
        facts |= {"slowdown": float(late[4] / early[4]), "cpu_seconds": float(np.median(values[:, 4])) / repeated}
        tally.facts[kind] = facts
        limits = np.array([*GROWTH.values(), np.inf]) + 2 * quarter * np.array(MORE.get(kind.rpartition(" ")[2], 0))
        if (late - early > limits).any() or (quarter > 7 and facts["slowdown"] > 1.5):
            return tally.lose(kind, f"{[*GROWTH, 'seconds']} grew from {early} to {late} in {times}: {facts}")
        return tally.count(kind, "flat", times=times)


def _rounds(changes: dict[str, Any], tally: Tally, kind: str, end: float) -> None:
    samples = _Samples()

    def listen(completed: int, *_: Any) -> None:
        if completed % BLOCK == 0:
            samples.take()
            if time.monotonic() > end:
                raise TimeoutError

    config = tiny.config(tally.folder / kind, epochs=ROUNDS // 5, rounds_per_epoch=5, checkpoint_every=3, **changes)
    with contextlib.suppress(TimeoutError):
        distill(tiny.teacher(), tiny.network(), config, data=tiny.data(), progress=listen)
    samples.judge(tally, kind, BLOCK)


def _calls(call: Callable[[Path], object], tally: Tally, kind: str, end: float) -> None:
    for _ in range(2):  # imports and caches
        call(tally.folder / "first")
    samples = _Samples()
    while not samples.rows or time.monotonic() < end:
        call(tally.folder / kind)
        shutil.rmtree(tally.folder / kind, ignore_errors=True)
        samples.take()
    samples.judge(tally, kind)


CALLS: dict[str, Callable[[Path], object]] = {
    "distill": lambda out: tiny.run(out, epochs=1, rounds_per_epoch=1, resume=True),
    "teach": tiny.teach,
    "evaluate": lambda _: evaluate(tiny.network(), tiny.data().test, num_classes=tiny.CLASSES),
    "extract": lambda _: extract(tiny.network(), image_size=tiny.SIZE, statistics=True),
    "save_weights": lambda out: save_weights(tiny.network(), out / "weights.safetensors"),
    "load_weights": lambda out: load_weights(tiny.network(), out.with_name("teacher.safetensors")),
    "export": lambda out: export(tiny.network(), out, image_size=tiny.SIZE),
}

KINDS: dict[str, tuple[float, Callable[[Tally, str, float], None]]] = {  # with their shares of the time
    "rounds, eager": (0.4, partial(_rounds, {})),
    "rounds, eager in bf16 with selection": (0.15, partial(_rounds, {"precision": "bf16", "select": "agreement"})),
    "rounds, compiled": (0.15, partial(_rounds, {"engine": "compiled"})),
    **{f"calls of {name}": (0.3 / len(CALLS), partial(_calls, call)) for name, call in CALLS.items()},
}


def run(tally: Tally) -> None:
    """Divide the time between the rounds of two engines and calls of each function, once each."""
    save_weights(tiny.network(), tally.folder / "teacher.safetensors")
    kinds = [kind for kind in KINDS if tally.seconds > 300 or "compiled" not in kind]  # compilation takes minutes
    for done, (kind, _) in enumerate(tally.turns(kinds), 1):
        share, repeat = KINDS[kind]
        repeat(tally, kind, time.monotonic() + max(4.0, share * tally.seconds))
        if done == len(kinds):
            break
