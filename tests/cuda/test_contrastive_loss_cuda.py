"""The CUDA kernels of contrastive_loss, run on the CPU by the execution shim, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfkd_fast.reference.contrastive_loss import contrastive_loss as reference
from dfkd_fast.testing import assert_close, assert_no_worse, extreme, random, unit_roundoff

from ..ops.table import vectors

KERNELS = "contrastive_loss"

CODES = {torch.float16: 1, torch.bfloat16: 2}
DTYPES = tuple(CODES)
REDUCTIONS = ("mean", "sum", "none")


def memory(x):
    """All of a tensor's memory from its first element on, as integers, and its strides. Strides must be positive."""
    last = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = x.detach().as_strided((last,), (1,))
    return (flat if x.dtype == torch.float32 else flat.view(torch.int16)).numpy().copy(), x.stride()


class Op:
    """Forward and backward as the launchers do them."""

    def __init__(self, kernels, *, temperature=0.1, symmetric=False, reduction="mean", order=0):
        self.kernels, self.order = kernels, order
        self.temperature, self.symmetric, self.reduction = temperature, symmetric, reduction

    def scratch(self, name, count, dim, *expected):
        return self.kernels.scratch(name, count, dim, int(self.symmetric), *expected)

    def forward(self, anchors, positives):
        count, dim = anchors.shape
        total = count * (2 if self.symmetric else 1)
        out = np.full(total if self.reduction == "none" else 1, np.inf, dtype=np.float32)
        saved = np.full(total, np.inf, dtype=np.float32)
        (a, a_strides), (b, b_strides) = memory(anchors), memory(positives)
        self.kernels(
            "dfkd_contrastive_loss",
            *(a, b, count, dim, *a_strides, *b_strides, CODES[anchors.dtype], self.temperature),
            *(int(self.symmetric), 1, REDUCTIONS.index(self.reduction), out, saved),
            self.scratch("dfkd_contrastive_loss_scratch", count, dim),
            None,
            order=self.order,
        )
        value = torch.from_numpy(out)
        return value if self.reduction == "none" else value[0], torch.from_numpy(saved)

    def backward(self, grad_output, anchors, positives, saved, expected_value=(True, True), layout=torch.empty_like):
        count, dim = anchors.shape
        (a, a_strides), (b, b_strides) = memory(anchors), memory(positives)
        both = zip((anchors, positives), expected_value, strict=True)
        results = [layout(x).fill_(torch.nan) if expected else None for x, expected in both]
        arrays, strides = [], []
        for result in results:
            array, steps = memory(result) if result is not None else (None, (0, 0))
            arrays.append(array)
            strides.extend(steps)
        self.kernels(
            "dfkd_contrastive_loss_backward",
            *(memory(grad_output)[0], grad_output.stride(0) if grad_output.ndim else 0, a, b, saved.numpy()),
            *(count, dim, *a_strides, *b_strides),
            *(CODES[anchors.dtype], self.temperature, int(self.symmetric), 1),
            *(REDUCTIONS.index(self.reduction), *arrays, *strides),
            self.scratch("dfkd_contrastive_loss_backward_scratch", count, dim, *map(int, expected_value)),
            None,
            order=self.order,
        )
        for result, array in zip(results, arrays, strict=True):
            if result is not None:
                values = torch.from_numpy(array).view(result.dtype)
                result.copy_(values.as_strided(result.shape, result.stride()))
        return results

    def __call__(self, anchors, positives, grad_output, **options):
        value, saved = self.forward(anchors, positives)
        return [value, *self.backward(grad_output, anchors, positives, saved, **options)]

    def reference(self, anchors, positives, grad_output):
        leaves = [x.detach().requires_grad_() for x in (anchors, positives)]
        options = {"temperature": self.temperature, "symmetric": self.symmetric, "reduction": self.reduction}
        value = reference(*leaves, normalize=True, **options)
        return [value.detach(), *torch.autograd.grad(value, leaves, grad_output.to(value.dtype))]

    def grad_output(self, count, seed):
        shape = (count * (2 if self.symmetric else 1),) if self.reduction == "none" else ()
        return random(*shape, seed=seed, shift=0.5)


def pair(n, dim, dtype, seed=0, **options):
    return vectors((n, dim), dtype=dtype, **options)(seed)


def check(op, make, draws=4, **options):
    """Value and gradients err at most twice as far from float64 as the reference does in the same dtype.

    Over several draws, since a single number can be exact by luck. One unit in the last place of the largest true value
    is always allowed.
    """
    columns = [[], [], []]
    for seed in range(draws):
        inputs = make(10 * seed)
        grad_output = op.grad_output(inputs[0].shape[0], seed + 1)
        mine = op(*inputs, grad_output, **options)
        plain = op.reference(*inputs, grad_output)
        truth = op.reference(*(x.double() for x in inputs), grad_output.double())
        for column, *row in zip(columns, mine, plain, truth, strict=True):
            column.append(tuple(row))
    for name, column in zip(("value", "d_anchors", "d_positives"), columns, strict=True):
        mine, plain, truth = (torch.cat([x.flatten() for x in part]) for part in zip(*column, strict=True))
        ulp = torch.finfo(mine.dtype).eps * float(truth.abs().max())
        assert_no_worse(mine, than=plain, truth=truth, floor=ulp, name=name)


