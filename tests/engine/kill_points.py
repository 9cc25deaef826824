"""Points of a run at which a process sends signals to itself."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from dfkd_fast import files
from dfkd_fast.data.loading import Loader
from dfkd_fast.engine import DistillState, engines, loop, trackers, training

__all__ = ["POINTS", "install", "passed"]


class _LogFile(io.FileIO):
    """The file of a TensorBoard log, whose writes can be replaced."""

    def write(self, data: Any) -> int:
        return super().write(data)


SYSTEM_CALLS = tuple((os, name) for name in ("fsync", "open", "replace", "unlink", "mkdir", "pwrite", "ftruncate"))
POINTS: dict[str, tuple[str, tuple[tuple[Any, str], ...]]] = {
    "after a system call": ("after", SYSTEM_CALLS),
    "inside a write": ("inside", ((files._RecordingFile, "write"),)),
    "inside a write of the TensorBoard log": ("inside", ((_LogFile, "write"),)),
    "in a step": (
        "before",
        (
            *((engines, "generator_step"), (engines, "student_step"), (training._Trainer, "_train")),
            *((loop, "evaluate"), (training, "evaluate")),
        ),
    ),
    "while a checkpoint is read": (
        "after",
        ((torch, "load"), (DistillState, "load_state_dict"), (Loader, "set_state")),
    ),
}
passed = multiprocessing.RawArray("i", len(POINTS))  # points that a process has passed, by kind


def install(kind: int, at: dict[int, int]) -> None:
    """Make this process send itself the signals ``at[n]`` at its n-th point of a kind."""
    when, places = list(POINTS.values())[kind]
    trackers.RecordWriter = lambda file: RecordWriter(io.BufferedWriter(_LogFile(file.name, "wb")))  # type: ignore

    def reach() -> None:
        passed[kind] += 1
        if passed[kind] in at:
            os.kill(os.getpid(), at[passed[kind]])

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if when == "inside" and at.get(passed[kind] + 1) == signal.SIGKILL:  # write half of the bytes
                original(*arguments[:-1], bytes(arguments[-1])[: len(arguments[-1]) // 2])
            result = original(*arguments, **options) if when == "after" else None
            reach()
            return result if when == "after" else original(*arguments, **options)

        return call

    for owner, name in places:
        setattr(owner, name, patched(getattr(owner, name)))
