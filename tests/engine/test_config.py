"""Typed configs: reading, validation and the packaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dfkd_fast.config import (
    DataConfig,
    DemoConfig,
    DistillConfig,
    ExperimentConfig,
    GeneratorConfig,
    LoopConfig,
    MHADConfig,
    find,
    read,
    to_dict,
)

PAPER = ["aircraft", "aircraft_mobilenetv2", "aircraft_resnet34", "aircraft_wrn_40_2", "cars196", "cub200"]


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_have_the_papers_values(name: str) -> None:
    experiment = read(ExperimentConfig, find(name))
    loop, optimizer = experiment.distill.loop, experiment.distill.optimizer
    assert (loop.generator_steps, loop.student_steps, loop.epochs, loop.batch_size) == (20, 15, 200, 64)
    assert (optimizer.generator_lr, optimizer.generator_betas) == (1e-3, (0.5, 0.99))
    assert (optimizer.student_lr, optimizer.student_momentum, optimizer.student_weight_decay) == (1e-2, 0.9, 5e-4)
    assert (experiment.teach.epochs, experiment.teach.batch_size, experiment.teach.lr) == (100, 64, 1e-2)
    assert experiment.data.image_size == 224
    assert experiment.teacher.name == "timm:resnet34"
    assert experiment.distill.objective.preset == "dfkd-fgvc"
    # Defaults that the files do not repeat.
    generator, mhad = experiment.distill.generator, experiment.distill.objective.mhad
    assert (generator.channels, generator.attention_scale, mhad.order) == ((512, 256, 128, 64, 64), 5e-2, 3)
    assert loop.rounds_per_epoch == 50


@pytest.mark.parametrize(("name", "least"), [("digits", 0.94), ("rendered", 0.80)])
def test_demo_configs_are_valid(name: str, least: float) -> None:
    demo = read(DemoConfig, find(f"demo_{name}"))
    assert (demo.least, demo.data.name) == (least, name)
    if name == "rendered":
        assert demo.presets == ["dfkd-fgvc", "baseline"]
        assert demo.data.classes == 10
        assert demo.distill.generator.attention != "none"


def test_config_round_trips_through_yaml(tmp_path: Path) -> None:
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
def test_read_names_the_invalid_field(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        read(DistillConfig, path)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (LoopConfig, {"epochs": 0}, "LoopConfig.epochs must be at least 1, got 0"),
        (LoopConfig, {"keep_checkpoints": 1}, "LoopConfig.keep_checkpoints must be at least 2, got 1"),
        (DistillConfig, {"image_size": 40}, "DistillConfig.image_size must be a positive multiple of 16, got 40"),
        (GeneratorConfig, {"channels": (0, 1, 1, 1, 1)}, "GeneratorConfig.channels must be positive"),
        (MHADConfig, {"stages": 0}, "MHADConfig.stages must be None or at least 1, got 0"),
        (DataConfig, {"classes": 1}, "DataConfig.classes must be at least 2, got 1"),
    ],
)
def test_invalid_value_raises(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_unknown_config_lists_the_packaged_ones() -> None:
    with pytest.raises(FileNotFoundError, match="no config file 'aircarft'; packaged configs: aircraft, "):
        find("aircarft")
