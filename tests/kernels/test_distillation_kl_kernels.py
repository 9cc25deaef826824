"""Compares the Triton kernels of distillation_kl with the float64 reference."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse, assert_close, extreme, unit_roundoff, value_and_gradients

from ..ops.table import DTYPES, logits

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
REVERSE = {"direction": "reverse"}
# The cases cover each shape in both directions, and each dtype, pair of dtypes, layout and reduction at least once.
CASES = {
    "plain": ((4, 8), {}, {"temperature": 3.0}),
    "plain, reverse": ((4, 8), {"dtype": BFLOAT16}, {**REVERSE, "reduction": "none", "temperature": 3.0}),
    "odd": ((5, 33), {"dtype": FLOAT16}, {"reduction": "none"}),
    "odd, reverse": ((5, 33), {"layout": "strided"}, {**REVERSE, "reduction": "mean", "squared": False}),
    "one class": ((3, 1), {"dtype": FLOAT16}, {"temperature": 3.0}),
    "one class, reverse": ((3, 1), {}, {**REVERSE, "reduction": "none"}),
    "one row": ((1, 200), {"dtype": BFLOAT16}, {"temperature": 3.0}),
    "one row, reverse": ((1, 200), {"dtype": FLOAT16}, {**REVERSE, "temperature": 0.5}),
    "one logit": ((1, 1), {"dtype": BFLOAT16}, {"reduction": "sum"}),
    "one logit, reverse": ((1, 1), {}, {**REVERSE, "reduction": "mean"}),
    "more rows than a tile": ((70, 20), {"dtype": BFLOAT16}, {"temperature": 3.0}),
    "more rows than a tile, reverse": ((70, 20), {"dtype": FLOAT16}, {**REVERSE, "reduction": "none"}),
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
def test_matches_float64_reference(kernel_device, case):
    shape, drawn, options = CASES[case]
    # A scalar loss is one value per draw: with few draws, the reference's error can be small by chance.
    draws = 2 if math.prod(shape) > 10_000 else 3 if options.get("reduction") == "none" else 16
    inputs = logits(shape, **drawn, device=kernel_device)
    assert_backend_no_worse(partial(ops.distillation_kl, **options), inputs, draws=draws)


def test_accepts_grad_output_with_zero_strides(kernel_device):
    """The backward of ``sum`` passes an expanded scalar."""
    op = lambda *inputs, backend: ops.distillation_kl(*inputs, reduction="none", backend=backend).sum()  # noqa: E731
    assert_backend_no_worse(op, logits((4, 9), device=kernel_device), draws=16)


@pytest.mark.parametrize(
    ("dtype", "direction"), [(FLOAT32, "forward"), (BFLOAT16, "reverse"), (FLOAT16, "forward"), (FLOAT16, "reverse")]
)
def test_extreme_logits(kernel_device, dtype, direction):
    inputs = [extreme(12, 9, dtype=dtype), extreme(12, 9, dtype=dtype, seed=1).roll(1, 0)]
    inputs = [t.to(kernel_device) for t in inputs]
    op = partial(ops.distillation_kl, direction=direction, reduction="sum")
    (value,), gradients = value_and_gradients(partial(op, backend="triton"), inputs)
    (expected,), expected_gradients = value_and_gradients(partial(op, backend="reference"), inputs)
    (exact,), exact_gradients = value_and_gradients(partial(op, backend="reference"), [t.double() for t in inputs])
    assert value.isfinite() == expected.isfinite()
    if value.isfinite():
        assert_close(value, exact, atol=2 * abs(float(expected - exact)), rtol=4 * unit_roundoff(torch.float32))
    for got, plain, truth in zip(gradients, expected_gradients, exact_gradients, strict=True):
        assert torch.equal(got.isnan(), plain.isnan())
        atol = 2 * float((plain.double() - truth).abs().max()) + torch.finfo(dtype).eps * float(truth.abs().max())
        assert_close(got, truth, atol=atol)


@pytest.mark.gpu
@pytest.mark.large_memory
def test_more_than_two_to_the_31_elements():
    shape = (2**21 + 3, 1_025)
    inputs = [torch.empty(shape, dtype=torch.float16, device="cuda").normal_().requires_grad_() for _ in range(2)]
    assert inputs[0].numel() > 2**31
    op = partial(ops.distillation_kl, reduction="sum")
    loss = op(*inputs, backend="triton")
    gradients = torch.autograd.grad(loss, inputs)
    pieces = [slice(start, start + 2**17) for start in range(0, shape[0], 2**17)]
    with torch.no_grad():
        sums = [op(*(t[piece] for t in inputs), backend="reference") for piece in pieces]
    assert_close(loss.cpu(), torch.stack(sums).double().sum().cpu(), atol=0, rtol=1e-5)
    for piece in (slice(0, 8), slice(2**20, 2**20 + 8), slice(2**21 - 5, 2**21 + 3)):
        exact = [t.detach()[piece].double().requires_grad_() for t in inputs]
        for got, expected in zip(gradients, torch.autograd.grad(op(*exact, backend="reference"), exact), strict=True):
            assert_close(got[piece], expected, atol=torch.finfo(torch.float16).eps * float(expected.abs().max()))
