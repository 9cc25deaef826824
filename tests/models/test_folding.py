"""Frozen copies for speed: the same outputs, nothing shared, and what may not be folded is not."""

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

from dfkd_fast.models import FeatureModel, LayerStatistics, Outputs, cast_weights, extract, fold_batchnorm

from . import nets
from .nets import NARROW, NARROW_TIMM, unsettled

# Options, BatchNorms, those of them that follow a convolution which nothing else reads.
NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "resnet8": (NARROW, 9, 9),
    "wrn_16_1": ({}, 13, 6),  # the first map of each block goes to its shortcut too
    "wrn_10_2": ({}, 7, 4),  # but for the stem's, where the shortcut starts from the activated one
    "timm:resnet50": (NARROW_TIMM, 17, 17),
    "torchvision:mobilenet_v2": ({"width_mult": 0.25}, 52, 52),
    "timm:tf_efficientnet_b0": ({}, 49, 49),  # activations inside of the BatchNorms
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


def tensors(outputs: Outputs) -> list[Tensor]:
    layers = [value for layer in outputs.statistics for value in layer]
    return [outputs.logits, *outputs.features, outputs.penultimate, *layers]


def close(found: Outputs, expected: Outputs, tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest of each."""
    assert type(found) is Outputs
    for left, right in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance * right.abs().max().item())


def storages(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_gives_the_same(name: str) -> None:
    _, norms, expected = NETWORKS[name]
    features, x = network(name, smallest=1e-6), images()
    folded = fold_batchnorm(features, image_size=SIZE)
    close(folded(x), features(x), 1e-4)
    paths = {path for path, module in features.model.named_modules() if isinstance(module, _BatchNorm)}
    left = {path for path, module in folded.model.named_modules() if isinstance(module, _BatchNorm)}
    assert len(paths) == norms
    assert len(folded.folded) == len(set(folded.folded)) == expected
    assert set(folded.folded) == paths - left
    assert features.folded == ()
    wide = copy.deepcopy(features).double()
    close(fold_batchnorm(wide, dtype=torch.float64, image_size=SIZE)(x.double()), wide(x.double()), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet8", "wrn_10_2", "timm:tf_efficientnet_b0"])
def test_in_bfloat16_folding_costs_no_accuracy(name: str) -> None:
    features, x = network(name), images(8)
    exact = tensors(copy.deepcopy(features).double()(x.double()))
    folded = fold_batchnorm(features, dtype=torch.bfloat16, image_size=SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(tensors(each(x)), exact, strict=True)])
            for each in (folded, features)
        ]
        assert [t.dtype for t in tensors(folded(x))] == [t.dtype for t in tensors(features(x))]
    assert errors[0].norm() < 2 * errors[1].norm()
    kinds = {type(m).__name__: m.weight.dtype for m in folded.model.modules() if hasattr(m, "weight")}
    norms = {dtype for kind, dtype in kinds.items() if "BatchNorm" in kind}
    assert norms <= {torch.float32}
    assert {dtype for kind, dtype in kinds.items() if "BatchNorm" not in kind} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda f: fold_batchnorm(f, image_size=SIZE), lambda f: cast_weights(f, torch.bfloat16)]
)
def test_the_original_is_left_alone(make: Callable[[FeatureModel], FeatureModel]) -> None:
    features = network("torchvision:mobilenet_v2")
    features.to(memory_format=torch.channels_last)
    next(features.parameters()).requires_grad_(False)
    features.training = True  # the network's own flag decides
    state = {name: (id(t), t.clone()) for name, t in features.state_dict(keep_vars=True).items()}
    flags = [parameter.requires_grad for parameter in features.parameters()]
    modules, random = list(features.modules()), torch.get_rng_state()
    modes = [module.training for module in modules]
    expected = features(images())
    made = make(features)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(features.modules()) == modules
    assert [module.training for module in modules] == modes
    assert [parameter.requires_grad for parameter in features.parameters()] == flags
    for name, tensor in features.state_dict(keep_vars=True).items():
        assert id(tensor) == state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert all(map(torch.equal, tensors(features(images())), tensors(expected)))
    assert not storages(features) & storages(made)
    assert not set(features.modules()) & set(made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not any(module.training for module in made.model.modules())
    assert made.training == (features.training and not made.folded)
    names = ("stages", "feature_channels", "penultimate_dim", "num_classes")
    assert [getattr(made, name) for name in names] == [getattr(features, name) for name in names]
    for name, parameter in made.named_parameters():  # 1 x 1 convolutions among them, whose strides say little
        if parameter.ndim == 4:
            assert parameter.stride() == features.get_parameter(name).stride()


class _Classifier(nn.Module):
    """Two convolutions, two BatchNorms, and whatever is done with them."""

    def __init__(self, rule: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        for name, part in parts.items():
            self.add_module(name, part)
        self.rule = rule

    def forward(self, x: Tensor) -> Any:
        return self.rule(self, x)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.last(m.second(m.act(m.norm(m.first(x))))).mean((2, 3)))


def computed(change: Callable[[Any], Any], rule: Callable[[Any, Tensor], Any] = chain, **parts: nn.Module) -> nn.Module:
    model = unsettled(_Classifier(rule, **parts))
    change(model)
    return model.eval()


def two_readers(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.fc(m.last(m.second(m.act(m.norm(y)) + y)).mean((2, 3)))


def twice(m: Any, x: Tensor) -> Tensor:
    y = m.second(m.act(m.norm(m.first(x))))
    return m.fc(m.last(m.second(y)).mean((2, 3)))


def shared_norm(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.norm(m.second(m.act(m.norm(m.first(x))))).mean((2, 3)))


def weight_read(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.last(m.second(m.act(m.norm(m.first(x))))).mean((2, 3)) * m.first.weight.sum())


def statistics_read(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.last(m.second(m.act(m.norm(m.first(x))))).mean((2, 3)) + m.norm.running_mean)


class _Whole(nn.Module):
    """Followed no further, as torch's own modules are; it calls a layer that the network has by another path."""

    __module__ = "torch.nn.modules.whole"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def called_inside(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.last(m.second(m.act(m.norm(m.first(x))) + m.whole(x))).mean((2, 3)))


def views(m: Any, x: Tensor) -> Tensor:
    """What a BatchNorm reads is a convolution's output by way of something else."""
    return m.fc(m.last(m.act(m.second(m.norm(m.first(x).flip(1))))).mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "stages", "folded"),
    [
        (lambda: computed(lambda m: None), ["norm"], {"norm", "last"}),
        (lambda: computed(lambda m: None), ["first", "act"], {"last"}),
        (lambda: computed(lambda m: None, two_readers), ["norm"], {"last"}),
        (lambda: computed(lambda m: None, twice), ["norm"], {"norm"}),
        (lambda: computed(lambda m: None, shared_norm), ["second"], set()),
        (lambda: computed(lambda m: None, weight_read), ["act"], {"last"}),
        (lambda: computed(lambda m: None, statistics_read), ["act"], {"last"}),
        (lambda: computed(lambda m: setattr(m, "whole", _Whole(m.first)), called_inside), ["norm"], {"last"}),
        (lambda: computed(lambda m: None, views), ["act"], set()),
        (lambda: computed(lambda m: m.first.register_forward_hook(lambda *_: None)), ["last"], {"last"}),
        (lambda: computed(lambda m: m.norm.register_forward_pre_hook(lambda *_: None)), ["last"], {"last"}),
        (lambda: computed(lambda m: m.norm.register_full_backward_hook(lambda *_: None)), ["last"], {"last"}),
        (lambda: computed(lambda m: spectral_norm(m.first)), ["last"], {"last"}),
        (lambda: computed(lambda m: register_parametrization(m.first, "bias", nn.ReLU())), ["last"], {"last"}),
        (lambda: computed(lambda m: register_parametrization(m.norm, "weight", nn.ReLU())), ["last"], {"last"}),
        (lambda: computed(lambda m: nn.utils.weight_norm(m.first)), ["last"], {"last"}),
        (lambda: computed(lambda m: setattr(m, "norm", nn.BatchNorm2d(4, affine=False))), ["act"], {"norm", "last"}),
        (lambda: computed(lambda m: setattr(m, "norm", nn.GroupNorm(2, 4))), ["act"], {"last"}),
        (
            lambda: computed(lambda m: setattr(m, "norm", nn.BatchNorm2d(4, track_running_stats=False))),
            ["act"],
            {"last"},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_only_what_may_be_folded_is(model: Callable[[], nn.Module], stages: list[str], folded: set[str]) -> None:
    features = extract(model(), stages=stages, image_size=SIZE)
    made = fold_batchnorm(features, image_size=SIZE)
    assert set(made.folded) == folded
    close(made(images()), features(images()), 1e-5)


@torch.no_grad()
def test_linear_layers_are_folded_where_the_channels_are_theirs() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        rows = m.first(x).flatten(2).transpose(1, 2)[:, :4]  # (N, 4, 4): a BatchNorm1d normalises the first of these
        vectors = m.across(m.wide(rows)).mean(1)
        return m.fc(m.act(m.vector(m.middle(vectors))))

    parts = {"wide": nn.Linear(4, 4), "across": nn.BatchNorm1d(4), "middle": nn.Linear(4, 4, bias=False)}
    model = unsettled(_Classifier(rule, **parts, vector=nn.BatchNorm1d(4)))
    features = extract(model, stages=["first"], image_size=SIZE)
    made = fold_batchnorm(features, image_size=SIZE)
    assert made.folded == ("vector",)
    close(made(images()), features(images()), 1e-5)


@torch.no_grad()
def test_weights_that_several_layers_share() -> None:
    def share(m: Any) -> None:
        m.first = nn.Conv2d(3, 4, 3, padding=1)
        m.again = nn.Conv2d(3, 4, 3, padding=1)
        m.again.weight = m.first.weight

    def rule(m: Any, x: Tensor) -> Tensor:
        return m.fc((m.norm(m.first(x)) + m.act(m.again(x))).mean((2, 3)))

    features = extract(computed(share, rule), stages=["norm"], image_size=SIZE)
    made = fold_batchnorm(features, image_size=SIZE)
    assert made.folded == ("norm",)
    close(made(images()), features(images()), 1e-5)
    held = cast_weights(features, torch.bfloat16)
    assert held.model.again.weight is held.model.first.weight  # type: ignore[union-attr]


@torch.no_grad()
def test_weights_are_folded_wide_and_rounded_last() -> None:
    features = network("resnet8").to(torch.bfloat16)
    found = fold_batchnorm(features, dtype=torch.float32, image_size=SIZE).state_dict()
    expected = fold_batchnorm(copy.deepcopy(features).double(), dtype=torch.float64, image_size=SIZE).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].float())


@torch.no_grad()
def test_a_fold_that_the_type_does_not_hold_is_left() -> None:
    """In float16 large weights overflow and small ones lose their digits; bfloat16 has the range."""

    def overflow(m: Any) -> None:
        m.first.weight.fill_(300)
        m.norm.running_var.zero_()

    def underflow(m: Any) -> None:
        m.first.weight.mul_(1e-2)
        m.norm.running_var.fill_(1e10)

    def far(m: Any) -> None:
        m.norm.running_mean.fill_(1e6)

    for change in (overflow, underflow, far):
        features = extract(computed(change), stages=["act"], image_size=SIZE)
        for dtype, folded in ((torch.float16, ("last",)), (torch.bfloat16, ("norm", "last"))):
            assert fold_batchnorm(features, dtype=dtype, image_size=SIZE).folded == folded
    features.model.norm.running_var.fill_(-1)  # type: ignore[union-attr, operator]
    assert fold_batchnorm(features, image_size=SIZE).folded == ("last",)


def outputs(m: Any, x: Tensor) -> Outputs:
    y = m.act(m.norm(m.first(x)))
    z = m.last(m.second(y))
    pooled = z.mean((2, 3))
    return Outputs(m.fc(pooled), (y, z), pooled)


def between(m: Any, x: Tensor) -> Outputs:
    given = outputs(m, x)
    read = m.second(given.features[0])
    return given._replace(features=(read, m.norm(m.first(x))))


def untraceable(m: Any, x: Tensor) -> Outputs:
    return outputs(m, x if x.sum() > -1e9 else -x)


def outside_of_the_graph(m: Any, x: Tensor) -> Outputs:
    """Reads something of a BatchNorm that the graph does not show."""
    given = outputs(m, x)
    return given._replace(logits=given.logits * m.norm.eps)


def other_when_folded(m: Any, x: Tensor) -> Outputs:
    given = outputs(m, x)
    mean = given.features[0].mean((0, 2, 3)) * (1 if isinstance(m.norm, nn.BatchNorm2d) else 2)
    return given._replace(statistics=(LayerStatistics(mean, mean, mean, mean),))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "folded", "said"),
    [
        (outputs, ("norm", "last"), "2 of 2"),
        (between, (), "0 of 2"),
        (untraceable, (), "0 of 2 .*cannot be followed by torch.fx"),
        (other_when_folded, (), "0 of 2 .*something that torch.fx does not see"),
        (outside_of_the_graph, (), "0 of 2 .*something that torch.fx does not see"),
    ],
)
def test_networks_that_give_outputs_themselves(
    rule: Callable[[Any, Tensor], Outputs], folded: tuple[str, ...], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    features = extract(unsettled(_Classifier(rule)), image_size=SIZE)
    with caplog.at_level(logging.INFO, "dfkd_fast.graph.folding"):
        made = fold_batchnorm(features, dtype=torch.bfloat16, image_size=SIZE)
    assert made.folded == folded
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert re.search(said, record.getMessage())
    assert {m.weight.dtype for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {torch.bfloat16}
    close(fold_batchnorm(features, image_size=SIZE)(images()), features(images()), 1e-5)


class _Casts(TorchDispatchMode):
    """Counts conversions of some tensors."""

    def __init__(self, watched: set[int]) -> None:
        super().__init__()
        self.watched, self.count = watched, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage().data_ptr() in self.watched
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("name", ["wrn_10_2", "timm:tf_efficientnet_b0"])
def test_held_weights_give_the_same_bit_for_bit(name: str, statistics: bool) -> None:
    features = network(name).requires_grad_(False)
    if statistics:
        features = extract(features, statistics=True, image_size=SIZE)
    held = cast_weights(features, torch.bfloat16)
    assert (held.batchnorms, held.fused) == (features.batchnorms, features.fused)
    results = []
    for each in (features, held):
        x = images().requires_grad_()
        weights = {m.weight for m in each.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        casts = _Casts({weight.untyped_storage().data_ptr() for weight in weights})
        with torch.autocast("cpu", torch.bfloat16), casts:
            found = tensors(each(x))
        (gradient,) = torch.autograd.grad(sum(t.float().square().mean() for t in found if t.requires_grad), x)
        results.append([*found, gradient])
        assert casts.count == (len(weights) if each is features else 0)
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@torch.no_grad()
def test_what_computes_or_watches_its_weight_is_not_held() -> None:
    def change(m: Any) -> None:
        spectral_norm(m.first)
        m.second.register_forward_hook(lambda *_: None)

    features = extract(computed(change), stages=["last"], image_size=SIZE)
    held = cast_weights(features, torch.bfloat16)
    wide = {name for name, parameter in held.model.named_parameters() if parameter.dtype == torch.float32}
    norms = {f"{norm}.{name}" for norm in ("norm", "last") for name in ("weight", "bias")}
    assert wide == norms | {"first.bias", "first.parametrizations.weight.original", "second.weight"}
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, tensors(held(images())), tensors(features(images()))))


def test_compiled() -> None:
    features = network("resnet8")
    folded = fold_batchnorm(features, dtype=torch.bfloat16, image_size=SIZE)
    held = cast_weights(extract(features, statistics=True, image_size=SIZE), torch.bfloat16)
    torch._dynamo.reset()
    for each in (folded, held):
        x = images().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = each(x), torch.compile(each, fullgraph=True, backend="aot_eager")(x)
        close(found, expected, 2e-2)
        found.logits.float().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in each.parameters())
    torch._dynamo.reset()


