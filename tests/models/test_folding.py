"""``fold_batchnorm`` and ``cast_weights``: the same outputs, no shared tensor, and no unsafe fold."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfkd_fast.models import FeatureModel, LayerStatistics, Outputs, cast_weights, extract, fold_batchnorm

from . import nets
from .nets import NARROW, NARROW_TIMM, Net, close, randomize_batchnorm, snapshot

# Options, the number of BatchNorms, and the number that can be folded.
NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "resnet8": (NARROW, 9, 9),
    "wrn_16_1": ({}, 13, 6),  # shortcuts also read the stem and the blocks' outputs
    "wrn_10_2": ({}, 7, 4),  # the shortcut of the first block reads the activated map
    "timm:resnet50": (NARROW_TIMM, 17, 17),
    "torchvision:mobilenet_v2": ({"width_mult": 0.25}, 52, 52),
    "timm:tf_efficientnet_b0": ({}, 49, 49),  # BatchNormAct2d
}
SIZE = 32


def network(name: str, smallest: float = 0.2) -> FeatureModel:
    model = nets.network(name, **NETWORKS[name][0])
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_var[0] = smallest
    return extract(model, image_size=SIZE)


def images(count: int = 4) -> Tensor:
    return nets.images(count, SIZE)


def storages(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_outputs_match(name: str) -> None:
    _, norms, expected = NETWORKS[name]
    features, x = network(name, smallest=1e-6), images()
    folded = fold_batchnorm(features, image_size=SIZE)
    assert type(folded(x)) is Outputs
    close(folded(x), features(x), 1e-4)
    paths = {path for path, module in features.model.named_modules() if isinstance(module, _BatchNorm)}
    left = {path for path, module in folded.model.named_modules() if isinstance(module, _BatchNorm)}
    assert len(paths) == norms
    assert len(folded.folded) == len(set(folded.folded)) == expected
    assert set(folded.folded) == paths - left
    assert features.folded == ()
    upcast = copy.deepcopy(features).double()
    close(fold_batchnorm(upcast, dtype=torch.float64, image_size=SIZE)(x.double()), upcast(x.double()), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet8", "wrn_10_2", "timm:tf_efficientnet_b0"])
def test_bfloat16_error_is_at_most_twice_that_of_autocast(name: str) -> None:
    features, x = network(name), images(8)
    exact = tree_leaves(copy.deepcopy(features).double()(x.double()))
    folded = fold_batchnorm(features, dtype=torch.bfloat16, image_size=SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        found, unfolded = tree_leaves(folded(x)), tree_leaves(features(x))
    errors = [
        torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(each, exact, strict=True)]).norm()
        for each in (found, unfolded)
    ]
    assert [t.dtype for t in found] == [t.dtype for t in unfolded]
    assert errors[0] < 2 * errors[1]
    for module in folded.model.modules():
        if hasattr(module, "weight"):
            assert module.weight.dtype == (torch.float32 if isinstance(module, _BatchNorm) else torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda f: fold_batchnorm(f, image_size=SIZE), lambda f: cast_weights(f, torch.bfloat16)]
)
def test_original_is_unchanged_and_shares_nothing(make: Callable[[FeatureModel], FeatureModel]) -> None:
    features = network("torchvision:mobilenet_v2")
    features.to(memory_format=torch.channels_last)
    next(features.parameters()).requires_grad_(False)
    features.training = True  # only the flag of the plain network matters
    before, random, expected = snapshot(features), torch.get_rng_state(), features(images())
    result = make(features)
    assert torch.equal(torch.get_rng_state(), random)
    assert snapshot(features) == before
    assert all(map(torch.equal, tree_leaves(features(images())), tree_leaves(expected)))
    assert not storages(features) & storages(result)
    assert not set(features.modules()) & set(result.modules())
    assert not any(parameter.requires_grad for parameter in result.parameters())
    assert not any(module.training for module in result.model.modules())
    assert result.training == (features.training and not result.folded)
    for name in ("stages", "feature_channels", "penultimate_dim", "num_classes"):
        assert getattr(result, name) == getattr(features, name)
    for name, parameter in result.named_parameters():  # not the memory format: that of 1 x 1 weights is ambiguous
        if parameter.ndim == 4:
            assert parameter.stride() == features.get_parameter(name).stride()


class _Whole(nn.Module):
    """A leaf for torch.fx, like torch's own modules; it calls a layer that the network also calls by another path."""

    __module__ = "torch.nn.modules.whole"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


