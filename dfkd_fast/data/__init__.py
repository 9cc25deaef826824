"""Labelled images: for teacher training and evaluation, never for distillation."""

from __future__ import annotations

from collections.abc import Callable

from dfkd_fast.config import DataConfig
from dfkd_fast.data.digits import load_digits
from dfkd_fast.data.image_data import ImageArray, ImageData
from dfkd_fast.data.layout import DatasetNotFound
from dfkd_fast.data.loading import loader
from dfkd_fast.data.published import load_aircraft, load_cars196, load_cub200, load_folder
from dfkd_fast.data.rendered import load_rendered

__all__ = ["DatasetNotFound", "ImageArray", "ImageData", "load", "loader"]

_LOADERS: dict[str, Callable[[DataConfig], ImageData]] = {
    "digits": load_digits,
    "rendered": load_rendered,
    "aircraft": load_aircraft,
    "cars196": load_cars196,
    "cub200": load_cub200,
    "folder": load_folder,
}


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
    if config.name not in _LOADERS:
        raise ValueError(f"DataConfig.name must be one of {sorted(_LOADERS)}, got {config.name!r}")
    return _LOADERS[config.name](config)
