"""statistics_distance against plain norms in float64, and its kernels against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.ops.custom_op import recorded
from dfkd_fast.testing import (
    LAYOUTS,
    MAP_SHAPES,
    assert_backend_no_worse,
    assert_close,
    assert_compiles,
    random,
    unit_roundoff,
    value_and_gradients,
    with_layout,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}


def definition(x, running_mean, running_var):
    """Channel by channel."""
    means, spreads = 0.0, 0.0
    for c in range(x.shape[1]):
        v = x[:, c].double()
        mean = v.sum() / v.numel() if v.numel() else v.sum() * math.nan
        var = ((v - mean) ** 2).sum() / max(v.numel(), 1)
        means = means + (mean - running_mean[c].double()) ** 2
        spreads = spreads + (var - running_var[c].double()) ** 2
    return torch.sqrt(means) + torch.sqrt(spreads)


def inputs_of(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    layout: Any = "contiguous",
    device: str = "cpu",
):
    """Makes of a seed x, running mean and variance."""

    def make(seed: int) -> list[Any]:
        c, other = shape[1], {"dtype": stored or dtype, "device": device}
        x = {"dtype": dtype, "device": device, "layout": layout, "requires_grad": True}
        return [
            random(*shape, seed=seed + 1, scale=3.0, shift=1.0, **x),
            random(c, seed=seed + 2, **other),
            random(c, seed=seed + 3, **other).square() + 0.1,
        ]

    return make


def exactly(shape=(3, 5, 4, 2), layout="contiguous"):
    return inputs_of(shape, dtype=torch.float64, layout=layout)(0)


def gradient(value, x):
    return torch.autograd.grad(value, x)[0]


def fused(*inputs, backend="triton"):
    return ops.statistics_distance(*inputs, backend=backend)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradient_follow_the_formula(shape):
    inputs = exactly(shape)
    (value,), (dx, dmean, dvar) = value_and_gradients(ops.statistics_distance, inputs)
    (wanted,), (wanted_dx, *_) = value_and_gradients(definition, inputs)
    assert_close(value, wanted, atol=1e-12, rtol=1e-12)
    assert dmean is dvar is None
    if shape[0]:
        assert_close(dx, wanted_dx, atol=1e-12, rtol=1e-12)


def test_gradcheck_once_and_twice():
    x, mean, var = exactly((2, 3, 2, 2))
    op = lambda x: ops.statistics_distance(x, mean, var)  # noqa: E731
    assert gradcheck(op, (x,))
    assert gradgradcheck(op, (x,))


def test_gradient_by_the_derived_formula():
    """The backward that a fused kernel computes: element-wise, without a reduction."""
    x, running_mean, running_var = exactly()
    _, (dx, *_) = value_and_gradients(ops.statistics_distance, (x, running_mean, running_var))
    upstream = random(dtype=x.dtype, seed=1, shift=0.5)
    mean, var = ops.channel_statistics(x.detach())
    count = x.numel() // 5
    along_mean, along_var = ((a - b) / (a - b).norm() for a, b in ((mean, running_mean), (var, running_var)))
    away = x.detach() - mean[:, None, None]
    wanted = upstream * (along_mean[:, None, None] + 2 * along_var[:, None, None] * away) / count
    assert_close(dx, wanted, atol=1e-13)


def test_it_is_what_hooks_compute_of_the_statistics():
    x, running_mean, running_var = exactly()
    mean, var = ops.channel_statistics(x)
    wanted = (running_var - var).norm() + (running_mean - mean).norm()
    assert torch.equal(ops.statistics_distance(x, running_mean, running_var), wanted)


def test_an_empty_batch_has_no_distance():
    x, mean, var = exactly((0, 5, 3, 2))
    value = ops.statistics_distance(x, mean, var)
    assert value.isnan()
    assert gradient(value, x).shape == (0, 5, 3, 2)


def test_the_running_statistics_are_constants():
    x, mean, var = exactly()
    value = ops.statistics_distance(x, mean.requires_grad_(), var.requires_grad_())
    assert torch.autograd.grad(value, (mean, var), allow_unused=True) == (None, None)
    assert not ops.statistics_distance(x.detach(), mean, var).requires_grad


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_dtypes_may_differ(dtype, stored):
    inputs = inputs_of((4, 6, 5, 3), dtype=dtype, stored=stored)(0)
    (value,), (dx, *_) = value_and_gradients(ops.statistics_distance, inputs)
    (wanted,), (wanted_dx, *_) = value_and_gradients(definition, inputs)
    assert (value.dtype, dx.dtype) == (torch.float64 if dtype == torch.float64 else torch.float32, dtype)
    assert_close(value, wanted, atol=0.0, rtol=16 * unit_roundoff(value.dtype))
    assert_close(dx, wanted_dx, atol=16 * unit_roundoff(value.dtype), rtol=2 * unit_roundoff(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_changes_nothing(layout):
    inputs = exactly((2, 7, 5, 3))
    laid = [with_layout(inputs[0], layout).requires_grad_(), *inputs[1:]]
    (value,), (dx, *_) = value_and_gradients(ops.statistics_distance, laid)
    (wanted,), (wanted_dx, *_) = value_and_gradients(ops.statistics_distance, inputs)
    assert_close(value, wanted, atol=1e-12)
    assert_close(dx, wanted_dx, atol=1e-13)


def test_compiles_without_graph_breaks():
    calls = [inputs_of(shape, layout="channels_last")(0) for shape in ((2, 8, 4, 4), (3, 8, 5, 2), (5, 8, 6, 6))]
    assert_compiles(ops.statistics_distance, calls, atol=1e-5, rtol=1e-5)


def test_function_transforms():
    x, mean, var = (t.detach() for t in exactly())
    leaf = x.clone().requires_grad_()
    wanted = gradient(ops.statistics_distance(leaf, mean, var), leaf)
    assert_close(torch.func.grad(ops.statistics_distance)(x, mean, var), wanted, atol=1e-14)
    both = torch.func.vmap(ops.statistics_distance, in_dims=(0, None, None))(torch.stack([x, 2 * x]), mean, var)
    assert_close(both[1], ops.statistics_distance(2 * x, mean, var), atol=1e-12)


def test_arguments_are_checked():
    x, mean, var = exactly()
    op = ops.statistics_distance
    with pytest.raises(TypeError, match="x must be a tensor, got str"):
        op("x", mean, var)
    with pytest.raises(TypeError, match=r"running_mean must be of dtype .*, got torch.int64"):
        op(x, mean.long(), var)
    with pytest.raises(TypeError, match="running_var must be a tensor, got NoneType"):
        op(x, mean, None)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, ...\), got \(5,\)"):
        op(mean, mean, var)
    with pytest.raises(ValueError, match=r"running_var must have shape \(C\) with C = 5, got \(4,\)"):
        op(x, mean, var[:4])
    with pytest.raises(ValueError, match=r"running_mean must have shape \(C\) with C = 5, got \(5, 1\)"):
        op(x, mean[:, None], var)
    with pytest.raises(ValueError, match="running_var must be on the device of x, cpu, got meta"):
        op(x, mean, var.to("meta"))
    with pytest.raises(ValueError, match="backend must be"):
        op(x, mean, var, backend="cudnn")
    with pytest.raises(RuntimeError, match="has no implementation of statistics_distance; it has reference"):
        op(x, mean, var, backend="cuda")


# --- the kernels, and what is asked of every backend


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_that_agree_are_no_distance(kernel_device, backend, layout):
    x = random(3, 7, 5, 3, scale=3.0, layout=layout, device=kernel_device).requires_grad_()
    mean, var = (t.detach() for t in ops.channel_statistics(x, backend=backend))
    value = fused(x, mean, var, backend=backend)
    assert value == 0
    assert not gradient(value, x).any()
    # Where one norm is zero, the other has its gradient.
    value = fused(x, mean + 1, var, backend=backend)
    assert_close(value, math.sqrt(7), atol=1e-5)
    assert_close(gradient(value, x), -1 / math.sqrt(7) / 45, atol=1e-7)
    dx = gradient(fused(x, mean, var - 1, backend=backend), x)
    assert_close(dx, 2 / math.sqrt(7) / 45 * (x - mean[:, None, None]), atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (2, 3, 4, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_kernels_lies_as_the_map(kernel_device, dtype, shape):
    for layout, memory in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        inputs = inputs_of(shape, dtype=dtype, layout=layout, device=kernel_device)(0)
        dx = gradient(fused(*inputs), inputs[0])
        assert dx.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_are_no_worse_than_the_reference(kernel_device, shape, dtype):
    # The value is one number a draw, and of few the reference's error can be small by luck in all.
    assert_backend_no_worse(fused, inputs_of(shape, dtype=dtype, device=kernel_device), draws=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_on_memory_layouts(kernel_device, layout, dtype):
    made = inputs_of((3, 13, 5, 3), dtype=dtype, layout=layout, device=kernel_device)
    assert_backend_no_worse(fused, made, draws=8)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [(40, 24, 7, 5), (1, 70, 50, 3), (5, 8, 24, 24)])
def test_kernels_over_many_tiles(kernel_device, shape, layout):
    made = inputs_of(shape, dtype=torch.bfloat16, layout=layout, device=kernel_device)
    assert_backend_no_worse(fused, made, draws=4)


@pytest.fixture(params=["whole", "in blocks"])
def tiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """All channels in one tile, or only 32 at a time: thousands of them take the interpreter too long."""
    if request.param == "whole":
        yield
        return
    config = pytest.importorskip("dfkd_fast.kernels.config")
    with config.forced("statistics_distance", config.Launch(tile={"BLOCK": 32}, num_warps=1)):
        yield


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("channels", [31, 33, 100])
def test_kernels_take_any_number_of_channels(kernel_device, channels):
    assert_backend_no_worse(fused, inputs_of((2, channels, 3), device=kernel_device), draws=16)


@pytest.mark.parametrize("channels", [1_000, 4_500])
def test_kernels_take_many_channels(kernel_device, channels):
    assert_backend_no_worse(fused, inputs_of((6, channels), device=kernel_device), draws=4)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernels_take_stored_statistics_of_any_dtype_and_stride(kernel_device, stored):
    made = inputs_of((3, 9, 4, 2), dtype=torch.bfloat16, stored=stored, device=kernel_device)
    apart = lambda seed: [made(seed)[0], *(with_layout(t, "strided") for t in made(seed)[1:])]  # noqa: E731
    for each in (made, apart):
        assert_backend_no_worse(fused, each, draws=16)


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
    wanted = (-mean.double() / mean.double().norm() / 2)[:, None].expand(channels, 2)
    assert_close(gradient(value, x)[0], wanted, atol=0.0, rtol=8 * unit_roundoff(torch.float32))


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kernels_give_no_number_where_the_reference_gives_none(kernel_device, bad):
    for place in (1, 2):
        inputs = inputs_of((3, 40, 2), device=kernel_device)(0)
        inputs[place][38] = bad
        (value,), (dx, *_) = value_and_gradients(fused, inputs)
        (wanted,), (wanted_dx, *_) = value_and_gradients(lambda *a: fused(*a, backend="reference"), inputs)
        assert_close(value, wanted, atol=0.0)
        assert_close(dx, wanted_dx, atol=1e-6)


def test_kernels_scale_by_the_upstream_gradient(kernel_device):
    x, mean, var = inputs_of((3, 9, 4, 2), device=kernel_device)(0)
    once = gradient(fused(x, mean, var), x)
    for factor in (0.0, -4.0, 2.0**20):
        assert torch.equal(gradient(fused(x, mean, var) * factor, x), once * factor)


def test_two_runs_give_the_same_bits(kernel_device):
    made = inputs_of((9, 24, 7, 5), dtype=torch.float16, layout="channels_last", device=kernel_device)(0)
    first, second = (value_and_gradients(fused, made) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


def test_a_named_backend_says_why_it_cannot_serve(kernel_device):
    made = inputs_of((2, 3, 2, 2), dtype=torch.float64, device=kernel_device)(0)
    with pytest.raises(RuntimeError, match=r"cannot serve statistics_distance: its kernels take .*, not float64"):
        fused(*made)


def test_second_derivative_is_an_error(kernel_device):
    x, mean, var = inputs_of((2, 3, 2, 2), device=kernel_device)(0)
    dx = torch.autograd.grad(fused(x, mean, var), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="statistics_distance: fused backends have no second derivative"):
        dx.square().sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_operators_are_registered_soundly(kernel_device, layout):
    made = inputs_of((2, 9, 3, 2), stored=torch.bfloat16, layout=layout, device=kernel_device)(0)
    x, mean, var = (t.detach() for t in made)
    library = torch.ops.dfkd_fast
    torch.library.opcheck(library.statistics_distance.default, (x, mean, var))
    value, saved = library.statistics_distance(x, mean, var)
    assert saved.shape == (3, 9)
    torch.library.opcheck(library.statistics_distance_backward.default, (value, x, saved, [True]))


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", True)])
def test_kernels_compile_without_graph_breaks(kernel_device, compiler, dynamic):
    shapes = ((2, 8, 4, 4), (3, 8, 5, 2), (5, 8, 6, 6))
    calls = [inputs_of(shape, layout="channels_last", device=kernel_device)(0) for shape in shapes]
    op = lambda x, mean, var: fused(2 * x, mean, var)  # noqa: E731
    assert_compiles(op, calls, backend=compiler, dynamic=dynamic, atol=1e-5, rtol=1e-5)


def test_kernels_under_function_transforms(kernel_device):
    x, mean, var = (t.detach() for t in inputs_of((2, 5, 3, 2), device=kernel_device)(0))
    wanted = torch.func.grad(lambda x: fused(x, mean, var, backend="reference"))(x)
    assert_close(torch.func.grad(fused)(x, mean, var), wanted, atol=1e-6)
    stacked = torch.stack([x, 2 * x])
    each = torch.func.vmap(torch.func.grad(fused), in_dims=(0, None, None))(stacked, mean, var)
    for i in range(2):
        assert_close(each[i], torch.func.grad(fused)(stacked[i], mean, var), atol=1e-6)


def test_autocast_changes_nothing(kernel_device, backend):
    made = inputs_of((2, 5, 3, 2), device=kernel_device)(0)
    wanted = fused(*made, backend=backend)
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        assert torch.equal(fused(*made, backend=backend), wanted)


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


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_dtype_and_layout(kernel_device, data):
    rank = data.draw(st.integers(2, 5))
    shape = (data.draw(st.integers(0, 9)), data.draw(st.integers(1, 70)))
    shape += tuple(data.draw(st.integers(1, 9)) for _ in range(rank - 2))
    layouts = [name for name in LAYOUTS if rank == 4 or name != "channels_last"]
    made = inputs_of(
        shape,
        dtype=data.draw(st.sampled_from(DTYPES)),
        stored=data.draw(st.sampled_from((*DTYPES, torch.float64))),
        # Of an empty batch the reference keeps whatever strides x has.
        layout=data.draw(st.sampled_from(layouts if shape[0] else ["contiguous"])),
        device=kernel_device,
    )
    assert_backend_no_worse(fused, made, draws=16)


# --- on a card alone


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 64, 112, 112), (64, 512, 7, 7), (256, 32, 32, 32), (256, 128, 8, 8)])
def test_on_the_maps_of_networks(shape, dtype):
    made = inputs_of(shape, dtype=dtype, stored=torch.float32, layout="channels_last", device="cuda")
    assert_backend_no_worse(fused, made, draws=8)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs():
    x, mean, var = inputs_of((8, 64, 14, 14), layout="channels_last", device="cuda")(0)

    def step():
        value = fused(x, mean, var)
        return value, gradient(value, x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(1, 4):
        with torch.no_grad():
            for tensor, new in zip((x, mean, var), inputs_of((8, 64, 14, 14), device="cuda")(10 * seed), strict=True):
                tensor.copy_(new)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_memory_is_that_of_a_few_numbers_a_channel():
    x, mean, var = inputs_of((64, 64, 112, 112), dtype=torch.bfloat16, layout="channels_last", device="cuda")(0)
    gradient(fused(x, mean, var), x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = fused(x, mean, var)
    assert torch.cuda.max_memory_allocated() - before <= 2**21
    gradient(value, x)
    assert torch.cuda.max_memory_allocated() - before <= x.numel() * x.element_size() + 2**21
