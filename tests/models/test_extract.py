"""``extract``: values, shared weights, copies, compilation and errors."""

from __future__ import annotations

import copy
import gc
import linecache
import logging
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath
from timm.utils import ModelEmaV3
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from dfkd_fast import ops, patch
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

from .. import tiny
from .nets import NARROW, NARROW_TIMM, Net, close, images, network, randomize_batchnorm, scalar, snapshot

RESNET = "layer1 layer2 layer3 layer4"
# Default stages, their channels, the penultimate length, and the number of BatchNorms per fused operation.
FAMILIES: dict[str, tuple[str, tuple[int, ...], int, dict[str, int]]] = {
    "timm:resnet18": (RESNET, (64, 128, 256, 512), 512, {"": 3, "relu": 9, "add+relu": 8}),
    "torchvision:mobilenet_v2": (
        "features.3 features.6 features.13 features.18",
        (24, 32, 96, 1280),
        1280,
        {"": 7, "add": 10, "relu6": 35},
    ),
    "timm:efficientnet_b0": ("blocks.1 blocks.2 blocks.4 bn2", (24, 40, 112, 1280), 1280, {"": 40, "add": 9}),
    "timm:convnext_atto": ("stages.0 stages.1 stages.2 stages.3", (40, 80, 160, 320), 320, {}),
    "timm:regnetx_002": ("s1 s2 s3 s4", (24, 56, 152, 368), 368, {"": 4, "relu": 27, "add+relu": 13}),
    "wrn_16_1": ("block1 block2 relu", (16, 32, 64), 64, {"relu": 13}),
    "resnet8x4": ("layer1 layer2 layer3", (64, 128, 256), 256, {"": 3, "relu": 4, "add+relu": 3}),
}


