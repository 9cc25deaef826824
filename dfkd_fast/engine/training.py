"""Supervised training of a teacher, or of a student for comparison, on labeled images."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfkd_fast import report
from dfkd_fast.collectives import average, current_group
from dfkd_fast.config import TeachConfig, to_dict
from dfkd_fast.data import ImageData, loader
from dfkd_fast.data.loading import Loader
from dfkd_fast.engine.checkpoint import Checkpoints
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
from dfkd_fast.engine.evaluation import evaluate
from dfkd_fast.engine.interrupt import StopRequest, catch_signals
from dfkd_fast.engine.progress import Listener, ProgressLine
from dfkd_fast.engine.runtime import Runtime, float32_weights, new_run_folder, rng_states, set_rng_states
from dfkd_fast.engine.trackers import TrackedRun, Trackers
from dfkd_fast.files import write_file
from dfkd_fast.graph import unwrap
from dfkd_fast.graph.tracing import weights_of
from dfkd_fast.models import save_weights
from dfkd_fast.nn.norm import synchronize_batchnorm

__all__ = ["TeachResult", "teach"]

log = logging.getLogger(__name__)

_AGREE_EVERY = 10  # steps, after which several processes stop together


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    """The result of :func:`teach`.

    Attributes:
        model: the trained network, in eval mode; with ``config.ema``, the average.
        accuracy: top-1 accuracy on the held-out images, in [0, 1].
        weights: safetensors file of the weights, with classes, image size and normalization as metadata.
        run_dir: the run's folder.
        epochs: the number ``epoch`` (1, 2, ...), the mean training ``loss`` and the ``accuracy`` of each epoch. Epochs
            that were not evaluated have an accuracy of NaN.
        images_per_s: training images per second; 0 if the run was already finished.
    """

    model: nn.Module
    accuracy: float
    weights: Path
    run_dir: Path
    epochs: dict[str, list[float]]
    images_per_s: float


class _Trainer:
    """Trains epoch by epoch with SGD, a cosine learning rate and cross-entropy.

    Attributes:
        finished: number of finished epochs.
        step: number of steps of the next epoch that are already done.
        history: loss and accuracy of the finished epochs.
        images_per_s: training images per second in this process.
    """

    def __init__(self, model: nn.Module, batches: Loader, config: TeachConfig, runtime: Runtime) -> None:
        self.model, self.batches, self.config, self.runtime = model, batches, config, runtime
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.autocast is torch.float16)
        self.average: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.average = AveragedModel(unwrap(model), multi_avg_fn=average, use_buffers=True)
        self.finished = self.step = 0
        self.history: dict[str, list[float]] = {"epoch": [], "loss": [], "accuracy": []}
        self._order = batches.get_state()  # of the next epoch
        self._losses = torch.zeros((), device=runtime.device)
        self._images, self._seconds = 0, 0.0

    @property
    def network(self) -> nn.Module:
        """The network to evaluate and save."""
        return self.model if self.average is None else self.average.module

    @property
    def images_per_s(self) -> float:
        return self._images / self._seconds if self._seconds else 0.0

    def _rate(self) -> float:
        """The learning rate of the next step."""
        steps = len(self.batches)
        done, warmup = self.finished * steps + self.step, self.config.warmup_epochs * steps
        if done < warmup:
            return self.config.lr * (done + 1) / warmup
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (self.config.epochs * steps - warmup)))

    def _train(self, images: Tensor, labels: Tensor) -> None:
        runtime = self.runtime
        images = images.to(runtime.device, non_blocking=True, memory_format=runtime.memory_format)
        labels = labels.to(runtime.device, non_blocking=True)
        with runtime.cast():
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        average([*(weight.grad for weight in self.model.parameters() if weight.grad is not None), loss])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(unwrap(self.model))
        self._losses += loss
        self._images += self.config.batch_size
        self.step += 1

    def epoch(self, stop: StopRequest) -> float | None:
        """Train to the end of the epoch and return its mean loss, or None if the process must stop before."""
        start = time.perf_counter()
        self.batches.set_state(self._order, skip=self.step)
        for images, labels in self.batches:
            self._train(images, labels)
            if current_group() is None or self.step % _AGREE_EVERY == 0:
                agree_to_stop(False, stop)
            if stop.agreed is not None:
                return None
        mean = self._losses.item() / len(self.batches)
        self._seconds += time.perf_counter() - start
        self._losses.zero_()
        self._order = self.batches.get_state()
        self.finished, self.step = self.finished + 1, 0
        return mean

    def require_finite(self) -> None:
        """Raise ArithmeticError if a weight or a running statistic is NaN or infinite."""
        for network in self.networks():
            for name, tensor in weights_of(network).items():
                if not tensor.isfinite().all():
                    raise ArithmeticError(f"{name} is not finite after epoch {self.finished}; try a lower lr")

    def networks(self) -> list[nn.Module]:
        """The trained network, and with ``config.ema`` its average."""
        return [unwrap(self.model), *([] if self.average is None else [self.average.module])]

    def parts(self) -> dict[str, Any]:
        """Objects with a state dict, by their names in a checkpoint."""
        parts = {"model": unwrap(self.model), "optimizer": self.optimizer, "scaler": self.scaler}
        return parts if self.average is None else {**parts, "average": self.average}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue with the same results."""
        return {
            **{name: part.state_dict() for name, part in self.parts().items()},
            **rng_states(),
            "order": self._order,
            "losses": self._losses,
            "position": [self.finished, self.step],
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        set_rng_states(state)
        self._order = state["order"]
        self._losses.copy_(state["losses"])
        self.finished, self.step = state["position"]
        self.history = state["history"]


def teach(
    model: nn.Module,
    data: ImageData,
    config: TeachConfig,
    *,
    description: Mapping[str, str] | None = None,
    workers: int = 0,
    progress: bool | Listener = True,
) -> TeachResult:
    """Train a classifier with SGD, a cosine learning rate and cross-entropy (paper, section 5.1).

    Seeds torch's global generators with ``config.seed``. A run that is killed and started again with ``config.resume``
    ends with the results of an undisturbed one, on the CPU bit for bit, if the random transforms of the data use
    PyTorch's global generator. Within :func:`dfkd_fast.engine.join`, all processes must call this function: each has an
    equal part of every batch, and its own random transforms.

    Args:
        model: a classifier from images (N, 3, H, W) to logits (N, data.num_classes). It is trained in place. Weights of
            other dtypes are trained and saved in float32, and converted back at the end.
        data: labeled images. The held-out images are only used to measure the accuracy, and select nothing.
        config: options of the training. Without ``config.resume``, ``config.out`` must not contain checkpoints.
        description: additional metadata of the weights file.
        workers: number of data loader processes.
        progress: show a progress bar, or a function that is called with the progress instead.

    Returns:
        The trained network, its accuracy and the run folder.

    Raises:
        ArithmeticError: the mean loss of an epoch or a trained weight is not finite.
        ValueError: there are fewer training images than ``config.batch_size``, the number of processes does not divide
            it, or the folder contains another run.
        CheckpointError: the run cannot be resumed: no checkpoint in its folder is usable, or a setting, the data or the
            network differs. The message names the difference.
        dfkd_fast.files.FolderInUseError: another run writes to the folder.
        dfkd_fast.files.WriteError: a file could not be written. The earlier checkpoints are kept.
        KeyboardInterrupt: after Ctrl-C, once the run is saved. SIGTERM saves the run and exits with status 143.
    """
    config, described = restartable(config), dict(description or {})
    require_divisible(config.batch_size, "TeachConfig.batch_size")
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    with locked_folder(lambda: new_run_folder(config.out, "teach")) as folder, float32_weights(model):
        torch.manual_seed(config.seed)
        batches = loader(
            data.train,
            batch_size=config.batch_size,
            shuffle=True,
            seed=config.seed,
            workers=workers,
            drop_last=True,
            group=current_group(),
        )
        if not len(batches):
            raise ValueError(f"batch_size must be at most the number of training images, got {config.batch_size}")
        runtime.place(model)
        trainer = _Trainer(model, batches, config, runtime)
        checkpoints = _start(trainer, data, folder, described)
        require_equal(value for each in trainer.networks() for value in each.state_dict().values())
        group = current_group() if config.sync_batchnorm else None
        with runtime.backends(), synchronize_batchnorm({"network": model}, group):
            _train(trainer, data, folder, checkpoints, workers, progress)
        return _finish(trainer, data, folder, described)


def _start(trainer: _Trainer, data: ImageData, folder: Path, description: dict[str, str]) -> Checkpoints:
    """Load the newest checkpoint if the run is resumed, and write its config.yaml."""
    config = trainer.config
    assert isinstance(data.train, Sized)
    resolved: dict[str, Any] = {"precision": trainer.runtime.precision, "training_images": len(data.train)}
    resolved |= {name: getattr(data, name) for name in ("num_classes", "image_size", "mean", "std")}
    resolved |= {name: description[name] for name in ("model", "options") if name in description}
    checkpoints = Checkpoints(folder / "checkpoints", config, resolved=resolved)
    networks = {name: part for name, part in trainer.parts().items() if isinstance(part, nn.Module)}
    saved = on_main(lambda: checkpoints.resumed(networks))
    if saved is not None:
        trainer.load_state_dict(saved)
        if trainer.finished < config.epochs:
            log.info("resumed at epoch %d, step %d", trainer.finished, trainer.step)
        else:
            log.info("this run is finished: all of its %d epochs are done", config.epochs)
    if is_main() and (trainer.finished < config.epochs or not (folder / "config.yaml").exists()):
        write_file(folder / "config.yaml", yaml.safe_dump({"teach": to_dict(config)}, sort_keys=False).encode())
    return checkpoints


def _train(
    trainer: _Trainer,
    data: ImageData,
    folder: Path,
    checkpoints: Checkpoints,
    workers: int,
    progress: bool | Listener,
) -> None:
    """Train the epochs that are left, with an evaluation, files and a checkpoint after each that needs them."""
    config, history = trainer.config, trainer.history
    tracked = TrackedRun(
        folder=folder, config={"teach": to_dict(config)}, resumed=config.resume, steps=trainer.finished
    )
    trackers = Trackers(config.trackers if is_main() else (), tracked)
    line = ProgressLine("teach", total=config.epochs, unit="epochs", enabled=progress if is_main() else False)

    def write_history() -> None:
        if is_main():
            report.write_results(folder / "history.json", {"epochs": history, "accuracy": None})

    def record(mean: float) -> None:
        epoch, last = trainer.finished, trainer.finished == config.epochs
        for name, value in (("epoch", epoch), ("loss", mean), ("accuracy", math.nan)):
            history[name].append(value)
        if not math.isfinite(mean):
            write_history()
            raise ArithmeticError(f"the mean loss of epoch {epoch} is {mean}; try a lower lr")
        trainer.require_finite()
        trackers.add_scalars({"teach/loss": mean}, epoch)
        if last or (config.evaluate_every and epoch % config.evaluate_every == 0):
            found = evaluate(
                trainer.network, data.test, num_classes=data.num_classes, workers=workers, runtime=trainer.runtime
            )
            history["accuracy"][-1] = found.top1
            trackers.add_scalars({"teach/accuracy": found.top1}, epoch)
        write_history()
        newest = [value for value in history["accuracy"] if not math.isnan(value)][-1:]
        line.show(epoch, {"loss": mean, **({"accuracy": newest[0]} if newest else {})}, trainer.images_per_s)

    trainer.model.train()
    with trackers, catch_signals() as stop, line:
        while trainer.finished < config.epochs:
            mean = trainer.epoch(stop)
            if not config.sync_batchnorm:
                broadcast([*unwrap(trainer.model).buffers(), *unwrap(trainer.network).buffers()])
            if mean is not None:
                record(mean)
            due = trainer.finished == config.epochs or trainer.finished % config.checkpoint_every == 0
            agree_to_stop(False, stop)
            if due or stop.agreed is not None:
                require_equal(value for each in trainer.networks() for value in each.state_dict().values())
                trackers.flush()  # a run that resumes from the checkpoint does not log its epochs again
                if is_main():
                    checkpoints.save(trainer.state_dict())
            if stop.agreed is not None:
                line.message(f"saved at epoch {trainer.finished}, step {trainer.step}")
                stop.leave()
        trackers.add_results({"accuracy": history["accuracy"][-1]})
    if is_main():
        checkpoints.prune()  # an earlier process may have been killed between a save and its deletions


def _finish(trainer: _Trainer, data: ImageData, folder: Path, description: dict[str, str]) -> TeachResult:
    """Write the files of a finished run."""
    model, history = trainer.model, trainer.history
    if trainer.average is not None:
        unwrap(model).load_state_dict(trainer.average.module.state_dict())
    model.eval()
    accuracy = history["accuracy"][-1]
    meta = {"format": "dfkd_fast.teacher/1", "num_classes": str(data.num_classes)}
    meta |= {name: json.dumps(getattr(data, name)) for name in ("image_size", "mean", "std", "classes")}
    weights = folder / "teacher.safetensors"

    if is_main():
        save_weights(model, weights, {**meta, **description})
        report.write_results(folder / "history.json", {"epochs": history, "accuracy": accuracy})
    return TeachResult(
        model=model,
        accuracy=accuracy,
        weights=weights,
        run_dir=folder,
        epochs=history,
        images_per_s=trainer.images_per_s,
    )
