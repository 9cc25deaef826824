"""The CUDA extension: whether it is here, and why not.

It is built by CMakeLists.txt into this package's folder: ``_operators.so`` defines ``torch.ops.dfkd_fast_cuda``,
``libdfkd_kernels.so`` holds the kernels. Nothing of it is loaded where torch is built without CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["UNAVAILABLE", "build"]

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


def build() -> dict[str, Any] | None:
    """Of the extension that is here: ``toolkit``, ``architectures``, ``commit``; None where there is none."""
    if UNAVAILABLE is not None:
        return None
    from dfkd_fast import _C

    return _C.build()
