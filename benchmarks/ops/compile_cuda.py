"""Compile the CUDA kernels of csrc/, without a GPU, and print what the assembler says of them.

For each kernel: registers of a thread, and the number of wgmma instructions in its code. A kernel is sound without
stack and spills; where its name ends in ``_wgmma`` it must have them, and they must not be serialised.

    python -m dfkd_fast.benchmarks.ops.compile_cuda [--workers N] [FILE.cu ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dfkd_fast.doctor import find_nvcc
from dfkd_fast.ops.extension import kernel_name

__all__ = ["CSRC", "compile_file", "count_wgmma", "disassembler", "main", "parse", "sources", "unsound"]

CSRC = Path(__file__).resolve().parents[2] / "csrc"

_SERIALISED = re.compile(r"wgmma\.mma_async instructions are serialized.* in (?:the )?function '([^']+)'")
_INSTRUCTION = re.compile(r"\bHGMMA\b|\bwgmma\.mma_async\b")
_KERNEL = re.compile(r"Function : (\S+)|^\s*\.text\.(\S+):|^\s*(?:\.\w+ )*\.entry (\w+)")
_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>[^']+)' for 'sm_(?P<arch>\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?(\d+) bytes smem)?")


def sources() -> list[Path]:
    """The files that are compiled."""
    return sorted(CSRC.glob("*.cu"))


def parse(log: str) -> list[dict[str, Any]]:
    """Rows of what ``ptxas -v`` prints: ``kernel`` (its symbol), its numbers, and ``complaints``.

    Those are of the kernel, or of one of its file where the assembler does not name it.
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
    serialised = set(_SERIALISED.findall(log))
    unnamed = ["setmaxnreg ignored in this file"] if "'setmaxnreg' ignored" in log else []
    return [{**row, "complaints": ["wgmma serialised"] * (row["kernel"] in serialised) + unnamed} for row in rows]


def count_wgmma(code: str) -> dict[str, int]:
    """How many wgmma instructions each kernel has, by its symbol.

    Args:
        code: as cuobjdump or nvdisasm print it, or PTX.
    """
    found: dict[str, int] = {}
    kernel = ""
    for line in code.splitlines():
        if begun := _KERNEL.search(line):
            kernel = begun[begun.lastindex or 0]
            found.setdefault(kernel, 0)
        elif kernel:
            found[kernel] += len(_INSTRUCTION.findall(line))
    return found


def disassembler(nvcc: str) -> list[str] | None:
    """A command that prints the machine code of a cubin.

    The toolkit's, else the one that comes with Triton; None where there is none.
    """
    folders = [Path(nvcc).resolve().parent]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for name, words in (("cuobjdump", ["-sass"]), ("nvdisasm", list[str]())):
        for folder in folders:
            if (folder / name).exists():
                return [str(folder / name), *words]
    return None


def _readable(symbols: Iterable[str]) -> dict[str, str]:
    """Kernel names as they stand in the source, with their template arguments."""
    symbols = list(symbols)
    filt = shutil.which("c++filt")
    if filt is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run([filt], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = {}
    for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True):
        names[symbol] = kernel_name(name)
    return names


def _wgmma(nvcc: str, folder: Path) -> dict[str, int]:
    """Of what was compiled into a folder, with what it went through."""
    command = disassembler(nvcc)
    if command is None:
        return count_wgmma("\n".join(path.read_text() for path in folder.glob("*.ptx")))
    (path,) = folder.glob("*.cubin")
    return count_wgmma(subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout)


def compile_file(nvcc: str, path: Path) -> list[dict[str, Any]]:
    """Compile one file, and read what the assembler says.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_nvcc_") as folder:
        command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", str(path)]
        # Only the device's code: compiling the host's would take a third longer.
        command += ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-o", f"{folder}/{path.stem}.cubin"]
        if disassembler(nvcc) is None:
            command += ["--keep", f"--keep-dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path.name}:\n{done.stderr[-4000:]}")
        counted = _wgmma(nvcc, Path(folder))
    rows = parse(done.stdout + done.stderr)
    names = _readable(row["kernel"] for row in rows)
    return [{**row, "kernel": names[row["kernel"]], "wgmma": counted.get(row["kernel"], 0)} for row in rows]


def unsound(row: dict[str, Any]) -> str | None:
    """What is wrong with a kernel's code; None where nothing is."""
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
    parser.add_argument("files", nargs="*", help="only these of csrc/")
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
