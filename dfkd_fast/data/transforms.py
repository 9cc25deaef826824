"""The paper's image transforms (its authors' loader), scaled to other sizes than 224."""

from __future__ import annotations

from typing import Literal

import torch
from torchvision.transforms import v2

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "evaluation_transform", "training_transform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _resized(image_size: int) -> int:
    """Length of the shorter side before the crop: 256 for 224, and in that proportion."""
    return round(image_size * 256 / 224)


def _normalized() -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def training_transform(image_size: int, *, crop: Literal["random_resized", "random"] = "random_resized") -> v2.Compose:
    """Resize the shorter side to 256/224 of the size, crop at random, mirror every other image.

    Args:
        image_size: height and width of the result.
        crop: of a random area and aspect, or of the very size (Aircraft, whose subjects fill the frame).

    Returns:
        From an RGB PIL image to a float32 tensor (3, H, W), normalised by ImageNet's mean and standard deviation.
    """
    cropped = {"random_resized": v2.RandomResizedCrop, "random": v2.RandomCrop}[crop](image_size)
    return v2.Compose([v2.Resize(_resized(image_size)), cropped, v2.RandomHorizontalFlip(), *_normalized()])


def evaluation_transform(image_size: int) -> v2.Compose:
    """Resize the shorter side to 256/224 of the size and crop the centre; as :func:`training_transform` otherwise."""
    return v2.Compose([v2.Resize(_resized(image_size)), v2.CenterCrop(image_size), *_normalized()])
