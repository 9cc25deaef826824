"""The effect of the method's components and open choices (docs/ablation.md), and the accuracy of the engines.

Each cell is the method with one choice changed, distilled with every seed from the same teacher. The teacher never saw
the held-out images. Cells run in the order of their seeds, so a table with fewer seeds is complete early.
Several cells run at the same time, each in its own process, because a single cell leaves most of a GPU idle at this
image size. With ``--engines``, the cells compare the graph engine in bf16 with the eager engine in float32 instead.

    python -m dfkd_fast.benchmarks.ablation --out FILE --device cpu --size small
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from dfkd_fast import data
from dfkd_fast.benchmarks.results import Results, commits, parser
from dfkd_fast.config import DemoConfig, find, read, to_dict
from dfkd_fast.engine import NonFiniteError, distill, teach
from dfkd_fast.files import write_file
from dfkd_fast.jobs import Job, run_jobs
from dfkd_fast.models import create_model, extract
from dfkd_fast.report import markdown_table

__all__ = [
    "CELLS",
    "ablation_section",
    "engine_cells",
    "experiment",
    "main",
    "mean_and_deviation",
    "override",
    "run_cell",
    "top1_text",
    "trained_teacher",
]

SEEDS = (0, 1, 2)

Overrides = Mapping[str, Any]

CELLS: Mapping[str, Overrides] = yaml.safe_load(Path(__file__).with_name("ablation_cells.yaml").read_text("utf-8"))
"""Changes of the method's configuration by cell."""


def experiment(name: str) -> DemoConfig:
    """Return the configuration of an experiment.

    "full" and "small" are ``ablation_full.yaml`` and ``ablation_small.yaml``. "digits" and "rendered" are the demo's
    experiments. "tiny" is "digits" with one epoch for the teacher and one round.
    """
    if name in ("full", "small"):
        return read(DemoConfig, Path(__file__).with_name(f"ablation_{name}.yaml"))
    tiny: Overrides = {"teach.epochs": 1, "distill.loop.epochs": 1, "distill.loop.rounds_per_epoch": 1}
    demo = "digits" if name == "tiny" else name
    return override(read(DemoConfig, find(f"demo_{demo}")), tiny if name == "tiny" else {})


def engine_cells(experiments: Sequence[str]) -> dict[str, tuple[str, Overrides]]:
    """Return the cells of ``--engines``: for each name, the experiment and the overrides."""
    cells: dict[str, tuple[str, Overrides]] = {}
    for name in experiments:
        config = experiment(name)
        for preset in config.presets:
            changes: Overrides = {"objective.preset": preset, "objective.student": {}}
            changes = {} if preset == config.distill.objective.preset else changes
            for engine, precision in (("eager", "fp32"), ("graph", "bf16")):
                more = {"engine": engine, "precision": precision}
                cells[f"{name}, {preset}, {engine} {precision}"] = name, {**changes, **more}
    return cells


def override(config: Any, changes: Overrides) -> Any:
    """Return a config with some fields changed, given by dotted paths. The last name may be a key of a dict field.

    Raises:
        ValueError: the config has no such field.
    """
    for path, value in changes.items():
        try:
            config = _replaced(config, path.split("."), value)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not a field of the config: {error}") from error
    return config


def _replaced(config: Any, names: Sequence[str], value: Any) -> Any:
    name, *rest = names
    if isinstance(config, dict):
        return {**config, name: value}
    return replace(config, **{name: _replaced(getattr(config, name), rest, value) if rest else value})


