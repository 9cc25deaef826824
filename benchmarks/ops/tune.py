"""Finds launch configurations: tries every candidate of ``kernels/config.py`` on the device and writes the winners.

What a case's kernels ask for (kernel, architecture, dtype, sizes) is written down while the case runs. Each such choice
is tried where it weighs most: in the case that makes the fewest of them. A candidate must give what the first one
gives, within rounding; then its time counts, over those passes that ask for it, with a cold cache. It becomes an entry
of ``tuned.json``, with the reason, if it beats the first candidate by more than 3 % twice.
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

__all__ = ["GAIN", "Choice", "Tried", "choices", "decide", "difference", "tune", "tune_all"]

GAIN = 0.03
"""By how much a candidate must beat the first one."""

Timer = Callable[["Choice"], float]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One launch configuration to be settled.

    Attributes:
        key: its name in ``tuned.json``.
        asked: kernel, architecture, dtype and sizes.
        case: the case that it is tried in.
        dtype: of the case.
        passes: those that ask for it.
    """

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
    """What came of a choice; ``winner`` is None where the first candidate stays."""

    key: str
    first_us: float
    best_us: float
    tried: int
    refused: int
    winner: config.Launch | None


def _backward(outputs: Sequence[Tensor], inputs: Any) -> list[Tensor]:
    wanted = [tensor for tensor in tensors(inputs) if tensor.requires_grad]
    outputs = [output for output in outputs if output.requires_grad]
    if not wanted or not outputs:
        return []
    torch.manual_seed(0)
    upstream = [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def choices(benchmark: Benchmark, device: torch.device, *, shapes: Sequence[str] = ("paper", "large")) -> list[Choice]:
    """What the kernels of an op's cases ask for, each once."""
    found: dict[str, tuple[int, Choice]] = {}
    for case in benchmark.cases:
        if case.shapes not in shapes:
            continue
        for dtype in case.dtypes:
            inputs = case.inputs(Make(device, dtype, seed=case.seed))
            with config.asked() as forward:
                outputs = tensors(case.call(*inputs, backend="triton"))
            with config.asked() as backward:
                _backward(outputs, inputs)
            del outputs
            asked = {config.key(*each): each for each in (*forward, *backward)}
            for key, each in asked.items():
                passes = tuple(
                    name
                    for name, seen in (("forward", forward), ("backward", backward))
                    if key in {config.key(*other) for other in seen}
                )
                if key not in found or len(asked) < found[key][0]:
                    choice = Choice(key=key, asked=each, case=case, dtype=dtype, passes=passes)
                    found[key] = len(asked), choice
    return [choice for _, choice in found.values()]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str:
    """How results differ by more than another order of summation explains; empty where they do not.

    Args:
        actual: of a candidate.
        expected: of the first.
        dtype: of the inputs, in whose rounding the difference is measured.
    """
    eps = max(torch.finfo(dtype).eps, 2e-6)
    for place, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"result {place} differs"
            continue
        a, b = a.detach().float(), b.detach().float()
        off = a - b
        # Not written as a > b: NaN must fail.
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
    choice: Choice,
    *,
    timer: Timer,
    results: Callable[[Choice], Sequence[Tensor]],
    report: Callable[[str], None] = print,
) -> Tried:
    """Try every candidate.

    Args:
        choice: what to settle.
        timer: microseconds of the choice's passes with what ``config.choose`` now gives.
        results: outputs and gradients likewise.
        report: given a line about each candidate that is refused.
    """
    first, *others = choice.candidates()
    refused = 0

    def timed(launch: config.Launch) -> float:
        with config.forced(choice.key, launch):
            return timer(choice)

    with config.forced(choice.key, first):
        expected = results(choice)
    times = [(timed(first), first)]
    for launch in others:
        try:
            with config.forced(choice.key, launch):
                wrong = difference(results(choice), expected, choice.dtype)
            if not wrong:
                times.append((timed(launch), launch))
        except Exception as error:  # too much shared memory, for one
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            refused += 1
            report(f"{choice.key}: {launch} refused: {wrong}")
    first_us = times[0][0]
    best_us, best = min(times, key=lambda pair: pair[0])
    if best is not first and best_us < (1 - GAIN) * first_us:
        # Again, in turn: what was luck the first time is rarely so twice.
        best_us, first_us = timed(best), timed(first)
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
    """Write winners to ``tuned.json``, and take out entries that the first candidate now equals.

    Args:
        found: what was settled.
        where: device and commit, for the reason.
        path: the file; None is that of ``kernels/config.py``.
    """
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
    report: Callable[[str], None] = print,
    timer: Timer | None = None,
    path: Path | None = None,
) -> list[Tried]:
    """Settle every launch configuration of an op's cases and save what was found, choice by choice.

    Args:
        benchmark: the op.
        device: to measure on; its architecture is what the choices hold for.
        where: device and commit, for the reason.
        shapes: of which cases.
        report: given a line about what is refused.
        timer: replaces the timing on the device.
        path: of the table; None is ``kernels/tuned.json``.
    """
    found = []
    for choice in choices(benchmark, device, shapes=shapes):
        if len(choice.candidates()) < 2:
            continue
        tried = decide(
            choice,
            timer=timer or (lambda each: _time(each, device)),
            results=lambda each: _results(each, device),
            report=report,
        )
        save([tried], where, path)
        found.append(tried)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def tune_all(
    chosen: Sequence[Benchmark], device: torch.device, shapes: str, report: Callable[[str], None]
) -> list[dict[str, Any]]:
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
