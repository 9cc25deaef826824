"""Which implementation of an op runs: a registry, and the rule that chooses from it.

The choice falls on the first of these that names a backend:

1. the op's ``backend`` argument;
2. the innermost ``with dfkd_fast.ops.backend(...)`` of the calling thread;
3. the environment variable ``DFKD_FAST_BACKEND`` (for debugging; a compiled function keeps the value of its tracing);
4. none: the best backend that serves these arguments, in the order of :data:`NAMES`; but ``cuda`` only for shapes for
   which it has been measured to be the fastest (:mod:`dfkd_fast.ops.choices`), and in eager mode no fused backend below
   the sizes of :data:`EAGER_MIN_NUMEL`.

``cuda`` is CUDA C++ (csrc/) for devices of compute capability 9.0: wgmma, TMA, clusters and grid-wide barriers. Its
launchers serve fewer shapes than ``triton``, and say why they refuse one.

A backend that was named is used or an error says why it cannot be; it is never replaced silently. :func:`register` adds
backends of other names, which are used only when named.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

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

NAMES = ("cuda", "triton", "reference")
"""The backends that the package comes with, best first."""

VARIABLE = "DFKD_FAST_BACKEND"
"""The environment variable."""


EAGER_MIN_NUMEL = {
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
}
"""Elements of an op's first tensor from which a fused backend is chosen automatically in eager mode.

Launching a fused kernel from Python takes longer than PyTorch takes for several small kernels of its own, so an eager
call is faster fused only once the reference keeps the GPU busy for longer than that. Under torch.compile and in CUDA
graphs launches are free, and the fused op runs at every size. The values are provisional: CPU time per call measured
without a GPU, over the reference's memory traffic at 2.95 TB/s.
"""


def _small_and_eager(op: str, x: Tensor) -> bool:
    """Whether launches would cost an automatically chosen fused backend more than it saves."""
    if not x.is_cuda or torch.compiler.is_compiling() or x.numel() >= EAGER_MIN_NUMEL[op]:
        return False
    # Graphs are captured, and warmed up before, on a side stream.
    return torch.cuda.current_stream(x.device) == torch.cuda.default_stream(x.device)


class UnsupportedError(RuntimeError):
    """The backend that was asked for cannot serve these arguments; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of an op.

    Args:
        function: takes the public function's checked arguments, without ``backend``.
        unsupported_reason: takes the same; returns why ``function`` does not support them, None if it does.
        automatic: takes the same; returns whether dispatch may choose the backend when no backend is named.
    """

    function: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = lambda *args, **kwargs: None
    automatic: Callable[..., bool] = lambda *args, **kwargs: True


_registry: dict[str, dict[str, Implementation]] = {}
_names = list(NAMES)  # and those that register() was given

# A thread's own stack of names. Dynamo follows threading.local and guards on it, which it does not for ContextVar.
_local = threading.local()


def register(
    op: str,
    name: str,
    function: Callable[..., Any],
    unsupported_reason: Callable[..., str | None] = lambda *args, **kwargs: None,
) -> None:
    """Plug an implementation in under a public op; see :class:`Implementation`.

    Args:
        op: name of the op.
        name: of the backend: one of :data:`NAMES`, or another, which is then used only when named.
        function: takes the public function's arguments, checked, without ``backend``.
        unsupported_reason: takes the same; why ``function`` cannot serve them, None if it can.
    """
    if name not in _names:
        _names.insert(-1, name)  # before the reference

    def automatic(x: Tensor, *args: Any, **kwargs: Any) -> bool:
        if name == "triton" and x.device.type == "cpu":
            return False  # The interpreter is for tests.
        return name != "cuda" or choices.faster(op, x) == name

    _registry.setdefault(op, {})[name] = Implementation(function, unsupported_reason, automatic)


def backends() -> dict[str, tuple[str, ...]]:
    """The backends that each op has an implementation for, best first."""
    return {op: tuple(name for name in _names if name in table) for op, table in _registry.items()}


class backend:
    """Run every op inside the ``with`` block, in this thread, on one backend.

    Blocks nest, the innermost counts, and an op's own ``backend`` argument beats them all.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"reference"`` or a name that :func:`register` was given.

    Raises:
        ValueError: no such backend name.
    """

    def __init__(self, name: str) -> None:
        require_choice("backend", name, tuple(_names))
        self.name = name

    def __enter__(self) -> None:
        _local.stack = (*getattr(_local, "stack", ()), self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _local.stack = _local.stack[:-1]


def _named(argument: str | None) -> tuple[str, str] | None:
    """The backend that was asked for, and by what."""
    if argument is not None:
        return argument, "backend"
    stack = getattr(_local, "stack", ())
    if stack:
        return stack[-1], "dfkd_fast.ops.backend"
    value = os.environ.get(VARIABLE)
    return (value, VARIABLE) if value else None


def dispatch(op: str, requested: str | None, *args: Any, **kwargs: Any) -> Any:
    """Choose an implementation of ``op`` for these arguments and call it.

    Args:
        op: as registered.
        requested: the public function's ``backend`` argument.
        *args: passed on.
        **kwargs: passed on.

    Raises:
        ValueError: an unknown backend name was asked for.
        RuntimeError: the backend asked for has no implementation of this op.
        UnsupportedError: it cannot serve these arguments.
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
        raise RuntimeError(f"no backend can serve {op} for these arguments")
    name, source = named
    require_choice(source, name, tuple(_names))
    if name not in table:
        raise RuntimeError(
            f"backend {name!r}, asked for by {source}, has no implementation of {op}; it has {', '.join(sorted(table))}"
        )
    reason = table[name].unsupported_reason(*args, **kwargs)
    if reason is not None:
        raise UnsupportedError(f"backend {name!r}, asked for by {source}, cannot serve {op}: {reason}")
    with nvtx_range("op", op):
        return table[name].function(*args, **kwargs)
