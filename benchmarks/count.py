"""Counts launches and bytes of global memory of ops and whole steps, without a GPU: ``dfkd-fast bench --count``.

:mod:`~dfkd_fast.benchmarks.traffic` has the rule, and :mod:`~dfkd_fast.benchmarks.step.fake_cuda` traces the ops and
steps with the paper's shapes. ``op_counts.json`` has one row per case, dtype and ``backend``: ``eager`` (the
reference), ``compile`` (torch.compile of the best known PyTorch formulation) and ``triton``, forward and backward
together. ``step_counts.json`` has one row per step and variant. Each row has

- ``launches``, ``bytes_read`` and ``bytes_written``;
- ``flops`` and ``compulsory_bytes``: the least work. That of an op is in its case, and that of a step is counted in the
  steps of the eager engine (:func:`dfkd_fast.benchmarks.step.roofline.round_work`);
- ``least_us``: the larger of two times on an H100: bytes read and written at the copy bandwidth, and ``flops`` at the
  bf16 matrix rate;
- for a step, ``kernels``: the groups of kernels with the most bytes, by region of the step, source and name.

    python -m dfkd_fast.benchmarks.count --variants dfkd_fast
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dfkd_fast.benchmarks.count_tables import VARIANTS, op_lines, step_lines
from dfkd_fast.benchmarks.ops.cases import BENCHMARKS
from dfkd_fast.benchmarks.ops.measure import PeakRates
from dfkd_fast.benchmarks.results import Results
from dfkd_fast.benchmarks.step import fake_cuda
from dfkd_fast.benchmarks.traffic import Kernel, summary
from dfkd_fast.report import result_table

__all__ = ["FOLDER", "H100", "OP_KEY", "STEP_KEY", "count", "main", "op_rows", "step_rows"]

Row = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "results" / "counted"
OP_KEY, STEP_KEY = ("op", "case", "dtype", "backend"), ("step", "variant")
STEPS = ("generator_step", "student_step")

H100 = PeakRates(copy_gbps=2950.0, matmul_tflops=780.0)
_GROUPS = 25  # groups of kernels in a row


def _measures(kernels: Sequence[Kernel], compulsory: float | None, flops: float | None) -> Row:
    counted = {name: round(value) for name, value in summary(kernels).items()}
    least = H100.roofline_us(counted["bytes_read"] + counted["bytes_written"], flops or 0.0)
    return {**counted, "compulsory_bytes": compulsory, "flops": flops, "least_us": least}


def op_rows(op: str, report: dict[str, dict[str, list[Row]]]) -> list[Row]:
    """Return the rows of an op from the report of its trace."""
    cases, rows = {case.name: case for case in BENCHMARKS[op].cases if case.shapes == "paper"}, []
    for key, found in report.items():
        name, _, dtype = key.rpartition("/")
        work = cases[name].work(getattr(torch, dtype).itemsize)
        least = (work.forward_bytes + work.backward_bytes, work.forward_flops + work.backward_flops)
        for backend, kernels in found.items():
            key_of_row = dict(zip(OP_KEY, (op, name, dtype, backend), strict=True))
            rows.append({**key_of_row, **_measures([Kernel(**each) for each in kernels], *least)})
    return rows


def _groups(regions: dict[str, list[Kernel]]) -> list[Row]:
    groups: dict[tuple[str, str, str], list[Kernel]] = defaultdict(list)
    for region, kernels in regions.items():
        for kernel in kernels:
            groups[region, kernel.source, kernel.name].append(kernel)
    names = ("region", "source", "name")
    rows = [{**dict(zip(names, key, strict=True)), **summary(kernels)} for key, kernels in groups.items()]
    return sorted(rows, key=lambda row: row["bytes_read"] + row["bytes_written"], reverse=True)[:_GROUPS]


def step_rows(variant: str, report: dict[str, Any], work: dict[str, Row] | None) -> list[Row]:
    """Return a variant's row per step from the report of its trace, and the least ``work`` by step.

    Kernels outside of compiled regions are those of the second round, without initialization.

    Raises:
        RuntimeError: the trace failed.
    """
    if report["error"] is not None:
        raise RuntimeError(f"the trace of {variant} failed:\n{report['error']}")
    rows = []
    for step in STEPS:
        found = {"outside": report["kernels"][f"{step} again"]}
        for name, graph in report["graphs"].items():
            if name.startswith(f"{step}."):
                found[name.removeprefix(f"{step}.")] = graph["kernels"]
        regions = {region: [Kernel(**each) for each in kernels] for region, kernels in found.items()}
        least = (work[step]["bytes"], work[step]["flops"]) if work else (None, None)
        measures = _measures([each for kernels in regions.values() for each in kernels], *least)
        rows.append({"step": step, "variant": variant, **measures, "kernels": _groups(regions)})
    return rows


def count(
    ops: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    *,
    out: str | Path = FOLDER,
    trace: Callable[..., Any] = fake_cuda.trace,
) -> None:
    """Count ops and steps, write their rows and print tables; without ``ops`` and ``variants``, count all.

    Args:
        ops: names of ops.
        variants: names in ``VARIANTS``.
        out: folder of the result files. Rows of other ops and variants in it are kept.
        trace: tests replace it.

    Raises:
        ValueError: an unknown op or variant.
        RuntimeError: there is no C compiler, torch is built without CUDA, or a trace failed.
    """
    if not ops and not variants:
        ops, variants = tuple(BENCHMARKS), VARIANTS
    if unknown := sorted({*(ops or ())} - BENCHMARKS.keys() | {*(variants or ())} - {*VARIANTS}):
        known = ", ".join([*BENCHMARKS, *VARIANTS])
        raise ValueError(f"nothing to count for {', '.join(unknown)}; there are {known}")
    if shutil.which(fake_cuda.C_COMPILER) is None:
        raise RuntimeError(f"counting needs a C compiler, and there is no {fake_cuda.C_COMPILER}; set CC")
    if torch.version.cuda is None:
        raise RuntimeError(f"counting needs a torch built with CUDA (no GPU), and torch is {torch.__version__}")
    console, facts, rows = Console(), asdict(H100), []
    results = {
        "op": Results(Path(out) / "op_counts.json", key=OP_KEY, facts=facts),
        "step": Results(Path(out) / "step_counts.json", key=STEP_KEY, facts=facts),
    }
    work = {r["step"]: {"bytes": r["compulsory_bytes"], "flops": r["flops"]} for r in results["step"].rows}
    names = [name for name in VARIANTS if name in (variants or ())]  # eager first, which counts the least work
    for name in [*(f"ops:{op}" for op in ops or ()), *names]:
        start, (kind, _, op) = time.monotonic(), name.rpartition(":")
        report = trace(name, code=True)[name]
        if not kind:
            work = report.get("work") or work
        found = op_rows(op, report) if kind else step_rows(name, report, work)
        for row in found:
            results["op" if kind else "step"].add(row)
        rows += found
        console.print(f"{name}: {time.monotonic() - start:.0f} s", markup=False, highlight=False)
    if lines := op_lines([row for row in rows if "op" in row]):
        console.print(result_table(lines, "forward and backward"))
    for step in STEPS if names else ():
        console.print(result_table(step_lines(results["step"].rows, step), step))
    console.print(f"rows: {Path(out)}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count ops and steps."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", type=Path, default=FOLDER, help="folder of the result files")
    command.add_argument("--ops", nargs="+", choices=[*BENCHMARKS], help="only these ops")
    command.add_argument("--variants", nargs="+", choices=VARIANTS, help="only these variants of the steps")
    options = command.parse_args(arguments)
    count(options.ops, options.variants, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
