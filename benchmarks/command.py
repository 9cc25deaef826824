"""What ``dfkd-fast bench`` does: choose cases, tune where asked, measure, print a table, save rows and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from dfkd_fast.benchmarks.cases import Benchmark, Case
from dfkd_fast.benchmarks.compile_kernels import benchmarks
from dfkd_fast.benchmarks.measure import ceilings
from dfkd_fast.benchmarks.ops import KEY, measure, open_results, subjects
from dfkd_fast.benchmarks.ops_report import save_plot, terminal_rows
from dfkd_fast.benchmarks.tune import tune as tune_op
from dfkd_fast.report import environment, result_table, timestamp

__all__ = ["bench", "from_file"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _case(benchmark: Benchmark, sizes: Any, where: str) -> Case:
    """A case of a file's entry."""
    if benchmark.make is None:
        raise ValueError(f"{where}: {benchmark.op} has no shapes of one's own")
    if not isinstance(sizes, dict | list):
        raise ValueError(f"{where}: a shape of {benchmark.op} must be a list or a mapping of sizes, got {sizes!r}")
    named = dict(sizes) if isinstance(sizes, dict) else {"shape": sizes}
    plain, asked = named.pop("shape", []), named.pop("dtypes", ["bfloat16"])
    if not isinstance(asked, list) or not set(asked) <= _DTYPES.keys():
        raise ValueError(f"{where}: dtypes must be a list of {', '.join(_DTYPES)}, got {asked!r}")
    dtypes: list[torch.dtype] = [_DTYPES[name] for name in asked]
    try:
        return benchmark.make(*plain, **named, shapes="file", dtypes=dtypes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {sizes} is no shape of {benchmark.op}: {error}") from error


def from_file(known: dict[str, Benchmark], path: Path) -> list[Benchmark]:
    """The ops and shapes that a YAML or JSON file lists.

    Args:
        known: every benchmark by its op.
        path: holds, for each op, a list of shapes. One is a list of sizes, or a mapping from the names of sizes and
            options to values; in it, ``shape`` may be the list, and ``dtypes``, bfloat16 by default, a list of names.

    Raises:
        ValueError: the file says something else, or names an op or a size that there is not.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(shapes, list) for shapes in content.values()):
        raise ValueError(f"{path} must hold a list of shapes for each op")
    _check_names(list(content), known)
    return [
        replace(known[op], cases=[_case(known[op], sizes, str(path)) for sizes in shapes])
        for op, shapes in content.items()
    ]


def _check_names(names: Sequence[str], known: dict[str, Benchmark]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no benchmark of {', '.join(map(str, unknown))}; there are {', '.join(sorted(known))}")


def _tune(chosen: Sequence[Benchmark], device: torch.device, shapes: str, console: Console) -> None:
    here = environment()
    where = f"{here['device']['name']}, {(here['commit'] or here['source'])[:12]}"
    lines = []
    for benchmark in chosen:
        console.print(f"tuning {benchmark.op}")
        lines += [
            {
                "choice": tried.key,
                "first, us": f"{tried.first_us:.4g}",
                "best, us": f"{tried.best_us:.4g}",
                "tried": tried.tried,
                "refused": tried.refused,
                "taken": str(tried.winner.tile) if tried.winner else "the first",
            }
            for tried in tune_op(benchmark, device, where=where, shapes=(shapes,), tell=console.print)
        ]
    console.print(result_table(lines, "launch configurations"))


def bench(
    ops: Sequence[str] | None = None,
    *,
    shapes: str = "paper",
    out: str | Path = "runs/bench",
    tune: bool = False,
    backends: Sequence[str] | None = None,
    device: str = "cuda",
    console: Console | None = None,
) -> bool:
    """Measure ops anew and show what came of it.

    Args:
        ops: their names; None is all.
        shapes: "paper", "large" or a file, see :func:`from_file`.
        out: folder of ``ops.json`` and ``ops.png``; rows of other ops stay.
        tune: settle the launch configurations first.
        backends: these providers alone.
        device: "cuda", or "cpu" to try it out.
        console: to print on.

    Returns:
        Whether the project's own backends and the reference ran everywhere.

    Raises:
        ValueError: an unknown op, backend or file, or tuning on a CPU.
        RuntimeError: there is no CUDA device.
    """
    console = console or Console()
    known = benchmarks()
    _check_names(ops or (), known)
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "bench needs a CUDA device and finds none; `dfkd-fast doctor` says why, and --device cpu tries it out"
        )
    if tune and device != "cuda":
        raise ValueError("--tune finds launch configurations of a GPU and needs one")
    if shapes in ("paper", "large"):
        chosen, kind = list(known.values()), shapes
    elif Path(shapes).is_file():
        chosen, kind = from_file(known, Path(shapes)), "file"
    else:
        raise ValueError(f"--shapes must be paper, large or a file, and there is no file {shapes}")
    chosen = [benchmark for benchmark in chosen if not ops or benchmark.op in ops]

    where = torch.device(device)
    if tune:
        _tune(chosen, where, kind, console)
    found, absent = subjects(chosen, where, shapes=(kind,), backends=backends)
    for each in absent:
        console.print(f"{each.backend} is not here: {each.why}", markup=False)
    if not found:
        raise ValueError("nothing to measure: no case of these ops, shapes and backends")
    since = timestamp()
    rates = ceilings(where)
    console.print(
        f"ceilings: copy {rates.copy_gbps:,.0f} GB/s, bf16 matrix products {rates.matmul_tflops:,.3g} TFLOP/s"
    )
    results = open_results(Path(out) / "ops.json", rates)
    keys = [key for subject in found for key in subject.keys]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(keys))

        def tell(row: dict[str, Any]) -> None:
            progress.update(task, advance=1, description=f"{row['op']} {row['case']} {row['backend']}")

        sound = measure(
            found,
            results,
            device=where,
            rates=rates,
            since=since,
            tell=tell,
            complain=lambda words: progress.console.print(words, markup=False),
        )
    results.finish(complete=not results.todo(keys))
    asked = set(keys)
    rows = [row for row in results.rows if tuple(row[name] for name in KEY) in asked]
    for op, lines in terminal_rows(rows).items():
        console.print(result_table(lines, f"{op}, microseconds a call"))
    console.print(f"rows: {results.path}", markup=False)
    console.print(f"plot: {save_plot(rows, results.path.with_suffix('.png'))}", markup=False)
    return sound
