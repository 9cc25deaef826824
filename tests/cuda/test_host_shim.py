"""The CPU emulation is as strict as a GPU about barriers, bounds, asynchronous copies and wgmma."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch

from .host_kernels import HostError

KERNELS = "probe"


def zeros(*shape):
    return np.zeros(shape, dtype=np.int32)


def test_a_missing_barrier_shows_in_some_order(kernels):
    expected = np.tile((np.arange(48) + 1) % 48, (2, 1))
    for barrier in (1, 0):
        correct = []
        for order in (0, 1, 7):
            out = zeros(2, 48)
            kernels("probe_neighbor", out, 2, 48, barrier, order=order)
            correct.append((out == expected).all())
        assert all(correct) == bool(barrier)


def test_running_one_warp_ahead_shows_a_missing_barrier_that_lockstep_hides(kernels):
    expected = np.concatenate([100 * step + (np.arange(64) + 32) % 64 for step in range(2)]).astype(np.int32)
    for order, barrier, correct in (
        (0, 1, True),
        (1, 1, True),
        (7, 1, True),
        (0, 0, True),
        (1, 0, False),
        (7, 0, False),
    ):
        out = zeros(128)
        kernels("probe_exchange", out, barrier, order=order)
        assert (out == expected).all() == correct, (order, barrier)


def test_accesses_out_of_bounds_are_reported(kernels):
    out = zeros(1)
    kernels("probe_shared_store", out, 15)
    assert out[0] == 1
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        kernels("probe_shared_store", out, 16)
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        kernels("probe_neighbor", zeros(47), 1, 48, 1)


def test_a_barrier_that_some_threads_skip_is_reported(kernels):
    with pytest.raises(HostError, match="waits at a barrier that other threads never reach"):
        kernels("probe_divergent_barrier")


@pytest.mark.parametrize("order", [0, 1, 6])
def test_accumulators_are_nan_before_the_wait(kernels, order):
    torch.manual_seed(0)
    a, b, c = torch.randn(64, 128).bfloat16(), torch.randn(128, 128).bfloat16(), torch.zeros(64, 128)
    for a_in_registers in (0, 1):
        kernels("probe_wgmma", a, b, c, a_in_registers, 1, order=order)
        torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-4, atol=1e-4)
    kernels("probe_wgmma", a, b, c, 0, 0)
    assert c.isnan().all()


@pytest.mark.parametrize(("width", "order"), [(64, 0), (64, 6), (0, 1), (0, 6)])
def test_tma_tiles_are_clipped_to_the_tensor(kernels, width, order):
    source = np.random.default_rng(0).integers(1, 1000, (3, 5, 72)).astype(np.int16)
    for x, y, z in ((0, 0, 0), (8, 2, 1), (56, 4, 2), (-8, -1, -1)):
        both = np.stack([source, np.zeros_like(source)])
        kernels("probe_tma", both, 72, 5, 3, x, y, z, width, 1, order=order)
        inside = np.zeros(source.shape, dtype=bool)
        inside[max(z, 0) : z + 2, max(y, 0) : y + 3, max(x, 0) : x + (width or 24)] = True
        assert (both[1] == np.where(inside, source, 0)).all()


def test_tma_loads_are_invisible_before_the_wait(kernels):
    both = np.ones((2, 3, 5, 72), dtype=np.int16)
    kernels("probe_tma", both, 72, 5, 3, 0, 0, 0, 64, 0)
    assert (both[1, :2, :3, :64] == -1).all()  # the initial value of shared memory


@pytest.mark.parametrize(("mode", "order"), [(0, 0), (0, 6), (1, 1), (1, 6), (2, 0), (2, 1)])
def test_distributed_shared_memory(kernels, mode, order):
    rows = np.array([[100 * rank + lane for lane in range(32)] for rank in range(4)], dtype=np.int32)
    out = zeros(4, 4, 32)
    kernels("probe_cluster", rows, out, 2, 4, mode, 1, order=order)
    assert (out == rows).all()


def test_shared_memory_of_a_finished_block_is_not_accessed(kernels):
    with pytest.raises(HostError, match="block 1 uses the shared memory of block 0, which has finished"):
        kernels("probe_cluster", zeros(2, 32), zeros(2, 2, 32), 1, 2, 0, 0)


def test_tma_stores_need_a_proxy_fence(kernels):
    out = zeros(32)
    kernels("probe_tma_store", out, 0)
    assert (out == -1).all()  # the initial value of shared memory
    kernels("probe_tma_store", out, 1)
    assert (out == np.arange(32)).all()


def run_pipeline(kernels, mode, order):
    values = np.arange(32 * 7, dtype=np.float32)
    out = np.zeros_like(values)
    kernels("probe_pipeline", values, out, 7, mode, order=order)
    return (out == values).all()


def test_a_stage_that_is_overwritten_too_early_is_detected(kernels):
    assert all(run_pipeline(kernels, 1, order) for order in (0, 1, 6, 7))
    with suppress(HostError):
        assert not all(run_pipeline(kernels, 0, order) for order in (0, 1, 6, 7))


def test_an_endless_wait_is_reported(kernels):
    with pytest.raises(HostError, match="waits forever for the phase of an mbarrier"):
        run_pipeline(kernels, 2, 0)


@pytest.mark.parametrize("order", [0, 1, 6])
def test_named_and_global_barriers(kernels, order):
    out = zeros(64)
    kernels("probe_named_barrier", out, order=order)
    assert (out == 64 + np.arange(64) % 32).all()
    out = zeros(5)
    kernels("probe_global_barrier", zeros(5), zeros(1), out, 5, order=order)
    assert (out == (np.arange(5) + 1) % 5 + 1).all()
