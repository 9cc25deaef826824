"""How far a batch's statistics are from stored ones, plainly. See :func:`dfkd_fast.ops.statistics_distance`."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast.reference.batchnorm_statistics import channel_statistics

__all__ = ["statistics_distance"]


def statistics_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Euclidean distance of the channels' means of x (N, C, ...) to the stored ones, plus that of the variances."""
    mean, var = channel_statistics(x)
    # torch.dist rather than a root of squares, whose gradient at zero would be no number.
    total = torch.dist(mean, running_mean.detach()) + torch.dist(var, running_var.detach())
    return total.to(mean.dtype)  # stored statistics may have more digits
