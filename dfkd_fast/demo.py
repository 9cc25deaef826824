"""The demo: train a teacher, distill it without its images and evaluate the student, in minutes."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from dfkd_fast import data, report
from dfkd_fast.config import DemoConfig, ModelConfig, ObjectiveConfig, find, read, to_dict
from dfkd_fast.engine import distill, teach
from dfkd_fast.engine.runtime import new_run_folder
from dfkd_fast.jobs import Job, run_jobs
from dfkd_fast.models import create_model, extract

__all__ = ["Row", "demo", "experiment_jobs", "objective_of", "run"]


def objective_of(config: DemoConfig, preset: str) -> ObjectiveConfig:
    """Return the config's objective. If ``preset`` is not its preset, use that one with its default student weights."""
    own = config.distill.objective
    return own if preset == own.preset else replace(own, preset=preset, student={})


@dataclass(frozen=True)
class Row:
    """The result of a job: a row of the table and of ``results.json``.

    Attributes:
        network: description of the network.
        trained_on: description of its training images.
        top1: top-1 accuracy on the held-out images, in [0, 1].
        images_per_s: training images per second.
        seconds: wall time of the job, in seconds.
        weights: the network's weights file.
    """

    network: str
    trained_on: str
    top1: float
    images_per_s: float
    seconds: float
    weights: Path

    def __str__(self) -> str:
        return f"top-1 {self.top1:.1%}"


def _network(config: DemoConfig, model: ModelConfig, classes: int) -> tuple[nn.Module, str]:
    torch.manual_seed(config.distill.seed)
    network = create_model(model, num_classes=classes)
    return network, f"{model.name}, {sum(p.numel() for p in network.parameters()) / 1e3:.0f}k weights"


def _teach(config: DemoConfig, folder: Path, role: Literal["teacher", "student"], *, progress: Any) -> Row:
    """Train a network with data."""
    started = time.perf_counter()
    images, model = data.load(config.data), getattr(config, role)
    network, description = _network(config, model, images.num_classes)
    with_data = replace(config.teach, out=str(folder / f"{role}_with_data"))
    result = teach(network, images, with_data, description=model.metadata(), progress=progress)
    speed, seconds = result.images_per_s, time.perf_counter() - started
    return Row(f"{role}: {description}", "labeled images", result.accuracy, speed, seconds, result.weights)


def _distill(config: DemoConfig, folder: Path, preset: str, teacher: Row, *, progress: Any) -> Row:
    """Distill the teacher into a new student without data."""
    started = time.perf_counter()
    images = data.load(config.data)
    config = replace(config, teacher=replace(config.teacher, weights=str(teacher.weights)))
    models = config.teacher, config.student
    networks = [_network(config, model, images.num_classes) for model in models]
    teacher_network, student = (
        extract(network, stages=model.stages, image_size=images.image_size)
        for (network, _), model in zip(networks, models, strict=True)
    )
    result = distill(
        teacher_network,
        student,
        replace(config.distill, objective=objective_of(config, preset), out=str(folder / preset)),
        data=images,  # only the held-out images, for the accuracy curve
        description=config.student.metadata(),
        inputs={name: to_dict(getattr(config, name)) for name in ("data", "teacher", "student")},
        progress=progress,
    )
    assert result.accuracy is not None
    speed, seconds = result.images_per_s, time.perf_counter() - started
    weights = result.run_dir / "student.safetensors"
    return Row(f"student: {networks[1][1]}", f"synthetic images, {preset}", result.accuracy, speed, seconds, weights)


def experiment_jobs(config: DemoConfig, folder: Path, title: str) -> list[Job]:
    """Return the trainings of an experiment: both networks with data, and a student per preset without data."""
    teacher = f"{title}: teacher, with data"
    return [
        Job(name=teacher, call=partial(_teach, config, folder, "teacher")),
        *(
            Job(name=f"{title}: student, {preset}", call=partial(_distill, config, folder, preset), after=(teacher,))
            for preset in config.presets
        ),
        Job(name=f"{title}: student, with data", call=partial(_teach, config, folder, "student")),
    ]


