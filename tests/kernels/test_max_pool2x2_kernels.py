"""Compares the Triton kernels of max_pool2x2 and max_unpool2x2 bit by bit with the reference: they only move values."""

from __future__ import annotations

import itertools

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, assert_backend_no_worse, random, value_and_gradients, with_layout

from ..ops.table import DTYPES, POOL_SHAPES, assert_same, maps, pool_and_unpool, special_values, ties


def assert_same_bits(run):
    """``run(backend)`` returns equal tensors for both backends."""
    for a, b in zip(run("triton"), run("reference"), strict=True):
        assert_same(a, b)


def contiguous(gradient):
    """A copy with the strides of a contiguous tensor: autograd may pass the reference's backward either format."""
    return gradient.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("shape", POOL_SHAPES.values(), ids=POOL_SHAPES)
def test_matches_reference_bits(kernel_device, shape):
    """Values, codes and both gradients, for each dtype with each layout of the input and of the gradients."""
    for (i, layout), (j, dtype) in itertools.product(enumerate(LAYOUTS), enumerate(DTYPES)):
        x = with_layout(ties(*shape, dtype=dtype, device=kernel_device), layout)

        def run(backend, x=x, relu=(i + j) % 2 == 0, layout=LAYOUTS[(i + j) % 3]):
            leaf = x.detach().requires_grad_()
            y, code = ops.max_pool2x2(leaf, relu=relu, backend=backend)
            options = {"dtype": x.dtype, "layout": layout, "device": x.device}
            (dx,) = torch.autograd.grad(y, leaf, random(*y.shape, seed=2, **options))
            leaf = y.detach().requires_grad_()
            out = ops.max_unpool2x2(leaf, code, x.shape[2:], backend=backend)
            (dy,) = torch.autograd.grad(out, leaf, random(*out.shape, seed=3, **options))
            return y, code, out, contiguous(dx), contiguous(dy)

        assert_same_bits(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_reference(kernel_device, dtype):
    make = maps((2, 5, 5, 6), dtype=dtype, layout="channels_last", device=kernel_device)
    assert_backend_no_worse(lambda x, backend: ops.max_pool2x2(x, backend=backend)[0], make)
    assert_backend_no_worse(pool_and_unpool, make)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_special_values_match_reference(kernel_device, layout, dtype, relu):
    x = with_layout(special_values(dtype).to(kernel_device), layout)
    _, code = ops.max_pool2x2(x, relu=relu, backend="reference")

    def run(backend):
        y, found = ops.max_pool2x2(x, relu=relu, backend=backend)
        return y, found, ops.max_unpool2x2(y, code, (3, 3), backend=backend)

    assert_same_bits(run)
    got, expected = (
        value_and_gradients(lambda x, name=name: ops.max_pool2x2(x, relu=relu, backend=name)[0], [x])[1][0]
        for name in ("triton", "reference")
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("view", ["contiguous slice", "channels-last slice", "expanded batch"])
def test_accepts_views_and_expanded_gradients(kernel_device, view):
    x = random(2, 8, 5, 4, device=kernel_device)
    x = x.to(memory_format=torch.channels_last) if view == "channels-last slice" else x
    x = x[:1].expand(3, -1, -1, -1) if view == "expanded batch" else x[:, 2:5]

    def run(backend):
        leaf = x.detach().requires_grad_()
        y, code = ops.max_pool2x2(leaf, relu=True, backend=backend)
        out = ops.max_unpool2x2(y, with_layout(code, "transposed"), (5, 4), backend=backend)
        return y, code, out, contiguous(*torch.autograd.grad(out.sum(), leaf))

    assert_same_bits(run)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64, 28, 28), (64, 32, 56, 56), (64, 16, 112, 112), (64, 16, 224, 224)])
def test_shapes_of_the_paper(shape, dtype):
    x = ties(*shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)

    def run(backend):
        leaf = x.detach().requires_grad_()
        y, code = ops.max_pool2x2(leaf, relu=True, backend=backend)
        out = ops.max_unpool2x2(y, code, shape[2:], backend=backend)
        return y, code, out, *torch.autograd.grad(out, leaf, x.flip(0))

    assert_same_bits(run)


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(layout):
    shape = (2, 16, 8_193, 8_195)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=form).normal_().requires_grad_()
    assert x.numel() > 2**31
    y, code = ops.max_pool2x2(x, relu=True, backend="triton")
    out = ops.max_unpool2x2(y, code, shape[2:], backend="triton")
    (gradient,) = torch.autograd.grad(out, x, x.detach())
    for rows in (slice(0, 64), slice(4_000, 4_064), slice(8_128, 8_193)):
        part = x.detach()[:, :, rows].clone(memory_format=form).requires_grad_()
        expected, expected_code = ops.max_pool2x2(part, relu=True, backend="reference")
        half = slice(rows.start // 2, rows.stop // 2)
        assert torch.equal(y[:, :, half], expected)
        assert torch.equal(code[:, :, half], expected_code)
        expected_out = ops.max_unpool2x2(expected, expected_code, part.shape[2:], backend="reference")
        assert torch.equal(out[:, :, rows], expected_out)
        assert torch.equal(gradient[:, :, rows], torch.autograd.grad(expected_out, part, part.detach())[0])
