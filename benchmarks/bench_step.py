"""Whole rounds of distillation, by every variant of `step_variants`, as a stage.

ResNet-34 teaches ResNet-18 at 224 x 224, 200 classes, bf16, objective dfkd-fgvc, rounds of 20 generator and 15 student
steps, at batch 64, 128 and 256. Each measurement is a process of its own; the variants take turns, in an order that
rotates from one repeat to the next, so that what drifts on a device (clocks, heat) touches all alike. A row is the
median of its repeats, which stand in it under ``runs``. What rows are set against is measured once a session and stands
at the head of the file: the device's ceilings, and the least work of a round (`step_floor`).

One more row (``kind`` "endurance") is of a thousand rounds on a small configuration (`step_endurance`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.common import Clock, Key, Results, stage_arguments
from dfkd_fast.benchmarks.step_variants import SIZES, VARIANTS, Size
from dfkd_fast.report import environment, source_digest

__all__ = ["KEY", "REPEATS", "TURNS", "VERSION", "kept_runs", "main", "row_of", "todo"]

VERSION = "1"
KEY = ("kind", "variant", "batch")
REPEATS = 3
# What is compiled longest comes last: a session may end in it, and should have measured all others by then.
TURNS = ("peer", "eager", "dfkd_fast", "compile_reduce_overhead", "compile_max_autotune")

_CUTS = 2  # measurements of a row that ran out of most of a session's time, after which all others go first
_LEAST_S = 40.0  # that a measurement is given which has never been made
_CUT = "out of time"
_MEDIANS = (
    *("images_per_s", "round_ms", "generator_step_ms", "student_step_ms", "peak_bytes", "steady_bytes"),
    *("reserved_bytes", "gpu_busy", "kernels_per_step", "kernel_ms", "seconds_to_first_round"),
)


def kept_runs(row: dict[str, Any] | None, since: str | None) -> list[dict[str, Any]]:
    """The measurements of a row that still count.

    None of a row older than ``since``. Measurements of other sources than the present ones stay as they are and are not
    added to.
    """
    if row is None or (since is not None and row["date"] < since):
        return []
    return list(row["runs"]) if _full(row) or row["source"] == source_digest() else []


def _full(row: dict[str, Any]) -> bool:
    return row["status"] != "ok" or len(row["runs"]) >= (1 if row["kind"] == "endurance" else REPEATS)


def todo(size: Size, results: Results, since: str | None) -> list[Key]:
    """The row of each measurement to be made, in their order.

    Batch by batch, and for each all variants once before any a second time, in an order that rotates. A row that twice
    did not fit into a session comes after all others.

    Args:
        size: the experiment.
        results: rows so far; ``cut`` at its head counts measurements that ran out of time.
        since: renew what is older.
    """
    rows = {results.key_of(row): row for row in results.rows}
    cut = results.head.get("cut", {})
    found: list[tuple[tuple[int, ...], Key]] = []

    def want(key: Key, repeats: int, *order: int) -> None:
        row = rows.get(key)
        have = kept_runs(row, since)
        if row is not None and have and _full(row):
            return
        late = cut.get(_name(key), 0) >= _CUTS
        at, place, first = order
        for repeat in range(len(have), repeats):
            turn = (place - repeat - at) % len(TURNS)
            found.append(((late, at, first + repeat, turn), key))

    for at, batch in enumerate(size.batches):
        for place, variant in enumerate(TURNS):
            want(("step", variant, batch), REPEATS, at, place, 0)
    # After the most important batch size.
    want(("endurance", "dfkd_fast", SIZES["small"].batches[0]), 1, 0, 0, REPEATS)
    return [key for _, key in sorted(found, key=lambda pair: pair[0])]


def _name(key: Key) -> str:
    return "/".join(map(str, key))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def row_of(key: Key, runs: Sequence[dict[str, Any]], round_floor_ms: float) -> dict[str, Any]:
    """The row of some measurements of one variant at one batch size.

    The time to the first step is that of a warm cache of torch.compile where one was measured, and ``cache`` says so.

    Args:
        key: its key.
        runs: as `step_variants` writes them, at least one.
        round_floor_ms: least time of a round.
    """
    row: dict[str, Any] = dict(zip(KEY, key, strict=True))
    broken = [run["status"] for run in runs if run["status"] != "ok"]
    sound = [run for run in runs if run["status"] == "ok"]
    for name in _MEDIANS:
        values = [run[name] for run in sound if run.get(name) is not None]
        row[name] = _rounded(statistics.median(values)) if values else None
    row["images_per_s_by_repeat"] = [_rounded(run["images_per_s"]) for run in sound]
    row["round_p10_ms"], row["round_p90_ms"] = (
        _rounded(statistics.median(run[name] for run in sound)) if sound else None
        for name in ("round_p10_ms", "round_p90_ms")
    )
    warm = [run for run in sound if run["cache"] != "cold"]
    first = [run["seconds_to_first_step"] for run in warm or sound]
    cold = [run["seconds_to_first_step"] for run in sound if run["cache"] == "cold"]
    row["seconds_to_first_step"] = _rounded(statistics.median(first)) if first else None
    row["cache"] = (warm or sound)[0]["cache"] if sound else None
    row["cold_seconds_to_first_step"] = _rounded(statistics.median(cold)) if cold else None
    row["floor_ms"] = _rounded(round_floor_ms)
    row["floor_fraction"] = _rounded(round_floor_ms / row["round_ms"]) if sound else None
    row["engine"] = sound[0]["engine"] if sound else None
    row["status"] = broken[0] if broken else "ok"
    row["source"] = source_digest()
    row["runs"] = _rounded(list(runs))
    return row


def _call(module: str, arguments: Sequence[str], limit_s: float) -> tuple[dict[str, Any] | None, str]:
    """What a module of this folder wrote, run in a process of its own; else None, and why."""
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_step_") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"dfkd_fast.benchmarks.{module}", *arguments, "--out", str(out)]
        if module == "step_variants":
            command += ["--started", str(time.time())]
        limit = None if math.isinf(limit_s) else limit_s
        errors = Path(folder) / "errors"
        # Into a file, not a pipe, which the compiler's workers would keep open.
        with errors.open("wb") as file:
            try:
                done = subprocess.run(command, timeout=limit, stderr=file, check=False)
            except subprocess.TimeoutExpired:
                return None, _CUT
        if done.returncode or not out.exists():
            return None, f"exit status {done.returncode}\n{errors.read_text(errors='replace')[-2000:]}"
        return json.loads(out.read_text(encoding="utf-8")), ""


def _head(results: Results, limits: dict[str, Any]) -> None:
    here = environment()
    facts = {name: limits[name] for name in ("copy_gbps", "matmul_tflops")}
    results.facts = facts
    results.head["device"] = {
        "name": here["device"]["name"],
        "driver": here["device"].get("driver"),
        **{what: here[what] for what in ("torch", "triton", "cuda", "commit")},
        **facts,
    }
    results.head["floors"] = limits["floors"]


def _measure(key: Key, options: argparse.Namespace, limit_s: float) -> tuple[dict[str, Any] | None, str]:
    kind, variant, batch = key
    where = ["--device", options.device]
    if kind == "endurance":
        return _call("step_endurance", [*where, "--rounds", str(options.rounds)], limit_s)
    given = [variant, *where, "--size", options.size, "--batch", str(batch)]
    if options.compile_backend:
        given += ["--compile-backend", options.compile_backend]
    return _call("step_variants", given, limit_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, as far as time allows.

    Returns:
        0; 1 where a measurement failed, which the others do not suffer from.
    """
    parser = stage_arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "endurance"], default=None, help="these alone")
    parser.add_argument("--rounds", type=int, default=1000, help="of the endurance row")
    parser.add_argument("--compile-backend", default=None, help="of torch.compile, in place of its variants' modes")
    options = parser.parse_args(arguments)

    clock, size = Clock(options.seconds), SIZES[options.size]
    version = VERSION if options.size == "full" else f"{VERSION}-{options.size}"
    results = Results(options.out, stage="step", version=version, key=KEY)
    wanted = todo(size, results, options.since)
    if options.variants is not None:
        wanted = [key for key in wanted if ("endurance" if key[0] == "endurance" else key[1]) in options.variants]
    failed: set[Key] = set()
    over: set[Key] = set()
    floors: dict[str, Any] = {}
    if wanted:
        limits, why = _call("step_variants", ["limits", "--device", options.device, "--size", options.size], clock.left)
        if limits is None:
            print(f"the device's ceilings could not be measured: {why}", flush=True)
            return 1
        _head(results, limits)
        floors = limits["floors"]
    least = min(_LEAST_S, options.seconds / 4)
    rows = {results.key_of(row): row for row in results.rows}
    runs = {key: kept_runs(rows.get(key), options.since) for key in wanted}
    took = {key: max((run["seconds"] for run in row["runs"]), default=0.0) for key, row in rows.items()}
    for key in wanted:
        if key in failed | over or clock.left < max(least, 1.2 * took.get(key, 0.0)):
            continue
        start, limit = time.monotonic(), clock.left
        found, why = _measure(key, options, limit)
        seconds = time.monotonic() - start
        took[key] = max(took.get(key, 0.0), seconds)
        if found is None:
            print(f"{_name(key)}: {why}", flush=True)
            if why != _CUT:
                failed.add(key)
            elif limit >= options.seconds / 2:
                cut = results.head.setdefault("cut", {})
                cut[_name(key)] = cut.get(_name(key), 0) + 1
            continue
        runs[key].append({**found, "seconds": seconds})
        if key[0] == "endurance":
            row = {**dict(zip(KEY, key, strict=True)), "status": found["status"], "source": source_digest()}
            row |= {"steady": found["steady"], "runs": _rounded(runs[key])}
            said = "steady" if found["steady"] else "not steady"
        else:
            row = row_of(key, runs[key], floors[str(key[2])]["round_ms"])
            said = f"{found['images_per_s']:.0f} images/s" if found["status"] == "ok" else found["status"]
        results.add(row)
        print(f"{_name(key)}, repeat {len(runs[key])}: {said} ({seconds:.0f} s)", flush=True)
        if row["status"] != "ok":  # as it would be the next time
            over.add(key)
    results.finish(complete=not todo(size, results, None))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
