"""Measurements that outlive a kernel which never ends, or which takes the device from its process.

A stage runs its work in a child process, which says in a file what it is about to do and how long that may take. Where
the child dies in the midst of it, or is still at it after that time, the work is lost: the stage gives it a row that
says so, and a new child goes on with the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.common import Clock

__all__ = ["Journal", "supervise"]

_POLL_S = 0.2
_GRACE_S = 5.0


class Journal:
    """What a child is at, in a file beside its results.

    Args:
        results: the stage's result file.
    """

    def __init__(self, results: Path) -> None:
        self.path = results.with_suffix(".begun")

    @contextmanager
    def begun(self, what: Any, limit_s: float) -> Iterator[None]:
        """Around a piece of work.

        Args:
            what: tells it from others; becomes JSON.
            limit_s: seconds after which it is lost.
        """
        partial = self.path.with_suffix(".begun.partial")
        partial.write_text(json.dumps({"what": what, "until": time.time() + limit_s, "limit_s": limit_s}))
        os.replace(partial, self.path)
        yield
        self.path.unlink()  # not where an error ends the child: that work is lost too

    def read(self) -> dict[str, Any] | None:
        """What is under way; None for nothing."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a child; one that waits for a device does not listen to more than this."""
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def supervise(
    command: Sequence[str], journal: Journal, clock: Clock, lost: Callable[[Any, str], None], *, most: int = 20
) -> int:
    """Run a child until one ends by itself with nothing under way.

    Args:
        command: of the child, without its ``--seconds``.
        journal: what it writes.
        clock: the time that there is.
        lost: given each piece of work that was lost, and why, in words; makes sure that it is not begun again.
        most: children at the most.

    Returns:
        The last one's exit status; 1 where work was lost or no time was left to go on.
    """
    journal.clear()
    sound = True
    for _ in range(most):
        process = subprocess.Popen([*command, "--seconds", f"{clock.left:.1f}"], stdin=subprocess.DEVNULL)
        try:
            why = _watch(process, journal)
        finally:
            _stop(process)
        under_way = journal.read()
        if under_way is None:
            return process.returncode or int(not sound)
        sound = False
        journal.clear()
        lost(under_way["what"], why)
        if clock.left <= 0:
            return 1
    return 1


def _watch(process: subprocess.Popen[bytes], journal: Journal) -> str:
    """Wait until a child has ended, or has to be; why, in words."""
    while True:
        try:
            status = process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            under_way = journal.read()
            if under_way is not None and time.time() > under_way["until"]:
                return f"did not end within {under_way['limit_s']:.0f} s"
            continue
        if status < 0:
            return f"the process ended by {signal.Signals(-status).name}"
        return f"the process ended with exit status {status}"
