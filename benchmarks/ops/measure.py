"""Timing of one case of an op by one provider: forward, backward and both, with a cold or a warm L2 cache.

On a GPU, several calls are captured into a CUDA graph whose replays are timed with events, so that CPU overhead between
launches is not measured. Cold: each call of a replay has its own inputs and keeps its results, so that no data is used
twice; before each replay the L2 cache is filled with other data by reading it (written data would be evicted during the
timed interval). For "both", forward and backward are two graphs with such a flush before each. Warm: all calls share
their inputs, and an untimed replay precedes each timed one. Where the capture fails, single calls are timed instead,
and the measurement's ``timer`` is "events".
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.benchmarks.ops.cases import Case, Make, tensors
from dfkd_fast.benchmarks.results import rounded

__all__ = ["CACHES", "PASSES", "Ceilings", "Measurement", "Trial", "ceilings", "time_calls"]

PASSES = ("forward", "backward", "both")
CACHES = ("cold", "warm")

_WARM_UP = 3
_REPLAY_US = 4000.0  # duration of a replay: much longer than the launch of a graph
_MAX_CALLS = 128  # in a replay
_MIN_REPEATS, _MAX_REPEATS, _REPEATS_S = 20, 100, 0.15
_CEILING_SIZES = (2**29, 8192)  # elements to copy, side of the matrices
_MEMORY_SHARE = 0.4  # of the free memory, for calls that are kept alive together

Piece = Callable[[], object]


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
        """Summarise times per call in microseconds."""
        p10, *_, p90 = statistics.quantiles(times, n=10, method="inclusive")
        return cls(statistics.median(times), p10, p90, peak, len(times), calls, timer)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured peak rates of the device: a copy (bytes read plus written) and bf16 matrix products."""

    copy_gbps: float
    matmul_tflops: float

    def roofline_us(self, moved: float, flops: float) -> float:
        """The least time in which so many bytes can be moved and so many operations computed."""
        return max(moved / self.copy_gbps / 1e3, flops / self.matmul_tflops / 1e6)


def ceilings(device: torch.device) -> Ceilings:
    """Measure the peak rates: a copy of 1 GiB, and a product of 8192 x 8192 matrices of random bf16 numbers."""
    count, side = _CEILING_SIZES if device.type == "cuda" else (2**22, 256)
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b, c = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(3))
    stopwatch = _Stopwatch(device) if device.type == "cuda" else None

    def median_us(piece: Piece) -> float:
        for _ in range(_WARM_UP):
            piece()
        return statistics.median(stopwatch.times([piece], cold=False) if stopwatch else _host_times(piece))

    copied = median_us(lambda: target.copy_(source))
    multiplied = median_us(lambda: torch.matmul(a, b, out=c))
    gbps, tflops = 2 * source.nbytes / copied / 1e3, 2 * side**3 / multiplied / 1e6
    return Ceilings(copy_gbps=rounded(gbps), matmul_tflops=rounded(tflops))


