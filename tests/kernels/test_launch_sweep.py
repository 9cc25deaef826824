"""Launches every kernel through Triton's own launcher against a stub of the CUDA driver, for each architecture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dfkd_fast.kernels.common import _sum_kernel, launch, record_launches
from dfkd_fast.kernels.config import Launch

needs_stub = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver replaces the stub")


@pytest.fixture
def run(tmp_path, repository):
    """Runs Python with Triton's compiler in place of the interpreter, and returns what it prints."""

    def program(*arguments: Any) -> str:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return program


@needs_stub
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--compile", "--arch", 90, "--dtype", "bfloat16"), marks=pytest.mark.slow),
        *(pytest.param(("--compile", "--arch", arch), marks=pytest.mark.slow) for arch in (80, 86, 90, 100, 120)),
    ],
    ids=lambda options: " ".join(map(str, options)) or "all launches",
)
def test_launches_reach_the_driver_unchanged(tmp_path, repository, run, options):
    found = json.loads(run("-m", "tests.kernels.stub_driver", tmp_path, *options))
    assert found["failures"] == []
    assert found["kernels"] == sorted(
        f"{path.stem}.{name}"
        for path in (repository / "kernels").glob("*.py")
        for name in re.findall(r"^def (_\w*_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    )


# This script runs the sweep with a launch() that checks no arguments and passes an unknown constant.
UNCHECKED_SCRIPT = """
from dfkd_fast.kernels import distillation_kl
from tests.kernels import stub_driver

def launch(kernel, grid, *args, config, **constants):
    kernel[grid](*args, **config.tile, **constants, UNKNOWN=1, num_warps=config.num_warps, num_stages=config.num_stages)

distillation_kl.launch = launch
stub_driver.main()
"""


@needs_stub
def test_sweep_reports_an_unknown_constant(tmp_path, run):
    arguments = ("--op", "distillation_kl", "--arch", 90, "--dtype", "float32")
    failures = json.loads(run("-c", UNCHECKED_SCRIPT, tmp_path, *arguments))["failures"]
    assert failures
    for failure in failures:
        assert "KeyError: 'Keyword argument UNKNOWN was specified but unrecognised'" in failure
        assert "launching _forward_kernel" in failure


LAUNCH_SCRIPT = """
import json, sys
from pathlib import Path
import torch
from dfkd_fast.kernels.common import _sum_kernel, launch
from dfkd_fast.kernels.config import Launch
from tests.kernels.stub_driver import Stub, Sweep

stub = Stub(Path(sys.argv[1]))
stub.use(90)
Sweep(stub, real=False)
x = torch.empty(8, device="meta")
for grid, count, warps, name in json.loads(sys.argv[2]):
    try:
        launch(_sum_kernel, grid, x, x, count, 0.1, config=Launch(tile={name: 1024}, num_warps=warps))
        print(*stub.launch.grid, hex(stub.launch.params[2]))
    except Exception as error:
        print(error)
"""


@needs_stub
def test_stub_enforces_the_limits_of_a_driver(tmp_path, run):
    launches = {
        ((65537, 1, 2), 2**40, 4, "BLOCK"): "65537 1 2 0x10000000000",
        ((2**31 - 1,), 2**33, 4, "BLOCK"): "2147483647 1 1 0x200000000",
        ((1, 65536), 8, 4, "BLOCK"): "Triton Error [CUDA]: grid y is not in 1 .. 65535",
        ((1, 1, 65536), 8, 4, "BLOCK"): "Triton Error [CUDA]: grid z is not in 1 .. 65535",
        # Triton's launcher multiplies the grid in 32 bits: 2^31 overflows, and it launches nothing.
        ((65536, 32768), 8, 4, "BLOCK"): "number of launches is 0, not 1",
        ((1,), 8, 64, "BLOCK"): "out of resource: threads, Required: 2048, Hardware limit: 1024. "
        "Reducing block sizes or `num_stages` may help.",
        # Rejected before Triton compiles.
        ((1,), 8, 4, "BLOK"): "_sum_kernel is missing BLOCK; has no argument BLOK",
    }
    assert run("-c", LAUNCH_SCRIPT, tmp_path, json.dumps(list(launches))).splitlines() == list(launches.values())


# The number of positional arguments, the tile, further constants, and the error message.
MISTAKES = {
    "unknown constant": (4, {"BLOCK": 1024}, {"UNKNOWN": 1}, "_sum_kernel has no argument UNKNOWN"),
    "misspelt constant": (4, {"BLOK": 1024}, {}, "_sum_kernel is missing BLOCK; has no argument BLOK"),
    "missing constant": (4, {}, {}, "_sum_kernel is missing BLOCK"),
    "missing argument": (3, {"BLOCK": 1024}, {}, "_sum_kernel is missing scale"),
    "constant also by position": (5, {"BLOCK": 1024}, {}, "_sum_kernel got BLOCK twice"),
    "constant also in the tile": (4, {"BLOCK": 1024}, {"BLOCK": 1024}, "_sum_kernel got BLOCK twice"),
    "argument also by name": (4, {"BLOCK": 1024}, {"scale": 1.0}, "_sum_kernel got scale twice"),
    "too many arguments": (6, {}, {}, "_sum_kernel takes 5 arguments, got 6 positional ones"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("context", [nullcontext, partial(record_launches, 90)], ids=["launching", "recording"])
def test_launch_rejects_wrong_arguments(mistake, context):
    count, tile, constants, message = MISTAKES[mistake]
    x = torch.empty(8)
    with context() as launches, pytest.raises(TypeError, match=f"^{message}$"):
        launch(_sum_kernel, (1,), *(x, x, 8, 1.0, 1024, 8)[:count], config=Launch(tile=tile), **constants)
    assert not launches
