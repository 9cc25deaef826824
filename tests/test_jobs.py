"""Parallel jobs: order, results, progress, and what happens if one fails."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dfkd_fast.jobs import Job, JobError, run_jobs


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes import this module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


def add(*values: int, progress: Any) -> int:
    progress(1, 2, {"loss": 3.5}, 10.0)
    return sum(values)


def interval(*before: tuple[float, float], seconds: float = 0.3, progress: Any) -> tuple[float, float]:
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


def fail(*, progress: Any) -> None:
    raise ValueError("no such thing")


def end(*, number: signal.Signals, progress: Any) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def write_when_stopped(path: Path, *, progress: Any) -> None:
    def stop(*_: Any) -> None:
        path.with_suffix(".stopped").touch()
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    path.touch()
    time.sleep(60)


def fail_after(path: Path, *, progress: Any) -> None:
    while not path.exists():
        time.sleep(0.01)
    fail(progress=progress)


def threads(*, progress: Any) -> int:
    return torch.get_num_threads()


def test_results_are_passed_on_in_order() -> None:
    jobs = [
        Job(name="sum", call=partial(add, 1), after=("b", "a")),
        Job(name="a", call=partial(add, 10)),
        Job(name="b", call=partial(add, 100)),
        Job(name="threads", call=threads),
    ]
    assert run_jobs(jobs, workers=2) == {"a": 10, "b": 100, "sum": 111, "threads": 1}


def test_at_most_the_given_number_of_jobs_run_at_a_time() -> None:
    jobs = [Job(name=str(i), call=interval) for i in range(4)]
    jobs.append(Job(name="last", call=interval, after=("3",)))
    spans = run_jobs(jobs, workers=2)
    for start, _ in spans.values():
        assert sum(other[0] <= start < other[1] for other in spans.values()) <= 2
    assert spans["last"][0] >= spans["3"][1]
    assert max(end for _, end in spans.values()) - min(start for start, _ in spans.values()) < 5 * 0.3 + 5


def test_a_terminal_shows_a_row_per_job_and_a_log_a_line() -> None:
    jobs = [Job(name="one job", call=partial(add, 2)), Job(name="another", call=partial(add, 3))]
    for terminal in (True, False):
        console = Console(record=True, width=100, force_terminal=terminal)
        run_jobs(jobs, workers=1, text=lambda result: f"result {result}", console=console)
        shown = console.export_text()
        assert "one job" in shown
        assert "result 3" in shown
        assert ("1/2" in shown) is terminal
        assert ("one job: result 2 (" in shown) is not terminal


def test_a_failed_job_is_named_and_the_others_are_stopped(tmp_path: Path) -> None:
    path = tmp_path / "started"
    jobs = [
        Job(name="long", call=partial(write_when_stopped, path)),
        Job(name="broken", call=partial(fail_after, path)),
        Job(name="never", call=add),
    ]
    with pytest.raises(JobError, match=r"^broken: ValueError: no such thing$") as error:
        run_jobs(jobs, workers=2)
    assert "in fail" in error.value.details
    assert path.with_suffix(".stopped").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_whose_process_dies_is_named(number: signal.Signals) -> None:
    with pytest.raises(JobError, match=f"^victim ended with exit status -{number.value}$"):
        run_jobs([Job(name="victim", call=partial(end, number=number))])


def test_a_job_that_can_never_start_is_named() -> None:
    with pytest.raises(ValueError, match=r"never finish: .'b'."):
        run_jobs([Job(name="a", call=partial(add, 1)), Job(name="b", call=add, after=("a", "c"))])


def test_interrupt_stops_the_jobs(tmp_path: Path) -> None:
    path = tmp_path / "started"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([Job(name="long", call=partial(write_when_stopped, path))])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert path.with_suffix(".stopped").exists()


def test_results_are_reported_as_they_arrive() -> None:
    seen: list[int] = []
    jobs = [Job(name=str(i), call=partial(add, i), after=(str(i - 1),) if i else ()) for i in range(3)]
    run_jobs(jobs, finished=seen.append)
    assert seen == [0, 1, 3]


def test_a_failed_job_and_those_that_wait_for_it_are_reported() -> None:
    jobs = [
        Job(name="broken", call=fail),
        Job(name="last", call=add, after=("second",)),
        Job(name="second", call=add, after=("broken",)),
        Job(name="fine", call=partial(add, 4)),
    ]
    failed: dict[str, JobError] = {}
    assert run_jobs(jobs, workers=2, failed=failed.__setitem__) == {"fine": 4}
    assert {name: str(error) for name, error in failed.items()} == {
        "broken": "broken: ValueError: no such thing",
        "second": "second needs broken: ValueError: no such thing",
        "last": "last needs second needs broken: ValueError: no such thing",
    }
    assert all("Traceback" in error.details for error in failed.values())
    assert not any(error.stopped for error in failed.values())


def test_a_job_that_reaches_its_time_limit_can_save(tmp_path: Path) -> None:
    failed: dict[str, JobError] = {}
    jobs = [Job(name="slow", call=partial(write_when_stopped, tmp_path / "slow")), Job(name="late", call=interval)]
    run_jobs(jobs, workers=1, failed=failed.__setitem__, limit_s=4.0, budget_s=4.0)
    assert (tmp_path / "slow.stopped").exists()
    assert str(failed["slow"]) == "slow was stopped by its time limit"
    assert str(failed["late"]) == "late: no time left"
    assert all(error.stopped for error in failed.values())


def variable(name: str, *, progress: Any) -> tuple[str | None, int]:
    return os.environ.get(name), len(os.sched_getaffinity(0))


def test_jobs_have_the_environment_of_their_parent_and_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("a", None):  # the server that forks the processes has started before
        monkeypatch.setenv("DFKD_TEST", value) if value else monkeypatch.delenv("DFKD_TEST")
        found = run_jobs([Job(name="v", call=partial(variable, "DFKD_TEST"))], workers=1)
        assert found["v"] == (value, 1)


def test_workers_must_be_positive() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run_jobs([], workers=0)
