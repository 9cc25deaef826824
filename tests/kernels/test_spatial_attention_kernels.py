"""spatial_attention's kernels against the reference; what the op itself is, is in test_spatial_attention.py."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkd_fast import ops
from dfkd_fast.testing import (
    LAYOUTS,
    MAP_SHAPES,
    assert_backend_no_worse,
    assert_close,
    assert_compiles,
    assert_no_worse,
    random,
    value_and_gradients,
    with_layout,
)

FORMS = ("spatial", "spatial_mean1", "channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def near(form, shape):
    """A scale at which what is added to the features is as large as they are."""
    return {"spatial": float(shape[2] * shape[3]), "spatial_mean1": 1.0, "channel": float(shape[1])}[form]


def maker(shape, *, hidden=3, dtype=torch.float32, layout="contiguous", device="cpu", bias=True, only=None):
    """For :func:`assert_backend_no_worse`: logits of standard deviation 1, and gradients to all or some inputs."""
    n, c, h, w = shape

    def make(seed):
        fixed = {"dtype": dtype, "device": device}
        inputs = [
            random(*shape, layout=layout, seed=seed, **fixed),
            random(n, hidden, h, w, layout=layout, seed=seed + 1, **fixed),
            random(c, hidden, seed=seed + 2, scale=hidden**-0.5, **fixed),
            random(c, seed=seed + 3, **fixed) if bias else None,
        ]
        for i in only or ():
            inputs[i].requires_grad_()
        return inputs

    return make


def no_worse(make, form, shape, *, scale=None, draws=4, **more):
    """out, what of it is added to the features, and the gradients."""
    scale = near(form, shape) if scale is None else scale

    def op(f, *others, backend):
        y = ops.spatial_attention(f, *others, scale=scale, form=form, backend=backend)
        return y, y.to(torch.promote_types(y.dtype, torch.float32)) - f

    assert_backend_no_worse(op, make, draws=draws, **more)


@contextlib.contextmanager
def tiles(**changed):
    """Other tiles than the usual: several to a map, a channel and a chunk, where shapes are small."""
    from dfkd_fast.kernels import config

    with contextlib.ExitStack() as stack:
        for kernel in ("statistics", "slopes", "gate", "rows", "gradients"):
            sizes = {"BLOCK_M": 16, "BLOCK_C": 16, "BLOCK_K": 16, "TILES": 1, "PROGRAMS": 2, "MEGABYTES": 0, **changed}
            stack.enter_context(config.forced(f"spatial_attention_{kernel}", config.Launch(tile=sizes)))
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_no_worse_than_the_reference(kernel_device, dtype, form):
    shape = (2, 19, 5, 4)
    no_worse(maker(shape, dtype=dtype, layout="channels_last", device=kernel_device), form, shape)


@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize(("dtype", "hidden"), [(torch.float32, 20), (torch.bfloat16, 7)])
def test_kernels_on_more_than_one_tile(kernel_device, dtype, hidden, form):
    """Chunks to merge, channels in turn, narrow maps in two blocks, tiles that are not full."""
    shape = (2, 19, 5, 4)
    make = maker(shape, hidden=hidden, dtype=dtype, layout="channels_last", device=kernel_device)
    for changed in ({}, {"BLOCK_C": 32}):
        with tiles(**changed):
            no_worse(make, form, shape)


def test_groups_of_samples_change_nothing(kernel_device):
    """Maps of a megabyte a sample, and groups of that size."""
    inputs = maker((2, 256, 32, 32), dtype=torch.bfloat16, layout="channels_last", device=kernel_device)(0)
    op = lambda *a: ops.spatial_attention(*a, scale=1000.0, backend="triton")  # noqa: E731
    results = []
    for megabytes in (0, 1):
        with tiles(BLOCK_M=512, BLOCK_C=256, TILES=2, MEGABYTES=megabytes):
            results.append(value_and_gradients(op, inputs)[1])
    # Groups differ in how D is summed, and the sums of programs in their number: a last digit of bfloat16 may turn.
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", MAP_SHAPES.values(), ids=MAP_SHAPES)
def test_kernels_on_awkward_shapes(kernel_device, shape, form):
    for layout, dtype in (("contiguous", torch.bfloat16), ("channels_last", torch.float32)):
        make = maker(shape, hidden=1 if dtype == torch.float32 else 3, dtype=dtype, layout=layout, device=kernel_device)
        no_worse(make, form, shape, scale=1.5)


@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_take_any_layout(kernel_device, layout, form):
    shape = (2, 7, 5, 3)
    no_worse(maker(shape, dtype=torch.bfloat16, layout=layout, device=kernel_device), form, shape)
    # And upstream gradients, weights and biases of their own.
    inputs = maker(shape, layout=layout, device=kernel_device)(0)
    inputs[2] = with_layout(inputs[2], "transposed")
    inputs[3] = with_layout(inputs[3], "strided")
    for other in LAYOUTS:
        gradients = []
        for backend in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = ops.spatial_attention(*leaves, scale=3.0, form=form, backend=backend)
            gradients.append(torch.autograd.grad(y, leaves, random(*shape, layout=other, device=kernel_device, seed=9)))
        for got, want in zip(*gradients, strict=True):
            assert_close(got, want, atol=2e-5, rtol=2e-5)
    leaf = inputs[0].detach().requires_grad_()
    ops.spatial_attention(leaf, *inputs[1:], form=form, backend="triton").sum().backward()  # no strides at all
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_gradients_to_any_of_the_inputs(kernel_device, form):
    shape = (2, 19, 4, 3)
    some = ((0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2))
    whole = value_and_gradients(
        lambda *a: ops.spatial_attention(*a, scale=5.0, form=form, backend="triton"),
        maker(shape, device=kernel_device)(0),
    )[1]
    for i, only in enumerate(some):
        with tiles() if i % 2 else tiles(BLOCK_C=32):
            inputs = maker(shape, device=kernel_device, only=only)(0)
            op = lambda *a: ops.spatial_attention(*a, scale=5.0, form=form, backend="triton")  # noqa: E731
            for j, gradient in enumerate(value_and_gradients(op, inputs)[1]):
                assert (gradient is None) == (j not in only)
                if gradient is not None:
                    assert_close(gradient, whole[j], atol=1e-5, rtol=1e-5)
    if form == "spatial":
        assert whole[3].abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_kernels_on_extreme_logits(kernel_device, form):
    for factor in (1e6, 1e30):
        f, h, w, b = maker((2, 4, 5, 3), device=kernel_device)(0)
        op = lambda *a: ops.spatial_attention(*a, form=form, backend="triton")  # noqa: E731
        values, gradients = value_and_gradients(op, (f, factor * h, w, b))
        assert all(t.isfinite().all() for t in (*values, *gradients))
        wanted = ops.spatial_attention(*(t.double() for t in (f, factor * h, w, b)), form=form)
        assert_close(values[0], wanted, atol=1e-5 if factor < 1e7 else 0.05 * 4, rtol=1e-6)
    h[0, 0, 0, 0] = torch.nan
    y = ops.spatial_attention(f, h, w, b, form=form, backend="triton")
    assert torch.equal(y.isnan(), ops.spatial_attention(f, h, w, b, form=form, backend="reference").isnan())


def test_a_bias_over_positions_counts_for_nothing_in_kernels_either(kernel_device):
    f, h, w, b = maker((2, 5, 7, 3), device=kernel_device)(0)
    op = lambda *a: ops.spatial_attention(*a, scale=20.0, backend="triton")  # noqa: E731
    assert torch.equal(op(f, h, w, 1e6 * b), op(f, h, w, None))
    assert torch.equal(op(f, h, w, torch.full_like(b, torch.inf)), op(f, h, w, None))


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_are_equal_to_the_bit(kernel_device, form):
    op = lambda *a: ops.spatial_attention(*a, scale=9.0, form=form, backend="triton")  # noqa: E731
    with tiles():
        runs = [value_and_gradients(op, maker((2, 19, 5, 4), device=kernel_device)(0)) for _ in range(2)]
    for a, b in zip(*((*values, *gradients) for values, gradients in runs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_kernels_under_autocast(kernel_device, form):
    shape = (2, 8, 5, 4)

    def op(*inputs, backend):
        with torch.autocast(kernel_device, dtype=torch.bfloat16):
            return ops.spatial_attention(*inputs, scale=near(form, shape), form=form, backend=backend)

    assert_backend_no_worse(op, maker(shape, device=kernel_device))
    narrow = maker(shape, dtype=torch.bfloat16, device=kernel_device)
    wide = maker(shape, device=kernel_device)
    assert_backend_no_worse(op, lambda seed: (*narrow(seed)[:2], *wide(seed)[2:]))  # as a network's maps and weights
    no_worse(lambda seed: (wide(seed)[0], *narrow(seed)[1:]), form, shape)
    no_worse(lambda seed: (narrow(seed)[0], *wide(seed)[1:]), form, shape)


def test_kernels_keep_inputs_and_two_numbers_a_channel(kernel_device):
    for form in FORMS:
        kept = []
        inputs = maker((2, 8, 6, 4), device=kernel_device, only=(0, 1, 2))(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ops.spatial_attention(*inputs, form=form, backend="triton")
        assert [t.numel() for t in kept] == [t.numel() for t in inputs] + [0 if form == "channel" else 2 * 2 * 8]


def test_a_named_backend_says_why_it_cannot_serve(kernel_device):
    inputs = [t.to(kernel_device).double() for t in maker((1, 3, 2, 2))(0)]
    with pytest.raises(RuntimeError, match=r"cannot serve spatial_attention: its kernels take .*, not float64"):
        ops.spatial_attention(*inputs, backend="triton")


def test_second_derivatives_are_a_clear_error(kernel_device):
    inputs = maker((1, 3, 2, 3), device=kernel_device, only=(0, 1, 2, 3))(0)
    y = ops.spatial_attention(*inputs, form="channel", backend="triton")
    gradients = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="spatial_attention: fused backends have no second derivative"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_opcheck(kernel_device, layout, form):
    library = torch.ops.dfkd_fast
    f, h, w, b = maker((2, 5, 3, 4), dtype=torch.bfloat16, layout=layout, device=kernel_device)(0)
    torch.library.opcheck(library.spatial_attention.default, (f, h, w, b, 0.5, form))
    saved = library.spatial_attention.default(f, h, w, b, 0.5, form)[1]
    for needs_grad in ([True, True, True, True], [False, True, False, True]):
        arguments = (with_layout(f, "channels_last"), f, h, w, b, 0.5, form, saved, needs_grad)
        torch.library.opcheck(library.spatial_attention_backward.default, arguments)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
def test_kernels_compile_without_graph_breaks(kernel_device, compiler, dynamic):
    shapes = [(2, 8, 4, 4), (3, 8, 5, 2), (2, 8, 3, 7)]
    for form in ("spatial", "channel") if compiler == "aot_eager" else ("spatial",):
        calls = [maker(s, layout="channels_last", device=kernel_device)(0) for s in shapes[: 3 if dynamic else 2]]
        op = lambda *a, form=form: ops.spatial_attention(*a, scale=2.0, form=form, backend="triton")  # noqa: E731
        assert_compiles(op, calls, backend=compiler, dynamic=dynamic, atol=1e-6, rtol=1e-6)


def test_kernels_compile_under_autocast(kernel_device):
    def op(*inputs):
        with torch.autocast(kernel_device, dtype=torch.bfloat16):
            return ops.spatial_attention(*inputs, scale=2.0, backend="triton")

    assert_compiles(op, [maker((2, 8, 4, 4), device=kernel_device)(0)], atol=1e-6, rtol=1e-6)


def test_function_transforms_of_kernels(kernel_device):
    f, h, w, b = maker((3, 4, 2, 2), device=kernel_device)(0)
    op = lambda *a: ops.spatial_attention(*a, scale=2.0, form="channel", backend="triton")  # noqa: E731
    each = torch.func.vmap(lambda x, y: op(x[None], y[None], w, b)[0])
    assert torch.equal(each(f, h), op(f, h, w, b))
    total = lambda v: op(f, h, v, b).square().sum()  # noqa: E731
    leaf = w.clone().requires_grad_()
    assert torch.equal(torch.func.grad(total)(w), torch.autograd.grad(total(leaf), leaf)[0])


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    hidden=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    form=st.sampled_from(FORMS),
    usual=st.booleans(),
)
def test_sweep(kernel_device, shape, hidden, dtype, layout, form, usual):
    make = maker(shape, hidden=hidden, dtype=dtype, layout=layout, device=kernel_device)
    with contextlib.nullcontext() if usual else tiles():
        no_worse(make, form, shape, draws=4)


# --- on a card alone

PAPER = ((64, 256, 28, 28), (64, 128, 56, 56), (64, 64, 112, 112), (64, 64, 224, 224))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", PAPER, ids=["x".join(map(str, shape)) for shape in PAPER])
def test_the_papers_maps(shape, form):
    n, c, h, w = shape
    fixed = {"device": "cuda", "dtype": torch.bfloat16}
    f = torch.randn(shape, **fixed).to(memory_format=torch.channels_last)
    narrow = torch.randn((n, c // 8, h, w), **fixed).to(memory_format=torch.channels_last)
    weight, bias = torch.randn((c, c // 8), **fixed) * (c // 8) ** -0.5, torch.randn(c, **fixed)
    g = torch.randn_like(f)
    results = []
    for backend, exact in (("triton", False), ("reference", False), ("reference", True)):
        leaves = [(t.float() if exact else t).detach().requires_grad_() for t in (f, narrow, weight, bias)]
        y = ops.spatial_attention(*leaves, scale=near(form, shape), form=form, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))])
        del y, leaves
    for name, mine, plain, truth in zip(("out", "f", "hidden", "weight", "bias"), *results, strict=True):
        floor = torch.finfo(mine.dtype).eps * float(truth.abs().max())
        assert_no_worse(mine, than=plain, truth=truth, floor=floor, name=name)


@pytest.mark.gpu
def test_memory_beyond_inputs_and_gradients_is_little():
    f = torch.randn((64, 64, 112, 112), device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    inputs = [f, f[:, :8].contiguous(memory_format=torch.channels_last), f[0, :, 0, :8].contiguous()]
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = ops.spatial_attention(*inputs, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(y, inputs, f)
    own = sum(t.numel() * t.element_size() for t in gradients)
    assert torch.cuda.max_memory_allocated() - before <= own + 2**24


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_captured_graph_follows_its_inputs(form):
    inputs = maker((4, 16, 15, 14), dtype=torch.bfloat16, layout="channels_last", device="cuda", only=(0, 1, 2, 3))(0)
    g = random(4, 16, 15, 14, dtype=torch.bfloat16, layout="channels_last", device="cuda", seed=9)

    def step():
        y = ops.spatial_attention(*inputs, scale=50.0, form=form, backend="triton")
        return y, *torch.autograd.grad(y, inputs, g)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for i, tensor in enumerate(inputs):
            tensor.copy_(random(*tensor.shape, dtype=torch.bfloat16, device="cuda", seed=20 + i))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize("shape", [(43, 64, 1024, 768), (2, 64, 4096, 4224)], ids=["many samples", "large samples"])
def test_more_elements_than_32_bits_count(shape, form):
    n, c, h, w = shape
    assert n * c * h * w > 2**31
    f = torch.randn((n, h, w, c), device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    narrow = torch.randn((n, h, w, 2), device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight = torch.randn((c, 2), device="cuda", dtype=torch.bfloat16)
    scale = near(form, shape)
    results = []
    for f_part, narrow_part in ((f, narrow), (f[-1:], narrow[-1:])):
        leaves = [t.detach().requires_grad_() for t in (f_part, narrow_part)]
        y = ops.spatial_attention(*leaves, weight, scale=scale, form=form, backend="triton")
        results.append([y.detach()[-1:].clone(), *(t[-1:].clone() for t in torch.autograd.grad(y, leaves, f_part))])
        del y, leaves
    for whole, alone in zip(*results, strict=True):
        assert_close(whole, alone, atol=0.01 * float(alone.abs().max()))
