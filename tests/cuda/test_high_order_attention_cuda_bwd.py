"""high_order_attention's backward kernels under the execution shim, against the reference in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfkd_fast.testing import assert_no_worse

from .host_kernels import HostKernels, build, compiler
from .test_high_order_attention_cuda import CODES, DTYPES, MODES, RESULTS, codes, drawn, like, rows

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler with sanitizers")

SOURCES = ["high_order_attention_bwd.cu"]
BY_SIZE, ONCE, CHAIN, TALL = 0, 1, 2, 3


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostKernels]:
    running = HostKernels(build(tmp_path_factory.getbasetemp().parent / "host", SOURCES))
    yield running
    running.close()


def scratch(kernels: HostKernels, name: str, *arguments: int) -> np.ndarray | None:
    """As many bytes as a function asks for, no number in any of them; what it returns is told as a refusal."""
    try:
        kernels(name, *arguments)
    except ValueError as told:
        return np.full(int(re.findall(r"returned (\d+)", str(told))[0]), 0xFF, dtype=np.uint8)
    return None


def backward(
    kernels: HostKernels,
    given: tuple[Tensor, ...],
    mode: str = "joint",
    result: str = "features",
    *,
    form: int = BY_SIZE,
    thread_order: int = 0,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> list[Tensor | None]:
    x, proj, out, upstream = given
    asked = (*codes(x, out), MODES.index(mode), *map(int, wanted), form)
    gradients = [np.full_like(rows(t), -1) if want else None for t, want in zip((x, proj, out), wanted, strict=True)]
    kernels(
        "dfkd_high_order_attention_backward", *map(rows, (upstream, x, proj, out)), *codes(x, out),
        CODES[x.dtype], MODES.index(mode), list(RESULTS).index(result), form, *gradients,
        scratch(kernels, "dfkd_high_order_attention_backward_scratch", *asked), None, order=thread_order,
    )  # fmt: skip
    return [None if g is None else like(g, t) for g, t in zip(gradients, (x, proj, out), strict=True)]


def reference(given: tuple[Tensor, ...], mode: Any, result: str, *, exact: bool) -> list[Tensor]:
    *leaves, upstream = [t.detach().double() if exact else t.detach() for t in given]
    leaves = [t.requires_grad_() for t in leaves]
    y = RESULTS[result](*leaves, mode=mode, backend="reference")
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def check(
    kernels: HostKernels,
    shape: tuple[int, ...],
    mode: str = "joint",
    result: str = "features",
    *,
    form: int = BY_SIZE,
    thread_order: int = 0,
    change: Callable[..., None] | None = None,
    **drawn_as: Any,
) -> None:
    """Gradients err at most twice as far as the reference's in their type, or one unit in the last place."""
    given = drawn(shape, **drawn_as)
    if change is not None:
        change(*given)
    got = backward(kernels, given, mode, result, form=form, thread_order=thread_order)
    plain, exact = (reference(given, mode, result, exact=exact)[1:] for exact in (False, True))
    for name, mine, than, truth in zip(("dx", "dproj", "dout"), got, plain, exact, strict=True):
        assert mine is not None
        ulp = torch.finfo(mine.dtype).eps * float(truth.abs().max())
        assert_no_worse(mine, than=than, truth=truth, floor=ulp, name=name)


CASES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    # shape, order, hidden units, form
    "one pass, several tiles a warpgroup": ((1, 64, 21, 33), 3, 16, ONCE),
    "one pass, few channels and units": ((3, 24, 3, 5), 3, 8, ONCE),
    "one pass, two panels": ((1, 128, 15, 29), 3, 32, ONCE),
    "one pass, a panel and a bit": ((2, 72, 9, 17), 3, 24, ONCE),
    "one block of the chain": ((1, 104, 15, 19), 3, 24, CHAIN),
    "few channels": ((1, 40, 3, 7), 3, 8, CHAIN),
    "two blocks": ((1, 256, 9, 31), 3, 64, CHAIN),
    "two blocks, taller": ((1, 200, 9, 23), 3, 40, TALL),
    "four blocks": ((1, 512, 3, 43), 3, 128, CHAIN),
    "four blocks, taller": ((1, 264, 3, 7), 3, 72, TALL),
    "more units than channels ask for": ((1, 16, 3, 7), 2, 40, BY_SIZE),
    "order 1": ((1, 72, 3, 7), 1, 24, BY_SIZE),
    "one pass, order 2": ((1, 64, 3, 7), 2, 16, BY_SIZE),
}
"""Sizes that are no multiples of tiles, and what they are for. The shim has two blocks or clusters at the same time."""


def served(mode: str, form: int) -> bool:
    return mode == "joint" or form in (BY_SIZE, CHAIN)


