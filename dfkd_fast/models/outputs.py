"""What a network gives a distillation: the protocol between models and objectives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LayerStatistics", "Outputs"]


class LayerStatistics(NamedTuple):
    """The input of one BatchNorm, this batch's statistics beside the stored ones; each (C,), float32.

    ``var`` is the biased variance. ``mean`` and ``var`` are differentiable in the images; the stored ones are constants
    and, in a float32 network, its very buffers.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor


class Outputs(NamedTuple):
    """What one forward of a network gives.

    A network whose own forward returns this is used as it is; :func:`dfkd_fast.models.extract` makes one of any other.

    Attributes:
        logits: (N, classes).
        features: one map (N, C, H, W) a stage, shallow to deep.
        penultimate: (N, D), what the last linear layer reads.
        statistics: one entry a BatchNorm, in network order; empty where none were asked for.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    penultimate: Tensor
    statistics: tuple[LayerStatistics, ...] = ()
