"""high_order_attention against the formula of the paper, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, unit_roundoff, value_and_gradients

from .table import DTYPES, high_order

MODES = ("joint", "per_order")
PUBLIC = {"features": ops.high_order_attention, "map": ops.high_order_attention_map}


def definition(x, proj_weight, out_weight, mode):
    """y and A, factor by factor, order by order, at rows of features."""
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
def test_value_and_gradients_follow_the_formula(shape, order, mode):
    inputs = make(shape, order=order)
    for which, name in enumerate(PUBLIC):
        values, gradients = value_and_gradients(lambda *a, f=PUBLIC[name]: f(*a, mode=mode), inputs)
        expected, expected_gradients = value_and_gradients(lambda *a, w=which: definition(*a, mode)[w], inputs)
        assert_close(values[0], expected[0], atol=1e-13, rtol=1e-13, name=name)
        for got, expected_value, argument in zip(
            gradients, expected_gradients, ("x", "proj_weight", "out_weight"), strict=True
        ):
            assert_close(got, expected_value, atol=1e-11, rtol=1e-11, name=f"{name}: gradient of {argument}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("function", PUBLIC.values(), ids=PUBLIC)
def test_gradcheck_once_and_twice(function, mode):
    inputs = make((2, 5, 2, 3), hidden=2, requires_grad=True)
    assert gradcheck(lambda *a: function(*a, mode=mode), inputs)
    assert gradgradcheck(lambda *a: function(*a, mode=mode), inputs)


def test_gradients_stay_finite_where_a_factor_is_zero():
    x, proj, out = make((1, 4, 2, 2), hidden=3)
    proj[3] = 0  # the first factor of order 3: z_3 is zero, its derivative in that factor is not formed by dividing
    values, gradients = value_and_gradients(ops.high_order_attention, (x, proj, out))
    assert all(t.isfinite().all() for t in (*values, *gradients))


def error_bound(x, proj, out, u):
    """How far y may be off when both products and y are rounded to unit roundoff u and the rest is exact.

    Each factor is off by u of itself, so z_r by r u, its rounding adds one, the second product sums these over the
    absolute values and rounds once more; the sigmoid's slope is at most 1 / 4. First order in u; 1.1 covers the rest.
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
def test_reduced_precision_stays_within_its_bound(dtype, order):
    inputs = make((2, 24, 7, 5), order=order, dtype=dtype)
    exact = [t.double() for t in inputs]
    y = ops.high_order_attention(*inputs)
    assert y.dtype == dtype
    # In float32 the sums of products round too, once a term.
    u = unit_roundoff(dtype) * (24 if dtype == torch.float32 else 1)
    assert_close(y, definition(*exact, "joint")[0], atol=error_bound(*exact, u) + 1e-6 * (dtype != torch.float32))
    _, gradients = value_and_gradients(ops.high_order_attention, inputs)
    _, expected = value_and_gradients(lambda *a: definition(*a, "joint")[0], exact)
    for got, expected_value, given in zip(gradients, expected, inputs, strict=True):
        assert got.dtype == given.dtype
        # Some dozen roundings lie on the way, each of random sign, in the norm of the gradient; 32 u covers their sum.
        assert (got.double() - expected_value).norm() <= 32 * unit_roundoff(dtype) * expected_value.norm()


def test_autocast_runs_the_products_in_its_type_and_keeps_the_dtype_of_x():
    inputs = make((2, 24, 5, 5), dtype=torch.float32)
    exact = [t.double() for t in inputs]
    plain = ops.high_order_attention(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.high_order_attention(*inputs)
        halved = ops.high_order_attention(inputs[0].bfloat16(), *inputs[1:])
    assert y.dtype == torch.float32
    assert halved.dtype == torch.bfloat16
    error = (y.double() - definition(*exact, "joint")[0]).abs().max()
    assert error > 8 * (plain.double() - definition(*exact, "joint")[0]).abs().max()  # so it did run in bfloat16
    u = unit_roundoff(torch.bfloat16)
    # Inputs and weights are rounded as well here: two more u a factor, one more in the second product.
    assert_close(y, definition(*exact, "joint")[0], atol=3 * error_bound(*exact, u) + 1e-6)


def test_weights_of_another_dtype_are_cast_for_the_product():
    x, proj, out = make((2, 8, 3, 3), dtype=torch.bfloat16)
    y = ops.high_order_attention(x, proj.float(), out.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.high_order_attention(x, proj, out))
    _, gradients = value_and_gradients(ops.high_order_attention, (x, proj.float(), out.float()))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("mode", MODES)
def test_gate_times_features_is_the_result(mode):
    inputs = make((2, 9, 3, 4))
    gate = ops.high_order_attention_map(*inputs, mode=mode)
    assert ((gate >= 0) & (gate <= 1)).all()
    assert_close(gate * inputs[0], ops.high_order_attention(*inputs, mode=mode), atol=1e-15)


def test_zero_weights_halve_the_features():
    x, proj, out = make()
    for mode in MODES:
        assert torch.equal(ops.high_order_attention(x, proj, torch.zeros_like(out), mode=mode), x / 2)


def test_saturated_gate_is_finite():
    x, proj, out = make((1, 8, 2, 2), dtype=torch.float32)
    values, gradients = value_and_gradients(ops.high_order_attention, (x * 1e4, proj, out))
    assert values[0].isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_forward_mode_derivatives():
    x, proj, out = make((3, 4, 2, 2))
    total = lambda w: ops.high_order_attention(x, w, out).square().sum()  # noqa: E731
    _, tangent = torch.func.jvp(total, (proj,), (torch.ones_like(proj),))
    assert_close(tangent, torch.func.grad(total)(proj).sum(), atol=1e-11)


@pytest.mark.parametrize("function", PUBLIC.values(), ids=PUBLIC)
def test_arguments_are_checked(function):
    x, proj, out = make((2, 8, 4, 4))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        function([1.0], proj, out)
    with pytest.raises(TypeError, match=r"x must be of dtype .*, got torch.int64"):
        function(x.long(), proj, out)
    with pytest.raises(TypeError, match=r"out_weight must be of dtype .*, got torch.complex64"):
        function(x, proj, out.to(torch.complex64))
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\), got \(2, 8, 4\)"):
        function(x[..., 0], proj, out)
    with pytest.raises(ValueError, match=r"x must have shape .* nothing but N may be 0, got \(2, 8, 0, 4\)"):
        function(x[:, :, :0], proj, out)
    with pytest.raises(ValueError, match=r"out_weight must have shape \(R, C, K\) with C = 8, got \(3, 7, 2\)"):
        function(x, proj, out[:, :7])
    with pytest.raises(
        ValueError, match=r"proj_weight must have shape .* with R\(R\+1\)/2 = 6, K = 2, C = 8, got \(5, 2"
    ):
        function(x, proj[:5], out)
    with pytest.raises(ValueError, match="proj_weight must be on the device of x, cpu, got meta"):
        function(x, proj.to("meta"), out)
    with pytest.raises(ValueError, match="mode must be 'joint' or 'per_order', got 'both'"):
        function(x, proj, out, mode="both")
