"""Synthesizers with a generator: momentum adversarial distillation, fast meta-learned synthesis and NAYER."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfkd_fast.collectives import shard
from dfkd_fast.models.weights import read_tensors
from dfkd_fast.synthesis.base import SYNTHESIZERS, Online, Setting
from dfkd_fast.synthesis.pool import PoolSynthesizer, Source

__all__ = ["Contrastive", "Fast", "LabelEmbedding", "Momentum"]

log = logging.getLogger(__name__)


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def _weight(layer: Any) -> Tensor:
    """The parameter that a layer's weight is computed from."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight


def _reset(module: nn.Module, random: torch.Generator) -> None:
    """Reinitialize all layers in place."""
    seed = int(torch.randint(2**31, (), device=random.device, generator=random))
    with torch.random.fork_rng(devices=[random.device] if random.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for layer in module.modules():
            if parametrize.is_parametrized(layer, "weight"):  # a reset would change the computed weight
                nn.init.kaiming_uniform_(_weight(layer), a=math.sqrt(5))
            elif callable(reset := getattr(layer, "reset_parameters", None)):
                reset()


class _GeneratorPair(nn.Module):
    """Images of two generators, for a student step on both."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, noise: Tensor, other: Tensor) -> Tensor:
        return torch.cat([self.first(noise), self.second(other)])


class _WarmUp(PoolSynthesizer):
    """Sets the weight of the term ``masked_kl`` to 0 in the first ``options.warm_up`` rounds."""

    published: float | None = None

    def start_round(self, weights: dict[str, float], round: int) -> None:
        if "masked_kl" in weights:
            self.published = weights["masked_kl"] if self.published is None else self.published
            weights["masked_kl"] = 0.0 if round < self.options.warm_up else self.published


@SYNTHESIZERS.register("momentum")
class Momentum(Online):
    """Momentum adversarial distillation (MAD; Do et al., NeurIPS 2022).

    Like :class:`Online`, with an exponential moving average of the generator, BatchNorm buffers included. A student
    step takes one batch of images from each.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of momentum adversarial distillation.

        Args:
            momentum: weight of the average in each update.
            weights: relative weights of the images of the generator and of the average in the student's loss.
        """

        momentum: float = 0.95
        weights: tuple[float, float] = (1.0, 1.0)

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        first, second = options.weights
        self.sample_weights = () if first == second else (2 * first / (first + second), 2 * second / (first + second))
        self.average = copy.deepcopy(setting.generator).requires_grad_(False)
        self.sampler = _GeneratorPair(setting.generator, self.average)
        pairs = list(zip(self.average.state_dict().values(), setting.generator.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # BatchNorm's counters

    def draw_samples(self, count: int, random: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return shard(self.noise(count, random)), shard(self.noise(count, random))

    def after_step(self) -> None:
        averages, values = ([pair[index] for pair in self._averaged] for index in (0, 1))
        torch._foreach_lerp_(averages, values, 1 - self.options.momentum)
        for average, value in self._copied:
            average.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        return _named("average", self.average)


class _Batch(Source):
    """A generator with its noise as parameters."""

    def __init__(self, generator: nn.Module, setting: Setting) -> None:
        super().__init__(setting)
        self.generator = generator
        size = (setting.batch_size, int(generator.latent_dim))  # type: ignore[arg-type]
        self.noise = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=setting.device))

    def forward(self, places: Tensor | None = None) -> Tensor:
        """Return the batch of images in [-1, 1], augmented."""
        return self.augmented(self.generator(shard(self.noise)), places)


@SYNTHESIZERS.register("fast")
class Fast(_WarmUp):
    """Up to 100x faster data-free knowledge distillation (Fang et al., AAAI 2022), first-order meta-learning.

    Each synthesis optimizes a copy of the generator and the noise on augmented images. The sum of the copy's gradients
    is then the gradient of one step of Adam on the generator itself. As in the released code, the rate of this step is
    that of the copy times the number of iterations.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of the fast synthesizer.

        Args:
            noise_rate: learning rate of the noise, relative to that of the generator.
            warm_up: number of first rounds in which the term ``masked_kl`` has weight 0.
        """

        noise_rate: float = 5.0
        warm_up: int = 19

    module: _Batch

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        self.generator = setting.generator
        self.module = _Batch(copy.deepcopy(setting.generator), setting)
        self.copied = list(self.module.generator.parameters())
        self.trained = list(setting.generator.parameters())
        self.gradients = [torch.zeros_like(parameter) for parameter in self.trained]
        self.optimizer = torch.optim.Adam(
            self.trained, lr=setting.learning_rate * setting.iterations, betas=setting.betas, fused=True
        )
        for parameter in self.trained:  # Adam creates this state in its first step, but a checkpoint needs it before
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": zeros["exp_avg"].new_zeros((), dtype=torch.float32), **zeros}

    def parameters(self) -> list[tuple[list[nn.Parameter], float]]:
        return [(self.copied, 1.0), ([self.module.noise], self.options.noise_rate)]

    def start(self) -> None:
        super().start()
        with torch.no_grad():
            self.module.generator.load_state_dict(self.setting.generator.state_dict())
            noise = self.module.noise
            drawn = torch.randn(noise.shape, dtype=noise.dtype, device=noise.device, generator=self.setting.random)
            noise.copy_(drawn)
            torch._foreach_zero_(self.gradients)

    def draw(self, count: int) -> tuple[Tensor, ...]:
        return self.sampler.draw(count, self.setting.random)

    def after_backward(self, scale: Tensor | None) -> None:
        for total, each in zip(self.gradients, self.copied, strict=True):
            if each.grad is not None:
                gradient = each.grad if scale is None else each.grad / scale
                # The optimizer of the copy skips a step with such a gradient.
                total.add_(gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def finish(self) -> None:
        super().finish()
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        own = {f"gradient.{index}": each for index, each in enumerate(self.gradients)}
        for index, parameter in enumerate(self.trained):
            own |= {f"adam.{index}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        return {**super().tensors(), **_named("generator", self.setting.generator), **own}


class _Views(_Batch):
    """A generator with its noise as parameters, and two views of each image."""

    def forward(self, places: Tensor | None = None, crops: Tensor | None = None) -> Tensor:
        """Return the augmented images, and crops of them that are resized, (2 N, 3, H, W) in [-1, 1].

        Args:
            places: see :func:`dfkd_fast.synthesis.crop_and_flip`.
            crops: (N, 5) float32: scale of height and width, offsets in [-1, 1] and sign of the columns.
        """
        images = self.generator(shard(self.noise))
        both = [self.augmented(images, places)]
        if crops is not None:
            height, width, down, right, sign = crops.T
            zero = torch.zeros_like(height)
            rows = torch.stack([zero, height, down * (1 - height)], 1)
            columns = torch.stack([sign * width, zero, right * (1 - width)], 1)
            grid = nn.functional.affine_grid(torch.stack([columns, rows], 1), list(images.shape), align_corners=False)
            both.append(nn.functional.grid_sample(images.float(), grid, align_corners=False).to(images.dtype))
        return torch.cat(both)


@SYNTHESIZERS.register("cmi")
class Contrastive(PoolSynthesizer):
    """Contrastive model inversion (CMI; Fang et al., IJCAI 2021).

    Each synthesis optimizes a new generator and its noise. The local view of each image is a resized crop of 25 to
    100 % of its area, for the term ``contrast``.
    """

    views = 2
    module: _Views

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        self.generator = setting.generator
        self.module = _Views(setting.generator, setting)

    def start(self) -> None:
        super().start()
        random = self.setting.random

        def normal(tensor: Tensor, mean: float, deviation: float) -> None:
            drawn = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=random)
            tensor.copy_(drawn * deviation + mean)

        with torch.no_grad():
            normal(self.module.noise, 0.0, 1.0)
            for layer in self.setting.generator.modules():
                if isinstance(layer, nn.BatchNorm2d) and layer.affine:
                    normal(layer.weight, 1.0, 0.02)
                elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                    normal(_weight(layer), 0.0, 0.02)
                else:
                    continue
                if layer.bias is not None:
                    layer.bias.zero_()

    def draw(self, count: int) -> tuple[Tensor, ...]:
        random, device = self.setting.random, self.setting.device
        places = self.sampler.draw(count, random) or (None,)
        drawn = torch.rand(count, 5, dtype=torch.float32, device=device, generator=random)
        area = 0.25 + 0.75 * drawn[:, 0]
        ratio = torch.exp((2 * drawn[:, 1] - 1) * math.log(4 / 3))  # of width to height, as in torchvision
        height, width = ((area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1))
        sign = torch.where(drawn[:, 4] < 0.5, -1.0, 1.0).float()
        offsets = 2 * drawn[:, 2:4] - 1
        crops = torch.stack([height, width, offsets[:, 0], offsets[:, 1], sign], 1)
        return places[0], shard(crops)  # type: ignore[return-value]


class _Embedded(Source):
    """Maps the embeddings of classes to a generator's input, with one random linear layer per group of images."""

    def __init__(self, setting: Setting, embeddings: Tensor) -> None:
        super().__init__(setting)
        width, size, self.group = embeddings.shape[1], int(setting.generator.latent_dim), setting.num_classes
        options: dict[str, Any] = {"dtype": torch.float32, "device": setting.device}
        self.generator, self.embeddings = setting.generator, embeddings
        self.norm = nn.BatchNorm1d(width, **options)
        groups = math.ceil(setting.batch_size / self.group)
        self.layers = nn.ModuleList(nn.Linear(width, size, **options) for _ in range(groups))

    def forward(self, labels: Tensor, places: Tensor | None = None) -> Tensor:
        """Return images in [-1, 1] of the classes ``labels``, (N,), augmented."""
        groups = self.norm(self.embeddings[labels]).split(self.group)
        noise = torch.cat([layer(group) for layer, group in zip(self.layers, groups, strict=True)])
        return self.augmented(self.generator(shard(noise)), places)


@SYNTHESIZERS.register("nayer")
class LabelEmbedding(_WarmUp):
    """NAYER, noisy layer generation (Tran et al., CVPR 2024).

    The generator's input is the embedding of a class, through a linear layer with new random weights in each
    synthesis. Without a file of embeddings, classes have one-hot embeddings.

    Raises:
        ValueError: the file of embeddings does not have one row per class.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of NAYER.

        Args:
            embeddings: a safetensors file with the tensor ``embeddings``, (classes, width), such as CLIP's text
                embeddings of the class names.
            reset_every: number of syntheses after which the generator starts anew.
            warm_up: number of first rounds in which the term ``masked_kl`` has weight 0.
        """

        embeddings: str | None = None
        reset_every: int = 20
        warm_up: int = 20

    module: _Embedded

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        self.generator = setting.generator
        self.module = _Embedded(setting, self._embeddings())
        self.replicated = (self.module.norm,)
        self.syntheses = 0

    def _embeddings(self) -> Tensor:
        count, device, path = self.setting.num_classes, self.setting.device, self.options.embeddings
        if path is None:
            log.warning("synthesizer 'nayer' has no file of embeddings: classes have one-hot embeddings")
            return torch.eye(count, dtype=torch.float32, device=device)
        found = read_tensors(path).get("embeddings")
        if found is None or found.ndim != 2 or len(found) != count:
            shape = None if found is None else tuple(found.shape)
            raise ValueError(f"{path} must have a tensor 'embeddings' of shape ({count}, width), got {shape}")
        return found.float().to(device)

    def draw_labels(self) -> Tensor:
        count, classes = self.setting.batch_size, self.setting.num_classes
        places = torch.arange(count, device=self.setting.device)
        return torch.where(places < count // classes * classes, places % classes, super().draw_labels())

    def start(self) -> None:
        super().start()
        with torch.no_grad():
            if self.syntheses and self.syntheses % self.options.reset_every == 0:
                _reset(self.setting.generator, self.setting.random)
                self.module.norm.reset_parameters()
            for layer in self.module.layers:
                assert isinstance(layer, nn.Linear)
                like: dict[str, Any] = {"dtype": torch.float32, "device": layer.weight.device}
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=self.setting.random, **like))
                layer.bias.zero_()
            self.syntheses += 1

    def draw(self, count: int) -> tuple[Tensor, ...]:
        assert self.labels is not None
        return (self.labels, *self.sampler.draw(count, self.setting.random))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "syntheses": self.syntheses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.syntheses = int(state["syntheses"])
