"""high_order_attention_mse against its formula in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import MAP_SHAPES

from .table import assert_matches, high_order
from .test_high_order_attention import MODES
from .test_high_order_attention import definition as attended


def make(shape=(2, 8, 4, 4), **options):
    """Return inputs; all except the target require a gradient."""
    return high_order(shape, dtype=torch.float64, target=True, **options)(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize(
    "shape", [s for s in MAP_SHAPES.values() if s[0]], ids=[n for n, s in MAP_SHAPES.items() if s[0]]
)
def test_value_and_gradients_match_formula(shape, order, mode):
    assert_matches(
        partial(ops.high_order_attention_mse, mode=mode),
        lambda x, proj, out, target: (attended(x, proj, out, mode)[0] - target).square().mean(),
        make(shape, order=order),
        atol=1e-13,
        gradient_atol=1e-11,
        rtol=1e-11,
    )


def test_dtypes_may_differ_and_empty_batch_is_nan():
    x, proj, out, target = (t.detach() for t in make((2, 8, 3, 3)))
    assert ops.high_order_attention_mse(x, proj, out, target.half()).dtype == torch.float64
    assert ops.high_order_attention_mse(x.half(), proj, out, target).dtype == torch.float32
    assert ops.high_order_attention_mse(x[:0], proj, out, target[:0]).isnan()
