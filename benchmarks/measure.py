"""Timing of one case by one provider: forward, backward and both, with a cold and with a warm cache.

On a GPU a number of calls is captured into a CUDA graph and its replays are timed by device events, so that what the
host does between launches is not in the time. Cold: each call of a replay has inputs of its own and keeps its results,
so that nothing is met twice, and before each replay, outside of the timed interval, the L2 is filled with other data by
reading it (data written would have to leave the L2 during the interval). For "both", forward and backward are graphs of
their own with such a flush between them. Warm: all calls have the same inputs, and a replay that is not timed goes
before the one that is. Where a capture fails, single calls are timed instead, and the measurement says so.
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

from dfkd_fast.benchmarks.cases import Case, Inputs, Make

__all__ = ["CACHES", "PASSES", "Ceilings", "Measurement", "Trial", "ceilings", "tensors"]

PASSES = ("forward", "backward", "both")
CACHES = ("cold", "warm")

_WARM_UP = 3
_REPLAY_US = 4000.0  # about how long a replay should take: much longer than the start of a graph
_CALLS = 128  # of a replay, at the most
_LAPS, _MOST_LAPS, _LAPS_S = 20, 100, 0.15
_CEILING = (2**29, 8192)  # elements to copy, and side of the matrices
_SHARE = 0.4  # of the free memory that calls kept side by side may take

Piece = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Microseconds a call over ``laps`` measurements, and bytes at the peak beyond inputs and upstream gradients.

    ``timer`` is "graph", "events" (a capture failed) or "host".
    """

    median_us: float
    p10_us: float
    p90_us: float
    peak_bytes: int | None
    laps: int
    calls: int
    timer: str


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device does at best, measured: copying (read and written bytes count), and bf16 matrix products."""

    copy_gbps: float
    matmul_tflops: float

    def floor_us(self, moved: float, flops: float) -> float:
        """The least time that moving so many bytes and computing so many operations can take."""
        return max(moved / self.copy_gbps / 1e3, flops / self.matmul_tflops / 1e6)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in tensors(each)] if isinstance(value, tuple | list) else []


def _summary(laps: Sequence[float], *, calls: int, peak: int | None, timer: str) -> Measurement:
    deciles = statistics.quantiles(laps, n=10, method="inclusive")
    return Measurement(
        median_us=statistics.median(laps),
        p10_us=deciles[0],
        p90_us=deciles[-1],
        peak_bytes=peak,
        laps=len(laps),
        calls=calls,
        timer=timer,
    )


def ceilings(device: torch.device) -> Ceilings:
    """Measure the two ceilings: a copy of a gibibyte and a product of 8192 x 8192 matrices, of random bf16 numbers."""
    cuda = _is_gpu(device)
    count, side = _CEILING if cuda else (2**22, 256)
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    stopwatch = _Stopwatch(device) if cuda else None

    def median_us(piece: Piece) -> float:
        for _ in range(_WARM_UP):
            piece()
        laps = stopwatch.laps([piece], cold=False) if stopwatch else _host_laps(piece)
        return statistics.median(laps)

    copied = median_us(lambda: target.copy_(source))
    multiplied = median_us(lambda: torch.matmul(a, b, out=c))
    return Ceilings(
        copy_gbps=round(2 * source.nbytes / copied / 1e3, 1), matmul_tflops=round(2 * side**3 / multiplied / 1e6, 2)
    )


def _host_laps(piece: Piece, laps: int = _LAPS) -> list[float]:
    times = []
    for _ in range(laps):
        start = time.perf_counter()
        piece()
        times.append(1e6 * (time.perf_counter() - start))
    return times


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
        self._flush_us = min(self._once(self.flush) for _ in range(5))

    def flush(self) -> None:
        """Fill the L2 with other data."""
        torch.sum(self._other, dim=0, out=self._sum)

    def _once(self, piece: Piece) -> float:
        """Microseconds by the device's clock."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        piece()
        after.record()
        torch.cuda.synchronize(self.device)
        return 1e3 * before.elapsed_time(after)

    def laps(self, pieces: Sequence[Piece], *, cold: bool) -> list[float]:
        """Microseconds of all pieces together, again and again."""
        host, device = 0.0, 0.0
        for _ in range(2):  # the first replay of a graph also uploads it
            start = time.perf_counter()
            for piece in pieces:
                piece()
            host = 1e6 * (time.perf_counter() - start)
            torch.cuda.synchronize(self.device)
            device = 1e6 * (time.perf_counter() - start)
        # The device must still be busy with the flush when the host has queued the timed piece, or waiting is timed.
        flushes = 1 + min(200, math.ceil(1.5 * host / self._flush_us))
        count = round(min(_MOST_LAPS, max(_LAPS, 1e6 * _LAPS_S / max(device, 1.0))))
        marks = []
        for _ in range(count):
            for piece in pieces:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if cold:
                    for _ in range(flushes):
                        self.flush()
                else:
                    piece()
                before.record()
                piece()
                after.record()
                marks.append((before, after))
        torch.cuda.synchronize(self.device)
        times = [1e3 * before.elapsed_time(after) for before, after in marks]
        return [sum(times[i : i + len(pieces)]) for i in range(0, len(times), len(pieces))]


