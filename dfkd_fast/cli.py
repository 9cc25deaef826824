"""The commands, thin over the Python functions: teach, distill, evaluate, export, demo, bench, profile and doctor."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dfkd_fast.config import DataConfig, DistillConfig, EngineName, ModelConfig, Precision, TeachConfig, find, to_dict

__all__ = ["main"]

_TEACH, _DISTILL = TeachConfig(), DistillConfig()


def _described(weights: str, model: ModelConfig | None) -> tuple[ModelConfig, dict[str, str]]:
    """The network that a weights file belongs to, from the command line or from the file's own metadata."""
    from dfkd_fast.models import read_metadata

    metadata = read_metadata(weights)
    if model is not None:
        return replace(model, weights=weights), metadata
    if "model" not in metadata:
        raise ValueError(f"{weights} does not say which network it belongs to: name one with --model.name")
    options = json.loads(metadata.get("options", "{}"))
    return ModelConfig(name=metadata["model"], weights=weights, options=options), metadata


def _print_result(title: str, rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console

    from dfkd_fast.report import result_table

    Console().print(result_table([{"": name, title: str(value)} for name, value in rows], ""))


def _teach(
    *,
    data: DataConfig,
    teacher: ModelConfig,
    student: ModelConfig | None = None,
    teach: TeachConfig = _TEACH,
    distill: DistillConfig = _DISTILL,
    role: Literal["teacher", "student"] = "teacher",
    out: str | None = None,
) -> None:
    """Train a classifier on labelled images: the experiment's teacher, or its student for comparison.

    Args:
        data: the labelled images.
        teacher: the network to train; its weights, where given, are where training starts, with a new last layer.
        student: the network to train with ``--role student``.
        teach: rates and length.
        distill: not used here; part of an experiment's file.
        role: which of the two networks.
        out: folder of the run; over ``teach.out``.
    """
    import torch

    from dfkd_fast import data as datasets
    from dfkd_fast.engine import teach as train
    from dfkd_fast.models import create_model

    model = teacher if role == "teacher" else student
    if model is None:
        raise ValueError("--role student needs --student.name")
    images = datasets.load(data)
    config = replace(teach, out=out) if out is not None else teach
    torch.manual_seed(config.seed)  # the networks' initial weights are part of the run
    network = create_model(model, num_classes=images.num_classes, new_head=True)
    result = train(network, images, config, description=model.metadata(), workers=data.workers)
    _print_result(
        "result",
        [
            ("top-1", f"{result.accuracy:.2%}"),
            ("images/s", f"{result.images_per_s:.0f}"),
            ("weights", result.weights),
            ("run", result.run_dir),
        ],
    )


def _distill(
    *,
    teacher: ModelConfig,
    student: ModelConfig,
    data: DataConfig | None = None,
    num_classes: int | None = None,
    teach: TeachConfig = _TEACH,
    distill: DistillConfig = _DISTILL,
    engine: EngineName | None = None,
    precision: Precision | None = None,
    out: str | None = None,
    resume: bool = False,
) -> None:
    """Train a student to agree with a teacher, without the teacher's data.

    Args:
        teacher: the network that knows; its weights are needed.
        student: the network that learns.
        data: held-out images to evaluate on; none are needed to distil.
        num_classes: of the teacher, where neither the data nor the weights file says it.
        teach: not used here; part of an experiment's file.
        distill: the run.
        engine: how steps are executed, see ``distill.engine``; over it.
        precision: over ``distill.precision``.
        out: folder of the run; over ``distill.out``.
        resume: go on from the newest sound checkpoint in that folder.
    """
    import torch

    from dfkd_fast import data as datasets
    from dfkd_fast.engine import distill as run
    from dfkd_fast.models import create_model, extract, read_metadata

    if teacher.weights is None:
        raise ValueError("--teacher.weights must name the teacher's weights; `dfkd-fast teach` makes some")
    metadata = read_metadata(teacher.weights)
    images = datasets.load(data) if data is not None else None
    classes = num_classes or (images.num_classes if images is not None else int(metadata.get("num_classes", 0)))
    if not classes:
        raise ValueError("--num_classes must be given: neither data nor the weights file says it")
    given = {"out": out, "engine": engine, "precision": precision}
    config = replace(distill, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    config = replace(config, resume=resume or config.resume)
    if images is None:
        known = {name: json.loads(metadata[name]) for name in ("image_size", "mean", "std") if name in metadata}
        config = replace(config, **{k: v for k, v in known.items() if getattr(config, k) is None})
    size = config.image_size or (images.image_size if images is not None else 64)
    torch.manual_seed(config.seed)  # the student's initial weights are part of the run
    teacher_network, student_network = (
        extract(create_model(model, num_classes=classes), stages=model.stages, image_size=size)
        for model in (teacher, student)
    )
    inputs = {"data": data, "teacher": teacher, "student": student}
    result = run(
        teacher_network,
        student_network,
        config,
        data=images,
        description=student.metadata(),
        inputs={name: to_dict(value) for name, value in inputs.items() if value is not None},
    )
    rows: list[tuple[str, Any]] = [("agreement on synthetic images", f"{result.agreement:.2%}")]
    if result.accuracy is not None:
        rows.append(("top-1", f"{result.accuracy:.2%}"))
    rows += [
        ("images/s", f"{result.images_per_s:.0f}"),
        ("student", result.run_dir / "student.safetensors"),
        ("run", result.run_dir),
    ]
    _print_result("result", rows)


def _evaluate(
    *,
    weights: str,
    data: DataConfig,
    model: ModelConfig | None = None,
    device: str = "auto",
    teacher: ModelConfig | None = None,
    student: ModelConfig | None = None,
    teach: TeachConfig = _TEACH,
    distill: DistillConfig = _DISTILL,
) -> None:
    """Measure a classifier's accuracy on held-out images.

    Args:
        weights: safetensors or torch file.
        data: the labelled images.
        model: the network, where the weights file does not say it.
        device: ``auto`` is cuda where there is one.
        teacher: not used here; part of an experiment's file.
        student: not used here; part of an experiment's file.
        teach: not used here; part of an experiment's file.
        distill: not used here; part of an experiment's file.
    """
    from dfkd_fast import data as datasets
    from dfkd_fast.engine import Runtime
    from dfkd_fast.engine import evaluate as measure
    from dfkd_fast.models import create_model

    config, _ = _described(weights, model)
    images = datasets.load(data)
    runtime = Runtime.of(device, "auto", channels_last=True)
    network = runtime.place(create_model(config, num_classes=images.num_classes))
    with runtime.backends():
        result = measure(network, images.test, num_classes=images.num_classes, workers=data.workers, runtime=runtime)
    rows: list[tuple[str, Any]] = [("images", result.images), ("top-1", f"{result.top1:.2%}")]
    if result.top5 is not None:
        rows.append(("top-5", f"{result.top5:.2%}"))
    _print_result("result", [*rows, ("images/s", f"{result.images_per_s:.0f}")])


def _export(
    *,
    weights: str,
    out: str | None = None,
    model: ModelConfig | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> None:
    """Write a trained student as safetensors and ONNX, and check the ONNX output against PyTorch.

    Args:
        weights: the student's file.
        out: folder; None is ``export`` beside the weights.
        model: the network, where the weights file does not say it.
        num_classes: likewise.
        image_size: likewise.
    """
    from dfkd_fast.engine import export as write
    from dfkd_fast.models import create_model

    config, metadata = _described(weights, model)
    classes = num_classes or int(metadata.get("num_classes", 0))
    size = image_size or int(metadata.get("image_size", 0))
    if not classes or not size:
        raise ValueError(f"{weights} does not say its classes and image size: give --num_classes and --image_size")
    network = create_model(config, num_classes=classes)
    folder = Path(out) if out is not None else Path(weights).parent / "export"
    result = write(network, folder, image_size=size, metadata=metadata)
    _print_result(
        "result",
        [
            ("safetensors", result.safetensors),
            ("onnx", result.onnx),
            ("largest difference of logits, relative", f"{result.difference:.1e}"),
        ],
    )


def _demo(*, out: str | None = None, only: Literal["all", "digits", "rendered"] = "all", seed: int = 0) -> None:
    """Teach, distil and evaluate on digits and on rendered birds, on this machine, in minutes.

    Args:
        out: folder of the run; None makes a new one under ``runs/``.
        only: one of the two.
        seed: of everything random.
    """
    from dfkd_fast.demo import demo

    if not demo(out, names=["digits", "rendered"] if only == "all" else [only], seed=seed):
        raise SystemExit(1)


def _bench(
    *,
    ops: list[str] | None = None,
    shapes: str = "paper",
    out: str = "runs/bench",
    tune: bool = False,
    backends: list[str] | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Time the functional ops against eager PyTorch, torch.compile, public kernels and the roofline.

    Writes ``ops.json`` and a plot, ``ops.png``, into a folder, and prints a table.

    Args:
        ops: names of ops, which may also stand plainly: ``dfkd-fast bench contrastive_loss``; None is all.
        shapes: ``paper``, ``large``, or a YAML or JSON file with a list of shapes for each op, as sizes in order or
            by name: ``distillation_kl: [[512, 100], {rows: 512, classes: 100, dtypes: [float32]}]``.
        out: folder of the results; what it holds of other ops stays.
        tune: first try every launch configuration of the ops' kernels on these shapes, and write those that beat the
            first guess into ``kernels/tuned.json``.
        backends: ``reference``, ``compile``, ``compile_max_autotune``, ``triton``, ``cuda`` or ``peer:NAME``; None
            is all that there are.
        device: ``cpu`` is for trying this out: the reference and torch.compile, on cases that are small enough.
    """
    from dfkd_fast.benchmarks.ops.bench import bench

    if not bench(ops, shapes=shapes, out=out, tune=tune, backends=backends, device=device):
        raise SystemExit(1)


def _doctor(*, kernels: bool = False, launches: bool = False) -> None:
    """Say what is and is not available on this machine, and why.

    Args:
        kernels: compile the kernels instead, and show their registers, shared memory, spills and matrix instructions.
        launches: show what the CUDA extension launches at the paper's shapes instead, and what that takes of the GPU.
    """
    from dfkd_fast import doctor

    if kernels:
        from dfkd_fast.benchmarks.ops.compile_kernels import compile_for_this_gpu

        raise SystemExit(compile_for_this_gpu())
    raise SystemExit(doctor.launches() if launches else doctor.doctor())


def _profile(
    *,
    teacher: ModelConfig,
    student: ModelConfig,
    data: DataConfig | None = None,
    num_classes: int | None = None,
    teach: TeachConfig = _TEACH,
    distill: DistillConfig = _DISTILL,
    engines: list[EngineName] | None = None,
    steps: int = 10,
    out: str | None = None,
) -> None:
    """Print where a step's time goes, by network and op.

    Writes ``anatomy.json`` and Chrome traces, which Perfetto and chrome://tracing open, into a folder.

    Args:
        teacher: the network that knows; without weights it gets random ones, and the times are the same.
        student: the network that learns; likewise.
        data: not loaded; says the number of classes and the size of the images.
        num_classes: of the networks, where neither the data nor the weights file says it; else 200.
        teach: not used here; part of an experiment's file.
        distill: the run.
        engines: what to run the steps with, as a list or with commas: ``eager,graph``; None is ``distill.engine``.
        steps: how many of each kind to record.
        out: folder; None makes a new one under ``runs/``.
    """
    import torch

    from dfkd_fast import data as datasets
    from dfkd_fast.models import create_model, extract, read_metadata
    from dfkd_fast.profiling import profile

    metadata = read_metadata(teacher.weights) if teacher.weights is not None else {}
    if teacher.weights is None:
        print("no --teacher.weights: the teacher's are random, which changes no time")
    of_data = datasets.num_classes(data) if data is not None else None
    classes = num_classes or int(metadata.get("num_classes", 0)) or of_data or 200
    size = distill.image_size or int(metadata.get("image_size", 0)) or (data.image_size if data is not None else 224)
    torch.manual_seed(distill.seed)
    teacher_network, student_network = (
        extract(create_model(model, num_classes=classes), stages=model.stages, image_size=size)
        for model in (teacher, student)
    )
    result = profile(
        teacher_network,
        student_network,
        replace(distill, image_size=size),
        engines=engines or [distill.engine],
        steps=steps,
        networks=(teacher.name, student.name),
        out=out,
    )
    traces = [(f"trace, {name}", path) for name, path in result.traces.items()]
    _print_result("result", [("classes", classes), ("anatomy.json", result.folder / "anatomy.json"), *traces])


COMMANDS: Any = {  # jsonargparse takes nested dicts, and mypy does not take a flat one for one
    "teach": _teach,
    "distill": _distill,
    "evaluate": _evaluate,
    "export": _export,
    "demo": _demo,
    "bench": _bench,
    "profile": _profile,
    "doctor": _doctor,
}


def _prepare_bench(arguments: Sequence[str]) -> list[str]:
    """Names of ops that stand for themselves, and values with commas, as lists."""
    options, names, waiting = [], [], False
    for index, word in enumerate(arguments[1:], 1):
        if waiting or word.startswith("-"):
            listed = waiting and arguments[index - 1] in ("--ops", "--backends") and not word.startswith("[")
            options.append(json.dumps(word.split(",")) if listed else word)
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            switch = word in ("--help", "-h") or (word == "--tune" and following not in ("true", "false"))
            if word == "--tune" and switch:
                options[-1] = "--tune=true"
            waiting = not waiting and not switch and "=" not in word
        else:
            names.append(word)
    return [arguments[0], *options, *([f"--ops={json.dumps(names)}"] if names else [])]


def _prepare(arguments: Sequence[str]) -> list[str]:
    """Let ``--config`` take a packaged config's name, switches stand without a value, and ops for themselves."""
    if arguments and arguments[0] == "bench":
        arguments = _prepare_bench(arguments)
    prepared: list[str] = []
    for index, word in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if index and arguments[index - 1] == "--config":
            word = str(find(word))
        elif word.startswith("--config="):
            word = "--config=" + str(find(word.removeprefix("--config=")))
        elif word in ("--resume", "--kernels", "--launches") and following.startswith("-"):
            word += "=true"
        elif word.startswith("--engines=") or (index and arguments[index - 1] == "--engines"):
            option, equals, names = word.rpartition("=")
            word = option + equals + (names if names.startswith("[") else json.dumps(names.split(",")))
        prepared.append(word)
    return prepared


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. What a user can mend is said shortly, with exit status 2; DFKD_FAST_TRACEBACK=1 shows all."""
    from jsonargparse import ArgumentError, auto_cli

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("dfkd_fast").setLevel(logging.INFO)  # our own lines, not those of every library
    try:
        words = _prepare(sys.argv[1:] if arguments is None else arguments)
        # Its own way out of an error prints all hundred options first.
        auto_cli(COMMANDS, as_positional=False, args=words, exit_on_error=False)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ArgumentError, ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("DFKD_FAST_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
