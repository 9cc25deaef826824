"""Supervised training and evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import evaluate, teach
from dfkd_fast.config import DataConfig, ModelConfig, TeachConfig
from dfkd_fast.data import load
from dfkd_fast.models import create_model, load_weights, read_metadata

from .. import tiny


def config(out: Path, epochs: int = 3) -> TeachConfig:
    return TeachConfig(epochs=epochs, batch_size=10, lr=0.05, device="cpu", out=str(out))


def test_teach_learns_and_leaves_its_weights(tmp_path: Path) -> None:
    model = tiny.network((8, 8, 8, 8))
    result = teach(model, tiny.data(), config(tmp_path, 30), description={"model": "resnet8"}, progress=False)
    assert result.accuracy == 1.0  # twenty images, learned by heart
    assert result.epochs["loss"][-1] < 0.2 * result.epochs["loss"][0]
    assert not model.training
    fresh = tiny.network((8, 8, 8, 8), seed=3)
    load_weights(fresh, result.weights)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(fresh.eval()(images), model(images))
    metadata = read_metadata(result.weights)
    assert json.loads(metadata["classes"]) == [f"class {i}" for i in range(5)]
    assert metadata["model"] == "resnet8"
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_seed_is_a_training(tmp_path: Path) -> None:
    losses = [
        teach(tiny.network(), tiny.data(), replace(config(tmp_path / str(i)), seed=seed), progress=False).epochs["loss"]
        for i, seed in enumerate([0, 0, 1])
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError, match="the mean loss of epoch 1 is nan: a lower lr may help"):
        teach(tiny.network(), tiny.data(), replace(config(tmp_path), lr=1e30), progress=False)


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most the number of training images, got 64"):
        teach(tiny.network(), tiny.data(), replace(config(tmp_path), batch_size=64), progress=False)


class _Fixed(nn.Module):
    """Logits that are known: a share of them right at first, a share among the first five."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        truth = x[:, 0, 0, 0].round().long()
        rank = x[:, 1, 0, 0].round().long()
        return -(torch.arange(self.classes) - truth[:, None] + rank[:, None]).abs().float()


def test_accuracy_counts_what_is_right() -> None:
    images = torch.zeros(10, 3, 4, 4)
    labels = torch.arange(10) % 5 + 2
    images[:, 0] = labels[:, None, None].float()
    images[6:, 1] = 2.0  # four of ten are off by two: wrong at first, right among five
    model = _Fixed(8).train()
    result = evaluate(model, torch.utils.data.TensorDataset(images, labels), num_classes=8, batch_size=3)
    assert (result.top1, result.top5, result.images) == (pytest.approx(0.6), pytest.approx(1.0), 10)
    assert model.training
    few = evaluate(_Fixed(5), torch.utils.data.TensorDataset(images[:2], labels[:2] % 5), num_classes=5)
    assert few.top5 is None
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(model, torch.utils.data.TensorDataset(images[:0], labels[:0]), num_classes=8)


@pytest.mark.slow
def test_digits_are_learned_by_a_small_network(tmp_path: Path) -> None:
    data = load(DataConfig(name="digits", image_size=32))
    model = create_model(ModelConfig(name="resnet8"), num_classes=10)
    result = teach(model, data, TeachConfig(epochs=6, lr=0.1, device="cpu", out=str(tmp_path)), progress=False)
    assert result.accuracy > 0.95
    assert math.isfinite(result.images_per_s)
