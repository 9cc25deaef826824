"""Writes the tables of README and docs/ from the committed results, between markers: `make report`."""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.ablation import CELLS
from dfkd_fast.benchmarks.ops.drop_ins import drop_ins_section
from dfkd_fast.benchmarks.ops.tables import ops_section, write_choices
from dfkd_fast.benchmarks.results import measured_on
from dfkd_fast.benchmarks.step.accuracy import accuracy_section
from dfkd_fast.benchmarks.step.breakdown import breakdown_section
from dfkd_fast.benchmarks.step.variants import VARIANTS
from dfkd_fast.report import markdown_table, read_results

__all__ = ["ablation_table", "between_markers", "coverage_tables", "demo_table", "main"]

ROOT = Path(__file__).resolve().parents[1]


def between_markers(page: str, name: str, text: str) -> str:
    """A page with the lines between ``<!-- begin: name -->`` and ``<!-- end: name -->`` replaced.

    Raises:
        ValueError: the page does not have the pair of markers, once.
    """
    pattern = re.compile(rf"(<!-- begin: {re.escape(name)} -->\n).*?(<!-- end: {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page must have one pair of markers '<!-- begin: {name} -->', '<!-- end: {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", page)


_VARIANTS = ("roofline", *VARIANTS)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1%}" if len(values) == 1 else f"{mean:.1%} ± {100 * statistics.stdev(values):.1f}"


def ablation_table(content: dict[str, Any]) -> str:
    """The cells of one result file: mean and standard deviation of top-1 over seeds, and what it was measured on."""
    rows = content["rows"]
    teachers = sorted({row["teacher_accuracy"] for row in rows})
    lines = ["| cell | changed | top-1 | of the teacher's | agreement | n |", "|---|---|---:|---:|---:|---:|"]
    for cell in [*CELLS, *sorted({row["cell"] for row in rows} - set(CELLS))]:
        of_cell = [row for row in rows if row["cell"] == cell]
        if not of_cell:
            continue
        sound = [row for row in of_cell if row["accuracy"] is not None]
        changed = ", ".join(f"`{path}={value}`" for path, value in of_cell[0]["overrides"].items())
        if sound:
            top1 = _spread([row["accuracy"] for row in sound])
            share = _spread([row["accuracy"] / row["teacher_accuracy"] for row in sound])
            agree = _spread([row["agreement"] for row in sound])
        else:
            top1 = share = agree = "-"
        broken = len(of_cell) - len(sound)
        count = f"{len(sound)}" + (f" (not finite: {broken})" if broken else "")
        lines.append(f"| {cell} | {changed} | {top1} | {share} | {agree} | {count} |")
    where = sorted({f"{block['device']['name']}, torch {block['torch']}" for block in content["environments"]})
    commits = sorted({(block["commit"] or f"sources {block['source']}")[:12] for block in content["environments"]})
    rounds = sorted({row["rounds"] for row in rows})
    lines += [
        "",
        f"Mean ± standard deviation over n seeds. Teacher: {', '.join(f'{value:.1%}' for value in teachers)}; "
        f"rounds: {', '.join(map(str, rounds))}; measured on: {'; '.join(where)}; commit: {', '.join(commits)}.",
    ]
    return "\n".join(lines)


def demo_table(contents: Sequence[dict[str, Any]]) -> str:
    """Results of `make demo`, one row per network, and the machine, from its ``results.json`` files."""
    lines = ["| set | network | learned from | top-1 | of the teacher's |", "|---|---|---|---:|---:|"]
    notes = []
    for content in contents:
        teacher = content["rows"][0]["top1"]
        for row in content["rows"]:
            lines.append(
                f"| {content['experiment']} | {row['network']} | {row['learned_from']} | {row['top1']:.1%} "
                f"| {row['top1'] / teacher:.1%} |"
            )
        environment = content["environment"]
        notes.append(
            f"`{content['experiment']}`: {content['rounds']} rounds, {content['seconds']:.0f} s in all on "
            f"{environment['cpu'] if environment['device']['name'] == 'cpu' else environment['device']['name']}, "
            f"threads: {environment['threads']}, torch {environment['torch']}, "
            f"commit {(environment['commit'] or environment['source'])[:12]}."
        )
    return "\n".join([*lines, "", "One seed. " + " ".join(notes)])


def coverage_tables(compat: Path) -> str:
    """One table per module of dfkd_fast.compat: which op computes each drop-in.

    Modules are parsed, not imported, because some need the project that they replace.

    Args:
        compat: folder of the package.
    """

    def assigned(module: str, name: str) -> Any:
        body = ast.parse((compat / f"{module}.py").read_text(encoding="utf-8")).body
        return next(
            node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        )

    parts = []
    for module in ast.literal_eval(assigned("__init__", "MODULES")):
        rows, before = [], ""
        for case in assigned(module, "COVERAGE").elts:
            name, called_with, op = (ast.literal_eval(argument) for argument in case.args)
            page = "batchnorm_statistics" if op == "channel_statistics" else op
            by = f"[`{op}`](ops/{page}.md)" if op else "plain PyTorch"
            rows.append({"drop-in": f"`{name}`" * (name != before), "called with": called_with, "computed by": by})
            before = name
        parts.append("\n".join([f"### dfkd_fast.compat.{module}", "", *markdown_table(rows)]))
    return "\n\n".join(parts)


