"""Accuracy, calibration, agreement with the teacher, and cost of a classifier."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

from dfkd_fast.collectives import current_group
from dfkd_fast.data import loader
from dfkd_fast.engine.distributed import everyone
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.graph import Outputs, preserve_train_mode

__all__ = [
    "Cost",
    "EvalResult",
    "Measures",
    "Predictions",
    "cost",
    "evaluate",
    "logits_of",
    "measure",
    "predictions",
    "runtime_of",
]

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


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The result of :func:`predictions`, on the CPU.

    Attributes:
        logits: (N, classes), float32.
        labels: (N,), int64.
        seconds: duration, including data loading.
    """

    logits: Tensor
    labels: Tensor
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The result of :func:`measure`. Fractions are in [0, 1].

    Attributes:
        top1: top-1 accuracy.
        top5: top-5 accuracy; None with fewer than six classes.
        images: number of images.
        not_finite: number of images whose largest logit is not finite.
        per_class: top-1 accuracy on the images of each class; None for a class without images.
        counts: number of images of each class.
        confused: wrong predictions as ``(label, predicted class, number of images)``, the most frequent first, at most
            20.
        ece: expected calibration error: the mean over images of the distance between accuracy and mean confidence of
            the image's bin. The confidence is the probability of the predicted class.
        reliability: ``(mean confidence, accuracy, number of images)`` of each of 15 equal bins of the confidence. Bin i
            is (i / 15, (i + 1) / 15]. Mean and accuracy of an empty bin are None.
        agreement: fraction of images for which teacher and student predict the same class; None without a teacher.
        kl: KL divergence of the student's probabilities from the teacher's, KL(teacher || student), in nats, mean over
            images; None without a teacher. It is infinite if the student rules out a class (a logit of -inf) that
            the teacher does not.
    """

    top1: float
    top5: float | None
    images: int
    not_finite: int
    per_class: list[float | None]
    counts: list[int]
    confused: list[tuple[int, int, int]]
    ece: float
    reliability: list[tuple[float | None, float | None, int]]
    agreement: float | None
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The result of :func:`cost`.

    Attributes:
        flops: floating-point operations per image of convolutions, matrix products and attention. A multiplication
            and an addition count as two. Other ops, such as BatchNorm, ReLU and the fused ops of ``dfkd_fast.ops``, are
            not counted.
        parameters: number of parameters.
        latency_ms: duration of a forward pass of one image, in milliseconds.
        batch_ms_per_image: duration of a forward pass of 64 images, per image, in milliseconds.
        peak_bytes: most memory that PyTorch had allocated on the CUDA device during a forward pass of 64 images,
            including weights and all other tensors on the device; None on other devices.
    """

    flops: int
    parameters: int
    latency_ms: float
    batch_ms_per_image: float
    peak_bytes: int | None


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a network on its device in float32."""
    device = next(model.parameters()).device
    return Runtime(device=device, autocast=None, tf32=False, channels_last=False)


def logits_of(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """The float32 logits (N, classes) of images (N, 3, H, W) on any device."""
    images = images.to(runtime.device, non_blocking=True, memory_format=runtime.memory_format)
    with runtime.cast():
        outputs = model(images)
    return (outputs.logits if isinstance(outputs, Outputs) else outputs).float()


def _batches(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, int]],
    *,
    num_classes: int,
    batch_size: int,
    workers: int,
    runtime: Runtime,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 logits and labels per batch, on the device. Raises the ValueErrors of :func:`predictions`.

    In a run on P processes, process i has the images i, i + P, i + 2 P, ...
    """
    assert isinstance(dataset, Sized)
    if len(dataset) == 0:
        raise ValueError("dataset must have at least one image, got an empty one")
    if (group := current_group()) is not None:
        dataset = Subset(dataset, range(group.rank, len(dataset), group.size))
        if len(dataset) == 0:
            return
    for images, labels in loader(dataset, batch_size=batch_size, shuffle=False, seed=0, workers=workers):
        logits = logits_of(model, images, runtime)
        if logits.shape != (len(labels), num_classes):
            raise ValueError(f"logits must have shape {(len(labels), num_classes)}, got {tuple(logits.shape)}")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}")
        yield logits, labels.to(runtime.device, non_blocking=True)


def _rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of classes with a larger logit than the label, or with an equal one and a smaller index."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1)


