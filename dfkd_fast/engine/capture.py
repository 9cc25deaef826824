"""Recording work once to replay it many times, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

__all__ = ["CaptureError", "CudaRecorder", "Recorder"]

_ERROR_MODE = "thread_local"  # of captures: which threads' calls break them


class CaptureError(RuntimeError):
    """A step cannot be captured: it synchronises with the host, copies from unpinned memory, ..."""


class Recorder(Protocol):
    """A way to record and replay, for :class:`dfkd_fast.engine.GraphEngine`."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` as it will be recorded, so that everything that happens only once happens now."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work``; returns a function that replays it on the same memory."""


class CudaRecorder:
    """Records CUDA graphs, all on one side stream and in one memory pool.

    Sharing the pool is safe: graphs run one at a time, and steps write their results into the state's tensors.

    Args:
        device: of the work.
        generators: random streams that the work draws from, in addition to the device's default one. They advance with
            each replay as in eager mode.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.device, self.generators = device, tuple(generators)
        # Warm-up and capture on one stream: an AccumulateGrad node stays on the stream that it was made on.
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
            # The outer context restores the caller's stream if a failure keeps the inner one from doing so.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)):
                # Other threads write checkpoints and evaluate; what they call must not break the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=_ERROR_MODE):
                    work()
        except Exception as error:  # a capture fails in many ways, often twice over
            cause = error.__context__ or error
            with suppress(Exception):  # the reason of the failed capture is reported instead
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
        """End a failed capture: until then generators refuse to draw, and the allocator to free."""
        with suppress(RuntimeError):  # the allocator knows already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        graph = self._graph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode=_ERROR_MODE)
            self._nothing.zero_()
            graph.capture_end()
