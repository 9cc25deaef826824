"""The interface between networks and loss terms."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LayerStatistics", "Outputs"]


class LayerStatistics(NamedTuple):
    """Batch and running statistics of one BatchNorm's input, each (C,), float32 (Eq. 3).

    ``var`` is the biased variance. ``mean`` and ``var`` are differentiable with respect to the images. The running
    statistics are constants; in a float32 network they are the buffers themselves.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor


class Outputs(NamedTuple):
    """Outputs of one forward pass, in the network's dtype.

    :func:`dfkd_fast.models.extract` adds them to a network. A network that returns Outputs itself is not traced.

    Attributes:
        logits: (N, classes).
        features: one map (N, C, H, W) per stage, shallow to deep.
        penultimate: (N, D), the input of the last linear layer.
        statistics: one entry per BatchNorm, in execution order; empty if statistics are not requested.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    penultimate: Tensor
    statistics: tuple[LayerStatistics, ...] = ()