@dataclass
class _Call:
    """One call: its inputs and upstream gradients, and between forward and backward its results.

    ``outputs`` are those results that gradients flow from.
    """

    inputs: Inputs
    wanted: list[Tensor]
    upstream: list[Tensor]
    results: list[Tensor] = field(default_factory=list)

    @property
    def outputs(self) -> list[Tensor]:
        return [result for result in self.results if result.requires_grad]

    def forget(self) -> None:
        self.results = []


class Trial:
    """One case in one dtype by one provider, made ready to be timed.

    Making it runs the forward once, so that what the provider cannot do, or has no memory for, is an error here.
    Forward is with gradients asked for, as in training; backward is to every input that requires a gradient, with
    random upstream gradients, on graphs that are kept.

    Args:
        case: what to call it on.
        dtype: of the inputs.
        device: where.
        function: the provider, called with the case's inputs.
        laps: measurements, on a CPU; on a GPU there are twenty or more.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        function: Callable[..., Any],
        *,
        laps: int = 5,
    ) -> None:
        self.case, self.device, self._function, self._laps = case, device, function, laps
        self._make = Make(device, dtype, seed=case.seed())
        self._stream = torch.cuda.Stream(device) if _is_gpu(device) else None
        self._stopwatch: _Stopwatch | None = None
        self._shapes: list[Tensor] = []
        self._kept: list[_Call] = []  # what captured graphs read and write
        with self._on_stream():
            self._first = self._call()
            self._forward(self._first)
            self._shapes = [output.detach().to("meta") for output in self._first.outputs]
            self._first.upstream = self._upstream()
            self._first.forget()

    @property
    def passes(self) -> tuple[str, ...]:
        """Those that there are: without gradients to compute, the forward alone."""
        return PASSES if self._first.wanted and self._shapes else PASSES[:1]

    def run(self, which: str) -> object:
        """One pass, plainly; for timers of others."""
        with self._on_stream():
            if which != "backward" or not self._first.outputs:
                self._forward(self._first)
            if which == "forward":
                return self._first.results
            return self._backward(self._first)

    def measure(self, which: str, l2: str) -> Measurement:
        """Time one pass.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
        """
        if not _is_gpu(self.device):
            self.run(which)
            laps = _host_laps(lambda: self.run(which), self._laps)
            self._first.forget()
            return _summary(laps, calls=1, peak=None, timer="host")
        with torch.cuda.device(self.device), self._on_stream():
            if self._stopwatch is None:
                self._stopwatch = _Stopwatch(self.device)
            try:
                peak, once_us = self._prepare(which)
                calls = min(_CALLS, math.ceil(_REPLAY_US / once_us))
                free = torch.cuda.mem_get_info(self.device)[0]
                calls = max(1, min(calls, int(_SHARE * free / max(peak, 1))))
                timer, laps = "graph", self._graph_laps(which, l2, calls)
                if not laps:
                    self._clear()
                    timer, calls = "events", 1
                    laps = self._stopwatch.laps(self._plain(which), cold=l2 == "cold")
            finally:
                self._clear()
        return _summary([lap / calls for lap in laps], calls=calls, peak=peak, timer=timer)

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)  # of None: nothing changes

    def _call(self) -> _Call:
        inputs = self.case.inputs(self._make)
        wanted = [tensor for tensor in tensors(inputs) if tensor.requires_grad]
        return _Call(inputs=inputs, wanted=wanted, upstream=self._upstream())

    def _upstream(self) -> list[Tensor]:
        return [
            torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=self.device).normal_()
            for shape in self._shapes
        ]

    def _forward(self, call: _Call) -> None:
        call.forget()
        call.results = tensors(self._function(*call.inputs))

    def _backward(self, call: _Call) -> object:
        if not call.wanted or not call.outputs:
            return None
        return torch.autograd.grad(call.outputs, call.wanted, call.upstream, retain_graph=True, allow_unused=True)

    def _clear(self) -> None:
        self._first.forget()
        self._kept = []
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _prepare(self, which: str) -> tuple[int, float]:
        """Warm up; the peak of memory and about the microseconds of one call."""
        call = self._first
        for _ in range(_WARM_UP):
            self._forward(call)
            if which != "forward":
                self._backward(call)
        call.forget()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        if which == "backward":
            self._forward(call)
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
        torch.cuda.reset_peak_memory_stats(self.device)
        if which != "backward":
            self._forward(call)
        if which != "forward":
            self._backward(call)
        torch.cuda.synchronize(self.device)
        once_us = 1e6 * (time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self._clear()
        return peak, once_us

    def _graph_laps(self, which: str, l2: str, calls: int) -> list[float]:
        """Laps of graphs; none where they cannot be captured, be it that they take more memory than single calls."""
        assert self._stopwatch is not None
        try:
            self._check_waits(which)
            return self._stopwatch.laps(self._captured(which, l2, calls), cold=l2 == "cold")
        except RuntimeError:
            return []

    def _check_waits(self, which: str) -> None:
        """An error where a call waits for the device: found out before a capture, which such a call would break."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for piece in self._plain(which):
                piece()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            self._first.forget()

    def _graph(self, work: Callable[[], object]) -> Piece:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        return graph.replay

    def _captured(self, which: str, l2: str, calls: int) -> list[Piece]:
        """The graphs of a lap."""
        if l2 == "warm":
            first = self._first
            if which == "backward":
                self._forward(first)

            def again() -> None:
                for _ in range(calls):
                    if which != "backward":
                        self._forward(first)
                    if which != "forward":
                        self._backward(first)

            return [self._graph(again)]

        each = self._kept = [self._first, *(self._call() for _ in range(calls - 1))]

        def forward() -> None:
            for call in each:
                self._forward(call)

        def backward() -> list[object]:
            return [self._backward(call) for call in each]

        if which == "forward":
            pieces = [self._graph(forward)]
        elif which == "backward":
            forward()
            pieces = [self._graph(lambda: backward())]
        else:
            pieces = [self._graph(forward), self._graph(lambda: backward())]
        return pieces

    def _plain(self, which: str) -> list[Piece]:
        """The same as single calls, without a graph."""
        first = self._first
        if which == "backward":
            self._forward(first)
        forward, backward = (lambda: self._forward(first)), (lambda: self._backward(first))
        pieces: dict[str, list[Piece]] = {"forward": [forward], "backward": [backward], "both": [forward, backward]}
        return pieces[which]
