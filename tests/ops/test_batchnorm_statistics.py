"""batchnorm_statistics and channel_statistics against definitions in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, MAP_SHAPES, assert_close, random, unit_roundoff, value_and_gradients, with_layout

from .definitions import results
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
def test_statistics_are_accurate_for_large_means(every_backend_and_device, mean, deviation, layout):
    """E[x^2] - E[x]^2 would have an error of 225 unit roundoffs at mean 30, and no correct digit at mean -1000."""
    backend, device = every_backend_and_device
    x = random(16, 3, 28, 28, scale=deviation, shift=mean, seed=3, layout=layout, device=device)
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    _, got_mean, got_var = ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, backend=backend)
    exact, u = x.double(), unit_roundoff(torch.float32)
    center = exact.mean((0, 2, 3))
    # The mean has the error of a pairwise sum of 12,544 terms. var has its square, and the error of the sum in var.
    assert_close(got_mean, center, atol=0.0, rtol=16 * u, name="mean")
    spread = (exact - center[:, None, None]).square().mean((0, 2, 3))
    assert_close(got_var, spread, atol=(16 * u * mean) ** 2, rtol=64 * u, name="var")


def test_gradients_are_accurate_for_large_means_and_rounded_once(every_backend_and_device):
    """As an affine map of x, the gradient of var would have no correct digit at mean 10,000."""
    backend, device = every_backend_and_device

    def statistics(x, bias):
        zero, one = torch.zeros(3, device=device, dtype=x.dtype), torch.ones(3, device=device, dtype=x.dtype)
        return ops.batchnorm_statistics(x, zero, one, None, bias, 1e-5, backend=backend)

    bias = torch.zeros(3, device=device)
    vectors = bias.double(), bias.double() + 1, None, bias.double()
    x = random(8, 3, 5, 5, scale=1e-2, shift=1e4, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(statistics(x, bias)[2].sum(), x)
    exact = x.detach().double()
    expected = 2 * (exact - exact.mean((0, 2, 3), keepdim=True)) / 200
    assert_close(gradient, expected, atol=2 * 1e4 * unit_roundoff(torch.float32) * 2 / 200)

    x = random(2, 3, 5, 5, dtype=torch.float16, device=device).requires_grad_()
    grads: list[torch.Tensor] = []
    gradient = results(lambda x: statistics(x, bias), [x], grads)[-1]
    exact = x.detach().double().requires_grad_()
    expected = results(lambda x: definition(x, *vectors, None, activation="none", eps=1e-5), [exact], grads)[-1]
    once = backend != "cpu"  # which adds two rounded gradients, as autograd does
    assert_close(gradient, expected, rtol=1.01 * unit_roundoff(x.dtype), atol=1e-7 if once else 1e-3)


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("relu6", F.relu6)])
@pytest.mark.parametrize("residual", [False, True])
def test_activations_match_torch_at_their_limits(every_backend_and_device, residual, activation, function):
    backend, device = every_backend_and_device
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("affine", "residual"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (s, layout)
        for s in SHAPES.values()
        for layout in LAYOUTS
        if 0 not in s and (len(s) == 4 or layout != "channels_last")
    ],
)
def test_cpu_backend_matches_formula(shape, layout, affine, residual, activation):
    inputs = make(shape, dtype=torch.float32, affine=affine, residual=residual)
    inputs = [
        t if i not in (0, 5) or t is None else with_layout(t, layout).requires_grad_() for i, t in enumerate(inputs)
    ]
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    with ops.backend("cpu"):
        values, gradients = value_and_gradients(partial(call, activation=activation), inputs)
    expected, expected_gradients = value_and_gradients(partial(definition, activation=activation), exact)
    assert values[0].stride() == ops.batchnorm_statistics(*inputs[:5], 1e-3, backend="reference")[0].stride()
    u = unit_roundoff(torch.float32)
    for got, correct in zip((*values, *gradients), (*expected, *expected_gradients), strict=True):
        if correct is not None:
            assert_close(got, correct, atol=512 * u, rtol=16 * u)


@pytest.mark.parametrize("needs", [(0,), (0, 1), (0, 2), (1,), (2,)])
def test_cpu_backend_has_the_gradients_of_each_result(needs):
    """Results that a loss does not use have no gradient."""
    x, rm, rv, w, b, _ = make(dtype=torch.float32)
    gradients = []
    for backend in ("cpu", "reference"):
        results = ops.batchnorm_statistics(x, rm, rv, w, b, 1e-3, activation="relu", backend=backend)
        total = sum(results[i].square().sum() for i in needs)
        gradients.append(torch.autograd.grad(total, [x, w, b], allow_unused=True))
    for a, other in zip(*gradients, strict=True):
        assert (a is None) == (other is None)
        if a is not None:
            assert_close(a, other, atol=1e-4, rtol=1e-5)


def test_cpu_backend_is_automatic_only_where_it_is_supported():
    x, rm, rv, w, b, _ = make(dtype=torch.float32)
    rm, rv = rm.detach(), rv.detach()

    def chosen(x, activation="relu"):
        y = ops.batchnorm_statistics(x, rm, rv, w, b, 1e-3, activation=activation)[0]
        return "cpu" if "Fused" in type(y.grad_fn).__name__ else "reference"

    assert chosen(x) == chosen(x.bfloat16()) == chosen(x, "relu6") == "cpu"
    assert chosen(x.double()) == chosen(x[:0]) == chosen(x.half(), "relu6") == "reference"
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        ops.batchnorm_statistics(x.double(), rm, rv, w, b, 1e-3, backend="cpu")
    y, mean, var = ops.batchnorm_statistics(x, rm, rv, w, b, 1e-3)
    (gradient,) = torch.autograd.grad((y.square().sum(), var.sum()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference'"):
        gradient.sum().backward()
    compiled = torch.compile(lambda x: ops.batchnorm_statistics(x, rm, rv, w, b, 1e-3), backend="eager", fullgraph=True)
    for a, other in zip(compiled(x), (y, mean, var), strict=True):
        assert_close(a, other, atol=1e-6, rtol=1e-6)


def test_dtypes_may_differ():
    x, rm, rv, w, b, res = make(residual=True)
    y, mean, _ = call(x.bfloat16(), rm.float(), rv.float(), w.float(), b.float(), res.float())
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    y, mean, _ = call(x, rm.float(), rv.float(), w.float(), b.float(), res.half())
    assert (y.dtype, mean.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["maps", "expanded"])
def test_strides_do_not_change_values_and_gradients(backend, kind):
    """PyTorch's BatchNorm computes wrong gradients for these strides on the CPU."""
    x, *vectors, _ = (None if t is None else t.detach() for t in make((1, 5, 4, 1), dtype=torch.float32))
    if kind == "maps":
        x = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    else:
        vectors = [v[:1].expand(5) for v in vectors]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in (x, *vectors)]
    results = []
    for tensors in ([x, *vectors], dense):
        leaves = [t.detach().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(tensors)]
        results.append(value_and_gradients(lambda *t: ops.batchnorm_statistics(*t, 1e-3, backend=backend), leaves))
    for found, expected in zip(*results, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)
