"""Searches launch configurations: ``dfkd-fast bench --tune``.

A choice is what a case's kernels ask ``kernels/config.py`` for: kernel, architecture, dtype and sizes. Each choice is
tried in the case that makes the fewest choices, where it weighs most. A candidate must compute the results of the first
candidate within rounding; its time is that of the passes that use it, with a cold cache. A candidate that is faster
than the first by more than 3 %, twice, is saved in ``kernels/tuned.json`` with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.benchmarks.ops.cases import Benchmark, Case, Make, tensors
from dfkd_fast.benchmarks.ops.measure import Trial
from dfkd_fast.kernels import config
from dfkd_fast.report import environment, write_results

__all__ = ["GAIN", "Choice", "Tried", "choices", "decide", "difference", "save", "tune", "tune_all"]

GAIN = 0.03
"""By how much a candidate must be faster than the first one."""

Timer = Callable[["Choice"], float]
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


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The outcome of a choice; ``winner`` is None where the first candidate stays."""

    key: str
    first_us: float
    best_us: float
    tried: int
    refused: int
    winner: config.Launch | None


def _backward(outputs: Sequence[Tensor], inputs: Any) -> list[Tensor]:
    leaves = [tensor for tensor in tensors(inputs) if tensor.requires_grad]
    outputs = [output for output in outputs if output.requires_grad]
    if not leaves or not outputs:
        return []
    torch.manual_seed(0)
    grad_outputs = [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, leaves, grad_outputs, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def choices(benchmark: Benchmark, device: torch.device, *, shapes: Sequence[str] = ("paper", "large")) -> list[Choice]:
    """The choices that the kernels of an op's cases need, each once."""
    found: dict[str, tuple[int, Choice]] = {}
    for case in benchmark.cases:
        for dtype in case.dtypes if case.shapes in shapes else ():
            inputs = case.inputs(Make(device, dtype, seed=case.seed))
            with config.asked() as forward:
                outputs = tensors(case.call(*inputs, backend="triton"))
            with config.asked() as backward:
                _backward(outputs, inputs)
            del outputs
            seen = {
                "forward": {config.key(*each) for each in forward},
                "backward": {config.key(*each) for each in backward},
            }
            asked = {config.key(*each): each for each in (*forward, *backward)}
            for key, each in asked.items():
                if key not in found or len(asked) < found[key][0]:
                    passes = tuple(name for name, keys in seen.items() if key in keys)
                    found[key] = len(asked), Choice(key=key, asked=each, case=case, dtype=dtype, passes=passes)
    return [choice for _, choice in found.values()]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str:
    """How results differ by more than another order of summation explains, in the rounding of ``dtype``; or ""."""
    eps = max(torch.finfo(dtype).eps, 2e-6)
    for place, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"result {place} differs"
            continue
        a, b = a.detach().float(), b.detach().float()
        off = a - b
        # "not <=" because NaN must fail.
        rms = off.square().mean().sqrt() <= eps * b.square().mean().sqrt()
        if b.numel() and not (rms and off.abs().max() <= 8 * eps * b.abs().max()):
            return f"result {place} is off by {float(off.abs().max()):.3g}, of {float(b.abs().max()):.3g}"
    return ""


def _results(choice: Choice, device: torch.device) -> list[Tensor]:
    inputs = choice.case.inputs(Make(device, choice.dtype, seed=choice.case.seed))
    outputs = tensors(choice.case.call(*inputs, backend="triton"))
    return [*(output.detach() for output in outputs), *_backward(outputs, inputs)]


def _time(choice: Choice, device: torch.device) -> float:
    trial = Trial(choice.case, choice.dtype, device, lambda *inputs: choice.case.call(*inputs, backend="triton"))
    l2 = "cold" if device.type == "cuda" else "warm"
    return sum(trial.measure(which, l2).median_us for which in choice.passes)


def decide(
    choice: Choice, *, timer: Timer, results: Callable[[Choice], Sequence[Tensor]], report: Report = print
) -> Tried:
    """Try every candidate; ``report`` gets a line about each that is refused."""

    def timed(launch: config.Launch) -> float:
        with config.forced(choice.key, launch):
            return timer(choice)

    first, *others = choice.candidates()
    refused = 0
    with config.forced(choice.key, first):
        expected = list(results(choice))
    times = [(timed(first), first)]
    for launch in others:
        try:
            with config.forced(choice.key, launch):
                wrong = difference(results(choice), expected, choice.dtype)
            if not wrong:
                times.append((timed(launch), launch))
        except Exception as error:  # for example too much shared memory
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            refused += 1
            report(f"{choice.key}: {launch} refused: {wrong}")
    first_us = times[0][0]
    best_us, best = min(times, key=lambda pair: pair[0])
    if best is not first and best_us < (1 - GAIN) * first_us:
        best_us, first_us = timed(best), timed(first)  # luck rarely repeats
    won = best is not first and best_us < (1 - GAIN) * first_us
    return Tried(
        key=choice.key,
        first_us=first_us,
        best_us=best_us if won else first_us,
        tried=len(times),
        refused=refused,
        winner=best if won else None,
    )


def save(found: Sequence[Tried], where: str, path: Path | None = None) -> None:
    """Write winners to ``tuned.json`` and remove entries that no longer win. ``where`` is device and commit."""
    path = path or config.TUNED
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for each in found:
        table.pop(each.key, None)
        if each.winner is not None:
            tried = f"{each.tried + each.refused} tried"
            why = f"{each.best_us:.4g} us; the first candidate {each.first_us:.4g} us, {tried}, {where}"
            table[each.key] = config.entry(each.winner, why)
    write_results(path, dict(sorted(table.items())))
    config._tuned.cache_clear()


def tune(
    benchmark: Benchmark,
    device: torch.device,
    *,
    where: str,
    shapes: Sequence[str] = ("paper", "large"),
    report: Report = print,
    timer: Timer | None = None,
    path: Path | None = None,
) -> list[Tried]:
    """Tune every choice of an op's cases, and save each as it is decided. ``timer`` and ``path`` are for tests."""
    found = []
    for choice in choices(benchmark, device, shapes=shapes):
        if len(choice.candidates()) < 2:
            continue
        clock = timer or (lambda each: _time(each, device))
        tried = decide(choice, timer=clock, results=lambda each: _results(each, device), report=report)
        save([tried], where, path)
        found.append(tried)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def tune_all(chosen: Sequence[Benchmark], device: torch.device, shapes: str, report: Report) -> list[dict[str, Any]]:
    """Tune several ops; table rows for the terminal."""
    here = environment()
    where = f"{here['device']['name']}, {(here['commit'] or here['source'])[:12]}"
    return [
        {
            "choice": tried.key,
            "first, us": f"{tried.first_us:.4g}",
            "best, us": f"{tried.best_us:.4g}",
            "tried": tried.tried,
            "refused": tried.refused,
            "chosen": str(tried.winner.tile) if tried.winner else "the first",
        }
        for benchmark in chosen
        for tried in tune(benchmark, device, where=where, shapes=(shapes,), report=report)
    ]
