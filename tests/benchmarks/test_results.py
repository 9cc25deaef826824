"""Result files: rows by key, the machine they were measured on, and several writers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_fast.benchmarks import results as module
from dfkd_fast.benchmarks.results import Results, rounded
from dfkd_fast.report import read_results

WRITER = """
import sys
from pathlib import Path
from dfkd_fast.benchmarks import results
results._environment = lambda: {"date": "today", "commit": "a"}
file = results.Results(Path("rows.json"), key=("process", "number"))
for number in range(25):
    file.add({"process": int(sys.argv[1]), "number": number})
"""


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.setattr(module, "_environment", lambda: {"date": "today", "commit": "a"})


def test_row_replaces_the_one_with_its_key():
    results = Results(Path("rows.json"), key=("case", "pass"))
    assert results.rows == []
    for us in (1.0, 2.0):
        results.add({"case": "a", "pass": "forward", "us": us})
        results.add({"case": "a", "pass": "backward", "us": 10 * us})
    assert [(row["pass"], row["us"]) for row in results.rows] == [("forward", 2.0), ("backward", 20.0)]
    assert results.key_of(results.rows[0]) == ("a", "forward")
    assert results.rows[0]["date"].endswith("+00:00")
    again = Results(Path("rows.json"), key=("case", "pass"))
    again.add({"case": "b", "pass": "forward", "us": 3.0})
    assert len(again.rows) == 3


def test_environment_is_stored_once_and_referenced_by_rows(monkeypatch):
    results = Results(Path("rows.json"), key=("case",), facts={"copy_gbps": 4000.0})
    results.add({"case": 1})
    monkeypatch.setattr(module, "_environment", lambda: {"date": "tomorrow", "commit": "a"})
    results.add({"case": 2})
    monkeypatch.setattr(module, "_environment", lambda: {"date": "tomorrow", "commit": "b"})
    results.add({"case": 3})
    content = read_results("rows.json")
    assert [block["commit"] for block in content["environments"]] == ["a", "b"]
    assert [row["environment"] for row in content["rows"]] == [0, 0, 1]
    assert content["copy_gbps"] == content["environments"][1]["copy_gbps"] == 4000.0


def test_several_processes_write_to_one_file():
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(number)]) for number in range(2)]
    assert [writer.wait(120) for writer in writers] == [0] * 2
    content = read_results("rows.json")
    assert {(row["process"], row["number"]) for row in content["rows"]} == {(p, n) for p in range(2) for n in range(25)}
    assert len(content["rows"]) == 50
    assert len(content["environments"]) == 1


def test_floats_keep_five_significant_digits():
    assert rounded({"us": 123456.7, "times": [0.000123456, 7], "name": "x"}) == {
        "us": 123460.0, "times": [0.00012346, 7], "name": "x",
    }  # fmt: skip
    assert rounded(2 / 3, digits=2) == 0.67
