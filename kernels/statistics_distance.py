"""Distance between batch statistics and running statistics: one launch after those that compute the batch statistics.

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

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batchnorm_statistics import statistics
from dfkd_fast.kernels.batchnorm_statistics_bwd import statistics_backward
from dfkd_fast.kernels.common import INTERPRETED, architecture, launch, next_power_of_2, traffic
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward"]


@config.heuristic("statistics_distance")
def _config(arch: int, dtype: torch.dtype, *, channels: int) -> Launch:
    """One program, bound by latency: four channels per thread if there are 128 to 1,024 channels."""
    block = max(32, min(channels, 4096))
    return Launch(tile={"BLOCK": block}, num_warps=max(1, min(8, block // 128)))


@triton.jit
def _load_differences(stats_ptr, running_mean_ptr, running_var_ptr, offs, channels):
    """(BLOCK, 2): means and variances minus the stored ones."""
    mask = offs < channels
    mean = tl.load(stats_ptr + offs, mask=mask, other=0.0)
    var = tl.load(stats_ptr + 2 * channels + offs, mask=mask, other=0.0)
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
def _store_directions(stats_ptr, scaled, norm, offs, channels):
    """Store u and w."""
    norm = tl.where(norm == 0, 1.0, norm)
    # w replaces the variances. If several threads hold the same element, all of them must have read it before.
    tl.debug_barrier()
    u, w = tl.split(tl.div_rn(scaled, tl.broadcast_to(norm[None, :], scaled.shape)))
    tl.store(stats_ptr + channels + offs, u, mask=offs < channels)
    tl.store(stats_ptr + 2 * channels + offs, w, mask=offs < channels)


@traffic(writes="distance_ptr", updates="stats_ptr", parts={"stats_ptr": lambda a: 2 / 3})
@triton.jit
def _distance_kernel(
    stats_ptr,  # [3, C]: on entry m, unused and v; on exit m, u and w
    running_mean_ptr,  # [C]
    running_var_ptr,  # [C]
    distance_ptr,  # []
    channels,
    ONE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    scaled = _load_differences(stats_ptr, running_mean_ptr, running_var_ptr, offs, channels)
    largest = tl.max(tl.abs(scaled), 0)
    if not ONE_TILE:
        for start in range(BLOCK, channels, BLOCK):
            more = _load_differences(stats_ptr, running_mean_ptr, running_var_ptr, start + offs, channels)
            largest = tl.maximum(largest, tl.max(tl.abs(more), 0))
    scale, inverse = _power_of_2(largest)
    scaled *= inverse[None, :]
    squares = _sum_squares(scaled, BLOCK)
    if not ONE_TILE:
        for start in range(BLOCK, channels, BLOCK):
            more = _load_differences(stats_ptr, running_mean_ptr, running_var_ptr, start + offs, channels)
            squares += _sum_squares(more * inverse[None, :], BLOCK)
    norm = tl.sqrt_rn(squares)
    tl.store(distance_ptr, tl.sum(scale * norm, 0))
    if not ONE_TILE:
        for start in range(BLOCK, channels, BLOCK):
            more = _load_differences(stats_ptr, running_mean_ptr, running_var_ptr, start + offs, channels)
            _store_directions(stats_ptr, more * inverse[None, :], norm, start + offs, channels)
    _store_directions(stats_ptr, scaled, norm, offs, channels)


def forward(x: Tensor, running_mean: Tensor, running_var: Tensor, distance: Tensor, saved: Tensor) -> None:
    """Distance between the statistics of x and the stored ones.

    Args:
        x: (N, C, ...), any strides.
        running_mean: (C,), any floating dtype.
        running_var: (C,), any floating dtype.
        distance: Output, scalar, float32.
        saved: Output, (3, C), float32, contiguous, for :func:`backward`.
    """
    channels = x.shape[1]
    # The variances are in the last row until the kernel below overwrites it.
    statistics(x, saved[0], saved[2])
    chosen = config.choose(
        "statistics_distance", architecture(x), saved.dtype, channels=min(next_power_of_2(channels), 4096)
    )
    launch(
        _distance_kernel,
        (1,),
        saved,
        running_mean.contiguous(),
        running_var.contiguous(),
        distance,
        channels,
        config=chosen,
        ONE_TILE=channels <= chosen.tile["BLOCK"],
    )


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
