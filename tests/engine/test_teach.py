"""Supervised training, evaluation and export."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from dfkd_fast import evaluate, teach
from dfkd_fast.config import TeachConfig
from dfkd_fast.data import ImageArray, ImageData, loader
from dfkd_fast.engine import CheckpointError, ExportError, TeachResult, export, training
from dfkd_fast.engine.interrupt import StopRequest
from dfkd_fast.models import load_weights, read_metadata

from .. import tiny


def config(out: Path, epochs: int = 3, **changes: Any) -> TeachConfig:
    return TeachConfig(epochs=epochs, batch_size=10, lr=0.05, device="cpu", out=str(out), **changes)


def network(dropout: float = 0.2) -> nn.Module:
    """A network whose results depend on PyTorch's global generator."""
    model = tiny.network()
    model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)  # type: ignore[arg-type]
    return model


def shifted() -> ImageData:
    """Images that are shifted at random for training: six batches of ten."""
    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 5
    train, test = ImageArray(images, labels, shift=2), ImageArray(images[:20], labels[:20])
    return ImageData(train, test, tuple("abcde"), tiny.HALF, tiny.HALF, 8)


def full(out: Path, **changes: Any) -> TeachResult:
    """A training with all options."""
    options: dict[str, Any] = {"label_smoothing": 0.1, "warmup_epochs": 1, "ema": 0.8, "evaluate_every": 2}
    return teach(network(), shifted(), config(out, **(options | changes)), progress=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TeachResult:
    """The result of a complete run of :func:`full`."""
    return full(tmp_path_factory.mktemp("undisturbed"), resume=True)


def assert_same_files(one: TeachResult, other: TeachResult) -> None:
    assert tiny.same_weights(one.model, other.model)
    for name in ("teacher.safetensors", "history.json"):
        assert (one.run_dir / name).read_bytes() == (other.run_dir / name).read_bytes(), name
    names = [sorted(path.name for path in (each.run_dir / "checkpoints").iterdir()) for each in (one, other)]
    assert names[0] == names[1] == ["epoch-000002-step-0000.pt", "epoch-000003-step-0000.pt"]
    for name in names[0]:
        a, b = (torch.load(each.run_dir / "checkpoints" / name)["state"] for each in (one, other))
        for left, right in zip(tree_leaves(a), tree_leaves(b), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def shown(folder: Path, name: str = "teach/loss") -> list[int]:
    """The steps of a value that TensorBoard shows."""
    return [event.step for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(name)]


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


def interrupt(patch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something after the given step of the training, from 0."""
    train, steps = training._Trainer._train, count()

    def stepped(self: training._Trainer, *arguments: Any) -> None:
        train(self, *arguments)
        if next(steps) == step:
            action()

    patch.setattr(training._Trainer, "_train", stepped)


def die() -> None:
    raise tiny.Killed


@pytest.mark.parametrize("step", [2, 9, 17], ids=["in the first epoch", "in the second one", "in the last step"])
def test_killed_training_resumes_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, undisturbed: TeachResult
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, step, die)
        with pytest.raises(tiny.Killed):
            full(tmp_path, resume=True)
    found = full(tmp_path, resume=True)
    assert_same_files(found, undisturbed)
    assert shown(tmp_path) == [1, 2, 3]
    assert shown(tmp_path, "teach/accuracy") == [2, 3]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("step", [8, 11], ids=["in the middle of an epoch", "in its last step"])
def test_signal_saves_the_training_before_leaving(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    number: signal.Signals,
    expected: type[BaseException],
    undisturbed: TeachResult,
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(expected):
            full(tmp_path, checkpoint_every=100)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == f"epoch-000001-step-{step - 5:04d}.pt"
    steps = count()
    with monkeypatch.context() as patch:
        patch.setattr(training.F, "cross_entropy", lambda *a, f=F.cross_entropy, **o: next(steps) >= 0 and f(*a, **o))
        found = full(tmp_path, resume=True)
    assert next(steps) == 17 - step  # of 18 steps
    assert_same_files(found, undisturbed)


def test_finished_training_returns_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: TeachResult
) -> None:
    shutil.copytree(undisturbed.run_dir, tmp_path / "run")
    (tmp_path / "run" / "teacher.safetensors").unlink()  # as if the process was killed before it wrote the weights
    interrupt(monkeypatch, 0, die)
    found = full(tmp_path / "run", resume=True)
    assert_same_files(found, undisturbed)
    assert found.accuracy == undisturbed.accuracy
    assert found.images_per_s == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": False}, "already contains checkpoints of a run: set resume, or choose another folder"),
        (
            {"momentum": 0.5, "epochs": 4},
            r"epochs was 3 and is now 4; momentum was 0\.9 and is now 0\.5; set them back, or",
        ),
        ({"ema": 0.0}, r"ema was 0\.8 and is now 0\.0; set it back, or choose another folder for out"),
    ],
)
def test_training_in_the_folder_of_another_one_is_refused(
    changes: dict[str, Any], message: str, undisturbed: TeachResult
) -> None:
    with pytest.raises((CheckpointError, ValueError), match=message):
        full(undisturbed.run_dir, **{"resume": True, **changes})


def test_resumed_training_refuses_other_data_and_networks(undisturbed: TeachResult) -> None:
    options = config(undisturbed.run_dir, label_smoothing=0.1, warmup_epochs=1, ema=0.8, resume=True)
    with pytest.raises(CheckpointError, match="training_images was 60 and is now 20"):
        teach(network(), replace(shifted(), train=shifted().test), options, progress=False)
    with pytest.raises(CheckpointError, match=r"with another model: conv1\.weight had shape \(4, 3, 3, 3\) and now"):
        teach(tiny.network((8, 4, 6, 8)), shifted(), options, progress=False)


def test_schedule_smoothing_and_average_follow_their_definitions(tmp_path: Path) -> None:
    """SGD on a linear classifier of normalized pixels, step by step in float64."""
    images, labels = torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(2)), torch.arange(40) % 5
    data = ImageData(TensorDataset(images, labels), TensorDataset(images, labels), tuple("abcde"), *[tiny.HALF] * 2, 2)
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(12, 5, bias=False))
    weight, mean, buffer = model[2].weight.detach().double(), torch.zeros(3).double(), torch.zeros(5, 12).double()
    options = {"weight_decay": 0.01, "warmup_epochs": 1, "label_smoothing": 0.2, "ema": 0.7}
    result = teach(model, data, config(tmp_path, precision="fp32", **options), progress=False)
    batches = loader(data.train, batch_size=10, shuffle=True, seed=0, workers=0, drop_last=True)
    averages: list[Tensor] = []
    for step, (batch, of) in enumerate(batch for _ in range(3) for batch in batches):
        x = batch.double()
        rate = 0.05 * ((step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 8)) / 2)
        normalized = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
        pixels = normalized.flatten(1)
        targets = 0.8 * torch.eye(5).double()[of] + 0.2 / 5
        gradient = ((pixels @ weight.T).softmax(1) - targets).T @ pixels / 10 + 0.01 * weight
        buffer = 0.9 * buffer + gradient
        weight = weight - rate * buffer
        mean = 0.9 * mean + 0.1 * x.mean((0, 2, 3))
        now = [weight, mean]
        averages = [0.7 * a + 0.3 * b for a, b in zip(averages, now, strict=True)] if averages else now
    assert result.model is model
    torch.testing.assert_close(model[2].weight.detach().double(), averages[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[0].running_mean.double(), averages[1], rtol=1e-4, atol=1e-6)
    saved = load_file(result.weights)
    assert torch.equal(saved["2.weight"], model[2].weight)
    predicted = (images.double() - averages[1].view(1, 3, 1, 1)) / model[0].running_var.double().view(1, 3, 1, 1).sqrt()
    right = ((predicted.flatten(1) @ averages[0].T).argmax(1) == labels).double().mean().item()
    assert result.accuracy == pytest.approx(right, abs=0.03)  # one image may be at the border of two classes


@pytest.mark.parametrize(("every", "expected"), [(0, [3]), (1, [1, 2, 3]), (2, [2, 3])])
def test_evaluations_are_recorded_and_change_nothing(
    tmp_path: Path, every: int, expected: list[int], undisturbed: TeachResult
) -> None:
    lines: list[dict[str, float]] = []
    options = config(tmp_path, label_smoothing=0.1, warmup_epochs=1, ema=0.8, evaluate_every=every)
    result = teach(network(), shifted(), options, progress=lambda done, total, values, speed: lines.append(values))
    assert tiny.same_weights(result.model, undisturbed.model)
    history = json.loads((tmp_path / "history.json").read_text())
    measured = [
        epoch for epoch, value in zip((1, 2, 3), history["epochs"]["accuracy"], strict=True) if value is not None
    ]
    assert measured == shown(tmp_path, "teach/accuracy") == expected
    assert history["accuracy"] == history["epochs"]["accuracy"][-1] == lines[-1]["accuracy"] == result.accuracy
    assert ("accuracy" in lines[0]) == (every == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, r"TeachConfig\.label_smoothing must be in \[0, 1\), got 1\.0"),
        ({"ema": -0.1}, r"TeachConfig\.ema must be in \[0, 1\), got -0\.1"),
        ({"epochs": 3, "warmup_epochs": 3}, r"warmup_epochs must be less than epochs, got 3 and 3"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
    ],
)
def test_invalid_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeachConfig(**changes)


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
            "epochs": {"epoch": [1], "loss": [None], "accuracy": [None]},
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

    def last_step_diverges(self: training._Trainer, stop: StopRequest) -> float | None:
        loss = epoch(self, stop)
        self.model.fc.bias.data.fill_(math.nan)  # type: ignore[union-attr,operator]
        return loss

    monkeypatch.setattr(training._Trainer, "epoch", last_step_diverges)
    with pytest.raises(ArithmeticError, match=r"fc\.bias is not finite after epoch 1; try a lower lr"):
        teach(tiny.network(), tiny.data(), config(tmp_path, 1), progress=False)
    assert not (tmp_path / "teacher.safetensors").exists()
    assert not (tmp_path / "checkpoints").exists()


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
