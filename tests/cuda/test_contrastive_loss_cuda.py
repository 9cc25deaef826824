"""Compares the CUDA kernels of contrastive_loss, run on the CPU by the CPU emulation, with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import (
    assert_backend_no_worse,
    assert_close,
    extreme,
    random,
    unit_roundoff,
    value_and_gradients,
)

from ..ops.table import vectors
from .host_function import HostFunction

KERNELS = "contrastive_loss"

CODES = {torch.float16: 1, torch.bfloat16: 2}
DTYPES = tuple(CODES)
F16, BF16 = DTYPES
REDUCTIONS = ("mean", "sum", "none")
L2_BYTES = 20 << 20


class Op:
    """Calls the launchers like ``ops.contrastive_loss``, with gradients."""

    def __init__(self, kernels, *, order=0, new_gradient=torch.empty_like, **options):
        self.kernels, self.order, self.new_gradient = kernels, order, new_gradient
        self.options = {"temperature": 0.1, "symmetric": False, "reduction": "mean", **options}
        self.symmetric = int(self.options["symmetric"])
        reduction = REDUCTIONS.index(self.options["reduction"])
        self.codes = self.options["temperature"], self.symmetric, 1, reduction

    def __call__(self, anchors, positives, *, backend="cuda"):
        if backend == "cuda":
            return HostFunction.apply(self, anchors, positives)
        return ops.contrastive_loss(anchors, positives, **self.options, backend=backend)

    def scratch(self, name, count, dim, *needs_grad):
        return self.kernels.scratch(name, count, dim, self.symmetric, *needs_grad)

    def forward(self, anchors, positives):
        count, dim = anchors.shape
        saved = torch.full((count * (1 + self.symmetric),), torch.inf)
        out = torch.full_like(saved, torch.inf) if self.options["reduction"] == "none" else torch.tensor(torch.inf)
        sizes = count, dim, *anchors.stride(), *positives.stride(), CODES[anchors.dtype]
        scratch = self.scratch("dfkd_contrastive_loss_scratch", count, dim)
        arguments = (anchors, positives, *sizes, *self.codes, out, saved, scratch, None)
        self.kernels("dfkd_contrastive_loss", *arguments, order=self.order)
        return out, saved

    def backward(self, grad_output, anchors, positives, saved, needs_grad=(True, True)):
        count, dim = anchors.shape
        sizes = count, dim, *anchors.stride(), *positives.stride(), CODES[anchors.dtype]
        both = zip((anchors, positives), needs_grad, strict=True)
        gradients = [self.new_gradient(x).fill_(torch.nan) if needed else None for x, needed in both]
        strides = [step for g in gradients for step in ((0, 0) if g is None else g.stride())]
        grad_output_stride = grad_output.stride(0) if grad_output.ndim else 0
        scratch = self.scratch("dfkd_contrastive_loss_backward_scratch", count, dim, *map(int, needs_grad))
        given = grad_output, grad_output_stride, anchors, positives, saved
        arguments = (*given, *sizes, *self.codes, *gradients, *strides, scratch, None)
        self.kernels("dfkd_contrastive_loss_backward", *arguments, order=self.order)
        return gradients


def results(op, *inputs):
    """The value and both gradients, for a random upstream gradient."""
    (value,), gradients = value_and_gradients(op, inputs)
    return [value, *gradients]


def pair(n, dim, dtype, seed=0, **options):
    return vectors((n, dim), dtype=dtype, **options)(seed)


@pytest.fixture
def launcher(kernels):
    """Sets the number of SMs, the smallest supported N and the cache size that the launchers assume."""

    def configure(*, num_sms=132, min_count=129, l2_bytes=L2_BYTES):
        kernels("dfkd_host_contrastive_loss", num_sms, min_count, l2_bytes)

    yield configure
    configure()


SMALL = {"num_sms": 2, "min_count": 1}


@pytest.fixture
def small(launcher):
    """Supports few vectors, in few blocks."""
    launcher(**SMALL)


SYMMETRIC, NONE = {"symmetric": True}, {"reduction": "none"}
# (N, D), dtype, launcher settings, options, draws
CASES = {
    "one tile": ((5, 7), BF16, SMALL, {}, 3),
    "one tile, symmetric": ((5, 7), F16, SMALL, SYMMETRIC, 3),
    # Several blocks and tiles in each direction, tiles with and without masks, both padded widths.
    "several tiles": ((131, 9), BF16, {"num_sms": 3}, {}, 1),
    "several tiles, symmetric": ((131, 70), F16, {"num_sms": 3}, SYMMETRIC, 1),
    "sum": ((6, 5), BF16, SMALL, {"reduction": "sum", **SYMMETRIC}, 1),
    "no reduction": ((6, 5), BF16, SMALL, NONE | SYMMETRIC, 1),
    # The only other vector is the partner: the loss and its gradients are exactly zero.
    "one vector per side": ((1, 3), BF16, SMALL, SYMMETRIC, 1),
    "one element per side": ((1, 1), BF16, SMALL, SYMMETRIC, 1),
    "widest vectors": ((2, 128), BF16, SMALL, {}, 1),
    "odd sizes": ((33, 65), BF16, SMALL, {}, 1),
    "lowest temperature": ((9, 6), F16, SMALL, {"temperature": 0.0301}, 2),
    "high temperature": ((9, 6), F16, SMALL, {"temperature": 1.7}, 2),
    "one block": ((129, 9), F16, {"num_sms": 1}, NONE, 1),
    "blocks that end within a row": ((200, 9), F16, {"num_sms": 5}, NONE, 1),
}
SLOW_CASES = {
    "one tile, float16": ((5, 7), F16, SMALL, {}, 3),
    "one tile, bfloat16, symmetric": ((5, 7), BF16, SMALL, SYMMETRIC, 3),
    "several tiles, float16": ((131, 9), F16, {"num_sms": 3}, {}, 1),
    "several tiles, bfloat16, symmetric": ((131, 70), BF16, {"num_sms": 3}, SYMMETRIC, 1),
    **{
        f"one block, more tiles than stages, {dim}, {dtype}, {symmetric}": (
            *((300, dim), dtype, {"num_sms": 1}, {"symmetric": symmetric}, 1),
        )
        for dim in (64, 128)
        for dtype in DTYPES
        for symmetric in (False, True)
    },
    # Vectors that exceed the cache: blocks take whole rows.
    "two blocks of whole rows": ((129, 9), F16, {"num_sms": 2, "l2_bytes": 0}, NONE | SYMMETRIC, 1),
    "one block of whole rows": ((300, 9), F16, {"num_sms": 1, "l2_bytes": 0}, NONE, 1),
    "four blocks": ((300, 9), F16, {"num_sms": 4}, NONE | SYMMETRIC, 1),
    "seven blocks": ((260, 9), F16, {"num_sms": 7}, NONE, 1),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_errors_are_within_twice_the_references(kernels, launcher, case):
    (n, dim), dtype, settings, options, draws = (CASES | SLOW_CASES)[case]
    launcher(**settings)
    assert_backend_no_worse(Op(kernels, **options), vectors((n, dim), dtype=dtype), backend="cuda", draws=draws)


@pytest.mark.usefixtures("small")
def test_losses_far_below_the_rounding_of_the_logarithms_are_accurate(kernels):
    """Nearly all of the softmax is the partner: the loss must not be the difference of two rounded logarithms."""
    first = torch.zeros(4, 8)
    first[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    first[:, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    first = (first + random(4, 8, seed=3, scale=0.03)).to(BF16)
    second = (first + random(4, 8, seed=4, scale=0.03)).to(BF16)
    op = Op(kernels, temperature=0.035, **NONE, **SYMMETRIC)
    value, *gradients = results(op, first, second)
    truth, *true_gradients = results(lambda *pair: op(*pair, backend="reference"), first.double(), second.double())
    assert float(truth.max()) < 1e-9
    assert_close(value, truth, atol=5e-15)  # the reference's error: an ulp of the logarithm in float64
    for got, expected in zip(gradients, true_gradients, strict=True):
        assert_close(got, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_more_anchors_than_one_cluster_combines(kernels):
    op, (t, s) = Op(kernels, symmetric=True), pair(4100, 3, BF16)
    value, saved = op.forward(t, s)
    assert saved.shape == (8200,)
    assert_close(value, op(t, s, backend="reference"), atol=2e-6)


@pytest.mark.usefixtures("small")
def test_memory_layouts_give_equal_results(kernels):
    for layout in ("strided", "transposed"):
        inputs = pair(5, 16, BF16, layout=layout)
        expected = results(Op(kernels), *(x.contiguous() for x in inputs))
        got = results(Op(kernels, new_gradient=lambda x: x.new_empty(x.shape[::-1]).T), *inputs)
        assert all(map(torch.equal, got, expected)), layout
    expanded, other = random(1, 16, dtype=BF16).expand(7, -1), random(7, 16, dtype=BF16, seed=1)
    op = Op(kernels, new_gradient=lambda x: torch.empty(x.shape, dtype=x.dtype), **NONE)
    got = [op.forward(expanded, other)[0]]
    got += op.backward(torch.tensor([0.3]).expand(7), expanded, other, op.forward(expanded, other)[1])
    value, saved = op.forward(expanded.contiguous(), other)
    expected = [value, *op.backward(torch.full((7,), 0.3), expanded.contiguous(), other, saved)]
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    ("symmetric", "n"), [(False, 17), (True, 17), pytest.param(False, 150, marks=pytest.mark.slow)]
)
def test_subsets_of_gradients_are_bitwise_equal(kernels, launcher, symmetric, n):
    """The results are bitwise equal if the columns of a row are split the same way."""
    launcher(num_sms=1, min_count=1, l2_bytes=0)
    op = Op(kernels, symmetric=symmetric)
    inputs, grad_output = pair(n, 6, BF16), torch.tensor(-1.3)
    saved = op.forward(*inputs)[1]
    whole = op.backward(grad_output, *inputs, saved)
    for needs_grad in ((True, False), (False, True), (False, False)):
        some = op.backward(grad_output, *inputs, saved, needs_grad)
        for got, expected, needed in zip(some, whole, needs_grad, strict=True):
            assert torch.equal(got, expected) if needed else got is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_vectors_have_zero_gradients(kernels, symmetric):
    op, dtype = Op(kernels, symmetric=symmetric), DTYPES[symmetric]

    def make(seed):
        t, s = pair(5, 7, dtype, seed)
        t[1], t[3], s[1], s[4] = 0, 0, 0, 0
        return t, s

    assert_backend_no_worse(op, make, backend="cuda", draws=2)
    _, dt, ds = results(op, *make(0))
    assert not any(zero.any() for zero in (dt[1], dt[3], ds[1], ds[4]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES)
def test_very_long_and_very_short_vectors(kernels, dtype):
    """The gradients of very short vectors may overflow the dtype."""
    op, n = Op(kernels, reduction="none"), 12
    t, s = extreme(n, 9, dtype=dtype), random(n, 9, dtype=dtype)
    value, *gradients = results(op, t, s)
    expected, *expected_gradients = results(lambda *pair: op(*pair, backend="reference"), t.double(), s.double())
    assert_close(value, expected, atol=1e-4, rtol=1e-5)
    assert not any(g.isnan().any() for g in gradients)
    scale = float(expected_gradients[1].abs().max())
    assert_close(gradients[1], expected_gradients[1], atol=2 * scale * max(unit_roundoff(dtype), 1e-5))
    long = [row for row in range(n) if row % 6 < 4]
    largest = expected_gradients[0][long].abs().amax(1, keepdim=True)
    tiny = torch.finfo(dtype).smallest_normal
    assert_close(gradients[0][long], expected_gradients[0][long], atol=4 * largest * unit_roundoff(dtype) * 64 + tiny)


@pytest.mark.usefixtures("small")
def test_scaling_a_vector_by_a_power_of_two_changes_no_bit(kernels):
    t, s = pair(5, 7, BF16)
    expected = results(Op(kernels), t, s)
    for factor in (2.0**-105, 2.0**100):
        got = results(Op(kernels), t * factor, s)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[2], expected[2])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("n", "row", "bad"), [(5, 2, torch.inf), (5, 2, torch.nan), (260, 259, torch.nan)])
def test_non_finite_inputs_give_nan(kernels, n, row, bad):
    """Covers rows in the bad value's tile and in others: tiles with and without a mask, and both forms of exp2."""
    t, s = pair(n, 7, BF16)
    t[row, 3] = bad
    value, dt, _ = results(Op(kernels, reduction="none"), t, s)
    assert value.isnan().all()
    assert dt[row].isnan().any()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("size", "reduction"), [(1e-30, "none"), (0.0, "mean"), (0.0, "none"), (65536.0, "none")])
