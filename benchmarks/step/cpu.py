"""Measures whole rounds on the CPU, in float32 and bfloat16, at two image sizes, with one thread and with all.

Variants of one loop take turns in one process, round by round, so that a change of the machine's speed affects all:

- ``peer``: the loop as in published code (:mod:`~dfkd_fast.benchmarks.step.peer_loop`), in NCHW;
- ``eager``: this project's steps with plain networks and the reference ops, channels-last;
- ``nchw``: ``dfkd_fast`` in NCHW;
- ``dfkd_fast``: the default engine.

All have networks, generator, losses and precision in common. For ``dfkd_fast``, a profile also gives the share of
convolutions in the time of a round and their rate, next to the highest rate of a convolution on this machine.

    python -m dfkd_fast.benchmarks.step.cpu --out step_cpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from dfkd_fast import ops
from dfkd_fast.benchmarks.results import Results, measured_on
from dfkd_fast.benchmarks.step.variants import SIZES, Loop, Size, build, engine_loop, peer_loop, run_round
from dfkd_fast.config import Precision
from dfkd_fast.engine import EagerEngine
from dfkd_fast.engine.networks import eager_networks
from dfkd_fast.models import frozen
from dfkd_fast.report import markdown_table, read_results, result_table

__all__ = ["VARIANTS", "Cell", "main", "measure", "step_cpu_rows", "step_cpu_section"]

VARIANTS = ("peer", "eager", "nchw", "dfkd_fast")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
KEY = ("size", "precision", "threads", "variant")
# Without AVX-512, PyTorch runs bfloat16 convolutions as the "slow" ones instead of in oneDNN.
_CONVOLUTIONS = (
    "aten::mkldnn_convolution",
    "aten::convolution_backward",
    "aten::_slow_conv2d_forward",
    "aten::_slow_conv2d_backward",
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A setting in which all variants are compared."""

    size: str
    precision: Precision
    threads: int


@contextlib.contextmanager
def _loops(size: Size, precision: Precision) -> Iterator[dict[str, Loop]]:
    loops: dict[str, Loop] = {}
    with contextlib.ExitStack() as stack:
        for variant in VARIANTS:
            channels_last = variant in ("eager", "dfkd_fast")
            device = torch.device("cpu")
            state, teacher = build(size, size.batch, device, precision=precision, channels_last=channels_last)
            if variant == "peer":
                loops[variant] = peer_loop(state)
                continue
            stack.enter_context(frozen(teacher))
            loops[variant] = engine_loop(EagerEngine(state, eager_networks(state) if variant == "eager" else None))
        yield loops


def _seconds(loop: Loop, variant: str, steps: tuple[int, int]) -> tuple[float, float]:
    """Run a round and return the seconds of its generator steps and of its student steps."""
    marks: list[float] = []
    with ops.backend("reference") if variant in ("peer", "eager") else contextlib.nullcontext():
        run_round(loop, steps, lambda: marks.append(time.perf_counter()))
    marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


def _convolutions(loop: Loop, steps: tuple[int, int]) -> tuple[float, float]:
    """Return the share of convolutions in the time of a round, and their operations per second."""
    with FlopCounterMode(display=False) as counter:
        run_round(loop, steps)
    flops = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        run_round(loop, steps)
        wall = time.perf_counter() - start
    # Only what the convolutions compute, without changes of memory format, counts as theirs.
    seconds = 1e-6 * sum(e.self_cpu_time_total for e in profiler.key_averages() if e.key in _CONVOLUTIONS)
    return seconds / wall, flops / seconds


