"""The distillation loop: rounds of generator and student steps, evaluations and checkpoints."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dfkd_fast import report
from dfkd_fast.collectives import average, collect, current_group
from dfkd_fast.config import DistillConfig, to_dict
from dfkd_fast.data import ImageData
from dfkd_fast.engine.background import Background
from dfkd_fast.engine.checkpoint import CheckpointError, Checkpoints
from dfkd_fast.engine.distributed import (
    agree_to_stop,
    broadcast,
    is_main,
    locked_folder,
    on_main,
    require_divisible,
    require_equal,
    restartable,
)
from dfkd_fast.engine.engines import Engine, create_engine
from dfkd_fast.engine.evaluation import evaluate
from dfkd_fast.engine.interrupt import catch_signals
from dfkd_fast.engine.progress import Listener, ProgressLine
from dfkd_fast.engine.rounds import NonFiniteError, Round, Rounds
from dfkd_fast.engine.runtime import Runtime, float32_weights, new_run_folder
from dfkd_fast.engine.state import DistillState, build_state
from dfkd_fast.engine.steps import synthesize
from dfkd_fast.engine.trackers import TrackedRun, Trackers
from dfkd_fast.files import write_file
from dfkd_fast.graph import FeatureModel, extract, frozen, preserve_train_mode, require_separate, unwrap
from dfkd_fast.models import load_weights, normalization, save_weights
from dfkd_fast.objectives import FeatureShapes, required_outputs

__all__ = ["Callback", "DistillResult", "NonFiniteError", "agreement", "distill", "prepare_networks"]

log = logging.getLogger(__name__)

Callback = Callable[[Round, DistillState], object]
"""A function of a finished round and the state after it. If its result is true, the run ends."""

_GRID = 64  # maximum number of generated images in an image grid
_AGREEMENT_BATCHES = 4  # number of synthetic batches per measurement of the agreement


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """The result of :func:`distill`.

    Attributes:
        student: the trained student, without adapters or attention modules.
        generator: the trained generator; None if the run optimized images directly.
        rounds: mean of each loss term (``generator/bn``, ...) per round, with round numbers from zero in ``round``.
        epochs: ``agreement`` and, with data, ``accuracy`` per epoch, with epoch numbers from one in ``epoch``. Epochs
            that were not evaluated have an accuracy of NaN.
        run_dir: folder with checkpoints, config, the logs of local trackers, pictures, ``student.safetensors`` and, if
            there are any, ``generator.safetensors`` and the attention modules of L_MHAD of the last step,
            ``attention.safetensors``.
        accuracy: top-1 accuracy of the student on the held-out images, in [0, 1]; None without data.
        agreement: fraction of synthetic images that teacher and student assign to the same class.
        images_per_s: synthetic training images of generator and student per second; 0 if the run was already finished.
        seconds: wall time of this call's steps, in seconds.
    """

    student: nn.Module
    generator: nn.Module | None
    rounds: dict[str, list[float]]
    epochs: dict[str, list[float]]
    run_dir: Path
    accuracy: float | None
    agreement: float
    images_per_s: float
    seconds: float


def agreement(state: DistillState) -> float:
    """Fraction of new synthetic images that teacher and student assign to the same class, in eval mode.

    Needs no data. Every call uses the same noise, with images from the current generator. Logits that are not finite
    agree with nothing.
    """
    random = torch.Generator(device=state.runtime.device).manual_seed(state.config.seed + 1)
    count = state.config.loop.batch_size
    same = torch.zeros(1, device=state.runtime.device)
    student = state.student.module
    with preserve_train_mode(student, False), torch.no_grad(), state.runtime.cast():
        for _ in range(_AGREEMENT_BATCHES):
            inputs = state.normalize(synthesize(state, *state.synthesizer.draw_samples(count, random)))
            logits = state.teacher(inputs).logits, student(inputs).logits
            finite = torch.stack([each.amax(1).isfinite() for each in logits]).all(0)
            same += ((logits[0].argmax(1) == logits[1].argmax(1)) & finite).float().mean()
    average([same])
    return same.item() / _AGREEMENT_BATCHES


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """A finished epoch whose evaluation may still be running."""

    number: int
    agreement: float
    student: nn.Module
    accuracy: Future[float] | None


class _Run:
    """Evaluations and output files of one call of :func:`distill`."""

    def __init__(
        self,
        state: DistillState,
        folder: Path,
        checkpoints: Checkpoints,
        data: ImageData | None,
        meta: dict[str, str],
        inputs: dict[str, Any],
    ) -> None:
        self.state, self.folder, self.checkpoints, self.data, self.meta = state, folder, checkpoints, data, meta
        # Two threads, so that a checkpoint does not wait for an evaluation. With several processes, all run their
        # collectives in the same order.
        device = state.runtime.device
        self.files = Background(device)
        self.measurements = Background(device) if current_group() is None else Background(device, overlap=False)
        rounds, recorded = state.position.round, state.epochs.get("epoch", [0])[-1]
        self.trackers = Trackers(
            state.config.trackers if is_main() else (),
            TrackedRun(
                folder=folder,
                config=_content(inputs, state.config),
                resumed=state.config.resume,
                steps=rounds,
                epochs=int(min(recorded, rounds // state.config.loop.rounds_per_epoch)),
            ),
        )
        self.best = folder / "best_student.safetensors"
        self.saved: tuple[int, int] | None = None
        self.pending: _Epoch | None = None

    def save(self) -> None:
        """Write a checkpoint of the state. Call :meth:`Rounds.drain` first, which adds the last losses to it."""
        position, per_epoch = self.state.position, self.state.config.loop.rounds_per_epoch
        if (position.round, position.step) == self.saved:
            return
        if self.pending is not None and (self.pending.number * per_epoch, 0) != (position.round, position.step):
            # A run that resumes from this checkpoint has later weights, so it could not repeat the epoch's evaluation.
            self.finish_epoch()
        self.saved = (position.round, position.step)
        require_equal(self.state.mutable_tensors())
        if not is_main():
            return
        content = self.state.state_dict()
        history = {name: content.pop(name) for name in ("rounds", "epochs")}  # copies without tensors, but long
        snapshot = {**tree_map_only(Tensor, Tensor.clone, content), **history}

        def write() -> None:
            self.trackers.flush()  # a run that resumes from the checkpoint does not log its rounds again
            self.checkpoints.save(snapshot)

        self.files.submit(write)

    def evaluate_missed(self) -> None:
        """Evaluate the last epoch of a resumed run if the run stopped before that evaluation finished."""
        epoch, rest = divmod(self.state.position.round, self.state.config.loop.rounds_per_epoch)
        if epoch and not rest and not self.state.position.step and epoch not in self.state.epochs.get("epoch", []):
            self.evaluate_epoch(epoch, last=self.state.position.round == self.state.total_rounds)

    def log_round(self, finished: Round) -> None:
        self.trackers.add_scalars({**finished.means, "student/lr": finished.student_lr}, finished.number + 1)

    def evaluate_epoch(self, epoch: int, *, last: bool) -> None:
        """Start the evaluation of an epoch and save a picture of synthetic images."""
        self.finish_epoch()
        state, loop, overlaps = self.state, self.state.config.loop, self.measurements.overlaps
        due = last or (loop.evaluate_every and epoch % loop.evaluate_every == 0)
        student = copy.deepcopy(state.student.module.model) if overlaps else state.student.module.model
        accuracy = None
        if self.data is not None and due:
            accuracy = self.measurements.submit(lambda: self.accuracy(student))
        self.pending = _Epoch(number=epoch, agreement=agreement(state), student=student, accuracy=accuracy)
        random = torch.Generator(device=state.runtime.device).manual_seed(state.config.seed + 2)
        count = min(_GRID, loop.batch_size) if current_group() is None else loop.batch_size
        images = collect(synthesize(state, *state.synthesizer.draw_samples(count, random)).float())[:_GRID]
        if is_main():
            self.files.submit(lambda: self.save_images(images, epoch))
        if not overlaps:
            self.finish_epoch()

    def save_images(self, images: Tensor, epoch: int) -> None:
        self.trackers.add_images("generator", images / 2 + 0.5, epoch)
        report.save_image_grid(images, self.folder / "images" / f"epoch-{epoch:04d}.png")

    def finish_epoch(self) -> None:
        """Record the results of the pending epoch, and save its student if it is the best so far."""
        if self.pending is None:
            return
        state, epoch, self.pending = self.state, self.pending, None
        measured = {"agreement": epoch.agreement}
        if epoch.accuracy is not None:
            measured["accuracy"] = epoch.accuracy.result()
        if epoch.number in state.epochs.get("epoch", []):  # a callback has ended the run within this epoch before
            for series in state.epochs.values():
                series.pop()
        state.epochs.setdefault("epoch", []).append(epoch.number)
        self.trackers.add_scalars({f"epoch/{name}": value for name, value in measured.items()}, epoch.number)
        numbers = state.epochs["epoch"]
        for name in ("agreement", *(["accuracy"] if self.data is not None or "accuracy" in state.epochs else [])):
            series = state.epochs.setdefault(name, [])
            series += [math.nan] * (len(numbers) - 1 - len(series))  # epochs of an earlier process without data
            series.append(measured.get(name, math.nan))
        criterion = {"agreement": "agreement", "test_accuracy": "accuracy"}.get(state.config.loop.select)
        if criterion in measured and measured[criterion] > state.best.get("score", -math.inf):
            state.best = {"score": measured[criterion], "epoch": epoch.number}
            if is_main():
                save_weights(epoch.student, self.best, self.meta)

    def accuracy(self, student: nn.Module) -> float:
        assert self.data is not None
        return evaluate(student, self.data.test, num_classes=self.data.num_classes, runtime=self.state.runtime).top1

    def finish(self) -> None:
        """Wait until all evaluations are recorded and all files are written."""
        self.finish_epoch()
        self.files.wait()
        if is_main():
            self.checkpoints.prune()  # an earlier process may have been killed between a save and its deletions

    def save_networks(self) -> nn.Module:
        """Write the trained networks, and return the student with its final weights."""
        state, student = self.state, self.state.student.module.model
        if state.config.loop.select != "last":
            on_main(lambda: load_weights(student, self.best_weights()) and None)
            state.runtime.place(student)
            broadcast(student.state_dict().values())
        if is_main():
            save_weights(student, self.folder / "student.safetensors", self.meta)
            _save_generator(state, self.folder)
            _save_attention(state, self.folder)
        return student

    def close(self, *, failed: bool) -> None:
        """Stop the threads, and write the history and the curves so far.

        If the run failed, its exception is more important than those of these files, which are logged.
        """
        self.measurements.close()
        self.files.close()
        if failed:
            self.trackers.close(failed=True)
        if not is_main():
            return
        rounds, epochs = self.state.rounds, self.state.epochs
        try:
            report.write_results(self.folder / "history.json", {"rounds": rounds, "epochs": epochs})
            report.save_curves(rounds, epochs, self.folder / "curves.png")
        except OSError as error:
            if not failed:
                raise
            log.warning("%s", error)
        if failed and self.checkpoints.paths():
            log.info("set resume to continue this run from %s", self.checkpoints.paths()[0])

    def best_weights(self) -> Path:
        """The weights of the best student.

        Raises:
            NonFiniteError: no epoch had a finite score.
        """
        if "epoch" not in self.state.best:
            raise NonFiniteError(f"no epoch has a finite score for select={self.state.config.loop.select!r}")
        return self.best


def prepare_networks(
    teacher: nn.Module, student: nn.Module, config: DistillConfig, data: ImageData | None
) -> tuple[FeatureModel, FeatureModel, dict[str, Any]]:
    image_size = config.image_size or (data.image_size if data is not None else None)
    if image_size is None:
        raise ValueError("DistillConfig.image_size must be set, because no evaluation data is given")
    if config.loop.select == "test_accuracy" and data is None:
        raise ValueError("LoopConfig.select is 'test_accuracy', which needs evaluation data, but none was given")
    teacher, student = unwrap(teacher), unwrap(student)
    plain = [unwrap(model.model) if isinstance(model, FeatureModel) else model for model in (teacher, student)]
    require_separate(*plain)
    if not any(weight.requires_grad for weight in plain[1].parameters()):
        raise ValueError("the student has no weight that requires a gradient: call requires_grad_(True) first")
    needs = required_outputs(config.objective)
    # The run moves and casts a copy of the teacher, so the caller's network stays as it is.
    teacher, student = (
        model if isinstance(model, FeatureModel) else extract(model, image_size=image_size, needs=needs)
        for model in (copy.deepcopy(teacher).float(), student)
    )
    for name, model in (("teacher", teacher), ("student", student)):
        if model.image_channels != 3:
            raise ValueError(
                f"the {name} takes images with {model.image_channels} channel(s), but the generator makes RGB images: "
                "replace its first convolution by one with 3 input channels, for example with the weights repeated for "
                "each channel and divided by 3"
            )
    if data is not None and data.num_classes != teacher.num_classes:
        raise ValueError(f"data has {data.num_classes} classes, the teacher has {teacher.num_classes}")
    default = (data.mean, data.std) if data is not None else normalization(teacher.model)
    sizes = {"image_size": image_size, "mean": config.mean or default[0], "std": config.std or default[1]}
    return teacher, student, sizes


def distill(
    teacher: nn.Module,
    student: nn.Module,
    config: DistillConfig,
    *,
    data: ImageData | None = None,
    generator: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
    description: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: bool | Listener = True,
) -> DistillResult:
    """Train a student to match a teacher without the teacher's data (Shao et al., ICCV 2023, section 4.4).

    Args:
        teacher: a trained classifier from normalized float32 images (N, 3, H, W) to logits (N, classes). It is not
            changed. For stages other than the default ones, pass a :class:`dfkd_fast.models.FeatureModel`.
        student: the classifier to train in place, a module or ``FeatureModel``, with the teacher's inputs and outputs.
            Weights of other dtypes are trained and saved in float32, and converted back at the end.
        config: options of the run. Without ``config.resume``, ``config.out`` must not contain checkpoints of another
            run.
        data: held-out images for evaluation. They are never used for training.
        generator: a generator to train in place instead of ``config.generator``: a module with the attribute
            ``latent_dim`` that maps noise (N, latent_dim) to images (N, 3, H, W) in [-1, 1].
        callbacks: functions that are called after each round, in order, with the round's losses and the state. If one
            returns True, the run ends after this round, as if it was its last. A callback must not change the state's
            tensors other than in place. With callbacks, the host waits for the device after each round.
        description: metadata for the student's file, in addition to its classes and normalization.
        inputs: further entries of the run's ``config.yaml``, of types that YAML can express, for example the configs of
            networks and data.
        progress: show a progress bar, or a function that is called with the progress instead.

    Within :func:`dfkd_fast.engine.join`, all processes must call this function with the same arguments. Together, they
    compute what one process would compute, except for dropout, whose masks are the same in each process. The first
    process writes the files and shows the progress; all call the callbacks. See docs/scaling.md.

    Returns:
        The trained student, its history and the run folder.

    Raises:
        ValueError: config, data and networks do not fit together, the number of processes does not divide the batch
            size, or the folder contains another run.
        NonFiniteError: a loss or gradient was not finite. It is raised at the end of that round or of the next one. Or
            a weight, a running statistic or the state of an optimizer is not finite, which is checked before saving.
        CheckpointError: the run cannot be resumed: no checkpoint in its folder is usable, or a setting differs that
            changes the algorithm. The message names it. With a constant learning rate, ``epochs`` can be increased.
        dfkd_fast.files.FolderInUseError: another run writes to the folder.
        dfkd_fast.files.WriteError: a file could not be written. The checkpoints and the history so far are kept.
        KeyboardInterrupt: after Ctrl-C, once the run is saved. SIGTERM saves the run and exits with status 143.
    """
    config = restartable(config)
    require_divisible(config.loop.batch_size, "LoopConfig.batch_size")
    if current_group() is not None and config.autotune:
        raise ValueError("autotune is not supported with several processes, because each would choose other kernels")
    with float32_weights(student), float32_weights(generator or nn.Identity()):
        runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
        teacher, student, sizes = prepare_networks(teacher, student, config, data)
        student.train()
        with runtime.backends(), frozen(teacher), preserve_train_mode(teacher, False):
            state = build_state(teacher, student, config, runtime, given=generator, **sizes)
            given = dict(description or {}), dict(inputs or {})
            with state.synchronized():
                engine = create_engine(state)
                with locked_folder(lambda: new_run_folder(config.out, "distill")) as folder:
                    return _distill(engine, folder, data, sizes, *given, progress, callbacks)


def _resume(state: DistillState, checkpoints: Checkpoints) -> None:
    """Load the newest usable checkpoint if the run is resumed and there is one."""
    networks = {name: part for name, part in state._parts().items() if isinstance(part, nn.Module)}
    saved = on_main(lambda: checkpoints.resumed(networks))
    if saved is None:
        return
    state.load_state_dict(saved)
    if found := state.non_finite():  # earlier versions did not check this before saving
        position = state.position
        raise CheckpointError(
            f"cannot resume from {checkpoints.folder}: in the checkpoint of round {position.round}, step "
            f"{position.step}, {', '.join(found[:5])}{' and others' * (len(found) > 5)} are not finite; delete it to "
            "resume from the previous one"
        )
    if state.position.round < state.total_rounds:
        log.info("resumed at round %d, step %d", state.position.round, state.position.step)
    else:
        log.info("this run is finished: all of its %d rounds are done", state.total_rounds)


def _content(inputs: dict[str, Any], config: DistillConfig) -> dict[str, Any]:
    """The content of the run's config.yaml."""
    return {**inputs, "distill": to_dict(config)}


