"""max_pool2x2 and max_unpool2x2 against the definition, window by window, and against torch's pooling and unpooling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import (
    LAYOUTS,
    assert_backend_no_worse,
    assert_compiles,
    random,
    value_and_gradients,
    with_layout,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "plain": (2, 8, 4, 4),
    "odd": (3, 7, 5, 3),
    "one channel": (2, 1, 3, 2),
    "one window": (1, 5, 2, 2),
    "one window, one channel": (1, 1, 2, 2),
    "odd height, vectors of four": (1, 12, 7, 4),
    "odd width": (2, 16, 2, 9),
    "more channels than a tile": (1, 70, 4, 3),
    "empty batch": (0, 5, 3, 4),
}
SPECIAL = (math.nan, -math.inf, -1.0, -0.0, 0.0, 1.0, math.inf)


def definition(x, relu):
    """Window by window: a value takes over if it is larger or NaN."""
    n, c, h, w = x.shape
    y, code = x.new_empty(n, c, h // 2, w // 2), torch.empty(n, c, h // 2, w // 2, dtype=torch.uint8)
    for at in itertools.product(range(n), range(c), range(h // 2), range(w // 2)):
        a, b, i, j = at
        best, winner = None, 0
        for k in range(4):
            value = float(x[a, b, 2 * i + k // 2, 2 * j + k % 2])
            value = 0.0 if relu and value <= 0 else value
            if best is None or value > best or math.isnan(value):
                best, winner = value, k
        y[at], code[at] = best, 4 if relu and best == 0 else winner
    return y, code


def torchs(x, relu):
    """The same by torch, with its indices."""
    return F.max_pool2d(F.relu(x) if relu else x, 2, return_indices=True)


def special(dtype=torch.float64):
    """Every window of four special values."""
    return torch.tensor(list(itertools.product(SPECIAL, repeat=4)), dtype=dtype).view(7, 7 * 7 * 7, 2, 2)


def ties(*shape, dtype=torch.float64, **options):
    """Few different values, most of them not positive: windows with equals, and windows without anything positive."""
    return random(*shape, dtype=dtype, **options).round().clamp(-2, 1)


def there_and_back(x, relu=True, backend=None):
    y, code = ops.max_pool2x2(x, relu=relu, backend=backend)
    return ops.max_unpool2x2(y * 3, code, x.shape[2:], backend=backend)


def same(a, b):
    """Equal to the bit but for the sign of zero, NaN where NaN is, in equal strides and dtype."""
    assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def plain(gradient):
    """Contiguous, in strides that say so: autograd may hand the reference's backward either format."""
    return gradient.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_codes_follow_the_definition(shape, relu):
    for x in (random(*shape, dtype=torch.float64), ties(*shape)):
        y, code = ops.max_pool2x2(x, relu=relu)
        wanted, wanted_code = definition(x, relu)
        same(y, wanted)
        assert code.dtype == torch.uint8
        assert torch.equal(code, wanted_code)
        assert not code.requires_grad


