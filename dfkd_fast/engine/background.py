"""Work in the background of training: writing files, evaluating a copy of the student."""

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
    """One thread that runs jobs in the order of submission, on a separate CUDA stream.

    Args:
        device: where jobs compute. On the CPU there is nothing to gain, and the caller runs each job at once.
        overlap: run jobs concurrently with the caller; None is only on CUDA.
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
        """Whether jobs run concurrently with the caller, which must not change what they read."""
        return self._thread is not None

    def submit(self, work: Callable[[], T]) -> Job[T]:
        """Run ``work`` after everything that is on the caller's stream now."""
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
        """A job that failed stops the run at the next job, not at the end."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            job.result()

    def wait(self) -> None:
        """Wait for every job, and raise the exception of one that failed."""
        while self._jobs:
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Wait, and end the thread. Only :meth:`wait` raises the exception of a job."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
