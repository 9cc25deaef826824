"""Compiles every kernel in every configuration that may be launched, for each architecture, on a machine without a GPU.

The cases of all ``bench_<op>.py`` run on tensors without data; each launch that they would make is written down, with
the configuration that the architecture gets, and compiled by Triton and ptxas. A launch is sound if it spills no
register, needs no stack, and fits the architecture's shared memory. What comes of it stands in
``kernels/compiled.json``; rows are kept while kernel source, argument types and configuration stay the same.

::

    python -m dfkd_fast.benchmarks.compile_kernels [--op OP ...] [--arch 90 ...] [--dtype bfloat16 ...] [--check]
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.benchmarks.cases import Benchmark, Case, Make

__all__ = ["ARCHITECTURES", "DTYPES", "Row", "benchmarks", "compile_row", "digest", "main", "rows_of", "run_on_meta"]

ARCHITECTURES = (80, 86, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_HERE = Path(__file__).resolve().parent


def benchmarks() -> dict[str, Benchmark]:
    """The benchmark of each op, by the op's name."""
    found = {}
    for path in sorted(_HERE.glob("bench_*.py")):
        module = importlib.import_module(f"dfkd_fast.benchmarks.{path.stem}")
        if isinstance(getattr(module, "BENCHMARK", None), Benchmark):
            found[module.BENCHMARK.op] = module.BENCHMARK
    return found


def _for_device(node: ast.stmt) -> bool:
    """Whether what stands at the top of a module may be part of a kernel: a function for the device, or a constant."""
    if isinstance(node, ast.FunctionDef):
        return any("jit" in ast.dump(decorator) for decorator in node.decorator_list)
    return isinstance(node, ast.Assign | ast.AnnAssign)


