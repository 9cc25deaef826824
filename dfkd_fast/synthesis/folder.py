"""Folders of images, and saved pools."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dfkd_fast.config import expand
from dfkd_fast.data.image_data import read_image
from dfkd_fast.files import write_file
from dfkd_fast.models.weights import read_tensors, write_tensors
from dfkd_fast.synthesis.base import SYNTHESIZERS, Setting
from dfkd_fast.synthesis.pool import PoolSynthesizer, Source

__all__ = ["POOL_FILE", "Folder", "read_pool", "write_pool"]

POOL_FILE = "pool.safetensors"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def write_pool(folder: str | Path, images: Tensor, labels: Tensor, *, png: bool = False) -> Path:
    """Write images to a folder: as ``pool.safetensors``, or as PNG files in one folder per class.

    Args:
        folder: the folder, which is created.
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        png: write PNG files.

    Raises:
        dfkd_fast.files.WriteError: a file could not be written.
    """
    root, images, labels = expand(folder), images.cpu(), labels.cpu()
    if not png:
        write_tensors(root / POOL_FILE, {"images": images, "labels": labels})
        return root
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        content = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, format="PNG")
        write_file(root / f"{label:04d}" / f"{index:06d}.png", content.getvalue())
    return root


def read_pool(folder: str | Path, image_size: int, most: int) -> Tensor:
    """Read the images of a folder, (N, 3, image_size, image_size) uint8.

    The folder contains ``pool.safetensors``, or image files in any subfolders, which are resized and cropped.

    Args:
        folder: the folder.
        image_size: height and width, in pixels.
        most: maximum number of images; with more, it is an error.

    Raises:
        OSError: the file cannot be read.
        ValueError: there are no images or more than ``most``, those of the file have another size, or an image cannot
            be read. The message names the folder or file.
    """
    root = expand(folder)
    if (root / POOL_FILE).is_file():
        images = read_tensors(root / POOL_FILE).get("images", torch.zeros(0))
        expected = (3, image_size, image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"{root / POOL_FILE} must have uint8 images (N, {', '.join(map(str, expected))}), got "
                f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
    else:
        names = [Path(path) / name for path, _, files in os.walk(root) for name in files if name[:1] != "."]
        paths = sorted(path for path in names if path.suffix.lower() in _SUFFIXES)
        if len(paths) > most:
            raise ValueError(f"{root} has {len(paths)} images, more than SynthesisConfig.pool_size, {most}")
        images = torch.zeros(len(paths), 3, image_size, image_size, dtype=torch.uint8)
        for image, path in zip(images, paths, strict=True):
            image.copy_(_square(path, image_size))
    if not 0 < len(images) <= most:
        raise ValueError(f"{root} must have between 1 and {most} images (SynthesisConfig.pool_size), got {len(images)}")
    return images


def _square(path: Path, size: int) -> Tensor:
    """The center of an image, resized so that its shorter side has the size."""
    image = read_image(path)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class _Nothing(Source):
    """A module without images, because no generator step runs."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.unused = nn.Parameter(torch.zeros((), device=setting.device))

    def forward(self) -> Tensor:
        return self.images + self.unused


@SYNTHESIZERS.register("folder")
class Folder(PoolSynthesizer):
    """A folder of images, for example of a diffusion model. ``loop.generator_steps`` must be 0.

    Raises:
        ValueError: see :func:`read_pool`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of the folder.

        Args:
            folder: the folder; see :func:`read_pool`.
        """

        folder: str

    generator = None
    uses_generator = False
    makes_images = False

    def __init__(self, setting: Setting, options: Any) -> None:
        images = read_pool(options.folder, setting.image_size, setting.config.pool_size)
        size = max(len(images), setting.batch_size)  # of the pool, which has no other images
        super().__init__(replace(setting, config=replace(setting.config, pool_size=size)), options)
        self.module = _Nothing(setting)
        self.pool.images[: len(images)] = images
        self.pool.count.fill_(len(images))
        self.digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()

    def draw(self, count: int) -> tuple[Tensor, ...]:
        return ()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state: Any) -> None:
        if state["digest"] != self.digest:
            raise ValueError(f"the images in {self.options.folder} are not those that the run started with")
