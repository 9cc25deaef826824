"""Distance to running statistics in plain PyTorch. Formulas: :func:`dfkd_fast.ops.statistics_distance`."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast.reference.batchnorm_statistics import channel_statistics
from dfkd_fast.reference.common import upcast

__all__ = ["statistics_distance", "statistics_distances"]


def statistics_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Return the Euclidean distance of the means of x (N, C, ...) to running_mean, plus that of the variances."""
    mean, var = channel_statistics(x)
    # The gradient of torch.dist at zero is zero; that of a square root would be NaN.
    distance = torch.dist(mean, running_mean.detach()) + torch.dist(var, running_var.detach())
    return distance.to(mean.dtype)  # running statistics may be float64


def statistics_distances(*tensors: Tensor) -> Tensor:
    """Return the sum of the distances of all layers; each has mean, var, running_mean and running_var, (C,)."""
    # Layers of equal width are stacked, so that a few kernels run instead of four per layer in each pass.
    by_width: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for mean, var, running_mean, running_var in zip(*(tensors[i::4] for i in range(4)), strict=True):
        pairs = by_width.setdefault(len(mean), [])
        pairs += [(mean, running_mean.detach()), (var, running_var.detach())]
    distances = []
    for pairs in by_width.values():
        batch, running = (upcast(torch.stack(side)) for side in zip(*pairs, strict=True))
        distances.append(torch.linalg.vector_norm(batch - running.to(batch.dtype), dim=1).sum())
    return torch.stack(distances).sum()
