"""Mixed high-order attention, its gate alone, and the mean squared error of what it lets through: forward and backward.

Features are rows of C numbers, one a position, P of them; factors u, their products z and logits l are per position::

    u_{r,i} = proj_{r,i} x      z_r = prod over i of u_{r,i}      a_r = relu(z_r)      l = sum over r of out_r a_r
    A = sigmoid(l)              y = A x                           error = mean((A x - target)^2)

With g the gradient of y (of the error: ``2 (A x - target) grad_output / numel``; of the gate alone: that over x)::

    dl = g x A (1 - A)       da_r = out_r^T dl     du_{r,i} = da_r [z_r > 0] prod over j != i of u_{r,j}
    dx = g A + sum proj^T du         dproj_{r,i} = sum over P of du_{r,i} x^T          dout_r = sum over P of dl a_r^T

"per_order" has a sigmoid an order: dl_r = g x A_r (1 - A_r) / R. The products over j != i are multiplied out, never
divided. Nothing but x is saved. Factors, products, logits and gate are float32; what a matrix product takes has the
type of the weights.

Two forms, by whether a program holds all channels of its positions (``BLOCK_C >= C``). Whole: no intermediate leaves
the program. Forward reads x and writes y, 4PC bytes in a two-byte type; backward reads x and g and writes dx, 6PC, and
where weights have gradients dl, a and du, 3.25PC numbers for K = C / 4 and R = 3, for the products over positions.
Split, for more channels, whose logits exceed a program's registers: a (in backward dl and du too) is written once, and
each kernel is a plain matrix product with one end of the formula before or behind it.

Sums over positions are split over programs, whose partial sums are added in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

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
    sum_of,
)
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward", "gradients", "value"]


_LIMITS = {"BLOCK_M": (16, 128), "BLOCK_C": (16, 256), "BLOCK_K": (16, 128), "num_stages": (2, 4)}


def _launch(m: int, c: int, k: int, hidden: int, warps: int = 4, stages: int = 2) -> Launch:
    tile = {"BLOCK_M": m, "BLOCK_C": c, "BLOCK_K": max(16, min(k, hidden))}
    return Launch(tile=tile, num_warps=warps, num_stages=stages)


def _split(arch: int, dtype: torch.dtype, hidden: int, order: int, gates: int, ragged: int) -> Launch:
    """No program has all channels. Larger tiles spill with four factors, gates, or addresses that are no vectors."""
    if dtype == torch.float32:
        if order > 3 or (ragged and arch >= 100):
            return _launch(16, 16, 16, hidden)
        return _launch(32, 32, 32, hidden) if arch < 100 else _launch(32, 32 if gates == 1 else 16, 16, hidden)
    if order > 3 or ragged:
        return _launch(32, 32, 16, hidden)
    if gates > 1:
        return _launch(64, 32, 32, hidden)
    if 100 <= arch < 120:
        return _launch(64, 128, 32, hidden, 8)  # 64 x 64 spills there
    return _launch(64, 64, 32, hidden, stages=3 if arch == 90 else 2)


@config.heuristic("high_order_attention", **_LIMITS)
def _config(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, ragged: int
) -> Launch:
    """A program has all channels, unless that spills: with 256 and more gates, or ``ragged`` addresses."""
    whole = max(16, channels)
    if dtype != torch.float32 and order <= 3 and not ragged and whole <= (256 if gates == 1 else 128):
        return _launch(128 if whole <= 64 else 64, whole, 16, hidden, 8)
    return _split(arch, dtype, hidden, order, gates, ragged)


@config.heuristic("high_order_attention_backward", **_LIMITS)
def _config_backward(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, ragged: int
) -> Launch:
    """As forward; 256 channels spill, and so does more than one gate."""
    whole = max(16, channels)
    if dtype != torch.float32 and order <= 3 and gates == 1 and not ragged and whole <= 128:
        return _launch(64, whole, 16, hidden, 4 if whole <= 64 else 8)
    return _split(arch, dtype, hidden, order, gates, ragged)


@config.heuristic("high_order_attention_weights", **_LIMITS)
def _config_weights(
    arch: int, dtype: torch.dtype, *, channels: int, hidden: int, order: int, gates: int, ragged: int
) -> Launch:
    """The gradients of the weights: BLOCK_C channels by BLOCK_K hidden units, BLOCK_M positions per step.

    Larger steps spill on sm_100, a third stage does on sm_80.
    """
    if dtype == torch.float32:
        return _launch(32, max(16, min(32, channels)), 32, hidden)
    block = max(16, min(64, channels))
    return (
        _launch(32, block, 32, hidden)
        if ragged or 100 <= arch < 120
        else _launch(64, block, 64, hidden, stages=3 if arch == 90 else 2)
    )


@triton.jit
def _at(row, positions, stride_sample, stride_position, FLAT: tl.constexpr):
    """Offsets of rows in a map; FLAT where samples follow each other as positions do."""
    return row * stride_position if FLAT else row // positions * stride_sample + row % positions * stride_position


@triton.jit
def _inside(inside, channel, CHANNELS: tl.constexpr):
    """Which elements of a tile exist: no comparison where all channels do."""
    all_in: tl.constexpr = tl.constexpr(CHANNELS) % channel.shape[0] == 0
    return inside[:, None] if all_in else inside[:, None] & (channel < CHANNELS)[None, :]


@triton.jit
def _load(base, at, inside, channel, stride, CHANNELS: tl.constexpr):
    """A tile of a map, zero outside."""
    to = base + at[:, None] + channel.to(tl.int64)[None, :] * stride
    return tl.load(to, mask=_inside(inside, channel, CHANNELS), other=0.0)


@triton.jit
def _store(base, at, inside, channel, stride, value, CHANNELS: tl.constexpr):
    """Its counterpart, from float32."""
    to = base + at[:, None] + channel.to(tl.int64)[None, :] * stride
    tl.store(to, cast(value, base.dtype.element_ty), mask=_inside(inside, channel, CHANNELS))


@triton.jit
def _matrix(base, i, j, stride_i: tl.constexpr, stride_j: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a weight (ROWS, COLUMNS), zero outside."""
    to = base + i[:, None] * stride_i + j[None, :] * stride_j
    if tl.constexpr(ROWS) % i.shape[0] == 0 and tl.constexpr(COLUMNS) % j.shape[0] == 0:
        return tl.load(to)
    else:
        return tl.load(to, mask=(i < ROWS)[:, None] & (j < COLUMNS)[None, :], other=0.0)


