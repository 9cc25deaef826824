"""Kernels compiled ahead of time: the report is complete and sound, and made from the sources that are here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_fast.benchmarks.compile_kernels import digest
from dfkd_fast.report import read_compiled

pytest.importorskip("triton")

from dfkd_fast.kernels.config import shared_memory

SPILLING = """
import triton
import triton.language as tl


@triton.jit
def keeps_too_much(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values * tl.sum(values))


@triton.jit
def copies(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))
"""

COMPILE = """
import json
from dfkd_fast.benchmarks import compile_kernels
compile_kernels._sources = lambda module: "none"
for name in ("keeps_too_much", "copies"):
    row = compile_kernels.Row(
        op="none", case="none", kernel=f"kept.{name}", arch=90,
        signature={"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"},
        constants=[([2], 32768 if name == "keeps_too_much" else 128)], attributes=[], num_warps=1, num_stages=1)
    print(json.dumps(compile_kernels.compile_row(row)))
"""


def run(*arguments: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since here kernels are decorated for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def tool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run("-m", "dfkd_fast.benchmarks.compile_kernels", *arguments, folder=folder)


def test_every_launch_has_a_sound_row_in_the_report(tmp_path):
    done = tool("--check", folder=tmp_path)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}\nmend with: make kernels"


def test_no_row_of_the_report_is_unsound():
    rows = read_compiled()["rows"]
    assert {row["arch"] for row in rows} == {80, 86, 90, 100, 120}
    assert not [row for row in rows if row["stack"] or row["local"] or row["shared"] > shared_memory(row["arch"])]


def test_what_is_compiled_here_is_what_the_report_says(tmp_path):
    """One op afresh; all of them is the slow test's work."""
    done = tool("--op", "distillation_kl", "--arch", "90", "--dtype", "bfloat16", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 unsound" in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_launch_compiles_soundly(tmp_path):
    done = tool("--workers", str(min(8, os.cpu_count() or 1)), folder=tmp_path)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))


def test_a_spill_is_seen(tmp_path):
    (tmp_path / "kept.py").write_text(SPILLING)
    done = run("-c", COMPILE, folder=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr
    spilling, sound = (json.loads(line) for line in done.stdout.splitlines())
    assert "spills" in spilling["error"]
    assert "error" not in sound


def test_the_digest_sees_what_a_module_does_alone():
    source = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    assert digest(source) == digest("# A comment.\n\n\ndef f(x):\n    return (x + 1)  # more\n")
    assert digest(source) != digest(source.replace("+ 1", "+ 2"))


def test_the_digest_of_kernels_leaves_their_launchers_out():
    source = "import triton\nSIZE = 4\n@triton.jit\ndef _k(x):\n    return x + SIZE\ndef launch(x):\n    _k[(1,)](x)\n"
    changed = source.replace("(1,)", "(2,)").replace("import triton", "import torch\nimport triton")
    assert digest(source) != digest(changed)
    assert digest(source, kernels=True) == digest(changed, kernels=True)
    for old, new in (("x + SIZE", "x - SIZE"), ("SIZE = 4", "SIZE = 8")):
        assert digest(source, kernels=True) != digest(source.replace(old, new), kernels=True)
