"""Attention modules: parameters and convolutions here, the attention's own mathematics in :mod:`dfkd_fast.ops`."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops

__all__ = ["HighOrderAttention", "SpatialAttention"]


class HighOrderAttention(nn.Module):
    """Mixed high-order attention (paper, section 3.3; Chen et al., ICCV 2019).

    Order r multiplies r linear maps of the features element-wise; the rectified products of all orders decide, through
    a sigmoid, how much of each feature passes.

    Args:
        channels: C, of the features.
        order: R, the highest order.
        reduction: C / K; the maps have K = max(1, C // reduction) channels.
        mode: ``joint`` is one sigmoid over the summed orders, ``per_order`` the mean of one sigmoid an order.

    Attributes:
        proj_weight: (R (R + 1) / 2, K, C), factors ordered (1, 1), (2, 1), (2, 2), (3, 1), ...
        out_weight: (R, C, K).

    Raises:
        ValueError: channels, order or reduction below 1, or an unknown mode.
    """

    def __init__(
        self, channels: int, *, order: int = 3, reduction: int = 4, mode: Literal["joint", "per_order"] = "joint"
    ) -> None:
        super().__init__()
        if min(channels, order, reduction) < 1:
            raise ValueError(
                f"channels, order and reduction must be at least 1, got {channels}, {order} and {reduction}"
            )
        if mode not in ("joint", "per_order"):
            raise ValueError(f"mode must be 'joint' or 'per_order', got {mode!r}")
        hidden = max(1, channels // reduction)
        self.channels, self.order, self.mode = channels, order, mode
        self.proj_weight = nn.Parameter(torch.empty(order * (order + 1) // 2, hidden, channels))
        self.out_weight = nn.Parameter(torch.empty(order, channels, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights as ``nn.Conv2d`` draws those of a 1 x 1 convolution: uniform within 1 / sqrt(fan in)."""
        for weight in (self.proj_weight, self.out_weight):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """The attended features A * x, (N, C, H, W) as x."""
        return ops.high_order_attention(x, self.proj_weight, self.out_weight, mode=self.mode)

    def attention(self, x: Tensor) -> Tensor:
        """The attention map A alone, (N, C, H, W), each value in (0, 1)."""
        return ops.high_order_attention_map(x, self.proj_weight, self.out_weight, mode=self.mode)

    def extra_repr(self) -> str:
        return f"{self.channels}, order={self.order}, mode={self.mode!r}"


class SpatialAttention(nn.Module):
    """The generator's spatial attention module (paper, Eq. 4 to 6 and figure 2).

    A narrow hourglass of convolutions, one pooling and one unpooling deep, writes a map per channel; the softmax of
    that map gates the features: ``F + scale * softmax(A_s) * F``.

    Args:
        channels: C, of the features.
        reduction: r; the hourglass is C / r channels wide at its ends.
        scale: lambda of Eq. 6.
        form: ``spatial`` is the softmax over the H W positions of each channel, ``spatial_mean1`` the same times H W,
            ``channel`` the softmax over the channels at each position.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        scale: float = 5e-2,
        form: Literal["spatial", "spatial_mean1", "channel"] = "spatial",
    ) -> None:
        super().__init__()
        width = max(1, channels // reduction)
        self.scale, self.form = scale, form
        self.reduce = nn.Conv2d(channels, width, 1)
        # A convolution before a BatchNorm has no bias: the norm would subtract it.
        self.encode = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.encode_norm = nn.BatchNorm2d(2 * width)
        self.bottleneck = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bottleneck_norm = nn.BatchNorm2d(4 * width)
        self.widen = nn.ConvTranspose2d(4 * width, 2 * width, 3, padding=1, bias=False)
        self.widen_norm = nn.BatchNorm2d(2 * width)
        self.decode = nn.ConvTranspose2d(2 * width, width, 3, padding=1, bias=False)
        self.decode_norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, channels, 1)

    def hidden(self, features: Tensor) -> Tensor:
        """The hourglass: (N, C, H, W) to the maps h, (N, C / r, H, W), that the gate expands. H and W at least 2."""
        normed = self.encode_norm(self.encode(self.reduce(features)))
        pooled, code = ops.max_pool2x2(normed, relu=True)
        gamma = F.relu(self.bottleneck_norm(self.bottleneck(pooled)))
        widened = F.relu(self.widen_norm(self.widen(gamma)))
        unpooled = ops.max_unpool2x2(widened, code, normed.shape[-2:])
        return F.relu(self.decode_norm(self.decode(unpooled)))

    def forward(self, features: Tensor) -> Tensor:
        """Gate (N, C, H, W) features; the result has their shape."""
        weight = self.expand.weight.flatten(1)
        return ops.spatial_attention(
            features, self.hidden(features), weight, self.expand.bias, scale=self.scale, form=self.form
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}, form={self.form!r}"
