"""Supervised training of a teacher, or of a student for comparison, on labeled images."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.data import DataLoader

from dfkd_fast import report
from dfkd_fast.config import TeachConfig, to_dict
from dfkd_fast.data import ImageData, loader
from dfkd_fast.engine.evaluation import evaluate
from dfkd_fast.engine.progress import Listener, ProgressLine
from dfkd_fast.engine.runtime import Runtime, float32_weights, new_run_folder
from dfkd_fast.engine.trackers import TrackedRun, Trackers
from dfkd_fast.files import lock_folder, write_file
from dfkd_fast.graph import unwrap
from dfkd_fast.graph.tracing import weights_of
from dfkd_fast.models import save_weights

__all__ = ["TeachResult", "teach"]


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    """The result of :func:`teach`.

    Attributes:
        model: the trained network, in eval mode.
        accuracy: top-1 accuracy on the held-out images, in [0, 1].
        weights: safetensors file of the weights, with classes, image size and normalization as metadata.
        run_dir: the run's folder.
        epochs: two lists, ``epoch`` (1, 2, ...) and ``loss`` (the mean training loss of each epoch).
        images_per_s: training images per second.
    """

    model: nn.Module
    accuracy: float
    weights: Path
    run_dir: Path
    epochs: dict[str, list[float]]
    images_per_s: float


class _Trainer:
    """Trains epoch by epoch with SGD, a cosine learning rate and cross-entropy."""

    def __init__(self, model: nn.Module, batches: DataLoader[Any], config: TeachConfig, runtime: Runtime) -> None:
        self.model, self.batches, self.config, self.runtime = model, batches, config, runtime
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.autocast is torch.float16)
        self.steps = 0

    def epoch(self) -> float:
        """Train for one epoch and return the mean loss."""
        runtime, total = self.runtime, self.config.epochs * len(self.batches)
        losses = torch.zeros((), device=runtime.device)
        for images, labels in self.batches:
            images = images.to(runtime.device, non_blocking=True, memory_format=runtime.memory_format)
            labels = labels.to(runtime.device, non_blocking=True)
            with runtime.cast():
                loss = F.cross_entropy(self.model(images).float(), labels)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * 0.5 * (1 + math.cos(math.pi * self.steps / total))
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses += loss.detach()
            self.steps += 1
        return losses.item() / len(self.batches)


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

    Seeds torch's global generators with ``config.seed``.

    Args:
        model: a classifier from images (N, 3, H, W) to logits (N, data.num_classes). It is trained in place. Weights of
            other dtypes are trained and saved in float32, and converted back at the end.
        data: labeled images. The held-out images are only used for the final evaluation.
        config: options of the training.
        description: additional metadata of the weights file.
        workers: number of data loader processes.
        progress: show a progress bar, or a function that is called with the progress instead.

    Returns:
        The trained network, its accuracy and the run folder.

    Raises:
        ArithmeticError: the mean loss of an epoch or a trained weight is not finite.
        ValueError: there are fewer training images than ``config.batch_size``.
        dfkd_fast.files.FolderInUseError: another run writes to the folder.
        dfkd_fast.files.WriteError: a file could not be written.
    """
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    torch.manual_seed(config.seed)
    folder = new_run_folder(config.out, "teach")
    with lock_folder(folder), float32_weights(model):
        return _teach(model, data, config, runtime, folder, dict(description or {}), workers, progress)


def _teach(
    model: nn.Module,
    data: ImageData,
    config: TeachConfig,
    runtime: Runtime,
    folder: Path,
    description: dict[str, str],
    workers: int,
    progress: bool | Listener,
) -> TeachResult:
    write_file(folder / "config.yaml", yaml.safe_dump({"teach": to_dict(config)}, sort_keys=False).encode())
    batches = loader(
        data.train, batch_size=config.batch_size, shuffle=True, seed=config.seed, workers=workers, drop_last=True
    )
    if not len(batches):
        raise ValueError(f"batch_size must be at most the number of training images, got {config.batch_size}")
    runtime.place(model)
    trainer = _Trainer(model, batches, config, runtime)
    history: dict[str, list[float]] = {"epoch": [], "loss": []}
    trackers = Trackers(config.trackers, TrackedRun(folder=folder, config={"teach": to_dict(config)}))
    model.train()
    start = time.perf_counter()
    with (
        trackers,
        runtime.backends(),
        ProgressLine("teach", total=config.epochs, unit="epochs", enabled=progress) as line,
    ):
        for epoch in range(1, config.epochs + 1):
            mean = trainer.epoch()
            history["epoch"].append(epoch)
            history["loss"].append(mean)
            report.write_results(folder / "history.json", {"epochs": history, "accuracy": None})
            if not math.isfinite(mean):
                raise ArithmeticError(f"the mean loss of epoch {epoch} is {mean}; try a lower lr")
            trackers.add_scalars({"teach/loss": mean}, epoch)
            line.show(epoch, {"loss": mean}, trainer.steps * config.batch_size / (time.perf_counter() - start))
        runtime.synchronize()
        seconds = time.perf_counter() - start
        for name, tensor in weights_of(unwrap(model)).items():
            if not tensor.isfinite().all():
                raise ArithmeticError(f"{name} is not finite after epoch {config.epochs}; try a lower lr")
        result = evaluate(model, data.test, num_classes=data.num_classes, workers=workers, runtime=runtime)
        trackers.add_scalars({"teach/accuracy": result.top1}, config.epochs)
        trackers.add_results({"accuracy": result.top1})
    model.eval()
    report.write_results(folder / "history.json", {"epochs": history, "accuracy": result.top1})
    meta = {"format": "dfkd_fast.teacher/1", "num_classes": str(data.num_classes)}
    meta |= {name: json.dumps(getattr(data, name)) for name in ("image_size", "mean", "std", "classes")}
    weights = folder / "teacher.safetensors"
    save_weights(model, weights, {**meta, **description})
    return TeachResult(
        model=model,
        accuracy=result.top1,
        weights=weights,
        run_dir=folder,
        epochs=history,
        images_per_s=trainer.steps * config.batch_size / seconds,
    )
