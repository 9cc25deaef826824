"""max_pool2x2 and max_unpool2x2 against their definitions and torch's pooling and unpooling."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, random, with_layout

from .table import POOL_SHAPES as SHAPES
from .table import assert_matches, assert_same, pool_and_unpool, special_values, ties


def definition(x, relu):
    """Search each window; a larger value or NaN replaces the maximum."""
    n, c, h, w = x.shape
    y, code = x.new_empty(n, c, h // 2, w // 2), torch.empty(n, c, h // 2, w // 2, dtype=torch.uint8)
    for at in itertools.product(range(n), range(c), range(h // 2), range(w // 2)):
        sample, channel, i, j = at
        best, winner = None, 0
        for k in range(4):
            value = float(x[sample, channel, 2 * i + k // 2, 2 * j + k % 2])
            value = 0.0 if relu and value <= 0 else value
            if best is None or value > best or math.isnan(value):
                best, winner = value, k
        y[at], code[at] = best, 4 if relu and best == 0 else winner
    return y, code


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_codes_match_definition(shape, relu):
    for x in (random(*shape, dtype=torch.float64), ties(*shape), special_values()):
        y, code = ops.max_pool2x2(x, relu=relu)
        expected, expected_code = definition(x, relu)
        assert_same(y, expected)
        assert code.dtype == torch.uint8
        assert torch.equal(code, expected_code)
        assert not code.requires_grad


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pooling_and_unpooling_match_torch(shape, relu):
    """Pooling followed by unpooling has the values, positions and gradients of torch."""

    def torch_pool(x):
        return F.max_pool2d(F.relu(x) if relu else x, 2, return_indices=True)

    def torch_pair(x):
        y, index = torch_pool(x)
        return F.max_unpool2d(y * 3, index, 2, output_size=list(x.shape[2:]))

    x = ties(*shape)
    index, code = torch_pool(x)[1], ops.max_pool2x2(x, relu=relu)[1]
    width = shape[3]
    rows, columns = (torch.arange(n).mul(2) for n in code.shape[2:])
    place = (code & 3).long()
    assert torch.equal((rows[:, None] + place // 2) * width + columns + place % 2, index)
    assert_matches(partial(pool_and_unpool, relu=relu), torch_pair, [x], atol=0.0, rtol=0.0)


def test_unpooling_supports_all_sizes_that_pool_to_input():
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


def test_unpooling_reads_only_lowest_two_bits_of_code():
    y, code = random(2, 3, 2, 4), torch.randint(0, 4, (2, 3, 2, 4), dtype=torch.uint8)
    for high in (4, 252):
        assert torch.equal(ops.max_unpool2x2(y, code | high), ops.max_unpool2x2(y, code))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_once_and_twice(layout, relu):
    # Values differ from each other and from zero by more than gradcheck's step.
    values = torch.randperm(2 * 3 * 5 * 4, dtype=torch.float64).view(2, 3, 5, 4) - 59.5
    x = with_layout(values, layout).requires_grad_()
    code = ops.max_pool2x2(x)[1]
    y = random(2, 3, 2, 2, dtype=torch.float64, layout=layout, requires_grad=True)
    for function, leaf in (
        (lambda x: ops.max_pool2x2(x, relu=relu)[0], x),
        (lambda y: ops.max_unpool2x2(y, code, (5, 4)), y),
        (lambda x: pool_and_unpool(x, relu=relu) ** 2, x),
    ):
        assert gradcheck(function, leaf)
        assert gradgradcheck(function, leaf)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_keep_memory_format_of_input(layout):
    x = random(2, 6, 5, 4, layout=layout)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y, code = ops.max_pool2x2(x)
    out = ops.max_unpool2x2(with_layout(y, layout), code, (5, 4))
    for result in (y, code, out):
        assert result.is_contiguous(memory_format=form)
    assert torch.equal(y, ops.max_pool2x2(x.contiguous())[0])


def test_arguments_are_checked():
    x, y, code = random(2, 3, 4, 6), random(2, 3, 2, 3), torch.zeros(2, 3, 2, 3, dtype=torch.uint8)
    for small in (x[:, :, :1], x[:, :, :, :1]):
        with pytest.raises(ValueError, match=r"x must have H and W of at least 2, got shape \(2, 3, "):
            ops.max_pool2x2(small)
    with pytest.raises(TypeError, match=r"y must be of dtype float16, bfloat16, float32 or float64, got torch.uint8"):
        ops.max_unpool2x2(code, code)
    for error, message, wrong in (
        (TypeError, "code must be a tensor, got int", 0),
        (TypeError, "code must be of dtype uint8, got torch.int64", code.long()),
        (ValueError, r"code must have the shape of y, \(2, 3, 2, 3\), got \(2, 3, 2, 2\)", code[..., :2]),
        (ValueError, "code must be on the device of y, cpu, got meta", code.to("meta")),
    ):
        with pytest.raises(error, match=message):
            ops.max_unpool2x2(y, wrong)
    for size in ((3, 6), (4, 8), (6, 6), (4,), (2, 3, 4, 6)):
        with pytest.raises(ValueError, match=r"output_size must be \(4 or 5, 6 or 7\) for y of shape \(2, 3, 2, 3\)"):
            ops.max_unpool2x2(y, code, size)
