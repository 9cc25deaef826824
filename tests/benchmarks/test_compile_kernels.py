"""Kernels are compiled without a GPU. Every launch is found, and a spill is reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS

pytest.importorskip("triton")

SPILLING = """
import triton
import triton.language as tl


@triton.jit
def spilling_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values * tl.sum(values))
"""

COMPILE = """
import json
from dfkd_fast.benchmarks.ops import compile_kernels
for block in (32768, 128):
    launch = compile_kernels.Compilation(
        case="none", kernel="spilling.spilling_kernel", arch=90, num_warps=1, num_stages=1, attributes={},
        signature={"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"}, constants={(2,): block})
    print(json.dumps(compile_kernels.compile_one(launch)))
"""


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in another process, because in this one Triton uses its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_op_compiles_for_sm_90(tmp_path):
    arguments = ("--op", "distillation_kl", "--arch", "90", "--dtype", "bfloat16")
    done = run("-m", "dfkd_fast.benchmarks.ops.compile_kernels", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == f"{len(lines)} compilations, 0 not sound"
    assert lines
    assert all("registers" in line and "sm_90 [distillation_kl " in line for line in lines)


def test_spill_is_reported(tmp_path):
    (tmp_path / "spilling.py").write_text(SPILLING)
    done = run("-c", COMPILE, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    spilling, sound = (json.loads(line) for line in done.stdout.splitlines())
    assert spilling["error"].startswith("spills: ")
    assert spilling["stack"] > 0
    assert sound["error"] == ""
    assert sound["constants"] == "BLOCK=128"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_launch_compiles(tmp_path):
    workers = str(min(8, os.cpu_count() or 1))
    done = run("-m", "dfkd_fast.benchmarks.ops.compile_kernels", "--workers", workers, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert set(re.findall(r" sm_\d+ \[(\w+) ", done.stdout)) == set(BENCHMARKS)
