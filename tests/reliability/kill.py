"""Kills tiny runs and writers, repeats them, and compares the result with that of an undisturbed one, bit for bit.

Every process is forked from this one, which has imported everything. It dies at its n-th *point*, for example before
the n-th event of a file in its folder, at a random time, or at a system call.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.compat.tensorflow_stub.io.gfile import GFile
from torch import Tensor
from torch.utils._pytree import tree_flatten

from dfkd_fast import files, report
from dfkd_fast.config import ObjectiveConfig, TeachConfig
from dfkd_fast.engine import Checkpoints, DistillState, background, distill, engines, export, loop, teach
from dfkd_fast.models import save_weights
from dfkd_fast.objectives import PRESETS

from .. import tiny
from .harness import Tally

_HANG_S = 120.0
_DATA = tiny.data()
_fork = multiprocessing.get_context("fork")
_passed = _fork.RawArray("i", 16)
"""The points that a process has passed, by kind."""
_number = _fork.RawValue("i")
"""The number of processes so far."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {"checkpoint_every": 1},
    {"checkpoint_every": 2, "select": "agreement"},
    {"checkpoint_every": 3, "select": "test_accuracy", "keep_checkpoints": 3},
    {"checkpoint_every": 1, "evaluate_every": 2, "overlap": True},
)
STEPS = ((engines, "generator_step"), (engines, "student_step"), (loop, "evaluate"), (loop, "agreement"))
READS = ((zipfile.ZipFile, "testzip"), (torch, "load"), (DistillState, "load_state_dict"), (Checkpoints, "newest"))
POINTS: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "before a file event": (),
    "before fsync": (("before", os, "fsync"),),
    "after a system call": tuple(("after", os, name) for name in ("fsync", "replace", "unlink", "mkdir", "pwrite")),
    "inside a write": (("inside", files._RecordingFile, "write"),),
    "inside a write of the TensorBoard log": (("inside", GFile, "write"),),
    "in a step": tuple(("before", *place) for place in STEPS),
    "while a checkpoint is read": tuple((when, *place) for place in READS for when in ("before", "after")),
}
KINDS = (
    *(f"kill -9 {name}" for name in POINTS),
    *("kill -9 at a random time", "kill -9 at a system call, by strace", "SIGTERM", "SIGINT", "SIGSTOP and SIGCONT"),
    *("kill -9 in teach", "kill -9 in save_weights", "kill -9 in export"),
)
SYSTEM_CALLS = ("write", "fsync", "rename", "unlink", "openat", "mkdir", "close", "fstat,newfstatat", "flock", "lseek")