def _host_times(piece: Piece, repeats: int = _MIN_REPEATS) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        piece()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def time_calls(
    call: Callable[[int], object], device: torch.device, *, seconds: float, least: int, most: int = 200
) -> Measurement:
    """Time ``call(0)``, ``call(1)``, ... one by one, launches included, after three calls to warm up.

    There are ``least`` to ``most`` calls, about ``seconds`` in all. The argument of ``call`` selects the inputs.
    On CUDA, events surround each call, and all calls are queued before the first event is read.
    """
    for number in range(_WARM_UP):
        call(number)
    if device.type != "cuda":
        once = min(_host_times(lambda: call(0), 2)) / 1e6
        repeats = round(min(most, max(least, seconds / max(once, 1e-9))))
        return Measurement.of(_host_times(lambda: call(0), repeats), timer="host")
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for number in range(_WARM_UP):
        call(number)
    torch.cuda.synchronize(device)
    count = round(min(most, max(least, _WARM_UP * seconds / max(time.perf_counter() - start, 1e-9))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for number, (before, after) in enumerate(events):
        before.record()
        call(number)
        after.record()
    torch.cuda.synchronize(device)
    return Measurement.of([1e3 * before.elapsed_time(after) for before, after in events], timer="events")


class _Stopwatch:
    """Times pieces of device work on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        width = 4096
        self._other = torch.randn(math.ceil(max(2.5 * cache, 2**25) / 4 / width), width, device=device)
        self._sum = torch.empty(width, device=device)
        self.flush()
        torch.cuda.synchronize(device)
        marks = [self._between_events(self.flush) for _ in range(5)]
        torch.cuda.synchronize(device)
        self._flush_us = min(1e3 * before.elapsed_time(after) for before, after in marks)

    def flush(self) -> None:
        """Fill the L2 cache with other data."""
        torch.sum(self._other, dim=0, out=self._sum)

    def _between_events(self, piece: Piece) -> tuple[Any, Any]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        piece()
        after.record()
        return before, after

    def times(self, pieces: Sequence[Piece], *, cold: bool) -> list[float]:
        """Microseconds of all pieces together, repeatedly."""
        host, device = 0.0, 0.0
        for _ in range(2):  # the first replay of a graph also uploads it
            start = time.perf_counter()
            for piece in pieces:
                piece()
            host = 1e6 * (time.perf_counter() - start)
            torch.cuda.synchronize(self.device)
            device = 1e6 * (time.perf_counter() - start)
        # The device must still be busy flushing when the host has queued the timed piece.
        flushes = 1 + min(200, math.ceil(1.5 * host / self._flush_us))
        count = round(min(_MAX_REPEATS, max(_MIN_REPEATS, 1e6 * _REPEATS_S / max(device, 1.0))))
        marks = []
        for _ in range(count):
            for piece in pieces:
                for _ in range(flushes if cold else 1):
                    (self.flush if cold else piece)()
                marks.append(self._between_events(piece))
        torch.cuda.synchronize(self.device)
        times = [1e3 * before.elapsed_time(after) for before, after in marks]
        return [sum(times[i : i + len(pieces)]) for i in range(0, len(times), len(pieces))]


@dataclass
class _Call:
    """One call: inputs and output gradients, and between forward and backward its results."""

    inputs: tuple[Any, ...]
    grad_outputs: list[Tensor]
    results: list[Tensor] = field(default_factory=list)

    @property
    def trainable(self) -> list[Tensor]:
        return [tensor for tensor in tensors(self.inputs) if tensor.requires_grad]

    @property
    def outputs(self) -> list[Tensor]:
        return [result for result in self.results if result.requires_grad]


class Trial:
    """One case in one dtype by one provider.

    The constructor runs the forward once, so that errors and a lack of memory show here. The forward records the graph,
    as in training. The backward computes the gradients of all inputs that require one, from random output gradients, on
    a retained graph. On a CPU, a measurement has ``repeats`` repeats; on a GPU 20 to 100.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, function: Callable[..., Any], *, repeats: int = 5
    ) -> None:
        self.case, self.device, self._function, self._repeats = case, device, function, repeats
        self._make = Make(device, dtype, seed=case.seed)
        self.cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.cuda else None
        self._stopwatch: _Stopwatch | None = None
        self._shapes: list[Tensor] = []
        self._kept: list[_Call] = []  # read and written by captured graphs
        with self._on_stream():
            self._first = self._call()
            self._forward(self._first)
            self._shapes = [output.detach().to("meta") for output in self._first.outputs]
            self._first.grad_outputs = self._grad_outputs()
            self._first.results = []

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that exist: only the forward where nothing requires a gradient."""
        return PASSES if self._first.trainable and self._shapes else PASSES[:1]

    def run(self, which: str) -> object:
        """Run one pass, for other timers."""
        with self._on_stream():
            if which != "backward" or not self._first.outputs:
                self._forward(self._first)
            return self._first.results if which == "forward" else self._backward(self._first)

    def measure(self, which: str, l2: str) -> Measurement:
        """Time one pass. Raises torch.OutOfMemoryError where it does not fit into memory."""
        if not self.cuda:
            self.run(which)
            times = _host_times(lambda: self.run(which), self._repeats)
            self._first.results = []
            return Measurement.of(times, timer="host")
        with torch.cuda.device(self.device), self._on_stream():
            if self._stopwatch is None:
                self._stopwatch = _Stopwatch(self.device)
            try:
                peak, once_us = self._warm_up(which)
                calls = min(_MAX_CALLS, math.ceil(_REPLAY_US / once_us))
                free = torch.cuda.mem_get_info(self.device)[0]
                calls = max(1, min(calls, int(_MEMORY_SHARE * free / max(peak, 1))))
                timer, times = "graph", self._graph_times(which, l2, calls)
                if not times:
                    self._clear()
                    timer, calls = "events", 1
                    times = self._stopwatch.times(self._eager(which), cold=l2 == "cold")
            finally:
                self._clear()
        return Measurement.of([each / calls for each in times], calls=calls, peak=peak, timer=timer)

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)  # a null context for None

    def _call(self) -> _Call:
        return _Call(inputs=self.case.inputs(self._make), grad_outputs=self._grad_outputs())

    def _grad_outputs(self) -> list[Tensor]:
        return [
            torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=self.device).normal_()
            for shape in self._shapes
        ]

    def _forward(self, call: _Call) -> None:
        call.results = []
        call.results = tensors(self._function(*call.inputs))

    def _backward(self, call: _Call) -> object:
        if not call.trainable or not call.outputs:
            return None
        leaves = call.trainable
        return torch.autograd.grad(call.outputs, leaves, call.grad_outputs, retain_graph=True, allow_unused=True)

    def _clear(self) -> None:
        self._first.results = []
        self._kept = []
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _warm_up(self, which: str) -> tuple[int, float]:
        """Peak memory and approximate microseconds of one call."""
        call = self._first
        for _ in range(_WARM_UP):
            self._forward(call)
            if which != "forward":
                self._backward(call)
        call.results = []
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        if which == "backward":
            self._forward(call)
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        torch.cuda.reset_peak_memory_stats(self.device)
        for piece in self._passes_of(which):
            piece(call)
        torch.cuda.synchronize(self.device)
        once_us = 1e6 * (time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self._clear()
        return peak, once_us

    def _passes_of(self, which: str) -> list[Callable[[_Call], object]]:
        both = {"forward": self._forward, "backward": self._backward}
        return [both[which]] if which in both else list(both.values())

    def _graph_times(self, which: str, l2: str, calls: int) -> list[float]:
        """Times of graph replays; empty where no graph can be captured, also for lack of memory."""
        assert self._stopwatch is not None
        try:
            self._refuse_synchronisation(which)
            return self._stopwatch.times(self._captured(which, l2, calls), cold=l2 == "cold")
        except RuntimeError:
            return []

    def _refuse_synchronisation(self, which: str) -> None:
        """Raise where a call synchronises with the host, which would invalidate a capture."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for piece in self._eager(which):
                piece()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            self._first.results = []

    def _captured(self, which: str, l2: str, calls: int) -> list[Piece]:
        """The graphs of one repeat."""

        def graph(work: Callable[[], object]) -> Piece:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=self._stream):
                work()
            return captured.replay

        passes = self._passes_of(which)
        if l2 == "warm":
            each, groups = [self._first] * calls, [passes]
        else:
            each = self._kept = [self._first, *(self._call() for _ in range(calls - 1))]
            groups = [[single] for single in passes]
        if which == "backward":
            for call in {id(call): call for call in each}.values():
                self._forward(call)

        def run(group: list[Callable[[_Call], object]]) -> list[object]:
            kept = []
            for call in each:
                for single in group:
                    gradients = single(call)
                    if l2 == "cold":  # kept until the capture ends, so that no two calls write to the same memory
                        kept.append(gradients)
            return kept

        return [graph(functools.partial(run, group)) for group in groups]

    def _eager(self, which: str) -> list[Piece]:
        """The same work as single calls, without a graph."""
        if which == "backward":
            self._forward(self._first)
        return [lambda single=single: single(self._first) for single in self._passes_of(which)]  # type: ignore[misc]
