"""Builds the CUDA kernels for the CPU: one library and one process per op and test session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .host_kernels import HostKernels, build, toolchain


@pytest.fixture(scope="session")
def _running() -> Iterator[dict[str, HostKernels]]:
    running: dict[str, HostKernels] = {}
    yield running
    for kernels in running.values():
        kernels.close()


@pytest.fixture
def kernels(request: Any, tmp_path_factory: pytest.TempPathFactory, _running: dict[str, HostKernels]) -> HostKernels:
    """The kernels named by the test module's ``KERNELS``. All test processes share one build."""
    if toolchain() is None:
        pytest.skip("no C++ compiler with sanitizers")
    name = request.module.KERNELS
    if name not in _running:
        sources = ["host/probe.cpp"] if name == "probe" else [f"{name}.cu", f"{name}_bwd.cu"]
        _running[name] = HostKernels(build(tmp_path_factory.getbasetemp().parent / "host", sources))
    return _running[name]
