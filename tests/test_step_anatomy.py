"""The stage that profiles a step, and its part of docs/performance.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dfkd_fast.benchmarks import report, step_anatomy
from dfkd_fast.report import markdown_table


def test_markdown_tables_align_numbers_and_escape_bars() -> None:
    rows = [{"name": "a|b", "ms": "1.5"}, {"name": "c", "share": "20%"}]
    assert markdown_table(rows) == [
        "| name | ms | share |",
        "|---|---:|---:|",
        "| a\\|b | 1.5 |  |",
        "| c |  | 20% |",
    ]
    assert markdown_table([]) == []


def test_the_stage_writes_what_the_page_is_made_of(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "benchmarks" / "results" / "cpu" / "anatomy.json"
    out.parent.mkdir(parents=True)
    arguments = ["--out", str(out), "--device", "cpu", "--size", "small", "--engines", "eager", "--steps", "2"]
    assert step_anatomy.main(arguments) == 0
    content = json.loads(out.read_text())
    assert content["complete"]
    assert [row["engine"] for row in content["rows"]] == ["eager"]
    assert {step["step"] for step in content["rows"][0]["steps"]} == {"generator", "student"}
    assert content["run"]["networks"] == {"teacher": "resnet8", "student": "resnet8"}
    before = out.read_bytes()
    monkeypatch.setattr(step_anatomy, "profile", None)  # nothing is left to be profiled
    assert step_anatomy.main(arguments) == 0
    assert out.read_bytes() == before

    (tmp_path / "docs").mkdir()
    for name in ("docs/performance.md", "README.md", "docs/ablation.md"):
        shutil.copyfile(repository / name, tmp_path / name)
    report.main([], root=tmp_path)
    page = (tmp_path / "docs" / "performance.md").read_text()
    section = page.partition("<!-- begin: anatomy -->")[2].partition("<!-- end: anatomy -->")[0]
    assert "| eager | generator |" in section
    assert "Engine `eager`, student step:" in section
    assert "| generator | backward |" in section
