"""The drawn set: subcategories of one bird (see :mod:`dfkd_fast.data.synthetic.birds`), kept on disk once drawn."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_fast.config import DataConfig
from dfkd_fast.data.image_data import HALF, ImageArray, ImageData
from dfkd_fast.data.registry import ImageSet, register
from dfkd_fast.data.synthetic import birds

__all__ = ["LARGEST_SIZE", "MOST_CLASSES", "SMALLEST_SIZE", "Rendered"]

MOST_CLASSES = 200
SMALLEST_SIZE, LARGEST_SIZE = 32, 224

_WORTH_PROCESSES = 4000
"""Images from which on starting processes pays: about three seconds of drawing at 32 pixels."""
_CHUNK = 500


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """All that decides the pixels of one split; label-major order."""

    split: birds.Split
    seed: int
    size: int
    classes: int
    per_class: int
    version: int = birds.DRAWING_VERSION

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.classes * self.per_class, 3, self.size, self.size

    @property
    def stem(self) -> str:
        key = hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"rendered-{self.split}-{key}"


@register("rendered")
class Rendered(ImageSet):
    """Birds of ``config.classes`` subcategories, drawn at ``config.image_size`` or read from the cache.

    The first call for a set draws it, about one millisecond per image, in ``config.workers`` processes when it is
    large. ``config.root`` is the cache folder; None is ``dfkd_fast`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.
    Training images move by up to a sixteenth of their size; every other variation is in the drawing. Pixels are
    normalised to [-1, 1]; labels follow one another in both splits.
    """

    @classmethod
    def num_classes(cls, config: DataConfig) -> int:
        return config.classes

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        if config.classes > MOST_CLASSES:
            raise ValueError(f"DataConfig.classes must be at most {MOST_CLASSES} for 'rendered', got {config.classes}")
        if not SMALLEST_SIZE <= config.image_size <= LARGEST_SIZE:
            sizes = f"{SMALLEST_SIZE}..{LARGEST_SIZE}"
            raise ValueError(f"DataConfig.image_size must be in {sizes} for 'rendered', got {config.image_size}")
        if config.seed < 0:
            raise ValueError(f"DataConfig.seed must not be negative for 'rendered', got {config.seed}")
        folder = Path(config.root) if config.root is not None else _cache_folder()

        def split(name: birds.Split, per_class: int, shift: int) -> ImageArray:
            recipe = _Recipe(
                split=name, seed=config.seed, size=config.image_size, classes=config.classes, per_class=per_class
            )
            images = torch.from_numpy(_cached(recipe, folder, config.workers))
            labels = torch.arange(config.classes).repeat_interleave(per_class)
            return ImageArray(images, labels, shift=shift)

        return ImageData(
            train=split("train", config.train_per_class, config.image_size // 16 if config.augment else 0),
            test=split("test", config.test_per_class, 0),
            classes=tuple(birds.class_name(word) for word in birds.class_words()[: config.classes]),
            mean=HALF,
            std=HALF,
            image_size=config.image_size,
        )


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dfkd_fast"


def _cached(recipe: _Recipe, folder: Path, workers: int) -> NDArray[np.uint8]:
    """The images of a split as a copy-on-write memory map; drawn first if there is no such file, or a broken one.

    A file is moved into place when it is complete, and its name is a hash of the recipe.
    """
    path = folder / f"{recipe.stem}.npy"
    if path.exists():
        try:
            images = np.load(path, mmap_mode="c")
            if (images.shape, images.dtype) == (recipe.shape, np.uint8):
                return images
        except (ValueError, EOFError):
            pass
        warnings.warn(f"{path} is damaged; drawing it again", stacklevel=4)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".drawing-", dir=folder) as scratch:
        _draw_all(recipe, Path(scratch) / path.name, workers)
        os.replace(Path(scratch) / path.name, path)
    return np.load(path, mmap_mode="c")


def _draw_all(recipe: _Recipe, path: Path, workers: int) -> None:
    """Draw a split straight into a file, so that processes need not hand images to one another."""
    total = recipe.shape[0]
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=recipe.shape).flush()
    starts = range(0, total, _CHUNK)
    if workers < 2 or total < _WORTH_PROCESSES:
        for start in starts:
            _draw_some(recipe, path, start)
        return
    # fork, as a DataLoader's own workers: the other ways import the caller's main module once more.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for drawn in [pool.submit(_draw_some, recipe, path, start) for start in starts]:
            drawn.result()


def _draw_some(recipe: _Recipe, path: Path, start: int) -> None:
    """Draw the images from ``start`` to the end of its chunk."""
    images = np.lib.format.open_memmap(path, mode="r+")
    words = birds.class_words()
    for position in range(start, min(start + _CHUNK, len(images))):
        label, index = divmod(position, recipe.per_class)
        values = birds.nuisances(recipe.seed, recipe.split, label, index)
        images[position] = birds.draw(words[label], values, recipe.size)
    images.flush()
