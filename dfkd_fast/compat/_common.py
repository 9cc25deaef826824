"""What several drop-ins share: which calls an op takes, and the losses that the projects write alike.

A call that no op takes is left to plain PyTorch, whose errors are those of the originals.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast import ops

__all__ = [
    "activation_map",
    "alike",
    "covered",
    "differences",
    "distance",
    "floating",
    "input_distance",
    "input_statistics",
    "kl_div",
    "positive",
    "softened_kl",
    "stage_distance",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(x: Any, ndim: int) -> bool:
    """A tensor of a dtype that the ops take, with so many dimensions, none but the first empty."""
    return isinstance(x, Tensor) and x.dtype in _DTYPES and x.ndim == ndim and 0 not in x.shape[1:]


def alike(a: Tensor, b: Tensor) -> bool:
    """Of one shape, on one device."""
    return a.shape == b.shape and a.device == b.device


def positive(value: Any) -> bool:
    """A finite Python number above zero."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def covered(student: Any, teacher: Any, temperature: Any, reduction: Any = "batchmean") -> bool:
    """Whether :func:`dfkd_fast.ops.distillation_kl` computes it: logits (N, classes) of one shape, T above zero."""
    return (
        floating(student, 2)
        and floating(teacher, 2)
        and alike(student, teacher)
        and positive(temperature)
        and reduction in ("batchmean", "sum", "mean", "none")
    )


def softened_kl(student: Tensor, teacher: Tensor, temperature: Any, reduction: Any, *, squared: bool = True) -> Tensor:
    """KL(teacher || student) of softened class probabilities along dimension 1.

    Args:
        student: (N, classes, ...) logits.
        teacher: likewise.
        temperature: of both softmaxes.
        reduction: as that of ``torch.nn.functional.kl_div``.
        squared: times temperature squared.
    """
    if covered(student, teacher, temperature, reduction):
        return ops.distillation_kl(student, teacher, temperature=temperature, reduction=reduction, squared=squared)
    log_q = F.log_softmax(student / temperature, dim=1)
    loss = kl_div(log_q, F.softmax(teacher / temperature, dim=1), reduction)
    return loss * temperature**2 if squared else loss


def kl_div(log_q: Tensor, p: Tensor, reduction: Any) -> Tensor:
    """That of PyTorch, which warns of its "mean"; here it is what a caller of the originals has asked for."""
    if reduction == "mean":
        return F.kl_div(log_q, p, reduction="none").mean()
    return F.kl_div(log_q, p, reduction=reduction)


def input_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,), of maps (N, C, H, W); other shapes raise what they raise in PyTorch."""
    if floating(x, 4):
        return ops.channel_statistics(x)
    return x.mean([0, 2, 3]), x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False)


def _stored(value: Any, x: Tensor) -> bool:
    """One number a channel of x, on its device."""
    return floating(value, 1) and value.shape[0] == x.shape[1] and value.device == x.device


def input_distance(x: Tensor, running_mean: Any, running_var: Any, *, moved: bool = False) -> Tensor:
    """Distance of the statistics of maps (N, C, H, W) to the stored ones, (C,) (Yin et al., CVPR 2020, Eq. 4).

    Shapes that the op does not take raise what they raise in PyTorch.

    Args:
        x: the maps.
        running_mean: the stored means, detached here.
        running_var: likewise.
        moved: whether the stored are first taken to the type and device of the maps' own.
    """
    if floating(x, 4) and _stored(running_mean, x) and _stored(running_var, x):
        return ops.statistics_distance(x, running_mean, running_var)
    mean, var = input_statistics(x)
    running_mean, running_var = running_mean.detach(), running_var.detach()
    if moved:
        running_mean, running_var = running_mean.to(mean), running_var.to(var)
    return distance(running_mean, running_var, mean, var)


def distance(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Euclidean distance of the variances plus that of the means."""
    return torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)


def activation_map(features: Tensor, power: Any) -> Tensor:
    """(N, C, H, W) to unit rows (N, H W): the mean over channels of the features to a power.

    Zagoruyko and Komodakis, ICLR 2017. No op computes it.
    """
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


def differences(images: Tensor) -> tuple[Tensor, ...]:
    """Total variation of images (N, C, H, W): the differences right, down and along both diagonals. No op has it."""
    return (
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, :] - images[:, :, :-1, :],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
    )
