"""The execution shim is as strict as a GPU where it matters: barriers, bounds, copies under way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from .host_kernels import HostError, HostKernels, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler with sanitizers")


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostKernels]:
    running = HostKernels(build(tmp_path_factory.getbasetemp().parent / "host", ["host/probe.cpp"]))
    yield running
    running.close()


@pytest.mark.parametrize("order", [0, 1, 7])
def test_a_barrier_makes_the_order_of_threads_invisible(kernels: HostKernels, order: int) -> None:
    out = np.zeros(2 * 48, dtype=np.int32)
    kernels("probe_neighbour", out, 2, 48, 1, order=order)
    assert (out.reshape(2, 48) == (np.arange(48) + 1) % 48).all()


def test_a_missing_barrier_shows_in_some_order(kernels: HostKernels) -> None:
    found = []
    for order in (0, 1):
        out = np.zeros(48, dtype=np.int32)
        kernels("probe_neighbour", out, 1, 48, 0, order=order)
        found.append(out)
    assert (found[0] != found[1]).any()


def test_a_warp_that_runs_ahead_shows_a_barrier_that_lockstep_hides(kernels: HostKernels) -> None:
    wanted = np.concatenate([100 * turn + (np.arange(64) + 32) % 64 for turn in range(2)]).astype(np.int32)
    for order, barrier, right in ((0, 1, True), (1, 1, True), (7, 1, True), (0, 0, True), (1, 0, False), (7, 0, False)):
        out = np.zeros(128, dtype=np.int32)
        kernels("probe_turns", out, barrier, order=order)
        assert (out == wanted).all() == right, (order, barrier)


def test_shared_memory_ends_where_the_launch_said(kernels: HostKernels) -> None:
    out = np.zeros(1, dtype=np.int32)
    kernels("probe_beyond", out, 15)
    assert out[0] == 1
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        kernels("probe_beyond", out, 16)


def test_so_do_arrays(kernels: HostKernels) -> None:
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        kernels("probe_neighbour", np.zeros(47, dtype=np.int32), 1, 48, 1)


def test_a_barrier_that_some_never_reach_is_told(kernels: HostKernels) -> None:
    with pytest.raises(HostError, match="waits at a barrier that others never reach"):
        kernels("probe_never_all")


def test_copies_under_way_are_not_there_yet(kernels: HostKernels) -> None:
    values = np.arange(256, dtype=np.float32)
    out = np.zeros_like(values)
    kernels("probe_copied", values, out, 1)
    valid = np.arange(256) // 4 % 2 == 0
    assert (out == np.where(valid, values, 0)).all()
    kernels("probe_copied", values, out, 0)
    assert np.isnan(out).all()  # what shared memory begins as


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_matrix_instructions(kernels: HostKernels, dtype: torch.dtype, code: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = np.zeros((16, 8), dtype=np.float32)
    kernels("probe_product", a.view(torch.int16).numpy(), b.view(torch.int16).numpy(), c, code)
    torch.testing.assert_close(torch.from_numpy(c), a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="probe_product returned 1"):
        kernels("probe_product", a.float().numpy(), b.float().numpy(), c, 0)


def test_reductions_over_a_warp_and_its_groups(kernels: HostKernels) -> None:
    values = np.random.default_rng(0).normal(size=32).astype(np.float32)
    values[9] = np.nan
    sums, largest = np.zeros_like(values), np.zeros_like(values)
    kernels("probe_reduced", values, sums, largest)
    assert np.isnan(sums).all()
    groups = values.reshape(4, 8)
    assert np.isnan(largest[8:16]).all()
    kept = [0, 2, 3]
    assert (largest.reshape(4, 8)[kept] == groups[kept].max(1, keepdims=True)).all()
