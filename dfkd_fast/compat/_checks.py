"""What an op takes. The rest is left to plain PyTorch, whose errors are those of the originals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["alike", "floating", "positive"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(x: Any, ndim: int) -> bool:
    """A tensor of a dtype that the ops take, with so many dimensions, none but the first empty."""
    return isinstance(x, Tensor) and x.dtype in _DTYPES and x.ndim == ndim and 0 not in x.shape[1:]


def alike(a: Tensor, b: Tensor) -> bool:
    """Of one shape, on one device."""
    return a.shape == b.shape and a.device == b.device


def positive(value: Any) -> bool:
    """A finite Python number above zero."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
