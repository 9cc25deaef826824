"""Convolutions that are fused with the residual addition and the ReLU that follow them."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dfkd_fast.graph.conv2d_act import conv2d_act
from dfkd_fast.models import FeatureModel, extract, fold_batchnorm

from . import nets
from .nets import NARROW, NARROW_TIMM, Net, close, randomize_batchnorm

SIZE = 32
OPTIONS: dict[str, tuple[list[int], list[int], list[int], int]] = {
    "plain": ([1, 1], [0, 0], [1, 1], 1),
    "strided": ([2, 1], [1, 2], [1, 1], 1),
    "dilated groups": ([1, 1], [1, 1], [2, 2], 2),
}
module: Any = importlib.import_module("dfkd_fast.graph.conv2d_act")  # the function has the same name


def arguments(options: str, *, channels_last: bool, residual: bool) -> tuple[Any, ...]:
    """The operator's arguments."""
    generator = torch.Generator().manual_seed(0)
    stride, padding, dilation, groups = OPTIONS[options]
    x, weight = (torch.randn(s, generator=generator) for s in ((2, 4, 7, 6), (6, 4 // groups, 3, 3)))
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    bias = torch.randn(6, generator=generator)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    added = torch.empty_like(y).normal_(generator=generator) if residual else None
    return x, weight, bias, added, stride, padding, dilation, groups


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_operator(options: str, channels_last: bool, residual: bool) -> None:
    given = arguments(options, channels_last=channels_last, residual=residual)
    before = copy.deepcopy(given)
    x, weight, bias, added, *rest = given
    y = F.conv2d(x, weight, bias, *rest)
    expected = F.relu(y if added is None else y + added)
    found = torch.ops.dfkd_fast.conv2d_act(*given)
    assert torch.equal(found, expected)
    assert found.stride() == y.stride()
    assert all(map(torch.equal, (t for t in given if isinstance(t, Tensor)), tree_leaves(before)[: 3 + residual]))
    torch.library.opcheck(torch.ops.dfkd_fast.conv2d_act.default, given)


@pytest.mark.parametrize("residual", [None, "residual"])
def test_cudnn_receives_its_arguments(residual: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[dict[str, Any]] = []
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
        monkeypatch.setattr(
            torch, name, lambda *given, names=names: called.append(dict(zip(names, given, strict=True)))
        )

    class OnCuda:
        is_cuda = True

    x: Any = OnCuda()
    module._compute(x, "weight", "bias", residual, [1, 1], [2, 2], [3, 3], 4)
    expected = {"self": x, "weight": "weight", "bias": "bias", "stride": [1, 1], "padding": [2, 2]}
    expected |= {"dilation": [3, 3], "groups": 4}
    assert called == [expected if residual is None else {**expected, "z": residual, "alpha": 1}]


def fused(features: FeatureModel) -> list[tuple[str, bool]]:
    """The fused convolutions, and whether each has a residual."""
    calls = features.programs[False].graph.find_nodes(op="call_function", target=conv2d_act)
    return [(call.args[0].target.removeprefix("model."), call.args[2] is not None) for call in calls]


# The number of fused convolutions without and with a residual.
COUNTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "resnet8": (NARROW, 4, 3),
    "wrn_10_2": ({}, 4, 0),
    "timm:resnet50": (NARROW_TIMM, 9, 4),
    "torchvision:mobilenet_v2": ({"width_mult": 0.25}, 0, 0),  # ReLU6
    "torchvision:vgg11": ({}, 8, 0),  # no BatchNorms
}


@pytest.mark.parametrize("name", COUNTS)
def test_fused_network_equals_unfused_network(name: str) -> None:
    options, plain, added = COUNTS[name]
    features = extract(nets.network(name, **options), image_size=SIZE).requires_grad_(False)
    for dtype in (torch.float32, torch.bfloat16):
        reference = fold_batchnorm(features, dtype=dtype, image_size=SIZE)
        changed = fold_batchnorm(features, dtype=dtype, image_size=SIZE, batch_size=2)
        assert changed.folded == reference.folded
        assert [residual for _, residual in fused(changed)].count(True) == added
        assert len(fused(changed)) == plain + added
        assert fused(reference) == fused(features) == []
        x = nets.images(3, SIZE)  # another batch size
        copies = (changed, copy.deepcopy(changed), pickle.loads(pickle.dumps(changed)))
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            expected = reference(x)
            for each in copies:
                assert all(map(torch.equal, tree_leaves(each(x)), tree_leaves(expected)))
            gradients = []
            for each in (reference, changed):
                given = x.clone().requires_grad_()
                gradients += torch.autograd.grad(nets.scalar(each, given), given)
        assert torch.equal(*gradients)


def test_compiled_network_on_the_cpu_equals_eager_network() -> None:
    features = extract(nets.network("resnet8", **NARROW), image_size=SIZE)
    changed, x = fold_batchnorm(features, image_size=SIZE, batch_size=2), nets.images(2, SIZE)
    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x), changed(x))
    torch.compiler.reset()


RULES: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[tuple[str, bool]]]] = {
    "two readers": (lambda m, x: (lambda y: m.act(y) + y)(m.conv(x)), []),
    "left summand": (lambda m, x: m.act(m.conv(x) + m.again(x)), [("conv", True)]),
    "broadcast": (lambda m, x: m.act(m.conv(x) + x.mean((2, 3), keepdim=True).mean(1, keepdim=True)), []),
    "overwritten residual": (lambda m, x: (lambda y: m.act(y.add_(m.conv(x))) + y)(m.again(x)), []),
    "add without activation": (lambda m, x: (m.conv(x) + m.again(x)).abs(), []),
    "no bias": (lambda m, x: m.act(m.without_bias(x)), []),
    "circular padding": (lambda m, x: m.act(m.circular(x)), []),
    "same padding": (lambda m, x: m.act(m.same(x)), []),
    "identity between": (lambda m, x: F.relu(m.identity(m.conv(x))), [("conv", False)]),
}


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_which_convolutions_are_fused(name: str) -> None:
    rule, expected = RULES[name]
    parts = {
        "again": nn.Conv2d(3, 4, 3, padding=1),
        "without_bias": nn.Conv2d(3, 4, 3, bias=False),
        "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        "same": nn.Conv2d(3, 4, 3, padding="same"),
        "identity": nn.Identity(),
    }
    model = randomize_batchnorm(Net(lambda m, x: m.fc(m.bn(m.act(rule(m, x)) + 1).mean((2, 3))), **parts))
    features = extract(model, stages=["bn"], image_size=SIZE)
    changed = fold_batchnorm(features, image_size=SIZE, batch_size=2)
    assert fused(changed) == expected
    assert all(map(torch.equal, tree_leaves(changed(nets.images())), tree_leaves(features(nets.images()))))


