"""The scripts in examples/ run, the changes between them are small, and their losses agree."""

from __future__ import annotations

import difflib
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDERS = ("plain_dfkd", "deepinversion")


@pytest.fixture
def examples(repository: Path) -> Path:
    return repository / "examples"


@pytest.fixture
def compare(examples: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_examples", examples / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def swap(folder: Path) -> tuple[list[str], list[str]]:
    """Lines of code that occur in only one of the two scripts."""
    before, after = ((folder / name).read_text().splitlines() for name in ("before.py", "after.py"))
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ") and line[2:].strip()]
    code = [line for line in changed if '"""' not in line]
    return [line[2:] for line in code if line[0] == "-"], [line[2:] for line in code if line[0] == "+"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("script", ["before", "after"])
def test_scripts_run(
    examples: Path, folder: str, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(examples / folder))
    monkeypatch.setattr(sys, "argv", ["script", "--steps", "1", "--size", "32", "--batch", "4", "--seed", "3"])
    runpy.run_path(str(examples / folder / f"{script}.py"), run_name="__main__")
    assert "s per step" in capsys.readouterr().out
    sys.modules.pop("losses", None)


def test_plain_loop_changes_only_imports(examples: Path) -> None:
    removed, added = swap(examples / "plain_dfkd")
    assert removed == ["from losses import DeepInversionHook, SupConLoss, kldiv"]
    assert added == [
        "from dfkd_fast.compat.cpsc import SupConLoss",
        "from dfkd_fast.compat.datafree import DeepInversionHook, kldiv",
    ]


def test_deepinversion_changes_few_lines(examples: Path) -> None:
    removed, added = swap(examples / "deepinversion")
    assert len(added) <= 6
    assert len(removed) <= 14
    loop = (examples / "deepinversion" / "after.py").read_text()
    assert "hook" not in loop


def test_compare(compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules, path = set(sys.modules), list(sys.path)
    file = tmp_path / "swap.json"
    options = ["--device", "cpu", "--steps", "1", "--size", "32", "--batch", "32", "--seed", "0", "--turns", "1"]
    assert compare.main(["all", *options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ops run on backend reference") == printed.count("both scripts ran plain PyTorch") == 2
    content = json.loads(file.read_text())
    assert content["environment"]["torch"]
    assert [row["example"] for row in content["rows"]] == list(FOLDERS)
    for row in content["rows"]:
        assert row["before_s"] > 0
        assert row["after_s"] > 0
        assert row["first_loss_difference"] <= 1e-6
        assert row["largest_loss_difference"] <= 1e-4
    assert sys.path == path
    assert not {"before", "after", "losses"} & (set(sys.modules) - modules)


def test_compare_reports_the_backend(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFKD_FAST_BACKEND", raising=False)
    assert (compare.ops_backend("cuda:0"), compare.ops_backend("cpu")) == ("triton", "reference")
    monkeypatch.setenv("DFKD_FAST_BACKEND", "reference")
    assert compare.ops_backend("cuda") == "reference"


@pytest.mark.gpu
def test_compare_on_a_gpu(compare: ModuleType) -> None:
    for folder in FOLDERS:
        row = compare.compare(folder, device="cuda", steps=2, size=32, batch=32, seed=0)
        assert row["backend"] == "triton"
        assert row["first_loss_difference"] <= 1e-4
