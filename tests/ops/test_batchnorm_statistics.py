"""batchnorm_statistics and channel_statistics against their definitions, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, random, unit_roundoff, value_and_gradients

from .table import DTYPES, norm
from .table import call_norm as call

ACTIVATIONS = ("none", "relu", "relu6")
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}


def definition(x, running_mean, running_var, weight, bias, eps, activation, residual):
    """Channel by channel."""
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


def define(x, running_mean, running_var, weight, bias, residual, *, activation="none", eps=1e-3):
    return definition(x, running_mean, running_var, weight, bias, eps, activation, residual)


def make(shape=(3, 5, 4, 2), *, dtype=torch.float64, **options):
    return norm(shape, dtype=dtype, **options)(1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("affine", "residual"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_follow_the_formula(shape, affine, residual, activation):
    inputs = make(shape, affine=affine, residual=residual)
    values, gradients = value_and_gradients(lambda *a: call(*a, activation=activation), inputs)
    expected, expected_gradients = value_and_gradients(lambda *a: define(*a, activation=activation), inputs)
    for got, expected_value, name in zip(values, expected, ("y", "mean", "var"), strict=True):
        assert_close(got, expected_value, atol=1e-12, rtol=1e-12, name=name)
    names = ("x", "running_mean", "running_var", "weight", "bias", "residual")
    for got, expected_value, name in zip(gradients, expected_gradients, names, strict=True):
        if expected_value is not None and shape[0] > 0:
            assert_close(got, expected_value, atol=1e-12, rtol=1e-12, name=f"gradient of {name}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_once_and_twice(activation):
    inputs = make((2, 3, 2, 2), residual=True)
    assert gradcheck(lambda *a: call(*a, activation=activation), inputs)
    assert gradgradcheck(lambda *a: call(*a, activation=activation), inputs)
    x = inputs[0]
    assert gradcheck(ops.channel_statistics, (x,))
    assert gradgradcheck(ops.channel_statistics, (x,))


@pytest.mark.parametrize("affine", [True, False])
def test_is_batchnorm_in_eval_mode(affine):
    norm = nn.BatchNorm2d(5, eps=1e-4, affine=affine).double()
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    x = make()[0]
    y, mean, var = ops.batchnorm_statistics(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    assert_close(y, norm.eval()(x), atol=1e-13)
    norm.momentum = 1.0  # the running statistics become the batch's, with the unbiased variance
    norm.train()(x)
    count = x.numel() // 5
    assert_close(mean, norm.running_mean, atol=1e-13)
    assert_close(var, norm.running_var * (count - 1) / count, atol=1e-13)


def test_statistics_do_not_touch_the_running_ones():
    inputs = make()
    before = [t.clone() for t in inputs[1:3]]
    call(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs[1:3], before, strict=True))


@pytest.mark.parametrize(
    ("mean", "deviation", "layout"),
    [
        *((30.0, 2.0, "contiguous"), (30.0, 2.0, "strided"), (-1000.0, 1.0, "channels_last")),
        *((3000.0, 2.0, "channels_last"), (1e-3, 1e-6, "channels_last"), (1e-3, 1e-6, "contiguous")),
    ],
)
def test_statistics_are_sound_far_from_zero(backend_and_device, mean, deviation, layout):
    """Whatever the running mean says. E[x^2] - E[x]^2 would lose 225 u of the variance at 30, and all of it at 1000."""
    backend, device = backend_and_device
    x = random(16, 3, 28, 28, scale=deviation, shift=mean, seed=3, layout=layout, device=device)
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    _, got_mean, got_var = ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, backend=backend)
    exact, u = x.double(), unit_roundoff(torch.float32)
    centre = exact.mean((0, 2, 3))
    # The mean: pairwise sums of 12,544 terms. The variance: that error's square, and its own sum.
    assert_close(got_mean, centre, atol=0.0, rtol=16 * u, name="mean")
    spread = (exact - centre[:, None, None]).square().mean((0, 2, 3))
    assert_close(got_var, spread, atol=(16 * u * mean) ** 2, rtol=64 * u, name="var")


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("relu6", F.relu6)])
@pytest.mark.parametrize("residual", [False, True])
def test_activations_agree_with_torch_at_their_corners(backend_and_device, residual, activation, function):
    backend, device = backend_and_device
    x = torch.tensor([[-1.0, 0.0, 6.0, 7.0, math.nan]], device=device, requires_grad=True)
    eps = 2.0**-10  # so that the variance and eps add to one exactly
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


def test_channel_statistics_are_those_of_the_norm():
    inputs = make(residual=True)
    _, mean, var = call(*inputs, activation="relu")
    alone = ops.channel_statistics(inputs[0])
    assert torch.equal(alone[0], mean)
    assert torch.equal(alone[1], var)
    expected = define(*inputs)
    assert_close(alone[0], expected[1], atol=1e-13)
    assert_close(alone[1], expected[2], atol=1e-12)


def test_one_value_a_channel_has_no_variance():
    mean, var = ops.channel_statistics(random(1, 4, 1, 1))
    assert torch.equal(mean, random(1, 4, 1, 1).flatten())
    assert torch.equal(var, torch.zeros(4))


def test_empty_batch_has_no_statistics():
    inputs = make((0, 5, 3, 2), residual=True)
    y, mean, var = call(*inputs, activation="relu")
    assert y.shape == (0, 5, 3, 2)
    assert mean.isnan().all()
    assert var.isnan().all()
    assert torch.autograd.grad(y.sum() + mean.sum() + var.sum(), inputs[0])[0].shape == (0, 5, 3, 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision(dtype, activation):
    """Everything is float32 but for one rounding of y and one of each gradient."""
    inputs = make((4, 6, 9, 7), dtype=dtype, residual=True)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    values, gradients = value_and_gradients(lambda *a: call(*a, activation=activation), inputs)
    expected, expected_gradients = value_and_gradients(lambda *a: define(*a, activation=activation), exact)
    assert [v.dtype for v in values] == [dtype, torch.float32, torch.float32]
    single = unit_roundoff(torch.float32)
    # Of terms up to (3 + 8) / sqrt(0.1) before they cancel.
    assert_close(values[0], expected[0], atol=256 * single, rtol=unit_roundoff(dtype), name="y")
    for got, expected_value in zip(values[1:], expected[1:], strict=True):
        assert_close(got, expected_value, atol=16 * single, rtol=16 * single)
    for got, expected_value, given in zip(gradients, expected_gradients, inputs, strict=True):
        if expected_value is not None:
            assert got.dtype == given.dtype
            # The upstream gradient of y is rounded to dtype: of the sums over 252 positions each term is.
            assert (got.double() - expected_value).norm() <= 8 * unit_roundoff(dtype) * expected_value.norm()


def test_dtypes_may_differ():
    x, rm, rv, w, b, res = make(residual=True)
    y, mean, _ = call(x.bfloat16(), rm.float(), rv.float(), w.float(), b.float(), res.float())
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    y, mean, _ = call(x, rm.float(), rv.float(), w.float(), b.float(), res.half())
    assert (y.dtype, mean.dtype) == (torch.float64, torch.float64)


def test_arguments_are_checked():
    x, rm, rv, w, b, res = make(residual=True)
    with pytest.raises(TypeError, match="x must be a tensor, got str"):
        call("x", rm, rv, w, b, res)
    with pytest.raises(TypeError, match=r"running_mean must be of dtype .*, got torch.int64"):
        call(x, rm.long(), rv, w, b, res)
    with pytest.raises(TypeError, match="running_var must be a tensor, got NoneType"):
        call(x, rm, None, w, b, res)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, ...\), got \(5,\)"):
        call(rm, rm, rv, w, b, None)
    with pytest.raises(ValueError, match=r"running_var must have shape \(C\) with C = 5, got \(4,\)"):
        call(x, rm, rv[:4], w, b, res)
    with pytest.raises(ValueError, match=r"weight must have shape \(C\) with C = 5, got \(5, 1\)"):
        call(x, rm, rv, w[:, None], b, res)
    with pytest.raises(ValueError, match="bias must be on the device of x, cpu, got meta"):
        call(x, rm, rv, w, b.to("meta"), res)
    with pytest.raises(ValueError, match=r"residual must have the shape of x, \(3, 5, 4, 2\), got \(3, 5, 2, 4\)"):
        call(x, rm, rv, w, b, res.transpose(2, 3))
    for wrong in (0, -1e-5, math.nan):
        with pytest.raises(ValueError, match=r"eps must be a finite number above 0, got"):
            call(x, rm, rv, w, b, res, eps=wrong)
    with pytest.raises(TypeError, match="eps must be a number, got Tensor"):
        call(x, rm, rv, w, b, res, eps=torch.tensor(1e-5))
    with pytest.raises(ValueError, match="activation must be 'none', 'relu' or 'relu6', got None"):
        call(x, rm, rv, w, b, res, activation=None)
    with pytest.raises(TypeError, match="x must be of dtype"):
        ops.channel_statistics(x.long())
