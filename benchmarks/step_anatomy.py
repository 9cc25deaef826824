"""The anatomy of a step, before and after: a stage. Where the time goes in the eager, compiled and captured form.

The configuration is that of `bench_step` at its most important batch size. A row is one engine; all come of one
session, since the graph's kernels are told apart by those of the compiled form.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.common import Results, stage_arguments
from dfkd_fast.benchmarks.step_variants import SIZES, build
from dfkd_fast.config import EngineName
from dfkd_fast.profiling import profile, save_anatomy, summary_table, table
from dfkd_fast.report import markdown_table

__all__ = ["ENGINES", "KEY", "VERSION", "anatomy_section", "main"]

VERSION = "1"
KEY = ("engine",)
ENGINES: tuple[EngineName, ...] = ("eager", "compiled", "graph")


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile all engines, once."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=5, help="of each kind, of which the median is taken")
    options = parser.parse_args(arguments)

    size, device = SIZES[options.size], torch.device(options.device)
    version = VERSION if options.size == "full" else f"{VERSION}-{options.size}"
    results = Results(options.out, stage="anatomy", version=version, key=KEY)
    if results.todo([(engine,) for engine in options.engines], options.since):
        state, teacher = build(size, size.batches[0], device)
        with tempfile.TemporaryDirectory(prefix="dfkd_fast_anatomy_") as folder:
            content = profile(
                teacher,
                state.student,
                state.config,
                engines=options.engines,
                steps=options.steps,
                networks=(size.teacher.name, size.student.name),
                out=folder,
            ).content
        results.head["run"] = {name: content[name] for name in ("precision", "batch", "image_size", "networks")}
        for each in content["engines"]:
            results.add(each)
    results.finish(complete=not results.todo([(engine,) for engine in options.engines]))
    return 0


def anatomy_section(content: dict[str, Any], device: str, images: Path) -> str:
    """One device's part of the page: a figure, drawn from its result file alone, and tables.

    Args:
        content: of the result file.
        device: name of its folder.
        images: folder of the page's pictures.
    """
    order = {engine: place for place, engine in enumerate(ENGINES)}
    engines = sorted(content["rows"], key=lambda row: order[row["engine"]])
    environment = content["environments"][engines[-1]["environment"]]
    picture = save_anatomy(
        {**content["run"], "environment": environment, "engines": engines}, images / f"anatomy-{device}.png"
    )
    run, last = content["run"], engines[-1]
    lines = [
        f"### {environment['device']['name']}",
        "",
        f"{run['networks']['teacher']} to {run['networks']['student']}, batch {run['batch']}, {run['image_size']} x "
        f"{run['image_size']}, {run['precision']}.",
        "",
        f"![Where the time of a step goes, by engine](images/{picture.name})",
        "",
        *markdown_table(summary_table(engines)),
    ]
    for step in last["steps"]:
        lines += [
            "",
            f"Engine `{last['engine']}`, {step['step']} step:",
            "",
            *markdown_table(table(last, step["step"])),
        ]
    named = [row for row in last["rows"] if row["share"] > 0]
    if named:
        largest = max(named, key=lambda row: row["microseconds"])
        lines += [
            "",
            f"The largest item: {largest['op_class']} of the {largest['network']} ({largest['direction']}, "
            f"{largest['step']} step), {largest['share']:.0%} of that step.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
