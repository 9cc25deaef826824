"""Writes the tables of README and docs/ from the committed results, between markers, and plots: `make report`."""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.ablation import ablation_section
from dfkd_fast.benchmarks.count_tables import op_counts_section, save_op_plot, save_step_plot, step_counts_section
from dfkd_fast.benchmarks.methods import methods_section
from dfkd_fast.benchmarks.ops.drop_ins import drop_ins_section
from dfkd_fast.benchmarks.ops.tables import ops_section, write_choices
from dfkd_fast.benchmarks.results import measured_on
from dfkd_fast.benchmarks.scaling import scaling_section, scaling_times_section
from dfkd_fast.benchmarks.step.breakdown import breakdown_section
from dfkd_fast.benchmarks.step.cpu import step_cpu_section
from dfkd_fast.benchmarks.step.variants import VARIANTS
from dfkd_fast.report import markdown_table, read_results

__all__ = ["PLOTS", "SECTIONS", "between_markers", "coverage_tables", "demo_table", "main", "step_section"]

ROOT = Path(__file__).resolve().parents[1]


def between_markers(page: str, name: str, text: str) -> str:
    """Return a page with ``text`` between ``<!-- begin: name -->`` and ``<!-- end: name -->``.

    Raises:
        ValueError: the page does not have exactly one pair of the markers.
    """
    pattern = re.compile(rf"(<!-- begin: {re.escape(name)} -->\n).*?(<!-- end: {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page must have one pair of markers '<!-- begin: {name} -->', '<!-- end: {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", page)


def demo_table(contents: Sequence[dict[str, Any]]) -> str:
    """Return the table of `make demo`, one row per network, and a note on the machine. ``contents`` are its results."""
    table, notes = [], []
    for content in contents:
        teacher = content["rows"][0]["top1"]
        table += [
            {
                "data set": content["experiment"],
                "network": row["network"],
                "trained on": row["trained_on"],
                "top-1": f"{row['top1']:.1%}",
                "relative to teacher": f"{row['top1'] / teacher:.1%}",
            }
            for row in content["rows"]
        ]
        notes.append(f"`{content['experiment']}`: {content['rounds']} rounds.")
    last, environment = contents[-1], contents[-1]["environment"]
    device = environment["cpu"] if environment["device"]["name"] == "cpu" else environment["device"]["name"]
    notes.append(
        f"Everything took {last['seconds']:.0f} s in {last['processes']} parallel processes with one thread each on "
        f"{device}, with torch {environment['torch']}, commit {(environment['commit'] or environment['source'])[:12]}."
    )
    return "\n".join([*markdown_table(table), "", "One seed. " + " ".join(notes)])


def coverage_tables(compat: Path) -> str:
    """Return one table per module of dfkd_fast.compat, with the op that computes each drop-in.

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


def reliability_section(content: dict[str, Any], folder: str) -> str:
    """Return the table of docs/reliability.md from the ``reliability.json`` of a machine, with the sums over seeds."""
    rows = sorted(content["rows"], key=lambda row: row["target"])
    outcomes: dict[tuple[str, str], Counter[str]] = {}
    skipped = dict.fromkeys(f"- `{row['target']}`, {row['kind']}: {row['skipped']}" for row in rows if "skipped" in row)
    for row in (row for row in rows if "skipped" not in row):
        outcomes.setdefault((row["target"], row["kind"]), Counter()).update(row["outcomes"])
    table = []
    for (target, kind), counts in outcomes.items():
        line = {"target": f"`{target}`", "fault or input": kind, "cases": f"{counts.total():,}"}
        line["lost"] = f"{counts.pop('lost', 0):,}"
        table.append(
            {**line, "outcomes": ", ".join(f"{outcome}: {count:,}" for outcome, count in counts.most_common())}
        )
    times: Counter[str] = Counter()
    for (target, _), seconds in {(row["target"], row["seed"]): row["seconds"] for row in rows}.items():
        times[target] += seconds
    cases, lost = (sum(row.get(name, 0) for row in rows) for name in ("cases", "lost"))
    seeds = ", ".join(sorted({str(row["seed"]) for row in rows}))
    listed = ", ".join(f"`{target}` {seconds / 60:.0f}" for target, seconds in times.items())
    facts = (
        f"{cases:,} cases, {lost:,} lost. Minutes per target: {listed}. Seeds: {seeds}. "
        f"CPU: {content['environments'][-1]['cpu']}; measured on: {measured_on(content)}."
    )
    missing = ["", "Not injected on this machine:", "", *skipped] if skipped else []
    return "\n".join([*markdown_table(table), "", facts, *missing])


_STEP_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ms per round": ("round_ms", "{:.1f}".format),
    "generator step, ms": ("generator_step_ms", "{:.2f}".format),
    "student step, ms": ("student_step_ms", "{:.2f}".format),
    "share of roofline": ("share", "{:.1%}".format),
    "GPU busy": ("gpu_busy", "{:.1%}".format),
    "peak, GiB": ("peak_bytes", lambda value: f"{value / 2**30:.2f}"),
    "compile and capture, s": ("prepare_s", "{:.1f}".format),
    "hours for 350,000 steps": ("hours_per_350k_steps", "{:.1f}".format),
}


def _step_line(variant: str, runs: Sequence[dict[str, Any]], least_ms: float | None) -> dict[str, str]:
    """Return the line of a variant, with medians over its runs. ``least_ms`` is the roofline of a round."""
    finished = [row for row in runs if row["status"] == "ok"]
    line = {"variant": variant, "images/s": "" if finished else runs[0]["status"]}
    if speeds := [row["images_per_s"] for row in finished if "images_per_s" in row]:
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}, n = {len(speeds)}"
        line["images/s"] = f"{statistics.median(speeds):,.0f} ({spread})"
    for column, (name, text) in _STEP_COLUMNS.items():
        values = [row[name] for row in finished if row.get(name) is not None]
        if name == "share" and least_ms and variant != "roofline" and finished:
            values = [least_ms / statistics.median(row["round_ms"] for row in finished)]
        line[column] = text(statistics.median(values)) if values else ""
    return line


def step_section(content: dict[str, Any], folder: str) -> str:
    """Return one device's tables for docs/performance.md, one per batch size, from its ``step.json``."""
    parts = [f"### {folder}"]
    for batch in sorted({row["batch"] for row in content["rows"]}):
        rows = [row for row in content["rows"] if row["batch"] == batch]
        runs = {name: [row for row in rows if row["variant"] == name] for name in ("roofline", *VARIANTS)}
        least_ms = runs["roofline"][0]["round_ms"] if runs["roofline"] else None
        table = [_step_line(name, each, least_ms) for name, each in runs.items() if each]
        parts += ["", f"Batch {batch}:", "", *markdown_table(table)]
        speeds = {
            name: statistics.median(values)
            for name, each in runs.items()
            if (values := [row["images_per_s"] for row in each if row["status"] == "ok" and "images_per_s" in row])
        }
        speed = speeds.pop("dfkd_fast", None)
        if speed and speeds:
            ratios = ", ".join(f"{speed / value:.2f} x `{name}`" for name, value in speeds.items())
            parts += ["", f"Images per second of `dfkd_fast`: {ratios}."]
    return "\n".join([*parts, "", f"Measured on {measured_on(content)}."])


