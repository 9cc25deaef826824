"""high_order_attention_mse against the formula in float64, its kernels against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import (
    LAYOUTS,
    MAP_SHAPES,
    assert_backend_no_worse,
    assert_close,
    assert_compiles,
    random,
    value_and_gradients,
    with_layout,
)

MODES = ("joint", "per_order")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def definition(x, proj, out, target, mode):
    """Factor by factor, order by order."""
    factors, first, logits = torch.einsum("fkc,nchw->fnkhw", proj, x), 0, []
    for r in range(1, out.shape[0] + 1):
        logits.append(torch.einsum("ck,nkhw->nchw", out[r - 1], factors[first : first + r].prod(0).clamp(min=0)))
        first += r
    if mode == "joint":
        gate = 1 / (1 + torch.exp(-sum(logits)))
    else:
        gate = sum(1 / (1 + torch.exp(-each)) for each in logits) / len(logits)
    return ((gate * x - target) ** 2).sum() / x.numel()


def drawn(shape, *, order=3, hidden=None, dtype=torch.float64, layout="contiguous", device="cpu", scale=1.0):
    """A function of a seed: x and weights, which require gradients, and a target, which does not."""
    channels = shape[1]
    hidden = hidden or max(1, channels // 4)
    fixed = {"dtype": dtype, "device": device}

    def draw(seed=0):
        return (
            random(*shape, layout=layout, seed=seed + 1, scale=scale, requires_grad=True, **fixed),
            random(
                order * (order + 1) // 2,
                hidden,
                channels,
                seed=seed + 2,
                scale=1.5 / channels**0.5,
                requires_grad=True,
                **fixed,
            ),
            random(order, channels, hidden, seed=seed + 3, scale=1.5 / hidden**0.5, requires_grad=True, **fixed),
            random(*shape, layout=layout, seed=seed + 4, **fixed),
        )

    return draw


def no_worse(mode, inputs, draws):
    function = lambda *a, backend: ops.high_order_attention_mse(*a, mode=mode, backend=backend)  # noqa: E731
    assert_backend_no_worse(function, inputs, draws=draws)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize(
    "shape", [s for s in MAP_SHAPES.values() if s[0]], ids=[n for n, s in MAP_SHAPES.items() if s[0]]
)
def test_value_and_gradients_follow_the_formula(shape, order, mode):
    inputs = drawn(shape, order=order)()
    values, gradients = value_and_gradients(lambda *a: ops.high_order_attention_mse(*a, mode=mode), inputs)
    wanted, wanted_gradients = value_and_gradients(lambda *a: definition(*a, mode), inputs)
    assert_close(values[0], wanted[0], atol=1e-13, rtol=1e-13)
    assert gradients[3] is None
    for got, want in zip(gradients[:3], wanted_gradients[:3], strict=True):
        assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_once_and_twice(mode):
    inputs = drawn((2, 4, 2, 2), hidden=2)()
    assert gradcheck(lambda *a: ops.high_order_attention_mse(*a, mode=mode), inputs)
    assert gradgradcheck(lambda *a: ops.high_order_attention_mse(*a, mode=mode), inputs)


def test_it_is_the_error_of_the_attended_features():
    x, proj, out, target = drawn((2, 9, 3, 4))()
    want = F.mse_loss(ops.high_order_attention(x, proj, out), target)
    assert_close(ops.high_order_attention_mse(x, proj, out, target), want, atol=1e-14)


def test_dtypes_and_the_empty_batch():
    x, proj, out, target = (t.detach() for t in drawn((2, 8, 3, 3))())
    assert ops.high_order_attention_mse(x, proj, out, target.half()).dtype == torch.float64
    assert ops.high_order_attention_mse(x.half(), proj, out, target).dtype == torch.float32
    assert ops.high_order_attention_mse(x[:0], proj, out, target[:0]).isnan()


def test_arguments_are_checked():
    x, proj, out, target = drawn((2, 8, 4, 4))()
    op = ops.high_order_attention_mse
    with pytest.raises(TypeError, match="target must be a tensor, got float"):
        op(x, proj, out, 1.0)
    with pytest.raises(ValueError, match=r"target must have shape \(N, C, H, W\) with N = 2, C = 8, H = 4, W = 4, got"):
        op(x, proj, out, target[:, :, :2])
    with pytest.raises(ValueError, match="target must be on the device of x, cpu, got meta"):
        op(x, proj, out, target.to("meta"))
    with pytest.raises(ValueError, match=r"target requires a gradient, .*: pass target.detach\(\)"):
        op(x, proj, out, target.requires_grad_())
    with pytest.raises(ValueError, match="out_weight must have shape"):
        op(x, proj, out[:, :7], target.detach())
    with pytest.raises(ValueError, match="mode must be 'joint' or 'per_order', got 'both'"):
        op(x, proj, out, target.detach(), mode="both")
    with pytest.raises(RuntimeError, match="'cuda', asked for by backend, has no implementation of high_order"):
        op(x, proj, out, target.detach(), backend="cuda")


# --- kernels


def in_tiles(channels):
    """As in the tests of high_order_attention's kernels: fewer channels than there are is the form that splits them."""
    from contextlib import ExitStack

    from dfkd_fast.kernels.config import Launch, forced

    stack = ExitStack()
    for kernel in ("high_order_attention", "high_order_attention_backward", "high_order_attention_weights"):
        stack.enter_context(forced(kernel, Launch(tile={"BLOCK_M": 16, "BLOCK_C": channels, "BLOCK_K": 16})))
    return stack