def step_section(content: dict[str, Any], folder: str) -> str:
    """One device's tables for docs/performance.md, one per batch size, from its ``step.json``: medians over runs."""
    rows, parts = content["rows"], [f"### {folder}"]
    for batch in sorted({row["batch"] for row in rows}):
        of = {name: [r for r in rows if (r["variant"], r["batch"]) == (name, batch)] for name in _VARIANTS}
        least = of["roofline"][0] if of["roofline"] else None
        table = []
        if least:
            table.append({"variant": "roofline", "ms per round": f"{least['round_ms']:.1f}"})
            table[0] |= {f"{k} step, ms": f"{least[f'{k}_step_ms']:.2f}" for k in ("generator", "student")}
        speed: dict[str, float] = {}
        for variant in VARIANTS:
            runs = [row for row in of[variant] if row["status"] == "ok"]
            if not runs:
                if of[variant]:
                    table.append({"variant": variant, "images/s": of[variant][0]["status"]})
                continue

            def median(name: str, runs: list[dict[str, Any]] = runs) -> float | None:
                values = [row[name] for row in runs if row.get(name) is not None]
                return statistics.median(values) if values else None

            speed[variant] = median("images_per_s") or 0.0
            each = [row["images_per_s"] for row in runs]
            peak, busy = median("peak_bytes"), median("gpu_busy")
            table.append(
                {
                    "variant": variant,
                    "images/s": f"{speed[variant]:,.0f} ({min(each):,.0f} to {max(each):,.0f}, n = {len(each)})",
                    "ms per round": f"{median('round_ms'):.1f}",
                    "generator step, ms": f"{median('generator_step_ms'):.2f}",
                    "student step, ms": f"{median('student_step_ms'):.2f}",
                    "share of roofline": f"{least['round_ms'] / median('round_ms'):.1%}" if least else "",
                    "GPU busy": f"{busy:.1%}" if busy else "",
                    "peak, GiB": f"{peak / 2**30:.2f}" if peak else "",
                    "compile and capture, s": f"{median('prepare_s'):.1f}",
                    "hours for 350,000 steps": f"{median('hours_per_350k_steps'):.1f}",
                }
            )
        columns = dict.fromkeys(name for line in sorted(table, key=len, reverse=True) for name in line)
        parts += ["", f"Batch {batch}:", "", *markdown_table([{n: line.get(n, "") for n in columns} for line in table])]
        ours = speed.pop("dfkd_fast", 0.0)
        others = [f"{ours / value:.2f} x `{name}`" for name, value in speed.items() if ours]
        if others:
            parts += ["", f"Images per second of `dfkd_fast`: {', '.join(others)}."]
    return "\n".join([*parts, "", f"Measured on {measured_on(content)}."])


SECTIONS: dict[str, dict[str, Callable[[dict[str, Any], str], str]]] = {
    "docs/benchmarks.md": {"ops": ops_section},
    "docs/performance.md": {"step": step_section, "accuracy": accuracy_section, "breakdown": breakdown_section},
    "docs/swapping.md": {"drop_ins": drop_ins_section},
    "docs/ablation.md": {"ablation": lambda content, folder: f"### {folder}\n\n{ablation_table(content)}"},
}
"""What stands between the markers of each page: by the name of the result file, a device's section."""


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Write all tables, and ``kernels/choices.json``."""
    del arguments
    results = root / "benchmarks" / "results"
    for name, sections in SECTIONS.items():
        page = root / name
        if not page.exists():
            continue
        text = page.read_text(encoding="utf-8")
        for kind, section in sections.items():
            parts = []
            for path in sorted(results.glob(f"*/{kind}.json")):
                content = read_results(path)
                if content is not None and content["rows"]:
                    parts.append(section(content, path.parent.name))
            text = between_markers(text, kind, "\n\n".join(parts) or "Nothing has been measured yet.")
        page.write_text(text, encoding="utf-8")
        print(page)
    contents = [content for path in sorted(results.glob("*/demo_*.json")) if (content := read_results(path))]
    page = root / "README.md"
    if contents and page.exists():
        text = between_markers(page.read_text(encoding="utf-8"), "demo", demo_table(contents))
        page.write_text(text, encoding="utf-8")
        print(page)
    if (root / "kernels").is_dir():
        write_choices(results, root / "kernels" / "choices.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