def test_upstream_gradients_of_any_magnitude(kernels, size, reduction):
    """The magnitude must not change what the rounding to 16 bits loses."""
    dtype = BF16 if size < 1 else F16
    op, inputs = Op(kernels, reduction=reduction), pair(5, 7, dtype)
    for got, expected in zip(
        *(
            value_and_gradients(lambda *pair, name=name: op(*pair, backend=name) * size, inputs)[1]
            for name in ("cuda", "reference")
        ),
        strict=True,
    ):
        assert_close(got, expected, atol=float(expected.abs().max()) * 16 * unit_roundoff(dtype))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("n", "dim", "symmetric"), [(6, 120, True), (40, 9, False)])
def test_forward_saves_the_base_2_logsumexp(kernels, n, dim, symmetric):
    t, s = pair(n, dim, BF16)
    saved = Op(kernels, symmetric=symmetric, temperature=0.3).forward(t, s)[1]
    unit = torch.nn.functional.normalize(torch.cat([t, s]).double())
    lse = (unit @ unit.T / 0.3).fill_diagonal_(-torch.inf).logsumexp(1) / np.log(2.0)
    assert_close(saved, lse[: saved.shape[0]], atol=1e-5)


@pytest.mark.parametrize(
    ("n", "dim", "symmetric"),
    [(130, 9, False), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(140, 128, True), (300, 9, False)])],
)
def test_results_do_not_depend_on_thread_order(kernels, launcher, n, dim, symmetric):
    launcher(num_sms=2)
    inputs = pair(n, dim, BF16)
    options = {"symmetric": symmetric, "reduction": "none"}
    first, *others = (results(Op(kernels, order=order, **options), *inputs) for order in (0, 1, 7))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_unsupported_sizes_need_no_scratch(kernels):
    for n, dim in [(128, 4), (129, 129), (129, 0)]:
        assert Op(kernels).scratch("dfkd_contrastive_loss_scratch", n, dim).size == 0
        assert Op(kernels).scratch("dfkd_contrastive_loss_backward_scratch", n, dim, 1, 1).size == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_sweep(kernels, launcher, seed):
    draw = np.random.default_rng(seed)
    n, dim = int(draw.integers(1, 400)), int(draw.integers(1, 129))
    launcher(num_sms=int(draw.choice([1, 3, 8, 132])), min_count=1, l2_bytes=int(draw.choice([0, L2_BYTES])))
    symmetric, half = (bool(draw.integers(2)) for _ in range(2))
    options = {"symmetric": symmetric, "reduction": str(draw.choice(REDUCTIONS))}
    op = Op(kernels, temperature=float(draw.choice([0.031, 0.1, 0.5])), order=int(draw.integers(8)), **options)
    layout = str(draw.choice(["contiguous", "strided", "transposed"]))
    draws = 4 if n < 20 else 2 if n < 100 else 1  # a single number can be exact by chance
    make = vectors((n, dim), dtype=DTYPES[half], layout=layout)
    assert_backend_no_worse(op, lambda i: make(100 * seed + i), backend="cuda", draws=draws)
