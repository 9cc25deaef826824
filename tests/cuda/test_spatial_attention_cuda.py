"""Compares the CUDA kernels of spatial_attention, run on the CPU under sanitizers, with the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse, assert_close, value_and_gradients

from ..ops.table import attention, near
from .host_function import HostFunction

KERNELS = "spatial_attention"
FORMS = ("spatial", "spatial_mean1", "channel")
SUPPORTED = FORMS[:2]
DTYPES = (torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def dense(x):
    """Maps in channels-last layout, other tensors contiguous."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def unset(x):
    """An output like x, filled with NaN."""
    return torch.full_like(x, torch.nan)


class Op:
    """Calls the launchers like ``ops.spatial_attention``, with gradients."""

    def __init__(self, kernels, *, scale, form="spatial", order=0):
        self.kernels, self.scale, self.form, self.order = kernels, scale, form, order
        self.options = float(scale), FORMS.index(form)

    def __call__(self, *tensors, backend="cuda"):
        if backend == "cuda":
            return HostFunction.apply(self, *tensors)
        return ops.spatial_attention(*tensors, scale=self.scale, form=self.form, backend=backend)

    def sizes(self, features, hidden):
        n, c, h, w = features.shape
        return n, c, hidden.shape[1], h * w

    def forward(self, features, hidden, weight, bias):
        sizes, dtypes = self.sizes(features, hidden), (CODES[features.dtype], CODES[weight.dtype])
        features, hidden, weight = map(dense, (features, hidden, weight))
        out, saved = unset(features), torch.full((2, *sizes[:2]), torch.nan)
        arguments = (features, hidden, weight, *sizes, *dtypes, *self.options, out, saved, None)
        self.kernels("dfkd_spatial_attention", *arguments, order=self.order)
        return out, saved

    def backward(self, grad_output, features, hidden, weight, bias, saved, needs_grad=(True, True, True, True)):
        sizes = self.sizes(features, hidden)
        dtypes = [CODES[t.dtype] for t in (features, weight, weight if bias is None else bias)]
        tensors = [None if t is None else dense(t) for t in (features, hidden, weight, bias)]
        gradients = [unset(t) if needed else None for t, needed in zip(tensors, needs_grad, strict=True)]
        scratch = self.kernels.scratch("dfkd_spatial_attention_backward_scratch", *sizes, self.options[-1])
        assert scratch.size % 16 == 0
        given = dense(grad_output), *tensors[:3], saved
        arguments = (*given, *sizes, *dtypes, *self.options, *gradients, scratch, None)
        self.kernels("dfkd_spatial_attention_backward", *arguments, order=self.order)
        return gradients


@pytest.fixture
def op(kernels):
    def spatial_attention(*tensors, backend="cuda", **options):
        return Op(kernels, **options)(*tensors, backend=backend)

    return spatial_attention


def inputs(shape, *, hidden=8, dtype=torch.bfloat16, **options):
    return attention(shape, hidden=hidden, dtype=dtype, layout="channels_last", **options)


def check(op, shape, form="spatial", **options):
    """Checks the output, the term that is added to the features, and the gradients."""

    def both(f, *others, backend):
        y = op(f, *others, scale=near(form, shape), form=form, backend=backend)
        y = y.clone(memory_format=torch.contiguous_format)  # memory formats are tested elsewhere
        return y, y.to(torch.promote_types(y.dtype, torch.float32)) - f

    assert_backend_no_worse(both, inputs(shape, **options), backend="cuda", draws=1)


