"""The Triton kernels of statistics_distance against the reference in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.ops.custom_op import recorded
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

from ..ops.table import DTYPES, distance_tiles, stored

SINGLE, BRAIN, HALF = DTYPES
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}
# Shape, draws, and how inputs are drawn: each shape and layout, each with one dtype; many tiles; many channels; stored
# statistics of other dtypes. The value is one number a draw: of few, the reference's error can be small by luck in all.
CASES = {
    **{name: (shape, 8, {"dtype": DTYPES[i % 3]}) for i, (name, shape) in enumerate(SHAPES.items())},
    **{
        layout: ((3, 13, 5, 3), 8, {"dtype": DTYPES[(i + 1) % 3], "layout": layout}) for i, layout in enumerate(LAYOUTS)
    },
    "many tiles": ((40, 24, 7, 5), 4, {"dtype": BRAIN, "layout": "channels_last"}),
    "many tiles, contiguous": ((5, 8, 24, 24), 4, {"dtype": BRAIN}),
    "odd channels": ((1, 70, 50, 3), 4, {"dtype": BRAIN, "layout": "channels_last"}),
    "odd channels, contiguous": ((1, 70, 50, 3), 4, {"dtype": BRAIN}),
    "1,000 channels": ((6, 1_000), 4, {}),
    "4,500 channels": ((6, 4_500), 2, {}),
    **{f"statistics in {dtype}": ((3, 9, 4, 2), 16, {"dtype": BRAIN, "other": dtype}) for dtype in (SINGLE, HALF)},
}


def fused(*inputs, backend="triton"):
    return ops.statistics_distance(*inputs, backend=backend)


def gradient(value, x):
    return torch.autograd.grad(value, x)[0]


@pytest.fixture(params=["whole", "in blocks"])
def tiled(request):
    """All channels in one tile, or 32 at a time."""
    with distance_tiles() if request.param == "in blocks" else nullcontext():
        yield


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(kernel_device, case):
    shape, draws, drawn = CASES[case]
    assert_backend_no_worse(fused, stored(shape, device=kernel_device, **drawn), draws=draws)


@pytest.mark.parametrize(("channels", "tiling"), [(33, nullcontext), (31, distance_tiles), (100, distance_tiles)])
def test_any_number_of_channels(kernel_device, channels, tiling):
    with tiling():
        assert_backend_no_worse(fused, stored((2, channels, 3), device=kernel_device), draws=8)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_stored_statistics_with_strides(kernel_device, other):
    made = stored((3, 9, 4, 2), dtype=BRAIN, other=other, device=kernel_device)
    apart = lambda seed: [made(seed)[0], *(with_layout(t, "strided") for t in made(seed)[1:])]  # noqa: E731
    assert_backend_no_worse(fused, apart, draws=16)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("size", [1e37, 1e30, 1e-6, 1e-30, 1e-37])
def test_kernels_lose_nothing_to_the_square_of_a_difference(kernel_device, size):
    """The sum of squares has no place in float32 for either of the first two, nor for the last two."""
    channels = 70
    x = torch.zeros(1, channels, 2, device=kernel_device, requires_grad=True)
    mean = random(channels, scale=size, seed=1, device=kernel_device)
    var = random(channels, scale=size, seed=2, device=kernel_device)
    value = fused(x, mean, var)
    assert_close(value, mean.double().norm() + var.double().norm(), atol=0.0, rtol=8 * unit_roundoff(torch.float32))
    expected = (-mean.double() / mean.double().norm() / 2)[:, None].expand(channels, 2)
    assert_close(gradient(value, x)[0], expected, atol=0.0, rtol=8 * unit_roundoff(torch.float32))


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kernels_give_no_number_where_the_reference_gives_none(kernel_device, bad):
    for place in (1, 2):
        inputs = stored((3, 40, 2), device=kernel_device)(0)
        inputs[place][38] = bad
        (value,), (dx, *_) = value_and_gradients(fused, inputs)
        (expected,), (expected_dx, *_) = value_and_gradients(lambda *a: fused(*a, backend="reference"), inputs)
        assert_close(value, expected, atol=0.0)
        assert_close(dx, expected_dx, atol=1e-6)


def test_kernels_scale_by_the_upstream_gradient(kernel_device):
    x, mean, var = stored((3, 9, 4, 2), device=kernel_device)(0)
    once = gradient(fused(x, mean, var), x)
    for factor in (0.0, -4.0, 2.0**20):
        assert torch.equal(gradient(fused(x, mean, var) * factor, x), once * factor)


@pytest.mark.parametrize(
    ("shape", "forward"),
    [
        ((2, 32, 4, 4), ["_forward_kernel", "_distance_kernel"]),
        ((64, 64, 112, 112), ["_forward_kernel", "_merge_kernel", "_distance_kernel"]),
        ((2, 5_000), ["_forward_kernel", "_distance_kernel"]),
    ],
)
def test_one_launch_is_added_and_one_goes_back(shape, forward):
    pytest.importorskip("triton")
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    x = (x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()
    stored = torch.empty(2, shape[1], device="meta")
    with recorded(90) as launches:
        value = fused(x, *stored)
        found = [launch.kernel.fn.__name__ for launch in launches]
        launches.clear()
        torch.autograd.grad(value, x, torch.empty_like(value))
    assert found == forward
    assert [launch.kernel.fn.__name__ for launch in launches] == ["_backward_kernel"]
