"""The comparison of methods: its settings, one run and its tables."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from dfkd_fast.benchmarks import methods
from dfkd_fast.config import ExperimentConfig, find, read
from dfkd_fast.objectives import PRESETS


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_has_settings(method: str) -> None:
    config = methods.settings_of(method)
    assert config.objective.preset == method
    assert config.loop.batch_size == 32


def test_methods_without_a_part_differ_in_it() -> None:
    names = [name for name in methods.METHODS if "," in name and ":" not in name]
    assert {name.partition(", ")[2] for name in names} == {"inversion", "contrast", "momentum", "bank"}
    for name in names:
        assert methods.settings_of(name) != methods.settings_of(name.partition(",")[0])


def test_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    short = {"data.train_per_class": 8, "data.test_per_class": 2, "teach.epochs": 1, "teach.device": "cpu"}
    small = read(ExperimentConfig, find("rendered32"), changes=short)
    monkeypatch.setattr(methods, "experiment", lambda: small)
    monkeypatch.setattr(methods, "STEPS", (5, 10))
    monkeypatch.setitem(methods.METHODS, "dfad", {**methods.METHODS["dfad"], "loop.batch_size": 8})
    row = methods.run_method("dfad", 0, methods.trained_teacher(), steps=10)
    assert [point[0] for point in row["curve"]] == [5, 10]
    assert row["accuracy"] == row["curve"][-1][2]
    assert row["images_per_s"] > 0


def test_tables() -> None:
    common = {"accuracy": None, "teacher_accuracy": 0.9, "images_per_s": 100.0, "peak_bytes": 2**30}
    rows = [
        {"method": "fast", "seed": 0, "curve": [[250, 10.0, 0.25], [500, 20.0, 0.5]], **common},
        {"method": "fast", "seed": 1, "curve": [[260, 31.0, 0.75]], **common},
    ]
    text = methods.methods_section({"rows": rows, "environments": [{"cpu": "c", "commit": "a" * 40}]}, "cpu")
    steps, seconds = [line for line in text.splitlines() if line.startswith("| `fast`")]
    assert steps.startswith("| `fast` | - | 50.0% ± 35.4 | 50.0% | - | 100 | 1.00 | 2 |")
    assert seconds.startswith("| `fast` | 25.0% | 62.5% ± 17.7 | 62.5% ± 17.7 |")
    assert "without" not in text
    rows = [
        {**common, "method": name, "seed": seed, "accuracy": accuracy, "curve": []}
        for name, values in (("fast", (0.5, 0.6, 0.7)), ("fast, inversion", (0.4, 0.4, 0.6)))
        for seed, accuracy in enumerate(values)
    ]
    text = methods.methods_section({"rows": rows, "environments": [{"cpu": "c", "commit": "a" * 40}]}, "cpu")
    # Differences -10, -20 and -10: standard deviation 5.77, and t = 4.303 with two degrees of freedom.
    assert "| `fast` | inversion | 46.7% | -13.3 ± 14.3 | 3 |" in text
