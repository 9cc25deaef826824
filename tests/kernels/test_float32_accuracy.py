"""Accuracy of the float32 kernels with the approximate instructions of a GPU.

Triton's interpreter computes exponentials and quotients with NumPy, which rounds almost correctly. Compiled kernels use
the PTX instructions that :func:`emulate_ptx` describes. On a GPU, the same cases run compiled.
"""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse

from ..ops.table import attention, call_act, call_norm, high_order, logits, norm, norm_act, stored, vectors

pytest.importorskip("triton")

import triton
import triton.language as tl

from dfkd_fast.kernels import common


def _hash(*operands):
    """A value in [-1, 1] that depends only on the bits of the operands."""
    bits = np.zeros((), np.uint32)
    for operand in operands:
        bits = (bits ^ np.asarray(operand, np.float32).view(np.uint32)) * np.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x85EBCA77)
        bits = bits ^ (bits >> np.uint32(13))
    return bits / 2.0**31 - 1.0


def _flush_denormals(x):
    """Zero in place of denormal values, as instructions with ``.ftz`` read and write them."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _ulps(exact, count):
    return count * np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def _approximate(exact, bound, *operands):
    """Float32 values within ``bound`` of exact float64 values. Half an ulp of the bound is left for rounding."""
    error = np.maximum(bound - _ulps(exact, 0.5), 0.0) * _hash(*operands)
    return np.where(np.isfinite(error), exact + error, exact).astype(np.float32)


def _ex2(x):
    exact = np.exp2(x.astype(np.float64))
    return np.where(x == 0, np.float32(1), _approximate(exact, exact * 2.0**-22.5, x))


def _log(x, function):
    exact = function(x.astype(np.float64))
    return _approximate(exact, _ulps(exact, 1), x)


def _div(x, y):
    exact = x.astype(np.float64) / y.astype(np.float64)
    return _approximate(exact, _ulps(exact, 2), x, y)


def emulate_ptx(monkeypatch):
    """Give the interpreter's float32 functions the errors of the instructions that Triton 3.6 compiles for sm_90.

    ===========  ===================================  ======================================================
    Triton       PTX                                  largest error
    ===========  ===================================  ======================================================
    exp          mul.f32 by log2(e), ex2.approx.f32   2^-22.5 relative, and the rounding of the product
    exp2         ex2.approx.ftz.f32                   2^-22.5 relative, denormals are zero
    log, log2    libdevice's logf and log2f           1 ulp
    a / b        div.full.f32                         2 ulp
    dot          fma.rn.f32, in order of k            that of the sum, the same for every tile
    ===========  ===================================  ======================================================

    ``div_rn`` and ``sqrt_rn`` round correctly, on a GPU as in NumPy. No kernel uses ``sqrt`` or ``rsqrt``. The emulated
    errors cover the whole range within the bounds; those of the hardware do not, so a kernel that passes has a margin.

    Source: NVIDIA's PTX ISA, floating point instructions, and CUDA C++ Programming Guide, mathematical functions.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    log2e = np.float32(np.log2(np.e))
    functions = {
        "create_exp": (lambda x: _ex2(x * log2e), np.exp),
        "create_exp2": (lambda x: _flush_denormals(_ex2(_flush_denormals(x))), np.exp2),
        "create_log": (partial(_log, function=np.log), np.log),
        "create_log2": (partial(_log, function=np.log2), np.log2),
        "create_fdiv": (_div, np.divide),
    }
    for name, (approximate, exact) in functions.items():

        def build(self, *handles, approximate=approximate, exact=exact):
            arrays = [handle.data for handle in handles]
            function = approximate if all(a.dtype == np.float32 for a in arrays) else exact
            with np.errstate(all="ignore"):
                return TensorHandle(function(*arrays), handles[-1].dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, name, build)

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        # NumPy's product rounds differently for other tiles, so that a logit would depend on the kernel.
        total = acc.data
        for k in range(a.data.shape[-1]):
            product = a.data[..., k, None].astype(np.float64) * b.data[..., k, :].astype(np.float64)[..., None, :]
            total = (product + total).astype(np.float32)
        return TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A GPU, or the CPU with a GPU's arithmetic."""
    if request.param == "cuda":
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is for machines without a GPU (TRITON_INTERPRET=1)")
    emulate_ptx(monkeypatch)
    return "cpu"


@triton.jit
def _functions_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, common.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.float32))
    tl.store(y_ptr + count + offs, common.sigmoid(x, tl.float32))


