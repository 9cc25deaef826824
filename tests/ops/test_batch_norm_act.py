"""batch_norm_act against definitions in float64, and the running statistics that it updates in place."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code  # torch has no public name for it

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES, assert_close, random, unit_roundoff, value_and_gradients

from .table import DTYPES, RecordedOperators, assert_matches, norm_act
from .table import call_act as call

ACTIVATIONS = ("none", "relu", "leaky_relu")
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}
SHAPES = {name: shape for name, shape in SHAPES.items() if name not in ("one element", "empty batch")}
FLOAT = unit_roundoff(torch.float32)


def definition(x, weight, bias, running_mean, running_var, residual, *, activation):
    """Compute each channel in turn."""
    maps = []
    for c in range(x.shape[1]):
        v = x[:, c]
        mean = v.sum() / v.numel()
        y = (v - mean) / torch.sqrt(((v - mean) ** 2).sum() / v.numel() + 1e-3)
        y = y * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
        y = y if residual is None else y + residual[:, c]
        slope = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2}[activation]
        maps.append(torch.where(y > 0, y, slope * y))
    return torch.stack(maps, 1)


def running(channels=5, *, dtype=torch.float32, device="cpu"):
    """Running mean and variance."""
    mean = random(channels, dtype=dtype, device=device, seed=7)
    return mean, random(channels, dtype=dtype, device=device, seed=8).square() + 0.5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("affine", "residual"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_match_formula(shape, affine, residual, activation):
    inputs = norm_act(shape, dtype=torch.float64, affine=affine, residual=residual)(1)
    assert_matches(partial(call, activation=activation), partial(definition, activation=activation), inputs, atol=1e-11)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("slope", [None, 0.2, 0.0, 1.5])
def test_activations_match_torch_at_their_limits(backend_and_device, slope, residual):
    """With a weight of 0, the activation's argument is exactly the bias or the residual."""
    backend, device = backend_and_device
    z = torch.tensor([[-1.0, -0.0, 0.0, 2.0], [-3.0, 5.0, -0.0, 0.0]], device=device, requires_grad=True)
    bias = z.detach()[0].requires_grad_()
    options = {"activation": "relu"} if slope is None else {"activation": "leaky_relu", "negative_slope": slope}
    given = {"bias": None, "residual": z} if residual else {"bias": bias, "residual": None}
    x, weight = random(2, 4, device=device), torch.zeros(4, device=device)
    y = call(x, weight, running_mean=None, running_var=None, backend=backend, **given, **options)
    leaf = z if residual else bias
    expected = F.relu(leaf) if slope is None else F.leaky_relu(leaf, slope)
    expected = expected.expand(2, 4)
    assert torch.equal(y, expected)
    assert torch.equal(y.signbit() & (y != 0), expected.signbit() & (expected != 0))
    for a, b in zip(*(torch.autograd.grad(v, leaf, z.detach() + 3) for v in (y, expected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision_stays_within_bound(backend_and_device, dtype, activation):
    """The reference rounds three times: after the normalization, the addition and the activation."""
    backend, device = backend_and_device
    inputs = norm_act((4, 6, 9, 7), dtype=dtype, residual=True, device=device)(1)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    (y,), gradients = value_and_gradients(partial(call, activation=activation, backend=backend), inputs)
    (truth,), expected = value_and_gradients(partial(definition, activation=activation), exact)
    assert y.dtype == dtype
    assert_close(y, truth, atol=8 * unit_roundoff(dtype), rtol=4 * unit_roundoff(dtype), name="y")
    for got, exact_gradient, given in zip(gradients, expected, inputs, strict=True):
        if exact_gradient is not None:
            assert got.dtype == given.dtype
            # Besides rounding, the activation of a few values near zero may differ.
            assert (got.double() - exact_gradient).norm() <= 32 * unit_roundoff(dtype) * exact_gradient.norm()


def test_dtypes_may_differ(backend_and_device):
    backend, device = backend_and_device
    x, w, b, _, _, res = norm_act(residual=True, device=device)(1)
    mean, var = running(dtype=torch.bfloat16, device=device)
    before = mean.double(), var.double()
    y = call(
        *(x.half(), w.double(), b.bfloat16(), mean, var.double(), res.float()),
        update_running_stats=True,
        backend=backend,
    )
    assert y.dtype == torch.float16
    truth = definition(*(t.double() for t in (x.half(), w, b.bfloat16(), *before, res)), activation="none")
    assert_close(y, truth, atol=4e-3, rtol=4e-3)
    assert_close(mean, 0.9 * before[0] + 0.1 * x.half().double().mean((0, 2, 3)), atol=0.0, rtol=1e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0])
def test_running_statistics_match_torch(backend_and_device, dtype, layout, momentum):
    """The error is that of float32 sums of 120 values. The buffers are views, updated in place once per call."""
    backend, device = backend_and_device
    x = random(6, 5, 4, 5, dtype=dtype, scale=3.0, shift=2.0, layout=layout, device=device, requires_grad=True)
    both = torch.stack(running(device=device), 1)
    mean, var = both.unbind(1)
    expected = [t.double() for t in (mean, var)]
    pointers, versions = (mean.data_ptr(), var.data_ptr()), both._version
    for _ in range(2):
        y = ops.batch_norm_act(x, None, None, mean, var, momentum=momentum, backend=backend)
        F.batch_norm(x.detach().double(), *expected, training=True, momentum=momentum)
    y.sum().backward()
    assert (mean.data_ptr(), var.data_ptr()) == pointers
    assert backend == "reference" or both._version > versions  # F.batch_norm does not count its update
    for got, truth in zip((mean, var), expected, strict=True):
        assert_close(got, truth, atol=4 * FLOAT, rtol=16 * FLOAT)


@pytest.mark.parametrize(
    ("mean", "deviation", "layout"),
    [
        *((30.0, 2.0, "contiguous"), (30.0, 2.0, "strided"), (-1000.0, 1.0, "channels_last")),
        *((3000.0, 2.0, "channels_last"), (1e-3, 1e-6, "channels_last"), (1e-3, 1e-6, "contiguous")),
    ],
)
def test_statistics_are_accurate_for_large_means(kernel_device, mean, deviation, layout):
    """With momentum 1, the running statistics are those of the batch; the variance is multiplied by M / (M - 1)."""
    x = random(16, 3, 28, 28, scale=deviation, shift=mean, seed=3, layout=layout, device=kernel_device)
    got_mean, got_var = running(3, device=kernel_device)
    y = ops.batch_norm_act(x, None, None, got_mean, got_var, momentum=1.0, eps=1e-30, backend="triton")
    exact = x.double()
    center = exact.mean((0, 2, 3), keepdim=True)
    assert_close(got_mean, center.flatten(), atol=0.0, rtol=16 * FLOAT, name="mean")
    assert_close(got_var, exact.var((0, 2, 3)), atol=(16 * FLOAT * mean) ** 2, rtol=64 * FLOAT, name="var")
    # An error of the mean shifts y.
    atol = 16 * FLOAT * (1 + abs(mean) / deviation)
    assert_close(y, (exact - center) / exact.std((0, 2, 3), correction=0, keepdim=True), atol=atol, rtol=64 * FLOAT)


def test_running_statistics_are_unchanged_unless_updated(backend_and_device):
    backend, device = backend_and_device
    x, buffers, before = random(3, 5, 4, 2, device=device), running(device=device), running(device=device)
    y = ops.batch_norm_act(x, None, None, *buffers, update_running_stats=False, backend=backend)
    assert torch.equal(y, ops.batch_norm_act(x, None, None, None, None, backend=backend))
    empty = ops.batch_norm_act(x[:0], None, None, *buffers, backend=backend)
    assert empty.shape == (0, 5, 4, 2)
    for got, old in zip(buffers, before, strict=True):
        assert torch.equal(got, old)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_training_running_statistics_normalize(activation):
    x, w, b, mean, var, res = norm_act(dtype=torch.float64, residual=True)(1)
    options = {"activation": activation, "training": False, "update_running_stats": True}
    before = mean.clone(), var.clone()
    y = call(x, w, b, mean, var, res, **options)
    y_expected = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-3).sqrt() * w.view(-1, 1, 1)
    y_expected = y_expected + b.view(-1, 1, 1) + res
    function = {"none": lambda z: z, "relu": F.relu, "leaky_relu": partial(F.leaky_relu, negative_slope=0.2)}
    assert_close(y, function[activation](y_expected), atol=1e-12)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    with pytest.raises(RuntimeError, match=r"does not support .*: its kernels normalize by batch statistics"):
        call(x, w, b, mean, var, res, backend="triton", **options)
    with pytest.raises(ValueError, match="running_mean must not be None if training is False"):
        call(x, w, b, None, var, res, **options)


def test_one_value_per_channel_raises(backend_and_device):
    backend, device = backend_and_device
    for shape in ((1, 5), (1, 5, 1, 1)):
        x = random(*shape, device=device)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            ops.batch_norm_act(x, None, None, None, None, backend=backend)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            F.batch_norm(x, None, None, training=True)
        mean, var = running(device=device)
        assert ops.batch_norm_act(x, None, None, mean, var, training=False).shape == shape


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_code_updates_running_statistics_in_place(kernel_device, compiler):
    """Two calls update the same buffers. The generated code passes the buffers to the operator, without copies."""

    def function(x, weight, mean, var):
        for _ in range(2):
            x = ops.batch_norm_act(2 * x, weight, None, mean, var, activation="relu", momentum=0.3, backend="triton")
        return x

    weight = random(5, shift=1.0, device=kernel_device, requires_grad=True)
    x = random(3, 5, 4, 2, device=kernel_device, requires_grad=True)
    results = []
    torch.compiler.reset()
    for each in (function, torch.compile(function, fullgraph=True, backend=compiler)):
        buffers = running(device=kernel_device)
        y, codes = run_and_get_code(each, x, weight, *buffers)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight)), *buffers))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-6)
    if compiler == "inductor":
        calls = re.findall(r"batch_norm_act\.default\(\w+, \w+, None, None, (\w+), (\w+),", codes[0])
        assert len(calls) == 2
        assert calls[0] == calls[1]
        for buffer in calls[0]:
            assert buffer.startswith("primals_")
            assert f"{buffer} = " in codes[0].replace(",", " =")
            assert not re.search(rf"copy_\(.*{buffer}|fused_\w*\(.*{buffer}", codes[0])


