"""Launch plans: what an operator launches for arguments of one kind is worked out once, and then only repeated.

A kernel for a few hundred rows takes a microsecond or two; for Python to choose its tiles, find it in Triton's cache
and bind twenty arguments takes several times that, and an op is several kernels. But all of it follows from what the
arguments *are* - dtypes, shapes, strides, numbers - and not from their values. So when a kind of arguments comes for
the second time, the launches are written down as they are made: which compiled kernel, how many programs, which
argument, result or temporary each pointer points into. From the third time on, all that happens is one allocation for
all temporaries, and the bare launches.

A plan is kept only where it is sure to do the same: where the launching function did nothing on the device but launch,
and each pointer is into exactly one argument, result or temporary. What else it read is checked or in the way: the
precision of float32 products is compared at each call; a forced or observed configuration, hooks of a profiler and
pointers that are not aligned take the ordinary way. With ``DFKD_FAST_PLANS=0`` in the environment all do. Who changes
Triton's knobs, or constants of a kernel module, calls :func:`forget` after it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from dfkd_fast.kernels import config

__all__ = ["Plans", "forget", "note_launch", "ordinary", "tf32_allowed"]

_ALIGNMENT = 16  # bytes; Triton compiles a kernel of its own for pointers that have less
_SEGMENT = 512  # bytes; what PyTorch's allocator aligns to, and so each temporary
_MOST = 1024  # kinds an operator keeps; a program whose shapes never repeat must not fill the memory

# How a compiled kernel is called, below its public face, has changed between releases; in these it is as it is here.
_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"], ["3", "8"], ["3", "9"])


class _State(threading.local):
    """What a thread is writing down, and whether it wants no plans."""

    recording: _Recording | None = None
    ordinary: bool = os.environ.get("DFKD_FAST_PLANS") == "0"


_state = _State()


@contextmanager
def ordinary() -> Iterator[None]:
    """Inside, in this thread, every launch is made the ordinary way; backward too, which stays in it."""
    before, _state.ordinary = _state.ordinary, True
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _state.ordinary = before


def note_launch(
    compiled: Any, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]
) -> None:
    """Write a launch that was made into the plan that is being recorded, if one is.

    Args:
        compiled: what Triton's launch returned; None from its interpreter.
        kernel: the ``triton.jit`` function.
        grid: programs along each axis.
        arguments: the kernel's, up to its compile-time constants.
        constants: these, by name.
    """
    if _state.recording is not None:
        last = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        _state.recording.launches.append((compiled, grid, (*arguments, *last)))


def tf32_allowed() -> bool:
    """Whether float32 products may be TF32; a plan that is being recorded is then one for that."""
    allowed: bool = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if _state.recording is not None:
        _state.recording.tf32 = allowed
    return allowed


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


_ALLOCATE = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")


class _Recording(TorchDispatchMode):
    """Watches what a launching function does."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self.tf32: bool | None = None
        self.computes = False
        self.sees = False  # not where dispatch to modes is off

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.sees = True
        result = func(*args, **(kwargs or {}))
        if func._schema.name not in _ALLOCATE:
            inputs = {_storage(a) for a in args if isinstance(a, Tensor)}
            results = result if isinstance(result, (tuple, list)) else (result,)
            views = all(isinstance(r, Tensor) and _storage(r) in inputs for r in results)
            # What neither takes nor gives a tensor, as the promotion of dtypes, has no work for the device either.
            devoid = not inputs and not any(isinstance(r, Tensor) for r in results)
            self.computes |= func._schema.is_mutable or not (views or devoid)
        return result


class _Unplannable(Exception):
    """A launch that a plan cannot hold."""


# Where a pointer of a launch's arguments stands, which slot it points into, and how far from its start.
_Pointer = tuple[int, int, int]
_Template = tuple[list[Any], list[_Pointer], list[tuple[int, "_Template"]]]


def _filled(template: _Template, pointers: list[int]) -> list[Any]:
    fixed, places, nested = template
    arguments = fixed.copy()
    for at, slot, offset in places:
        arguments[at] = pointers[slot] + offset
    for at, inner in nested:
        arguments[at] = tuple(_filled(inner, pointers))
    return arguments


