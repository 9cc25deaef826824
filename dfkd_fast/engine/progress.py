"""The progress of a run: a bar with losses, speed and remaining time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Listener", "ProgressLine"]

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
