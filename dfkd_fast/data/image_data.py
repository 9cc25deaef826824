"""The common form of all data sets, and datasets of images in memory and in files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS as IMAGE_SUFFIXES

from dfkd_fast.config import require_file

__all__ = ["HALF", "IMAGE_SUFFIXES", "ImageArray", "ImageData", "ImageFiles", "find_images", "is_hidden", "read_image"]

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation that map [0, 1] to [-1, 1], the generator's range."""


_MOST_ASPECT = 1000


@dataclass(frozen=True)
class ImageData:
    """Labeled images in two disjoint splits.

    Args:
        train: items ``(image, label)``: a float32 tensor (3, H, W), normalized by ``mean`` and ``std``, and an int.
        test: test images, without random transforms.
        classes: class names in the order of the labels.
        mean: one value per channel, for pixels in [0, 1].
        std: one value per channel, for pixels in [0, 1].
        image_size: height and width in pixels.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


class ImageArray(Dataset[tuple[Tensor, int]]):
    """Images in memory that are normalized when they are fetched. A ``DataLoader`` fetches whole batches.

    Args:
        images: uint8, (N, 3, S, S); may be a memory map or expanded from one channel.
        labels: int64, (N,).
        mean: one value per channel, for pixels in [0, 1].
        std: one value per channel, for pixels in [0, 1].
        shift: maximum random shift in pixels in each direction, drawn from PyTorch's global generator at each fetch.
            The border is replicated. 0 turns augmentation off.

    Raises:
        TypeError: images are not uint8.
        ValueError: wrong shape, or shift is not in 0..S - 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        shift: int = 0,
    ) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images must have shape (N, 3, S, S), got {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must have shape ({images.shape[0]},), got {tuple(labels.shape)}")
        if not 0 <= shift < images.shape[2]:
            raise ValueError(f"shift must be in 0..{images.shape[2] - 1}, got {shift}")
        self.images = images
        self.labels = labels
        self.shift = shift
        deviation = torch.tensor(list(std), dtype=torch.float32).view(3, 1, 1)
        self._scale = 1 / (255 * deviation)
        self._offset = -torch.tensor(list(mean), dtype=torch.float32).view(3, 1, 1) / deviation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """The items of a batch; ``DataLoader`` calls this instead of ``__getitem__``."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[chosen]
        if self.shift:
            images = _shift(images, self.shift)
        pixels = images.to(torch.float32).mul_(self._scale).add_(self._offset)
        return list(zip(pixels.unbind(), self.labels[chosen].tolist(), strict=True))


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB. 16-bit gray values are scaled to 8 bits.

    Raises:
        ValueError: the file is missing, truncated, not an image, too large, or has 32-bit pixels. The message names the
            file.
    """
    try:
        with Image.open(require_file(path)) as image:
            most, (short, long) = Image.MAX_IMAGE_PIXELS, sorted(image.size)
            if most is not None and (short * long > most or long > _MOST_ASPECT * short):
                # A damaged header or a decompression bomb: decoding or resizing it could need gigabytes.
                raise ValueError(f"it has {image.width} x {image.height} pixels, which is too large or too narrow")
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                # PIL would clip all values above 255 to white.
                return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bits, and their range is unknown; convert it to 8 bits")
            return image.convert("RGB")
    except Exception as error:  # a damaged file may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = "" if isinstance(error, OSError) and error.errno else "; replace the file, or remove it from the data"
        raise ValueError(f"cannot read the image {path}: {reason}{remedy}") from error


def is_hidden(name: str) -> bool:
    """Whether systems and tools hide a folder or file of this name in a tree of images."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")


def _raise(error: OSError) -> None:
    raise error


def find_images(folder: str | Path) -> list[str]:
    """The paths of the files with image suffixes in a folder and its subfolders, sorted, without hidden ones.

    Raises:
        OSError: a folder cannot be read.
    """
    paths: list[str] = []
    for parent, folders, files in sorted(os.walk(folder, onerror=_raise, followlinks=True)):
        if any(map(is_hidden, Path(parent).relative_to(folder).parts)):
            continue
        # A folder with the name of an image is reported when it is read.
        images = [name for name in sorted(files + folders) if name.lower().endswith(IMAGE_SUFFIXES)]
        paths += [os.path.join(parent, name) for name in images if not is_hidden(name)]
    return paths


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images in files.

    Args:
        samples: the path and the label of each image.
        transform: maps an RGB PIL image to a float32 tensor (3, H, W).
    """

    def __init__(self, samples: Sequence[tuple[str | Path, int]], transform: Callable[[Any], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def _shift(images: Tensor, most: int) -> Tensor:
    """Shifts each image by a random number of pixels, up to ``most`` in each direction."""
    size = images.shape[-1]
    dy, dx = torch.randint(-most, most + 1, (2, len(images))).tolist()
    moved = torch.empty_like(images)
    for target, source, y, x in zip(moved, images, dy, dx, strict=True):
        top, left = max(y, 0), max(x, 0)
        bottom, right = size + min(y, 0), size + min(x, 0)
        target[:, top:bottom, left:right] = source[:, top - y : bottom - y, left - x : right - x]
        target[:, :top] = target[:, top : top + 1]
        target[:, bottom:] = target[:, bottom - 1 : bottom]
        target[:, :, :left] = target[:, :, left : left + 1]
        target[:, :, right:] = target[:, :, right - 1 : right]
    return moved