@pytest.fixture
def planned(kernels):
    """Sets for how many multiprocessors launches are planned, from how many anchors on, and what stays in the cache."""

    def plan(*, num_sms=132, smallest=129, cached_bytes=20 << 20):
        kernels("dfkd_host_contrastive_loss", num_sms, smallest, cached_bytes)

    yield plan
    plan()


@pytest.fixture
def few(planned):
    """Serve few vectors too, in few blocks."""
    planned(num_sms=2, smallest=1)


# The quick ones of every combination.
FLAGS_AND_TYPES = [
    (False, torch.bfloat16),
    (True, torch.float16),
    pytest.param(True, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(False, torch.float16, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("symmetric", "dtype"), FLAGS_AND_TYPES)
def test_no_worse_than_the_reference(kernels, symmetric, dtype):
    check(Op(kernels, symmetric=symmetric), lambda seed: pair(5, 7, dtype, seed), 3)


@pytest.mark.parametrize(("symmetric", "dtype"), FLAGS_AND_TYPES)
def test_many_tiles(kernels, planned, symmetric, dtype):
    """More than one block and tile in each direction, tiles with and without masks, ends within tiles; both widths."""
    planned(num_sms=3)
    check(Op(kernels, symmetric=symmetric), lambda seed: pair(131, 70 if symmetric else 9, dtype, seed), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("symmetric", "dtype"), FLAGS_AND_TYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_more_tiles_than_stages(kernels, planned, symmetric, dtype, dim):
    """One block, which goes round its stages several times, and begins new rows in the midst of them."""
    planned(num_sms=1)
    check(Op(kernels, symmetric=symmetric), lambda seed: pair(300, dim, dtype, seed), 1)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(kernels, reduction):
    check(Op(kernels, reduction=reduction, symmetric=True), lambda seed: pair(6, 5, torch.bfloat16, seed), 1)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (1, 1), (2, 128), (33, 65)])
def test_shapes(kernels, n, dim):
    """Of one vector the partner is all there is to the sum: loss and gradients are exactly zero."""
    check(Op(kernels, symmetric=n == 1), lambda seed: pair(n, dim, torch.bfloat16, seed), 1)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("temperature", [0.0301, 1.7])
def test_other_temperatures(kernels, temperature):
    check(Op(kernels, temperature=temperature), lambda seed: pair(9, 6, torch.float16, seed), 2)


@pytest.mark.usefixtures("few")
def test_a_partner_that_is_all_there_is(kernels):
    """What is left of the loss must not be what is left of rounding."""
    first = torch.zeros(4, 8)
    first[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    first[:, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    first = (first + random(4, 8, seed=3, scale=0.03)).to(torch.bfloat16)
    second = (first + random(4, 8, seed=4, scale=0.03)).to(torch.bfloat16)
    op = Op(kernels, temperature=0.035, reduction="none", symmetric=True)
    grad_output = op.grad_output(4, 5)
    mine, truth = op(first, second, grad_output), op.reference(first.double(), second.double(), grad_output.double())
    assert float(truth[0].max()) < 1e-9
    assert_close(mine[0], truth[0], atol=5e-15)  # an ulp of the logarithm of the sum, in float64
    for got, expected in zip(mine[1:], truth[1:], strict=True):
        assert_close(got, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("num_sms", "cached_bytes", "n", "symmetric"),
    [
        (1, 20 << 20, 129, False),
        (5, 20 << 20, 200, False),
        *(
            pytest.param(*c, marks=pytest.mark.slow)
            for c in [(2, 0, 129, True), (1, 0, 300, False), (4, 20 << 20, 300, True), (7, 20 << 20, 260, False)]
        ),
    ],
)
def test_work_dealt_out_otherwise(kernels, planned, num_sms, cached_bytes, n, symmetric):
    """As for few processors, so that blocks end in the midst of rows, or have several; or in step, by whole rows."""
    planned(num_sms=num_sms, cached_bytes=cached_bytes)
    check(Op(kernels, symmetric=symmetric, reduction="none"), lambda seed: pair(n, 9, torch.float16, seed), 1)


@pytest.mark.slow
def test_more_anchors_than_one_cluster_merges(kernels, planned):
    planned(num_sms=2, smallest=1)
    op, (t, s) = Op(kernels, symmetric=True), pair(4100, 3, torch.bfloat16)
    value, saved = op.forward(t, s)
    expected = op.reference(t, s, torch.tensor(1.0))[0]
    assert saved.shape == (8200,)
    assert_close(value, expected, atol=2e-6)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_any_layout(kernels, layout):
    op = Op(kernels)
    inputs, grad_output = pair(5, 16, torch.bfloat16, layout=layout), torch.tensor(0.7)
    expected = op(*(x.contiguous() for x in inputs), grad_output)
    results = op(*inputs, grad_output, layout=lambda x: x.new_empty(x.shape[::-1]).T)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.usefixtures("few")
def test_broadcast_rows_and_gradients(kernels):
    op, n = Op(kernels, reduction="none"), 7
    t, s = random(1, 16, dtype=torch.bfloat16).expand(n, -1), random(n, 16, dtype=torch.bfloat16, seed=1)
    results = op(t, s, torch.tensor([0.3]).expand(n), layout=lambda x: torch.empty(x.shape, dtype=x.dtype))
    expected = op(t.contiguous(), s, torch.full((n,), 0.3))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    ("symmetric", "n"), [(False, 17), (True, 17), pytest.param(False, 150, marks=pytest.mark.slow)]
)
def test_the_gradients_that_are_asked_for(kernels, planned, symmetric, n):
    """Equal to the bit where a row's columns are not split otherwise."""
    planned(num_sms=1, smallest=1, cached_bytes=0)
    op = Op(kernels, symmetric=symmetric)
    inputs, grad_output = pair(n, 6, torch.bfloat16), torch.tensor(-1.3)
    _, saved = op.forward(*inputs)
    expected = op.backward(grad_output, *inputs, saved)
    one, none = op.backward(grad_output, *inputs, saved, expected=(True, False))
    assert torch.equal(one, expected[0])
    assert none is None
    none, other = op.backward(grad_output, *inputs, saved, expected=(False, True))
    assert torch.equal(other, expected[1])
    assert none is None
    assert op.backward(grad_output, *inputs, saved, expected=(False, False)) == [None, None]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zero_length(kernels, symmetric):
    op, dtype = Op(kernels, symmetric=symmetric), DTYPES[symmetric]

    def make(seed):
        t, s = pair(5, 7, dtype, seed)
        t[1], t[3], s[1], s[4] = 0, 0, 0, 0
        return t, s

    check(op, make, 2)
    _, dt, ds = op(*make(0), torch.tensor(2.0))
    for zero in (dt[1], dt[3], ds[1], ds[4]):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_rows(kernels, dtype):
    """Very long and very short rows; the gradients of the short ones need not exist in the type."""
    op, n = Op(kernels, reduction="none"), 12
    t, s = extreme(n, 9, dtype=dtype), random(n, 9, dtype=dtype)
    grad_output = random(n, seed=1, shift=0.5)
    value, *gradients = op(t, s, grad_output)
    expected, *expected_gradients = op.reference(t.double(), s.double(), grad_output.double())
    assert_close(value, expected, atol=1e-4, rtol=1e-5)
    assert not any(g.isnan().any() for g in gradients)
    scale = float(expected_gradients[1].abs().max())
    assert_close(gradients[1], expected_gradients[1], atol=2 * scale * max(unit_roundoff(dtype), 1e-5))
    long = [row for row in range(n) if row % 6 < 4]
    largest = expected_gradients[0][long].abs().amax(1, keepdim=True)
    tiny = torch.finfo(dtype).smallest_normal
    assert_close(gradients[0][long], expected_gradients[0][long], atol=4 * largest * unit_roundoff(dtype) * 64 + tiny)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_no_number_shows(kernels, bad):
    """In a tile with masks or without, by the instruction or the polynomial."""
    t, s = pair(5, 7, torch.bfloat16)
    t[2, 3] = bad
    value, dt, _ = Op(kernels, reduction="none")(t, s, torch.ones(5))
    assert value.isnan().all()
    assert dt[2].isnan().any()


def test_what_is_no_number_shows_far_away(kernels):
    t, s = pair(260, 7, torch.bfloat16)
    s[259, 3] = torch.nan
    assert Op(kernels, reduction="none").forward(t, s)[0].isnan().all()


@pytest.mark.usefixtures("few")
def test_the_length_of_a_row(kernels):
    op, grad_output = Op(kernels), torch.tensor(1.0)
    t, s = pair(5, 7, torch.bfloat16)
    expected = op(t, s, grad_output)
    for factor in (2.0**-105, 2.0**100):
        got = op(t * factor, s, grad_output)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[2], expected[2])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("grad_output", "reduction"), [(1e-30, "none"), (0.0, "mean"), (0.0, "none"), (65536.0, "none")]
)
def test_any_upstream_gradient(kernels, grad_output, reduction):
    """What is rounded to half precision must not depend on how large the gradient that comes in is."""
    dtype = torch.bfloat16 if grad_output < 1 else torch.float16
    op = Op(kernels, reduction=reduction)
    inputs, g = pair(5, 7, dtype), op.grad_output(5, 4) * grad_output
    for got, expected in zip(op(*inputs, g)[1:], op.reference(*inputs, g)[1:], strict=True):
        largest = float(expected.abs().max())
        assert_close(got, expected, atol=largest * 4 * unit_roundoff(dtype) * 4)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("n", "dim", "symmetric"), [(6, 120, True), (40, 9, False)])
