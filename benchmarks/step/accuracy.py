"""Accuracy of the graph engine in bf16 against the eager engine in float32, on the demo's experiments.

All runs distil from the same teacher. Seeds alternate between the engines, so a shorter table is complete early.

    python -m dfkd_fast.benchmarks.step.accuracy --out accuracy.json
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dfkd_fast.benchmarks.ablation import SEEDS, run, show
from dfkd_fast.benchmarks.results import Results, parser
from dfkd_fast.config import DemoConfig, EngineName, Precision, find, read
from dfkd_fast.demo import objective_of
from dfkd_fast.report import markdown_table

__all__ = ["ENGINES", "KEY", "accuracy_section", "main"]

KEY = ("experiment", "objective", "engine", "seed")
ENGINES: dict[EngineName, Precision] = {"eager": "fp32", "graph": "bf16"}


def accuracy_section(content: dict[str, Any], folder: str) -> str:
    """One device's table for docs/performance.md: mean and range over seeds by engine."""
    table = []
    rows = content["rows"]
    for experiment, objective in dict.fromkeys((row["experiment"], row["objective"]) for row in rows):
        line = {"data": experiment, "objective": objective}
        for engine, precision in ENGINES.items():
            key = (experiment, objective, engine)
            found = [row["accuracy"] for row in rows if tuple(row[name] for name in KEY[:3]) == key]
            if values := [value for value in found if value is not None]:
                spread = f"{min(values):.1%} to {max(values):.1%}, n = {len(values)}"
                line[f"{engine}, {precision}"] = f"{statistics.fmean(values):.1%} ({spread})"
            else:
                line[f"{engine}, {precision}"] = ""
        table.append(line)
    return "\n".join([f"### {folder}", "", *markdown_table(table)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Distil with every seed and engine, as far as time allows. A CPU runs its default engine instead of ``graph``."""
    command = parser(__doc__, small="one round")
    command.add_argument("--seconds", type=float, default=math.inf, help="start no run after this")
    command.add_argument("--experiments", nargs="+", default=["digits", "rendered"])
    options = command.parse_args(arguments)

    end, results = time.monotonic() + options.seconds, Results(options.out, key=KEY)
    configs = {name: read(DemoConfig, find(f"demo_{name}")) for name in options.experiments}
    keys = [
        (experiment, preset, engine, seed)
        for seed in SEEDS
        for experiment, config in configs.items()
        for preset in config.presets
        for engine in ENGINES
    ]
    for key in keys:
        if time.monotonic() > end:
            break
        experiment, preset, engine, seed = key
        config, precision = configs[experiment], ENGINES[engine]
        changes: dict[str, Any] = {"objective": objective_of(config, preset), "precision": precision}
        changes["engine"] = engine if options.device == "cuda" else "auto"
        if options.size == "small":
            config = replace(config, teach=replace(config.teach, epochs=1))
            changes |= {"loop.epochs": 1, "loop.rounds_per_epoch": 1}
        row = run(config, changes, seed, options.device)
        results.add({**dict(zip(KEY, key, strict=True)), "precision": precision, **row})
        show(" ".join(map(str, key)), row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
