"""Typed configs: reading, validation and the packaged files."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dfkd_fast.cli import create_parser, main
from dfkd_fast.config import (
    DataConfig,
    DemoConfig,
    DistillConfig,
    ExperimentConfig,
    GeneratorConfig,
    LoopConfig,
    MHADConfig,
    expand,
    find,
    read,
    recipe,
    to_dict,
)
from dfkd_fast.data import DatasetNotFound, load
from dfkd_fast.engine import export
from dfkd_fast.engine.runtime import new_run_folder
from dfkd_fast.models import load_weights, read_metadata, save_weights
from dfkd_fast.nn import GENERATORS
from dfkd_fast.objectives import PRESETS
from dfkd_fast.report import read_results, write_results
from dfkd_fast.synthesis import SYNTHESIZERS

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


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_recipe(name: str) -> None:
    config = recipe(name)
    assert config.objective.preset == name
    assert config.synthesis.name in SYNTHESIZERS
    assert config.generator.name in GENERATORS
    # Values of the publications, not of a miniature.
    assert config.loop.epochs >= 200
    assert config.loop.epochs * config.loop.rounds_per_epoch * config.loop.student_steps >= 80_000
    steps = {"zskd": 1500, "adi": 3000, "fast": 10, "nayer": 80, "dfkd-fgvc": 20, "baseline": 20, "mad": 20, "cmi": 200}
    assert config.loop.generator_steps == steps.get(name, 1)
    text = find(name).read_text()
    assert text.startswith("# ")
    assert PRESETS[name].source.split(",")[0].split(" ")[0] in text


def test_recipes_come_after_experiments() -> None:
    parser = create_parser()
    parsed = parser.parse_args(["distill", "--config", "aircraft", "--config", "fast", "--distill.loop.epochs", "3"])
    config = parser.instantiate(parsed).distill
    assert (config.teacher.name, config.data.name) == ("timm:resnet34", "aircraft")
    assert (config.distill.synthesis.name, config.distill.loop.epochs) == ("fast", 3)
    assert config.distill.optimizer.student_lr == 0.2


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_replace_each_other(name: str) -> None:
    parser = create_parser()
    for before in ("fast", "nayer", "dfkd-fgvc"):
        parsed = parser.parse_args(["distill", "--config", before, "--config", name])
        found, expected = parser.instantiate(parsed).distill.distill, recipe(name)
        assert found.synthesis.name == expected.synthesis.name
        if name not in ("zskd", "adi"):  # use no generator
            assert found.generator.name == expected.generator.name
        assert found.loop == replace(expected.loop, student_in_generator_step=found.loop.student_in_generator_step)


def test_methods_lists_sources(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["methods"])
    printed = capsys.readouterr().out
    for words in ("dfkd-fgvc", "deep_inversion", "BatchNorm statistics", "Tran et al., NAYER, CVPR 2024"):
        assert words in printed


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
        (DistillConfig, {"image_size": 4}, "DistillConfig.image_size must be at least 8, got 4"),
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_read_accepts_byte_order_marks_and_windows_lines(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(f"# é{end}seed: 7{end}{end}loop:{end}  epochs: 3{end}".encode(encoding))
    assert read(DistillConfig, path) == DistillConfig(seed=7, loop=LoopConfig(epochs=3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must map names to values, got None"),
        (b"- 1", r"must map names to values, got \[1\]"),
        (b"seed: [1", "line 1, column 9"),
        (b"# \xe9", "position 2"),
        (b"loop: {epochz: 3}", r"unknown field loop\.epochz; did you mean loop\.epochs\?"),
        (b"loop: 3", "loop must be a mapping of fields, got 3"),
        (b"3: 4", "unknown field 3"),
        (b"loop: {epochs: 0}", "LoopConfig.epochs must be at least 1"),
    ],
)
def test_read_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)config\.yaml: .*{message}"):
        read(DistillConfig, path)


@pytest.mark.parametrize(
    "content",
    [b"- 1", b"teach: {epochs: [3", b"teach:\n\tepochs: 3", b"# \xe9", "teach: {epoch: 3}".encode("utf-16")],
)
def test_the_command_line_names_the_config_file(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as left:
        main(["teach", "--config", "mine.yaml"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: mine.yaml: ")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, which is also ``$PLACE``; the working folder is another one."""
    folder, work = tmp_path / "home", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PLACE", str(folder))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(work)
    return folder


FORMS = ["~", "$PLACE", "${PLACE}", "$HOME"]


@pytest.mark.parametrize("form", FORMS)
def test_paths_are_expanded(home: Path, form: str) -> None:
    assert expand(form) == home
    assert expand(Path(form) / "a b") == home / "a b"
    assert new_run_folder(f"{form}/run", "x") == home / "run"
    (home / "mine.yaml").write_text("seed: 3")
    assert find(f"{form}/mine.yaml") == home / "mine.yaml"
    assert read(DistillConfig, f"{form}/mine.yaml").seed == 3
    linear = torch.nn.Linear(2, 2)
    save_weights(linear, f"{form}/linear.safetensors", {"key": "value"})
    load_weights(linear, f"{form}/linear.safetensors")
    assert read_metadata(f"{form}/linear.safetensors") == {"key": "value"}
    assert write_results(f"{form}/rows.json", {"rows": []}) == home / "rows.json"
    assert read_results(f"{form}/rows.json") == {"rows": []}
    with pytest.raises(DatasetNotFound) as caught:
        load(DataConfig(name="folder", root=form))
    assert caught.value.filename == str(home / "train")
    assert list(Path().iterdir()) == []


def test_export_expands_its_folder(home: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    assert export(model, "~/export", image_size=8).onnx == home / "export" / "student.onnx"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("$NOWHERE/run", r"the environment variable \$NOWHERE is not set"),
        ("${NOWHERE}/run", r"the environment variable \$\{NOWHERE\} is not set"),
        ("run/x$NOWHERE", r"the environment variable \$NOWHERE is not set"),
        ("~no-such-user/run", "there is no user no-such-user"),
    ],
)
def test_paths_that_cannot_be_expanded(home: Path, path: str, reason: str) -> None:
    for use in (expand, find, lambda path: new_run_folder(path, "x"), read_metadata):
        with pytest.raises(ValueError, match=f"cannot expand the path .*: {reason}; set it or write the full path"):
            use(path)
    assert list(Path().iterdir()) == []


def test_names_that_exist_are_not_variables(home: Path) -> None:
    (home / "a$NOWHERE").mkdir()
    assert new_run_folder(str(home / "a$NOWHERE" / "run"), "x") == home / "a$NOWHERE" / "run"
    assert expand("costs 5$") == Path("costs 5$")


def test_a_user_without_a_name_or_home(tmp_path: Path) -> None:
    """As in a container whose user id is not in its password database."""
    code = """
import os, pwd

def missing(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = missing
import dfkd_fast.ops, torch._inductor.codecache
assert not os.environ["TRITON_HOME"].startswith("~")
from dfkd_fast.cli import create_parser, main

main("teach --data.name digits --teacher.name resnet8 --out ~/run".split())
"""
    unnamed = ("HOME", "TRITON_HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    environment = {name: value for name, value in os.environ.items() if name not in unnamed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: cannot expand the path '~/run': HOME is not set; set it or write the full path" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_numbers_in_results_are_finite_and_deep_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"loss": [NaN, 1e999, -Infinity, 1.5]}')
    assert read_results(path) == {"loss": [None, None, None, 1.5]}
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"results\.json is not a result file: maximum recursion depth"):
        read_results(path)
