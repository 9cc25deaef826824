"""The demo: train a teacher, distill it without its images and evaluate the student, in minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dfkd_fast import data, report
from dfkd_fast.config import DemoConfig, ModelConfig, ObjectiveConfig, Preset, find, read, to_dict
from dfkd_fast.engine import DistillResult, distill, teach
from dfkd_fast.engine.runtime import new_run_folder
from dfkd_fast.models import create_model, extract

__all__ = ["demo", "run"]


def objective_of(config: DemoConfig, preset: Preset) -> ObjectiveConfig:
    """Return the config's objective. If ``preset`` is not its preset, use that one with its default student weights."""
    own = config.distill.objective
    return own if preset == own.preset else replace(own, preset=preset, student={})


@dataclass(frozen=True)
class _Row:
    """A row of the table and of ``results.json``."""

    network: str
    trained_on: str
    top1: float
    images_per_s: float | None


def _train(
    config: DemoConfig, images: data.ImageData, folder: Path, progress: bool
) -> tuple[list[_Row], dict[str, DistillResult]]:
    """Train both networks with data, then one student per preset without it. Return rows, and results by preset."""

    def network(model: ModelConfig) -> nn.Module:
        torch.manual_seed(config.distill.seed)
        return create_model(model, num_classes=images.num_classes)

    rows, networks, names = [], {}, {}
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        networks[role] = network(model)
        with_data = replace(config.teach, out=str(folder / f"{role}_with_data"))
        texts: dict[str, Any] = {"description": model.metadata(), "title": f"{role}, with data"}
        result = teach(networks[role], images, with_data, progress=progress, **texts)
        count = sum(p.numel() for p in networks[role].parameters())
        names[role] = f"{role}: {model.name}, {count / 1e3:.0f}k weights"
        rows.append(_Row(names[role], "labeled images", result.accuracy, result.images_per_s))
    teacher = extract(networks["teacher"], stages=config.teacher.stages, image_size=images.image_size)
    runs: dict[str, DistillResult] = {}
    for preset in config.presets:
        student = extract(network(config.student), stages=config.student.stages, image_size=images.image_size)
        runs[preset] = distilled = distill(
            teacher,
            student,
            replace(config.distill, objective=objective_of(config, preset), out=str(folder / preset)),
            data=images,  # only the held-out images, for the accuracy curve
            description=config.student.metadata(),
            inputs={name: to_dict(getattr(config, name)) for name in ("data", "teacher", "student")},
            progress=progress,
        )
        assert distilled.accuracy is not None
        rows.append(_Row(names["student"], f"synthetic images, {preset}", distilled.accuracy, distilled.images_per_s))
    return [*rows, _Row("chance", "", 1 / images.num_classes, None)], runs


def _save_pictures(images: data.ImageData, synthetic: Path, folder: Path, count: int) -> Path:
    """Save held-out images next to synthetic ones."""
    assert isinstance(images.test, Sized)
    total = len(images.test)  # evenly spaced indices cover all classes of a sorted set
    held_out = torch.stack([images.test[index][0] for index in range(0, total, max(1, total // count))[:count]])
    shown = report.save_image_grid(held_out, folder / "held_out.png")  # in [-1, 1], like the synthetic images
    path = folder / "pictures.png"
    report.save_beside([shown, synthetic], path, scale=3 if images.image_size < 64 else 1)
    return path


def run(config: DemoConfig, folder: Path, title: str, *, console: Console, progress: bool = True) -> bool:
    """Run one experiment: train both networks, distill with each preset and print a table.

    Args:
        config: the experiment.
        folder: output folder, with a subfolder per training.
        title: name of the experiment in the output.
        console: prints the output.
        progress: show progress bars.

    Returns:
        Whether the student of the first preset reached ``config.least`` of its teacher's top-1 accuracy.
    """
    started = time.perf_counter()
    images = data.load(config.data)
    console.rule(f"[bold]{title}[/]: {images.num_classes} classes, {images.image_size} x {images.image_size}")
    rows, runs = _train(config, images, folder, progress)
    teacher, student = rows[0].top1, rows[2].top1
    table = [
        {
            "network": row.network,
            "trained on": row.trained_on,
            "top-1": f"{row.top1:.1%}",
            "relative to teacher": f"{row.top1 / teacher:.1%}",
            "images/s": None if row.images_per_s is None else f"{row.images_per_s:.0f}",
        }
        for row in rows
    ]
    console.print(report.result_table(table, title))
    last = f"images/epoch-{config.distill.loop.epochs:04d}.png"
    for preset, distilled in runs.items():
        console.print(f"[bold]{preset}[/]: {distilled.run_dir}")
        for name in ("student.safetensors", "checkpoints", "config.yaml", "tensorboard", last, "curves.png"):
            console.print(f"  {distilled.run_dir / name}", highlight=False, soft_wrap=True)
    synthetic = runs[config.presets[0]].run_dir / last
    pictures = _save_pictures(images, synthetic, folder, config.distill.loop.batch_size)
    console.print(f"held-out and synthetic images: {pictures}", highlight=False, soft_wrap=True)
    seconds = time.perf_counter() - started
    results = {
        "experiment": title,
        "environment": report.environment(),
        "seconds": seconds,
        "rounds": config.distill.loop.epochs * config.distill.loop.rounds_per_epoch,
        "rows": [asdict(row) for row in rows],
    }
    report.write_results(folder / "results.json", results)
    reached = student >= config.least * teacher
    console.print(
        f"{'[green]reached[/]' if reached else '[red]missed[/]'}: the {config.presets[0]} student has "
        f"{student / teacher:.1%} of its teacher's top-1; {config.least:.0%} is required ({seconds:.0f} s)"
    )
    return reached


def demo(out: str | None, *, names: Sequence[str] = ("digits", "rendered"), seed: int = 0) -> bool:
    """Run the demo's experiments, each from ``configs/demo_NAME.yaml``.

    Args:
        out: output folder; None creates a new one under ``runs/``.
        names: the experiments to run.
        seed: random seed.

    Returns:
        Whether all students reached their targets.
    """
    # Networks this small gain little from more threads, and with one thread results do not depend on the core count.
    torch.set_num_threads(1)
    console = Console()
    folder = new_run_folder(out, "demo")
    reached = []
    for name in names:
        config = read(DemoConfig, find(f"demo_{name}"))
        config = replace(config, teach=replace(config.teach, seed=seed), distill=replace(config.distill, seed=seed))
        reached.append(run(config, folder / name, name, console=console))
    return all(reached)