SECTIONS: dict[str, dict[str, Callable[[dict[str, Any], str], str]]] = {
    "docs/benchmarks.md": {"op_counts": op_counts_section, "ops": ops_section},
    "docs/performance.md": {
        "step_counts": step_counts_section,
        "step": step_section,
        "step_cpu": step_cpu_section,
        "accuracy": ablation_section,
        "breakdown": breakdown_section,
    },
    "docs/swapping.md": {"drop_ins": drop_ins_section},
    "docs/ablation.md": {"ablation": ablation_section},
    "docs/methods.md": {"methods": methods_section, "methods_validation": methods_section},
    "docs/reliability.md": {"reliability": reliability_section},
    "docs/scaling.md": {"step_counts": scaling_section, "scaling": scaling_times_section},
}
"""Functions that write one device's section, by page and marker. The results of a marker are in ``MARKER.json``."""

PLOTS: dict[str, tuple[str, Callable[[dict[str, Any], Path], Path]]] = {
    "docs/images/op_bytes.svg": ("op_counts", save_op_plot),
    "docs/images/step_bytes.svg": ("step_counts", save_step_plot),
}
"""The name of the result file without ``.json`` and a function, by plot."""

_NOTES = {
    "op_counts": "Not counted yet.",
    "step_counts": "Not counted yet.",
    "step_cpu": "Not measured yet.",
    "ablation": "Not measured yet: `python -m dfkd_fast.benchmarks.ablation` measures it.",
    "methods": "Not measured yet: `python -m dfkd_fast.benchmarks.methods` measures it.",
    "methods_validation": "Not measured yet.",
    "scaling": "Not measured on several GPUs yet: `make gpu` measures it on a machine that has them.",
    "reliability": "Not run yet: `make reliability` runs it.",
}
_NOTE = "Not measured on a GPU yet: `make gpu` measures it."


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Write all tables and plots, and ``kernels/choices.json``."""
    del arguments
    results = root / "benchmarks" / "results"
    texts: dict[str, dict[str, str]] = {"README.md": {}}
    for name, sections in SECTIONS.items():
        for kind, section in sections.items():
            contents = ((read_results(path), path.parent.name) for path in sorted(results.glob(f"*/{kind}.json")))
            found = [section(content, folder) for content, folder in contents if content and content["rows"]]
            texts.setdefault(name, {})[kind] = "\n\n".join(found) or _NOTES.get(kind, _NOTE)
    if demos := [content for path in sorted(results.glob("*/demo_*.json")) if (content := read_results(path))]:
        texts["README.md"]["demo"] = demo_table(demos)
    for name, parts in texts.items():
        if (page := root / name).exists():
            text = page.read_text(encoding="utf-8")
            for kind, part in parts.items():
                text = between_markers(text, kind, part)
            page.write_text(text, encoding="utf-8")
            print(page)
    for name, (kind, save) in PLOTS.items():
        if content := read_results(results / "counted" / f"{kind}.json"):
            print(save(content, root / name))
    if (root / "kernels").is_dir():
        write_choices(results, root / "kernels" / "choices.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
