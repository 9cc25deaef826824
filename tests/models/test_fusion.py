"""Patterns that are fused with a BatchNorm, and similar ones that must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.models import FeatureModel, extract, frozen

from .nets import NARROW, Net, close, images, network, randomize_batchnorm, scalar


def build(rule: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> nn.Module:
    """A stem, ``rule(m, x)`` with the network m and the output x of the stem, and a head."""
    model = Net(lambda m, x: m.fc(rule(m, m.conv(x)).float().mean((2, 3))), skip=nn.Identity(), **parts)
    model.register_buffer("place", torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
    return randomize_batchnorm(model)


def _add_to(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _input_written(m: Any, x: Tensor) -> Tensor:
    """Overwrites the BatchNorm's input before the addition."""
    y = m.bn(x)
    return y + m.act(x)


def _residual_written(m: Any, x: Tensor) -> Tensor:
    """Overwrites the residual between the addition and the activation."""
    h = x * 2
    y = m.bn(x) + h
    z = h.mul_(3)
    return F.relu(y) + z


# The rule, and the operations that are expected to be fused with each BatchNorm.
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
    "two norms": (lambda m, x: m.act(m.bn(x) + m.bn2(x)), {"bn": "add+relu", "bn2": ""}),
    "two norms, in place": (lambda m, x: m.act(_add_to(m.bn(x), m.bn2(x))), {"bn": "add+relu", "bn2": ""}),
    "the second activated": (lambda m, x: m.bn(x) + F.relu(m.bn2(x)), {"bn": "add", "bn2": "relu"}),
    "the first activated": (lambda m, x: F.relu(m.bn(x)) + m.bn2(x), {"bn": "relu", "bn2": "add"}),
    "input overwritten": (_input_written, {"bn": ""}),
    "input overwritten past an identity": (lambda m, x: (lambda y: m.skip(y) + m.act(x))(m.bn(x)), {"bn": ""}),
    "residual overwritten": (_residual_written, {"bn": "add+relu"}),
}


def extracted_with_statistics(model: nn.Module, stage: str = "conv") -> FeatureModel:
    return extract(model, stages=[stage], statistics=True, image_size=8)


@pytest.mark.parametrize("case", CASES)
def test_fused_operations_and_values(case: str) -> None:
    rule, expected = CASES[case]
    model, x = build(rule), images(3, 8)
    extracted = extracted_with_statistics(model)
    assert dict(zip(extracted.batchnorms, extracted.fused, strict=True)) == expected
    with torch.no_grad():
        outputs, conv = extracted(x), model.conv(x)
        close((outputs.logits, outputs.statistics[0].mean), (model(x), conv.mean((0, 2, 3))))
        close(outputs.features[0], conv)


@pytest.mark.parametrize(("stage", "fused"), [("bn", ""), ("act", "add+relu")])
def test_output_of_a_stage_is_kept(stage: str, fused: str) -> None:
    model, x = build(CASES["add and activation"][0]), images(3, 8)
    extracted = extracted_with_statistics(model, stage)
    assert extracted.fused == (fused,)
    normed = model.bn(model.conv(x))
    close(extracted(x).features[0], normed if stage == "bn" else F.relu(normed + model.conv(x)))
    close(extracted(x).logits, model(x))


def test_activation_with_a_hook_is_kept() -> None:
    model = build(lambda m, x: m.act(m.bn(x)))
    calls: list[int] = []
    model.act.register_forward_hook(lambda *_: calls.append(1))
    extracted = extracted_with_statistics(model)
    calls.clear()
    extracted(images(1, 8))
    assert (extracted.fused, calls) == (("",), [1])


@pytest.mark.parametrize(
    ("layer", "fused"), [(nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.SiLU, ""), (nn.Identity, "relu")]
)
def test_activation_inside_batchnorm_act(layer: type[nn.Module], fused: str) -> None:
    model = build(lambda m, x: F.relu(m.bn(x)), bn=BatchNormAct2d(4, act_layer=layer))
    extracted = extracted_with_statistics(model)
    assert extracted.fused == (fused,)
    close(extracted(images(3, 8)).logits, model(images(3, 8)))


def test_autocast_matches_plain_network() -> None:
    model = network("resnet8", **NARROW)
    extracted, x = extract(model, statistics=True), images()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, expected = extracted(x), model(x)
    assert outputs.features[-1].dtype == torch.bfloat16
    assert outputs.statistics[-1].var.dtype == torch.float32
    assert (outputs.logits - expected).abs().max() <= 0.05 * expected.abs().max()


def test_kernels_match_reference_eager_and_compiled(kernel_device: str) -> None:
    model = network("resnet8", **NARROW).to(kernel_device)
    extracted = extract(model, statistics=True, image_size=8)
    x = images(2, 8).to(kernel_device).to(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(scalar, fullgraph=True, backend="aot_eager")
    results = []
    torch.compiler.reset()
    with frozen(model):
        for backend, function in (("reference", scalar), ("triton", scalar), ("triton", compiled)):
            with ops.backend(backend):
                loss = function(extracted, x)
                results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    torch.compiler.reset()
    for loss, gradient in results[1:]:
        close(loss, results[0][0])
        close(gradient, results[0][1], 1e-4)
