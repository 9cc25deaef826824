"""Tables and a plot from ``ops.json``, and ``choices.json``, the table of fastest backends that dispatch reads."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Make, tensors
from dfkd_fast.benchmarks.results import commits
from dfkd_fast.ops.choices import shape_class
from dfkd_fast.report import markdown_table, read_results

__all__ = ["choices", "ops_section", "save_plot", "speedups", "terminal_rows", "write_choices"]

Row = dict[str, Any]

_KERNELS = ("triton", "cuda")
_COMPILED = ("compile", "compile_max_autotune")


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Group rows by (op, case, dtype, pass, l2), then by backend."""
    found: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["op"], row["case"], row["dtype"], row["pass"], row["l2"]][row["backend"]] = row
    return found


def _fastest(group: dict[str, Row], backends: Iterable[str]) -> Row | None:
    timed = [group[name] for name in backends if name in group and group[name]["median_us"] is not None]
    return min(timed, key=lambda row: row["median_us"], default=None)


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["median_us"] is not None:
        return _us(row["median_us"])
    return row["status"] if row["status"] in ("out of memory", "not supported") else "failed"


def _backends(rows: Iterable[Row]) -> list[str]:
    order = ["reference", *_COMPILED, *_KERNELS]
    named = {row["backend"] for row in rows}
    return [name for name in order if name in named] + sorted(named - set(order))