def _not_finite(logits: Tensor) -> Tensor:
    return ~logits.amax(1).isfinite()  # -inf is a valid score of a masked class


def _warn(not_finite: int, images: int) -> None:
    if not_finite:
        log.warning("%d of %d images have logits that are not finite; they count as wrong", not_finite, images)


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
    :func:`measure` computes more from the logits of all images. Within :func:`dfkd_fast.engine.join`, all processes
    must call this function: each evaluates a part of the images.

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
        ValueError: the dataset is empty, a label is not in 0..num_classes - 1, or the logits have another shape.
    """
    runtime = runtime or runtime_of(model)
    counts = torch.zeros(3, dtype=torch.int64, device=runtime.device)
    images, start = 0, time.perf_counter()
    options: Any = {"num_classes": num_classes, "batch_size": batch_size, "workers": workers, "runtime": runtime}
    with preserve_train_mode(model, False):
        for logits, labels in _batches(model, dataset, **options):
            bad, rank = _not_finite(logits), _rank_of_label(logits, labels)
            counts += torch.stack([~bad & (rank < 1), ~bad & (rank < 5), bad]).sum(1)
            images += len(labels)
    first, five, broken, images = (sum(each) for each in zip(*everyone([*counts.tolist(), images]), strict=True))
    _warn(broken, images)
    return EvalResult(
        top1=first / images,
        top5=five / images if num_classes > 5 else None,
        images=images,
        images_per_s=images / (time.perf_counter() - start),
    )


@torch.inference_mode()
def predictions(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, int]],
    *,
    num_classes: int,
    batch_size: int = 256,
    workers: int = 0,
    runtime: Runtime | None = None,
) -> Predictions:
    """Return the logits of a classifier in eval mode for all images, for :func:`measure`.

    Within :func:`dfkd_fast.engine.join`, all processes must call this function, and all get all logits.

    Args:
        model: maps images (N, 3, H, W) to logits (N, num_classes) or :class:`dfkd_fast.models.Outputs`. Its training
            flags are restored.
        dataset: pairs of a normalized float32 image (3, H, W) and an integer label.
        num_classes: number of classes.
        batch_size: number of images per batch.
        workers: number of data loader processes.
        runtime: device and precision; None uses the model's device and float32.

    Returns:
        Logits and labels in the order of the dataset.

    Raises:
        ValueError: the dataset is empty, a label is not in 0..num_classes - 1, or the logits have another shape.
    """
    runtime, start = runtime or runtime_of(model), time.perf_counter()
    found = []
    options: Any = {"num_classes": num_classes, "batch_size": batch_size, "workers": workers, "runtime": runtime}
    with preserve_train_mode(model, False):
        for logits, labels in _batches(model, dataset, **options):
            found.append((logits.cpu(), labels.cpu()))
    found = found or [(torch.zeros(0, num_classes), torch.zeros(0, dtype=torch.int64))]
    parts = everyone(tuple(torch.cat(each) for each in zip(*found, strict=True)))
    logits, labels = (_interleave(each) for each in zip(*parts, strict=True))
    return Predictions(logits=logits, labels=labels, seconds=time.perf_counter() - start)


def _interleave(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all processes in the order of the dataset; see :func:`_batches`."""
    rows = torch.cat([*parts])
    result = torch.empty_like(rows)
    for rank, part in enumerate(parts):
        result[rank :: len(parts)] = part
    return result