def hooked_forward(
    model: nn.Module, x: Tensor, paths: list[str]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, and the inputs and outputs of the modules at ``paths``, in call order."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[path], outputs[path] = arguments[0].clone(), output.clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, inputs, outputs


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_match_plain_network(name: str) -> None:
    names, channels, dim, fused = FAMILIES[name]
    stages, model, x = tuple(names.split()), network(name), images(2, 64).requires_grad_()
    head = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    logits, inputs, maps = hooked_forward(model, x, [*stages, *norms, head])
    weight = torch.randn(2, 5)
    expected = torch.autograd.grad((logits * weight).sum(), [x, *model.parameters()])
    for extracted in (extract(model), extract(model, statistics=True)):
        assert (extracted.stages, extracted.feature_channels) == (stages, channels)
        assert (extracted.penultimate_dim, extracted.num_classes) == (dim, 5)
        outputs = extracted(x)
        assert isinstance(outputs, Outputs)
        close(outputs[:3], (logits, tuple(maps[stage] for stage in stages), inputs[head]))
        close(torch.autograd.grad((outputs.logits * weight).sum(), [x, *model.parameters()]), expected, 1e-4)
        assert len(outputs.statistics) == len(extracted.batchnorms) == len(extracted.fused)
        for path, layer in zip(extracted.batchnorms, outputs.statistics, strict=True):
            assert isinstance(layer, LayerStatistics)
            module, upcast = model.get_submodule(path), inputs[path].double()
            close(layer.mean, upcast.mean((0, 2, 3)).float())
            close(layer.var, upcast.var((0, 2, 3), unbiased=False).float())
            assert torch.equal(layer.running_mean, module.running_mean)
            assert torch.equal(layer.running_var, module.running_var)
            assert all(value.dtype == torch.float32 for value in layer)
    assert list(extracted.batchnorms) == [path for path in inputs if path in norms]  # in call order
    assert extracted.other_batchnorms == ()
    assert Counter(extracted.fused) == fused


@pytest.mark.parametrize(
    ("name", "stages", "sizes"),
    [
        ("timm:resnet34", RESNET, (32, 48, 224)),
        ("torchvision:resnet18", RESNET, (64,)),
        ("timm:resnet50", RESNET, (64,)),
        ("timm:mobilenetv2_100", "blocks.1 blocks.2 blocks.4 bn2", (32, 48, 224)),
        ("wrn_40_2", "block1 block2 relu", (64,)),
        ("torchvision:convnext_tiny", "features.1 features.3 features.5 features.7", (64,)),
        ("torchvision:efficientnet_b0", "features.2 features.3 features.5 features.8", (64,)),
        ("torchvision:mobilenet_v3_small", "features.1 features.3 features.8 features.12", (64,)),
        (
            "torchvision:densenet121",
            "features.denseblock1 features.denseblock2 features.denseblock3 features.norm5",
            (64,),
        ),
    ],
)
def test_default_stages(name: str, stages: str, sizes: tuple[int, ...]) -> None:
    model = network(name)
    assert [extract(model, image_size=size).stages for size in sizes] == [tuple(stages.split())] * len(sizes)


@pytest.mark.parametrize("statistics", [False, True])
def test_frozen_network_passes_gradcheck_without_weight_gradients(statistics: bool) -> None:
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
def test_training_mode_matches_plain_network(name: str, options: dict[str, Any]) -> None:
    plain = network(name, **options)
    extracted = extract(copy.deepcopy(plain))
    x = images()
    for training in (True, False):
        plain.train(training)
        extracted.train(training)
        assert all(module.training is training for module in extracted.model.modules())
        torch.manual_seed(3)
        expected = plain(x)
        torch.manual_seed(3)
        close(extracted(x).logits, expected)
    left, right = plain.state_dict(), extracted.model.state_dict()
    assert any(name.endswith("running_mean") for name in left) == (name != "timm:convnext_atto")
    assert all(torch.allclose(value, right[name], atol=1e-6) for name, value in left.items())


class _Functional(nn.Module):
    """Reads its own training flag, creates a tensor, and overwrites a stage's output in place."""

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


def test_functional_dropout_follows_the_training_flag() -> None:
    model = _Functional()
    extracted = extract(model, stages=["conv", "last"], image_size=16)
    x = images(8, 16)
    for training in (True, False, True):
        model.train(training)  # the flag of the network, not of the wrapper, selects the forward
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        close(extracted(x).logits, expected)
    assert extracted(x).penultimate.count_nonzero() < 48  # they are read after the first dropout and before the last
    shift = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    features = extracted(x).features
    close(features[0], model.conv(x * 2 + shift))  # before the activation overwrites it
    assert features[0].min() < 0


def test_tensors_created_in_forward_follow_the_network() -> None:
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


REWRITES: dict[str, Callable[[nn.Module], FeatureModel]] = {
    "features": lambda model: extract(model, image_size=32),
    "statistics": lambda model: extract(model, statistics=True, image_size=32),
    "folded": lambda model: fold_batchnorm(extract(model, image_size=32), image_size=32),
    "cast": lambda model: cast_weights(extract(model, statistics=True, image_size=32), torch.bfloat16),
    "patched": lambda model: (patch(model.requires_grad_(False)), extract(model, image_size=32))[1],
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm resnet18": lambda: network("timm:resnet18", **NARROW_TIMM),
    "wide resnet": lambda: network("wrn_40_2"),
    "cifar resnet": lambda: network("resnet8", **NARROW),
    "functional": lambda: randomize_batchnorm(_Functional()),
}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_copies_and_pickles_give_identical_outputs(name: str, rewrite: str) -> None:
    extracted, x = REWRITES[rewrite](NETWORKS[name]()), images()
    described = {name: value for name, value in vars(extracted).items() if isinstance(value, tuple | int)}
    with torch.autocast("cpu", torch.bfloat16, enabled=rewrite == "cast"):
        expected = tree_leaves(extracted(x))
        for result in (copy.deepcopy(extracted), pickle.loads(pickle.dumps(extracted))):
            assert all(map(torch.equal, tree_leaves(result(x)), expected))
            assert {name: value for name, value in vars(result).items() if isinstance(value, tuple | int)} == described
            assert set(result.state_dict()) == set(extracted.state_dict())
            for tensor in [*result.model.parameters(), *result.model.buffers()]:
                tensor.zero_()
            assert result(x).logits.count_nonzero() == 0  # a copy reads its own weights
            assert all(map(torch.equal, tree_leaves(extracted(x)), expected))  # and does not change the original's


def test_copies_train_like_the_original() -> None:
    extracted = extract(network("timm:resnet18", drop_rate=0.3, **NARROW_TIMM)).train()
    results = []
    for each in (copy.deepcopy(extracted), pickle.loads(pickle.dumps(extracted)), extracted):
        torch.manual_seed(3)
        logits = each(images()).logits
        results.append([logits, *torch.autograd.grad(logits.sum(), list(each.parameters())), *each.buffers()])
    assert all(map(torch.equal, results[0], results[2]))
    assert all(map(torch.equal, results[1], results[2]))


def test_extract_leaves_the_network_unchanged() -> None:
    model = network("timm:resnet18", drop_rate=0.2, **NARROW_TIMM).train()
    model.layer2.eval()
    before, random = snapshot(model), torch.get_rng_state()
    for statistics in (False, True):
        extract(model, statistics=statistics)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_statistics_imply_eval_mode() -> None:
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


class _Branch(nn.Module):
    """Cannot be traced: it branches on its input's values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _Permute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def channels_last() -> Net:
    return Net(lambda m, x: m.fc(m.move(m.conv(x)).mean((1, 2))), move=_Permute())


def test_explicit_stages_when_there_are_no_default_stages() -> None:
    assert extract(channels_last(), stages=["conv"], image_size=32).feature_channels == (4,)


def resnet() -> nn.Module:
    return network("timm:resnet18")


@pytest.mark.parametrize(
    ("model", "stages", "message"),
    [
        (resnet, ["layr1"], r"ResNet has no module 'layr1' .*did you mean 'layer1'.*It has .*layer4"),
        (resnet, ["layer1", "fc"], r"'fc' of ResNet returns \(1, 5\); a stage must return a map \(N, C, H, W\)"),
        (resnet, [], "must name at least one module"),
        (resnet, ["layer1", "layer1"], "none twice"),
        (resnet, "layer1", "must be a sequence of module paths, got the string 'layer1'"),
        (lambda: "timm:resnet18", None, r"model must be a torch\.nn\.Module, got str"),
        (channels_last, ["move"], r"'move' of Net returns \(1, 32, 32, 4\); a stage must return a map"),
        (channels_last, None, "stages of Net cannot be chosen automatically, because the tensor"),
    ],
)
def test_errors(model: Callable[[], nn.Module], stages: Any, message: str) -> None:
    error = TypeError if "got str" in message or "the string" in message else ValueError
    with pytest.raises(error, match=message):
        extract(model(), stages=stages, image_size=32)


UNSUPPORTED: dict[str, Callable[[Any, Tensor], Any]] = {
    r"cannot be traced by torch.fx, in 'branch' \(_Branch\): TraceError.*Outputs": lambda m, x: m.fc(
        m.branch(m.conv(x)).mean((2, 3))
    ),
    r"must return logits \(N, classes\), got tuple": lambda m, x: (m.fc(m.conv(x).mean((2, 3))), x),
    r"must return logits \(N, classes\), got \(1, 4, 32, 32\)": lambda m, x: m.conv(x),
    r"logits must come from a linear layer.*from 'last.0' \(ReLU\)\. Pass": lambda m, x: m.last(m.conv(x)).flatten(1),
    "logits must come from a linear layer": lambda m, x: m.fc(m.conv(x).permute(0, 2, 3, 1))[:, 0, 0],
    "not the output .* of a module; pass stages": lambda m, x: m.fc(x.flatten(1)[:, :4]),
    r"does not accept an image \(1, 3, 32, 32\); try another image_size": lambda m, x: m.fc(m.conv(x)),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_networks(message: str) -> None:
    model = Net(UNSUPPORTED[message], branch=_Branch(), last=nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=message):
        extract(model, image_size=32)


def test_network_that_returns_outputs_is_used_unchanged() -> None:
    def rule(m: Any, x: Tensor) -> Outputs:
        first = m.branch(m.conv(x))
        second = m.deep(first)
        pooled = second.mean((2, 3))
        return Outputs(m.fc(pooled), (first, second), pooled)

    model = Net(rule, branch=_Branch(), deep=nn.Conv2d(4, 6, 3, stride=2), fc=nn.Linear(6, 5))
    extracted = extract(model, image_size=16)
    assert extracted.model is model
    assert (extracted.stages, extracted.feature_channels) == (("0", "1"), (4, 6))
    assert (extracted.penultimate_dim, extracted.num_classes) == (6, 5)
    x = images(2, 16)
    assert torch.equal(extracted(x).features[1], model(x).features[1])
    assert extract(model, stages=extracted.stages, statistics=True, image_size=16).batchnorms == ()
    assert extract(model, stages=["1"], image_size=16).feature_channels == (6,)
    with pytest.raises(ValueError, match=r"Net returns its features itself, \['0', '1'\]; got \['conv'\]"):
        extract(model, stages=["conv"], image_size=16)


class _OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_statistics_of_each_kind_of_batchnorm() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        x = m.bn2(m.bn(m.conv(x)))
        x = x + m.path(m.bn(input=x))  # the second call of this module
        x = m.flat(m.pool(m.untracked(m.own(x))).flatten(1))
        return m.fc(m.dropout(x))

    model = Net(
        rule,
        bn=nn.BatchNorm2d(4, affine=False, eps=1e-2),
        bn2=BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout),
        path=DropPath(0.5),
        own=_OwnNorm(4),
        untracked=nn.BatchNorm2d(4, track_running_stats=False),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.BatchNorm1d(4),
        dropout=nn.Dropout(0.5),
    )
    extracted, x = extract(randomize_batchnorm(model), statistics=True, image_size=16), images(4, 16)
    assert extracted.batchnorms == ("bn", "bn2", "bn", "own")
    assert extracted.other_batchnorms == ("untracked", "flat")
    outputs = extracted(x)
    logits, inputs, maps = hooked_forward(model, x, ["bn2", "fc", "conv", "own"])
    close((outputs.logits, outputs.penultimate), (logits, inputs["fc"]))
    first, act, second, own = outputs.statistics
    close(own[:2], (inputs["own"].mean((0, 2, 3)), inputs["own"].var((0, 2, 3), unbiased=False)))
    assert own.running_mean is model.own.running_mean
    close((first.mean, second.mean), (maps["conv"].mean((0, 2, 3)), maps["bn2"].mean((0, 2, 3))))
    assert torch.equal(first.running_mean, second.running_mean)
    assert torch.equal(act.running_var, model.bn2.running_var)


class _DetectronNorm(nn.Module):
    """A BatchNorm of another library, with buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class _Subclass(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, FrozenBatchNorm2d, _DetectronNorm, _Subclass])