class _Memory:
    """Where everything lies that a recorded launch pointed to.

    Args:
        tensors: the operator's arguments and results. What is in none of them is a temporary.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.workspace = 0  # bytes of all temporaries
        self._slots = {id(x): slot for slot, x in enumerate(tensors)}
        self._starts = [x.data_ptr() for x in tensors]
        self._owners: dict[int, list[int]] = {}
        for slot, x in enumerate(tensors):
            self._owners.setdefault(_storage(x), []).append(slot)
        self._temporaries: dict[int, int] = {}

    def template(self, arguments: Sequence[Any]) -> _Template:
        """A launch's arguments, with places for pointers."""
        fixed: list[Any] = []
        places: list[_Pointer] = []
        nested: list[tuple[int, _Template]] = []
        for at, argument in enumerate(arguments):
            fixed.append(0 if isinstance(argument, Tensor) else argument)
            if isinstance(argument, tuple):
                inner = self.template(argument)
                if inner[1] or inner[2]:
                    nested.append((at, inner))
            elif isinstance(argument, Tensor) and argument.data_ptr():
                places.append((at, *self._place(argument)))
        return fixed, places, nested

    def _place(self, x: Tensor) -> tuple[int, int]:
        """The slot that a tensor lies in, and how many bytes from its start."""
        if id(x) in self._slots:
            return self._slots[id(x)], 0
        storage = _storage(x)
        owners = self._owners.get(storage)
        if owners is None:
            if storage not in self._temporaries:
                self._temporaries[storage] = self.workspace
                size = x.untyped_storage().nbytes()
                self.workspace += -(-size // _SEGMENT) * _SEGMENT
            return len(self._starts), self._temporaries[storage] + x.data_ptr() - storage
        if len(owners) > 1:
            raise _Unplannable  # a view of memory that two arguments share: of which of them?
        return owners[0], x.data_ptr() - self._starts[owners[0]]


_STREAM = 3  # where it stands in what a compiled kernel is called with


class _Plan:
    """The launches of one operator for one kind of arguments."""

    def __init__(self, recording: _Recording, tensors: list[Tensor]) -> None:
        self.tf32 = recording.tf32
        memory = _Memory(tensors)
        self._launches: list[tuple[Any, _Template]] = []
        for compiled, grid, arguments in recording.launches:
            if compiled is None:
                raise _Unplannable
            # The stream is put in at each call; no metadata and no hooks, for which there is the ordinary way.
            head = [*(*grid, 1, 1)[:3], None, compiled.function, compiled.packed_metadata, None, None, None]
            # The compiled kernel, and not its method alone: Triton unloads what nobody holds.
            self._launches.append((compiled, memory.template((*head, *arguments))))
        self._workspace = memory.workspace

    def run(self, pointers: list[int], like: Tensor, stream: int) -> None:
        """Make the launches.

        Args:
            pointers: of the tensors that the plan was made for, in their order.
            like: any of them, for the device.
            stream: to launch on.
        """
        if self._workspace:
            workspace = like.new_empty(self._workspace, dtype=torch.uint8)
            pointers.append(workspace.data_ptr())
        for compiled, template in self._launches:
            arguments = _filled(template, pointers)
            arguments[_STREAM] = stream
            compiled.run(*arguments)


def _hooked() -> bool:
    """Whether somebody wants to be told of launches, as Triton's profiler does."""
    runtime = knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


_operators: weakref.WeakSet[Plans] = weakref.WeakSet()


def forget() -> None:
    """Drop every plan, and with it the compiled kernels that it holds."""
    for each in _operators:
        each.clear()


class Plans:
    """The plans of one operator.

    Args:
        launch: takes the operator's arguments and results, and fills these.
    """

    def __init__(self, launch: Callable[..., None]) -> None:
        self._launch = launch
        self._known: dict[tuple[Any, ...], _Plan | None] = {}  # None where there is none: launched the ordinary way
        self._seen: set[tuple[Any, ...]] = set()
        self._failed: set[tuple[Any, ...]] = set()
        _operators.add(self)

    def clear(self) -> None:
        """Begin anew."""
        self._seen.clear()
        self._known.clear()
        self._failed.clear()

    def __call__(self, arguments: Sequence[Any], results: Sequence[Tensor]) -> None:
        """Fill the results: by a plan where there is one."""
        kinds: list[Any] = []
        pointers: list[int] = []
        bits = 0
        like: Tensor | None = None
        for argument in arguments:
            if isinstance(argument, Tensor):
                like = argument
                pointer = argument.data_ptr()
                bits |= pointer
                pointers.append(pointer)
                kinds += (argument.dtype, argument.shape, argument.stride(), argument.get_device())
            else:
                kinds.append(argument)
        assert like is not None
        kind = tuple(kinds)
        plan = self._known.get(kind)
        if plan is not None and plan.tf32 is not None and plan.tf32 != tf32_allowed():
            kind = ("the other precision", *kind)
            plan = self._known.get(kind)
        if plan is None:
            if kind in self._known or not self._again(kind):
                self._launch(*arguments, *results)
            else:
                self._record(kind, arguments, results)
            return
        active, index = driver.active, like.get_device()
        if (
            bits % _ALIGNMENT
            or active.get_current_device() != index
            or _state.ordinary
            or not config.settled()
            or _hooked()
        ):
            self._launch(*arguments, *results)
            return
        for result in results:
            pointers.append(result.data_ptr())
        plan.run(pointers, like, active.get_current_stream(index))

    def _again(self, kind: tuple[Any, ...]) -> bool:
        """Whether this kind was there before, and may be recorded now."""
        if _state.ordinary or not _KNOWN or not config.settled() or _state.recording is not None:
            return False
        if kind in self._seen:
            return True
        if len(self._seen) >= _MOST:
            self.clear()
        self._seen.add(kind)
        return False

    def _record(self, kind: tuple[Any, ...], arguments: Sequence[Any], results: Sequence[Tensor]) -> None:
        """Launch the ordinary way, and write down what is done; the next time, if this call is not fit for it."""
        tensors = [x for x in (*arguments, *results) if isinstance(x, Tensor)]
        if any(x.data_ptr() % _ALIGNMENT for x in tensors) or len({id(x) for x in tensors}) < len(tensors):
            self._launch(*arguments, *results)
            return
        with _Recording() as recording:
            _state.recording = recording
            tensors[0].new_empty(0)  # whether anything is seen
            try:
                self._launch(*arguments, *results)
            finally:
                _state.recording = None
        if not recording.sees:
            return
        plan = None
        if recording.launches and not recording.computes:
            with suppress(_Unplannable):
                plan = _Plan(recording, tensors)
        if plan is None and kind not in self._failed:
            self._failed.add(kind)  # once more: a finaliser may have computed something in between
            return
        self._known[kind] = plan
