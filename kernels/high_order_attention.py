"""Mixed high-order attention: gated features, the gate, or the gated features' mean squared error; and the gradients.

Features are rows x of C channels, one row per position, P rows in total. Per position, with orders r = 1 .. R, their
factors u of K hidden units, the products z of the factors, activations a_r and logits l::

    u_{r,i} = proj_{r,i} x      z_r = prod over i of u_{r,i}      a_r = relu(z_r)      l = sum over r of out_r a_r
    A = sigmoid(l)              y = A x                           error = mean((A x - target)^2)

Gradient, with g the gradient of y (for the error, ``2 (A x - target) grad_output / numel``)::

    dl = g x A (1 - A)       da_r = out_r^T dl     du_{r,i} = da_r [z_r > 0] prod over j != i of u_{r,j}
    dx = g A + sum proj^T du         dproj_{r,i} = sum over P of du_{r,i} x^T          dout_r = sum over P of dl a_r^T

If the result is the gate, with gradient h, then ``dl = h A (1 - A)``, and dx has no term g A. In mode "per_order", A is
the mean of one gate A_r per order (``GATES = R``), and dl_r = g x A_r (1 - A_r) / R. The products over j != i are
computed by multiplication, not from z by division. Only x is saved. Products, logits and gate are float32; the
operands of matrix products have the dtype of the weights.

There are two forms. In the whole form, a program holds all channels of its positions (``BLOCK_C >= C``), and
intermediates stay in registers. The split form is for logits that exceed a program's registers. There, products
without a prologue or epilogue are PyTorch's (cuBLAS)::

    U = X proj^T          [P, R(R+1)/2 K]    torch.mm
    y, or dl and g A                         one kernel: a = relu(products of U), a product with out, the gate
    du                    [P, R(R+1)/2 K]    one kernel: the product dl out, times the factors in U
    dX = du proj + g A    [P, C]             torch.addmm
    dproj = du^T X        dout = dl^T a      torch.mm

cuBLAS selects tiles by shape, which matters because the paper's maps have few tiles for the SMs of a large GPU, and
splits the sums over positions. Factors are rounded to the dtype of the weights, as in the reference.

Memory traffic with two-byte features, K = C / 4 and R = 3. Whole form: forward reads x and writes y, 4PC bytes.
Backward reads x and g and writes dx, 6PC bytes. If weights need gradients, backward also writes dl, a_r and du, 6.5PC
bytes, for the matrix products over positions. Split form, counted per launch: forward 5PC + 7PC bytes; backward
5PC (U), 12.5PC (dl, g A, and a for dout), 8PC (du), 7PC (dX), 5PC (dproj) and 3.5PC (dout), partly from L2.

Sums over positions are split over programs, and their partial sums are added in a fixed order. cuBLAS does the same as
long as the calls of one handle share a stream. Results are therefore deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.common import (
    architecture,
    cast,
    cdiv,
    divide,
    dot,
    exp,
    fma,
    launch,
    next_power_of_2,
    num_sms,
    precision,
    sigmoid,
    sum_partials,
    traffic,
)
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward", "gradients", "value"]


_LIMITS = {"BLOCK_M": (16, 128), "BLOCK_C": (16, 256), "BLOCK_K": (16, 128), "num_stages": (2, 4)}


def _launch(m: int, c: int, k: int, hidden: int, warps: int = 4, stages: int = 2) -> Launch:
    tile = {"BLOCK_M": m, "BLOCK_C": c, "BLOCK_K": max(16, min(k, hidden))}
    return Launch(tile=tile, num_warps=warps, num_stages=stages)


def _split(arch: int, dtype: torch.dtype, hidden: int, order: int, gates: int, unaligned: int) -> Launch:
    """The split form. Larger tiles spill with four factors, several gates, or loads that cannot be vectorized."""
    if dtype == torch.float32:
        if order > 3 or gates > 1 or (unaligned and arch >= 100):
            return _launch(16, 16, 16 if arch < 120 or unaligned else 32, hidden)  # on sm_120, 16 spills
        return _launch(32, 32, 32 if arch == 80 else 16, hidden)
    if order > 3 or unaligned:
        return _launch(32, 32, 16, hidden)
    if gates > 1:
        return _launch(64 if arch == 90 else 32, 32, 32, hidden)  # elsewhere, 64 spills
    if 100 <= arch < 120:
        return _launch(64, 128, 32, hidden, 8)  # 64 x 64 spills
    return _launch(64, 64, 32, hidden, stages=3 if arch == 90 else 2)


@config.heuristic("high_order_attention", **_LIMITS)
def _config(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, unaligned: int
) -> Launch:
    """The whole form unless it spills, as with 256 channels and several gates or with ``unaligned`` addresses."""
    whole = max(16, channels)
    if dtype != torch.float32 and order <= 3 and not unaligned and whole <= (256 if gates == 1 else 128):
        return _launch(128 if whole <= 64 else 64, whole, 16, hidden, 8)
    return _split(arch, dtype, hidden, order, gates, unaligned)


@config.heuristic("high_order_attention_backward", **_LIMITS)
def _config_backward(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, unaligned: int
) -> Launch:
    """Like forward, but the whole form also spills with 256 channels or with several gates."""
    whole = max(16, channels)
    if dtype != torch.float32 and order <= 3 and gates == 1 and not unaligned and whole <= 128:
        return _launch(64, whole, 16, hidden, 4 if whole <= 64 else 8)
    return _split(arch, dtype, hidden, order, gates, unaligned)


@config.heuristic("high_order_attention_hidden", **_LIMITS)
def _config_hidden(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, unaligned: int
) -> Launch:
    """The gradient of the factors: BLOCK_M positions by BLOCK_K hidden units, BLOCK_C channels per step."""
    if dtype == torch.float32 or order > 3 or unaligned:
        return _launch(32, 32, 32, hidden)
    return _launch(64, 64, 128, hidden, 4 if hidden <= 64 else 8, stages=3 if arch == 90 else 2)


@config.heuristic("high_order_attention_weights", **_LIMITS)
def _config_weights(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, unaligned: int
) -> Launch:
    """The weights' gradients in the whole form: BLOCK_C channels by BLOCK_K hidden units, BLOCK_M positions per step.

    Longer steps spill on sm_100, and a third stage spills on sm_80.
    """
    if dtype == torch.float32:
        return _launch(32, max(16, min(32, channels)), 32, hidden)
    block = max(16, min(64, channels))
    return (
        _launch(32, block, 32, hidden)
        if unaligned or 100 <= arch < 120
        else _launch(64, block, 64, hidden, stages=3 if arch == 90 else 2)
    )


class Map(NamedTuple):
    """Feature maps as the kernels take them: P rows of C channels.

    ``stride_n`` is None if all adjacent rows have the distance ``stride_p``, also those of different samples. All
    fields are None if there is no such map.
    """

    data: Any
    stride_n: Any
    stride_p: Any
    stride_c: Any


@triton.jit
def _row_offsets(m, offs_m, positions):
    """Offsets of rows in a map."""
    if m.stride_n is None:
        return offs_m * m.stride_p
    else:
        return offs_m // positions * m.stride_n + offs_m % positions * m.stride_p


@triton.jit
def _mask(mask_m, offs_c, CHANNELS: tl.constexpr):
    """The mask of a tile, without a comparison if the blocks divide the channels."""
    all_in: tl.constexpr = tl.constexpr(CHANNELS) % offs_c.shape[0] == 0
    return mask_m[:, None] if all_in else mask_m[:, None] & (offs_c < CHANNELS)[None, :]


@triton.jit
def _load(base, at, mask_m, offs_c, stride, CHANNELS: tl.constexpr):
    """A tile of rows at the offsets ``at``, zero outside."""
    ptrs = base + at[:, None] + offs_c.to(tl.int64)[None, :] * stride
    return tl.load(ptrs, mask=_mask(mask_m, offs_c, CHANNELS), other=0.0)


@triton.jit
def _load_map(m, offs_m, positions, mask_m, offs_c, C: tl.constexpr):
    """A tile of a map, zero outside."""
    return _load(m.data, _row_offsets(m, offs_m, positions), mask_m, offs_c, m.stride_c, C)


@triton.jit
def _store(base, at, mask_m, offs_c, stride, value, CHANNELS: tl.constexpr):
    """Writes a float32 tile to rows at the offsets ``at``."""
    ptrs = base + at[:, None] + offs_c.to(tl.int64)[None, :] * stride
    tl.store(ptrs, cast(value, base.dtype.element_ty), mask=_mask(mask_m, offs_c, CHANNELS))


@triton.jit
def _load_weight(base, i, j, stride_i: tl.constexpr, stride_j: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a weight (ROWS, COLUMNS), zero outside."""
    ptrs = base + i[:, None] * stride_i + j[None, :] * stride_j
    if tl.constexpr(ROWS) % i.shape[0] == 0 and tl.constexpr(COLUMNS) % j.shape[0] == 0:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(i < ROWS)[:, None] & (j < COLUMNS)[None, :], other=0.0)


