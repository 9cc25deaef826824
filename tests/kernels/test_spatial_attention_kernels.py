"""Compares the Triton kernels of spatial_attention with the float64 reference."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

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
FLOAT32, BFLOAT16, _ = DTYPES
# Shape, form, arguments of `attention`, and a tiling. The cases cover each shape, dtype and layout in each form.
CASES = {
    **{
        f"{name}, {form}": (
            *(shape, form),
            {"dtype": DTYPES[(i + j) % 3], "layout": LAYOUTS[(i + j) % 2], "hidden": 1 + i % 3},
            nullcontext,
        )
        for i, (name, shape) in enumerate(MAP_SHAPES.items())
        for j, form in enumerate(FORMS)
    },
    **{
        f"{layout}, {form}": ((2, 19, 5, 4), form, {"dtype": DTYPES[(i + j) % 3], "layout": layout}, nullcontext)
        for i, layout in enumerate(LAYOUTS)
        for j, form in enumerate(FORMS)
    },
    # These cases have several chunks to merge, partly filled tiles, and hidden maps in one block or in two.
    **{
        name: (
            *((2, 19, 5, 4), form, {"dtype": dtype, "hidden": hidden, "layout": "channels_last"}),
            partial(spatial_tiles, **({"BLOCK_C": 32} if "in one tile" in name else {})),
        )
        for name, form, dtype, hidden in (
            ("channels in several tiles", "spatial", FLOAT32, 20),
            ("channels in one tile", "spatial", BFLOAT16, 7),
            ("channels in one tile, hidden in two", "spatial", BFLOAT16, 20),
            ("softmax over channels in several tiles", "channel", BFLOAT16, 20),
            ("softmax over channels in one tile", "channel", FLOAT32, 7),
        )
    },
}


def check(make, form, shape, *, draws=4):
    """Checks the output, what it adds to the features, and the gradients; ``near`` makes both parts similarly large."""

    def op(f, *others, backend):
        y = ops.spatial_attention(f, *others, scale=near(form, shape), form=form, backend=backend)
        return y, y.to(torch.promote_types(y.dtype, torch.float32)) - f

    assert_backend_no_worse(op, make, draws=draws)


@pytest.mark.parametrize("case", CASES)
def test_matches_float64_reference(kernel_device, case):
    shape, form, drawn, tiling = CASES[case]
    with tiling():
        check(attention(shape, device=kernel_device, **drawn), form, shape, draws=2 if math.prod(shape) > 100 else 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_grad_output_and_parameters_in_any_layout(kernel_device, form, layout):
    shape = (2, 7, 5, 3)
    inputs = attention(shape, layout=layout, device=kernel_device)(0)
    inputs[2:] = with_layout(inputs[2], "transposed"), with_layout(inputs[3], "strided")
    inputs = [t.detach().requires_grad_() for t in inputs]
    results = {
        backend: ops.spatial_attention(*inputs, scale=3.0, form=form, backend=backend)
        for backend in ("triton", "reference")
    }
    for other in LAYOUTS:
        g = random(*shape, layout=other, device=kernel_device, seed=9)
        found, expected = (torch.autograd.grad(y, inputs, g, retain_graph=True) for y in results.values())
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, atol=2e-5, rtol=2e-5, name=other)
    (df,) = torch.autograd.grad(results["triton"].sum(), inputs[0])  # grad_output has zero strides
    assert df.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_groups_of_samples_do_not_change_gradients(kernel_device):
    """The features and grad_output of a sample take one megabyte, so each group has one sample."""
    inputs = attention((2, 256, 32, 32), dtype=torch.bfloat16, layout="channels_last", device=kernel_device)(0)
    op = partial(ops.spatial_attention, scale=1000.0, backend="triton")
    results = []
    for megabytes in (0, 1):
        with spatial_tiles(BLOCK_M=512, BLOCK_C=256, TILES=2, MEGABYTES=megabytes):
            results.append(value_and_gradients(op, inputs)[1])
    # Groups change the order of the sums, so the last bit of a bfloat16 result may differ.
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_logits(kernel_device, form):
    op = partial(ops.spatial_attention, form=form)
    f, h, w, b = attention((2, 4, 5, 3), device=kernel_device)(0)
    for factor in (1e6, 1e30):
        values, gradients = value_and_gradients(partial(op, backend="triton"), (f, factor * h, w, b))
        assert all(t.isfinite().all() for t in (*values, *gradients))
        expected = op(*(t.double() for t in (f, factor * h, w, b)))
        # At 1e30 a logit's rounding error is far above 1: a softmax weight may be wrong by 1, which changes 0.05 |f|.
        assert_close(values[0], expected, atol=1e-5 if factor < 1e7 else 0.05 * 4, rtol=1e-6)
    h[0, 0, 0, 0] = torch.nan
    found, expected = (op(f, h, w, b, backend=backend).isnan() for backend in ("triton", "reference"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("descending", [False, True])
def test_ordered_logits(kernel_device, descending):
    """In ascending order, each tile of a chunk has a new maximum; in descending order, only the first has it."""

    def inputs(seed):
        f, h, *parameters = attention((2, 7, 9, 7), device=kernel_device)(seed)
        return f, (30 * h.flatten(2).sort(descending=descending).values).view_as(h), *parameters

    with spatial_tiles(TILES=4):
        check(inputs, "spatial", (2, 7, 9, 7), draws=2)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(kernel_device, form):
    shape = (2, 8, 5, 4)

    def op(*inputs, backend):
        with torch.autocast(kernel_device, dtype=torch.bfloat16):
            return ops.spatial_attention(*inputs, scale=near(form, shape), form=form, backend=backend)

    half = attention(shape, dtype=torch.bfloat16, device=kernel_device)
    single = attention(shape, device=kernel_device)
    assert_backend_no_worse(op, single)
    assert_backend_no_worse(op, lambda seed: (*half(seed)[:2], *single(seed)[2:]))  # a network's maps and weights
    check(lambda seed: (single(seed)[0], *half(seed)[1:]), form, shape)
    check(lambda seed: (half(seed)[0], *single(seed)[1:]), form, shape)


def test_compiles_under_autocast(kernel_device):
    def op(*inputs):
        with torch.autocast(kernel_device, dtype=torch.bfloat16):
            return ops.spatial_attention(*inputs, scale=2.0, backend="triton")

    assert_compiles(op, [attention((2, 8, 4, 4), device=kernel_device)(0)], atol=1e-6, rtol=1e-6)


PAPER = ((64, 256, 28, 28), (64, 128, 56, 56), (64, 64, 112, 112), (64, 64, 224, 224))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", PAPER, ids=["x".join(map(str, shape)) for shape in PAPER])
def test_shapes_of_the_paper(shape, form):
    n, c, h, w = shape
    fixed = {"device": "cuda", "dtype": torch.bfloat16}
    f = torch.randn(shape, **fixed).to(memory_format=torch.channels_last)
    hidden = torch.randn((n, c // 8, h, w), **fixed).to(memory_format=torch.channels_last)
    weight, bias = torch.randn((c, c // 8), **fixed) * (c // 8) ** -0.5, torch.randn(c, **fixed)
    g = torch.randn_like(f)
    results = []
    for backend, exact in (("triton", False), ("reference", False), ("reference", True)):
        leaves = [(t.float() if exact else t).detach().requires_grad_() for t in (f, hidden, weight, bias)]
        y = ops.spatial_attention(*leaves, scale=near(form, shape), form=form, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))])
        del y, leaves
    for name, found, plain, truth in zip(("out", "f", "hidden", "weight", "bias"), *results, strict=True):
        floor = torch.finfo(found.dtype).eps * float(truth.abs().max())
        assert_no_worse(found, than=plain, truth=truth, floor=floor, name=name)


@pytest.mark.gpu
def test_backward_allocates_little_beyond_the_gradients():
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
def test_more_than_two_to_the_31_elements(shape, form):
    n, c, h, w = shape
    assert n * c * h * w > 2**31
    f = torch.randn((n, h, w, c), device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    hidden = torch.randn((n, h, w, 2), device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight = torch.randn((c, 2), device="cuda", dtype=torch.bfloat16)
    scale = near(form, shape)
    results = []
    for f_part, hidden_part in ((f, hidden), (f[-1:], hidden[-1:])):
        leaves = [t.detach().requires_grad_() for t in (f_part, hidden_part)]
        y = ops.spatial_attention(*leaves, weight, scale=scale, form=form, backend="triton")
        results.append([y.detach()[-1:].clone(), *(t[-1:].clone() for t in torch.autograd.grad(y, leaves, f_part))])
        del y, leaves
    for last, expected in zip(*results, strict=True):
        assert_close(last, expected, atol=0.01 * float(expected.abs().max()))
