"""Tools for testing kernels: difficult inputs, and comparisons that report where results differ.

::

    from dfkd_fast import ops
    from dfkd_fast.testing import LAYOUTS, assert_close, assert_no_worse, random, value_and_gradients

    x = random(2, 7, 5, 3, dtype=torch.bfloat16, layout="strided")
    ...
    assert_no_worse(y, than=pytorch_bfloat16, truth=pytorch_float64, name="y")
"""

from dfkd_fast.testing.compare import assert_close, assert_no_worse, describe_difference, unit_roundoff
from dfkd_fast.testing.differentiate import assert_backend_no_worse, assert_compiles, value_and_gradients
from dfkd_fast.testing.inputs import LAYOUTS, MAP_SHAPES, extreme, random, with_layout

__all__ = [
    "LAYOUTS",
    "MAP_SHAPES",
    "assert_backend_no_worse",
    "assert_close",
    "assert_compiles",
    "assert_no_worse",
    "describe_difference",
    "extreme",
    "random",
    "unit_roundoff",
    "value_and_gradients",
    "with_layout",
]
