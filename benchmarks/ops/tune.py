"""Searches launch configurations: ``dfkd-fast bench --tune``.

A choice is a launch configuration that a case requests from ``kernels/config.py`` for a kernel, architecture, dtype and
sizes. Each choice is tried in the case with the fewest choices, where it has the largest effect. A candidate must
reproduce the default's results within rounding. Its time is that of the passes that use it, with a cold cache. If it is
faster than the default by more than 3 % in two measurements, ``kernels/tuned.json`` gets the candidate and the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.benchmarks.ops.cases import Benchmark, Case, Make, gradients, tensors
from dfkd_fast.benchmarks.ops.measure import Trial
from dfkd_fast.kernels import config
from dfkd_fast.report import environment, write_results

__all__ = ["GAIN", "Choice", "Tried", "choices", "decide", "difference", "tune"]

GAIN = 0.03
"""The least gain, as a share of the default's time."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One launch configuration: its key in ``tuned.json``, and the case and passes in which it is tried."""

    key: str
    asked: config.Asked
    case: Case
    dtype: torch.dtype
    passes: tuple[str, ...]

    def candidates(self) -> list[config.Launch]:
        kernel, arch, dtype, sizes = self.asked
        return config.candidates(kernel, arch, dtype, **sizes)

    def results(self, device: torch.device) -> list[Tensor]:
        """Return results and gradients of the case."""
        make = Make(device, self.dtype, seed=self.case.seed)
        inputs = self.case.inputs(make)
        results = tensors(self.case.call(*inputs, backend="triton"))
        grad_outputs = [make.tensor(*x.shape, dtype=x.dtype) for x in results if x.requires_grad]
        return [*(result.detach() for result in results), *gradients(results, inputs, grad_outputs)]

    def time_us(self, device: torch.device) -> float:
        """Return the microseconds of the passes, summed."""
        trial = Trial(self.case, self.dtype, device, lambda *inputs: self.case.call(*inputs, backend="triton"))
        return sum(trial.measure(which, "cold").median_us for which in self.passes)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The outcome of a choice. ``winner`` is None if the first candidate, the default, stays."""

    key: str
    first_us: float
    best_us: float
    tried: int
    refused: int
    winner: config.Launch | None

    def save(self, where: str, path: Path) -> None:
        """Write the winner to ``tuned.json``, or remove its entry if the default stays."""
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        table.pop(self.key, None)
        if self.winner is not None:
            times = f"{self.best_us:.4g} us; the first candidate {self.first_us:.4g} us"
            table[self.key] = config.entry(self.winner, f"{times}, {self.tried + self.refused} tried, {where}")
        write_results(path, dict(sorted(table.items())))
        config._tuned.cache_clear()

    def row(self) -> dict[str, Any]:
        """A table row for the terminal."""
        return {
            "choice": self.key,
            "first, us": f"{self.first_us:.4g}",
            "best, us": f"{self.best_us:.4g}",
            "tried": self.tried,
            "refused": self.refused,
            "chosen": str(self.winner.tile) if self.winner else "the first",
        }


def choices(benchmark: Benchmark, device: torch.device, shapes: str = "paper") -> list[Choice]:
    """List the choices that the cases of an op need, each once."""
    found: dict[str, tuple[int, Choice]] = {}
    for case in benchmark.cases:
        for dtype in case.dtypes if case.shapes == shapes else ():
            inputs = case.inputs(Make(device, dtype, seed=case.seed))
            with config.asked() as forward:
                results = tensors(case.call(*inputs, backend="triton"))
            with config.asked() as backward:
                gradients(results, inputs)
            del results
            asked = {config.key(*each): each for each in (*forward, *backward)}
            for key, each in asked.items():
                if key not in found or len(asked) < found[key][0]:
                    passes = tuple(
                        name for name, those in (("forward", forward), ("backward", backward)) if each in those
                    )
                    found[key] = len(asked), Choice(key=key, asked=each, case=case, dtype=dtype, passes=passes)
    return [choice for _, choice in found.values()]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Describe differences that another order of summation does not explain, in the precision of ``dtype``; else ""."""
    eps = max(torch.finfo(dtype).eps, 2e-6)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"result {index} differs"
            continue
        a, b = a.detach().float(), b.detach().float()
        off = a - b
        # "not <=" because NaN must fail.
        rms = off.square().mean().sqrt() <= eps * b.square().mean().sqrt()
        if b.numel() and not (rms and off.abs().max() <= 8 * eps * b.abs().max()):
            return f"result {index} is off by {float(off.abs().max()):.3g}, of {float(b.abs().max()):.3g}"
    return ""


def decide(choice: Choice, device: torch.device, report: Report = print) -> Tried:
    """Try every candidate; ``report`` gets a line about each one that is refused."""

    def with_launch(function: Callable[[torch.device], Any], launch: config.Launch) -> Any:
        with config.forced(choice.key, launch):
            return function(device)

    default, *others = choice.candidates()
    refused, expected = 0, with_launch(choice.results, default)
    times = [(with_launch(choice.time_us, default), default)]
    for launch in others:
        try:
            wrong = difference(with_launch(choice.results, launch), expected, choice.dtype)
            if not wrong:
                times.append((with_launch(choice.time_us, launch), launch))
        except Exception as error:  # for example too much shared memory
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            refused += 1
            report(f"{choice.key}: {launch} refused: {wrong}")
    first_us = times[0][0]
    best_us, best = min(times, key=lambda pair: pair[0])
    won = best_us < (1 - GAIN) * first_us
    if won:  # measure again: a lucky result rarely repeats
        best_us, first_us = with_launch(choice.time_us, best), with_launch(choice.time_us, default)
        won = best_us < (1 - GAIN) * first_us
    return Tried(
        key=choice.key,
        first_us=first_us,
        best_us=best_us if won else first_us,
        tried=len(times),
        refused=refused,
        winner=best if won else None,
    )


def tune(
    chosen: Sequence[Benchmark], device: torch.device, shapes: str, report: Report = print, path: Path = config.TUNED
) -> list[Tried]:
    """Tune every choice of the cases of some ops and save each as soon as it is decided."""
    here, found = environment(), []
    where = f"{here['device']['name']}, {(here['commit'] or here['source'])[:12]}"
    for choice in [choice for benchmark in chosen for choice in choices(benchmark, device, shapes)]:
        if len(choice.candidates()) > 1:
            found.append(decide(choice, device, report))
            found[-1].save(where, path)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found
