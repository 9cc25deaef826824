"""CUDA kernels of high_order_attention and its map under the execution shim, against the reference in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfkd_fast.ops import high_order_attention, high_order_attention_map
from dfkd_fast.testing import MAP_SHAPES, assert_no_worse, random

from .host_kernels import HostKernels, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler with sanitizers")

SOURCES = ["high_order_attention.cu", "high_order_attention_bwd.cu"]
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
DTYPES = (torch.bfloat16, torch.float16)
MODES = ("joint", "per_order")
RESULTS = {"features": high_order_attention, "map": high_order_attention_map}
AUTOMATIC, WHOLE, SPLIT, TALL = 0, 1, 2, 3


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostKernels]:
    running = HostKernels(build(tmp_path_factory.getbasetemp().parent / "host", SOURCES))
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


def scratch(kernels: HostKernels, name: str, *arguments: int) -> np.ndarray | None:
    """As many bytes as a function asks for, no number in any of them; what it returns is told as a refusal."""
    try:
        kernels(name, *arguments)
    except ValueError as told:
        return np.full(int(re.findall(r"returned (\d+)", str(told))[0]), 0xFF, dtype=np.uint8)
    return None


def codes(x: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    n, channels, h, w = x.shape
    return n * h * w, channels, out.shape[2], out.shape[0]


def forward(
    kernels: HostKernels, given: tuple[Tensor, ...], mode: str, result: str, *, form: int = 0, thread_order: int = 0
) -> Tensor:
    x, proj, out, _ = given
    y = np.full_like(rows(x), -1)
    place = scratch(kernels, "dfkd_high_order_attention_scratch", *codes(x, out), MODES.index(mode), form)
    kernels(
        "dfkd_high_order_attention", *map(rows, (x, proj, out)), *codes(x, out), CODES[x.dtype], MODES.index(mode),
        list(RESULTS).index(result), form, y, place, None, order=thread_order,
    )  # fmt: skip
    return like(y, x)


def backward(
    kernels: HostKernels,
    given: tuple[Tensor, ...],
    mode: str,
    result: str,
    *,
    form: int = 0,
    thread_order: int = 0,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> list[Tensor | None]:
    x, proj, out, upstream = given
    asked = (*codes(x, out), MODES.index(mode), *map(int, wanted), form)
    gradients = [np.full_like(rows(t), -1) if want else None for t, want in zip((x, proj, out), wanted, strict=True)]
    kernels(
        "dfkd_high_order_attention_backward", *map(rows, (upstream, x, proj, out)), *codes(x, out), CODES[x.dtype],
        MODES.index(mode), list(RESULTS).index(result), form, *gradients,
        scratch(kernels, "dfkd_high_order_attention_backward_scratch", *asked), None, order=thread_order,
    )  # fmt: skip
    return [None if g is None else like(g, t) for g, t in zip(gradients, (x, proj, out), strict=True)]


def reference(given: tuple[Tensor, ...], mode: Any, result: str, *, exact: bool) -> list[Tensor]:
    *leaves, upstream = [t.detach().double() if exact else t.detach() for t in given]
    leaves = [t.requires_grad_() for t in leaves]
    y = RESULTS[result](*leaves, mode=mode, backend="reference")
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def once(mode: str, order: int) -> bool:
    """Whether there is a whole form of backward."""
    return mode == "joint" and order == 3


def check(
    kernels: HostKernels,
    shape: tuple[int, ...],
    mode: str,
    result: str,
    *,
    form: int = 0,
    draws: int = 1,
    change: Callable[..., None] | None = None,
    **drawn_as: Any,
) -> None:
    """Values and gradients err at most twice as far as the reference's in their type, or one unit in the last place."""
    columns: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], [], [], []]
    for seed in range(draws):
        given = drawn(shape, seed=10 * seed, **drawn_as)
        if change is not None:
            change(*given)
        way_back = form if form != WHOLE or once(mode, given[2].shape[0]) else AUTOMATIC
        got = [forward(kernels, given, mode, result, form=form), *backward(kernels, given, mode, result, form=way_back)]
        plain, exact = (reference(given, mode, result, exact=exact) for exact in (False, True))
        for column, mine, than, truth in zip(columns, got, plain, exact, strict=True):
            assert mine is not None
            column.append((mine.flatten(), than.flatten(), truth.flatten()))
    for name, column in zip(("value", "dx", "dproj", "dout"), columns, strict=True):
        mine, than, truth = (torch.cat(each) for each in zip(*column, strict=True))
        ulp = torch.finfo(mine.dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
        assert_no_worse(mine, than=than, truth=truth, floor=ulp, name=name)


CASES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    # shape, order, hidden units, form
    "tiles of positions and channels": ((2, 136, 3, 11), 1, 8, SPLIT),
    "tiles of hidden units": ((1, 16, 2, 5), 1, 40, SPLIT),
    "split, order 2": ((1, 24, 3, 5), 2, 9, SPLIT),
    "split, order 3": ((1, 40, 3, 7), 3, 5, SPLIT),
    "tall": ((1, 16, 3, 5), 3, 24, TALL),
    "split, order 4": ((1, 24, 1, 7), 4, 3, SPLIT),
    "whole, order 1": ((1, 9, 3, 5), 1, 3, WHOLE),
    "whole, two panels": ((1, 68, 2, 5), 2, 9, WHOLE),
    "whole, order 3": ((2, 20, 3, 7), 3, 5, WHOLE),
    "by itself": ((1, 24, 3, 5), 4, 3, AUTOMATIC),
}
"""Sizes that are no multiples of tiles, and what they are for."""


