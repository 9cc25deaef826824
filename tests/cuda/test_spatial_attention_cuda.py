"""spatial_attention's CUDA kernels on the CPU, under sanitizers, against the reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse, assert_close, value_and_gradients

from ..ops.table import attention, near

KERNELS = "spatial_attention"
FORMS = ("spatial", "spatial_mean1", "channel")  # the last one is not served

SERVED = FORMS[:2]
ORDERS = (0, 1, 7)
HALVES = (torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def bits(x):
    """What a kernel sees of a tensor: a map channels-last."""
    if x is None:
        return None
    x = (x.detach().permute(0, 2, 3, 1) if x.ndim == 4 else x.detach()).contiguous()
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy().copy()


def unset(x):
    """Room for a result like x, NaN before."""
    return bits(torch.full_like(x, torch.nan))


def tensor(values, like):
    """Back again."""
    x = torch.from_numpy(values)
    x = x if like.dtype == torch.float32 else x.view(like.dtype)
    return x.permute(0, 3, 1, 2) if like.ndim == 4 else x


class Call:
    """A call of the launchers: what forward and backward have in common."""

    def __init__(self, kernels, order, *arguments):
        self.kernels, self.order = kernels, order
        self.tensors = arguments[:4]
        features, hidden, weight, bias = self.tensors
        scale, form = arguments[4:]
        n, c, h, w = features.shape
        self.sizes = n, c, hidden.shape[1], h * w
        self.types = [CODES[t.dtype] for t in (features, weight, weight if bias is None else bias)]
        self.numbers = float(scale), FORMS.index(form)

    def forward(self):
        features = self.tensors[0]
        out, saved = unset(features), np.full((2, *self.sizes[:2]), np.nan, dtype=np.float32)
        given = [bits(t) for t in self.tensors[:3]]
        arguments = (*given, *self.sizes, *self.types[:2], *self.numbers, out, saved, None)
        self.kernels("dfkd_spatial_attention", *arguments, order=self.order)
        return tensor(out, features), saved

    def backward(self, grad_output, saved, expected):
        given = [bits(t) for t in self.tensors[:3]]
        results = [
            unset(t) if expected_value else None for t, expected_value in zip(self.tensors, expected, strict=True)
        ]
        scratch = self.kernels.scratch("dfkd_spatial_attention_backward_scratch", *self.sizes, self.numbers[-1])
        assert scratch.size % 16 == 0
        arguments = (bits(grad_output), *given, saved, *self.sizes, *self.types, *self.numbers, *results, scratch, None)
        self.kernels("dfkd_spatial_attention_backward", *arguments, order=self.order)
        return [None if r is None else tensor(r, t) for r, t in zip(results, self.tensors, strict=True)]


class Hosted(torch.autograd.Function):
    """The op through the launchers."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.call = Call(*arguments)
        out, ctx.saved = ctx.call.forward()
        return out

    @staticmethod
    def backward(ctx, grad_output):
        expected = ctx.needs_input_grad[2:6]
        return None, None, *ctx.call.backward(grad_output, ctx.saved, expected), None, None


@pytest.fixture
def op(kernels):
    def spatial_attention(*tensors, scale, form, backend="cuda", order=0):
        if backend == "cuda":
            return Hosted.apply(kernels, order, *tensors, scale, form)
        return ops.spatial_attention(*tensors, scale=scale, form=form, backend=backend)

    return spatial_attention


def drawn(shape, *, hidden=8, dtype=torch.bfloat16, **options):
    return attention(shape, hidden=hidden, dtype=dtype, layout="channels_last", **options)


def no_worse(op, make, form, shape, *, scale=None, draws=1):
    """out, what of it is added to the features, and the gradients."""
    scale = near(form, shape) if scale is None else scale

    def both(f, *others, backend):
        y = op(f, *others, scale=scale, form=form, backend=backend)
        # Whatever lies beside it: memory formats are the operator's affair.
        y = y.clone(memory_format=torch.contiguous_format)
        return y, y.to(torch.promote_types(y.dtype, torch.float32)) - f

    assert_backend_no_worse(both, make, backend="cuda", draws=draws)


