"""Builds the CUDA kernels for the CPU: one library and one process per op and test session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .host_kernels import HostKernels, build, compiler

SOURCES = {
    "probe": ["host/probe.cpp"],
    "contrastive_loss": ["contrastive_loss.cu", "contrastive_loss_bwd.cu"],
    "spatial_attention": ["spatial_attention.cu", "spatial_attention_bwd.cu"],
    "high_order_attention": ["high_order_attention.cu", "high_order_attention_bwd.cu"],
}


@pytest.fixture(scope="session")
def _running() -> Iterator[dict[str, HostKernels]]:
    running: dict[str, HostKernels] = {}
    yield running
    for kernels in running.values():
        kernels.close()


@pytest.fixture
def kernels(request: Any, tmp_path_factory: pytest.TempPathFactory, _running: dict[str, HostKernels]) -> HostKernels:
    """The kernels named by the test module's ``KERNELS``. All test processes share one build."""
    if compiler() is None:
        pytest.skip("no C++ compiler with sanitizers")
    name = request.module.KERNELS
    if name not in _running:
        _running[name] = HostKernels(build(tmp_path_factory.getbasetemp().parent / "host", SOURCES[name]))
    return _running[name]
