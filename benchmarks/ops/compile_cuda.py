"""Compile the CUDA kernels of csrc/ for every architecture, without a GPU, and keep what the assembler says of them.

``csrc/compiled.json`` has a row a kernel and architecture: registers of a thread, bytes of stack and spills, barriers,
static shared memory, and the number of wgmma instructions in its code. It is written by ``--write`` where all of them
are sound: no stack, no spill, and where a kernel's name ends in ``_hopper``, wgmma that run one beside the other. A
digest of the sources says what it was made from. The files of csrc/hopper/ are for sm_90a alone.

    python -m dfkd_fast.benchmarks.compile_cuda [--write] [--check] [--workers N] [FILE.cu ...]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
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

__all__ = [
    "ARCHITECTURES",
    "CSRC",
    "TABLE",
    "architectures",
    "compile_file",
    "count_wgmma",
    "digest",
    "disassembler",
    "main",
    "parse",
    "sources",
    "unsound",
]

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TABLE = CSRC / "compiled.json"
ARCHITECTURES = ("80", "90a", "100f")

_WGMMA = "90a"  # the one architecture that has it
_SERIALISED = re.compile(r"wgmma\.mma_async instructions are serialized.* in (?:the )?function '([^']+)'")
_INSTRUCTION = re.compile(r"\bHGMMA\b|\bwgmma\.mma_async\b")
_KERNEL = re.compile(r"Function : (\S+)|^\s*\.text\.(\S+):|^\s*(?:\.\w+ )*\.entry (\w+)")
_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>[^']+)' for 'sm_(?P<arch>\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?(\d+) bytes smem)?")


def digest(csrc: Path = CSRC) -> str:
    """Of everything that decides what the kernels compile to, but the compiler."""
    content = hashlib.sha256(repr(ARCHITECTURES).encode())
    headers = [path for folder in (csrc, csrc / "hopper") for path in folder.glob("*.h")]
    for path in sorted([*sources(csrc), *headers]):
        content.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()


def sources(csrc: Path = CSRC) -> list[Path]:
    """The files that are compiled."""
    return sorted([*csrc.glob("*.cu"), *csrc.glob("hopper/*.cu")])


def architectures(name: str) -> tuple[str, ...]:
    """What a file of csrc/ is compiled for."""
    return (_WGMMA,) if name.startswith("hopper/") else ARCHITECTURES


def parse(log: str) -> list[dict[str, Any]]:
    """Rows of what ``ptxas -v`` prints: ``kernel`` (its symbol), ``arch``, its numbers, and ``complaints``.

    Those are of the kernel, or of one of its file where the assembler does not name it.
    """
    rows: list[dict[str, Any]] = []
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            rows.append({"kernel": found["symbol"], "arch": found["arch"]})
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
    """Compile one file for each of its architectures, and read what the assembler says.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    rows = []
    name = path.relative_to(CSRC).as_posix()
    for arch in architectures(name):
        with tempfile.TemporaryDirectory(prefix="dfkd_fast_nvcc_") as folder:
            command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", str(path)]
            # The device's code alone: compiling the host's as often would take a third longer.
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", f"{folder}/{path.stem}.cubin"]
            if arch == _WGMMA and disassembler(nvcc) is None:
                command += ["--keep", f"--keep-dir={folder}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} for sm_{arch}:\n{done.stderr[-4000:]}")
            counted = _wgmma(nvcc, Path(folder)) if arch == _WGMMA else {}
            rows += [
                {"file": name, **row, "arch": arch, "wgmma": counted.get(row["kernel"], 0)}
                for row in parse(done.stdout + done.stderr)
            ]
    names = _readable(dict.fromkeys(row["kernel"] for row in rows))
    return [{**row, "kernel": names[row["kernel"]]} for row in rows]


def unsound(row: dict[str, Any]) -> str | None:
    """What is wrong with a kernel's code; None where nothing is."""
    wrong = [f"{row[name]} bytes of {name}" for name in ("stack", "spill_stores", "spill_loads") if row[name]]
    name = row["kernel"].partition("<")[0]
    if name.endswith("_hopper") or (name.startswith("_Z") and "_hopper" in name):
        wrong += [] if row["wgmma"] else ["no wgmma"]
    wrong += row.get("complaints", [])
    return ", ".join(wrong) or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and write or check the table.

    Returns:
        0; 1 where a kernel is not sound or the table is not of these sources; 2 where there is no compiler.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="these of csrc/ alone")
    parser.add_argument("--write", action="store_true", help="write csrc/compiled.json")
    parser.add_argument("--check", action="store_true", help="say whether csrc/compiled.json is of these sources")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)

    known = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"digest": None, "rows": []}
    if options.check:
        fresh = known["digest"] == digest()
        print("csrc/compiled.json is of these sources" if fresh else "csrc/compiled.json is of other sources")
        return int(not fresh)
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc under CUDA_HOME, on the PATH or in /usr/local/cuda", file=sys.stderr)
        return 2
    paths = [CSRC / name for name in options.files] or sources()
    with ThreadPoolExecutor(options.workers) as pool:
        rows = [row for found in pool.map(lambda path: compile_file(nvcc, path), paths) for row in found]
    rows.sort(key=lambda row: (row["file"], row["kernel"], row["arch"]))
    bad = 0
    for row in rows:
        wrong = unsound(row)
        bad += wrong is not None
        words = [f"{row['registers']} registers", *([f"{row['wgmma']} wgmma"] if row["wgmma"] else [])]
        print(f"{row['kernel']} sm_{row['arch']}: {', '.join([*words, *([wrong] if wrong else [])])}")
    if options.write and not options.files and not bad:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", version)
        counted = "PTX" if disassembler(nvcc) is None else "SASS"
        content = {"nvcc": release[1] if release else None, "wgmma": counted, "digest": digest(), "rows": rows}
        kept = [{name: value for name, value in row.items() if name != "complaints"} for row in rows]
        lines = ",\n  ".join(json.dumps(row) for row in kept)
        head = json.dumps({**content, "rows": []}, indent=1).removesuffix("[]\n}")
        TABLE.write_text(f"{head}[\n  {lines}\n ]\n}}\n", encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