def test_plain_convolutions_are_kept_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    features = extract(nets.network("resnet8", **NARROW), image_size=SIZE)
    tried = []

    def reason(conv: nn.Conv2d, x: Any, residual: Any, image: Tensor) -> str | None:
        tried.append((image.shape[0], conv.weight.shape, residual is not None))
        return "no engine" if residual is None else None

    monkeypatch.setattr(module, "_reason_to_keep", reason)
    with caplog.at_level(logging.INFO, "dfkd_fast.graph.conv2d_act"):
        changed = fold_batchnorm(features, image_size=SIZE, batch_size=5)
    assert [residual for _, residual in fused(changed)] == [True] * 3
    assert len(set(tried)) == len(tried) <= 7
    assert {batch for batch, *_ in tried} == {5}
    assert "is not fused with its ReLU: no engine" in caplog.text
    assert "3 of 7 convolutions fused with their ReLUs" in caplog.text
    close(changed(nets.images()), features(nets.images()), 1e-4)


def failing(*given: Any) -> Any:
    raise RuntimeError("GET was unable to find an engine to execute this computation\nmore")


FAULTS: dict[str, tuple[Callable[..., Any], tuple[float, float], str | None]] = {
    "raises": (failing, (1, 2), "RuntimeError: GET was unable to find an engine to execute this computation"),
    "ignores the residual": (lambda conv, x, residual: conv2d_act(conv, x, None), (1, 2), "its result differs"),
    "returns NaN": (lambda *given: tuple(y * torch.nan for y in conv2d_act(*given)), (1, 2), "its result differs"),
    "other strides": (
        lambda *given: tuple(y.contiguous() for y in conv2d_act(*given)),
        (1, 2),
        "its result differs",
    ),
    "slower": (conv2d_act, (2, 1), "it takes 2.000 ms instead of 1.000 ms"),
    "faster": (conv2d_act, (1, 2), None),
}


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_trial_of_a_kernel(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, times, expected = FAULTS[fault]
    times_left = list(times)
    monkeypatch.setattr(module, "conv2d_act", kernel)
    monkeypatch.setattr(module, "_milliseconds", lambda call: (call(), times_left.pop(0))[1])
    conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    x, residual = (torch.randn(2, n, 8, 8).to(memory_format=torch.channels_last) for n in (3, 4))
    assert module._try_kernel(conv, x, residual) == expected
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert "deterministic" in module._try_kernel(conv, x, residual)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["resnet8", "timm:resnet50"])
def test_fused_network_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Fuse the convolutions that pass the trial, and compare with the plain network."""
    features = extract(nets.network(name, **COUNTS[name][0]), image_size=64).cuda()
    features.to(memory_format=torch.channels_last)
    x = nets.images(16, 64).cuda().to(memory_format=torch.channels_last)
    plain = fold_batchnorm(features, dtype=dtype, image_size=64)
    changed = fold_batchnorm(features, dtype=dtype, image_size=64, batch_size=16)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        close(changed(x), plain(x), 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudnn_computes_the_operator(dtype: torch.dtype, residual: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    options: Any = {"generator": generator, "device": "cuda", "dtype": dtype}
    x, weight, bias = (torch.randn(shape, **options) for shape in ((4, 16, 8, 8), (32, 16, 3, 3), (32,)))
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    y = F.conv2d(x, weight, bias, padding=1)
    added = torch.empty_like(y).normal_(generator=generator) if residual else None
    found = torch.ops.dfkd_fast.conv2d_act(x, weight, bias, added, [1, 1], [1, 1], [1, 1], 1)
    assert found.stride() == y.stride()
    close(found.float(), F.relu(y if added is None else y + added).float(), 2e-2)