def test_operator_with_running_statistics_passes_opcheck(kernel_device):
    x = random(3, 5, 4, 2, device=kernel_device, requires_grad=True)
    for buffers in (running(device=kernel_device), (running(device=kernel_device)[0], None)):
        with RecordedOperators() as operators:
            ops.batch_norm_act(x, None, None, *buffers, backend="triton")
        ((function, arguments),) = operators.calls
        torch.library.opcheck(function, arguments)


def test_function_transforms_update_running_statistics(backend_and_device):
    """vmap over buffers of each sample works with kernels; buffers shared by samples raise an error, as in PyTorch."""
    backend, device = backend_and_device
    xs = torch.stack([random(3, 5, 4, 2, seed=seed, device=device) for seed in (1, 2)])
    function = partial(ops.batch_norm_act, momentum=0.3, backend=backend)
    expected, buffers = running(device=device), running(device=device)
    for x in xs:
        function(x, None, None, *expected)
        torch.func.grad(lambda x: function(x, None, None, *buffers).square().sum())(x)
    for a, b in zip(buffers, expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises((RuntimeError, ValueError), match=r"vmap|running_mean"):
        torch.func.vmap(lambda x: function(x, None, None, *buffers))(xs)
    if backend == "triton":
        each = [torch.stack([t, t]) for t in running(device=device)]
        torch.func.vmap(lambda x, *buffers: function(x, None, None, *buffers))(xs, *each)
        for i, x in enumerate(xs):
            single = running(device=device)
            function(x, None, None, *single)
            for a, b in zip(each, single, strict=True):
                assert torch.equal(a[i], b)


def test_runs_in_inference_mode(backend_and_device):
    backend, device = backend_and_device
    expected = running(device=device)
    y = ops.batch_norm_act(random(3, 5, 4, 2, device=device), None, None, *expected, backend=backend)
    with torch.inference_mode():
        buffers = running(device=device)
        found = ops.batch_norm_act(random(3, 5, 4, 2, device=device), None, None, *buffers, backend=backend)
    for a, b in zip((found, *buffers), (y, *expected), strict=True):
        assert torch.equal(a, b)


def test_momentum_must_be_a_number():
    with pytest.raises(ValueError, match=f"momentum must be a finite number, got {math.nan}"):
        ops.batch_norm_act(random(2, 5), None, None, None, None, momentum=math.nan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_evaluation_does_not_write_running_statistics(dtype):
    buffers = running(dtype=dtype)
    ops.batch_norm_act(random(3, 5, 4, 2), None, None, *buffers, training=False)
    assert [buffer._version for buffer in buffers] == [0, 0]


def strided_norm(kind):
    """Inputs of :func:`call`: vectors with strides, or maps whose memory format depends on sizes of 1."""
    inputs = [None if t is None else t.detach() for t in norm_act((1, 5, 4, 1), dtype=torch.float64)(1)]
    if kind == "maps":
        inputs[0] = inputs[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert inputs[0].stride() == (1, 1, 5, 20)
        return inputs
    view = {
        "expanded": lambda v: v[:1].expand(5),
        "strided": lambda v: torch.stack([v, v.new_full((5,), 9.0)], 1)[:, 0],
    }
    return [inputs[0], *(view[kind](v) for v in inputs[1:5]), None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["maps", "expanded", "strided"])
def test_strides_do_not_change_values_and_gradients(kind, training):
    """PyTorch's BatchNorm computes wrong gradients for these strides on the CPU."""
    inputs = strided_norm(kind)
    dense = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in inputs]
    function = partial(call, training=training)
    results = [
        value_and_gradients(
            function, [t if t is None else t.detach().requires_grad_(i < 3) for i, t in enumerate(tensors)]
        )
        for tensors in (inputs, dense)
    ]
    for found, expected in zip(*results, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_channels_last_volumes():
    """Maps with 2 to 7 channels are copied on the CPU, volumes are not."""
    x = random(2, 3, 2, 3, 2, dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last_3d)
    assert_close(
        ops.batch_norm_act(last, None, None, None, None), ops.batch_norm_act(x, None, None, None, None), atol=1e-14
    )


def test_strided_running_statistics_are_updated():
    x, vectors = random(3, 5, 4, 2), running()
    views = [torch.stack([v, v], 1)[:, 0] for v in vectors]
    for each in (vectors, views):
        ops.batch_norm_act(x, None, None, *each, backend="reference")
    assert torch.equal(vectors[0], views[0])
    assert torch.equal(vectors[1], views[1])


def test_a_residual_whose_elements_overlap():
    """The strides of the sum, and with them those of BatchNorm's output gradient, depend on the residual's."""
    torch.manual_seed(0)
    x = torch.randn(20, dtype=torch.float64).as_strided((5, 2, 1, 2), (4, 1, 4, 2))
    residual = torch.randn(12, dtype=torch.float64).as_strided((5, 2, 1, 2), (1, 2, 2, 1))
    weight, bias = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    grad_output, results = torch.randn(5, 2, 1, 2, dtype=torch.float64), []
    for each in (residual, residual.contiguous()):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
        y = ops.batch_norm_act(*leaves, None, None, residual=each, activation="relu")
        results.append([y, *torch.autograd.grad(y, leaves, grad_output)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