RULES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "chain": lambda m, x: m.bn2(m.conv2(m.act(m.bn(m.conv(x))))),
    "two readers": lambda m, x: (lambda y: m.bn2(m.conv2(m.act(m.bn(y)) + y)))(m.conv(x)),
    "called twice": lambda m, x: m.bn2(m.conv2(m.conv2(m.act(m.bn(m.conv(x)))))),
    "called by a leaf": lambda m, x: m.bn2(m.conv2(m.act(m.bn(m.conv(x))) + m.whole(x))),
    "shared norm": lambda m, x: m.bn(m.conv2(m.act(m.bn(m.conv(x))))),
    "weight is read": lambda m, x: m.bn2(m.conv2(m.act(m.bn(m.conv(x))))) * m.conv.weight.sum(),
    "statistics are read": lambda m, x: (
        m.bn2(m.conv2(m.act(m.bn(m.conv(x))))).movedim(1, 3) + m.bn.running_mean
    ).movedim(3, 1),
    "operation between": lambda m, x: m.bn2(m.act(m.conv2(m.bn(m.conv(x).flip(1))))),
    "shared weight": lambda m, x: m.bn(m.conv(x)) + m.act(m.again(x)),
}


def changed(change: Callable[[Any], Any], rule: str = "chain", **parts: nn.Module) -> nn.Module:
    model = randomize_batchnorm(Net(lambda m, x: m.fc(RULES[rule](m, x).mean((2, 3))), **parts))
    change(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "change", "stages", "folded"),
    [
        ("chain", None, ["bn"], {"bn", "bn2"}),
        ("chain", None, ["conv", "act"], {"bn2"}),
        ("two readers", None, ["bn"], {"bn2"}),
        ("called twice", None, ["bn"], {"bn"}),
        ("shared norm", None, ["conv2"], set()),
        ("weight is read", None, ["act"], {"bn2"}),
        ("statistics are read", None, ["act"], {"bn2"}),
        ("called by a leaf", lambda m: setattr(m, "whole", _Whole(m.conv)), ["bn"], {"bn2"}),
        ("operation between", None, ["act"], set()),
        ("chain", lambda m: m.conv.register_forward_hook(lambda *_: None), ["bn2"], {"bn2"}),
        ("chain", lambda m: m.bn.register_forward_pre_hook(lambda *_: None), ["bn2"], {"bn2"}),
        ("chain", lambda m: m.bn.register_full_backward_hook(lambda *_: None), ["bn2"], {"bn2"}),
        ("chain", lambda m: spectral_norm(m.conv), ["bn2"], {"bn2"}),
        ("chain", lambda m: register_parametrization(m.conv, "bias", nn.ReLU()), ["bn2"], {"bn2"}),
        ("chain", lambda m: register_parametrization(m.bn, "weight", nn.ReLU()), ["bn2"], {"bn2"}),
        ("chain", lambda m: nn.utils.weight_norm(m.conv), ["bn2"], {"bn2"}),
        ("chain", lambda m: setattr(m, "bn", nn.BatchNorm2d(4, affine=False)), ["act"], {"bn", "bn2"}),
        ("chain", lambda m: setattr(m, "bn", nn.GroupNorm(2, 4)), ["act"], {"bn2"}),
        ("chain", lambda m: setattr(m, "bn", nn.BatchNorm2d(4, track_running_stats=False)), ["act"], {"bn2"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_unsafe_folds_are_skipped(rule: str, change: Any, stages: list[str], folded: set[str]) -> None:
    features = extract(changed(change or (lambda m: None), rule), stages=stages, image_size=SIZE)
    result = fold_batchnorm(features, image_size=SIZE)
    assert set(result.folded) == folded
    close(result(images()), features(images()), 1e-5)


@torch.no_grad()
def test_linear_layers_fold_only_for_vectors() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        rows = m.conv(x).flatten(2).transpose(1, 2)[:, :4]  # (N, 4, 4): a BatchNorm1d normalizes dimension 1
        vectors = m.across(m.wide(rows)).mean(1)
        return m.fc(m.act(m.vector(m.middle(vectors))))

    parts = {"wide": nn.Linear(4, 4), "across": nn.BatchNorm1d(4), "middle": nn.Linear(4, 4, bias=False)}
    model = randomize_batchnorm(Net(rule, **parts, vector=nn.BatchNorm1d(4)))
    features = extract(model, stages=["conv"], image_size=SIZE)
    result = fold_batchnorm(features, image_size=SIZE)
    assert result.folded == ("vector",)
    close(result(images()), features(images()), 1e-5)


@torch.no_grad()
def test_shared_weights_fold_separately_and_stay_shared_after_a_cast() -> None:
    def share(m: Any) -> None:
        m.again.weight = m.conv.weight

    model = changed(share, "shared weight", again=nn.Conv2d(3, 4, 3, padding=1))
    features = extract(model, stages=["bn"], image_size=SIZE)
    result = fold_batchnorm(features, image_size=SIZE)
    assert result.folded == ("bn",)
    close(result(images()), features(images()), 1e-5)
    cast = cast_weights(features, torch.bfloat16)
    assert cast.model.again.weight is cast.model.conv.weight  # type: ignore[union-attr]


@torch.no_grad()
def test_weights_are_folded_in_float64_and_rounded_once() -> None:
    features = network("resnet8").to(torch.bfloat16)
    found = fold_batchnorm(features, dtype=torch.float32, image_size=SIZE).state_dict()
    expected = fold_batchnorm(copy.deepcopy(features).double(), dtype=torch.float64, image_size=SIZE).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].float())


def overflow(m: Any) -> None:
    m.conv.weight.fill_(300)
    m.bn.running_var.zero_()


def underflow(m: Any) -> None:
    m.conv.weight.mul_(1e-2)
    m.bn.running_var.fill_(1e10)


@torch.no_grad()
@pytest.mark.parametrize("change", [overflow, underflow, lambda m: m.bn.running_mean.fill_(1e6)])
def test_fold_outside_the_range_of_float16_is_skipped(change: Callable[[Any], Any]) -> None:
    """Large weights overflow and small ones lose digits; bfloat16 has the range of float32."""
    features = extract(changed(change), stages=["act"], image_size=SIZE)
    for dtype, folded in ((torch.float16, ("bn2",)), (torch.bfloat16, ("bn", "bn2"))):
        assert fold_batchnorm(features, dtype=dtype, image_size=SIZE).folded == folded
    features.model.bn.running_var.fill_(-1)  # type: ignore[union-attr, operator]
    assert fold_batchnorm(features, image_size=SIZE).folded == ("bn2",)


def outputs(m: Any, x: Tensor) -> Outputs:
    y = m.act(m.bn(m.conv(x)))
    z = m.bn2(m.conv2(y))
    pooled = z.mean((2, 3))
    return Outputs(m.fc(pooled), (y, z), pooled)


def between(m: Any, x: Tensor) -> Outputs:
    given = outputs(m, x)
    read = m.conv2(given.features[0])
    return given._replace(features=(read, m.bn(m.conv(x))))


def untraceable(m: Any, x: Tensor) -> Outputs:
    return outputs(m, x if x.sum() > -1e9 else -x)


def outside_of_the_graph(m: Any, x: Tensor) -> Outputs:
    """Reads an attribute of a BatchNorm that the graph does not contain."""
    given = outputs(m, x)
    return given._replace(logits=given.logits * m.bn.eps)


def other_when_folded(m: Any, x: Tensor) -> Outputs:
    given = outputs(m, x)
    mean = given.features[0].mean((0, 2, 3)) * (1 if isinstance(m.bn, nn.BatchNorm2d) else 2)
    return given._replace(statistics=(LayerStatistics(mean, mean, mean, mean),))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "folded", "message"),
    [
        (outputs, ("bn", "bn2"), "2 of 2"),
        (between, (), "0 of 2"),
        (untraceable, (), "0 of 2 .*torch.fx cannot trace"),
        (other_when_folded, (), "0 of 2 .*depends on values that torch.fx does not record"),
        (outside_of_the_graph, (), "0 of 2 .*depends on values that torch.fx does not record"),
    ],
)
def test_networks_that_return_outputs(
    rule: Callable[[Any, Tensor], Outputs], folded: tuple[str, ...], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    features = extract(randomize_batchnorm(Net(rule)), image_size=SIZE)
    with caplog.at_level(logging.INFO, "dfkd_fast.graph.folding"):
        result = fold_batchnorm(features, dtype=torch.bfloat16, image_size=SIZE)
    assert result.folded == folded
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert re.search(message, record.getMessage())
    assert {m.weight.dtype for m in result.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {torch.bfloat16}
    close(fold_batchnorm(features, image_size=SIZE)(images()), features(images()), 1e-5)


class _Casts(TorchDispatchMode):
    """Counts the dtype conversions of the tensors with these storages."""

    def __init__(self, watched: set[int]) -> None:
        super().__init__()
        self.watched, self.count = watched, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage().data_ptr() in self.watched
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("name", ["wrn_10_2", "timm:tf_efficientnet_b0"])
def test_cast_weights_give_identical_outputs(name: str, statistics: bool) -> None:
    features = network(name).requires_grad_(False)
    if statistics:
        features = extract(features, statistics=True, image_size=SIZE)
    cast = cast_weights(features, torch.bfloat16)
    assert (cast.batchnorms, cast.fused) == (features.batchnorms, features.fused)
    results = []
    for each in (features, cast):
        x = images().requires_grad_()
        weights = {m.weight for m in each.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        casts = _Casts({weight.untyped_storage().data_ptr() for weight in weights})
        with torch.autocast("cpu", torch.bfloat16), casts:
            found = tree_leaves(each(x))
        (gradient,) = torch.autograd.grad(sum(t.float().square().mean() for t in found if t.requires_grad), x)
        results.append([*found, gradient])
        assert casts.count == (len(weights) if each is features else 0)
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@torch.no_grad()
def test_layers_with_parametrizations_or_hooks_are_not_cast() -> None:
    def change(m: Any) -> None:
        spectral_norm(m.conv)
        m.conv2.register_forward_hook(lambda *_: None)

    features = extract(changed(change), stages=["bn2"], image_size=SIZE)
    cast = cast_weights(features, torch.bfloat16)
    kept = {name for name, parameter in cast.model.named_parameters() if parameter.dtype == torch.float32}
    norms = {f"{norm}.{name}" for norm in ("bn", "bn2") for name in ("weight", "bias")}
    assert kept == norms | {"conv.bias", "conv.parametrizations.weight.original", "conv2.weight"}
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, tree_leaves(cast(images())), tree_leaves(features(images()))))


@torch.no_grad()
def test_folded_networks_can_be_extracted_and_folded_again() -> None:
    folded = fold_batchnorm(network("resnet8"), image_size=SIZE)
    for again in (extract(folded, image_size=SIZE), fold_batchnorm(folded, image_size=SIZE)):
        assert torch.equal(again(images()).logits, folded(images()).logits)


def test_errors() -> None:
    features = network("resnet8")
    for call in (lambda model: fold_batchnorm(model, image_size=SIZE), lambda model: cast_weights(model, torch.half)):
        with pytest.raises(TypeError, match="must be a FeatureModel from extract, got CifarResNet"):
            call(features.model)
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .*, got torch.int8"):
        cast_weights(features, torch.int8)
    with pytest.raises(ValueError, match=r"CifarResNet returns BatchNorm statistics.*use cast_weights"):
        fold_batchnorm(extract(features, statistics=True, image_size=SIZE), image_size=SIZE)
    padless = randomize_batchnorm(Net(lambda m, x: m.fc(m.wide(x).mean((2, 3))), wide=nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"Net does not accept an image \(1, 3, 1, 1\); try another image_size"):
        fold_batchnorm(extract(padless, stages=["wide"], image_size=SIZE), image_size=1)
    features.model.layer2.train()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="CifarResNet must be in eval mode to be folded; 'layer2' is in training mode"):
        fold_batchnorm(features, image_size=SIZE)
    features.train()
    with pytest.raises(ValueError, match="'the network' is in training mode"):
        fold_batchnorm(features, image_size=SIZE)
    assert features.model.training
