"""The float32 kernels with the arithmetic of the GPU: no worse than the reference although instructions approximate.

Triton's interpreter computes exponentials and quotients with NumPy, which rounds almost correctly; compiled kernels use
the instructions of PTX that :func:`approximate` describes. On a GPU the same cases run compiled, and the ratio of the
kernel's error to the reference's is recorded.
"""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse

from ..ops.table import attention, call_norm, high_order, logits, norm, stored, vectors

pytest.importorskip("triton")

import triton
import triton.language as tl

from dfkd_fast.kernels import common


def _spread(*operands):
    """A fixed number in [-1, 1] for each combination of operands' bits."""
    bits = np.zeros((), np.uint32)
    for operand in operands:
        bits = (bits ^ np.asarray(operand, np.float32).view(np.uint32)) * np.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x85EBCA77)
        bits = bits ^ (bits >> np.uint32(13))
    return bits / 2.0**31 - 1.0


def _flush(x):
    """Zero in place of denormal numbers, as instructions with ``.ftz`` read and write them."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _approximate(exact, bound, *operands):
    """Float32 values within ``bound`` of the exact ones, which are float64; half an ulp of it is the rounding."""
    error = np.maximum(bound - _ulps(exact, 0.5), 0.0) * _spread(*operands)
    return np.where(np.isfinite(error), exact + error, exact).astype(np.float32)


def _ulps(exact, count):
    return count * np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def _ex2(x):
    exact = np.exp2(x.astype(np.float64))
    return np.where(x == 0, np.float32(1), _approximate(exact, exact * 2.0**-22.5, x))


def _log(x, function):
    exact = function(x.astype(np.float64))
    return _approximate(exact, _ulps(exact, 1), x)


def _div(x, y):
    exact = x.astype(np.float64) / y.astype(np.float64)
    return _approximate(exact, _ulps(exact, 2), x, y)


def _sqrt(x, bound, power):
    exact = _flush(x).astype(np.float64) ** power
    return _approximate(exact, exact * bound, x)


def _float32_only(approximate, exact):
    """The approximation for float32; other types as the interpreter computes them."""

    def function(*arrays):
        with np.errstate(all="ignore"):
            return (approximate if all(a.dtype == np.float32 for a in arrays) else exact)(*arrays)

    return function


def approximate(monkeypatch):
    """Let the interpreter compute float32 functions with the errors of the instructions Triton 3.6 compiles for sm_90.

    ===========  ===================================  ======================================================
    Triton       PTX                                  largest error
    ===========  ===================================  ======================================================
    exp          mul.f32 by log2(e), ex2.approx.f32   2^-22.5 relative, and the rounding of the product
    exp2         ex2.approx.ftz.f32                   2^-22.5 relative, denormals are zero
    log, log2    libdevice's logf and log2f           1 ulp
    a / b        div.full.f32                         2 ulp
    sqrt, rsqrt  sqrt.approx.ftz, rsqrt.approx.ftz    2^-23 and 2^-22.9 relative
    ===========  ===================================  ======================================================

    ``div_rn`` and ``sqrt_rn`` are rounded correctly, on the card as in NumPy. Errors depend on the operands' bits and
    take all values within the bounds, which those of the hardware do not: a kernel that passes here has some to spare.

    Source: NVIDIA's PTX ISA, floating point instructions, and CUDA C++ Programming Guide, mathematical functions.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    log2e = np.float32(np.log2(np.e))
    functions = {
        "create_exp": _float32_only(lambda x: _ex2(x * log2e), np.exp),
        "create_exp2": _float32_only(lambda x: _flush(_ex2(_flush(x))), np.exp2),
        "create_log": _float32_only(functools.partial(_log, function=np.log), np.log),
        "create_log2": _float32_only(functools.partial(_log, function=np.log2), np.log2),
        "create_fdiv": _float32_only(_div, np.divide),
        "create_sqrt": _float32_only(functools.partial(_sqrt, bound=2.0**-23, power=0.5), np.sqrt),
        "create_rsqrt": _float32_only(functools.partial(_sqrt, bound=2.0**-22.9, power=-0.5), lambda x: 1 / np.sqrt(x)),
    }
    for name, function in functions.items():

        def build(self, *handles, function=function):
            return TensorHandle(function(*(handle.data for handle in handles)), handles[-1].dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, name, build)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def card(request, monkeypatch):
    """The device for kernels: a GPU, or the CPU with a GPU's arithmetic."""
    if request.param == "emulated":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the interpreter is for machines without a GPU (TRITON_INTERPRET=1)")
        approximate(monkeypatch)
        return "cpu"
    return "cuda"


