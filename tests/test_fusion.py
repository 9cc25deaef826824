"""What follows a BatchNorm and is computed with it: the same network, fewer passes, and nothing guessed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.config import ModelConfig
from dfkd_fast.models import FeatureModel, create_model, extract, frozen

SMALL = {"widths": [4, 4, 6, 8]}


def unsettled(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and scales that differ from layer to layer."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model.eval()


def network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return unsettled(create_model(ModelConfig(name=name, options=options), num_classes=5))


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def hooked(model: nn.Module, x: Tensor, extracted: FeatureModel) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits, stages and the BatchNorms' loss of the plain network, by hooks."""
    losses: dict[str, Tensor] = {}
    features: dict[str, Tensor] = {}

    def read(path: str) -> Callable[..., None]:
        def hook(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            var, mean = torch.var_mean(given[0], (0, 2, 3), unbiased=False)
            losses[path] = (mean - module.running_mean).norm() + (var - module.running_var).norm()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(read(path)) for path in extracted.batchnorms]
    for path in extracted.stages:
        keep = lambda _, __, output, path=path: features.__setitem__(path, output.clone())  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(keep))
    logits = model(x)
    for handle in handles:
        handle.remove()
    loss = torch.stack([losses[path] for path in extracted.batchnorms]).sum()
    return logits, [features[path] for path in extracted.stages], loss


def loss_of(outputs: Any) -> Tensor:
    """L_BN."""
    layers = outputs.statistics
    return sum((s.mean - s.running_mean).norm() + (s.var - s.running_var).norm() for s in layers)  # type: ignore


