"""The table of the fastest measured backend per op, architecture, dtype and shape class.

``make report`` writes ``kernels/choices.json`` from committed results in which ``triton`` and ``cuda`` were measured on
the same device. ``cuda`` is selected automatically only if the table says that it is the fastest.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["faster", "read_choices", "shape_class"]

Key = tuple[str, int, str, tuple[int, ...]]


def shape_class(x: Tensor) -> tuple[int, ...]:
    """Return base-2 logarithms, rounded up: those of N H W and C for maps (N, C, H, W), else that of each size."""
    n, *rest = x.shape
    sizes = (n * rest[1] * rest[2], rest[0]) if len(rest) == 3 else (n, *rest)
    return tuple(max(0, int(size) - 1).bit_length() for size in sizes)


def read_choices(path: Path) -> dict[Key, str]:
    """Read the fastest backend per op, architecture, dtype and shape class; empty if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    if not os.path.lexists(path):
        return {}
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {(row["op"], row["arch"], row["dtype"], tuple(row["shape_class"])): row["backend"] for row in rows}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; install dfkd_fast again") from error


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
    """Return the fastest measured backend for tensors like ``x``, or None if there is no measurement.

    Args:
        op: name of the op.
        x: the op's first tensor.
    """
    if op not in _MEASURED or not x.is_cuda:
        return None
    dtype = str(x.dtype).removeprefix("torch.")
    return _CHOICES.get((op, _architecture(x.device.index or 0), dtype, shape_class(x)))
