"""Handles Ctrl-C and SIGTERM, so that a run can save a checkpoint before it exits."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["StopRequest", "catch_signals"]


class StopRequest:
    """A request to stop the run.

    Attributes:
        received: the SIGINT or SIGTERM that this process got, or None.
        agreed: the signal on which the run stops, or None; see :func:`dfkd_fast.engine.distributed.agree_to_stop`.
    """

    received: signal.Signals | None = None
    agreed: signal.Signals | None = None

    def leave(self) -> None:
        """Raise KeyboardInterrupt if the run stops on SIGINT, or exit with status 143 if it stops on SIGTERM."""
        if self.agreed is signal.SIGINT:
            raise KeyboardInterrupt
        if self.agreed is not None:
            raise SystemExit(128 + self.agreed)


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Record the first SIGINT or SIGTERM in the yielded request. One that comes later has its usual effect.

    Those of the next second are ignored: torchrun sends its processes the Ctrl-C that they have got from the terminal.
    Does nothing outside of the main thread, because Python handles signals only in that thread.
    """
    request, first = StopRequest(), 0.0
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            number, handler = previous.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if request.received is None:
            request.received, first = signal.Signals(number), time.monotonic()
        elif time.monotonic() > first + 1:
            restore()
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, receive)
    try:
        yield request
    finally:
        restore()
