"""The code in the diffs of CONTRIBUTING.md runs in the files that they change, and their tests pass."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast import data, objectives

ROOT = Path(__file__).resolve().parents[2]
DIFFS = re.findall(r"(?ms)^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
dispatch: Any = importlib.import_module("dfkd_fast.ops.backend")  # the package has a class of this name


def added(diff: str) -> dict[str, str]:
    """Lines added to each file by a diff."""
    _, *parts = re.split(r"(?m)^\+\+\+ b/(.*)\n", diff)
    files = zip(parts[::2], parts[1::2], strict=True)
    return {path: "".join(re.findall(r"(?m)^\+(?!\+\+)(.*\n)", text)) for path, text in files}


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """After each test, removes what a diff has registered."""
    names, tables = list(dispatch._names), (objectives.TERMS, data.DATASETS, dispatch._registry["distillation_kl"])
    before = [dict(table) for table in tables]
    yield
    dispatch._names[:] = names
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: re.findall(r"tests/test_(\w+).py", diff)[0])
def test_diff_passes_its_own_test(diff):
    (module, code), (test, checks) = added(diff).items()
    assert (ROOT / module).is_file()
    assert test.startswith("tests/test_")
    there = importlib.import_module(module.removesuffix(".py").replace("/", "."))
    annotations = "from __future__ import annotations\n"
    exec(compile(annotations + code, module, "exec"), dict(vars(there)))
    namespace: dict[str, Any] = {}
    exec(compile(checks, test, "exec"), namespace)
    (run,) = (value for name, value in namespace.items() if name.startswith("test_"))
    run()


def test_diffs_cover_terms_data_sets_and_backends():
    folders = {path.rpartition("/")[0] for diff in DIFFS for path in added(diff)}
    assert folders == {"dfkd_fast/objectives", "dfkd_fast/data", "dfkd_fast/ops", "tests"}
