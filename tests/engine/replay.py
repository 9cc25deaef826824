"""A stand-in for CUDA graphs on the CPU, with the same rules about what a replay may depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["READS_BACK", "ReplayRecorder"]

aten = torch.ops.aten
READS_BACK = {
    aten._local_scalar_dense.default: "reads a value back to the host",
    aten.equal.default: "reads a value back to the host",
    aten.nonzero.default: "has a result whose size depends on values",
}
_REFUSED = {**READS_BACK, aten.lift_fresh.default: "copies a value from the host"}


class _Recording(TorchDispatchMode):
    """Records every operator below autograd and autocast, with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} {_REFUSED[func]}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class ReplayRecorder:
    """Replays operators one by one on the memory that they were recorded with.

    As in a captured graph, Python numbers and tensor addresses are those of the recording, while values in memory and
    random streams are those of the replay. Unlike a capture, recording also runs the work.

    Attributes:
        recordings: number of recordings so far.
    """

    def __init__(self) -> None:
        self.recordings = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        with _Recording() as recording:
            work()

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, before in recording.calls:
                after = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if isinstance(old, Tensor) and not torch._C._is_alias_of(old, new):
                        old.copy_(new)

        return replay
