"""Inputs of ops at the edges of dtypes, in odd memory layouts, and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_fast.testing import LAYOUTS, with_layout

__all__ = ["edge_inputs", "laid_out", "pick", "spoiled"]

OTHERS = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
SHAPES = {2: ((1, 1), (1, 5), (4, 1)), 3: ((1, 1, 1), (1, 3, 5)), 4: ((2, 1, 3, 2), (1, 5, 2, 2), (3, 4, 4, 3))}
EDGES: dict[str, Callable[[Tensor, Any], Tensor]] = {  # of x, about normally distributed
    "plain": lambda x, info: x,
    "denormal": lambda x, info: x * info.tiny / 16,
    "tiny": lambda x, info: x * info.tiny * 16,
    "small": lambda x, info: x * info.tiny**0.5,
    "large": lambda x, info: x * info.max**0.5,
    "huge": lambda x, info: x * info.max / 8,
    "largest": lambda x, info: x.sign() * info.max,
    "zero": lambda x, info: x * 0,  # of both signs
    "ties": lambda x, info: x.round(),
    "equal": lambda x, info: torch.ones_like(x),
    "offset": lambda x, info: 1e4 + x * 1e-2,
    "eps": lambda x, info: 1 + (4 * x).round() * info.eps,
    "mixed": lambda x, info: x * 10.0 ** torch.linspace(-6, 4, x.numel(), dtype=x.dtype).view(x.shape),
    "one large": lambda x, info: x * torch.where(x == x.max(), 1e4, 1.0),
    "masked": lambda x, info: torch.where(torch.arange(x.shape[-1]) % 3 == 1, -math.inf, x),  # only logits
}


def pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def laid_out(rng: np.random.Generator, t: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype in another layout."""
    # In half precision, repeated values near the kink of an activation add up to large errors.
    repeated = ("expanded", "overlapping") if t.dtype.itemsize > 2 else ()
    layout = pick(rng, (*LAYOUTS, *repeated, "reversed")) if t.numel() else "contiguous"
    if layout == "expanded":
        return t.narrow(int(rng.integers(t.ndim)), 0, 1).expand(t.shape)
    if layout == "overlapping":
        strides = [int(rng.integers(1, 3)) for _ in t.shape]
        return t.flatten().repeat(2 * t.ndim + 1).as_strided(t.shape, strides)
    if layout == "reversed":
        order = list(range(t.ndim))[::-1]
        return t.permute(order).contiguous().permute(order)
    return with_layout(t, layout if t.ndim == 4 or (layout != "channels_last" and t.ndim > 1) else "offset")


def spoiled(rng: np.random.Generator, t: Tensor) -> Any:
    """Return a wrong tensor, or something else."""
    dim = int(rng.integers(t.ndim))
    makers = (lambda: pick(rng, ("text", 1.0, [t])), lambda: t.to(pick(rng, OTHERS)), lambda: t.to("meta"))
    shapes = (lambda: t[None], t.flatten, t.sum, lambda: t[..., None], lambda: torch.cat([t, t], dim))
    return pick(rng, (*makers, *shapes, lambda: t.narrow(dim, 0, 0), lambda: t.movedim(0, -1), t.to_sparse))()


def edge_inputs(case: Any, op: str, dtype: torch.dtype, rng: np.random.Generator) -> tuple[list[Any], list[str]]:
    """Inputs of a random shape with an edge in one tensor or in all, and their descriptions."""
    shapes = (*case.shapes, *SHAPES[len(case.shapes[0])])
    inputs = case.make(shapes[rng.integers(len(shapes))], needs_grad=case.needs_grad)(int(rng.integers(1 << 20)))
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)  # the definition must not overflow
    edge = str(rng.choice(list(EDGES)[: None if op == "distillation_kl" else -1]))
    names = [edge if chosen else "plain" for chosen in rng.permutation(len(inputs)) < rng.choice([1, 10])]
    for i, (x, name) in enumerate(zip(inputs, names, strict=True)):
        if x is not None:
            value = EDGES[name](x.detach().double(), info).clamp(None if name == "masked" else -info.max, info.max)
            inputs[i] = value.to(dtype).requires_grad_(x.requires_grad)
    return inputs, [f"{name} {tuple(x.shape)}" for name, x in zip(names, inputs, strict=True) if x is not None]
