"""The commands teach, distill, evaluate, export, demo, bench, profile and doctor: thin over the Python functions."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dfkd_fast.config import EngineName, ExperimentConfig, ModelConfig, Precision, find, to_dict

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from dfkd_fast.graph import FeatureModel

__all__ = ["main"]


def _required(experiment: ExperimentConfig, name: str) -> Any:
    """A field of the experiment that the command needs."""
    value = getattr(experiment, name)
    if value is None:
        raise ValueError(f"--{name}.name must be given, or a file that has it by --config")
    return value


def _described(weights: str, model: ModelConfig | None) -> tuple[ModelConfig, dict[str, str]]:
    """The network of a weights file, from the command line or from the file's metadata."""
    from dfkd_fast.models import read_metadata

    metadata = read_metadata(weights)
    if model is not None:
        return replace(model, weights=weights), metadata
    if "model" not in metadata:
        raise ValueError(f"{weights} does not say which network it belongs to: name one with --model.name")
    options = json.loads(metadata.get("options", "{}"))
    return ModelConfig(name=metadata["model"], weights=weights, options=options), metadata


def _networks(experiment: ExperimentConfig, num_classes: int, image_size: int) -> tuple[FeatureModel, FeatureModel]:
    """Teacher and student, with the initial weights of ``distill.seed``, which are part of the run."""
    import torch

    from dfkd_fast.models import create_model, extract

    torch.manual_seed(experiment.distill.seed)

    def build(config: ModelConfig) -> FeatureModel:
        return extract(create_model(config, num_classes=num_classes), stages=config.stages, image_size=image_size)

    return build(_required(experiment, "teacher")), build(_required(experiment, "student"))


def _print_result(*rows: tuple[str, object]) -> None:
    from rich.console import Console

    from dfkd_fast.report import result_table

    Console().print(result_table([{"": name, "result": str(value)} for name, value in rows], ""))


def _teach(
    experiment: ExperimentConfig, *, role: Literal["teacher", "student"] = "teacher", out: str | None = None
) -> None:
    """Train a classifier on labelled images: the experiment's teacher, or its student for comparison.

    Training starts from the network's weights, if any are named, with a new last layer.

    Args:
        experiment: data, networks and training.
        role: which of the two networks.
        out: folder of the run; overrides ``teach.out``.
    """
    import torch

    from dfkd_fast import data as datasets
    from dfkd_fast.engine import teach
    from dfkd_fast.models import create_model

    data, model = _required(experiment, "data"), _required(experiment, role)
    images = datasets.load(data)
    config = replace(experiment.teach, out=out or experiment.teach.out)
    torch.manual_seed(config.seed)  # the initial weights are part of the run
    network = create_model(model, num_classes=images.num_classes, new_head=True)
    result = teach(network, images, config, description=model.metadata(), workers=data.workers)
    _print_result(
        ("top-1", f"{result.accuracy:.2%}"),
        ("images/s", f"{result.images_per_s:.0f}"),
        ("weights", result.weights),
        ("run", result.run_dir),
    )


