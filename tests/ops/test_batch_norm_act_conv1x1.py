"""batch_norm_act_conv1x1 with the gate that reads its features, against definitions in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, random, unit_roundoff, value_and_gradients

from .table import DTYPES, assert_matches, conv1x1
from .table import call_conv1x1 as call

FORMS = ("spatial", "spatial_mean1", "channel")
SHAPES = {name: shape for name, shape in MAP_SHAPES.items() if name not in ("one element", "empty batch")}


def definition(x, weight, bias, running_mean, running_var, conv_weight, conv_bias, *, form):
    """Compute each channel in turn, and the gate of each channel or position."""
    channels, height, width = x.shape[1:]
    maps = []
    for c in range(channels):
        v = x[:, c]
        mean = v.sum() / v.numel()
        z = (v - mean) / torch.sqrt(((v - mean) ** 2).sum() / v.numel() + 1e-3)
        z = z * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
        maps.append(torch.where(z > 0, z, 0.2 * z))
    f = torch.stack(maps, 1)
    reduced = torch.einsum("kc,nchw->nkhw", conv_weight, f)
    reduced = reduced if conv_bias is None else reduced + conv_bias[:, None, None]
    hidden = conv_weight.shape[0]
    gate = torch.linspace(-1, 1, channels * hidden, dtype=x.dtype).view(channels, hidden)
    e = torch.exp(torch.einsum("ck,nkhw->nchw", gate, reduced.sin()))
    if form == "channel":
        return reduced, f + channels * e / e.sum(1, keepdim=True) * f
    return reduced, f + height * width * e / e.sum((2, 3), keepdim=True) * f  # in both forms, because of the scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_match_formula(shape, affine, form):
    inputs = conv1x1(shape, dtype=torch.float64, affine=affine)(1)
    assert_matches(partial(call, form=form), partial(definition, form=form), inputs, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision_stays_within_bound(backend_and_device, dtype, form):
    backend, device = backend_and_device
    inputs = conv1x1((4, 24, 9, 7), dtype=dtype, device=device)(1)
    exact = [t.detach().double().cpu().requires_grad_(t.requires_grad) for t in inputs]
    values, gradients = value_and_gradients(partial(call, form=form, backend=backend), inputs)
    truths, expected = value_and_gradients(partial(definition, form=form), exact)
    for got, truth in zip((*values, *gradients), (*truths, *expected), strict=True):
        if truth is not None:
            assert got.dtype == dtype
            assert (got.double().cpu() - truth).norm() <= 32 * unit_roundoff(dtype) * truth.norm()


def test_dtypes_may_differ(backend_and_device):
    backend, device = backend_and_device
    x, w, b, mean, var, conv, conv_bias = (t.detach() for t in conv1x1(device=device)(1))
    given = (x.half(), w.double(), b.bfloat16(), mean.bfloat16(), var.double(), conv.double(), conv_bias.bfloat16())
    reduced, out = call(*given, update_running_stats=True, backend=backend)
    assert reduced.dtype == out.dtype == torch.float16
    truth = definition(*(t.double().cpu() for t in given), form="spatial")
    for got, expected in zip((reduced, out), truth, strict=True):
        assert_close(got.cpu(), expected, atol=2e-2, rtol=2e-2)
    assert_close(given[3], 0.9 * mean.bfloat16() + 0.1 * x.mean((0, 2, 3)), atol=1e-2)


def test_weight_gradient_of_constant_channels_is_finite(backend_and_device):
    """The kernels compute mean / sqrt(eps) after the last position, which is infinite in float16."""
    backend, device = backend_and_device
    x, *_, conv, conv_bias = (t.detach() for t in conv1x1((1, 5, 2, 2), dtype=torch.float16, device=device)(1))
    conv.requires_grad_()
    call(x * 0 + 3e4, None, None, None, None, conv, conv_bias, backend=backend)[0].sum().backward()
    assert torch.equal(conv.grad, torch.zeros_like(conv))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0])
def test_running_statistics_match_torch(backend_and_device, dtype, momentum):
    backend, device = backend_and_device
    x, _, _, mean, var, conv, _ = (t.detach() for t in conv1x1((6, 5, 4, 5), device=device)(1))
    x, both = x.to(dtype).requires_grad_(), torch.stack([mean, var], 1)
    mean, var = both.unbind(1)
    expected, version = [t.double() for t in (mean, var)], both._version
    for _ in range(2):
        result = ops.batch_norm_act_conv1x1(x, None, None, mean, var, conv, momentum=momentum, backend=backend)
        F.batch_norm(x.detach().double(), *expected, training=True, momentum=momentum)
    result[0].sum().backward()
    assert backend == "reference" or both._version > version
    roundoff = unit_roundoff(torch.float32)
    for got, truth in zip((mean, var), expected, strict=True):
        assert_close(got, truth, atol=4 * roundoff, rtol=16 * roundoff)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_equals_separate_modules(training, dtype):
    torch.manual_seed(0)
    norm, conv = nn.BatchNorm2d(16).train(training).to(dtype), nn.Conv2d(16, 2, 1).to(dtype)
    x = random(3, 16, 6, 5, dtype=dtype, layout="channels_last", requires_grad=True)
    running = norm.running_mean.clone(), norm.running_var.clone()
    given = (x, norm.weight, norm.bias, *running, conv.weight.flatten(1), conv.bias)
    reduced, f, none = ops.batch_norm_act_conv1x1(*given, negative_slope=0.2, training=training)
    expected_f = F.leaky_relu(norm(x), 0.2)
    expected = conv(expected_f)
    assert none is None
    leaves = [x, *norm.parameters(), *conv.parameters()]
    for results in ((reduced, expected), (f, expected_f), zip(running, norm.buffers(), strict=False)):
        for a, b in [results] if isinstance(results, tuple) else results:
            assert torch.equal(a, b)
    dy, df = random(*reduced.shape, dtype=dtype, seed=3), random(*f.shape, dtype=dtype, seed=4)
    found, truth = (torch.autograd.grad(pair, leaves, (dy, df)) for pair in ((reduced, f), (expected, expected_f)))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_kernels_leave_the_activated_map_out_only_if_they_support_the_call(kernel_device):
    """Otherwise the features are the activated map."""
    for shape, hidden, layout, fused in (
        ((2, 16, 4, 3), 2, "channels_last", True),
        ((2, 256, 4, 3), 32, "channels_last", True),
        ((2, 257, 4, 3), 32, "channels_last", False),
        ((2, 16, 4, 3), 33, "channels_last", False),
        ((2, 16, 4, 3), 2, "contiguous", False),
        ((2, 16, 4, 3), 2, "strided", False),
        ((2, 1, 4, 3), 2, "channels_last", False),
    ):
        inputs = conv1x1(shape, hidden=hidden, layout=layout, device=kernel_device)(1)
        reduced, features, norm = ops.batch_norm_act_conv1x1(*inputs, backend="triton")
        expected, f, none = ops.batch_norm_act_conv1x1(*inputs, backend="reference")
        assert none is None
        assert (norm is not None) == fused
        assert_close(reduced, expected, atol=1e-5)
        assert_close(features, inputs[0] if fused else f, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_one_result(kernel_device, used):
    """The gradient of the other one is missing."""
    inputs = conv1x1((3, 8, 5, 4), device=kernel_device)(1)
    leaves = [t for t in inputs if t.requires_grad]

    def run(backend):
        reduced, features, norm = ops.batch_norm_act_conv1x1(*inputs, negative_slope=0.2, backend=backend)
        gate, hidden = random(8, 3, device=kernel_device), random(3, 3, 5, 4, device=kernel_device)
        result = ops.spatial_attention(features, hidden, gate, norm=norm, backend=backend) if used else reduced
        return torch.autograd.grad(
            result, leaves, random(*result.shape, seed=5, device=kernel_device), allow_unused=True
        )

    for a, b in zip(run("triton"), run("reference"), strict=True):
        assert_close(a, torch.zeros_like(a) if b is None else b, atol=2e-5)


def test_a_norm_requires_the_triton_backend(kernel_device):
    inputs = [t.detach() for t in conv1x1(device=kernel_device)(1)]
    reduced, features, norm = ops.batch_norm_act_conv1x1(*inputs, backend="triton")
    weight = random(8, 3, device=kernel_device)
    expected = ops.spatial_attention(features, reduced, weight, norm=norm, backend="triton")
    with ops.backend("reference"):
        assert torch.equal(ops.spatial_attention(features, reduced, weight, norm=norm), expected)
    with pytest.raises(ValueError, match="backend must be 'triton' or None with a norm, got 'reference'"):
        ops.spatial_attention(features, reduced, weight, norm=norm, backend="reference")


def test_kernels_require_training(kernel_device):
    inputs = conv1x1(device=kernel_device)(1)
    with pytest.raises(RuntimeError, match="its kernels normalize by batch statistics, and training is False"):
        ops.batch_norm_act_conv1x1(*inputs, training=False, backend="triton")


def test_arguments_are_checked():
    x, w, b, mean, var, conv, conv_bias = (t.detach() for t in conv1x1()(1))
    with pytest.raises(ValueError, match="running_mean must not be None if training is False"):
        ops.batch_norm_act_conv1x1(x, w, b, None, var, conv, conv_bias, training=False)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        ops.batch_norm_act_conv1x1(x[:1, :, :1, :1], w, b, mean, var, conv, conv_bias)
