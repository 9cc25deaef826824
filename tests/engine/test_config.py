"""Typed configs: what is checked, how they are read, and that every packaged one is sound."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfkd_fast import config as configs
from dfkd_fast.config import (
    DemoConfig,
    DistillConfig,
    ExperimentConfig,
    GeneratorConfig,
    LoopConfig,
    find,
    read,
    to_dict,
)

PAPER = ["aircraft", "aircraft_mobilenetv2", "aircraft_resnet34", "aircraft_wrn_40_2", "cars196", "cub200"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_experiments_have_its_numbers(name: str) -> None:
    experiment = read(ExperimentConfig, find(name))
    loop, optimizer = experiment.distill.loop, experiment.distill.optimizer
    assert (loop.generator_steps, loop.student_steps, loop.epochs, loop.batch_size) == (20, 15, 200, 64)
    assert (optimizer.generator_lr, optimizer.generator_betas) == (1e-3, (0.5, 0.99))
    assert (optimizer.student_lr, optimizer.student_momentum, optimizer.student_weight_decay) == (1e-2, 0.9, 5e-4)
    assert (experiment.teach.epochs, experiment.teach.batch_size, experiment.teach.lr) == (100, 64, 1e-2)
    assert experiment.data.image_size == 224
    assert experiment.teacher.name == "timm:resnet34"
    assert experiment.distill.objective.preset == "dfkd-fgvc"


@pytest.mark.parametrize("name", ["demo_digits", "demo_rendered"])
def test_the_demos_configs_are_sound(name: str) -> None:
    demo = read(DemoConfig, find(name))
    assert demo.least == {"demo_digits": 0.94, "demo_rendered": 0.75}[name]
    assert demo.data.name == name.removeprefix("demo_")
    if name == "demo_rendered":
        assert demo.presets == ["dfkd-fgvc", "baseline"]
        assert demo.data.classes == 10
        assert demo.distill.generator.attention != "none"


def test_defaults_are_the_papers() -> None:
    config = DistillConfig()
    assert config.generator.channels == (512, 256, 128, 64, 64)
    assert config.generator.attention_scale == 5e-2
    assert config.loop.rounds_per_epoch == 50
    assert config.objective.mhad.order == 3


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        DistillConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        LoopConfig(3)  # type: ignore[misc]


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    config = DistillConfig(generator=GeneratorConfig(channels=(1, 2, 3, 4, 5)), seed=7)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert read(DistillConfig, path) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loop": {"epohcs": 3}}, "epohcs"),
        ({"loop": {"epochs": "many"}}, "epochs"),
        ({"generator": {"channels": [1, 2]}}, "channels"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        read(DistillConfig, path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoopConfig(epochs=0), "LoopConfig.epochs must be at least 1, got 0"),
        (lambda: LoopConfig(keep_checkpoints=1), "LoopConfig.keep_checkpoints must be at least 2, got 1"),
        (lambda: DistillConfig(image_size=40), "DistillConfig.image_size must be a positive multiple of 16, got 40"),
        (lambda: GeneratorConfig(channels=(0, 1, 1, 1, 1)), "GeneratorConfig.channels must be positive"),
        (lambda: configs.MHADConfig(stages=0), "MHADConfig.stages must be None or at least 1, got 0"),
        (lambda: configs.DataConfig(classes=1), "DataConfig.classes must be at least 2, got 1"),
    ],
)
def test_a_wrong_value_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_an_unknown_config_is_told_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match="no config file 'aircarft'; by name there are aircraft, "):
        find("aircarft")
