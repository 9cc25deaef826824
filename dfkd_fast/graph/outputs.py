"""The outputs of a network in a distillation: the protocol between networks and objectives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LayerStatistics", "Outputs"]


class LayerStatistics(NamedTuple):
    """Statistics of the input of one BatchNorm: those of the batch and the stored ones; each (C,), float32.

    ``var`` is the biased variance. ``mean`` and ``var`` are differentiable in the images. The stored statistics are
    constants; in a float32 network they are the buffers themselves.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor


class Outputs(NamedTuple):
    """The outputs of one forward of a network.

    A network whose forward returns Outputs is used as it is; :func:`dfkd_fast.models.extract` adds them to any other.

    Attributes:
        logits: (N, classes).
        features: one map (N, C, H, W) per stage, shallow to deep.
        penultimate: (N, D), the input of the last linear layer.
        statistics: one entry per BatchNorm, in network order; empty without statistics.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    penultimate: Tensor
    statistics: tuple[LayerStatistics, ...] = ()
