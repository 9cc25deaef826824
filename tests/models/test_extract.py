"""Networks with more outputs: the same values as the plain network's, shared weights, and no graph breaks."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath
from torch import Tensor, nn

from dfkd_fast import patch
from dfkd_fast.models import (
    FeatureModel,
    LayerStatistics,
    Outputs,
    batchnorm_mode,
    cast_weights,
    extract,
    fold_batchnorm,
    frozen,
)

from .nets import NARROW, NARROW_TIMM, close, images, network, unsettled

# Default stages, channels, penultimate length, and what is fused with how many BatchNorms.
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[int, ...], int, dict[str, int]]] = {
    "timm:resnet18": (
        ("layer1", "layer2", "layer3", "layer4"),
        (64, 128, 256, 512),
        512,
        {"": 3, "relu": 9, "add+relu": 8},
    ),
    "torchvision:mobilenet_v2": (
        ("features.3", "features.6", "features.13", "features.18"),
        (24, 32, 96, 1280),
        1280,
        {"": 7, "add": 10, "relu6": 35},
    ),
    "timm:efficientnet_b0": (
        ("blocks.1", "blocks.2", "blocks.4", "bn2"),
        (24, 40, 112, 1280),
        1280,
        {"": 40, "add": 9},
    ),
    "timm:convnext_atto": (("stages.0", "stages.1", "stages.2", "stages.3"), (40, 80, 160, 320), 320, {}),
    "timm:regnetx_002": (("s1", "s2", "s3", "s4"), (24, 56, 152, 368), 368, {"": 4, "relu": 27, "add+relu": 13}),
    "wrn_16_1": (("block1", "block2", "relu"), (16, 32, 64), 64, {"relu": 13}),
    "resnet8x4": (("layer1", "layer2", "layer3"), (64, 128, 256), 256, {"": 3, "relu": 4, "add+relu": 3}),
}


def watched(model: nn.Module, x: Tensor, paths: list[str]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, and the first input and the output of some modules, by hooks."""
    read: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            read[path], given[path] = arguments[0].clone(), output.clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, read, given


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_the_plain_network(name: str) -> None:
    """Values, and gradients of images and parameters."""
    stages, channels, dim, fused = FAMILIES[name]
    model, x = network(name), images(2, 64).requires_grad_()
    head = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    logits, read, given = watched(model, x, [*stages, *norms, head])
    weight = torch.randn(2, 5)
    expected = torch.autograd.grad((logits * weight).sum(), [x, *model.parameters()])
    for extracted in (extract(model), extract(model, statistics=True)):
        assert (extracted.stages, extracted.feature_channels) == (stages, channels)
        assert (extracted.penultimate_dim, extracted.num_classes) == (dim, 5)
        outputs = extracted(x)
        assert isinstance(outputs, Outputs)
        close(outputs.logits, logits)
        for stage, feature in zip(stages, outputs.features, strict=True):
            close(feature, given[stage])
        close(outputs.penultimate, read[head])
        found = torch.autograd.grad((outputs.logits * weight).sum(), [x, *model.parameters()])
        for a, b in zip(found, expected, strict=True):
            close(a, b, 1e-4)
        assert len(outputs.statistics) == len(extracted.batchnorms) == len(extracted.fused)
        for path, layer in zip(extracted.batchnorms, outputs.statistics, strict=True):
            assert isinstance(layer, LayerStatistics)
            module, wide = model.get_submodule(path), read[path].double()
            close(layer.mean, wide.mean((0, 2, 3)).float())
            close(layer.var, wide.var((0, 2, 3), unbiased=False).float())
            assert torch.equal(layer.running_mean, module.running_mean)
            assert torch.equal(layer.running_var, module.running_var)
            assert all(value.dtype == torch.float32 for value in layer)
    assert set(extracted.batchnorms) == set(norms)
    assert extracted.other_batchnorms == ()
    assert Counter(extracted.fused) == fused


@torch.no_grad()
def test_statistics_come_in_network_order() -> None:
    model = network("timm:resnet18", **NARROW_TIMM)
    found = extract(model, statistics=True).batchnorms
    order: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_, path=path: order.append(path))
    model(images())
    assert list(found) == order


