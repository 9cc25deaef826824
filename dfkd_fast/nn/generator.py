"""The attention generator (paper, table 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from dfkd_fast.nn.attention import SpatialAttention
from dfkd_fast.nn.norm import batch_norm_act, count_batches
from dfkd_fast.registry import Registry

__all__ = ["GENERATORS", "AttentionGenerator", "UpsamplingGenerator", "freeze_spectral_norm"]

GENERATORS: Registry[Callable[..., nn.Module]] = Registry("generator", "GeneratorConfig.name", factories=True)
"""Functions of ``image_size``, ``latent_dim`` and options that build a generator, by name.

A generator is a module with the attribute ``latent_dim``. Its forward maps noise (N, latent_dim) to images
(N, 3, image_size, image_size) in [-1, 1].
"""


class _SpectralNorm(parametrizations._SpectralNorm):
    """PyTorch's spectral norm with two matrix products per forward in training instead of three.

    After a power iteration, v is W^T u divided by its norm. Therefore u^T W v is that norm.
    """

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return super().forward(weight)
        matrix = self._reshape_weight_to_matrix(weight)
        with torch.no_grad():
            F.normalize(torch.mv(matrix, self._v), dim=0, eps=self.eps, out=self._u)
        product = torch.mv(matrix.t(), self._u.clone())  # a copy, because the next forward overwrites u
        sigma = torch.linalg.vector_norm(product)
        with torch.no_grad():
            self._v.copy_(product / sigma.clamp_min(self.eps))
        return weight / sigma


class _Block(nn.Module):
    """Upsamples by 2: transposed convolution, [BatchNorm], LeakyReLU, [spatial attention]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        batch_norm: bool,
        spectral_norm: bool,
        attention: SpatialAttention | None,
        gain: float,
    ) -> None:
        super().__init__()
        self.gain = gain
        # A BatchNorm would subtract the bias.
        convolution = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=not batch_norm)
        if spectral_norm:
            parametrize.register_parametrization(convolution, "weight", _SpectralNorm(convolution.weight, dim=1))
        self.upsample = convolution
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()
        self.activation = nn.LeakyReLU(0.2)
        self.attention = attention if attention is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, slope = self.upsample(x), self.activation.negative_slope
        if not isinstance(self.norm, nn.BatchNorm2d):
            return self.attention(self.activation(x if self.gain == 1 else x * self.gain))
        if isinstance(self.attention, SpatialAttention):
            return self.attention.forward_normalized(x, self.norm, slope)
        return self.attention(batch_norm_act(self.norm, x, activation="leaky_relu", negative_slope=slope, count=False))


