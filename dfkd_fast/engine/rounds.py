"""Queues rounds of steps, and reads the losses of each round back while the next one runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_fast.engine.engines import Engine
from dfkd_fast.engine.state import DistillState
from dfkd_fast.nvtx import nvtx_range

__all__ = ["NonFiniteError", "Round", "Rounds"]


class NonFiniteError(ArithmeticError):
    """A loss or gradient was not finite, and its step was skipped, or a step wrote a value that is not finite.

    The message names the first such step and its loss terms, or the tensors.
    """


@dataclass(frozen=True, kw_only=True)
class Round:
    """The results of a finished round.

    Attributes:
        number: index of the round, from zero.
        means: mean of each loss term over the round's steps, by names such as ``generator/bn``.
        student_lr: the student's learning rate after the round.
    """

    number: int
    means: dict[str, float]
    student_lr: float


class _Readback:
    """An asynchronous copy of a round's trace to the host."""

    def __init__(self, state: DistillState) -> None:
        self.number, self.student_lr = state.position.round, state.student_lr()
        trace, cuda = state.trace[: state.position.step], state.trace.is_cuda
        self._trace = torch.empty(trace.shape, dtype=trace.dtype, pin_memory=cuda).copy_(trace, non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True)) if cuda else None

    def get(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._trace


class Rounds:
    """Runs the rounds of a run and reads their losses back.

    Losses are read back after the next round is queued, so that the device does not wait for the host. Call
    :meth:`drain` before saving or evaluating the state.

    Args:
        engine: runs the steps.
        finished: called with each finished round, in order.

    Attributes:
        images: number of synthetic training images of generator and student so far.
    """

    def __init__(self, engine: Engine, finished: Callable[[Round], None]) -> None:
        self.engine, self.state, self.images = engine, engine.state, 0
        self._finished = finished
        self._pending: _Readback | None = None
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the steps, in seconds."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def run(self, stopped: Callable[[], bool]) -> bool:
        """Queue the remaining steps of the round until ``stopped()`` is true. Return whether the round is complete.

        Raises:
            NonFiniteError: a step of the previous round was skipped.
        """
        state = self.state
        if self._since is None:
            self._since = time.perf_counter()
        with nvtx_range("round", str(state.position.round)):
            self.engine.start_round()
            first = state.position.step
            while state.position.step < state.steps_per_round and not stopped():
                self.engine.step()
        self.images += (state.position.step - first) * state.config.loop.batch_size
        before, self._pending = self._pending, _Readback(state)
        if before is not None:
            self._collect(before)
        whole = state.position.step == state.steps_per_round
        if whole:
            state.position.round += 1
            state.position.step = 0
        return whole

    def drain(self) -> None:
        """Wait for the device, read all losses back and check the state.

        Raises:
            NonFiniteError: a step was skipped, or the state contains NaN or infinite values.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._collect(pending)
        self.state.runtime.synchronize()
        if found := self.state.non_finite():
            position = self.state.position
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise NonFiniteError(
                f"before round {position.round}, step {position.step}: {', '.join(found[:5])}{more} not finite; "
                "the last good checkpoint is kept"
            )
        self._seconds, self._since = self.seconds, None

    def _collect(self, readback: _Readback) -> None:
        state, trace = self.state, readback.get()
        means = _means(state, readback.number, trace)
        if len(trace) < state.steps_per_round:
            return  # the round was stopped early; a resumed run records its means
        state.rounds.setdefault("round", []).append(readback.number)
        for name, value in means.items():
            state.rounds.setdefault(name, []).append(value)
        self._finished(Round(number=readback.number, means=means, student_lr=readback.student_lr))


def _means(state: DistillState, number: int, trace: Tensor) -> dict[str, float]:
    """Return the mean of each loss term over its steps, or raise NonFiniteError if a step was skipped."""
    first = state.config.loop.generator_steps
    means: dict[str, float] = {}
    for (side, trained), rows in zip(state.sides.items(), (trace[:first], trace[first:]), strict=True):
        names = trained.objective.names
        for step, row in enumerate(rows):
            bad = [name for name, value in zip(names, row, strict=False) if not math.isfinite(value)]
            if not bad and not row[-1]:
                bad = ["gradient"]
            if bad:
                raise NonFiniteError(
                    f"round {number}, {side} step {step}: {', '.join(bad)} not finite; "
                    "the step was skipped and the last good checkpoint is kept"
                )
        if len(rows):
            means |= {f"{side}/{name}": rows[:, column].mean().item() for column, name in enumerate(names)}
    return means
