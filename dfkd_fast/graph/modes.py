"""Context managers for the state of a network in a step: gradients of its weights, statistics of its BatchNorms."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["attributes_kept", "batchnorm_mode", "frozen", "preserve_state", "preserve_train_mode"]

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
    """Set the mode of every BatchNorm of ``model`` inside; nothing else changes, and leaving restores all of it.

    Args:
        model: any network; BatchNorms of every kind that derive from torch's (1d, 2d, 3d, synchronised, timm's).
        mode: ``batch`` uses the batch's statistics and leaves ``running_mean``, ``running_var`` and
            ``num_batches_tracked`` untouched; ``update`` uses the batch's statistics and updates the buffers, as
            training does; ``eval`` uses the stored ones. A layer without stored statistics uses the batch's in each
            mode.

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


@contextmanager
def preserve_train_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """``model`` in train or eval mode inside; leaving restores every module's flag."""
    saved = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in saved:
            module.training = flag


@contextmanager
def preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode and no gradients inside; leaving restores flags and random streams."""
    devices = [device] if device.type == "cuda" else []
    with preserve_train_mode(model, False), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[set[str]]:
    """Undo on leaving what a forward sets on its modules, and put the names of that into the set that is yielded."""
    saved = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    for now, before in saved:  # a forward writes into copies
        now.update({name: copy.copy(held) for name, held in before.items() if type(held) in (list, dict, set)})
    written: set[str] = set()
    try:
        yield written
    finally:
        for now, before in saved:
            written |= {name for name in now.keys() | before.keys() if not _same(now.get(name), before.get(name))}
            now.clear()
            now.update(before)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or type(a) not in (list, dict, set):
        return a is b
    left, right = ([*map(id, each), *map(id, each.values() if type(each) is dict else ())] for each in (a, b))
    return left == right