@pytest.mark.parametrize("case", CASES)
def test_error_is_no_larger_than_the_references(kernels: HostKernels, case: str) -> None:
    shape, order, hidden, form = CASES[case]
    number = list(CASES).index(case)
    mode, result, dtype = MODES[number % 2], list(RESULTS)[number // 2 % 2], DTYPES[number // 3 % 2]
    mode = mode if served(mode, form) else "joint"
    check(kernels, shape, mode, result, form=form, order=order, hidden=hidden, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_combination(kernels: HostKernels, case: str, mode: str, result: str, dtype: torch.dtype) -> None:
    shape, order, hidden, form = CASES[case]
    if served(mode, form):
        check(kernels, shape, mode, result, form=form, order=order, hidden=hidden, dtype=dtype, thread_order=1)
        check(kernels, shape, mode, result, form=form, order=order, hidden=hidden, dtype=dtype, thread_order=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "mode", "form"),
    [
        ((1, 64, 56, 56), "joint", ONCE),
        ((1, 128, 28, 56), "joint", ONCE),
        ((1, 128, 28, 28), "joint", CHAIN),
        ((1, 128, 28, 28), "per_order", CHAIN),
        ((2, 256, 14, 25), "joint", TALL),
        ((2, 256, 14, 25), "per_order", CHAIN),
        ((4, 512, 7, 14), "joint", CHAIN),
        ((4, 512, 7, 14), "per_order", CHAIN),
    ],
)
def test_many_tiles(kernels: HostKernels, shape: tuple[int, ...], mode: str, form: int) -> None:
    check(kernels, shape, mode, form=form)


@pytest.mark.parametrize(
    ("shape", "mode", "form"),
    [
        ((1, 64, 10, 33), "joint", ONCE),
        ((1, 128, 10, 33), "joint", ONCE),
        ((1, 128, 10, 33), "joint", CHAIN),
        ((1, 256, 5, 15), "joint", CHAIN),
        ((1, 256, 5, 15), "per_order", CHAIN),
        pytest.param((1, 256, 20, 25), "joint", TALL, marks=pytest.mark.slow),
        pytest.param((1, 512, 5, 15), "joint", CHAIN, marks=pytest.mark.slow),
        pytest.param((1, 512, 5, 15), "per_order", CHAIN, marks=pytest.mark.slow),
    ],
)
def test_the_order_of_threads_is_invisible(kernels: HostKernels, shape: tuple[int, ...], mode: str, form: int) -> None:
    """And so is when copies and products happen."""
    given = drawn(shape)
    first, *others = (backward(kernels, given, mode, form=form, thread_order=order) for order in (0, 1, 7))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("channels", "form"), [(64, ONCE), (128, ONCE), (128, CHAIN), pytest.param(256, CHAIN, marks=pytest.mark.slow)]
)
def test_each_subset_of_gradients(kernels: HostKernels, channels: int, form: int) -> None:
    """The same bits, whatever else is wanted."""
    given = drawn((1, channels, 10, 17))
    want = backward(kernels, given, form=form)
    for subset in range(1, 7):
        wanted = tuple(bool(subset >> i & 1) for i in range(3))
        got = backward(kernels, given, form=form, wanted=wanted)  # type: ignore[arg-type]
        for mine, all_of, asked in zip(got, want, wanted, strict=True):
            assert (mine is not None) == asked
            if mine is not None:
                assert all_of is not None
                assert torch.equal(mine, all_of)


@pytest.mark.parametrize(
    ("channels", "mode", "form"),
    [(64, "joint", ONCE), (128, "joint", ONCE), (192, "joint", TALL), (192, "per_order", CHAIN)],
)
def test_extreme_features(kernels: HostKernels, channels: int, mode: str, form: int) -> None:
    """Saturated gates, products near the largest number, a position and a factor of zero, a NaN."""

    def change(x: Tensor, proj: Tensor, out: Tensor, upstream: Tensor) -> None:
        x[0, :, 0] *= 1e4
        x[1, :, 0, 0] = 0
        proj[3] = 0

    check(kernels, (2, channels, 2, 3), mode, form=form, change=change)
    given = drawn((2, channels, 2, 3))
    change(*given)
    given[0][1, 3, 1, 2] = torch.nan
    dx, dproj, dout = backward(kernels, given, mode, form=form)
    assert dx is not None
    at = dx.isnan()
    assert at[1, :, 1, 2].all()
    assert at.sum() == channels
    for gradient in (dproj, dout):
        assert gradient is not None
        assert gradient.isnan().any()


@pytest.mark.parametrize("channels", [64, 512])
def test_no_positions(kernels: HostKernels, channels: int) -> None:
    dx, dproj, dout = backward(kernels, drawn((0, channels, 3, 2)))
    assert dx is not None
    assert dx.shape == (0, channels, 3, 2)
    for gradient in (dproj, dout):
        assert gradient is not None
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("channels", "hidden", "order", "mode", "dtype", "form", "said"),
    [
        (64, 16, 3, "joint", torch.float32, BY_SIZE, "dtype must be float16 or bfloat16"),
        (64, 16, 4, "joint", torch.bfloat16, BY_SIZE, "R of out_weight .* is 4"),
        (64, 16, 3, "joint", torch.bfloat16, 4, "form of the backward is 4"),
        (64, 16, 3, "per_order", torch.bfloat16, ONCE, "one pass serves joint gates"),
        (256, 16, 3, "per_order", torch.bfloat16, TALL, "taller tiles serve joint gates"),
        (128, 32, 3, "joint", torch.bfloat16, TALL, "more than 128 channels or 32 hidden maps"),
        (136, 16, 3, "joint", torch.bfloat16, ONCE, "up to 128 channels and 32 hidden maps"),
        (64, 40, 3, "joint", torch.bfloat16, ONCE, "up to 128 channels and 32 hidden maps"),
        (60, 16, 3, "joint", torch.bfloat16, BY_SIZE, "C of out_weight .* is 60"),
        (64, 12, 3, "joint", torch.bfloat16, BY_SIZE, "K of out_weight .* is 12"),
        (520, 16, 3, "joint", torch.bfloat16, BY_SIZE, "C of out_weight .* is 520"),
        (512, 136, 3, "joint", torch.bfloat16, BY_SIZE, "K of out_weight .* is 136"),
    ],
)
def test_what_is_not_served_is_refused(
    kernels: HostKernels, channels: int, hidden: int, order: int, mode: str, dtype: torch.dtype, form: int, said: str
) -> None:
    with pytest.raises(ValueError, match=f"returned 1: .*{said}"):
        backward(kernels, drawn((1, channels, 1, 2), hidden=hidden, order=order, dtype=dtype), mode, form=form)
