"""The tests marked ``gpu``, as a stage: one row a test, written when it ends.

The stage's version is a digest of sources and tests, so a change of either asks for a new run.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast.benchmarks.common import Clock, Results, stage_arguments
from dfkd_fast.report import source_digest

__all__ = ["main", "version"]

TESTS = Path(__file__).resolve().parents[1] / "tests"


def version() -> str:
    """Changes with any source of the package and any test."""
    digest = hashlib.sha256(source_digest().encode())
    for path in sorted(TESTS.rglob("*.py")):
        digest.update(path.relative_to(TESTS).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class _Recorder:
    """A pytest plugin: leaves out what has a row, adds a row a test, ends the run when time is up."""

    def __init__(self, results: Results, clock: Clock, since: str | None) -> None:
        self.results, self.clock, self.since = results, clock, since
        self.todo: list[tuple[Any, ...]] = []

    @pytest.hookimpl(trylast=True)  # after `-m gpu` has chosen
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.todo = self.results.todo([(item.nodeid,) for item in items], self.since)
        wanted = {key[0] for key in self.todo}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that its set-up ends has no call; a failed tear-down is the test's failure.
        if report.when == "call" or report.outcome != "passed":
            self.clock.took(report.duration)
            self._add(report, report.outcome, round(report.duration, 3))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        result = yield
        if not self.clock.fits():
            item.session.shouldstop = "no time left"
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, "not collected", 0.0)

    def _add(self, report: pytest.TestReport | pytest.CollectReport, outcome: str, seconds: float) -> None:
        row = {"test": report.nodeid, "outcome": outcome, "seconds": seconds}
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            row["reason"] = report.longrepr[2]
        elif outcome != "passed":
            row["reason"] = report.longreprtext[-2000:]
        self.results.add(row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no row yet; 0 where every test passed."""
    options = stage_arguments(__doc__).parse_args(arguments)
    results = Results(options.out, stage="tests", version=version(), key=("test",))
    results.rows = [row for row in results.rows if row["outcome"] != "not collected"]
    recorder = _Recorder(results, Clock(options.seconds), options.since)
    status = pytest.main(
        [str(TESTS), f"--rootdir={TESTS.parent}", "-m", "gpu", "-q", "--continue-on-collection-errors"],
        plugins=[recorder],
    )
    finished = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if status not in (*finished, pytest.ExitCode.INTERRUPTED):
        return int(status)
    done = {row["test"] for row in results.rows}
    results.finish(complete=all(test in done for (test,) in recorder.todo))
    return int(any(row["outcome"] not in ("passed", "skipped") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