F16 = {"dtype": torch.float16}
# Shape, hidden maps, form, options of inputs().
CASES = {
    "one tile": ((2, 24, 5, 4), 8, "spatial", {}),
    "one tile, float16": ((2, 24, 5, 4), 8, "spatial_mean1", F16),
    "one box of channels": ((1, 64, 23, 25), 8, "spatial", {}),
    "more tiles than blocks": ((1, 40, 31, 33), 16, "spatial", {}),
    "two boxes": ((2, 104, 13, 17), 24, "spatial", {}),
    "three of four boxes": ((1, 168, 9, 11), 40, "spatial", {}),
    "more samples than block groups": ((5, 8, 3, 7), 8, "spatial", {}),
    "several samples per block group": ((3, 8, 39, 40), 8, "spatial", {}),
    "most hidden maps": ((1, 64, 13, 25), 64, "spatial", {}),
    "float32 parameters": ((1, 16, 3, 5), 8, "spatial", {"parameters": torch.float32}),
    "float16 parameters": ((1, 16, 3, 5), 8, "spatial", {"parameters": torch.float16}),
    **{f"gradients {i}": ((2, 72, 6, 12), 8, "spatial", {"needs_grad": i}) for i in ((0,), (1,), (2,), (0, 3))},
}
SLOW_CASES = {
    f"{name}, {options}": (shape, hidden, "spatial_mean1", options)
    for options in ({}, F16)
    for name, shape, hidden in (
        ("four boxes", (3, 256, 13, 15), 32),
        ("many tiles", (2, 72, 40, 31), 16),
        ("more samples than clusters", (7, 128, 12, 13), 16),
    )
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_errors_are_within_twice_the_references(op, case):
    shape, hidden, form, options = (CASES | SLOW_CASES)[case]
    check(op, shape, form, hidden=hidden, **options)


def test_subsets_of_gradients_are_bitwise_equal(op):
    shape = (1, 24, 4, 3)
    call = lambda *a: op(*a, scale=5.0)  # noqa: E731
    whole = value_and_gradients(call, inputs(shape)(0))[1]
    for needs_grad in ((0,), (1,), (2,), (3,), (0, 2)):
        for j, gradient in enumerate(value_and_gradients(call, inputs(shape, needs_grad=needs_grad)(0))[1]):
            assert (gradient is None) == (j not in needs_grad)
            assert gradient is None or torch.equal(gradient, whole[j])
    assert whole[3].abs().max() == 0


def test_empty_batch_has_zero_parameter_gradients(op):
    (y,), gradients = value_and_gradients(lambda *a: op(*a, scale=1.0), inputs((0, 8, 3, 3))(0))
    assert y.shape == (0, 8, 3, 3)
    assert all((g == 0).all() for g in gradients)


def test_one_position_has_no_softmax_gradient(op):
    given = inputs((2, 16, 1, 1))(0)
    (y,), gradients = value_and_gradients(lambda *a: op(*a, scale=0.3), given)
    assert_close(y, 1.3 * given[0].float(), atol=0, rtol=2**-8)
    assert all((g == 0).all() for g in gradients[1:])


def test_extreme_logits(op):
    for factor in (1e6, 1e30):
        f, h, w, b = inputs((1, 8, 9, 8))(0)
        h = factor * h
        values, gradients = value_and_gradients(lambda *a: op(*a, scale=0.05), (f, h, w, b))
        assert all(t.isfinite().all() for t in (*values, *gradients))
        expected = ops.spatial_attention(*(t.double() for t in (f, h, w, b)), form="spatial")
        assert_close(values[0], expected, atol=0.01 if factor < 1e7 else 0.05 * 4, rtol=2**-8)
    h[0, 0, 0, 0] = torch.nan
    y = op(f, h, w, b, scale=0.05)
    assert torch.equal(y.isnan(), op(f, h, w, b, scale=0.05, backend="reference").isnan())


def test_running_maximum_that_rises_late(op):
    """A lane's logits first rise far above all earlier ones, then fall far below."""
    f, h, w, b = inputs((1, 8, 40, 16))(0)
    towards = w.float().mean(0).to(h.dtype)[:, None, None]
    h[:, :, 16:24] += 90 * towards
    h[:, :, 32:] -= 90 * towards
    expected = ops.spatial_attention(*(t.double() for t in (f, h, w, b)), scale=1e6, form="spatial")
    assert_close(op(f, h, w, b, scale=1e6), expected, atol=1e-30, rtol=2**-7)


def test_bias_is_ignored(op):
    f, h, w, b = inputs((1, 16, 7, 3))(0)
    expected = op(f, h, w, None, scale=20.0)
    assert torch.equal(op(f, h, w, torch.full_like(b, torch.inf), scale=20.0), expected)


def test_forward_saves_row_max_and_row_sum(kernels):
    f, h, w, b = inputs((2, 72, 13, 11), hidden=16)(0)
    row_max, row_sum = Op(kernels, scale=1.0).forward(f, h, w, b)[1]
    logits = torch.einsum("ck,nkp->ncp", w.double(), h.double().flatten(2))
    assert_close(row_max, logits.amax(2), atol=1e-5)
    assert_close(row_sum, (logits - logits.amax(2, keepdim=True)).exp().sum(2), atol=0, rtol=1e-5)


def test_results_do_not_depend_on_thread_order(op):
    """They do not depend on when copies and wgmma complete either. Stages are reused and blocks wait for each other."""
    given = inputs((3, 72, 19, 14))(0)
    runs = [value_and_gradients(lambda *a, i=i: op(*a, scale=9.0, order=i), given) for i in (0, 1, 7)]
    for other in runs[1:]:
        for a, b in zip((*runs[0][0], *runs[0][1]), (*other[0], *other[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 32), st.integers(1, 15), st.integers(1, 19)),
    hidden=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(SUPPORTED),
)
def test_sweep(op, shape, hidden, dtype, form):
    check(op, (shape[0], 8 * shape[1], *shape[2:]), form, hidden=8 * hidden, dtype=dtype)
