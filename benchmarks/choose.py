"""Write the table of fastest backends that dispatch reads, from committed results: ``make report`` does it.

Where an op's cases were measured both with Triton's kernels and with those of csrc/ (``cuda``), forward and backward
and with a cold cache, the faster is written down for the class of their shapes. Cases of one class are weighed by the
geometric mean of their ratios to Triton's times.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.cases import Make
from dfkd_fast.benchmarks.compile_kernels import benchmarks
from dfkd_fast.ops.choices import shape_class
from dfkd_fast.report import read_results

__all__ = ["choices", "write"]


def _times(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Microseconds of forward and backward by op, case and dtype, of ``triton`` and ``cuda``; where both are."""
    passes: dict[tuple[str, str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok" and row["l2"] == "cold" and row["backend"] in ("cuda", "triton"):
            passes[row["op"], row["case"], row["dtype"], row["backend"]][row["pass"]] = row["median_us"]
    found: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for (op, case, dtype, backend), each in passes.items():
        if {"forward", "backward"} <= each.keys():
            found[op, case, dtype][backend] = each["forward"] + each["backward"]
    return {key: times for key, times in found.items() if len(times) == 2}


def choices(content: dict[str, Any], arch: int) -> list[dict[str, Any]]:
    """Rows of the table from one result file.

    Args:
        content: of ``ops.json``.
        arch: what it was measured on, 90 for sm_90.
    """
    cases = {(benchmark.op, case.name): case for benchmark in benchmarks().values() for case in benchmark.cases}
    classes: dict[tuple[str, str, tuple[int, ...]], list[dict[str, float]]] = defaultdict(list)
    for (op, name, dtype), times in _times(content["rows"]).items():
        case = cases.get((op, name))
        if case is None:  # of a file of a user's own
            continue
        first = next(t for t in case.inputs(Make("meta", getattr(torch, dtype))) if isinstance(t, torch.Tensor))
        classes[op, dtype, shape_class(first)].append(times)
    rows = []
    for (op, dtype, shapes), each in sorted(classes.items()):
        ratio = statistics.geometric_mean(times["cuda"] / times["triton"] for times in each)
        rows.append(
            {
                "op": op,
                "arch": arch,
                "dtype": dtype,
                "shape_class": list(shapes),
                "backend": "cuda" if ratio < 1 else "triton",
                "cuda_over_triton": float(f"{ratio:.4g}"),
                "cases": len(each),
            }
        )
    return rows


def write(results: Path, table: Path) -> int:
    """Write the table from every device's results.

    Args:
        results: folder with one folder a device.
        table: the file; removed where nothing was measured.

    Returns:
        How many rows it has.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(results.glob("*/ops.json")):
        content = read_results(path)
        if content is None or not content["rows"]:
            continue
        capability = content["environments"][-1]["device"].get("capability")
        if capability is not None:
            major, _, minor = str(capability).partition(".")
            rows += choices(content, 10 * int(major) + int(minor))
    if not rows:
        table.unlink(missing_ok=True)
        return 0
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    table.write_text(f'{{"rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    return len(rows)
