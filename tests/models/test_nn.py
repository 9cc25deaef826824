"""The modules against definitions written here, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.nn import AttentionGenerator, HighOrderAttention, ProjectionHead, SpatialAttention, freeze_spectral_norm
from dfkd_fast.testing import random
from dfkd_fast.testing.inputs import Layout


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize("mode", ["joint", "per_order"])
@pytest.mark.parametrize(("channels", "order"), [(3, 1), (9, 2), (16, 3), (5, 4)])
def test_high_order_attention_is_the_polynomial(channels: int, order: int, mode: str) -> None:
    module = HighOrderAttention(channels, order=order, mode=mode).double()  # type: ignore[arg-type]
    assert module.proj_weight.shape == (order * (order + 1) // 2, max(1, channels // 4), channels)
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64)
    logits, factor = [], 0
    for r in range(order):
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
def test_spatial_attention_is_the_papers_hourglass(form: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = SpatialAttention(16, reduction=8, scale=0.05, form=form).double()  # type: ignore[arg-type]
    x = torch.randn(3, 16, *size, dtype=torch.float64)

    def norm(y: Tensor) -> Tensor:
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, correction=0)
        return ((y - mean) / (var + 1e-5).sqrt()).clamp(min=0)

    narrow = F.conv2d(x, module.reduce.weight, module.reduce.bias)
    psi = norm(F.conv2d(narrow, module.encode.weight, padding=1))
    pooled, indices = F.max_pool2d(psi, 2, return_indices=True)
    gamma = norm(F.conv2d(pooled, module.bottleneck.weight, padding=1))
    widened = norm(F.conv_transpose2d(gamma, module.widen.weight, padding=1))
    unpooled = torch.zeros_like(psi).flatten(2).scatter(2, indices.flatten(2), widened.flatten(2)).view_as(psi)
    hidden = norm(F.conv_transpose2d(unpooled, module.decode.weight, padding=1))
    logits = F.conv2d(hidden, module.expand.weight, module.expand.bias)
    weights = torch.exp(logits - logits.max())
    positions = size[0] * size[1]
    gate = {
        "spatial": weights / weights.sum((2, 3), keepdim=True),
        "spatial_mean1": positions * weights / weights.sum((2, 3), keepdim=True),
        "channel": weights / weights.sum(1, keepdim=True),
    }[form]
    # out - F alone: the gate's share is far below the resolution of a comparison of out itself.
    torch.testing.assert_close((module(x) - x) * positions, 0.05 * gate * x * positions, rtol=1e-9, atol=1e-10)


def _hidden_by_torchs_pooling(module: SpatialAttention, features: Tensor) -> Tensor:
    psi = F.relu(module.encode_norm(module.encode(module.reduce(features))))
    pooled, indices = F.max_pool2d(psi, 2, return_indices=True)
    gamma = F.relu(module.bottleneck_norm(module.bottleneck(pooled)))
    widened = F.relu(module.widen_norm(module.widen(gamma)))
    unpooled = F.max_unpool2d(widened, indices, [2, 2], output_size=list(psi.shape[-2:]))
    return F.relu(module.decode_norm(module.decode(unpooled)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 3)])
def test_the_hourglass_is_that_of_torchs_pooling_and_unpooling(
    size: tuple[int, int], layout: Layout, training: bool
) -> None:
    """To the bit: values, gradients and running statistics. Windows with nothing positive, all ties, are among them."""
    torch.manual_seed(0)
    module = SpatialAttention(16, reduction=8).train(training)
    nn.init.constant_(module.encode_norm.bias, -1.0)
    other = copy.deepcopy(module)
    x = random(3, 16, *size, layout=layout, requires_grad=True)
    got, expected_value = module.hidden(x), _hidden_by_torchs_pooling(other, x)
    grad_output = torch.randn_like(expected_value)
    expected = [each for name, each in module.named_parameters() if not name.startswith("expand")]
    theirs = [each for name, each in other.named_parameters() if not name.startswith("expand")]
    assert torch.equal(got, expected_value)
    for mine, other_one in zip(
        torch.autograd.grad(got, [x, *expected], grad_output),
        torch.autograd.grad(expected_value, [x, *theirs], grad_output),
        strict=True,
    ):
        assert torch.equal(mine, other_one)
    assert not _changed(_snapshot(other), module)


def test_the_hourglass_runs_on_kernels(kernel_device: str) -> None:
    torch.manual_seed(0)
    module = SpatialAttention(16, reduction=8).to(kernel_device, memory_format=torch.channels_last)
    x = random(2, 16, 5, 6, layout="channels_last", device=kernel_device, requires_grad=True)
    results = []
    for name in ("triton", "reference"):
        with ops.backend(name):
            hidden = module.hidden(x)
        results.append((hidden, torch.autograd.grad(hidden.square().sum(), x)[0]))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_spatial_attention_keeps_its_names() -> None:
    """Checkpoints hold them."""
    layers = ("reduce", "encode", "bottleneck", "widen", "decode", "expand")
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{layer}.weight" for layer in layers} | {"reduce.bias", "expand.bias"}
    names |= {f"{layer}_norm.{each}" for layer in layers[1:5] for each in statistics}
    assert set(SpatialAttention(16).state_dict()) == names


@pytest.mark.parametrize("attention", ["spatial", "spatial_mean1", "channel", "none"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_generator_paints_images_of_the_size_asked_for(attention: str, batch_norm: bool) -> None:
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


def test_generator_of_the_paper_has_its_channels() -> None:
    generator = AttentionGenerator(224)
    assert generator.project.out_features == 512 * 14 * 14
    shapes = [tuple(block.upsample.weight.shape) for block in generator.blocks]
    assert shapes == [(512, 256, 3, 3), (256, 128, 3, 3), (128, 64, 3, 3), (64, 64, 3, 3)]
    assert generator.paint.weight.shape == (3, 64, 3, 3)
    assert all(block.upsample.bias is not None for block in generator.blocks)
    assert all(isinstance(block.attention, SpatialAttention) for block in generator.blocks)


def test_spectral_norm_iterates_once_a_forward_and_on_the_transposed_convolutions_alone() -> None:
    generator = AttentionGenerator(16, latent_dim=4, channels=(8, 8, 8, 8, 8))
    parametrized = [name for name, _ in generator.named_parameters() if "parametrizations" in name]
    assert {name.split(".")[2] for name in parametrized} == {"upsample"}
    norm = generator.blocks[0].upsample.parametrizations.weight[0]
    weight = generator.blocks[0].upsample.parametrizations.weight.original.detach()
    u, v = norm._u.clone(), norm._v.clone()
    matrix = weight.transpose(0, 1).flatten(1)  # of a transposed convolution, the output channels are dimension 1
    u = F.normalize(matrix @ v, dim=0, eps=norm.eps)
    v = F.normalize(matrix.T @ u, dim=0, eps=norm.eps)
    generator(torch.randn(2, 4))
    torch.testing.assert_close(norm._u, u)
    torch.testing.assert_close(norm._v, v)


def test_spectral_norm_held_leaves_the_estimate() -> None:
    generator = AttentionGenerator(16, latent_dim=4, channels=(8, 8, 8, 8, 8))
    noise = torch.randn(2, 4)
    before = _snapshot(generator)
    with freeze_spectral_norm(generator):
        generator(noise)
    assert not {name for name in _changed(before, generator) if name.endswith(("_u", "_v"))}
    generator(noise)
    assert {name for name in _changed(before, generator) if name.endswith(("_u", "_v"))}


def test_projection_head_is_two_linear_layers() -> None:
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
        (lambda: HighOrderAttention(0), "channels, order and reduction must be at least 1, got 0"),
        (lambda: HighOrderAttention(8, mode="both"), "mode must be 'joint' or 'per_order', got 'both'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("module", [HighOrderAttention(8), SpatialAttention(16)])
def test_attention_modules_compile_without_graph_breaks(module: nn.Module) -> None:
    x = torch.randn(2, 8 if isinstance(module, HighOrderAttention) else 16, 6, 6)
    module.eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
