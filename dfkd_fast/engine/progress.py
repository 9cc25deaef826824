"""The progress of a run: a bar with losses, speed and remaining time, and a TensorBoard log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from dfkd_fast.files import WriteError

__all__ = ["EventLog", "Listener", "ProgressLine"]

log = logging.getLogger(__name__)

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
    """A TensorBoard log, which is created by the first write.

    If a write fails, for example on a full disk, the log warns once and ends, and the run continues.

    Args:
        folder: folder of the event files.
        first_step: the first step of this process. TensorBoard hides this step and later ones of earlier processes.
    """

    def __init__(self, folder: Path, *, first_step: int = 1) -> None:
        self.folder, self.first_step = folder, first_step
        self._lock, self._failed = threading.Lock(), False
        self._writer: SummaryWriter | None = None

    def _call(self, method: str, *arguments: Any) -> None:
        with self._lock:  # pictures are written by another thread
            if self._failed:
                return
            try:
                if self._writer is None:
                    # TensorBoard ignores the first process's value, but without it, it also ignores the second one's.
                    self._writer = SummaryWriter(str(self.folder), purge_step=self.first_step)
                getattr(self._writer, method)(*arguments)
            except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
                self._failed = True
                reason = WriteError.of(self.folder, error) if isinstance(error, OSError) else f"{self.folder}: {error}"
                log.warning("%s; the rest of the run has no TensorBoard log", reason)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._call("add_scalar", name, value, step)

    def add_images(self, name: str, images: Any, step: int) -> None:
        self._call("add_images", name, images, step)
        self.flush()

    def flush(self) -> None:
        """Write everything to the log's file, so that it is not lost if the process is killed."""
        if self._writer is not None:
            self._call("flush")

    def close(self) -> None:
        if self._writer is not None:
            self._call("close")
