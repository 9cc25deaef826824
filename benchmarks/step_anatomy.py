"""The anatomy of a step, before and after: a stage. Where the time goes in the eager, compiled and captured form.

The configuration is that of `bench_step` at its most important batch size. A row is one engine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from dfkd_fast.benchmarks.common import Results, stage_arguments
from dfkd_fast.benchmarks.step_variants import SIZES, build
from dfkd_fast.config import EngineName
from dfkd_fast.profiling import profile, summary_table, table
from dfkd_fast.report import markdown_table

__all__ = ["ENGINES", "KEY", "VERSION", "anatomy_section", "main"]

VERSION = "2"
KEY = ("engine",)
ENGINES: tuple[EngineName, ...] = ("eager", "compiled", "graph")


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile all engines, once."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=5, help="of each kind, of which the mean is taken")
    options = parser.parse_args(arguments)

    size, device = SIZES[options.size], torch.device(options.device)
    version = VERSION if options.size == "full" else f"{VERSION}-{options.size}"
    results = Results(options.out, stage="anatomy", version=version, key=KEY)
    todo = [engine for (engine,) in results.todo([(engine,) for engine in options.engines], options.since)]
    if todo:
        state, teacher = build(size, size.batches[0], device)
        with tempfile.TemporaryDirectory(prefix="dfkd_fast_anatomy_") as folder:
            content = profile(
                teacher,
                state.student,
                state.config,
                engines=todo,
                steps=options.steps,
                networks=(size.teacher.name, size.student.name),
                out=folder,
            ).content
        results.head["run"] = {name: content[name] for name in ("precision", "batch", "image_size", "networks")}
        for each in content["engines"]:
            results.add(each)
    results.finish(complete=not results.todo([(engine,) for engine in options.engines]))
    return 0


def anatomy_section(content: dict[str, Any], device: str) -> str:
    """One device's tables on the page: all engines, then the time by network of each kind of step.

    Args:
        content: of the result file.
        device: name of its folder.
    """
    del device
    engines = sorted(content["rows"], key=lambda row: ENGINES.index(row["engine"]))
    run, environment = content["run"], content["environments"][engines[-1]["environment"]]
    lines = [
        f"### {environment['device']['name']}",
        "",
        f"{run['networks']['teacher']} to {run['networks']['student']}, batch {run['batch']}, {run['image_size']} x "
        f"{run['image_size']}, {run['precision']}.",
        "",
        *markdown_table(summary_table(engines)),
    ]
    for engine in engines:
        if engine["engine"] == "graph":
            continue  # the kernels of a replayed graph belong to no network: its totals are in the table above
        for step in engine["steps"]:
            lines += ["", f"Engine `{engine['engine']}`, {step['step']} step:", ""]
            lines += markdown_table(table(engine, step["step"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
