"""Runs the cases of a target until its time is over, counts their outcomes and writes them to a result file.

A case is one injected fault or one fuzzed input. Its random numbers depend only on the seed and its index, so a failed
case can be repeated: ``python -m tests.reliability TARGET --seed SEED --case INDEX``.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dfkd_fast import cli

__all__ = ["LOST", "TARGETS", "Lost", "Tally", "command", "digest", "empty", "forked", "snapshot"]

TARGETS = ("kill", "faults", "corruption", "fuzz_files", "fuzz_ops", "numerics", "injection", "soak")
"""Modules of this package. Each has ``run(tally)``, which runs cases until ``tally.cases()`` ends."""

LOST = "lost"
"""The outcome of a case in which data was lost or silently wrong, or the process crashed or hung."""

# Functions that read files by their suffix, and raise an exception if a file is damaged.
CONTENTS: dict[str, Callable[[Path], Any]] = {
    ".pt": lambda path: digest(torch.load(path, weights_only=True)),
    ".safetensors": lambda path: safetensors.torch.load_file(path) and path.read_bytes(),
    ".json": lambda path: json.loads(path.read_bytes()),
}

Kind = TypeVar("Kind")


class Lost(Exception):
    """A forked process failed, crashed or hung."""


def forked(work: Callable[[Callable[[Any], None]], object], *, seconds: float) -> Iterator[Any]:
    """Yield what ``work`` sends from a forked process. Raises Lost if it fails, or sends nothing for some seconds."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        try:
            work(lambda value: send.send((value, None)))
            send.send((None, "end"))
        except BaseException:
            send.send((None, traceback.format_exc()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    send.close()
    reason = None
    try:
        while reason is None:
            value, reason = receive.recv() if receive.poll(seconds) else (None, f"hung for {seconds:.0f} s")
            if reason is None:
                yield value
    except EOFError:
        process.join()
        reason = f"crashed with exit status {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receive.close()
    if reason != "end":
        raise Lost(reason)


def empty(folder: Path) -> Path:
    """Create a folder in place of an old one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def command(arguments: Sequence[str]) -> str:
    """Run a command and return its output. Raises ValueError with the error that it prints."""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        try:
            cli.main(arguments)
        except SystemExit as end:
            if end.code == 2 and not isinstance(end.__cause__, RecursionError | UnicodeError):
                raise ValueError(errors.getvalue().strip()) from end.__cause__
            if end.code:
                raise
    return output.getvalue()


def digest(value: Any) -> str:
    """A text that depends on all loaded values, and on all bytes of all tensors."""

    def content(t: Tensor) -> tuple[Any, ...]:
        exact = t.float() if t.dtype == torch.bfloat16 else t  # NumPy has no bfloat16
        return t.dtype, t.shape, exact.contiguous().numpy().tobytes()

    return hashlib.sha256(repr(tree_map_only(Tensor, content, value)).encode()).hexdigest()


def snapshot(folder: Path) -> dict[str, Any]:
    """The contents of the files of a folder, without the TensorBoard log. Raises an exception if one is damaged."""
    paths = [path for path in folder.rglob("[!.]*") if path.is_file() and path.parent.name != "tensorboard"]
    return {str(path.relative_to(folder)): CONTENTS.get(path.suffix, Path.read_bytes)(path) for path in paths}


class Tally:
    """Counts the outcomes of a target's cases, by kind of fault. ``case`` is the index of the only case to run."""

    def __init__(self, target: str, *, seconds: float, seed: int, folder: Path, case: int | None = None) -> None:
        self.target, self.seconds, self.seed, self.folder, self.only = target, seconds, seed, folder, case
        self.index = 0
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: dict[str, list[str]] = defaultdict(list)
        self.facts: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self._start = time.monotonic()

    def left(self) -> float:
        """Return the seconds until the time is over; negative afterwards."""
        return self.seconds - (time.monotonic() - self._start)

    def cases(self) -> Iterator[np.random.Generator]:
        """Yield the random numbers of one case after the other, at least of one, until the time is over."""
        self.index = self.only or 0
        yield np.random.default_rng([self.seed, self.index])
        while self.only is None and self.left() > 0:
            self.index += 1
            yield np.random.default_rng([self.seed, self.index])

    def turns(self, kinds: Sequence[Kind]) -> Iterator[tuple[Kind, np.random.Generator]]:
        """Yield the kinds in turn, from one that depends on the seed, each with the random numbers of a case."""
        for rng in self.cases():
            yield kinds[(self.seed + self.index) % len(kinds)], rng

    def count(self, kind: str, outcome: str, *, times: int = 1) -> None:
        """Count cases that ended well. ``outcome`` says how, for example ``refused with a reason``."""
        self.outcomes[kind][outcome] += times

    def lose(self, kind: str, reason: str) -> None:
        """Count a case that ended badly. ``reason`` is printed with the command that repeats it."""
        self.outcomes[kind][LOST] += 1
        command = f"python -m tests.reliability {self.target} --seed {self.seed} --case {self.index}"
        self.failures[kind].append(f"{reason}\n  repeat: {command}")
        print(f"{self.target}: {kind}: LOST: {self.failures[kind][-1]}", flush=True)

    def judge(self, kind: str, case: Callable[[], str], *, seconds: float = 60.0) -> None:
        """Count the outcome that ``case`` returns in a forked process, in an empty folder, or a loss if it fails."""
        os.chdir(empty(self.folder / "case"))
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            for outcome in forked(lambda send: send(case()), seconds=seconds):
                self.count(kind, outcome)
        except Lost as error:
            self.lose(kind, str(error))

    def skip(self, kind: str, reason: str) -> None:
        """Note a kind of fault that this machine cannot inject."""
        self.skipped[kind] = reason

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per kind for the result file."""
        common = {"target": self.target, "seed": self.seed, "seconds": time.monotonic() - self._start}
        rows: list[dict[str, Any]] = [
            {**common, "kind": kind, "cases": outcomes.total(), "outcomes": dict(outcomes), LOST: outcomes[LOST]}
            for kind, outcomes in self.outcomes.items()
        ]
        rows += [{**common, "kind": kind, "cases": 0, "skipped": reason} for kind, reason in self.skipped.items()]
        for row in rows:
            row.update(self.facts.get(row["kind"], {}))
        return rows
