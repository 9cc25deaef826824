"""Accuracy on held-out images."""

from __future__ import annotations

import logging
import time
from collections.abc import Sized
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from dfkd_fast.data import loader
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.graph import Outputs, preserve_train_mode

__all__ = ["EvalResult", "evaluate", "logits_of", "runtime_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The result of :func:`evaluate`.

    Attributes:
        top1: top-1 accuracy, in [0, 1].
        top5: top-5 accuracy, in [0, 1]; None with fewer than six classes.
        images: number of images.
        images_per_s: images per second, including data loading.
    """

    top1: float
    top5: float | None
    images: int
    images_per_s: float


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a network on its device in float32."""
    device = next(model.parameters()).device
    return Runtime(device=device, autocast=None, tf32=False, channels_last=False)


def logits_of(model: nn.Module, images: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """The float32 logits (N, classes) of images (N, 3, H, W) on any device."""
    images = images.to(runtime.device, non_blocking=True, memory_format=runtime.memory_format)
    with runtime.cast():
        outputs = model(images)
    return (outputs.logits if isinstance(outputs, Outputs) else outputs).float()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: Dataset[tuple[torch.Tensor, int]],
    *,
    num_classes: int,
    batch_size: int = 256,
    workers: int = 0,
    runtime: Runtime | None = None,
) -> EvalResult:
    """Measure the top-1 and, with more than five classes, top-5 accuracy of a classifier in eval mode.

    An image whose largest logit is not finite counts as wrong, and a warning gives the number of such images.

    Args:
        model: maps images (N, 3, H, W) to logits (N, num_classes) or :class:`dfkd_fast.models.Outputs`. Its training
            flags are restored.
        dataset: pairs of a normalized float32 image (3, H, W) and an integer label.
        num_classes: number of classes.
        batch_size: number of images per batch.
        workers: number of data loader processes.
        runtime: device and precision; None uses the model's device and float32.

    Returns:
        Accuracies and speed.

    Raises:
        ValueError: the dataset is empty.
    """
    assert isinstance(dataset, Sized)
    if len(dataset) == 0:
        raise ValueError("dataset must have at least one image, got an empty one")
    runtime = runtime or runtime_of(model)
    metrics = {1: MulticlassAccuracy(num_classes, average="micro").to(runtime.device)}
    if num_classes > 5:
        metrics[5] = MulticlassAccuracy(num_classes, top_k=5, average="micro").to(runtime.device)
    broken = torch.zeros((), dtype=torch.int64, device=runtime.device)
    start = time.perf_counter()
    with preserve_train_mode(model, False):
        for images, labels in loader(dataset, batch_size=batch_size, shuffle=False, seed=0, workers=workers):
            labels = labels.to(runtime.device, non_blocking=True)
            logits = logits_of(model, images, runtime)
            bad = ~logits.amax(1, keepdim=True).isfinite()  # -inf is a valid score of a masked class
            broken += bad.sum()
            # The label gets the lowest score, because NaN would count as the highest one.
            wrong = -(torch.arange(logits.shape[1], device=logits.device) == labels[:, None]).float()
            for metric in metrics.values():
                metric.update(torch.where(bad, wrong, logits), labels)
    top1 = metrics[1].compute().item()
    if broken:
        log.warning("%d of %d images have logits that are not finite; they count as wrong", broken, len(dataset))
    return EvalResult(
        top1=top1,
        top5=metrics[5].compute().item() if 5 in metrics else None,
        images=len(dataset),
        images_per_s=len(dataset) / (time.perf_counter() - start),
    )
