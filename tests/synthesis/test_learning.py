"""Every method trains a student clearly above chance: its recipe with small networks, few steps and adapted rates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd_fast import DistillConfig, distill, teach
from dfkd_fast.config import DataConfig, InversionContrastConfig, ModelConfig, TeachConfig, recipe
from dfkd_fast.data import ImageData, load
from dfkd_fast.models import create_model
from dfkd_fast.objectives import PRESETS

LEAST = 0.25  # of ten classes; the standard deviation of guesses is 0.016

# Methods without a prior of images, with a network without BatchNorm, whose running statistics would be those of noise.
PLAIN = ("zskd", "dfad", "zskt")

# Generator steps, student steps and rounds, and what differs from 64 images per step and the recipe's rates.
SETTINGS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "dfkd-fgvc": ((4, 4, 25), {}),
    "baseline": ((4, 4, 50), {}),
    "mad": ((4, 4, 50), {}),
    "dafl": ((2, 10, 50), {"student_lr": 0.1}),
    "dfq": ((2, 4, 50), {}),
    "dfad": ((1, 8, 50), {"student_lr": 0.02}),
    "zskt": ((1, 8, 50), {"student_lr": 0.05}),
    "zskd": ((30, 80, 4), {"generator_lr": 0.05, "student_lr": 0.01, "batch_size": 64}),
    "adi": ((80, 40, 5), {"batch_size": 64, "half": 8, "jitter": 1, "warm_up": 5}),
    "cmi": ((20, 30, 4), {"batch_size": 64}),
    "fast": ((8, 25, 6), {"batch_size": 64, "warm_up": 2}),
    "nayer": ((16, 25, 5), {"batch_size": 64, "warm_up": 2}),
}


def network(method: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if method not in PLAIN:
        return create_model(ModelConfig(name="resnet8", options={"widths": [8, 8, 16, 32]}), num_classes=10)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def config(method: str, out: Path) -> DistillConfig:
    published, (steps, changes) = recipe(method), SETTINGS[method]
    changes = dict(changes)
    rates = {name: changes.pop(name) for name in ("generator_lr", "student_lr") if name in changes}
    loop: dict[str, Any] = {"generator_steps": steps[0], "student_steps": steps[1], "rounds_per_epoch": steps[2]}
    options = {"width": 16, "normalize_image": published.loop.student_in_generator_step == "update"}
    contrast = InversionContrastConfig(dim=32, bank_size=512, negatives=128)
    synthesis = replace(published.synthesis, pool_size=4096, crop=1)
    loop |= {"epochs": 1, "batch_size": changes.pop("batch_size", 32), "checkpoint_every": 1000, "evaluate_every": 0}
    return replace(
        published,
        generator=replace(published.generator, name="upsampling", options=options, latent_dim=16),
        synthesis=replace(synthesis, options={**synthesis.options, **changes}),
        objective=replace(published.objective, contrast=contrast),
        optimizer=replace(published.optimizer, **{"student_lr": 0.05, **rates}),
        loop=replace(published.loop, **loop),
        **{"device": "cpu", "precision": "fp32", "out": str(out)},
    )


@pytest.fixture(scope="module")
def images() -> ImageData:
    return load(DataConfig(name="digits", image_size=16, augment=False))


@pytest.fixture(scope="module")
def teachers(images: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    @functools.cache
    def teacher(method: str) -> nn.Module:
        settings: dict[str, Any] = {
            "device": "cpu",
            "precision": "fp32",
            "out": str(tmp_path_factory.mktemp("teacher")),
        }
        config = TeachConfig(epochs=5, batch_size=32, lr=0.05, **settings)
        result = teach(network(method, 0), images, config, progress=False)
        assert result.accuracy > 0.9
        return result.model

    return lambda method: teacher("zskd" if method in PLAIN else "others")


@pytest.mark.parametrize("method", PRESETS)
def test_the_student_learns(
    method: str, teachers: Callable[[str], nn.Module], images: ImageData, tmp_path: Path
) -> None:
    settings = config(method, tmp_path)
    result = distill(teachers(method), network(method, 1), settings, data=images, progress=False)
    assert result.accuracy is not None
    assert result.accuracy > LEAST
