"""The execution shim is as strict as a GPU where it matters: barriers, bounds, copies and products under way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .host_kernels import HostError

KERNELS = "probe"


@pytest.mark.parametrize("order", [0, 1, 7])
def test_a_barrier_makes_the_order_of_threads_invisible(kernels, order):
    out = np.zeros(2 * 48, dtype=np.int32)
    kernels("probe_neighbour", out, 2, 48, 1, order=order)
    assert (out.reshape(2, 48) == (np.arange(48) + 1) % 48).all()


def test_a_missing_barrier_shows_in_some_order(kernels):
    found = []
    for order in (0, 1):
        out = np.zeros(48, dtype=np.int32)
        kernels("probe_neighbour", out, 1, 48, 0, order=order)
        found.append(out)
    assert (found[0] != found[1]).any()


def test_a_warp_that_runs_ahead_shows_a_barrier_that_lockstep_hides(kernels):
    expected = np.concatenate([100 * turn + (np.arange(64) + 32) % 64 for turn in range(2)]).astype(np.int32)
    for order, barrier, right in ((0, 1, True), (1, 1, True), (7, 1, True), (0, 0, True), (1, 0, False), (7, 0, False)):
        out = np.zeros(128, dtype=np.int32)
        kernels("probe_turns", out, barrier, order=order)
        assert (out == expected).all() == right, (order, barrier)


def test_shared_memory_ends_where_the_launch_said(kernels):
    out = np.zeros(1, dtype=np.int32)
    kernels("probe_beyond", out, 15)
    assert out[0] == 1
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        kernels("probe_beyond", out, 16)


def test_so_do_arrays(kernels):
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        kernels("probe_neighbour", np.zeros(47, dtype=np.int32), 1, 48, 1)


def test_a_barrier_that_some_never_reach_is_told(kernels):
    with pytest.raises(HostError, match="waits at a barrier that others never reach"):
        kernels("probe_never_all")


def test_matrix_loads(kernels):
    rows, out = np.arange(256, dtype=np.uint16), np.zeros((32, 4), dtype=np.uint32)
    kernels("probe_matrices", rows, out)
    # Of matrix i lane l has row l / 4, columns 2 (l % 4) and the next.
    assert (out.view(np.uint16).reshape(8, 4, 4, 2) == rows.reshape(4, 8, 4, 2).transpose(1, 2, 0, 3)).all()


def test_reductions_over_a_warp_and_its_groups(kernels):
    values = np.random.default_rng(0).normal(size=32).astype(np.float32)
    values[9] = np.nan
    sums, largest = np.zeros_like(values), np.zeros_like(values)
    kernels("probe_reduced", values, sums, largest)
    assert np.isnan(sums).all()
    groups = values.reshape(4, 8)
    assert np.isnan(largest[8:16]).all()
    kept = [0, 2, 3]
    assert (largest.reshape(4, 8)[kept] == groups[kept].max(1, keepdims=True)).all()


@pytest.mark.parametrize(
    ("n", "width", "order", "transpose_a", "transpose_b"),
    [
        *((16, 16, 6, 0, 0), (16, 16, 0, 1, 1), (96, 32, 0, 0, 1)),
        *((96, 32, 1, 1, 0), (128, 64, 1, 1, 1), (128, 64, 6, 0, 0)),
    ],
)
def test_products_of_a_warpgroup(kernels, n, width, transpose_a, transpose_b, order):
    torch.manual_seed(0)
    for dtype, code in ((torch.float16, 1), (torch.bfloat16, 2)):
        a, b = torch.randn(64, 128).to(dtype), torch.randn(128, n).to(dtype)
        stored_a = (a.T if transpose_a else a).contiguous().view(torch.int16).numpy()
        stored_b = (b if transpose_b else b.T).contiguous().view(torch.int16).numpy()
        for registers in (0, 1):
            c = np.zeros((64, n), dtype=np.float32)
            kernels(
                "probe_wgmma",
                stored_a,
                stored_b,
                c,
                code,
                n,
                width,
                transpose_a,
                transpose_b,
                registers,
                1,
                order=order,
            )
            torch.testing.assert_close(torch.from_numpy(c), a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def test_products_under_way_are_not_there_yet(kernels):
    a, b = (torch.randn(rows, 128).bfloat16().view(torch.int16).numpy() for rows in (64, 128))
    c = np.zeros((64, 128), dtype=np.float32)
    kernels("probe_wgmma", a, b, c, 2, 128, 64, 0, 0, 0, 0)
    assert np.isnan(c).all()


@pytest.mark.parametrize(("width", "order"), [(64, 0), (64, 6), (0, 1), (0, 6)])
def test_tiles_end_where_their_tensor_does(kernels, width, order):
    there = np.random.default_rng(0).integers(1, 1000, (3, 5, 72)).astype(np.int16)
    wide = width or 24
    for x, y, z in ((0, 0, 0), (8, 2, 1), (56, 4, 2), (-8, -1, -1)):
        both = np.stack([there, np.zeros_like(there)])
        kernels("probe_tile", both, 72, 5, 3, x, y, z, width, 1, order=order)
        inside = np.zeros(there.shape, dtype=bool)
        inside[max(z, 0) : z + 2, max(y, 0) : y + 3, max(x, 0) : x + wide] = True
        assert (both[1] == np.where(inside, there, 0)).all()


def test_tiles_under_way_are_not_there_yet(kernels):
    both = np.ones((2, 3, 5, 72), dtype=np.int16)
    kernels("probe_tile", both, 72, 5, 3, 0, 0, 0, 64, 0)
    assert (both[1, :2, :3, :64] == -1).all()  # what shared memory begins as


@pytest.mark.parametrize(("mode", "order"), [(0, 0), (0, 6), (1, 1), (1, 6), (2, 0), (2, 1)])
def test_blocks_of_a_cluster_reach_each_other(kernels, mode, order):
    rows = np.array([[100 * rank + lane for lane in range(32)] for rank in range(4)], dtype=np.int32)
    out = np.zeros((4, 4, 32), dtype=np.int32)
    kernels("probe_sent", rows, out, 2, 4, mode, 1, order=order)
    assert (out == rows).all()


def test_what_was_stored_without_a_fence_is_not_copied(kernels):
    out = np.zeros(32, dtype=np.int32)
    kernels("probe_stored", out, 0)
    assert (out == -1).all()  # what shared memory begins as
    kernels("probe_stored", out, 1)
    assert (out == np.arange(32)).all()


def test_a_block_that_has_ended_is_not_written_to(kernels):
    rows, out = np.zeros((2, 32), dtype=np.int32), np.zeros((2, 2, 32), dtype=np.int32)
    with pytest.raises(HostError, match="block 0 of the cluster has ended, and block 1 uses its shared memory"):
        kernels("probe_sent", rows, out, 1, 2, 0, 0)


@pytest.mark.parametrize("order", [0, 1, 6, 7])
def test_a_ring_of_stages(kernels, order):
    values = np.arange(32 * 7, dtype=np.float32)
    out = np.zeros_like(values)
    kernels("probe_ring", values, out, 7, 1, order=order)
    assert (out == values).all()


def test_a_ring_that_is_filled_too_early(kernels):
    values = np.arange(32 * 7, dtype=np.float32)
    wrong = 0
    for order in (0, 1, 6, 7):
        out = np.zeros_like(values)
        try:
            kernels("probe_ring", values, out, 7, 0, order=order)
        except HostError:
            wrong += 1
            break
        wrong += int((out != values).any())
    assert wrong


def test_a_wait_that_never_ends_is_told(kernels):
    with pytest.raises(HostError, match="waits for a barrier's phase, which never comes"):
        kernels("probe_ring", np.zeros(32 * 3, dtype=np.float32), np.zeros(32 * 3, dtype=np.float32), 3, 2)


@pytest.mark.parametrize("order", [0, 1, 6])
def test_some_warps_wait(kernels, order):
    out = np.zeros(64, dtype=np.int32)
    kernels("probe_some", out, order=order)
    assert (out == 64 + np.arange(64) % 32).all()


@pytest.mark.parametrize("order", [0, 1, 6])
def test_blocks_of_a_cooperative_launch_run_together(kernels, order):
    numbers, counter, out = (np.zeros(size, dtype=np.int32) for size in (5, 1, 5))
    kernels("probe_grid", numbers, counter, out, 5, order=order)
    assert (out == (np.arange(5) + 1) % 5 + 1).all()
