"""spatial_attention against Eq. 6 of the paper in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, assert_no_worse, unit_roundoff, value_and_gradients

from .table import assert_matches, attention

FORMS = ("spatial", "spatial_mean1", "channel")


def definition(features, hidden, weight, bias, scale, form):
    """Compute each row of the softmax in turn."""
    n, c, h, w = features.shape
    logits = torch.einsum("ck,nkhw->nchw", weight, hidden)
    if bias is not None:
        logits = logits + bias.reshape(1, c, 1, 1)
    rows = logits.reshape(n, c, h * w)
    if form == "channel":
        rows = rows.transpose(1, 2)
    gates = []
    for sample in rows:
        for row in sample:
            e = torch.exp(row - row.detach().max())
            gates.append(e / e.sum())
    gate = torch.stack(gates).reshape(rows.shape) if gates else rows
    gate = gate.transpose(1, 2) if form == "channel" else gate * (h * w if form == "spatial_mean1" else 1)
    return features + scale * gate.reshape(n, c, h, w) * features


def make(shape=(2, 8, 4, 4), *, dtype=torch.float64, requires_grad=False, **options):
    return attention(shape, dtype=dtype, needs_grad=(0, 1, 2, 3) if requires_grad else (), **options)(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", MAP_SHAPES.values(), ids=MAP_SHAPES)
def test_value_and_gradients_match_formula(shape, bias, form):
    inputs = make(shape, bias=bias)
    # With a scale near the number of positions, the gate is about 1.
    scale = float(shape[2] * shape[3]) if form == "spatial" else 0.7
    op = partial(ops.spatial_attention, scale=scale, form=form)
    assert_matches(op, lambda *a: definition(*a, scale, form), inputs, atol=1e-13, gradient_atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("form", ["spatial", "spatial_mean1"])
def test_spatial_forms_ignore_bias(backend_and_device, form):
    backend, device = backend_and_device
    f, h, w, b = make((2, 5, 7, 3), dtype=torch.float32, device=device)
    op = lambda *a: ops.spatial_attention(*a, scale=20.0, form=form, backend=backend)  # noqa: E731
    for bias in (1e6 * b, torch.full_like(b, math.inf)):
        assert torch.equal(op(f, h, w, bias), op(f, h, w, None))
    for hidden in (h, 1e30 * h):  # with large values, the gradient of the weight overflows
        inputs = (1e30 * f, hidden, 1e-30 * w, b)
        assert torch.equal(value_and_gradients(op, inputs)[1][3], torch.zeros_like(b))


@pytest.mark.parametrize("form", FORMS)
def test_scale_zero_is_the_identity(form):
    inputs = make()
    assert torch.equal(ops.spatial_attention(*inputs, scale=0.0, form=form), inputs[0])


@pytest.mark.parametrize(("form", "scale"), [("spatial", 56.0 * 56), ("spatial_mean1", 1.0), ("channel", 8.0)])
def test_float32_matches_float64(form, scale):
    """At this scale, the added term is as large as the features, so the test covers all of its digits."""
    inputs = make((2, 8, 56, 56), dtype=torch.float32)
    exact = [t.double() for t in inputs]
    added = ops.spatial_attention(*inputs, scale=scale, form=form).double() - exact[0]
    expected = definition(*exact, scale, form) - exact[0]
    u = unit_roundoff(torch.float32)
    # The absolute error of a logit is the relative error of the gate. Two roundings follow.
    magnitude = float(torch.einsum("ck,nkhw->nchw", exact[2].abs(), exact[1].abs()).max()) + 4
    assert_close(
        added, expected, atol=2 * u * (expected + exact[0]).abs(), rtol=(4 * magnitude + 16) * u, name="out - F"
    )


def test_small_gate_keeps_its_digits_in_float32():
    """The product of features and (1 + gate) would lose two digits of a gate of 1.6e-5."""
    f, h, w, b = make((1, 4, 56, 56), dtype=torch.float32)
    out = ops.spatial_attention(f, h, w, b, scale=0.05, form="spatial").double()
    expected = definition(*(t.double() for t in (f, h, w, b)), 0.05, "spatial")
    assert_close(out, expected, atol=1.01 * unit_roundoff(torch.float32) * expected.abs())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_within_bound(dtype, form):
    inputs = make((2, 8, 9, 7), hidden=4, dtype=dtype)
    exact = [t.double() for t in inputs]
    scale = 63.0 if form == "spatial" else 2.0
    op = lambda *a: ops.spatial_attention(*a, scale=scale, form=form)  # noqa: E731
    (y,), gradients = value_and_gradients(op, inputs)
    (expected,), expected_gradients = value_and_gradients(lambda *a: definition(*a, scale, form), exact)
    assert y.dtype == dtype
    u = unit_roundoff(dtype)
    # Rounding the logits l changes the gate by a relative 2 max |l| u. The result is rounded once.
    logit = float(torch.einsum("ck,nkhw->nchw", exact[2], exact[1]).abs().max())
    assert_close(y, expected, atol=1.05 * (2 * logit * u * (expected - exact[0]).abs() + u * expected.abs()) + 1e-6)
    for got, expected_value, given in zip(gradients, expected_gradients, inputs, strict=True):
        assert got.dtype == given.dtype
        assert (got.double() - expected_value).norm() <= 32 * u * expected_value.norm() + 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_only_dtype_of_product(form):
    inputs = make((2, 8, 6, 6), dtype=torch.float32)
    expected = definition(*(t.double() for t in inputs), 4.0, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.spatial_attention(*inputs, scale=4.0, form=form)
        mixed = ops.spatial_attention(inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:], scale=4.0, form=form)
    assert y.dtype == torch.float32
    assert mixed.dtype == torch.bfloat16
    # Only the matrix product runs in bfloat16: rounding its operands and result by hand gives the same error.
    f, h, w, b = inputs
    logits = torch.einsum("ck,nkhw->nchw", w.bfloat16().double(), h.bfloat16().double()).bfloat16().double()
    b = b[:, None, None] if form == "channel" else 0
    gate = (logits + b).softmax(1) if form == "channel" else (logits.flatten(2)).softmax(2).view_as(logits)
    by_hand = f.double() * (1 + 4.0 * gate * (36 if form == "spatial_mean1" else 1))
    assert_no_worse(y, than=by_hand, truth=expected, factor=1.5)
    assert (y.double() - expected).abs().max() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_result_is_channels_last_with_one_hidden_channel(form):
    y = ops.spatial_attention(*make((2, 7, 5, 3), hidden=1, layout="channels_last"), form=form)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_logits_give_finite_results(form):
    f, h, w, b = make((1, 4, 3, 3), dtype=torch.float32)
    values, gradients = value_and_gradients(lambda *a: ops.spatial_attention(*a, form=form), (f, 1e6 * h, w, b))
    assert all(t.isfinite().all() for t in (*values, *gradients))
