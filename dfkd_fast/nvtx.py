"""Named ranges on a profiler's timeline: round, step, network, op.

Ranges appear in a running torch.profiler and, if the ``nvtx`` package is installed, in Nsight Systems. They are host
ranges: a kernel belongs to the range that launched it. A captured graph is one launch, so it has only round and
step ranges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

try:
    import nvtx
except ImportError:  # an extra: pip install 'dfkd-fast[nvtx]'
    nvtx = None

__all__ = ["KINDS", "PREFIX", "nvtx_range"]

PREFIX = "dfkd_fast"
"""NVTX domain of the ranges, and prefix of their names in torch.profiler: ``dfkd_fast/network/teacher``."""

KINDS = ("round", "step", "network", "op")
"""Kinds of ranges, from the outermost to the innermost."""

_annotate: Callable[..., Any] | None = None if nvtx is None else nvtx.annotate
_NOTHING = contextlib.nullcontext()
_COLORS = {"round": "gray", "step": "blue", "network": "green", "op": "orange"}


def nvtx_range(kind: str, name: str) -> contextlib.AbstractContextManager[Any]:
    """Create a range around a ``with`` block.

    Code that torch.compile traces has no ranges, because they would break the graph.

    Args:
        kind: one of :data:`KINDS`.
        name: name within its kind, for example ``generator``, ``teacher`` or ``high_order_attention``.
    """
    if torch.compiler.is_compiling():
        return _NOTHING
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"{PREFIX}/{kind}/{name}")
    if _annotate is not None:
        return _annotate(f"{kind} {name}", color=_COLORS[kind], domain=PREFIX)
    return _NOTHING
