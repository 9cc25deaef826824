"""The image transforms of the paper's code, scaled to any image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torchvision.transforms import v2

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "evaluation_transform", "training_transform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _resized(image_size: int) -> int:
    """Length of the shorter side before the crop: 256 for an image size of 224, and in proportion for others."""
    return round(image_size * 256 / 224)


def _normalized(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def training_transform(image_size: int, *, crop: Literal["random_resized", "random"] = "random_resized") -> v2.Compose:
    """Resize the shorter side to 256/224 of ``image_size``, crop and flip at random.

    Args:
        image_size: height and width of the result in pixels.
        crop: "random_resized" crops a random area and aspect ratio; "random" crops without rescaling (Aircraft).

    Returns:
        A transform from an RGB PIL image to a float32 tensor (3, H, W), normalized by ImageNet's mean and std.
    """
    cropped = {"random_resized": v2.RandomResizedCrop, "random": v2.RandomCrop}[crop](image_size)
    normalized = _normalized(IMAGENET_MEAN, IMAGENET_STD)
    return v2.Compose([v2.Resize(_resized(image_size)), cropped, v2.RandomHorizontalFlip(), *normalized])


def evaluation_transform(
    image_size: int, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> v2.Compose:
    """Resize and normalize like :func:`training_transform`, but crop the center and do not flip."""
    return v2.Compose([v2.Resize(_resized(image_size)), v2.CenterCrop(image_size), *_normalized(mean, std)])
