"""The paper's experiment with its packaged config, on a miniature copy of the data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dfkd_fast.cli import main
from dfkd_fast.config import ModelConfig
from dfkd_fast.models import create_model, save_weights

from ..data.trees import VARIANTS, aircraft_tree


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_aircraft_config_distills_resnet34_into_resnet18(tmp_path: Path) -> None:
    root = aircraft_tree(tmp_path / "data")
    teacher = create_model(ModelConfig(name="timm:resnet34"), num_classes=len(VARIANTS))
    save_weights(teacher, tmp_path / "teacher.safetensors", {})
    main(
        [
            *("distill", "--config", "aircraft", "--data.root", str(root), "--data.workers", "0"),
            *("--teacher.weights", "teacher.safetensors", "--out", "run", "--distill.device", "cpu"),
            *("--distill.loop.batch_size", "8", "--distill.loop.epochs", "1", "--distill.loop.rounds_per_epoch", "1"),
            *("--distill.loop.generator_steps", "1", "--distill.loop.student_steps", "1"),
        ]
    )
    assert (tmp_path / "run" / "student.safetensors").is_file()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["distill"]
    assert saved["generator"]["channels"] == [512, 256, 128, 64, 64]
    history = yaml.safe_load((tmp_path / "run" / "history.json").read_text())
    assert set(history["rounds"]) == {
        *("round", "generator/bn", "generator/kd", "student/kd", "student/mhad", "student/sfcl")
    }
    assert len(history["epochs"]["accuracy"]) == 1
