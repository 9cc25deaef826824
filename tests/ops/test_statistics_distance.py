"""statistics_distance against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, random, unit_roundoff, value_and_gradients

from .table import DTYPES, assert_matches, call_distances, layers, stored

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


WIDTHS = [(5,), (7, 3, 7, 1), tuple(range(1, 131))]


def sum_of_norms(*statistics):
    total = 0.0
    for i in range(0, len(statistics), 4):
        mean, var, running_mean, running_var = (t.double() for t in statistics[i : i + 4])
        total = total + (mean - running_mean).square().sum().sqrt() + (var - running_var).square().sum().sqrt()
    return total


@pytest.mark.parametrize("widths", WIDTHS, ids=len)
def test_layers_match_formula(widths):
    assert_matches(call_distances, sum_of_norms, layers((1, *widths), dtype=torch.float64)(1))


@pytest.mark.parametrize("other", [torch.float64, *DTYPES])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_dtypes_of_layers_may_differ(backend_and_device, dtype, other):
    backend, device = backend_and_device
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no kernel")
    inputs = layers((1, 6, 9, 6), dtype=dtype, other=other, device=device)(1)
    (value,), gradients = value_and_gradients(lambda *given: call_distances(*given, backend=backend), inputs)
    (expected,), expected_gradients = value_and_gradients(sum_of_norms, inputs)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(value, expected, atol=0.0, rtol=16 * unit_roundoff(value.dtype))
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        assert (found is None) == (gradient is None)
        if found is not None:
            assert found.dtype == dtype
            assert_close(found, gradient, atol=16 * unit_roundoff(value.dtype), rtol=2 * unit_roundoff(dtype))


def test_equal_layers_have_zero_gradient(backend_and_device):
    backend, device = backend_and_device
    mean, var = (random(7, seed=i, device=device).requires_grad_() for i in (1, 2))
    value = call_distances(mean, var, mean.detach(), var.detach() + 1, backend=backend)
    assert_close(value, math.sqrt(7), atol=1e-6)
    dmean, dvar = torch.autograd.grad(value, (mean, var))
    assert not dmean.any()
    assert_close(dvar, -1 / math.sqrt(7), atol=1e-6)


def test_layers_are_checked():
    first, second = (layers((1, c))(1) for c in (5, 3))
    with pytest.raises(ValueError, match="layers must contain at least one layer"):
        ops.statistics_distances([])
    for i, name in enumerate(("mean", "var", "running_mean", "running_var")):
        for error, message, wrong in (
            (TypeError, f"{name} must be a tensor, got str", "text"),
            (TypeError, f"{name} must be of dtype .*, got torch.int64", second[i].long()),
            (ValueError, rf"{name} must have shape \(C\)", second[i][None]),
            (ValueError, f"{name} must be on the device of .*mean, cpu, got meta", second[i].to("meta")),
            *([(ValueError, rf"{name} must have shape \(C\) with C = 3", second[i][:2])] if i else []),
        ):
            with pytest.raises(error, match=message):
                ops.statistics_distances([first, [*second[:i], wrong, *second[i + 1 :]]])
