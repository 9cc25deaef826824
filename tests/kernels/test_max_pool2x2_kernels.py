"""The Triton kernels of max_pool2x2 and max_unpool2x2: no arithmetic, so the reference's bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, assert_backend_no_worse, random, value_and_gradients, with_layout

from ..ops.table import DTYPES, POOL_SHAPES, assert_same, maps, pool_and_unpool, special_values, ties


def plain(gradient):
    """Contiguous, in strides that say so: autograd may hand the reference's backward either format."""
    return gradient.clone(memory_format=torch.contiguous_format)


def assert_bits(x, *, relu, grad_output, seed=2):
    """Values, codes, and the gradients of pooling and of unpooling, for random gradients that come in some layout."""
    results = []
    for backend in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        y, code = ops.max_pool2x2(leaf, relu=relu, backend=backend)
        g = random(*y.shape, dtype=x.dtype, layout=grad_output, device=x.device, seed=seed)
        (dx,) = torch.autograd.grad(y, leaf, g)
        leaf = y.detach().requires_grad_()
        out = ops.max_unpool2x2(leaf, code, x.shape[2:], backend=backend)
        g = random(*out.shape, dtype=x.dtype, layout=grad_output, device=x.device, seed=seed + 1)
        (dy,) = torch.autograd.grad(out, leaf, g)
        results.append((y, code, out, plain(dx), plain(dy)))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("shape", POOL_SHAPES.values(), ids=POOL_SHAPES)
def test_the_references_bits(kernel_device, shape):
    """Each layout of the input with each dtype, and with each layout of the gradients that come in."""
    for number, layout in enumerate(LAYOUTS):
        for turn, dtype in enumerate(DTYPES):
            x = with_layout(ties(*shape, dtype=dtype, device=kernel_device), layout)
            assert_bits(x, relu=(number + turn) % 2 == 0, grad_output=LAYOUTS[(number + turn) % 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_the_reference(kernel_device, dtype):
    """In float64 too, where the reference's bits would be wrong alike."""
    make = maps((2, 5, 5, 6), dtype=dtype, layout="channels_last", device=kernel_device)
    assert_backend_no_worse(lambda x, backend: ops.max_pool2x2(x, backend=backend)[0], make)
    assert_backend_no_worse(pool_and_unpool, make)


@pytest.mark.parametrize(
    ("layout", "dtype", "relu"),
    [
        (layout, dtype, relu)
        for (layout, relu), dtype in zip(
            itertools.product(("contiguous", "channels_last"), (False, True)), (*DTYPES, torch.float32), strict=True
        )
    ],
)
def test_special_values_are_treated_as_by_torch(kernel_device, layout, dtype, relu):
    x = with_layout(special_values(dtype).to(kernel_device), layout)
    y, code = ops.max_pool2x2(x, relu=relu, backend="triton")
    expected, expected_code = ops.max_pool2x2(x, relu=relu, backend="reference")
    assert_same(y, expected)
    assert_same(code, expected_code)
    got, expected_value = (
        value_and_gradients(lambda x, name=name: ops.max_pool2x2(x, relu=relu, backend=name)[0], [x])[1][0]
        for name in ("triton", "reference")
    )
    assert torch.equal(got, expected_value)
    assert_same(*(ops.max_unpool2x2(y, code, (3, 3), backend=name) for name in ("triton", "reference")))


def test_what_autograd_and_views_hand_over(kernel_device):
    """An upstream gradient of one number in every place, a slice of channels, a broadcast batch, a code laid out so."""
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
            assert_same(a, b)


def test_backward_keeps_a_byte_per_window(kernel_device):
    kept = []
    x = random(2, 8, 6, 4, device=kernel_device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, code = ops.max_pool2x2(x, relu=True, backend="triton")
        ops.max_unpool2x2(y, code, backend="triton")
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, code.shape)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64, 28, 28), (64, 32, 56, 56), (64, 16, 112, 112), (64, 16, 224, 224)])
def test_the_papers_maps(shape, dtype):
    x = ties(*shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    results = []
    for backend in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        y, code = ops.max_pool2x2(leaf, relu=True, backend=backend)
        out = ops.max_unpool2x2(y, code, shape[2:], backend=backend)
        results.append((y, code, out, torch.autograd.grad(out, leaf, x.flip(0))[0]))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


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
        expected, expected_code = ops.max_pool2x2(part, relu=True, backend="reference")
        half = slice(rows.start // 2, rows.stop // 2)
        assert torch.equal(y[:, :, half], expected)
        assert torch.equal(code[:, :, half], expected_code)
        expected_out = ops.max_unpool2x2(expected, expected_code, part.shape[2:], backend="reference")
        assert torch.equal(out[:, :, rows], expected_out)
        assert torch.equal(gradient[:, :, rows], torch.autograd.grad(expected_out, part, part.detach())[0])
