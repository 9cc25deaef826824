"""Runs jobs in parallel processes, and shows their progress in one live table."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Job", "JobError", "run_jobs"]

_SAVE_S = 60.0  # for a checkpoint of a run that has reached its time limit
_LONGEST_S = 3600.0  # of one call that waits
_GRACE_S = 10.0  # between SIGTERM, after which a distillation saves a checkpoint, and SIGKILL


class JobError(RuntimeError):
    """A job raised an exception or its process died. The message names the job.

    Attributes:
        details: the traceback.
        stopped: whether the job was stopped by a time limit or not started for lack of time.
    """

    def __init__(self, message: str, details: str = "", *, stopped: bool = False) -> None:
        super().__init__(message)
        self.details, self.stopped = details, stopped


@dataclass(frozen=True, kw_only=True)
class Job:
    """A function call for another process.

    Attributes:
        name: unique name, shown in the table.
        call: called with the results of the jobs in ``after``, in order, and the keyword argument ``progress`` for
            :func:`dfkd_fast.engine.distill` or :func:`dfkd_fast.engine.teach`. It and its result must be picklable.
        after: names of the jobs that must finish first.
    """

    name: str
    call: Callable[..., Any]
    after: tuple[str, ...] = ()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _pin(slot: int, workers: int) -> None:
    """Restrict this process to one GPU, or without GPUs to one core if there is one per worker."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if gpus := gpus[: torch.cuda.device_count()]:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif workers <= len(cores := sorted(os.sched_getaffinity(0))):
        os.sched_setaffinity(0, {cores[slot]})


def _work(
    job: Job, arguments: Sequence[Any], connection: Connection, slot: int, workers: int, environment: dict[str, str]
) -> None:
    os.setpgrp()  # on Ctrl-C, only the parent stops the jobs
    os.environ.clear()  # the server has the environment of its start
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _pin(slot, workers)
    torch.set_num_threads(1)
    try:
        message = "result", job.call(*arguments, progress=lambda *values: connection.send(("progress", values)))
    except Exception as error:
        message = "error", (f": {type(error).__name__}: {error}", traceback.format_exc())
    connection.send(message)


class _Table:
    """A row per job: a progress bar in a terminal, and otherwise a line when the job ends.

    If the jobs do not fit the terminal, only those that run have a row.
    """

    def __init__(self, jobs: Sequence[Job], console: Console, text: Callable[[Any], str]) -> None:
        self.text, self.started = text, dict[str, float]()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn())
        self.progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self.fits = len(jobs) + 4 < console.height
        if not self.fits:
            self.total = self.progress.add_task("all", total=len(jobs), note="")
        self.rows: dict[str, TaskID] = {
            job.name: self.progress.add_task(
                escape(job.name), total=None, start=False, note="waiting", visible=self.fits
            )
            for job in jobs
        }

    def start(self, name: str) -> None:
        self.started[name] = time.perf_counter()
        self.progress.start_task(self.rows[name])
        self.progress.update(self.rows[name], note="starting", visible=True)

    def update(self, name: str, completed: int, total: int, values: Mapping[str, float], images_per_s: float) -> None:
        loss = [f"loss {values.get('loss', sum(values.values())):.3g}"] if values else []
        note = "  ".join([*loss, f"{images_per_s:.0f} images/s"])
        self.progress.update(self.rows[name], completed=completed, total=total, note=note)

    def finish(self, name: str, result: Any) -> None:
        row, note = self.rows[name], str(result) if isinstance(result, JobError) else self.text(result)
        self.progress.update(row, note=f"[bold]{escape(note)}[/]", visible=self.fits)
        self.progress.stop_task(row)
        if not self.fits:
            self.progress.advance(self.total)
        if self.progress.disable or not self.fits:
            seconds = time.perf_counter() - self.started.get(name, time.perf_counter())
            self.progress.console.print(f"{name}: {note} ({seconds:.0f} s)", highlight=False, markup=False)


@dataclass
class _Running:
    """A job that runs, the core or GPU that it has, and the time at which it must end."""

    job: Job
    process: Any  # there are several kinds
    slot: int
    end: float
    terminated: bool = False


