"""Classes of images in files."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from dfkd_fast.config import expand
from dfkd_fast.data import find_images, loader
from dfkd_fast.data.image_data import IMAGE_SUFFIXES, read_image
from dfkd_fast.data.transforms import evaluation_transform
from dfkd_fast.engine.evaluation import logits_of, runtime_of
from dfkd_fast.engine.progress import Listener, ProgressLine
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.files import atomic_write
from dfkd_fast.graph import preserve_train_mode

__all__ = ["Prediction", "predict", "write_predictions"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: the image file.
        classes: names of the most probable classes, the best one first; empty after an error.
        probabilities: the probability of each of these classes, in [0, 1].
        error: why there is no prediction, in one line that names the file; None if there is one.
    """

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


class _Images(Dataset[tuple[Tensor, str]]):
    """Transformed images, each with an error. After an error, the image is black."""

    def __init__(self, paths: Sequence[Path], image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.paths, self.image_size = paths, image_size
        self.transform = evaluation_transform(image_size, mean=mean, std=std)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.transform(read_image(self.paths[index])), ""
        except ValueError as error:
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.float32), str(error)


def _image_paths(images: Iterable[str | Path]) -> list[Path]:
    paths: list[Path] = []
    for each in map(expand, images):
        paths += map(Path, find_images(each)) if each.is_dir() else [each]
    return paths


@torch.inference_mode()
def _probabilities(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """Probabilities (N, classes) on the CPU, of the network in eval mode."""
    with preserve_train_mode(model, False), runtime.backends():
        return logits_of(model, images, runtime).softmax(1).cpu()


def predict(
    model: nn.Module,
    images: Iterable[str | Path],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None = None,
    top: int = 5,
    batch_size: int = 64,
    workers: int = 0,
    runtime: Runtime | None = None,
    progress: bool | Listener = False,
) -> Iterator[Prediction]:
    """Classify image files in batches, while the predictions are read.

    Args:
        model: maps images (N, 3, image_size, image_size) to logits (N, classes) or
            :class:`dfkd_fast.models.Outputs`. It is evaluated in eval mode; its training flags are restored.
        images: image files, and folders that are searched for files with image suffixes, also in their subfolders.
            Hidden ones are left out.
        image_size: height and width to which images are resized and cropped as for evaluation, in pixels.
        mean: mean of the input normalization per channel, for pixels in [0, 1].
        std: standard deviation of the input normalization per channel.
        classes: names of the classes in the order of the logits; None uses the numbers from 0.
        top: maximum number of classes per image.
        batch_size: number of images per batch.
        workers: number of processes that read images.
        runtime: device and precision; None uses the model's device and float32.
        progress: show a progress bar on stderr if there is more than one batch, or call a function instead.

    Returns:
        One prediction per image, in the order of ``images``, and sorted within a folder. An image that cannot be read
        or whose logits are not finite has an error instead of classes.

    Raises:
        ValueError: there are no images, or ``top`` or ``batch_size`` is below 1.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    given = list(images)
    paths = _image_paths(given)
    if not paths:
        listed = ", ".join(map(str, given)) or "no file or folder was given"
        raise ValueError(f"no images to classify: {listed}; image files end with {', '.join(IMAGE_SUFFIXES)}")
    data = _Images(paths, image_size, mean, std)
    batches = loader(data, batch_size=batch_size, shuffle=False, seed=0, workers=workers)
    enabled = progress if len(batches) > 1 or not isinstance(progress, bool) else False
    line = ProgressLine("predict", total=len(paths), unit="images", enabled=enabled, console=Console(stderr=True))

    def predictions() -> Iterator[Prediction]:
        done, start = 0, time.perf_counter()
        with line:
            for pixels, errors in batches:
                found = _probabilities(model, pixels, runtime or runtime_of(model))
                best = found.topk(min(top, found.shape[1]))
                for values, indices, error in zip(best.values.tolist(), best.indices.tolist(), errors, strict=True):
                    path, done = paths[done], done + 1
                    if not error and math.isnan(values[0]):
                        error = f"the logits of {path} are not finite"
                    if error:
                        yield Prediction(path=path, error=error)
                        continue
                    names = tuple(str(index) if classes is None else classes[index] for index in indices)
                    yield Prediction(path=path, classes=names, probabilities=tuple(values))
                line.show(done, {}, done / (time.perf_counter() - start))

    return predictions()


def _rows(predictions: Iterable[Prediction], format: Literal["csv", "json"]) -> Iterator[str]:
    """The text of a file, piece by piece."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    number = 0
    for number, each in enumerate(predictions, 1):
        path = os.fsencode(each.path).decode(errors="backslashreplace")
        best = [(name, round(value, 6)) for name, value in zip(each.classes, each.probabilities, strict=True)]
        if format == "json":
            found: list[dict[str, Any]] = [{"class": name, "probability": value} for name, value in best]
            yield ("[\n" if number == 1 else ",\n") + json.dumps({"path": path, **found[0], "top": found})
            continue
        if number == 1:
            more = [f"{name}_{place}" for place in range(2, len(best) + 1) for name in ("class", "probability")]
            table.writerow(["path", "class", "probability", *more])
        table.writerow([path, *(value for pair in best for value in pair)])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    if format == "json":
        yield "\n]\n" if number else "[]\n"


def write_predictions(
    predictions: Iterable[Prediction], out: str | Path | None = None, *, format: Literal["csv", "json"] = "csv"
) -> int:
    """Write predictions as CSV or JSON, one row per image, and log a warning for each image with an error.

    A row has the path, the best class and its probability. In CSV, these of the next classes follow in the columns
    ``class_2``, ``probability_2``, ...; in JSON, ``top`` lists all classes of the prediction.

    Args:
        predictions: the result of :func:`predict`.
        out: the file, which is written atomically; None writes each row to stdout as soon as it is known.
        format: ``csv`` or ``json``.

    Returns:
        The number of images with an error, which have no row.

    Raises:
        dfkd_fast.files.WriteError: the file could not be written; its previous content is kept.
    """
    errors = 0

    def good() -> Iterator[Prediction]:
        nonlocal errors
        for each in predictions:
            if each.error is None:
                yield each
            else:
                errors += 1
                log.warning("%s", each.error)

    with ExitStack() as stack:
        stdout = sys.stdout  # a progress bar redirects it
        file = stack.enter_context(atomic_write(out)) if out is not None else None
        for text in _rows(good(), format):
            if file is None:
                stdout.write(text)
                stdout.flush()
            else:
                file.write(text.encode())
    return errors
