"""The effect of the method's components and open choices: the table of docs/ablation.md.

Each cell is the method with one choice changed, distilled with every seed from the same teacher. The teacher never saw
the held-out images. Cells run seed by seed, so a table with fewer seeds is complete early. Several cells run at a time,
each in its own process, because one leaves most of a GPU idle at this image size.

    python -m dfkd_fast.benchmarks.ablation --out FILE --device cpu --size small
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dfkd_fast import data
from dfkd_fast.benchmarks.results import Results, commits, parser
from dfkd_fast.config import (
    DataConfig,
    DemoConfig,
    DistillConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TeachConfig,
    find,
    read,
    to_dict,
)
from dfkd_fast.engine import NonFiniteError, distill, teach
from dfkd_fast.models import create_model, extract
from dfkd_fast.report import markdown_table

__all__ = ["CELLS", "SEEDS", "ablation_section", "experiment", "main", "override", "run", "run_cell", "trained_teacher"]

SEEDS = (0, 1, 2)

Overrides = Mapping[str, Any]

CELLS: Mapping[str, Overrides] = {
    # table 3 of the paper
    "baseline": {"objective.preset": "baseline"},
    "+ SFCL": {"objective.student.mhad": 0.0},
    "+ MHAD": {"objective.student.sfcl": 0.0},
    "both": {},
    # order R of the attention (3 in "both")
    "R = 1": {"objective.mhad.order": 1},
    "R = 2": {"objective.mhad.order": 2},
    # the generator's gate ("spatial" in "both")
    "gate spatial_mean1": {"generator.attention": "spatial_mean1"},
    "gate channel": {"generator.attention": "channel"},
    "lambda = 0": {"generator.attention": "none"},
    # the input of MHAD ("features" in "both")
    "MHAD on attention maps": {"objective.mhad.target": "attention"},
    # temperature of SFCL (0.1 in "both")
    "tau = 0.05": {"objective.sfcl.temperature": 0.05},
    "tau = 0.5": {"objective.sfcl.temperature": 0.5},
    # weight of SFCL (8 in "both", 0 in "+ MHAD")
    "gamma = 0.3": {"objective.student.sfcl": 0.3},
    "gamma = 1": {"objective.student.sfcl": 1.0},
    "gamma = 3": {"objective.student.sfcl": 3.0},
    # weight of MHAD (10 in "both"), also with a weaker SFCL
    "beta = 40": {"objective.student.mhad": 40.0},
    "beta = 40, gamma = 0.1": {"objective.student.mhad": 40.0, "objective.student.sfcl": 0.1},
    # the generator's blocks
    "no BatchNorm in blocks": {"generator.batch_norm": False},
}


def experiment(size: str) -> DemoConfig:
    """The experiment of the cell "both": "full", or "small", the demo's with the weights of the paper."""
    if size == "small":
        config = read(DemoConfig, find("demo_rendered"))
        return replace(config, distill=override(config.distill, {"loop.epochs": 4, "objective": ObjectiveConfig()}))
    loop = {"loop.epochs": 4, "loop.rounds_per_epoch": 40}
    return DemoConfig(
        data=DataConfig(name="rendered", image_size=64, classes=20, train_per_class=200, test_per_class=50),
        teacher=ModelConfig(name="resnet32x4"),
        student=ModelConfig(name="resnet8x4"),
        teach=TeachConfig(epochs=40, lr=0.05),
        distill=override(DistillConfig(optimizer=OptimizerConfig(student_lr=0.05)), loop),
        presets=["dfkd-fgvc"],
        least=0.0,
    )


def override(config: Any, changes: Overrides) -> Any:
    """Return a config with some fields changed, given by dotted paths. The last name may be a key of a dict field.

    Raises:
        ValueError: the config has no such field.
    """
    for path, value in changes.items():
        config = _override(config, path.split("."), value, path)
    return config


def _override(config: Any, names: Sequence[str], value: Any, path: str) -> Any:
    name, rest = names[0], names[1:]
    if isinstance(config, dict):
        return {**config, name: _override(config[name], rest, value, path) if rest else value}
    if not is_dataclass(config) or isinstance(config, type) or name not in {item.name for item in fields(config)}:
        raise ValueError(f"{path} is not a field of the config: {type(config).__name__} has no {name!r}")
    return replace(config, **{name: _override(getattr(config, name), rest, value, path) if rest else value})


