"""Runs the checks and measurements of `make gpu` on one GPU, in two calls of at most 380 s and 200 s.

Call 1 first measures the device's peak rates. Then everything that does not need an idle machine runs in parallel: the
smoke tests of the kernels and engines, and processes that fill the compilers' caches. If the smoke tests pass, steps
and ops are timed one after another on the idle machine. If one fails, only the GPU tests and two baselines without this
project's kernels run, and the call ends early. Call 2 builds the CUDA extension and runs the GPU tests in parallel.
Then it measures a larger batch, accuracy, drop-ins and, last, the CUDA kernels, one after another. In each of these
phases, the jobs that did not succeed in call 1 are repeated first.

A job is a process. It writes each row to a result file immediately, so a job that is stopped loses only its last row.
``plan.json`` has the outcomes, and ``plan.log`` all output. Copy the result files to ``benchmarks/results/<device>/``,
because call 2 reads the outcomes of call 1 from this folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS
from dfkd_fast.benchmarks.results import Results
from dfkd_fast.report import device_slug, read_results

__all__ = ["BUDGETS", "FAILED_BUDGET", "JOBS", "LEFT_OUT", "Job", "main", "previous_failures", "run_plan"]

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {1: 380.0, 2: 200.0}
"""Seconds of each call."""

FAILED_BUDGET = 200.0
"""Seconds of call 1 if a smoke test fails."""

_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """One process of the plan.

    Attributes:
        name: unique name, the key in ``plan.json``.
        command: a module of this folder, ``pytest`` or ``pip``, and its arguments. With ``torchrun`` first, the module
            runs in one process per GPU. ``{out}`` is the result folder and ``{root}`` the repository.
        phase: "peaks", then "parallel" (all at once, nothing is timed), then "sequential" (one by one).
        timeout_s: seconds after which it is stopped.
        min_left_s: seconds that must be left to start it.
        smoke: whether this job is one of the smoke tests.
        after: a sequential job runs only if the smoke tests "passed" or only if they "failed"; with "any", always.
    """

    name: str
    command: tuple[str, ...]
    phase: str = "sequential"
    timeout_s: float = 60.0
    min_left_s: float = 10.0
    smoke: bool = False
    after: str = "passed"


def _step(variant: str, *arguments: str) -> tuple[str, ...]:
    return "step.variants", variant, "--out", "{out}/step.json", *arguments


def _tests(workers: int, *arguments: str) -> tuple[str, ...]:
    """Return the command of tests in several workers. A lost device or a hang ends one worker and fails one test."""
    options = ("-q", "-n", str(workers), "--timeout-method", "thread", "--max-worker-restart", "40")
    return "pytest", *options, "-p", "dfkd_fast.benchmarks.record_tests", "--rootdir={root}", *arguments


_TIMED = ("dfkd_fast", "peer", "compile_reduce_overhead", "eager")
_FAST_TESTS = ("--timeout", "90", "-m", "gpu and not slow")
_SMOKE = ("{root}/benchmarks/ops/test_smoke.py", "--timeout", "150", "-k")
_ENGINES = ("{root}/tests/engine/test_engine.py", *_FAST_TESTS)
LEFT_OUT = {"gpu and slow": "takes minutes per test; run it separately: pytest -m 'gpu and slow'"}
"""GPU tests that no job runs, by marker expression, with the reason."""


_CALL_1 = (
    Job("peaks", _step("roofline"), phase="peaks", timeout_s=40),
    Job("smoke ops", _tests(8, *_SMOKE, "not memcheck"), "parallel", 150, smoke=True),
    Job("smoke engines", _tests(1, *_ENGINES), "parallel", 150, smoke=True),
    Job("memcheck", _tests(1, *_SMOKE, "memcheck"), "parallel", 150),
    Job("compile dfkd_fast", _step("dfkd_fast", "--compile-only"), "parallel", 170),
    Job("compile reduce_overhead", _step("compile_reduce_overhead", "--compile-only"), "parallel", 170),
    *(Job(f"compile {op}", ("ops.bench", op, "--compile-only"), "parallel", 150) for op in BENCHMARKS),
    *(Job(f"step {variant}", _step(variant), timeout_s=60, min_left_s=20) for variant in _TIMED),
    Job("ops", ("ops.bench", "--out", "{out}/ops.json", "--seconds", "60"), timeout_s=75, min_left_s=20),
    Job("breakdown", ("step.breakdown", "--out", "{out}/breakdown.json"), timeout_s=60, min_left_s=25),
    *(Job(f"step {variant} again", _step(variant, "--run", "2"), timeout_s=60, min_left_s=25) for variant in _TIMED),
    *(Job(f"baseline {variant}", _step(variant), timeout_s=45, after="failed") for variant in ("peer", "eager")),
    Job("tests", _tests(12, "{root}/tests", *_FAST_TESTS), timeout_s=110, min_left_s=20, after="failed"),
)
_PIP = ("pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "{root}")
_CUDA_OPS = ("ops.bench", "--out", "{out}/ops.json", "--backends", "cuda", "triton", "--seconds", "12")
_CALL_2 = (
    Job("build extension", _PIP, "parallel", 100),
    Job("all tests", _tests(10, "{root}/tests", "--ignore={root}/tests/cuda", *_FAST_TESTS), "parallel", 85),
    *(
        Job(f"step {variant} batch 256", _step(variant, "--batch", "256"), timeout_s=55, min_left_s=25, after="any")
        for variant in ("dfkd_fast", "peer")
    ),
    Job(
        "accuracy",
        ("ablation", "--engines", "--out", "{out}/accuracy.json", "--seconds", "25"),
        timeout_s=45,
        after="any",
    ),
    Job("drop-ins", ("ops.drop_ins", "--out", "{out}/drop_ins.json", "--seconds", "12"), timeout_s=25, after="any"),
    Job(
        "step dfkd_fast on all GPUs",
        ("torchrun", "step.variants", "dfkd_fast", "--out", "{out}/scaling.json"),
        timeout_s=90,
        min_left_s=40,
    ),
    Job("cuda tests", _tests(8, "{root}/tests/cuda", *_FAST_TESTS), timeout_s=60, after="any"),
    Job("cuda ops", _CUDA_OPS, timeout_s=35, after="any"),
)
JOBS: dict[int, tuple[Job, ...]] = {1: _CALL_1, 2: _CALL_2}
"""The jobs of each call, in order."""


class _Machine:
    """Runs jobs as processes on this machine. The output of a job is appended to the log when the job ends."""

    def __init__(self, out: Path, extra: Sequence[str] = ()) -> None:
        self.out, self.extra = out, tuple(extra)

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        """Start a job in a new process group."""
        module, *arguments = (part.format(out=self.out, root=ROOT) for part in job.command)
        if module == "torchrun":
            count, (module, *arguments) = max(2, torch.cuda.device_count()), arguments
            start = ["--standalone", f"--nproc-per-node={count}", "-m", f"dfkd_fast.benchmarks.{module}"]
            module, arguments = "torch.distributed.run", [*start, *arguments, *self.extra]
        elif module not in ("pytest", "pip"):
            module, arguments = f"dfkd_fast.benchmarks.{module}", [*arguments, *self.extra]
        command = [sys.executable, "-u", "-m", module, *arguments]
        more: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "process_group": 0}
        more["env"] = {**os.environ, "DFKD_FAST_RESULTS": str(self.out)}
        if module == "pip":
            more["env"]["DFKD_FAST_CUDA"] = "1"
        with (self.out / f".{job.name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, **more)

    def stop(self, job: Job, process: subprocess.Popen[bytes]) -> None:
        """End a job and its children, and append its output to the log."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(_GRACE_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        part = self.out / f".{job.name}.log"
        with (self.out / "plan.log").open("a", encoding="utf-8") as log:
            log.write(f"\n--- {job.name}\n{part.read_text(encoding='utf-8', errors='replace')[-200_000:]}")
        part.unlink()


