"""Functions that the drop-ins share: checks whether an op supports a call, and losses that several projects have.

Calls that no op supports run in plain PyTorch and raise the errors of the originals.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast import ops

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(x: Any, ndim: int) -> bool:
    """Whether x is a tensor of a supported dtype with ``ndim`` dimensions, of which only the first may be empty."""
    return isinstance(x, Tensor) and x.dtype in _DTYPES and x.ndim == ndim and 0 not in x.shape[1:]


def matching(a: Any, b: Any) -> bool:
    """Whether an op supports a and b as two tensors (N, D) with the same shape and device."""
    return floating(a, 2) and floating(b, 2) and a.shape == b.shape and a.device == b.device


def positive(value: Any) -> bool:
    """Whether value is a finite, positive Python number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def covered(student: Any, teacher: Any, temperature: Any, reduction: Any = "batchmean") -> bool:
    """Whether :func:`dfkd_fast.ops.distillation_kl` supports the logits, temperature and reduction."""
    options = positive(temperature) and reduction in ("batchmean", "sum", "mean", "none")
    return options and matching(student, teacher)


def softened_kl(student: Tensor, teacher: Tensor, temperature: Any, reduction: Any, *, squared: bool = True) -> Tensor:
    """Compute KL(teacher || student) of softened class probabilities along dimension 1 (Hinton et al., 2015).

    Args:
        student: logits (N, classes, ...), any floating dtype.
        teacher: logits with the same shape.
        temperature: temperature of both softmaxes.
        reduction: as in ``torch.nn.functional.kl_div``.
        squared: multiply by temperature squared.
    """
    if covered(student, teacher, temperature, reduction):
        return ops.distillation_kl(student, teacher, temperature=temperature, reduction=reduction, squared=squared)
    log_q = F.log_softmax(student / temperature, dim=1)
    loss = kl_div(log_q, F.softmax(teacher / temperature, dim=1), reduction)
    return loss * temperature**2 if squared else loss


def kl_div(log_q: Tensor, p: Tensor, reduction: Any) -> Tensor:
    """``F.kl_div`` without PyTorch's warning about reduction "mean"."""
    if reduction == "mean":
        return F.kl_div(log_q, p, reduction="none").mean()
    return F.kl_div(log_q, p, reduction=reduction)


def input_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, (C,), of maps (N, C, H, W); other shapes raise PyTorch's errors."""
    if floating(x, 4):
        return ops.channel_statistics(x)
    return x.mean([0, 2, 3]), x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False)


def _per_channel(value: Any, x: Tensor) -> bool:
    """Whether value is a tensor with one element per channel of x, on the device of x."""
    return floating(value, 1) and value.shape[0] == x.shape[1] and value.device == x.device


def input_distance(x: Tensor, running_mean: Any, running_var: Any, *, moved: bool = False) -> Tensor:
    """Compute the distance of batch statistics to running statistics (Yin et al., CVPR 2020, Eq. 4).

    Shapes that the op does not support raise PyTorch's errors.

    Args:
        x: maps (N, C, H, W), any floating dtype.
        running_mean: (C,); detached.
        running_var: (C,); detached.
        moved: whether to cast the running statistics to the dtype and device of the batch statistics.
    """
    if floating(x, 4) and _per_channel(running_mean, x) and _per_channel(running_var, x):
        return ops.statistics_distance(x, running_mean, running_var)
    mean, var = input_statistics(x)
    running_mean, running_var = running_mean.detach(), running_var.detach()
    if moved:
        running_mean, running_var = running_mean.to(mean), running_var.to(var)
    return distance(running_mean, running_var, mean, var)


def distance(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return the Euclidean distance of the variances plus that of the means."""
    return torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)


def activation_map(features: Tensor, power: Any) -> Tensor:
    """Return the mean over channels of features (N, C, H, W) raised to a power, as unit rows (N, H W)."""
    return F.normalize(features.pow(power).mean(1).flatten(1))


def stage_distance(student: Tensor, teacher: Tensor, power: Any) -> Tensor:
    """Return the mean squared difference of attention maps; the higher is pooled to (h, h), h the smaller height."""
    heights = student.shape[2], teacher.shape[2]
    size = (min(heights),) * 2
    if heights[0] > heights[1]:
        student = F.adaptive_avg_pool2d(student, size)
    elif heights[0] < heights[1]:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    return (activation_map(student, power) - activation_map(teacher, power)).square().mean()


def differences(images: Tensor) -> tuple[Tensor, ...]:
    """Return differences of neighboring pixels in images (N, C, H, W): right, down and along both diagonals."""
    return (
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, :] - images[:, :, :-1, :],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
    )
