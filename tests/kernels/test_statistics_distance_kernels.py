"""Compares the Triton kernels of statistics_distance with the float64 reference."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.ops.custom_op import record_op_launches
from dfkd_fast.testing import (
    LAYOUTS,
    MAP_SHAPES,
    assert_backend_no_worse,
    assert_close,
    random,
    unit_roundoff,
    value_and_gradients,
    with_layout,
)

from ..ops.table import DTYPES, call_distances, distance_tiles, layers, stored

SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}
# Shape, draws, arguments of `stored`, and a tiling. Each shape and each layout has one dtype.
# The distance is one value per draw: with few draws, the reference's error can be small by chance.
CASES = {
    **{name: (shape, 8, {"dtype": DTYPES[i % 3]}, nullcontext) for i, (name, shape) in enumerate(SHAPES.items())},
    **{
        layout: ((3, 13, 5, 3), 8, {"dtype": DTYPES[(i + 1) % 3], "layout": layout}, nullcontext)
        for i, layout in enumerate(LAYOUTS)
    },
    "many tiles": ((40, 24, 7, 5), 4, {"dtype": torch.bfloat16, "layout": "channels_last"}, nullcontext),
    "many tiles, contiguous": ((5, 8, 24, 24), 4, {"dtype": torch.bfloat16}, nullcontext),
    "odd channels": ((1, 70, 50, 3), 4, {"dtype": torch.bfloat16, "layout": "channels_last"}, nullcontext),
    "odd channels, contiguous": ((1, 70, 50, 3), 4, {"dtype": torch.bfloat16}, nullcontext),
    "33 channels": ((2, 33, 3), 8, {}, nullcontext),
    "31 channels in blocks": ((2, 31, 3), 8, {}, distance_tiles),
    "100 channels in blocks": ((2, 100, 3), 8, {}, distance_tiles),
    "1,000 channels": ((6, 1_000), 4, {}, nullcontext),
    "4,500 channels": ((6, 4_500), 2, {}, nullcontext),
}
fused = partial(ops.statistics_distance, backend="triton")


@pytest.fixture(params=["whole", "in blocks"])
def tiled(request):
    """Selects tiles of all channels, or of 32 channels."""
    with distance_tiles() if request.param == "in blocks" else nullcontext():
        yield


@pytest.mark.parametrize("case", CASES)
def test_matches_float64_reference(kernel_device, case):
    shape, draws, drawn, tiling = CASES[case]
    with tiling():
        assert_backend_no_worse(ops.statistics_distance, stored(shape, device=kernel_device, **drawn), draws=draws)


@pytest.mark.parametrize("other", [*DTYPES, torch.float64])
def test_stored_statistics_of_any_dtype_with_strides(kernel_device, other):
    make = stored((3, 9, 4, 2), dtype=torch.bfloat16, other=other, device=kernel_device)
    strided = lambda seed: [make(seed)[0], *(with_layout(t, "strided") for t in make(seed)[1:])]  # noqa: E731
    assert_backend_no_worse(ops.statistics_distance, strided, draws=16)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("widths", [(64,), (33, 1, 100, 64), (8,) * 130], ids=len)
def test_layers_match_float64_reference(kernel_device, widths):
    """With more than 64 layers, there are several launches."""
    draws = 2 if len(widths) > 64 else 8
    assert_backend_no_worse(call_distances, layers((1, *widths), device=kernel_device), draws=draws)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("size", [1e37, 1e30, 1e-6, 1e-30, 1e-37])
def test_squared_differences_do_not_overflow_or_underflow(kernel_device, size):
    channels = 70
    x = torch.zeros(1, channels, 2, device=kernel_device, requires_grad=True)
    mean = random(channels, scale=size, seed=1, device=kernel_device)
    var = random(channels, scale=size, seed=2, device=kernel_device)
    value = fused(x, mean, var)
    assert_close(value, mean.double().norm() + var.double().norm(), atol=0.0, rtol=8 * unit_roundoff(torch.float32))
    expected = (-mean.double() / mean.double().norm() / 2)[:, None].expand(channels, 2)
    (dx,) = torch.autograd.grad(value, x)
    assert_close(dx[0], expected, atol=0.0, rtol=8 * unit_roundoff(torch.float32))


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_statistics_match_reference(kernel_device, bad):
    for argument in (1, 2):
        inputs = stored((3, 40, 2), device=kernel_device)(0)
        inputs[argument][38] = bad
        (value,), (dx, *_) = value_and_gradients(fused, inputs)
        (expected,), (expected_dx, *_) = value_and_gradients(partial(fused, backend="reference"), inputs)
        assert_close(value, expected, atol=0.0)
        assert_close(dx, expected_dx, atol=1e-6)


def test_gradients_scale_with_grad_output(kernel_device):
    x, mean, var = stored((3, 9, 4, 2), device=kernel_device)(0)
    (once,) = torch.autograd.grad(fused(x, mean, var), x)
    for factor in (0.0, -4.0, 2.0**20):
        assert torch.equal(*torch.autograd.grad(fused(x, mean, var) * factor, x), once * factor)


@pytest.mark.parametrize(
    ("shape", "statistics"),
    [
        ((2, 32, 4, 4), ["_forward_kernel"]),
        ((64, 64, 112, 112), ["_forward_kernel", "_merge_kernel"]),
        ((2, 5_000), ["_forward_kernel"]),
    ],
)
def test_number_of_launches(shape, statistics):
    """Forward makes one launch more than the statistics. Backward makes one launch."""
    pytest.importorskip("triton")
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    x = (x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()
    with record_op_launches(90) as launches:
        value = fused(x, *torch.empty(2, shape[1], device="meta"))
        torch.autograd.grad(value, x, torch.empty_like(value))
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == [*statistics, "_distance_kernel", "_backward_kernel"]


def test_layers_share_launches():
    """One launch per 64 layers in forward, and one product in backward."""
    pytest.importorskip("triton")
    inputs = [t.to("meta").detach().requires_grad_(t.requires_grad) for t in layers((1, *[8] * 65))(1)]
    with record_op_launches(90) as launches:
        value = call_distances(*inputs, backend="triton")
        torch.autograd.grad(value, inputs[0], torch.empty_like(value))
    assert [launch.kernel.fn.__name__ for launch in launches] == ["_distance_kernel"] * 2