@pytest.mark.parametrize("relu", [False, True])
def test_special_values_and_ties(relu):
    x = special()
    y, code = ops.max_pool2x2(x, relu=relu)
    wanted, wanted_code = definition(x, relu)
    same(y, wanted)
    assert torch.equal(code, wanted_code)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_pair_is_torchs(shape, relu):
    """Values, places and gradients of pooling, something in between, and unpooling."""
    x = ties(*shape)
    index = torchs(x, relu)[1]
    code = ops.max_pool2x2(x, relu=relu)[1]
    width = shape[3]
    rows, columns = (torch.arange(n).mul(2) for n in code.shape[2:])
    place = (code & 3).long()
    assert torch.equal((rows[:, None] + place // 2) * width + columns + place % 2, index)

    def torchs_pair(x):
        y, index = torchs(x, relu)
        return F.max_unpool2d(y * 3, index, 2, output_size=list(x.shape[2:]))

    got, got_gradients = value_and_gradients(lambda x: there_and_back(x, relu), [x])
    want, want_gradients = value_and_gradients(torchs_pair, [x])
    assert torch.equal(got[0], want[0])
    assert torch.equal(got_gradients[0], want_gradients[0])


def test_unpooling_takes_the_sizes_that_pool_to_it():
    y, code = random(2, 3, 2, 4), torch.randint(0, 4, (2, 3, 2, 4), dtype=torch.uint8)
    even = ops.max_unpool2x2(y, code)
    assert even.shape == (2, 3, 4, 8)
    assert torch.equal(ops.max_pool2x2(even.abs())[1][even.view(2, 3, 2, 2, 4, 2).sum((3, 5)) != 0], code[y != 0])
    for size in itertools.product((4, 5), (8, 9)):
        out = ops.max_unpool2x2(y, code, size)
        assert out.shape == (2, 3, *size)
        assert torch.equal(out[:, :, :4, :8], even)
        assert not out[:, :, 4:].any()
        assert not out[:, :, :, 8:].any()
        assert torch.equal(ops.max_unpool2x2(y, code, list(size)), out)


def test_only_the_lowest_two_bits_of_a_code_name_a_place():
    y, code = random(2, 3, 2, 4), torch.randint(0, 4, (2, 3, 2, 4), dtype=torch.uint8)
    for high in (4, 252):
        assert torch.equal(ops.max_unpool2x2(y, code | high), ops.max_unpool2x2(y, code))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_once_and_twice(layout, relu):
    # No two values of a window, and none and zero, are closer than what gradcheck moves them by.
    values = torch.randperm(2 * 3 * 5 * 4, dtype=torch.float64).view(2, 3, 5, 4) - 59.5
    x = with_layout(values, layout).requires_grad_()
    code = ops.max_pool2x2(x)[1]
    y = random(2, 3, 2, 2, dtype=torch.float64, layout=layout, requires_grad=True)
    for function, leaf in (
        (lambda x: ops.max_pool2x2(x, relu=relu)[0], x),
        (lambda y: ops.max_unpool2x2(y, code, (5, 4)), y),
        (lambda x: there_and_back(x, relu) ** 2, x),
    ):
        assert gradcheck(function, leaf)
        assert gradgradcheck(function, leaf)


def test_relu_passes_no_gradient_at_or_below_zero():
    x = torch.tensor([[-1.0, -2.0, 0.0, -3.0, 2.0, -1.0], [-3.0, -1.0, 0.0, -1.0, 1.0, 2.0]]).view(1, 1, 2, 6)
    leaf = x.requires_grad_()
    y, code = ops.max_pool2x2(leaf, relu=True)
    assert y.flatten().tolist() == [0, 0, 2]
    assert code.flatten().tolist() == [4, 4, 0]
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert gradient.flatten().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_laid_out_as_the_input(layout):
    x = random(2, 6, 5, 4, layout=layout)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y, code = ops.max_pool2x2(x)
    out = ops.max_unpool2x2(with_layout(y, layout), code, (5, 4))
    for result in (y, code, out):
        assert result.is_contiguous(memory_format=form)
    assert torch.equal(y, ops.max_pool2x2(x.contiguous())[0])


def test_autocast_leaves_the_dtype():
    x = random(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(there_and_back(x), there_and_back(x.clone()))
        assert there_and_back(x).dtype == torch.float32


def test_arguments_are_checked():
    x, y, code = random(2, 3, 4, 6), random(2, 3, 2, 3), torch.zeros(2, 3, 2, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        ops.max_pool2x2([0.0])
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\), got \(3, 4, 6\)"):
        ops.max_pool2x2(x[0])
    for small in (x[:, :, :1], x[:, :, :, :1]):
        with pytest.raises(ValueError, match=r"x must have H and W of at least 2, got shape \(2, 3, "):
            ops.max_pool2x2(small)
    with pytest.raises(TypeError, match=r"y must be of dtype float16, bfloat16, float32 or float64, got torch.uint8"):
        ops.max_unpool2x2(code, code)
    with pytest.raises(TypeError, match="code must be a tensor, got int"):
        ops.max_unpool2x2(y, 0)
    with pytest.raises(TypeError, match=r"code must be of dtype uint8, got torch.int64"):
        ops.max_unpool2x2(y, code.long())
    with pytest.raises(ValueError, match=r"code must have the shape of y, \(2, 3, 2, 3\), got \(2, 3, 2, 2\)"):
        ops.max_unpool2x2(y, code[..., :2])
    with pytest.raises(ValueError, match="code must be on the device of y, cpu, got meta"):
        ops.max_unpool2x2(y, code.to("meta"))
    for size in ((3, 6), (4, 8), (6, 6), (4,), (2, 3, 4, 6)):
        with pytest.raises(ValueError, match=r"output_size must be \(4 or 5, 6 or 7\) for y of shape \(2, 3, 2, 3\)"):
            ops.max_unpool2x2(y, code, size)
    with pytest.raises(ValueError, match="backend must be"):
        ops.max_pool2x2(x, backend="numpy")
    with pytest.raises(RuntimeError, match="has no implementation of max_unpool2x2; it has reference, triton"):
        ops.max_unpool2x2(y, code, backend="cuda")


# --- the kernels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_give_the_references_bits(kernel_device, shape, layout):
    """No arithmetic, no error: values, codes and gradients are those of the reference, in its strides."""
    for (dtype, relu), upstream in itertools.product(zip(DTYPES, (True, False, True), strict=True), LAYOUTS[:3]):
        x = with_layout(ties(*shape, dtype=dtype, device=kernel_device), layout)
        results = []
        for backend in ("triton", "reference"):
            leaf = x.detach().requires_grad_()
            y, code = ops.max_pool2x2(leaf, relu=relu, backend=backend)
            g = random(*y.shape, dtype=dtype, layout=upstream, device=kernel_device, seed=2)
            (dx,) = torch.autograd.grad(y, leaf, g)
            leaf = with_layout(y, layout).requires_grad_()
            out = ops.max_unpool2x2(leaf, code, shape[2:], backend=backend)
            g = random(*out.shape, dtype=dtype, layout=upstream, device=kernel_device, seed=3)
            (dy,) = torch.autograd.grad(out, leaf, g)
            results.append((y, code, out, plain(dx), plain(dy)))
            if backend == "triton" and layout == "channels_last":
                assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (dx, dy))
        for a, b in zip(*results, strict=True):
            same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_no_worse_than_the_reference(kernel_device, dtype):
    make = lambda seed: (random(2, 5, 5, 6, dtype=dtype, layout="channels_last", device=kernel_device, seed=seed),)  # noqa: E731
    assert_backend_no_worse(lambda x, backend: ops.max_pool2x2(x, backend=backend)[0], make)
    assert_backend_no_worse(lambda x, backend: there_and_back(x, backend=backend), make)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels_treat_special_values_as_torch_does(kernel_device, layout, dtype, relu):
    x = with_layout(special(dtype).to(kernel_device), layout)
    y, code = ops.max_pool2x2(x, relu=relu, backend="triton")
    wanted, wanted_code = ops.max_pool2x2(x, relu=relu, backend="reference")
    same(y, wanted)
    same(code, wanted_code)
    got, want = (
        value_and_gradients(lambda x, name=name: ops.max_pool2x2(x, relu=relu, backend=name)[0], [x])[1][0]
        for name in ("triton", "reference")
    )
    assert torch.equal(got, want)
    same(*(ops.max_unpool2x2(y, code, (3, 3), backend=name) for name in ("triton", "reference")))


def test_kernels_take_what_autograd_and_views_hand_them(kernel_device):
    """An upstream gradient of one number in every place, a slice of channels, a broadcast batch, a code of its own."""
    x = random(2, 8, 5, 4, device=kernel_device)
    for case in (x[:, 2:5], x.to(memory_format=torch.channels_last)[:, 2:5], x[:1].expand(3, -1, -1, -1)):
        results = []
        for backend in ("triton", "reference"):
            leaf = case.detach().requires_grad_()
            y, code = ops.max_pool2x2(leaf, relu=True, backend=backend)
            out = ops.max_unpool2x2(y, with_layout(code, "transposed"), (5, 4), backend=backend)
            (gradient,) = torch.autograd.grad(out.sum(), leaf)
            results.append((y, code, out, plain(gradient)))
        for a, b in zip(*results, strict=True):
            same(a, b)


def test_two_runs_are_equal_to_the_bit(kernel_device):
    x = random(2, 9, 7, 6, dtype=torch.bfloat16, layout="channels_last", device=kernel_device)
    runs = [value_and_gradients(lambda x: there_and_back(x, backend="triton"), [x]) for _ in range(2)]
    assert torch.equal(runs[0][0][0], runs[1][0][0])
    assert torch.equal(runs[0][1][0], runs[1][1][0])


def test_backward_keeps_a_byte_a_window(kernel_device):
    kept = []
    x = random(2, 8, 6, 4, device=kernel_device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, code = ops.max_pool2x2(x, relu=True, backend="triton")
        ops.max_unpool2x2(y, code, backend="triton")
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, code.shape)] * 2


def test_a_named_backend_says_why_it_cannot_serve(kernel_device):
    x = random(1, 2, 4, 4, dtype=torch.float64, device=kernel_device)
    code = torch.zeros(1, 2, 4, 4, dtype=torch.uint8, device=kernel_device)
    with pytest.raises(RuntimeError, match=r"cannot serve max_pool2x2: its kernels take .*, not float64"):
        ops.max_pool2x2(x, backend="triton")
    with pytest.raises(RuntimeError, match=r"cannot serve max_unpool2x2: its kernels take .*, not float64"):
        ops.max_unpool2x2(x, code, backend="triton")


def test_second_derivatives_are_a_clear_error(kernel_device):
    x = random(1, 2, 4, 4, device=kernel_device, requires_grad=True)
    y, code = ops.max_pool2x2(x, backend="triton")
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="max_pool2x2: fused backends have no second derivative"):
        dx.sum().backward()
    leaf = y.detach().requires_grad_()
    out = ops.max_unpool2x2(leaf, code, backend="triton")
    (dy,) = torch.autograd.grad((out**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="max_unpool2x2: fused backends have no second derivative"):
        dy.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel_device, dtype, layout):
    fixed = {"dtype": dtype, "layout": layout, "device": kernel_device}
    x, y = random(2, 3, 5, 4, **fixed), random(2, 3, 2, 2, **fixed)
    code = torch.randint(0, 4, (2, 3, 2, 2), dtype=torch.uint8).to(kernel_device)
    library, last = torch.ops.dfkd_fast, layout == "channels_last"
    for relu in (False, True):
        torch.library.opcheck(library.max_pool2x2.default, (x, relu))
        torch.library.opcheck(library.max_unpool2x2.default, (y, code, 5, 4, last, relu))
    torch.library.opcheck(library.max_unpool2x2_backward.default, (x, code, last))


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", True)])
def test_kernels_compile_without_graph_breaks(kernel_device, compiler, dynamic):
    shapes, layouts = ((2, 3, 4, 6), (3, 3, 4, 6), (2, 5, 5, 3)), ("channels_last", "contiguous")
    if compiler == "inductor":
        shapes, layouts = shapes[:2], layouts[:1]  # it takes seconds a graph
    for layout in layouts:
        calls = [[random(*shape, layout=layout, device=kernel_device)] for shape in shapes]
        assert_compiles(lambda x: there_and_back(x, backend="triton"), calls, backend=compiler, dynamic=dynamic)


