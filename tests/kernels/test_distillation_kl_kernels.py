"""The Triton kernels of distillation_kl against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse, assert_close, extreme, unit_roundoff, value_and_gradients

from ..ops.table import DTYPES, logits

SINGLE, BRAIN, HALF = DTYPES
DIRECTIONS = ("forward", "reverse")


def fused(**options):
    """The op with options, its backend left open."""
    return lambda *inputs, backend="triton": ops.distillation_kl(*inputs, **options, backend=backend)


def draws(options):
    """A sum is one number a draw: of few draws, the reference's error can be small by luck in all."""
    return 3 if options.get("reduction") == "none" else 16


# Each shape in both directions, and each dtype, pair of dtypes, layout and reduction at least once.
REVERSE = {"direction": "reverse"}
CASES = {
    "plain": ((4, 8), {}, {"temperature": 3.0}),
    "plain, reverse": ((4, 8), {"dtype": BRAIN}, {**REVERSE, "reduction": "none", "temperature": 3.0}),
    "odd": ((5, 33), {"dtype": HALF}, {"reduction": "none"}),
    "odd, reverse": ((5, 33), {"layout": "strided"}, {**REVERSE, "reduction": "mean", "squared": False}),
    "one class": ((3, 1), {"dtype": HALF}, {"temperature": 3.0}),
    "one class, reverse": ((3, 1), {}, {**REVERSE, "reduction": "none"}),
    "one row": ((1, 200), {"dtype": BRAIN}, {"temperature": 3.0}),
    "one row, reverse": ((1, 200), {"dtype": HALF}, {**REVERSE, "temperature": 0.5}),
    "one logit": ((1, 1), {"dtype": BRAIN}, {"reduction": "sum"}),
    "one logit, reverse": ((1, 1), {}, {**REVERSE, "reduction": "mean"}),
    "more rows than a tile": ((70, 20), {"dtype": BRAIN}, {"temperature": 3.0}),
    "more rows than a tile, reverse": ((70, 20), {"dtype": HALF}, {**REVERSE, "reduction": "none"}),
    "strided": ((5, 33), {"layout": "strided"}, {"reduction": "sum", "temperature": 0.5, "squared": False}),
    "transposed": ((5, 33), {"layout": "transposed"}, {"reduction": "mean", "temperature": 0.5}),
    "transposed, reverse": ((5, 33), {"layout": "transposed"}, {**REVERSE, "reduction": "sum"}),
    "offset": ((5, 33), {"layout": "offset"}, {"reduction": "sum", "temperature": 0.5}),
    "offset, reverse": ((5, 33), {"layout": "offset"}, {**REVERSE, "reduction": "mean"}),
    **{f"{a} and {b}": ((4, 9), {"dtype": a, "other": b}, {}) for a in DTYPES for b in DTYPES if a != b},
    "rows longer than a tile": ((3, 4_500), {}, {}),
    "elements of rows longer than a tile": ((3, 4_500), {}, {"reduction": "none"}),
    "rows over several programs": ((70, 500), {}, {"temperature": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(kernel_device, case):
    shape, drawn, options = CASES[case]
    inputs = logits(shape, **drawn, device=kernel_device)
    assert_backend_no_worse(fused(**options), inputs, draws=2 if math.prod(shape) > 10_000 else draws(options))


def test_an_upstream_gradient_of_one_number_for_all(kernel_device):
    """What ``sum`` hands back has strides of zero."""
    op = lambda *inputs, backend: fused(reduction="none")(*inputs, backend=backend).sum()  # noqa: E731
    assert_backend_no_worse(op, logits((4, 9), device=kernel_device), draws=16)


@pytest.mark.parametrize(
    ("dtype", "direction"), [(SINGLE, "forward"), (BRAIN, "reverse"), (HALF, "forward"), (HALF, "reverse")]
)
def test_extreme_logits(kernel_device, dtype, direction):
    inputs = [extreme(12, 9, dtype=dtype), extreme(12, 9, dtype=dtype, seed=1).roll(1, 0)]
    inputs = [t.to(kernel_device) for t in inputs]
    op = fused(direction=direction, reduction="sum")
    (mine,), gradients = value_and_gradients(op, inputs)
    (expected_value,), expected = value_and_gradients(lambda *a: op(*a, backend="reference"), inputs)
    (truth,), true = value_and_gradients(lambda *a: op(*a, backend="reference"), [t.double() for t in inputs])
    assert mine.isfinite() == expected_value.isfinite()
    if mine.isfinite():
        assert_close(mine, truth, atol=2 * abs(float(expected_value - truth)), rtol=4 * unit_roundoff(torch.float32))
    for got, plain, exact in zip(gradients, expected, true, strict=True):
        assert torch.equal(got.isnan(), plain.isnan())
        size = float(exact.abs().max())
        allowed = 2 * float((plain.double() - exact).abs().max()) + torch.finfo(dtype).eps * size
        assert_close(got, exact, atol=allowed)


def on_gpu(n, classes, dtype=torch.float32):
    """Drawn on the GPU too: for the largest logits the host would take minutes."""

    def make(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return [(2 * torch.randn(n, classes, device="cuda", generator=generator)).to(dtype) for _ in range(2)]

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 200), (64, 1000), (4096, 1000), (4096, 32_000)])
def test_the_papers_logits(shape, dtype, direction):
    draws = 4 if math.prod(shape) > 2**20 else 16
    assert_backend_no_worse(fused(temperature=4.0, direction=direction), on_gpu(*shape, dtype), draws=draws)


@pytest.mark.gpu
@pytest.mark.large_memory
def test_more_logits_than_32_bits_count():
    shape = (2**21 + 3, 1_025)
    inputs = [torch.empty(shape, dtype=torch.float16, device="cuda").normal_().requires_grad_() for _ in range(2)]
    assert inputs[0].numel() > 2**31
    loss = fused(reduction="sum")(*inputs)
    gradients = torch.autograd.grad(loss, inputs)
    pieces = [slice(start, start + 2**17) for start in range(0, shape[0], 2**17)]
    with torch.no_grad():
        sums = [fused(reduction="sum")(*(t[piece] for t in inputs), backend="reference") for piece in pieces]
    assert_close(loss.cpu(), torch.stack(sums).double().sum().cpu(), atol=0, rtol=1e-5)
    for piece in (slice(0, 8), slice(2**20, 2**20 + 8), slice(2**21 - 5, 2**21 + 3)):
        true = [t.detach()[piece].double().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(fused(reduction="sum")(*true, backend="reference"), true)
        for got, expected_value in zip(gradients, expected, strict=True):
            assert_close(
                got[piece], expected_value, atol=torch.finfo(torch.float16).eps * float(expected_value.abs().max())
            )
