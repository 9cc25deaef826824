"""high_order_attention's forward kernels under the execution shim, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfkd_fast.ops import high_order_attention, high_order_attention_map
from dfkd_fast.testing import assert_no_worse, random

from .host_kernels import HostKernels, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler with sanitizers")

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
DTYPES = (torch.bfloat16, torch.float16)
MODES = ("joint", "per_order")
RESULTS = {"features": high_order_attention, "map": high_order_attention_map}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostKernels]:
    running = HostKernels(build(tmp_path_factory.getbasetemp().parent / "host", ["high_order_attention.cu"]))
    yield running
    running.close()


def drawn(
    shape: tuple[int, ...],
    *,
    order: int = 3,
    hidden: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weights of deviation 1.5 / sqrt(fan in), and a gradient of the result."""
    channels = shape[1]
    hidden = hidden or max(1, channels // 4)
    # Products of four factors vary so much that one element would decide.
    options: Any = {"layout": "channels_last", "scale": 0.5 if order == 4 else 1.0}
    return (
        random(*shape, seed=seed + 1, dtype=dtype, **options),
        random(order * (order + 1) // 2, hidden, channels, seed=seed + 2, scale=1.5 / channels**0.5, dtype=dtype),
        random(order, channels, hidden, seed=seed + 3, scale=1.5 / hidden**0.5, dtype=dtype),
        random(*shape, seed=seed + 4, dtype=dtype, layout="channels_last"),
    )


def rows(t: Tensor) -> np.ndarray:
    """A map as (positions, channels), a weight as it lies."""
    laid = t.detach().movedim(1, -1) if t.ndim == 4 else t.detach()
    return laid.contiguous().view(torch.int16).numpy().copy()


def like(array: np.ndarray, t: Tensor) -> Tensor:
    values = torch.from_numpy(array).view(t.dtype)
    return values.movedim(-1, 1) if t.ndim == 4 else values


def codes(x: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    n, channels, h, w = x.shape
    return n * h * w, channels, out.shape[2], out.shape[0]


def forward(
    kernels: HostKernels, given: tuple[Tensor, ...], mode: str, result: str, *, thread_order: int = 0
) -> Tensor:
    x, proj, out, _ = given
    y = np.full_like(rows(x), -1)
    kernels(
        "dfkd_high_order_attention", *map(rows, (x, proj, out)), *codes(x, out), CODES[x.dtype],
        MODES.index(mode), list(RESULTS).index(result), y, None, order=thread_order,
    )  # fmt: skip
    return like(y, x)


def reference(given: tuple[Tensor, ...], mode: str, result: str, *, exact: bool) -> Tensor:
    leaves = [t.double() if exact else t for t in given[:3]]
    return RESULTS[result](*leaves, mode=mode, backend="reference")  # type: ignore[arg-type]


def check(
    kernels: HostKernels,
    shape: tuple[int, ...],
    mode: str = "joint",
    result: str = "features",
    *,
    thread_order: int = 0,
    change: Callable[..., None] | None = None,
    order: int = 3,
    hidden: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Values err at most twice as far as the reference's in their type, or one unit in the last place."""
    given = drawn(shape, order=order, hidden=hidden, dtype=dtype)
    if change is not None:
        change(*given)
    got = forward(kernels, given, mode, result, thread_order=thread_order)
    plain, truth = (reference(given, mode, result, exact=exact) for exact in (False, True))
    ulp = torch.finfo(dtype).eps * float(truth.abs().max())
    assert_no_worse(got, than=plain, truth=truth, floor=ulp, name="value")


CASES: dict[str, tuple[tuple[int, ...], int, int]] = {
    # shape, order, hidden units
    "a ring that is used again": ((2, 64, 22, 19), 3, 16),
    "few channels and units": ((1, 24, 5, 13), 3, 8),
    "one position": ((1, 64, 1, 1), 3, 16),
    "two panels, a ring that is used again": ((1, 128, 16, 41), 3, 32),
    "a panel and a bit, order 1": ((1, 72, 3, 7), 1, 24),
    "more units than channels ask for": ((1, 16, 3, 7), 2, 32),
    "a cluster of two": ((1, 256, 12, 17), 3, 64),
    "a bit of four panels, order 2": ((1, 136, 3, 7), 2, 40),
    "a cluster of eight": ((1, 512, 3, 43), 3, 128),
}
"""Sizes that are no multiples of tiles, and what they are for."""


@pytest.mark.parametrize("case", CASES)
def test_error_is_no_larger_than_the_references(kernels: HostKernels, case: str) -> None:
    shape, order, hidden = CASES[case]
    number = list(CASES).index(case)
    mode, result, dtype = MODES[number % 2], list(RESULTS)[number // 2 % 2], DTYPES[number // 4 % 2]
    check(kernels, shape, mode, result, order=order, hidden=hidden, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_combination(kernels: HostKernels, case: str, mode: str, result: str, dtype: torch.dtype) -> None:
    shape, order, hidden = CASES[case]
    check(kernels, shape, mode, result, order=order, hidden=hidden, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_fewer_orders(kernels: HostKernels, channels: int, mode: str, order: int) -> None:
    check(kernels, (1, channels, 3, 31), mode, order=order)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 256, 20, 23), (1, 384, 17, 19), (1, 512, 16, 17)])
@pytest.mark.parametrize("mode", MODES)
def test_many_clusters(kernels: HostKernels, shape: tuple[int, ...], mode: str) -> None:
    check(kernels, shape, mode)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((1, 64, 20, 33), "joint"),
        ((1, 128, 20, 33), "per_order"),
        ((1, 256, 5, 15), "joint"),
        pytest.param((1, 128, 10, 33), "joint", marks=pytest.mark.slow),
        pytest.param((1, 256, 5, 15), "per_order", marks=pytest.mark.slow),
        pytest.param((1, 512, 5, 15), "joint", marks=pytest.mark.slow),
        pytest.param((1, 512, 5, 15), "per_order", marks=pytest.mark.slow),
    ],
)
def test_the_order_of_threads_is_invisible(kernels: HostKernels, shape: tuple[int, ...], mode: str) -> None:
    """And so is when copies and products happen."""
    given = drawn(shape)
    first, *others = (forward(kernels, given, mode, "features", thread_order=order) for order in (0, 1, 7))
    for other in others:
        assert torch.equal(first, other)


def test_half_of_a_batch_is_the_half_of_its_result(kernels: HostKernels) -> None:
    """A position's numbers do not depend on the tile it is in."""
    x, proj, out, upstream = drawn((2, 64, 9, 11))
    whole = forward(kernels, (x, proj, out, upstream), "joint", "features")
    assert torch.equal(forward(kernels, (x[1:], proj, out, upstream), "joint", "features"), whole[1:])


@pytest.mark.parametrize(
    ("channels", "mode"),
    [(32, "joint"), (32, "per_order"), (192, "joint"), pytest.param(288, "joint", marks=pytest.mark.slow)],
)
def test_extreme_features(kernels: HostKernels, channels: int, mode: str) -> None:
    """Saturated gates, products near the largest number, a position and a factor of zero, a NaN."""

    def change(x: Tensor, proj: Tensor, out: Tensor, upstream: Tensor) -> None:
        x[0, :, 0] *= 1e4  # few: of so large a logit the sign alone counts, and that of a small sum is luck
        x[1, :, 0, 0] = 0
        proj[3] = 0

    check(kernels, (2, channels, 2, 3), mode, change=change)
    given = drawn((2, channels, 2, 3))
    change(*given)
    given[0][1, 3, 1, 2] = torch.nan
    at = forward(kernels, given, mode, "features").isnan()
    assert at[1, :, 1, 2].all()
    assert at.sum() == channels


def test_no_positions(kernels: HostKernels) -> None:
    assert forward(kernels, drawn((0, 64, 3, 2)), "joint", "features").shape == (0, 64, 3, 2)


@pytest.mark.parametrize(
    ("channels", "hidden", "order", "dtype", "said"),
    [
        (64, 16, 3, torch.float32, "dtype must be float16 or bfloat16"),
        (64, 16, 4, torch.bfloat16, "R of out_weight .* is 4; the kernel serves 1 to 3"),
        (60, 16, 3, torch.bfloat16, "C of out_weight .* is 60; the kernel serves multiples of 8 up to 512"),
        (64, 12, 3, torch.bfloat16, "K of out_weight .* is 12; the kernel serves multiples of 8 up to 128"),
        (520, 16, 3, torch.bfloat16, "C of out_weight .* is 520"),
        (512, 136, 3, torch.bfloat16, "K of out_weight .* is 136"),
    ],
)
def test_what_is_not_served_is_refused(
    kernels: HostKernels, channels: int, hidden: int, order: int, dtype: torch.dtype, said: str
) -> None:
    with pytest.raises(ValueError, match=f"returned 1: {said}"):
        forward(kernels, drawn((1, channels, 1, 2), hidden=hidden, order=order, dtype=dtype), "joint", "map")
