"""Accuracy of the graph engine in bf16 against the eager engine in float32, on the demo's experiments.

Every run distils from the same teacher. Seeds alternate between the engines, so that a shorter table is complete early.

    python -m dfkd_fast.benchmarks.step.accuracy --out accuracy.json
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dfkd_fast import data
from dfkd_fast.benchmarks.ablation import Profile, trained_teacher
from dfkd_fast.benchmarks.results import Key, Results, parser
from dfkd_fast.config import DemoConfig, EngineName, Precision, find, read
from dfkd_fast.demo import objective_of
from dfkd_fast.engine import NonFiniteError, distill
from dfkd_fast.models import create_model, extract
from dfkd_fast.report import markdown_table

__all__ = ["ENGINES", "KEY", "accuracy_section", "main", "run"]

KEY = ("experiment", "objective", "engine", "seed")
ENGINES: dict[EngineName, Precision] = {"eager": "fp32", "graph": "bf16"}
SEEDS = (0, 1, 2)


def run(config: DemoConfig, key: Key, device: str, *, folder: Path | None = None) -> dict[str, Any]:
    """Distil once. On a CPU, which has no graphs, the default engine runs. ``folder`` holds trained teachers.

    Returns:
        The row. After a non-finite loss, accuracy is None and ``error`` says why.
    """
    _, preset, engine, seed = key
    images = data.load(config.data)
    profile = Profile(data=config.data, teacher=config.teacher, student=config.student, teach=config.teach)
    weights, teacher_accuracy = trained_teacher(profile, device, folder)
    torch.manual_seed(seed)
    teacher, student = (
        extract(create_model(model, num_classes=images.num_classes), stages=model.stages, image_size=images.image_size)
        for model in (replace(config.teacher, weights=str(weights)), config.student)
    )
    row = {**dict(zip(KEY, key, strict=True)), "precision": ENGINES[engine], "teacher_accuracy": teacher_accuracy}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_accuracy_") as out:
        changed = replace(
            config.distill,
            objective=objective_of(config, preset),
            seed=seed,
            device=device,
            out=out,
            engine=engine if device == "cuda" else "auto",
            precision=ENGINES[engine],
        )
        try:
            result = distill(teacher, student, changed, data=images, progress=False)
        except NonFiniteError as error:
            row |= {"accuracy": None, "agreement": None, "error": str(error)}
        else:
            row |= {"accuracy": result.accuracy, "agreement": result.agreement}
    return {**row, "seconds": time.perf_counter() - start}


def accuracy_section(content: dict[str, Any], folder: str) -> str:
    """One device's table for docs/performance.md: mean and range over seeds of each engine."""
    table = []
    rows = content["rows"]
    for experiment, objective in dict.fromkeys((row["experiment"], row["objective"]) for row in rows):
        line: dict[str, Any] = {"data": experiment, "objective": objective}
        for engine, precision in ENGINES.items():
            key = (experiment, objective, engine)
            found = [row["accuracy"] for row in rows if tuple(row[name] for name in KEY[:3]) == key]
            values = [value for value in found if value is not None]
            text = (
                f"{statistics.fmean(values):.1%} ({min(values):.1%} to {max(values):.1%}, n = {len(values)})"
                if values
                else ""
            )
            line[f"{engine}, {precision}"] = text
        table.append(line)
    return "\n".join([f"### {folder}", "", *markdown_table(table)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Distil with every seed and engine, as far as time allows."""
    command = parser(__doc__, small="one round")
    command.add_argument("--seconds", type=float, default=math.inf, help="start no run after this")
    command.add_argument("--experiments", nargs="+", default=["digits", "rendered"])
    options = command.parse_args(arguments)

    start, results = time.monotonic(), Results(options.out, key=KEY)
    for seed in SEEDS:
        for experiment in options.experiments:
            config = read(DemoConfig, find(f"demo_{experiment}"))
            if options.size == "small":
                loop = replace(config.distill.loop, epochs=1, rounds_per_epoch=1)
                teach = replace(config.teach, epochs=1)
                config = replace(config, distill=replace(config.distill, loop=loop), teach=teach)
            for key in [(experiment, preset, engine, seed) for preset in config.presets for engine in ENGINES]:
                if time.monotonic() - start > options.seconds:
                    return 0
                row = run(config, key, options.device)
                results.add(row)
                top1 = "not finite" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
                print(f"{' '.join(map(str, key))}: {top1} ({row['seconds']:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
