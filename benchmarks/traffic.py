"""Counts kernel launches and bytes of global memory without a GPU.

One rule counts everything: a kernel reads each byte of its inputs once and writes each byte of its outputs once,
however often its threads load it. The sources of kernels are

- ``eager``: operators of PyTorch, each counted as one kernel, which is the least possible (:class:`EagerTraffic`);
- ``inductor`` and ``library``: kernels that torch.compile generates, and library calls such as convolutions and
  operators of :func:`~dfkd_fast.ops.custom_op.library_operator`, from Inductor's schedule (:func:`inductor_traffic`);
- ``triton``: launches of this project's kernels, from the recorder and each kernel's declaration
  (:func:`dfkd_fast.kernels.common.traffic`).

Counting does not show what the caches save or cost, nor occupancy and latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dfkd_fast.kernels.common import RecordedLaunch
from dfkd_fast.ops.custom_op import is_library_call, record_op_launches

__all__ = ["ARCH", "EagerTraffic", "Kernel", "inductor_traffic", "launch_traffic", "op_traffic", "summary"]

ARCH = 90
"""Architecture whose launch configurations are counted."""


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    source: str
    read: float
    written: float


def summary(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Return ``launches``, ``bytes_read`` and ``bytes_written``."""
    kernels = list(kernels)
    read, written = (sum(getattr(kernel, name) for kernel in kernels) for name in ("read", "written"))
    return {"launches": len(kernels), "bytes_read": read, "bytes_written": written}


def _bytes(x: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded dimension counts once."""
    return x.itemsize * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size)


def _key(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.numel()


def _tensors(name: str, value: Any) -> dict[str, Tensor]:
    """The tensors of a kernel argument, which may be a nested NamedTuple, by their dotted names."""
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, tuple):
        return {}
    fields = getattr(value, "_fields", range(len(value)))
    return {
        key: x
        for field, each in zip(fields, value, strict=True)
        for key, x in _tensors(f"{name}.{field}", each).items()
    }


def launch_traffic(launch: RecordedLaunch) -> Kernel:
    """Count a recorded launch by its kernel's declaration."""
    declared, given = launch.kernel.traffic, {**launch.arguments, **launch.constants}
    found = {key: x for name, value in given.items() for key, x in _tensors(name, value).items()}

    def total(names: str) -> float:
        counted: dict[Any, float] = {}
        for name in names.split():
            part = float(declared["parts"].get(name, lambda given: 1.0)(given))
            for key, x in found.items():
                if key == name or key.startswith(f"{name}."):
                    counted[_key(x)] = part * _bytes(x)
        return sum(counted.values())

    writes, updates, reads = declared["writes"], declared["updates"], declared["reads"]
    if reads is None:
        outputs = (*writes.split(), *updates.split())
        named = [key for key in found if not any(key == name or key.startswith(f"{name}.") for name in outputs)]
        # A part is declared for the argument that contains the tensor.
        reads = " ".join(next((name for name in declared["parts"] if key.startswith(f"{name}.")), key) for key in named)
    kernel = launch.kernel.fn
    name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_').removesuffix('_kernel')}"
    return Kernel(name, "triton", total(reads) + total(updates), total(writes) + total(updates))


# Operators that overwrite their first argument without reading it.
_OVERWRITES = {"copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_", "normal_", "uniform_", "bernoulli_"}
# Operators that launch nothing.
_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_local_scalar_dense", "_unsafe_view", "_reshape_alias", "resize_", "set_"),
}


class EagerTraffic(TorchDispatchMode):
    """Counts the operators that run inside, forward and backward, on meta or fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise Dynamo would not compile inside the mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {}, result)
        return result

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count one call."""
        if func.namespace == "dfkd_fast" and not is_library_call(func):
            self.kernels += op_traffic(func, *args, **kwargs)
            return
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in _FREE or (func.namespace == "prim" and name == "device"):
            return
        read, written = {}, {_key(x): _bytes(x) for x in tree_leaves(result) if isinstance(x, Tensor)}
        named = {argument.name: argument for argument in func._schema.arguments}
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        for argument, value in given.items():
            alias = named[argument].alias_info if argument in named else None
            mutated = alias is not None and alias.is_write
            for x in tree_leaves(value):
                if isinstance(x, Tensor):
                    if mutated:
                        written[_key(x)] = _bytes(x)
                    if not mutated or name not in _OVERWRITES:
                        read[_key(x)] = _bytes(x)
        if sum(written.values()):
            self.kernels.append(Kernel(name, "eager", sum(read.values()), sum(written.values())))


def _on_meta(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=x.requires_grad)


def op_traffic(call: Callable[..., object], *args: Any, **kwargs: Any) -> list[Kernel]:
    """Count the launches of this project's ops in a call, and the operators that their launchers call.

    Tensor arguments are replaced by tensors without data.
    """
    inside = EagerTraffic()
    with _disable_current_modes(), record_op_launches(ARCH, inside) as launches:
        args, kwargs = tree_map(_on_meta, (args, kwargs))
        call(*args, **kwargs)
    return [*map(launch_traffic, launches), *inside.kernels]


# Operators that fused kernels are not named after.
_UNNAMED = {
    "clone",
    "convert_element_type",
    "expand",
    "full",
    "permute",
    "reshape",
    "scalar_tensor",
    "squeeze",
    "unsqueeze",
    "view",
}


def inductor_traffic(lowering: Any) -> list[Kernel]:
    """Count the kernels of a graph that Inductor has scheduled, except this project's.

    Args:
        lowering: a ``torch._inductor.graph.GraphLowering`` after code generation.
    """
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    found = []
    with V.set_graph_handler(lowering):
        for node in lowering.scheduler.nodes:
            extern = isinstance(node, ExternKernelSchedulerNode)
            operator = getattr(node.node, "op_overload", None) if extern else None
            if isinstance(node, NopKernelSchedulerNode) or (extern and isinstance(node.node, ir.MultiOutput)):
                continue
            if getattr(operator, "namespace", "") == "dfkd_fast" and not is_library_call(operator):
                continue
            if extern:
                name = getattr(operator, "_opname", None) or node.node.python_kernel_name.rpartition(".")[2]
            else:
                origins = {origin for each in node.get_nodes() if each.node is not None for origin in each.node.origins}
                names = {each.target._opname for each in origins if isinstance(each.target, torch._ops.OpOverload)}
                name = "+".join(sorted(names - _UNNAMED or names) or ["copy"])
            read, written = node.get_read_buffer_sizes(), node.get_write_buffer_sizes()
            found.append(Kernel(name, "library" if extern else "inductor", float(read), float(written)))
    return found