def digest(source: str, *, kernels: bool = False) -> str:
    """Twelve hex digits that change with what a module does, and not with its comments, docstrings or layout.

    Args:
        source: of the module.
        kernels: only with what its kernels do. What its launchers choose is in a :class:`Row`.
    """
    tree = ast.parse(source)
    if kernels:
        tree.body = [node for node in tree.body if _for_device(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


@functools.cache
def _sources(module: str) -> str:
    """What the kernels of a module are made of: its digest, and those of the kernel modules that it imports."""
    from dfkd_fast import kernels

    folder = Path(str(kernels.__file__)).parent
    seen: dict[str, str] = {}
    waiting = [module.rpartition(".")[2]]
    while waiting:
        name = waiting.pop()
        if name in seen or name in ("config", "__init__"):
            continue
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        seen[name] = digest(source, kernels=True)
        waiting += re.findall(r"^from dfkd_fast\.kernels\.(\w+) import", source, re.MULTILINE)
    return "-".join(seen[name] for name in sorted(seen))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compilation.

    Attributes:
        op: whose case asked for it first.
        case: that case.
        kernel: module and name of the function.
        arch: 90 for sm_90.
        signature: type of each argument by name, ``constexpr`` for constants.
        constants: the constants.
        attributes: what is known of arguments: divisible by 16.
        num_warps: of a block.
        num_stages: of the pipeline.
    """

    op: str
    case: str
    kernel: str
    arch: int
    signature: dict[str, str]
    constants: list[tuple[list[int], Any]]
    attributes: list[tuple[list[int], Any]]
    num_warps: int
    num_stages: int

    def key(self) -> str:
        """Identifies what is compiled: the source as well as the configuration."""
        what = [
            _sources(self.kernel.rpartition(".")[0]),
            self.kernel,
            self.arch,
            self.signature,
            [(path, str(value)) for path, value in self.constants],
            self.attributes,
            self.num_warps,
            self.num_stages,
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:14]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, tuple | list) else []


def run_on_meta(case: Case, make: Make) -> None:
    """Forward and backward of a case without data.

    Args:
        case: any.
        make: makes its inputs, on the meta device.
    """
    inputs = case.inputs(make)
    results = [t for t in _tensors(case.call(*inputs, backend="triton")) if t.requires_grad]
    wanted = [t for t in _tensors(list(inputs)) if t.requires_grad]
    if results and wanted:
        torch.autograd.grad(results, wanted, [torch.empty_like(t) for t in results], allow_unused=True)


def _specialised(launch: Any, arch: int) -> tuple[dict[str, str], list[Any], list[Any]]:
    """Argument types, constants and attributes, as Triton's own launcher would find them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    bound, specialization, rest = bind(**launch.arguments, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return signature, [(list(k), v) for k, v in constants.items()], [(list(k), v) for k, v in attributes.items()]


def rows_of(benchmark: Benchmark, arch: int, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Row]:
    """Every different compilation that the cases of an op ask for."""
    from dfkd_fast.ops.library import recorded

    seen = set()
    for dtype in dtypes:
        for case in benchmark.cases:
            with recorded(arch) as launches:
                run_on_meta(case, Make("meta", dtype))
            for launch in launches:
                signature, constants, attributes = _specialised(launch, arch)
                row = Row(
                    op=benchmark.op,
                    case=f"{case.name} {str(dtype).removeprefix('torch.')}",
                    kernel=f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__name__}",
                    arch=arch,
                    signature=signature,
                    constants=constants,
                    attributes=attributes,
                    num_warps=launch.config.num_warps,
                    num_stages=launch.config.num_stages,
                )
                if row.key() not in seen:
                    seen.add(row.key())
                    yield row


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


def compile_row(row: Row) -> dict[str, Any]:
    """Compile, and say what came of it: a row of ``compiled.json``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dfkd_fast.kernels.config import shared_memory

    module, _, name = row.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    constants = {tuple(path): value for path, value in row.constants}
    attributes = {tuple(path): value for path, value in row.attributes}
    sizes = {
        kernel.arg_names[path[0]]: value
        for path, value in constants.items()
        if row.signature[kernel.arg_names[path[0]]] == "constexpr"
        and kernel.params[path[0]].is_constexpr
        and isinstance(value, int | str)
    }
    result: dict[str, Any] = {
        "key": row.key(),
        "op": row.op,
        "case": row.case,
        "kernel": name,
        "arch": row.arch,
        "constants": " ".join(f"{name}={value}" for name, value in sizes.items()),
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
    }
    source = ASTSource(kernel, row.signature, constants, attributes)
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", row.arch, 32), options=options)
    except Exception as error:  # whatever the compiler says, it is this launch's fault
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {**result, "error": f"{type(error).__name__}: {' | '.join(lines[-3:])[:400]}"}
    ptx = compiled.asm["ptx"]
    result |= _resources(compiled.asm["cubin"])
    result |= {
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)) + len(re.findall(r"tcgen05\.mma", ptx)),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if result["stack"] or result["local"]:
        result["error"] = f"spills: {result['stack']} bytes of stack, {result['local']} of local memory"
    elif result["shared"] > shared_memory(row.arch):
        has = shared_memory(row.arch)
        result["error"] = f"needs {result['shared']} bytes of shared memory, sm_{row.arch} has {has}"
    return result


def _one_thread() -> None:
    torch.set_num_threads(1)


def _print(result: dict[str, Any]) -> None:
    used = (
        "{registers:>3} registers {shared:>6} B shared {wgmma:>3} wgmma {mma:>3} mma".format(**result)
        if "registers" in result
        else "not compiled"
    )
    print(
        f"{'FAIL' if 'error' in result else 'ok  '} {result['op']} {result['kernel']} sm_{result['arch']} "
        f"[{result['case']}] {result['constants']} warps={result['num_warps']} stages={result['num_stages']}: {used}"
        + (f"\n     {result['error']}" if "error" in result else ""),
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what has no row yet; 0 where every launch is sound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=None, help="these ops alone")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, help="90 for sm_90")
    parser.add_argument("--dtype", nargs="+", default=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
    parser.add_argument("--check", action="store_true", help="compile nothing: fail where the report lacks a launch")
    parser.add_argument("--write", action="store_true", help="write kernels/compiled.json (for all ops, all of them)")
    parser.add_argument("--workers", type=int, default=1, help="processes that compile")
    options = parser.parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):
        # Triton has read it already.
        os.execv(sys.executable, [sys.executable, "-m", "dfkd_fast.benchmarks.compile_kernels", *sys.argv[1:]])

    from dfkd_fast.report import read_compiled, write_compiled

    dtypes = [getattr(torch, name) for name in options.dtype]
    found = {op: each for op, each in benchmarks().items() if options.op is None or op in options.op}
    rows = [row for benchmark in found.values() for arch in options.arch for row in rows_of(benchmark, arch, dtypes)]
    unique = {row.key(): row for row in rows}
    known = {row["key"]: row for row in read_compiled()["rows"]}
    if options.check:
        missing = [row for key, row in unique.items() if key not in known]
        for row in missing:
            print(f"not in compiled.json: {row.op} {row.kernel} sm_{row.arch} [{row.case}]")
        print(f"{len(unique)} launches, {len(missing)} without a row")
        return int(bool(missing))
    results: dict[str, dict[str, Any]] = {}
    waiting = []
    for key, row in unique.items():
        if options.write and key in known:
            results[key] = known[key]
        else:
            waiting.append(row)
    if options.workers > 1:
        with multiprocessing.get_context("spawn").Pool(options.workers, _one_thread) as pool:
            for result in pool.imap_unordered(compile_row, waiting):
                _print(result)
                results[result["key"]] = result
    else:
        for row in waiting:
            result = compile_row(row)
            _print(result)
            results[result["key"]] = result
    bad = [result for result in results.values() if "error" in result]
    if options.write:
        others = [row for row in known.values() if row["op"] not in found] if options.op else []
        write_compiled([*others, *(result for result in results.values() if "error" not in result)])
    print(f"{len(results)} launches, {len(waiting)} compiled now, {len(bad)} unsound")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
