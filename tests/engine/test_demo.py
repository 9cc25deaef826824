"""The demo's output and exit status, on runs too short to learn anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dfkd_fast import demo as demos
from dfkd_fast.cli import main
from dfkd_fast.config import DemoConfig, find, read


def toy(least: float) -> DemoConfig:
    config = read(DemoConfig, find("demo_digits"))
    loop = replace(config.distill.loop, epochs=1, rounds_per_epoch=1, generator_steps=1, student_steps=1)
    distill, teach = replace(config.distill, loop=loop), replace(config.teach, epochs=1)
    return replace(config, teach=teach, distill=distill, presets=["dfkd-fgvc", "baseline"], least=least)


def test_run_prints_its_table_and_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console, train, trained = Console(record=True, width=200), demos._train, []
    monkeypatch.setattr(demos, "_train", lambda *arguments: trained.append(train(*arguments)) or trained[0])
    assert demos.run(toy(0.0), tmp_path, "digits", console=console, progress=False)
    shown = console.export_text()
    monkeypatch.setattr(demos, "_train", lambda *arguments: trained[0])
    assert not demos.run(toy(1.5), tmp_path / "missed", "digits", console=console, progress=False)
    presets = ("synthetic images, dfkd-fgvc", "synthetic images, baseline")
    for word in ("teacher: resnet8", "labeled images", *presets, "chance"):
        assert word in shown
    results = json.loads((tmp_path / "results.json").read_text())
    top1 = [row["top1"] for row in results["rows"]]
    assert top1[-1] == 0.1
    assert len(top1) == 5
    for run in ("dfkd-fgvc", "baseline"):
        for name in ("student.safetensors", "checkpoints", "config.yaml", "tensorboard", "curves.png"):
            assert (tmp_path / run / name).exists(), f"{run}/{name}"
            assert str(tmp_path / run / name) in shown
        saved = (tmp_path / run / "config.yaml").read_text()
        assert f"preset: {run}" in saved
        assert ("sfcl: 0.1" in saved) is (run == "dfkd-fgvc")  # other presets use their own weights
    assert (tmp_path / "pictures.png").is_file()


def test_command_fails_if_a_student_misses_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    reached = iter([True, False, True])
    monkeypatch.setattr(demos, "run", lambda *arguments, **options: next(reached))
    try:
        with pytest.raises(SystemExit) as left:
            main(["demo", "--out", str(tmp_path)])
        assert left.value.code == 1
        main(["demo", "--out", str(tmp_path), "--only", "digits"])
    finally:
        torch.set_num_threads(threads)
