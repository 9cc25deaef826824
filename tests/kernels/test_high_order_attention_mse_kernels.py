"""The Triton kernels of high_order_attention_mse against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, assert_backend_no_worse, assert_close, value_and_gradients, with_layout

from ..ops.table import high_order, high_order_tiles

MODES = ("joint", "per_order")
drawn = partial(high_order, target=True)


def no_worse(mode, inputs, draws):
    function = lambda *a, backend: ops.high_order_attention_mse(*a, mode=mode, backend=backend)  # noqa: E731
    assert_backend_no_worse(function, inputs, draws=draws)


@pytest.mark.parametrize(
    ("dtype", "layout", "block", "mode"),
    [
        (torch.float32, "transposed", 16, "joint"),
        (torch.float32, "transposed", 32, "per_order"),
        (torch.bfloat16, "channels_last", 32, "joint"),
        (torch.bfloat16, "channels_last", 16, "per_order"),
        (torch.float16, "strided", 16, "per_order"),
        (torch.float16, "strided", 32, "joint"),
    ],
)
def test_no_worse_than_the_reference(kernel_device, dtype, layout, block, mode):
    with high_order_tiles(block):
        no_worse(mode, drawn((2, 20, 3, 3), dtype=dtype, layout=layout, device=kernel_device), draws=8)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 1, 1, 1), torch.float32), ((1, 1, 1, 1), torch.bfloat16), ((2, 3, 1, 2), torch.float16)]
)
def test_few_elements(kernel_device, shape, dtype):
    with high_order_tiles(16):
        no_worse("joint", drawn(shape, order=2, dtype=dtype, device=kernel_device, scale=0.5), draws=16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_and_target_may_lie_differently(kernel_device, layout):
    x, proj, out, target = drawn((2, 6, 3, 4), layout="channels_last", device=kernel_device)(1)
    got, expected = (
        value_and_gradients(lambda *a, t=t: ops.high_order_attention_mse(*a, t, backend="triton"), (x, proj, out))
        for t in (with_layout(target, layout), target)
    )
    assert_close(got[0][0], expected[0][0], atol=1e-6)
    for a, b in zip(got[1], expected[1], strict=True):
        assert_close(a, b, atol=1e-6)


def test_function_transforms_and_autocast(kernel_device):
    x, proj, out, target = (t.detach() for t in drawn((2, 4, 2, 2), device=kernel_device)(1))
    op = ops.high_order_attention_mse
    got, expected = (
        torch.func.grad(lambda w, b=b: op(x, w, out, target, backend=b))(proj) for b in ("triton", "reference")
    )
    assert_close(got, expected, atol=1e-5)
    each = torch.func.vmap(lambda a, t: op(a[None], proj, out, t[None], backend="triton"))(x, target)
    assert_close(each.mean(), op(x, proj, out, target), atol=1e-5)
    with torch.autocast(kernel_device, torch.bfloat16):
        rounded = op(x, proj, out, target, backend="triton")
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - each.mean()).abs() < 0.05
