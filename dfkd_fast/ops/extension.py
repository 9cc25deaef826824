"""The CUDA extension: whether it is here, and why not.

It is built by CMakeLists.txt into this package's folder: ``_operators.so`` defines ``torch.ops.dfkd_fast_cuda``,
``libdfkd_kernels.so`` holds the kernels. Nothing of it is loaded where torch is built without CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNAVAILABLE", "aligned", "as_rows", "build", "filled_as_rows", "unserved_by_extension"]

_FOLDER = Path(__file__).resolve().parents[1]


def _load() -> str | None:
    library = _FOLDER / "_operators.so"
    if not library.exists():
        return "the CUDA extension is not built (docs/building.md)"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another torch or another machine
        cause = error.__cause__ or error
        return f"the CUDA extension does not load: {cause}"
    return None


UNAVAILABLE = _load()
"""Why the kernels of csrc/ cannot be called; None where they can."""


_DTYPES = (torch.float16, torch.bfloat16)
_ALIGNMENT = 16  # bytes; of every pointer that a launcher is given


def unserved_by_extension(*tensors: Tensor) -> str | None:
    """Why the kernels of csrc/ cannot take these tensors; None where they can."""
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    first = tensors[0]
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"its kernels run on CUDA devices, not on {tensor.device.type}"
        if tensor.dtype not in _DTYPES:
            return f"its kernels take float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.dtype != first.dtype:
            return "its kernels take tensors of one dtype"
    if torch.cuda.get_device_capability(first.device) < (8, 0):
        return "its kernels need a device of compute capability 8.0 or later"
    return None


def aligned(x: Tensor) -> Tensor:
    """A contiguous tensor with the alignment that launchers ask for: x itself, or a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def as_rows(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) as (N, H W, C) without gaps; of channels-last maps a view."""
    return aligned(x.permute(0, 2, 3, 1).flatten(1, 2))


@contextmanager
def filled_as_rows(result: Tensor) -> Iterator[Tensor]:
    """What a launcher fills instead of maps (N, C, H, W); an empty result stands for one that nobody wants."""
    if result.numel() == 0:
        yield result
        return
    there = result.permute(0, 2, 3, 1)
    if there.is_contiguous() and result.data_ptr() % _ALIGNMENT == 0:
        yield there.flatten(1, 2)
        return
    rows = result.new_empty(there.shape)
    yield rows.flatten(1, 2)
    there.copy_(rows)


def build() -> dict[str, Any] | None:
    """Of the extension that is here: ``toolkit``, ``architectures``, ``commit``; None where there is none."""
    if UNAVAILABLE is not None:
        return None
    from dfkd_fast import _C

    return _C.build()
