"""Synthesizers that optimize images directly: DeepInversion and zero-shot knowledge distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.collectives import shard
from dfkd_fast.graph.tracing import dummy_image, eval_forward
from dfkd_fast.synthesis.base import SYNTHESIZERS, Setting
from dfkd_fast.synthesis.pool import PoolSynthesizer, Source

__all__ = ["DeepInversion", "ZeroShot"]


class _Images(Source):
    """Images as parameters. They can be shifted (by rolling) and flipped together.

    Args:
        setting: the run.
        scale: ``images * scale + shift`` is the parameter, for images in [-1, 1].
        shift: see ``scale``.
    """

    def __init__(self, setting: Setting, scale: Tensor, shift: Tensor) -> None:
        super().__init__(setting)
        self.pixels = nn.Parameter(torch.zeros_like(self.images))
        self.scale, self.shift = scale, shift

    def forward(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Return the images in [-1, 1], with the given order of rows (H,) and columns (W,), or of half as many."""
        images = (shard(self.pixels) - self.shift) / self.scale
        shard(self.images).copy_(images.detach())
        if rows is None or columns is None:
            return images
        if len(rows) < images.shape[2]:
            images = nn.functional.avg_pool2d(images, 2)
        return images.index_select(2, rows).index_select(3, columns)


class _ImageSynthesizer(PoolSynthesizer):
    generator = None
    uses_generator = False
    module: _Images

    def draw(self, count: int) -> tuple[Tensor, ...]:
        return ()


@SYNTHESIZERS.register("deep_inversion")
class DeepInversion(_ImageSynthesizer):
    """DeepInversion and Adaptive DeepInversion (Yin et al., CVPR 2020).

    Images are optimized from noise for one class each. In each iteration they are shifted and flipped together. Their
    values stay in the range of images. In the first iterations, the teacher sees them at half resolution.

    Raises:
        ValueError: there are not more iterations than those at half resolution, the image size is odd, or the teacher
            does not accept images of half the size.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of DeepInversion.

        Args:
            half: number of first iterations on images that are averaged to half of their height and width.
            jitter: maximum shift, in pixels; half of it in the first iterations.
            flip: flip the images in half of the iterations.
            warm_up: number of iterations in which the learning rate rises, before a cosine annealing; in both stages.
        """

        half: int = 0
        jitter: int = 2
        flip: bool = True
        warm_up: int = 100

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        self.module = _Images(setting, setting.scale, setting.shift)
        if type(options.half) is not int or not 0 <= options.half < setting.iterations:
            raise ValueError(
                "SynthesisConfig.options.half of 'deep_inversion' must be an integer from 0 to below the "
                f"{setting.iterations} iterations of a synthesis, got {options.half!r}"
            )
        if options.half:
            model = setting.teacher.model
            if setting.image_size % 2:
                raise ValueError(f"SynthesisConfig.options.half needs an even image size, got {setting.image_size}")
            eval_forward(model, dummy_image(model, setting.image_size // 2))

    def stage_of(self, iteration: int) -> int:
        return 1 if 0 < self.options.half <= iteration else 0

    def rate(self, iteration: int) -> float:
        half = self.options.half
        iteration, count = (iteration, half) if iteration < half else (iteration - half, self.setting.iterations - half)
        warm_up = min(self.options.warm_up, count // 2)
        if iteration < warm_up:
            return (iteration + 1) / warm_up
        rest = max(1, count - warm_up)
        return 0.5 * (1 + math.cos(math.pi * (iteration - warm_up) / rest))

    def start(self) -> None:
        super().start()
        pixels = self.module.pixels
        noise = torch.randn(pixels.shape, dtype=torch.float32, device=pixels.device, generator=self.setting.random)
        pixels.data.copy_(noise)

    def draw(self, count: int) -> tuple[Tensor, ...]:
        size, device, random = self.setting.image_size, self.setting.device, self.setting.random
        jitter = self.options.jitter
        if self.options.half and self.stage == 0:
            size, jitter = size // 2, jitter // 2
        places = torch.rand(3, dtype=torch.float32, device=device, generator=random)
        shift = ((2 * jitter + 1) * places[:2]).long() - jitter
        order = torch.arange(size, device=device)
        columns = torch.where(places[2] < 0.5, size - 1 - order, order) if self.options.flip else order
        return (order + shift[0]) % size, (columns + shift[1]) % size

    def after_step(self) -> None:
        scale, shift = self.setting.scale, self.setting.shift
        self.module.pixels.data.copy_(self.module.pixels.data.clamp(shift - scale, shift + scale))


@SYNTHESIZERS.register("zskd")
class ZeroShot(_ImageSynthesizer):
    """Zero-shot knowledge distillation (Nayak et al., ICML 2019): images of probabilities drawn around each class.

    The probabilities of class k are drawn from a Dirichlet distribution with concentration
    ``beta * minmax(C_k) + 1e-4``, where C is the similarity of the teacher's last weights. Half of the images use each
    ``beta``. Images are optimized in [0, 1]. After each step, each image is scaled to the whole range of values.

    Raises:
        ValueError: the teacher has no linear layer with one output per class.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of zero-shot distillation.

        Args:
            betas: scales of the concentrations.
        """

        betas: tuple[float, float] = (1.0, 0.1)

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        layers = [layer for layer in setting.teacher.model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        weights = [layer.weight.flatten(1) for layer in layers if len(layer.weight) == setting.num_classes]
        if not weights:
            raise ValueError("synthesizer 'zskd' needs a teacher whose last layer has one row of weights per class")
        unit = nn.functional.normalize(weights[-1].detach().float(), dim=1)
        similarity = unit @ unit.T
        least, most = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
        self.similarity = (similarity - least) / (most - least).clamp_min(1e-12)
        size = (setting.batch_size, setting.num_classes)
        self.labels = torch.zeros(size, dtype=torch.float32, device=setting.device)
        half = torch.full_like(setting.scale, 0.5)
        self.module = _Images(setting, half, half)

    def draw_labels(self) -> Tensor:
        classes = super().draw_labels()
        first = torch.arange(len(classes), device=classes.device) < len(classes) // 2
        beta: Tensor = torch.where(first, self.options.betas[0], self.options.betas[1])[:, None]
        gamma = torch._standard_gamma(beta * self.similarity[classes] + 1e-4, generator=self.setting.random)
        gamma = gamma.clamp_min(1e-30)
        return gamma / gamma.sum(1, keepdim=True)

    def start(self) -> None:
        super().start()
        pixels = self.module.pixels
        values = torch.rand(pixels.shape, dtype=torch.float32, device=pixels.device, generator=self.setting.random)
        pixels.data.copy_(values)

    def after_step(self) -> None:
        pixels = self.module.pixels.data
        least, most = (each(pixels, (1, 2, 3), keepdim=True) for each in (torch.amin, torch.amax))
        pixels.copy_((pixels - least) / (most - least).clamp_min(1e-12))
