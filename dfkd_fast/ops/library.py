"""Operators of the torch library ``dfkd_fast``: what stands between a kernel and autograd, torch.compile and vmap.

An operator is functional: it allocates its results and has a kernel fill them. The fake implementation that
``torch.compile`` traces with is that same allocation, so that strides cannot differ between the two.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "FusedFunction", "no_second_derivative", "operator", "recorded", "unserved"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run in its interpreter, on the CPU; Triton reads the same variable, once, likewise."""

_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LIBRARY = torch.library.Library("dfkd_fast", "FRAGMENT")

Results = Tensor | tuple[Tensor, ...]


_recording = False


@contextmanager
def recorded(arch: int) -> Iterator[list[Any]]:
    """Inside, ops on meta tensors write down the launches that they would make; see :mod:`dfkd_fast.kernels.common`.

    Args:
        arch: the architecture that they are chosen for: 90 for sm_90.
    """
    from dfkd_fast.kernels.common import recording

    global _recording
    _recording = True
    try:
        with recording(arch) as launches:
            yield launches
    finally:
        _recording = False


def operator(schema: str, allocate: Callable[..., Results], launch: Callable[..., None]) -> Any:
    """Define an operator.

    Args:
        schema: name, arguments and results, as torch.library takes them. Nothing may be mutated.
        allocate: takes the operator's arguments, returns its results, not filled. Also run on fake tensors, so that it
            must not look at values.
        launch: takes the arguments and the results, and fills them.

    Returns:
        The operator, to be called with the arguments.
    """
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Results:
        results = allocate(*arguments)
        launch(*arguments, *((results,) if isinstance(results, Tensor) else results))
        return results

    def fake(*arguments: Any) -> Results:
        results = allocate(*arguments)
        if _recording:
            launch(*arguments, *((results,) if isinstance(results, Tensor) else results))
        return results

    def one_by_one(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Results, Any]:
        """For vmap: kernels have one batch dimension of their own, and take no further one."""
        each = [
            overload(
                *(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)),
            )
            for i in range(info.batch_size)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        stacked = tuple(torch.stack(column) for column in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)

    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"dfkd_fast::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.dfkd_fast, name).default
    torch.library.register_vmap(f"dfkd_fast::{name}", one_by_one, lib=_LIBRARY)
    return overload


class FusedFunction(torch.autograd.Function):
    """Base of the autograd Functions of the fused backends, which also work under torch.func's transforms."""

    generate_vmap_rule = True


class _Once(FusedFunction):
    """The identity on gradients; going back through it is an error."""

    @staticmethod
    def forward(op: str, gradient: Tensor, *origins: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: fused backends have no second derivative; use backend='reference', which has them all"
        )


def no_second_derivative(op: str, gradients: Sequence[Tensor | None], *origins: Tensor | None) -> Any:
    """Gradients on their way out of a backward, such that differentiating them says why it cannot be done.

    Args:
        op: name of the public op.
        gradients: what the backward computed.
        *origins: what it was computed from, upstream gradient included.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        # The usual backward records nothing; the compiled one refuses a second derivative by itself.
        return tuple(gradients)
    return tuple(None if g is None else _Once.apply(op, g, *origins) for g in gradients)


def unserved(*tensors: Tensor | None) -> str | None:
    """Why Triton's kernels cannot take these tensors; None where they can."""
    if not _TRITON:
        return "triton is not installed"
    if _recording:
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            return f"its kernels take float16, bfloat16 and float32, not {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.is_cuda and not (INTERPRETED and tensor.device.type == "cpu"):
            return f"its kernels run on CUDA devices, not on {tensor.device.type}"
        if tensor.is_cuda and INTERPRETED:
            return "TRITON_INTERPRET=1 is set, and the interpreter is for CPU tensors"
    return None
