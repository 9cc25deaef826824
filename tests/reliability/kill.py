"""Kills tiny runs and writers, repeats them, and compares the result with that of an undisturbed one, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfkd_fast import files, report
from dfkd_fast.engine import background, distill, export, loop
from dfkd_fast.models import save_weights
from dfkd_fast.objectives import PRESETS

from .. import tiny
from ..engine.kill_points import POINTS, install, passed
from .harness import Tally, snapshot

Subject = tuple[Any, ...]  # a key of WORK and arguments
Points = dict[int, dict[int, int]]  # by kind of point: the signal at the n-th point
STATUSES = (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
VARIANTS: tuple[dict[str, Any], ...] = (
    {"checkpoint_every": 1},
    {"checkpoint_every": 2, "select": "agreement"},
    {"checkpoint_every": 3, "select": "test_accuracy", "keep_checkpoints": 3},
    {"checkpoint_every": 1, "evaluate_every": 2, "overlap": True},
)
KILLS = (f"kill -9 {name}" for name in (*POINTS, "at a random time", "in teach", "in save_weights", "in export"))
KINDS: tuple[str, ...] = (*KILLS, "SIGTERM", "SIGINT", "SIGSTOP and SIGCONT")
TIMED = {"at a random time": [9], "SIGSTOP and SIGCONT": [19, 18, 19, 18]}
_undisturbed: dict[Subject, tuple[dict[str, Any], float, list[int]]] = {}


def _distill(preset: Any, variant: int) -> None:
    changes = dict(VARIANTS[variant])
    if changes.pop("overlap", False):  # a thread, as on a GPU
        loop.Background = lambda device: background.Background(device, overlap=True)  # type: ignore
    if variant:  # drawing takes longer than the run
        report.save_curves = lambda rounds, epochs, path: files.write_file(path, repr((rounds, epochs)).encode())
    config = tiny.config(Path("run"), **tiny.method(preset), resume=True, **changes)
    distill(*tiny._traced(), config, data=tiny.data(), progress=False)


WORK: dict[str, Callable[..., object]] = {
    "distill": _distill,
    "teach": lambda: tiny.teach(Path("run"), epochs=3, lr=0.05, ema=0.5, evaluate_every=2, resume=True),
    "save_weights": lambda: [save_weights(each(), "run/weights.safetensors") for each in (tiny.teacher, tiny.network)],
    "export": lambda: export(tiny.network(), "run", image_size=tiny.SIZE),
}


def _child(subject: Subject, folder: Path, points: Points) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(folder)
    for kind, at in points.items():
        install(kind, at)
    try:
        WORK[subject[0]](*subject[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run(subject: Subject, folder: Path, points: Points, signals: Sequence[tuple[float, int]] = ()) -> int:
    """Run a process, send it signals after pauses, and return its exit status. Raises RuntimeError if it fails."""
    passed[:] = [0] * len(POINTS)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(subject, folder, points))
    process.start()
    for pause, number in signals:
        time.sleep(pause)
        os.kill(process.pid or 0, number)
    process.join(120)
    if (status := process.exitcode) not in STATUSES:
        process.kill()
        raise RuntimeError(f"exit status {status} after at most 120 s: {(folder / 'log').read_text()[-3000:]}")
    return int(status or 0)


def _result(folder: Path) -> dict[str, Any]:
    """The content of a finished folder, with leftover files and the values that TensorBoard shows."""
    found = snapshot(folder) | {path.name: "left over" for path in folder.rglob("*.partial")}
    log = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    for tag in log.Reload().Tags()["scalars"] if (folder / "tensorboard").exists() else ():
        points = [(each.step, each.value) for each in log.Scalars(tag)]
        # TensorBoard hides points by their round, so that those of an epoch can be there twice.
        found[f"tensorboard {tag}"] = sorted(set(points)) if tag.startswith("epoch/") else points
    return found


def _disturb(subject: Subject, folder: Path, kind: str, random: np.random.Generator, repeated: bool) -> int:
    """Run one process with signals and return its exit status."""
    _, seconds, counts = _undisturbed[subject]
    name = kind.removeprefix("kill -9 ")
    if numbers := TIMED.get(name):
        return _run(subject, folder, {}, [(random.uniform(0, seconds / len(numbers)), number) for number in numbers])
    signals = [signal.Signals[kind]] * int(random.integers(1, 3)) if kind == name else [signal.SIGKILL]
    index = random.choice([index for index, count in enumerate(counts) if count])
    if name in POINTS and (repeated or "read" not in name):  # at first there is nothing to read
        index = list(POINTS).index(name)
    first = random.integers(1, 1 + (counts[index] or 6))
    return _run(subject, folder, {index: dict(zip((first, first + random.integers(1, 20)), signals, strict=False))})


def _case(tally: Tally, random: np.random.Generator, kind: str) -> None:
    folder = tally.folder / "case"
    subject: Subject = (kind.rpartition(" ")[2],)
    if subject[0] not in WORK:
        subject = ("distill", str(random.choice(list(PRESETS))), int(random.integers(len(VARIANTS))))
    if subject not in _undisturbed:
        folder.mkdir()
        start = time.monotonic()
        _run(subject, folder, {index: {} for index in range(len(POINTS))})
        _undisturbed[subject] = _result(folder / "run"), time.monotonic() - start, list(passed)
        shutil.rmtree(folder)
    folder.mkdir()
    statuses, saved = [1], list[str]()
    while statuses[-1] and len(statuses) < 5:
        statuses.append(_disturb(subject, folder, kind, random, len(statuses) > 1))
        before, saved = saved, sorted(name for name in snapshot(folder / "run") if name.endswith(".pt"))
        if len(saved) < min(len(before), 2) or (before and saved[-1] < before[-1]):
            raise RuntimeError(f"checkpoints are lost: {before} became {saved}")
    _run(subject, folder, {})
    found, expected = _result(folder / "run"), _undisturbed[subject][0]
    names = {**found, **expected}
    if kind in ("SIGTERM", "SIGINT"):  # these save other checkpoints before the last one
        names = {name: None for name in names if "4-step" in name or not name.endswith(".pt")}
    if changed := sorted(name for name in names if found.get(name) != expected.get(name)):
        texts = [f"{name} is {found.get(name)!r:.500}, expected {expected.get(name)!r:.500}" for name in changed]
        raise RuntimeError(f"{subject} ended with {statuses[1:]}, then: {'; '.join(texts)}")
    tally.count(kind, f"stopped {sum(map(bool, statuses[1:]))} times, equal")


def run(tally: Tally) -> None:
    """Run the kinds in turn."""
    tiny._traced()
    for kind, random in tally.turns(KINDS):
        try:
            _case(tally, random, kind)
        except Exception as error:
            tally.lose(kind, str(error))
        shutil.rmtree(tally.folder / "case", ignore_errors=True)
