"""Measures the time of a step by network and op, for the eager, compiled and graph engines.

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

__all__ = ["breakdown_section", "main"]


def breakdown_section(content: dict[str, Any], folder: str) -> str:
    """Return one device's tables for docs/performance.md, from its ``breakdown.json``."""
    lines = [f"### {folder}", "", *markdown_table(summary_table(content["rows"]))]
    for engine in content["rows"]:
        # Kernels of a replayed graph have no ranges; the summary has their total.
        for step in engine["steps"] if engine["engine"] != "graph" else ():
            lines += ["", f"Engine `{engine['engine']}`, {step['step']} step:", ""]
            lines += markdown_table(table(engine, step["step"]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile the engines one by one; on a CPU only the eager engine."""
    options = parser(__doc__, small="small networks", sizes=tuple(SIZES)).parse_args(arguments)
    size, cuda = SIZES[options.size], options.device == "cuda"
    engines: list[EngineName] = ["graph", "eager", "compiled"] if cuda else ["eager"]
    results = Results(options.out, key=("engine",))
    for engine in engines:
        state, teacher = build(size, size.batch, torch.device(options.device))
        names = (size.teacher.name, size.student.name)
        more: dict[str, Any] = {"engines": [engine], "steps": 5 if cuda else 1, "networks": names}
        with tempfile.TemporaryDirectory(prefix="dfkd_fast_breakdown_") as folder:
            found = profile(teacher, state.student.module, state.config, out=folder, **more)
        results.add(found.content["engines"][0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
