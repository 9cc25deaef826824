"""Supervised training, evaluation and export."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dfkd_fast import evaluate, teach
from dfkd_fast.config import TeachConfig
from dfkd_fast.engine import ExportError, export, training
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


def test_tensorboard_shows_each_epoch_of_a_repeated_training_once(tmp_path: Path) -> None:
    for _ in range(2):
        teach(tiny.network(), tiny.data(), config(tmp_path), progress=False)
    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in log.Scalars("teach/loss")] == [1, 2, 3]


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
    if "lr" in changes:
        assert json.loads((tmp_path / "history.json").read_text()) == {
            "epochs": {"epoch": [1], "loss": [None]},
            "accuracy": None,
        }
    assert not (tmp_path / "teacher.safetensors").exists()


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


def test_masks_may_be_infinite(tmp_path: Path) -> None:
    model = tiny.network()
    model.register_buffer("mask", torch.full((3,), -math.inf))
    assert teach(model, tiny.data(), config(tmp_path), progress=False).weights.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_count_as_wrong(value: float, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(_KnownRanks):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.full((len(x), 8), value)[:3], super().forward(x)[3:]])

    images, labels = torch.zeros(6, 3, 4, 4), torch.arange(6)
    images[:, 0] = labels[:, None, None].float()
    result = evaluate(Broken(8), TensorDataset(images, labels), num_classes=8)
    assert (result.top1, result.top5) == (pytest.approx(0.5), pytest.approx(0.5))
    assert "3 of 6 images have logits that are not finite; they count as wrong" in caplog.text


def test_masked_classes_are_valid(caplog: pytest.LogCaptureFixture) -> None:
    class Masked(_KnownRanks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).index_fill(1, torch.tensor([7]), -math.inf)

    images = torch.zeros(2, 3, 4, 4)
    result = evaluate(Masked(8), TensorDataset(images, torch.zeros(2, dtype=torch.int64)), num_classes=8)
    assert result.top1 == 1
    assert not caplog.text


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = training._Trainer.epoch

    def last_step_diverges(self: training._Trainer) -> float:
        loss = epoch(self)
        self.model.fc.bias.data.fill_(math.nan)  # type: ignore[union-attr,operator]
        return loss

    monkeypatch.setattr(training._Trainer, "epoch", last_step_diverges)
    with pytest.raises(ArithmeticError, match=r"fc\.bias is not finite after epoch 1; try a lower lr"):
        teach(tiny.network(), tiny.data(), config(tmp_path, 1), progress=False)
    assert not (tmp_path / "teacher.safetensors").exists()


class _Constant(nn.Module):
    """Returns the same logits for all images, which depend on a weight."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)).unsqueeze(1) * 0 + self.scores


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_export_refuses_logits_that_are_not_finite(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"_Constant has weights that are NaN or infinite: scores"):
        export(_Constant(1.0, value), tmp_path, image_size=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [math.nan, 0.5, 0.0])
def test_export_checks_the_outputs_of_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    run = onnxruntime.InferenceSession.run

    def changed(self: Any, *arguments: Any) -> list[Any]:
        return [each + wrong for each in run(self, *arguments)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", changed)
    model = _Constant(0.0, 0.0)  # also a head that is initialized with zeros has a difference
    if wrong == 0:
        assert export(model, tmp_path, image_size=8).difference == 0
        return
    message = "are NaN or infinite in ONNX" if math.isnan(wrong) else "ONNX logits differ from PyTorch's by"
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path, image_size=8)
    assert not list(tmp_path.iterdir())


def test_export_refuses_another_image_size_than_the_metadata(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size is 8, but the metadata says 16"):
        export(_Constant(1.0), tmp_path, image_size=8, metadata={"image_size": "16"})
