"""Named ranges on the timeline of a profiler: round, step, network, op.

A range shows in Nsight Systems, through the ``nvtx`` package where it is installed, and in a running torch.profiler. It
is of the host: kernels belong to the range in which they were launched. A captured graph is launched as a whole, so of
its ranges only round and step are seen.
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
"""Domain of the ranges in NVTX; in torch.profiler the first part of their names: ``dfkd_fast/network/teacher``."""

KINDS = ("round", "step", "network", "op")
"""What a range can be of, from the outside in."""

_annotate: Callable[..., Any] | None = None if nvtx is None else nvtx.annotate
_NOTHING = contextlib.nullcontext()
_COLORS = {"round": "gray", "step": "blue", "network": "green", "op": "orange"}


def nvtx_range(kind: str, name: str) -> contextlib.AbstractContextManager[Any]:
    """A range around a ``with`` block.

    Inside code that torch.compile traces there is none: a range would be a graph break, and its ops are fused anyway.

    Args:
        kind: one of :data:`KINDS`.
        name: of what: ``generator``, ``teacher``, ``high_order_attention``, ...
    """
    if torch.compiler.is_compiling():
        return _NOTHING
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"{PREFIX}/{kind}/{name}")
    if _annotate is not None:
        return _annotate(f"{kind} {name}", color=_COLORS[kind], domain=PREFIX)
    return _NOTHING
