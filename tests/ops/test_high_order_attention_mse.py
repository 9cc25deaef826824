"""high_order_attention_mse against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, value_and_gradients

from .table import high_order

MODES = ("joint", "per_order")


def definition(x, proj, out, target, mode):
    """Factor by factor, order by order."""
    factors, first, logits = torch.einsum("fkc,nchw->fnkhw", proj, x), 0, []
    for r in range(1, out.shape[0] + 1):
        logits.append(torch.einsum("ck,nkhw->nchw", out[r - 1], factors[first : first + r].prod(0).clamp(min=0)))
        first += r
    if mode == "joint":
        gate = 1 / (1 + torch.exp(-sum(logits)))
    else:
        gate = sum(1 / (1 + torch.exp(-each)) for each in logits) / len(logits)
    return ((gate * x - target) ** 2).sum() / x.numel()


def make(shape=(2, 8, 4, 4), **options):
    """All but the target require a gradient."""
    return high_order(shape, dtype=torch.float64, target=True, **options)(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize(
    "shape", [s for s in MAP_SHAPES.values() if s[0]], ids=[n for n, s in MAP_SHAPES.items() if s[0]]
)
def test_value_and_gradients_follow_the_formula(shape, order, mode):
    inputs = make(shape, order=order)
    values, gradients = value_and_gradients(lambda *a: ops.high_order_attention_mse(*a, mode=mode), inputs)
    expected, expected_gradients = value_and_gradients(lambda *a: definition(*a, mode), inputs)
    assert_close(values[0], expected[0], atol=1e-13, rtol=1e-13)
    assert gradients[3] is None
    for got, expected_value in zip(gradients[:3], expected_gradients[:3], strict=True):
        assert_close(got, expected_value, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_once_and_twice(mode):
    inputs = make((2, 4, 2, 2), hidden=2)
    assert gradcheck(lambda *a: ops.high_order_attention_mse(*a, mode=mode), inputs)
    assert gradgradcheck(lambda *a: ops.high_order_attention_mse(*a, mode=mode), inputs)


def test_it_is_the_error_of_the_attended_features():
    x, proj, out, target = make((2, 9, 3, 4))
    expected = F.mse_loss(ops.high_order_attention(x, proj, out), target)
    assert_close(ops.high_order_attention_mse(x, proj, out, target), expected, atol=1e-14)


def test_dtypes_and_the_empty_batch():
    x, proj, out, target = (t.detach() for t in make((2, 8, 3, 3)))
    assert ops.high_order_attention_mse(x, proj, out, target.half()).dtype == torch.float64
    assert ops.high_order_attention_mse(x.half(), proj, out, target).dtype == torch.float32
    assert ops.high_order_attention_mse(x[:0], proj, out, target[:0]).isnan()


def test_arguments_are_checked():
    x, proj, out, target = make()
    op = ops.high_order_attention_mse
    with pytest.raises(TypeError, match="target must be a tensor, got float"):
        op(x, proj, out, 1.0)
    with pytest.raises(ValueError, match=r"target must have shape \(N, C, H, W\) with N = 2, C = 8, H = 4, W = 4, got"):
        op(x, proj, out, target[:, :, :2])
    with pytest.raises(ValueError, match="target must be on the device of x, cpu, got meta"):
        op(x, proj, out, target.to("meta"))
    with pytest.raises(ValueError, match=r"target requires a gradient, .*: pass target.detach\(\)"):
        op(x, proj, out, target.requires_grad_())
    with pytest.raises(ValueError, match="out_weight must have shape"):
        op(x, proj, out[:, :7], target.detach())
    with pytest.raises(ValueError, match="mode must be 'joint' or 'per_order', got 'both'"):
        op(x, proj, out, target.detach(), mode="both")