@torch.no_grad()
def test_folded_networks_can_be_extracted_and_folded_again() -> None:
    folded = fold_batchnorm(network("resnet8"), image_size=SIZE)
    for again in (extract(folded, image_size=SIZE), fold_batchnorm(folded, image_size=SIZE)):
        assert torch.equal(again(images()).logits, folded(images()).logits)


def test_wrong_arguments() -> None:
    features = network("resnet8")
    with pytest.raises(TypeError, match="must be a FeatureModel, as extract gives it, got CifarResNet"):
        fold_batchnorm(features.model, image_size=SIZE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a FeatureModel, as extract gives it, got CifarResNet"):
        cast_weights(features.model, torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .*, got torch.int8"):
        cast_weights(features, torch.int8)
    with pytest.raises(ValueError, match="CifarResNet gives the statistics of its BatchNorms"):
        fold_batchnorm(extract(features, statistics=True, image_size=SIZE), image_size=SIZE)
    valid = unsettled(_Classifier(lambda m, x: m.fc(m.wide(x).mean((2, 3))), wide=nn.Conv2d(3, 4, 3)))
    small = extract(valid, stages=["wide"], image_size=SIZE)
    with pytest.raises(ValueError, match=r"_Classifier does not take an image \(1, 3, 1, 1\); another image_size may"):
        fold_batchnorm(small, image_size=1)
    features.model.layer2.train()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="CifarResNet must be in eval mode to be folded; 'layer2' is in training mode"):
        fold_batchnorm(features, image_size=SIZE)
    features.train()
    with pytest.raises(ValueError, match="'the network' is in training mode"):
        fold_batchnorm(features, image_size=SIZE)
    assert features.model.training
