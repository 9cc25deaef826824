"""The tables of the documentation come from committed results, are between markers, and are up to date."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from dfkd_fast.benchmarks import ablation, report
from dfkd_fast.benchmarks.ablation import CELLS, ablation_section, experiment, override
from dfkd_fast.report import read_results, write_results

PAGES = (*report.SECTIONS, "README.md")


@pytest.fixture
def copy(tmp_path: Path, repository: Path) -> Path:
    """The committed pages, without results."""
    for name in PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(repository / name, tmp_path / name)
    return tmp_path


def between(page: Path, name: str) -> str:
    return page.read_text().partition(f"<!-- begin: {name} -->\n")[2].partition(f"<!-- end: {name} -->")[0].strip()


def test_only_the_lines_between_the_markers_change():
    page = "above\n<!-- begin: a -->\nold\n<!-- end: a -->\nbelow\n"
    expected = "above\n<!-- begin: a -->\nnew \\1\n<!-- end: a -->\nbelow\n"
    assert report.between_markers(page, "a", "new \\1\n\n") == expected
    for bad in ("no markers", page + page):
        with pytest.raises(ValueError, match="one pair of markers '<!-- begin: a -->'"):
            report.between_markers(bad, "a", "new")


def test_pages_without_results_have_a_note(copy):
    assert report.main([], root=copy) == 0
    for name, sections in report.SECTIONS.items():
        for section in sections:
            assert between(copy / name, section) == "Nothing has been measured yet."


def test_each_device_has_a_section(copy):
    block = {"device": {"name": "A GPU"}, "torch": "2.11.0", "commit": "c" * 40, "source": "s"}
    row = {"cell": "eager", "overrides": {}, "accuracy": 0.9, "teacher_accuracy": 1.0, "agreement": 0.8, "rounds": 9}
    for device in ("gpu-a", "gpu-b"):
        content = {"environments": [block], "rows": [row]}
        write_results(copy / "benchmarks" / "results" / device / "accuracy.json", content)
    report.main([], root=copy)
    text = between(copy / "docs" / "performance.md", "accuracy")
    assert text.count("| eager |  | 90.0% | 90.0% | 80.0% | 1 |") == 2
    assert text.index("### gpu-a") < text.index("### gpu-b")
    assert between(copy / "docs" / "performance.md", "step") == "Nothing has been measured yet."


def test_committed_pages_are_up_to_date(copy, repository):
    (copy / "benchmarks").symlink_to(repository / "benchmarks")
    assert report.main([], root=copy) == 0
    for name in PAGES:
        assert (copy / name).read_text() == (repository / name).read_text(), f"{name}: run make report"


def test_ablation_has_mean_and_deviation_over_seeds():
    fixed = {"cell": "+ SFCL", "overrides": {"objective.student.mhad": 0.0}, "teacher_accuracy": 0.8, "rounds": 80}
    rows = [{**fixed, "seed": seed, "accuracy": a, "agreement": 0.5} for seed, a in enumerate((0.4, 0.6))]
    rows.append({**fixed, "seed": 2, "accuracy": None, "agreement": None})
    block = {"device": {"name": "A GPU"}, "torch": "2.11.0", "commit": "0123456789abcdef", "source": "s"}
    text = ablation_section({"rows": rows, "environments": [block]}, "a-gpu")
    line = "| + SFCL | `objective.student.mhad=0.0` | 50.0% ± 14.1 | 62.5% ± 17.7 | 50.0% ± 0.0 | 2 (not finite: 1) |"
    assert line in text
    assert "Teacher: 80.0%; rounds: 80; measured on: A GPU, torch 2.11.0; commit: 0123456789ab." in text


def test_engines_are_compared_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = [
        "--engines",
        "--size",
        "small",
        "--device",
        "cpu",
        "--out",
        "accuracy.json",
        "--seeds",
        "0",
        "--jobs",
        "1",
    ]
    for seconds in ("-1", "600", "600"):  # the last one has nothing left to do
        assert ablation.main([*arguments, "--seconds", seconds]) == 0
        rows = (read_results("accuracy.json") or {"rows": []})["rows"]
        assert len(rows) == (0 if seconds == "-1" else 2)
    overrides = [row["overrides"] for row in rows]
    assert {(each["engine"], each["precision"]) for each in overrides} == {("eager", "fp32"), ("graph", "bf16")}
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["teacher_accuracy"] <= 1 for row in rows)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_changes_fields_that_exist(cell):
    for name in ("small", "full"):
        config = experiment(name).distill
        assert (override(config, CELLS[cell]) == config) is (cell == "both")
    with pytest.raises(ValueError, match=r"generator\.nothing is not a field"):
        override(config, {"generator.nothing": 1})
