"""The plan of `make gpu`, run on a simulated machine."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_fast.benchmarks import plan
from dfkd_fast.benchmarks.plan import BUDGETS, FAILED_BUDGET, JOBS, Job, previous_failures, run_plan
from dfkd_fast.report import read_results, write_results


class Machine:
    """Runs jobs in simulated time: each takes its seconds and ends with its status."""

    def __init__(self, seconds: dict[str, float] | float = 5.0, status: dict[str, int] | None = None) -> None:
        self.now, self.seconds, self.status = 0.0, seconds, status or {}
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.outcomes: dict[str, str] = {}

    def start(self, job: Job) -> object:
        assert job.name not in self.started, f"{job.name} runs twice"
        self.started[job.name] = begin = self.now
        took = self.seconds.get(job.name, 5.0) if isinstance(self.seconds, dict) else self.seconds

        class Process:
            def poll(process) -> int | None:
                return self.status.get(job.name, 0) if self.now >= begin + took else None

        return Process()

    def stop(self, job: Job, process: object) -> None:
        self.ended[job.name] = self.now

    def run(self, jobs: tuple[Job, ...] | list[Job], budget_s: float) -> bool:
        def sleep(seconds: float) -> None:
            self.now += seconds

        def record(job: Job, status: str, seconds: float) -> None:
            assert job.name not in self.outcomes
            self.outcomes[job.name] = status

        return run_plan(jobs, budget_s=budget_s, machine=self, record=record, clock=lambda: self.now, sleep=sleep)


# Estimated seconds of the jobs of a run without failures.
SECONDS = {
    1: {
        **{job.name: 90.0 for job in JOBS[1] if job.phase == "parallel"},
        **{job.name: 25.0 for job in JOBS[1] if job.name.startswith(("step", "baseline"))},
        **{"peaks": 15.0, "compile dfkd_fast": 120.0, "ops": 65.0, "breakdown": 40.0, "tests": 100.0},
    },
    2: {
        **{"build extension": 70.0, "all tests": 60.0, "accuracy": 32.0, "drop-ins": 14.0, "cuda tests": 12.0},
        **{"step dfkd_fast batch 256": 35.0, "step peer batch 256": 25.0},
    },
}


def names(phase: str, after: str = "passed", call: int = 1) -> list[str]:
    return [job.name for job in JOBS[call] if job.phase == phase and job.after == after]


class TestRun:
    @pytest.mark.parametrize("call", JOBS)
    def test_phases_are_in_order_and_measurements_fit_into_the_budget(self, call):
        machine = Machine(SECONDS[call])
        machine.run(JOBS[call], BUDGETS[call])
        peaks, parallel = names("peaks", call=call), names("parallel", call=call)
        sequential = [job.name for job in JOBS[call] if job.phase == "sequential" and job.name in machine.started]
        assert list(machine.started) == [*peaks, *parallel, *sequential]
        assert len({machine.started[name] for name in parallel}) == 1
        for before, after in itertools.pairwise([*peaks, parallel[0]]):
            assert machine.started[after] >= machine.ended[before]
        for before, after in [*((name, sequential[0]) for name in parallel), *itertools.pairwise(sequential)]:
            assert machine.started[after] >= machine.ended[before], "a timed job overlaps another one"
        assert max(machine.ended.values()) <= BUDGETS[call]
        measured = {name for name, status in machine.outcomes.items() if status == "ok"}
        steps = ("dfkd_fast", "peer", "compile_reduce_overhead", "eager")
        needed = {1: {*(f"step {name}" for name in steps), "ops"}, 2: {"accuracy", "drop-ins"}}
        assert needed[call] <= measured
        assert all(machine.outcomes[name] == "skipped" for name in names("sequential", "failed", call))
        assert call == 1 or sequential[-1] == "cuda ops"  # the CUDA extension comes last

    def test_hanging_jobs_are_stopped_within_the_budget(self):
        machine = Machine(10_000.0)
        assert not machine.run(JOBS[1], BUDGETS[1])
        assert max(machine.ended.values()) <= BUDGETS[1] + 1
        assert machine.outcomes["peaks"] == "stopped after 40 s"

    @pytest.mark.parametrize("hangs", [False, True])
    def test_failed_smoke_test_skips_measurements_and_ends_early(self, hangs):
        name = "smoke ops"
        machine = Machine({**SECONDS[1], **({name: 10_000.0} if hangs else {})}, {} if hangs else {name: 1})
        assert not machine.run(JOBS[1], BUDGETS[1])
        assert all(machine.outcomes[each] == "skipped" for each in names("sequential"))
        assert machine.outcomes["baseline peer"] == "ok"
        assert max(machine.ended.values()) <= FAILED_BUDGET + 1

    @pytest.mark.parametrize("broken", ["smoke engines", "memcheck", "compile dfkd_fast", "step dfkd_fast", "ops"])
    def test_other_jobs_run_after_a_failing_job(self, broken):
        machine = Machine(10.0, {broken: 3})
        assert not machine.run(JOBS[1], BUDGETS[1])
        skipped = names("sequential", "passed" if broken == "smoke engines" else "failed")
        expected = dict.fromkeys((job.name for job in JOBS[1]), "ok") | dict.fromkeys(skipped, "skipped")
        assert machine.outcomes == expected | {broken: "failed (exit status 3)"}

    def test_job_is_not_started_if_too_little_time_is_left(self):
        jobs = [Job("a", ("x",), timeout_s=50), Job("b", ("x",), min_left_s=20), Job("c", ("x",), min_left_s=5)]
        machine = Machine({"a": 45.0, "c": 3.0})
        assert machine.run(jobs, 60)
        assert machine.outcomes == {"a": "ok", "b": "no time left", "c": "ok"}


def test_failures_of_call_1_are_read_from_its_results(tmp_path):
    statuses = ["ok", "failed (exit status 1)", "no time left", "stopped after 150 s", "skipped"]
    rows = [{"call": 1, "job": status, "status": status} for status in statuses]
    write_results(tmp_path / "plan.json", {"rows": [*rows, {"call": 2, "job": "accuracy", "status": "failed"}]})
    assert previous_failures(tmp_path) == statuses[1:]
    assert previous_failures(tmp_path / "nowhere") == []


def test_both_calls_and_two_machine_starts_take_at_most_fifteen_minutes():
    assert sum(BUDGETS.values()) + 2 * 60 <= 15 * 60


@pytest.mark.parametrize("call", JOBS)
def test_jobs_run_existing_modules_and_write_at_most_six_result_files(call, repository):
    files = {"plan.json", "checks.json"}
    for job in JOBS[call]:
        several = job.command[0] == "torchrun"  # only on machines with several GPUs
        files |= set() if several else set(re.findall(r"\{out\}/([\w.]+)", " ".join(job.command)))
        module = job.command[several].replace(".", "/")
        assert module in ("pytest", "pip") or (repository / "benchmarks" / f"{module}.py").exists()
    assert len(files) <= 6


COLLECT = """
import json, sys, pytest
for arguments in json.loads(sys.argv[1]):  # in one process, which imports the tests once
    print("status", int(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", *arguments])))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_gpu_test_runs_in_a_job_or_is_left_out_with_a_reason(repository):
    jobs = [job.command for job in JOBS[2] if job.command[0] == "pytest"]
    paths = [[part.format(root=repository) for part in job if "{root}/tests" in part] for job in jobs]
    selections = [["gpu"], *([job[-1], *path] for job, path in zip(jobs, paths, strict=True))]
    selections += [[expression] for expression in plan.LEFT_OUT]
    command = [sys.executable, "-c", COLLECT, json.dumps(selections)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=200, check=True)
    parts = re.split(r"(?m)^status (\d)$", done.stdout)
    assert set(parts[1::2]) <= {"0", "5"}, done.stdout
    every, *covered = ({line for line in part.splitlines() if "::" in line} for part in parts[:-1:2])
    assert len(covered) == len(selections) - 1
    assert every
    assert all(plan.LEFT_OUT.values())
    assert every == set().union(*covered)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("call", ["1", "2"])
def test_every_measurement_runs_at_small_size_on_the_cpu(tmp_path, call):
    """Runs the real commands, with kernels in the interpreter."""
    command = [sys.executable, "-m", "dfkd_fast.benchmarks.plan", "--rehearse", "--call", call, "--budget", "1500"]
    subprocess.run([*command, "--out", str(tmp_path)], check=False, timeout=1700)
    rows = read_results(tmp_path / "plan.json")["rows"]
    statuses = {row["job"]: row["status"] for row in rows}
    bad = {name: status for name, status in statuses.items() if status not in ("ok", "skipped")}
    assert not bad, (bad, (tmp_path / "plan.log").read_text()[-5000:])
    assert len(list(Path(tmp_path).iterdir())) <= 8
