"""Distance between batch statistics and running statistics: one launch after those that compute the batch statistics.

The same launch computes the distances of all layers of a network, one program per layer.

With m and v the mean and variance per channel over M values, r_m and r_v the running ones, and |.| the L2 norm::

    distance = |m - r_m| + |v - r_v|

Gradient, with g = grad_output, and 0 for u or w if its norm is 0::

    u = (m - r_m) / |m - r_m|     w = (v - r_v) / |v - r_v|     dx = g u / M + 2 g w (x - m) / M

This is the backward of the statistics, with g u and g w as the gradients of m and v. m, u and w are saved.

Norms. Before the differences are squared, they are divided by the largest power of two that does not exceed their
maximum. The division is exact. No square overflows, and a square that underflows would not change the sum. If a tile
holds all channels, the differences stay in registers; otherwise they are read three times.

Memory traffic: that of the statistics (2-byte elements: 2 bytes per element forward, 4 bytes backward). The distance
adds a few values per channel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batchnorm_statistics import statistics
from dfkd_fast.kernels.batchnorm_statistics_bwd import statistics_backward
from dfkd_fast.kernels.common import INTERPRETED, MAX_LAYERS, architecture, launch, next_power_of_2, select, traffic
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward", "forward_layers"]


@config.heuristic("statistics_distance")
def _config(arch: int, dtype: torch.dtype, *, channels: int) -> Launch:
    """One program, bound by latency: four channels per thread if there are 128 to 1,024 channels."""
    block = max(32, min(channels, 4096))
    return Launch(tile={"BLOCK": block}, num_warps=max(1, min(8, block // 128)))


@triton.jit
def _load_differences(mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, offs, channels):
    """(BLOCK, 2): means and variances minus the stored ones."""
    mask = offs < channels
    mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean -= tl.load(running_mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    var -= tl.load(running_var_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.join(mean, var)


@triton.jit
def _power_of_2(x):
    """The largest power of two that does not exceed x, and its inverse, limited to normal numbers."""
    # The limits are the exponents of 2^-126 and 2^126: infinity has a larger one, and denormals have none.
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _sum_squares(x, BLOCK: tl.constexpr):
    """Sum over channels. The interpreter adds rows one by one, so there two steps are more accurate."""
    if INTERPRETED:
        return tl.sum(tl.sum(tl.reshape(x * x, [32, BLOCK // 32, 2]), 1), 0)
    else:
        return tl.sum(x * x, 0)


@triton.jit
def _store_directions(directions_ptr, scaled, norm, offs, channels):
    """Store u and w."""
    norm = tl.where(norm == 0, 1.0, norm)
    # w may replace the variances. If several threads hold the same element, all of them must have read it before.
    tl.debug_barrier()
    u, w = tl.split(tl.div_rn(scaled, tl.broadcast_to(norm[None, :], scaled.shape)))
    tl.store(directions_ptr + offs, u, mask=offs < channels)
    tl.store(directions_ptr + channels + offs, w, mask=offs < channels)


@traffic(writes="distances_ptr directions_ptr")
@triton.jit
def _distance_kernel(
    means,  # one [C] per layer, like the next three
    variances,
    running_means,
    running_vars,
    starts,  # sum of C of the layers before each layer, and of all layers
    distances_ptr,  # [layers]
    directions_ptr,  # [2 * sum of C]: u and w of each layer; w may be in the memory of the variances
    ONE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    mean_ptr, var_ptr = select(means, layer), select(variances, layer)
    running_mean_ptr, running_var_ptr = select(running_means, layer), select(running_vars, layer)
    start = select(starts, layer)
    channels = select(starts, layer + 1) - start
    directions_ptr += 2 * start
    offs = tl.arange(0, BLOCK)
    scaled = _load_differences(mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, offs, channels)
    largest = tl.max(tl.abs(scaled), 0)
    if not ONE_TILE:
        for first in range(BLOCK, channels, BLOCK):
            more = _load_differences(mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, first + offs, channels)
            largest = tl.maximum(largest, tl.max(tl.abs(more), 0))
    scale, inverse = _power_of_2(largest)
    scaled *= inverse[None, :]
    squares = _sum_squares(scaled, BLOCK)
    if not ONE_TILE:
        for first in range(BLOCK, channels, BLOCK):
            more = _load_differences(mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, first + offs, channels)
            squares += _sum_squares(more * inverse[None, :], BLOCK)
    norm = tl.sqrt_rn(squares)
    tl.store(distances_ptr + layer, tl.sum(scale * norm, 0))
    if not ONE_TILE:
        for first in range(BLOCK, channels, BLOCK):
            more = _load_differences(mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, first + offs, channels)
            _store_directions(directions_ptr, more * inverse[None, :], norm, first + offs, channels)
    _store_directions(directions_ptr, scaled, norm, offs, channels)


def _of_one_dtype(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Contiguous tensors of one dtype, as :func:`select` requires."""
    mixed = len({t.dtype for t in tensors}) > 1
    return tuple(t.to(torch.float32 if mixed else t.dtype).contiguous() for t in tensors)


def forward_layers(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    distances: Tensor,
    directions: Tensor,
) -> None:
    """Distances between the given statistics and the stored ones, and their gradients.

    Args:
        means: (C,) per layer, any floating dtype.
        variances: (C,) per layer, any floating dtype.
        running_means: (C,) per layer, any floating dtype.
        running_vars: (C,) per layer, any floating dtype.
        distances: Output, (layers,), float32.
        directions: Output, (2 * sum of C,), float32: the gradients of each layer's mean and variance.
    """
    starts = [0, *itertools.accumulate(len(mean) for mean in means)]
    largest = max(len(mean) for mean in means)
    chosen = config.choose(
        "statistics_distance", architecture(directions), torch.float32, channels=min(next_power_of_2(largest), 4096)
    )
    groups = [_of_one_dtype(each) for each in (means, variances, running_means, running_vars)]
    for first in range(0, len(means), MAX_LAYERS):
        part = slice(first, first + MAX_LAYERS)
        launch(
            _distance_kernel,
            (len(means[part]),),
            *(group[part] for group in groups),
            tuple(starts[first : first + MAX_LAYERS + 1]),
            distances[part],
            directions,
            config=chosen,
            ONE_TILE=largest <= chosen.tile["BLOCK"],
        )


def forward(x: Tensor, running_mean: Tensor, running_var: Tensor, distance: Tensor, saved: Tensor) -> None:
    """Distance between the statistics of x and the stored ones.

    Args:
        x: (N, C, ...), any strides.
        running_mean: (C,), any floating dtype.
        running_var: (C,), any floating dtype.
        distance: Output, scalar, float32.
        saved: Output, (3, C), float32, contiguous, for :func:`backward`.
    """
    # The variances are in the last row until the kernel overwrites it with w.
    statistics(x, saved[0], saved[2])
    forward_layers([saved[0]], [saved[2]], [running_mean], [running_var], distance.view(1), saved[1:])


def backward(grad_output: Tensor, x: Tensor, saved: Tensor, dx: Tensor) -> None:
    """Gradient of :func:`forward`.

    Args:
        grad_output: Gradient of ``distance``, a scalar.
        x: As in forward.
        saved: From forward.
        dx: Output, same shape as x, contiguous or channels-last.
    """
    mean, dmean, dvar = saved.unbind()
    statistics_backward(dmean, dvar, x, mean, dx, grad_output)
