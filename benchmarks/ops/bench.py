"""Times every op against eager PyTorch, torch.compile, public kernels and its roofline: ``dfkd-fast bench``.

The ``backend`` of a row is one of: ``reference``, eager PyTorch; ``compile`` and ``compile_max_autotune``,
torch.compile (default mode and max-autotune-no-cudagraphs) of the best known PyTorch formulation; ``triton`` and
``cuda``, the kernels of this project; ``peer:NAME``, a public kernel, if its library is installed. The roofline of a
row is the larger of two times: its minimum bytes divided by the measured copy bandwidth, and its operations divided by
the measured bf16 matrix rate. A backend that fails, runs out of memory or does not support a case gets a row with that
``status`` and no times.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Benchmark, Case, Make, case_of, tensors
from dfkd_fast.benchmarks.ops.measure import CACHES, PASSES, Measurement, PeakRates, Trial, measure_peak_rates
from dfkd_fast.benchmarks.ops.tables import save_plot, terminal_rows
from dfkd_fast.benchmarks.results import Key, Results, dtype_name, parser, rounded
from dfkd_fast.config import expand
from dfkd_fast.ops.backend import UnsupportedError
from dfkd_fast.report import result_table

__all__ = ["KEY", "Subject", "bench", "from_file", "main", "measure", "subjects"]

KEY = ("op", "case", "dtype", "backend", "pass", "l2")

_OWN = ("reference", "triton", "cuda")  # a failure of one of these is a fault of this project
_MODES = {"compile": None, "compile_max_autotune": "max-autotune-no-cudagraphs"}
_CPU_BYTES, _CPU_FLOPS = 64e6, 5e9  # larger cases are skipped on a CPU
_SKIP = ("out of memory", "not supported")


@dataclass(frozen=True, eq=False)
class Subject:
    """One case in one dtype with one backend. ``passes`` are pairs of a pass and a state of the L2 cache."""

    op: str
    case: Case
    dtype: torch.dtype
    backend: str
    function: Callable[..., Any]
    passes: tuple[tuple[str, str], ...]

    @property
    def keys(self) -> list[Key]:
        """The key of each of its rows."""
        return [(self.op, self.case.name, dtype_name(self.dtype), self.backend, *each) for each in self.passes]

    def row(self, key: Key, measured: Measurement | None, status: str, rates: PeakRates) -> dict[str, Any]:
        """The row of a key. Without a measurement, ``status`` says why."""
        work, which = self.case.work(self.dtype.itemsize), key[KEY.index("pass")]
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
            "shapes": self.case.shapes,
        }


def _providers(benchmark: Benchmark, case: Case) -> dict[str, Callable[..., Any]]:
    from dfkd_fast import ops
    from dfkd_fast.ops import extension

    def by(backend: str) -> Callable[..., Any]:
        return lambda *inputs: case.call(*inputs, backend=backend)

    found = {name: by(name) for name in ops.backends()[benchmark.op]}
    if extension.UNAVAILABLE is not None:
        found.pop("cuda", None)
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
    shapes: str = "paper",
    backends: Sequence[str] | None = None,
    passes: Sequence[str] = PASSES,
    caches: Sequence[str] = CACHES,
) -> list[Subject]:
    """List everything to measure. The first case of every op comes first, then the second ones, and so on.

    On a CPU there are only ``reference`` and ``compile``, a warm cache and small cases.
    """
    cuda = device.type == "cuda"
    found: list[tuple[int, Subject]] = []
    for benchmark in chosen:
        for index, case in enumerate(case for case in benchmark.cases if case.shapes == shapes):
            work = case.work(4)
            if not cuda and (work.forward_bytes > _CPU_BYTES or work.forward_flops > _CPU_FLOPS):
                continue
            for dtype in case.dtypes:
                trains = any(x.requires_grad for x in tensors(case.inputs(Make("meta", dtype))))
                directions = passes if trains else PASSES[:1]
                pairs = tuple((which, l2) for which in directions for l2 in (caches if cuda else ("warm",)))
                for backend, function in _providers(benchmark, case).items():
                    if (not backends or backend in backends) and (cuda or backend in ("reference", "compile")):
                        found.append((index, Subject(benchmark.op, case, dtype, backend, function, pairs)))
    return [subject for _, subject in sorted(found, key=lambda pair: pair[0])]


def measure(
    found: Sequence[Subject],
    results: Results,
    *,
    device: torch.device,
    seconds: float = math.inf,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
    trial: Callable[..., Any] = Trial,
) -> bool:
    """Measure the device's peak rates, then subjects one by one, and write their rows. ``progress`` gets each row.

    No subject is started after ``seconds``. Tests replace ``trial``.

    Returns:
        Whether all backends of this project worked. Failures of torch.compile and of public kernels are only
        recorded.
    """
    end, all_ok, rates = time.monotonic() + seconds, True, measure_peak_rates(device)
    results.facts |= asdict(rates)
    for subject in found:
        if time.monotonic() > end:
            break
        for row in _rows(subject, device, rates, trial):
            all_ok &= subject.backend not in _OWN or row["status"] in ("ok", *_SKIP)
            results.add(row)
            progress(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return all_ok


def _rows(subject: Subject, device: torch.device, rates: PeakRates, trial: Callable[..., Any]) -> list[dict[str, Any]]:
    torch.compiler.reset()
    rows, made, failure = [], None, ""
    # The backward is timed separately on a retained graph, which torch.compile allows only without donated buffers.
    with torch._functorch.config.patch(donated_buffer=False):
        for key in subject.keys:
            measured, status = None, failure
            if not failure:
                try:
                    made = made or trial(subject.case, subject.dtype, device, subject.function)
                    measured = made.measure(*key[KEY.index("pass") :])
                    status = "ok"
                except Exception as error:  # recorded in the row; the other passes continue
                    status = _status(error)
                    failure = status if made is None else ""
            if measured is None and device.type == "cuda":
                torch.cuda.synchronize(device)  # raises if this process has lost the device
                torch.cuda.empty_cache()
            rows.append(subject.row(key, measured, status, rates))
    return rows


def _status(error: Exception) -> str:
    if isinstance(error, UnsupportedError):
        return "not supported"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def from_file(path: Path) -> list[Benchmark]:
    """Read ops and shapes from a YAML or JSON file: a list of shapes per op, each as in ``cases.yaml``.

    Raises:
        ValueError: the file is malformed, or an op, size or dtype is unknown.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not content or not isinstance(content, dict) or not all(isinstance(shapes, list) for shapes in content.values()):
        raise ValueError(f"{path} must hold a list of shapes for each op")
    try:
        return [
            replace(each, cases=[case_of(each.op, sizes, "file") for sizes in content[each.op]])
            for each in _chosen(content)
        ]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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
) -> bool:
    """Time ops, print tables, and write ``ops.json`` and ``ops.png``; ``dfkd-fast bench --help`` lists the options.

    Returns:
        Whether the kernels of this project and the reference ran in all cases.

    Raises:
        ValueError: an unknown op, backend or file, or tuning on a CPU.
        RuntimeError: there is no CUDA device.
    """
    console, where = Console(), torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "bench needs a CUDA device, but none is available; see `dfkd-fast doctor`, or try it with --device cpu"
        )
    if tune and device != "cuda":
        raise ValueError("--tune searches launch configurations of a GPU and needs one")
    chosen = _chosen(ops)
    if shapes not in ("paper", "large"):
        file = expand(shapes)
        if not file.is_file():
            raise ValueError(f"--shapes must be paper, large or a file, and there is no file {file}")
        chosen = [each for each in from_file(file) if not ops or each.op in ops]
        shapes = "file"
    if tune:
        from dfkd_fast.benchmarks.ops.tune import tune as tune_ops

        tried = tune_ops(chosen, where, shapes, console.print)
        console.print(result_table([each.row() for each in tried], "launch configurations"))
    found = subjects(chosen, where, shapes=shapes, backends=backends)
    if not found:
        raise ValueError("nothing to measure: no case of these ops, shapes and backends")
    results = Results(Path(out) / "ops.json", key=KEY)
    all_ok = measure(found, results, device=where, progress=partial(_show, console))
    keys = {key for subject in found for key in subject.keys}
    rows = [row for row in results.rows if results.key_of(row) in keys]
    for op, lines in terminal_rows(rows).items():
        console.print(result_table(lines, f"{op}, microseconds per call"))
    console.print(f"rows: {results.path}", markup=False)
    console.print(f"plot: {save_plot(rows, results.path.with_suffix('.png'))}", markup=False)
    return all_ok


