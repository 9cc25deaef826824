"""Distance of activation maps (Zagoruyko and Komodakis, ICLR 2017) in its published variants. No op has it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["activation_map", "stage_distance"]


def activation_map(features: Tensor, power: Any) -> Tensor:
    """(N, C, H, W) to unit rows (N, H W): the mean over channels of the features to a power."""
    return F.normalize(features.pow(power).mean(1).flatten(1))


def stage_distance(student: Tensor, teacher: Tensor, power: Any) -> Tensor:
    """Mean squared difference of two maps, the larger one pooled to the height of the smaller, squared."""
    heights = student.shape[2], teacher.shape[2]
    size = (min(heights),) * 2
    if heights[0] > heights[1]:
        student = F.adaptive_avg_pool2d(student, size)
    elif heights[0] < heights[1]:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return (activation_map(student, power) - activation_map(teacher, power)).square().mean()