def trained_teacher(config: DemoConfig, device: str) -> tuple[Path, float]:
    """Return a teacher's weights file and accuracy. The first call trains it and keeps both in a temporary folder."""
    parts = [to_dict(part) for part in (config.data, config.teacher, config.teach)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    kept = Path(tempfile.gettempdir()) / f"dfkd_fast_ablation_{os.getuid()}" / digest
    weights, note = kept / "teacher.safetensors", kept / "accuracy.json"
    if not note.exists():
        images = data.load(config.data)
        model = create_model(config.teacher, num_classes=images.num_classes)
        result = teach(model, images, replace(config.teach, device=device, out=str(kept), resume=True), progress=False)
        if result.weights != weights:
            result.weights.replace(weights)
        write_file(note, json.dumps(result.accuracy).encode())
    return weights, json.loads(note.read_text())


def run_cell(
    job: tuple[str, str, Overrides, int], *, device: str, end: float, progress: Any = False
) -> dict[str, Any] | None:
    """Run one job, a tuple (cell, experiment, overrides, seed). A CPU uses its default engine instead of the cell's.

    Returns:
        The row. If ``time.time()`` is past ``end``, nothing is run, and the result is None. After a non-finite loss,
        ``accuracy`` is None and ``error`` has the message.
    """
    cell, name, overrides, seed = job
    if time.time() > end:
        return None
    config = experiment(name)
    images = data.load(config.data)
    weights, teacher_accuracy = trained_teacher(config, device)
    torch.manual_seed(seed)
    teacher, student = (
        extract(create_model(model, num_classes=images.num_classes), stages=model.stages, image_size=images.image_size)
        for model in (replace(config.teacher, weights=str(weights)), config.student)
    )
    loop = config.distill.loop
    row: dict[str, Any] = {"cell": cell, "seed": seed, "overrides": dict(overrides)}
    row |= {"accuracy": None, "agreement": None, "images_per_s": None, "teacher_accuracy": teacher_accuracy}
    row["rounds"] = loop.epochs * loop.rounds_per_epoch
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_cell_") as out:
        changes = {**overrides, "seed": seed, "device": device, "out": out}
        changes |= {"loop.evaluate_every": 0, "loop.checkpoint_every": 1000}
        if device == "cpu":
            changes["engine"] = "auto"
        try:
            result = distill(teacher, student, override(config.distill, changes), data=images, progress=progress)
            row |= {"accuracy": result.accuracy, "agreement": result.agreement, "images_per_s": result.images_per_s}
        except NonFiniteError as error:
            row["error"] = str(error)
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def top1_text(row: dict[str, Any] | None) -> str:
    """The result of a run in one word, for the live table."""
    if row is None:
        return "not started: no time left"
    return "not finite" if row["accuracy"] is None else f"{row['accuracy']:.1%}"


def ablation_section(content: dict[str, Any], folder: str) -> str:
    """Return one device's table, with the mean and standard deviation over seeds of each cell."""
    rows, table = content["rows"], []
    for cell in dict.fromkeys([*CELLS, *(row["cell"] for row in rows)]):
        of_cell = [row for row in rows if row["cell"] == cell]
        finite = [row for row in of_cell if row["accuracy"] is not None]
        not_finite = len(of_cell) - len(finite)
        if of_cell:
            changes = of_cell[0]["overrides"].items()
            line = {"cell": cell, "changed": ", ".join(f"`{path}={value}`" for path, value in changes)}
            line["top-1"] = mean_and_deviation([row["accuracy"] for row in finite])
            line["relative to teacher"] = mean_and_deviation(
                [row["accuracy"] / row["teacher_accuracy"] for row in finite]
            )
            line["agreement"] = mean_and_deviation([row["agreement"] for row in finite])
            line["n"] = f"{len(finite)}" + (f" (not finite: {not_finite})" if not_finite else "")
            table.append(line)
    teachers = ", ".join(f"{value:.1%}" for value in sorted({row["teacher_accuracy"] for row in rows}))
    rounds = ", ".join(map(str, sorted({row["rounds"] for row in rows})))
    blocks = content["environments"]
    devices = "; ".join(sorted({f"{block['device']['name']}, torch {block['torch']}" for block in blocks}))
    note = f"Mean ± standard deviation over n seeds. Teacher: {teachers}; rounds: {rounds}; measured on: {devices}; "
    return "\n".join([f"### {folder}", "", *markdown_table(table), "", f"{note}commit: {commits(blocks)}."])


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in percent."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1%}" + (f" ± {100 * statistics.stdev(values):.1f}" if values[1:] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that have no row yet."""
    command = parser(__doc__, small="smaller networks and images")
    command.add_argument("--seconds", type=float, default=math.inf, help="start no cell after this")
    command.add_argument("--jobs", type=int, default=None, help="processes (default: one per core, on a GPU at most 6)")
    command.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    command.add_argument("--engines", action="store_true", help="compare the engines instead of the cells")
    command.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = command.parse_args(arguments)

    if options.engines:
        cells = engine_cells(["tiny"] if options.size == "small" else ["digits", "rendered"])
    else:
        cells = {cell: (options.size, CELLS[cell]) for cell in options.cells}
    end, results = time.time() + options.seconds, Results(options.out, key=("cell", "seed"))
    known = {results.key_of(row) for row in results.rows}
    jobs = [(cell, *cells[cell], seed) for seed in options.seeds for cell in cells if (cell, seed) not in known]
    for name in {name for _, name, _, _ in jobs}:
        trained_teacher(experiment(name), options.device)  # once, before several processes read it
    workers = options.jobs or min(len(os.sched_getaffinity(0)), 6 if options.device == "cuda" else 64)
    cell_jobs = [
        Job(name=f"{job[0]}, seed {job[3]}", call=partial(run_cell, job, device=options.device, end=end))
        for job in jobs
    ]

    def finished(row: dict[str, Any] | None) -> None:
        if row is not None:
            results.add(row)

    run_jobs(cell_jobs, workers=workers, text=top1_text, finished=finished)
    return 0


if __name__ == "__main__":
    sys.exit(main())
