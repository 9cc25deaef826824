"""Runs every CUDA kernel under compute-sanitizer: memcheck, racecheck, initcheck and synccheck report no errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfkd_fast.ops import extension

from . import kernel_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE)),
]

TOOLS = {"memcheck": [], "racecheck": ["--racecheck-report", "analysis"], "initcheck": [], "synccheck": []}


def sanitizer() -> str | None:
    """Returns the path of compute-sanitizer, or None."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    paths = [home / folder / "compute-sanitizer" for home in homes for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(path) for path in paths if path.is_file()), None)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_no_errors(op: str, tool: str) -> None:
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    options = ["--tool", tool, *TOOLS[tool], "--target-processes", "all", "--error-exitcode", "86"]
    options += ["--print-limit", "20"]
    # Each tensor gets a separate allocation, so that accesses beyond its end are detected.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [program, *options, sys.executable, "-m", "tests.cuda.kernel_cases", op],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=115,
    )
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, output[-6000:]
    assert "done" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in output or "RACECHECK SUMMARY: 0 hazards" in output, output[-2000:]
