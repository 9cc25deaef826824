"""When things happened on a device: marks between rounds, and how busy a profiled round kept it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

__all__ = ["Timeline", "covered", "profile_once"]


class Timeline:
    """Marks in the order of the device's work: CUDA events, which nothing waits for; on a CPU the host's clock.

    Args:
        device: whose work is marked.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def start(self) -> None:
        """Forget earlier marks, and let earlier work end."""
        self._events.clear()
        self._times.clear()
        if self._cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        """Mark this place."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Milliseconds from each mark to the next; waits for the last."""
        if self._cuda:
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in pairwise(self._events)]
        return [1e3 * (second - first) for first, second in pairwise(self._times)]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def profile_once(
    work: Callable[[], None], synchronize: Callable[[], None], *, device: torch.device, steps: int
) -> dict[str, Any]:
    """Run ``work`` twice under torch.profiler, and look at the second time.

    The device's activity alone is recorded, so that the host is held up as little as can be. ``gpu_busy`` is the share
    of the profiled time in which a kernel, a copy or a fill ran.

    Args:
        work: queues device work.
        synchronize: waits for it.
        device: where it runs.
        steps: that ``work`` consists of.

    Returns:
        ``gpu_busy``, ``kernels_per_step`` (copies and fills included), ``kernel_ms`` (of the whole work, overlaps once)
        and ``profiled_ms``; on a CPU each is None.
    """
    names = ("gpu_busy", "kernels_per_step", "kernel_ms", "profiled_ms")
    if device.type != "cuda":
        return dict.fromkeys(names)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1),
        acc_events=True,
    ) as profiler:
        work()
        synchronize()
        profiler.step()
        start = time.perf_counter()
        work()
        synchronize()
        wall_ms = 1e3 * (time.perf_counter() - start)
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    kernels = [
        (event.start_ns(), event.end_ns())
        for event in results.events()
        # Ranges of the host are drawn on the device's line too; what ran there has no annotation.
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
    kernel_ms = covered(kernels) / 1e6
    return dict(zip(names, (kernel_ms / wall_ms, len(kernels) / steps, kernel_ms, wall_ms), strict=True))