def test_relative_errors_of_exp_and_sigmoid_are_bounded(device):
    """The errors do not grow with the argument, unlike the error of ``tl.exp``."""
    x = torch.linspace(-87, 87, 4096, device=device)
    x[-4:] = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan])
    y = x.new_empty(2, 4096)
    _functions_kernel[(1,)](x, y, 4096, BLOCK=4096)
    exp, sigmoid = x.double().clamp(max=0).exp(), x.double().sigmoid()
    assert y[:, -4:-1].tolist() == [[1, 0, 1], [0.5, 0, 1]]
    assert y[:, -1].isnan().all()
    for name, actual, exact, bound in (("exp", y[0], exp, 2**-22), ("sigmoid", y[1], sigmoid, 2**-21)):
        assert float((actual.double() / exact - 1)[:-4].abs().max()) <= bound, name


def _case(function, make, shape, draws, **options):
    return partial(function, **options), partial(make, shape), draws


def _spatial(f, h, w, b, *, backend, form="spatial", factor=1.0):
    scale = float(f[0, 0].numel())
    return ops.spatial_attention(f, h, factor * w, b, scale=scale, form=form, backend=backend)


def _high_order(x, proj, out, *, backend, factor=1.0, **options):
    return ops.high_order_attention(x, proj, factor * out, backend=backend, **options)


kl = partial(_case, ops.distillation_kl, logits)
kl_large = partial(_case, ops.distillation_kl, partial(logits, scale=20.0))
contrastive = partial(_case, ops.contrastive_loss, vectors)
spatial = partial(_case, _spatial, partial(attention, hidden=8))
high = partial(_case, _high_order, high_order)
# A scalar result needs more draws: with few, the reference's error can be small by chance.
CASES = {
    "distillation_kl": kl((16, 200), 8),
    "distillation_kl, temperature 4": kl((16, 200), 8, temperature=4.0),
    "distillation_kl, temperature 3, elementwise": kl((16, 200), 2, temperature=3.0, reduction="none"),
    "distillation_kl, reverse": kl((8, 1000), 8, temperature=4.0, direction="reverse"),
    "distillation_kl, 1000 classes": kl((8, 1000), 8),
    "distillation_kl, large logits": kl_large((8, 200), 4, reduction="none"),
    "distillation_kl, large logits, temperature 4": kl_large((16, 200), 8, temperature=4.0),
    "contrastive_loss, one program": contrastive((32, 64), 8),
    "contrastive_loss, tiles": contrastive((90, 40), 2, reduction="none"),
    "contrastive_loss, symmetric": contrastive((70, 24), 4, temperature=0.5, symmetric=True),
    "contrastive_loss, not normalized": contrastive((80, 12), 2, temperature=1.0, normalize=False, reduction="none"),
    "spatial_attention": spatial((2, 16, 9, 9), 2),
    "spatial_attention, large logits": spatial((2, 16, 9, 9), 8, factor=8.0),
    "spatial_attention, channel": spatial((2, 64, 6, 6), 2, form="channel"),
    "spatial_attention, channel, large logits": spatial((2, 300, 4, 4), 2, form="channel", factor=8.0),
    "high_order_attention": high((2, 32, 6, 6), 2),
    "high_order_attention, per order": high((2, 32, 6, 6), 2, mode="per_order"),
    "high_order_attention, per order, large logits": high((2, 4, 7, 7), 4, mode="per_order", factor=4.0),
    "high_order_attention_map": _case(ops.high_order_attention_map, high_order, (2, 32, 6, 6), 2),
    "batchnorm_statistics": _case(call_norm, norm, (8, 24, 12, 12), 2),
    "batchnorm_statistics, residual": _case(
        call_norm, partial(norm, residual=True), (2, 70, 5, 5), 2, activation="relu"
    ),
    "batch_norm_act": _case(call_act, norm_act, (8, 24, 12, 12), 2),
    "batch_norm_act, residual": _case(
        call_act, partial(norm_act, residual=True), (2, 70, 5, 5), 2, activation="leaky_relu"
    ),
    "statistics_distance": _case(ops.statistics_distance, stored, (4, 24, 6, 6), 8),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_matches_float64_reference(case, device, record_property):
    """On a GPU, the recorded property is the kernel's error divided by the reference's error."""
    function, make, draws = CASES[case]
    record_property("ratio", assert_backend_no_worse(function, make(device=device), draws=draws))
