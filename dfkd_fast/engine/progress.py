"""The progress of a run: a bar with losses, speed and remaining time, and a TensorBoard log."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from dfkd_fast.files import WriteError

__all__ = ["EventLog", "Listener", "ProgressLine"]

log = logging.getLogger(__name__)

_FLUSH_S = 30.0  # for a TensorBoard that watches the run

Listener = Callable[[int, int, dict[str, float], float], object]
"""Called with the numbers of completed and of all units, loss values, and images per second."""


class ProgressLine(Progress):
    """A rich progress bar with a second line for losses and speed, so that both fit a narrow terminal.

    Args:
        title: name of the task.
        total: number of units of the task.
        unit: name of the units, for example ``rounds``.
        enabled: show the bar; if false, nothing is printed; a :data:`Listener` is called instead.
        console: console of the output; None uses the default one.
    """

    def __init__(
        self, title: str, *, total: int, unit: str, enabled: bool | Listener = True, console: Console | None = None
    ) -> None:
        self._note, self._total = "", total
        self._listener = None if isinstance(enabled, bool) else enabled
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=enabled is not True,
        )
        self._task = self.add_task(title, total=total)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self._note, style="cyan")

    def show(self, completed: int, values: Mapping[str, float], images_per_s: float) -> None:
        """Show the number of completed units, loss values and speed."""
        if self._listener is not None:
            self._listener(completed, self._total, dict(values), images_per_s)
        if self.disable:
            return
        self._note = "  ".join(
            [*(f"{name} {value:.3g}" for name, value in values.items()), f"{images_per_s:.0f} images/s"]
        )
        self.update(self._task, completed=completed)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.disable:
            self.console.print(text, highlight=False)


class EventLog:
    """A TensorBoard log, whose file is created by the first write.

    Writes in the calling thread, unlike torch's SummaryWriter, whose thread can wait forever if memory runs out. If a
    write fails, for example on a full disk, the log warns once and ends, and the run continues.

    Args:
        folder: folder of the event files.
        first_step: the first step of this process. TensorBoard hides this step and later ones of earlier processes.
    """

    def __init__(self, folder: Path, *, first_step: int = 1) -> None:
        self.folder, self.first_step = folder, first_step
        self._lock, self._failed, self._flushed = threading.Lock(), False, 0.0
        self._writer: RecordWriter | None = None

    def _write(self, **event: Any) -> None:
        assert self._writer is not None
        self._writer.write(Event(wall_time=time.time(), **event).SerializeToString())
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _open(self) -> None:
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._writer = RecordWriter((self.folder / name).open("wb"))
            self._write(file_version="brain.Event:2")
            # TensorBoard ignores the first process's value, but without it, it also ignores the second one's.
            self._write(session_log=SessionLog(status=SessionLog.START), step=self.first_step)

    @contextmanager
    def _guard(self) -> Iterator[bool]:
        """Yield whether the log can be used, and end it after an error."""
        with self._lock:  # pictures are written by another thread
            try:
                yield not self._failed
            except OSError as error:
                self._failed = True
                reason = WriteError.of(self.folder, error)
                log.warning("%s; the rest of the run has no TensorBoard log", reason)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self._guard() as usable:
            if usable:
                self._open()
                self._write(summary=summary.scalar(name, value), step=step)

    def add_images(self, name: str, images: Any, step: int) -> None:
        with self._guard() as usable:
            if usable:
                self._open()
                self._write(summary=summary.image(name, images, dataformats="NCHW"), step=step)
        self.flush()

    def flush(self) -> None:
        """Write everything to the log's file, so that it is not lost if the process is killed."""
        with self._guard() as usable:
            if usable and self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        with self._guard() as usable:
            if usable and self._writer is not None:
                self._writer.close()