def _start(state: DistillState, folder: Path, resolved: dict[str, Any], inputs: dict[str, Any]) -> Checkpoints:
    """Load the newest checkpoint if the run is resumed, and write its config.yaml."""
    config = state.config
    checkpoints = Checkpoints(folder / "checkpoints", config, state.teacher_digest(), resolved)
    _resume(state, checkpoints)
    require_equal([*state.teacher.model.state_dict().values(), *state.mutable_tensors()])
    if is_main() and (state.position.round < state.total_rounds or not (folder / "config.yaml").exists()):
        write_file(folder / "config.yaml", yaml.safe_dump(_content(inputs, config), sort_keys=False).encode())
    return checkpoints


def _save_generator(state: DistillState, folder: Path) -> None:
    """Write the generator, if there is one, with the config that builds it."""
    generator = state.synthesizer.generator
    if generator is None:
        return
    described = {"format": "dfkd_fast.generator/1", "image_size": str(state.image_size)}
    built = json.dumps(to_dict(state.config.generator)) if state.builds_generator else ""
    save_weights(generator, folder / "generator.safetensors", {**described, **({"generator": built} if built else {})})


def _save_attention(state: DistillState, folder: Path) -> None:
    """Write the attention modules and adapters of L_MHAD, if the student's loss has it, with what builds them."""
    term = state.student.objective.kinds().get("mhad")
    if term is None:
        return
    teacher, student = state.teacher, state.student.module
    described = {
        "mhad": to_dict(state.config.objective.mhad),
        "shapes": asdict(FeatureShapes.of(teacher, student)),
        "stages": {"teacher": teacher.stages, "student": student.stages},
    }
    metadata = {name: json.dumps(value) for name, value in described.items()}
    save_weights(term, folder / "attention.safetensors", {"format": "dfkd_fast.attention/1", **metadata})