@pytest.mark.parametrize(("block", "mode"), [(16, "joint"), (32, "per_order"), (32, "joint"), (16, "per_order")])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "transposed"), (torch.bfloat16, "channels_last"), (torch.float16, "strided")],
)
def test_error_is_no_larger_than_the_references(kernel_device, dtype, layout, block, mode):
    with in_tiles(block):
        no_worse(mode, drawn((2, 20, 3, 3), dtype=dtype, layout=layout, device=kernel_device), draws=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 2)])
def test_few_elements(kernel_device, shape, dtype):
    with in_tiles(16):
        no_worse("joint", drawn(shape, order=2, dtype=dtype, device=kernel_device, scale=0.5), draws=32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_and_target_may_lie_differently(kernel_device, layout):
    x, proj, out, target = drawn((2, 6, 3, 4), dtype=torch.float32, layout="channels_last", device=kernel_device)()
    got, want = (
        value_and_gradients(lambda *a, t=t: ops.high_order_attention_mse(*a, t, backend="triton"), (x, proj, out))
        for t in (with_layout(target, layout), target)
    )
    assert_close(got[0][0], want[0][0], atol=1e-6)
    for a, b in zip(got[1], want[1], strict=True):
        assert_close(a, b, atol=1e-6)


@pytest.mark.parametrize("wanted", range(1, 8))
def test_each_subset_of_gradients(kernel_device, wanted):
    inputs = drawn((2, 20, 2, 3), dtype=torch.bfloat16, device=kernel_device)()
    function = lambda *a: ops.high_order_attention_mse(*a, backend="triton")  # noqa: E731
    with in_tiles(16 if wanted % 2 else 32):
        _, want = value_and_gradients(function, inputs)
        some = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
        _, got = value_and_gradients(function, some)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b) if wanted >> i & 1 else a is None


def test_two_runs_give_the_same_bits_and_an_empty_batch_no_number(kernel_device):
    inputs = drawn((2, 20, 3, 3), dtype=torch.bfloat16, device=kernel_device)()
    function = lambda *a: ops.high_order_attention_mse(*a, backend="triton")  # noqa: E731
    with in_tiles(16):
        first, second = (value_and_gradients(function, inputs) for _ in range(2))
    for a, b in zip((*first[0], *first[1][:3]), (*second[0], *second[1][:3]), strict=True):
        assert torch.equal(a, b)
    (value,), gradients = value_and_gradients(
        function, drawn((0, 4, 2, 2), dtype=torch.float32, device=kernel_device)()
    )
    assert value.isnan()
    assert all((g == 0).all() for g in gradients[1:3])


