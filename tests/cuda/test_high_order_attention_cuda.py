"""high_order_attention's CUDA kernels under the execution shim, against the reference in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dfkd_fast.ops import high_order_attention, high_order_attention_map
from dfkd_fast.testing import assert_no_worse

from ..ops.table import high_order

KERNELS = "high_order_attention"
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
DTYPES = (torch.bfloat16, torch.float16)
MODES = ("joint", "per_order")
RESULTS = {"features": high_order_attention, "map": high_order_attention_map}
BY_SIZE, ONCE, CHAIN, TALL = 0, 1, 2, 3
"""Forms of backward."""

slow = pytest.mark.slow


def drawn(shape, *, order=3, dtype=torch.bfloat16, **options):
    """x, weights, and a gradient of the result."""
    # Products of four factors vary so much that one element would decide.
    scale = 0.5 if order == 4 else 1.0
    fixed = {"layout": "channels_last", "scale": scale, "target": True, "needs_grad": ()}
    return high_order(shape, order=order, dtype=dtype, **fixed, **options)(1)


def rows(t):
    """A map as (positions, channels), a weight as it lies."""
    laid = t.detach().movedim(1, -1) if t.ndim == 4 else t.detach()
    return laid.contiguous().view(torch.int16).numpy().copy()


def like(array, t):
    values = torch.from_numpy(array).view(t.dtype)
    return values.movedim(-1, 1) if t.ndim == 4 else values


def codes(x, out):
    n, channels, h, w = x.shape
    return n * h * w, channels, out.shape[2], out.shape[0]


def forward(kernels, given, mode="joint", result="features", *, thread_order=0):
    x, proj, out, _ = given
    y = np.full_like(rows(x), -1)
    kernels(
        "dfkd_high_order_attention", *map(rows, (x, proj, out)), *codes(x, out), CODES[x.dtype],
        MODES.index(mode), list(RESULTS).index(result), y, None, order=thread_order,
    )  # fmt: skip
    return like(y, x)


def backward(
    kernels, given, mode="joint", result="features", *, form=BY_SIZE, thread_order=0, needs_grad=(True, True, True)
):
    x, proj, out, grad_output = given
    sizes = (*codes(x, out), MODES.index(mode), *map(int, needs_grad), form)
    scratch = kernels.scratch("dfkd_high_order_attention_backward_scratch", *sizes)
    each = zip((x, proj, out), needs_grad, strict=True)
    gradients = [np.full_like(rows(t), -1) if needs else None for t, needs in each]
    kernels(
        "dfkd_high_order_attention_backward", *map(rows, (grad_output, x, proj, out)), *codes(x, out),
        CODES[x.dtype], MODES.index(mode), list(RESULTS).index(result), form, *gradients,
        scratch if scratch.size else None, None, order=thread_order,
    )  # fmt: skip
    return [None if g is None else like(g, t) for g, t in zip(gradients, (x, proj, out), strict=True)]


def reference(given, mode, result, *, exact):
    *leaves, grad_output = [t.detach().double() if exact else t.detach() for t in given]
    leaves = [t.requires_grad_() for t in leaves]
    y = RESULTS[result](*leaves, mode=mode, backend="reference")
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_output)]


def check(kernels, given, mode="joint", result="features", *, form=None, thread_order=0):
    """Values (or gradients by a form) err at most twice as far as the reference's in their type, or one last place."""
    if form is None:
        results = [forward(kernels, given, mode, result, thread_order=thread_order)]
    else:
        results = [None, *backward(kernels, given, mode, result, form=form, thread_order=thread_order)]
    plain, exact = (reference(given, mode, result, exact=exact) for exact in (False, True))
    for name, mine, than, truth in zip(("y", "dx", "dproj", "dout"), results, plain, exact, strict=False):
        if mine is not None:
            floor = torch.finfo(mine.dtype).eps * float(truth.abs().max())
            assert_no_worse(mine, than=than, truth=truth, floor=floor, name=name)


