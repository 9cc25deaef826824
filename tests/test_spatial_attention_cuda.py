"""spatial_attention's CUDA kernels on the CPU, under sanitizers, against the reference in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_backend_no_worse, assert_close, random, value_and_gradients

from .host_kernels import HostKernels, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler with sanitizers")

FORMS = ("spatial", "spatial_mean1", "channel")
HALVES = (torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostKernels]:
    folder = tmp_path_factory.getbasetemp().parent / "host"
    running = HostKernels(build(folder, ["spatial_attention.cu", "spatial_attention_bwd.cu"]))
    yield running
    running.close()


def bits(x: Tensor | None) -> np.ndarray | None:
    """What a kernel sees of a tensor: a map channels-last."""
    if x is None:
        return None
    x = (x.detach().permute(0, 2, 3, 1) if x.ndim == 4 else x.detach()).contiguous()
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy().copy()


def unset(x: Tensor) -> np.ndarray:
    """Room for a result like x, NaN before."""
    return bits(torch.full_like(x, torch.nan))


def tensor(values: np.ndarray, like: Tensor) -> Tensor:
    """Back again."""
    x = torch.from_numpy(values)
    x = x if like.dtype == torch.float32 else x.view(like.dtype)
    return x.permute(0, 3, 1, 2) if like.ndim == 4 else x


class Call:
    """A call of the launchers: what forward and backward have in common."""

    def __init__(self, kernels: HostKernels, order: int, *arguments: Any) -> None:
        self.kernels, self.order = kernels, order
        self.tensors = arguments[:4]
        features, hidden, weight, bias = self.tensors
        scale, form = arguments[4:]
        n, c, h, w = features.shape
        self.sizes = n, c, hidden.shape[1], h * w
        types = [CODES[t.dtype] for t in (features, weight, weight if bias is None else bias)]
        self.numbers = *types, float(scale), FORMS.index(form)

    def scratch(self, name: str) -> np.ndarray:
        """As much as asked for and no more; NaN. A size comes back as what the launcher of a kernel would fail with."""
        size = 0
        try:
            self.kernels(name, *self.sizes, self.numbers[-1])
        except ValueError as found:
            size = int(re.findall(r"\d+", str(found))[-1])
        assert size % 16 == 0
        return np.full(size // 4, np.nan, dtype=np.float32)

    def forward(self) -> tuple[Tensor, np.ndarray]:
        features = self.tensors[0]
        out, saved = unset(features), np.full((2, *self.sizes[:2]), np.nan, dtype=np.float32)
        given = [bits(t) for t in self.tensors]
        scratch = self.scratch("dfkd_spatial_attention_scratch")
        arguments = (*given, *self.sizes, *self.numbers, out, saved, scratch, None)
        self.kernels("dfkd_spatial_attention", *arguments, order=self.order)
        return tensor(out, features), saved

    def backward(self, upstream: Tensor, saved: np.ndarray, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        given = [bits(t) for t in self.tensors]
        results = [unset(t) if want else None for t, want in zip(self.tensors, wanted, strict=True)]
        scratch = self.scratch("dfkd_spatial_attention_backward_scratch")
        arguments = (bits(upstream), *given, saved, *self.sizes, *self.numbers, *results, scratch, None)
        self.kernels("dfkd_spatial_attention_backward", *arguments, order=self.order)
        return [None if r is None else tensor(r, t) for r, t in zip(results, self.tensors, strict=True)]


class Hosted(torch.autograd.Function):
    """The op through the launchers."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.call = Call(*arguments)
        out, ctx.saved = ctx.call.forward()
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        wanted = ctx.needs_input_grad[2:6]
        return None, None, *ctx.call.backward(upstream, ctx.saved, wanted), None, None


@pytest.fixture(scope="module")
def op(kernels: HostKernels) -> Callable[..., Tensor]:
    def spatial_attention(*tensors, scale, form, backend="cuda", order=0):
        if backend == "cuda":
            return Hosted.apply(kernels, order, *tensors, scale, form)
        return ops.spatial_attention(*tensors, scale=scale, form=form, backend=backend)

    return spatial_attention


def near(form, shape):
    """A scale at which what is added to the features is as large as they are."""
    return {"spatial": float(shape[2] * shape[3]), "spatial_mean1": 1.0, "channel": float(shape[1])}[form]


