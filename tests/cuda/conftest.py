"""Builds the CUDA kernels for the CPU: one library per op, and one process per op and test process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from .host_kernels import HostKernels, build, toolchain


@functools.cache
def _start(name: str, folder: Path) -> HostKernels:
    return HostKernels(build(folder, ["host/probe.cpp"] if name == "probe" else [f"{name}.cu", f"{name}_bwd.cu"]))


@pytest.fixture
def kernels(request: Any, tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels named by the test module's ``KERNELS``. All test processes share one build."""
    if toolchain() is None:
        pytest.skip("no C++ compiler with sanitizers")
    return _start(request.module.KERNELS, tmp_path_factory.getbasetemp().parent / "host")