def _install(kind: int, at: dict[int, int]) -> None:
    """Make this process send itself the signals ``at[n]`` at its n-th point of a kind."""

    def reach(number: int | None) -> None:
        _passed[kind] += 1
        if number is not None:
            os.kill(os.getpid(), number)

    def patch(when: str, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            number = at.get(_passed[kind] + 1)
            if when == "inside" and number == signal.SIGKILL:  # write half of the bytes
                original(*(x[: len(x) // 2] if isinstance(x, bytes | memoryview) else x for x in arguments), **options)
            if when != "after":
                reach(number)
            result = original(*arguments, **options)
            if when == "after":
                reach(number)
            return result

        setattr(owner, name, call)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.listdir", "os.scandir"):
            if str(arguments[0]).startswith("run"):
                reach(at.get(_passed[kind] + 1))

    places = list(POINTS.values())[kind]
    for place in places:
        patch(*place)
    if not places:
        sys.addaudithook(hook)


def _distill(preset: str, variant: int) -> None:
    changes = dict(VARIANTS[variant])
    if changes.pop("overlap", False):
        loop.Background = functools.partial(background.Background, overlap=True)  # type: ignore[misc,assignment]
    config = tiny.config(Path("run"), objective=ObjectiveConfig(preset=preset), **changes)  # type: ignore[arg-type]
    resume = any(Path("run/checkpoints").glob("*.pt"))
    distill(*tiny._traced(), replace(config, resume=resume), data=_DATA, progress=False)


def _teach() -> None:
    config = TeachConfig(epochs=3, batch_size=10, lr=0.05, device="cpu", precision="fp32", out="run")
    teach(tiny.network(), _DATA, config, progress=False)


def _save_weights() -> None:
    for network in (tiny.teacher(), tiny.network()):
        save_weights(network, "run/weights.safetensors", {"classes": "5"})


def _export() -> None:
    export(tiny.network(), "run", image_size=tiny.SIZE)


WORK: dict[str, Callable[..., None]] = {
    "distill": _distill,
    "teach": _teach,
    "save_weights": _save_weights,
    "export": _export,
}
Subject = tuple[Any, ...]
"""A key of WORK and the function's arguments."""


def _child(subject: Subject, folder: Path, points: dict[int, dict[int, int]], stop: bool) -> None:
    status = 1
    with (folder / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    event_file_writer.time = SimpleNamespace(time=lambda: time.time() + 10 * _number.value)  # two in the same second
    try:
        os.chdir(folder)
        for kind, at in points.items():
            _install(kind, at)
        if stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        WORK[subject[0]](*subject[1:])
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as leave:
        status = int(str(leave.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _start(subject: Subject, folder: Path, points: dict[int, dict[int, int]], *, stop: bool = False) -> Any:
    _passed[:] = [0] * len(_passed)
    _number.value += 1
    process = _fork.Process(target=_child, args=(subject, folder, points, stop))
    process.start()
    return process


def _wait(process: Any, folder: Path, *expected: int) -> int:
    """Wait for a process and return its exit status. Raises RuntimeError if it hangs or fails."""
    process.join(_HANG_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise RuntimeError(f"hangs for {_HANG_S} s")
    if process.exitcode not in (0, *expected):
        raise RuntimeError(f"exit status {process.exitcode}: {(folder / 'log').read_text()[-3000:]}")
    return int(process.exitcode)


def _digest(content: Any) -> str:
    """Hash nested containers of tensors and plain values."""
    leaves, spec = tree_flatten(content)
    digest = hashlib.sha256(str(spec).encode())
    for leaf in leaves:
        digest.update(leaf.contiguous().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
    return digest.hexdigest()


def _content(path: Path) -> Any:
    """What a file contains. Raises an exception if it is damaged."""
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        del content["settings"]["resume"]
        return _digest(content)
    if path.suffix == ".yaml":
        content = yaml.safe_load(path.read_bytes())
        content.get("distill", {}).pop("resume", None)
        return content
    if path.suffix == ".safetensors":
        load_file(path)
    if path.suffix == ".png" and path.read_bytes()[:1] != b"[":
        Image.open(path).load()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _snapshot(folder: Path) -> dict[str, Any]:
    """The content of the finished files of a folder, without the TensorBoard log."""
    paths = [path for path in folder.rglob("[!.]*") if path.is_file() and "tfevents" not in path.name]
    return {path.relative_to(folder).as_posix(): _content(path) for path in paths}


def _checkpoints(content: dict[str, Any]) -> list[str]:
    return sorted(name for name in content if name.startswith("checkpoints/"))


def _result(folder: Path) -> dict[str, Any]:
    """The content of a finished folder."""
    found = _snapshot(folder) | {path.name: "leftover" for path in folder.rglob("*.partial")}
    if (folder / "tensorboard").exists():
        log = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        for tag in log.Tags()["scalars"]:
            points = [(each.step, each.value) for each in log.Scalars(tag)]
            # Epochs after the checkpoint are logged again, because TensorBoard hides points by their round.
            found[f"tensorboard {tag}"] = sorted(set(points)) if tag.startswith("epoch/") else points
    return found


class _Case:
    """One subject in one folder.

    Args:
        subject: the work of the processes.
        folder: an empty folder.
        known: the results, seconds and numbers of points of undisturbed runs, by subject.
    """

    known: dict[Subject, tuple[dict[str, Any], float, list[int]]] = {}

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder = subject, folder
        self.before: dict[str, Any] = {}
        if subject not in self.known:
            self._clear()
            start = time.monotonic()
            _wait(_start(subject, folder, {kind: {} for kind in range(len(POINTS))}), folder)
            self.known[subject] = _result(folder / "run"), time.monotonic() - start, list(_passed)
        self.expected, self.seconds, self.points = self.known[subject]
        self.used = [kind for kind in range(len(POINTS)) if self.points[kind]]
        self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def signals(self, random: np.random.Generator, kind: int, *numbers: int) -> int:
        """Run a process which sends itself signals at points of a kind."""
        first = int(random.integers(1, 1 + (self.points[kind] or 9)))  # an undisturbed run reads nothing
        at = {first + int(offset): number for offset, number in zip((0, random.integers(1, 20)), numbers, strict=False)}
        return self.end(_start(self.subject, self.folder, {kind: at}))

    def random_time(self, random: np.random.Generator) -> int:
        process = _start(self.subject, self.folder, {})
        time.sleep(random.uniform(0, self.seconds))
        process.kill()
        return self.end(process)

    def pause(self, random: np.random.Generator) -> int:
        process = _start(self.subject, self.folder, {})
        for _ in range(3):
            time.sleep(random.uniform(0, self.seconds / 4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(random.uniform(0, 0.05))
                os.kill(process.pid, signal.SIGCONT)
        return self.end(process)

    def system_call(self, random: np.random.Generator) -> int:
        process = _start(self.subject, self.folder, {}, stop=True)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        call, number = random.choice(SYSTEM_CALLS), 1 + int(random.geometric(0.03))
        inject = f"inject={call}:signal=SIGKILL:when={number}"
        command = [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            f"trace={call}",
            "-e",
            inject,
            "-p",
            str(process.pid),
        ]
        with subprocess.Popen(command) as tracer:
            while "TracerPid:\t0\n" in Path(f"/proc/{process.pid}/status").read_text() and tracer.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGCONT)
            return self.end(process)

    def end(self, process: Any) -> int:
        """Wait for a process, and check that all files are whole and that no checkpoint is lost."""
        code = _wait(process, self.folder, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 130)
        now = _snapshot(self.folder / "run")
        old, new = _checkpoints(self.before), _checkpoints(now)
        if len(new) < min(len(old), 2) or (old and new[-1] < old[-1]):
            raise RuntimeError(f"checkpoints are lost: {old} became {new}")
        self.before = now
        return code

    def finish(self, *, same_checkpoints: bool) -> list[str]:
        """Repeat the work without a signal, and return what differs from an undisturbed run."""
        _wait(_start(self.subject, self.folder, {}), self.folder)
        found, expected = _result(self.folder / "run"), dict(self.expected)
        for content in () if same_checkpoints else (found, expected):  # a stopped run saves other checkpoints
            for name in _checkpoints(content)[:-1]:
                del content[name]
        changed = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
        return [f"{name} is {found.get(name)}, expected {expected.get(name)}" for name in changed]


def _run_case(tally: Tally, random: np.random.Generator, kind: str) -> None:
    subject: Subject = ("distill", str(random.choice(list(PRESETS))), int(random.integers(len(VARIANTS))))
    what = kind.removeprefix("kill -9 ")
    if what.startswith("in ") and what != "in a step":
        subject = (what.removeprefix("in "),)
    case = _Case(subject, tally.folder / "case")
    ends = []
    for _ in range(random.integers(1, 4)):
        if kind in ("SIGTERM", "SIGINT"):
            numbers = [getattr(signal, kind)] * int(random.integers(1, 3))
            ends.append(case.signals(random, int(random.choice(case.used)), *numbers))
        elif what == "at a random time":
            ends.append(case.random_time(random))
        elif kind == "SIGSTOP and SIGCONT":
            ends.append(case.pause(random))
        elif what == "at a system call, by strace":
            ends.append(case.system_call(random))
        else:
            number = list(POINTS).index(what) if what in POINTS else int(random.choice(case.used))
            if "read" in what and not ends:  # the first process has nothing to read
                number -= 1
            ends.append(case.signals(random, number, signal.SIGKILL))
        if ends[-1] == 0:
            break
    if changed := case.finish(same_checkpoints=kind not in ("SIGTERM", "SIGINT")):
        tally.lose(kind, f"{subject} ended with {ends}, then: " + "; ".join(changed))
    else:
        stops = sum(code != 0 for code in ends)
        tally.count(kind, f"stopped {stops} times, equal" if stops else "not stopped, equal")


def run(tally: Tally) -> None:
    """Run one case of each kind, then more until the time is over."""
    tiny._traced()
    for share in [0.0] * len(KINDS) + [1.0]:
        for random in tally.cases(share):
            kind = KINDS[tally.index % len(KINDS)]
            if "strace" in kind and shutil.which("strace") is None:
                tally.skip(kind, "strace is not installed")
                continue
            try:
                _run_case(tally, random, kind)
            except RuntimeError as error:
                tally.lose(kind, str(error))