def _distill(
    experiment: ExperimentConfig,
    *,
    num_classes: int | None = None,
    engine: EngineName | None = None,
    precision: Precision | None = None,
    out: str | None = None,
    resume: bool = False,
) -> None:
    """Train a student to agree with a teacher, without the teacher's data.

    Data, if named, are held-out images to evaluate on.

    Args:
        experiment: networks, the run and data.
        num_classes: of the teacher, if neither the data nor the weights file says it.
        engine: overrides ``distill.engine``.
        precision: overrides ``distill.precision``.
        out: folder of the run; overrides ``distill.out``.
        resume: continue from the newest sound checkpoint in that folder.
    """
    from dfkd_fast import data as datasets
    from dfkd_fast.engine import distill
    from dfkd_fast.models import read_metadata

    data, teacher, student = experiment.data, experiment.teacher, _required(experiment, "student")
    if teacher is None or teacher.weights is None:
        raise ValueError("--teacher.weights must name the teacher's weights; `dfkd-fast teach` makes some")
    metadata = read_metadata(teacher.weights)
    images = datasets.load(data) if data is not None else None
    classes = num_classes or (images.num_classes if images is not None else int(metadata.get("num_classes", 0)))
    if not classes:
        raise ValueError("--num_classes must be given: neither data nor the weights file says it")
    given = {"out": out, "engine": engine, "precision": precision, "resume": resume or None}
    config = replace(experiment.distill, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if images is None:
        known = {name: json.loads(metadata[name]) for name in ("image_size", "mean", "std") if name in metadata}
        config = replace(config, **{name: value for name, value in known.items() if getattr(config, name) is None})
    size = config.image_size or (images.image_size if images is not None else 64)
    inputs = {"data": data, "teacher": teacher, "student": student}
    result = distill(
        *_networks(experiment, classes, size),
        config,
        data=images,
        description=student.metadata(),
        inputs={name: to_dict(value) for name, value in inputs.items() if value is not None},
    )
    _print_result(
        ("agreement on synthetic images", f"{result.agreement:.2%}"),
        *([("top-1", f"{result.accuracy:.2%}")] if result.accuracy is not None else []),
        ("images/s", f"{result.images_per_s:.0f}"),
        ("student", result.run_dir / "student.safetensors"),
        ("run", result.run_dir),
    )


def _evaluate(
    experiment: ExperimentConfig, *, weights: str, model: ModelConfig | None = None, device: str = "auto"
) -> None:
    """Measure a classifier's accuracy on held-out images.

    Args:
        experiment: the data.
        weights: safetensors or torch file.
        model: the network, if the weights file does not say it.
        device: ``auto`` is cuda if there is one.
    """
    from dfkd_fast import data as datasets
    from dfkd_fast.engine import Runtime, evaluate
    from dfkd_fast.models import create_model

    data = _required(experiment, "data")
    config, _ = _described(weights, model)
    images = datasets.load(data)
    runtime = Runtime.of(device, "auto", channels_last=True)
    network = runtime.place(create_model(config, num_classes=images.num_classes))
    with runtime.backends():
        result = evaluate(network, images.test, num_classes=images.num_classes, workers=data.workers, runtime=runtime)
    _print_result(
        ("images", result.images),
        ("top-1", f"{result.top1:.2%}"),
        *([("top-5", f"{result.top5:.2%}")] if result.top5 is not None else []),
        ("images/s", f"{result.images_per_s:.0f}"),
    )


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
        out: folder; None is ``export`` next to the weights.
        model: the network, if the weights file does not say it.
        num_classes: the number of classes, if the weights file does not say it.
        image_size: height and width of the images, if the weights file does not say it.
    """
    from dfkd_fast.engine import export
    from dfkd_fast.models import create_model

    config, metadata = _described(weights, model)
    classes = num_classes or int(metadata.get("num_classes", 0))
    size = image_size or int(metadata.get("image_size", 0))
    if not classes or not size:
        raise ValueError(f"{weights} does not say its classes and image size: give --num_classes and --image_size")
    network = create_model(config, num_classes=classes)
    folder = Path(out) if out is not None else Path(weights).parent / "export"
    result = export(network, folder, image_size=size, metadata=metadata)
    _print_result(
        ("safetensors", result.safetensors),
        ("onnx", result.onnx),
        ("largest difference of logits, relative", f"{result.difference:.1e}"),
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
    ops: list[str],
    shapes: str = "paper",
    out: str = "runs/bench",
    tune: bool = False,
    backends: str | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Time the functional ops against eager PyTorch, torch.compile, public kernels and the roofline.

    Writes ``ops.json`` and a plot, ``ops.png``, into a folder, and prints a table.

    Args:
        ops: names of ops; none is all.
        shapes: ``paper``, ``large``, or a YAML or JSON file with a list of shapes for each op, as sizes in order or
            by name: ``distillation_kl: [[512, 100], {rows: 512, classes: 100, dtypes: [float32]}]``.
        out: folder of the results; results of other ops in it stay.
        tune: first try every launch configuration of the ops' kernels on these shapes, and write those that beat the
            default into ``kernels/tuned.json``.
        backends: ``reference``, ``compile``, ``compile_max_autotune``, ``triton``, ``cuda`` or ``peer:NAME``, separated
            by commas; None is all.
        device: ``cpu`` is for trying the command out: the reference and torch.compile, on small cases.
    """
    from dfkd_fast.benchmarks.ops.bench import bench

    chosen = backends.split(",") if backends else None
    if not bench(ops or None, shapes=shapes, out=out, tune=tune, backends=chosen, device=device):
        raise SystemExit(1)


def _doctor(*, kernels: bool = False, launches: bool = False) -> None:
    """Say what is and is not available on this machine, and why.

    Args:
        kernels: compile the kernels instead, and show their registers, shared memory, spills and matrix instructions.
        launches: show what the CUDA extension launches at the paper's shapes instead, and its use of the GPU.
    """
    from dfkd_fast import doctor

    if kernels:
        from dfkd_fast.benchmarks.ops.compile_kernels import compile_for_this_gpu

        raise SystemExit(compile_for_this_gpu())
    raise SystemExit(doctor.launches() if launches else doctor.doctor())


def _profile(
    experiment: ExperimentConfig,
    *,
    num_classes: int | None = None,
    engines: str | None = None,
    steps: int = 10,
    out: str | None = None,
) -> None:
    """Print where a step's time goes, by network and op.

    Writes ``breakdown.json`` and Chrome traces (for Perfetto or chrome://tracing) into a folder. Networks without
    weights get random ones; the times are the same. The data are not loaded: they only give the number of classes and
    the size of the images.

    Args:
        experiment: networks, the run and data.
        num_classes: of the networks, if neither the data nor the weights file says it; else 200.
        engines: names of engines, separated by commas: ``eager,graph``; None is ``distill.engine``.
        steps: number of steps of each kind to record.
        out: folder; None makes a new one under ``runs/``.
    """
    from dfkd_fast import data as datasets
    from dfkd_fast.models import read_metadata
    from dfkd_fast.profiling import profile

    data, teacher, config = experiment.data, _required(experiment, "teacher"), experiment.distill
    metadata = read_metadata(teacher.weights) if teacher.weights is not None else {}
    if teacher.weights is None:
        print("no --teacher.weights: the teacher's are random, which changes no time")
    of_data = datasets.num_classes(data) if data is not None else None
    classes = num_classes or int(metadata.get("num_classes", 0)) or of_data or 200
    size = config.image_size or int(metadata.get("image_size", 0)) or (data.image_size if data is not None else 224)
    result = profile(
        *_networks(experiment, classes, size),
        replace(config, image_size=size),
        engines=engines.split(",") if engines else [config.engine],  # type: ignore[arg-type]
        steps=steps,
        networks=(teacher.name, _required(experiment, "student").name),
        out=out,
    )
    traces = [(f"trace, {name}", path) for name, path in result.traces.items()]
    _print_result(("classes", classes), ("anatomy.json", result.folder / "anatomy.json"), *traces)


# Each command, and the fields of an ExperimentConfig that it reads, if it takes one.
COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "teach": (_teach, ("data", "teacher", "student", "teach")),
    "distill": (_distill, ("data", "teacher", "student", "distill")),
    "evaluate": (_evaluate, ("data",)),
    "export": (_export, ()),
    "demo": (_demo, ()),
    "bench": (_bench, ()),
    "profile": (_profile, ("data", "teacher", "student", "distill")),
    "doctor": (_doctor, ()),
}


