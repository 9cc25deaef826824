"""Which backend is the fastest for which shapes, by measurement: the table that dispatch reads.

``kernels/choices.json`` is written by `make report` from committed results, where ``triton`` and ``cuda`` have both
been measured on a device. Nothing is chosen without a measurement.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["faster", "read_choices", "shape_class"]

Key = tuple[str, int, str, tuple[int, ...]]


def shape_class(x: Tensor) -> tuple[int, ...]:
    """Powers of two that sizes are rounded up to: of maps (N, C, H, W) positions N H W and channels, else each size."""
    n, *rest = x.shape
    sizes = (n * rest[1] * rest[2], rest[0]) if len(rest) == 3 else (n, *rest)
    return tuple(max(0, int(size) - 1).bit_length() for size in sizes)


def read_choices(path: Path) -> dict[Key, str]:
    """The fastest backend by op, architecture, dtype and class of shapes; empty where there is no such file."""
    if not path.exists():
        return {}
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["op"], row["arch"], row["dtype"], tuple(row["shape_class"])): row["backend"] for row in rows}


def _table() -> dict[Key, str]:
    found = importlib.util.find_spec("dfkd_fast.kernels")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    return read_choices(Path(folders[0]) / "choices.json") if folders else {}


_CHOICES = _table()
_MEASURED = frozenset(op for op, *_ in _CHOICES)


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def faster(op: str, x: Tensor) -> str | None:
    """The backend that was measured to be the fastest for tensors like ``x``; None where none was.

    Args:
        op: its name.
        x: the op's first tensor.
    """
    if op not in _MEASURED or not x.is_cuda:
        return None
    dtype = str(x.dtype).removeprefix("torch.")
    return _CHOICES.get((op, _architecture(x.device.index or 0), dtype, shape_class(x)))
