"""Compares the CUDA kernels of high_order_attention, run on the CPU by the CPU emulation, with the reference."""

from __future__ import annotations

from itertools import product

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
# The algorithm of backward: selected by size, one pass, through memory, and through memory in taller tiles.
BY_SIZE, ONCE, CHAIN, TALL = 0, 1, 2, 3

slow = pytest.mark.slow


def inputs(shape, *, order=3, dtype=torch.bfloat16, **options):
    """x, both weights and the upstream gradient."""
    fixed = {"layout": "channels_last", "target": True, "needs_grad": ()}
    return high_order(shape, order=order, dtype=dtype, **fixed, **options)(1)


def codes(x, out):
    n, channels, h, w = x.shape
    return n * h * w, channels, out.shape[2], out.shape[0]


def forward(kernels, given, mode="joint", result="features", *, thread_order=0):
    x, proj, out, _ = given
    y = torch.full_like(x, torch.nan)
    kernels(
        "dfkd_high_order_attention", x, proj, out, *codes(x, out), CODES[x.dtype],
        MODES.index(mode), list(RESULTS).index(result), y, None, order=thread_order,
    )  # fmt: skip
    return y


def backward(
    kernels, given, mode="joint", result="features", *, form=BY_SIZE, thread_order=0, needs_grad=(True, True, True)
):
    x, proj, out, grad_output = given
    sizes = (*codes(x, out), MODES.index(mode), *map(int, needs_grad), form)
    scratch = kernels.scratch("dfkd_high_order_attention_backward_scratch", *sizes)
    each = zip((x, proj, out), needs_grad, strict=True)
    gradients = [torch.full_like(t, torch.nan) if needed else None for t, needed in each]
    kernels(
        "dfkd_high_order_attention_backward", grad_output, x, proj, out, *codes(x, out),
        CODES[x.dtype], MODES.index(mode), list(RESULTS).index(result), form, *gradients,
        scratch if scratch.size else None, None, order=thread_order,
    )  # fmt: skip
    return gradients


def run(kernels, given, mode="joint", result="features", *, form=None, thread_order=0):
    """The output if ``form`` is None, otherwise the gradients computed by that form of backward."""
    if form is None:
        return [forward(kernels, given, mode, result, thread_order=thread_order)]
    return backward(kernels, given, mode, result, form=form, thread_order=thread_order)


def reference(given, mode, result, *, exact):
    *leaves, grad_output = [t.detach().double() if exact else t.detach() for t in given]
    leaves = [t.requires_grad_() for t in leaves]
    y = RESULTS[result](*leaves, mode=mode, backend="reference")
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_output)]


def check(kernels, given, mode="joint", result="features", *, form=None, thread_order=0):
    """Asserts that errors are at most twice the reference's in the same dtype, plus one ulp."""
    got = run(kernels, given, mode, result, form=form, thread_order=thread_order)
    names = ("y",) if form is None else ("dx", "dproj", "dout")
    low, truth = (reference(given, mode, result, exact=exact)[form is not None :] for exact in (False, True))
    for name, mine, than, expected in zip(names, got, low, truth, strict=False):
        floor = torch.finfo(mine.dtype).eps * float(expected.abs().max())
        assert_no_worse(mine, than=than, truth=expected, floor=floor, name=name)


# Shape, order, hidden units, and the form of backward (None: forward). Sizes are not multiples of the tile. The shim
# runs two blocks or clusters at the same time.
CASES = {
    "reused pipeline stages": ((2, 64, 22, 19), 3, 16, None),
    "few channels and units": ((1, 24, 5, 13), 3, 8, None),
    "one position": ((1, 64, 1, 1), 3, 16, None),
    "two boxes, reused pipeline stages": ((1, 128, 16, 41), 3, 32, None),
    "a partial second box, order 1": ((1, 72, 3, 7), 1, 24, None),
    "more units than a quarter of the channels": ((1, 16, 3, 7), 2, 32, None),
    "a cluster of two": ((1, 256, 12, 17), 3, 64, None),
    "four partial boxes, order 2": ((1, 136, 3, 7), 2, 40, None),
    "a cluster of eight": ((1, 512, 3, 43), 3, 128, None),
    "backward, one pass, several tiles per warpgroup": ((1, 64, 21, 33), 3, 16, ONCE),
    "backward, one pass, few channels and units": ((3, 24, 3, 5), 3, 8, ONCE),
    "backward, one pass, two boxes": ((1, 128, 15, 29), 3, 32, ONCE),
    "backward, one pass, a partial second box": ((2, 72, 9, 17), 3, 24, ONCE),
    "backward, one block": ((1, 104, 15, 19), 3, 24, CHAIN),
    "backward, few channels": ((1, 40, 3, 7), 3, 8, CHAIN),
    "backward, two blocks": ((1, 256, 9, 31), 3, 64, CHAIN),
    "backward, two blocks, taller tiles": ((1, 200, 9, 23), 3, 40, TALL),
    "backward, four blocks": ((1, 512, 3, 43), 3, 128, CHAIN),
    "backward, four blocks, taller tiles": ((1, 264, 3, 7), 3, 72, TALL),
    "backward, more units than a quarter of the channels": ((1, 16, 3, 7), 2, 40, BY_SIZE),
    "backward, order 1": ((1, 72, 3, 7), 1, 24, BY_SIZE),
    "backward, one pass, order 2": ((1, 64, 3, 7), 2, 16, BY_SIZE),
}


