"""Does the fast engine teach as well? The demo's table on graphs in bf16 beside the eager engine in float32: a stage.

Each experiment of the demo (configs/demo_*.yaml) is distilled with every seed by either engine, from one and the same
teacher for all. The engines agree on an experiment and objective where the difference of their mean accuracies is
within the spread of the eager engine's seeds: its largest accuracy less its least.
"""

from __future__ import annotations

import functools
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
from dfkd_fast.benchmarks.common import Clock, Key, Results, stage_arguments
from dfkd_fast.config import DemoConfig, EngineName, Precision, find, read
from dfkd_fast.demo import objective_of
from dfkd_fast.engine import NonFiniteError, distill
from dfkd_fast.models import create_model, extract

__all__ = ["ENGINES", "EXPERIMENTS", "KEY", "SEEDS", "VERSION", "keys", "main", "run", "verdicts"]

VERSION = "1"
KEY = ("experiment", "objective", "engine", "seed")
EXPERIMENTS = ("digits", "rendered")
ENGINES: dict[EngineName, Precision] = {"eager": "fp32", "graph": "bf16"}
SEEDS = (0, 1, 2)


@functools.cache
def _config(experiment: str) -> DemoConfig:
    return read(DemoConfig, find(f"demo_{experiment}"))


def keys(experiments: Sequence[str] = EXPERIMENTS) -> list[Key]:
    """Every row's key: seeds go round engines and experiments, so that a smaller table is there early."""
    return [
        (experiment, preset, engine, seed)
        for seed in SEEDS
        for experiment in experiments
        for preset in _config(experiment).presets
        for engine in ENGINES
    ]


def run(config: DemoConfig, key: Key, device: str, *, kept: Path | None = None) -> dict[str, Any]:
    """Distil once.

    Args:
        config: the experiment.
        key: as :data:`KEY` names its parts.
        device: where to run. On a CPU there are no graphs, and what runs for them is the engine that there is.
        kept: folder of trained teachers; None is one in the machine's folder for temporary files.

    Returns:
        The row. A run whose losses did not stay finite has accuracy None and says so under ``error``.
    """
    _, preset, engine, seed = key
    images = data.load(config.data)
    profile = Profile(data=config.data, teacher=config.teacher, student=config.student, teach=config.teach)
    weights, teacher_accuracy = trained_teacher(profile, device, kept)
    torch.manual_seed(seed)
    teacher, student = (
        extract(create_model(model, num_classes=images.num_classes), stages=model.stages, image_size=images.image_size)
        for model in (replace(config.teacher, weights=str(weights)), config.student)
    )
    row = {**dict(zip(KEY, key, strict=True)), "precision": ENGINES[engine], "teacher_accuracy": teacher_accuracy}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_accuracy_") as folder:
        changed = replace(
            config.distill,
            objective=objective_of(config, preset),
            seed=seed,
            device=device,
            out=folder,
            engine=engine if device == "cuda" else "auto",
            precision=ENGINES[engine],
        )
        try:
            result = distill(teacher, student, changed, data=images, progress=False)
        except NonFiniteError as error:
            row |= {"accuracy": None, "agreement": None, "error": str(error)}
        else:
            row |= {"accuracy": result.accuracy, "agreement": result.agreement}
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the rows say of each experiment and objective of which both engines have been measured.

    Returns:
        For each: the means, the spread of the eager engine's seeds, the difference of the means (graph less eager), how
        many seeds each has, and whether they are ``equal``: False too where a run did not stay finite.
    """
    found = []
    for experiment, objective in dict.fromkeys((row["experiment"], row["objective"]) for row in rows):
        here = [row for row in rows if (row["experiment"], row["objective"]) == (experiment, objective)]
        values = {engine: [row["accuracy"] for row in here if row["engine"] == engine] for engine in ENGINES}
        if not all(values.values()):
            continue
        verdict: dict[str, Any] = {"experiment": experiment, "objective": objective}
        verdict["seeds"] = {engine: len(each) for engine, each in values.items()}
        if any(value is None for each in values.values() for value in each):
            found.append({**verdict, "equal": False})
            continue
        means = {engine: statistics.fmean(each) for engine, each in values.items()}
        spread, difference = max(values["eager"]) - min(values["eager"]), means["graph"] - means["eager"]
        verdict |= {"eager": means["eager"], "graph": means["graph"], "spread": spread, "difference": difference}
        found.append({**verdict, "equal": abs(difference) <= spread})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no row yet, as far as time allows."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    options = parser.parse_args(arguments)

    clock = Clock(options.seconds)
    results = Results(options.out, stage="accuracy", version=VERSION, key=KEY)
    for key in results.todo(keys(options.experiments), options.since):
        if not clock.fits():
            break
        start = time.monotonic()
        row = run(_config(key[0]), key, options.device)
        clock.took(time.monotonic() - start)
        results.head["verdicts"] = verdicts([*(r for r in results.rows if results.key_of(r) != key), row])
        results.add(row)
        top1 = "not finite" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        print(f"{' '.join(map(str, key))}: {top1} ({row['seconds']:.0f} s)", flush=True)
    complete = not results.todo(keys())
    results.head["verdicts"] = verdicts(results.rows)
    results.finish(complete=complete)
    return 0


if __name__ == "__main__":
    sys.exit(main())
