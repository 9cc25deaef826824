"""Triton's kernels of high_order_attention and high_order_attention_map against the reference in float64."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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

MODES = ("joint", "per_order")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PUBLIC = {"features": ops.high_order_attention, "map": ops.high_order_attention_map}
KERNELS = ("high_order_attention", "high_order_attention_backward", "high_order_attention_weights")


def in_tiles(channels: int) -> ExitStack:
    """Inside, programs have tiles of 16 by so many channels: fewer than there are is the form that splits them."""
    from dfkd_fast.kernels.config import Launch, forced

    stack = ExitStack()
    tile = {"BLOCK_M": 16, "BLOCK_C": channels, "BLOCK_K": 16}
    for kernel in KERNELS:
        stack.enter_context(forced(kernel, Launch(tile=tile)))
    return stack


def drawn(shape, *, order=3, hidden=None, dtype=torch.float32, layout="contiguous", device="cpu", scale=1.0):
    """A function of a seed: x and weights of deviation 1.5 / sqrt(fan in)."""
    channels = shape[1]
    hidden = hidden or max(1, channels // 4)
    fixed = {"dtype": dtype, "device": device}

    def draw(seed=0):
        return (
            random(*shape, layout=layout, seed=seed + 1, scale=scale, **fixed),
            random(order * (order + 1) // 2, hidden, channels, seed=seed + 2, scale=1.5 / channels**0.5, **fixed),
            random(order, channels, hidden, seed=seed + 3, scale=1.5 / hidden**0.5, **fixed),
        )

    return draw


def no_worse(name, mode, inputs, draws=2):
    assert_backend_no_worse(lambda *a, backend: PUBLIC[name](*a, mode=mode, backend=backend), inputs, draws=draws)


@pytest.mark.parametrize(("mode", "block"), [("joint", 16), ("per_order", 32), ("joint", 32), ("per_order", 16)])
@pytest.mark.parametrize(
    ("order", "hidden", "dtype", "layout"),
    [
        (1, 5, torch.float32, "contiguous"),
        (2, 17, torch.bfloat16, "channels_last"),
        (3, 5, torch.float16, "strided"),
        (3, 16, torch.bfloat16, "contiguous"),
        (4, 3, torch.float32, "transposed"),
    ],
)
def test_error_is_no_larger_than_the_references(kernel_device, order, hidden, dtype, layout, block, mode):
    """37 positions a sample and 20 channels: several tiles, none of them full."""
    name = "map" if hidden == 16 else "features"
    # Products of four factors vary so much that one element would decide.
    options = {"dtype": dtype, "layout": layout, "device": kernel_device, "scale": 0.5 if order == 4 else 1.0}
    inputs = drawn((2, 20, 3, 7), order=order, hidden=hidden, **options)
    with in_tiles(block):
        no_worse(name, mode, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MAP_SHAPES.values(), ids=MAP_SHAPES)
def test_every_shape(kernel_device, shape, dtype):
    inputs = drawn(shape, dtype=dtype, device=kernel_device)
    # Few elements have an error by luck: it takes many to say how large it is.
    with in_tiles(16):
        no_worse("features", "joint", inputs, draws=16 if math.prod(shape) < 30 else 2)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(kernel_device, layout, name):
    """As chosen by rule, and weights laid out in every way too."""

    def inputs(seed):
        x, *weights = drawn((2, 8, 4, 3), dtype=torch.bfloat16, device=kernel_device)(seed)
        other = "transposed" if layout == "channels_last" else layout
        return with_layout(x, layout), *(with_layout(weight, other) for weight in weights)

    no_worse(name, "joint", inputs)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "expanded"])
def test_gradients_that_come_in_any_layout(kernel_device, layout):
    inputs = [t.requires_grad_() for t in drawn((2, 6, 3, 4), device=kernel_device)()]
    upstream = random(2, 6, 3, 4, device=kernel_device, seed=9)
    upstream = upstream[:1, :1, :1, :1].expand(2, 6, 3, 4) if layout == "expanded" else with_layout(upstream, layout)
    got, want = (
        torch.autograd.grad(ops.high_order_attention(*inputs, backend=backend), inputs, upstream)
        for backend in ("triton", "reference")
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("block", [16, 32])
def test_each_subset_of_gradients(kernel_device, block, wanted):
    with in_tiles(block):
        inputs = drawn((2, 20, 2, 3), dtype=torch.bfloat16, device=kernel_device)()
        function = lambda *a: ops.high_order_attention(*a, backend="triton")  # noqa: E731
        _, want = value_and_gradients(function, inputs)
        some = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
        _, got = value_and_gradients(function, some)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(a, b) if wanted >> i & 1 else a is None


@pytest.mark.parametrize(("channels", "whole"), [(64, True), (512, False)])
def test_nothing_is_computed_that_is_not_wanted(channels, whole):
    x, *weights = (t.to("meta") for t in drawn((2, channels, 4, 4), dtype=torch.bfloat16)())

    def launches(*leaves):
        for t in (x, *weights):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        with recorded(90) as made:
            y = ops.high_order_attention(x, *weights, backend="triton")
            forward = len(made)
            torch.autograd.grad(y, leaves, torch.empty_like(y))
        return {launch.kernel.__name__: launch for launch in made[forward:]}

    features = launches(x)
    assert list(features) == (
        ["_whole_backward_kernel"] if whole else ["_split_hidden_kernel", "_split_gate_kernel", "_split_input_kernel"]
    )
    if whole:
        assert all(features["_whole_backward_kernel"].arguments[name].numel() == 0 for name in ("slopes", "factors"))
    assert "_split_input_kernel" not in launches(*weights)
    only = launches(weights[1])["_weights_kernel"]
    assert not only.constants["WANT_PROJ"]
    assert only.arguments["factors"].numel() == 0


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_features(kernel_device, mode, block):
    """Saturated gates, products near the largest number, a factor of zero, a NaN: as the reference has them."""
    x, proj, out = drawn((2, 20, 2, 3), device=kernel_device)()
    x[0] *= 1e4
    x[1, :, 0, 0] = 0
    proj[3] = 0
    with in_tiles(block):
        function = lambda *a: ops.high_order_attention(*a, mode=mode, backend="triton")  # noqa: E731
        values, gradients = value_and_gradients(function, (x, proj, out))
        wanted, wanted_gradients = value_and_gradients(
            lambda *a: ops.high_order_attention(*a, mode=mode), (x, proj, out)
        )
        for got, want in zip((*values, *gradients), (*wanted, *wanted_gradients), strict=True):
            assert got.isfinite().all()
            assert_close(got, want, atol=1e-4 * float(want.abs().max()))
        x[1, 3, 1, 2] = torch.nan
        at = ops.high_order_attention(x, proj, out, mode=mode, backend="triton").isnan()
    assert at[1, :, 1, 2].all()
    assert at.sum() == 20


def test_two_runs_give_the_same_bits(kernel_device):
    inputs = drawn((2, 20, 3, 5), dtype=torch.bfloat16, device=kernel_device)()
    function = lambda *a: ops.high_order_attention(*a, backend="triton")  # noqa: E731
    for block in (16, 32):
        with in_tiles(block):
            first, second = (value_and_gradients(function, inputs) for _ in range(2))
        for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
            assert torch.equal(a, b)


def test_empty_batch_has_zero_gradients_of_the_weights(kernel_device):
    values, gradients = value_and_gradients(
        lambda *a: ops.high_order_attention(*a, backend="triton"), drawn((0, 5, 3, 2), device=kernel_device)()
    )
    assert values[0].shape == gradients[0].shape == (0, 5, 3, 2)
    assert all((g == 0).all() for g in gradients[1:])


def test_a_second_derivative_says_that_there_is_none(kernel_device):
    inputs = [t.requires_grad_() for t in drawn((1, 4, 2, 2), device=kernel_device)()]
    y = ops.high_order_attention(*inputs, backend="triton").sum()
    (dx,) = torch.autograd.grad(y, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="high_order_attention: fused backends have no second derivative"):
        dx.sum().backward()


def test_what_the_kernels_do_not_serve(kernel_device):
    with pytest.raises(RuntimeError, match="cannot serve high_order_attention: its kernels go up to order 4, not 5"):
        ops.high_order_attention(*drawn((1, 4, 2, 2), order=5, device=kernel_device)(), backend="triton")
    with pytest.raises(RuntimeError, match=r"cannot serve high_order_attention_map: its kernels take .*, not float64"):
        ops.high_order_attention_map(
            *drawn((1, 4, 2, 2), dtype=torch.float64, device=kernel_device)(), backend="triton"
        )


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_operators_pass_opcheck(kernel_device, layout):
    x, proj, out = drawn((2, 5, 2, 3), order=2, layout=layout, device=kernel_device)()
    proj = proj.mT.contiguous().mT
    library = torch.ops.dfkd_fast
    upstream = random(2, 5, 2, 3, layout=layout, device=kernel_device, seed=5)
    for result, mode in (("features", "joint"), ("map", "per_order")):
        torch.library.opcheck(library.high_order_attention.default, (x, proj, out, mode, result))
        arguments = (upstream, x, proj, out, mode, result, [True, result == "map", True])
        torch.library.opcheck(library.high_order_attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("name", "backend", "dynamic"),
    [("features", "aot_eager", True), ("map", "aot_eager", None), ("features", "inductor", None)],
)
def test_compiles_without_graph_breaks(kernel_device, name, backend, dynamic):
    shapes = [(2, 8, 4, 4), (3, 8, 5, 2), (5, 8, 1, 6)][: 2 if backend == "inductor" else 3]
    calls = [drawn(shape, layout="channels_last", device=kernel_device)() for shape in shapes]
    function = lambda *a: PUBLIC[name](*a, backend="triton")  # noqa: E731
    assert_compiles(function, calls, backend=backend, dynamic=dynamic, atol=1e-5, rtol=1e-5)


def test_function_transforms(kernel_device):
    x, proj, out = drawn((2, 4, 2, 2), device=kernel_device)()
    total = lambda w, backend: ops.high_order_attention(x, w, out, backend=backend).square().sum()  # noqa: E731
    got, want = (torch.func.grad(total)(proj, backend) for backend in ("triton", "reference"))
    assert_close(got, want, atol=1e-5 * float(want.abs().max()))
    each = torch.func.vmap(lambda one: ops.high_order_attention(one[None], proj, out, backend="triton")[0])(x)
    assert_close(each, ops.high_order_attention(x, proj, out), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(kernel_device, dtype):
    """The products run in the autocast type, features and result keep theirs, weights get gradients in theirs."""

    def inputs(seed):
        x, *weights = drawn((2, 24, 3, 3), device=kernel_device)(seed)
        return x.to(dtype), *weights

    def function(*arguments, backend):
        with torch.autocast(kernel_device, torch.bfloat16, enabled=arguments[0].dtype != torch.float64):
            return ops.high_order_attention(*arguments, backend=backend)

    with in_tiles(32):
        assert_backend_no_worse(function, inputs, draws=2)
    _, gradients = value_and_gradients(lambda *a: function(*a, backend="triton"), inputs(0))
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(kernel_device, data):
    # Where few terms are added, the plain computation is exact to less than an ulp by luck.
    size = st.integers(3, 6)
    shape = (data.draw(st.integers(2, 3)), data.draw(st.integers(12, 40)), data.draw(size), data.draw(size))
    inputs = drawn(
        shape,
        order=data.draw(st.integers(1, 4)),
        hidden=data.draw(st.integers(4, 35)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        device=kernel_device,
        scale=0.5,
    )
    with in_tiles(data.draw(st.sampled_from([16, 64]))):
        no_worse(data.draw(st.sampled_from(list(PUBLIC))), data.draw(st.sampled_from(MODES)), inputs, draws=6)


# --- on the card alone

PAPER = [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAPER, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes_of_the_paper(shape, dtype, mode):
    no_worse("features", mode, drawn(shape, dtype=dtype, layout="channels_last", device="cuda"), draws=1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (8, 512, 7, 7)])
def test_a_graph_replays_with_other_inputs(shape):
    leaves = [t.requires_grad_() for t in drawn(shape, dtype=torch.bfloat16, layout="channels_last", device="cuda")()]
    upstream = torch.ones_like(leaves[0])

    def step():
        y = ops.high_order_attention(*leaves, backend="triton")
        return y, *torch.autograd.grad(y, leaves, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (10, 20):
        with torch.no_grad():
            for leaf, fresh in zip(leaves, drawn(shape, dtype=torch.bfloat16, device="cuda")(seed), strict=True):
                leaf.copy_(fresh)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("channels", [64, 512])
def test_more_than_two_to_the_31_elements(channels):
    n, side = 2**31 // (channels * 2**10) + 3, 32
    dtype = torch.bfloat16
    _, *weights = drawn((1, channels, 1, 1), dtype=dtype, device="cuda")()
    x = torch.randn(n, side, side, channels, device="cuda", dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    y = ops.high_order_attention(x, *weights, backend="triton")
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x[-2:].detach().requires_grad_()
    want = ops.high_order_attention(last, *weights, backend="triton")
    assert_close(y[-2:], want, atol=0.0)
    assert_close(dx[-2:], torch.autograd.grad(want, last, want.detach())[0], atol=0.0)


@pytest.mark.gpu
def test_forward_holds_nothing_beside_its_result():
    x, *weights = drawn((64, 64, 56, 56), dtype=torch.bfloat16, layout="channels_last", device="cuda")()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = ops.high_order_attention(x, *weights, backend="triton")
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * y.element_size() + 2**21


@pytest.mark.gpu
def test_float32_is_multiplied_in_tf32_only_where_torch_allows_it(monkeypatch):
    inputs = drawn((4, 64, 14, 14), device="cuda")()
    exact = ops.high_order_attention(*(t.double() for t in inputs))
    errors = []
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        errors.append((ops.high_order_attention(*inputs, backend="triton").double() - exact).abs().max())
    assert errors[0] < 64 * unit_roundoff(torch.float32) < errors[1]
