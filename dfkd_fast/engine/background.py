"""Background jobs during training: writing files and evaluating a copy of the student."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["Background"]

T = TypeVar("T")


class Background:
    """A thread that runs jobs in the order of submission, on a separate CUDA stream.

    Args:
        device: the device that the jobs use.
        overlap: run jobs concurrently with the caller, not in :meth:`submit`. None does so on CUDA only.
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
        """Whether jobs run concurrently with the caller. If so, the caller must not change what the jobs read."""
        return self._thread is not None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` after the work that is now queued on the caller's stream.

        Raises:
            Exception: an earlier job raised it. The run stops here instead of at its end.
        """
        run, stream = work, self._stream
        if stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()

            def run() -> T:
                with torch.cuda.stream(stream):
                    stream.wait_event(ready)
                    result = work()
                    stream.synchronize()
                    return result

        if self._thread is None:
            job: Future[T] = Future()
            job.set_result(run())
            return job
        while self._jobs and self._jobs[0].done():
            self._jobs.pop(0).result()
        job = self._thread.submit(run)
        self._jobs.append(job)
        return job

    def wait(self) -> None:
        """Wait for all jobs, and raise the exception of a job that failed."""
        while self._jobs:
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Wait for all jobs and end the thread, without raising their exceptions."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
