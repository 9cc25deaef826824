"""Context managers for how a network behaves in a step: which weights get gradients, which statistics it uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batchnorm_mode", "frozen"]

_MODES = ("batch", "update", "eval")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` requires a gradient inside; outside each does as before.

    A forward run inside computes no weight gradient even when its backward runs outside.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@contextmanager
def batchnorm_mode(model: nn.Module, mode: Literal["batch", "update", "eval"]) -> Iterator[None]:
    """How the BatchNorms of ``model`` behave inside; nothing else of it changes, and all is put back on leaving.

    Args:
        model: any network; BatchNorms of every kind that derive from torch's (1d, 2d, 3d, synchronised, timm's).
        mode: ``batch`` uses the batch's statistics and leaves ``running_mean``, ``running_var`` and
            ``num_batches_tracked`` untouched; ``update`` uses the batch's statistics and updates the buffers, as
            training does; ``eval`` uses the stored ones. A layer that was built without stored statistics uses the
            batch's in each mode.

    Raises:
        ValueError: another mode.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    saved = [(m, m.training, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for module, _, _ in saved:
            module.training = mode != "eval"
            if mode == "batch":
                # In training, torch neither reads nor writes the buffers of a layer that does not track.
                module.track_running_stats = False
        yield
    finally:
        for module, training, track in saved:
            module.training = training
            module.track_running_stats = track
