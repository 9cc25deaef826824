"""Comparisons and inputs of dfkd_fast.testing."""

from __future__ import annotations

import math

import pytest
import torch

from dfkd_fast.testing import (
    LAYOUTS,
    assert_close,
    assert_compiles,
    assert_no_worse,
    extreme,
    random,
    unit_roundoff,
    value_and_gradients,
    with_layout,
)


def test_assert_close_reports_worst_element():
    expected = torch.zeros(2, 3)
    got = expected.clone()
    got[0, 1], got[1, 2] = 1e-3, -2e-3
    assert_close(got, expected, atol=2.1e-3)
    with pytest.raises(
        AssertionError, match=r"dx: 2 of 6 elements differ; worst at \(1, 2\): -0.002.*, expected 0.0, off by 2.0"
    ):
        assert_close(got, expected, atol=1e-4, name="dx")
    assert_close(got, 0.0, atol=torch.tensor([[0, 1e-2, 0], [0, 0, 1e-2]]))
    with pytest.raises(AssertionError, match=r"1 of 6 elements differ; worst at \(0, 1\)"):
        assert_close(got, expected, atol=torch.tensor([[0, 1e-4, 0], [0, 0, 1e-2]]))


def test_assert_close_on_nan_and_infinity():
    expected = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert_close(expected.clone(), expected, atol=0.0, rtol=0.1)
    with pytest.raises(AssertionError, match=r"NaN only in actual at \(3,\)"):
        assert_close(torch.tensor([math.nan, math.inf, -math.inf, math.nan]), expected, atol=1.0)
    with pytest.raises(AssertionError, match=r"NaN only in expected at \(0,\)"):
        assert_close(torch.tensor([0.0, math.inf, -math.inf, 1.0]), expected, atol=1.0)
    with pytest.raises(AssertionError, match=r"1 of 4 elements differ; worst at \(1,\): -inf, expected inf"):
        assert_close(torch.tensor([math.nan, -math.inf, -math.inf, 1.0]), expected, atol=1.0, rtol=1.0)
    with pytest.raises(AssertionError, match=r"worst at \(2,\): 5.0, expected -inf"):
        assert_close(torch.tensor([math.nan, math.inf, 5.0, 1.0]), expected, atol=1.0, rtol=1.0)
    with pytest.raises(AssertionError, match=r"\(4,\) and 2 more"):
        assert_close(torch.full((7,), math.nan), 0.0, atol=1.0)


def test_assert_close_checks_shapes_and_ignores_dtypes():
    with pytest.raises(AssertionError, match=r"y: shape \(2,\), expected \(1, 2\)"):
        assert_close(torch.zeros(2), torch.zeros(1, 2), atol=1.0, name="y")
    assert_close(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64), atol=0.0)
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3), atol=0.0)


def test_assert_no_worse():
    truth = random(50, dtype=torch.float64)
    plain = truth.bfloat16()
    assert assert_no_worse(plain, than=plain, truth=truth) == 1
    assert assert_no_worse(truth + 1.5 * (plain - truth), than=plain, truth=truth) == pytest.approx(1.5)
    assert assert_no_worse(truth, than=truth, truth=truth) == 0
    with pytest.raises(
        AssertionError,
        match=r"y: root mean square error .* is more than 2.0 times that of plain PyTorch, .*; worst at \(",
    ):
        assert_no_worse(truth + 4 * (plain - truth), than=plain, truth=truth, name="y")
    one_off = truth.clone()
    one_off[7] += 3 * (plain - truth).abs().max()
    with pytest.raises(AssertionError, match=r"largest error .* worst at \(7,\)"):
        assert_no_worse(one_off, than=plain, truth=truth)
    with pytest.raises(AssertionError, match="error nan"):
        assert_no_worse(truth * math.nan, than=plain, truth=truth)
    assert assert_no_worse(truth + 1e-3, than=truth, truth=truth, floor=2e-3) == math.inf


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout):
    x = random(3, 4, 5, 2)
    assert torch.equal(with_layout(x, layout), x)
    assert torch.equal(random(3, 4, 5, 2, layout=layout), x)
    assert with_layout(x, layout).is_contiguous() == (layout in ("contiguous", "offset"))
    assert with_layout(x, layout).data_ptr() != x.data_ptr()
    assert with_layout(x, layout).storage_offset() == (layout == "offset")


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("channels_last", (3, 3), "'channels_last' needs four dimensions"),
        ("transposed", (3,), "'transposed' needs two dimensions"),
        ("zigzag", (3,), "layout must be one of"),
    ],
)
def test_with_layout_raises_if_layout_does_not_apply(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        with_layout(random(*shape), layout)


def test_random_is_equal_in_every_dtype():
    exact = random(100, dtype=torch.float64, shift=2.0, scale=0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_close(random(100, dtype=dtype, shift=2.0, scale=0.5), exact, atol=0.0, rtol=unit_roundoff(dtype))
    assert not torch.equal(random(100), random(100, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_values_are_finite_and_large(dtype):
    x = extreme(12, 7, dtype=dtype)
    assert x.isfinite().all()
    assert x.abs().max() > 1e3
    assert (x[5] == 0).all()


def test_value_and_gradients():
    a, b = random(3, requires_grad=True), random(3, seed=1)
    (value,), gradients = value_and_gradients(lambda a, b, c: a * b, (a, b, None))
    assert torch.equal(value, a.detach() * b)
    assert gradients[1:] == (None, None)
    assert torch.equal(gradients[0], b * random(3, seed=1, shift=0.5))
    assert a.grad is None


def test_assert_compiles_detects_differences_and_graph_breaks():
    assert_compiles(lambda x: x.sin(), [(random(3),), (random(4),)])

    def differs(x):
        return x * 2 if torch.compiler.is_compiling() else x * 3

    with pytest.raises(AssertionError, match="call 0, output 0"):
        assert_compiles(differs, [(random(3),)])

    def breaks(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        assert_compiles(breaks, [(random(3),)])
