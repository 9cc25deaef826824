"""The distillation loop: rounds of generator and student steps, evaluations and checkpoints."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.tensorboard import SummaryWriter

from dfkd_fast import report
from dfkd_fast.config import DistillConfig, to_dict
from dfkd_fast.data import ImageData
from dfkd_fast.engine.background import Background, Job
from dfkd_fast.engine.checkpoint import Checkpoints
from dfkd_fast.engine.engines import Engine, create_engine
from dfkd_fast.engine.evaluation import evaluate
from dfkd_fast.engine.interrupt import StopRequest
from dfkd_fast.engine.progress import ProgressLine
from dfkd_fast.engine.rounds import NonFiniteError, Round, Rounds
from dfkd_fast.engine.runtime import Runtime, new_run_folder
from dfkd_fast.engine.state import DistillState, build_state
from dfkd_fast.engine.steps import synthesize
from dfkd_fast.graph import FeatureModel, extract, frozen, preserve_train_mode
from dfkd_fast.models import load_weights, normalization, save_weights

__all__ = ["DistillResult", "NonFiniteError", "agreement", "distill"]

log = logging.getLogger(__name__)

_GRID = 64  # images at most in a picture of what the generator makes
_AGREEMENT_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """The result of :func:`distill`.

    Attributes:
        student: the network given, trained; without adapters or attention modules.
        generator: the trained generator.
        rounds: per-round means of each loss term (``generator/bn``, ...), and ``round``.
        epochs: per-epoch ``agreement`` (and ``accuracy`` where evaluated), with ``epoch``.
        run_dir: folder with checkpoints, config, TensorBoard log, pictures, ``student.safetensors``.
        accuracy: top-1 of the returned student on the held-out images; None without data.
        agreement: share of synthetic images that teacher and student put into the same class.
        images_per_s: synthetic images per second of training that the generator or the student was trained on.
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

    Needs no data. The noise is the same in every call; the images are those of the current generator.
    """
    noise = torch.Generator(device=state.runtime.device).manual_seed(state.config.seed + 1)
    count = state.config.loop.batch_size
    same = torch.zeros((), device=state.runtime.device)
    student = state.student.module
    with preserve_train_mode(student, False), torch.no_grad(), state.runtime.cast():
        for _ in range(_AGREEMENT_BATCHES):
            inputs = state.normalize(synthesize(state, state.draw(count, noise)))
            same += (state.teacher(inputs).logits.argmax(1) == student(inputs).logits.argmax(1)).float().mean()
    return same.item() / _AGREEMENT_BATCHES


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """An epoch whose evaluation may still be running."""

    number: int
    agreement: float
    student: nn.Module
    accuracy: Job[float] | None


class _Run:
    """The evaluations and files of one call of :func:`distill`."""

    def __init__(
        self, state: DistillState, folder: Path, checkpoints: Checkpoints, data: ImageData | None, meta: dict[str, str]
    ) -> None:
        self.state, self.folder, self.checkpoints, self.data, self.meta = state, folder, checkpoints, data, meta
        # Separate threads: a checkpoint does not wait for an evaluation.
        self.files, self.measurements = Background(state.runtime.device), Background(state.runtime.device)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=state.position.round or None)
        self.best = folder / "best_student.safetensors"
        self.saved: tuple[int, int] | None = None
        self.pending: _Epoch | None = None

    def save(self) -> None:
        """Write a checkpoint of the current state, whose rounds must have been read back."""
        position, per_epoch = self.state.position, self.state.config.loop.rounds_per_epoch
        if (position.round, position.step) == self.saved:
            return
        if self.pending is not None and (self.pending.number * per_epoch, 0) != (position.round, position.step):
            # Only a checkpoint at the end of the epoch has the weights to repeat its evaluation.
            self.finish_epoch()
        snapshot = tree_map_only(Tensor, Tensor.clone, self.state.state_dict())
        self.files.submit(lambda: self.checkpoints.save(snapshot))
        self.saved = (position.round, position.step)

    def evaluate_missed(self) -> None:
        """Evaluate the last epoch of a resumed run if its checkpoint was written before the evaluation was done."""
        epoch, rest = divmod(self.state.position.round, self.state.config.loop.rounds_per_epoch)
        if epoch and not rest and not self.state.position.step and epoch not in self.state.epochs.get("epoch", []):
            self.close_epoch(epoch, last=self.state.position.round == self.state.total_rounds)

    def log_round(self, finished: Round) -> None:
        for name, value in finished.means.items():
            self.writer.add_scalar(name, value, finished.number + 1)
        self.writer.add_scalar("student/lr", finished.student_lr, finished.number + 1)

    def close_epoch(self, epoch: int, *, last: bool) -> None:
        """Start the evaluation of an epoch, and save images of the generator."""
        self.finish_epoch()
        state, loop, overlaps = self.state, self.state.config.loop, self.measurements.overlaps
        due = last or (loop.evaluate_every and epoch % loop.evaluate_every == 0)
        student = copy.deepcopy(state.student.module.model) if overlaps else state.student.module.model
        accuracy = None
        if self.data is not None and due:
            accuracy = self.measurements.submit(lambda: self.accuracy(student))
        self.pending = _Epoch(number=epoch, agreement=agreement(state), student=student, accuracy=accuracy)
        noise = torch.Generator(device=state.runtime.device).manual_seed(state.config.seed + 2)
        images = synthesize(state, state.draw(min(_GRID, loop.batch_size), noise)).float()
        self.files.submit(lambda: self.paint(images, epoch))
        if not overlaps:
            self.finish_epoch()

    def paint(self, images: Tensor, epoch: int) -> None:
        self.writer.add_images("generator", images / 2 + 0.5, epoch)
        report.save_image_grid(images, self.folder / "images" / f"epoch-{epoch:04d}.png")
        self.writer.flush()

    def finish_epoch(self) -> None:
        """Record the pending epoch, and save its student if it is the best so far."""
        if self.pending is None:
            return
        state, epoch, self.pending = self.state, self.pending, None
        measured = {"agreement": epoch.agreement}
        if epoch.accuracy is not None:
            measured["accuracy"] = epoch.accuracy.result()
        state.epochs.setdefault("epoch", []).append(epoch.number)
        for name, value in measured.items():
            self.writer.add_scalar(f"epoch/{name}", value, epoch.number)
        for name in ("agreement", *(["accuracy"] if self.data is not None else [])):
            state.epochs.setdefault(name, []).append(measured.get(name, math.nan))
        criterion = {"agreement": "agreement", "test_accuracy": "accuracy"}.get(state.config.loop.select)
        if criterion in measured and measured[criterion] > state.best.get("score", -math.inf):
            state.best = {"score": measured[criterion], "epoch": epoch.number}
            save_weights(epoch.student, self.best, self.meta)

    def accuracy(self, student: nn.Module) -> float:
        assert self.data is not None
        return evaluate(student, self.data.test, num_classes=self.data.num_classes, runtime=self.state.runtime).top1

    def finish(self) -> None:
        """Wait for evaluations and files."""
        self.finish_epoch()
        self.files.wait()

    def close(self) -> None:
        """Write curves and histories of the rounds and epochs so far."""
        self.measurements.close()
        self.files.close()
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
        raise ValueError("DistillConfig.image_size must be given without evaluation data to take it from")
    if image_size % 16:
        raise ValueError(f"image_size must be a multiple of 16 for the generator, got {image_size}")
    if config.loop.select == "test_accuracy" and data is None:
        raise ValueError("LoopConfig.select is 'test_accuracy', which needs evaluation data; none was given")
    teacher, student = _features(teacher, image_size), _features(student, image_size)
    if data is not None and data.num_classes != teacher.num_classes:
        raise ValueError(f"data has {data.num_classes} classes, the teacher {teacher.num_classes}")
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
        teacher: a trained classifier, (N, 3, H, W) to (N, classes); unchanged. A
            :class:`dfkd_fast.models.FeatureModel` has its stages.
        student: the classifier to train in place; also plain or a ``FeatureModel``.
        config: the run. ``config.out`` must not hold another run's checkpoints unless ``config.resume``.
        data: held-out images to evaluate on. They are never trained on.
        description: metadata of the student's file, in addition to the classes and the normalisation.
        inputs: plain values for the run's ``config.yaml``, such as the networks and data.
        progress: draw a progress bar.

    Returns:
        The trained student, its history and the run folder.

    Raises:
        ValueError: a config, data or networks that do not fit together, or a folder that holds another run.
        NonFiniteError: a loss or gradient was not finite; raised at the end of its round.
        CheckpointError: no checkpoint in the folder to resume is sound and of this run.
        KeyboardInterrupt: after ctrl-C, once the run is saved. SIGTERM saves and exits with status 143.
    """
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    teacher_features, student_features, sizes = _prepare(teacher, student, config, data)
    student_features.train()
    with runtime.backends(), frozen(teacher_features), preserve_train_mode(teacher_features, False):
        state = build_state(teacher_features, student_features, config, runtime, **sizes)
        return _distill(create_engine(state), data, sizes, dict(description or {}), dict(inputs or {}), progress)


