"""Pytest plugin: writes the outcome of each test to ``checks.json``, as the test ends. For `make gpu`.

The folder is that of the environment variable ``DFKD_FAST_RESULTS``. A worker whose device is lost ends, and
pytest-xdist starts another, so that a fault in one kernel fails one test.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast.benchmarks.results import Results

_MAX_RESERVED = 2**30  # bytes of device memory that a worker keeps from one test to the next


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """After each test, end a process that has lost its device, and free memory that other workers need."""
    result = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            if torch.cuda.memory_reserved() > _MAX_RESERVED:
                gc.collect()
                torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(70)
    return result


class _Recorder:
    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row: dict[str, Any] = {"check": report.nodeid, "status": report.outcome, "seconds": report.duration}
        row |= {str(name): value for name, value in report.user_properties}  # for example a measured error ratio
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            row["reason"] = report.longrepr[2]
        elif report.outcome != "passed":
            row["reason"] = report.longreprtext[-2000:]
        self.results.add(row)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            reason = report.longreprtext[-2000:]
            self.results.add({"check": report.nodeid, "status": "not collected", "reason": reason})


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that collects the reports of all workers."""
    if not hasattr(config, "workerinput"):
        folder = Path(os.environ.get("DFKD_FAST_RESULTS", "."))
        config.pluginmanager.register(_Recorder(Results(folder / "checks.json", key=("check",))))
