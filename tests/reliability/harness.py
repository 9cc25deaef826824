"""Runs the cases of a target until its time is over, counts their outcomes and writes them to a result file.

A case is one injected fault or one fuzzed input. Its random numbers depend only on the seed and its index, so a failed
case can be repeated: ``python -m tests.reliability TARGET --seed SEED --case INDEX``.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_fast.benchmarks.results import Results

__all__ = ["TARGETS", "Tally", "run_target"]

TARGETS = ("kill", "faults", "corruption", "fuzz_files", "fuzz_ops", "numerics", "injection", "soak")
"""Modules of this package. Each has ``run(tally)``, which runs cases until ``tally.cases()`` ends."""

LOST = "lost"
"""The outcome of a case in which data was lost or silently wrong, or the process crashed or hung."""


class Tally:
    """Counts the outcomes of a target's cases, by kind of fault.

    Args:
        target: name of the target.
        seconds: time for the target.
        seed: seed of all cases.
        folder: an empty folder for the files of the cases.
        case: run only the case with this index.
    """

    def __init__(self, target: str, *, seconds: float, seed: int, folder: Path, case: int | None = None) -> None:
        self.target, self.seconds, self.seed, self.folder, self.only = target, seconds, seed, folder, case
        self.index = 0
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: dict[str, list[str]] = defaultdict(list)
        self.facts: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self._start = time.monotonic()

    def left(self, share: float = 1.0) -> float:
        """Return the seconds until this share of the time is over; negative afterwards."""
        return share * self.seconds - (time.monotonic() - self._start)

    def cases(self, share: float = 1.0) -> Iterator[np.random.Generator]:
        """Yield the random numbers of one case after the other, at least of one, until a share of the time is over.

        Call it repeatedly with increasing shares to divide the time between parts of a target.
        """
        first = True
        while self.only is None and (first or self.left(share) > 0):
            first = False
            yield np.random.default_rng([self.seed, self.index])
            self.index += 1
        if self.only is not None and share == 1.0:
            self.index = self.only
            yield np.random.default_rng([self.seed, self.only])

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
        """Count the outcome that ``case`` returns in a forked process. An exception, a crash or a hang is a loss."""
        receive, send = multiprocessing.Pipe(duplex=False)

        def child() -> None:
            try:
                send.send((case(), None))
            except BaseException:
                send.send((LOST, traceback.format_exc()))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        send.close()
        try:
            outcome, reason = receive.recv() if receive.poll(seconds) else (LOST, f"hung for {seconds:.0f} s")
        except EOFError:
            process.join()
            outcome, reason = LOST, f"crashed with exit status {process.exitcode}"
        finally:
            process.kill()
            process.join()
            receive.close()
        if reason is None:
            self.count(kind, outcome)
        else:
            self.lose(kind, reason)

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


def run_target(
    target: str, *, seconds: float, seed: int, folder: Path, case: int | None = None, out: Path | None = None
) -> Tally:
    """Run one target and add its rows to the result file ``out``. An error of the target is a lost case."""
    tally = Tally(target, seconds=seconds, seed=seed, folder=folder, case=case)
    try:
        importlib.import_module(f".{target}", __package__).run(tally)
    except Exception:
        tally.lose("harness", traceback.format_exc())
    if out is not None and case is None:
        results = Results(out, key=("target", "kind"))
        for row in tally.rows():
            results.add(row)
    return tally