def test_statistics_of_other_batchnorms(kind: Callable[[int], nn.Module]) -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.act(m.bn2(m.conv2(m.act(m.bn(m.conv(x)))))).mean((2, 3)))

    model = Net(rule, bn=kind(4), bn2=kind(4)).eval()
    for norm in (model.bn, model.bn2):
        norm.running_mean.normal_()
    plain, x = extract(model, image_size=16), images(4, 16)
    logits, inputs, _ = hooked_forward(model, x, ["bn", "bn2"])
    for extracted in (extract(model, statistics=True, image_size=16), extract(plain, statistics=True)):
        assert (extracted.batchnorms, extracted.other_batchnorms) == (("bn", "bn2"), ())
        outputs = extracted(x)
        close(outputs.logits, logits)
        for name, found in zip(("bn", "bn2"), outputs.statistics, strict=True):
            expected = inputs[name].mean((0, 2, 3)), inputs[name].var((0, 2, 3), unbiased=False)
            close(found, (*expected, model.get_buffer(f"{name}.running_mean"), model.get_buffer(f"{name}.running_var")))
    close(fold_batchnorm(plain, image_size=16)(x).logits, logits)


def test_synchronized_batchnorm_of_vectors_is_not_a_map() -> None:
    model = Net(lambda m, x: m.fc(m.flat(m.bn(m.conv(x)).mean((2, 3)))), flat=nn.BatchNorm1d(4))
    extracted = extract(nn.SyncBatchNorm.convert_sync_batchnorm(model).eval(), statistics=True, image_size=16)
    assert extracted.batchnorms == ("bn",)
    assert {"bn2", "flat"} == set(extracted.other_batchnorms)
    assert extracted(images(2, 16)).logits.shape == (2, 5)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "ModelEmaV3": ModelEmaV3,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_network_in_a_wrapper_is_extracted(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = network("resnet8", **NARROW)
    wrapper = wrap(model)
    prefix = next(path for path, module in wrapper.named_modules() if isinstance(module, type(model)))
    extracted = extract(wrapper, image_size=16, stages=[f"{prefix}.layer1", "layer2"])
    assert type(extracted.model) is type(model)
    assert extracted.stages == ("layer1", "layer2")
    close(extracted(images(2, 16)).logits, model(images(2, 16)))


def test_a_network_compiled_in_place_and_one_that_counts_its_calls() -> None:
    model = Net(lambda m, x: m.fc(m.bn(m.conv(x)).mean((2, 3)) + m.calls.add_(1) * 0)).train()
    model.register_buffer("calls", torch.zeros(()))
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    extracted = extract(model, statistics=True, image_size=16, stages=["bn"])
    assert (model.calls, model._compiled_call_impl) == (0, compiled)
    assert extracted.batchnorms == ("bn",)
    assert model.training
    assert model.bn.num_batches_tracked == 0


HEADS: dict[str, Callable[[Any, Tensor], Any]] = {
    "float": lambda m, x: m.fc(m.conv(x).mean((2, 3))).float(),
    "to": lambda m, x: m.fc(m.conv(x).mean((2, 3)).to(m.fc.weight.dtype)).to(torch.float32),
    "squeeze": lambda m, x: m.head(m.conv(x).mean((2, 3), keepdim=True)).squeeze(-1).squeeze(-1),
    "flatten": lambda m, x: torch.flatten(m.head(m.conv(x).mean((2, 3), keepdim=True)), 1).contiguous(),
    "view": lambda m, x: m.fc(m.conv(x).mean((2, 3))).clone().view(x.size(0), -1),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", HEADS)
def test_heads_that_cast_squeeze_or_flatten(name: str, dtype: torch.dtype) -> None:
    model = Net(HEADS[name], head=nn.Conv2d(4, 5, 1)).to(dtype).eval()
    x = images(2, 16).to(dtype)
    extracted = extract(model, stages=["conv"], image_size=16, statistics=True)
    assert (extracted.penultimate_dim, extracted.num_classes) == (4, 5)
    assert torch.equal(extracted(x).logits, model(x))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_networks_for_grey_images() -> None:
    """LeNet on MNIST, as in DAFL."""
    lenet = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.Flatten())
    lenet.append(nn.Linear(16 * 10 * 10, 10))
    extracted = extract(lenet, image_size=32)
    assert extracted.image_channels == 1
    assert extracted(images(2)[:, :1]).logits.shape == (2, 10)
    assert extract(network("resnet8", **NARROW), image_size=16).image_channels == 3


def test_weights_that_are_not_finite_are_named() -> None:
    model = network("resnet8", **NARROW)
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    extract(model, image_size=16)
    with torch.no_grad():
        model.fc.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"CifarResNet has weights .* NaN or infinite: fc\.bias \(5 of 5 values\)"):
        extract(model, image_size=16)


