"""Tables of README and docs/ from the committed results.

They stand between markers, and the rest of a page is left as it is; docs/benchmarks.md is written whole.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.benchmarks.ablation import CELLS
from dfkd_fast.benchmarks.choose import write as write_choices
from dfkd_fast.benchmarks.host_time import host_section
from dfkd_fast.benchmarks.ops_report import ops_page
from dfkd_fast.benchmarks.step_anatomy import anatomy_section
from dfkd_fast.benchmarks.step_report import accuracy_section, step_section
from dfkd_fast.benchmarks.swap import swap_section
from dfkd_fast.report import markdown_table, read_results

__all__ = ["ablation_table", "between_markers", "demo_table", "drop_in_tables", "main"]

ROOT = Path(__file__).resolve().parents[1]

_PAGE = """# Ablation

What the method's parts and open choices are worth. Written by `make report` from `benchmarks/results/`.

<!-- begin: ablation -->
<!-- end: ablation -->
"""

_OPS_PAGE = """# Microbenchmarks

Each op of `dfkd_fast.ops` beside eager PyTorch (`reference`), torch.compile (`compile`, the faster of its default mode
and max-autotune-no-cudagraphs, of the best PyTorch formulation known), public kernels (`peer:`) and its floor. Written
by `make report` from `benchmarks/results/`.

Times are medians in microseconds with a cold L2; `warm` is the time of the project's kernel with a warm one. Forward
is with gradients asked for, as in training; backward is to every input of the op. The floor is the larger of the bytes
that must be moved over the measured copy bandwidth and the operations over the measured bf16 matrix rate; `of the
floor` is floor over time, for the project's kernel, as is the peak of memory beyond inputs and upstream gradients.
bf16 where nothing else is said.

How to measure on your own machine: [Measuring](measuring.md#one-op).

{}
"""


def between_markers(page: str, name: str, text: str) -> str:
    """A page with the lines between ``<!-- begin: name -->`` and ``<!-- end: name -->`` replaced.

    Raises:
        ValueError: the page does not have the pair of markers, once.
    """
    pattern = re.compile(rf"(<!-- begin: {re.escape(name)} -->\n).*?(<!-- end: {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page must have one pair of markers '<!-- begin: {name} -->', '<!-- end: {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", page)


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
    """What `make demo` measured: one row a network, and the machine, from its ``results.json`` files."""
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


def drop_in_tables(compat: Path) -> str:
    """One table per module of dfkd_fast.compat. They are parsed, not imported: some need the project they stand for.

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


def _write_demo(root: Path) -> None:
    found = [read_results(path) for path in sorted((root / "benchmarks" / "results").glob("*/demo_*.json"))]
    contents = [content for content in found if content is not None]
    page = root / "README.md"
    if contents and page.exists():
        text = between_markers(page.read_text(encoding="utf-8"), "demo", demo_table(contents))
        page.write_text(text, encoding="utf-8")
        print(f"{page}: {len(contents)} experiments of the demo")


def _write_ops(root: Path) -> None:
    parts = []
    for path in sorted((root / "benchmarks" / "results").glob("*/ops.json")):
        content = read_results(path)
        if content is not None and content["rows"]:
            parts.append(ops_page(content, path.parent.name))
    page = root / "docs" / "benchmarks.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(_OPS_PAGE.format("\n\n".join(parts) or "Nothing has been measured yet."), encoding="utf-8")
    print(f"{page}: {len(parts)} devices")


def _write_page(page: Path, sections: dict[str, Callable[[dict[str, Any], str], str]]) -> None:
    """Fill a page's tables.

    Args:
        page: of docs/; nothing is done where it is not there.
        sections: by the name of the result file and of the markers, what makes a device's part of its content.
    """
    if not page.exists():
        return
    results = page.parents[1] / "benchmarks" / "results"
    text, counts = page.read_text(encoding="utf-8"), {}
    for name, section in sections.items():
        parts = []
        for path in sorted(results.glob(f"*/{name}.json")):
            content = read_results(path)
            if content is not None and content["rows"]:
                parts.append(section(content, path.parent.name))
        text = between_markers(text, name, "\n\n".join(parts) or "Nothing has been measured yet.")
        counts[name] = len(parts)
    page.write_text(text, encoding="utf-8")
    print(f"{page}: " + ", ".join(f"{name} on {count} devices" for name, count in counts.items()))


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Write docs/benchmarks.md and the tables of README and docs: ablation (made if missing), performance, swapping."""
    del arguments
    _write_demo(root)
    _write_ops(root)
    docs = root / "docs"
    sections = {"step": step_section, "accuracy": accuracy_section, "anatomy": anatomy_section}
    _write_page(docs / "performance.md", sections)
    swapping = docs / "swapping.md"
    if swapping.exists():
        tables = drop_in_tables(root / "dfkd_fast" / "compat")
        text = between_markers(swapping.read_text(encoding="utf-8"), "drop-ins", tables)
        swapping.write_text(text, encoding="utf-8")
    _write_page(swapping, {"host_time": host_section, "swap": swap_section})
    if (root / "kernels").is_dir():
        count = write_choices(root / "benchmarks" / "results", root / "kernels" / "choices.json")
        print(f"{root / 'kernels' / 'choices.json'}: {count} classes of shapes")
    parts = []
    for path in sorted((root / "benchmarks" / "results").glob("*/ablation*.json")):
        content = read_results(path)
        if content is not None and content["rows"]:
            state = "" if content["complete"] else " (not complete)"
            parts.append(f"### {path.parent.name}{state}\n\n{ablation_table(content)}")
    page = root / "docs" / "ablation.md"
    text = page.read_text(encoding="utf-8") if page.exists() else _PAGE
    page.parent.mkdir(exist_ok=True)
    text = between_markers(text, "ablation", "\n\n".join(parts) or "No results yet.")
    page.write_text(text, encoding="utf-8")
    print(f"{page}: {len(parts)} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