# Shape, order, hidden units and form of backward, if it is that. Sizes are no multiples of tiles. The shim has two
# blocks or clusters at the same time.
CASES = {
    "a ring that is used again": ((2, 64, 22, 19), 3, 16, None),
    "few channels and units": ((1, 24, 5, 13), 3, 8, None),
    "one position": ((1, 64, 1, 1), 3, 16, None),
    "two panels, a ring that is used again": ((1, 128, 16, 41), 3, 32, None),
    "a panel and a bit, order 1": ((1, 72, 3, 7), 1, 24, None),
    "more units than channels ask for": ((1, 16, 3, 7), 2, 32, None),
    "a cluster of two": ((1, 256, 12, 17), 3, 64, None),
    "a bit of four panels, order 2": ((1, 136, 3, 7), 2, 40, None),
    "a cluster of eight": ((1, 512, 3, 43), 3, 128, None),
    "back in one pass, several tiles a warpgroup": ((1, 64, 21, 33), 3, 16, ONCE),
    "back in one pass, few channels and units": ((3, 24, 3, 5), 3, 8, ONCE),
    "back in one pass, two panels": ((1, 128, 15, 29), 3, 32, ONCE),
    "back in one pass, a panel and a bit": ((2, 72, 9, 17), 3, 24, ONCE),
    "back, one block of the chain": ((1, 104, 15, 19), 3, 24, CHAIN),
    "back, few channels": ((1, 40, 3, 7), 3, 8, CHAIN),
    "back, two blocks": ((1, 256, 9, 31), 3, 64, CHAIN),
    "back, two blocks, taller": ((1, 200, 9, 23), 3, 40, TALL),
    "back, four blocks": ((1, 512, 3, 43), 3, 128, CHAIN),
    "back, four blocks, taller": ((1, 264, 3, 7), 3, 72, TALL),
    "back, more units than channels ask for": ((1, 16, 3, 7), 2, 40, BY_SIZE),
    "back, order 1": ((1, 72, 3, 7), 1, 24, BY_SIZE),
    "back in one pass, order 2": ((1, 64, 3, 7), 2, 16, BY_SIZE),
}


def served(mode, form):
    return mode == "joint" or form in (None, BY_SIZE, CHAIN)


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(kernels, case):
    shape, order, hidden, form = CASES[case]
    number = list(CASES).index(case)
    mode, result, dtype = MODES[number % 2], list(RESULTS)[number // 2 % 2], DTYPES[number // 3 % 2]
    given = drawn(shape, order=order, hidden=hidden, dtype=dtype)
    check(kernels, given, mode if served(mode, form) else "joint", result, form=form)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_combination(kernels, case, mode, result, dtype):
    shape, order, hidden, form = CASES[case]
    if served(mode, form):
        given = drawn(shape, order=order, hidden=hidden, dtype=dtype)
        for thread_order in (0,) if form is None else (1, 5):
            check(kernels, given, mode, result, form=form, thread_order=thread_order)


@slow
@pytest.mark.parametrize(
    ("shape", "mode", "form", "order"),
    [
        *(((1, c, 3, 31), mode, None, order) for c in (64, 128, 256, 512) for mode in MODES for order in (1, 2)),
        *((shape, mode, None, 3) for shape in ((1, 256, 20, 23), (1, 384, 17, 19), (1, 512, 16, 17)) for mode in MODES),
        ((1, 64, 56, 56), "joint", ONCE, 3),
        ((1, 128, 28, 56), "joint", ONCE, 3),
        ((1, 128, 28, 28), "joint", CHAIN, 3),
        ((1, 128, 28, 28), "per_order", CHAIN, 3),
        ((2, 256, 14, 25), "joint", TALL, 3),
        ((2, 256, 14, 25), "per_order", CHAIN, 3),
        ((4, 512, 7, 14), "joint", CHAIN, 3),
        ((4, 512, 7, 14), "per_order", CHAIN, 3),
    ],
)
def test_fewer_orders_many_clusters_and_many_tiles(kernels, shape, mode, form, order):
    check(kernels, drawn(shape, order=order), mode, form=form)


@pytest.mark.parametrize(
    ("shape", "mode", "form"),
    [
        ((1, 64, 20, 33), "joint", None),
        ((1, 128, 20, 33), "per_order", None),
        ((1, 256, 5, 15), "joint", None),
        ((1, 64, 10, 33), "joint", ONCE),
        ((1, 128, 10, 33), "joint", ONCE),
        ((1, 128, 10, 33), "joint", CHAIN),
        ((1, 256, 5, 15), "per_order", CHAIN),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                ((1, 128, 10, 33), "joint", None),
                ((1, 256, 5, 15), "per_order", None),
                ((1, 256, 5, 15), "joint", CHAIN),
                ((1, 256, 20, 25), "joint", TALL),
                *(((1, 512, 5, 15), mode, form) for mode, form in product(MODES, (None, CHAIN))),
            )
        ),
    ],
)
def test_the_order_of_threads_is_invisible(kernels, shape, mode, form):
    """And so is when copies and products happen."""
    given, runs = drawn(shape), []
    for order in (0, 1, 7):
        if form is None:
            runs.append([forward(kernels, given, mode, thread_order=order)])
        else:
            runs.append(backward(kernels, given, mode, form=form, thread_order=order))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_half_of_a_batch_is_the_half_of_its_result(kernels):
    """A position's numbers do not depend on the tile it is in."""
    x, *others = drawn((2, 64, 9, 11))
    assert torch.equal(forward(kernels, (x[1:], *others)), forward(kernels, (x, *others))[1:])


