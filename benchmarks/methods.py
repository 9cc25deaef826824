"""The accuracy of the methods over student steps and over time, on drawn subcategories and one CPU thread per run.

Every method distills the same teacher into the same student, with its recipe at a small size (``methods.yaml``), and so
do methods without one of their parts. The held-out images are only used to measure. Time is the CPU time of a run
without its measurements, so that other processes on the machine hardly change it.

    python -m dfkd_fast.benchmarks.methods --out FILE
"""

from __future__ import annotations

import argparse
import math
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from dfkd_fast import data
from dfkd_fast.benchmarks.results import Results, commits
from dfkd_fast.config import DataConfig, DistillConfig, ExperimentConfig, find, read
from dfkd_fast.data import ImageData
from dfkd_fast.data.image_data import ImageArray
from dfkd_fast.engine import NonFiniteError, Runtime, distill, evaluate, teach
from dfkd_fast.jobs import Job, run_jobs
from dfkd_fast.models import create_model, extract
from dfkd_fast.report import markdown_table
from dfkd_fast.sweep import mean_and_deviation, paired_difference

__all__ = ["METHODS", "main", "methods_section", "run_method"]

METHODS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("methods.yaml").read_text("utf-8"))
STEPS = (125, 250, 500, 1000)
SECONDS = (15, 30, 60, 120, 240)
_PART = re.compile("[^:]*,")  # a method without one of its parts
CHOSEN = "dfkd-fgvc: beta 40, gamma 0.1"  # on other subcategories (--validation), from the settings in methods.yaml


def settings_of(name: str) -> DistillConfig:
    """Return the settings of a method, or of ``"METHOD, PART"`` or ``"METHOD: SETTINGS"``, which change it."""
    method = re.split("[,:]", name)[0]
    changes = {**METHODS["all"], **METHODS[method], **METHODS[name]}
    return read(
        ExperimentConfig, find(method), changes={f"distill.{field}": value for field, value in changes.items()}
    ).distill


def experiment() -> ExperimentConfig:
    """Return the data and the networks of all methods."""
    return read(ExperimentConfig, find("rendered32"), changes={"teach.device": "cpu"})


def load_images(config: DataConfig, *, validation: bool) -> ImageData:
    """Load the images, or those of as many other subcategories."""
    if not validation:
        return data.load(config)
    both, first = data.load(replace(config, classes=2 * config.classes)), config.classes

    def others(images: Any) -> ImageArray:
        kept = images.labels >= first
        return ImageArray(
            images.images[kept], images.labels[kept] - first, mean=both.mean, std=both.std, shift=images.shift
        )

    return replace(both, train=others(both.train), test=others(both.test), classes=both.classes[first:])


def trained_teacher(*, validation: bool = False) -> tuple[Path, float]:
    """Train the teacher in a temporary folder, if it is not there, and return its weights and accuracy."""
    config = experiment()
    assert config.data is not None
    assert config.teacher is not None
    images = load_images(config.data, validation=validation)
    torch.manual_seed(config.teach.seed)
    folder = Path(tempfile.gettempdir()) / f"dfkd_fast_{os.getuid()}" / f"methods_teacher{'_validation' * validation}"
    settings = replace(config.teach, out=str(folder), resume=True)
    result = teach(create_model(config.teacher, num_classes=images.num_classes), images, settings, progress=False)
    return result.weights, result.accuracy


def run_method(
    method: str,
    seed: int,
    taught: tuple[Path, float],
    *,
    steps: int = STEPS[-1],
    validation: bool = False,
    progress: Any = False,
) -> dict[str, Any]:
    """Distill the taught network with one method and seed.

    Returns:
        The row, with a curve of (student steps, seconds, accuracy).
    """
    config, (weights, teacher_accuracy) = experiment(), taught
    assert config.data is not None
    assert config.teacher is not None
    assert config.student is not None
    images = load_images(config.data, validation=validation)
    torch.manual_seed(seed)
    teacher, student = (
        extract(create_model(model, num_classes=images.num_classes), image_size=images.image_size)
        for model in (replace(config.teacher, weights=str(weights)), config.student)
    )
    settings, generator = settings_of(method), config.distill.generator
    if settings.generator.name != "attention":
        generator = replace(settings.generator, options={**settings.generator.options, "width": 32})
    rounds = math.ceil(steps / settings.loop.student_steps)
    loop = replace(settings.loop, rounds_per_epoch=rounds, evaluate_every=0, checkpoint_every=rounds)
    runtime = Runtime.of("cpu", "fp32", channels_last=False)
    curve: list[tuple[int, float, float]] = []
    start, measuring, marks = time.process_time(), 0.0, 0

    def measure(done: Any, state: Any) -> bool:
        nonlocal measuring, marks
        seconds = time.process_time() - start - measuring
        passed = sum(mark <= state.student_updates for mark in STEPS) + sum(mark <= seconds for mark in SECONDS)
        if passed > marks:
            marks = passed
            begin = time.process_time()
            found = evaluate(state.student.module.model, images.test, num_classes=images.num_classes, runtime=runtime)
            curve.append((state.student_updates, seconds, found.top1))
            measuring += time.process_time() - begin
        return seconds > SECONDS[-1]

    row: dict[str, Any] = {"method": method, "seed": seed, "teacher_accuracy": teacher_accuracy}
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_method_") as out:
        run: dict[str, Any] = {"loop": loop, "generator": generator, "seed": seed, "out": out, "precision": "fp32"}
        sizes = {name: getattr(images, name) for name in ("image_size", "mean", "std")}
        changed = replace(settings, **run, **sizes, device="cpu", channels_last=False)
        try:
            distill(teacher, student, changed, callbacks=[measure], progress=progress)
        except NonFiniteError as error:
            row["error"] = str(error)
    if curve:
        row["images_per_s"] = curve[-1][0] * loop.batch_size / curve[-1][1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**row, "curve": curve, "peak_bytes": peak, "accuracy": curve[-1][2] if curve else None}


