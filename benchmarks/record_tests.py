"""Pytest plugin that writes the outcome of each test to ``checks.json`` when the test ends; for `make gpu`.

The environment variable ``DFKD_FAST_RESULTS`` names the folder. A worker process exits if it has lost its device, and
pytest-xdist starts another, so a fault in one kernel fails only one test.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast.benchmarks.results import Results

_MAX_RESERVED = 2**30  # bytes of device memory that a worker keeps between tests


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """After each test, exit if the device is lost, and free memory that other workers need."""
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
        if report.outcome != "passed":
            skipped = isinstance(report.longrepr, tuple)  # path, line and reason
            row["reason"] = report.longrepr[2] if skipped else report.longreprtext[-2000:]  # type: ignore[index]
        self.results.add(row)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            reason = report.longreprtext[-2000:]
            self.results.add({"check": report.nodeid, "status": "not collected", "reason": reason})


def pytest_configure(config: pytest.Config) -> None:
    """Register the recorder, except in workers, because the main process receives the reports of all workers."""
    if not hasattr(config, "workerinput"):
        folder = Path(os.environ.get("DFKD_FAST_RESULTS", "."))
        config.pluginmanager.register(_Recorder(Results(folder / "checks.json", key=("check",))))
