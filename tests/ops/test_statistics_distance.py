"""statistics_distance against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, random, unit_roundoff, value_and_gradients

from .table import DTYPES, assert_matches, stored

SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}


def definition(x, running_mean, running_var):
    """Compute each channel in turn."""
    means, spreads = 0.0, 0.0
    for c in range(x.shape[1]):
        v = x[:, c].double()
        mean = v.sum() / v.numel() if v.numel() else v.sum() * math.nan
        var = ((v - mean) ** 2).sum() / max(v.numel(), 1)
        means = means + (mean - running_mean[c].double()) ** 2
        spreads = spreads + (var - running_var[c].double()) ** 2
    return torch.sqrt(means) + torch.sqrt(spreads)


def float64_inputs(shape=(3, 5, 4, 2)):
    return stored(shape, dtype=torch.float64)(1)


def gradient(value, x):
    return torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradient_match_formula(shape):
    assert_matches(ops.statistics_distance, definition, float64_inputs(shape))


def test_running_statistics_receive_no_gradient():
    x, mean, var = float64_inputs()
    value = ops.statistics_distance(x, mean.requires_grad_(), var.requires_grad_())
    assert torch.autograd.grad(value, (mean, var), allow_unused=True) == (None, None)
    assert not ops.statistics_distance(x.detach(), mean, var).requires_grad


@pytest.mark.parametrize("other", [torch.float64, *DTYPES])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_dtypes_may_differ(dtype, other):
    inputs = stored((4, 6, 5, 3), dtype=dtype, other=other)(1)
    (value,), (dx, *_) = value_and_gradients(ops.statistics_distance, inputs)
    (expected,), (expected_dx, *_) = value_and_gradients(definition, inputs)
    assert (value.dtype, dx.dtype) == (torch.float64 if dtype == torch.float64 else torch.float32, dtype)
    assert_close(value, expected, atol=0.0, rtol=16 * unit_roundoff(value.dtype))
    assert_close(dx, expected_dx, atol=16 * unit_roundoff(value.dtype), rtol=2 * unit_roundoff(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equal_statistics_have_zero_distance_and_gradient(backend_and_device, layout):
    backend, device = backend_and_device
    op = lambda *a: ops.statistics_distance(*a, backend=backend)  # noqa: E731
    x = random(3, 7, 5, 3, scale=3.0, layout=layout, device=device).requires_grad_()
    mean, var = (t.detach() for t in ops.channel_statistics(x, backend=backend))
    value = op(x, mean, var)
    assert value == 0
    assert not gradient(value, x).any()
    # If one norm is zero, the gradient of the other remains.
    value = op(x, mean + 1, var)
    assert_close(value, math.sqrt(7), atol=1e-5)
    assert_close(gradient(value, x), -1 / math.sqrt(7) / 45, atol=1e-7)
    dx = gradient(op(x, mean, var - 1), x)
    assert_close(dx, 2 / math.sqrt(7) / 45 * (x - mean[:, None, None]), atol=1e-7)
