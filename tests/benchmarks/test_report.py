"""The tables of the documentation come from committed results, are between markers, and are up to date."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast.benchmarks import ablation, report
from dfkd_fast.benchmarks.ablation import ablation_section
from dfkd_fast.report import read_results, write_results

NOT_MEASURED = "Not measured on a GPU yet: `make gpu` measures it."
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
            assert between(copy / name, section) == report._NOTES.get(section, NOT_MEASURED)


def test_each_device_has_a_section(copy):
    block = {"device": {"name": "A GPU"}, "torch": "2.11.0", "commit": "c" * 40, "source": "s"}
    row = {"cell": "eager", "seed": 0, "overrides": {}, "accuracy": 0.9, "teacher_accuracy": 1.0, "rounds": 9}
    for device in ("gpu-a", "gpu-b"):
        sweep = {"title": "engines", "axes": {"engine": {"eager": {}}}}
        content = {"sweep": sweep, "environments": [block], "rows": [{**row, "status": "done"}]}
        write_results(copy / "benchmarks" / "results" / device / "accuracy.json", content)
    report.main([], root=copy)
    text = between(copy / "docs" / "performance.md", "accuracy")
    assert text.count("| eager | 90.0% | 1 of 3 |") == 2
    assert text.index("### gpu-a") < text.index("### gpu-b")
    assert between(copy / "docs" / "performance.md", "step") == NOT_MEASURED


BLOCK = {"device": {"name": "cpu"}, "torch": "2.11.0", "commit": "c" * 40, "source": "s"}
COUNTED = {"environments": [BLOCK], "copy_gbps": 2950.0, "matmul_tflops": 780.0}


def counts(read: float, written: float, launches: int = 2, **more: Any) -> dict[str, Any]:
    row = {"launches": launches, "bytes_read": read, "bytes_written": written, "flops": 2e12, "compulsory_bytes": 2e9}
    return {**row, "least_us": 2500.0, "environment": 0, **more}


def test_counted_ops_have_one_line_per_case(copy):
    key = {"op": "an_op", "case": "2x3"}
    sizes = {"eager": (9e6, 4.5e6, 1234), "compile": (4e6, 2e6), "triton": (2e6, 1e6)}
    rows = [
        counts(*sizes[backend], **key, backend=backend, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for backend in ("triton", "compile", "eager")
    ]
    folder = copy / "benchmarks" / "results" / "counted"
    write_results(folder / "op_counts.json", {**COUNTED, "rows": rows})
    report.main([], root=copy)
    text = between(copy / "docs" / "benchmarks.md", "op_counts")
    assert "| an_op | 2x3 | 1,234 | 2 | 2 | 13.5 | 6 | 3 | 0.50 | 2,000.0 | 2,500.0 |" in text
    assert "|  | 2x3 float32 | 1,234 | 2 | 2 | 13.5 | 6 | 3 | 0.50 | 2,000.0 | 2,500.0 |" in text
    assert "Counted with torch 2.11.0, commit cccccccccccc; least times at 2.95 TB/s and 780 TFLOP/s." in text
    assert between(copy / "docs" / "benchmarks.md", "ops") == NOT_MEASURED
    plot = copy / "docs" / "images" / "op_bytes.svg"
    first = plot.read_bytes()
    report.main([], root=copy)
    assert plot.read_bytes() == first
    assert all(name in first.decode() for name in ("an_op", "eager", "compile", "triton"))


def test_counted_steps_are_compared_with_compile_and_before(copy):
    groups = [
        {"region": "teacher.forward", "source": "library", "name": "convolution", **counts(2e9, 1e9)},
        {"region": "outside", "source": "eager", "name": "_fused_adam_", **counts(4e8, 4e8, 1)},
    ]
    rows = [
        counts(3e9, 1e9, step="student_step", variant="dfkd_fast", kernels=groups),
        counts(4e9, 1e9, step="student_step", variant="before", kernels=[], commit="1234567"),
        counts(6e9, 2e9, 1000, step="student_step", variant="compile", kernels=[]),
    ]
    write_results(copy / "benchmarks" / "results" / "counted" / "step_counts.json", {**COUNTED, "rows": rows})
    report.main([], root=copy)
    text = between(copy / "docs" / "performance.md", "step_counts")
    lines = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| variant", "| region"))
    ]
    assert lines == [
        "| compile | 1,000 | 6.00 | 2.00 | 8.00 | 1.00 | 1.60 | 2.50 |",
        "| before | 2 | 4.00 | 1.00 | 5.00 | 0.62 | 1.00 | 2.50 |",
        "| dfkd_fast | 2 | 3.00 | 1.00 | 4.00 | 0.50 | 0.80 | 2.50 |",
        "| teacher.forward | library | `convolution` | 2 | 3,000.0 | 75.0% |",
        "| outside | eager | `_fused_adam_` | 1 | 800.0 | 20.0% |",
    ]
    assert "Compulsory work: 2.00 GB and 2.00 TFLOP. `before` is `dfkd_fast` at commit 1234567." in text
    assert "The kernels of `dfkd_fast` with the most bytes, 95% of all" in text
    assert "before" in (copy / "docs" / "images" / "step_bytes.svg").read_text()


def test_committed_pages_are_up_to_date(copy, repository):
    (copy / "benchmarks").symlink_to(repository / "benchmarks")
    assert report.main([], root=copy) == 0
    for name in (*PAGES, *report.PLOTS):
        assert (copy / name).read_text() == (repository / name).read_text(), f"{name}: run make report"


def test_ablation_has_mean_and_difference_over_seeds():
    cells = {"both": {}, "+ SFCL": {"distill.objective.student.mhad": 0.0}}
    sweep = {"title": "", "axes": {"cell": cells}, "seeds": [0, 1], "compare_with": "both"}
    rows = [
        {"cell": cell, "seed": seed, "overrides": cells[cell], "accuracy": accuracy, "status": "done"}
        | {"teacher_accuracy": 0.8, "rounds": 80}
        for cell, values in (("both", (0.5, 0.5)), ("+ SFCL", (0.4, 0.6)))
        for seed, accuracy in enumerate(values)
    ]
    block = {"device": {"name": "A GPU"}, "torch": "2.11.0", "commit": "0123456789abcdef", "source": "s"}
    text = ablation_section({"sweep": sweep, "rows": rows, "environments": [block]}, "a-gpu")
    assert "| both |  | 50.0% ± 0.0 |  | 2 of 2 |" in text
    # Differences -10 and 10: standard error 10, t = 12.706 for 95 % and one degree of freedom.
    assert "| + SFCL | `distill.objective.student.mhad=0.0` | 50.0% ± 14.1 | +0.0 ± 127.1 (p = 1) | 2 of 2 |" in text
    assert "Teacher: 80.0%; rounds: 80; measured on: A GPU, torch 2.11.0; commit: 0123456789ab." in text


@pytest.mark.slow
def test_engines_are_compared_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = ["--engines", "--size", "small", "--device", "cpu", "--seeds", "0", "--jobs", "2"]
    for seconds in ("0", "600"):
        assert ablation.main([*arguments, "--out", "accuracy.json", "--seconds", seconds]) == 0
        rows = (read_results("accuracy.json") or {"rows": []})["rows"]
        assert {row["status"] for row in rows} == {"stopped" if seconds == "0" else "done"}
    overrides = [row["overrides"] for row in rows]
    assert [each["distill.precision"] for each in overrides] == ["fp32", "bf16"] * 2
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["teacher_accuracy"] <= 1 for row in rows)


def test_reliability_adds_the_seeds_of_a_kind():
    block = {
        "device": {"name": "d"},
        "cpu": "c",
        "torch": "t",
        "triton": "t",
        "commit": "a" * 40,
        "source": "s",
        "date": "d",
    }
    common = {"target": "kill", "seconds": 60.0, "cases": 3, "environment": 0}
    rows = [
        {**common, "kind": "SIGTERM", "seed": 0, "lost": 0, "outcomes": {"equal": 2, "stopped": 1}},
        {**common, "kind": "SIGTERM", "seed": 1, "lost": 1, "outcomes": {"equal": 2, "lost": 1}},
        {**common, "kind": "disk", "seed": 1, "cases": 0, "skipped": "no right to mount"},
    ]
    text = report.reliability_section({"rows": rows, "environments": [block]}, "cpu")
    assert "| `kill` | SIGTERM | 6 | 1 | equal: 4, stopped: 1 |" in text
    assert "6 cases, 1 lost. Minutes per target: `kill` 2. Seeds: 0, 1." in text
    assert text.endswith("- `kill`, disk: no right to mount")
