"""high_order_attention against the formula of the paper in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, unit_roundoff, value_and_gradients

from .table import DTYPES, assert_matches, high_order

MODES = ("joint", "per_order")


def definition(x, proj_weight, out_weight, mode):
    """Compute y and A, one factor at a time."""
    rows = x.movedim(1, -1)
    order = out_weight.shape[0]
    factor, logits = 0, []
    for r in range(1, order + 1):
        z = torch.ones((), dtype=x.dtype)
        for _ in range(r):
            z = z * (rows @ proj_weight[factor].T)
            factor += 1
        logits.append(torch.where(z > 0, z, torch.zeros_like(z)) @ out_weight[r - 1].T)
    assert factor == proj_weight.shape[0]
    if mode == "joint":
        gate = 1 / (1 + torch.exp(-sum(logits)))
    else:
        gate = sum(1 / (1 + torch.exp(-each)) for each in logits) / order
    return (gate * rows).movedim(-1, 1), gate.movedim(-1, 1)


def make(shape=(2, 8, 4, 4), *, dtype=torch.float64, requires_grad=False, **options):
    return high_order(shape, dtype=dtype, needs_grad=(0, 1, 2) if requires_grad else (), **options)(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", MAP_SHAPES.values(), ids=MAP_SHAPES)
def test_value_and_gradients_match_formula(shape, order, mode):
    inputs = make(shape, order=order)
    for i, function in enumerate((ops.high_order_attention, ops.high_order_attention_map)):
        formula = lambda *a, i=i: definition(*a, mode)[i]  # noqa: E731
        assert_matches(partial(function, mode=mode), formula, inputs, atol=1e-13, gradient_atol=1e-11, rtol=1e-11)


def test_values_and_gradients_are_finite_for_a_zero_factor_and_a_saturated_gate():
    x, proj, out = make((1, 4, 2, 2), hidden=3, dtype=torch.float32)
    without_factor = proj.clone()
    without_factor[3] = 0  # first factor of order 3; its gradient must not be computed as the product divided by it
    for inputs in ((x, without_factor, out), (x * 1e4, proj, out)):
        values, gradients = value_and_gradients(ops.high_order_attention, inputs)
        assert all(t.isfinite().all() for t in (*values, *gradients))


def error_bound(x, proj, out, u):
    """Bound the error of y if only the matrix products and y are rounded, with unit roundoff u.

    Each factor has relative error u, so the product of order r has r u, plus one u for its rounding. The second matrix
    product adds these errors and one rounding. The sigmoid's slope is at most 1 / 4. 1.1 covers higher powers of u.
    """
    factors = torch.einsum("fkc,nchw->fnkhw", proj, x)
    logits, error, first = 0, 0, 0
    for r in range(1, out.shape[0] + 1):
        rectified = factors[first : first + r].prod(0).relu()
        logits = logits + torch.einsum("ck,nkhw->nchw", out[r - 1], rectified)
        error = error + (r + 1) * u * torch.einsum("ck,nkhw->nchw", out[r - 1].abs(), rectified)
        first += r
    return 1.1 * (x.abs() * (error + u * logits.abs()) / 4 + u * (logits.sigmoid() * x).abs())


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision_stays_within_bound(dtype, order):
    inputs = make((2, 24, 7, 5), order=order, dtype=dtype)
    exact = [t.double() for t in inputs]
    y = ops.high_order_attention(*inputs)
    assert y.dtype == dtype
    # In float32 each term of a sum is rounded too.
    u = unit_roundoff(dtype) * (24 if dtype == torch.float32 else 1)
    assert_close(y, definition(*exact, "joint")[0], atol=error_bound(*exact, u) + 1e-6 * (dtype != torch.float32))
    _, gradients = value_and_gradients(ops.high_order_attention, inputs)
    _, expected = value_and_gradients(lambda *a: definition(*a, "joint")[0], exact)
    for got, expected_value, given in zip(gradients, expected, inputs, strict=True):
        assert got.dtype == given.dtype
        # 32 u covers about a dozen roundings with random signs, in the norm of the gradient.
        assert (got.double() - expected_value).norm() <= 32 * unit_roundoff(dtype) * expected_value.norm()


def test_autocast_changes_only_dtype_of_products():
    inputs = make((2, 24, 5, 5), dtype=torch.float32)
    exact = [t.double() for t in inputs]
    plain = ops.high_order_attention(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.high_order_attention(*inputs)
        halved = ops.high_order_attention(inputs[0].bfloat16(), *inputs[1:])
    assert y.dtype == torch.float32
    assert halved.dtype == torch.bfloat16
    error = (y.double() - definition(*exact, "joint")[0]).abs().max()
    assert error > 8 * (plain.double() - definition(*exact, "joint")[0]).abs().max()  # it ran in bfloat16
    u = unit_roundoff(torch.bfloat16)
    # Inputs and weights are rounded too: two more u per factor, and one in the second product.
    assert_close(y, definition(*exact, "joint")[0], atol=3 * error_bound(*exact, u) + 1e-6)


def test_weights_are_cast_to_dtype_of_x():
    x, proj, out = make((2, 8, 3, 3), dtype=torch.bfloat16)
    y = ops.high_order_attention(x, proj.float(), out.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.high_order_attention(x, proj, out))
    _, gradients = value_and_gradients(ops.high_order_attention, (x, proj.float(), out.float()))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_forward_mode_derivative_matches_gradient():
    x, proj, out = make((3, 4, 2, 2))
    total = lambda w: ops.high_order_attention(x, w, out).square().sum()  # noqa: E731
    _, tangent = torch.func.jvp(total, (proj,), (torch.ones_like(proj),))
    assert_close(tangent, torch.func.grad(total)(proj).sum(), atol=1e-11)
