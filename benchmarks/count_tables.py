"""Tables and plots of counted launches and bytes, from ``op_counts.json`` and ``step_counts.json``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.results import commits
from dfkd_fast.report import markdown_table

__all__ = [
    "BACKENDS",
    "VARIANTS",
    "kernel_lines",
    "op_counts_section",
    "op_lines",
    "save_op_plot",
    "save_step_plot",
    "step_counts_section",
    "step_lines",
]

Row = dict[str, Any]

BACKENDS = ("eager", "compile", "triton")
VARIANTS = ("eager", "peer", "compile", "dfkd_fast")
"""Variants of the steps that are counted. A row of another one, such as ``before``, is kept."""


def _moved(row: Row) -> float:
    return row["bytes_read"] + row["bytes_written"]


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _ratio(row: Row, other: Row | None) -> str:
    return "" if other is None else f"{_moved(row) / _moved(other):.2f}"


def _cases(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The rows of each op, case and dtype by backend, ordered by op."""
    cases: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["op"]):
        cases[row["op"], row["case"], row["dtype"]][row["backend"]] = row
    return list(cases.values())


def op_lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return one line per op, case and dtype."""
    lines, before = [], ""
    for case in _cases(rows):
        row, compiled = case["triton"], case["compile"]
        lines.append(
            {
                "op": row["op"] if row["op"] != before else "",
                "case": row["case"] + (f" {row['dtype']}" if row["dtype"] != "bfloat16" else ""),
                **{f"launches, {name}": f"{case[name]['launches']:,}" for name in BACKENDS},
                **{f"MB, {name}": _number(_moved(case[name]) / 1e6) for name in BACKENDS},
                "triton / compile": _ratio(row, compiled),
                "compulsory MB": _number(row["compulsory_bytes"] / 1e6),
                "least us": _number(row["least_us"]),
            }
        )
        before = row["op"]
    return lines


def _variants(rows: Sequence[Row], step: str) -> dict[str, Row]:
    """The rows of a step by variant, ``dfkd_fast`` last."""
    found = {row["variant"]: row for row in rows if row["step"] == step}
    order = ("eager", "peer", "compile", *sorted(found.keys() - {*VARIANTS}), "dfkd_fast")
    return {name: found[name] for name in order if name in found}


def step_lines(rows: Sequence[Row], step: str) -> list[dict[str, str]]:
    """Return one line per variant of a step."""
    variants = _variants(rows, step)
    return [
        {
            "variant": name,
            "launches": f"{row['launches']:,}",
            "GB read": f"{row['bytes_read'] / 1e9:.2f}",
            "GB written": f"{row['bytes_written'] / 1e9:.2f}",
            "GB": f"{_moved(row) / 1e9:.2f}",
            **{f"/ {other}": _ratio(row, variants.get(other)) for other in ("compile", "before") if other in variants},
            "least ms": f"{row['least_us'] / 1e3:.2f}",
        }
        for name, row in variants.items()
    ]


def kernel_lines(row: Row) -> list[dict[str, str]]:
    """Return one line per group of kernels of a step's row, largest first."""
    return [
        {
            "region": group["region"],
            "source": group["source"],
            "kernels": f"`{group['name']}`",
            "launches": f"{group['launches']:,}",
            "MB": _number(_moved(group) / 1e6),
            "share": f"{_moved(group) / _moved(row):.1%}",
        }
        for group in row["kernels"]
    ]


def _counted_at(content: dict[str, Any]) -> str:
    blocks = [content["environments"][index] for index in sorted({row["environment"] for row in content["rows"]})]
    rates = f"{content['copy_gbps'] / 1e3:.2f} TB/s and {content['matmul_tflops']:,.0f} TFLOP/s"
    return f"Counted with torch {blocks[-1]['torch']}, commit {commits(blocks)}; least times at {rates}."


def op_counts_section(content: dict[str, Any], folder: str) -> str:
    """Return the table of docs/benchmarks.md from ``op_counts.json``."""
    plot = "![Bytes of each op with each backend, relative to the compulsory bytes](images/op_bytes.svg)"
    return "\n\n".join([plot, "\n".join(markdown_table(op_lines(content["rows"]))), _counted_at(content)])


def step_counts_section(content: dict[str, Any], folder: str) -> str:
    """Return the tables of docs/performance.md from ``step_counts.json``."""
    rows = content["rows"]
    parts = ["![Gigabytes per step by variant](images/step_bytes.svg)"]
    for step in dict.fromkeys(row["step"] for row in rows):
        variants = _variants(rows, step)
        parts += [f"### One {step.replace('_', ' ')}", "\n".join(markdown_table(step_lines(rows, step)))]
        row = variants.get("dfkd_fast", next(iter(variants.values())))
        notes = []
        if row["flops"] is not None:
            notes.append(
                f"Compulsory work: {row['compulsory_bytes'] / 1e9:.2f} GB and {row['flops'] / 1e12:.2f} TFLOP."
            )
        if "before" in variants:
            notes.append(f"`before` is `dfkd_fast` at commit {variants['before']['commit']}.")
        parts += [" ".join(notes)] * bool(notes)
        if "dfkd_fast" in variants:
            share = sum(map(_moved, row["kernels"])) / _moved(row)
            intro = f"The kernels of `dfkd_fast` with the most bytes, {share:.0%} of all, by region of the step:"
            parts += [intro, "\n".join(markdown_table(kernel_lines(row)))]
    return "\n\n".join([*parts, _counted_at(content)])


def _save(figure: Any, path: Path) -> Path:
    """Save an SVG that is the same each time."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Creator": None, "Date": None})
    return path


def save_op_plot(content: dict[str, Any], path: Path) -> Path:
    """Plot the bytes of each op with each backend, summed over its bfloat16 cases, relative to the compulsory bytes."""
    from matplotlib.figure import Figure

    cases: dict[str, list[dict[str, Row]]] = defaultdict(list)
    for case in _cases([row for row in content["rows"] if row["dtype"] == "bfloat16"]):
        cases[case["triton"]["op"]].append(case)
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(BACKENDS):
        least = [sum(case[name]["compulsory_bytes"] for case in each) for each in cases.values()]
        moved = [sum(_moved(case[name]) for case in each) for each in cases.values()]
        places = [place + (index - 1) * 0.27 for place in range(len(cases))]
        axes.barh(places, [a / b for a, b in zip(moved, least, strict=True)], 0.27, label=name)
    axes.set_yticks(range(len(cases)), [*cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="0.5", linewidth=0.8)
    axes.set_xlabel("bytes / compulsory bytes")
    axes.legend(fontsize=8)
    return _save(figure, path)


def save_step_plot(content: dict[str, Any], path: Path) -> Path:
    """Plot the gigabytes of each step by variant."""
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys(row["step"] for row in content["rows"]))
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    for axes, step in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        variants = _variants(content["rows"], step)
        for kind, color, start in (("read", "tab:blue", 0.0), ("written", "tab:orange", 1.0)):
            widths = [row[f"bytes_{kind}"] / 1e9 for row in variants.values()]
            lefts = [start * row["bytes_read"] / 1e9 for row in variants.values()]
            axes.barh([*variants], widths, left=lefts, color=color, label=kind)
        axes.invert_yaxis()
        axes.set_title(step.replace("_", " "), loc="left", fontsize=10)
        axes.set_xlabel("GB")
    figure.axes[-1].legend(fontsize=8)
    return _save(figure, path)
