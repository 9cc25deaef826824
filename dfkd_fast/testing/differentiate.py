"""Values with gradients, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.testing.compare import assert_close, assert_no_worse
from dfkd_fast.testing.inputs import random

__all__ = ["assert_backend_no_worse", "assert_compiles", "value_and_gradients"]


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
    grad_output = [
        random(*output.shape, dtype=output.dtype, device=output.device, seed=seed + i, shift=0.5)
        for i, output in enumerate(outputs)
    ]
    expected = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, expected, grad_output))
    return (
        tuple(output.detach() for output in outputs),
        tuple(next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves),
    )


def assert_backend_no_worse(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Callable[[int], Sequence[Tensor | None]],
    *,
    backend: str = "triton",
    draws: int = 4,
    factor: float = 2.0,
) -> float:
    """Values and gradients of a backend err at most ``factor`` times as far from float64 as the reference's.

    Errors are taken over several draws together, since a single number, a loss say, can be exact by luck. One unit in
    the last place of the largest true value is always allowed.

    Args:
        function: takes the inputs and ``backend``.
        inputs: takes a seed; those that require a gradient, or all where none does, are differentiated.
        backend: the one under test.
        draws: how many seeds, from 0.
        factor: how many times worse is still right.

    Returns:
        The largest ratio of root mean square errors, the backend's over the reference's, of all values and gradients.

    Raises:
        AssertionError: it is worse, or a result has another dtype, shape or memory format than the reference's.
    """
    columns: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(draws):
        given = inputs(10 * seed)
        exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
        results = []
        for tensors, name in ((given, backend), (given, "reference"), (exact, "reference")):
            values, gradients = value_and_gradients(
                lambda *a, name=name: function(*a, backend=name),
                tensors,
            )
            named = {f"output {i}": value for i, value in enumerate(values)}
            results.append(named | {f"gradient of input {i}": g for i, g in enumerate(gradients) if g is not None})
        for name, value in results[0].items():
            plain = results[1][name]
            if (value.dtype, value.shape, value.device) != (plain.dtype, plain.shape, plain.device):
                raise AssertionError(f"{name}: {value.dtype} {value.shape}, reference {plain.dtype} {plain.shape}")
            if name.startswith("output") and value.stride() != plain.stride():
                raise AssertionError(f"{name}: strides {value.stride()}, reference {plain.stride()}")
            columns.setdefault(name, []).append((value, plain, results[2][name]))
    ratio = 0.0
    for name, rows in columns.items():
        mine, plain, truth = (torch.cat([t.flatten() for t in column]) for column in zip(*rows, strict=True))
        # The mean of nothing is no number, in any dtype.
        number = ~truth.isnan()
        if not mine[~number].isnan().all():
            raise AssertionError(f"{name}: a number where there is none")
        mine, plain, truth = mine[number], plain[number], truth[number]
        ulp = torch.finfo(mine.dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
        each = assert_no_worse(mine, than=plain, truth=truth, factor=factor, floor=ulp, name=name)
        ratio = max(ratio, each)
    return ratio


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
        expected, expected_gradients = value_and_gradients(function, inputs)
        values, gradients = value_and_gradients(compiled, inputs)
        for j, (a, b) in enumerate(zip(values, expected, strict=True)):
            assert_close(a, b, atol=atol, rtol=rtol, name=f"call {i}, output {j}")
        for j, (g, h) in enumerate(zip(gradients, expected_gradients, strict=True)):
            if g is not None and h is not None:
                assert_close(g, h, atol=atol, rtol=rtol, name=f"call {i}, gradient of input {j}")
    return compiled
