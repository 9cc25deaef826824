"""The data set of :mod:`dfkd_fast.data.synthetic.birds`, drawn on first use and cached on disk."""

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

from dfkd_fast.config import DataConfig, expand
from dfkd_fast.data.image_data import HALF, ImageArray, ImageData
from dfkd_fast.data.registry import ImageSet, register
from dfkd_fast.data.synthetic import birds

__all__ = ["LARGEST_SIZE", "MOST_CLASSES", "SMALLEST_SIZE", "Rendered"]

MOST_CLASSES = 200
SMALLEST_SIZE, LARGEST_SIZE = 32, 224

_MIN_FOR_PROCESSES = 4000
"""For fewer images, the start of processes takes longer than it saves (about three seconds at 32 pixels)."""
_CHUNK = 500
_CHECKSUM = 16  # bytes


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Everything that determines the images of one split, which are sorted by label."""

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
    """Birds of ``config.classes`` subcategories at ``config.image_size``, with pixels in [-1, 1].

    The first call draws the images (about one millisecond each, in ``config.workers`` processes if there are many);
    later calls read the cache in ``config.root``, by default ``dfkd_fast`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.
    Augmentation shifts training images by up to a sixteenth of their size. Images are sorted by label.
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
        folder = _cache_folder() if config.root is None else expand(config.root)

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
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dfkd_fast"


def _cached(recipe: _Recipe, folder: Path, workers: int) -> NDArray[np.uint8]:
    """The images of a split as a copy-on-write memory map; a missing or damaged file is drawn first.

    The file's name is a hash of the recipe, and its last bytes are a checksum. Only complete files are moved into the
    cache.
    """
    path = folder / f"{recipe.stem}.npy"
    if path.is_file():
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        if content[-_CHECKSUM:].tobytes() == _checksum(content[:-_CHECKSUM].data, path):
            try:
                images = np.load(path, mmap_mode="c")
                if (images.shape, images.dtype) == (recipe.shape, np.uint8):
                    return images
            except OSError:
                raise
            except Exception:  # another content with the right checksum may fail in any way
                pass
        warnings.warn(f"{path} is damaged or of an earlier version; drawing it again", stacklevel=4)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".drawing-", dir=folder) as scratch:
            _draw_all(recipe, Path(scratch) / path.name, workers)
            with (Path(scratch) / path.name).open("r+b") as file:
                checksum = _checksum(file.read(), path)
                file.write(checksum)
            os.replace(Path(scratch) / path.name, path)
    except OSError as error:
        where = path if path.is_dir() else folder
        reason = f"{error.strerror or error}; set DataConfig.root to another folder"
        raise OSError(f"cannot draw images into {where}: {reason}") from error
    return np.load(path, mmap_mode="c")


def _checksum(content: bytes | memoryview, path: Path) -> bytes:
    """Also depends on the file's name, so that a renamed file does not replace another one."""
    return hashlib.blake2b(content, digest_size=_CHECKSUM, key=path.stem.encode()).digest()


def _draw_all(recipe: _Recipe, path: Path, workers: int) -> None:
    """Draws a split into a file that all processes map."""
    total = recipe.shape[0]
    np.save(path, np.zeros(recipe.shape, np.uint8))  # fails on a full disk, where a sparse memory map would crash
    starts = range(0, total, _CHUNK)
    if workers < 2 or total < _MIN_FOR_PROCESSES:
        for start in starts:
            _draw_chunk(recipe, path, start)
        return
    # DataLoader forks too. Other start methods import the caller's main module again.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for drawn in [pool.submit(_draw_chunk, recipe, path, start) for start in starts]:
            drawn.result()


def _draw_chunk(recipe: _Recipe, path: Path, start: int) -> None:
    """Draws one chunk of images."""
    images = np.lib.format.open_memmap(path, mode="r+")
    words = birds.class_words()
    for position in range(start, min(start + _CHUNK, len(images))):
        label, index = divmod(position, recipe.per_class)
        values = birds.nuisances(recipe.seed, recipe.split, label, index)
        images[position] = birds.draw(words[label], values, recipe.size)
    images.flush()
