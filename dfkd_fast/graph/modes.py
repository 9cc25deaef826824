"""Context managers that change a network's flags and restore them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "batchnorm_mode",
    "frozen",
    "not_compiled",
    "preserve_attributes",
    "preserve_buffers",
    "preserve_state",
    "preserve_train_mode",
]

_MODES = ("batch", "update", "eval")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off ``requires_grad`` of every parameter inside the context.

    A forward pass inside computes no weight gradient, even if its backward pass runs outside.
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
    """Set the mode of every BatchNorm inside the context. No other module changes.

    Args:
        model: any network. All subclasses of torch's BatchNorm change mode (1d, 2d, 3d, synchronized, timm's).
        mode: ``batch`` normalizes by batch statistics and leaves the buffers unchanged; ``update`` normalizes by batch
            statistics and updates the buffers, as in training; ``eval`` normalizes by running statistics. A layer
            without running statistics uses batch statistics in every mode.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    saved = [(m, m.training, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for module, _, _ in saved:
            module.training = mode != "eval"
            if mode == "batch":
                # A BatchNorm in training mode that does not track statistics leaves its buffers unchanged.
                module.track_running_stats = False
        yield
    finally:
        for module, training, track in saved:
            module.training = training
            module.track_running_stats = track


@contextmanager
def preserve_train_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set train or eval mode inside the context; leaving restores every module's flag."""
    saved = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in saved:
            module.training = flag


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Leaving the context restores buffers that a forward has changed, for example its own counters."""
    saved = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.detach().clone() for *_, buffer in saved]
    try:
        yield
    finally:
        with torch.no_grad():
            for (buffers, name, buffer), value in zip(saved, values, strict=True):
                buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients inside the context; leaving restores flags, buffers and random number generators."""
    devices = [device] if device.type == "cuda" else []
    with preserve_train_mode(model, False), preserve_buffers(model), torch.no_grad():
        with torch.random.fork_rng(devices=devices):
            yield


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Inside the context, modules that were compiled in place (``module.compile()``) run their plain forward."""
    saved = [(module, call) for module in model.modules() if (call := module._compiled_call_impl) is not None]
    for module, _ in saved:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, compiled in saved:
            module._compiled_call_impl = compiled


@contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[set[str]]:
    """Undo attribute changes of all modules on leaving, and add the attributes' names to the yielded set."""
    saved = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    for now, before in saved:  # so that a forward changes copies of containers
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
    """Whether two attribute values are one object, or built-in containers of the same objects."""
    if type(a) is not type(b) or type(a) not in (list, dict, set):
        return a is b
    left, right = ([*map(id, each), *map(id, each.values() if type(each) is dict else ())] for each in (a, b))
    return left == right
