"""What comes of ``ops.json``: a table for the terminal, a plot, and the text of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.targets import DEVICE, NOTES, TARGETS

__all__ = ["means", "ops_page", "save_plot", "speedups", "terminal_rows"]

Row = dict[str, Any]
Group = dict[str, Row]  # of one case and pass, by backend

_OURS = ("triton", "cuda")
_COMPILED = ("compile", "compile_max_autotune")
_PASSES = ("forward", "backward", "both")


def _grouped(rows: Iterable[Row], l2: str | None = None) -> dict[tuple[str, ...], Group]:
    """Rows by (op, case, dtype, pass, l2), then by backend."""
    found: dict[tuple[str, ...], Group] = {}
    for row in rows:
        if l2 is None or row["l2"] == l2:
            key = (row["op"], row["case"], row["dtype"], row["pass"], row["l2"])
            found.setdefault(key, {})[row["backend"]] = row
    return found


def _fastest(group: Group, backends: Iterable[str]) -> Row | None:
    timed = [group[name] for name in backends if name in group and group[name]["median_us"] is not None]
    return min(timed, key=lambda row: row["median_us"], default=None)


def speedups(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """How many times faster than the faster torch.compile: by (op, pass), then by case.

    Of the paper's shapes in bfloat16 with a cold L2. A case counts where both have a time.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    paper = [row for row in rows if row["shapes"] == "paper" and row["dtype"] == "bfloat16"]
    for (op, case, _, which, _), group in _grouped(paper, "cold").items():
        ours, compiled = _fastest(group, _OURS), _fastest(group, _COMPILED)
        if ours is not None and compiled is not None:
            found.setdefault((op, which), {})[case] = compiled["median_us"] / ours["median_us"]
    return found


