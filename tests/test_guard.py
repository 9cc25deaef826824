"""A stage's child that hangs or dies loses what it was at, and nothing else."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dfkd_fast.benchmarks import ops as stage
from dfkd_fast.benchmarks.common import Clock
from dfkd_fast.benchmarks.compile_kernels import benchmarks
from dfkd_fast.benchmarks.guard import Journal, supervise
from dfkd_fast.benchmarks.measure import Ceilings
from dfkd_fast.report import read_results

CHILD = """
    import json, os, sys, time
    from pathlib import Path
    from dfkd_fast.benchmarks.guard import Journal

    done = Path("done.json")
    journal = Journal(Path("results.json"))
    for work in ("first", "endless", "fatal", "failing", "last"):
        known = json.loads(done.read_text()) if done.exists() else {}
        if work in known:
            continue
        with journal.begun(work, 4.0):
            if work == "endless":
                time.sleep(60)
            if work == "fatal":
                os.abort()
            if work == "failing":
                raise RuntimeError("the device is lost")
            done.write_text(json.dumps({**known, work: "done"}))
"""


@pytest.fixture
def child(tmp_path: Path) -> list[str]:
    (tmp_path / "child.py").write_text(textwrap.dedent(CHILD))
    return [sys.executable, str(tmp_path / "child.py")]


def lose(what: str, why: str) -> None:
    path = Path("done.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), what: why}))


def test_what_was_under_way_is_lost_and_the_rest_goes_on(child: list[str]) -> None:
    journal = Journal(Path("results.json"))
    assert supervise(child, journal, Clock(60), lose) == 1
    assert json.loads(Path("done.json").read_text()) == {
        "first": "done",
        "endless": "did not end within 4 s",
        "fatal": "the process ended by SIGABRT",
        "failing": "the process ended with exit status 1",
        "last": "done",
    }
    assert journal.read() is None


def test_children_are_counted(child: list[str]) -> None:
    assert supervise(child, Journal(Path("results.json")), Clock(60), lose, most=1) == 1
    assert set(json.loads(Path("done.json").read_text())) == {"first", "endless"}


def test_a_sound_child_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(
        "import sys; open('ran', 'a').write('once'); sys.exit(int(sys.argv[-1] != '9.0'))"
    )
    command = [sys.executable, str(tmp_path / "child.py")]
    assert supervise(command, Journal(Path("results.json")), Clock(9.04), lose) == 0
    assert Path("ran").read_text() == "once"


def test_a_lost_subject_has_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = stage.subjects([benchmarks()["distillation_kl"]], torch.device("cpu"))
    subject = found[0]
    path, rates = Path("ops.json"), Ceilings(copy_gbps=4000.0, matmul_tflops=700.0)
    results = stage.open_results(path, rates)
    results.add(stage.row_of(subject, subject.keys[0], None, rates, "no gradient"))
    stage._lose(path, found, subject.keys, "did not end within 60 s")
    content = read_results(path)
    assert content is not None
    assert [row["status"] for row in content["rows"]] == [
        "no gradient",
        *["lost: did not end within 60 s"] * (len(subject.keys) - 1),
    ]
    assert len(subject.keys) > 1
    assert all(row["median_us"] is None for row in content["rows"])


def test_a_backend_that_loses_much_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = stage.subjects([benchmarks()["distillation_kl"]], torch.device("cpu"), backends=["reference"])
    path, rates = Path("ops.json"), Ceilings(copy_gbps=4000.0, matmul_tflops=700.0)
    results = stage.open_results(path, rates)
    for subject in found[:2]:
        assert not stage._is_given_up(results, found[2])
        results.add(stage.row_of(subject, subject.keys[0], None, rates, "lost: did not end within 60 s"))
    assert len({(subject.case.name, subject.dtype) for subject in found[:2]}) == 2
    begun: list[str] = []
    sound = stage.measure(found, results, device=torch.device("cpu"), rates=rates, trial=lambda *_: begun.append("one"))
    assert (sound, begun) == (False, [])