class _Runner:
    """Starts jobs, receives their messages and stops those that are late."""

    def __init__(self, jobs: Sequence[Job], workers: int, table: _Table, limit_s: float, budget_s: float) -> None:
        self.workers, self.table, self.limit_s = workers, table, limit_s
        self.until = time.monotonic() + budget_s
        self.waiting, self.results = list(jobs), dict[str, Any]()
        self.running: dict[Any, _Running] = {}  # by connection
        self.finished: Callable[[Any], object] | None = None
        self.failed: Callable[[str, JobError], object] | None = None
        # Processes are forked from a server that has imported torch. It has neither threads nor a CUDA context.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["dfkd_fast.engine", "dfkd_fast.models"])

    def run(self) -> None:
        while self.waiting or self.running:
            self._start_jobs()
            left = min((each.end for each in self.running.values()), default=0.0) - time.monotonic()
            ready: list[Any] = wait([*self.running], min(max(0.0, left), _LONGEST_S))
            for connection in ready:
                self._receive(connection)
            for each in self.running.values():
                if time.monotonic() >= each.end:
                    (each.process.kill if each.terminated else each.process.terminate)()
                    each.terminated, each.end = True, time.monotonic() + _SAVE_S

    def stop(self) -> None:
        for each in self.running.values():
            each.process.terminate()
        for each in self.running.values():
            each.process.join(_GRACE_S)
            each.process.kill()

    def _start_jobs(self) -> None:
        late = time.monotonic() >= self.until
        for job in [*self.waiting]:
            if job not in self.waiting:
                continue  # it waited for a job that has failed
            if late:
                self.waiting.remove(job)
                self._fail(job, JobError(f"{job.name}: no time left", stopped=True))
            elif len(self.running) < self.workers and self.results.keys() >= {*job.after}:
                self.waiting.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        here, there = self.context.Pipe()
        slot = min({*range(self.workers)} - {each.slot for each in self.running.values()})
        before = [self.results[name] for name in job.after]
        arguments = job, before, there, slot, self.workers, dict(os.environ)
        process = self.context.Process(target=_work, args=arguments, name=job.name)
        process.start()
        there.close()
        self.running[here] = _Running(job, process, slot, min(self.until, time.monotonic() + self.limit_s))
        self.table.start(job.name)

    def _receive(self, connection: Any) -> None:
        job, process = self.running[connection].job, self.running[connection].process
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):  # also if it died while it sent a message
            process.join()
            kind, value = "error", (f" ended with exit status {process.exitcode}", "")
        if kind == "progress":
            self.table.update(job.name, *value)
            return
        ended = self.running.pop(connection)
        if kind == "result":
            self.results[job.name] = value
            self.table.finish(job.name, value)
            if self.finished is not None:
                self.finished(value)
        process.join(_GRACE_S)
        process.kill()
        if kind == "result":
            return
        if ended.terminated:
            self._fail(job, JobError(f"{job.name} was stopped by its time limit", stopped=True))
        else:
            self._fail(job, JobError(f"{job.name}{value[0]}", value[1]))

    def _fail(self, job: Job, error: JobError) -> None:
        if self.failed is None:
            raise error
        self.table.finish(job.name, error)
        self.failed(job.name, error)
        for other in [other for other in self.waiting if job.name in other.after]:
            if other in self.waiting:  # it may have waited for two jobs
                self.waiting.remove(other)
                self._fail(other, JobError(f"{other.name} needs {error}", error.details, stopped=error.stopped))


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    text: Callable[[Any], str] = str,
    finished: Callable[[Any], object] | None = None,
    failed: Callable[[str, JobError], object] | None = None,
    limit_s: float = math.inf,
    budget_s: float = math.inf,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run jobs, each in its own process with one thread, and return their results by name.

    A job starts when a worker is free and the jobs that it waits for have finished; of several, the first one in
    ``jobs``. Results do not depend on the number of workers, if the jobs seed their random generators. A process is
    bound to one GPU, or to one core if there is one per worker, and ends if this process ends.

    Args:
        jobs: the jobs, in the order of their priority.
        workers: number of processes at a time; None is one per available core.
        text: turns a result into the note of its row.
        finished: called with each result, in this process.
        failed: called with the name of each job without a result, and its error. Then the other jobs continue, except
            those that wait for it. None raises the first error.
        limit_s: seconds after which a job gets SIGTERM, which makes a run save a checkpoint.
        budget_s: seconds after which all jobs get SIGTERM and no other is started.
        console: console of the table; None uses the default one.

    Raises:
        JobError: a job failed, and ``failed`` is None. The other jobs are stopped.
        ValueError: jobs wait for each other or for jobs that do not exist, or ``workers`` is below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    _check_order(jobs)
    table = _Table(jobs, console or Console(), text)
    runner = _Runner(jobs, workers or len(os.sched_getaffinity(0)), table, limit_s, budget_s)
    runner.finished, runner.failed = finished, failed
    try:
        with table.progress:
            runner.run()
    finally:
        runner.stop()
    return runner.results


def _check_order(jobs: Sequence[Job]) -> None:
    """Raise ValueError if jobs wait for each other or for jobs that do not exist."""
    waiting, done = list(jobs), set[str]()
    while ready := [job for job in waiting if done >= {*job.after}]:
        done |= {job.name for job in ready}
        waiting = [job for job in waiting if job not in ready]
    if waiting:
        raise ValueError(f"these jobs wait for jobs that never finish: {[job.name for job in waiting]}")