def test_the_reference_compiles_without_graph_breaks():
    calls = [[random(*shape, layout="channels_last")] for shape in ((2, 3, 4, 6), (3, 3, 4, 6), (2, 5, 5, 3))]
    assert_compiles(there_and_back, calls)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_function_transforms(kernel_device, backend):
    x = random(3, 2, 5, 4, device=kernel_device)
    loss = lambda x: (there_and_back(x, backend=backend) ** 2).sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(x), wanted)
    each = torch.func.vmap(lambda x: there_and_back(x[None], backend=backend)[0])
    assert torch.equal(each(x), there_and_back(x, backend=backend))
    each = torch.func.vmap(torch.func.grad(lambda x: loss(x[None])))
    assert torch.equal(each(x), wanted)


def test_autocast_leaves_the_kernels_dtype(kernel_device):
    x = random(2, 3, 4, 4, device=kernel_device)
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        same(there_and_back(x, backend="triton"), there_and_back(x, backend="reference"))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(2, 9), st.integers(2, 9)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    upstream=st.sampled_from(LAYOUTS),
    relu=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sweep(kernel_device, shape, dtype, layout, upstream, relu, seed):
    x = with_layout(ties(*shape, dtype=dtype, device=kernel_device, seed=seed), layout)
    results = []
    for backend in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        y, code = ops.max_pool2x2(leaf, relu=relu, backend=backend)
        out = ops.max_unpool2x2(y, code, shape[2:], backend=backend)
        g = random(*out.shape, dtype=dtype, layout=upstream, device=kernel_device, seed=seed + 1)
        results.append((y, code, out, plain(torch.autograd.grad(out, leaf, g)[0])))
    for a, b in zip(*results, strict=True):
        same(a, b)


