"""The demo's output and exit status, on runs too short to learn anything."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dfkd_fast import demo as demos
from dfkd_fast.cli import main
from dfkd_fast.config import DemoConfig, find, read
from dfkd_fast.report import read_results


def toy(least: float) -> DemoConfig:
    config = read(DemoConfig, find("demo_digits"))
    loop = replace(config.distill.loop, epochs=1, rounds_per_epoch=1, generator_steps=1, student_steps=1)
    distill, teach = replace(config.distill, loop=loop), replace(config.teach, epochs=1)
    return replace(config, teach=teach, distill=distill, presets=["dfkd-fgvc", "baseline"], least=least)


def test_run_prints_its_table_and_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(record=True, width=200)
    assert demos.run({"digits": toy(0.0)}, tmp_path, console=console, workers=2)
    shown, folder = console.export_text(), tmp_path / "digits"
    presets = ("synthetic images, dfkd-fgvc", "synthetic images, baseline")
    for word in ("teacher: resnet8", "labeled images", *presets, "chance", "reached"):
        assert word in shown
    results = read_results(folder / "results.json")
    assert results is not None
    top1 = [row["top1"] for row in results["rows"]]
    assert top1[-1] == 0.1
    assert len(top1) == 5
    for run in ("dfkd-fgvc", "baseline"):
        for name in ("student.safetensors", "checkpoints", "config.yaml", "tensorboard", "curves.png"):
            assert (folder / run / name).exists(), f"{run}/{name}"
        saved = (folder / run / "config.yaml").read_text()
        assert f"preset: {run}" in saved
        assert ("sfcl: 0.1" in saved) is (run == "dfkd-fgvc")  # other presets use their own weights
    assert (folder / "pictures.png").is_file()
    assert str(folder / "pictures.png") in shown

    # The last three lines are commands.
    tensorboard, *commands = (shlex.split(line) for line in shown.splitlines()[-3:])
    assert Path(tensorboard[0]).name == "tensorboard"
    assert tensorboard[1:] == ["--logdir", str(tmp_path)]
    for program, *arguments in commands:
        assert Path(program).name == "dfkd-fast"
        main(arguments)
    assert f"{results['rows'][2]['top1']:.2%}" in capsys.readouterr().out  # evaluate
    assert (folder / "dfad" / "student.safetensors").exists()


def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for workers in (1, 3):
        demos.run({"digits": toy(0.0)}, tmp_path / str(workers), console=Console(), workers=workers)
    one, three = (read_results(tmp_path / n / "digits" / "results.json") for n in ("1", "3"))
    assert [row["top1"] for row in one["rows"]] == [row["top1"] for row in three["rows"]]
    for name in ("student_with_data/teacher.safetensors", "dfkd-fgvc/student.safetensors"):
        first, second = ((tmp_path / n / "digits" / name).read_bytes() for n in ("1", "3"))
        assert first == second


def test_command_fails_if_a_student_misses_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    monkeypatch.setattr(demos, "run", lambda given, folder, **options: configs.append(given) or len(configs) == 2)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(tmp_path), "--seed", "3"])
    assert left.value.code == 1
    assert [*configs[0]] == ["digits", "rendered"]
    assert {config.distill.seed for config in configs[0].values()} == {3}
    main(["demo", "--out", str(tmp_path), "--only", "digits"])
    assert [*configs[1]] == ["digits"]


@pytest.mark.parametrize(("teacher", "student"), [(math.nan, 0.5), (0.5, math.nan), (0.0, 0.5), (0.0, 0.0)])
def test_nan_and_a_useless_teacher_miss_the_target(tmp_path: Path, teacher: float, student: float) -> None:
    rows = [demos.Row(str(i), "images", top1, 1.0, 1.0, Path("x")) for i, top1 in enumerate((teacher, student, 0.5))]
    config = replace(toy(0.0), presets=["dfkd-fgvc"])
    assert not demos._save_results(config, tmp_path, "toy", rows, facts={}, console=Console(record=True))
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_a_student_below_its_target_is_reported(tmp_path: Path) -> None:
    rows = [
        demos.Row(network, "images", top1, 1.0, 1.0, Path("x.safetensors"))
        for network, top1 in (("teacher", 0.9), ("student", 0.6), ("student", 0.8))
    ]
    for least, word in ((0.6, "reached"), (0.7, "missed")):
        console, config = Console(record=True, width=200), replace(toy(least), presets=["dfkd-fgvc"])
        reached = demos._save_results(config, tmp_path, "toy", rows, facts={"seconds": 1.0}, console=console)
        assert reached is (word == "reached")
        assert word in console.export_text()
    shares = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["top1"] for row in shares] == [0.9, 0.8, 0.6, 0.1]
