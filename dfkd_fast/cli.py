"""Data-free knowledge distillation: train, distill, evaluate, export and measure classifiers."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from argparse import SUPPRESS
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dfkd_fast.command_inputs import (
    agreed,
    build_classifier,
    build_networks,
    check_data,
    described_model,
    read_setup,
    required,
    with_image_size,
)
from dfkd_fast.config import (
    EngineName,
    ExperimentConfig,
    GeneratorConfig,
    ModelConfig,
    Precision,
    expand,
    find,
    is_factory,
    one_line,
    read_text,
    to_dict,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from dfkd_fast.engine import Cost, Measures

__all__ = ["main"]

log = logging.getLogger(__name__)


def _print_result(*rows: tuple[str, object]) -> None:
    from rich.console import Console

    from dfkd_fast.report import result_table

    console = Console()
    if not console.is_terminal:
        console.width = 1000  # a file or a pipe has no width, and paths must not be broken into lines
    console.print(result_table([{"": name, "result": str(value)} for name, value in rows], ""))


def _teach(
    experiment: ExperimentConfig,
    *,
    role: Literal["teacher", "student"] = "teacher",
    out: str | None = None,
    resume: bool = False,
) -> None:
    """Train the teacher, or the student for comparison, on labeled images.

    If the network has weights, training starts from them with a new last layer.

    Args:
        experiment: data, networks and training.
        role: the network to train.
        out: folder of the run; overrides ``teach.out``.
        resume: continue from the newest usable checkpoint in the run's folder.
    """
    import torch

    from dfkd_fast import data as datasets
    from dfkd_fast.engine import teach
    from dfkd_fast.models import create_model

    data, model = required(experiment, "data"), required(experiment, role)
    images = datasets.load(data)
    teaching = experiment.teach
    config = replace(teaching, out=out or teaching.out, resume=resume or teaching.resume)
    torch.manual_seed(config.seed)  # determines the initial weights
    network = create_model(model, num_classes=images.num_classes, new_head=True)
    result = teach(network, images, config, description=model.metadata(), workers=data.workers)
    _print_result(
        ("top-1", f"{result.accuracy:.2%}"),
        *([("images/s", f"{result.images_per_s:.0f}")] if result.images_per_s else []),
        ("weights", result.weights),
        ("run", result.run_dir),
    )


def _distill(
    experiment: ExperimentConfig,
    *,
    given: Container[str] = (),
    num_classes: int | None = None,
    pool: str | None = None,
    engine: EngineName | None = None,
    precision: Precision | None = None,
    out: str | None = None,
    resume: bool = False,
) -> None:
    """Train a student to match a teacher without the teacher's data.

    Data is optional and only used for evaluation. If ``data.root`` is not set, the data set is not read. Image size,
    normalization and classes come from the teacher's weights file, if it contains them.

    Args:
        experiment: networks, the run and data.
        given: names of the fields that the command line or the config file sets.
        num_classes: number of classes, required if neither the data nor the weights file gives it.
        pool: folder of images to train on instead of synthetic ones: image files, or the result of `synthesize`.
        engine: overrides ``distill.engine``.
        precision: overrides ``distill.precision``.
        out: folder of the run; overrides ``distill.out``.
        resume: continue from the newest usable checkpoint in the run's folder.
    """
    from dfkd_fast.engine import distill

    student = required(experiment, "student")
    overrides: dict[str, Any] = {"out": out, "engine": engine, "precision": precision, "resume": resume or None}
    if pool is not None:
        settings = replace(experiment.distill.synthesis, name="folder", options={"folder": pool}, per_round=1)
        overrides |= {"synthesis": settings, "loop": replace(experiment.distill.loop, generator_steps=0)}
    given_values = {name: value for name, value in overrides.items() if value is not None}
    experiment = replace(experiment, distill=replace(experiment.distill, **given_values))
    setup = read_setup(experiment, given, num_classes, evaluate=True)
    weights = setup.teacher.weights
    assert weights is not None
    if not weights.startswith("hf:"):  # `report` reads it from any folder
        weights = str(expand(weights).resolve())
    networks = {"data": setup.data, "teacher": replace(setup.teacher, weights=weights), "student": student}
    classes = setup.description.classes
    names = {"classes": json.dumps(classes)} if classes is not None else {}
    result = distill(
        *build_networks(replace(experiment, teacher=setup.teacher), setup.classes, setup.image_size),
        setup.config,
        data=setup.images,
        description={**names, **student.metadata()},
        inputs={name: to_dict(value) for name, value in networks.items() if value is not None},
    )
    _print_result(
        ("agreement on synthetic images", f"{result.agreement:.2%}"),
        *([("top-1", f"{result.accuracy:.2%}")] if result.accuracy is not None else []),
        *([("images/s", f"{result.images_per_s:.0f}")] if result.images_per_s else []),
        ("student", result.run_dir / "student.safetensors"),
        ("run", result.run_dir),
    )


def _synthesize(
    experiment: ExperimentConfig,
    *,
    given: Container[str] = (),
    count: int,
    out: str,
    format: Literal["safetensors", "png"] = "safetensors",
    generator: str | None = None,
    num_classes: int | None = None,
) -> None:
    """Write synthetic images, their labels and a manifest to a folder, for `distill --pool` or other programs.

    Args:
        experiment: the teacher, the synthesizer and, for adversarial terms, a trained student.
        given: names of the fields that the command line or the config file sets.
        count: number of images.
        out: the folder.
        format: one file, ``pool.safetensors``, or PNG files in one folder per class.
        generator: ``generator.safetensors`` of a run, for synthesizers that train a generator next to the student.
        num_classes: number of classes, required if the weights file does not give it.
    """
    from dfkd_fast.engine import build_generator, make_images
    from dfkd_fast.models import create_model, load_weights, read_metadata

    setup = read_setup(experiment, given, num_classes, evaluate=False)
    stored = {} if generator is None else read_metadata(generator)
    size = json.loads(stored.get("image_size", "null"))
    if generator is not None:
        size = agreed(generator, "image_size", size, (setup.teacher.weights or "the teacher", setup.config.image_size))
    config = replace(setup.config, image_size=size or setup.image_size)
    trained = None
    if generator is not None:
        built = stored.get("generator")
        if built is not None:
            config = replace(config, generator=GeneratorConfig(**json.loads(built)))
            name = config.generator.name
            if is_factory(name, ()) and name != experiment.distill.generator.name:
                raise ValueError(
                    f"{generator} names the generator {name!r}, which imports and runs code. If you trust it, set "
                    f"--distill.generator.name {name}"
                )
        trained = build_generator(config.generator, config.image_size or setup.image_size)
        load_weights(trained, generator)
    teacher, student = (
        None if each is None or each.weights is None else create_model(each, num_classes=setup.classes)
        for each in (setup.teacher, experiment.student)
    )
    assert teacher is not None
    if experiment.student is not None and student is None:
        print("no --student.weights: adversarial terms have no effect")
    folder = make_images(teacher, config, count=count, out=out, student=student, generator=trained, png=format == "png")
    _print_result(("images", count), ("folder", folder))


def _evaluate(
    experiment: ExperimentConfig,
    *,
    given: Container[str] = (),
    weights: str,
    model: ModelConfig | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    json: str | None = None,
) -> None:
    """Measure a classifier on held-out images: accuracy, calibration, agreement with its teacher, and cost.

    The image size comes from the weights file, if it contains one. Normalization and classes must be the data's, also
    those of the teacher.

    Args:
        experiment: the data and, to compare with it, a teacher with weights.
        given: names of the fields that the command line or the config file sets.
        weights: safetensors or torch file of the weights.
        model: the network, required if the weights file does not name it.
        device: a torch device; ``auto`` is ``cuda`` if available, otherwise ``cpu``.
        precision: precision of the networks, as in ``distill.precision``.
        json: file to write all values to.
    """
    from dfkd_fast import data as datasets
    from dfkd_fast.engine import Runtime, cost, is_main, measure, predictions
    from dfkd_fast.models import create_model, read_description
    from dfkd_fast.report import environment, write_results

    data, description = required(experiment, "data"), read_description(weights)
    config = described_model(weights, model, description)
    data = with_image_size(weights, description, data, given)
    images = datasets.load(data)
    check_data(weights, description, images)
    runtime = Runtime.of(device, precision, channels_last=True)
    options: dict[str, Any] = {"num_classes": images.num_classes, "workers": data.workers, "runtime": runtime}
    network = create_model(config, num_classes=images.num_classes)
    teacher = experiment.teacher.weights if experiment.teacher is not None else None
    if teacher is not None:
        description = read_description(teacher)
        config = described_model(teacher, experiment.teacher, description, "teacher")
        check_data(teacher, description, images)
        teacher_network = create_model(config, num_classes=images.num_classes)
    taught = None
    with runtime.backends():
        student = predictions(runtime.place(network), images.test, **options)
        if teacher is not None:
            taught = predictions(runtime.place(teacher_network), images.test, **options)
        if not is_main():
            return
        spent = cost(network, images.image_size, runtime)
    measures = measure(student, teacher=taught)
    teacher_top1 = measure(taught).top1 if taught is not None else None
    speed = measures.images / student.seconds
    _print_measures(measures, spent, images.classes, speed, teacher_top1)
    if json is not None:
        content = {
            **{"weights": weights, "teacher": teacher, "data": data.name, "classes": images.classes},
            **{"precision": runtime.precision, "images_per_s": speed, "teacher_top1": teacher_top1},
            **{"measures": to_dict(measures), "cost": to_dict(spent), "environment": environment()},
        }
        print(f"written to {write_results(json, content)}")


def _print_measures(
    measures: Measures, cost: Cost, classes: Sequence[str], images_per_s: float, teacher_top1: float | None
) -> None:
    from rich.console import Console

    from dfkd_fast.report import result_table

    def shown(name: str, value: float | None, form: str) -> list[tuple[str, object]]:
        return [(name, format(value, form))] if value is not None else []

    gib = cost.peak_bytes / 2**30 if cost.peak_bytes is not None else None
    _print_result(
        ("images", measures.images),
        *shown("top-1", measures.top1, ".2%"),
        *shown("top-5", measures.top5, ".2%"),
        *shown("top-1 of the teacher", teacher_top1, ".2%"),
        *shown("agreement with the teacher", measures.agreement, ".2%"),
        *shown("KL(teacher || student), nats", measures.kl, ".4f"),
        *shown("calibration error", measures.ece, ".2%"),
        *shown("parameters", cost.parameters, ","),
        *shown("MFLOPs per image", cost.flops / 1e6, ",.2f"),
        *shown("latency of one image, ms", cost.latency_ms, ".3g"),
        *shown("latency per image of 64, ms", cost.batch_ms_per_image, ".3g"),
        *shown("peak memory of 64 images, GiB", gib, ".2f"),
        *shown("images/s", images_per_s, ".0f"),
    )
    accuracy = {index: value for index, value in enumerate(measures.per_class) if value is not None}
    worst = [
        {"worst classes": classes[index], "images": measures.counts[index], "top-1": f"{accuracy[index]:.2%}"}
        for index in sorted(accuracy, key=accuracy.__getitem__)[:5]
    ]
    confused = [
        {"confused": classes[label], "with": classes[predicted], "images": count}
        for label, predicted, count in measures.confused[:5]
    ]
    for rows in filter(None, (worst, confused)):
        Console().print(result_table(rows))


def _predict(
    *,
    images: list[str],
    weights: str,
    model: ModelConfig | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    format: Literal["csv", "json"] = "csv",
    out: str | None = None,
    top: int = 5,
    workers: int = 0,
    device: str = "auto",
    precision: Precision = "fp32",
) -> None:
    """Classify image files, and all images in folders.

    Writes one row per image: its path, the best class and its probability, and then those of the next classes. Image
    size, normalization and class names come from the weights file, if it contains them. An image that cannot be read is
    reported on stderr. The others are still classified, and the exit status is 1.

    Args:
        images: image files, and folders that are searched for images, also in their subfolders.
        weights: safetensors or torch file of the weights.
        model: the network, required if the weights file does not name it.
        num_classes: number of classes, required if the weights file does not give it.
        image_size: height and width of the images in pixels, required if the weights file does not give it.
        format: ``csv`` or ``json``.
        out: output file; None writes to stdout.
        top: number of classes per image.
        workers: number of processes that read images.
        device: a torch device; ``auto`` is ``cuda`` if available, otherwise ``cpu``.
        precision: precision of the network, as in ``distill.precision``.
    """
    from dfkd_fast.engine import Runtime, predict, write_predictions
    from dfkd_fast.models import normalization

    runtime = Runtime.of(device, precision, channels_last=True)
    network, _, _, size, description = build_classifier(weights, model, num_classes, image_size)
    mean, std = normalization(network)
    predictions = predict(
        runtime.place(network),
        images,
        image_size=size,
        mean=description.mean or mean,
        std=description.std or std,
        classes=description.classes,
        top=top,
        workers=workers,
        runtime=runtime,
        # On a terminal, the bar and the rows would be mixed up.
        progress=sys.stderr.isatty() and (out is not None or not sys.stdout.isatty()),
    )
    if write_predictions(predictions, out, format=format):
        raise SystemExit(1)


def _export(
    *,
    weights: str,
    out: str | None = None,
    model: ModelConfig | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Export a student to safetensors and ONNX with a model card, and check the ONNX output against PyTorch.

    Args:
        weights: safetensors or torch file of the student's weights.
        out: output folder; None is the folder ``export`` next to the weights.
        model: the network, required if the weights file does not name it.
        num_classes: number of classes, required if the weights file does not give it.
        image_size: height and width of the images in pixels, required if the weights file does not give it.
        license: license of the weights for the model card, as an identifier of the Hugging Face hub.
        push_to_hub: upload the files to this repository of the Hugging Face hub, OWNER/NAME.
        private: create a private repository.
    """
    from dfkd_fast.engine import export, model_card
    from dfkd_fast.models import read_metadata
    from dfkd_fast.models.weights import resolve

    if push_to_hub is not None:
        model_card.require_login(push_to_hub)
    if out is None and weights.startswith("hf:"):
        raise ValueError(f"--out is required: there is no folder next to {weights}")
    network, config, classes, size, description = build_classifier(weights, model, num_classes, image_size)
    folder = Path(out) if out is not None else Path(weights).parent / "export"
    result = export(network, folder, image_size=size, metadata=read_metadata(weights))
    card = model_card.write_card(
        result.onnx.parent,
        weights=resolve(weights),
        model=config,
        description=description,
        num_classes=classes,
        image_size=size,
        license=license,
        repo=push_to_hub,
    )
    url = model_card.push_to_hub(card.parent, push_to_hub, private=private) if push_to_hub else None
    _print_result(
        ("safetensors", result.safetensors),
        ("onnx", result.onnx),
        ("model card", card),
        *([("uploaded", url)] if url else []),
        ("largest relative difference of logits", f"{result.difference:.1e}"),
    )