def _per_row(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function of float64 rows (rows, classes) -> (rows,) in parts, which bounds its memory."""
    parts = zip(*(tensor.split(4096) for tensor in tensors), strict=True)
    return torch.cat([function(*(each.double() for each in part)) for part in parts])


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    target, score = teacher.log_softmax(1), student.log_softmax(1)
    weight = target.exp()
    return torch.where(weight == 0, 0, weight * (target - score)).sum(1)  # 0 log 0 = 0


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _reliability(confidence: Tensor, correct: Tensor) -> list[tuple[float | None, float | None, int]]:
    """See :class:`Measures`. torchmetrics puts confidences of exactly 1 into a 16th bin."""
    bins = torch.bucketize(confidence, torch.arange(1, 15, dtype=torch.float64) / 15)
    rows: list[tuple[float | None, float | None, int]] = []
    for inside in (bins == index for index in range(15)):
        count = int(inside.sum())
        rows.append((_mean(confidence[inside]), _mean(correct[inside]), count) if count else (None, None, 0))
    return rows


def _confused(labels: Tensor, predicted: Tensor) -> list[tuple[int, int, int]]:
    wrong = labels != predicted
    pairs, counts = torch.stack([labels[wrong], predicted[wrong]]).unique(dim=1, return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:20]
    return [(*pair, count) for pair, count in zip(pairs[:, most].T.tolist(), counts[most].tolist(), strict=True)]


def measure(predictions: Predictions, *, teacher: Predictions | None = None) -> Measures:
    """Measure how accurate and how well calibrated predictions are, and how close they are to a teacher's.

    The predicted class is the one with the largest logit, and among equal ones the first. An image whose largest logit
    is not finite has no predicted class: it counts as wrong in the accuracies and as a disagreement with the
    teacher, and is left out of ``confused``, ``reliability`` and ``ece``. ``kl`` leaves out the images of which either
    network has such logits. Without any other image, ``ece`` and ``kl`` are NaN. A warning gives the number of such
    images.

    Args:
        predictions: the classifier's predictions.
        teacher: the teacher's predictions for the same images.

    Raises:
        ValueError: the teacher's predictions have other labels or another number of classes.
    """
    logits, labels = predictions.logits, predictions.labels
    (images, classes), broken = logits.shape, _not_finite(logits)
    _warn(int(broken.sum()), images)
    rank = _rank_of_label(logits, labels)
    correct, predicted = (rank == 0) & ~broken, logits.argmax(1)
    counts = labels.bincount(minlength=classes).tolist()
    right = labels[correct].bincount(minlength=classes).tolist()
    confidence = _per_row(lambda rows: rows.softmax(1).amax(1), logits[~broken])
    reliability = _reliability(confidence, correct[~broken])
    shifts = (abs(mean - accuracy) * count for mean, accuracy, count in reliability if mean is not None)  # type: ignore[operator]
    agreement = kl = None
    if teacher is not None:
        if teacher.logits.shape != logits.shape or not teacher.labels.equal(labels):
            shapes = f"{tuple(logits.shape)} and {tuple(teacher.logits.shape)}"
            raise ValueError(f"teacher must have logits for the same images and classes, got shapes {shapes}")
        valid = ~broken & ~_not_finite(teacher.logits)
        agreement = _mean((predicted == teacher.logits.argmax(1)) & valid)
        kl = _mean(_per_row(_divergence, teacher.logits[valid], logits[valid]))
    return Measures(
        top1=_mean(correct),
        top5=_mean((rank < 5) & ~broken) if classes > 5 else None,
        images=images,
        not_finite=int(broken.sum()),
        per_class=[hits / count if count else None for hits, count in zip(right, counts, strict=True)],
        counts=counts,
        confused=_confused(labels[~broken], predicted[~broken]),
        ece=sum(shifts) / len(confidence) if len(confidence) else float("nan"),
        reliability=reliability,
        agreement=agreement,
        kl=kl,
    )


def _count_flops(model: nn.Module, images: Tensor) -> int:
    # torch's counter does not know the fused attention of CPUs and the fused encoder layer: use plain products.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def _median_ms(model: nn.Module, images: Tensor) -> float:
    """The median of up to 30 forward passes, or fewer in about two seconds, after two to warm up."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 4 or (len(times) < 32 and time.perf_counter() - start < 2):
        if images.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            model(images)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            model(images)
            times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times[2:])


@torch.inference_mode()
def cost(model: nn.Module, image_size: int, runtime: Runtime) -> Cost:
    """Measure the operations, parameters, latency and memory of a classifier in eval mode.

    Times are medians of repeated forward passes on random images that are already on the device.

    Args:
        model: maps images (N, 3, H, W) to logits; it is on the runtime's device. Its training flags are restored.
        image_size: height and width of the images in pixels.
        runtime: device and precision.
    """
    images = torch.randn(64, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(runtime.device, memory_format=runtime.memory_format)
    cuda = images.is_cuda
    with preserve_train_mode(model, False), runtime.backends(), runtime.cast(), torch.cuda.device_of(images):
        flops, single = _count_flops(model, images[:1]), _median_ms(model, images[:1])
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        batch = _median_ms(model, images)
        peak = torch.cuda.max_memory_allocated() if cuda else None
    return Cost(
        flops=flops,
        parameters=sum(each.numel() for each in model.parameters()),
        latency_ms=single,
        batch_ms_per_image=batch / len(images),
        peak_bytes=peak,
    )
