"""spatial_attention's kernels against the reference; what the op itself is, is in test_spatial_attention.py."""

from __future__ import annotations

import math

import pytest
import torch

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

from ..ops.table import DTYPES, attention, near, spatial_tiles

FORMS = ("spatial", "spatial_mean1", "channel")


def no_worse(make, form, shape, *, scale=None, draws=4, **more):
    """out, what of it is added to the features, and the gradients."""
    scale = near(form, shape) if scale is None else scale

    def op(f, *others, backend):
        y = ops.spatial_attention(f, *others, scale=scale, form=form, backend=backend)
        return y, y.to(torch.promote_types(y.dtype, torch.float32)) - f

    assert_backend_no_worse(op, make, draws=draws, **more)


SINGLE, BRAIN, HALF = DTYPES
# Each shape, dtype and layout in each form.
CASES = {
    **{
        f"{name}, {form}": (
            shape,
            form,
            {"dtype": DTYPES[(i + j) % 3], "layout": LAYOUTS[(i + j) % 2], "hidden": 1 + i % 3},
        )
        for i, (name, shape) in enumerate(MAP_SHAPES.items())
        for j, form in enumerate(FORMS)
    },
    **{
        f"{layout}, {form}": ((2, 7, 5, 3), form, {"dtype": BRAIN, "layout": layout})
        for layout in LAYOUTS
        for form in ("spatial", "channel")
    },
    **{
        f"{dtype}, {form}": ((2, 19, 5, 4), form, {"dtype": dtype, "layout": "channels_last"})
        for dtype, form in zip((SINGLE, BRAIN, HALF, HALF), (*FORMS, "spatial"), strict=True)
    },
}
# Chunks to merge, channels in turn, narrow maps in two blocks, tiles that are not full.
IN_TILES = {
    "channels in turn": ("spatial", {"dtype": SINGLE, "hidden": 20}, {}),
    "channels in one tile": ("spatial", {"dtype": BRAIN, "hidden": 7}, {"BLOCK_C": 32}),
    "narrow maps in two blocks": ("spatial", {"dtype": BRAIN, "hidden": 20}, {"BLOCK_C": 32}),
    "softmax over channels in turn": ("channel", {"dtype": BRAIN, "hidden": 20}, {}),
    "softmax over channels in one tile": ("channel", {"dtype": SINGLE, "hidden": 7}, {"BLOCK_C": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(kernel_device, case):
    shape, form, drawn = CASES[case]
    draws = 2 if math.prod(shape) > 100 else 4
    no_worse(attention(shape, device=kernel_device, **drawn), form, shape, draws=draws)


@pytest.mark.parametrize("case", IN_TILES)
def test_no_worse_in_more_than_one_tile(kernel_device, case):
    form, drawn, changed = IN_TILES[case]
    shape = (2, 19, 5, 4)
    with spatial_tiles(**changed):
        no_worse(attention(shape, layout="channels_last", device=kernel_device, **drawn), form, shape, draws=2)


@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_gradients_weights_and_biases_of_any_layout(kernel_device, form):
    shape = (2, 7, 5, 3)
    for layout in ("contiguous", "channels_last"):
        inputs = attention(shape, layout=layout, device=kernel_device)(0)
        inputs[2:] = with_layout(inputs[2], "transposed"), with_layout(inputs[3], "strided")
        for other in LAYOUTS:
            gradients = []
            for backend in ("triton", "reference"):
                leaves = [t.detach().requires_grad_() for t in inputs]
                y = ops.spatial_attention(*leaves, scale=3.0, form=form, backend=backend)
                g = random(*shape, layout=other, device=kernel_device, seed=9)
                gradients.append(torch.autograd.grad(y, leaves, g))
            for got, expected in zip(*gradients, strict=True):
                assert_close(got, expected, atol=2e-5, rtol=2e-5)
        leaf = inputs[0].detach().requires_grad_()
        ops.spatial_attention(leaf, *inputs[1:], form=form, backend="triton").sum().backward()  # no strides at all
        assert leaf.grad.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_groups_of_samples_change_nothing(kernel_device):
    """Maps of a megabyte a sample, and groups of that size."""
    inputs = attention((2, 256, 32, 32), dtype=torch.bfloat16, layout="channels_last", device=kernel_device)(0)
    op = lambda *a: ops.spatial_attention(*a, scale=1000.0, backend="triton")  # noqa: E731
    results = []
    for megabytes in (0, 1):
        with spatial_tiles(BLOCK_M=512, BLOCK_C=256, TILES=2, MEGABYTES=megabytes):
            results.append(value_and_gradients(op, inputs)[1])
    # Groups differ in how D is summed, and the sums of programs in their number: a last digit of bfloat16 may turn.
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("form", FORMS)
def test_kernels_on_extreme_logits(kernel_device, form):
    for factor in (1e6, 1e30):
        f, h, w, b = attention((2, 4, 5, 3), device=kernel_device)(0)
        op = lambda *a: ops.spatial_attention(*a, form=form, backend="triton")  # noqa: E731
        values, gradients = value_and_gradients(op, (f, factor * h, w, b))
        assert all(t.isfinite().all() for t in (*values, *gradients))
        expected = ops.spatial_attention(*(t.double() for t in (f, factor * h, w, b)), form=form)
        assert_close(values[0], expected, atol=1e-5 if factor < 1e7 else 0.05 * 4, rtol=1e-6)
    h[0, 0, 0, 0] = torch.nan
    y = ops.spatial_attention(f, h, w, b, form=form, backend="triton")
    assert torch.equal(y.isnan(), ops.spatial_attention(f, h, w, b, form=form, backend="reference").isnan())


@pytest.mark.parametrize("form", FORMS)
def test_kernels_under_autocast(kernel_device, form):
    shape = (2, 8, 5, 4)

    def op(*inputs, backend):
        with torch.autocast(kernel_device, dtype=torch.bfloat16):
            return ops.spatial_attention(*inputs, scale=near(form, shape), form=form, backend=backend)

    assert_backend_no_worse(op, attention(shape, device=kernel_device))
    narrow = attention(shape, dtype=torch.bfloat16, device=kernel_device)
    wide = attention(shape, device=kernel_device)
    assert_backend_no_worse(op, lambda seed: (*narrow(seed)[:2], *wide(seed)[2:]))  # as a network's maps and weights
    no_worse(lambda seed: (wide(seed)[0], *narrow(seed)[1:]), form, shape)
    no_worse(lambda seed: (narrow(seed)[0], *wide(seed)[1:]), form, shape)


def test_kernels_keep_inputs_and_two_numbers_a_channel(kernel_device):
    for form in FORMS:
        kept = []
        inputs = attention((2, 8, 6, 4), device=kernel_device, needs_grad=(0, 1, 2))(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ops.spatial_attention(*inputs, form=form, backend="triton")
        assert [t.numel() for t in kept] == [t.numel() for t in inputs] + [0 if form == "channel" else 2 * 2 * 8]


def test_kernels_compile_under_autocast(kernel_device):
    def op(*inputs):
        with torch.autocast(kernel_device, dtype=torch.bfloat16):
            return ops.spatial_attention(*inputs, scale=2.0, backend="triton")

    assert_compiles(op, [attention((2, 8, 4, 4), device=kernel_device)(0)], atol=1e-6, rtol=1e-6)


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
def test_backward_takes_little_memory_beyond_gradients():
    f = torch.randn((64, 64, 112, 112), device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    inputs = [f, f[:, :8].contiguous(memory_format=torch.channels_last), f[0, :, 0, :8].contiguous()]
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = ops.spatial_attention(*inputs, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(y, inputs, f)
    assert torch.cuda.max_memory_allocated() - before <= sum(t.nbytes for t in gradients) + 2**24


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
