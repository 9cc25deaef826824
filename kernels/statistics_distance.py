"""How far a batch's statistics are from stored ones: one program after those of the statistics, one launch back.

With m and v mean and variance of each channel over M values, r_m and r_v the stored ones and g the upstream gradient::

    distance = |m - r_m| + |v - r_v|
    u = (m - r_m) / |m - r_m|     w = (v - r_v) / |v - r_v|     (zeros where the norm is zero)
    dx = g u / M + 2 g w (x - m) / M

so that backward is that of the statistics, with u and w for their gradients. Saved are m, u and w.

Norms. Before they are squared, differences are divided by the power of two at or below the largest of them, which
changes no digit, so that no square overflows and none that counts vanishes. They stay in registers where a tile holds
all channels, and are read three times where not.

Memory traffic: that of the statistics, one map forward and two back. A few numbers a channel are all that is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels import config
from dfkd_fast.kernels.batchnorm_statistics import statistics
from dfkd_fast.kernels.batchnorm_statistics_bwd import statistics_backward
from dfkd_fast.kernels.common import INTERPRETED, architecture, launch, next_power_of_2
from dfkd_fast.kernels.config import Launch

__all__ = ["backward", "forward"]


@config.heuristic("statistics_distance")
def _config(arch: int, dtype: torch.dtype, *, channels: int) -> Launch:
    """All channels in one program, which waits only for memory and its own barriers: four channels per thread."""
    block = max(32, min(channels, 4096))
    return Launch(tile={"BLOCK": block}, num_warps=max(1, min(8, block // 128)))


@triton.jit
def _differences(saved, running_mean, running_var, channel, channels):
    """(channels, 2): of the means and of the variances from the stored ones."""
    inside = channel < channels
    mean = tl.load(saved + channel, mask=inside, other=0.0)
    var = tl.load(saved + 2 * channels + channel, mask=inside, other=0.0)
    mean -= tl.load(running_mean + channel, mask=inside, other=0.0).to(tl.float32)
    var -= tl.load(running_var + channel, mask=inside, other=0.0).to(tl.float32)
    return tl.join(mean, var)


@triton.jit
def _powers(largest):
    """The power of two at or below a number, and its inverse; both within those of normal numbers."""
    # The exponents of 2^-126 and 2^126: an infinity has its own, and what is nearest to zero has none.
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _squares(scaled, BLOCK: tl.constexpr):
    """Sums over the channels. The interpreter adds rows up one by one, and so less exactly than threads do."""
    if INTERPRETED:
        return tl.sum(tl.sum(tl.reshape(scaled * scaled, [32, BLOCK // 32, 2]), 1), 0)
    else:
        return tl.sum(scaled * scaled, 0)


@triton.jit
def _store_directions(saved, scaled, root, channel, channels):
    """The unit vectors that the norms change along."""
    root = tl.where(root == 0, 1.0, root)
    # The variances stand where their direction goes, and threads may hold an element twice: all have read it first.
    tl.debug_barrier()
    mean, var = tl.split(tl.div_rn(scaled, tl.broadcast_to(root[None, :], scaled.shape)))
    tl.store(saved + channels + channel, mean, mask=channel < channels)
    tl.store(saved + 2 * channels + channel, var, mask=channel < channels)


@triton.jit
def _distance_kernel(saved, running_mean, running_var, distance, channels, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    scaled = _differences(saved, running_mean, running_var, channel, channels)
    largest = tl.max(tl.abs(scaled), 0)
    if not WHOLE:
        for start in range(BLOCK, channels, BLOCK):
            further = _differences(saved, running_mean, running_var, start + channel, channels)
            largest = tl.maximum(largest, tl.max(tl.abs(further), 0))
    scale, inverse = _powers(largest)
    scaled *= inverse[None, :]
    squares = _squares(scaled, BLOCK)
    if not WHOLE:
        for start in range(BLOCK, channels, BLOCK):
            further = _differences(saved, running_mean, running_var, start + channel, channels) * inverse[None, :]
            squares += _squares(further, BLOCK)
    root = tl.sqrt_rn(squares)
    tl.store(distance, tl.sum(scale * root, 0))
    if not WHOLE:
        for start in range(BLOCK, channels, BLOCK):
            further = _differences(saved, running_mean, running_var, start + channel, channels) * inverse[None, :]
            _store_directions(saved, further, root, start + channel, channels)
    _store_directions(saved, scaled, root, channel, channels)


def forward(x: Tensor, running_mean: Tensor, running_var: Tensor, distance: Tensor, saved: Tensor) -> None:
    """The distance of the statistics of x to the stored ones.

    Args:
        x: (N, C, ...), any strides.
        running_mean: (C,), any floating dtype.
        running_var: (C,), likewise.
        distance: a float32 scalar.
        saved: (3, C), float32, contiguous, for :func:`backward`.
    """
    channels = x.shape[1]
    # The variances are where the last row will be: the kernel below is done with them when it writes that.
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
        WHOLE=channels <= chosen.tile["BLOCK"],
    )


def backward(grad_output: Tensor, x: Tensor, saved: Tensor, dx: Tensor) -> None:
    """Gradient of :func:`forward`.

    Args:
        grad_output: gradient of ``distance``.
        x: as there.
        saved: as there.
        dx: of the shape of x, contiguous or channels-last.
    """
    mean, along_mean, along_var = saved.unbind()
    statistics_backward(along_mean, along_var, x, mean, dx, grad_output)