def test_what_forward_saves(kernels, n, dim, symmetric):
    """The logarithm to base 2 of each anchor's sum, as the other kernels'."""
    t, s = pair(n, dim, torch.bfloat16)
    _, saved = Op(kernels, symmetric=symmetric, temperature=0.3).forward(t, s)
    unit = torch.nn.functional.normalize(torch.cat([t, s]).double())
    sums = (unit @ unit.T / 0.3).fill_diagonal_(-torch.inf).logsumexp(1) / np.log(2.0)
    assert_close(saved, sums[: saved.shape[0]], atol=1e-5)


@pytest.mark.parametrize(
    ("n", "dim", "symmetric"),
    [(130, 9, False), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(140, 128, True), (300, 9, False)])],
)
def test_the_order_of_threads_is_invisible(kernels, planned, n, dim, symmetric):
    planned(num_sms=2)
    inputs, runs = pair(n, dim, torch.bfloat16), []
    for order in (0, 1, 7):
        op = Op(kernels, symmetric=symmetric, reduction="none", order=order)
        runs.append(op(*inputs, op.grad_output(n, 3)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_what_is_refused(kernels):
    def arguments(n=129, dim=4, code=1, temperature=0.1, normalize=1):
        t, s = (memory(x)[0] for x in pair(max(n, 1), max(dim, 1), torch.float16))
        return t, s, n, dim, dim, 1, dim, 1, code, temperature, 0, normalize, 0

    def forward(*given):
        kernels("dfkd_contrastive_loss", *given, np.zeros(1), np.zeros(300), np.zeros(1 << 20, np.uint8), None)

    def backward(*given):
        t, s, n, dim, *rest = given
        sizes = (n, dim, *rest[:4])
        outs = (np.zeros_like(t), np.zeros_like(s), *rest[:4], np.zeros(1 << 21, np.uint8), None)
        grad_output = np.zeros(1, np.float32)
        kernels("dfkd_contrastive_loss_backward", grad_output, 0, t, s, np.zeros(300, np.float32), *sizes,
                *rest[4:], *outs)  # fmt: skip

    forward(*arguments())
    backward(*arguments())
    for change, said in [
        ({"n": 128}, r"N of anchors \(N, D\) is 128; the kernel supports 129 to 8388608"),
        ({"n": 0}, r"N of anchors \(N, D\) is 0"),
        ({"dim": 0}, r"D of anchors \(N, D\) is 0; the kernel supports 1 to 128"),
        ({"dim": 129}, r"D of anchors \(N, D\) is 129"),
        ({"code": 0}, "dtype must be float16 or bfloat16"),
        ({"code": 3}, "dtype must be float16 or bfloat16"),
        ({"normalize": 0}, "normalize is False"),
        ({"temperature": 0.03}, "temperature is 0.03; the kernel supports 0.03005615 and more"),
        ({"temperature": 0.0}, "temperature is 0"),
    ]:
        for call in (forward, backward):
            with pytest.raises(ValueError, match=f"returned 1: {said}"):
                call(*arguments(**change))
    for n, dim in [(128, 4), (129, 129), (129, 0)]:
        assert Op(kernels).scratch("dfkd_contrastive_loss_scratch", n, dim).size == 0
        assert Op(kernels).scratch("dfkd_contrastive_loss_backward_scratch", n, dim, 1, 1).size == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_sweep(kernels, planned, seed):
    draw = np.random.default_rng(seed)
    n, dim = int(draw.integers(1, 400)), int(draw.integers(1, 129))
    planned(num_sms=int(draw.choice([1, 3, 8, 132])), smallest=1, cached_bytes=int(draw.choice([0, 20 << 20])))
    symmetric, half = (bool(draw.integers(2)) for _ in range(2))
    options = {"symmetric": symmetric, "reduction": str(draw.choice(REDUCTIONS))}
    op = Op(kernels, temperature=float(draw.choice([0.031, 0.1, 0.5])), order=int(draw.integers(8)), **options)
    layout = str(draw.choice(["contiguous", "strided", "transposed"]))
    # A single number can be exact by luck.
    draws = 4 if n < 20 else 2 if n < 100 else 1
    check(op, lambda i: pair(n, dim, DTYPES[half], 100 * seed + i, layout=layout), draws)
