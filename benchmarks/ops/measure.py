"""Times one implementation of one case of an op: forward, backward or both, with a cold or a warm L2 cache.

On a GPU, several calls are captured into one CUDA graph, so CPU overhead between launches is not measured.
``triton.testing.do_bench`` times the graph's replays and flushes the L2 cache before each. Cold: each call of the graph
has its own inputs and outputs. Warm: all calls share their inputs. If the capture fails, single calls are timed instead
and ``timer`` is "events".
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.benchmarks.ops.cases import Case, Make, gradients, tensors
from dfkd_fast.benchmarks.results import rounded

__all__ = ["CACHES", "PASSES", "Measurement", "PeakRates", "Trial", "measure_peak_rates"]

PASSES = ("forward", "backward", "both")
CACHES = ("cold", "warm")

_WARM_UP = 3
_REPLAY_US = 4000.0  # duration of a replay: much longer than the launch of a graph
_MAX_CALLS = 128  # per replay
_REPEATS_MS = 150  # duration of all timed replays
_CPU_REPEATS = 5
_MEMORY_SHARE = 0.4  # share of the free memory that the calls of one graph may use


@dataclass(frozen=True)
class Measurement:
    """Microseconds per call over ``repeats`` measurements of ``calls`` calls each.

    ``peak_bytes`` is the peak memory of a call beyond its inputs and output gradients. ``timer`` is "graph", "events"
    or "host".
    """

    median_us: float
    p10_us: float
    p90_us: float
    peak_bytes: int | None
    repeats: int
    calls: int
    timer: str

    @classmethod
    def of(cls, times: Sequence[float], *, calls: int = 1, peak: int | None = None, timer: str) -> Measurement:
        """Summarize times per call in microseconds."""
        p10, *_, p90 = statistics.quantiles(times, n=10, method="inclusive")
        return cls(statistics.median(times), p10, p90, peak, len(times), calls, timer)


@dataclass(frozen=True, kw_only=True)
class PeakRates:
    """Measured peak rates of a device: copy bandwidth (bytes read plus written) and bf16 matrix products."""

    copy_gbps: float
    matmul_tflops: float

    def roofline_us(self, moved: float, flops: float) -> float:
        """The least time to move ``moved`` bytes and compute ``flops`` operations, in microseconds."""
        return max(moved / self.copy_gbps / 1e3, flops / self.matmul_tflops / 1e6)


def measure_peak_rates(device: torch.device) -> PeakRates:
    """Measure the peak rates, on a GPU with a copy of 1 GiB and a product of random 8192 x 8192 bf16 matrices."""
    count, side = (2**29, 8192) if device.type == "cuda" else (2**22, 256)
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b, c = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(3))
    copied = statistics.median(_times(lambda: target.copy_(source), device))
    multiplied = statistics.median(_times(lambda: torch.matmul(a, b, out=c), device))
    gbps, tflops = 2 * source.nbytes / copied / 1e3, 2 * side**3 / multiplied / 1e6
    return PeakRates(copy_gbps=rounded(gbps), matmul_tflops=rounded(tflops))


def _times(call: Callable[[], object], device: torch.device) -> list[float]:
    """Microseconds of repeated calls, after untimed ones. On a GPU the L2 cache is flushed before each call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        times = [1e3 * ms for ms in do_bench(call, rep=_REPEATS_MS, return_mode="all")]
        return times if len(times) > 1 else times * 2  # quantiles need two values
    call()
    times = []
    for _ in range(_CPU_REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return times


@dataclass(eq=False)
class _Call:
    """One call: its inputs, its output gradients and, between forward and backward, its results."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    grad_outputs: list[Tensor]
    results: list[Tensor] = field(default_factory=list)

    def run(self, which: str) -> object:
        """Run one pass. The backward uses the results of the last forward, on a retained graph."""
        if which != "backward":
            self.results = []
            self.results = tensors(self.function(*self.inputs))
        if which == "forward":
            return self.results
        return gradients(self.results, self.inputs, self.grad_outputs, retain_graph=True)


class Trial:
    """One case in one dtype, computed by ``function``.

    The constructor runs the forward once and raises if ``function`` fails or memory runs out. The forward records the
    autograd graph, as in training. The backward computes the gradients of all inputs that require one, from random
    output gradients.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, function: Callable[..., Any]) -> None:
        self.case, self.device, self.cuda = case, device, device.type == "cuda"
        self._make = Make(device, dtype, seed=case.seed)
        self._stream = torch.cuda.Stream(device) if self.cuda else None
        with self._on_stream():
            self._first = call = _Call(function, case.inputs(self._make), [])
            call.run("forward")
            if any(x.requires_grad for x in tensors(call.inputs)):
                outputs = [result.detach() for result in call.results if result.requires_grad]
                call.grad_outputs = [torch.empty_like(output).normal_() for output in outputs]
            call.results = []

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that exist: only the forward if nothing requires a gradient."""
        return PASSES if self._first.grad_outputs else PASSES[:1]

    def run(self, which: str) -> object:
        """Run one pass, for other timers."""
        with self._on_stream():
            if which == "backward" and not self._first.results:
                self._first.run("forward")
            return self._first.run(which)

    def measure(self, which: str, l2: str) -> Measurement:
        """Time one pass.

        Args:
            which: "forward", "backward" or "both".
            l2: "cold" or "warm"; ignored on the CPU.

        Raises:
            torch.OutOfMemoryError: the pass does not fit into memory.
        """
        if not self.cuda:
            times = _times(lambda: self.run(which), self.device)
            self._first.results = []
            return Measurement.of(times, timer="host")
        with torch.cuda.device(self.device), self._on_stream():
            try:
                peak, once_us = self._warm_up(which)
                free = torch.cuda.mem_get_info(self.device)[0]
                fitting = int(_MEMORY_SHARE * free / max(peak, 1))
                calls = max(1, min(_MAX_CALLS, math.ceil(_REPLAY_US / once_us), fitting))
                timer, times = "graph", self._graph_times(which, calls, cold=l2 == "cold")
                if not times:
                    self._clear()
                    timer, calls = "events", 1
                    times = _times(lambda: self.run(which), self.device)
            finally:
                self._clear()
        return Measurement.of([each / calls for each in times], calls=calls, peak=peak, timer=timer)

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)  # a null context for None

    def _clear(self) -> None:
        self._first.results = []
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _warm_up(self, which: str) -> tuple[int, float]:
        """Peak bytes and approximate microseconds of one call."""
        call = self._first
        for _ in range(_WARM_UP):
            call.run("forward" if which == "forward" else "both")
        call.results = []
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        if which == "backward":
            call.run("forward")
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        torch.cuda.reset_peak_memory_stats(self.device)
        call.run(which)
        torch.cuda.synchronize(self.device)
        once_us = 1e6 * (time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self._clear()
        return peak, once_us

    def _graph_times(self, which: str, calls: int, *, cold: bool) -> list[float]:
        """Microseconds per replay of a graph; empty if the calls cannot be captured or do not fit into memory."""
        first, graph = self._first, torch.cuda.CUDAGraph()
        mode = torch.cuda.get_sync_debug_mode()
        try:
            every = [first] * calls
            if cold:
                every[1:] = [self._another_call() for _ in range(calls - 1)]
            if which == "backward":
                for call in dict.fromkeys(every):
                    call.run("forward")
            torch.cuda.set_sync_debug_mode("error")  # a call that synchronizes would invalidate the capture
            first.run(which)
            torch.cuda.set_sync_debug_mode(mode)
            kept = []
            with torch.cuda.graph(graph, stream=self._stream):
                for call in every:
                    result = call.run(which)
                    if cold:  # no two calls may write to the same memory
                        kept.append(result)
            return _times(graph.replay, self.device)
        except RuntimeError:
            return []
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def _another_call(self) -> _Call:
        grad_outputs = [torch.empty_like(gradient).normal_() for gradient in self._first.grad_outputs]
        return _Call(self._first.function, self.case.inputs(self._make), grad_outputs)
