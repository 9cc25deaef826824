"""``export`` of networks in wrappers, other dtypes and patched ones, which stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfkd_fast import patch
from dfkd_fast.engine import ExportError, export
from dfkd_fast.models import extract, load_weights

from .. import tiny


def patched() -> nn.Module:
    model = tiny.network().eval().requires_grad_(False)
    assert patch(model).replaced
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DataParallel": lambda: nn.DataParallel(tiny.network()),
    "compiled, averaged": lambda: torch.compile(AveragedModel(tiny.network()), backend="eager"),
    "traced, float16": lambda: extract(tiny.network().half(), image_size=tiny.SIZE),
    "float64": lambda: tiny.network().double().to(memory_format=torch.channels_last),
    "patched": patched,
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_is_exported(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()

    def state() -> list[object]:
        tensors = [(key, t.dtype, t.stride(), t.tolist()) for key, t in model.state_dict().items()]
        return [*tensors, [(m.training, "forward" in m.__dict__) for m in model.modules()]]

    before = state()
    result = export(model, tmp_path, image_size=tiny.SIZE)
    assert result.difference < 1e-3
    assert state() == before
    student = tiny.network(seed=3)
    load_weights(student, result.safetensors)
    expected = tiny.network().half().float() if "float16" in name else tiny.network()
    assert tiny.same_weights(student, expected)


class Scaled(nn.Module):
    """Has weights with the names of the graph's input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny.network()
        self.logits, self.images = nn.Parameter(torch.full((1,), 2.0)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * self.logits + self.images


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_weights_named_as_the_input_or_output(tmp_path: Path) -> None:
    assert export(Scaled(), tmp_path, image_size=tiny.SIZE).difference < 1e-3


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * 1e38 * 1e38


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def not_finite() -> nn.Module:
    model = tiny.network()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    return model


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (not_finite, ValueError, r"CifarResNet has weights .* NaN or infinite: fc\.weight \(1 of 40 values\)"),
        (Overflow, ExportError, r"the logits of Overflow for random images are NaN or infinite in PyTorch"),
        (Branch, ExportError, r"torch\.onnx cannot export Branch: "),
        (lambda: nn.Conv2d(7, 3, 3), ValueError, r"Conv2d does not accept an image \(2, 3, 16, 16\)"),
    ],
)
def test_networks_that_cannot_be_exported(
    model: Callable[[], nn.Module], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(model(), tmp_path, image_size=tiny.SIZE)
    assert not (tmp_path / "student.safetensors").exists()
