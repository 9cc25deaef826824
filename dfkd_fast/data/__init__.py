"""Labelled images: for teacher training and evaluation, never for distillation.

A data set is a class in a module of this folder, registered under its name: :class:`dfkd_fast.data.registry.ImageSet`.
"""

from __future__ import annotations

from dfkd_fast.config import DataConfig
from dfkd_fast.data import digits, published  # noqa: F401 - they register their sets
from dfkd_fast.data.image_data import ImageArray, ImageData
from dfkd_fast.data.loading import loader
from dfkd_fast.data.registry import DATASETS, DatasetNotFound, ImageSet, Layout, register
from dfkd_fast.data.synthetic import rendered  # noqa: F401

__all__ = [
    "DATASETS",
    "DatasetNotFound",
    "ImageArray",
    "ImageData",
    "ImageSet",
    "Layout",
    "load",
    "loader",
    "num_classes",
    "register",
]


def _registered(config: DataConfig) -> type[ImageSet]:
    if config.name not in DATASETS:
        raise ValueError(f"DataConfig.name must be one of {sorted(DATASETS)}, got {config.name!r}")
    return DATASETS[config.name]


def load(config: DataConfig) -> ImageData:
    """Read, draw or open the set that a config names.

    Args:
        config: the set, where it lies, and the size of its images.

    Returns:
        Training and held-out images; items are a float32 tensor (3, H, W), normalised, and an int.

    Raises:
        DatasetNotFound: a published tree, or a part of it, is not under ``config.root``.
        ValueError: an unknown name, or a field that the set cannot take.
    """
    return _registered(config).load(config)


def num_classes(config: DataConfig) -> int | None:
    """The number of classes of the set that a config names, without reading it; None where only its files tell.

    Raises:
        ValueError: an unknown name.
    """
    return _registered(config).num_classes(config)
