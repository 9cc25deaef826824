"""The drawn set: subcategories of one bird (see :mod:`dfkd_fast.data.birds`), kept on disk once drawn."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_fast.config import DataConfig
from dfkd_fast.data import birds
from dfkd_fast.data.image_data import HALF, ImageArray, ImageData

__all__ = ["LARGEST_SIZE", "MOST_CLASSES", "SMALLEST_SIZE", "load_rendered"]

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


def load_rendered(config: DataConfig) -> ImageData:
    """Birds of ``config.classes`` subcategories, drawn at ``config.image_size`` or read from the cache.

    The first call for a set draws it, about one millisecond an image, in ``config.workers`` processes when it is large.
    Training images move by up to a sixteenth of their size; every other variation is in the drawing.

    Args:
        config: ``root`` is the cache folder; None is ``dfkd_fast`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        The set, pixels normalised to [-1, 1]; labels follow one another in both splits.

    Raises:
        ValueError: more than 200 classes, a size outside 32..224, or a negative seed.
    """
    if config.classes > MOST_CLASSES:
        raise ValueError(f"DataConfig.classes must be at most {MOST_CLASSES} for 'rendered', got {config.classes}")
    if not SMALLEST_SIZE <= config.image_size <= LARGEST_SIZE:
        raise ValueError(
            f"DataConfig.image_size must be in {SMALLEST_SIZE}..{LARGEST_SIZE} for 'rendered', got {config.image_size}"
        )
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
    """The images of a split as a copy-on-write memory map: drawn first where no sound file holds them."""
    pixels, note = folder / f"{recipe.stem}.npy", folder / f"{recipe.stem}.json"
    if pixels.exists():
        problem = _problem(recipe, pixels, note)
        if problem is None:
            return np.load(pixels, mmap_mode="c")
        warnings.warn(f"{pixels} is {problem}; drawing it again", stacklevel=5)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".drawing-", dir=folder) as scratch:
        # The note goes first: pixels without their note, or beside an older one, count as broken, never as sound.
        unfinished = Path(scratch) / pixels.name
        _draw_all(recipe, unfinished, workers)
        written = Path(scratch) / note.name
        written.write_text(json.dumps(asdict(recipe) | {"crc32": _checksum(unfinished)}, indent=1) + "\n")
        os.replace(written, note)
        os.replace(unfinished, pixels)
    return np.load(pixels, mmap_mode="c")


def _problem(recipe: _Recipe, pixels: Path, note: Path) -> str | None:
    """What is wrong with a cached file, or None."""
    try:
        expected = json.loads(note.read_text())
    except FileNotFoundError:
        return f"without its {note.name}"
    except ValueError:
        return f"beside an unreadable {note.name}"
    if not isinstance(expected, dict) or {**expected, "crc32": None} != asdict(recipe) | {"crc32": None}:
        return f"beside a {note.name} of another set"
    if _checksum(pixels) != expected.get("crc32"):
        return "damaged (its checksum differs)"
    return None


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


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