def _reached(row: dict[str, Any], position: int, mark: float) -> float | None:
    """The accuracy at the last measurement up to a mark, plus a tenth. A run that has ended keeps its last accuracy."""
    points = [point for point in row["curve"] if point[position] <= 1.1 * mark]
    if position == 0 and row["curve"] and row["curve"][-1][0] < 0.9 * mark:
        return None  # it did not take as many steps
    return points[-1][2] if points else None


def _without(rows: list[dict[str, Any]], name: str) -> dict[str, str] | None:
    """Compare a method without one of its parts with the whole method, by seed."""
    method, _, part = name.partition(", ")
    whole, changed = (
        {row["seed"]: row["accuracy"] for row in rows if row["method"] == each and row["accuracy"] is not None}
        for each in (method, name)
    )
    pairs = [(changed[seed], whole[seed]) for seed in changed if seed in whole]
    if not pairs:
        return None
    without, with_it = zip(*pairs, strict=True)
    mean, width, _ = paired_difference(without, with_it)
    difference = f"{100 * mean:+.1f}" + ("" if math.isnan(width) else f" ± {100 * width:.1f}")
    line = {"method": f"`{method}`", "without": part, "top-1": f"{statistics.fmean(without):.1%}"}
    return {**line, "difference": difference, "n": f"{len(pairs)}"}


def methods_section(content: dict[str, Any], folder: str) -> str:
    """Return the tables at equal student steps and at equal CPU time."""
    rows, parts = content["rows"], [f"### {folder}"]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows) and not _PART.match(method)]
    for position, marks, unit in ((0, STEPS, "student steps"), (1, SECONDS, "CPU seconds")):
        table = []
        for method in methods:
            runs = [row for row in rows if row["method"] == method]
            line = {"method": f"`{method}`"}
            for mark in marks:
                values = [value for row in runs if (value := _reached(row, position, mark)) is not None]
                line[f"{mark} {unit}"] = mean_and_deviation(values)
            speeds = [row["images_per_s"] for row in runs if row.get("images_per_s")]
            line["student images/s"] = f"{statistics.fmean(speeds):,.0f}" if speeds else "-"
            line["peak, GiB"] = f"{max(row['peak_bytes'] for row in runs) / 2**30:.2f}"
            line["n"] = f"{len(runs)}"
            table.append(line)
        parts += ["", f"Top-1 accuracy by {unit}:", "", *markdown_table(table)]
    ablations = [found for name in METHODS if _PART.match(name) and (found := _without(rows, name))]
    if ablations:
        title = "Methods without one of their parts, at the end of the runs, with 95 % intervals of paired differences:"
        parts += ["", title, "", *markdown_table(ablations)]
    teacher = ", ".join(f"{value:.1%}" for value in sorted({row["teacher_accuracy"] for row in rows}))
    blocks = content["environments"]
    note = f"Mean ± standard deviation over n seeds. Teacher: {teacher}. CPU: {blocks[-1]['cpu']}; one thread per run; "
    return "\n".join([*parts, "", f"{note}commit: {commits(blocks)}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the methods and seeds that have no row yet."""
    known = [method for method in METHODS if method != "all"]
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, required=True, help="result file")
    command.add_argument("--methods", nargs="+", choices=known, metavar="METHOD")
    command.add_argument(
        "--validation", action="store_true", help="run the settings of dfkd-fgvc on other subcategories, to choose some"
    )
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--steps", type=int, default=STEPS[-1], help="student steps")
    command.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = command.parse_args(arguments)
    candidates = [name for name in known if re.match("dfkd-fgvc(:|$)", name)]
    chosen = options.methods or (
        candidates if options.validation else [name for name in known if ":" not in name or name == CHOSEN]
    )
    results = Results(options.out, key=("method", "seed"))
    done = {results.key_of(row) for row in results.rows}
    taught = trained_teacher(validation=options.validation)
    jobs = [
        Job(
            name=f"{method}, seed {seed}",
            call=partial(run_method, method, seed, taught, steps=options.steps, validation=options.validation),
        )
        for seed in options.seeds
        for method in chosen
        if (method, seed) not in done
    ]
    run_jobs(
        jobs, workers=options.jobs, text=lambda row: mean_and_deviation([row["accuracy"] or 0]), finished=results.add
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
