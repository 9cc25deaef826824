"""The kernels of batchnorm_statistics and channel_statistics against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import (
    LAYOUTS,
    MAP_SHAPES,
    assert_backend_no_worse,
    assert_close,
    random,
    unit_roundoff,
    value_and_gradients,
    with_layout,
)

from ..ops.table import DTYPES, call_norm, maps, norm

ACTIVATIONS = ("none", "relu", "relu6")


SINGLE, BRAIN, HALF = DTYPES
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}
FORMS = (("none", False), ("relu", True), ("relu6", False), ("none", True), ("relu", False), ("relu6", True))
# Each shape, with a dtype and a form in turn; each dtype and each layout with each activation; residuals that lie in
# another way; more tiles than programs, with vectors and without; channels that no block divides.
CASES = {
    **{
        name: (shape, *FORMS[i % 6], {"dtype": DTYPES[(i + i // 6) % 3]})
        for i, (name, shape) in enumerate(SHAPES.items())
    },
    **{
        f"{dtype}, {activation}": ((3, 7, 5, 3), activation, residual, {"dtype": dtype})
        for dtype in DTYPES
        for activation, residual in FORMS[:3]
    },
    **{
        f"{layout}, {activation}": ((3, 13, 5, 3), activation, (i + j) % 2 == 0, {"layout": layout})
        for i, layout in enumerate(LAYOUTS)
        for j, activation in enumerate(ACTIVATIONS)
    },
    **{
        f"{layout} with {other}": ((3, 16, 4, 2), "relu6", True, {"layout": layout, "other_layout": other})
        for layout, other in (
            ("channels_last", "contiguous"),
            ("contiguous", "channels_last"),
            ("channels_last", "strided"),
            ("offset", "transposed"),
        )
    },
    "more tiles than programs": ((40, 24, 7, 5), "relu", True, {"dtype": BRAIN, "layout": "channels_last"}),
    "more tiles, contiguous": ((5, 8, 24, 24), "relu", True, {"dtype": BRAIN}),
    "odd channels": ((1, 70, 50, 3), "relu", True, {"dtype": BRAIN, "layout": "channels_last"}),
    "odd channels, contiguous": ((1, 70, 50, 3), "relu", True, {"dtype": BRAIN}),
}


def call(*inputs, activation="relu", backend="triton"):
    return call_norm(*inputs, activation=activation, backend=backend)


def fused(activation):
    return lambda *inputs, backend="triton": call(*inputs, activation=activation, backend=backend)


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(kernel_device, case):
    shape, activation, residual, drawn = CASES[case]
    inputs = norm(shape, residual=residual, device=kernel_device, **drawn)
    assert_backend_no_worse(fused(activation), inputs, draws=2 if math.prod(shape) > 60 else 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((3, 7, 5, 3), SINGLE, "contiguous"),
        ((3, 7, 5, 3), BRAIN, "channels_last"),
        ((3, 7, 5, 3), HALF, "strided"),
        ((9, 40, 4, 4), SINGLE, "channels_last"),
        ((9, 40, 4, 4), BRAIN, "strided"),
        ((9, 40, 4, 4), HALF, "contiguous"),
    ],
)
def test_channel_statistics_are_no_worse(kernel_device, shape, dtype, layout):
    inputs = maps(shape, dtype=dtype, layout=layout, shift=2.0, device=kernel_device)
    assert_backend_no_worse(ops.channel_statistics, inputs)


@pytest.mark.parametrize(
    ("results", "residual", "activation"),
    [
        ((0,), False, "relu"),
        ((0,), True, "none"),
        ((1,), False, "relu6"),
        ((1,), True, "relu"),
        ((2,), False, "none"),
        ((2,), True, "relu6"),
        ((1, 2), True, "none"),
        ((0, 1), False, "relu6"),
        ((0, 1), True, "relu"),
        ((0, 2), False, "none"),
        ((0, 2), True, "relu6"),
    ],
)
def test_each_upstream_gradient_alone(kernel_device, results, residual, activation):
    made = norm((3, 9, 4, 2), residual=residual, device=kernel_device)(0)
    kept = [t if i in (0, 3, 4, 5) else None for i, t in enumerate(made) if t is not None and t.requires_grad]
    leaves = [t for t in kept if t is not None]
    found, expected = (
        torch.autograd.grad(
            [call(*made, activation=activation, backend=backend)[i] for i in results],
            leaves,
            [random(*((3, 9, 4, 2) if i == 0 else (9,)), seed=i + 1, device=kernel_device) for i in results],
            allow_unused=True,
        )
        for backend in ("triton", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        if b is None or a is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_statistics_of_a_jump(kernel_device):
    """The first tile says nothing of what comes after it."""
    x = random(64, 8, 6, 6, seed=3, layout="channels_last", device=kernel_device)
    x[1:] += 1000
    _, var = ops.channel_statistics(x, backend="triton")
    assert_close(var, x.double().var((0, 2, 3), unbiased=False), atol=0.0, rtol=64 * unit_roundoff(torch.float32))


def test_vectors_of_any_dtype(kernel_device):
    x, rm, rv, w, b, res = norm((3, 9, 4, 2), dtype=torch.bfloat16, residual=True, device=kernel_device)(0)
    given = (x, rm.double(), rv.half(), w.double(), b.float(), res.float())
    found, expected = (value_and_gradients(lambda *a, n=n: call(*a, backend=n), given) for n in ("triton", "reference"))
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            assert_close(a, b, atol=2e-2 if b.dtype == torch.bfloat16 else 1e-4, rtol=1e-2)


def test_upstream_gradients_of_any_layout(kernel_device):
    made = norm((3, 8, 4, 2), residual=True, layout="channels_last", device=kernel_device)(0)
    dy = random(3, 8, 4, 2, seed=9, device=kernel_device)
    expected = torch.autograd.grad(call(*made, backend="reference")[0], [made[0], made[5]], dy)
    for layout in (*LAYOUTS, "expanded"):
        given, expected_value = (
            with_layout(dy, layout) if layout != "expanded" else dy[:, :, :1, :1].expand_as(dy),
            expected,
        )
        if layout == "expanded":
            expected_value = torch.autograd.grad(call(*made, backend="reference")[0], [made[0], made[5]], given.clone())
        found = torch.autograd.grad(call(*made)[0], [made[0], made[5]], given)
        for a, b in zip(found, expected_value, strict=True):
            assert_close(a, b, atol=1e-5, name=layout)


def test_no_mask_is_kept_where_no_gradient_can_come(kernel_device):
    made = norm((2, 9, 3, 2), residual=True, device=kernel_device)(0)
    with torch.no_grad():
        assert call(*made)[0].grad_fn is None
    y = call(*made)[0]
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8]
    assert [t.numel() for t in kept] == [2 * 2 * 6]  # a bit an element, channels rounded up to a byte


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_more_than_two_to_the_31_elements(layout):
    memory = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
    x = torch.empty(70, 64, 704, 704, dtype=torch.bfloat16, device="cuda", memory_format=memory)
    assert x.numel() > 2**31
    x.normal_().requires_grad_()
    zero, one = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y, mean, var = ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, activation="relu", backend="triton")
    dx = torch.autograd.grad((y, var), x, (torch.ones_like(y), torch.ones_like(var)))[0]
    end = x[-1].detach().float()
    assert_close(y[-1], end.relu(), atol=0.05)
    assert_close(dx[-1], (end > 0).float(), atol=1e-2)
    assert_close(mean, 0.0, atol=1e-3)
    assert_close(var, 1.0, atol=1e-3)