def trained_teacher(config: DemoConfig, device: str, folder: Path | None = None) -> tuple[Path, float]:
    """Weights and accuracy of an experiment's teacher. The first call trains it and keeps it in ``folder``.

    The default folder is a temporary one per user.
    """
    parts = [to_dict(part) for part in (config.data, config.teacher, config.teach)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    kept = (folder or Path(tempfile.gettempdir()) / f"dfkd_fast_ablation_{os.getuid()}") / digest
    weights, note = kept / "teacher.safetensors", kept / "accuracy.json"
    if not note.exists():
        images = data.load(config.data)
        model = create_model(config.teacher, num_classes=images.num_classes)
        result = teach(model, images, replace(config.teach, device=device, out=str(kept)), progress=False)
        if result.weights != weights:
            result.weights.replace(weights)
        note.write_text(json.dumps(result.accuracy))
    return weights, json.loads(note.read_text())


def run(config: DemoConfig, overrides: Overrides, seed: int, device: str, folder: Path | None = None) -> dict[str, Any]:
    """Distil once. ``overrides`` change ``config.distill``; ``folder`` keeps trained teachers.

    Returns:
        ``accuracy``, ``agreement``, ``images_per_s``, ``teacher_accuracy`` and ``seconds``. After a non-finite loss the
        first three are None and ``error`` says why.
    """
    images = data.load(config.data)
    weights, teacher_accuracy = trained_teacher(config, device, folder)
    torch.manual_seed(seed)
    teacher, student = (
        extract(create_model(model, num_classes=images.num_classes), stages=model.stages, image_size=images.image_size)
        for model in (replace(config.teacher, weights=str(weights)), config.student)
    )
    row: dict[str, Any] = {"accuracy": None, "agreement": None, "images_per_s": None}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_run_") as out:
        changed = override(replace(config.distill, seed=seed, device=device, out=out), overrides)
        try:
            result = distill(teacher, student, changed, data=images, progress=False)
            row |= {"accuracy": result.accuracy, "agreement": result.agreement, "images_per_s": result.images_per_s}
        except NonFiniteError as error:
            row["error"] = str(error)
    return {**row, "teacher_accuracy": teacher_accuracy, "seconds": round(time.perf_counter() - start, 1)}


def run_cell(key: tuple[str, int], *, size: str, device: str, end: float = math.inf) -> dict[str, Any] | None:
    """Distil one cell with one seed and return its row; None after the time ``end``."""
    if time.time() > end:
        return None
    (cell, seed), config = key, experiment(size)
    loop = config.distill.loop
    row = {"cell": cell, "seed": seed, "overrides": dict(CELLS[cell]), "rounds": loop.epochs * loop.rounds_per_epoch}
    config = replace(
        config, distill=override(config.distill, {"loop.evaluate_every": 0, "loop.checkpoint_every": 1000})
    )
    return row | run(config, CELLS[cell], seed, device)


def show(name: str, row: dict[str, Any]) -> None:
    """Print the result of a run."""
    top1 = "not finite" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
    print(f"{name}: {top1} ({row['seconds']:.0f} s)", flush=True)


def ablation_section(content: dict[str, Any], folder: str) -> str:
    """One device's table for docs/ablation.md: mean and standard deviation over seeds, by cell."""
    rows, table = content["rows"], []
    for cell in dict.fromkeys([*CELLS, *sorted(row["cell"] for row in rows)]):
        of_cell = [row for row in rows if row["cell"] == cell]
        finite = [row for row in of_cell if row["accuracy"] is not None]
        not_finite = len(of_cell) - len(finite)
        if of_cell:
            changes = of_cell[0]["overrides"].items()
            line = {"cell": cell, "changed": ", ".join(f"`{path}={value}`" for path, value in changes)}
            line["top-1"] = _mean_and_deviation([row["accuracy"] for row in finite])
            line["of the teacher's"] = _mean_and_deviation(
                [row["accuracy"] / row["teacher_accuracy"] for row in finite]
            )
            line["agreement"] = _mean_and_deviation([row["agreement"] for row in finite])
            line["n"] = f"{len(finite)}" + (f" (not finite: {not_finite})" if not_finite else "")
            table.append(line)
    teachers = ", ".join(f"{value:.1%}" for value in sorted({row["teacher_accuracy"] for row in rows}))
    rounds = ", ".join(map(str, sorted({row["rounds"] for row in rows})))
    blocks = content["environments"]
    devices = "; ".join(sorted({f"{block['device']['name']}, torch {block['torch']}" for block in blocks}))
    note = f"Mean ± standard deviation over n seeds. Teacher: {teachers}; rounds: {rounds}; measured on: {devices}; "
    return "\n".join([f"### {folder}", "", *markdown_table(table), "", f"{note}commit: {commits(blocks)}."])


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1%}" + (f" ± {100 * statistics.stdev(values):.1f}" if values[1:] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that have no row yet."""
    command = parser(__doc__, small="smaller networks and images")
    command.add_argument("--seconds", type=float, default=math.inf, help="start no cell after this")
    command.add_argument("--jobs", type=int, default=None, help="processes (default: the cores, on a GPU at most 6)")
    command.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    command.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = command.parse_args(arguments)

    end = time.time() + options.seconds
    results = Results(options.out, key=("cell", "seed"))
    known = {results.key_of(row) for row in results.rows}
    keys = [(cell, seed) for seed in options.seeds for cell in options.cells if (cell, seed) not in known]
    if keys:
        trained_teacher(experiment(options.size), options.device)  # before several processes need it
    job = functools.partial(run_cell, size=options.size, device=options.device, end=end)
    jobs = options.jobs or min(os.cpu_count() or 1, 6 if options.device == "cuda" else 64)
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        for row in pool.imap_unordered(job, keys):
            if row is not None:
                results.add(row)
                show(f"{row['cell']}, seed {row['seed']}", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
