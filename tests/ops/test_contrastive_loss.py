"""contrastive_loss against Eq. 8 and 9 of the paper in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from dfkd_fast import ops
from dfkd_fast.testing import assert_close, extreme, random, unit_roundoff, value_and_gradients

from .table import DTYPES, assert_matches, vectors

REDUCTIONS = ("mean", "sum", "none")
FLAGS = [(symmetric, normalize) for symmetric in (False, True) for normalize in (False, True)]


def definition(
    anchors, positives, *, temperature=0.1, symmetric=False, negatives="all", normalize=True, reduction="mean"
):
    """Compute each pair of vectors in turn."""
    vectors = [*anchors, *positives]
    if normalize:
        vectors = [v / torch.sqrt((v * v).sum()) if v.detach().any() else torch.zeros_like(v) for v in vectors]
    n = len(anchors)
    losses = []
    for i in range(2 * n if symmetric else n):
        similarities = [(vectors[i] * vectors[j]).sum() / temperature for j in range(2 * n)]
        summed = [j for j in range(2 * n) if (j != i if negatives == "all" else (j < n) != (i < n))]
        others = torch.stack([similarities[j] for j in summed])
        shift = others.detach().max()
        losses.append(shift + (others - shift).exp().sum().log() - similarities[(i + n) % (2 * n)])
    losses = torch.stack(losses)
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]


def make(n=5, dim=7, *, dtype=torch.float64, requires_grad=False):
    return vectors((n, dim), dtype=dtype, needs_grad=(0, 1) if requires_grad else ())(1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("negatives", ["all", "cross"])
@pytest.mark.parametrize(("symmetric", "normalize"), FLAGS)
@pytest.mark.parametrize(
    ("n", "dim", "temperature"), [(1, 3, 0.1), (2, 1, 0.5), (5, 7, 0.1), (9, 4, 1.7), (6, 130, 0.02)]
)
def test_value_and_gradients_match_formula(n, dim, temperature, symmetric, normalize, negatives, reduction):
    options = {"temperature": temperature, "symmetric": symmetric, "normalize": normalize, "reduction": reduction}
    options["negatives"] = negatives
    assert_matches(partial(ops.contrastive_loss, **options), partial(definition, **options), make(n, dim), rtol=1e-11)


def test_sum_excludes_only_the_anchor():
    """With four equal vectors, each anchor has three others: log 3. Excluding the other anchor would give log 2."""
    t = torch.ones(2, 3, dtype=torch.float64)
    for symmetric in (False, True):
        assert_close(ops.contrastive_loss(t, t, symmetric=symmetric), math.log(3), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_rows_have_zero_gradient(symmetric, dtype):
    """Similarity and gradient are exactly zero, and second derivatives are finite."""
    t, s = make(dtype=dtype)
    t[1], t[3], s[1], s[4] = 0, 0, 0, 0  # both rows of pair 1, one row of pairs 3 and 4
    t.requires_grad_()
    s.requires_grad_()
    loss = ops.contrastive_loss(t, s, symmetric=symmetric)
    rows = [t.detach().double(), s.detach().double()]
    assert_close(loss, definition(*rows, symmetric=symmetric), atol=1e-5)
    dt, ds = torch.autograd.grad(loss, (t, s), create_graph=True)
    assert dt.isfinite().all()
    assert ds.isfinite().all()
    for zero in (dt[1], dt[3], ds[1], ds[4]):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert all((dt[i] != 0).any() for i in (0, 2, 4))
    again = torch.autograd.grad(dt.square().sum() + ds.square().sum(), (t, s))
    assert all(g.isfinite().all() for g in again)


def test_zero_row_without_normalization_passes_gradcheck():
    t, s = make(requires_grad=True)
    t.data[1] = 0
    op = lambda *a: ops.contrastive_loss(*a, temperature=0.5, normalize=False)  # noqa: E731
    assert gradcheck(op, (t, s))


def test_loss_does_not_depend_on_row_length():
    t, s = make(dtype=torch.float32)
    expected = ops.contrastive_loss(t, s)
    for factor in (2.0**-120, 2.0**100):
        got = ops.contrastive_loss(t * factor, s)
        assert_close(got, expected, atol=1e-6)


@pytest.mark.parametrize("size", [7, 70])  # one launch, and several
def test_gradients_of_short_rows_overflow_only_if_they_are_too_large(backend_and_device, size):
    """The gradient of a row is inversely proportional to its length. Here it is just below the largest float32."""
    backend, device = backend_and_device

    def largest(factor):
        pair = [(x * factor).to(device).requires_grad_() for x in make(4, size, dtype=torch.float32)]
        loss = ops.contrastive_loss(*pair, reduction="sum", backend=backend) * 1e-3
        return max(float(g.abs().max()) for g in torch.autograd.grad(loss, pair))

    exponent = math.floor(math.log2(3e38 / largest(1.0)))
    assert 1e38 < largest(2.0**-exponent) < math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_rows_give_finite_loss(dtype):
    values, gradients = value_and_gradients(
        lambda *a: ops.contrastive_loss(*a, reduction="none"),
        (extreme(12, 9, dtype=dtype).requires_grad_(), random(12, 9, dtype=dtype, requires_grad=True)),
    )
    assert values[0].isfinite().all()
    # Gradients of very short rows are large, and may overflow to infinity in the reduced-precision dtypes.
    assert not any(g.isnan().any() for g in gradients)


def test_small_temperature_matches_float64():
    values, gradients = value_and_gradients(
        lambda *a: ops.contrastive_loss(*a, temperature=1e-4, reduction="none"), make(dtype=torch.float32)
    )
    expected = definition(*(t.double() for t in make(dtype=torch.float32)), temperature=1e-4, reduction="none")
    # Rounding errors of similarities in [-1, 1], divided by the temperature.
    assert_close(values[0], expected, atol=16 * unit_roundoff(torch.float32) / 1e-4)
    assert all(g.isfinite().all() for g in gradients)


def test_empty_batch():
    t, s = make(0, 4, requires_grad=True)
    assert ops.contrastive_loss(t, s).isnan()
    assert ops.contrastive_loss(t, s, symmetric=True).isnan()
    assert ops.contrastive_loss(t, s, reduction="sum") == 0
    assert ops.contrastive_loss(t, s, reduction="none", symmetric=True).shape == (0,)
    assert [g.shape for g in torch.autograd.grad(ops.contrastive_loss(t, s), (t, s))] == [(0, 4), (0, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_reduced_precision_stays_within_bound(dtype, symmetric):
    """Only the gradients are rounded to the inputs' dtype; the rest is float32."""
    inputs = make(8, 33, dtype=dtype)
    exact = [t.double() for t in inputs]
    values, gradients = value_and_gradients(lambda *a: ops.contrastive_loss(*a, symmetric=symmetric), inputs)
    expected, expected_gradients = value_and_gradients(lambda *a: definition(*a, symmetric=symmetric), exact)
    assert values[0].dtype == torch.float32
    single = 64 * unit_roundoff(torch.float32)  # random walk of 33 terms per similarity, times 1 / temperature
    assert_close(values[0], expected[0], atol=single, rtol=single)
    for got, expected_value in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == dtype
        assert_close(
            got, expected_value, atol=single * float(expected_value.abs().max()) + 1e-7, rtol=unit_roundoff(dtype)
        )


def test_dtypes_may_differ():
    t, s = make()
    assert ops.contrastive_loss(t.bfloat16(), s.float()).dtype == torch.float32
    assert ops.contrastive_loss(t, s.float()).dtype == torch.float64


def test_meta_tensors():
    x = torch.empty(5, 7, device="meta", requires_grad=True)
    loss = ops.contrastive_loss(x, x)
    (gradient,) = torch.autograd.grad(loss, x)
    assert (loss.shape, gradient.shape, loss.is_meta) == ((), (5, 7), True)
