"""Values with gradients, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.testing.compare import assert_close
from dfkd_fast.testing.inputs import random

__all__ = ["assert_compiles", "value_and_gradients"]


def value_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None], *, seed: int = 1
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Outputs of a function, and the gradients of its inputs for a random upstream gradient (never all ones).

    Args:
        function: takes the inputs, returns a tensor or a tuple of them.
        inputs: tensors, or None for an argument left out. Gradients are taken of those that require one; where none
            does, of all. The same seed gives the same upstream gradients whatever the dtype.
        seed: of the upstream gradients.

    Returns:
        The outputs, detached, as a tuple; the gradients, one an input, None for inputs that take none.
    """
    some = any(t is not None and t.requires_grad for t in inputs)
    leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad or not some) for t in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    upstream = [
        random(*output.shape, dtype=output.dtype, device=output.device, seed=seed + i, shift=0.5)
        for i, output in enumerate(outputs)
    ]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, wanted, upstream))
    return (
        tuple(output.detach() for output in outputs),
        tuple(next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves),
    )


def assert_compiles(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    calls: Sequence[Sequence[Tensor | None]],
    *,
    backend: str = "aot_eager",
    dynamic: bool | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
) -> Any:
    """Forward and backward of ``torch.compile(function, fullgraph=True)`` equal those of the function itself.

    Args:
        function: takes the inputs, returns a tensor or a tuple of them.
        calls: the inputs of each call, one after the other on one compiled function.
        backend: of torch.compile.
        dynamic: as there.
        atol: as in :func:`assert_close`.
        rtol: likewise.

    Returns:
        The compiled function.

    Raises:
        AssertionError: an output or a gradient differs.
        torch._dynamo.exc.Unsupported: there is a graph break.
    """
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for i, inputs in enumerate(calls):
        wanted, wanted_gradients = value_and_gradients(function, inputs)
        values, gradients = value_and_gradients(compiled, inputs)
        for j, (a, b) in enumerate(zip(values, wanted, strict=True)):
            assert_close(a, b, atol=atol, rtol=rtol, name=f"call {i}, output {j}")
        for j, (g, h) in enumerate(zip(gradients, wanted_gradients, strict=True)):
            if g is not None and h is not None:
                assert_close(g, h, atol=atol, rtol=rtol, name=f"call {i}, gradient of input {j}")
    return compiled
