"""Times every op against eager PyTorch, torch.compile, public kernels and its roofline: ``dfkd-fast bench``.

Providers, the ``backend`` of a row: ``reference`` is eager PyTorch; ``compile`` and ``compile_max_autotune`` are
torch.compile (default mode, and max-autotune-no-cudagraphs) of the best known PyTorch formulation; ``triton`` and
``cuda`` are this project's kernels; ``peer:NAME`` is a public kernel, where its library is installed. The roofline of a
row is the larger of its least bytes over the measured copy bandwidth and its operations over the measured bf16 matrix
rate. A provider that fails, runs out of memory or does not support a case has a row with that ``status`` and no times.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Benchmark, Case, Make, tensors
from dfkd_fast.benchmarks.ops.measure import CACHES, PASSES, Ceilings, Measurement, Trial, ceilings
from dfkd_fast.benchmarks.ops.tables import save_plot, terminal_rows
from dfkd_fast.benchmarks.results import Key, Results, dtype_name, parser, rounded
from dfkd_fast.report import result_table

__all__ = ["KEY", "Subject", "bench", "from_file", "main", "measure", "row_of", "subjects"]

KEY = ("op", "case", "dtype", "backend", "pass", "l2")

_OWN = ("reference", "triton", "cuda")  # a failure of these is a fault of this project
_MODES = {"compile": None, "compile_max_autotune": "max-autotune-no-cudagraphs"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_BYTES, _CPU_FLOPS = 64e6, 5e9  # larger cases are left out on a CPU
_SKIP = ("out of memory", "not supported")


@dataclass(frozen=True, eq=False)
class Subject:
    """A case in one dtype by one provider, and the keys of its rows."""

    op: str
    case: Case
    dtype: torch.dtype
    backend: str
    function: Callable[..., Any]
    keys: tuple[Key, ...]


def _providers(benchmark: Benchmark, case: Case) -> dict[str, Callable[..., Any]]:
    from dfkd_fast import ops
    from dfkd_fast.ops import extension

    def by(backend: str) -> Callable[..., Any]:
        return lambda *inputs: case.call(*inputs, backend=backend)

    found: dict[str, Callable[..., Any]] = {}
    for name in ops.backends()[benchmark.op]:
        if name != "cuda" or extension.UNAVAILABLE is None:
            found[name] = by(name)
    for name, mode in _MODES.items():
        found[name] = torch.compile(case.compiled or by("reference"), dynamic=False, mode=mode)
    for name, peer in benchmark.peers.items():
        with contextlib.suppress(ImportError):
            if (function := peer(case.name)) is not None:
                found[f"peer:{name}"] = function
    return found


def subjects(
    chosen: Sequence[Benchmark],
    device: torch.device,
    *,
    shapes: Sequence[str] = ("paper",),
    backends: Sequence[str] | None = None,
    passes: Sequence[str] = PASSES,
    caches: Sequence[str] = CACHES,
) -> list[Subject]:
    """Everything to measure. All providers of a case follow each other; the ops take turns case by case.

    On a CPU there are only ``reference`` and ``compile``, a warm cache, and small cases.
    """
    cuda = device.type == "cuda"
    found: list[tuple[int, Subject]] = []
    for benchmark in chosen:
        cases = [case for case in benchmark.cases if case.shapes in shapes]
        for turn, case in enumerate(cases):
            least = case.work(4)
            if not cuda and (least.forward_bytes > _CPU_BYTES or least.forward_flops > _CPU_FLOPS):
                continue
            for dtype in case.dtypes:
                gradients = any(t.requires_grad for t in tensors(case.inputs(Make("meta", dtype))))
                pairs = [(p, l2) for p in passes for l2 in (caches if cuda else ("warm",))]
                for backend, function in _providers(benchmark, case).items():
                    if (backends and backend not in backends) or not (cuda or backend in ("reference", "compile")):
                        continue
                    fixed = (benchmark.op, case.name, dtype_name(dtype), backend)
                    keys = tuple((*fixed, *pair) for pair in pairs if gradients or pair[0] == "forward")
                    found.append((turn, Subject(benchmark.op, case, dtype, backend, function, keys)))
    return [subject for _, subject in sorted(found, key=lambda pair: pair[0])]


def row_of(
    subject: Subject, key: Key, measured: Measurement | None, rates: Ceilings, status: str = "ok"
) -> dict[str, Any]:
    """The row of a key. Without a measurement, ``status`` says why."""
    work, which = subject.case.work(subject.dtype.itemsize), key[KEY.index("pass")]
    directions = ("forward", "backward") if which == "both" else (which,)
    moved, flops = (sum(getattr(work, f"{d}_{unit}") for d in directions) for unit in ("bytes", "flops"))
    roofline = rates.roofline_us(moved, flops)
    names = ("median_us", "p10_us", "p90_us", "peak_bytes", "timer", "calls", "repeats")
    return {
        **dict(zip(KEY, key, strict=True)),
        **{name: getattr(measured, name, None) for name in names},
        "bytes": moved,
        "flops": flops,
        "roofline_us": rounded(roofline),
        "fraction": rounded(roofline / measured.median_us) if measured else None,
        "status": status,
        "shapes": subject.case.shapes,
    }


def measure(
    found: Sequence[Subject],
    results: Results,
    *,
    device: torch.device,
    rates: Ceilings,
    seconds: float | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
    trial: Callable[..., Any] = Trial,
) -> bool:
    """Measure subjects one by one and write their rows; ``progress`` is called with each.

    No subject is started after ``seconds``. ``trial`` is for tests.

    Returns:
        Whether all of this project's providers worked. Failures of torch.compile and of public kernels are only
        recorded.
    """
    start, sound = time.monotonic(), True
    for subject in found:
        if seconds is not None and time.monotonic() - start > seconds:
            break
        for row in _rows(subject, device, rates, trial):
            sound &= subject.backend not in _OWN or row["status"] in ("ok", *_SKIP)
            results.add(row)
            progress(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return sound


def _rows(subject: Subject, device: torch.device, rates: Ceilings, trial: Callable[..., Any]) -> list[dict[str, Any]]:
    torch.compiler.reset()
    rows, made, lost = [], None, ""
    # The backward is timed separately on a retained graph, which torch.compile allows only without donated buffers.
    with torch._functorch.config.patch(donated_buffer=False):
        for key in subject.keys:
            measured, status = None, lost
            if not lost:
                try:
                    made = made or trial(subject.case, subject.dtype, device, subject.function)
                    measured = made.measure(*key[KEY.index("pass") :])
                    status = "ok"
                except Exception as error:  # the others go on
                    status = _status(error)
                    lost = status if made is None else ""
            if measured is None and device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the device is lost to this process
                torch.cuda.empty_cache()
            rows.append(row_of(subject, key, measured, rates, status))
    return rows


def _status(error: Exception) -> str:
    from dfkd_fast.ops.backend import UnsupportedError

    if isinstance(error, torch.OutOfMemoryError | UnsupportedError):
        return "not supported" if isinstance(error, UnsupportedError) else "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def _compile_one(job: tuple[str, str, str, str]) -> str | None:
    op, name, backend, where = job
    torch.set_num_threads(1)
    device = torch.device(where)
    case = next(case for case in BENCHMARKS[op].cases if case.name == name)
    with torch._functorch.config.patch(donated_buffer=False):
        for dtype in case.dtypes:
            try:
                trial = Trial(case, dtype, device, _providers(BENCHMARKS[op], case)[backend])
                trial.run("both" if "both" in trial.passes else "forward")
            except Exception as error:  # the timed run records it
                return f"{op} {name} {backend}: {_status(error)}"
    return None


def compile_only(found: Sequence[Subject], device: torch.device, workers: int) -> None:
    """Fill the compilers' caches: every subject once, forward and backward, in parallel processes."""
    jobs = dict.fromkeys(
        (each.op, each.case.name, each.backend, str(device)) for each in found if each.backend != "reference"
    )
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        for failure in pool.imap_unordered(_compile_one, jobs):
            if failure:
                print(failure, flush=True)