def _save_pictures(config: DemoConfig, folder: Path) -> Path:
    """Save held-out images next to synthetic ones."""
    images, count = data.load(config.data), config.distill.loop.batch_size
    assert isinstance(images.test, Sized)
    total = len(images.test)  # evenly spaced indices cover all classes of a sorted set
    held_out = torch.stack([images.test[index * total // count][0] for index in range(count)])
    shown = report.save_image_grid(held_out, folder / "held_out.png")  # in [-1, 1], like the synthetic images
    synthetic = folder / config.presets[0] / "images" / f"epoch-{config.distill.loop.epochs:04d}.png"
    path = folder / "pictures.png"
    report.save_beside([shown, synthetic], path, scale=3 if images.image_size < 64 else 1)
    return path


def _save_results(
    config: DemoConfig,
    folder: Path,
    title: str,
    rows: Sequence[Row],
    *,
    facts: dict[str, Any],
    console: Console,
) -> bool:
    """Print the table of an experiment, write ``results.json`` and return whether the first student is good enough.

    ``facts`` are further entries of the file.
    """
    teacher, *students, supervised = rows
    classes = data.num_classes(config.data)
    assert classes is not None  # digits and rendered know it without reading files
    chance = 1 / classes

    def share_of_teacher(top1: float) -> float:
        return top1 / teacher.top1 if teacher.top1 else math.nan  # NaN reaches no threshold

    shown = [(row.network, row.trained_on, row.top1, f"{row.seconds:.0f}") for row in (teacher, supervised, *students)]
    table: list[dict[str, Any]] = [
        {
            "network": network,
            "trained on": trained_on,
            "top-1": f"{top1:.1%}",
            "relative to teacher": f"{share_of_teacher(top1):.1%}",
            "seconds": seconds_of_job,
        }
        for network, trained_on, top1, seconds_of_job in (*shown, ("chance", "", chance, None))
    ]
    size = config.data.image_size
    console.print(report.result_table(table, f"{title}, {classes} classes, {size} x {size}"))
    share = share_of_teacher(students[0].top1)
    reached = share >= config.least
    console.print(
        f"{'[green]reached[/]' if reached else '[red]missed[/]'}: the {config.presets[0]} student has {share:.1%} of "
        f"its teacher's top-1; {config.least:.0%} is required\n"
    )
    results = {
        "experiment": title,
        "environment": report.environment(),
        **facts,
        "rounds": config.distill.loop.epochs * config.distill.loop.rounds_per_epoch,
        "rows": [
            *({**asdict(row), "weights": row.weights.name} for row in (teacher, supervised, *students)),
            {"network": "chance", "trained_on": "", "top1": chance},
        ],
    }
    report.write_results(folder / "results.json", results)
    return reached


def _program(name: str) -> str:
    """A program of this environment: its name if it is on the PATH, otherwise its path."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).parent / name)


def run(configs: Mapping[str, DemoConfig], folder: Path, *, console: Console, workers: int | None = None) -> bool:
    """Run experiments in parallel processes, print their tables and write their results.

    Args:
        configs: the experiments by name.
        folder: output folder, with a subfolder per experiment.
        console: prints the output.
        workers: number of processes at a time; None is one per core.

    Returns:
        Whether, in all experiments, the student of the first preset reached ``least`` of its teacher's top-1 accuracy.

    Raises:
        JobError: a training failed.
    """
    started = time.perf_counter()
    jobs = {name: experiment_jobs(config, folder / name, name) for name, config in configs.items()}
    every = [job for each in jobs.values() for job in each]
    needed = {name for job in every for name in job.after}
    # Other jobs wait for the teachers, and distillations take longest.
    ordered = sorted(every, key=lambda job: 0 if job.name in needed else 1 if job.after else 2)
    workers = workers or len(os.sched_getaffinity(0))
    rows = run_jobs(ordered, workers=workers, console=console)
    facts, reached = {"seconds": time.perf_counter() - started, "processes": workers}, []
    console.print()
    for name, config in configs.items():
        done = [rows[job.name] for job in jobs[name]]
        reached.append(_save_results(config, folder / name, name, done, facts=facts, console=console))
    pictures = [_save_pictures(config, folder / name) for name, config in configs.items()]
    last = folder / name / configs[name].presets[0]
    lines = (
        "Held-out images next to synthetic ones:",
        *(f"  {path}" for path in pictures),
        "Try next (losses and images in a browser; the student's accuracy; another method):",
        f"  {_program('tensorboard')} --logdir {folder}",
        f"  {_program('dfkd-fast')} evaluate --config {last / 'config.yaml'} --weights {last / 'student.safetensors'}",
        f"  {_program('dfkd-fast')} distill --config {last / 'config.yaml'} --distill.objective "
        f"'{{preset: dfad}}' --out {folder / name / 'dfad'}",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return all(reached)


def demo(out: str | None, *, names: Sequence[str] = ("digits", "rendered"), seed: int = 0) -> bool:
    """Run the demo's experiments, each from ``configs/demo_NAME.yaml``.

    Args:
        out: output folder; None creates a new one under ``runs/``.
        names: the experiments to run.
        seed: random seed.

    Returns:
        Whether all students reached their targets.

    Raises:
        JobError: a training failed.
    """
    configs = {name: read(DemoConfig, find(f"demo_{name}")) for name in names}
    seeded = {
        name: replace(config, teach=replace(config.teach, seed=seed), distill=replace(config.distill, seed=seed))
        for name, config in configs.items()
    }
    return run(seeded, new_run_folder(out, "demo"), console=Console())
