"""Triton's kernels of high_order_attention and high_order_attention_map against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.ops.custom_op import recorded
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

from ..ops.table import DTYPES, high_order, high_order_tiles

MODES = ("joint", "per_order")
SINGLE, BRAIN, HALF = DTYPES
PUBLIC = {"features": ops.high_order_attention, "map": ops.high_order_attention_map}


def no_worse(name, mode, inputs, draws=2):
    assert_backend_no_worse(lambda *a, backend: PUBLIC[name](*a, mode=mode, backend=backend), inputs, draws=draws)


# 37 positions a sample and 20 channels: several tiles, none of them full. Each order with both modes, both results, and
# with tiles of all channels and of some.
CASES = {
    "order 1": ("features", "joint", 16, {"order": 1, "hidden": 5, "dtype": SINGLE}),
    "order 1, whole": ("map", "per_order", 32, {"order": 1, "hidden": 5, "dtype": SINGLE}),
    "order 2": ("map", "joint", 32, {"order": 2, "hidden": 17, "dtype": BRAIN, "layout": "channels_last"}),
    "order 2, split": (
        "features",
        "per_order",
        16,
        {"order": 2, "hidden": 17, "dtype": BRAIN, "layout": "channels_last"},
    ),
    "order 3": ("features", "joint", 32, {"hidden": 5, "dtype": HALF, "layout": "strided"}),
    "order 3, split": ("map", "joint", 16, {"hidden": 16, "dtype": BRAIN}),
    "order 3, per order, whole": ("map", "per_order", 32, {"hidden": 16, "dtype": BRAIN}),
    "order 3, per order, split": ("features", "per_order", 16, {"hidden": 5, "dtype": HALF, "layout": "strided"}),
    "order 4": ("features", "joint", 16, {"order": 4, "hidden": 3, "dtype": SINGLE, "layout": "transposed"}),
    "order 4, whole": ("features", "per_order", 32, {"order": 4, "hidden": 3, "dtype": SINGLE, "layout": "transposed"}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(kernel_device, case):
    name, mode, block, drawn = CASES[case]
    # Products of four factors vary so much that one element would decide.
    inputs = high_order((2, 20, 3, 7), device=kernel_device, scale=0.5 if drawn.get("order") == 4 else 1.0, **drawn)
    with high_order_tiles(block):
        no_worse(name, mode, inputs)


@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_shapes(kernel_device, shape):
    number, dimensions = list(MAP_SHAPES).index(shape), MAP_SHAPES[shape]
    inputs = high_order(dimensions, dtype=DTYPES[number % 3], device=kernel_device)
    # Few elements have an error by luck: it takes many to say how large it is.
    with high_order_tiles(16):
        no_worse("features", "joint", inputs, draws=16 if math.prod(dimensions) < 30 else 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernel_device, layout):
    """As chosen by rule, and weights laid out in every way too."""

    def inputs(seed):
        x, *weights = high_order((2, 8, 4, 3), dtype=torch.bfloat16, device=kernel_device)(seed)
        other = "transposed" if layout == "channels_last" else layout
        return with_layout(x, layout), *(with_layout(weight, other) for weight in weights)

    no_worse("map" if layout == "offset" else "features", "joint", inputs)


def test_orders_that_are_not_served(kernel_device):
    for name, function in (*PUBLIC.items(), ("mse", ops.high_order_attention_mse)):
        inputs = high_order((1, 4, 2, 2), order=5, device=kernel_device, target=name == "mse")(1)
        with pytest.raises(
            RuntimeError, match=r"does not support .* high_order_.*: its kernels support orders up to 4, not 5"
        ):
            function(*inputs, backend="triton")


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "expanded"])
def test_gradients_that_come_in_any_layout(kernel_device, layout):
    inputs = [t.requires_grad_() for t in high_order((2, 6, 3, 4), device=kernel_device)(1)]
    grad_output = random(2, 6, 3, 4, device=kernel_device, seed=9)
    grad_output = (
        grad_output[:1, :1, :1, :1].expand(2, 6, 3, 4) if layout == "expanded" else with_layout(grad_output, layout)
    )
    got, expected = (
        torch.autograd.grad(ops.high_order_attention(*inputs, backend=backend), inputs, grad_output)
        for backend in ("triton", "reference")
    )
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(("channels", "whole"), [(64, True), (512, False)])
def test_nothing_is_computed_that_is_not_wanted(channels, whole):
    x, *weights = (t.to("meta") for t in high_order((2, channels, 4, 4), dtype=torch.bfloat16)(1))

    def launches(*leaves):
        for t in (x, *weights):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        with recorded(90) as made:
            y = ops.high_order_attention(x, *weights, backend="triton")
            forward = len(made)
            torch.autograd.grad(y, leaves, torch.empty_like(y))
        return {launch.kernel.__name__: launch for launch in made[forward:]}

    features = launches(x)
    assert list(features) == (
        ["_whole_backward_kernel"] if whole else ["_split_hidden_kernel", "_split_gate_kernel", "_split_input_kernel"]
    )
    if whole:
        assert all(features["_whole_backward_kernel"].arguments[name].numel() == 0 for name in ("slopes", "factors"))
    assert "_split_input_kernel" not in launches(*weights)
    only = launches(weights[1])["_weights_kernel"]
    assert not only.constants["NEEDS_GRAD_PROJ"]
    assert only.arguments["factors"].numel() == 0


@pytest.mark.parametrize(("block", "mode"), [(16, "joint"), (32, "per_order"), (32, "joint")])
def test_extreme_features(kernel_device, mode, block):
    """Saturated gates, products near the largest number, a factor of zero, a NaN: as the reference has them."""
    x, proj, out = high_order((2, 20, 2, 3), device=kernel_device)(1)
    x[0] *= 1e4
    x[1, :, 0, 0] = 0
    proj[3] = 0
    with high_order_tiles(block):
        function = lambda *a: ops.high_order_attention(*a, mode=mode, backend="triton")  # noqa: E731
        values, gradients = value_and_gradients(function, (x, proj, out))
        expected, expected_gradients = value_and_gradients(
            lambda *a: ops.high_order_attention(*a, mode=mode), (x, proj, out)
        )
        for got, expected_value in zip((*values, *gradients), (*expected, *expected_gradients), strict=True):
            assert got.isfinite().all()
            assert_close(got, expected_value, atol=1e-4 * float(expected_value.abs().max()))
        x[1, 3, 1, 2] = torch.nan
        at = ops.high_order_attention(x, proj, out, mode=mode, backend="triton").isnan()
    assert at[1, :, 1, 2].all()
    assert at.sum() == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(kernel_device, dtype):
    """The products run in the autocast type, features and result keep theirs, weights get gradients in theirs."""

    def inputs(seed):
        x, *weights = high_order((2, 24, 3, 3), device=kernel_device)(seed)
        return x.to(dtype), *weights

    def function(*arguments, backend):
        with torch.autocast(kernel_device, torch.bfloat16, enabled=arguments[0].dtype != torch.float64):
            return ops.high_order_attention(*arguments, backend=backend)

    with high_order_tiles(32):
        assert_backend_no_worse(function, inputs, draws=2)
    _, gradients = value_and_gradients(lambda *a: function(*a, backend="triton"), inputs(0))
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("channels", [64, 512])
def test_more_than_two_to_the_31_elements(channels):
    n, side = 2**31 // (channels * 2**10) + 3, 32
    dtype = torch.bfloat16
    _, *weights = high_order((1, channels, 1, 1), dtype=dtype, device="cuda")(1)
    x = torch.randn(n, side, side, channels, device="cuda", dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    y = ops.high_order_attention(x, *weights, backend="triton")
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x[-2:].detach().requires_grad_()
    expected = ops.high_order_attention(last, *weights, backend="triton")
    assert_close(y[-2:], expected, atol=0.0)
    assert_close(dx[-2:], torch.autograd.grad(expected, last, expected.detach())[0], atol=0.0)


@pytest.mark.gpu
def test_float32_is_multiplied_in_tf32_only_where_torch_allows_it(monkeypatch):
    inputs = high_order((4, 64, 14, 14), device="cuda")(1)
    exact = ops.high_order_attention(*(t.double() for t in inputs))
    errors = []
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        errors.append((ops.high_order_attention(*inputs, backend="triton").double() - exact).abs().max())
    assert errors[0] < 64 * unit_roundoff(torch.float32) < errors[1]