def maker(shape, *, hidden=3, dtype=torch.bfloat16, bias=True, only=None, parameters=None):
    """For :func:`assert_backend_no_worse`: logits of standard deviation 1, and gradients to all or some inputs."""
    n, c, h, w = shape

    def make(seed):
        own = parameters or dtype
        inputs = [
            random(*shape, layout="channels_last", seed=seed, dtype=dtype),
            random(n, hidden, h, w, layout="channels_last", seed=seed + 1, dtype=dtype),
            random(c, hidden, seed=seed + 2, scale=hidden**-0.5, dtype=own),
            random(c, seed=seed + 3, dtype=own) if bias else None,
        ]
        for i in only or ():
            inputs[i].requires_grad_()
        return inputs

    return make


def no_worse(op, make, form, shape, *, scale=None, draws=1):
    """out, what of it is added to the features, and the gradients."""
    scale = near(form, shape) if scale is None else scale

    def both(f, *others, backend):
        y = op(f, *others, scale=scale, form=form, backend=backend)
        # Whatever lies beside it: memory formats are the operator's affair.
        y = y.clone(memory_format=torch.contiguous_format)
        return y, y.to(torch.promote_types(y.dtype, torch.float32)) - f

    assert_backend_no_worse(both, make, backend="cuda", draws=draws)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_are_no_worse_than_the_reference(op, dtype, form):
    shape = (2, 19, 5, 4)
    no_worse(op, maker(shape, dtype=dtype), form, shape, draws=2)


# Channels in whole vectors or not, by two, four and eight warps, and more than a block has; narrow maps in one or more
# steps of a product, in whole vectors or not, and more than a block has gradients of. Positions of several tiles and
# chunks of them.
TILES = {
    "chunks": ((1, 40, 19, 27), 8),
    "samples": ((2, 24, 9, 17), 5),
    "four warps along channels": ((1, 104, 7, 11), 16),
    "eight": ((1, 136, 5, 9), 17),
    "narrow maps shared out": ((1, 50, 9, 15), 40),
    "many": ((1, 33, 3, 5), 72),
}
LARGER = {
    "all of eight": ((2, 256, 5, 13), 32),
    "all of four": ((2, 128, 13, 15), 16),
    "all of two": ((2, 64, 24, 25), 8),
    "many in tiles": ((2, 100, 13, 11), 128),
}


@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize(("shape", "hidden"), TILES.values(), ids=TILES)
def test_kernels_on_more_than_one_tile(op, shape, hidden, form):
    no_worse(op, maker(shape, hidden=hidden), form, shape)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize(("shape", "hidden"), LARGER.values(), ids=LARGER)
def test_kernels_on_larger_tiles(op, shape, hidden, form):
    no_worse(op, maker(shape, hidden=hidden), form, shape, draws=2)


@pytest.mark.parametrize(
    ("channels", "hidden"), [(264, 3), pytest.param(140, 72, marks=pytest.mark.slow)], ids=["256", "128"]
)
def test_more_channels_than_a_block_has(op, channels, hidden):
    shape = (1, channels, 5, 7)
    no_worse(op, maker(shape, hidden=hidden, dtype=torch.float16), "spatial", shape)


@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize("shape", MAP_SHAPES.values(), ids=MAP_SHAPES)
def test_kernels_on_awkward_shapes(op, shape, form):
    no_worse(op, maker(shape, hidden=1 if form == "channel" else 3), form, shape, scale=1.5)


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_parameters_of_another_type(op, form):
    shape = (2, 8, 5, 4)
    for own in (torch.float32, torch.float16):
        no_worse(op, maker(shape, parameters=own), form, shape)
    no_worse(op, maker(shape, parameters=torch.float32, bias=False), form, shape)


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_gradients_to_any_of_the_inputs(op, form):
    """Which of them are wanted changes nothing in the rest, and nothing else is written."""
    shape = (1, 19, 4, 3)
    call = lambda *a: op(*a, scale=5.0, form=form)  # noqa: E731
    whole = value_and_gradients(call, maker(shape)(0))[1]
    for only in ((0,), (1,), (2,), (3,), (0, 2)):
        for j, gradient in enumerate(value_and_gradients(call, maker(shape, only=only)(0))[1]):
            assert (gradient is None) == (j not in only)
            assert gradient is None or torch.equal(gradient, whole[j])
    if form == "spatial":
        assert whole[3].abs().max() == 0


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_no_samples_have_gradients_of_zero(op, form):
    y, gradients = value_and_gradients(lambda *a: op(*a, scale=5.0, form=form), maker((0, 5, 3, 2))(0))
    assert y[0].shape == (0, 5, 3, 2)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_a_softmax_over_one_has_no_gradient(op, form):
    """To the bit: what is left of q - D there is nothing but rounding, and scale makes it as large as one likes."""
    shape = (2, 11, 1, 1) if form == "spatial" else (2, 1, 3, 5)
    inputs = maker(shape)(0)
    (y,), gradients = value_and_gradients(lambda *a: op(*a, scale=0.3, form=form), inputs)
    assert_close(y, 1.3 * inputs[0].float(), atol=0, rtol=2**-8)
    assert all((g == 0).all() for g in gradients[1:])


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_kernels_on_extreme_logits(op, form):
    for factor in (1e6, 1e30):
        f, h, w, b = maker((1, 4, 5, 3))(0)
        h = factor * h
        values, gradients = value_and_gradients(lambda *a: op(*a, scale=0.05, form=form), (f, h, w, b))
        assert all(t.isfinite().all() for t in (*values, *gradients))
        wanted = ops.spatial_attention(*(t.double() for t in (f, h, w, b)), form=form)
        assert_close(values[0], wanted, atol=0.01 if factor < 1e7 else 0.05 * 4, rtol=2**-8)
    h[0, 0, 0, 0] = torch.nan
    y = op(f, h, w, b, scale=0.05, form=form)
    assert torch.equal(y.isnan(), ops.spatial_attention(f, h, w, b, form=form, backend="reference").isnan())