@triton.jit
def _add_factors(
    u0, u1, u2, u3, x, proj_ptr, offs_k, offs_c,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of some channels to the factors of order R. Factors beyond R do not change."""
    at = proj_ptr + R * (R - 1) // 2 * K * C
    u0 = dot(x, _load_weight(at, offs_c, offs_k, 1, C, C, K), u0, PRECISION)
    if R > 1:
        u1 = dot(x, _load_weight(at + K * C, offs_c, offs_k, 1, C, C, K), u1, PRECISION)
    if R > 2:
        u2 = dot(x, _load_weight(at + 2 * K * C, offs_c, offs_k, 1, C, C, K), u2, PRECISION)
    if R > 3:
        u3 = dot(x, _load_weight(at + 3 * K * C, offs_c, offs_k, 1, C, C, K), u3, PRECISION)
    return u0, u1, u2, u3


@triton.jit
def _initial_factors(R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Zeros for the factors of order R, ones for the others."""
    u0 = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    u1 = tl.full([BLOCK_M, BLOCK_K], 0.0 if R > 1 else 1.0, tl.float32)
    u2 = tl.full([BLOCK_M, BLOCK_K], 0.0 if R > 2 else 1.0, tl.float32)
    u3 = tl.full([BLOCK_M, BLOCK_K], 0.0 if R > 3 else 1.0, tl.float32)
    return u0, u1, u2, u3


@triton.jit
def _product_without(u0, u1, u2, u3, i: tl.constexpr):
    """The product of all factors except the i-th."""
    if i == 0:
        return u1 * u2 * u3
    else:
        return u0 * (u2 * u3 if i == 1 else (u1 * u3 if i == 2 else u1 * u2))


@triton.jit
def _relu(z, x):
    """x if z > 0, else 0. A NaN in z counts as positive, as in torch's relu."""
    return tl.where(z <= 0.0, 0.0, x)


@triton.jit
def _logits_gradient(g, x, logits, dtype: tl.constexpr, RESULT: tl.constexpr):
    """The gradient dl. A (1 - A) is computed from exp(-|l|), because 1 - A loses precision in saturated gates."""
    e = exp(-tl.abs(logits), dtype)
    derivative = divide(e, fma(e, 2.0 + e, 1.0), dtype)  # e / (1 + e)^2
    return g * derivative if RESULT == "map" else g * x * derivative


@triton.jit
def _store_result(
    y, offs_m, positions, mask_m, offs_c, gate, x, target, part, RESULT: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Writes a tile of gated features or of the gate, or the tile's sum of squared errors as element ``part`` of y."""
    if RESULT == "error":
        # Features and target are zero outside the tile's mask.
        error = gate * x - target
        tl.store(y.data + part, tl.sum(error * error))
    else:
        value = gate if RESULT == "map" else gate * x
        _store(y.data, _row_offsets(y, offs_m, positions), mask_m, offs_c, y.stride_c, value, C)


# --- whole: a program has all channels of its positions


@triton.jit
def _whole_logits(
    logits, x, proj_ptr, out_ptr, offs_c,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the logits of order R."""
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        u0, u1, u2, u3 = _initial_factors(R, x.shape[0], BLOCK_K)
        u0, u1, u2, u3 = _add_factors(u0, u1, u2, u3, x, proj_ptr, offs_k, offs_c, R, C, K, PRECISION)
        z = u0 * u1 * u2 * u3
        weight = _load_weight(out_ptr + (R - 1) * C * K, offs_k, offs_c, 1, K, K, C)
        logits = dot(cast(_relu(z, z), x.dtype), weight, logits, PRECISION)
    return logits


@triton.jit
def _whole_gate(
    x, proj_ptr, out_ptr, offs_c, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gate A of a tile of features, and its logits. If there are several gates, zeros replace the logits."""
    zeros = tl.zeros([x.shape[0], x.shape[1]], tl.float32)
    if GATES == 1:
        logits = zeros
        for r in tl.static_range(1, ORDER + 1):
            logits = _whole_logits(logits, x, proj_ptr, out_ptr, offs_c, r, C, K, PRECISION, BLOCK_K)
        return sigmoid(logits, x.dtype), logits
    else:
        gate = zeros
        for r in tl.static_range(1, ORDER + 1):
            logits = _whole_logits(zeros, x, proj_ptr, out_ptr, offs_c, r, C, K, PRECISION, BLOCK_K)
            gate += sigmoid(logits, x.dtype)
        return gate * (1.0 / ORDER), zeros


@traffic(writes="y")
@triton.jit
def _whole_forward_kernel(
    x,  # Map, [P, C]
    other,  # Map, [P, C]: the target of "error", else unused
    proj_ptr,  # [R(R+1)/2, K, C]
    out_ptr,  # [R, C, K]
    y,  # Map, [P, C], or for "error" [programs]
    num_rows, positions,
    RESULT: tl.constexpr, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    offs_c = tl.arange(0, BLOCK_C)
    features = _load_map(x, offs_m, positions, mask_m, offs_c, C)
    operand = cast(features, proj_ptr.dtype.element_ty)
    gate, _ = _whole_gate(operand, proj_ptr, out_ptr, offs_c, GATES, ORDER, C, K, PRECISION, BLOCK_K)
    features = features.to(tl.float32)
    target = features
    if RESULT == "error":
        target = _load_map(other, offs_m, positions, mask_m, offs_c, C).to(tl.float32)
    _store_result(y, offs_m, positions, mask_m, offs_c, gate, features, target, tl.program_id(0), RESULT, C)


@triton.jit
def _whole_order_backward(
    dx, x, dl, proj_ptr, out_ptr, a_ptr, du_ptr, offs_m, mask_m, offs_c,
    R: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_GRAD_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the part of order R to dx, from the gradient of its logits, and writes a_r and du unless None."""
    first: tl.constexpr = R * (R - 1) // 2
    width: tl.constexpr = ORDER * (ORDER + 1) // 2 * K
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        u0, u1, u2, u3 = _initial_factors(R, x.shape[0], BLOCK_K)
        u0, u1, u2, u3 = _add_factors(u0, u1, u2, u3, x, proj_ptr, offs_k, offs_c, R, C, K, PRECISION)
        z = u0 * u1 * u2 * u3
        if a_ptr is not None:
            _store(a_ptr + (R - 1) * K, offs_m * (ORDER * K), mask_m, offs_k, 1, _relu(z, z), K)
        if NEEDS_GRAD_X or du_ptr is not None:
            da = tl.zeros([x.shape[0], BLOCK_K], tl.float32)
            da = dot(dl, _load_weight(out_ptr + (R - 1) * C * K, offs_c, offs_k, K, 1, C, K), da, PRECISION)
            dz = _relu(z, da)
            for i in tl.static_range(R):
                du = dz * _product_without(u0, u1, u2, u3, i)
                if du_ptr is not None:
                    _store(du_ptr + (first + i) * K, offs_m * width, mask_m, offs_k, 1, du, K)
                if NEEDS_GRAD_X:
                    weight = _load_weight(proj_ptr + (first + i) * K * C, offs_k, offs_c, C, 1, K, C)
                    dx = dot(cast(du, x.dtype), weight, dx, PRECISION)
    return dx


@traffic(writes="dx dl_ptr a_ptr du_ptr")
@triton.jit
def _whole_backward_kernel(
    grad_output_ptr,  # scalar, the gradient of "error", else unused
    x,  # Map, [P, C]
    other,  # Map, [P, C]: the target of "error", else the gradient of y
    proj_ptr,  # [R(R+1)/2, K, C]
    out_ptr,  # [R, C, K]
    dx,  # Map, [P, C], or None
    dl_ptr,  # [P, GATES, C], or None
    a_ptr,  # [P, R, K], or None
    du_ptr,  # [P, R(R+1)/2, K], or None
    num_rows, positions, scale,
    RESULT: tl.constexpr, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    NEEDS_GRAD_X: tl.constexpr = dx.data is not None
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    offs_c = tl.arange(0, BLOCK_C)
    features = _load_map(x, offs_m, positions, mask_m, offs_c, C)
    operand = cast(features, proj_ptr.dtype.element_ty)
    features = features.to(tl.float32)
    if GATES == 1 or RESULT == "error":
        gate, logits = _whole_gate(operand, proj_ptr, out_ptr, offs_c, GATES, ORDER, C, K, PRECISION, BLOCK_K)
    g = _load_map(other, offs_m, positions, mask_m, offs_c, C).to(tl.float32)
    if RESULT == "error":
        g = (gate * features - g) * (scale * tl.load(grad_output_ptr))
    starts_with_gate: tl.constexpr = GATES == 1 and NEEDS_GRAD_X and RESULT != "map"
    grad = g * gate if starts_with_gate else tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for r in tl.static_range(1, ORDER + 1):
        if GATES > 1:
            logits = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            logits = _whole_logits(logits, operand, proj_ptr, out_ptr, offs_c, r, C, K, PRECISION, BLOCK_K)
            if NEEDS_GRAD_X and RESULT != "map":
                grad += g * sigmoid(logits, operand.dtype) * (1.0 / ORDER)
        if r <= GATES:
            dl = _logits_gradient(g, features, logits, operand.dtype, RESULT) * (1.0 / GATES)
            if dl_ptr is not None:
                _store(dl_ptr + (r - 1) * C, offs_m * (GATES * C), mask_m, offs_c, 1, dl, C)
        grad = _whole_order_backward(
            grad, operand, cast(dl, operand.dtype), proj_ptr, out_ptr, a_ptr, du_ptr, offs_m, mask_m, offs_c,
            r, ORDER, C, K, PRECISION, NEEDS_GRAD_X, BLOCK_K,
        )  # fmt: skip
    if NEEDS_GRAD_X:
        _store(dx.data, _row_offsets(dx, offs_m, positions), mask_m, offs_c, dx.stride_c, grad, C)


# --- split: factors go through memory


@triton.jit
def _load_factors(
    u_ptr, offs_m, mask_m, offs_k, R: tl.constexpr, ORDER: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """The factors of order R, and ones beyond R."""
    at = offs_m * (ORDER * (ORDER + 1) // 2 * K)
    u_ptr += R * (R - 1) // 2 * K
    ones = tl.full([offs_m.shape[0], offs_k.shape[0]], 1.0, tl.float32)
    u0 = _load(u_ptr, at, mask_m, offs_k, 1, K).to(tl.float32)
    u1 = _load(u_ptr + K, at, mask_m, offs_k, 1, K).to(tl.float32) if R > 1 else ones
    u2 = _load(u_ptr + 2 * K, at, mask_m, offs_k, 1, K).to(tl.float32) if R > 2 else ones
    u3 = _load(u_ptr + 3 * K, at, mask_m, offs_k, 1, K).to(tl.float32) if R > 3 else ones
    return u0, u1, u2, u3


@triton.jit
def _split_logits(
    logits, u_ptr, a_ptr, out_ptr, offs_m, mask_m, offs_c,
    R: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the logits of order R for some channels. The programs of the first channels also write a_r unless None."""
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        u0, u1, u2, u3 = _load_factors(u_ptr, offs_m, mask_m, offs_k, R, ORDER, K)
        z = u0 * u1 * u2 * u3
        a = _relu(z, z)
        if a_ptr is not None:
            first = mask_m & (tl.program_id(1) == 0)
            _store(a_ptr + (R - 1) * K, offs_m * (ORDER * K), first, offs_k, 1, a, K)
        weight = _load_weight(out_ptr + (R - 1) * C * K, offs_k, offs_c, 1, K, K, C)
        logits = dot(cast(a, weight.dtype), weight, logits, PRECISION)
    return logits


@traffic(writes="y dl_ptr a_ptr")
@triton.jit
def _split_gate_kernel(
    grad_output_ptr,  # scalar, the gradient of "error", else unused
    x,  # Map, [P, C]
    other,  # Map, [P, C]: the target of "error"; else, in backward, the gradient of y; else unused
    u_ptr,  # [P, R(R+1)/2, K]
    out_ptr,  # [R, C, K]
    y,  # Map, [P, C]: the result, for "error" [programs]; in backward the part g A of dx, or None
    dl_ptr,  # [P, GATES, C], or None in forward
    a_ptr,  # [P, R, K], or None
    num_rows, positions, scale,
    RESULT: tl.constexpr, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    zeros = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    gate = zeros
    logits = zeros
    for r in tl.static_range(1, ORDER + 1):
        if GATES > 1:
            logits = zeros
        logits = _split_logits(
            logits, u_ptr, a_ptr, out_ptr, offs_m, mask_m, offs_c, r, ORDER, C, K, PRECISION, BLOCK_K
        )
        if GATES > 1:
            gate += sigmoid(logits, dtype)
    gate = sigmoid(logits, dtype) if GATES == 1 else gate * (1.0 / ORDER)
    features = _load_map(x, offs_m, positions, mask_m, offs_c, C).to(tl.float32)
    g = features
    if dl_ptr is not None or RESULT == "error":
        g = _load_map(other, offs_m, positions, mask_m, offs_c, C).to(tl.float32)
    if dl_ptr is not None:
        if RESULT == "error":
            g = (gate * features - g) * (scale * tl.load(grad_output_ptr))
        if y.data is not None and RESULT != "map":
            _store(y.data, _row_offsets(y, offs_m, positions), mask_m, offs_c, y.stride_c, g * gate, C)
        for r in tl.static_range(1, GATES + 1):
            if GATES > 1:
                logits = _split_logits(
                    zeros, u_ptr, None, out_ptr, offs_m, mask_m, offs_c, r, ORDER, C, K, PRECISION, BLOCK_K
                )
            dl = _logits_gradient(g, features, logits, dtype, RESULT) * (1.0 / GATES)
            _store(dl_ptr + (r - 1) * C, offs_m * (GATES * C), mask_m, offs_c, 1, dl, C)
    else:
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        _store_result(y, offs_m, positions, mask_m, offs_c, gate, features, g, part, RESULT, C)


@traffic(writes="du_ptr")
@triton.jit
def _split_hidden_kernel(
    dl_ptr,  # [P, GATES, C]
    u_ptr,  # [P, R(R+1)/2, K]
    out_ptr,  # [R, C, K]
    du_ptr,  # [P, R(R+1)/2, K]
    num_rows,
    GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    for r in tl.static_range(1, ORDER + 1):
        # The highest order comes first: it has the most work.
        if tl.program_id(2) == ORDER - r:
            da = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for start in range(0, C, BLOCK_C):
                offs_c = start + tl.arange(0, BLOCK_C)
                dl = _load(dl_ptr + (r - 1) % GATES * C, offs_m * (GATES * C), mask_m, offs_c, 1, C)
                da = dot(dl, _load_weight(out_ptr + (r - 1) * C * K, offs_c, offs_k, K, 1, C, K), da, PRECISION)
            u0, u1, u2, u3 = _load_factors(u_ptr, offs_m, mask_m, offs_k, r, ORDER, K)
            dz = _relu(u0 * u1 * u2 * u3, da)
            for i in tl.static_range(r):
                du = dz * _product_without(u0, u1, u2, u3, i)
                at_du = offs_m * (ORDER * (ORDER + 1) // 2 * K)
                _store(du_ptr + (r * (r - 1) // 2 + i) * K, at_du, mask_m, offs_k, 1, du, K)


# --- gradients of the weights in the whole form: products over positions


@traffic(writes="partials_ptr")
@triton.jit
def _weights_kernel(
    x,  # Map, [P, C]
    dl_ptr,  # [P, GATES, C]; None if dout is not needed
    a_ptr,  # [P, R, K]; None if dout is not needed
    du_ptr,  # [P, R(R+1)/2, K]; None if dproj is not needed
    partials_ptr,  # [splits, size]: dproj and then dout, as far as they are needed
    num_rows, positions, steps,
    GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dproj^T = x^T du or of dout_r = dl_r^T a_r, summed over ``steps * BLOCK_M`` positions."""
    NEEDS_GRAD_PROJ: tl.constexpr = du_ptr is not None
    NEEDS_GRAD_OUT: tl.constexpr = dl_ptr is not None
    width: tl.constexpr = ORDER * (ORDER + 1) // 2 * K
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    proj_tiles: tl.constexpr = blocks_c * ((width + BLOCK_K - 1) // BLOCK_K) if NEEDS_GRAD_PROJ else 0
    size: tl.constexpr = (width * C if NEEDS_GRAD_PROJ else 0) + (ORDER * K * C if NEEDS_GRAD_OUT else 0)
    pid = tl.program_id(0)
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1).to(tl.int64) * steps * BLOCK_M
    partials_ptr += tl.program_id(1).to(tl.int64) * size
    acc = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    if NEEDS_GRAD_PROJ and pid < proj_tiles:
        offs_k = pid // blocks_c * BLOCK_K + tl.arange(0, BLOCK_K)
        for step in range(0, steps):
            offs_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < num_rows
            features = cast(_load_map(x, offs_m, positions, mask_m, offs_c, C), du_ptr.dtype.element_ty)
            du = _load(du_ptr, offs_m * width, mask_m, offs_k, 1, width)
            acc = dot(tl.trans(features), du, acc, PRECISION)
        ptrs = partials_ptr + offs_k[None, :] * C + offs_c[:, None]
        tl.store(ptrs, acc, mask=(offs_c < C)[:, None] & (offs_k < width)[None, :])
    if NEEDS_GRAD_OUT and pid >= proj_tiles:
        order_tiles: tl.constexpr = blocks_c * ((K + BLOCK_K - 1) // BLOCK_K)
        r = (pid - proj_tiles) // order_tiles
        offs_k = (pid - proj_tiles) % order_tiles // blocks_c * BLOCK_K + tl.arange(0, BLOCK_K)
        for step in range(0, steps):
            offs_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < num_rows
            dl = _load(dl_ptr + r % GATES * C, offs_m * (GATES * C), mask_m, offs_c, 1, C)
            a = _load(a_ptr + r * K, offs_m * (ORDER * K), mask_m, offs_k, 1, K)
            acc = dot(tl.trans(dl), a, acc, PRECISION)
        ptrs = partials_ptr + (size - ORDER * K * C) + r * (C * K) + offs_c[:, None] * K + offs_k[None, :]
        tl.store(ptrs, acc, mask=(offs_c < C)[:, None] & (offs_k < K)[None, :])


@traffic(writes="dproj_ptr dout_ptr")
@triton.jit
def _reduce_kernel(
    partials_ptr,  # [splits, size]
    dproj_ptr,  # [R(R+1)/2, K, C], or None
    dout_ptr,  # [R, C, K], or None
    splits, proj_size, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of both weights' gradients."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = partials_ptr + split.to(tl.int64)[:, None] * size + offs[None, :]
        acc += tl.sum(tl.load(at, mask=(split < splits)[:, None] & (offs < size)[None, :], other=0.0), 0)
    if dproj_ptr is not None:
        tl.store(dproj_ptr + offs, cast(acc, dproj_ptr.dtype.element_ty), mask=offs < proj_size)
    if dout_ptr is not None:
        mask = (offs >= proj_size) & (offs < size)
        tl.store(dout_ptr + (offs - proj_size), cast(acc, dout_ptr.dtype.element_ty), mask=mask)


# --- launchers


def _map(x: Tensor | None) -> Map:
    """A map as a kernel argument. Copies maps that have no constant distance between positions."""
    if x is None:
        return Map(None, None, None, None)
    samples, _, height, width = x.shape
    x = x if height == 1 or width == 1 or x.stride(2) == width * x.stride(3) else x.contiguous()
    stride_p = x.stride(2) if width == 1 else x.stride(3)
    flat = samples == 1 or x.stride(0) == height * width * stride_p
    return Map(x, None if flat else x.stride(0), stride_p, x.stride(1))


def _choose(kernel: str, x: Tensor, out: Tensor, mode: str) -> Launch:
    """The configuration of a kernel."""
    order, channels, hidden = out.shape
    sizes = {"channels": next_power_of_2(channels), "hidden": next_power_of_2(hidden), "order": order}
    unaligned = int(channels % 8 != 0 or hidden % 8 != 0)
    gates = 1 if mode == "joint" else order
    return config.choose(kernel, architecture(x), out.dtype, **sizes, gates=gates, unaligned=unaligned)


def _constants(out: Tensor, mode: str) -> dict[str, Any]:
    order, channels, hidden = out.shape
    gates = 1 if mode == "joint" else order
    return {"GATES": gates, "ORDER": order, "C": channels, "K": hidden, "PRECISION": precision(out.dtype)}


def _rows(m: Map, dtype: torch.dtype) -> Tensor:
    """A map as a matrix [P, C] of a dtype. It is a view if the dtype is that of the map and rows have one distance."""
    samples, channels, height, width = m.data.shape
    if m.stride_n is not None:
        return m.data.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
    return m.data.as_strided((samples * height * width, channels), (m.stride_p, m.stride_c)).to(dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype of a, which autocast does not change for functions with ``out``."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def value(x: Tensor, other: Tensor, proj: Tensor, out: Tensor, mode: str, result: str, y: Tensor) -> None:
    """Computes gated features, the gate, or the mean squared error.

    Args:
        x: (N, C, H, W), any strides.
        other: (N, C, H, W), any strides: the target of "error", else x.
        proj: (R(R+1)/2, K, C), order R up to 4, K hidden units, in the dtype of the matrix products.
        out: (R, C, K), in the same dtype.
        mode: see :func:`dfkd_fast.ops.high_order_attention`.
        result: "features", "map" or "error".
        y: (N, C, H, W), or a float32 scalar for "error".
    """
    error = result == "error"
    if error and x.numel() == 0:
        y.fill_(float("nan"))  # as torch's mean of an empty tensor
        return
    proj, out = proj.contiguous(), out.contiguous()
    x_map, other_map, constants = _map(x), _map(other), _constants(out, mode)
    sizes = x.numel() // x.shape[1], x.shape[2] * x.shape[3]
    chosen = _choose("high_order_attention", x, out, mode)
    grid = cdiv(sizes[0], chosen.tile["BLOCK_M"]), cdiv(x.shape[1], chosen.tile["BLOCK_C"])
    y_map = Map(x.new_empty(grid[0] * grid[1], dtype=torch.float32), None, None, None) if error else _map(y)
    gate = {"RESULT": result, "config": chosen, **constants}
    if grid[1] == 1:
        launch(_whole_forward_kernel, grid, x_map, other_map, proj, out, y_map, *sizes, **gate)
    else:
        u = _product(_rows(x_map, proj.dtype), proj.flatten(0, 1).t())
        launch(_split_gate_kernel, grid, None, x_map, other_map, u, out, y_map, None, None, *sizes, 1.0, **gate)
    if error:
        sum_partials(y_map.data, y, 1 / x.numel())
    elif y_map.data is not y:
        y.copy_(y_map.data)


def forward(x: Tensor, proj: Tensor, out: Tensor, mode: str, result: str, y: Tensor) -> None:
    """Calls :func:`value` for the result "features" or "map"."""
    value(x, x, proj, out, mode, result, y)


def _whole_gradients(
    grad_output: Tensor, x: Tensor, other: Tensor, proj: Tensor, out: Tensor, mode: str, result: str,
    dx: Map, dproj: Tensor | None, dout: Tensor | None, chosen: Launch,
) -> None:  # fmt: skip
    """Computes :func:`gradients` in the whole form."""
    (order, channels, hidden), factors, constants = out.shape, proj.shape[0], _constants(out, mode)
    x_map, sizes = _map(x), (x.numel() // channels, x.shape[2] * x.shape[3])
    needs_grad_proj, needs_grad_out = dproj is not None, dout is not None
    dl = out.new_empty(sizes[0], constants["GATES"] * channels) if needs_grad_out else None
    a = out.new_empty(sizes[0], order * hidden) if needs_grad_out else None
    du = out.new_empty(sizes[0], factors * hidden) if needs_grad_proj else None
    blocks_m = cdiv(sizes[0], chosen.tile["BLOCK_M"])
    tensors = (grad_output, x_map, _map(other), proj, out, dx, dl, a, du)
    gate = {"RESULT": result, "config": chosen, **constants}
    launch(_whole_backward_kernel, (blocks_m, 1), *tensors, *sizes, 2 / x.numel(), **gate)
    if not (needs_grad_proj or needs_grad_out):
        return
    chosen = _choose("high_order_attention_weights", x, out, mode)
    blocks_c, block_k = cdiv(channels, chosen.tile["BLOCK_C"]), chosen.tile["BLOCK_K"]
    tiles = needs_grad_proj * cdiv(factors * hidden, block_k) + needs_grad_out * order * cdiv(hidden, block_k)
    tiles *= blocks_c
    blocks_m = cdiv(sizes[0], chosen.tile["BLOCK_M"])
    steps = cdiv(blocks_m, max(1, 2 * num_sms(x) // tiles))
    splits = cdiv(blocks_m, steps)
    proj_size, out_size = needs_grad_proj * proj.numel(), needs_grad_out * out.numel()
    partials = x.new_empty((splits, proj_size + out_size), dtype=torch.float32)
    launch(
        _weights_kernel, (tiles, splits), x_map, dl, a, du, partials, *sizes, steps, config=chosen, **constants
    )  # fmt: skip
    reduce = Launch(tile={"BLOCK_S": 32, "BLOCK": 64})
    results = (dproj, dout, splits, proj_size, proj_size + out_size)
    launch(_reduce_kernel, (cdiv(proj_size + out_size, 64),), partials, *results, config=reduce)


def _split_gradients(
    grad_output: Tensor, x: Tensor, other: Tensor, proj: Tensor, out: Tensor, mode: str, result: str,
    dx: Map, dproj: Tensor | None, dout: Tensor | None, chosen: Launch,
) -> None:  # fmt: skip
    """Computes :func:`gradients` in the split form."""
    (order, channels, hidden), x_map, constants = out.shape, _map(x), _constants(out, mode)
    count, positions = x.numel() // channels, x.shape[2] * x.shape[3]
    rows, stacked = _rows(x_map, proj.dtype), proj.flatten(0, 1)
    u = _product(rows, stacked.t())
    dl = out.new_empty(count, constants["GATES"] * channels)
    a = None if dout is None else out.new_empty(count, order * hidden)
    grid: tuple[int, ...] = (cdiv(count, chosen.tile["BLOCK_M"]), cdiv(channels, chosen.tile["BLOCK_C"]))
    tensors = (grad_output, x_map, _map(other), u, out, dx, dl, a)
    gate = {"RESULT": result, "config": chosen, **constants}
    launch(_split_gate_kernel, grid, *tensors, count, positions, 2 / x.numel(), **gate)
    if dout is not None and a is not None:
        if mode == "joint":
            dout.copy_(_product(dl.t(), a).unflatten(1, (order, hidden)).transpose(0, 1))
        else:
            for dl_r, a_r, dout_r in zip(dl.chunk(order, 1), a.chunk(order, 1), dout, strict=True):
                torch.mm(dl_r.t(), a_r, out=dout_r)
    if dx.data is None and dproj is None:
        return
    du = torch.empty_like(u)
    chosen = _choose("high_order_attention_hidden", x, out, mode)
    grid = (cdiv(count, chosen.tile["BLOCK_M"]), cdiv(hidden, chosen.tile["BLOCK_K"]), order)
    launch(_split_hidden_kernel, grid, dl, u, out, du, count, config=chosen, **constants)
    if dproj is not None:
        torch.mm(du.t(), rows, out=dproj.flatten(0, 1))
    if dx.data is None:
        return
    if dx.stride_n is None and dx.data.dtype == du.dtype:
        grad = _rows(dx, du.dtype)
        torch.addmm(grad, du, stacked, beta=0 if result == "map" else 1, out=grad)
        return
    grad = _product(du, stacked).unflatten(0, (x.shape[0], *x.shape[2:])).permute(0, 3, 1, 2)
    if result == "map":
        dx.data.copy_(grad)
    else:
        dx.data.add_(grad)


def gradients(
    grad_output: Tensor, x: Tensor, other: Tensor, proj: Tensor, out: Tensor, mode: str, result: str,
    dx: Tensor | None, dproj: Tensor | None, dout: Tensor | None,
) -> None:  # fmt: skip
    """Computes the gradients of :func:`value`.

    Args:
        grad_output: the gradient of "error", a scalar; else unused.
        x: (N, C, H, W), as in :func:`value`.
        other: (N, C, H, W), any strides: the target of "error", else the gradient of y.
        proj: (R(R+1)/2, K, C).
        out: (R, C, K).
        mode: as in :func:`value`.
        result: as in :func:`value`.
        dx: (N, C, H, W); None if it is not needed.
        dproj: (R(R+1)/2, K, C), contiguous; None if it is not needed.
        dout: (R, C, K), contiguous; None if it is not needed.
    """
    if x.numel() == 0:
        for gradient in (dproj, dout):
            if gradient is not None:
                gradient.zero_()
        return
    dx_map = _map(dx)
    chosen = _choose("high_order_attention_backward", x, out, mode)
    compute = _whole_gradients if x.shape[1] <= chosen.tile["BLOCK_C"] else _split_gradients
    compute(grad_output, x, other, proj.contiguous(), out.contiguous(), mode, result, dx_map, dproj, dout, chosen)
    if dx is not None and dx_map.data is not dx:
        dx.copy_(dx_map.data)


def backward(
    grad_output: Tensor, x: Tensor, proj: Tensor, out: Tensor, mode: str, result: str, *results: Tensor | None
) -> None:
    """Computes the gradients of :func:`forward`, with the gradient of y. ``results`` are dx, dproj and dout."""
    gradients(x, x, grad_output, proj, out, mode, result, *results)