@pytest.mark.parametrize(("dtype", "form"), zip(HALVES, SERVED, strict=True))
def test_kernels_are_no_worse_than_the_reference(op, dtype, form):
    shape = (2, 24, 5, 4)
    no_worse(op, drawn(shape, hidden=8, dtype=dtype), form, shape)


# One, two and four panels of channels, not full; narrow maps of each width; teams of one, two and four blocks, and more
# samples than there are teams; samples of one tile and of more tiles than there are blocks.
SHAPES = {
    "one panel": ((1, 64, 23, 25), 8),
    "more tiles than blocks": ((1, 40, 31, 33), 16),
    "two panels": ((2, 104, 13, 17), 24),
    "three of four panels": ((1, 168, 9, 11), 40),
    "more samples than teams": ((5, 8, 3, 7), 8),
    "teams in turn": ((3, 8, 39, 40), 8),
    "panels of 64 narrow maps": ((1, 64, 13, 25), 64),
}
LARGER = {
    "four panels": ((3, 256, 13, 15), 32),
    "many tiles": ((2, 72, 40, 31), 16),
    "samples in turn": ((7, 128, 12, 13), 16),
}


@pytest.mark.parametrize(("shape", "hidden"), SHAPES.values(), ids=SHAPES)
def test_kernels_on_several_tiles(op, shape, hidden):
    no_worse(op, drawn(shape, hidden=hidden), "spatial", shape)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "hidden"), LARGER.values(), ids=LARGER)
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_on_larger_maps(op, shape, hidden, dtype):
    no_worse(op, drawn(shape, hidden=hidden, dtype=dtype), "spatial_mean1", shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_with_parameters_of_another_type(op, dtype):
    shape = (1, 16, 3, 5)
    no_worse(op, drawn(shape, hidden=8, parameters=dtype), "spatial", shape)


@pytest.mark.parametrize("only", [(0,), (1,), (2,), (0, 3)])
def test_kernels_make_only_what_is_wanted(op, only):
    shape = (2, 72, 6, 12)
    no_worse(op, drawn(shape, hidden=8, needs_grad=only), "spatial", shape)


def test_gradients_to_any_of_the_inputs(op):
    """Which of them are wanted changes nothing in the rest, and nothing else is written."""
    shape = (1, 24, 4, 3)
    call = lambda *a: op(*a, scale=5.0, form="spatial")  # noqa: E731
    whole = value_and_gradients(call, drawn(shape)(0))[1]
    for only in ((0,), (1,), (2,), (3,), (0, 2)):
        for j, gradient in enumerate(value_and_gradients(call, drawn(shape, needs_grad=only)(0))[1]):
            assert (gradient is None) == (j not in only)
            assert gradient is None or torch.equal(gradient, whole[j])
    assert whole[3].abs().max() == 0


def test_no_samples(op):
    values, gradients = value_and_gradients(
        lambda *a: op(*a, scale=1.0, form="spatial"), drawn((0, 8, 3, 3), hidden=8)(0)
    )
    assert values[0].shape == (0, 8, 3, 3)
    assert all((g == 0).all() for g in gradients)


def test_a_softmax_over_one_has_no_gradient(op):
    inputs = drawn((2, 16, 1, 1), hidden=8)(0)
    (y,), gradients = value_and_gradients(lambda *a: op(*a, scale=0.3, form="spatial"), inputs)
    assert_close(y, 1.3 * inputs[0].float(), atol=0, rtol=2**-8)
    assert all((g == 0).all() for g in gradients[1:])


def test_kernels_on_extreme_logits(op):
    for factor in (1e6, 1e30):
        f, h, w, b = drawn((1, 8, 9, 8), hidden=8)(0)
        h = factor * h
        values, gradients = value_and_gradients(lambda *a: op(*a, scale=0.05, form="spatial"), (f, h, w, b))
        assert all(t.isfinite().all() for t in (*values, *gradients))
        expected = ops.spatial_attention(*(t.double() for t in (f, h, w, b)), form="spatial")
        assert_close(values[0], expected, atol=0.01 if factor < 1e7 else 0.05 * 4, rtol=2**-8)
    h[0, 0, 0, 0] = torch.nan
    y = op(f, h, w, b, scale=0.05, form="spatial")
    assert torch.equal(y.isnan(), ops.spatial_attention(f, h, w, b, form="spatial", backend="reference").isnan())


def test_maxima_that_grow_and_fall(op):
    """Logits that a lane meets in a bad order: far above those before, then far below."""
    f, h, w, b = drawn((1, 8, 40, 16), hidden=8)(0)
    towards = w.float().mean(0).to(h.dtype)[:, None, None]
    h[:, :, 16:24] += 90 * towards
    h[:, :, 32:] -= 90 * towards
    y = op(f, h, w, b, scale=1e6, form="spatial")
    expected = ops.spatial_attention(*(t.double() for t in (f, h, w, b)), scale=1e6, form="spatial")
    assert_close(y, expected, atol=1e-30, rtol=2**-7)


def test_a_bias_over_positions_counts_for_nothing(op):
    f, h, w, b = drawn((1, 16, 7, 3), hidden=8)(0)
    plain = op(f, h, w, None, scale=20.0, form="spatial")
    assert torch.equal(op(f, h, w, torch.full_like(b, torch.inf), scale=20.0, form="spatial"), plain)


def test_maxima_and_sums_are_saved(kernels):
    f, h, w, b = drawn((2, 72, 13, 11), hidden=16)(0)
    saved = torch.from_numpy(Call(kernels, 0, f, h, w, b, 1.0, "spatial").forward()[1]).double()
    logits = torch.einsum("ck,nkp->ncp", w.double(), h.double().flatten(2))
    assert_close(saved[0], logits.amax(2), atol=1e-5)
    assert_close(saved[1], (logits - logits.amax(2, keepdim=True)).exp().sum(2), atol=0, rtol=1e-5)


def test_the_order_of_threads_changes_nothing(op):
    """Nor do copies and products that are early or late: stages are used again, blocks wait for each other."""
    inputs = drawn((3, 72, 19, 14), hidden=8)(0)
    runs = [value_and_gradients(lambda *a, i=i: op(*a, scale=9.0, form="spatial", order=i), inputs) for i in ORDERS]
    for other in runs[1:]:
        for a, b in zip((*runs[0][0], *runs[0][1]), (*other[0], *other[1]), strict=True):
            assert torch.equal(a, b)


def test_what_is_not_served_is_refused(kernels):
    for shape, hidden, form, dtype, said in (
        ((1, 264, 2, 2), 8, "spatial", torch.bfloat16, r"C of features .* is 264; .* multiples of 8 up to 256"),
        ((1, 20, 2, 2), 8, "spatial", torch.bfloat16, "C of features .* is 20"),
        ((1, 16, 2, 2), 12, "spatial", torch.bfloat16, "K of hidden .* is 12; .* multiples of 8 up to 64"),
        ((1, 16, 2, 2), 72, "spatial", torch.bfloat16, "K of hidden .* is 72"),
        ((1, 16, 2, 2), 8, "channel", torch.bfloat16, "form is 'channel'; the kernel supports 'spatial' and"),
        ((1, 16, 2, 2), 8, "spatial", torch.float32, "dtype must be float16 or bfloat16"),
    ):
        call = Call(kernels, 0, *drawn(shape, hidden=hidden, dtype=dtype)(0), 1.0, form)
        with pytest.raises(ValueError, match=f"dfkd_spatial_attention returned 1: {said}"):
            call.forward()
        with pytest.raises(ValueError, match=f"dfkd_spatial_attention_backward returned 1: {said}"):
            call.backward(call.tensors[0], np.zeros(1, dtype=np.float32), (True, True, True, True))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 32), st.integers(1, 15), st.integers(1, 19)),
    hidden=st.integers(1, 8),
    dtype=st.sampled_from(HALVES),
    form=st.sampled_from(SERVED),
)
def test_sweep(op, shape, hidden, dtype, form):
    shape = (shape[0], 8 * shape[1], *shape[2:])
    no_worse(op, drawn(shape, hidden=8 * hidden, dtype=dtype), form, shape)
