"""The tests marked ``gpu``, as a stage: one row per test, written when it ends, with the properties it recorded.

Several worker processes run them side by side, since most of a test's time goes into compilers. A kernel that never
ends or takes the device from its process costs that test alone: the worker ends, and another goes on.

The stage's version is a digest of sources and tests, so a change of either asks for a new run.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast.benchmarks.common import Clock, Results, stage_arguments
from dfkd_fast.report import source_digest

__all__ = ["main", "version"]

TESTS = Path(__file__).resolve().parents[1] / "tests"

_TEST_LIMIT_S = 120
_MOST_WORKERS = 8
_MOST_KEPT = 2**30  # bytes of the device that a worker keeps from one test to the next
_KNOWN = "DFKD_FAST_KNOWN_TESTS"  # the file that names those which have a row


def version() -> str:
    """Changes with any source of the package and any test."""
    digest = hashlib.sha256(source_digest().encode())
    for path in sorted(TESTS.rglob("*.py")):
        digest.update(path.relative_to(TESTS).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# ---- in the workers: this module is a plugin of theirs ---------------------------------------------------------------


@pytest.hookimpl(trylast=True)  # after `-m gpu` has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has a row."""
    known = set(json.loads(Path(os.environ[_KNOWN]).read_text(encoding="utf-8")))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """After each test: a process that has lost its device would fail all the others; and so would one that keeps much
    of its memory, which no other process can then have.
    """
    result = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            if torch.cuda.memory_reserved() > _MOST_KEPT:
                gc.collect()
                torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(70)
    return result


# ---- in the process that writes the rows -----------------------------------------------------------------------------


class _Recorder:
    """A pytest plugin: adds a row a test, ends the run when time is up."""

    def __init__(self, results: Results, clock: Clock) -> None:
        self.results, self.clock = results, clock
        self.todo: list[str] = []
        self._added: set[str] = set()

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        self.todo = self.todo or list(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that its set-up ends has no call; a failed tear-down is the test's failure, as is its worker's end.
        if report.when == "call" or report.outcome != "passed":
            if report.when in ("setup", "call", "teardown"):
                self._add(report, report.outcome, round(report.duration, 3))
                self.clock.took(report.duration)
            elif report.nodeid not in self._added:  # else the end of a worker that lost its device in this test
                self._add(report, report.outcome, 0.0)
        if not self.clock.fits():
            self._config.pluginmanager.getplugin("dsession").shouldstop = "no time left"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, "not collected", 0.0)

    def _add(self, report: pytest.TestReport | pytest.CollectReport, outcome: str, seconds: float) -> None:
        row = {"test": report.nodeid, "outcome": outcome, "seconds": seconds}
        row |= dict(getattr(report, "user_properties", ()))  # a failed collection has none
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            row["reason"] = report.longrepr[2]
        elif outcome != "passed":
            row["reason"] = report.longreprtext[-2000:]
        self.results.add(row)
        self._added.add(report.nodeid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no row yet; 0 where every test passed."""
    options = stage_arguments(__doc__).parse_args(arguments)
    results = Results(options.out, stage="tests", version=version(), key=("test",))
    results.rows = [row for row in results.rows if row["outcome"] != "not collected"]
    recorder = _Recorder(results, Clock(options.seconds))
    known = [row["test"] for row in results.rows if options.since is None or row["date"] >= options.since]
    workers = max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_") as folder:
        listed = Path(folder) / "known.json"
        listed.write_text(json.dumps(known), encoding="utf-8")
        os.environ[_KNOWN] = str(listed)
        status = pytest.main(
            [
                *(str(TESTS), f"--rootdir={TESTS.parent}", "-m", "gpu", "-q", "--continue-on-collection-errors"),
                *("-p", "dfkd_fast.benchmarks.gpu_tests", "-n", str(workers), "--max-worker-restart", "100"),
                # The only way that ends a process which waits for its device.
                *("-o", f"timeout={_TEST_LIMIT_S}", "-o", "timeout_method=thread"),
            ],
            plugins=[recorder],
        )
    finished = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if status not in (*finished, pytest.ExitCode.INTERRUPTED):
        return int(status)
    done = {row["test"] for row in results.rows}
    results.finish(complete=all(test in done for test in recorder.todo))
    return int(any(row["outcome"] not in ("passed", "skipped") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
