"""Compares the Triton kernels of high_order_attention and its map and MSE variants with the float64 reference."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.ops.custom_op import record_op_launches
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

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
OPS = {"features": ops.high_order_attention, "map": ops.high_order_attention_map, "mse": ops.high_order_attention_mse}
PRODUCTS = ("mm", "addmm")
# Op, mode, channels per tile, shape, and further arguments of `high_order`. Each order occurs in both modes, and with
# tiles of all 20 channels and of 16. The 42 positions do not fill the tiles.
ODD = (2, 20, 3, 7)
CASES = {
    "order 1": ("features", "joint", 16, ODD, {"order": 1, "hidden": 5, "dtype": FLOAT32}),
    "order 1, whole": ("map", "per_order", 32, ODD, {"order": 1, "hidden": 5, "dtype": FLOAT32}),
    "order 2": ("map", "joint", 32, ODD, {"order": 2, "hidden": 17, "dtype": BFLOAT16, "layout": "channels_last"}),
    "order 2, split": (
        *("features", "per_order", 16, ODD),
        {"order": 2, "hidden": 17, "dtype": BFLOAT16, "layout": "channels_last"},
    ),
    "order 3": ("features", "joint", 32, ODD, {"hidden": 5, "dtype": FLOAT16, "layout": "strided"}),
    "order 3, split": ("map", "joint", 16, ODD, {"hidden": 16, "dtype": BFLOAT16}),
    "order 3, per order, whole": ("map", "per_order", 32, ODD, {"hidden": 16, "dtype": BFLOAT16}),
    "order 3, per order, split": (
        *("features", "per_order", 16, ODD),
        {"hidden": 5, "dtype": FLOAT16, "layout": "strided"},
    ),
    # Products of four factors vary so much that one element could dominate: hence the scale.
    **{
        name: ("features", mode, block, ODD, {"order": 4, "hidden": 3, "layout": "transposed", "scale": 0.5})
        for name, mode, block in (("order 4", "joint", 16), ("order 4, whole", "per_order", 32))
    },
    **{
        name: ("features", "joint", 16, shape, {"dtype": DTYPES[i % 3]})
        for i, (name, shape) in enumerate(MAP_SHAPES.items())
    },
    **{
        f"mse, {layout}, {mode}, {block}": ("mse", mode, block, (2, 20, 3, 3), {"dtype": dtype, "layout": layout})
        for dtype, layout in zip(DTYPES, ("transposed", "channels_last", "strided"), strict=True)
        for mode in ("joint", "per_order")
        for block in (16, 32)
    },
    **{
        f"mse, {shape}, {dtype}": ("mse", "joint", 16, shape, {"order": 2, "scale": 0.5, "dtype": dtype})
        for shape, dtype in (((1, 1, 1, 1), FLOAT32), ((1, 1, 1, 1), BFLOAT16), ((2, 3, 1, 2), FLOAT16))
    },
}


@pytest.mark.parametrize("case", CASES)
def test_matches_float64_reference(kernel_device, case):
    name, mode, block, shape, drawn = CASES[case]
    # With few elements or a scalar result, the reference's error can be small by chance.
    draws = 16 if math.prod(shape) < 30 else 8 if name == "mse" else 2
    with high_order_tiles(block):
        inputs = high_order(shape, device=kernel_device, target=name == "mse", **drawn)
        assert_backend_no_worse(partial(OPS[name], mode=mode), inputs, draws=draws)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_features_and_weights(kernel_device, layout):
    """The heuristic chooses the tiles."""

    def inputs(seed):
        x, *weights = high_order((2, 8, 4, 3), dtype=torch.bfloat16, device=kernel_device)(seed)
        other = "transposed" if layout == "channels_last" else layout
        return with_layout(x, layout), *(with_layout(weight, other) for weight in weights)

    assert_backend_no_worse(OPS["map" if layout == "offset" else "features"], inputs, draws=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_target_may_have_its_own_layout(kernel_device, layout):
    *leaves, target = high_order((2, 6, 3, 4), target=True, layout="channels_last", device=kernel_device)(1)
    got, expected = (
        value_and_gradients(lambda *a, t=t: ops.high_order_attention_mse(*a, t, backend="triton"), leaves)
        for t in (with_layout(target, layout), target)
    )
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert_close(a, b, atol=1e-6)


def test_order_5_raises(kernel_device):
    for name, function in OPS.items():
        inputs = high_order((1, 4, 2, 2), order=5, device=kernel_device, target=name == "mse")(1)
        with pytest.raises(
            RuntimeError, match=r"does not support .* high_order_.*: its kernels support orders up to 4, not 5"
        ):
            function(*inputs, backend="triton")


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "expanded"])
def test_grad_output_in_any_layout(kernel_device, layout):
    inputs = [t.requires_grad_() for t in high_order((2, 6, 3, 4), device=kernel_device)(1)]
    g = random(2, 6, 3, 4, device=kernel_device, seed=9)
    g = g[:1, :1, :1, :1].expand_as(g) if layout == "expanded" else with_layout(g, layout)
    got, expected = (
        torch.autograd.grad(ops.high_order_attention(*inputs, backend=backend), inputs, g)
        for backend in ("triton", "reference")
    )
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(("channels", "whole"), [(64, True), (512, False)])
def test_skips_gradients_that_are_not_needed(channels, whole):
    x, *weights = (t.to("meta") for t in high_order((2, channels, 4, 4), dtype=torch.bfloat16)(1))

    def launches(*leaves):
        """Launches of backward by kernel, and the shapes of its products."""
        for t in (x, *weights):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        with record_op_launches(90) as made, ExitStack() as stack:
            y = ops.high_order_attention(x, *weights, backend="triton")
            forward = len(made)
            products = [stack.enter_context(mock.patch.object(torch, f, wraps=getattr(torch, f))) for f in PRODUCTS]
            torch.autograd.grad(y, leaves, torch.empty_like(y))
        shapes = [tuple(call.kwargs["out"].shape) for each in products for call in each.call_args_list]
        return {launch.kernel.__name__: launch for launch in made[forward:]}, shapes

    features, products = launches(x)
    only_out, products_out = launches(weights[1])
    if whole:
        assert list(features) == ["_whole_backward_kernel"]
        assert all(features["_whole_backward_kernel"].arguments[name] is None for name in ("dl_ptr", "du_ptr"))
        assert only_out["_weights_kernel"].arguments["du_ptr"] is None
        assert products == products_out == []
    else:
        factors, gradient, dproj, dout = (32, 768), (32, 512), (768, 512), (512, 384)
        assert list(features) == ["_split_gate_kernel", "_split_hidden_kernel"]
        assert features["_split_gate_kernel"].arguments["a_ptr"] is None
        assert products == [factors, gradient]
        assert list(only_out) == ["_split_gate_kernel"]
        assert only_out["_split_gate_kernel"].arguments["y"].data is None
        assert products_out == [factors, dout]
        assert launches(weights[0])[1] == [factors, dproj]
        assert launches(x, *weights)[1] == [factors, dout, dproj, gradient]


@pytest.mark.parametrize(("block", "mode"), [(16, "joint"), (32, "per_order"), (32, "joint")])
def test_extreme_features(kernel_device, mode, block):
    """Gates saturate, products are large, one factor is zero, and finally one feature is NaN."""
    x, proj, out = high_order((2, 20, 2, 3), device=kernel_device)(1)
    x[0] *= 1e4
    x[1, :, 0, 0] = 0
    proj[3] = 0
    op = partial(ops.high_order_attention, mode=mode, backend="triton")
    with high_order_tiles(block):
        found = value_and_gradients(op, (x, proj, out))
        expected = value_and_gradients(partial(op, backend="reference"), (x, proj, out))
        for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert a.isfinite().all()
            assert_close(a, b, atol=1e-4 * float(b.abs().max()))
        x[1, 3, 1, 2] = torch.nan
        nan = op(x, proj, out).isnan()
    assert nan[1, :, 1, 2].all()
    assert nan.sum() == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(kernel_device, dtype):
    """Only the products run in the autocast dtype: the result has x's dtype, and each gradient its input's."""

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
    inputs = [t.detach() for t in high_order((2, 4, 2, 2), target=True, device=kernel_device)(1)]
    with torch.autocast(kernel_device, torch.bfloat16):
        rounded = ops.high_order_attention_mse(*inputs, backend="triton")
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - ops.high_order_attention_mse(*inputs, backend="triton")).abs() < 0.05


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
def test_float32_uses_tf32_only_if_torch_allows_it(monkeypatch):
    inputs = high_order((4, 64, 14, 14), device="cuda")(1)
    exact = ops.high_order_attention(*(t.double() for t in inputs))
    errors = []
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        errors.append((ops.high_order_attention(*inputs, backend="triton").double() - exact).abs().max())
    assert errors[0] < 64 * unit_roundoff(torch.float32) < errors[1]
