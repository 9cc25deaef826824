"""Computes and compares values and gradients, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.testing.compare import assert_close, assert_no_worse
from dfkd_fast.testing.inputs import random

__all__ = ["assert_backend_no_worse", "assert_compiles", "value_and_gradients"]


def value_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None], *, seed: int = 1
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Return the outputs of a function and the gradients of its inputs for random output gradients.

    Args:
        function: takes the inputs, returns a tensor or a tuple of tensors.
        inputs: tensors of any shape and floating dtype, or None for an omitted argument. If none requires a gradient,
            all are differentiated.
        seed: seed of the output gradients, which are the same in every dtype, up to rounding.

    Returns:
        The outputs, detached, as a tuple; one gradient per input, None for inputs that are not differentiated.

    Raises:
        RuntimeError: an output depends on no differentiated input, or such an input affects no output.
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
    """Assert that a backend's errors against float64 are at most ``factor`` times those of the reference.

    Errors are computed over several draws together, because a single value, such as a loss, can be exact by chance. One
    unit in the last place of the largest true value is always allowed.

    Args:
        function: takes the inputs and ``backend``.
        inputs: returns the inputs for a seed, see :func:`value_and_gradients`.
        backend: the backend to test.
        draws: number of draws.
        factor: allowed ratio of errors.

    Returns:
        The largest ratio of root mean square errors, backend to reference, over all values and gradients.

    Raises:
        AssertionError: an error is larger than allowed, or a dtype, shape or memory format differs from the reference.
    """
    columns: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(draws):
        given = inputs(10 * seed)
        exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
        results = []
        for tensors, name in ((given, backend), (given, "reference"), (exact, "reference")):
            values, gradients = value_and_gradients(partial(function, backend=name), tensors)
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
        actual, plain, truth = (torch.cat([t.flatten() for t in column]) for column in zip(*rows, strict=True))
        # The mean of an empty tensor is NaN in every dtype.
        number = ~truth.isnan()
        if not actual[~number].isnan().all():
            raise AssertionError(f"{name}: expected NaN")
        actual, plain, truth = actual[number], plain[number], truth[number]
        ulp = torch.finfo(actual.dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
        ratio = max(ratio, assert_no_worse(actual, than=plain, truth=truth, factor=factor, floor=ulp, name=name))
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
    """Assert that ``torch.compile(function, fullgraph=True)`` gives the same values and gradients as the function.

    Args:
        function: takes the inputs, returns a tensor or a tuple of tensors.
        calls: inputs of successive calls of the compiled function, see :func:`value_and_gradients`.
        backend: backend of torch.compile.
        dynamic: whether torch.compile uses dynamic shapes.
        atol: absolute tolerance, as in :func:`assert_close`.
        rtol: relative tolerance.

    Returns:
        The compiled function.

    Raises:
        AssertionError: an output or a gradient differs.
        torch._dynamo.exc.Unsupported: there is a graph break (torch has no public name for this exception).
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
