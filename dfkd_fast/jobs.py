"""Runs jobs in parallel processes, and shows their progress in one live table."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Job", "JobError", "run_jobs"]

_GRACE_S = 10.0  # between SIGTERM, after which a distillation saves a checkpoint, and SIGKILL


class JobError(RuntimeError):
    """A job raised an exception or its process died. The message names the job; ``details`` has the traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


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


def _work(job: Job, arguments: Sequence[Any], connection: Connection) -> None:
    os.setpgrp()  # on Ctrl-C, only the parent stops the jobs
    torch.set_num_threads(1)
    try:
        message = "result", job.call(*arguments, progress=lambda *values: connection.send(("progress", values)))
    except Exception as error:
        message = "error", (f"{type(error).__name__}: {error}", traceback.format_exc())
    connection.send(message)


class _Table:
    """A row per job: a progress bar in a terminal, and otherwise a line when the job ends."""

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
        self.rows: dict[str, TaskID] = {
            job.name: self.progress.add_task(job.name, total=None, start=False, note="waiting") for job in jobs
        }

    def start(self, name: str) -> None:
        self.started[name] = time.perf_counter()
        self.progress.start_task(self.rows[name])
        self.progress.update(self.rows[name], note="starting")

    def update(self, name: str, completed: int, total: int, values: Mapping[str, float], images_per_s: float) -> None:
        loss = [f"loss {sum(values.values()):.3g}"] if values else []
        note = "  ".join([*loss, f"{images_per_s:.0f} images/s"])
        self.progress.update(self.rows[name], completed=completed, total=total, note=note)

    def finish(self, name: str, result: Any) -> None:
        row, note = self.rows[name], self.text(result)
        self.progress.update(row, note=f"[bold]{note}[/]")
        self.progress.stop_task(row)
        if self.progress.disable:
            seconds = time.perf_counter() - self.started[name]
            self.progress.console.print(f"{name}: {note} ({seconds:.0f} s)", highlight=False)


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    text: Callable[[Any], str] = str,
    finished: Callable[[Any], object] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run jobs, each in its own process with one thread, and return their results by name.

    A job starts when a worker is free and the jobs that it waits for have finished; of several, the first one in
    ``jobs``. Results do not depend on the number of workers, if the jobs seed their random generators.

    Args:
        jobs: the jobs, in the order of their priority.
        workers: number of processes at a time; None is one per available core.
        text: turns a result into the note of its row.
        finished: called with each result, in this process.
        console: console of the table; None uses the default one.

    Raises:
        JobError: a job failed. The other jobs are stopped.
        ValueError: jobs wait for each other or for jobs that do not exist.
    """
    count = workers or len(os.sched_getaffinity(0))
    # Processes are forked from a server that has imported torch. It has neither threads nor a CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dfkd_fast.engine", "dfkd_fast.models"])
    waiting, results = list(jobs), dict[str, Any]()
    running: dict[Any, tuple[Job, Any]] = {}  # by connection; Any, because there are several kinds of both
    table = _Table(jobs, console or Console(), text)
    try:
        with table.progress:
            while waiting or running:
                for job in [job for job in waiting if results.keys() >= {*job.after}][: count - len(running)]:
                    waiting.remove(job)
                    here, there = context.Pipe()
                    arguments = [results[name] for name in job.after]
                    process = context.Process(target=_work, args=(job, arguments, there), name=job.name)
                    process.start()
                    there.close()
                    running[here] = job, process
                    table.start(job.name)
                if not running:
                    raise ValueError(f"these jobs wait for jobs that never finish: {[job.name for job in waiting]}")
                ready: list[Any] = wait([*running])
                for connection in ready:
                    job, process = running[connection]
                    try:
                        kind, value = connection.recv()
                    except EOFError:
                        process.join()
                        raise JobError(f"{job.name} ended with exit status {process.exitcode}") from None
                    if kind == "progress":
                        table.update(job.name, *value)
                    elif kind == "error":
                        raise JobError(f"{job.name}: {value[0]}", value[1])
                    else:
                        results[job.name] = value
                        table.finish(job.name, value)
                        if finished is not None:
                            finished(value)
                        del running[connection]
                        process.join()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_GRACE_S)
            process.kill()
    return results