RESNET = ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize(
    ("name", "stages", "sizes"),
    [
        ("timm:resnet34", RESNET, (32, 48, 224)),
        ("torchvision:resnet18", RESNET, (64,)),
        ("timm:resnet50", RESNET, (64,)),
        ("timm:mobilenetv2_100", ("blocks.1", "blocks.2", "blocks.4", "bn2"), (32, 48, 224)),
        ("wrn_40_2", ("block1", "block2", "relu"), (64,)),
        ("torchvision:convnext_tiny", ("features.1", "features.3", "features.5", "features.7"), (64,)),
        ("torchvision:efficientnet_b0", ("features.2", "features.3", "features.5", "features.8"), (64,)),
        ("torchvision:mobilenet_v3_small", ("features.1", "features.3", "features.8", "features.12"), (64,)),
        (
            "torchvision:densenet121",
            ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"),
            (64,),
        ),
    ],
)
def test_default_stages(name: str, stages: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    model = network(name)
    assert [extract(model, image_size=size).stages for size in sizes] == [stages] * len(sizes)


@pytest.mark.parametrize("statistics", [False, True])
def test_gradients_of_statistics_and_of_frozen_networks(statistics: bool) -> None:
    model = network("resnet8", **NARROW)
    extracted = extract(model, statistics=statistics, image_size=16).double()
    x = images(2, 8).double().requires_grad_()

    def values(x: Tensor) -> tuple[Tensor, ...]:
        outputs = extracted(x)
        return outputs.logits, *(value for layer in outputs.statistics for value in layer[:2])

    with frozen(extracted):
        assert torch.autograd.gradcheck(values, x, fast_mode=True)
        assert not any(v.requires_grad for layer in extracted(x).statistics for v in layer[2:])
        sum(v.sum() for v in values(x)).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:resnet18", {"drop_rate": 0.3, "drop_path_rate": 0.3, **NARROW_TIMM}),
        ("torchvision:mobilenet_v2", {}),
        ("timm:convnext_atto", {"drop_rate": 0.3, "drop_path_rate": 0.3}),
        ("wrn_10_1", {"drop_rate": 0.3}),
    ],
)
def test_training_is_that_of_the_plain_network(name: str, options: dict[str, Any]) -> None:
    plain = network(name, **options)
    extracted = extract(copy.deepcopy(plain))
    x = images()
    plain.train()
    extracted.train()
    assert all(module.training for module in extracted.model.modules())
    torch.manual_seed(3)
    expected = plain(x)
    torch.manual_seed(3)
    close(extracted(x).logits, expected)
    left, right = plain.state_dict(), extracted.model.state_dict()
    assert any(name.endswith("running_mean") for name in left) == (name != "timm:convnext_atto")
    assert all(torch.allclose(value, right[name], atol=1e-6) for name, value in left.items())
    plain.eval()
    extracted.eval()
    close(extracted(x).logits, plain(x))


