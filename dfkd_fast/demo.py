"""The main job on real input, in minutes: teach, set the images aside, distil from the teacher alone, evaluate."""

from __future__ import annotations

import time
from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dfkd_fast import data, report
from dfkd_fast.config import DemoConfig, ModelConfig, ObjectiveConfig, Preset, find, read, to_dict
from dfkd_fast.engine import distill, teach
from dfkd_fast.engine.runtime import new_run_folder
from dfkd_fast.models import FeatureModel, create_model, extract

__all__ = ["demo", "run"]


def objective_of(config: DemoConfig, preset: Preset) -> ObjectiveConfig:
    """The config's own objective, or another preset as published: weights tuned for one are not those of the other."""
    own = config.distill.objective
    return own if preset == own.preset else replace(own, preset=preset, student={})


def _spread(count: int, wanted: int) -> range:
    """At most ``wanted`` indices, evenly over ``count``: some of every class where a set is sorted by class."""
    return range(0, count, max(1, count // wanted))[:wanted]


def run(config: DemoConfig, folder: Path, title: str, *, console: Console, progress: bool = True) -> bool:
    """One experiment of the demo: train, distil with each preset, print the table.

    Args:
        config: the experiment.
        folder: where each of its runs gets a folder.
        title: what it is called in print.
        console: where to print.
        progress: draw progress bars.

    Returns:
        Whether the student of the first preset reached ``config.least`` of its teacher's top-1.
    """
    started = time.perf_counter()
    images = data.load(config.data)
    console.rule(f"[bold]{title}[/]: {images.num_classes} classes, {images.image_size} x {images.image_size}")

    def network(model: ModelConfig) -> FeatureModel:
        torch.manual_seed(config.distill.seed)
        plain = create_model(model, num_classes=images.num_classes)
        return extract(plain, stages=model.stages, image_size=images.image_size)

    rows: list[tuple[str, str, float, float | None]] = []
    taught, names = {}, {}
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        features = network(model)
        taught[role] = features
        result = teach(
            features.model,
            images,
            replace(config.teach, out=str(folder / f"{role}_with_data")),
            description=model.metadata(),
            title=f"{role}, with data",
            progress=progress,
        )
        names[role] = f"{role}: {model.name}, {sum(p.numel() for p in features.model.parameters()) / 1e3:.0f}k weights"
        rows.append((names[role], "labelled images", result.accuracy, result.images_per_s))
    teacher_top1 = rows[0][2]

    runs = {}
    for preset in config.presets:
        student = network(config.student)
        result_ = distill(
            taught["teacher"],
            student,
            replace(config.distill, objective=objective_of(config, preset), out=str(folder / preset)),
            data=images,  # the held-out half, for the accuracy curve
            description=config.student.metadata(),
            inputs={name: to_dict(getattr(config, name)) for name in ("data", "teacher", "student")},
            progress=progress,
        )
        source = f"teacher alone, {preset}"
        assert result_.accuracy is not None
        rows.append((names["student"], source, result_.accuracy, result_.images_per_s))
        runs[preset] = result_
    rows.append(("chance", "", 1 / images.num_classes, None))
    console.print(
        report.result_table(
            [
                {
                    "network": name,
                    "learned from": source,
                    "top-1": f"{top1:.1%}",
                    "of the teacher": f"{top1 / teacher_top1:.1%}",
                    "images/s": "" if speed is None else f"{speed:.0f}",
                }
                for name, source, top1, speed in rows
            ],
            title,
        )
    )
    for preset, result_ in runs.items():
        console.print(f"[bold]{preset}[/]: {result_.run_dir}")
        for what, name in (
            ("student", "student.safetensors"),
            ("checkpoints", "checkpoints"),
            ("resolved config", "config.yaml"),
            ("TensorBoard log", "tensorboard"),
            ("synthetic images", f"images/epoch-{config.distill.loop.epochs:04d}.png"),
            ("curves", "curves.png"),
        ):
            console.print(f"  {what:17} {result_.run_dir / name}", highlight=False, soft_wrap=True)
    share = rows[2][2] / teacher_top1
    painted = runs[config.presets[0]].run_dir / f"images/epoch-{config.distill.loop.epochs:04d}.png"
    assert isinstance(images.test, Sized)
    some = _spread(len(images.test), config.distill.loop.batch_size)
    held_out = torch.stack([images.test[index][0] for index in some])
    shown = report.save_image_grid(held_out, folder / "held_out.png")  # normalised by 0.5: in [-1, 1], as painted ones
    report.save_beside([shown, painted], folder / "pictures.png", scale=3 if images.image_size < 64 else 1)
    console.print(f"held-out images beside synthetic ones: {folder / 'pictures.png'}", highlight=False, soft_wrap=True)
    seconds = time.perf_counter() - started
    report.write_results(
        folder / "results.json",
        {
            "experiment": title,
            "environment": report.environment(),
            "seconds": seconds,
            "rounds": config.distill.loop.epochs * config.distill.loop.rounds_per_epoch,
            "rows": [
                {"network": name, "learned_from": source, "top1": top1, "images_per_s": speed}
                for name, source, top1, speed in rows
            ],
        },
    )
    reached = share >= config.least
    console.print(
        f"{'[green]reached[/]' if reached else '[red]missed[/]'}: the {config.presets[0]} student has {share:.1%} of "
        f"its teacher's top-1, {config.least:.0%} were wanted ({seconds:.0f} s)"
    )
    return reached


def demo(out: str | None, *, names: Sequence[str] = ("digits", "rendered"), seed: int = 0) -> bool:
    """Run the demo's experiments, ``configs/demo_NAME.yaml`` each.

    Returns:
        Whether every one reached what it must.
    """
    # Networks this small gain little from a second thread, lose much where the cores are busy, and with one the numbers
    # do not depend on how many cores there are.
    torch.set_num_threads(1)
    console = Console()
    folder = new_run_folder(out, "demo")
    reached = []
    for name in names:
        config = read(DemoConfig, find(f"demo_{name}"))
        config = replace(config, teach=replace(config.teach, seed=seed), distill=replace(config.distill, seed=seed))
        reached.append(run(config, folder / name, name, console=console))
    return all(reached)
