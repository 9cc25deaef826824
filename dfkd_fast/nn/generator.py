"""The attention generator (paper, table 6): noise to images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from dfkd_fast.nn.attention import SpatialAttention

__all__ = ["AttentionGenerator", "freeze_spectral_norm"]


class _Block(nn.Module):
    """Twice the size: transposed convolution, [BatchNorm], LeakyReLU, [spatial attention]."""

    def __init__(
        self, inputs: int, outputs: int, *, batch_norm: bool, spectral_norm: bool, attention: SpatialAttention | None
    ) -> None:
        super().__init__()
        convolution = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        self.upsample = parametrizations.spectral_norm(convolution) if spectral_norm else convolution
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()
        self.activation = nn.LeakyReLU(0.2)
        self.attention = attention if attention is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.activation(self.norm(self.upsample(x))))


class AttentionGenerator(nn.Module):
    """Noise (N, latent_dim) to images (N, 3, H, W) in [-1, 1].

    A linear layer and a BatchNorm make the first map, H / 16 x W / 16; four blocks double it; a convolution and tanh
    paint it. Spectral norm is on the transposed convolutions alone.

    Args:
        image_size: H and W, a multiple of 16.
        latent_dim: length of the noise vector.
        channels: widths of the first map and of the four blocks' outputs.
        batch_norm: a BatchNorm in each block; the paper's table has none.
        spectral_norm: spectral norm, one power iteration each time the module runs in training mode.
        attention: the gate's form, or ``none`` for a generator without attention modules.
        attention_scale: lambda of Eq. 6.
        attention_reduction: r of the attention modules.

    Raises:
        ValueError: image_size is not a positive multiple of 16, or channels are not five.
    """

    def __init__(
        self,
        image_size: int,
        *,
        latent_dim: int = 256,
        channels: Sequence[int] = (512, 256, 128, 64, 64),
        batch_norm: bool = True,
        spectral_norm: bool = True,
        attention: Literal["spatial", "spatial_mean1", "channel", "none"] = "spatial",
        attention_scale: float = 5e-2,
        attention_reduction: int = 8,
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16, got {image_size}")
        if len(channels) != 5:
            raise ValueError(f"channels must be five widths, the first map's and the four blocks', got {channels}")
        self.image_size, self.latent_dim, self.first = image_size, latent_dim, image_size // 16
        self.project = nn.Linear(latent_dim, channels[0] * self.first**2)
        self.project_norm = nn.BatchNorm2d(channels[0])
        self.blocks = nn.Sequential()
        for inputs, outputs in pairwise(channels):
            gate = None
            if attention != "none":
                gate = SpatialAttention(outputs, reduction=attention_reduction, scale=attention_scale, form=attention)
            self.blocks.append(
                _Block(inputs, outputs, batch_norm=batch_norm, spectral_norm=spectral_norm, attention=gate)
            )
        self.paint = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        first = self.project(noise).unflatten(1, (-1, self.first, self.first))
        return self.paint(self.blocks(self.project_norm(first))).tanh()


@contextmanager
def freeze_spectral_norm(module: nn.Module) -> Iterator[None]:
    """Inside, spectral norms of ``module`` divide by their present estimate and do not iterate it.

    A student step draws images from a generator that it must leave untouched, power-iteration vectors included.
    """
    norms = [
        parametrization
        for child in module.modules()
        if isinstance(child, parametrize.ParametrizationList)
        for parametrization in child
        if parametrization.training
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