@triton.jit
def _functions_kernel(x, y, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    each = tl.load(x + at)
    tl.store(y + at, common.exp(tl.minimum(each, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.float32))
    tl.store(y + count + at, common.sigmoid(each, tl.float32))


def test_functions_of_the_kernels(card):
    """Relative errors do not grow with the argument, as that of ``tl.exp`` does."""
    x = torch.linspace(-87, 87, 4096, device=card)
    x[-4:] = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan])
    y = x.new_empty(2, 4096)
    _functions_kernel[(1,)](x, y, 4096, BLOCK=4096)
    exp, sigmoid = x.double().clamp(max=0).exp(), x.double().sigmoid()
    assert y[:, -4:-1].tolist() == [[1, 0, 1], [0.5, 0, 1]]
    assert y[:, -1].isnan().all()
    for name, actual, exact, bound in (("exp", y[0], exp, 2**-22), ("sigmoid", y[1], sigmoid, 2**-21)):
        assert float((actual.double() / exact - 1)[:-4].abs().max()) <= bound, name


def _kl(shape, draws, scale=2.0, **options):
    return functools.partial(ops.distillation_kl, **options), functools.partial(logits, shape, scale=scale), draws


def _contrast(shape, draws, **options):
    return functools.partial(ops.contrastive_loss, **options), functools.partial(vectors, shape), draws


def _spatial(shape, draws, form="spatial", sharper=1.0):
    scale = float(shape[2] * shape[3])

    def function(f, h, w, b, *, backend):
        return ops.spatial_attention(f, h, sharper * w, b, scale=scale, form=form, backend=backend)

    return function, functools.partial(attention, shape, hidden=8), draws


def _high_order(shape, draws, mode="joint", function=ops.high_order_attention, sharper=1.0):
    def sharpened(x, proj, out, *, backend):
        return function(x, proj, sharper * out, mode=mode, backend=backend)

    return sharpened, functools.partial(high_order, shape), draws


# Function, inputs and draws. A result that is one number needs more draws: the error of the reference can be small by
# luck in few.
CASES = {
    "distillation_kl": _kl((16, 200), 8),
    "distillation_kl, temperature 4": _kl((16, 200), 8, temperature=4.0),
    "distillation_kl, temperature 3, elementwise": _kl((16, 200), 2, temperature=3.0, reduction="none"),
    "distillation_kl, reverse": _kl((8, 1000), 8, temperature=4.0, direction="reverse"),
    "distillation_kl, 1000 classes": _kl((8, 1000), 8),
    "distillation_kl, large logits": _kl((8, 200), 4, scale=20.0, reduction="none"),
    "distillation_kl, large logits, temperature 4": _kl((16, 200), 8, scale=20.0, temperature=4.0),
    "contrastive_loss, one program": _contrast((32, 64), 8),
    "contrastive_loss, tiles": _contrast((90, 40), 2, reduction="none"),
    "contrastive_loss, symmetric": _contrast((70, 24), 4, temperature=0.5, symmetric=True),
    "contrastive_loss, not normalized": _contrast((80, 12), 2, temperature=1.0, normalize=False, reduction="none"),
    "spatial_attention": _spatial((2, 16, 9, 9), 2),
    "spatial_attention, large logits": _spatial((2, 16, 9, 9), 8, sharper=8.0),
    "spatial_attention, channel": _spatial((2, 64, 6, 6), 2, "channel"),
    "spatial_attention, channel, large logits": _spatial((2, 300, 4, 4), 2, "channel", sharper=8.0),
    "high_order_attention": _high_order((2, 32, 6, 6), 2),
    "high_order_attention, per order": _high_order((2, 32, 6, 6), 2, "per_order"),
    "high_order_attention, per order, large logits": _high_order((2, 4, 7, 7), 4, "per_order", sharper=4.0),
    "high_order_attention_map": _high_order((2, 32, 6, 6), 2, function=ops.high_order_attention_map),
    "batchnorm_statistics": (call_norm, functools.partial(norm, (8, 24, 12, 12)), 2),
    "batchnorm_statistics, residual": (
        *(functools.partial(call_norm, activation="relu"), functools.partial(norm, (2, 70, 5, 5), residual=True)),
        2,
    ),
    "statistics_distance": (ops.statistics_distance, functools.partial(stored, (4, 24, 6, 6)), 8),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_ratio(case, card, record_property):
    """The rule of all kernels; what a GPU's run records is the kernel's error over the reference's."""
    function, make, draws = CASES[case]
    ratio = assert_backend_no_worse(function, make(device=card), draws=draws)
    record_property("ratio", ratio)
