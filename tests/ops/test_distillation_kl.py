"""distillation_kl against the definition of the divergence in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dfkd_fast import ops
from dfkd_fast.testing import assert_close, extreme, unit_roundoff, value_and_gradients

from .table import DTYPES, assert_matches, logits

DIRECTIONS = ("forward", "reverse")
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def definition(student, teacher, *, temperature=1.0, direction="forward", reduction="batchmean", squared=True):
    """Compute each class in turn, from probabilities."""
    rows = []
    for s, t in zip(student, teacher, strict=True):
        q = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        p = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        if direction == "reverse":
            p, q = q, p
        rows.append(torch.stack([p[k] * (torch.log(p[k]) - torch.log(q[k])) for k in range(len(p))]))
    terms = torch.stack(rows) * (temperature * temperature if squared else 1)
    n, classes = terms.shape
    return {
        "batchmean": terms.sum() / n,
        "sum": terms.sum(),
        "mean": terms.sum() / (n * classes),
        "none": terms,
    }[reduction]


def make(n=4, classes=7, *, dtype=torch.float64, requires_grad=False):
    return logits((n, classes), dtype=dtype, needs_grad=(0, 1) if requires_grad else ())(1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("n", "classes", "temperature", "squared"),
    [(1, 1, 1.0, True), (4, 7, 1.0, True), (5, 2, 4.0, True), (3, 33, 0.3, True), (1, 5, 2, True), (4, 7, 3.0, False)],
)
def test_value_and_gradients_match_formula(n, classes, temperature, squared, direction, reduction):
    options = {"temperature": temperature, "direction": direction, "reduction": reduction, "squared": squared}
    op, formula = (partial(function, **options) for function in (ops.distillation_kl, definition))
    assert_matches(op, formula, make(n, classes), atol=1e-13, gradient_atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_give_finite_results(dtype, direction):
    s, t = extreme(12, 9, dtype=dtype), extreme(12, 9, dtype=dtype, seed=1).roll(1, 0)
    op = lambda *a: ops.distillation_kl(*a, direction=direction, reduction="sum")  # noqa: E731
    values, gradients = value_and_gradients(op, (s, t))
    assert values[0].isfinite()
    assert values[0] >= 0
    assert not any(g.isnan().any() for g in gradients)


def made_for(backend, device, *shape):
    """Return logits in the most precise dtype of a backend, and a tolerance."""
    dtype, atol = (torch.float64, 1e-14) if backend == "reference" else (torch.float32, 1e-6)
    return *logits(shape, dtype=dtype, device=device)(1), atol


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_logits_have_zero_divergence_and_gradient(backend_and_device, direction):
    """A constant offset of the logits changes nothing."""
    s, _, atol = made_for(*backend_and_device, 4, 9)
    op = lambda *a: ops.distillation_kl(*a, direction=direction, backend=backend_and_device[0])  # noqa: E731
    for teacher, allowed in ((s.clone(), atol if backend_and_device[0] == "reference" else 0.0), (s + 5, atol)):
        (value,), gradients = value_and_gradients(op, (s, teacher))
        for each in (value, *gradients):
            assert_close(each, 0.0, atol=allowed)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_classes_have_no_effect(backend_and_device, direction):
    """Classes with logits of minus infinity on both sides do not affect value or gradients."""
    s, t, atol = made_for(*backend_and_device, 3, 6)
    keep = [0, 2, 3, 5]
    masked_s, masked_t = s.clone(), t.clone()
    masked_s[:, [1, 4]] = masked_t[:, [1, 4]] = -math.inf
    op = lambda *a: ops.distillation_kl(*a, temperature=2.0, direction=direction, backend=backend_and_device[0])  # noqa: E731
    (value,), gradients = value_and_gradients(op, (masked_s, masked_t))
    (expected,), expected_gradients = value_and_gradients(op, (s[:, keep], t[:, keep]))
    assert_close(value, expected, atol=atol, rtol=atol)
    for got, expected_value in zip(gradients, expected_gradients, strict=True):
        assert_close(got[:, keep], expected_value, atol=atol)
        assert_close(got[:, [1, 4]], 0.0, atol=0.0)


def test_class_masked_on_one_side(backend_and_device):
    s, t, atol = made_for(*backend_and_device, 2, 4)
    t[0, 1] = -math.inf  # this class contributes 0, as in torch
    op = lambda *a: ops.distillation_kl(*a, backend=backend_and_device[0])  # noqa: E731
    (value,), gradients = value_and_gradients(op, (s, t))
    (expected,), expected_gradients = value_and_gradients(ops.distillation_kl, (s.double(), t.double()))
    assert_close(value, F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean"), atol=atol)
    for got, expected_value in zip((value, *gradients), (expected, *expected_gradients), strict=True):
        assert got.isfinite().all()
        assert_close(got, expected_value, atol=atol)
    assert op(t, s) == math.inf  # the student excludes a class that the teacher expects


def test_empty_batch():
    s, t = make(0, 5, requires_grad=True)
    for reduction in ("batchmean", "mean"):
        assert ops.distillation_kl(s, t, reduction=reduction).isnan()
    assert ops.distillation_kl(s, t, reduction="sum") == 0
    assert ops.distillation_kl(s, t, reduction="none").shape == (0, 5)
    assert torch.autograd.grad(ops.distillation_kl(s, t), s)[0].shape == (0, 5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision_stays_within_bound(dtype, direction):
    """Only the gradients are rounded to the logits' dtype; the rest is float32."""
    inputs = make(8, 50, dtype=dtype)
    exact = [t.double() for t in inputs]
    op = lambda *a: ops.distillation_kl(*a, temperature=2.0, direction=direction)  # noqa: E731
    (value,), gradients = value_and_gradients(op, inputs)
    define = lambda *a: definition(*a, temperature=2.0, direction=direction)  # noqa: E731
    (expected,), expected_gradients = value_and_gradients(define, exact)
    assert value.dtype == torch.float32
    # log p and log q are near -4, with errors of a few unit roundoffs; p sums to 1; temperature squared is 4.
    single = 64 * unit_roundoff(torch.float32)
    assert_close(value, expected, atol=single, rtol=single)
    for got, expected_value in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == dtype
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest denormal
        assert_close(
            got, expected_value, atol=single * float(expected_value.abs().max()) + tiny, rtol=unit_roundoff(dtype)
        )


def test_dtypes_may_differ():
    s, t = make()
    assert ops.distillation_kl(s.bfloat16(), t.float()).dtype == torch.float32
    assert ops.distillation_kl(s.half(), t).dtype == torch.float64
    _, gradients = value_and_gradients(ops.distillation_kl, (s.bfloat16(), t.float()))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]


def test_hessian_matches_formula():
    s, t = make()
    curvature = torch.func.hessian(lambda x: ops.distillation_kl(x[None], t[:1]))(s[0])
    q = s[0].softmax(0)
    assert_close(curvature, q.diag() - torch.outer(q, q), atol=1e-13)
