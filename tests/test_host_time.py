"""The host's time: a stand-in for Triton's driver launches nothing, and what was measured becomes a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from dfkd_fast.benchmarks.host_time import KEY, VERSION, cases, host_section, stand_in


def _measure(out, *arguments):
    # A process of its own: whether Triton interprets kernels is decided when they are decorated.
    command = [sys.executable, "-m", "dfkd_fast.benchmarks.host_time", "--out", str(out), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are interpreted without a GPU alone")
def test_interpreted_kernels_cannot_stand_in():
    with pytest.raises(RuntimeError, match="interpreted"), stand_in():
        pass


def test_cases_have_names_of_their_own():
    names = [(case.name, case.shape) for case in cases()]
    assert len(set(names)) == len(names)
    assert any(name.startswith("datafree.DeepInversionHook") for name, _ in names)


@pytest.mark.slow
def test_every_case_is_measured_and_launches_its_kernels(tmp_path):
    out = tmp_path / "host_time.json"
    result = _measure(out, "--calls", "3", "--repeats", "2")
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    assert (content["stage"], content["version"], content["complete"]) == ("host_time", VERSION, True)
    assert len(content["rows"]) == len(list(cases()))
    for row in content["rows"]:
        assert set(KEY) <= row.keys()
        assert row["kernels"] > 0, f"{row['case']} was not computed by a kernel"
        assert 0 < row["ours_least_us"] <= row["ours_us"]
        assert 0 < row["original_least_us"] <= row["original_us"]
    assert f"| {content['rows'][0]['case']} |" in host_section(content, "cpu")


def test_the_table_says_where_it_was_measured():
    content = {
        "rows": [{"case": "a.loss", "shape": "2x3", "original_least_us": 61.4, "ours_least_us": 30.2, "kernels": 2}],
        "environments": [{"cpu": "a processor", "torch": "2.11", "triton": None, "commit": None}],
    }
    text = host_section(content, "cpu")
    assert "| a.loss | 2x3 | 61 | 30 | 2 |" in text
    assert "`cpu`: a processor, one thread, torch 2.11, triton None, commit unknown." in text
