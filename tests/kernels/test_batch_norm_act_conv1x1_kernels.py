"""Compares the Triton kernels of batch_norm_act_conv1x1, and the gate that follows, with the float64 reference."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from dfkd_fast.testing import LAYOUTS, assert_backend_no_worse, assert_close, random, with_layout

from ..ops.table import DTYPES, call_conv1x1, conv1x1, conv1x1_tiles

# Shape, hidden channels and tiling: several tiles per program; channels that do not fill a block; the largest tile; one
# output channel; two positions.
CASES = {
    "several tiles": ((9, 24, 7, 5), 3, conv1x1_tiles),
    "odd channels": ((3, 29, 5, 7), 5, conv1x1_tiles),
    "one block": ((5, 70, 5, 3), 8, nullcontext),
    "most channels": ((3, 256, 5, 3), 32, nullcontext),
    "one hidden channel": ((4, 20, 6, 4), 1, nullcontext),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[pytest.mark.slow] if case == "most channels" and dtype != DTYPES[0] else [])
        for case in CASES
        for dtype in DTYPES
    ],
)
def test_matches_float64_reference(kernel_device, case, dtype):
    shape, hidden, tiling = CASES[case]
    inputs = conv1x1(shape, hidden=hidden, dtype=dtype, device=kernel_device)
    with tiling():
        assert_backend_no_worse(call_conv1x1, inputs)


@pytest.mark.parametrize("form", ["spatial_mean1", "channel"])
@pytest.mark.parametrize("affine", [True, False])
def test_matches_float64_reference_in_every_form(kernel_device, form, affine):
    inputs = conv1x1((4, 24, 5, 7), affine=affine, dtype=torch.bfloat16, device=kernel_device)
    assert_backend_no_worse(partial(call_conv1x1, form=form), inputs)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_grad_output_in_any_layout(kernel_device, layout):
    inputs = conv1x1((3, 8, 4, 2), device=kernel_device)(0)
    grad_output = [random(3, channels, 4, 2, seed=9, device=kernel_device) for channels in (3, 8)]
    laid = [g[:, :, :1, :1].expand_as(g) if layout == "expanded" else with_layout(g, layout) for g in grad_output]
    found, expected = (
        torch.autograd.grad(call_conv1x1(*inputs, backend=backend), [t for t in inputs if t.requires_grad], gradients)
        for backend, gradients in (("triton", laid), ("reference", [g.clone() for g in laid]))
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=2e-5, rtol=1e-5)