@pytest.mark.parametrize(
    ("channels", "form"), [(64, ONCE), (128, ONCE), (128, CHAIN), pytest.param(256, CHAIN, marks=slow)]
)
def test_each_subset_of_gradients(kernels, channels, form):
    """The same bits, whatever else is asked for."""
    given = drawn((1, channels, 10, 17))
    whole = backward(kernels, given, form=form)
    for needs_grad in list(product((False, True), repeat=3))[1:-1]:
        some = backward(kernels, given, form=form, needs_grad=needs_grad)
        for a, b, needs in zip(some, whole, needs_grad, strict=True):
            assert torch.equal(a, b) if needs else a is None


@pytest.mark.parametrize(
    ("channels", "mode", "form"),
    [
        (32, "joint", None),
        (192, "per_order", None),
        (192, "joint", None),
        pytest.param(288, "joint", None, marks=slow),
        (64, "joint", ONCE),
        (128, "joint", ONCE),
        (192, "joint", TALL),
        (192, "per_order", CHAIN),
    ],
)
def test_extreme_features(kernels, channels, mode, form):
    """Saturated gates, products near the largest number, a position and a factor of zero, a NaN."""
    given = drawn((2, channels, 2, 3))
    x, proj, *_ = given
    x[0, :, 0] *= 1e4  # few: of so large a logit the sign alone counts, and that of a small sum is luck
    x[1, :, 0, 0] = 0
    proj[3] = 0
    check(kernels, given, mode, form=form)
    x[1, 3, 1, 2] = torch.nan
    first, *others = [forward(kernels, given, mode)] if form is None else backward(kernels, given, mode, form=form)
    at = first.isnan()
    assert at[1, :, 1, 2].all()
    assert at.sum() == channels
    assert all(gradient.isnan().any() for gradient in others)


@pytest.mark.parametrize("channels", [64, 512])
def test_no_positions(kernels, channels):
    given = drawn((0, channels, 3, 2))
    dx, *others = backward(kernels, given)
    assert forward(kernels, given).shape == dx.shape == (0, channels, 3, 2)
    assert all((gradient == 0).all() for gradient in others)


# Channels, hidden units, order, dtype, mode and form of backward.
REFUSED = [
    (64, 16, 3, torch.float32, "joint", BY_SIZE, "dtype must be float16 or bfloat16"),
    (64, 16, 4, torch.bfloat16, "joint", BY_SIZE, "R of out_weight .* is 4; the kernel supports 1 to 3"),
    (
        60,
        16,
        3,
        torch.bfloat16,
        "joint",
        BY_SIZE,
        "C of out_weight .* is 60; the kernel supports multiples of 8 up to 512",
    ),
    (
        64,
        12,
        3,
        torch.bfloat16,
        "joint",
        BY_SIZE,
        "K of out_weight .* is 12; the kernel supports multiples of 8 up to 128",
    ),
    (520, 16, 3, torch.bfloat16, "joint", BY_SIZE, "C of out_weight .* is 520"),
    (512, 136, 3, torch.bfloat16, "joint", BY_SIZE, "K of out_weight .* is 136"),
    (64, 16, 3, torch.bfloat16, "joint", 4, "form of the backward is 4"),
    (64, 16, 3, torch.bfloat16, "per_order", ONCE, "one pass supports joint gates"),
    (256, 16, 3, torch.bfloat16, "per_order", TALL, "taller tiles support joint gates"),
    (128, 32, 3, torch.bfloat16, "joint", TALL, "more than 128 channels or 32 hidden maps"),
    (136, 16, 3, torch.bfloat16, "joint", ONCE, "up to 128 channels and 32 hidden maps"),
    (64, 40, 3, torch.bfloat16, "joint", ONCE, "up to 128 channels and 32 hidden maps"),
]


@pytest.mark.parametrize(("channels", "hidden", "order", "dtype", "mode", "form", "said"), REFUSED)
def test_what_is_not_served_is_refused(kernels, channels, hidden, order, dtype, mode, form, said):
    given = drawn((1, channels, 1, 2), hidden=hidden, order=order, dtype=dtype)
    with pytest.raises(ValueError, match=f"returned 1: .*{said}"):
        backward(kernels, given, mode, form=form)
    if form == BY_SIZE:
        with pytest.raises(ValueError, match=f"returned 1: {said}"):
            forward(kernels, given, mode, "map")
