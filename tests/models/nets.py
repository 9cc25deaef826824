"""Networks and helpers for the tests of models and graph rewrites."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from dfkd_fast.config import ModelConfig
from dfkd_fast.models import create_model

NARROW: dict[str, Any] = {"widths": (4, 4, 6, 8)}
NARROW_TIMM: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}


def randomize_batchnorm(model: nn.Module) -> nn.Module:
    """Gives BatchNorms random statistics, scales of both signs and one small variance; sets eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.running_var[0] = 0.2
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.weight[-1] *= -1
                    module.bias.normal_(0, 0.3)
    return model.eval()


@functools.cache
def _built(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batchnorm(create_model(ModelConfig(name=name, options=dict(options)), num_classes=5))


def network(name: str, **options: Any) -> nn.Module:
    """A copy of a network, which the test may change."""
    return copy.deepcopy(_built(name, tuple(options.items())))


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Compares tensors to ``tolerance`` times the largest expected value of each."""
    for left, right in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance * right.abs().max().item())


def snapshot(model: nn.Module) -> list[Any]:
    """The state of all modules: attributes and dictionary items by identity, tensors by value."""
    found: list[Any] = []
    for path, module in model.named_modules():
        found.append((path, id(module), type(module), list(module.__dict__)))
        for name, value in module.__dict__.items():
            found.append((path, name, id(value)))
            if isinstance(value, dict):
                found.append([(key, id(item)) for key, item in value.items()])
        found += [(t.tolist(), t.requires_grad, t.grad is None) for t in module.state_dict(keep_vars=True).values()]
    return found


class Net(nn.Module):
    """Two convolutions, two BatchNorms and a head; ``rule`` is the forward, ``parts`` are further modules."""

    def __init__(self, rule: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        for name, part in parts.items():
            self.add_module(name, part)
        self.rule = rule

    def forward(self, *inputs: Tensor) -> Any:
        return self.rule(self, *inputs)


def scalar(network: nn.Module, x: Tensor) -> Tensor:
    """A loss that depends on every output of a FeatureModel."""
    outputs = network(x)
    total = outputs.logits.logsumexp(1).mean() + outputs.penultimate.square().mean()
    for feature in outputs.features:
        total = total + feature.square().mean()
    for layer in outputs.statistics:
        total = total + (layer.mean - layer.running_mean).norm() + (layer.var - layer.running_var).norm()
    return total
