"""Time of a step by network and op, for the eager, compiled and graph engines.

python -m dfkd_fast.benchmarks.step.breakdown --out breakdown.json
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from dfkd_fast.benchmarks.results import Results, parser
from dfkd_fast.benchmarks.step.variants import SIZES, build
from dfkd_fast.config import EngineName
from dfkd_fast.profiling import profile, summary_table, table
from dfkd_fast.report import markdown_table

__all__ = ["ENGINES", "breakdown_section", "main"]

ENGINES: tuple[EngineName, ...] = ("graph", "eager", "compiled")


def breakdown_section(content: dict[str, Any], folder: str) -> str:
    """One device's tables for docs/performance.md, from its ``breakdown.json``."""
    engines = content["rows"]
    lines = [f"### {folder}", "", *markdown_table(summary_table(engines))]
    for engine in engines:
        if engine["engine"] == "graph":
            continue  # kernels of a replayed graph carry no ranges; the table above has their total
        for step in engine["steps"]:
            lines += ["", f"Engine `{engine['engine']}`, {step['step']} step:", ""]
            lines += markdown_table(table(engine, step["step"]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile the engines one by one."""
    command = parser(__doc__, small="small networks", sizes=tuple(SIZES))
    command.add_argument("--engines", nargs="+", choices=ENGINES, default=None, help="all; on a CPU only eager")
    options = command.parse_args(arguments)

    size, device = SIZES[options.size], torch.device(options.device)
    results, steps = Results(options.out, key=("engine",)), 5 if device.type == "cuda" else 1
    for engine in options.engines or (ENGINES if device.type == "cuda" else ("eager",)):
        state, teacher = build(size, size.batch, device)
        with tempfile.TemporaryDirectory(prefix="dfkd_fast_breakdown_") as folder:
            names = (size.teacher.name, size.student.name)
            found = profile(
                teacher, state.student.module, state.config, engines=[engine], steps=steps, networks=names, out=folder
            )
        for row in found.content["engines"]:
            results.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
