"""Supervised training and evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dfkd_fast import evaluate, teach
from dfkd_fast.config import TeachConfig
from dfkd_fast.models import load_weights, read_metadata

from .. import tiny


def config(out: Path, epochs: int = 3) -> TeachConfig:
    return TeachConfig(epochs=epochs, batch_size=10, lr=0.05, device="cpu", out=str(out))


def test_teach_learns_and_writes_its_weights(tmp_path: Path) -> None:
    model = tiny.network((8, 8, 8, 8))
    result = teach(model, tiny.data(), config(tmp_path, 30), description={"model": "resnet8"}, progress=False)
    assert result.accuracy == 1.0  # the network memorizes the twenty images
    assert result.epochs["loss"][-1] < 0.2 * result.epochs["loss"][0]
    assert not model.training
    fresh = tiny.network((8, 8, 8, 8), seed=3)
    load_weights(fresh, result.weights)
    assert tiny.same_weights(fresh, model)
    metadata = read_metadata(result.weights)
    assert json.loads(metadata["classes"]) == [f"class {i}" for i in range(5)]
    assert metadata["model"] == "resnet8"
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_seed_determines_the_losses(tmp_path: Path) -> None:
    losses = [
        teach(tiny.network(), tiny.data(), replace(config(tmp_path / str(i)), seed=seed), progress=False).epochs["loss"]
        for i, seed in enumerate([0, 0, 1])
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e30}, "the mean loss of epoch 1 is nan; try a lower lr"),
        ({"batch_size": 64}, "batch_size must be at most the number of training images, got 64"),
    ],
)
def test_divergence_and_too_few_images_raise(tmp_path: Path, changes: dict[str, float], message: str) -> None:
    with pytest.raises((ArithmeticError, ValueError), match=message):
        teach(tiny.network(), tiny.data(), replace(config(tmp_path), **changes), progress=False)


class _KnownRanks(nn.Module):
    """Predicts the class ``label - offset``, where the image's first two channels are the label and the offset."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        label, offset = x[:, 0, 0, 0].round().long(), x[:, 1, 0, 0].round().long()
        return -(torch.arange(self.classes) - label[:, None] + offset[:, None]).abs().float()


def test_evaluate_counts_top1_and_top5() -> None:
    images = torch.zeros(10, 3, 4, 4)
    labels = torch.arange(10) % 5 + 2
    images[:, 0] = labels[:, None, None].float()
    images[6:, 1] = 2.0  # four of ten predictions are off by two, so the label is in the top 5, not the top 1
    model = _KnownRanks(8).train()
    result = evaluate(model, TensorDataset(images, labels), num_classes=8, batch_size=3)
    assert (result.top1, result.top5, result.images) == (pytest.approx(0.6), pytest.approx(1.0), 10)
    assert model.training
    few = evaluate(_KnownRanks(5), TensorDataset(images[:2], labels[:2] % 5), num_classes=5)
    assert few.top5 is None
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(model, TensorDataset(images[:0], labels[:0]), num_classes=8)