def test_networks_without_stages() -> None:
    model, x = network("timm:vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2), images()
    with pytest.raises(ValueError, match="stages of VisionTransformer cannot be chosen automatically"):
        extract(model, image_size=32)
    for needs in ("penultimate", "logits"):
        outputs = extract(extract(model, image_size=32, needs=needs), statistics=True, image_size=32)(x)
        close(outputs.logits, model(x))
        assert (len(outputs.features), outputs.penultimate.shape, outputs.statistics) == (0, (2, 12), ())
    model = Net(lambda m, x: m.fc(m.branch(m.bn(m.conv(x))).mean((2, 3))), branch=_Branch()).eval()
    logits = extract(model, image_size=32, needs="logits")
    assert (logits.stages, logits.penultimate_dim, logits.num_classes) == ((), 0, 5)
    assert torch.equal(logits(x).logits, model(x))
    assert torch.equal(fold_batchnorm(logits, image_size=32)(x).logits, model(x))
    for changes in ({"needs": "penultimate"}, {"needs": "logits", "statistics": True}):
        with pytest.raises(ValueError, match=r"cannot be traced by torch\.fx"):
            extract(model, image_size=32, **changes)
    with pytest.raises(ValueError, match=r"cannot be traced by torch\.fx"):
        extract(logits, statistics=True, image_size=32)


@pytest.fixture(autouse=True)
def _reset_compiler() -> Any:
    yield
    torch.compiler.reset()


LONG = ["timm:resnet18", "timm:convnext_atto", "torchvision:mobilenet_v2", "timm:efficientnet_b0"]


@pytest.mark.parametrize(
    ("name", "options", "rewrite"),
    [
        ("timm:resnet18", NARROW_TIMM, "features"),
        *(("resnet8", NARROW, rewrite) for rewrite in ("statistics", "folded", "cast")),
        *(pytest.param(name, {}, r, marks=pytest.mark.slow) for name in LONG for r in ("features", "statistics")),
    ],
)
def test_compiles_without_graph_breaks(name: str, options: dict[str, Any], rewrite: str) -> None:
    extracted = REWRITES[rewrite](network(name, **options))
    inputs = [images().requires_grad_(), *(p for p in extracted.parameters() if p.requires_grad)]
    compiled = torch.compile(scalar, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=rewrite == "cast"):
        with ops.backend("reference"):  # which torch.compile uses; the backend "cpu" rounds gradients in bfloat16 twice
            expected = scalar(extracted, inputs[0])
        found = compiled(extracted, inputs[0])
    torch.testing.assert_close(found, expected)
    close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), 1e-4)