def from_file(path: Path) -> list[Benchmark]:
    """The ops and shapes that a YAML or JSON file lists.

    The file holds a list of shapes for each op. A shape is a list of sizes, or a mapping from sizes and options to
    values, in which ``shape`` may be the list and ``dtypes`` a list of dtypes (bfloat16 by default).

    Raises:
        ValueError: the file has another form, or names an unknown op, size or dtype.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(shapes, list) for shapes in content.values()):
        raise ValueError(f"{path} must hold a list of shapes for each op")
    return [
        replace(each, cases=[_case_of(each, sizes, path) for sizes in content[each.op]]) for each in _chosen(content)
    ]


def _case_of(benchmark: Benchmark, sizes: Any, path: Path) -> Case:
    if not isinstance(sizes, dict | list):
        raise ValueError(f"{path}: a shape of {benchmark.op} must be a list or a mapping of sizes, got {sizes!r}")
    named = dict(sizes) if isinstance(sizes, dict) else {"shape": sizes}
    plain, dtypes = named.pop("shape", []), named.pop("dtypes", ["bfloat16"])
    if not isinstance(dtypes, list) or not set(dtypes) <= _DTYPES.keys():
        raise ValueError(f"{path}: dtypes must be a list of {', '.join(_DTYPES)}, got {dtypes!r}")
    try:
        return benchmark.make(*plain, **named, shapes="file", dtypes=[_DTYPES[name] for name in dtypes])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {sizes} is not a shape of {benchmark.op}: {error}") from error


def _chosen(names: Sequence[str] | dict[str, Any] | None) -> list[Benchmark]:
    unknown = [str(name) for name in names or () if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"no benchmark of {', '.join(unknown)}; there are {', '.join(sorted(BENCHMARKS))}")
    return [BENCHMARKS[name] for name in names] if names else list(BENCHMARKS.values())


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
    """Time ops, print tables, and write ``ops.json`` and ``ops.png``, as ``dfkd-fast bench`` explains.

    Returns:
        Whether this project's kernels and the reference ran everywhere.

    Raises:
        ValueError: an unknown op, provider or file, or tuning on a CPU.
        RuntimeError: there is no CUDA device.
    """
    console, where = console or Console(), torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "bench needs a CUDA device and finds none. `dfkd-fast doctor` says why; --device cpu tries the command out"
        )
    if tune and device != "cuda":
        raise ValueError("--tune searches launch configurations of a GPU and needs one")
    chosen = _chosen(ops)
    if shapes not in ("paper", "large"):
        if not Path(shapes).is_file():
            raise ValueError(f"--shapes must be paper, large or a file, and there is no file {shapes}")
        chosen = [each for each in from_file(Path(shapes)) if not ops or each.op in ops]
    kind = shapes if shapes in ("paper", "large") else "file"
    if tune:
        from dfkd_fast.benchmarks.ops.tune import tune_all

        console.print(result_table(tune_all(chosen, where, kind, console.print), "launch configurations"))
    found = subjects(chosen, where, shapes=(kind,), backends=backends)
    if not found:
        raise ValueError("nothing to measure: no case of these ops, shapes and backends")
    rates = ceilings(where)
    console.print(f"measured peaks: copy {rates.copy_gbps:,.0f} GB/s, bf16 matmul {rates.matmul_tflops:,.3g} TFLOP/s")
    results = Results(Path(out) / "ops.json", key=KEY, facts=asdict(rates))
    keys = {key for subject in found for key in subject.keys}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(keys))

        def advance(row: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=f"{row['op']} {row['case']} {row['backend']}")
            if row["median_us"] is None and row["status"] not in _SKIP:
                bar.console.print(f"{row['op']} {row['case']} {row['backend']}: {row['status']}", markup=False)

        sound = measure(found, results, device=where, rates=rates, progress=advance)
    rows = [row for row in results.rows if results.key_of(row) in keys]
    for op, lines in terminal_rows(rows).items():
        console.print(result_table(lines, f"{op}, microseconds per call"))
    console.print(f"rows: {results.path}", markup=False)
    console.print(f"plot: {save_plot(rows, results.path.with_suffix('.png'))}", markup=False)
    return sound


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure for a fixed time, for the plan of `make gpu`. Returns 1 where one of this project's kernels failed."""
    command = parser(__doc__, small="one case per op", out=False)
    command.add_argument("--seconds", type=float, default=None, help="start no case after this")
    command.add_argument("--backends", nargs="+", default=["triton", "compile", "reference"])
    command.add_argument("--compile-only", type=int, default=0, metavar="PROCESSES", help="fill caches, time nothing")
    options = command.parse_args(arguments)

    device = torch.device(options.device)
    chosen = list(BENCHMARKS.values())
    if options.size == "small":
        smallest = [min(each.cases, key=lambda case: case.work(2).forward_bytes) for each in chosen]
        chosen = [replace(a, cases=[replace(case, shapes="paper")]) for a, case in zip(chosen, smallest, strict=True)]
    once: dict[str, Any] = {"passes": ("forward", "backward"), "caches": ("cold",)}
    found = subjects(chosen, device, backends=options.backends, **once)
    if options.compile_only:
        compile_only(found, device, options.compile_only)
        return 0
    rates = ceilings(device)
    print(rates, flush=True)

    def say(row: dict[str, Any]) -> None:
        time_us = row["median_us"]
        print(" ".join(str(row[name]) for name in KEY), f"{time_us:.4g} us" if time_us else row["status"], flush=True)

    results = Results(options.out, key=KEY, facts=asdict(rates))
    return int(not measure(found, results, device=device, rates=rates, seconds=options.seconds, progress=say))


if __name__ == "__main__":
    sys.exit(main())