def _show(console: Console, row: dict[str, Any]) -> None:
    result = f"{row['median_us']:.4g} us" if row["median_us"] else row["status"]
    console.print(*(row[name] for name in KEY), result, markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure ops for a limited time; a job of `make gpu`. Returns 1 if a kernel of this project failed."""
    command = parser(__doc__, small="one case per op", out=False)
    command.add_argument("ops", nargs="*", help="all by default")
    command.add_argument("--seconds", type=float, default=math.inf, help="start no case after this")
    command.add_argument("--backends", nargs="+", default=["triton", "compile", "reference"])
    command.add_argument("--compile-only", action="store_true", help="fill the compilers' caches and time nothing")
    options = command.parse_args(arguments)

    device, chosen = torch.device(options.device), _chosen(options.ops)
    if options.size == "small":
        smallest = [min(each.cases, key=lambda case: case.work(2).forward_bytes) for each in chosen]
        chosen = [replace(a, cases=[replace(case, shapes="paper")]) for a, case in zip(chosen, smallest, strict=True)]
    found = subjects(chosen, device, backends=options.backends, passes=("forward", "backward"), caches=("cold",))
    if options.compile_only:
        for subject in found:
            with torch._functorch.config.patch(donated_buffer=False), contextlib.suppress(Exception):
                Trial(subject.case, subject.dtype, device, subject.function).run("both")
        return 0
    results = Results(options.out, key=KEY)
    show = partial(_show, Console())
    return int(not measure(found, results, device=device, seconds=options.seconds, progress=show))


if __name__ == "__main__":
    sys.exit(main())
