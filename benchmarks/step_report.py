"""What comes of ``step.json`` and ``accuracy.json``: the tables of docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dfkd_fast.benchmarks.engine_accuracy import ENGINES, verdicts
from dfkd_fast.benchmarks.step_variants import VARIANTS

__all__ = ["accuracy_section", "demands", "step_section"]

Row = dict[str, Any]

_COMPILED = ("compile_max_autotune", "compile_reduce_overhead")
_GIB = 2**30


def _of(rows: Sequence[Row], batch: int) -> dict[str, Row]:
    """Rows of whole steps at one batch size, by variant, in the order of the variants."""
    by_variant = {row["variant"]: row for row in rows if row["kind"] == "step" and row["batch"] == batch}
    return {variant: by_variant[variant] for variant in VARIANTS if variant in by_variant}


def _cell(value: float | None, form: str = "{:.1f}") -> str:
    return "-" if value is None else form.format(value)


def _memory(row: Row, name: str) -> str:
    return _cell(None if row[name] is None else row[name] / _GIB, "{:.2f}")


def _table(rows: Sequence[Row], batch: int) -> list[str]:
    found = _of(rows, batch)
    ours = found.get("dfkd_fast", {}).get("images_per_s")
    lines = [
        "| variant | images/s | repeats | ours over it | generator step, ms | student step, ms | of the floor "
        "| GPU busy | kernels a step | peak, GiB | steady, GiB | reserved, GiB | first step, s | cold, s |",
        "|---|" + "---:|" * 13,
    ]
    for variant, row in found.items():
        if row["status"] != "ok":
            lines.append(f"| {variant} | {row['status']} |" + " - |" * 12)
            continue
        each = sorted(row["images_per_s_by_repeat"])
        cells = [
            variant,
            _cell(row["images_per_s"], "{:.0f}"),
            f"{each[0]:.0f} to {each[-1]:.0f} ({len(each)})",
            _cell(ours / row["images_per_s"] if ours else None, "{:.2f}"),
            _cell(row["generator_step_ms"], "{:.2f}"),
            _cell(row["student_step_ms"], "{:.2f}"),
            _cell(row["floor_fraction"], "{:.1%}"),
            _cell(row["gpu_busy"], "{:.1%}"),
            _cell(row["kernels_per_step"], "{:.0f}"),
            *(_memory(row, name) for name in ("peak_bytes", "steady_bytes", "reserved_bytes")),
            _cell(row["seconds_to_first_step"]) + (" (cold)" if row["cache"] == "cold" else ""),
            _cell(row["cold_seconds_to_first_step"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def demands(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """What is demanded at batch 64, what was measured, and whether that is enough; of what there are rows for."""
    found = {variant: row for variant, row in _of(rows, 64).items() if row["status"] == "ok"}
    ours = found.get("dfkd_fast")
    if ours is None:
        return []
    said: list[tuple[str, str, bool]] = []

    def ask(name: str, value: float | None, form: str, *, least: float = -math.inf, most: float = math.inf) -> None:
        if value is not None:
            said.append((name, form.format(value), least <= value <= most))

    speed = {variant: row["images_per_s"] for variant, row in found.items()}
    compiled = [speed[variant] for variant in _COMPILED if variant in speed]
    against = (("peer", speed.get("peer"), 4.0), ("eager", speed.get("eager"), 2.0))
    for name, other, least in (*against, ("the faster torch.compile", max(compiled, default=None), 1.3)):
        ratio = speed["dfkd_fast"] / other if other else None
        ask(f"images/s over {name}: at least {least:g}", ratio, "{:.2f}", least=least)
    ask("GPU busy: at least 97 %", ours["gpu_busy"], "{:.1%}", least=0.97)
    for what in ("peak", "steady", "reserved"):
        mine, theirs = ours[f"{what}_bytes"], found.get("peer", {}).get(f"{what}_bytes")
        share = mine / theirs if mine is not None and theirs else None
        ask(f"memory ({what}) over peer: at most 0.6", share, "{:.2f}", most=0.6)
    if ours["cache"] == "warm":
        first = ours["seconds_to_first_step"]
        ask("seconds to the first step, warm cache: at most 90", first, "{:.1f}", most=90)
    return said


def _floor_lines(content: dict[str, Any]) -> list[str]:
    lines = [
        "| batch | step | operations, GFLOP | least bytes, MB | floor, ms | bound by |",
        "|---:|---|---:|---:|---:|---|",
    ]
    device = content["device"]
    for batch, each in content["floors"].items():
        for step in ("generator_step", "student_step"):
            work = each[step]
            compute = work["flops"] / device["matmul_tflops"] / 1e9
            memory = work["bytes"] / device["copy_gbps"] / 1e6
            lines.append(
                f"| {batch} | {step.removesuffix('_step')} | {work['flops'] / 1e9:.1f} | {work['bytes'] / 1e6:.0f} "
                f"| {work['floor_ms']:.2f} | {'operations' if compute >= memory else 'bytes'} |"
            )
    return lines


def _endurance_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["kind"] != "endurance" or not row["runs"]:
            continue
        run = row["runs"][-1]
        grown = ", ".join(
            f"{what} memory {run[f'{what}_growth'] / 2**20:+.2f} MiB"
            for what in ("allocated", "reserved", "host")
            if f"{what}_growth" in run
        )
        lines += [
            "",
            f"{run['rounds']} rounds on a small configuration (engine `{run['engine']}`): {grown}; round time from "
            f"{run['first_ms']:.3f} to {run['last_ms']:.3f} ms ({run['drift']:+.1%}): "
            f"{'steady' if row['steady'] else '**not steady**'}.",
        ]
    return lines


def _provenance(content: dict[str, Any]) -> str:
    where = sorted({f"{block['device']['name']}, torch {block['torch']}" for block in content["environments"]})
    commits = sorted({(block["commit"] or f"sources {block['source']}")[:12] for block in content["environments"]})
    return f"Measured on: {'; '.join(where)}; commit: {', '.join(commits)}."


def step_section(content: dict[str, Any], folder: str) -> str:
    """The tables of one device.

    Args:
        content: of its ``step.json``.
        folder: of its results.
    """
    rows, device = content["rows"], content["device"]
    lines = [f"### {folder}" + ("" if content["complete"] else " (not complete)")]
    for batch in sorted({row["batch"] for row in rows if row["kind"] == "step"}):
        lines += ["", f"Batch {batch}:", "", *_table(rows, batch)]
    asked = demands(rows)
    if asked:
        lines += ["", "What is demanded at batch 64:", "", "| demand | measured | holds |", "|---|---:|---|"]
        lines += [f"| {name} | {value} | {'yes' if holds else '**no**'} |" for name, value, holds in asked]
    lines += [
        "",
        f"The floor, from a copy at {device['copy_gbps']:.0f} GB/s and bf16 matrix products at "
        f"{device['matmul_tflops']:.0f} TFLOP/s:",
        "",
        *_floor_lines(content),
        *_endurance_lines(rows),
        "",
        _provenance(content),
    ]
    return "\n".join(lines)


def accuracy_section(content: dict[str, Any], folder: str) -> str:
    """The engines' accuracies on one device, mean and range over seeds.

    Args:
        content: of its ``accuracy.json``.
        folder: of its results.
    """
    rows = content["rows"]
    lines = [f"### {folder}" + ("" if content["complete"] else " (not complete)"), ""]
    lines += ["| set | objective | " + " | ".join(f"{n}, {p}" for n, p in ENGINES.items()) + " | difference | equal |"]
    lines += ["|---|---|" + "---:|" * (len(ENGINES) + 1) + "---|"]
    found = verdicts(rows)
    for verdict in found:
        here = [row for row in rows if all(row[name] == verdict[name] for name in ("experiment", "objective"))]
        cells = [verdict["experiment"], verdict["objective"]]
        for engine in ENGINES:
            values = [row["accuracy"] for row in here if row["engine"] == engine and row["accuracy"] is not None]
            broken = verdict["seeds"][engine] - len(values)
            cells.append(
                (f"{sum(values) / len(values):.1%} ({min(values):.1%} to {max(values):.1%}, n = {len(values)})")
                if values
                else "-"
            )
            cells[-1] += f", not finite: {broken}" if broken else ""
        cells += [_cell(verdict.get("difference"), "{:+.1%}"), "yes" if verdict["equal"] else "**no**"]
        lines.append("| " + " | ".join(cells) + " |")
    if not found:
        lines = [lines[0], "", "No experiment has been measured with both engines yet."]
    return "\n".join([*lines, "", _provenance(content)])