# --- on a card alone

PAPER = ((64, 64, 28, 28), (64, 32, 56, 56), (64, 16, 112, 112), (64, 16, 224, 224))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAPER, ids=["x".join(map(str, shape)) for shape in PAPER])
def test_the_papers_maps(shape, dtype):
    x = ties(*shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    results = []
    for backend in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        y, code = ops.max_pool2x2(leaf, relu=True, backend=backend)
        out = ops.max_unpool2x2(y, code, shape[2:], backend=backend)
        results.append((y, code, out, torch.autograd.grad(out, leaf, x.flip(0))[0]))
    for a, b in zip(*results, strict=True):
        same(a, b)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs():
    x = random(4, 16, 15, 14, dtype=torch.bfloat16, layout="channels_last", device="cuda", requires_grad=True)
    g = random(4, 16, 15, 14, dtype=torch.bfloat16, layout="channels_last", device="cuda", seed=1)

    def step():
        out = there_and_back(x, backend="triton")
        return out, torch.autograd.grad(out, x, g)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in range(2, 102):
        with torch.no_grad():
            x.copy_(random(*x.shape, dtype=x.dtype, seed=seed))
        graph.replay()
        if seed % 33 == 2:
            for a, b in zip(results, step(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(layout):
    shape = (2, 16, 8_193, 8_195)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=form).normal_().requires_grad_()
    assert x.numel() > 2**31
    y, code = ops.max_pool2x2(x, relu=True, backend="triton")
    out = ops.max_unpool2x2(y, code, shape[2:], backend="triton")
    (gradient,) = torch.autograd.grad(out, x, x.detach())
    for rows in (slice(0, 64), slice(4_000, 4_064), slice(8_128, 8_193)):
        part = x.detach()[:, :, rows].clone(memory_format=form).requires_grad_()
        wanted, wanted_code = ops.max_pool2x2(part, relu=True, backend="reference")
        half = slice(rows.start // 2, rows.stop // 2)
        assert torch.equal(y[:, :, half], wanted)
        assert torch.equal(code[:, :, half], wanted_code)
        wanted_out = ops.max_unpool2x2(wanted, wanted_code, part.shape[2:], backend="reference")
        assert torch.equal(out[:, :, rows], wanted_out)
        assert torch.equal(gradient[:, :, rows], torch.autograd.grad(wanted_out, part, part.detach())[0])


@pytest.mark.gpu
def test_memory_is_that_of_the_results():
    x = random(64, 16, 224, 224, dtype=torch.bfloat16, layout="channels_last", device="cuda", requires_grad=True)
    size = x.numel() * x.element_size()
    there_and_back(x, backend="triton").sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, code = ops.max_pool2x2(x, relu=True, backend="triton")
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * (size + size // 4 + size // 8)
    del y, code, gradient
