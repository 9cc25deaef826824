"""The distillation loop: rounds of generator and student steps, and what happens between them."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from dfkd_fast import report
from dfkd_fast.config import DistillConfig, to_dict
from dfkd_fast.data import ImageData
from dfkd_fast.engine.checkpoint import Checkpoints
from dfkd_fast.engine.evaluation import evaluate
from dfkd_fast.engine.interrupt import StopRequest
from dfkd_fast.engine.progress import ProgressLine
from dfkd_fast.engine.runtime import Runtime, new_run_folder
from dfkd_fast.engine.state import DistillState, build_state
from dfkd_fast.engine.steps import generator_step, student_step, synthesize
from dfkd_fast.models import FeatureModel, extract, frozen, load_weights, normalization, save_weights

__all__ = ["DistillResult", "NonFiniteError", "agreement", "distill"]

log = logging.getLogger(__name__)

_GRID = 64  # images at most in a picture of what the generator makes
_AGREEMENT_BATCHES = 4


class NonFiniteError(ArithmeticError):
    """A step's loss or gradient was not finite; it never reached the weights. Names the first step and term."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a run leaves.

    Attributes:
        student: the network given, trained; a plain one, without adapters or attention modules.
        generator: the trained generator.
        rounds: per-round means of every loss term, ``generator/bn`` and so on, and ``round``.
        epochs: per-epoch ``agreement`` (and ``accuracy`` where evaluated), with ``epoch``.
        run_dir: folder with checkpoints, config, TensorBoard log, pictures, ``student.safetensors``.
        accuracy: top-1 of the returned student on the held-out images, None where none were given.
        agreement: share of synthetic images that teacher and student put into the same class.
        images_per_s: synthetic images that the generator or the student was trained on, a second of training.
        seconds: wall time of this call's steps.
    """

    student: nn.Module
    generator: nn.Module
    rounds: dict[str, list[float]]
    epochs: dict[str, list[float]]
    run_dir: Path
    accuracy: float | None
    agreement: float
    images_per_s: float
    seconds: float


def agreement(state: DistillState) -> float:
    """Share of fresh synthetic images whose top-1 class is the same for teacher and student, in eval mode.

    Needs no data. The noise is the same at every call; the generator that paints it is the present one.
    """
    noise = torch.Generator(device=state.runtime.device).manual_seed(state.config.seed + 1)
    count = state.config.loop.batch_size
    same = torch.zeros((), device=state.runtime.device)
    training = state.student.training
    state.student.eval()
    with torch.no_grad(), state.runtime.cast():
        for _ in range(_AGREEMENT_BATCHES):
            inputs = synthesize(state, state.draw(count, noise)).float() * state.scale + state.shift
            same += (state.teacher(inputs).logits.argmax(1) == state.student(inputs).logits.argmax(1)).float().mean()
    state.student.train(training)
    return same.item() / _AGREEMENT_BATCHES


def _grid(state: DistillState) -> torch.Tensor:
    noise = torch.Generator(device=state.runtime.device).manual_seed(state.config.seed + 2)
    return synthesize(state, state.draw(min(_GRID, state.config.loop.batch_size), noise)).float().cpu()


def _run_steps(state: DistillState, stop: StopRequest) -> None:
    """The rest of the present round, step by step; ends early where a stop was asked for."""
    loop = state.config.loop
    while state.position.step < state.steps_per_round and stop.received is None:
        step = state.position.step
        (generator_step if step < loop.generator_steps else student_step)(state, step)
        state.position.step += 1


def _check(state: DistillState) -> dict[str, float]:
    """Read the rows of the round's trace that are written, once, and return each term's mean over them.

    Raises:
        NonFiniteError: some step was skipped.
    """
    loop, trace = state.config.loop, state.trace[: state.position.step].cpu()
    parts = {
        "generator": (state.generator_objective.names, trace[: loop.generator_steps]),
        "student": (state.student_objective.names, trace[loop.generator_steps :]),
    }
    means: dict[str, float] = {}
    for side, (names, rows) in parts.items():
        for step, row in enumerate(rows):
            bad = [name for name, value in zip(names, row, strict=False) if not math.isfinite(value)]
            if not bad and not row[-1]:
                bad = ["gradient"]
            if bad:
                raise NonFiniteError(
                    f"round {state.position.round}, {side} step {step}: {', '.join(bad)} not finite; "
                    "the step was skipped and the last good checkpoint is kept"
                )
        if len(rows):
            means |= {f"{side}/{name}": rows[:, column].mean().item() for column, name in enumerate(names)}
    return means


def _close_round(state: DistillState) -> dict[str, float]:
    means = _check(state)
    state.rounds.setdefault("round", []).append(state.position.round)
    for name, value in means.items():
        state.rounds.setdefault(name, []).append(value)
    state.position.round += 1
    state.position.step = 0
    return means


class _Run:
    """One call of :func:`distill`: the state, and what is written beside it."""

    def __init__(
        self, state: DistillState, folder: Path, checkpoints: Checkpoints, data: ImageData | None, meta: dict[str, str]
    ) -> None:
        self.state, self.folder, self.checkpoints, self.data, self.meta = state, folder, checkpoints, data, meta
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=state.position.round or None)
        self.best = folder / "best_student.safetensors"
        self.saved: tuple[int, int] | None = None

    def save(self) -> None:
        position = (self.state.position.round, self.state.position.step)
        if position != self.saved:
            self.checkpoints.save(self.state.state_dict())
            self.saved = position

    def log_round(self, means: Mapping[str, float]) -> None:
        for name, value in means.items():
            self.writer.add_scalar(name, value, self.state.position.round)
        self.writer.add_scalar("student/lr", self.state.student_lr(), self.state.position.round)

    def close_epoch(self, epoch: int, *, last: bool) -> None:
        """Measure, keep the best where asked to, and paint what the generator makes."""
        state, loop = self.state, self.state.config.loop
        measured = {"agreement": agreement(state)}
        due = last or (loop.evaluate_every and epoch % loop.evaluate_every == 0)
        if self.data is not None and due:
            measured["accuracy"] = self.accuracy(state.student.model)
        state.epochs.setdefault("epoch", []).append(epoch)
        for name, value in measured.items():
            self.writer.add_scalar(f"epoch/{name}", value, epoch)
        for name in ("agreement", *(["accuracy"] if self.data is not None else [])):
            state.epochs.setdefault(name, []).append(measured.get(name, math.nan))
        images = _grid(state)
        self.writer.add_images("generator", images / 2 + 0.5, epoch)
        report.save_image_grid(images, self.folder / "images" / f"epoch-{epoch:04d}.png")
        self.writer.flush()
        criterion = {"agreement": "agreement", "test_accuracy": "accuracy"}.get(loop.select)
        if criterion in measured and measured[criterion] > state.best.get("score", -math.inf):
            state.best = {"score": measured[criterion], "epoch": epoch}
            save_weights(state.student.model, self.best, self.meta)

    def accuracy(self, student: nn.Module) -> float:
        assert self.data is not None
        return evaluate(student, self.data.test, num_classes=self.data.num_classes, runtime=self.state.runtime).top1

    def close(self) -> None:
        """Curves and histories, from what there is so far."""
        self.writer.close()
        report.save_curves(self.state.rounds, self.state.epochs, self.folder / "curves.png")
        history = {"rounds": self.state.rounds, "epochs": self.state.epochs}
        (self.folder / "history.json").write_text(json.dumps(history, indent=1))


def _features(model: nn.Module, image_size: int) -> FeatureModel:
    return model if isinstance(model, FeatureModel) else extract(model, image_size=image_size)


def _prepare(
    teacher: nn.Module, student: nn.Module, config: DistillConfig, data: ImageData | None
) -> tuple[FeatureModel, FeatureModel, dict[str, Any]]:
    image_size = config.image_size or (data.image_size if data is not None else None)
    if image_size is None:
        raise ValueError("DistillConfig.image_size must be given where there is no evaluation data to take it from")
    if image_size % 16:
        raise ValueError(f"image_size must be a multiple of 16 for the generator, got {image_size}")
    if config.loop.select == "test_accuracy" and data is None:
        raise ValueError("LoopConfig.select is 'test_accuracy', which needs evaluation data; none was given")
    teacher, student = _features(teacher, image_size), _features(student, image_size)
    if data is not None and data.num_classes != teacher.num_classes:
        raise ValueError(f"data has {data.num_classes} classes, the teacher tells {teacher.num_classes} apart")
    default = (data.mean, data.std) if data is not None else normalization(teacher.model)
    sizes = {"image_size": image_size, "mean": config.mean or default[0], "std": config.std or default[1]}
    return teacher, student, sizes


def distill(
    teacher: nn.Module,
    student: nn.Module,
    config: DistillConfig,
    *,
    data: ImageData | None = None,
    description: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> DistillResult:
    """Train a student to agree with a teacher, without the teacher's data (paper, section 3).

    Args:
        teacher: a trained classifier, (N, 3, H, W) to (N, classes); left as it was. A
            :class:`dfkd_fast.models.FeatureModel` names its stages itself.
        student: the classifier to train, in place; likewise.
        config: the run. ``config.out`` must not hold another run's checkpoints unless ``config.resume``.
        data: held-out images to evaluate on. They are never trained on.
        description: written into the student's file as metadata, beside the classes and the normalisation.
        inputs: plain values written into the run's ``config.yaml`` before the run's own, such as which networks and
            data it was called with.
        progress: draw a progress bar.

    Returns:
        The trained student, its history and the run folder.

    Raises:
        ValueError: a config, data or networks that do not fit together, or a folder that holds another run.
        NonFiniteError: a loss or gradient was not finite; raised at the end of its round.
        CheckpointError: to be resumed, but no checkpoint in the folder is sound and of this run.
        KeyboardInterrupt: after ctrl-C, when the run is saved. SIGTERM saves and exits with status 143.
    """
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    teacher_features, student_features, sizes = _prepare(teacher, student, config, data)
    modes = {module: module.training for module in teacher_features.model.modules()}
    teacher_features.eval()
    student_features.train()
    try:
        with runtime.backends(), frozen(teacher_features):
            state = build_state(teacher_features, student_features, config, runtime, **sizes)
            return _distill(state, data, sizes, dict(description or {}), dict(inputs or {}), progress)
    finally:
        for module, training in modes.items():
            module.training = training


def _distill(
    state: DistillState,
    data: ImageData | None,
    sizes: dict[str, Any],
    description: dict[str, str],
    inputs: dict[str, Any],
    progress: bool,
) -> DistillResult:
    config, loop, runtime = state.config, state.config.loop, state.runtime
    folder = new_run_folder(config.out, "distill")
    checkpoints = Checkpoints(folder / "checkpoints", config, state.teacher_digest())
    if config.resume:
        saved = checkpoints.newest()
        if saved is not None:
            state.load_state_dict(saved)
            log.info("resumed at round %d, step %d", state.position.round, state.position.step)
    elif checkpoints.paths():
        raise ValueError(f"{folder} holds checkpoints of a run already: set resume, or name another folder in out")
    (folder / "config.yaml").write_text(yaml.safe_dump({**inputs, "distill": to_dict(config)}, sort_keys=False))
    meta = {**{name: json.dumps(value) for name, value in sizes.items()}, **description}
    meta |= {"num_classes": str(state.student.num_classes), "format": "dfkd_fast.student/1"}

    run = _Run(state, folder, checkpoints, data, meta)
    images = seconds = 0.0
    try:
        line = ProgressLine("distil", total=state.total_rounds, unit="rounds", enabled=progress)
        with StopRequest() as stop, line:
            while state.position.round < state.total_rounds:
                steps, start = state.position.step, time.perf_counter()
                _run_steps(state, stop)
                runtime.synchronize()
                seconds += time.perf_counter() - start
                images += (state.position.step - steps) * loop.batch_size
                if state.position.step < state.steps_per_round:
                    _check(state)
                    run.save()
                    line.print(f"saved at round {state.position.round}, step {state.position.step}")
                    stop.leave()
                means = _close_round(state)
                run.log_round(means)
                line.update(state.position.round, means, images / seconds)
                done = state.position.round == state.total_rounds
                epoch, rest = divmod(state.position.round, loop.rounds_per_epoch)
                if rest == 0:
                    run.close_epoch(epoch, last=done)
                if done or stop.received is not None or state.position.round % loop.checkpoint_every == 0:
                    run.save()
                stop.leave()
    finally:
        run.close()

    student = state.student.model
    if loop.select != "last":
        load_weights(student, run.best)
        runtime.place(student)
    save_weights(student, folder / "student.safetensors", meta)
    state.student.eval()
    return DistillResult(
        student=student,
        generator=state.generator,
        rounds=state.rounds,
        epochs=state.epochs,
        run_dir=folder,
        accuracy=run.accuracy(student) if data is not None else None,
        agreement=agreement(state),
        images_per_s=images / seconds if seconds else math.nan,
        seconds=seconds,
    )