def _report(
    *, runs: list[str], out: str = "report.html", device: str = "auto", root: str | None = None, trust: bool = False
) -> None:
    """Write an HTML page of what the students of one or more runs learned.

    Args:
        runs: folders of `distill`; several become columns, ranked by top-1 accuracy. That of a sweep adds its table and
            up to eight of its runs.
        out: the file.
        device: a torch device; ``auto`` is ``cuda`` if available, otherwise ``cpu``.
        root: root folder of the held-out images; None uses that of the run.
        trust: build networks and generators that a run names as package.module:factory, which imports and runs code.
    """
    from dfkd_fast.run_page import write_page

    _print_result(("page", write_page(runs, out, device=device, root=root, trust=trust)))


def _demo(*, out: str | None = None, only: Literal["all", "digits", "rendered"] = "all", seed: int = 0) -> None:
    """Train, distill and evaluate on digits and on rendered birds; takes minutes on a CPU.

    Args:
        out: folder of the run; None creates a new one under ``runs/``.
        only: the experiments to run.
        seed: random seed.
    """
    from dfkd_fast.demo import demo

    if not demo(out, names=["digits", "rendered"] if only == "all" else [only], seed=seed):
        raise SystemExit(1)


def _bench(
    *,
    ops: list[str],
    shapes: str = "paper",
    out: str | None = None,
    tune: bool = False,
    count: bool = False,
    backends: str | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Time ops or whole steps against eager PyTorch, torch.compile and others, or count launches.

    Prints a table, and writes ``ops.json`` and the plot ``ops.png`` to a folder; for steps, ``step.json`` or
    ``step_cpu.json``.

    Args:
        ops: names of the ops to time; by default all. The only name ``step`` times rounds of distillation instead.
        shapes: ``paper``, ``large``, or a YAML or JSON file with a list of shapes per op, with sizes by position or by
            name: ``distillation_kl: [[512, 100], {rows: 512, classes: 100, dtypes: [float32]}]``.
        out: output folder; results of other ops in it are kept. None is ``runs/bench``, or
            ``benchmarks/results/counted`` of the repository with ``count``.
        tune: before timing, try every launch configuration of the kernels on these shapes, and write those that beat
            the default to ``kernels/tuned.json``.
        count: count kernel launches and bytes of memory instead, without a GPU: of the given ops, or of all ops and of
            the distillation steps.
        backends: ``reference``, ``compile``, ``compile_max_autotune``, ``triton``, ``cuda`` or ``peer:NAME``, separated
            by commas; None is all.
        device: ``cpu`` times steps on the CPU; for ops it only runs the reference and torch.compile, on small shapes,
            to test the command.
    """
    if count:
        from dfkd_fast.benchmarks import count as counting

        if tune or backends or shapes != "paper":
            raise ValueError("--count takes no --tune, --backends or --shapes")
        counting.count(ops or None, out=out or counting.FOLDER)
        return
    if ops == ["step"]:
        from dfkd_fast.benchmarks.step.variants import bench_step

        if tune or backends or shapes != "paper":
            raise ValueError("step takes no --tune, --backends or --shapes")
        raise SystemExit(bench_step(Path(out or "runs/bench"), device))
    from dfkd_fast.benchmarks.ops.bench import bench

    chosen = backends.split(",") if backends else None
    if not bench(ops or None, shapes=shapes, out=out or "runs/bench", tune=tune, backends=chosen, device=device):
        raise SystemExit(1)


def _doctor(*, kernels: bool = False, launches: bool = False) -> None:
    """Show which optional features this machine supports, and why others are unavailable.

    Args:
        kernels: compile the kernels instead, and show their registers, shared memory, spills and matrix instructions.
        launches: show the kernels that the CUDA extension launches at the paper's shapes, and their occupancy, instead.
    """
    from dfkd_fast import doctor

    if kernels:
        from dfkd_fast.benchmarks.ops.compile_kernels import compile_for_this_gpu

        raise SystemExit(compile_for_this_gpu())
    (doctor.launches if launches else doctor.doctor)()


def _profile(
    experiment: ExperimentConfig,
    *,
    num_classes: int | None = None,
    engines: str | None = None,
    steps: int = 10,
    out: str | None = None,
) -> None:
    """Profile steps and print their time by network and op.

    Writes ``breakdown.json`` and Chrome traces (for Perfetto or chrome://tracing) to a folder. Networks without weights
    get random ones. The times do not depend on the weights. The data is not loaded; it only gives the number of
    classes and the image size.

    Args:
        experiment: networks, the run and data.
        num_classes: number of classes; None takes it from the weights file or the data, or else uses 200.
        engines: names of engines, separated by commas, for example ``eager,graph``; None is ``distill.engine``.
        steps: number of generator steps and of student steps to record.
        out: output folder; None creates a new one under ``runs/``.
    """
    from dfkd_fast import data as datasets
    from dfkd_fast.models import WeightsDescription, read_description
    from dfkd_fast.profiling import profile

    data, teacher, config = experiment.data, required(experiment, "teacher"), experiment.distill
    description = WeightsDescription() if teacher.weights is None else read_description(teacher.weights)
    if teacher.weights is None:
        print("no --teacher.weights: using random weights; the times do not depend on the weights")
    data_classes = datasets.num_classes(data) if data is not None else None
    classes = num_classes or description.num_classes or data_classes or 200
    size = config.image_size or description.image_size or (data.image_size if data is not None else 224)
    result = profile(
        *build_networks(experiment, classes, size),
        replace(config, image_size=size),
        engines=engines.split(",") if engines else [config.engine],  # type: ignore[arg-type]
        steps=steps,
        networks=(teacher.name, required(experiment, "student").name),
        out=out,
    )
    traces = [(f"trace, {name}", path) for name, path in result.traces.items()]
    _print_result(("classes", classes), ("breakdown", result.folder / "breakdown.json"), *traces)


def _sweep(
    *,
    arguments: Sequence[str] = (),
    grid: str,
    out: str | None = None,
    seeds: list[int] | None = None,
    changes: dict[str, Any] | None = None,
    jobs: int | None = None,
    minutes_per_cell: float = math.inf,
    minutes: float = math.inf,
    dry_run: bool = False,
    page: bool = False,
) -> None:
    """Run many settings with several seeds, in parallel processes, and compare them in one table.

    Starting it again with the same ``--out`` continues it, whatever happened to the process. The exit status is 0 if no
    run is missing.

    Args:
        arguments: the command line.
        grid: YAML file with the axes of the sweep, or name of a packaged sweep: ``table1`` to ``table5`` and
            ``figure7`` of the paper, ``rendered_tiny``, ``rendered_small``.
        out: folder of the sweep; None creates a new one under ``runs/``.
        seeds: random seeds, instead of those of the file.
        changes: fields of all runs by dotted path, for example ``{distill.loop.epochs: 10}``.
        jobs: number of processes at a time; None is one per GPU, or without GPUs one per core.
        minutes_per_cell: minutes after which a run is stopped with a checkpoint; the next start continues it.
        minutes: minutes after which the whole sweep is stopped like this.
        dry_run: only list the runs, with their time and memory estimated from a few steps.
        page: also write ``report.html`` to the folder, as `report` does.
    """
    from dfkd_fast import sweep as sweeps

    config = sweeps.read_sweep(grid)
    config = config if seeds is None else replace(config, seeds=seeds)
    for cell in sweeps.sweep_cells(config, changes=changes):
        _check_factories(cell.experiment, arguments)
    if dry_run:
        sweeps.estimate(config, changes=changes, jobs=jobs)
        return
    limits: dict[str, Any] = {"minutes_per_cell": minutes_per_cell, "minutes": minutes}
    folder, rows = sweeps.sweep(config, out, changes=changes, jobs=jobs, **limits)
    if page:
        _report(runs=[str(folder)], out=str(folder / "report.html"), trust=True)  # the factories were checked above
    if any(row["status"] != "done" for row in rows):
        raise SystemExit(1)


def _reproduce(
    *,
    arguments: Sequence[str] = (),
    grid: str,
    out: str | None = None,
    changes: dict[str, Any] | None = None,
    jobs: int | None = None,
    minutes: float = math.inf,
) -> None:
    """Run a sweep, such as a table of the paper, and write ``report.html``, a page of its results, to its folder.

    It is `sweep --page`, which has more options. Starting it again continues the sweep.

    Args:
        arguments: the command line.
        grid: a sweep, as in `sweep`.
        out: folder of the sweep; None is ``runs/NAME``.
        changes: fields of all runs by dotted path, for example ``{distill.loop.epochs: 10}``.
        jobs: number of processes at a time; None is one per GPU, or without GPUs one per core.
        minutes: minutes after which the sweep is stopped with checkpoints.
    """
    out = out or f"runs/{Path(grid).stem}"
    _sweep(arguments=arguments, grid=grid, out=out, changes=changes, jobs=jobs, minutes=minutes, page=True)


def _methods() -> None:
    """List the packaged methods, for ``--config NAME``.

    A method's settings come after those of an experiment: ``dfkd-fast distill --config aircraft --config fast``.
    """
    from rich.console import Console

    from dfkd_fast.config import recipe
    from dfkd_fast.objectives import PRESETS
    from dfkd_fast.registry import load_plugins
    from dfkd_fast.report import result_table

    load_plugins()
    rows = []
    for name, preset in PRESETS.items():
        try:
            config = recipe(name)
        except FileNotFoundError:  # of another package
            config = None
        images = config.synthesis.name if config is not None else ""
        uses = preset.prior or "logits"
        rows.append({"method": name, "images": images, "uses of the teacher": uses, "source": preset.source})
    Console().print(result_table(rows, ""))


# Parameters of commands that are positional on the command line, and their names in the usage.
POSITIONAL = {"ops": "[OP ...]", "images": "IMAGE [IMAGE ...]", "runs": "RUN [RUN ...]", "grid": "GRID"}

# Each command, with the fields of ExperimentConfig that it reads.
COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "teach": (_teach, ("data", "teacher", "student", "teach")),
    "distill": (_distill, ("data", "teacher", "student", "distill")),
    "synthesize": (_synthesize, ("data", "teacher", "student", "distill")),
    "evaluate": (_evaluate, ("data", "teacher")),
    "predict": (_predict, ()),
    "export": (_export, ()),
    "report": (_report, ()),
    "demo": (_demo, ()),
    "bench": (_bench, ()),
    "profile": (_profile, ("data", "teacher", "student", "distill")),
    "sweep": (_sweep, ()),
    "reproduce": (_reproduce, ()),
    "methods": (_methods, ()),
    "doctor": (_doctor, ()),
}


DISTRIBUTED = ("teach", "distill", "synthesize", "evaluate")
"""Commands that torchrun can start in several processes."""

_ERROR_DELAY_S = 3.0


def _check_factories(
    experiment: ExperimentConfig, arguments: Sequence[str], *, model: ModelConfig | None = None
) -> None:
    """Raise ValueError if a config file names a factory, which is code, and the command line does not."""
    named = {
        "teacher": experiment.teacher,
        "student": experiment.student,
        "distill.generator": experiment.distill.generator,
        "model": model,
    }
    for field, part in named.items():
        libraries = () if field == "distill.generator" else ("timm", "torchvision")
        if part is None or not is_factory(part.name, libraries):
            continue
        if not any(part.name in each for each in arguments):
            raise ValueError(
                f"{field}.name is {part.name!r} in a config file, which imports and runs code. If you trust it, also "
                f"name it on the command line: --{field}.name {part.name} (for a sweep: --changes "
                f"'{{{field}.name: {part.name}}}')"
            )


def create_parser() -> ArgumentParser:
    """Create the command-line parser, with a subcommand per entry of ``COMMANDS``."""
    import docstring_parser
    from jsonargparse import ActionConfigFile, ArgumentParser

    class ConfigFile(ActionConfigFile):
        """Also accepts the name of a packaged config."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            path = find(values)
            text = read_text(ExperimentConfig, path, more={action.dest for action in parser._actions} - {self.dest})
            try:
                super().__call__(parser, cfg, text, option_string)
            except Exception as error:
                raise ValueError(f"{path}: {one_line(error)}") from error

    # With exit_on_error, the parser would print all options before the error.
    parser = ArgumentParser(prog="dfkd-fast", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands(required=True)
    for name, (command, used) in COMMANDS.items():
        summary = command.__doc__.split("\n", 1)[0]
        described = {each.arg_name: each.description for each in docstring_parser.parse(command.__doc__).params}
        positional = [each for each in POSITIONAL if each in command.__annotations__]
        usage = " ".join([f"dfkd-fast {name} [options]", *(POSITIONAL[each] for each in positional)])
        options = ArgumentParser(description=summary, usage=usage, exit_on_error=False)
        if used:
            options.add_argument(
                "--config", action=ConfigFile, help="YAML file, or name of a packaged config or method"
            )
            options.add_class_arguments(ExperimentConfig)
            for action in options._actions:  # accepted in config files, but hidden from the help text
                if action.dest.split(".")[0] in {field.name for field in fields(ExperimentConfig)} - {*used}:
                    action.help = SUPPRESS
        flags = [parameter for parameter, kind in command.__annotations__.items() if kind == "bool"]
        options.add_function_arguments(
            command, as_group=False, skip={"experiment", "given", "arguments", *positional, *flags}
        )
        for flag in flags:
            options.add_argument(f"--{flag}", action="store_true", help=described[flag])
        for each in positional:
            several: dict[str, Any] = {"nargs": "*", "default": []} if "..." in POSITIONAL[each] else {}
            options.add_argument(each, type=str, help=described[each], **several)
        commands.add_subcommand(name, options, help=summary)
    return parser


def _with_underscores(argument: str) -> str:
    """``--push-to-hub=x`` as ``--push_to_hub=x``, which is how the parser knows it."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


@contextmanager
def _join(command: str) -> Iterator[None]:
    """Join the processes that torchrun has started. Only the first one prints results and warnings."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield
        return
    if command not in DISTRIBUTED:
        raise ValueError(f"{command} runs in one process: start it without torchrun")
    from dfkd_fast.engine import join

    with join() as group, ExitStack() as stack:
        if group is not None and group.rank:
            logging.getLogger().setLevel(logging.ERROR)
            logging.getLogger("dfkd_fast").setLevel(logging.ERROR)
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _wait_for_first_process() -> None:
    """Let only one process print an error that all have: torchrun ends the others when the first one has failed."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_ERROR_DELAY_S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error prints one line and exits with status 2; DFKD_FAST_TRACEBACK=1 shows the traceback."""
    from jsonargparse import ArgumentError, set_parsing_settings

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("dfkd_fast").setLevel(logging.INFO)  # other libraries stay at WARNING
    # By default, jsonargparse imports the class that a value names as its class_path.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["dfkd_fast.config"])
    stack = ExitStack()  # closed only without an error
    try:
        parser = create_parser()
        arguments = [_with_underscores(each) for each in (sys.argv[1:] if arguments is None else arguments)]
        parsed = parser.instantiate(parser.parse_args(arguments))
        command, used = COMMANDS[parsed.subcommand]
        stack.enter_context(_join(parsed.subcommand))
        options = vars(parsed[parsed.subcommand])
        options.pop("config", None)
        if "given" in command.__annotations__:
            options["given"] = parser.parse_args(arguments, defaults=False)[parsed.subcommand]
        if "arguments" in command.__annotations__:
            options["arguments"] = arguments
        if used:
            experiment = ExperimentConfig(**{field.name: options.pop(field.name) for field in fields(ExperimentConfig)})
            _check_factories(experiment, arguments, model=options.get("model"))
            command(experiment, **options)
        else:
            command(**options)
        stack.close()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ArgumentError, ValueError, TypeError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        if os.environ.get("DFKD_FAST_TRACEBACK") == "1":
            raise
        _wait_for_first_process()
        print(f"error: {str(error) or 'not enough memory'}", file=sys.stderr)
        raise SystemExit(2) from error