def test_what_the_kernels_do_not_do(kernel_device):
    op = ops.high_order_attention_mse
    inputs = drawn((1, 4, 2, 2), dtype=torch.float32, device=kernel_device)()
    (dx,) = torch.autograd.grad(op(*inputs, backend="triton"), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="high_order_attention_mse: fused backends have no second derivative"):
        dx.sum().backward()
    with pytest.raises(
        RuntimeError, match="cannot serve high_order_attention_mse: its kernels go up to order 4, not 5"
    ):
        op(*drawn((1, 4, 2, 2), order=5, dtype=torch.float32, device=kernel_device)(), backend="triton")
    with pytest.raises(RuntimeError, match=r"cannot serve high_order_attention_mse: its kernels take .*, not float64"):
        op(*inputs[:3], inputs[3].double(), backend="triton")


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_operators_pass_opcheck(kernel_device, layout):
    inputs = [
        t.detach() for t in drawn((2, 5, 2, 3), order=2, dtype=torch.float32, layout=layout, device=kernel_device)()
    ]
    upstream = torch.tensor(0.5, device=kernel_device)
    library = torch.ops.dfkd_fast
    torch.library.opcheck(library.high_order_attention_mse.default, (*inputs, "joint"))
    torch.library.opcheck(
        library.high_order_attention_mse_backward.default, (upstream, *inputs, "per_order", [True, False, True])
    )


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", True), ("inductor", None)])
def test_compiles_without_graph_breaks(kernel_device, backend, dynamic):
    shapes = [(2, 8, 4, 4), (3, 8, 5, 2)]
    calls = [drawn(shape, dtype=torch.float32, layout="channels_last", device=kernel_device)() for shape in shapes]
    function = lambda *a: ops.high_order_attention_mse(*a, backend="triton")  # noqa: E731
    assert_compiles(function, calls, backend=backend, dynamic=dynamic, atol=1e-5, rtol=1e-5)


def test_function_transforms_and_autocast(kernel_device):
    x, proj, out, target = (t.detach() for t in drawn((2, 4, 2, 2), dtype=torch.float32, device=kernel_device)())
    op = ops.high_order_attention_mse
    got, want = (
        torch.func.grad(lambda w, b=b: op(x, w, out, target, backend=b))(proj) for b in ("triton", "reference")
    )
    assert_close(got, want, atol=1e-5)
    each = torch.func.vmap(lambda a, t: op(a[None], proj, out, t[None], backend="triton"))(x, target)
    assert_close(each.mean(), op(x, proj, out, target), atol=1e-5)
    with torch.autocast(kernel_device, torch.bfloat16):
        rounded = op(x, proj, out, target, backend="triton")
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - each.mean()).abs() < 0.05


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(kernel_device, data):
    # One number a draw has an error by luck where few elements go into it.
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
        no_worse(data.draw(st.sampled_from(MODES)), inputs, draws=8)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7)])
def test_shapes_of_the_paper(shape, dtype, mode):
    no_worse(mode, drawn(shape, dtype=dtype, layout="channels_last", device="cuda"), draws=2)


@pytest.mark.gpu
def test_the_attended_features_are_never_written():
    inputs = drawn((64, 64, 56, 56), dtype=torch.bfloat16, layout="channels_last", device="cuda")()
    size = inputs[0].numel() * inputs[0].element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    error = ops.high_order_attention_mse(*inputs, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < size // 8
    torch.autograd.grad(error, inputs[0])
    assert torch.cuda.max_memory_allocated() - before < size + size // 8


@pytest.mark.gpu
def test_a_graph_replays_with_other_inputs():
    inputs = drawn((8, 64, 14, 14), dtype=torch.bfloat16, layout="channels_last", device="cuda")()

    def step():
        error = ops.high_order_attention_mse(*inputs, backend="triton")
        return error, *torch.autograd.grad(error, inputs[:3])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, fresh in zip(inputs, drawn((8, 64, 14, 14), dtype=torch.bfloat16, device="cuda")(10), strict=True):
            leaf.copy_(fresh)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
