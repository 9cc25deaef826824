"""Every op by every provider, beside its floor: what ``dfkd-fast bench`` and the stage "ops" of ``make gpu`` measure.

Providers, the ``backend`` of a row: ``reference`` is eager PyTorch; ``compile`` and ``compile_max_autotune`` are
torch.compile (default mode, and max-autotune-no-cudagraphs) of the best PyTorch formulation known; ``triton`` and
``cuda`` are this project's; ``peer:NAME`` is a public kernel, where its library is installed. The floor of a row is the
larger of its least bytes over the copy bandwidth and its operations over the bf16 matrix rate, both measured in the
same run. A provider that runs out of memory, or does not serve a case, has a row that says so (``status``) and no
numbers.

Rows stand for the sources that they were measured with (``sources``): a change of one op's kernel outdates that op's
rows of ``triton``, and no others.

The stage measures in a child process (guard.py): a kernel that never ends, or takes the device from its process, is a
row that says so and not the end of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.cases import Benchmark, Case, Make
from dfkd_fast.benchmarks.common import Clock, Key, Results, stage_arguments
from dfkd_fast.benchmarks.compile_kernels import benchmarks, digest
from dfkd_fast.benchmarks.guard import Journal, supervise
from dfkd_fast.benchmarks.measure import CACHES, PASSES, Ceilings, Measurement, Trial, ceilings, tensors
from dfkd_fast.report import environment, read_results

__all__ = ["KEY", "Absent", "Subject", "main", "measure", "open_results", "row_of", "sources", "subjects", "version"]

VERSION = "1"  # of how things are timed

KEY = ("op", "case", "dtype", "backend", "pass", "l2")

# What decides most comes first.
_ORDER = ("triton", "cuda", "compile", "reference", "peer", "compile_max_autotune")
_OURS = ("reference", "triton", "cuda")  # where these fail, something is to be mended
_MODES = {"compile": None, "compile_max_autotune": "max-autotune-no-cudagraphs"}

_LIMIT_S, _COMPILE_LIMIT_S = 60.0, 180.0  # after which a subject is taken for lost
_MOST_LOST = 2  # subjects of an op's backend; after that its others are left for when it has been mended

_CPU_BYTES, _CPU_FLOPS = 64e6, 5e9  # on a CPU, cases that need more are left out

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What one trial is about: a case, in one dtype, by one provider, and the rows that come of it."""

    op: str
    case: Case
    dtype: torch.dtype
    backend: str
    function: Callable[..., Any]
    keys: tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A provider that is not there, and why."""

    backend: str
    why: str


def _kernel_modules(op: str) -> list[Path]:
    """The kernel modules of an op: those of its name and those that they import."""
    from dfkd_fast import kernels

    folder = Path(str(kernels.__file__)).parent
    if not (folder / f"{op}.py").exists():
        return sorted(folder.glob("*.py"))
    seen: set[str] = set()
    waiting = [op, f"{op}_fwd", f"{op}_bwd", "config"]
    while waiting:
        name = waiting.pop()
        if name in seen or not (folder / f"{name}.py").exists():
            continue
        seen.add(name)
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        waiting += re.findall(r"^from dfkd_fast\.kernels\.(\w+) import", source, re.MULTILINE)
        for names in re.findall(r"^from dfkd_fast\.kernels import (.+)$", source, re.MULTILINE):
            waiting += re.findall(r"\w+", names)
    return [*(folder / f"{name}.py" for name in sorted(seen)), folder / "tuned.json"]


def _digest(paths: Iterable[Path]) -> str:
    parts = [VERSION]
    for path in paths:
        if path.exists():
            text = path.read_text(encoding="utf-8")
            parts.append(path.name + digest(text) if path.suffix == ".py" else text)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@functools.cache
def sources(op: str, backend: str) -> str:
    """Twelve hex digits that change with what a row of this op and provider measures."""
    from dfkd_fast import ops, reference

    paths = [_HERE / f"bench_{op}.py"]
    if backend in ("triton", "cuda"):
        paths.append(Path(str(ops.__file__)).with_name(f"{op}.py"))
        paths += _kernel_modules(op) if backend == "triton" else _cuda_sources(op)
    elif not backend.startswith("peer:"):
        folder = Path(str(reference.__file__)).parent
        paths += [folder / f"{op}.py", folder / "common.py"]
    return _digest(paths)


def _cuda_sources(op: str = "") -> list[Path]:
    """Files of csrc/ that an op, or any, is compiled from; none where this is not a checkout."""
    csrc = _HERE.parent / "csrc"
    return sorted({path for name in (f"{op}*.cu", f"{op}*.h", "sm90.h", "ops.cpp") for path in csrc.glob(name)})


def version() -> str:
    """Changes with any source that any row depends on."""
    from dfkd_fast import kernels, ops, reference

    folders = [Path(str(package.__file__)).parent for package in (kernels, ops, reference)]
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return _digest([*sorted(_HERE.glob("bench_*.py")), *files, folders[0] / "tuned.json", *_cuda_sources()])


def _providers(benchmark: Benchmark, case: Case, absent: dict[str, Absent]) -> dict[str, Callable[..., Any]]:
    """The functions of a case by provider."""
    from dfkd_fast import ops
    from dfkd_fast.ops import extension

    def by(backend: str) -> Callable[..., Any]:
        return lambda *inputs: case.call(*inputs, backend=backend)

    plain = case.compiled or by("reference")
    found: dict[str, Callable[..., Any]] = {"reference": by("reference")}
    for name, mode in _MODES.items():
        found[name] = torch.compile(plain, dynamic=False, mode=mode)
    for name in ops.backends().get(benchmark.op, ()):
        if name == "cuda" and extension.UNAVAILABLE is not None:
            absent.setdefault(name, Absent(backend=name, why=extension.UNAVAILABLE))
        else:
            found[name] = by(name)
    for name, peer in benchmark.peers.items():
        try:
            function = peer(case.name)
        except ImportError as error:
            absent.setdefault(name, Absent(backend=f"peer:{name}", why=str(error)))
            continue
        if function is not None:
            found[f"peer:{name}"] = function
    return found


def _fits_a_cpu(case: Case) -> bool:
    work = case.work(4)
    return work.forward_bytes <= _CPU_BYTES and work.forward_flops <= _CPU_FLOPS


def subjects(
    chosen: Sequence[Benchmark],
    device: torch.device,
    *,
    shapes: Sequence[str] = ("paper", "large"),
    backends: Sequence[str] | None = None,
) -> tuple[list[Subject], list[Absent]]:
    """What there is to measure, in the order in which it is best measured, and which providers are not there.

    Args:
        chosen: the ops.
        device: on a CPU there are the reference and torch.compile's default mode, of cases that are small enough, with
            a warm cache.
        shapes: of which kinds, the most important first.
        backends: these providers alone; None is all.
    """
    absent: dict[str, Absent] = {}
    found = []
    caches = CACHES if device.type == "cuda" else ("warm",)
    for benchmark in chosen:
        for case in benchmark.cases:
            if case.shapes not in shapes or (device.type != "cuda" and not _fits_a_cpu(case)):
                continue
            for backend, function in _providers(benchmark, case, absent).items():
                if device.type != "cuda" and backend not in ("reference", "compile"):
                    continue
                if backends is not None and backend not in backends:
                    continue
                for dtype in case.dtypes:
                    gradients = any(t.requires_grad for t in tensors(case.inputs(Make("meta", dtype))))
                    named = str(dtype).removeprefix("torch.")
                    keys = tuple(
                        (benchmark.op, case.name, named, backend, which, l2)
                        for which in (PASSES if gradients else PASSES[:1])
                        for l2 in caches
                    )
                    found.append(
                        Subject(op=benchmark.op, case=case, dtype=dtype, backend=backend, function=function, keys=keys)
                    )
    rank = {name: place for place, name in enumerate(_ORDER)}
    found.sort(key=lambda each: (shapes.index(each.case.shapes), rank[each.backend.partition(":")[0]]))
    return found, list(absent.values())


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def row_of(
    subject: Subject, key: Key, measured: Measurement | None, rates: Ceilings, status: str = "ok"
) -> dict[str, Any]:
    """One row; without a measurement, ``status`` says why."""
    work = subject.case.work(subject.dtype.itemsize)
    which = key[KEY.index("pass")]
    moved = (work.forward_bytes if which != "backward" else 0) + (work.backward_bytes if which != "forward" else 0)
    flops = (work.forward_flops if which != "backward" else 0) + (work.backward_flops if which != "forward" else 0)
    floor = rates.floor_us(moved, flops)
    row: dict[str, Any] = dict(zip(KEY, key, strict=True))
    for name in ("median_us", "p10_us", "p90_us"):
        row[name] = _round(getattr(measured, name)) if measured else None
    row |= {
        "bytes": moved,
        "flops": flops,
        "floor_us": _round(floor),
        "fraction": _round(floor / measured.median_us) if measured else None,
        "peak_bytes": measured.peak_bytes if measured else None,
        "status": status,
        "shapes": subject.case.shapes,
        "sources": sources(subject.op, subject.backend),
    }
    if measured:
        row |= {"timer": measured.timer, "calls": measured.calls, "laps": measured.laps}
    return row


def open_results(path: Path, rates: Ceilings) -> Results:
    """The result file, with the present device and its ceilings at its head.

    Args:
        path: the file.
        rates: as measured in this run.
    """
    here = environment()
    facts = {"copy_gbps": rates.copy_gbps, "matmul_tflops": rates.matmul_tflops}
    results = Results(
        path,
        stage="ops",
        version=version(),
        key=KEY,
        facts=facts,
        keep=lambda row: row["sources"] == sources(row["op"], row["backend"]),
    )
    results.head["device"] = {
        "name": here["device"]["name"],
        "driver": here["device"].get("driver"),
        **{what: here[what] for what in ("torch", "triton", "cuda", "commit")},
        **facts,
    }
    return results


def measure(
    found: Sequence[Subject],
    results: Results,
    *,
    device: torch.device,
    rates: Ceilings,
    clock: Clock | None = None,
    since: str | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
    complain: Callable[[str], None] = print,
    trial: Callable[..., Any] = Trial,
    journal: Journal | None = None,
) -> bool:
    """Measure what has no row yet, as far as time allows.

    Args:
        found: the subjects.
        results: where rows go, one by one.
        device: where to measure.
        rates: for the floors.
        clock: the time there is; None is no end of it.
        since: measure rows again that are older.
        tell: given each row.
        complain: given each failure, in words.
        trial: makes a trial.
        journal: told what is under way.

    Returns:
        Whether all that should work did: a failure of torch.compile or of a public kernel is a row with that status,
        one of an op's own backends leaves no row, unless it says that it does not serve the case.
    """
    by_key = {key: subject for subject in found for key in subject.keys}
    groups: dict[Subject, list[Key]] = {}
    for key in results.todo(by_key, since):
        groups.setdefault(by_key[key], []).append(key)
    sound = True
    for subject, keys in groups.items():
        if clock is not None and not clock.fits():
            break
        if _is_given_up(results, subject):
            sound = False
            continue
        start = time.perf_counter()
        limit = _COMPILE_LIMIT_S if subject.backend in _MODES else _LIMIT_S
        with journal.begun(keys, limit) if journal is not None else contextlib.nullcontext():
            sound &= _measure_one(subject, keys, results, device, rates, tell, complain, trial)
        if clock is not None:
            clock.took(time.perf_counter() - start)
    return sound


def _is_given_up(results: Results, subject: Subject) -> bool:
    """Whether too much was lost to this provider of this op: each costs a limit, and some a device."""
    lost = {
        (row["case"], row["dtype"])
        for row in results.rows
        if row["status"].startswith("lost") and (row["op"], row["backend"]) == (subject.op, subject.backend)
    }
    return len(lost) >= _MOST_LOST


def _measure_one(
    subject: Subject,
    keys: Sequence[Key],
    results: Results,
    device: torch.device,
    rates: Ceilings,
    tell: Callable[[dict[str, Any]], None],
    complain: Callable[[str], None],
    trial: Callable[..., Any],
) -> bool:
    """The rows of one subject; whether it works where it should."""
    from dfkd_fast.ops.backend import Unserved

    sound = True
    torch.compiler.reset()
    made, lost = None, ""
    # Timing backward on its own keeps the graph, which torch.compile allows only without this.
    with torch._functorch.config.patch(donated_buffer=False):
        for key in keys:
            measured, status, complaint = None, "ok", ""
            try:
                if made is None and not lost:
                    made = trial(subject.case, subject.dtype, device, subject.function)
                if made is None:
                    status = lost
                elif key[KEY.index("pass")] not in made.passes:
                    status = "no gradient"
                else:
                    measured = made.measure(*key[KEY.index("pass") :])
            except (torch.OutOfMemoryError, Unserved) as error:
                status = "not served" if isinstance(error, Unserved) else "out of memory"
                lost = status if made is None else ""
            except Exception as error:  # one that fails must not hide the others
                first = (str(error).strip().splitlines() or [""])[0]
                status = complaint = f"{type(error).__name__}: {first}"[:300]
            if measured is None and device.type == "cuda":
                gc.collect()
                torch.cuda.synchronize(device)  # where it fails, the device is lost to this process
                torch.cuda.empty_cache()
            if complaint:
                complain(f"{' '.join(key)}: {complaint}")
                if subject.backend in _OURS:
                    sound = False
                    continue
            row = row_of(subject, key, measured, rates, status)
            results.add(row)
            tell(row)
    del made
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return sound


def _lose(path: Path, found: Sequence[Subject], keys: Sequence[Sequence[str]], why: str) -> None:
    """Rows for what a child was at when it was lost."""
    by_key = {key: subject for subject in found for key in subject.keys}
    known = read_results(path)
    assert known is not None, "a child opens its results before it measures"
    rates = Ceilings(**{name: known["device"][name] for name in ("copy_gbps", "matmul_tflops")})
    results = open_results(path, rates)
    for key in results.todo(tuple(key) for key in keys):
        print(f"{' '.join(key)}: lost: {why}", flush=True)
        results.add(row_of(by_key[key], key, None, rates, f"lost: {why}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, as far as time allows."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ops", nargs="+", default=None, help="these alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    device, clock, journal = torch.device(options.device), Clock(options.seconds), Journal(options.out)
    everything, absent = subjects(list(benchmarks().values()), device)
    if not options.child:
        command = [sys.executable, "-u", "-m", "dfkd_fast.benchmarks.ops", *(arguments or sys.argv[1:]), "--child"]
        return supervise(command, journal, clock, lambda keys, why: _lose(options.out, everything, keys, why))
    for each in absent:
        print(f"{each.backend} is not here: {each.why}", flush=True)
    asked = [subject for subject in everything if options.ops is None or subject.op in options.ops]
    rates = ceilings(device)
    results = open_results(options.out, rates)

    def tell(row: dict[str, Any]) -> None:
        said = f"{row['median_us']:.4g} us" if row["median_us"] is not None else row["status"]
        print(f"{' '.join(str(row[name]) for name in KEY)}: {said}", flush=True)

    sound = measure(
        asked, results, device=device, rates=rates, clock=clock, since=options.since, tell=tell, journal=journal
    )
    results.finish(complete=not results.todo(key for subject in everything for key in subject.keys))
    return int(not sound or any(row["status"].startswith("lost") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