def _peak(dtype: torch.dtype) -> float:
    """Return the highest rate, in operations per second, of 3 x 3 convolutions that fit the cache."""
    rates = []
    for channels, side in itertools.product((128, 256), (8, 16)):
        x = torch.randn(16, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            times.append(time.perf_counter() - start)
        rates.append(2 * x.numel() * channels * 9 / min(times))
    return max(rates)


def measure(cell: Cell, *, rounds: int) -> list[dict[str, Any]]:
    """Measure all variants in a cell.

    Args:
        cell: size, precision and threads.
        rounds: number of rounds per variant, after one to warm up.

    Returns:
        A row per variant with medians in milliseconds.

    Raises:
        RuntimeError: a loss was not finite.
    """
    size, before = SIZES[cell.size], torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        with _loops(size, cell.precision) as loops:
            for variant, loop in loops.items():
                _seconds(loop, variant, size.steps)
            times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
            for _, (variant, loop) in itertools.product(range(rounds), loops.items()):
                times[variant].append(_seconds(loop, variant, size.steps))
            rows = []
            for variant, loop in loops.items():
                if not torch.isfinite(loop.losses()).all():
                    raise RuntimeError(f"{variant}: a loss or a gradient was not finite")
                whole = [1e3 * sum(each) for each in times[variant]]
                row: dict[str, Any] = {"size": cell.size, "precision": cell.precision, "threads": cell.threads}
                row |= {"variant": variant, "image": size.image, "batch": size.batch, "rounds": rounds}
                row |= {"round_ms": statistics.median(whole), "least_ms": min(whole), "most_ms": max(whole)}
                for i, kind in enumerate(("generator", "student")):
                    row[f"{kind}_step_ms"] = 1e3 * statistics.median(each[i] for each in times[variant]) / size.steps[i]
                rows.append(row)
            share, rate = _convolutions(loops["dfkd_fast"], size.steps)
            dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32
            rows[-1] |= {"convolutions": share, "convolution_gflops": rate / 1e9, "peak_gflops": _peak(dtype) / 1e9}
            return rows
    finally:
        torch.set_num_threads(before)


def step_cpu_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a line per cell with the times of all variants and the speed-up over ``peer``."""
    table = []
    for cell in dict.fromkeys(tuple(row[name] for name in KEY[:3]) for row in rows):
        by = {row["variant"]: row for row in rows if tuple(row[name] for name in KEY[:3]) == cell}
        if by.keys() != {*VARIANTS}:
            continue
        ours, peer = by["dfkd_fast"], by["peer"]
        line = {"image": f"{ours['image']} x {ours['image']}", "precision": cell[1], "threads": str(cell[2])}
        line |= {f"{variant}, ms": f"{by[variant]['round_ms']:,.0f}" for variant in VARIANTS}
        for title, name in (("generator step", "generator_step_ms"), ("student step", "student_step_ms")):
            line[f"{title}, speed-up"] = f"{peer[name] / ours[name]:.2f} x"
        line["round, speed-up"] = f"{peer['round_ms'] / ours['round_ms']:.2f} x"
        line["convolutions"] = f"{ours['convolutions']:.0%}"
        line["their rate / peak"] = f"{ours['convolution_gflops'] / ours['peak_gflops']:.0%}"
        table.append(line)
    return table


def step_cpu_section(content: dict[str, Any], folder: str) -> str:
    """Return the tables for docs/performance.md from ``step_cpu.json``."""
    del folder
    rows, notes = content["rows"], []
    for precision in PRECISIONS:
        of = {variant: {} for variant in VARIANTS}  # type: dict[str, dict[tuple[str, int], float]]
        for row in rows:
            if row["precision"] == precision:
                of[row["variant"]][row["size"], row["threads"]] = row["round_ms"]
        for variant in VARIANTS[:-1]:
            ratios = [ms / of["dfkd_fast"][cell] for cell, ms in of[variant].items() if cell in of["dfkd_fast"]]
            if ratios:
                mean = math.exp(statistics.fmean(map(math.log, ratios)))
                notes.append(
                    f"| `{variant}` | {precision} | {mean:.2f} x | {min(ratios):.2f} x to {max(ratios):.2f} x |"
                )
    cpu = content["environments"][-1]["cpu"]
    rounds = ", ".join(sorted({str(row["rounds"]) for row in rows}))
    return "\n".join(
        [
            *markdown_table(step_cpu_rows(rows)),
            "",
            "Speed-up of a round of `dfkd_fast`, geometric mean and range over the lines above:",
            "",
            "| over | precision | speed-up | range |",
            "|---|---|---:|---:|",
            *notes,
            "",
            f"Medians of {rounds} rounds per variant. CPU: {cpu}; measured on: {measured_on(content)}.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cells, write their rows and print the table."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, required=True, help="result file")
    command.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["cifar32", "cifar64"])
    command.add_argument("--rounds", type=int, default=3, help="rounds per variant")
    options = command.parse_args(arguments)
    threads = sorted({1, len(os.sched_getaffinity(0))})
    results, console = Results(options.out, key=KEY), Console(width=max(Console().width, 170))  # for the table
    for size, precision, count in itertools.product(options.sizes, PRECISIONS, threads):
        for row in measure(Cell(size=size, precision=precision, threads=count), rounds=options.rounds):
            results.add(row)
            console.print(
                f"{size}, {precision}, threads: {count}, {row['variant']}: {row['round_ms']:,.0f} ms per round",
                highlight=False,
            )
    content = read_results(options.out)
    assert content is not None
    console.print(result_table(step_cpu_rows(content["rows"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