def test_small_shares_keep_their_digits(op):
    """Logits far below the first tile's, of a chunk of its own: nothing is lost where chunks are merged."""
    f, h, w, b = maker((1, 8, 24, 24), hidden=2)(0)
    h[:, :, 12:] -= 20 * w.float().sign().mean(0).sign().to(h.dtype)[:, None, None]
    y = op(f, h, w, b, scale=1e6, form="spatial")
    wanted = ops.spatial_attention(*(t.double() for t in (f, h, w, b)), scale=1e6, form="spatial")
    assert_close(y, wanted, atol=1e-30, rtol=2**-7)


def test_a_bias_over_positions_counts_for_nothing(op):
    f, h, w, b = maker((2, 5, 7, 3))(0)
    plain = op(f, h, w, None, scale=20.0, form="spatial")
    for bias in (1e6 * b, torch.full_like(b, torch.inf)):
        assert torch.equal(op(f, h, w, bias, scale=20.0, form="spatial"), plain)


def test_maxima_and_sums_are_saved(kernels):
    f, h, w, b = maker((2, 11, 13, 23))(0)
    saved = torch.from_numpy(Call(kernels, 0, f, h, w, b, 1.0, "spatial").forward()[1]).double()
    logits = torch.einsum("ck,nkp->ncp", w.double(), h.double().flatten(2))
    assert_close(saved[0], logits.amax(2), atol=1e-5)
    assert_close(saved[1], (logits - logits.amax(2, keepdim=True)).exp().sum(2), atol=0, rtol=1e-5)


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_the_order_of_threads_changes_nothing(op, form):
    """Several tiles to a chunk and chunks to a sample: buffers are used again, parts are merged."""
    inputs = maker((1, 40, 19, 27), hidden=8)(0)
    runs = [value_and_gradients(lambda *a, i=i: op(*a, scale=9.0, form=form, order=i), inputs) for i in (0, 1, 7)]
    for other in runs[1:]:
        for a, b in zip((*runs[0][0], *runs[0][1]), (*other[0], *other[1]), strict=True):
            assert torch.equal(a, b)


def test_what_is_not_supported_is_refused(kernels):
    for shape, hidden, form, dtype in (
        ((1, 257, 2, 2), 3, "channel", torch.bfloat16),
        ((1, 129, 2, 2), 65, "channel", torch.bfloat16),
        ((1, 3, 2, 2), 129, "spatial", torch.bfloat16),
        ((1, 3, 2, 2), 2, "spatial", torch.float32),
    ):
        call = Call(kernels, 0, *maker(shape, hidden=hidden, dtype=dtype)(0), 1.0, form)
        with pytest.raises(ValueError, match="dfkd_spatial_attention returned 1"):
            call.forward()
        with pytest.raises(ValueError, match="dfkd_spatial_attention_backward returned 1"):
            call.backward(call.tensors[0], np.zeros(1, dtype=np.float32), (True, True, True, True))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 19)),
    hidden=st.integers(1, 40),
    dtype=st.sampled_from(HALVES),
    form=st.sampled_from(FORMS),
)
def test_sweep(op, shape, hidden, dtype, form):
    no_worse(op, maker(shape, hidden=hidden, dtype=dtype), form, shape, draws=2)
