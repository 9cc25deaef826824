"""The Triton kernels of contrastive_loss against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkd_fast import ops
from dfkd_fast.testing import (
    assert_backend_no_worse,
    assert_close,
    assert_compiles,
    extreme,
    random,
    unit_roundoff,
    value_and_gradients,
)

REDUCTIONS = ("mean", "sum", "none")
FLAGS = [(symmetric, normalize) for symmetric in (False, True) for normalize in (False, True)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["one program", "tiles"])
def form(request, monkeypatch):
    """How the kernels work: few vectors in one program, or tiles with columns split over many programs."""
    from dfkd_fast.kernels import contrastive_loss as kernels

    if request.param == "tiles":
        monkeypatch.setattr(kernels, "SMALL", 0)
        monkeypatch.setattr(kernels, "tiles_a_program", lambda blocks, tiles, available: 1)
    return request.param


def pairs(device, dtype, n=5, dim=7, *, scale=1.0, layout="contiguous"):
    """Inputs by seed."""
    fixed = {"dtype": dtype, "device": device, "scale": scale, "layout": layout}
    return lambda seed: (random(n, dim, seed=seed, **fixed), random(n, dim, seed=seed + 1, **fixed))


def loss(**options):
    return lambda *a, backend: ops.contrastive_loss(*a, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("symmetric", "normalize"), FLAGS)
def test_kernels_are_no_worse_than_the_reference(kernel_device, form, symmetric, normalize, dtype):
    options = {"symmetric": symmetric, "normalize": normalize, "temperature": 0.1 if normalize else 1.0}
    make = pairs(kernel_device, dtype, *((40, 12) if form == "tiles" else (5, 7)))
    assert_backend_no_worse(loss(**options), make, draws=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kernel_reductions(kernel_device, form, reduction, dtype):
    make = pairs(kernel_device, dtype, 37, 5)
    assert_backend_no_worse(loss(reduction=reduction, symmetric=form != "tiles"), make, draws=1)


@pytest.mark.parametrize(("n", "dim"), [(1, 3), (1, 1), (2, 300), (33, 17), (70, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_shapes(kernel_device, n, dim, dtype):
    assert_backend_no_worse(loss(symmetric=n == 1), pairs(kernel_device, dtype, n, dim), draws=1 if dim > 256 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("options", "split"), [({}, 1), ({"symmetric": True}, 9), ({"temperature": 0.02}, 2)])
def test_kernels_on_tiles_with_and_without_masks(kernel_device, monkeypatch, options, split, dtype):
    """200 vectors a side: tiles without the anchors, their positives or the end among them."""
    from dfkd_fast.kernels import contrastive_loss as kernels

    monkeypatch.setattr(kernels, "tiles_a_program", lambda blocks, tiles, available: split)
    assert_backend_no_worse(loss(**options), pairs(kernel_device, dtype, 200, 9), draws=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.02, 1.7])
def test_kernels_at_other_temperatures(kernel_device, form, temperature, dtype):
    assert_backend_no_worse(loss(temperature=temperature), pairs(kernel_device, dtype, 9, 6))


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_kernels_take_any_layout(kernel_device, form, layout):
    assert_backend_no_worse(loss(), pairs(kernel_device, torch.bfloat16, layout=layout), draws=1)


def test_kernels_take_broadcast_rows_and_gradients(kernel_device, form):
    row = random(1, 6, device=kernel_device).expand(4, -1)
    s = random(4, 6, device=kernel_device, seed=1, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        value = ops.contrastive_loss(row, s, reduction="none", backend=backend)
        results.append((value, torch.autograd.grad(value.sum(), s)[0]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_kernel_dtypes_may_differ(kernel_device, form, types):
    make = lambda seed: [random(5, 7, dtype=t, seed=seed + i, device=kernel_device) for i, t in enumerate(types)]  # noqa: E731
    assert_backend_no_worse(loss(), make)


@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_compute_the_gradients_that_are_asked_for(kernel_device, form, symmetric):
    t, s = pairs(kernel_device, torch.bfloat16, 35, 6)(0)
    op = lambda *a: ops.contrastive_loss(*a, symmetric=symmetric, backend="triton")  # noqa: E731
    wanted = value_and_gradients(op, (t, s))[1]
    assert torch.equal(value_and_gradients(op, (t.clone().requires_grad_(), s))[1][0], wanted[0])
    assert torch.equal(value_and_gradients(op, (t, s.clone().requires_grad_()))[1][1], wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_and_rows_of_zero_length(kernel_device, form, symmetric, dtype):
    def make(seed):
        t, s = pairs(kernel_device, dtype)(seed)
        t[1], t[3], s[1], s[4] = 0, 0, 0, 0
        return t, s

    assert_backend_no_worse(loss(symmetric=symmetric), make)
    op = loss(symmetric=symmetric)
    dt, ds = value_and_gradients(lambda *a: op(*a, backend="triton"), make(0))[1]
    for zero in (dt[1], dt[3], ds[1], ds[4]):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_extreme_rows(kernel_device, form, dtype):
    """Very long and very short rows; the gradients of the short ones need not exist in the type."""
    t, s = extreme(12, 9, dtype=dtype).to(kernel_device), random(12, 9, dtype=dtype, device=kernel_device)
    if dtype == torch.bfloat16 and kernel_device == "cpu":
        t[4::6] *= 1024  # the interpreter reads denormal bfloat16 numbers wrongly
    op = loss(reduction="none")
    values, gradients = value_and_gradients(lambda *a: op(*a, backend="triton"), (t, s))
    wanted, wanted_gradients = value_and_gradients(lambda *a: op(*a, backend="reference"), (t.double(), s.double()))
    assert_close(values[0], wanted[0], atol=1e-4, rtol=1e-5)
    assert not any(g.isnan().any() for g in gradients)
    scale = float(wanted_gradients[1].abs().max())
    assert_close(gradients[1], wanted_gradients[1], atol=2 * scale * max(unit_roundoff(dtype), 1e-5))
    long = [row for row in range(12) if row % 6 < 4]
    largest = wanted_gradients[0][long].abs().amax(1, keepdim=True)
    tiny = torch.finfo(dtype).smallest_normal
    assert_close(
        gradients[0][long], wanted_gradients[0][long], atol=4 * largest.cpu() * unit_roundoff(dtype) * 64 + tiny
    )


@pytest.mark.parametrize("factor", [2.0**-105, 2.0**100])
def test_kernels_and_the_length_of_a_row(kernel_device, form, factor):
    t, s = pairs(kernel_device, torch.bfloat16)(0)
    wanted, wanted_gradients = value_and_gradients(lambda *a: ops.contrastive_loss(*a, backend="triton"), (t, s))
    got, gradients = value_and_gradients(lambda *a: ops.contrastive_loss(*a, backend="triton"), (t * factor, s))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(gradients[1], wanted_gradients[1])


@pytest.mark.parametrize("upstream", [1e-30, 0.0, 65536.0])
def test_kernels_scale_by_any_upstream_gradient(kernel_device, form, upstream):
    """What is rounded to half precision must not depend on how large the gradient that comes in is."""
    for reduction in ("mean", "none"):
        results = []
        t, s = pairs(kernel_device, torch.float32 if upstream < 1 else torch.float16)(0)
        for backend in ("triton", "reference"):
            leaf = s.clone().requires_grad_()
            value = ops.contrastive_loss(t, leaf, reduction=reduction, backend=backend)
            g = random(*value.shape, device=kernel_device, seed=4) * upstream
            results.append(torch.autograd.grad(value, leaf, g)[0])
        largest = float(results[1].abs().max())
        assert_close(results[0], results[1], atol=largest * 4 * unit_roundoff(s.dtype) * 4)


def test_kernels_on_an_empty_batch(kernel_device):
    t, s = (x.requires_grad_() for x in pairs(kernel_device, torch.bfloat16, 0, 4)(0))
    assert ops.contrastive_loss(t, s, backend="triton").isnan()
    assert ops.contrastive_loss(t, s, reduction="sum", backend="triton") == 0
    value = ops.contrastive_loss(t, s, reduction="none", symmetric=True, backend="triton")
    assert value.shape == (0,)
    assert [g.shape for g in torch.autograd.grad(value.sum(), (t, s))] == [(0, 4), (0, 4)]


def test_kernels_keep_one_number_an_anchor(kernel_device):
    kept = []
    t, s = (x.requires_grad_() for x in pairs(kernel_device, torch.bfloat16)(0))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.contrastive_loss(t, s, backend="triton")
    assert [t.shape for t in kept] == [(5, 7), (5, 7), (5,)]


def test_two_runs_are_equal_to_the_bit(kernel_device, form):
    run = lambda: value_and_gradients(  # noqa: E731
        lambda *a: ops.contrastive_loss(*a, backend="triton"), pairs(kernel_device, torch.bfloat16, 37, 9)(0)
    )
    (first, gradients), (second, again) = run(), run()
    assert all(torch.equal(a, b) for a, b in zip((*first, *gradients), (*second, *again), strict=True))


def test_a_named_backend_says_why_it_cannot_serve(kernel_device):
    t, s = pairs(kernel_device, torch.float64)(0)
    with pytest.raises(RuntimeError, match=r"cannot serve contrastive_loss: its kernels take .*, not float64"):
        ops.contrastive_loss(t, s, backend="triton")


def test_second_derivatives_are_a_clear_error(kernel_device):
    t, s = (x.requires_grad_() for x in pairs(kernel_device, torch.float32)(0))
    (dt,) = torch.autograd.grad(ops.contrastive_loss(t, s, backend="triton"), t, create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_loss: fused backends have no second derivative"):
        dt.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(kernel_device, layout, reduction):
    t, s = pairs(kernel_device, torch.bfloat16, 4, 6, layout=layout)(0)
    library = torch.ops.dfkd_fast
    arguments = (0.1, True, True)
    torch.library.opcheck(library.contrastive_loss.default, (t, s, *arguments, reduction))
    value, saved = library.contrastive_loss(t, s, *arguments, reduction)
    arguments = (value, t, s, *arguments, reduction, saved, [True, False])
    torch.library.opcheck(library.contrastive_loss_backward.default, arguments)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
def test_kernels_compile_without_graph_breaks(kernel_device, compiler, dynamic):
    sizes = (4, 7) if compiler == "inductor" else (4, 7, 9)
    calls = [pairs(kernel_device, torch.bfloat16, n, 6)(0) for n in sizes]
    op = lambda *a: ops.contrastive_loss(*a, backend="triton")  # noqa: E731
    assert_compiles(op, calls, backend=compiler, dynamic=dynamic)


def test_kernel_function_transforms(kernel_device):
    t, s = pairs(kernel_device, torch.float32, 3, 4)(0)
    op = lambda *a: ops.contrastive_loss(*a, backend="triton")  # noqa: E731
    wanted = value_and_gradients(lambda *a: 2 * op(*a), (t, s))
    leaf = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(op(leaf, s), leaf)
    assert torch.equal(torch.func.grad(op)(t, s), gradient)
    many = torch.func.vmap(torch.func.grad(op))(torch.stack([t, t]), torch.stack([s, s]))
    assert torch.equal(many, torch.stack([gradient, gradient]))
    assert torch.equal(torch.func.vmap(op)(t[None], s[None])[0] * 2, wanted[0][0])


def test_autocast_leaves_the_kernels_in_float32(kernel_device):
    t, s = pairs(kernel_device, torch.float32)(0)
    wanted = ops.contrastive_loss(t, s, backend="triton")
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        assert torch.equal(ops.contrastive_loss(t, s, backend="triton"), wanted)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 90),
    dim=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "strided", "transposed", "offset"]),
    flags=st.tuples(st.booleans(), st.booleans()),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 1000),
)
def test_sweep(kernel_device, n, dim, dtype, layout, flags, reduction, seed):
    symmetric, normalize = flags
    # Similarities of the order of ten: of far larger ones, one rounding decides how the draws compare.
    make = pairs(kernel_device, dtype, n, dim, layout=layout, scale=1.0 if normalize else dim**-0.25)
    options = {"symmetric": symmetric, "normalize": normalize, "reduction": reduction}
    op = loss(temperature=0.1 if normalize else 0.5, **options)
    # A single number can be exact by luck.
    assert_backend_no_worse(op, lambda i: make(seed + i), draws=3 if reduction == "none" else 16)


# --- on a card alone


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("vectors", [128, 8192])
def test_the_methods_shapes(vectors, symmetric, dtype):
    assert_backend_no_worse(loss(symmetric=symmetric), pairs("cuda", dtype, vectors // 2, 128), draws=1)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_many_vectors_in_little_memory(symmetric):
    """131,072 vectors: at most 1 GiB beyond inputs and gradients; a few anchors against float64."""
    t, s = (x.requires_grad_() for x in pairs("cuda", torch.bfloat16, 65_536, 128)(0))
    op = lambda: ops.contrastive_loss(t, s, symmetric=symmetric, reduction="none", backend="triton")  # noqa: E731
    torch.autograd.grad(op().mean(), (t, s))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = op()
    dt, ds = torch.autograd.grad(value.mean(), (t, s))
    results = sum(x.numel() * x.element_size() for x in (dt, ds))
    assert torch.cuda.max_memory_allocated() - before <= results + 2**30
    unit = torch.nn.functional.normalize(torch.cat([t, s]).detach().double())
    some = torch.arange(0, 65_536, 1_021, device="cuda")
    similarity = unit[some] @ unit.T / 0.1
    similarity[torch.arange(len(some), device="cuda"), some] = -torch.inf
    wanted = similarity.logsumexp(1) - similarity.gather(1, (some + 65_536)[:, None])[:, 0]
    assert_close(value[some], wanted, atol=1e-5)
    assert dt.isfinite().all()
    assert ds.isfinite().all()


@pytest.mark.gpu
@pytest.mark.large_memory
def test_more_elements_than_32_bits_count():
    dim = 1_100_000
    x = torch.randn(2_000, dim, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    value = ops.contrastive_loss(x, x, temperature=0.5, reduction="none", backend="triton")
    few = torch.cat([x[:4], x[-4:]]).double()
    unit = few / few.norm(dim=1, keepdim=True)
    assert value.isfinite().all()
    # Rows at random are nearly orthogonal: each sees itself once more, and 3,998 with a similarity near zero.
    assert_close(value[[0, -1]], float(math.log(math.exp(2) + 3998) - 2 * (unit[0] @ unit[0])), atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 700])
def test_a_captured_graph_follows_its_inputs(n):
    t, s = (x.requires_grad_() for x in pairs("cuda", torch.bfloat16, n, 96)(0))

    def step():
        value = ops.contrastive_loss(t, s, backend="triton")
        return value, *torch.autograd.grad(value, (t, s))

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
            t.copy_(random(*t.shape, dtype=t.dtype, seed=seed))
        graph.replay()
        if seed % 33 == 2:
            assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))
