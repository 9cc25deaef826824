"""Recording work once to replay it many times: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

__all__ = ["CaptureError", "CudaRecorder", "Recorder"]

_ERROR_MODE = "thread_local"  # of captures: which threads' calls break them


class CaptureError(RuntimeError):
    """A step holds something that a CUDA graph cannot: a host synchronisation, a copy from unpinned memory, ..."""


class Recorder(Protocol):
    """What :class:`dfkd_fast.engine.GraphEngine` needs of a way to record and replay."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` as it will be recorded, so that what happens once alone happens now."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work``; what is returned replays it, on the same memory."""


class CudaRecorder:
    """Records CUDA graphs, all on one side stream and in one memory pool.

    Sharing the pool is safe where no two graphs run at a time and none leaves a result in it that is read after another
    has run. Steps leave their results in the state's own tensors.

    Args:
        device: of the work.
        generators: random streams that the work draws from, beside the device's default one. They go on from replay to
            replay as they would in eager mode.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.device, self.generators = device, tuple(generators)
        # Warming up and capturing on one stream: an AccumulateGrad node keeps to the stream that it was made on.
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._nothing = torch.zeros((), device=device)

    def warm_up(self, work: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record one graph.

        Raises:
            CaptureError: the work cannot be captured.
        """
        graph = self._graph()
        try:
            # The outer one puts the caller's stream back where a failure leaves the inner one without its end.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)):
                # Other threads write checkpoints and evaluate; what they call must not break the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=_ERROR_MODE):
                    work()
        except Exception as error:  # a capture fails in many ways, often twice over
            cause = error.__context__ or error
            with suppress(Exception):  # what made the capture fail is to be told, not this
                self._recover()
            raise CaptureError(
                f"a step could not be captured into a CUDA graph: {type(cause).__name__}: {cause}. Networks that read "
                "values back to the host cannot be; engine 'compiled' or 'eager' runs them"
            ) from error
        return graph.replay

    def _graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        return graph

    def _recover(self) -> None:
        """Leave the device usable. To torch a capture that failed goes on: generators refuse to draw, and the allocator
        to free, until they have been told of its end.
        """
        with suppress(RuntimeError):  # the allocator knows already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        graph = self._graph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode=_ERROR_MODE)
            self._nothing.zero_()
            graph.capture_end()