NETWORKS: dict[str, dict[str, int]] = {
    "timm:resnet18": {"": 3, "relu": 9, "add+relu": 8},
    "timm:resnet34": {"": 3, "relu": 17, "add+relu": 16},
    "torchvision:resnet18": {"": 3, "relu": 9, "add+relu": 8},
    "resnet20": {"": 2, "relu": 10, "add+relu": 9},
    "wrn_16_1": {"relu": 13},
    "timm:mobilenetv2_100": {"": 7, "add": 10, "relu6": 35},
    "timm:efficientnet_b0": {"": 40, "add": 9},
    "timm:regnetx_002": {"": 4, "relu": 27, "add+relu": 13},
    "timm:densenet121": {"relu": 121},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_compute_what_the_plain_ones_do(name: str) -> None:
    model, x = network(name), images().requires_grad_()
    extracted = extract(model, statistics=True)
    assert Counter(extracted.fused) == NETWORKS[name]
    assert len(extracted.fused) == len(extracted.batchnorms)
    with frozen(model):
        outputs = extracted(x)
        logits, features, loss = hooked(model, x, extracted)
        close(outputs.logits, logits)
        for found, wanted in zip(outputs.features, features, strict=True):
            close(found, wanted)
        close(loss_of(outputs), loss)
        weights = torch.randn(2, 5)
        found = torch.autograd.grad((outputs.logits * weights).sum() + 0.1 * loss_of(outputs), x)[0]
        wanted = torch.autograd.grad((logits * weights).sum() + 0.1 * loss, x)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_a_log_line_says_how_many(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dfkd_fast"):
        extract(network("resnet8", **SMALL), statistics=True)
    assert [record.message for record in caplog.records] == [
        "CifarResNet: 9 BatchNorms give statistics (2 alone, 3 add+relu, 4 relu)"
    ]


class _Net(nn.Module):
    """A stem, what is under test, and a head."""

    def __init__(self, rule: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.skip, self.fc = nn.Identity(), nn.Linear(4, 5)
        self.register_buffer("place", torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
        for name, part in parts.items():
            self.add_module(name, part)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rule(self, self.conv(x)).mean((2, 3)))


def _add_to(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _later(m: Any, x: Tensor) -> Tensor:
    """The norm's input is written into before the addition."""
    y = m.bn(x)
    return y + m.act(x)


def _residual_written(m: Any, x: Tensor) -> Tensor:
    """The residual is written into after the addition and before the activation."""
    h = x * 2
    y = m.bn(x) + h
    z = h.mul_(3)
    return F.relu(y) + z


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, str]]] = {
    "module": (lambda m, x: m.act(m.bn(x)), {"bn": "relu"}),
    "F.relu": (lambda m, x: F.relu(m.bn(x)), {"bn": "relu"}),
    "F.relu in place": (lambda m, x: F.relu(m.bn(x), inplace=True), {"bn": "relu"}),
    "torch.relu": (lambda m, x: torch.relu(m.bn(x)), {"bn": "relu"}),
    "method": (lambda m, x: m.bn(x).relu(), {"bn": "relu"}),
    "method in place": (lambda m, x: m.bn(x).relu_(), {"bn": "relu"}),
    "F.relu6": (lambda m, x: F.relu6(m.bn(x)), {"bn": "relu6"}),
    "F.hardtanh": (lambda m, x: F.hardtanh(m.bn(x), 0.0, 6.0), {"bn": "relu6"}),
    "F.hardtanh by name": (lambda m, x: F.hardtanh(m.bn(x), min_val=0, max_val=6), {"bn": "relu6"}),
    "other limits": (lambda m, x: F.hardtanh(m.bn(x), 0.0, 1.0), {"bn": ""}),
    "identity between": (lambda m, x: m.act(m.skip(m.bn(x))), {"bn": "relu"}),
    "leaky": (lambda m, x: F.leaky_relu(m.bn(x)), {"bn": ""}),
    "add": (lambda m, x: m.bn(x) + x, {"bn": "add"}),
    "add from the right": (lambda m, x: x + m.bn(x), {"bn": "add"}),
    "add and activation": (lambda m, x: m.act(m.bn(x) + x), {"bn": "add+relu"}),
    "torch.add": (lambda m, x: torch.add(m.bn(x), x).relu(), {"bn": "add+relu"}),
    "add in place": (lambda m, x: m.act(_add_to(m.bn(x), x)), {"bn": "add+relu"}),
    "method add in place": (lambda m, x: m.bn(x).add_(x), {"bn": "add"}),
    "alpha": (lambda m, x: torch.add(m.bn(x), x, alpha=2), {"bn": ""}),
    "a number": (lambda m, x: m.act(m.bn(x) + 1), {"bn": ""}),
    "itself": (lambda m, x: (lambda y: y + y)(m.bn(x)), {"bn": ""}),
    "a buffer": (lambda m, x: m.act(m.bn(x) + m.place), {"bn": "add+relu"}),
    "broadcast": (lambda m, x: m.act(m.bn(x) + x.mean((2, 3), keepdim=True)), {"bn": ""}),
    "promoted": (lambda m, x: m.bn(x) + x.double(), {"bn": ""}),
    "into the residual": (lambda m, x: (lambda y: y.add_(m.bn(x)) * y)(x * 2), {"bn": ""}),
    "used twice": (lambda m, x: (lambda y: m.act(y + x) * y)(m.bn(x)), {"bn": ""}),
    "sum used twice": (lambda m, x: (lambda y: F.relu(y) * y)(m.bn(x) + x), {"bn": "add"}),
    "two norms": (lambda m, x: m.act(m.bn(x) + m.other(x)), {"bn": "add+relu", "other": ""}),
    "two norms, in place": (lambda m, x: m.act(_add_to(m.bn(x), m.other(x))), {"bn": "add+relu", "other": ""}),
    "the second activated": (lambda m, x: m.bn(x) + F.relu(m.other(x)), {"bn": "add", "other": "relu"}),
    "the first activated": (lambda m, x: F.relu(m.bn(x)) + m.other(x), {"bn": "relu", "other": "add"}),
    "input overwritten": (_later, {"bn": ""}),
    "input overwritten past an identity": (lambda m, x: (lambda y: m.skip(y) + m.act(x))(m.bn(x)), {"bn": ""}),
    "residual overwritten": (_residual_written, {"bn": "add+relu"}),
}


@pytest.mark.parametrize("case", CASES)
def test_patterns(case: str) -> None:
    rule, wanted = CASES[case]
    torch.manual_seed(0)
    model = unsettled(_Net(rule)).double() if case == "promoted" else unsettled(_Net(rule))
    if case == "promoted":
        model = unsettled(_Net(lambda m, x: rule(m, x).float()))
    extracted = extract(model, stages=["conv"], statistics=True, image_size=8)
    assert dict(zip(extracted.batchnorms, extracted.fused, strict=True)) == wanted
    x = images(3, 8)
    with torch.no_grad():
        outputs = extracted(x)
        close(outputs.logits, model(x))
        close(outputs.statistics[0].mean, model.conv(x).mean((0, 2, 3)))
        close(outputs.features[0], model.conv(x))


def test_stages_between_stay() -> None:
    """What a stage is named after is not fused away; what ends in a stage is found there."""
    rule, _ = CASES["add and activation"]
    x = images(3, 8)
    for stage, fused in (("bn", ""), ("act", "add+relu")):
        model = unsettled(_Net(rule))
        extracted = extract(model, stages=[stage], statistics=True, image_size=8)
        assert extracted.fused == (fused,)
        normed = model.bn(model.conv(x))
        close(extracted(x).features[0], normed if stage == "bn" else F.relu(normed + model.conv(x)))
        close(extracted(x).logits, model(x))


def test_hooks_on_an_activation_keep_it() -> None:
    model = unsettled(_Net(lambda m, x: m.act(m.bn(x))))
    calls: list[int] = []
    model.act.register_forward_hook(lambda *_: calls.append(1))
    extracted = extract(model, stages=["conv"], statistics=True, image_size=8)
    calls.clear()
    extracted(images(1, 8))
    assert (extracted.fused, calls) == (("",), [1])


@pytest.mark.parametrize(
    ("layer", "fused"), [(nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.SiLU, ""), (nn.Identity, "relu")]
)
def test_activation_inside_of_the_norm(layer: type[nn.Module], fused: str) -> None:
    model = unsettled(_Net(lambda m, x: F.relu(m.bn(x)), bn=BatchNormAct2d(4, act_layer=layer)))
    extracted = extract(model, stages=["conv"], statistics=True, image_size=8)
    assert extracted.fused == (fused,)
    close(extracted(images(3, 8)).logits, model(images(3, 8)))


def test_autocast_is_that_of_the_plain_network() -> None:
    model = network("resnet8", **SMALL)
    extracted, x = extract(model, statistics=True), images()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, wanted = extracted(x), model(x)
    assert outputs.features[-1].dtype == torch.bfloat16
    assert outputs.statistics[-1].var.dtype == torch.float32
    assert (outputs.logits - wanted).abs().max() <= 0.05 * wanted.abs().max()


def _loss(extracted: FeatureModel, x: Tensor) -> Tensor:
    outputs = extracted(x)
    return outputs.logits.logsumexp(1).mean() + loss_of(outputs) + outputs.features[-1].square().mean()


def test_kernels_agree_with_the_reference(kernel_device: str) -> None:
    """A tiny network, forward and backward, channels-last."""
    model = network("resnet8", **SMALL).to(kernel_device)
    extracted = extract(model, statistics=True, image_size=8)
    x = images(2, 8).to(kernel_device).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    with frozen(model):
        for backend in ("reference", "triton"):
            with ops.backend(backend):
                loss = _loss(extracted, x)
                results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-4 * results[0][1].abs().max().item())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_without_graph_breaks(kernel_device: str, backend: str) -> None:
    model = network("resnet8", **SMALL).to(kernel_device)
    extracted = extract(model, statistics=True, image_size=8)
    x = images(2, 8).to(kernel_device).requires_grad_()
    torch.compiler.reset()
    with frozen(model), ops.backend(backend):
        wanted = torch.autograd.grad(_loss(extracted, x), x)[0]
        compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(extracted, x), x)[0]
    torch.compiler.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
