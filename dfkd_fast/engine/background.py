"""Work beside training: writing files, evaluating a copy of the student."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

__all__ = ["Background", "Job"]

T = TypeVar("T")
Job = Future[T]


class Background:
    """One thread that works through jobs in the order in which they came, on a CUDA stream of its own.

    Args:
        device: where jobs compute. On the CPU there is nothing to gain: there each job is done at once, by its caller.
        overlap: whether jobs run beside their caller; None is as the device suggests.
    """

    def __init__(self, device: torch.device, *, overlap: bool | None = None) -> None:
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        if overlap if overlap is not None else device.type == "cuda":
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="dfkd-fast")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._jobs: list[Future[Any]] = []

    @property
    def overlaps(self) -> bool:
        """Whether jobs run beside their caller, so that what they read must be theirs alone."""
        return self._thread is not None

    def submit(self, work: Callable[[], T]) -> Job[T]:
        """Have ``work`` done; it sees what its caller's stream has done so far."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))

        def run() -> T:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                if self._stream is not None and ready is not None:
                    self._stream.wait_event(ready)
                result = work()
                if self._stream is not None:
                    self._stream.synchronize()
                return result

        if self._thread is None:
            job: Job[T] = Future()
            job.set_result(run())
            return job
        self._raise_early()
        job = self._thread.submit(run)
        self._jobs.append(job)
        return job

    def _raise_early(self) -> None:
        """A job that failed stops the run at the next one, not at its end."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            job.result()

    def wait(self) -> None:
        """Until every job is done.

        Raises:
            Exception: what a job raised.
        """
        while self._jobs:
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Wait, and end the thread. What a job raised is told by :meth:`wait` alone."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
