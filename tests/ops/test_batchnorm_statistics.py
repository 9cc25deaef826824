"""batchnorm_statistics and channel_statistics against definitions in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, random, unit_roundoff, value_and_gradients

from .table import DTYPES, assert_matches, norm
from .table import call_norm as call

ACTIVATIONS = ("none", "relu", "relu6")
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}


def definition(x, running_mean, running_var, weight, bias, residual, *, activation, eps=1e-3):
    """Compute each channel in turn."""
    maps, means, variances = [], [], []
    for c in range(x.shape[1]):
        v = x[:, c]
        y = (v - running_mean[c]) / torch.sqrt(running_var[c] + eps)
        y = y * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
        if residual is not None:
            y = y + residual[:, c]
        if activation != "none":
            y = torch.where(y > 0, y, torch.zeros_like(y))
        if activation == "relu6":
            y = torch.where(y < 6, y, torch.full_like(y, 6))
        maps.append(y)
        mean = v.sum() / v.numel() if v.numel() else v.sum() * math.nan
        means.append(mean)
        variances.append(((v - mean) ** 2).sum() / max(v.numel(), 1) + 0 * mean)
    return torch.stack(maps, 1), torch.stack(means), torch.stack(variances)


def make(shape=(3, 5, 4, 2), *, dtype=torch.float64, **options):
    return norm(shape, dtype=dtype, **options)(1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("affine", "residual"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_match_formula(shape, affine, residual, activation):
    inputs = make(shape, affine=affine, residual=residual)
    assert_matches(partial(call, activation=activation), partial(definition, activation=activation), inputs)
    if activation == "none":
        x = inputs[:1]
        assert_matches(ops.channel_statistics, lambda x: definition(x, *inputs[1:], activation=activation)[1:], x)


@pytest.mark.parametrize(
    ("mean", "deviation", "layout"),
    [
        *((30.0, 2.0, "contiguous"), (30.0, 2.0, "strided"), (-1000.0, 1.0, "channels_last")),
        *((3000.0, 2.0, "channels_last"), (1e-3, 1e-6, "channels_last"), (1e-3, 1e-6, "contiguous")),
    ],
)
def test_statistics_are_accurate_for_large_means(backend_and_device, mean, deviation, layout):
    """E[x^2] - E[x]^2 would have an error of 225 unit roundoffs at mean 30, and no correct digit at mean -1000."""
    backend, device = backend_and_device
    x = random(16, 3, 28, 28, scale=deviation, shift=mean, seed=3, layout=layout, device=device)
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    _, got_mean, got_var = ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, backend=backend)
    exact, u = x.double(), unit_roundoff(torch.float32)
    center = exact.mean((0, 2, 3))
    # The mean has the error of a pairwise sum of 12,544 terms. var has its square, and the error of the sum in var.
    assert_close(got_mean, center, atol=0.0, rtol=16 * u, name="mean")
    spread = (exact - center[:, None, None]).square().mean((0, 2, 3))
    assert_close(got_var, spread, atol=(16 * u * mean) ** 2, rtol=64 * u, name="var")


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("relu6", F.relu6)])
@pytest.mark.parametrize("residual", [False, True])
def test_activations_match_torch_at_their_limits(backend_and_device, residual, activation, function):
    backend, device = backend_and_device
    x = torch.tensor([[-1.0, 0.0, 6.0, 7.0, math.nan]], device=device, requires_grad=True)
    eps = 2.0**-10  # var + eps is exactly 1
    zeros, var = torch.zeros(5, device=device), torch.full((5,), 1 - eps, device=device)
    other = torch.zeros_like(x) if residual else None
    results = []
    for name in (backend, "reference"):
        y, *_ = ops.batchnorm_statistics(
            x, zeros, var, None, None, eps, activation=activation, residual=other, backend=name
        )
        results.append((y, torch.autograd.grad(y.sum(), x)[0]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=0.0)
    y, dx = results[0]
    assert_close(y, function(x), atol=0.0)
    assert torch.equal(dx[:, :4], torch.autograd.grad(function(x).sum(), x)[0][:, :4])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision_stays_within_bound(dtype, activation):
    """Only y and the gradients are rounded, once; the rest is float32."""
    inputs = make((4, 6, 9, 7), dtype=dtype, residual=True)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    values, gradients = value_and_gradients(lambda *a: call(*a, activation=activation), inputs)
    expected, expected_gradients = value_and_gradients(partial(definition, activation=activation), exact)
    assert [v.dtype for v in values] == [dtype, torch.float32, torch.float32]
    single = unit_roundoff(torch.float32)
    # Terms are up to (3 + 8) / sqrt(0.1) before they cancel.
    assert_close(values[0], expected[0], atol=256 * single, rtol=unit_roundoff(dtype), name="y")
    for got, expected_value in zip(values[1:], expected[1:], strict=True):
        assert_close(got, expected_value, atol=16 * single, rtol=16 * single)
    for got, expected_value, given in zip(gradients, expected_gradients, inputs, strict=True):
        if expected_value is not None:
            assert got.dtype == given.dtype
            # The output gradient, and thus each of 252 terms of a sum, is rounded to dtype.
            assert (got.double() - expected_value).norm() <= 8 * unit_roundoff(dtype) * expected_value.norm()


def test_dtypes_may_differ():
    x, rm, rv, w, b, res = make(residual=True)
    y, mean, _ = call(x.bfloat16(), rm.float(), rv.float(), w.float(), b.float(), res.float())
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    y, mean, _ = call(x, rm.float(), rv.float(), w.float(), b.float(), res.half())
    assert (y.dtype, mean.dtype) == (torch.float64, torch.float64)
