"""Captures work as a CUDA graph that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

__all__ = ["CaptureError", "CudaRecorder"]

# Other threads write checkpoints and evaluate; their CUDA calls must not break a capture.
_ERROR_MODE = "thread_local"


class CaptureError(RuntimeError):
    """A step cannot be captured, for example because it synchronizes with the host or copies from pageable memory."""


class CudaRecorder:
    """Records CUDA graphs on one side stream and in one memory pool.

    Graphs can share the pool, because they run one at a time and steps write their results to tensors outside of it.

    Args:
        device: CUDA device of the work.
        generators: random generators that the work uses, in addition to the device's default one. Each replay advances
            them as an eager step does.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.device, self.generators = device, tuple(generators)
        # Warm up and capture on one stream, because an AccumulateGrad node stays on the stream that created it.
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._nothing = torch.zeros((), device=device)

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the capture's stream, so that one-time initialization happens before the capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture ``work`` and return the graph's replay.

        Raises:
            CaptureError: the work cannot be captured.
        """
        graph = self._graph()
        try:
            # The outer context restores the caller's stream if a failure prevents the inner one from doing so.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)):
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=_ERROR_MODE):
                    work()
        except Exception as error:  # captures raise many exception types, often one during the handling of another
            cause = error.__context__ or error
            with suppress(Exception):  # the cause of the failed capture is reported instead
                self._recover()
            raise CaptureError(
                f"a step could not be captured into a CUDA graph: {type(cause).__name__}: {cause}. Networks that read "
                "values back to the host cannot be captured; use engine 'compiled' or 'eager' for them"
            ) from error
        return graph.replay

    def _graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        return graph

    def _recover(self) -> None:
        """End a failed capture. Until then, generators cannot draw and the allocator cannot free memory."""
        with suppress(RuntimeError):  # raised if the allocator has already ended the capture
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        graph = self._graph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode=_ERROR_MODE)
            self._nothing.zero_()
            graph.capture_end()
