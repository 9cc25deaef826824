"""Compile the CUDA kernels of csrc/ for every architecture, without a GPU, and keep what the assembler says of them.

``csrc/compiled.json`` has a row a kernel and architecture: registers of a thread, bytes of stack and spills, barriers,
static shared memory. It is written by ``--write`` where all of them are sound: no stack, no spill. A digest of the
sources says what it was made from.

    python -m dfkd_fast.benchmarks.compile_cuda [--write] [--check] [--workers N] [FILE.cu ...]
"""

from __future__ import annotations

import argparse
import hashlib
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

__all__ = ["ARCHITECTURES", "CSRC", "TABLE", "compile_file", "digest", "main", "parse", "unsound"]

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TABLE = CSRC / "compiled.json"
ARCHITECTURES = ("80", "90a", "100f")

_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>[^']+)' for 'sm_(?P<arch>\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?(\d+) bytes smem)?")


def digest(csrc: Path = CSRC) -> str:
    """Of everything that decides what the kernels compile to, but the compiler."""
    content = hashlib.sha256(repr(ARCHITECTURES).encode())
    for path in sorted([*csrc.glob("*.cu"), *csrc.glob("*.cuh"), *csrc.glob("*.h")]):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()


def parse(log: str) -> list[dict[str, Any]]:
    """Rows of what ``ptxas -v`` prints: ``kernel`` (its symbol), ``arch``, and its numbers."""
    rows: list[dict[str, Any]] = []
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            rows.append({"kernel": found["symbol"], "arch": found["arch"]})
        elif rows and (found := _STACK.search(line)):
            rows[-1] |= dict(zip(("stack", "spill_stores", "spill_loads"), map(int, found.groups()), strict=True))
        elif rows and (found := _USED.search(line)):
            registers, barriers, shared = (int(number or 0) for number in found.groups())
            rows[-1] |= {"registers": registers, "barriers": barriers, "static_shared": shared}
    return rows


def _readable(symbols: Iterable[str]) -> dict[str, str]:
    """Kernel names as they stand in the source, with their template arguments."""
    symbols = list(symbols)
    filt = shutil.which("c++filt")
    if filt is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run([filt], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = {}
    for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True):
        name = re.sub(r"\(anonymous namespace\)::|dfkd::|_GLOBAL__N__\w+::", "", name)
        name = name.partition("(")[0] if "<" not in name else re.sub(r">\(.*", ">", name)
        names[symbol] = name.removeprefix("void ").strip()
    return names


def compile_file(nvcc: str, path: Path) -> list[dict[str, Any]]:
    """Compile one file for every architecture, and read what the assembler says.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_nvcc_") as folder:
        for arch in ARCHITECTURES:
            command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-c", str(path)]
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(Path(folder) / "object")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{path.name} for sm_{arch}:\n{done.stderr[-4000:]}")
            rows += [{"file": path.name, **row, "arch": arch} for row in parse(done.stderr)]
    names = _readable(dict.fromkeys(row["kernel"] for row in rows))
    return [{**row, "kernel": names[row["kernel"]]} for row in rows]


def unsound(row: dict[str, Any]) -> str | None:
    """What is wrong with a kernel's code; None where nothing is."""
    wrong = [f"{row[name]} bytes of {name}" for name in ("stack", "spill_stores", "spill_loads") if row[name]]
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
    paths = [CSRC / name for name in options.files] or sorted(CSRC.glob("*.cu"))
    with ThreadPoolExecutor(options.workers) as pool:
        rows = [row for found in pool.map(lambda path: compile_file(nvcc, path), paths) for row in found]
    rows.sort(key=lambda row: (row["file"], row["kernel"], row["arch"]))
    bad = 0
    for row in rows:
        wrong = unsound(row)
        bad += wrong is not None
        print(f"{row['kernel']} sm_{row['arch']}: {row['registers']} registers{', ' + wrong if wrong else ''}")
    if options.write and not options.files and not bad:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", version)
        content = {"nvcc": release[1] if release else None, "digest": digest(), "rows": rows}
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = json.dumps({**content, "rows": []}, indent=1).removesuffix("[]\n}")
        TABLE.write_text(f"{head}[\n  {lines}\n ]\n}}\n", encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