def _distill(
    engine: Engine,
    folder: Path,
    data: ImageData | None,
    sizes: dict[str, Any],
    description: dict[str, str],
    inputs: dict[str, Any],
    progress: bool | Listener,
    callbacks: Sequence[Callback],
) -> DistillResult:
    state, config = engine.state, engine.state.config
    loop, runtime = config.loop, state.runtime
    checkpoints = _start(state, folder, {**sizes, "precision": runtime.precision}, inputs)
    described = {**sizes, **({"classes": data.classes} if data is not None else {})}
    meta = {**{name: json.dumps(value) for name, value in described.items()}, **description}
    meta |= {"num_classes": str(state.student.module.num_classes), "format": "dfkd_fast.student/1"}

    run = _Run(state, folder, checkpoints, data, meta, inputs)
    line = ProgressLine("distill", total=state.total_rounds, unit="rounds", enabled=progress if is_main() else False)

    ended = False

    def finished(done: Round) -> None:
        nonlocal ended
        for callback in callbacks:
            ended |= bool(callback(done, state))
        run.log_round(done)
        line.show(done.number + 1, done.means, rounds.images / rounds.seconds)

    rounds = Rounds(engine, finished)
    try:
        with catch_signals() as stop, line:
            if state.position.round < state.total_rounds:
                engine.prepare()
            run.evaluate_missed()
            while state.position.round < state.total_rounds and not ended:
                complete = rounds.run(lambda: stop.received is not None and current_group() is None)
                if callbacks:
                    rounds.drain()
                ended = agree_to_stop(ended, stop)
                last = ended or state.position.round == state.total_rounds
                epoch, rest = divmod(state.position.round, loop.rounds_per_epoch)
                due = last or stop.agreed is not None or state.position.round % loop.checkpoint_every == 0
                if not (due or rest == 0):
                    continue
                rounds.drain()
                if not state.config.sync_batchnorm:
                    broadcast(state.buffers())
                if complete and (rest == 0 or ended):
                    run.evaluate_epoch(epoch + (rest > 0), last=last)
                if due:
                    run.save()
                if stop.agreed is not None:
                    run.finish()
                    line.message(f"saved at round {state.position.round}, step {state.position.step}")
                    stop.leave()
            run.finish()
            student = run.save_networks()
    except BaseException:
        run.close(failed=True)
        raise
    run.close(failed=False)
    state.student.module.eval()
    with run.trackers:
        results = {"agreement": agreement(state), **({} if data is None else {"accuracy": run.accuracy(student)})}
        run.trackers.add_results(results)
    return DistillResult(
        student=student,
        generator=state.synthesizer.generator,
        rounds=state.rounds,
        epochs=state.epochs,
        run_dir=folder,
        accuracy=results.get("accuracy"),
        agreement=results["agreement"],
        images_per_s=rounds.images / rounds.seconds if rounds.seconds else 0.0,
        seconds=rounds.seconds,
    )
