"""Compiles every Triton launch of the benchmark cases for each architecture, without a GPU: `make kernels`.

The cases run on meta tensors. Each launch is recorded with its configuration for the architecture, then compiled by
Triton and ptxas. A launch is sound if it does not spill, needs no stack and fits the architecture's shared memory.

    python -m dfkd_fast.benchmarks.ops.compile_kernels [--op OP ...] [--arch 90 ...] [--dtype bfloat16 ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Benchmark, Case, Make, gradients, tensors
from dfkd_fast.benchmarks.ops.compile_cuda import cuobjdump
from dfkd_fast.benchmarks.results import dtype_name

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "Compilation",
    "compilations",
    "compile_for_this_gpu",
    "compile_one",
    "run_on_meta",
]

ARCHITECTURES = (80, 86, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Compilation:
    """The input of Triton's compiler for one launch: a kernel, argument types and constants. ``arch`` 90 is sm_90."""

    case: str
    kernel: str
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int

    def key(self) -> str:
        """Return a key of the binary, equal for launches that can share it."""
        named = [(path, str(value)) for path, value in self.constants.items()]
        parts = (self.kernel, self.arch, self.signature, named, list(self.attributes.items()))
        return json.dumps([*parts, self.num_warps, self.num_stages])


def run_on_meta(case: Case, make: Make) -> None:
    """Run forward and backward of a case on meta tensors."""
    inputs = case.inputs(make)
    gradients(tensors(case.call(*inputs, backend="triton")), inputs)


def compilations(benchmark: Benchmark, arch: int, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Compilation]:
    """Yield every distinct compilation that the cases of an op need."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from dfkd_fast.ops.custom_op import record_op_launches

    backend, seen = make_backend(GPUTarget("cuda", arch, 32)), set()
    for dtype in dtypes:
        for case in benchmark.cases:
            with record_op_launches(arch) as launches:
                run_on_meta(case, Make("meta", dtype))
            for launch in launches:
                # Specialize the arguments as Triton's launcher does.
                kernel = launch.kernel
                bind = create_function_from_signature(kernel.signature, kernel.params, backend)
                options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
                bound, special, rest = bind(**launch.arguments, **launch.constants, **options)
                _, signature, constants, attributes = kernel._pack_args(backend, options, bound, special, rest)
                found = Compilation(
                    f"{benchmark.op} {case.name} {dtype_name(dtype)}",
                    f"{kernel.fn.__module__}.{kernel.fn.__name__}",
                    *(arch, signature, constants, attributes),
                    **options,
                )
                if found.key() not in seen:
                    seen.add(found.key())
                    yield found


def _resources(cubin: bytes) -> dict[str, int]:
    """Return registers per thread and bytes of stack and local memory of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = cuobjdump("-res-usage", Path(file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {text}")
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


def compile_one(what: Compilation) -> dict[str, Any]:
    """Compile one launch.

    Returns:
        ``registers``; bytes of ``stack``, ``local`` and ``shared`` memory; the number of ``wgmma`` and ``mma``
        instructions; and ``error``, the reason why the launch is not sound, or "".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dfkd_fast.kernels.config import shared_memory

    module, _, name = what.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    options = {"num_warps": what.num_warps, "num_stages": what.num_stages}
    tiles = {kernel.arg_names[path[0]]: value for path, value in what.constants.items()}
    row: dict[str, Any] = {"kernel": name, "arch": what.arch, "case": what.case, **options, "error": ""}
    row["constants"] = " ".join(f"{k}={v}" for k, v in tiles.items() if k.isupper() and isinstance(v, int | str))
    source = ASTSource(kernel, what.signature, what.constants, what.attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", what.arch, 32), options=options)
    except Exception as error:  # reported with the launch
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {**row, "error": f"{type(error).__name__}: {' | '.join(lines[-3:])[:400]}"}
    ptx = compiled.asm["ptx"]
    row |= _resources(compiled.asm["cubin"])
    row["shared"], row["wgmma"] = compiled.metadata.shared, len(re.findall(r"wgmma\.mma_async", ptx))
    row["mma"] = len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx))
    if row["stack"] or row["local"]:
        row["error"] = f"spills: {row['stack']} bytes of stack, {row['local']} of local memory"
    elif row["shared"] > (most := shared_memory(what.arch)):
        row["error"] = f"needs {row['shared']} bytes of shared memory, sm_{what.arch} has {most}"
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print. Returns 1 if a launch is not sound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, help="90 for sm_90")
    parser.add_argument("--dtype", nargs="+", default=[dtype_name(dtype) for dtype in DTYPES])
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):
        # Triton read the variable when it was imported: start again without it.
        given = sys.argv[1:] if arguments is None else arguments
        os.execv(sys.executable, [sys.executable, "-m", "dfkd_fast.benchmarks.ops.compile_kernels", *given])

    dtypes = [getattr(torch, name) for name in options.dtype]
    found = (each for op in options.op for arch in options.arch for each in compilations(BENCHMARKS[op], arch, dtypes))
    every = {each.key(): each for each in found}
    bad = 0
    with multiprocessing.get_context("spawn").Pool(options.workers, torch.set_num_threads, (1,)) as pool:
        for row in pool.imap_unordered(compile_one, every.values()):
            bad += bool(row["error"])
            used = "{registers} registers, {shared} B shared, {wgmma} wgmma, {mma} mma" if "registers" in row else ""
            what = "{kernel} sm_{arch} [{case}] {constants} warps={num_warps} stages={num_stages}: "
            print((what + used + " {error}").format(**row), flush=True)
    print(f"{len(every)} compilations, {bad} not sound")
    return int(bool(bad))


def compile_for_this_gpu() -> int:
    """Compile the bfloat16 kernels for this GPU, or for sm_90 without one: ``dfkd-fast doctor --kernels``."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return main(["--arch", f"{major}{minor}", "--dtype", "bfloat16", "--workers", str(os.cpu_count() or 1)])


if __name__ == "__main__":
    sys.exit(main())
