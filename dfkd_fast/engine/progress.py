"""A progress line: what is done, what the losses are, how fast it goes, how long it still takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["ProgressLine"]


class _TwoLines(Progress):
    """The bar on one line and a note below it, so that neither is cut in a narrow terminal."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.note, style="cyan")


class ProgressLine:
    """A rich progress bar for a run of ``total`` units; silent where ``enabled`` is false.

    Args:
        title: what is running.
        total: number of units (rounds, epochs).
        unit: their name.
        enabled: draw it.
        console: where; the standard one when None.
    """

    def __init__(
        self, title: str, *, total: int, unit: str, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._progress = _TwoLines(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not enabled,
        )
        self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, completed: int, values: Mapping[str, float], images_per_s: float | None = None) -> None:
        """Show that ``completed`` units are done, with loss terms and speed."""
        words = [f"{name} {value:.3g}" for name, value in values.items()]
        if images_per_s is not None:
            words.append(f"{images_per_s:.0f} images/s")
        self._progress.note = "  ".join(words)
        self._progress.update(self._task, completed=completed)

    def print(self, text: str) -> None:
        """A line above the bar."""
        if not self._progress.disable:
            self._progress.console.print(text, highlight=False)