def test_compiled_network_follows_the_mode() -> None:
    model = network("resnet8", **NARROW)
    extracted, x = extract(model, image_size=16), images(4, 16)
    compiled = torch.compile(extracted, backend="eager", fullgraph=True)
    for training in (False, True, False):
        model.train(training)
        reference = copy.deepcopy(model)
        close(compiled(x).logits, reference(x))
        with batchnorm_mode(extracted, "batch"):
            close(compiled(x).logits, model(x))
            close(extracted(x).logits, model(x))
        assert torch.equal(model.bn1.running_mean, reference.bn1.running_mean)


def test_log_counts_fused_batchnorms(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dfkd_fast"):
        extract(network("resnet8", **NARROW), statistics=True)
    assert [record.message for record in caplog.records] == [
        "CifarResNet: statistics of 9 BatchNorms (2 unfused, 3 add+relu, 4 relu)"
    ]


def test_discarded_networks_leave_no_generated_source() -> None:
    """torch.fx keeps the source of each GraphModule as long as the process lives."""
    counts = []
    for _ in range(3):
        extract(tiny.network(), image_size=tiny.SIZE, statistics=True)
        gc.collect()
        counts.append((len(fx.graph_module._loader.eval_cache), len(linecache.cache)))
    assert counts[1] == counts[2]
