"""The effect of the method's components and open choices (docs/ablation.md), and the accuracy of the engines.

Runs a packaged sweep and copies its rows to a result file. The next start continues it.

    python -m dfkd_fast.benchmarks.ablation --out FILE --device cpu --size small
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.results import commits, parser
from dfkd_fast.report import markdown_table, source_digest
from dfkd_fast.sweep import SweepConfig, read_sweep, sweep, sweep_table

_SHORT = {  # to test the command
    "data.train_per_class": 20,
    "data.test_per_class": 2,
    "teach.epochs": 1,
    "distill.loop.epochs": 1,
    "distill.loop.rounds_per_epoch": 1,
}

__all__ = ["ablation_section", "main"]


def ablation_section(content: dict[str, Any], folder: str) -> str:
    """Return one device's table, with mean, standard deviation and paired differences over seeds."""
    rows, config = content["rows"], SweepConfig(**content["sweep"])
    overrides = {row["cell"]: row["overrides"] for row in rows}
    table = []
    for line in sweep_table(config, rows):
        changes = overrides.get(line.get("cell", ""), {}).items()
        changed = {"changed": ", ".join(f"`{path}={value}`" for path, value in changes)} if "cell" in line else {}
        first, *others = line.items()
        table.append(dict([first, *changed.items(), *others]))
    done = [row for row in rows if row["status"] == "done"]
    teachers = ", ".join(f"{value:.1%}" for value in sorted({row["teacher_accuracy"] for row in done}))
    rounds = ", ".join(map(str, sorted({row["rounds"] for row in done})))
    blocks = content["environments"]
    devices = "; ".join(sorted({f"{block['device']['name']}, torch {block['torch']}" for block in blocks}))
    note = f"Mean ± standard deviation over n seeds. Teacher: {teachers}; rounds: {rounds}; measured on: {devices}; "
    return "\n".join([f"### {folder}", "", *markdown_table(table), "", f"{note}commit: {commits(blocks)}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that have no result yet."""
    command = parser(__doc__, small="smaller networks and images")
    command.add_argument("--seconds", type=float, default=math.inf, help="stop after this")
    command.add_argument("--jobs", type=int, default=None, help="processes (default: one per core, on a GPU at most 6)")
    command.add_argument("--engines", action="store_true", help="compare the engines instead of the cells")
    command.add_argument("--seeds", nargs="+", type=int, help="random seeds")
    options = command.parse_args(arguments)
    name = "engines" if options.engines else f"ablation_{'small' if options.size == 'small' else 'large'}"
    config = read_sweep(name)
    config = config if options.seeds is None else replace(config, seeds=options.seeds)
    # A single run leaves most of a GPU idle at this image size.
    workers = options.jobs or min(len(os.sched_getaffinity(0)), 6 if options.device == "cuda" else 64)
    devices: dict[str, Any] = {"distill.device": options.device, "teach.device": options.device}
    if options.device == "cpu":
        devices["distill.engine"] = "auto"
    if options.engines and options.size == "small":
        devices |= _SHORT
    size = options.size if options.engines else ""
    folder = f"{name}{size}_{options.device}_{source_digest()}"  # rows of other sources are not reused
    runs = Path(tempfile.gettempdir()) / f"dfkd_fast_{os.getuid()}" / folder
    runs.mkdir(parents=True, exist_ok=True)
    results, start = runs / "results.json", time.time_ns()
    try:
        sweep(config, str(runs), changes=devices, jobs=workers, minutes=options.seconds / 60)
    finally:
        if results.exists() and results.stat().st_mtime_ns >= start:  # also if it was interrupted
            options.out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
