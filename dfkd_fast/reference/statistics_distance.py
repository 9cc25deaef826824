"""Distance to running statistics in plain PyTorch. Formulas: :func:`dfkd_fast.ops.statistics_distance`."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast.reference.batchnorm_statistics import channel_statistics

__all__ = ["statistics_distance"]


def statistics_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Return the Euclidean distance of the means of x (N, C, ...) to running_mean, plus that of the variances."""
    mean, var = channel_statistics(x)
    # The gradient of torch.dist at zero is zero; that of a square root would be NaN.
    distance = torch.dist(mean, running_mean.detach()) + torch.dist(var, running_var.detach())
    return distance.to(mean.dtype)  # running statistics may be float64
