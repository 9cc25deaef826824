"""Labeled images for teacher training and evaluation. Distillation does not use them.

A data set is a registered subclass of :class:`dfkd_fast.data.registry.ImageSet`.
"""

from __future__ import annotations

from dfkd_fast.config import DataConfig
from dfkd_fast.data import digits, published  # noqa: F401 - registers data sets
from dfkd_fast.data.image_data import ImageArray, ImageData, find_images
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
    "find_images",
    "load",
    "loader",
    "needs_root",
    "num_classes",
    "register",
]


def _registered(config: DataConfig) -> type[ImageSet]:
    return DATASETS.find(config.name)


def load(config: DataConfig) -> ImageData:
    """Load a data set.

    Args:
        config: name, root folder and image size of the data set.

    Returns:
        Training and test images; an item is a normalized float32 tensor (3, H, W) and an int.

    Raises:
        DatasetNotFound: files are missing under ``config.root``.
        ValueError: unknown name, or a field that the data set does not support.
    """
    return _registered(config).load(config)


def num_classes(config: DataConfig) -> int | None:
    """The number of classes of a data set, without reading files; None if it depends on the files.

    Raises:
        ValueError: unknown name.
    """
    return _registered(config).num_classes(config)


def needs_root(config: DataConfig) -> bool:
    """Whether the data set reads files under ``config.root``.

    Raises:
        ValueError: unknown name.
    """
    return hasattr(_registered(config), "layout")