def previous_failures(folder: Path) -> list[str]:
    """Names of the jobs of call 1 that did not succeed, from the committed ``plan.json`` of a device."""
    content = read_results(folder / "plan.json") or {"rows": []}
    return [row["job"] for row in content["rows"] if row["call"] == 1 and row["status"] != "ok"]


def run_plan(
    jobs: Sequence[Job],
    *,
    budget_s: float,
    machine: Any,
    record: Callable[[Job, str, float], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Run the jobs of one call.

    Args:
        jobs: the jobs of the call, in the order in which they start within a phase.
        budget_s: seconds for all jobs. If a smoke test fails, at most :data:`FAILED_BUDGET`.
        machine: ``start(job)`` returns a process with ``poll()``; ``stop(job, process)`` ends it.
        record: called with each job, its status ("ok", "failed (exit status N)", "stopped after N s", "no time left" or
            "skipped") and its seconds.
        clock: returns seconds.
        sleep: waits.

    Returns:
        Whether every job that ran was ok.
    """
    end, all_ok, smoke_ok = clock() + budget_s, True, True

    def run(together: Sequence[Job]) -> None:
        nonlocal all_ok, smoke_ok
        running: dict[Job, tuple[Any, float, float]] = {}
        for job in together:
            left = end - clock()
            if left < job.min_left_s:
                record(job, "no time left", 0.0)
                smoke_ok &= not job.smoke
                continue
            running[job] = (machine.start(job), clock(), min(job.timeout_s, left))
        while running:
            for job, (process, start, limit) in list(running.items()):
                status, seconds = process.poll(), clock() - start
                if status is None and seconds < limit:
                    continue
                machine.stop(job, process)
                del running[job]
                fault = f"stopped after {limit:.0f} s" if status is None else f"failed (exit status {status})"
                record(job, "ok" if status == 0 else fault, seconds)
                all_ok &= status == 0
                smoke_ok &= status == 0 or not job.smoke
            if running:
                sleep(_POLL_S)

    phases = {phase: [job for job in jobs if job.phase == phase] for phase in ("peaks", "parallel", "sequential")}
    run(phases["peaks"])
    run(phases["parallel"])
    if not smoke_ok:
        end = min(end, end - budget_s + FAILED_BUDGET)
    for job in phases["sequential"]:
        if job.after in ("any", "passed" if smoke_ok else "failed"):
            run([job])
        else:
            record(job, "skipped", 0.0)
    return all_ok


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one call. Returns 1 if a job failed, 2 if there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=list(JOBS), default=1)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the result files")
    parser.add_argument("--budget", type=float, help="seconds for all jobs (default: 380 for call 1, 200 for call 2)")
    parser.add_argument("--rehearse", action="store_true", help="run the plan on the CPU with small sizes, to test it")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("make gpu needs a CUDA device, but none is available; see `dfkd-fast doctor`", file=sys.stderr)
        return 2
    name = "cpu" if options.rehearse else torch.cuda.get_device_name()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    jobs = list(JOBS[options.call])
    if options.call == 2:
        failed = previous_failures(ROOT / "benchmarks" / "results" / device_slug(name))
        jobs = [job for job in JOBS[1] if job.name in failed and job.after != "failed"] + jobs
    left_out = {"pip"} if options.rehearse else set()
    left_out |= {"torchrun"} if torch.cuda.device_count() < 2 else set()
    jobs = [job for job in jobs if job.command[0] not in left_out]
    results = Results(out / "plan.json", key=("call", "job"))

    def record(job: Job, status: str, seconds: float) -> None:
        print(f"{job.name}: {status} ({seconds:.0f} s)", flush=True)
        results.add({"call": options.call, "job": job.name, "status": status, "seconds": round(seconds, 1)})

    machine = _Machine(out, ("--device", "cpu", "--size", "small") if options.rehearse else ())
    budget = options.budget or BUDGETS[options.call]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    all_ok = run_plan(jobs, budget_s=budget, machine=machine, record=record)
    for lock in out.glob(".*.lock"):
        lock.unlink()
    return int(not all_ok)


if __name__ == "__main__":
    sys.exit(main())
