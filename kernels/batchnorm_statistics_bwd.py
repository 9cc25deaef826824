"""Gradients of a frozen BatchNorm with its input's statistics: see :mod:`dfkd_fast.kernels.batchnorm_statistics`.

Element by element: nothing is read that is not needed, and where neither the statistics nor the mask want it, x is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batchnorm_statistics import (
    ACTIVATIONS,
    channel_tile,
    distance,
    division,
    flattened,
    gain_of,
    known,
    layout_of,
    match_memory_format,
    on_channels,
    on_slots,
    passes,
    per_channel,
    place_of,
    pointers,
)
from dfkd_fast.kernels.common import cast, cdiv, launch
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "statistics_backward"]


@config.heuristic("batchnorm_statistics_backward", REPEATS=(1, 8), SLOTS=(8, 512), STAGES=(1, 3))
def _config(arch: int, dtype: torch.dtype, **sizes: int) -> Launch:
    """As forward, with two maps to read. In float32 with a residual, ptxas spills what is fetched ahead."""
    return channel_tile(dtype, 2, 1 if sizes["residual"] and dtype == torch.float32 else 2, sizes)


@triton.jit
def unpacked(octets, PLANES: tl.constexpr, SLOTS: tl.constexpr, REPEATS: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of ``_packed`` of the forward's module."""
    octets = octets.to(tl.int32)
    if PLANES:
        bits = (octets[:, None, :, :] >> tl.arange(0, 8)[None, :, None, None]) & 1
        bits = tl.reshape(bits, [CHANNELS, REPEATS, SLOTS])
    else:
        bits = (octets[:, :, :, None] >> tl.arange(0, 8)[None, None, None, :]) & 1
        bits = tl.reshape(bits, [SLOTS, REPEATS, CHANNELS])
    return bits != 0