@pytest.mark.parametrize("case", CASES)
def test_error_is_no_larger_than_the_references(kernels: HostKernels, case: str) -> None:
    shape, order, hidden, form = CASES[case]
    number = list(CASES).index(case)
    mode, result, dtype = MODES[number % 2], list(RESULTS)[number // 2 % 2], DTYPES[number // 4 % 2]
    check(kernels, shape, mode, result, form=form, order=order, hidden=hidden, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_combination(kernels: HostKernels, case: str, mode: str, result: str, dtype: torch.dtype) -> None:
    shape, order, hidden, form = CASES[case]
    check(kernels, shape, mode, result, form=form, order=order, hidden=hidden, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("form", [SPLIT, TALL])
@pytest.mark.parametrize("mode", MODES)
def test_many_tiles_of_order_3(kernels: HostKernels, mode: str, form: int) -> None:
    check(kernels, (2, 136, 7, 10), mode, "features", form=form, hidden=40)


@pytest.mark.parametrize(
    ("shape", "mode"), [((2, 8, 10, 20), "joint"), ((1, 8, 10, 15), "per_order"), ((1, 72, 10, 13), "joint")]
)
def test_a_block_that_walks_over_tiles(kernels: HostKernels, shape: tuple[int, ...], mode: str) -> None:
    """Under the shim there are two or three blocks at most."""
    if shape[1] <= 64 and mode == "joint":
        check(kernels, shape, mode, "features", form=WHOLE, hidden=2)
        return
    given = drawn(shape, hidden=2)
    got = forward(kernels, given, mode, "features", form=WHOLE)
    plain, exact = (reference(given, mode, "features", exact=exact)[0] for exact in (False, True))
    assert_no_worse(got, than=plain, truth=exact)


@pytest.mark.parametrize("shape", MAP_SHAPES.values(), ids=MAP_SHAPES)
def test_every_shape(kernels: HostKernels, shape: tuple[int, ...]) -> None:
    # Few elements have an error by luck: it takes many to say how large it is.
    check(kernels, shape, "joint", "features", draws=2 if math.prod(shape) < 30 else 1, dtype=DTYPES[shape[1] % 2])


def test_empty_batch_has_zero_gradients_of_the_weights(kernels: HostKernels) -> None:
    given = drawn((0, 5, 3, 2))
    for form in (AUTOMATIC, WHOLE, SPLIT):
        dx, dproj, dout = backward(kernels, given, "joint", "features", form=form)
        assert dx is not None
        assert dx.shape == (0, 5, 3, 2)
        for gradient in (dproj, dout):
            assert gradient is not None
            assert (gradient == 0).all()


@pytest.mark.parametrize("form", [WHOLE, SPLIT])
def test_each_subset_of_gradients(kernels: HostKernels, form: int) -> None:
    """The same bits, whatever else is wanted."""
    given = drawn((1, 12, 3, 11), order=3 if form == WHOLE else 1)
    want = backward(kernels, given, "joint", "features", form=form)
    for subset in (1, 2, 4, 5):
        wanted = tuple(bool(subset >> i & 1) for i in range(3))
        got = backward(kernels, given, "joint", "features", form=form, wanted=wanted)  # type: ignore[arg-type]
        for mine, all_of, asked in zip(got, want, wanted, strict=True):
            if asked:
                assert mine is not None
                assert all_of is not None
                assert torch.equal(mine, all_of)
            else:
                assert mine is None


@pytest.mark.parametrize(
    ("form", "mode"), [(WHOLE, "joint"), (SPLIT, "per_order"), pytest.param(TALL, "joint", marks=pytest.mark.slow)]
)
def test_the_order_of_threads_is_invisible(kernels: HostKernels, form: int, mode: str) -> None:
    given = drawn((1, 20, 3, 11), order=3 if mode == "joint" else 2)
    found = []
    for thread_order in (0, 1, 7):
        value = forward(kernels, given, mode, "features", form=form, thread_order=thread_order)
        gradients = backward(kernels, given, mode, "features", form=form, thread_order=thread_order)
        found.append([value, *gradients])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


@pytest.mark.parametrize(("form", "mode"), [(WHOLE, "joint"), (SPLIT, "joint"), (SPLIT, "per_order")])
def test_extreme_features(kernels: HostKernels, form: int, mode: str) -> None:
    """Saturated gates, products near the largest number, a position and a factor of zero, a NaN."""

    def change(x: Tensor, proj: Tensor, out: Tensor, upstream: Tensor) -> None:
        x[0] *= 1e4
        x[1, :, 0, 0] = 0
        proj[3] = 0

    check(kernels, (2, 20, 2, 3), mode, "features", form=form, change=change)
    given = drawn((2, 20, 2, 3))
    change(*given)
    given[0][1, 3, 1, 2] = torch.nan
    at = forward(kernels, given, mode, "features", form=form).isnan()
    assert at[1, :, 1, 2].all()
    assert at.sum() == 20


def test_what_the_kernels_do_not_serve(kernels: HostKernels) -> None:
    for dtype, order, form in (
        (torch.float32, 3, AUTOMATIC),
        (torch.bfloat16, 5, AUTOMATIC),
        (torch.bfloat16, 4, WHOLE),
    ):
        given = drawn((1, 4, 2, 2), dtype=dtype, order=order)
        for call in (forward, backward):
            with pytest.raises(ValueError, match="returned 1"):
                call(kernels, given, "joint", "features", form=form)
    # A backward of one gate an order has no whole form.
    with pytest.raises(ValueError, match="returned 1"):
        backward(kernels, drawn((1, 4, 2, 2)), "per_order", "features", form=WHOLE)
    with pytest.raises(ValueError, match=f"scratch returned {10 * 3 * 128 * 2}$"):
        kernels("dfkd_high_order_attention_scratch", 10, 512, 128, 3, 0, AUTOMATIC)
    x, proj, out = (np.zeros(shape, dtype=np.int16) for shape in ((1, 200), (1, 8, 200), (1, 200, 8)))
    with pytest.raises(ValueError, match="dfkd_high_order_attention returned 1"):
        kernels("dfkd_high_order_attention", x, proj, out, 1, 200, 8, 1, 2, 0, 0, 0, x.copy(), None, None)