def create_parser() -> ArgumentParser:
    """The parser of the command line, with a subcommand for each of ``COMMANDS``."""
    import docstring_parser
    from jsonargparse import ActionConfigFile, ArgumentParser

    class ConfigFile(ActionConfigFile):
        """Takes the name of a packaged config too."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            super().__call__(parser, cfg, str(find(values)), option_string)

    # Without exit_on_error, since the parser's way out of an error prints a hundred options first.
    parser = ArgumentParser(prog="dfkd-fast", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands(required=True)
    for name, (command, used) in COMMANDS.items():
        summary = command.__doc__.split("\n", 1)[0]
        usage = f"dfkd-fast {name} [options]" + (" [OP ...]" if name == "bench" else "")
        options = ArgumentParser(description=summary, usage=usage, exit_on_error=False)
        if used:
            options.add_argument("--config", action=ConfigFile, help="YAML file, or the name of a packaged one")
            options.add_class_arguments(ExperimentConfig)
            for action in options._actions:  # a file may have all fields; help is about those that matter
                if action.dest.split(".")[0] in {field.name for field in fields(ExperimentConfig)} - {*used}:
                    action.help = SUPPRESS
        described = {each.arg_name: each.description for each in docstring_parser.parse(command.__doc__).params}
        flags = [parameter for parameter, kind in command.__annotations__.items() if kind == "bool"]
        options.add_function_arguments(command, as_group=False, skip={"experiment", "ops", *flags})
        for flag in flags:
            options.add_argument(f"--{flag}", action="store_true", help=described[flag])
        if "ops" in described:
            options.add_argument("ops", nargs="*", type=str, default=[], help=described["ops"])
        commands.add_subcommand(name, options, help=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Errors of the user are one line and exit status 2; DFKD_FAST_TRACEBACK=1 shows the traceback."""
    from jsonargparse import ArgumentError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("dfkd_fast").setLevel(logging.INFO)  # not the messages of every library
    try:
        parser = create_parser()
        parsed = parser.instantiate(parser.parse_args(arguments))
        command, used = COMMANDS[parsed.subcommand]
        options = vars(parsed[parsed.subcommand])
        options.pop("config", None)
        if used:
            values = {field.name: options.pop(field.name) for field in fields(ExperimentConfig)}
            command(ExperimentConfig(**values), **options)
        else:
            command(**options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ArgumentError, ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("DFKD_FAST_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