def supported(mode, form):
    return mode == "joint" or form in (None, BY_SIZE, CHAIN)


@pytest.mark.parametrize("case", CASES)
def test_errors_are_within_twice_the_references(kernels, case):
    shape, order, hidden, form = CASES[case]
    number = list(CASES).index(case)
    mode, result, dtype = MODES[number % 2], list(RESULTS)[number // 2 % 2], DTYPES[number // 3 % 2]
    given = inputs(shape, order=order, hidden=hidden, dtype=dtype)
    check(kernels, given, mode if supported(mode, form) else "joint", result, form=form)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_combination(kernels, case, mode, result, dtype):
    shape, order, hidden, form = CASES[case]
    if supported(mode, form):
        given = inputs(shape, order=order, hidden=hidden, dtype=dtype)
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
def test_lower_orders_many_clusters_and_many_tiles(kernels, shape, mode, form, order):
    check(kernels, inputs(shape, order=order), mode, form=form)


ORDER_CASES = (
    ((1, 64, 20, 33), "joint", None),
    ((1, 128, 20, 33), "per_order", None),
    ((1, 256, 5, 15), "joint", None),
    *(((1, channels, 10, 33), "joint", form) for channels, form in ((64, ONCE), (128, ONCE), (128, CHAIN))),
    ((1, 256, 5, 15), "per_order", CHAIN),
)
SLOW_ORDER_CASES = (
    ((1, 128, 10, 33), "joint", None),
    ((1, 256, 5, 15), "per_order", None),
    ((1, 256, 5, 15), "joint", CHAIN),
    ((1, 256, 20, 25), "joint", TALL),
    *(((1, 512, 5, 15), mode, form) for mode, form in product(MODES, (None, CHAIN))),
)


@pytest.mark.parametrize(
    ("shape", "mode", "form"), [*ORDER_CASES, *(pytest.param(*case, marks=slow) for case in SLOW_ORDER_CASES)]
)
def test_results_do_not_depend_on_thread_order(kernels, shape, mode, form):
    """They do not depend on when copies and wgmma complete either."""
    given = inputs(shape)
    first, *others = (run(kernels, given, mode, form=form, thread_order=order) for order in (0, 1, 7))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_results_do_not_depend_on_the_batch(kernels):
    """A position's results are the same in any tile."""
    x, *others = inputs((2, 64, 9, 11))
    assert torch.equal(forward(kernels, (x[1:], *others)), forward(kernels, (x, *others))[1:])


@pytest.mark.parametrize(
    ("channels", "form"), [(64, ONCE), (128, ONCE), (128, CHAIN), pytest.param(256, CHAIN, marks=slow)]
)
def test_subsets_of_gradients_are_bitwise_equal(kernels, channels, form):
    given = inputs((1, channels, 10, 17))
    whole = backward(kernels, given, form=form)
    for needs_grad in list(product((False, True), repeat=3))[1:-1]:
        some = backward(kernels, given, form=form, needs_grad=needs_grad)
        for a, b, needed in zip(some, whole, needs_grad, strict=True):
            assert torch.equal(a, b) if needed else a is None


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
    """Covers saturated gates, products near the largest finite value, a zero position, a zero factor, a NaN."""
    given = inputs((2, channels, 2, 3))
    x, proj, *_ = given
    x[0, :, 0] *= 1e4  # only few: such logits matter by their sign, and rounding decides the sign of small sums
    x[1, :, 0, 0] = 0
    proj[3] = 0
    check(kernels, given, mode, form=form)
    x[1, 3, 1, 2] = torch.nan
    first, *others = run(kernels, given, mode, form=form)
    at = first.isnan()
    assert at[1, :, 1, 2].all()
    assert at.sum() == channels
    assert all(gradient.isnan().any() for gradient in others)


@pytest.mark.parametrize("channels", [64, 512])
def test_empty_batch_has_zero_weight_gradients(kernels, channels):
    given = inputs((0, channels, 3, 2))
    dx, *others = backward(kernels, given)
    assert forward(kernels, given).shape == dx.shape == (0, channels, 3, 2)
    assert all((gradient == 0).all() for gradient in others)
