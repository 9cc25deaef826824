"""What every benchmark shares: result files that grow row by row, a timer, and the bytes that leave the cache cold."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.report import environment, read_results, timestamp, write_results

__all__ = ["Clock", "Results", "Timing", "input_sets", "stage_arguments", "time_calls"]

Key = tuple[Any, ...]


def stage_arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that the queue hands to every stage (benchmarks/gpu.py)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result file, gone on with where it holds rows")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would not end within this")
    parser.add_argument("--since", default=None, help="measure rows again that are older than this time stamp")
    return parser


class Clock:
    """Time left of a stage's seconds, and whether another piece of work fits into it."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._longest = 0.0

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def took(self, seconds: float) -> None:
        """A piece of work took this long; the next may too."""
        self._longest = max(self._longest, seconds)

    def fits(self) -> bool:
        """Whether a piece of work as long as the longest so far would end in time."""
        return self.left > max(1.2 * self._longest, 0.0)


class Results:
    """The rows of one stage, on disk after each.

    A file holds ``stage``, ``version``, ``complete``, the ``environments`` that its rows were measured in, and
    ``rows``; a row has its key's fields, what was measured, ``date`` and ``environment``, an index. Rows of another
    version of the stage are dropped on opening: what they measured is no longer what the stage measures. ``head`` is
    what else the file says, before these.

    Args:
        path: the file.
        stage: its stage.
        version: of what the stage measures.
        key: names of the fields that tell one row from another.
        facts: what this run knows of its environment beyond :func:`dfkd_fast.report.environment`.
        keep: which rows of another version still hold; None for none.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        version: str,
        key: Sequence[str],
        facts: dict[str, Any] | None = None,
        keep: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        self.path, self.stage, self.version, self.key = path, stage, version, tuple(key)
        self.facts = facts or {}
        content = read_results(path)
        if content is None or (content.get("version") != version and keep is None):
            content = {"environments": [], "rows": [], "complete": False}
        elif content.get("version") != version and keep is not None:
            content = {**content, "rows": [row for row in content["rows"] if keep(row)], "complete": False}
        own = {"stage", "version", "complete", "environments", "rows"}
        self.head = {name: value for name, value in content.items() if name not in own}
        self.rows: list[dict[str, Any]] = content["rows"]
        self.environments: list[dict[str, Any]] = content["environments"]
        self.complete: bool = content["complete"]
        self._environment: int | None = None

    def key_of(self, row: dict[str, Any]) -> Key:
        return tuple(row[name] for name in self.key)

    def todo(self, keys: Iterable[Key], since: str | None = None) -> list[Key]:
        """Those keys without a row, in their order; then those whose row is older than ``since``, the oldest first."""
        dates = {self.key_of(row): row["date"] for row in self.rows}
        keys = list(keys)
        missing = [key for key in keys if key not in dates]
        old = [key for key in keys if since is not None and dates.get(key, since) < since]
        return missing + sorted(old, key=lambda key: dates[key])

    def add(self, row: dict[str, Any]) -> None:
        """Put a row in, over one with the same key, and write the file."""
        if self._environment is None:
            self._environment = self._here()
        key = self.key_of(row)
        self.rows = [other for other in self.rows if self.key_of(other) != key]
        self.rows.append({**row, "date": timestamp(), "environment": self._environment})
        self.write()

    def finish(self, *, complete: bool) -> None:
        """Say whether every row is there, and write the file."""
        self.complete = complete
        self.write()

    def write(self) -> None:
        write_results(
            self.path,
            {
                **self.head,
                "stage": self.stage,
                "version": self.version,
                "complete": self.complete,
                "environments": self.environments,
                "rows": self.rows,
            },
        )

    def _here(self) -> int:
        """Index of this machine's block, which is added where no known one equals it in all but its date."""
        here = {**environment(), **self.facts}
        for index, known in enumerate(self.environments):
            if {**known, "date": None} == {**here, "date": None}:
                return index
        self.environments.append(here)
        return len(self.environments) - 1


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds a call: the median of ``calls`` calls, and the tenth and ninetieth percentiles."""

    ms: float
    p10: float
    p90: float
    calls: int

    def row(self) -> dict[str, float]:
        times = {name: float(f"{getattr(self, name):.5g}") for name in ("ms", "p10", "p90")}
        return {**times, "calls": self.calls}


def input_sets(bytes_per_set: float, device: torch.device) -> int:
    """How many sets of inputs to rotate through so that none is still in the last-level cache when its turn comes."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, math.ceil(2 * cache / max(bytes_per_set, 1))))


def time_calls(
    call: Callable[[int], object], device: torch.device, *, seconds: float = 0.4, least: int = 10, most: int = 200
) -> Timing:
    """Time ``call(0)``, ``call(1)``, ...; the call picks its inputs by its number.

    CUDA events around each call, all queued before the first is read; on the CPU the host's clock. Three calls warm up.

    Args:
        call: the work.
        device: where it runs.
        seconds: about how long to go on.
        least: calls at the least.
        most: calls at the most.
    """
    for number in range(3):
        call(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for number in range(3):
        call(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    calls = round(min(most, max(least, 3 * seconds / max(time.perf_counter() - start, 1e-9))))
    if device.type == "cuda":
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for number, (before, after) in enumerate(events):
            before.record()
            call(number)
            after.record()
        torch.cuda.synchronize(device)
        times = [before.elapsed_time(after) for before, after in events]
    else:
        times = []
        for number in range(calls):
            start = time.perf_counter()
            call(number)
            times.append(1e3 * (time.perf_counter() - start))
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(ms=statistics.median(times), p10=deciles[0], p90=deciles[-1], calls=calls)