@GENERATORS.register("attention")
class AttentionGenerator(nn.Module):
    """Generates images (N, 3, H, W) in [-1, 1] from noise (N, latent_dim) (paper, table 6).

    A linear layer and a BatchNorm produce the first map, H / 16 x W / 16. Each of four blocks doubles H and W, and a
    convolution with tanh produces the image.

    Args:
        image_size: H and W in pixels, a multiple of 16.
        latent_dim: length of the noise vector.
        channels: numbers of channels of the first map and of the four blocks' outputs.
        batch_norm: use a BatchNorm in each block; the paper's table has none.
        spectral_norm: apply spectral norm to the transposed convolutions, with one power iteration per forward in
            training mode.
        attention: form of the spatial attention, or ``none`` for no attention modules.
        attention_scale: lambda in Eq. 6.
        attention_reduction: reduction r of the attention modules.
        gain: factor of each block's convolution output; with a BatchNorm in the blocks, it must be 1.

    Raises:
        ValueError: image_size is not a positive multiple of 16, channels does not have five entries, or a gain is
            combined with batch_norm.
    """

    def __init__(
        self,
        image_size: int,
        *,
        latent_dim: int = 256,
        channels: Sequence[int] = (512, 256, 128, 64, 64),
        batch_norm: bool = True,
        spectral_norm: bool = True,
        attention: Literal["spatial", "spatial_mean1", "channel", "none"] = "spatial_mean1",
        attention_scale: float = 5e-2,
        attention_reduction: int = 8,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16, got {image_size}")
        if len(channels) != 5:
            raise ValueError(f"channels must have five entries, for the first map and four blocks, got {channels}")
        if batch_norm and gain != 1:
            raise ValueError(f"gain must be 1 with batch_norm, which cancels it, got {gain}")
        self.image_size, self.latent_dim, self.first_size = image_size, latent_dim, image_size // 16
        self.project = nn.Linear(latent_dim, channels[0] * self.first_size**2, bias=False)
        self.project_norm = nn.BatchNorm2d(channels[0])
        self.blocks = nn.Sequential()
        for inputs, outputs in pairwise(channels):
            gate = None
            if attention != "none":
                gate = SpatialAttention(outputs, reduction=attention_reduction, scale=attention_scale, form=attention)
            self.blocks.append(
                _Block(inputs, outputs, batch_norm=batch_norm, spectral_norm=spectral_norm, attention=gate, gain=gain)
            )
        self.paint = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        """Generate images (N, 3, H, W) from noise (N, latent_dim), with the dtype of the weights.

        Raises:
            RuntimeError: the noise does not have latent_dim columns or the dtype of the weights.
        """
        norms = (self.project_norm, *(block.norm for block in self.blocks))
        count_batches(norm for norm in norms if isinstance(norm, nn.BatchNorm2d))
        # The features of a position are adjacent, so that the map is channels-last.
        first = self.project(noise).unflatten(1, (self.first_size, self.first_size, -1)).permute(0, 3, 1, 2)
        return self.paint(self.blocks(batch_norm_act(self.project_norm, first, count=False))).tanh()


@GENERATORS.register("upsampling")
class UpsamplingGenerator(nn.Module):
    """A generator like that of DAFL (Chen et al., ICCV 2019), CMI, Fast and NAYER.

    A linear layer and a BatchNorm produce the first map. Blocks double it by nearest-neighbor upsampling and a
    convolution, and a convolution with tanh produces the image. The released generators end in a sigmoid.

    Args:
        image_size: H and W in pixels, a multiple of ``2 ** blocks``.
        latent_dim: length of the noise vector.
        width: number of channels of the last map; the others have twice as many.
        blocks: number of blocks. The released generators have 2, for images of 32 x 32. At 224 x 224, the linear layer
            of 2 blocks has 100 million weights, that of 5 has 1.6 million.
        normalize_image: apply a BatchNorm without parameters before tanh, as DAFL does.

    Raises:
        ValueError: image_size is not a positive multiple of ``2 ** blocks``.
    """

    def __init__(
        self,
        image_size: int,
        *,
        latent_dim: int = 256,
        width: int = 64,
        blocks: int = 2,
        normalize_image: bool = False,
    ) -> None:
        super().__init__()
        if blocks < 1 or image_size < 1 or image_size % 2**blocks:
            raise ValueError(f"image_size must be a positive multiple of 2 ** blocks, got {image_size} and {blocks}")
        self.image_size, self.latent_dim, first = image_size, latent_dim, image_size // 2**blocks
        self.project = nn.Linear(latent_dim, 2 * width * first**2)
        self.to_map = nn.Unflatten(1, (2 * width, first, first))
        layers: list[nn.Module] = [nn.BatchNorm2d(2 * width)]
        for index in range(blocks):
            outputs = width if index + 1 == blocks else 2 * width
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, outputs, 3, padding=1)]
            layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(width, 3, 3, padding=1)]
        layers += [nn.BatchNorm2d(3, affine=False)] if normalize_image else []
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        """Generate images (N, 3, H, W) from noise (N, latent_dim), with the dtype of the weights."""
        return self.layers(self.to_map(self.project(noise)))


@contextmanager
def freeze_spectral_norm(module: nn.Module) -> Iterator[None]:
    """Context manager in which spectral norms of ``module`` use their current estimate without power iterations.

    A student step generates images but must not change the generator's power-iteration vectors.
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
