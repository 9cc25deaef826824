"""The kernels of batchnorm_statistics and channel_statistics against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_fast import ops
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

ACTIVATIONS = ("none", "relu", "relu6")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}
OPS = torch.ops.dfkd_fast


def inputs_of(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    layout: Any = "contiguous",
    residual_layout: Any = None,
    residual: bool = False,
    affine: bool = True,
    wanted: tuple[str, ...] = ("x", "weight", "bias", "residual"),
    device: str = "cpu",
    scale: float = 3.0,
    shift: float = 1.0,
):
    """Makes of a seed x, running mean and variance, weight, bias and residual, in the order of :func:`call`."""
    c = shape[1]

    def make(seed: int) -> list[Any]:
        fixed = {"dtype": dtype, "device": device}
        return [
            random(*shape, seed=seed, scale=scale, shift=shift, layout=layout, requires_grad="x" in wanted, **fixed),
            random(c, seed=seed + 1, shift=shift, **fixed),
            random(c, seed=seed + 2, **fixed).square() + 0.1,
            random(c, seed=seed + 3, shift=1.0, requires_grad="weight" in wanted, **fixed) if affine else None,
            random(c, seed=seed + 4, requires_grad="bias" in wanted, **fixed) if affine else None,
            random(*shape, seed=seed + 5, layout=residual_layout or layout, requires_grad="residual" in wanted, **fixed)
            if residual
            else None,
        ]

    return make


def call(x, running_mean, running_var, weight, bias, residual, *, activation="relu", backend="triton"):
    return ops.batchnorm_statistics(
        x, running_mean, running_var, weight, bias, 1e-3, activation=activation, residual=residual, backend=backend
    )


def norm(activation: str):
    return lambda *inputs, backend="triton": call(*inputs, activation=activation, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "residual"), [("none", False), ("relu", False), ("relu", True)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_are_no_worse_than_the_reference(kernel_device, shape, activation, residual, dtype):
    made = inputs_of(shape, dtype=dtype, residual=residual, device=kernel_device)
    assert_backend_no_worse(norm(activation), made)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_on_memory_layouts(kernel_device, layout, activation, residual):
    made = inputs_of((3, 13, 5, 3), layout=layout, residual=residual, device=kernel_device)
    assert_backend_no_worse(norm(activation), made)


@pytest.mark.parametrize(
    ("layout", "other"),
    [
        ("channels_last", "contiguous"),
        ("contiguous", "channels_last"),
        ("channels_last", "strided"),
        ("offset", "transposed"),
    ],
)
def test_kernels_with_a_residual_that_lies_otherwise(kernel_device, layout, other):
    made = inputs_of((3, 16, 4, 2), layout=layout, residual_layout=other, residual=True, device=kernel_device)
    assert_backend_no_worse(norm("relu6"), made)


@pytest.mark.parametrize("shape", [(40, 24, 7, 5), (1, 70, 50, 3), (5, 8, 24, 24)])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_kernels_over_many_tiles(kernel_device, layout, shape):
    """More tiles than programs, vectors and none, channels that a block does not divide."""
    made = inputs_of(shape, layout=layout, residual=True, dtype=torch.bfloat16, device=kernel_device)
    assert_backend_no_worse(norm("relu"), made, draws=2)


@pytest.mark.parametrize(
    "wanted", [("x",), ("residual",), ("weight",), ("bias",), ("x", "residual"), ("weight", "bias", "residual")]
)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_each_gradient_alone(kernel_device, activation, wanted):
    made = inputs_of((3, 9, 4, 2), residual=True, wanted=wanted, device=kernel_device)
    # Mean and variance have a gradient in x alone.
    results = slice(None) if "x" in wanted else slice(1)
    assert_backend_no_worse(lambda *a, backend: norm(activation)(*a, backend=backend)[results], made)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("results", [(0,), (1,), (2,), (1, 2), (0, 1), (0, 2)])
def test_each_upstream_gradient_alone(kernel_device, results, residual, activation):
    made = inputs_of((3, 9, 4, 2), residual=residual, device=kernel_device)(0)
    kept = [t if i in (0, 3, 4, 5) else None for i, t in enumerate(made) if t is not None and t.requires_grad]
    leaves = [t for t in kept if t is not None]
    found, wanted = (
        torch.autograd.grad(
            [call(*made, activation=activation, backend=backend)[i] for i in results],
            leaves,
            [random(*((3, 9, 4, 2) if i == 0 else (9,)), seed=i + 1, device=kernel_device) for i in results],
            allow_unused=True,
        )
        for backend in ("triton", "reference")
    )
    for a, b in zip(found, wanted, strict=True):
        if b is None or a is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_statistics_are_no_worse(kernel_device, dtype, layout):
    for shape in ((3, 7, 5, 3), (9, 40, 4, 4)):
        make = lambda seed, shape=shape: [  # noqa: E731
            random(*shape, seed=seed, dtype=dtype, layout=layout, shift=2.0, device=kernel_device)
        ]
        assert_backend_no_worse(lambda x, backend: ops.channel_statistics(x, backend=backend), make)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "deviation"), [(30.0, 2.0), (3000.0, 2.0), (1e-3, 1e-6)])
def test_statistics_are_sound_far_from_zero(kernel_device, mean, deviation, layout):
    """Whatever the running mean says."""
    x = random(16, 3, 28, 28, scale=deviation, shift=mean, seed=3, layout=layout, device=kernel_device)
    zero, one = torch.zeros(3, device=kernel_device), torch.ones(3, device=kernel_device)
    _, got_mean, got_var = ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, backend="triton")
    exact, u = x.double(), unit_roundoff(torch.float32)
    centre = exact.mean((0, 2, 3))
    assert_close(got_mean, centre, atol=0.0, rtol=16 * u, name="mean")
    spread = (exact - centre[:, None, None]).square().mean((0, 2, 3))
    assert_close(got_var, spread, atol=(16 * u * mean) ** 2, rtol=64 * u, name="var")


def test_statistics_of_a_jump(kernel_device):
    """The first tile says nothing of what comes after it."""
    x = random(64, 8, 6, 6, seed=3, layout="channels_last", device=kernel_device)
    x[1:] += 1000
    _, var = ops.channel_statistics(x, backend="triton")
    assert_close(var, x.double().var((0, 2, 3), unbiased=False), atol=0.0, rtol=64 * unit_roundoff(torch.float32))


def test_activations_at_their_corners(kernel_device):
    for residual in (False, True):
        x = torch.tensor([[-1.0, 0.0, 6.0, 7.0, torch.nan]], device=kernel_device, requires_grad=True)
        zeros, eps = torch.zeros(5, device=kernel_device), 2.0**-10
        var = torch.full((5,), 1 - eps, device=kernel_device)
        other = torch.zeros_like(x) if residual else None
        for activation in ("relu", "relu6"):
            results = []
            for backend in ("triton", "reference"):
                y, *_ = ops.batchnorm_statistics(
                    x, zeros, var, None, None, eps, activation=activation, residual=other, backend=backend
                )
                results.append((y, torch.autograd.grad(y.sum(), x)[0]))
            for a, b in zip(*results, strict=True):
                assert_close(a, b, atol=0.0)


def test_vectors_of_any_dtype(kernel_device):
    x, rm, rv, w, b, res = inputs_of((3, 9, 4, 2), dtype=torch.bfloat16, residual=True, device=kernel_device)(0)
    given = (x, rm.double(), rv.half(), w.double(), b.float(), res.float())
    found, wanted = (value_and_gradients(lambda *a, n=n: call(*a, backend=n), given) for n in ("triton", "reference"))
    for a, b in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            assert_close(a, b, atol=2e-2 if b.dtype == torch.bfloat16 else 1e-4, rtol=1e-2)


def test_upstream_gradients_of_any_layout(kernel_device):
    made = inputs_of((3, 8, 4, 2), residual=True, layout="channels_last", device=kernel_device)(0)
    dy = random(3, 8, 4, 2, seed=9, device=kernel_device)
    wanted = torch.autograd.grad(call(*made, backend="reference")[0], [made[0], made[5]], dy)
    for layout in (*LAYOUTS, "expanded"):
        given, want = with_layout(dy, layout) if layout != "expanded" else dy[:, :, :1, :1].expand_as(dy), wanted
        if layout == "expanded":
            want = torch.autograd.grad(call(*made, backend="reference")[0], [made[0], made[5]], given.clone())
        found = torch.autograd.grad(call(*made)[0], [made[0], made[5]], given)
        for a, b in zip(found, want, strict=True):
            assert_close(a, b, atol=1e-5, name=layout)


def test_two_runs_give_the_same_bits(kernel_device):
    made = inputs_of((9, 24, 7, 5), dtype=torch.float16, layout="channels_last", residual=True, device=kernel_device)(0)
    first, second = (value_and_gradients(call, made) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_backend_that_cannot_serve_says_why(kernel_device):
    x, *rest = inputs_of((2, 3, 2, 2), dtype=torch.float64, device=kernel_device)(0)
    message = "'triton', asked for by backend, cannot serve {}: its kernels take float16, bfloat16 and float32"
    with pytest.raises(RuntimeError, match=message.format("batchnorm_statistics")):
        call(x, *rest)
    with pytest.raises(RuntimeError, match=message.format("channel_statistics")):
        ops.channel_statistics(x, backend="triton")


def test_second_derivative_is_an_error(kernel_device):
    made = inputs_of((2, 3, 2, 2), residual=True, device=kernel_device)(0)
    for results in (call(*made), ops.channel_statistics(made[0], backend="triton")):
        gradient = torch.autograd.grad(sum(r.square().sum() for r in results), made[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="fused backends have no second derivative; use backend='reference'"):
            gradient.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_operators_are_registered_soundly(kernel_device, layout):
    x, rm, rv, w, b, res = (
        t.detach() for t in inputs_of((2, 9, 3, 2), layout=layout, residual=True, device=kernel_device)(0)
    )
    _, mean, var, mask = OPS.batchnorm_statistics(x, rm, rv, w, b, 1e-3, "relu", True, res)
    both = torch.float32
    torch.library.opcheck(OPS.batchnorm_statistics.default, (x, rm, rv, w, b, 1e-3, "relu", True, res))
    torch.library.opcheck(OPS.batchnorm_statistics.default, (x, rm, rv, None, None, 1e-3, "relu6", False, None))
    given = (x, rm, rv, w, b, 1e-3)
    torch.library.opcheck(
        OPS.batchnorm_statistics_backward.default,
        (res, mean, var, *given, "relu", mean, mask, both, [True, True, True, True]),
    )
    torch.library.opcheck(
        OPS.batchnorm_statistics_backward.default,
        (None, mean, None, *given, "none", mean, None, None, [True, False, False, False]),
    )
    torch.library.opcheck(OPS.channel_statistics.default, (x,))
    torch.library.opcheck(OPS.channel_statistics_backward.default, (mean, var, x, mean, [True]))


@pytest.mark.parametrize(("activation", "residual"), [("relu", True), ("relu6", False), ("none", True)])
def test_kernels_compile_without_graph_breaks(kernel_device, activation, residual):
    shapes = [(2, 8, 4, 4), (3, 8, 5, 2), (5, 8, 6, 6)]
    calls = [inputs_of(shape, residual=residual, layout="channels_last", device=kernel_device)(0) for shape in shapes]
    assert_compiles(norm(activation), calls, atol=1e-6, rtol=1e-6)


def test_kernels_compile_with_inductor(kernel_device):
    calls = [inputs_of((n, 8, 4, 4), residual=True, layout="channels_last", device=kernel_device)(0) for n in (2, 3)]
    both = lambda *a: (*call(*a), *ops.channel_statistics(a[0] * 2, backend="triton"))  # noqa: E731
    assert_compiles(both, calls, backend="inductor", atol=1e-4, rtol=1e-5)


def test_kernels_under_function_transforms(kernel_device):
    x, rm, rv, w, b, res = inputs_of((2, 5, 3, 2), residual=True, device=kernel_device)(0)

    def total(x, res, backend="triton"):
        return sum(r.square().sum() for r in call(x, rm, rv, w, b, res, backend=backend))

    plain = [t.detach() for t in (x, res)]
    for argument in (0, 1):
        wanted = torch.func.grad(lambda *a: total(*a, backend="reference"), argnums=argument)(*plain)
        assert_close(torch.func.grad(total, argnums=argument)(*plain), wanted, atol=1e-3, rtol=1e-4)
    stacked = [torch.stack([t, 2 * t]) for t in plain]
    each = torch.func.vmap(torch.func.grad(total))(*stacked)
    for i in range(2):
        assert_close(each[i], torch.func.grad(total)(*(t[i] for t in stacked)), atol=1e-4, rtol=1e-5)
    means, _ = torch.func.vmap(lambda x: ops.channel_statistics(x, backend="triton"))(stacked[0])
    assert_close(means[1], 2 * means[0], atol=1e-5)


def test_autocast_changes_nothing(kernel_device):
    made = inputs_of((2, 5, 3, 2), residual=True, device=kernel_device)(0)
    wanted = call(*made)
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(call(*made), wanted, strict=True))


def test_no_mask_is_kept_where_no_gradient_can_come(kernel_device):
    made = inputs_of((2, 9, 3, 2), residual=True, device=kernel_device)(0)
    with torch.no_grad():
        assert call(*made)[0].grad_fn is None
    y = call(*made)[0]
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8]
    assert [t.numel() for t in kept] == [2 * 2 * 6]  # a bit an element, channels rounded up to a byte


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_dtype_and_layout(data):
    rank = data.draw(st.integers(2, 5))
    shape = (data.draw(st.integers(0, 9)), data.draw(st.integers(1, 70)))
    shape += tuple(data.draw(st.integers(1, 9)) for _ in range(rank - 2))
    layouts = [name for name in LAYOUTS if rank == 4 or name != "channels_last"]
    # Of an empty batch the reference keeps whatever strides x has.
    layout = data.draw(st.sampled_from(layouts if shape[0] else ["contiguous"]))
    residual = data.draw(st.booleans())
    made = inputs_of(
        shape,
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=layout,
        residual=residual,
        affine=data.draw(st.booleans()),
    )
    assert_backend_no_worse(norm(data.draw(st.sampled_from(ACTIVATIONS))), made)


RESNET = [(64, 64, 112, 112), (64, 128, 28, 28), (64, 512, 7, 7)]


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RESNET)
def test_on_the_maps_of_a_resnet(shape, dtype, residual):
    made = inputs_of(
        shape, dtype=dtype, layout="channels_last", residual=residual, device="cuda", wanted=("x", "residual")
    )
    assert_backend_no_worse(norm("relu"), made, draws=1)


@pytest.mark.gpu
def test_in_a_graph_with_changed_inputs():
    x, rm, rv, w, b, res = inputs_of((8, 64, 14, 14), layout="channels_last", residual=True, device="cuda")(0)
    dy, dm, dv = random(8, 64, 14, 14, seed=7, device="cuda"), *random(2, 64, seed=8, device="cuda")

    def step():
        results = call(x, rm, rv, w, b, res)
        return *results, *torch.autograd.grad(results, [x, res], [dy, dm, dv])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        with torch.no_grad():
            x.copy_(random(8, 64, 14, 14, seed=seed, device="cuda"))
            res.copy_(random(8, 64, 14, 14, seed=seed + 50, device="cuda"))
        graph.replay()
        for a, b_ in zip(captured, step(), strict=True):
            assert torch.equal(a, b_)


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_more_than_two_to_the_31_elements(layout):
    memory = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
    x = torch.empty(70, 64, 704, 704, dtype=torch.bfloat16, device="cuda", memory_format=memory)
    assert x.numel() > 2**31
    x.normal_().requires_grad_()
    zero, one = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y, mean, var = ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, activation="relu", backend="triton")
    dx = torch.autograd.grad((y, var), x, (torch.ones_like(y), torch.ones_like(var)))[0]
    end = x[-1].detach().float()
    assert_close(y[-1], end.relu(), atol=0.05)
    assert_close(dx[-1], (end > 0).float(), atol=1e-2)
    assert_close(mean, 0.0, atol=1e-3)
    assert_close(var, 1.0, atol=1e-3)


@pytest.mark.gpu
def test_memory_beyond_the_results():
    """Forward allocates y, the statistics, a bit an element, and partial results; backward the two gradients."""
    shape = (64, 64, 112, 112)
    made = inputs_of(shape, dtype=torch.bfloat16, layout="channels_last", residual=True, device="cuda", affine=False)(0)
    elements = made[0].numel()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call(*made)
    assert torch.cuda.max_memory_allocated() - before <= elements * (2 + 1 / 8) + 2**21
    upstream = [torch.ones_like(r) for r in results]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(results, [made[0], made[5]], upstream)
    assert torch.cuda.max_memory_allocated() - before <= elements * 4 + 2**21
