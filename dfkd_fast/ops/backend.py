"""Registry of op implementations and backend selection.

The backend is the first of:

1. the op's ``backend`` argument;
2. the innermost ``with dfkd_fast.ops.backend(...)`` in the calling thread;
3. the environment variable ``DFKD_FAST_BACKEND`` (for debugging; compiled functions keep the value from tracing);
4. automatic: the first backend in :data:`NAMES` that supports the arguments. ``cuda`` is selected only for shapes for
   which measurements show it to be the fastest (:mod:`dfkd_fast.ops.choices`). In eager mode, the fused backends
   ``cuda`` and ``triton`` are selected only for tensors of at least the sizes in :data:`EAGER_MIN_NUMEL`.

``cuda`` is CUDA C++ (csrc/) for devices of compute capability 9.0. It uses wgmma, TMA, clusters and grid-wide barriers,
and supports fewer shapes than ``triton``. ``cpu`` is PyTorch's operators on the CPU with a hand-written backward.

A requested backend is never replaced: if it does not support the arguments, the op raises an error with the reason.
:func:`register` adds backends under other names, which run only on request.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.deprecated import renamed
from dfkd_fast.nvtx import nvtx_range
from dfkd_fast.ops import choices
from dfkd_fast.ops.checks import require_choice

__all__ = [
    "EAGER_MIN_NUMEL",
    "NAMES",
    "VARIABLE",
    "Implementation",
    "UnsupportedError",
    "backend",
    "backends",
    "dispatch",
    "register",
]

NAMES = ("cuda", "triton", "cpu", "reference")
"""The built-in backends, in order of preference."""

VARIABLE = "DFKD_FAST_BACKEND"
"""Environment variable that selects a backend."""

EAGER_MIN_NUMEL = {
    "batch_norm_act": 2**24,
    "batch_norm_act_conv1x1": 2**24,
    "batchnorm_statistics": 2**24,
    "channel_statistics": 2**24,
    "contrastive_loss": 2**18,
    "distillation_kl": 2**22,
    "high_order_attention": 2**22,
    "high_order_attention_map": 2**22,
    "high_order_attention_mse": 2**22,
    "max_pool2x2": 2**24,
    "max_unpool2x2": 2**24,
    "spatial_attention": 2**23,
    "statistics_distance": 2**24,
    "statistics_distances": 0,
}
"""Smallest number of elements in an op's first tensor for which eager mode selects a fused backend.

Launching a fused kernel from Python takes longer than launching several small PyTorch kernels. In eager mode, the fused
kernel is therefore faster only if the reference keeps the GPU busy for longer than that launch takes. torch.compile and
CUDA graphs remove the launch overhead, so there the fused op runs at every size. The values are provisional: they
compare the CPU time per call, measured without a GPU, with the reference's memory traffic at 2.95 TB/s.
"""


def _small_and_eager(op: str, x: Tensor) -> bool:
    """Return whether this eager call is too small for a fused backend to save more time than its launch takes."""
    if not x.is_cuda or torch.compiler.is_compiling() or x.numel() >= EAGER_MIN_NUMEL[op]:
        return False
    # CUDA graphs are warmed up and captured on a side stream, so a call on the default stream is eager.
    return torch.cuda.current_stream(x.device) == torch.cuda.default_stream(x.device)


class UnsupportedError(RuntimeError):
    """The requested backend does not support the arguments; the message gives the reason."""


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of an op.

    Args:
        function: takes the public function's checked arguments, without ``backend``.
        unsupported_reason: takes the same arguments; returns why ``function`` does not support them, or None.
        automatic: takes the same arguments; returns whether dispatch may select the backend automatically.
    """

    function: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = lambda *args, **kwargs: None
    automatic: Callable[..., bool] = lambda *args, **kwargs: True


_registry: dict[str, dict[str, Implementation]] = {}
_names = list(NAMES)  # register() adds others

# Each thread's stack of names. Dynamo traces and guards on threading.local, but not on ContextVar.
_local = threading.local()


def register(
    op: str,
    name: str,
    function: Callable[..., Any],
    unsupported_reason: Callable[..., str | None] = lambda *args, **kwargs: None,
) -> None:
    """Register an implementation of a public op; see :class:`Implementation`.

    Args:
        op: name of the op.
        name: name of the backend; one that is not in :data:`NAMES` runs only on request.
        function: takes the public function's checked arguments, without ``backend``.
        unsupported_reason: takes the same arguments; returns why ``function`` does not support them, or None.
    """
    if name not in _names:
        _names.insert(-1, name)  # before the reference

    def automatic(x: Tensor, *args: Any, **kwargs: Any) -> bool:
        if name == "triton" and x.device.type == "cpu":
            return False  # Triton's interpreter, which runs on the CPU, is only for tests.
        return name != "cuda" or choices.faster(op, x) == name

    _registry.setdefault(op, {})[name] = Implementation(function, unsupported_reason, automatic)


def backends() -> dict[str, tuple[str, ...]]:
    """Return the names of each op's registered backends, in order of preference."""
    return {op: tuple(name for name in _names if name in table) for op, table in _registry.items()}


class backend:
    """Context manager that selects the backend of all ops called in this thread.

    The innermost context applies. An op's ``backend`` argument takes precedence.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"reference"`` or a name passed to :func:`register`.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str) -> None:
        require_choice("backend", name, tuple(_names))
        self.name = name

    def __enter__(self) -> None:
        _local.stack = (*getattr(_local, "stack", ()), self.name)

    def __exit__(self, *exception: object) -> None:
        _local.stack = _local.stack[:-1]


def _named(argument: str | None) -> tuple[str, str] | None:
    """Return the requested backend and the source of the request, or None if the choice is automatic."""
    if argument is not None:
        return argument, "backend"
    stack = getattr(_local, "stack", ())
    if stack:
        return stack[-1], "dfkd_fast.ops.backend"
    value = os.environ.get(VARIABLE)
    return (value, VARIABLE) if value else None


def dispatch(op: str, requested: str | None, *args: Any, **kwargs: Any) -> Any:
    """Select an implementation of ``op`` for the arguments and call it.

    Args:
        op: name of the op.
        requested: the public function's ``backend`` argument.
        *args: passed to the implementation.
        **kwargs: passed to the implementation.

    Raises:
        ValueError: the requested backend is unknown.
        RuntimeError: the requested backend does not implement the op.
        UnsupportedError: the requested backend does not support the arguments.
    """
    table = _registry[op]
    named = _named(requested)
    if named is None:
        for name in NAMES:
            if name not in table or (name != "reference" and _small_and_eager(op, args[0])):
                continue
            found = table[name]
            if found.automatic(*args, **kwargs) and found.unsupported_reason(*args, **kwargs) is None:
                with nvtx_range("op", op):
                    return found.function(*args, **kwargs)
        raise RuntimeError(f"no backend of {op} supports these arguments")
    name, source = named
    require_choice(source, name, tuple(_names))
    if name not in table:
        raise RuntimeError(
            f"backend {name!r}, requested by {source}, does not implement {op}; available: {', '.join(sorted(table))}"
        )
    reason = table[name].unsupported_reason(*args, **kwargs)
    if reason is not None:
        raise UnsupportedError(f"backend {name!r}, requested by {source}, does not support this call of {op}: {reason}")
    with nvtx_range("op", op):
        return table[name].function(*args, **kwargs)


__getattr__ = renamed(__name__, Unserved="dfkd_fast.ops.backend.UnsupportedError")
