"""Modules of ``dfkd_fast.nn`` against float64 definitions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfkd_fast
from dfkd_fast import ops
from dfkd_fast.nn import (
    AttentionGenerator,
    HighOrderAttention,
    ProjectionHead,
    SpatialAttention,
    batch_norm_act,
    freeze_spectral_norm,
)
from dfkd_fast.testing import random


@pytest.mark.parametrize("mode", ["joint", "per_order"])
@pytest.mark.parametrize(("channels", "order"), [(3, 1), (9, 2), (16, 3), (5, 4)])
def test_high_order_attention_matches_definition(channels: int, order: int, mode: str) -> None:
    module = HighOrderAttention(channels, order=order, mode=mode).double()  # type: ignore[arg-type]
    assert module.proj_weight.shape == (order * (order + 1) // 2, max(1, channels // 4), channels)
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64)
    logits, factor = [], 0
    for r in range(order):  # the product of r + 1 projections
        z = torch.ones(2, module.proj_weight.shape[1], 3, 5, dtype=torch.float64)
        for _ in range(r + 1):
            z = z * torch.einsum("kc,nchw->nkhw", module.proj_weight[factor], x)
            factor += 1
        logits.append(torch.einsum("ck,nkhw->nchw", module.out_weight[r], z.clamp(min=0)))
    if mode == "joint":
        attention = 1 / (1 + torch.exp(-sum(logits)))
    else:
        attention = sum(1 / (1 + torch.exp(-one)) for one in logits) / order
    torch.testing.assert_close(module.attention(x), attention)
    torch.testing.assert_close(module(x), attention * x)


@pytest.mark.parametrize("form", ["spatial", "spatial_mean1", "channel"])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_spatial_attention_matches_definition(form: str, size: tuple[int, int], training: bool) -> None:
    torch.manual_seed(0)
    module = SpatialAttention(16, reduction=8, scale=0.05, form=form).double().train(training)  # type: ignore[arg-type]
    x = torch.randn(3, 16, *size, dtype=torch.float64)

    def norm(y: Tensor) -> Tensor:
        if training:
            y = y - y.mean((0, 2, 3), keepdim=True)
            y = y / (y.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        else:  # the initial statistics
            y = y / (1 + 1e-5) ** 0.5
        return y.clamp(min=0)

    narrow = F.conv2d(x, module.reduce.weight, module.reduce.bias)
    encoded = norm(F.conv2d(narrow, module.encode.weight, padding=1))
    pooled, indices = F.max_pool2d(encoded, 2, return_indices=True)
    inner = norm(F.conv2d(pooled, module.bottleneck.weight, padding=1))
    widened = norm(F.conv_transpose2d(inner, module.widen.weight, padding=1))
    unpooled = torch.zeros_like(encoded).flatten(2).scatter(2, indices.flatten(2), widened.flatten(2)).view_as(encoded)
    hidden = norm(F.conv_transpose2d(unpooled, module.decode.weight, padding=1))
    logits = F.conv2d(hidden, module.expand.weight, module.expand.bias)
    weights = torch.exp(logits - logits.max())
    positions = size[0] * size[1]
    gate = {
        "spatial": weights / weights.sum((2, 3), keepdim=True),
        "spatial_mean1": positions * weights / weights.sum((2, 3), keepdim=True),
        "channel": weights / weights.sum(1, keepdim=True),
    }[form]
    # Compare only the added term: a comparison of the output, of which it is a small share, would be less strict.
    torch.testing.assert_close((module(x) - x) * positions, 0.05 * gate * x * positions, rtol=1e-9, atol=1e-10)


def test_spatial_attention_kernels_match_reference(kernel_device: str) -> None:
    torch.manual_seed(0)
    module = SpatialAttention(16, reduction=8).to(kernel_device, memory_format=torch.channels_last)
    x = random(2, 16, 5, 6, layout="channels_last", device=kernel_device, requires_grad=True)
    results = []
    for name in ("triton", "reference"):
        with ops.backend(name):
            hidden = module.hidden(x)
        results.append((hidden, torch.autograd.grad(hidden.square().sum(), x)[0]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_spatial_attention_state_dict_has_stable_names() -> None:
    layers = ("reduce", "encode", "bottleneck", "widen", "decode", "expand")
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{layer}.weight" for layer in layers} | {"reduce.bias", "expand.bias"}
    names |= {f"{layer}_norm.{each}" for layer in layers[1:5] for each in statistics}
    assert set(SpatialAttention(16).state_dict()) == names


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_spatial_attention_of_a_normalized_map_matches_separate_modules(kernel_device: str, form: Any) -> None:
    """The kernels do not write the activated map."""
    torch.manual_seed(0)
    module = SpatialAttention(16, form=form, scale=10.0).to(kernel_device, memory_format=torch.channels_last)
    bn = nn.BatchNorm2d(16).to(kernel_device)
    x = random(3, 16, 6, 5, layout="channels_last", device=kernel_device, requires_grad=True)
    weight = random(3, 16, 6, 5, device=kernel_device, seed=2)
    leaves = [x, *bn.parameters(), *module.parameters()]
    results = []
    for name in ("triton", "reference"):
        state = [copy.deepcopy(each.state_dict()) for each in (bn, module)]
        with ops.backend(name):
            y = module.forward_normalized(x, bn, 0.2) if name == "triton" else module(F.leaky_relu(bn(x), 0.2))
        results.append((y, *torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True), bn.running_var.clone()))
        for each, before in zip((bn, module), state, strict=True):
            each.load_state_dict(before)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generator_blocks_call_modules_with_hooks() -> None:
    generator = AttentionGenerator(16, latent_dim=3, channels=(16, 8, 8, 8, 8))
    noise = torch.randn(3, 3)
    before = copy.deepcopy(generator.state_dict())
    expected, block = generator(noise), generator.blocks[0]
    for hooked in (block.norm, block.attention, block.attention.reduce):
        generator.load_state_dict(before)
        calls = []
        handle = hooked.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(output.shape))
        torch.testing.assert_close(generator(noise), expected, rtol=0, atol=0)
        handle.remove()
        assert len(calls) == 1


@pytest.mark.parametrize("attention", ["spatial", "spatial_mean1", "channel", "none"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_generator_images_and_gradients(attention: str, batch_norm: bool) -> None:
    generator = AttentionGenerator(
        48, latent_dim=7, channels=(16, 8, 8, 8, 8), batch_norm=batch_norm, attention=attention
    )  # type: ignore[arg-type]
    images = generator(torch.randn(3, 7))
    assert images.shape == (3, 3, 48, 48)
    assert images.abs().max() <= 1
    assert torch.isfinite(images).all()
    images.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in generator.parameters())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in generator.blocks.modules())
    assert norms == 4 * batch_norm + 16 * (attention != "none")


def test_gain_keeps_the_signal_of_a_generator_without_batch_norm() -> None:
    def deviation(gain: float) -> float:
        """The deviation of the last block's output relative to that of the first block's input."""
        torch.manual_seed(0)
        generator, sizes = AttentionGenerator(64, batch_norm=False, attention="none", gain=gain), []
        for block in generator.blocks:
            block.register_forward_hook(lambda _, inputs, output: sizes.append((inputs[0].std(), output.std())))
        with torch.no_grad():
            generator(torch.randn(8, 256))
        return float(sizes[-1][1] / sizes[0][0])

    assert deviation(1.0) < 0.03
    assert 0.3 < deviation(4.0) < 5


def test_default_generator_has_the_channels_of_the_paper() -> None:
    for name in ("AttentionGenerator", "HighOrderAttention", "ProjectionHead", "SpatialAttention"):
        assert getattr(dfkd_fast, name) is getattr(dfkd_fast.nn, name)
    generator = AttentionGenerator(224)
    assert generator.project.out_features == 512 * 14 * 14
    shapes = [tuple(block.upsample.weight.shape) for block in generator.blocks]
    assert shapes == [(512, 256, 3, 3), (256, 128, 3, 3), (128, 64, 3, 3), (64, 64, 3, 3)]
    assert generator.paint.weight.shape == (3, 64, 3, 3)
    assert all(layer.bias is None for layer in (generator.project, *(block.upsample for block in generator.blocks)))
    without = AttentionGenerator(224, batch_norm=False)
    assert all(block.upsample.bias is not None for block in without.blocks)
    assert all(isinstance(block.attention, SpatialAttention) for block in generator.blocks)


def test_spectral_norm_iterates_once_per_forward_unless_frozen() -> None:
    generator = AttentionGenerator(16, latent_dim=4, channels=(8, 8, 8, 8, 8))
    parametrized = [name for name, _ in generator.named_parameters() if "parametrizations" in name]
    assert {name.split(".")[2] for name in parametrized} == {"upsample"}
    norm = generator.blocks[0].upsample.parametrizations.weight[0]
    weight = generator.blocks[0].upsample.parametrizations.weight.original.detach()
    before = {name: t.clone() for name, t in generator.state_dict().items() if name.endswith(("_u", "_v"))}
    v = norm._v.clone()
    with freeze_spectral_norm(generator):
        generator(torch.randn(2, 4))
    assert all(torch.equal(generator.state_dict()[name], value) for name, value in before.items())
    matrix = weight.transpose(0, 1).flatten(1)  # a transposed convolution has its output channels in dimension 1
    u = F.normalize(matrix @ v, dim=0, eps=norm.eps)
    v = F.normalize(matrix.T @ u, dim=0, eps=norm.eps)
    generator(torch.randn(2, 4))
    torch.testing.assert_close(norm._u, u)
    torch.testing.assert_close(norm._v, v)


def test_spectral_norm_matches_pytorch() -> None:
    ours = AttentionGenerator(16, latent_dim=4, channels=(8, 6, 8, 8, 8)).double().blocks[0].upsample
    theirs = torch.nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(8, 6, 3, bias=False)).double()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        (weight, expected), grad = (ours.weight, theirs.weight), torch.randn(8, 6, 3, 3).double()
        torch.testing.assert_close(weight, expected)
        gradients = (torch.autograd.grad(w, m.parameters(), grad)[0] for w, m in ((weight, ours), (expected, theirs)))
        torch.testing.assert_close(*gradients)


def test_projection_head_matches_definition() -> None:
    head = ProjectionHead(12, 5)
    assert [tuple(p.shape) for p in head.parameters()] == [(12, 12), (12,), (5, 12), (5,)]
    x = torch.randn(3, 12)
    torch.testing.assert_close(
        head(x), F.linear(F.linear(x, *head[0].parameters()).clamp(min=0), *head[2].parameters())
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AttentionGenerator(40), "image_size must be a positive multiple of 16, got 40"),
        (lambda: AttentionGenerator(32, channels=(8, 8)), "channels must have five entries"),
        (lambda: AttentionGenerator(32, gain=4.0), "gain must be 1 with batch_norm, which cancels it, got 4"),
        (lambda: HighOrderAttention(0), "channels, order and reduction must be at least 1, got 0"),
        (lambda: HighOrderAttention(8, mode="both"), "mode must be 'joint' or 'per_order', got 'both'"),  # type: ignore[arg-type]
    ],
)
def test_errors(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize(
    ("options", "training", "track"),
    [
        *(({}, True, True), ({"momentum": 0.3, "eps": 1e-3}, True, True), ({"affine": False}, True, True)),
        *(({"momentum": None}, True, True), ({"momentum": None}, False, True), ({}, False, True)),
        *(({"track_running_stats": False}, True, False), ({"track_running_stats": False}, False, False)),
        *(({}, True, False), ({}, False, False)),  # the second flag as changed by batchnorm_mode
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_batch_norm_act_equals_module(activation, options, training, track, dtype, residual) -> None:
    """Values, gradients and buffers are bitwise equal to those of the module and PyTorch's activations."""
    results = []
    for fused in (True, False):
        bn = nn.BatchNorm2d(6, **options).train(training)
        bn.track_running_stats = track
        for i, parameter in enumerate(bn.parameters()):
            parameter.data = random(6, seed=i, shift=1.0)
        x, other = (random(4, 6, 5, 3, seed=i, dtype=dtype, requires_grad=True) for i in (3, 4))
        other = other if residual else None
        for _ in range(2):
            if fused:
                y = batch_norm_act(bn, x, activation=activation, negative_slope=0.2, residual=other)
            else:
                y = bn(x) if other is None else bn(x) + other
                y = {"none": y, "relu": F.relu(y), "leaky_relu": F.leaky_relu(y, 0.2)}[activation]
        leaves = [t for t in (x, other, *bn.parameters()) if t is not None]
        results.append((y, *torch.autograd.grad(y, leaves, random(*y.shape, seed=9, dtype=dtype)), *bn.buffers()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_batch_norm_act_compiles_without_graph_breaks() -> None:
    results = []
    for compiled in (False, True):
        bn = nn.BatchNorm2d(6)
        call = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager") if compiled else batch_norm_act
        for seed in range(2):
            y = call(bn, random(4, 6, 5, 3, seed=seed), activation="leaky_relu")
        results.append((y, *bn.buffers()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_batch_norm_act_calls_modules_with_hooks_and_checks_inputs() -> None:
    bn, seen = nn.BatchNorm2d(6), []
    x = random(4, 6, 5, 3)
    bn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = batch_norm_act(bn, x, activation="relu", residual=x)
    assert torch.equal(y, (seen[0] + x).relu())
    with pytest.raises(ValueError, match="expected 4D input"):
        batch_norm_act(nn.BatchNorm2d(6), x[0])
    with pytest.raises(ValueError, match="activation must be 'none', 'relu' or 'leaky_relu', got 'gelu'"):
        batch_norm_act(nn.BatchNorm2d(6), x, activation="gelu")  # type: ignore[arg-type]