def terminal_rows(rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
    """Return for each op one line per case, pass and cache: microseconds by backend and the share of the roofline.

    Share and peak memory are those of the fastest kernel of this project, or of the fastest backend without one.
    """
    names = _backends(rows)
    tables: dict[str, list[dict[str, str]]] = defaultdict(list)
    for (op, case, dtype, which, l2), group in _grouped(rows).items():
        best = _fastest(group, _KERNELS) or _fastest(group, names)
        tables[op].append(
            {
                "case": case if dtype == "bfloat16" else f"{case} {dtype}",
                "pass": which,
                "L2": l2,
                **{name.replace("_", " "): _cell(group.get(name)) for name in names},
                "roofline": _us(next(iter(group.values()))["roofline_us"]),
                "share": f"{best['fraction']:.0%}" if best else "",
                "MiB": f"{best['peak_bytes'] / 2**20:,.1f}" if best and best["peak_bytes"] is not None else "",
            }
        )
    return tables


def save_plot(rows: Sequence[Row], path: Path) -> Path:
    """Plot the share of the roofline by backend, one panel per op, with a cold cache if it was measured."""
    from matplotlib.figure import Figure

    l2 = "cold" if any(row["l2"] == "cold" for row in rows) else "warm"
    groups, names = _grouped(row for row in rows if row["l2"] == l2), _backends(rows)
    ops = list(dict.fromkeys(key[0] for key in groups))
    figure = Figure(figsize=(14, 1 + 4 * max(len(ops), 1)), layout="constrained")
    for panel, op in enumerate(ops, start=1):
        axes = figure.add_subplot(len(ops), 1, panel)
        cases = [key for key in groups if key[0] == op]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            heights = [groups[key].get(name, {}).get("fraction") or 0.0 for key in cases]
            centers = [i + (index - (len(names) - 1) / 2) * width for i in range(len(cases))]
            axes.bar(centers, heights, width, label=name)
        axes.set_xticks(range(len(cases)), [" ".join(key[1:4]) for key in cases], fontsize=7, rotation=90)
        axes.set_ylabel(f"roofline / time, {l2} L2")
        axes.set_title(op, loc="left")
        axes.axhline(1.0, color="0.5", linewidth=0.8)
        if panel == 1:
            axes.legend(fontsize=8, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def speedups(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return the speed-up compared with the faster torch.compile, by op and pass, as geometric means over cases.

    They include the paper's shapes in bfloat16 with a cold cache for which both were timed.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    paper = ("paper", "bfloat16", "cold")
    for (op, _, _, which, _), group in _grouped(
        row for row in rows if (row["shapes"], row["dtype"], row["l2"]) == paper
    ).items():
        kernel, compiled = _fastest(group, _KERNELS), _fastest(group, _COMPILED)
        if kernel is not None and compiled is not None:
            found[op][which].append(compiled["median_us"] / kernel["median_us"])
    return {op: {which: statistics.geometric_mean(v) for which, v in each.items()} for op, each in found.items()}


def ops_section(content: dict[str, Any], folder: str) -> str:
    """Return one device's part of docs/benchmarks.md, from its ``ops.json``."""
    rows = content["rows"]
    blocks = [content["environments"][index] for index in sorted({row["environment"] for row in rows})]
    last = blocks[-1]
    parts = [
        f"## {folder}",
        f"{last['device']['name']}, driver {last['device'].get('driver')}, torch {last['torch']}, triton "
        f"{last['triton']}, CUDA {last['cuda']}; commit {commits(blocks)}; {rows[-1]['date'][:10]}. Measured peaks: "
        f"copy {last['copy_gbps']:,.0f} GB/s, bf16 matmul {last['matmul_tflops']:,.0f} TFLOP/s.",
    ]
    means = speedups(rows)
    if means:
        passes = ("forward", "backward", "both")
        table = [{"op": op, **{p: f"{m[p]:.2f} x" if p in m else "" for p in passes}} for op, m in means.items()]
        parts += [
            "Speed-up over the faster torch.compile, geometric mean over the paper's shapes, bf16, cold L2:",
            "\n".join(markdown_table(table)),
        ]
    for op, lines in terminal_rows(rows).items():
        parts += [f"### {op}", "\n".join(markdown_table(lines))]
    return "\n\n".join(parts)


def choices(content: dict[str, Any], arch: int) -> list[dict[str, Any]]:
    """Return the faster of Triton and CUDA by op, dtype and class of shapes. ``arch`` 90 is sm_90.

    ``content``: a device's ``ops.json``. The ratio of a case is its time (forward plus backward, cold cache) with CUDA
    divided by that with Triton. A class of shapes has the geometric mean of its cases' ratios.
    """
    ratios: dict[tuple[str, str, tuple[int, ...]], list[float]] = defaultdict(list)
    times: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in content["rows"]:
        if row["status"] == "ok" and row["l2"] == "cold" and row["pass"] != "both":
            times[row["op"], row["case"], row["dtype"]][row["backend"]].append(row["median_us"])
    for (op, name, dtype), each in times.items():
        case = next((case for case in BENCHMARKS[op].cases if case.name == name), None)
        if case is not None and all(len(each[backend]) == 2 for backend in _KERNELS):
            first = tensors(case.inputs(Make("meta", getattr(torch, dtype))))[0]
            ratios[op, dtype, shape_class(first)].append(sum(each["cuda"]) / sum(each["triton"]))
    return [
        {
            "op": op,
            "arch": arch,
            "dtype": dtype,
            "shape_class": list(shapes),
            "backend": "cuda" if (mean := statistics.geometric_mean(values)) < 1 else "triton",
            "cuda_over_triton": float(f"{mean:.4g}"),
            "cases": len(values),
        }
        for (op, dtype, shapes), values in sorted(ratios.items())
    ]


def write_choices(results: Path, table: Path) -> int:
    """Write ``choices.json`` from the results of all devices and return its number of rows; without rows, remove it."""
    rows: list[dict[str, Any]] = []
    for path in sorted(results.glob("*/ops.json")):
        content = read_results(path)
        capability = content and content["rows"] and content["environments"][-1]["device"].get("capability")
        if content and capability:
            rows += choices(content, int(capability.replace(".", "")))
    if not rows:
        table.unlink(missing_ok=True)
        return 0
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    table.write_text(f'{{"rows": [\n  {lines}\n]}}\n', encoding="utf-8")
    return len(rows)
