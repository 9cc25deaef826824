"""Injects values that are not finite into the steps of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten  # torch has no public names for these

__all__ = ["CALLS", "TENSORS", "Fault"]

CALLS = ("generator", "teacher", "student", "objective")
"""Functions that a step calls; one element of one of their outputs is replaced."""

TENSORS = ("parameters", "buffers", "optimizer state", "learning rate")
"""Tensors that a step reads and writes."""


class Fault:
    """Writes a value to one element of a place in the step ``at`` (round, step), once. ``hit`` names the tensor.

    Args:
        place: one of :data:`CALLS` or :data:`TENSORS`, or it begins with "gradient" or "loss scale".
        rng: draws the value, the step, the tensor and the element.
    """

    def __init__(self, place: str, rng: np.random.Generator) -> None:
        self.place, self.rng, self.hit = place, rng, ""
        self.value, self.at = float(rng.choice([math.nan, math.inf, -math.inf])), tuple(rng.integers([3, 4]).tolist())

    def poison(self, x: Tensor, name: str = "gradient") -> Tensor:
        self.hit = name
        mask = torch.arange(x.numel()).view(x.shape) == int(self.rng.integers(x.numel()))
        return torch.where(mask, self.value, x)

    def poison_one(self, tensors: Any) -> None:
        named = {name: t for name, t in dict(tensors).items() if t is not None and t.is_floating_point()}
        name = str(self.rng.choice(list(named)))
        named[name].data.copy_(self.poison(named[name].data, name))

    def outputs(self, call: Any, *arguments: Any) -> Any:
        leaves, tree = tree_flatten(call(*arguments))
        i = int(self.rng.choice([0, self.rng.integers(len(leaves))]))  # logits come first
        if self.place == "objective":  # the sum contains the term
            leaves[0], i = leaves[0] + self.value, 1
        leaves[i] = self.poison(leaves[i], f"output {i}")
        return tree_unflatten(leaves, tree)

    def take(self, original: Any, engine: Any, kind: str) -> None:
        state, calls = engine.state, engine.networks
        if self.hit or (state.position.round, state.position.step) != self.at:
            return original(engine, kind)
        side, step = state.sides[kind], getattr(calls, f"{kind}_step")
        if self.place in CALLS:
            step = replace(step, **{self.place: partial(self.outputs, getattr(step, self.place))})
            engine.networks = replace(calls, **{f"{kind}_step": step})
        elif self.place.startswith("gradient"):
            weights = [*side.module.parameters()]
            weight = weights[self.rng.integers(len(weights))]
            handle = weight.register_hook(lambda g: handle.remove() or self.poison(g))
        elif self.place == "learning rate":
            rates = state.rates[state.position.step :] if kind == "student" else side.optimizer.param_groups[0]["lr"]
            self.poison_one({"rate": rates})
        original(engine, kind)
        engine.networks = calls
        if self.place in ("parameters", "buffers"):
            self.poison_one(
                getattr(state.sides[str(self.rng.choice(list(state.sides)))].module, f"named_{self.place}")()
            )
        elif self.place == "optimizer state":
            states = enumerate(side.optimizer.state.values())
            self.poison_one({f"{name} {i}": t for i, each in states for name, t in each.items()})
        elif self.place.startswith("loss scale"):
            self.poison_one({"scale": side.scaler._scale})
