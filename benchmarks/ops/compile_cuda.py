"""Compiles the CUDA kernels of csrc/ without a GPU and prints their resources: `make kernels`.

For each kernel: registers per thread and the number of wgmma instructions. A kernel is sound if it uses no stack and
does not spill. If its name ends in ``_wgmma``, it must contain wgmma instructions, and they must not be serialized.

    python -m dfkd_fast.benchmarks.ops.compile_cuda [--workers N] [FILE.cu ...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dfkd_fast.doctor import find_nvcc
from dfkd_fast.ops.extension import kernel_name

__all__ = ["CSRC", "compile_file", "count_wgmma", "cuobjdump", "main", "parse", "sources", "unsound"]

CSRC = Path(__file__).resolve().parents[2] / "csrc"

_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized.* in (?:the )?function '([^']+)'")
_INSTRUCTION = re.compile(r"\bHGMMA\b|\bwgmma\.mma_async\b")
_KERNEL = re.compile(r"Function : (\S+)|^\s*\.text\.(\S+):|^\s*(?:\.\w+ )*\.entry (\w+)")
_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>[^']+)' for 'sm_(?P<arch>\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?(\d+) bytes smem)?")


def sources() -> list[Path]:
    """Return the files that are compiled by default."""
    return sorted(CSRC.glob("*.cu"))


def parse(log: str) -> list[dict[str, Any]]:
    """Parse the output of ``ptxas -v``: one row per kernel with its symbol, resources and ``complaints``.

    A complaint in which the assembler names no kernel applies to all kernels of the file.
    """
    rows: list[dict[str, Any]] = []
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            rows.append({"kernel": found["symbol"]})
        elif rows and (found := _STACK.search(line)):
            rows[-1] |= dict(zip(("stack", "spill_stores", "spill_loads"), map(int, found.groups()), strict=True))
        elif rows and (found := _USED.search(line)):
            registers, barriers, shared = (int(number or 0) for number in found.groups())
            rows[-1] |= {"registers": registers, "barriers": barriers, "static_shared": shared}
    serialized = set(_SERIALIZED.findall(log))
    unnamed = ["setmaxnreg ignored in this file"] if "'setmaxnreg' ignored" in log else []
    return [{**row, "complaints": ["wgmma serialized"] * (row["kernel"] in serialized) + unnamed} for row in rows]


def count_wgmma(code: str) -> dict[str, int]:
    """Count the wgmma instructions of each kernel by its symbol, in the output of cuobjdump or nvdisasm or in PTX."""
    found: dict[str, int] = {}
    kernel = ""
    for line in code.splitlines():
        if begun := _KERNEL.search(line):
            kernel = begun[begun.lastindex or 0]
            found.setdefault(kernel, 0)
        elif kernel:
            found[kernel] += len(_INSTRUCTION.findall(line))
    return found


def cuobjdump(option: str, cubin: Path) -> str:
    """Return the output of the cuobjdump that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _demangled(symbols: Sequence[str]) -> list[str]:
    """Return kernel names as in the source, with template arguments; without c++filt, return the symbols."""
    if not symbols or shutil.which("c++filt") is None:
        return list(symbols)
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [kernel_name(name) for name in done.stdout.splitlines()]


def compile_file(nvcc: str, path: Path) -> list[dict[str, Any]]:
    """Compile one file and return the rows of :func:`parse` with ``wgmma``, the number of these instructions.

    Raises:
        RuntimeError: the file does not compile; the message is the compiler's.
    """
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_nvcc_") as folder:
        cubin = Path(folder) / f"{path.stem}.cubin"
        command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", str(path)]
        # Only the device code: compiling the host code would take a third longer.
        command += ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path.name}:\n{done.stderr[-4000:]}")
        counted = count_wgmma(cuobjdump("-sass", cubin))
    rows = parse(done.stdout + done.stderr)
    names = _demangled([row["kernel"] for row in rows])
    return [
        {**row, "kernel": name, "wgmma": counted.get(row["kernel"], 0)} for row, name in zip(rows, names, strict=True)
    ]


def unsound(row: dict[str, Any]) -> str | None:
    """Return why a kernel is not sound; None if it is."""
    wrong = [f"{row[name]} bytes of {name}" for name in ("stack", "spill_stores", "spill_loads") if row[name]]
    name = row["kernel"].partition("<")[0]
    if name.endswith("_wgmma") or (name.startswith("_Z") and "_wgmma" in name):
        wrong += [] if row["wgmma"] else ["no wgmma"]
    wrong += row.get("complaints", [])
    return ", ".join(wrong) or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print.

    Returns:
        0; 1 if a kernel is not sound; 2 if there is no compiler.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files of csrc/; all by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc under CUDA_HOME, on the PATH or in /usr/local/cuda", file=sys.stderr)
        return 2
    paths = [CSRC / name for name in options.files] or sources()
    bad = 0
    with ThreadPoolExecutor(options.workers) as pool:
        for path, rows in zip(paths, pool.map(lambda path: compile_file(nvcc, path), paths), strict=True):
            for row in sorted(rows, key=lambda row: row["kernel"]):
                wrong = unsound(row)
                bad += wrong is not None
                words = [f"{row['registers']} registers", *([f"{row['wgmma']} wgmma"] if row["wgmma"] else [])]
                print(f"{path.name} {row['kernel']}: {', '.join([*words, *([wrong] if wrong else [])])}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
