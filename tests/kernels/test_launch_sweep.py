"""Launches reach the driver as Python asked for them: every benchmark case on each architecture, without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dfkd_fast.kernels.common import _sum_kernel, launch, recording
from dfkd_fast.kernels.config import Launch

HERE = Path(__file__).resolve().parent

stubbed = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, with a driver that is no stub")


def run(folder: Path, *arguments: Any) -> str:
    """What a Python program prints in which Triton does not interpret kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sweep(folder: Path, *arguments: Any) -> dict[str, Any]:
    """The result of the launch sweep."""
    return json.loads(run(folder, HERE / "stub_driver.py", folder, *arguments))


def kernels(repository: Path) -> list[str]:
    """Every kernel that is launched, as ``module.function``."""
    return sorted(
        f"{path.stem}.{name}"
        for path in (repository / "kernels").glob("*.py")
        for name in re.findall(r"^def (_\w*_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    )


@stubbed
@pytest.mark.timeout(600)
def test_every_launch_reaches_the_driver_as_asked(tmp_path, repository):
    found = sweep(tmp_path)
    assert found["failures"] == []
    assert found["kernels"] == kernels(repository)


@stubbed
@pytest.mark.timeout(600)
def test_each_kernel_compiles_and_launches(tmp_path, repository):
    found = sweep(tmp_path, "--compile", "--arch", 90, "--dtype", "bfloat16")
    assert found["failures"] == []
    assert found["kernels"] == kernels(repository)


@stubbed
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_each_kernel_compiles_and_launches_in_each_dtype(tmp_path, repository, arch):
    found = sweep(tmp_path, "--compile", "--arch", arch)
    assert found["failures"] == []
    assert found["kernels"] == kernels(repository)


UNCHECKED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import stub_driver
from dfkd_fast.kernels import distillation_kl

def launch(kernel, grid, *args, config, **constants):
    kernel[grid](*args, **config.tile, **constants, GATES=1, num_warps=config.num_warps, num_stages=config.num_stages)

distillation_kl.launch = launch
stub_driver.main()
"""


@stubbed
def test_the_sweep_finds_an_unknown_constant(tmp_path):
    arguments = ("--op", "distillation_kl", "--arch", 90, "--dtype", "float32")
    failures = json.loads(run(tmp_path, "-c", UNCHECKED, HERE, tmp_path, *arguments))["failures"]
    assert failures
    for failure in failures:
        assert "KeyError: 'Keyword argument GATES was specified but unrecognised'" in failure
        assert "launching _forward_kernel" in failure


PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from stub_driver import Stub, Sweep
from dfkd_fast.kernels.common import _sum_kernel, launch
from dfkd_fast.kernels.config import Launch

stub = Stub(Path(sys.argv[2]))
stub.use(90)
Sweep(stub, real=False)
x = torch.empty(8, device="meta")
for grid, count, warps in json.loads(sys.argv[3]):
    try:
        launch(_sum_kernel, grid, x, x, count, 0.1, config=Launch(tile={"BLOCK": 1024}, num_warps=warps))
        print(*stub.launch.grid, hex(stub.launch.params[2]))
    except Exception as error:
        print(error)
"""


@stubbed
def test_the_stub_refuses_what_a_driver_refuses(tmp_path):
    launches = {
        ((65537, 1, 2), 2**40, 4): "65537 1 2 0x10000000000",
        ((2**31 - 1,), 2**33, 4): "2147483647 1 1 0x200000000",
        ((1, 65536), 8, 4): "Triton Error [CUDA]: grid y is not in 1 .. 65535",
        ((1, 1, 65536), 8, 4): "Triton Error [CUDA]: grid z is not in 1 .. 65535",
        ((65536, 32768), 8, 4): "number of launches is 0, not 1",  # 2^31 programs: the launcher counts in 32 bits
        ((1,), 8, 64): "out of resource: threads, Required: 2048, Hardware limit: 1024. "
        "Reducing block sizes or `num_stages` may help.",
    }
    printed = run(tmp_path, "-c", PROBE, HERE, tmp_path, json.dumps(list(launches))).splitlines()
    assert printed == list(launches.values())


MISTAKES = {
    "an unknown constant": (4, {"BLOCK": 1024}, {"GATES": 1}, "_sum_kernel has no argument GATES"),
    "an unknown one for another": (4, {"BLOK": 1024}, {}, "_sum_kernel is missing BLOCK; has no argument BLOK"),
    "a missing constant": (4, {}, {}, "_sum_kernel is missing BLOCK"),
    "a missing argument": (3, {"BLOCK": 1024}, {}, "_sum_kernel is missing scale"),
    "a constant given by position too": (5, {"BLOCK": 1024}, {}, "_sum_kernel got BLOCK twice"),
    "a constant of the tile too": (4, {"BLOCK": 1024}, {"BLOCK": 1024}, "_sum_kernel got BLOCK twice"),
    "an argument by name too": (4, {"BLOCK": 1024}, {"scale": 1.0}, "_sum_kernel got scale twice"),
    "too many arguments": (6, {}, {}, "_sum_kernel takes 5 arguments, got 6 positional ones"),
}


def mistaken(count: int, tile: dict[str, int], constants: dict[str, Any]) -> str:
    """The message of a launch with these arguments."""
    x = torch.empty(8)
    with pytest.raises(TypeError) as caught:
        launch(_sum_kernel, (1,), *(x, x, 8, 1.0, 1024, 8)[:count], config=Launch(tile=tile), **constants)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["as the machine runs it", "recording"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_launch_refuses_arguments_that_are_not_the_kernels(mistake, mode):
    *arguments, message = MISTAKES[mistake]
    if mode == "recording":
        with recording(90) as launches:
            assert mistaken(*arguments) == message
        assert not launches
    else:
        assert mistaken(*arguments) == message


JUST_IN_TIME = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_launch_sweep as tests
assert type(tests._sum_kernel).__name__ == "JITFunction"
for *arguments, _ in tests.MISTAKES.values():
    print(tests.mistaken(*arguments))
"""


def test_launch_refuses_them_before_the_just_in_time_compiler(tmp_path):
    printed = run(tmp_path, "-c", JUST_IN_TIME, HERE).splitlines()
    assert printed == [message for *_, message in MISTAKES.values()]