class _Functional(nn.Module):
    """Depends on its own training flag outside of any module, and changes a stage's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 6, 3, stride=2)
        self.fc = nn.Linear(6, 5)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        x = self.last(self.act(self.conv(x * self.scale + torch.tensor([[[0.1]], [[0.2]], [[0.3]]]))))
        x = F.dropout(x.mean((2, 3)), 0.5, training=self.training) * factor
        return self.fc(F.dropout(x, 0.5, training=self.training))


def test_a_forward_that_reads_its_own_flag() -> None:
    model = _Functional()
    extracted = extract(model, stages=["conv", "last"], image_size=16)
    x = images(8, 16)
    for training in (True, False, True):
        model.train(training)  # not through the wrapper: the network's own flag decides
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        close(extracted(x).logits, expected)
    assert extracted(x).penultimate.count_nonzero() < 48  # before the last dropout, after the first
    torch.manual_seed(7)
    outputs = extracted(x)
    shift = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    close(outputs.features[0], model.conv(x * 2 + shift))  # as it was before the activation wrote into it
    assert outputs.features[0].min() < 0


def test_tensors_made_in_the_forward_follow_the_network() -> None:
    model = _Functional().eval()
    extracted = extract(model, image_size=16).double()
    close(extracted(images(2, 16).double()).logits, model(images(2, 16).double()))
    assert set(extracted.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert not [name for name in vars(model) if "constant" in name]


def test_weights_and_buffers_are_shared() -> None:
    model = network("wrn_16_1")
    extracted = extract(model, statistics=True)
    assert extracted.model is model
    assert [id(p) for p in extracted.parameters()] == [id(p) for p in model.parameters()]
    assert set(extracted.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    x = images()
    extracted.to(memory_format=torch.channels_last)
    extracted.to(torch.float64)
    assert model.fc.weight.dtype == model.bn.running_mean.dtype == torch.float64
    model.float()
    with torch.no_grad():
        model.fc.bias.add_(1)
        model.block2[0].bn1.running_mean.add_(3)
        model.bn.running_var = model.bn.running_var * 2
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)
    close(extracted(x).logits, model(x))
    index = extracted.batchnorms.index("block2.0.bn1")
    assert torch.equal(extracted(x).statistics[index].running_mean, model.block2[0].bn1.running_mean)
    state = model.state_dict()
    fresh = network("wrn_16_1")
    fresh.load_state_dict(state)
    close(extracted(x).logits, fresh(x))


def test_batchnorm_mode_reaches_the_extracted_network() -> None:
    model = network("timm:mobilenetv2_100")
    extracted, x = extract(model), images(4)
    before = copy.deepcopy(model.state_dict())
    with batchnorm_mode(extracted, "batch"):
        batch = extracted(x).logits
        close(batch, model(x))
    assert (batch - extracted(x).logits).abs().max() > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def tensors(outputs: Outputs) -> list[Tensor]:
    return [
        outputs.logits,
        *outputs.features,
        outputs.penultimate,
        *(value for layer in outputs.statistics for value in layer),
    ]


REWRITES: dict[str, Callable[[nn.Module], FeatureModel]] = {
    "features": lambda model: extract(model, image_size=32),
    "statistics": lambda model: extract(model, statistics=True, image_size=32),
    "folded": lambda model: fold_batchnorm(extract(model, image_size=32), image_size=32),
    "held": lambda model: cast_weights(extract(model, statistics=True, image_size=32), torch.bfloat16),
    "patched": lambda model: (patch(model.requires_grad_(False)), extract(model, image_size=32))[1],
}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: network("timm:resnet18", **NARROW_TIMM),
        lambda: network("wrn_40_2"),
        lambda: network("resnet8", **NARROW),
        lambda: unsettled(_Functional()),
    ],
    ids=["timm resnet18", "wide resnet", "cifar resnet", "a user's own"],
)
@torch.no_grad()
def test_copies_and_pickles_give_the_same_bit_for_bit(make: Callable[[], nn.Module], rewrite: str) -> None:
    extracted, x = REWRITES[rewrite](make()), images()
    described = {name: value for name, value in vars(extracted).items() if isinstance(value, tuple | int)}
    with torch.autocast("cpu", torch.bfloat16, enabled=rewrite == "held"):
        expected = tensors(extracted(x))
        for made in (copy.deepcopy(extracted), pickle.loads(pickle.dumps(extracted))):
            assert all(map(torch.equal, tensors(made(x)), expected))
            assert {name: value for name, value in vars(made).items() if isinstance(value, tuple | int)} == described
            assert set(made.state_dict()) == set(extracted.state_dict())
            for tensor in [*made.model.parameters(), *made.model.buffers()]:
                tensor.zero_()
            assert made(x).logits.count_nonzero() == 0  # a copy reads its own weights
            assert all(map(torch.equal, tensors(extracted(x)), expected))  # the original has its own too


def test_a_copy_trains_like_the_original() -> None:
    extracted = extract(network("timm:resnet18", drop_rate=0.3, **NARROW_TIMM)).train()
    results = []
    for each in (copy.deepcopy(extracted), pickle.loads(pickle.dumps(extracted)), extracted):
        torch.manual_seed(3)
        logits = each(images()).logits
        results.append([logits, *torch.autograd.grad(logits.sum(), list(each.parameters())), *each.buffers()])
    assert all(map(torch.equal, results[0], results[2]))
    assert all(map(torch.equal, results[1], results[2]))


def test_extracting_disturbs_nothing() -> None:
    model = network("timm:resnet18", drop_rate=0.2, **NARROW_TIMM)
    model.train()
    model.layer2.eval()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    for statistics in (False, True):
        extract(model, statistics=statistics)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_statistics_mean_eval_mode_whatever_the_flags() -> None:
    model = network("timm:efficientnet_b0", drop_rate=0.5, drop_path_rate=0.5)
    extracted, x = extract(model, statistics=True), images()
    expected, state = extracted(x), copy.deepcopy(model.state_dict())
    extracted.train()
    assert torch.equal(extracted(x).logits, expected.logits)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_explicit_stages() -> None:
    model = network("timm:resnet18")
    extracted = extract(model, stages=["layer2.0", "layer4"])
    assert extracted.stages == ("layer2.0", "layer4")
    assert extracted.feature_channels == (128, 512)
    again = extract(extracted, statistics=True)
    assert again.stages == extracted.stages
    assert again.model is model
    assert extract(extracted, stages=["layer1"]).stages == ("layer1",)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        (["layr1"], ValueError, r"ResNet has no module 'layr1' .*did you mean 'layer1'.*It has .*layer4"),
        (["layer1", "fc"], ValueError, r"'fc' of ResNet gives \(1, 5\); a stage must give a map \(N, C, H, W\)"),
        ([], ValueError, "must name at least one module"),
        (["layer1", "layer1"], ValueError, "none of them twice"),
        ("layer1", TypeError, "must be a sequence of module paths, got the string 'layer1'"),
    ],
)
def test_wrong_stages(stages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extract(network("timm:resnet18"), stages=stages)


class _ChannelsAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.move, self.fc = nn.Conv2d(3, 6, 3), _Permute(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.move(self.conv(x)).mean((1, 2)))


class _Permute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def test_maps_with_the_channels_at_the_end_are_not_guessed() -> None:
    with pytest.raises(
        ValueError, match=r"'move' of _ChannelsAtTheEnd gives \(1, 30, 30, 6\); a stage must give a map"
    ):
        extract(_ChannelsAtTheEnd(), stages=["move"], image_size=32)
    with pytest.raises(ValueError, match="stages must be named for _ChannelsAtTheEnd: what it pools"):
        extract(_ChannelsAtTheEnd(), image_size=32)
    assert extract(_ChannelsAtTheEnd(), stages=["conv"], image_size=32).feature_channels == (6,)


class _Branch(nn.Module):
    """Untraceable: it looks at its input's values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _Forward(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        for name, part in parts.items():
            self.add_module(name, part)
        self.rule = forward

    def forward(self, x: Tensor) -> Any:
        return self.rule(self, x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: _Forward(lambda m, x: m.fc(m.branch(m.conv(x)).mean((2, 3))), branch=_Branch()),
            r"forward of _Forward cannot be followed by torch.fx, in 'branch' \(_Branch\): TraceError.*Outputs",
        ),
        (
            lambda: _Forward(lambda m, x: (m.fc(m.conv(x).mean((2, 3))), x)),
            r"must give logits \(N, classes\), got tuple",
        ),
        (lambda: _Forward(lambda m, x: m.conv(x)), r"must give logits \(N, classes\), got \(1, 4, 30, 30\)"),
        (
            lambda: _Forward(lambda m, x: m.act(m.conv(x)).flatten(1), act=nn.Sequential(nn.ReLU())),
            r"logits must come from a linear layer.*from 'act.0' \(ReLU\)\. Give a network",
        ),
        (
            lambda: _Forward(lambda m, x: m.fc(m.conv(x).permute(0, 2, 3, 1))[:, 0, 0]),
            "logits must come from a linear layer",
        ),
        (lambda: _Forward(lambda m, x: m.fc(x.flatten(1)[:, :4])), "stages must be named for _Forward"),
        (
            lambda: _Forward(lambda m, x: m.fc(m.conv(x))),
            r"does not take an image \(1, 3, 32, 32\); another image_size",
        ),
    ],
)
def test_networks_that_cannot_be_extracted(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(model(), image_size=32)


def test_a_model_is_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        extract("timm:resnet18")  # type: ignore[arg-type]


class _GivesOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.conv, self.deep = _Branch(), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Outputs:
        first = self.branch(self.conv(x))
        second = self.deep(first)
        pooled = second.mean((2, 3))
        return Outputs(self.fc(pooled), (first, second), pooled)


def test_a_network_that_gives_outputs_is_used_as_it_is() -> None:
    model = _GivesOutputs()
    extracted = extract(model, image_size=16)
    assert extracted.model is model
    assert (extracted.stages, extracted.feature_channels) == (("0", "1"), (4, 6))
    assert (extracted.penultimate_dim, extracted.num_classes) == (6, 5)
    x = images(2, 16)
    assert torch.equal(extracted(x).features[1], model(x).features[1])
    assert extract(model, stages=extracted.stages, statistics=True, image_size=16).batchnorms == ()
    assert extract(model, stages=["1"], image_size=16).feature_channels == (6,)
    with pytest.raises(ValueError, match=r"_GivesOutputs gives its features itself, \['0', '1'\]; got \['conv'\]"):
        extract(model, stages=["conv"], image_size=16)


class _OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class _ManyNorms(nn.Module):
    """Every kind of BatchNorm, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.plain = nn.BatchNorm2d(4, affine=False, eps=1e-2)
        self.act = BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout)
        self.path = DropPath(0.5)
        self.own = _OwnNorm(4)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.plain(self.conv(x)))
        x = x + self.path(self.plain(input=x))
        x = self.flat(self.pool(self.untracked(self.own(x))).flatten(1))
        return self.fc(self.dropout(x))


def test_kinds_of_batchnorm() -> None:
    model = unsettled(_ManyNorms())
    extracted, x = extract(model, statistics=True, image_size=16), images(4, 16)
    assert extracted.batchnorms == ("plain", "act", "plain")
    assert extracted.other_batchnorms == ("own", "untracked", "flat")
    outputs = extracted(x)
    close(outputs.logits, model(x))
    first, act, second = outputs.statistics
    close(first.mean, model.conv(x).mean((0, 2, 3)))
    close(second.mean, model.act(model.plain(model.conv(x))).mean((0, 2, 3)))
    assert torch.equal(first.running_mean, second.running_mean)
    assert torch.equal(act.running_var, model.act.running_var)
    close(outputs.penultimate, model.flat(model.pool(model.untracked(model.own(_before_own(model, x)))).flatten(1)))


def _before_own(model: Any, x: Tensor) -> Tensor:
    y = model.act(model.plain(model.conv(x)))
    return y + model.plain(y)


class _Flat(nn.Module):
    """A FeatureModel as torch.compile users have it: inside of something else."""

    def __init__(self, inner: FeatureModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x)
        total = outputs.logits.logsumexp(1).mean() + outputs.penultimate.square().mean()
        for feature in outputs.features:
            total = total + feature.square().mean()
        for layer in outputs.statistics:
            total = total + (layer.mean - layer.running_mean).norm() + (layer.var - layer.running_var).norm()
        return total


@pytest.fixture(autouse=True)
def _forget_compiled() -> Any:
    yield
    torch._dynamo.reset()


LONG = ["timm:resnet18", "timm:convnext_atto", "torchvision:mobilenet_v2", "timm:efficientnet_b0"]


@pytest.mark.parametrize(
    ("name", "options", "statistics"),
    [
        ("resnet8", NARROW, True),
        ("timm:resnet18", NARROW_TIMM, False),
        *(pytest.param(name, {}, each, marks=pytest.mark.slow) for name in LONG for each in (False, True)),
    ],
)
def test_compiles_without_graph_breaks(name: str, options: dict[str, Any], statistics: bool) -> None:
    model = _Flat(extract(network(name, **options), statistics=statistics))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images().requires_grad_()
    parameters = list(model.parameters())
    expected, found = model(x), compiled(x)
    torch.testing.assert_close(found, expected)
    expected = torch.autograd.grad(expected, [x, *parameters], allow_unused=True)
    found = torch.autograd.grad(found, [x, *parameters], allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            close(a, b, 1e-4)


def test_compiled_network_changes_mode() -> None:
    model = network("resnet8", **NARROW)
    extracted, x = extract(model, image_size=16), images(4, 16)
    compiled = torch.compile(extracted, backend="eager", fullgraph=True)
    for training in (False, True, False):
        model.train(training)
        reference = copy.deepcopy(model)
        close(compiled(x).logits, reference(x))
        with batchnorm_mode(model, "batch"):
            close(compiled(x).logits, model(x))
        assert torch.equal(model.bn1.running_mean, reference.bn1.running_mean)


def test_a_log_line_says_how_many(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dfkd_fast"):
        extract(network("resnet8", **NARROW), statistics=True)
    assert [record.message for record in caplog.records] == [
        "CifarResNet: 9 BatchNorms give statistics (2 alone, 3 add+relu, 4 relu)"
    ]