def means(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Geometric means of :func:`speedups` by (op, pass); under the op "all ops", over all cases of all of them."""
    found = speedups(rows)
    result = {key: statistics.geometric_mean(cases.values()) for key, cases in found.items()}
    for which in _PASSES:
        everything = [value for (_, each), cases in found.items() if each == which for value in cases.values()]
        if everything:
            result["all ops", which] = statistics.geometric_mean(everything)
    return result


def _us(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(row: Row | None) -> str:
    """A time, or why there is none."""
    if row is None:
        return ""
    if row["median_us"] is not None:
        return _us(row["median_us"])
    return row["status"] if row["status"] in ("out of memory", "no gradient", "not served") else "failed"


def _mib(row: Row | None) -> str:
    return "" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f}"


def _backends(rows: Iterable[Row]) -> list[str]:
    """Those that rows name, in the order of the columns."""
    order = ["reference", *_COMPILED, *_OURS]
    named = {row["backend"] for row in rows}
    return [name for name in order if name in named] + sorted(named - set(order))


def terminal_rows(rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
    """For each op, one line a case, pass and cache: microseconds by provider, and the fraction of the floor.

    The fraction and the peak are those of the fastest of the project's own backends, or of all where none was measured.
    """
    names = _backends(rows)
    tables: dict[str, list[dict[str, str]]] = {}
    for (op, case, dtype, which, l2), group in _grouped(rows).items():
        best = _fastest(group, _OURS) or _fastest(group, names)
        line = {"case": case if dtype == "bfloat16" else f"{case} {dtype}", "pass": which, "L2": l2}
        line |= {name.replace("compile_max", "max").replace("_", " "): _cell(group.get(name)) for name in names}
        line["floor"] = _us(next(iter(group.values()))["floor_us"])
        line["of it"] = f"{best['fraction']:.0%}" if best else ""
        line["MiB"] = _mib(best)
        tables.setdefault(op, []).append(line)
    return tables


def save_plot(rows: Sequence[Row], path: Path) -> Path:
    """Draw the fraction of the floor that each provider reaches, one panel an op, with a cold cache where measured."""
    from matplotlib.figure import Figure

    l2 = "cold" if any(row["l2"] == "cold" for row in rows) else "warm"
    groups = _grouped(rows, l2)
    ops, names = list(dict.fromkeys(key[0] for key in groups)), _backends(rows)
    most = max((sum(key[0] == op for key in groups) for op in ops), default=1)
    figure = Figure(figsize=(max(12, 0.45 * most), 1 + 4 * max(len(ops), 1)), layout="constrained")
    for place, op in enumerate(ops):
        axes = figure.add_subplot(len(ops), 1, place + 1)
        cases = [key for key in groups if key[0] == op]
        width = 0.8 / max(len(names), 1)
        for index, name in enumerate(names):
            heights = [(groups[key].get(name) or {}).get("fraction") or 0.0 for key in cases]
            at = [i + (index - (len(names) - 1) / 2) * width for i in range(len(cases))]
            axes.bar(at, heights, width, label=name, color=f"C{index}")
        several = len({key[2] for key in cases}) > 1
        between = " " if len(cases) > 12 else "\n"
        labels = [f"{key[1]}{f' {key[2]}' if several else ''}{between}{key[3]}" for key in cases]
        axes.set_xticks(range(len(cases)), labels, fontsize=7, rotation=90 if len(cases) > 12 else 0)
        axes.set_ylabel(f"floor / time, {l2} L2")
        axes.set_title(op, loc="left")
        axes.axhline(1.0, color="0.5", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
        if place == 0:
            axes.legend(fontsize=8, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _op_table(op: str, rows: Sequence[Row], with_targets: bool) -> list[str]:
    own = [row for row in rows if row["op"] == op]
    names = [name for name in _backends(own) if name not in _COMPILED]
    columns = ["case", "pass", "compile", *names, "warm", "floor", "of the floor", "peak, MiB"]
    columns.insert(2, columns.pop(columns.index("reference"))) if "reference" in names else None
    if with_targets:
        columns.append("target")
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    warm = _grouped(own, "warm")
    for (_, case, dtype, which, _), group in _grouped(own, "cold").items():
        best = _fastest(group, _OURS)
        again = _fastest(warm.get((op, case, dtype, which, "warm"), {}), [best["backend"]] if best else [])
        compiled = _fastest(group, _COMPILED) or next((group[name] for name in _COMPILED if name in group), None)
        cells = {name: _cell(group.get(name)) for name in names} | {
            "case": case if dtype == "bfloat16" else f"{case} {dtype}",
            "pass": which,
            "compile": _cell(compiled),
            "warm": _cell(again),
            "floor": _us(next(iter(group.values()))["floor_us"]),
            "of the floor": f"{best['fraction']:.0%}" if best else "",
            "peak, MiB": _mib(best),
            "target": _us(TARGETS.get((op, case, which)) if dtype == "bfloat16" else None),
        }
        lines.append(f"| {' | '.join(cells[name] for name in columns)} |")
    return lines


def _means_table(rows: Sequence[Row]) -> list[str]:
    found, mean = speedups(rows), means(rows)
    if not mean:
        return []
    lines = ["| op | forward | backward | both | the least |", "|---|---:|---:|---:|---|"]
    for op in dict.fromkeys(op for op, _ in mean):
        cells = [f"{mean[op, which]:.2f} x" if (op, which) in mean else "" for which in _PASSES]
        of_op = [
            (value, f"{each} {case} {which}" if op == "all ops" else f"{case} {which}")
            for (each, which), cases in found.items()
            if op in (each, "all ops")
            for case, value in cases.items()
        ]
        least, where = min(of_op)
        lines.append(f"| {op} | {' | '.join(cells)} | {least:.2f} x, {where} |")
    return lines


def _lead_table(rows: Sequence[Row]) -> list[str]:
    """Forward and backward of the kernels of csrc/ compared with Triton's."""
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    paper = [row for row in rows if row["shapes"] == "paper" and row["dtype"] == "bfloat16"]
    for (op, case, _, which, _), group in _grouped(paper, "cold").items():
        for name, row in group.items():
            if name in ("cuda", "triton") and which != "both" and row["median_us"] is not None:
                times.setdefault((op, case), {}).setdefault(name, {})[which] = row["median_us"]
    found: dict[str, dict[str, float]] = {}
    for (op, case), each in times.items():
        sums = {name: sum(passes.values()) for name, passes in each.items() if len(passes) == 2}
        if len(sums) == 2:
            found.setdefault(op, {})[case] = sums["triton"] / sums["cuda"]
    if not found:
        return []
    lines = ["| op | ahead at | mean | by case |", "|---|---:|---:|---|"]
    for op, cases in found.items():
        ahead = sum(ratio > 1 for ratio in cases.values())
        each_case = ", ".join(f"{case} {ratio:.2f} x" for case, ratio in cases.items())
        mean = statistics.geometric_mean(cases.values())
        lines.append(f"| {op} | {ahead} of {len(cases)} | {mean:.2f} x | {each_case} |")
    return lines


def _missed(rows: Sequence[Row]) -> list[str]:
    lines = []
    for (op, case, dtype, which, _), group in _grouped(rows, "cold").items():
        target, best = TARGETS.get((op, case, which)), _fastest(group, _OURS)
        if target is None or dtype != "bfloat16" or best is None or best["median_us"] <= target:
            continue
        note = NOTES.get((op, case, which))
        time, floor = best["median_us"], best["floor_us"]
        lines.append(
            f"- {op} {case} {which}: {_us(time)} us, {time / target:.2f} times its target of {_us(target)}; "
            f"the floor is {_us(floor)}." + (f" {note}" if note else "")
        )
    return lines


def _slower(rows: Sequence[Row]) -> list[str]:
    return [
        f"- {op} {case} {which}: {value:.2f} x"
        for (op, which), cases in speedups(rows).items()
        for case, value in cases.items()
        if value < 1
    ]


def ops_page(content: dict[str, Any], folder: str) -> str:
    """The part of docs/benchmarks.md about one device, from its ``ops.json`` alone."""
    rows, device = content["rows"], content["device"]
    environments = [content["environments"][index] for index in sorted({row["environment"] for row in rows})]
    commits = sorted({(block["commit"] or f"sources {block['source']}")[:12] for block in environments})
    rates = [
        f"{min(values):,.0f}" if len(set(values)) == 1 else f"{min(values):,.0f} to {max(values):,.0f}"
        for values in ([block[name] for block in environments] for name in ("copy_gbps", "matmul_tflops"))
    ]
    dates = sorted(row["date"][:10] for row in rows)
    unfinished = "" if content["complete"] else " (not complete)"
    with_targets = DEVICE in device["name"]
    parts = [
        f"## {folder}{unfinished}",
        f"{device['name']}, driver {device['driver']}, torch {device['torch']}, triton {device['triton']}, "
        f"CUDA {device['cuda']}; commit {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
        f"Ceilings, measured in the same runs: copy {rates[0]} GB/s, bf16 matrix products {rates[1]} TFLOP/s.",
    ]
    table = _means_table(rows)
    if table:
        parts += [
            "### Against the faster torch.compile",
            "Geometric means over the paper's shapes, bf16, cold L2; above 1 is faster than torch.compile.",
            "\n".join(table),
        ]
        slower = _slower(rows)
        if slower:
            parts += ["Slower than the faster torch.compile:", "\n".join(slower)]
    lead = _lead_table(rows)
    if lead:
        parts += [
            "### CUDA C++ compared with Triton",
            "Forward and backward of the backend `cuda` at the paper's shapes that it serves, bf16, cold L2; above 1 "
            "is faster than Triton.",
            "\n".join(lead),
        ]
    for op in dict.fromkeys(row["op"] for row in rows):
        parts += [f"### {op}", "\n".join(_op_table(op, rows, with_targets))]
    if with_targets:
        missed = _missed(rows)
        parts += ["### Targets missed", "\n".join(missed) if missed else "None of those that were measured."]
    odd = sorted({row["timer"] for row in rows if row.get("timer") not in (None, "graph")})
    if odd:
        named = [f"{row['op']} {row['case']} {row['backend']}" for row in rows if row.get("timer") in odd]
        parts.append(f"Timed call by call, since no graph could be captured: {', '.join(dict.fromkeys(named))}.")
    return "\n\n".join(parts)
