"""Which implementation of an op runs: a registry, and the rule that chooses from it.

The choice falls on the first of these that names a backend:

1. the op's ``backend`` argument;
2. the innermost ``with dfkd_fast.ops.backend(...)`` of the calling thread;
3. the environment variable ``DFKD_FAST_BACKEND`` (for debugging; a compiled function keeps the value of its tracing);
4. none: the best backend that serves these arguments, in the order of :data:`NAMES`; but ``hopper`` and ``cuda`` only
   for shapes for which they have been measured to be the fastest (:mod:`dfkd_fast.ops.choices`).

``cuda`` and ``hopper`` are both CUDA C++ (csrc/): the plain kernels, for any device from sm_80 on, and those in the
instructions of sm_90a, for Hopper GPUs and fewer shapes.

A backend that was named is used or an error says why it cannot be; it is never replaced silently.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from dfkd_fast.nvtx import nvtx_range
from dfkd_fast.ops import choices
from dfkd_fast.ops.checks import require_choice

__all__ = ["NAMES", "VARIABLE", "Implementation", "Unserved", "backend", "backends", "dispatch", "register"]

NAMES = ("hopper", "cuda", "triton", "reference")
"""The backends, best first."""

VARIABLE = "DFKD_FAST_BACKEND"
"""The environment variable."""


_MEASURED = ("hopper", "cuda")  # chosen unasked where choices.json says that they are the fastest, and nowhere else


class Unserved(RuntimeError):
    """The backend that was asked for cannot serve these arguments; the message says why."""


def _serves_all(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One backend's way to compute an op.

    Args:
        function: takes the public function's arguments, checked, without ``backend``.
        supports: takes the same; None where ``function`` can serve them, else the reason why not, in words.
        interpreted: on the CPU it runs in an interpreter, for tests: there it serves when named, and never unasked.
        faster: takes the arguments; whether it is known to be faster than what comes after it. Else it serves when
            named alone.
    """

    function: Callable[..., Any]
    supports: Callable[..., str | None] = _serves_all
    interpreted: bool = False
    faster: Callable[..., bool] | None = None

    def unasked(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the choice may fall on it where none was named."""
        if self.interpreted and args[0].device.type == "cpu":
            return False
        if self.faster is not None and not self.faster(*args, **kwargs):
            return False
        return self.supports(*args, **kwargs) is None


_registry: dict[str, dict[str, Implementation]] = {}

# A thread's own stack of names. Dynamo follows threading.local and guards on it, which it does not for ContextVar.
_local = threading.local()


def register(
    op: str, name: str, function: Callable[..., Any], supports: Callable[..., str | None] = _serves_all
) -> None:
    """Plug an implementation in under a public op; see :class:`Implementation`.

    Raises:
        ValueError: no such backend name.
    """
    require_choice("name", name, NAMES)

    def fastest(x: Any, *args: Any, **kwargs: Any) -> bool:
        return choices.faster(op, x) == name

    _registry.setdefault(op, {})[name] = Implementation(
        function,
        supports,
        interpreted=name == "triton",
        faster=fastest if name in _MEASURED else None,
    )


def backends() -> dict[str, tuple[str, ...]]:
    """The backends that each op has an implementation for, best first."""
    return {op: tuple(name for name in NAMES if name in table) for op, table in _registry.items()}


class backend:
    """Run every op inside the ``with`` block, in this thread, on one backend.

    Blocks nest, the innermost counts, and an op's own ``backend`` argument beats them all.

    Args:
        name: ``"hopper"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: no such backend name.
    """

    def __init__(self, name: str) -> None:
        require_choice("backend", name, NAMES)
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
        RuntimeError: the backend asked for has no implementation of this op, or (:class:`Unserved`) cannot serve these
            arguments.
    """
    table = _registry[op]
    named = _named(requested)
    if named is None:
        for name in NAMES:
            if name in table and table[name].unasked(*args, **kwargs):
                with nvtx_range("op", op):
                    return table[name].function(*args, **kwargs)
        raise RuntimeError(f"no backend can serve {op} for these arguments")
    name, source = named
    require_choice(source, name, NAMES)
    if name not in table:
        raise RuntimeError(
            f"backend {name!r}, asked for by {source}, has no implementation of {op}; it has {', '.join(sorted(table))}"
        )
    reason = table[name].supports(*args, **kwargs)
    if reason is not None:
        raise Unserved(f"backend {name!r}, asked for by {source}, cannot serve {op}: {reason}")
    with nvtx_range("op", op):
        return table[name].function(*args, **kwargs)
