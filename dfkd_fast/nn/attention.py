"""Attention modules. They hold parameters and convolutions; :mod:`dfkd_fast.ops` computes the attention."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.nn.norm import batch_norm_act, batch_norm_act_conv1x1, count_batches, has_hooks
from dfkd_fast.ops.spatial_attention import Norm

__all__ = ["HighOrderAttention", "SpatialAttention"]


class HighOrderAttention(nn.Module):
    """Mixed high-order attention (paper, section 4.2; Chen et al., ICCV 2019).

    Order r = 1..R multiplies r linear maps of the features. A sigmoid of the rectified products gates the features.

    Args:
        channels: number of channels C of the features.
        order: highest order R.
        reduction: C / K; the linear maps have K = max(1, C // reduction) channels.
        mode: ``joint`` applies one sigmoid to the sum over orders, ``per_order`` averages one sigmoid per order.

    Attributes:
        proj_weight: (R (R + 1) / 2, K, C), the maps (order, number) = (1, 1), (2, 1), (2, 2), (3, 1), ...
        out_weight: (R, C, K).

    Raises:
        ValueError: channels, order or reduction is less than 1, or mode is unknown.
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
        """Initialize both weights like a 1 x 1 ``nn.Conv2d``: uniform within 1 / sqrt(fan in)."""
        for weight in (self.proj_weight, self.out_weight):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated features A * x for x (N, C, H, W), any floating dtype.

        Raises:
            ValueError: x is not (N, C, H, W) with C = channels.
        """
        return ops.high_order_attention(x, self.proj_weight, self.out_weight, mode=self.mode)

    def attention(self, x: Tensor) -> Tensor:
        """Return the gate A in [0, 1]; arguments and errors are those of :meth:`forward`."""
        return ops.high_order_attention_map(x, self.proj_weight, self.out_weight, mode=self.mode)

    def extra_repr(self) -> str:
        return f"{self.channels}, order={self.order}, mode={self.mode!r}"


class SpatialAttention(nn.Module):
    """The generator's spatial attention module (paper, Eq. 4 to 6 and figure 2).

    A narrow hourglass of convolutions with one pooling and one unpooling computes a map A_s per channel. Its softmax
    gates the features: ``F + scale * softmax(A_s) * F``.

    Args:
        channels: number of channels C of the features.
        reduction: r; the hourglass has C / r channels at its ends.
        scale: lambda in Eq. 6.
        form: ``spatial`` applies the softmax over the H W positions of each channel, as the paper's text says;
            ``spatial_mean1`` multiplies it by H W, so that its mean is 1; ``channel`` applies the softmax over the
            channels at each position.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        scale: float = 5e-2,
        form: Literal["spatial", "spatial_mean1", "channel"] = "spatial_mean1",
    ) -> None:
        super().__init__()
        width = max(1, channels // reduction)
        self.scale, self.form = scale, form
        self.reduce = nn.Conv2d(channels, width, 1)
        # Convolutions before a BatchNorm have no bias, because the BatchNorm would subtract it.
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
        """Compute the hourglass, (N, C / r, H, W); arguments and errors are those of :meth:`forward`."""
        return self._hourglass(self.reduce(features))

    def _hourglass(self, reduced: Tensor) -> Tensor:
        count_batches([self.encode_norm, self.bottleneck_norm, self.widen_norm, self.decode_norm])
        relu: Any = {"activation": "relu", "count": False}
        normed = batch_norm_act(self.encode_norm, self.encode(reduced), count=False)
        pooled, code = ops.max_pool2x2(normed, relu=True)
        gamma = batch_norm_act(self.bottleneck_norm, self.bottleneck(pooled), **relu)
        widened = batch_norm_act(self.widen_norm, self.widen(gamma), **relu)
        unpooled = ops.max_unpool2x2(widened, code, normed.shape[-2:])
        return batch_norm_act(self.decode_norm, self.decode(unpooled), **relu)

    def forward(self, features: Tensor) -> Tensor:
        """Gate features (N, C, H, W), with H and W at least 2, any floating dtype; the result has the same shape.

        Raises:
            ValueError: H or W is less than 2, or the form is unknown.
        """
        return self._gate(features, self.hidden(features))

    def attention(self, features: Tensor) -> Tensor:
        """Return the gate ``1 + scale * softmax(A_s)``; arguments and errors are those of :meth:`forward`."""
        return self._gate(torch.ones_like(features), self.hidden(features))

    def _gate(self, features: Tensor, hidden: Tensor, norm: Norm | None = None) -> Tensor:
        weight = self.expand.weight.flatten(1)
        options: Any = {"scale": self.scale, "form": self.form, "norm": norm}
        return ops.spatial_attention(features, hidden, weight, self.expand.bias, **options)

    def forward_normalized(self, x: Tensor, bn: nn.BatchNorm2d, negative_slope: float) -> Tensor:
        """Gate ``leaky_relu(bn(x))``. Kernels need not write it; the batch is not counted.

        Args:
            x: (N, C, H, W), with H and W at least 2, any floating dtype.
            bn: the BatchNorm of the features.
            negative_slope: slope of the leaky ReLU.

        Returns:
            The result of :meth:`forward` for these features.

        Raises:
            ValueError: H or W is less than 2, the form is unknown, or training has only one value per channel.
        """
        if has_hooks(self) or type(self).forward is not SpatialAttention.forward:
            return self(batch_norm_act(bn, x, activation="leaky_relu", negative_slope=negative_slope, count=False))
        reduced, features, norm = batch_norm_act_conv1x1(bn, self.reduce, x, negative_slope=negative_slope, count=False)
        return self._gate(features, self._hourglass(reduced), norm)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, form={self.form!r}"