@triton.jit
def _add_factors(
    u0, u1, u2, u3, x, proj, hidden, channel,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The factors of order R, with what more channels add to them; those beyond R stay as they are."""
    at = proj + R * (R - 1) // 2 * K * C
    u0 = dot(x, _matrix(at, channel, hidden, 1, C, C, K), u0, PRECISION)
    if R > 1:
        u1 = dot(x, _matrix(at + K * C, channel, hidden, 1, C, C, K), u1, PRECISION)
    if R > 2:
        u2 = dot(x, _matrix(at + 2 * K * C, channel, hidden, 1, C, C, K), u2, PRECISION)
    if R > 3:
        u3 = dot(x, _matrix(at + 3 * K * C, channel, hidden, 1, C, C, K), u3, PRECISION)
    return u0, u1, u2, u3


@triton.jit
def _no_factors(R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Zeros to add to; ones for the factors that order R does not have."""
    u0 = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    u1 = tl.full([BLOCK_M, BLOCK_K], 0.0 if R > 1 else 1.0, tl.float32)
    u2 = tl.full([BLOCK_M, BLOCK_K], 0.0 if R > 2 else 1.0, tl.float32)
    u3 = tl.full([BLOCK_M, BLOCK_K], 0.0 if R > 3 else 1.0, tl.float32)
    return u0, u1, u2, u3


@triton.jit
def _others(u0, u1, u2, u3, but: tl.constexpr):
    """The product of the factors but one."""
    if but == 0:
        return u1 * u2 * u3
    else:
        return u0 * (u2 * u3 if but == 1 else (u1 * u3 if but == 2 else u1 * u2))


@triton.jit
def _positive(z, x):
    """x where z is not below or at zero: a NaN in z passes, as torch's relu lets it."""
    return tl.where(z <= 0.0, 0.0, x)


@triton.jit
def _slope(g, x, logits, dtype: tl.constexpr, RESULT: tl.constexpr):
    """Gradient of the logits. A (1 - A) from the exponential below one: 1 - A would lose the digits of a shut gate."""
    e = exp(-tl.abs(logits), dtype)
    spread = divide(e, fma(e, 2.0 + e, 1.0), dtype)  # over (1 + e)^2
    return g * spread if RESULT == "map" else g * x * spread


@triton.jit
def _finish(y, at, inside, channel, stride, gate, x, target, part, RESULT: tl.constexpr, C: tl.constexpr):
    """Write what is wanted of a tile: the gated features, the gate, or the sum of squared errors."""
    if RESULT == "error":
        # Outside, features and target are zero.
        error = gate * x - target
        tl.store(y + part, tl.sum(error * error))
    elif RESULT == "map":
        _store(y, at, inside, channel, stride, gate, C)
    else:
        _store(y, at, inside, channel, stride, gate * x, C)


# --- whole: a program has all channels of its positions


@triton.jit
def _whole_logits(
    logits, x, proj, out, channel,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits with those of order R added."""
    for start in range(0, K, BLOCK_K):
        hidden = start + tl.arange(0, BLOCK_K)
        u0, u1, u2, u3 = _no_factors(R, x.shape[0], BLOCK_K)
        u0, u1, u2, u3 = _add_factors(u0, u1, u2, u3, x, proj, hidden, channel, R, C, K, PRECISION)
        z = u0 * u1 * u2 * u3
        weight = _matrix(out + (R - 1) * C * K, hidden, channel, 1, K, K, C)
        logits = dot(cast(_positive(z, z), x.dtype), weight, logits, PRECISION)
    return logits


@triton.jit
def _whole_gate(
    x, proj, out, channel, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A for a tile of features, and its logits where they are one sum."""
    nothing = tl.zeros([x.shape[0], x.shape[1]], tl.float32)
    if GATES == 1:
        logits = nothing
        for r in tl.static_range(1, ORDER + 1):
            logits = _whole_logits(logits, x, proj, out, channel, r, C, K, PRECISION, BLOCK_K)
        return sigmoid(logits, x.dtype), logits
    else:
        gate = nothing
        for r in tl.static_range(1, ORDER + 1):
            logits = _whole_logits(nothing, x, proj, out, channel, r, C, K, PRECISION, BLOCK_K)
            gate += sigmoid(logits, x.dtype)
        return gate * (1.0 / ORDER), nothing


@triton.jit
def _whole_forward_kernel(
    x, other, proj, out, y, count, positions, x_n, x_p, x_c, other_n, other_p, other_c, y_n, y_p, y_c,
    RESULT: tl.constexpr, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < count
    channel = tl.arange(0, BLOCK_C)
    given = _load(x, _at(row, positions, x_n, x_p, FLAT), inside, channel, x_c, C)
    tile = cast(given, proj.dtype.element_ty)
    gate, _ = _whole_gate(tile, proj, out, channel, GATES, ORDER, C, K, PRECISION, BLOCK_K)
    wide = given.to(tl.float32)
    target = wide
    if RESULT == "error":
        target = _load(other, _at(row, positions, other_n, other_p, FLAT), inside, channel, other_c, C).to(tl.float32)
    _finish(
        y, _at(row, positions, y_n, y_p, FLAT), inside, channel, y_c, gate, wide, target, tl.program_id(0), RESULT, C
    )


@triton.jit
def _whole_order_backward(
    dx, x, dl, proj, out, rectified, factors, row, inside, channel,
    R: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_GRAD_X: tl.constexpr, NEEDS_GRAD_PROJ: tl.constexpr, NEEDS_GRAD_OUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From the gradient of the logits of order R to that of x, and what the products over positions take."""
    first: tl.constexpr = R * (R - 1) // 2
    width: tl.constexpr = ORDER * (ORDER + 1) // 2 * K
    for start in range(0, K, BLOCK_K):
        hidden = start + tl.arange(0, BLOCK_K)
        u0, u1, u2, u3 = _no_factors(R, x.shape[0], BLOCK_K)
        u0, u1, u2, u3 = _add_factors(u0, u1, u2, u3, x, proj, hidden, channel, R, C, K, PRECISION)
        z = u0 * u1 * u2 * u3
        if NEEDS_GRAD_OUT:
            _store(rectified + (R - 1) * K, row * (ORDER * K), inside, hidden, 1, _positive(z, z), K)
        if NEEDS_GRAD_X or NEEDS_GRAD_PROJ:
            da = tl.zeros([x.shape[0], BLOCK_K], tl.float32)
            da = dot(dl, _matrix(out + (R - 1) * C * K, channel, hidden, K, 1, C, K), da, PRECISION)
            dz = _positive(z, da)
            for i in tl.static_range(R):
                du = dz * _others(u0, u1, u2, u3, i)
                if NEEDS_GRAD_PROJ:
                    _store(factors + (first + i) * K, row * width, inside, hidden, 1, du, K)
                if NEEDS_GRAD_X:
                    weight = _matrix(proj + (first + i) * K * C, hidden, channel, C, 1, K, C)
                    dx = dot(cast(du, x.dtype), weight, dx, PRECISION)
    return dx


@triton.jit
def _whole_backward_kernel(
    grad_output, x, other, proj, out, dx, slopes, rectified, factors, count, positions, scale,
    x_n, x_p, x_c, other_n, other_p, other_c, dx_n, dx_p, dx_c,
    RESULT: tl.constexpr, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, FLAT: tl.constexpr,
    NEEDS_GRAD_X: tl.constexpr, NEEDS_GRAD_PROJ: tl.constexpr, NEEDS_GRAD_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < count
    channel = tl.arange(0, BLOCK_C)
    given = _load(x, _at(row, positions, x_n, x_p, FLAT), inside, channel, x_c, C)
    tile = cast(given, proj.dtype.element_ty)
    wide = given.to(tl.float32)
    if GATES == 1 or RESULT == "error":
        gate, logits = _whole_gate(tile, proj, out, channel, GATES, ORDER, C, K, PRECISION, BLOCK_K)
    g = _load(other, _at(row, positions, other_n, other_p, FLAT), inside, channel, other_c, C).to(tl.float32)
    if RESULT == "error":
        g = (gate * wide - g) * (scale * tl.load(grad_output))
    added: tl.constexpr = GATES == 1 and NEEDS_GRAD_X and RESULT != "map"
    gradient = g * gate if added else tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for r in tl.static_range(1, ORDER + 1):
        if GATES > 1:
            logits = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            logits = _whole_logits(logits, tile, proj, out, channel, r, C, K, PRECISION, BLOCK_K)
            if NEEDS_GRAD_X and RESULT != "map":
                gradient += g * sigmoid(logits, tile.dtype) * (1.0 / ORDER)
        if r <= GATES:
            dl = _slope(g, wide, logits, tile.dtype, RESULT) * (1.0 / GATES)
            if NEEDS_GRAD_OUT:
                _store(slopes + (r - 1) * C, row * (GATES * C), inside, channel, 1, dl, C)
        gradient = _whole_order_backward(
            gradient, tile, cast(dl, tile.dtype), proj, out, rectified, factors, row, inside, channel, r, ORDER, C, K,
            PRECISION, NEEDS_GRAD_X, NEEDS_GRAD_PROJ, NEEDS_GRAD_OUT, BLOCK_K,
        )  # fmt: skip
    if NEEDS_GRAD_X:
        _store(dx, _at(row, positions, dx_n, dx_p, FLAT), inside, channel, dx_c, gradient, C)


# --- split: hidden activations go through memory


@triton.jit
def _split_hidden_kernel(
    x, slopes, proj, out, hidden_out, count, positions, x_n, x_p, x_c,
    GRADIENT: tl.constexpr, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a (count, ORDER K) from x; or, with GRADIENT, du (count, factors, K) from x and dl (count, GATES, C)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < count
    hidden = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = _at(row, positions, x_n, x_p, FLAT)
    for r in tl.static_range(1, ORDER + 1):
        # The highest order has the most work: it goes first.
        if tl.program_id(2) == ORDER - r:
            u0, u1, u2, u3 = _no_factors(r, BLOCK_M, BLOCK_K)
            da = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for start in range(0, C, BLOCK_C):
                channel = start + tl.arange(0, BLOCK_C)
                tile = cast(_load(x, at, inside, channel, x_c, C), proj.dtype.element_ty)
                u0, u1, u2, u3 = _add_factors(u0, u1, u2, u3, tile, proj, hidden, channel, r, C, K, PRECISION)
                if GRADIENT:
                    dl = _load(slopes + (r - 1) % GATES * C, row * (GATES * C), inside, channel, 1, C)
                    da = dot(dl, _matrix(out + (r - 1) * C * K, channel, hidden, K, 1, C, K), da, PRECISION)
            z = u0 * u1 * u2 * u3
            if GRADIENT:
                dz = _positive(z, da)
                for i in tl.static_range(r):
                    du = dz * _others(u0, u1, u2, u3, i)
                    at_du = row * (ORDER * (ORDER + 1) // 2 * K)
                    _store(hidden_out + (r * (r - 1) // 2 + i) * K, at_du, inside, hidden, 1, du, K)
            else:
                _store(hidden_out + (r - 1) * K, row * (ORDER * K), inside, hidden, 1, _positive(z, z), K)


@triton.jit
def _split_logits(
    logits, rectified, out, row, inside, channel,
    R: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits of some channels with those of order R added."""
    for start in range(0, K, BLOCK_K):
        hidden = start + tl.arange(0, BLOCK_K)
        a = _load(rectified + (R - 1) * K, row * (ORDER * K), inside, hidden, 1, K)
        logits = dot(a, _matrix(out + (R - 1) * C * K, hidden, channel, 1, K, K, C), logits, PRECISION)
    return logits


@triton.jit
def _split_gate_kernel(
    grad_output, x, other, rectified, out, y, slopes, count, positions, scale,
    x_n, x_p, x_c, other_n, other_p, other_c, y_n, y_p, y_c,
    GRADIENT: tl.constexpr, RESULT: tl.constexpr, GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, NEEDS_GRAD_X: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From a to the result; or, with GRADIENT, to dl, and to y the part g A of the gradient of x."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < count
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    joint = gate
    for r in tl.static_range(1, ORDER + 1):
        if GATES == 1:
            joint = _split_logits(joint, rectified, out, row, inside, channel, r, ORDER, C, K, PRECISION, BLOCK_K)
        else:
            logits = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            logits = _split_logits(logits, rectified, out, row, inside, channel, r, ORDER, C, K, PRECISION, BLOCK_K)
            gate += sigmoid(logits, out.dtype.element_ty)
    gate = sigmoid(joint, out.dtype.element_ty) if GATES == 1 else gate * (1.0 / ORDER)
    wide = _load(x, _at(row, positions, x_n, x_p, FLAT), inside, channel, x_c, C).to(tl.float32)
    given = wide
    if GRADIENT or RESULT == "error":
        given = _load(other, _at(row, positions, other_n, other_p, FLAT), inside, channel, other_c, C).to(tl.float32)
    at = _at(row, positions, y_n, y_p, FLAT)
    if GRADIENT:
        g = given
        if RESULT == "error":
            g = (gate * wide - given) * (scale * tl.load(grad_output))
        if NEEDS_GRAD_X and RESULT != "map":
            _store(y, at, inside, channel, y_c, g * gate, C)
        for r in tl.static_range(1, GATES + 1):
            if GATES > 1:
                joint = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
                joint = _split_logits(joint, rectified, out, row, inside, channel, r, ORDER, C, K, PRECISION, BLOCK_K)
            dl = _slope(g, wide, joint, out.dtype.element_ty, RESULT) * (1.0 / GATES)
            _store(slopes + (r - 1) * C, row * (GATES * C), inside, channel, 1, dl, C)
    else:
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        _finish(y, at, inside, channel, y_c, gate, wide, given, part, RESULT, C)


@triton.jit
def _split_input_kernel(
    factors, proj, dx, count, positions, dx_n, dx_p, dx_c,
    ADD: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx from du, added to what dx holds or not."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < count
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # All factors are one product over stacked columns.
    width: tl.constexpr = ORDER * (ORDER + 1) // 2 * K
    gradient = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        du = _load(factors, row * width, inside, column, 1, width)
        gradient = dot(du, _matrix(proj, column, channel, C, 1, width, C), gradient, PRECISION)
    at = _at(row, positions, dx_n, dx_p, FLAT)
    if ADD:
        gradient += _load(dx, at, inside, channel, dx_c, C).to(tl.float32)
    _store(dx, at, inside, channel, dx_c, gradient, C)


# --- gradients of the weights: products over positions


@triton.jit
def _weights_kernel(
    x, slopes, rectified, factors, parts, count, positions, steps, x_n, x_p, x_c,
    GATES: tl.constexpr, ORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, NEEDS_GRAD_PROJ: tl.constexpr, NEEDS_GRAD_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over ``steps * BLOCK_M`` positions: dproj^T = x^T du, then dout_r = dl_r^T a_r, a tile of one of them."""
    width: tl.constexpr = ORDER * (ORDER + 1) // 2 * K
    across: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    projections: tl.constexpr = across * ((width + BLOCK_K - 1) // BLOCK_K) if NEEDS_GRAD_PROJ else 0
    total: tl.constexpr = (width * C if NEEDS_GRAD_PROJ else 0) + (ORDER * K * C if NEEDS_GRAD_OUT else 0)
    job = tl.program_id(0)
    channel = job % across * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1).to(tl.int64) * steps * BLOCK_M
    parts += tl.program_id(1).to(tl.int64) * total
    result = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    if NEEDS_GRAD_PROJ and job < projections:
        column = job // across * BLOCK_K + tl.arange(0, BLOCK_K)
        for step in range(0, steps):
            row = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = row < count
            left = cast(
                _load(x, _at(row, positions, x_n, x_p, FLAT), inside, channel, x_c, C), factors.dtype.element_ty
            )
            result = dot(tl.trans(left), _load(factors, row * width, inside, column, 1, width), result, PRECISION)
        to = parts + column[None, :] * C + channel[:, None]
        tl.store(to, result, mask=(channel < C)[:, None] & (column < width)[None, :])
    if NEEDS_GRAD_OUT and job >= projections:
        each: tl.constexpr = across * ((K + BLOCK_K - 1) // BLOCK_K)
        r = (job - projections) // each
        column = (job - projections) % each // across * BLOCK_K + tl.arange(0, BLOCK_K)
        for step in range(0, steps):
            row = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = row < count
            left = _load(slopes + r % GATES * C, row * (GATES * C), inside, channel, 1, C)
            right = _load(rectified + r * K, row * (ORDER * K), inside, column, 1, K)
            result = dot(tl.trans(left), right, result, PRECISION)
        to = parts + (total - ORDER * K * C) + r * (C * K) + channel[:, None] * K + column[None, :]
        tl.store(to, result, mask=(channel < C)[:, None] & (column < K)[None, :])


@triton.jit
def _add_parts_kernel(parts, dproj, dout, splits, proj_size, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """Both weights' gradients from the partial sums (splits, size) of each."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        to = parts + split.to(tl.int64)[:, None] * size + at[None, :]
        total += tl.sum(tl.load(to, mask=(split < splits)[:, None] & (at < size)[None, :], other=0.0), 0)
    if dproj is not None:
        tl.store(dproj + at, cast(total, dproj.dtype.element_ty), mask=at < proj_size)
    if dout is not None:
        tl.store(dout + (at - proj_size), cast(total, dout.dtype.element_ty), mask=(at >= proj_size) & (at < size))


# --- launchers


def _rows(*maps: Tensor) -> tuple[list[Tensor], list[list[int]], bool]:
    """Maps with positions one step apart, copied where they are not; strides (sample, position, channel); if FLAT."""
    laid, strides, flat = [], [], True
    for each in maps:
        n, _, h, w = each.shape
        even = h == 1 or w == 1 or each.stride(2) == w * each.stride(3)
        t = each if even else each.contiguous()
        step = t.stride(2) if w == 1 else t.stride(3)
        flat = flat and (n == 1 or t.stride(0) == h * w * step)
        laid.append(t)
        strides.append([t.stride(0), step, t.stride(1)])
    return laid, strides, flat


def _sizes(out: Tensor, mode: str) -> dict[str, int]:
    """What a launch is chosen by."""
    order, channels, hidden = out.shape
    return {
        "channels": next_power_of_2(channels), "hidden": next_power_of_2(hidden), "order": order,
        "gates": 1 if mode == "joint" else order, "ragged": int(channels % 8 != 0 or hidden % 8 != 0),
    }  # fmt: skip


def _constants(out: Tensor, mode: str, flat: bool) -> dict[str, Any]:
    order, channels, hidden = out.shape
    return {
        "GATES": 1 if mode == "joint" else order, "ORDER": order, "C": channels, "K": hidden,
        "PRECISION": precision(out.dtype), "FLAT": flat,
    }  # fmt: skip


def value(x: Tensor, other: Tensor, proj: Tensor, out: Tensor, mode: str, result: str, y: Tensor) -> None:
    """Attended features, gate, or mean squared error.

    Args:
        x: (N, C, H, W), any strides; ``other`` is the target of "error", of that shape, and x for others.
        other: see there.
        proj: (R(R+1)/2, K, C), R up to 4, in the type of the matrix products; so is ``out``, (R, C, K).
        out: see there.
        mode: as the op's; ``result`` is "features", "map" or "error".
        result: see there.
        y: of the shape of x, or a float32 scalar for "error".
    """
    error = result == "error"
    if error and x.numel() == 0:
        y.fill_(float("nan"))  # as torch's mean of nothing
        return
    proj, out = proj.contiguous(), out.contiguous()
    (x, other, filled), (x_strides, other_strides, y_strides), flat = _rows(x, other, x if error else y)
    count, positions = x.numel() // x.shape[1], x.shape[2] * x.shape[3]
    chosen = config.choose("high_order_attention", architecture(x), out.dtype, **_sizes(out, mode))
    tiles, blocks = cdiv(count, chosen.tile["BLOCK_M"]), cdiv(x.shape[1], chosen.tile["BLOCK_C"])
    if error:
        filled = x.new_empty(tiles * blocks, dtype=torch.float32)
    constants = _constants(out, mode, flat)
    gate = {"RESULT": result, "config": chosen, **constants}
    strides = (*x_strides, *other_strides, *y_strides)
    if blocks == 1:
        launch(_whole_forward_kernel, (tiles,), x, other, proj, out, filled, count, positions, *strides, **gate)
    else:
        rectified = out.new_empty(count, out.shape[0] * out.shape[2])
        _hidden(x, rectified, proj, out, rectified, chosen, count, positions, *x_strides, GRADIENT=False, **constants)
        launch(
            _split_gate_kernel, (tiles, blocks), x, x, other, rectified, out, filled, rectified, count, positions, 1.0,
            *strides, GRADIENT=False, NEEDS_GRAD_X=False, **gate,
        )  # fmt: skip
    if error:
        sum_of(filled, y, 1 / x.numel())
    elif filled is not y:
        y.copy_(filled)


def _hidden(x: Tensor, dl: Tensor, proj: Tensor, out: Tensor, to: Tensor, how: Launch, *at: int, **more: Any) -> None:
    grid = (cdiv(at[0], how.tile["BLOCK_M"]), cdiv(out.shape[2], how.tile["BLOCK_K"]), out.shape[0])
    launch(_split_hidden_kernel, grid, x, dl, proj, out, to, *at, config=how, **more)


def forward(x: Tensor, proj: Tensor, out: Tensor, mode: str, result: str, y: Tensor) -> None:
    """:func:`value` of "features" or "map"."""
    value(x, x, proj, out, mode, result, y)


def gradients(
    grad_output: Tensor, x: Tensor, other: Tensor, proj: Tensor, out: Tensor, mode: str, result: str,
    dx: Tensor | None, dproj: Tensor | None, dout: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of :func:`value`, whose further arguments these are.

    ``grad_output`` is the gradient of the scalar of "error"; ``other`` its target, or for others the gradient of y, of
    any strides. Of dx, dproj and dout (both contiguous) those that are not needed are None.
    """
    needs_grad_x, needs_grad_proj, needs_grad_out = dx is not None, dproj is not None, dout is not None
    if x.numel() == 0:
        for gradient in (dproj, dout):
            if gradient is not None:
                gradient.zero_()
        return
    proj, out = proj.contiguous(), out.contiguous()
    (x, other, filled), (x_strides, other_strides, dx_strides), flat = _rows(x, other, x if dx is None else dx)
    order, channels, hidden = out.shape
    count, positions = x.numel() // x.shape[1], x.shape[2] * x.shape[3]
    arch, factors, constants = architecture(x), order * (order + 1) // 2, _constants(out, mode, flat)
    gate = {"RESULT": result, "NEEDS_GRAD_X": needs_grad_x, **constants}
    strides = (*x_strides, *other_strides, *dx_strides)
    chosen = config.choose("high_order_attention_backward", arch, out.dtype, **_sizes(out, mode))
    tiles, blocks = cdiv(count, chosen.tile["BLOCK_M"]), cdiv(channels, chosen.tile["BLOCK_C"])
    whole = blocks == 1
    du = out.new_empty((count, factors * hidden) if needs_grad_proj or (needs_grad_x and not whole) else 0)
    dl = out.new_empty((count, constants["GATES"] * channels) if needs_grad_out or not whole else 0)
    a = out.new_empty((count, order * hidden) if needs_grad_out or not whole else 0)
    if whole:
        launch(
            _whole_backward_kernel, (tiles,), grad_output, x, other, proj, out, filled, dl, a, du, count, positions,
            2 / x.numel(), *strides, NEEDS_GRAD_PROJ=needs_grad_proj, NEEDS_GRAD_OUT=needs_grad_out,
            config=chosen, **gate,
        )  # fmt: skip
    else:
        _hidden(x, a, proj, out, a, chosen, count, positions, *x_strides, GRADIENT=False, **constants)
        launch(
            _split_gate_kernel, (tiles, blocks), grad_output, x, other, a, out, filled, dl, count, positions,
            2 / x.numel(), *strides, GRADIENT=True, config=chosen, **gate,
        )  # fmt: skip
        if needs_grad_x or needs_grad_proj:
            _hidden(x, dl, proj, out, du, chosen, count, positions, *x_strides, GRADIENT=True, **constants)
        if needs_grad_x:
            # One product over all factors: it does not depend on the number of gates.
            product = {name: value for name, value in constants.items() if name != "GATES"}
            launch(
                _split_input_kernel, (tiles, blocks), du, proj, filled, count, positions, *dx_strides,
                ADD=result != "map", config=chosen, **product,
            )  # fmt: skip
    if dx is not None and filled is not dx:
        dx.copy_(filled)
    if not (needs_grad_proj or needs_grad_out):
        return
    chosen = config.choose("high_order_attention_weights", arch, out.dtype, **_sizes(out, mode))
    across, block = cdiv(channels, chosen.tile["BLOCK_C"]), chosen.tile["BLOCK_K"]
    jobs = across * (needs_grad_proj * cdiv(factors * hidden, block) + needs_grad_out * order * cdiv(hidden, block))
    rows = cdiv(count, chosen.tile["BLOCK_M"])
    steps = cdiv(rows, max(1, 2 * num_sms(x) // jobs))
    splits = cdiv(rows, steps)
    sizes = needs_grad_proj * proj.numel(), needs_grad_out * out.numel()
    parts = x.new_empty((splits, sum(sizes)), dtype=torch.float32)
    launch(
        _weights_kernel, (jobs, splits), x, dl, a, du, parts, count, positions, steps, *x_strides,
        NEEDS_GRAD_PROJ=needs_grad_proj, NEEDS_GRAD_OUT=needs_grad_out, config=chosen, **constants,
    )  # fmt: skip
    launch(
        _add_parts_kernel, (cdiv(sum(sizes), 64),), parts, dproj, dout, splits, sizes[0], sum(sizes),
        config=Launch(tile={"BLOCK_S": 32, "BLOCK": 64}),
    )  # fmt: skip


def backward(
    grad_output: Tensor, x: Tensor, proj: Tensor, out: Tensor, mode: str, result: str, *results: Tensor | None
) -> None:
    """Gradients of :func:`forward`: ``grad_output`` is that of y; the results are those of :func:`gradients`."""
    gradients(x, x, grad_output, proj, out, mode, result, *results)