def _distill(
    engine: Engine,
    data: ImageData | None,
    sizes: dict[str, Any],
    description: dict[str, str],
    inputs: dict[str, Any],
    progress: bool,
) -> DistillResult:
    state, config = engine.state, engine.state.config
    loop, runtime = config.loop, state.runtime
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
    meta |= {"num_classes": str(state.student.module.num_classes), "format": "dfkd_fast.student/1"}

    run = _Run(state, folder, checkpoints, data, meta)
    line = ProgressLine("distil", total=state.total_rounds, unit="rounds", enabled=progress)

    def finished(done: Round) -> None:
        run.log_round(done)
        line.update(done.number + 1, done.means, rounds.images / rounds.seconds)

    rounds = Rounds(engine, finished)
    try:
        with StopRequest() as stop, line:
            if state.position.round < state.total_rounds:
                engine.prepare()
            run.evaluate_missed()
            while state.position.round < state.total_rounds:
                whole = rounds.run(lambda: stop.received is not None)
                done = state.position.round == state.total_rounds
                epoch, rest = divmod(state.position.round, loop.rounds_per_epoch)
                due = done or stop.received is not None or state.position.round % loop.checkpoint_every == 0
                if not (due or rest == 0):
                    continue
                rounds.drain()
                if whole and rest == 0:
                    run.close_epoch(epoch, last=done)
                if due:
                    run.save()
                if stop.received is not None:
                    run.finish()
                    line.print(f"saved at round {state.position.round}, step {state.position.step}")
                    stop.leave()
            run.finish()
    finally:
        run.close()

    student = state.student.module.model
    if loop.select != "last":
        load_weights(student, run.best)
        runtime.place(student)
    save_weights(student, folder / "student.safetensors", meta)
    state.student.module.eval()
    return DistillResult(
        student=student,
        generator=state.generator.module,
        rounds=state.rounds,
        epochs=state.epochs,
        run_dir=folder,
        accuracy=run.accuracy(student) if data is not None else None,
        agreement=agreement(state),
        images_per_s=rounds.images / rounds.seconds if rounds.seconds else math.nan,
        seconds=rounds.seconds,
    )