@triton.jit
def _backward_kernel(
    dy,
    dmean,
    dvar,
    grad_output,
    x,
    mask,
    running_mean,
    running_var,
    weight,
    bias,
    mean,
    dx,
    dresidual,
    dweights,
    dbiases,
    turns,
    per_sample,
    positions,
    channels,
    over,
    eps,
    dy_n,
    dy_p,
    dy_c,
    x_n,
    x_p,
    x_c,
    mask_n,
    mask_p,
    mask_c,
    dx_n,
    dx_p,
    dx_c,
    dresidual_n,
    dresidual_p,
    dresidual_c,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    SAMPLES: tl.constexpr,
    UNIT: tl.constexpr,
    REPEATS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    AXIS: tl.constexpr = 1 if PLANES else 0
    if PLANES:
        positions = known(positions, UNIT)
    else:
        channels = known(channels, UNIT)
    # Blocks of channels first, so that whole rows are read at one time.
    blocks = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    begin = chunk // per_sample
    step = tl.num_programs(0) // blocks // per_sample
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    channel_in = channel < channels
    column = on_channels(channel, PLANES).to(tl.int64)
    row = (tl.arange(0, REPEATS)[None, :, None] * SLOTS + on_slots(tl.arange(0, SLOTS), PLANES)).to(tl.int64)
    if x is not None:
        x = pointers(x, row, column, x_p, x_c, PLANES, UNIT)
    if dy is not None:
        dy = pointers(dy, row, column, dy_p, dy_c, PLANES, UNIT)
        gain = gain_of(running_var, weight, channel, channel_in, eps, PLANES)
        if x is not None:
            shift = per_channel(running_mean, channel, channel_in, PLANES)
        if bias is not None:
            offset = per_channel(bias, channel, channel_in, PLANES)
    if dx is not None:
        dx = pointers(dx, row, column, dx_p, dx_c, PLANES, UNIT)
    if grad_output is not None:
        over *= tl.load(grad_output).to(tl.float32)
    if dmean is not None:
        constant = per_channel(dmean, channel, channel_in, PLANES) * over
    if dvar is not None:
        slope = per_channel(dvar, channel, channel_in, PLANES) * (2 * over)
        centre = per_channel(mean, channel, channel_in, PLANES)
    if dresidual is not None:
        dresidual = pointers(dresidual, row, column, dresidual_p, dresidual_c, PLANES, UNIT)
    if mask is not None:
        octet = block * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
        octet_in = on_channels(octet * 8 < channels, PLANES)
        mask = pointers(mask, row, on_channels(octet, PLANES).to(tl.int64), mask_p, mask_c, PLANES, 1)
    sum_weight = tl.zeros([CHANNELS, SLOTS] if PLANES else [SLOTS, CHANNELS], tl.float32)
    sum_bias = tl.zeros_like(sum_weight)
    if dweights is not None:
        inverse = gain_of(running_var, None, channel, channel_in, eps, PLANES)

    for turn in tl.range(begin, turns, step, num_stages=STAGES):
        sample, first = place_of(turn, chunk, per_sample, SAMPLES, SLOTS * REPEATS)
        row_in = first + row < positions
        inside = row_in & on_channels(channel_in, PLANES)
        if x is not None:
            v = tl.load(x + distance(sample, first, x_n, x_p, PLANES, UNIT), mask=inside, other=0.0).to(tl.float32)
        if dy is not None:
            g = tl.load(dy + distance(sample, first, dy_n, dy_p, PLANES, UNIT), mask=inside, other=0.0).to(tl.float32)
            if mask is not None:
                at = mask + distance(sample, first, mask_n, mask_p, PLANES, 1)
                octets = tl.load(at, mask=row_in & octet_in, other=0)
                g = tl.where(unpacked(octets, PLANES, SLOTS, REPEATS, CHANNELS), g, 0.0)
            elif ACTIVATION > 0:
                # The forward's own expression, so that both round alike.
                z = (v - shift) * gain
                if bias is not None:
                    z += offset
                g = tl.where(passes(z, ACTIVATION), g, 0.0)
            if dresidual is not None:
                at = dresidual + distance(sample, first, dresidual_n, dresidual_p, PLANES, UNIT)
                tl.store(at, cast(g, dresidual.dtype.element_ty), mask=inside)
            if dweights is not None:
                sum_weight += tl.sum(g * ((v - shift) * inverse), 1)
            if dbiases is not None:
                sum_bias += tl.sum(g, 1)
        if dx is not None:
            if dy is not None:
                out = g * gain
                if dmean is not None:
                    out += constant
                if dvar is not None:
                    out += slope * (v - centre)
            elif dvar is not None:
                out = slope * (v - centre)
                if dmean is not None:
                    out += constant
            else:
                out = tl.broadcast_to(constant, inside.shape)
            at = dx + distance(sample, first, dx_n, dx_p, PLANES, UNIT)
            tl.store(at, cast(out, dx.dtype.element_ty), mask=inside)

    at = chunk.to(tl.int64) * channels + channel
    if dweights is not None:
        tl.store(dweights + at, tl.sum(sum_weight, AXIS), mask=channel_in)
    if dbiases is not None:
        tl.store(dbiases + at, tl.sum(sum_bias, AXIS), mask=channel_in)


@triton.jit
def _columns_kernel(parts, out, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        total += tl.load(parts + at, mask=(row < rows)[:, None] & (channel < channels)[None, :], other=0.0)
    tl.store(out + channel, cast(tl.sum(total, 0), out.dtype.element_ty), mask=channel < channels)


def backward(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    mean: Tensor,
    mask: Tensor | None,
    residual_dtype: torch.dtype | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    grad_output: Tensor | None = None,
) -> None:
    """Gradients of the forward.

    Args:
        dy: gradient of y, any strides; None for zero, as the next two.
        dmean: gradient of mean.
        dvar: gradient of var.
        x: as in forward, like all up to ``mask``.
        running_mean: (C,); None if dy is, as the next three.
        running_var: (C,).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: the op's.
        activation: the op's.
        mean: (C,).
        mask: as in forward; None where the activation is to be recomputed from x.
        residual_dtype: that of the residual, or None.
        dx: of the shape of x, contiguous or channels-last; None if it is not needed, as the next three.
        dweight: (C,), any floating dtype.
        dbias: (C,), likewise.
        dresidual: of the shape of x, contiguous or channels-last, in its dtype.
        grad_output: a scalar that dmean and dvar are multiplied by; None for one.
    """
    channels = x.shape[1]
    if x.shape[0] == 0 or dy is None:
        for out in (dweight, dbias, dresidual):
            if out is not None:
                out.zero_()
        dweight = dbias = dresidual = None
    map_grad = dx if dx is not None else dresidual
    if x.shape[0] == 0 or (map_grad is None and dweight is None and dbias is None):
        return
    if dx is None:
        dmean = dvar = None
    like = map_grad if map_grad is not None else dy
    assert like is not None
    reads_x = dvar is not None or dweight is not None or (dy is not None and activation != "none" and mask is None)
    # Where dx comes of the activation alone and that of the mask, nothing says how x lies but its shape.
    read = match_memory_format(x, like) if reads_x else None
    dy = None if dy is None else match_memory_format(dy, like)
    vectors = (None if v is None or dy is None else v.contiguous() for v in (running_mean, running_var, weight, bias))
    dmean, dvar = (None if v is None else v.contiguous() for v in (dmean, dvar))
    samples, positions, strides = flattened(x, (dy, read, mask, dx, dresidual))
    # Those that are written first, since theirs is the dense layout.
    maps = [strides[i] for i, t in ((3, dx), (4, dresidual), (0, dy), (1, read)) if t is not None]
    chosen, constants = layout_of("batchnorm_statistics_backward", x, samples, positions, maps, dresidual is not None)
    programs = 4 if dweight is not None or dbias is not None else 16
    blocks, chunks, turns, per_sample = division(x, chosen, samples, positions, programs)
    parts = [None if out is None else x.new_empty((chunks, channels), dtype=torch.float32) for out in (dweight, dbias)]
    launch(
        _backward_kernel,
        (blocks * chunks,),
        dy,
        dmean,
        dvar,
        grad_output,
        read,
        mask,
        *vectors,
        mean,
        dx,
        dresidual,
        *parts,
        turns,
        per_sample,
        positions,
        channels,
        1 / (samples * positions),
        eps,
        *(number for s in strides for number in s),
        config=chosen,
        ACTIVATION=ACTIVATIONS[activation],
        **constants,
    )
    for part, out in zip(parts, (dweight, dbias), strict=True):
        if part is not None and out is not None:
            launch(
                _columns_kernel,
                (cdiv(channels, 32),),
                part,
                out,
                chunks,
                channels,
                config=Launch(tile={"ROWS": 32, "CHANNELS": 32}),
            )


def statistics_backward(
    dmean: Tensor | None, dvar: Tensor | None, x: Tensor, mean: Tensor, dx: Tensor, grad_output: Tensor | None = None
) -> None:
    """Gradient of the statistics alone; the arguments are those of :func:`backward`."""
    nothing = (None, None, None)
    norm = (None, None, None, None, 1.0, "none")
    backward(None, dmean, dvar, x, *norm, mean, None, None, dx, *nothing, grad_output)
