"""The pool of synthetic images, and the base of synthesizers that fill it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.collectives import complete_, shard
from dfkd_fast.synthesis.base import Setting, Synthesizer

__all__ = ["Augment", "Pool", "PoolSynthesizer", "crop_and_flip", "to_float", "to_uint8"]


def to_uint8(images: Tensor) -> Tensor:
    """Convert images from [-1, 1] to uint8."""
    return images.add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class Pool:
    """A bounded pool of images on a device. When it is full, the oldest images are replaced.

    Args:
        size: maximum number of images.
        image_size: height and width, in pixels.
        device: the device.

    Attributes:
        images: (size, 3, H, W) uint8; the first ``count`` are valid.
        labels: (size,) int64, the class of each image.
        count: (1,) int64, the number of images.
        position: (1,) int64, the index of the next image.
    """

    def __init__(self, size: int, image_size: int, device: torch.device) -> None:
        self.images = torch.zeros(size, 3, image_size, image_size, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(size, dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add uint8 images (N, 3, H, W) and their classes (N,), N at most the size of the pool."""
        size = len(self.images)
        where = (self.position + torch.arange(len(images), device=images.device)) % size
        self.images.index_copy_(0, where, images)
        self.labels.index_copy_(0, where, labels)
        self.position.add_(len(images)).remainder_(size)
        self.count.add_(len(images)).clamp_(max=size)

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Draw the indices (count,) of random images."""
        where = torch.rand(count, dtype=torch.float32, device=self.images.device, generator=random) * self.count
        # float32 may round up, and steps are warmed up before the first synthesis.
        return where.long().minimum(self.count - 1).clamp_(min=0)

    def state_dict(self) -> dict[str, Tensor]:
        """The valid images, their labels and the position."""
        count = int(self.count)
        return {"images": self.images[:count], "labels": self.labels[:count], "position": self.position}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state_dict` in place.

        Raises:
            ValueError: the images do not fit into the pool.
        """
        images = state["images"]
        if len(images) > len(self.images) or images.shape[1:] != self.images.shape[1:]:
            raise ValueError(f"a pool of shape {tuple(images.shape)} does not fit into {tuple(self.images.shape)}")
        self.images[: len(images)] = images
        self.labels[: len(images)] = state["labels"]
        self.count.fill_(len(images))
        self.position.copy_(state["position"])


def crop_and_flip(images: Tensor, places: Tensor, pad: int) -> Tensor:
    """Pad images (N, 3, H, W) in [-1, 1] by black pixels, crop them to (H, W) and flip them.

    Args:
        images: the images; the result is differentiable with respect to them.
        places: (N, 3) int64, the first row and column, in [0, 2 * pad], and 1 for images to flip.
        pad: number of pixels on each side.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, [pad] * 4, value=-1.0)
    rows = places[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = places[:, 1:2] + torch.where(places[:, 2:] == 1, width - 1 - columns, columns)
    where = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    where = where.view(count, 1, -1).expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, where).view_as(images)


class Augment(nn.Module):
    """Converts uint8 images to [-1, 1], and applies :func:`crop_and_flip` to images in [-1, 1].

    Args:
        crop: number of pixels to pad on each side; None only converts.
        device: device of the images.
    """

    counts: Tensor

    def __init__(self, crop: int | None, device: torch.device) -> None:
        super().__init__()
        self.crop = crop
        places = 2 * (crop or 0) + 1
        self.register_buffer("counts", torch.tensor([places, places, 2], device=device), persistent=False)

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, ...]:
        """Draw the offsets and flips of ``count`` images, and return those of this process, (N, 3) int64.

        Without ``crop``, there are none.
        """
        if self.crop is None:
            return ()
        drawn = torch.rand(count, 3, dtype=torch.float32, device=self.counts.device, generator=random)
        places = drawn * self.counts
        return (shard(places.long().minimum(self.counts - 1)),)  # float32 may round up

    def forward(self, images: Tensor, places: Tensor | None = None) -> Tensor:
        """Return images (N, 3, H, W) in [-1, 1] of uint8 or floating-point images."""
        images = to_float(images) if images.dtype == torch.uint8 else images
        return images if places is None or self.crop is None else crop_and_flip(images, places, self.crop)


class Source(nn.Module):
    """Base of the trained modules of pool synthesizers.

    Attributes:
        images: (N, 3, H, W) float32 in [-1, 1], the images of the last call before augmentation, of which a process
            has only its own until the end of the synthesis.
        augment: the augmentation of a generator step.
    """

    images: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        size = (setting.batch_size, 3, setting.image_size, setting.image_size)
        self.register_buffer("images", torch.zeros(size, dtype=torch.float32, device=setting.device))
        self.augment = Augment(setting.config.crop, setting.device)

    def augmented(self, images: Tensor, places: Tensor | None) -> Tensor:
        """Keep the images, and augment them."""
        shard(self.images).copy_(images.detach())
        return self.augment(images, places)


class PoolSynthesizer(Synthesizer):
    """Base of synthesizers that add the best batch of each synthesis to a pool.

    A batch is better if the loss of its generator step is lower.

    Attributes:
        images: (N, 3, H, W) in [-1, 1], the images of the last generator step before augmentation. ``module`` writes
            them.
    """

    resets_optimizer = True
    makes_images: ClassVar[bool] = True
    sampler: Augment
    module: Source

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        config, device = setting.config, setting.device
        if self.makes_images != (setting.steps > 0):
            needed = "at least 1" if self.makes_images else "0"
            raise ValueError(
                f"LoopConfig.generator_steps must be {needed} with the synthesizer {config.name!r}, got {setting.steps}"
            )
        if config.pool_size < setting.batch_size:
            raise ValueError(
                f"SynthesisConfig.pool_size must be at least the batch size, got {config.pool_size} and "
                f"{setting.batch_size}"
            )
        self.pool = Pool(config.pool_size, setting.image_size, device)
        self.sampler = Augment(config.crop, device)
        self.labels = torch.zeros(setting.batch_size, dtype=torch.int64, device=device)
        self.best_loss = torch.full((1,), torch.inf, dtype=torch.float32, device=device)
        self.best_images = torch.zeros_like(self.pool.images[: setting.batch_size])

    def draw_labels(self) -> Tensor:
        """Draw the classes (N,) of a synthesis."""
        size, random = (self.setting.batch_size,), self.setting.random
        return torch.randint(self.setting.num_classes, size, device=self.setting.device, generator=random)

    def start(self) -> None:
        assert self.labels is not None
        self.labels.copy_(self.draw_labels())

    def start_stage(self) -> None:
        self.best_loss.fill_(torch.inf)

    def after_forward(self, loss: Tensor) -> Tensor | None:
        better = loss < self.best_loss
        best = shard(self.best_images)
        best.copy_(torch.where(better, to_uint8(shard(self.module.images)), best))
        self.best_loss.copy_(torch.where(better, loss, self.best_loss))
        return better

    def finish(self) -> None:
        assert self.labels is not None
        complete_(self.best_images)
        complete_(self.module.images)
        self.pool.add(self.best_images, self.classes())

    def classes(self) -> Tensor:
        """The class (N,) of each image of a synthesis."""
        assert self.labels is not None
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def draw_samples(self, count: int, random: torch.Generator | None = None) -> tuple[Tensor, ...]:
        random = random or self.setting.random
        images = self.pool.images.index_select(0, shard(self.pool.draw(count, random)))
        return (images, *self.sampler.draw(count, random))

    def tensors(self) -> dict[str, Tensor]:
        pool = {f"pool.{name}": getattr(self.pool, name) for name in ("images", "labels", "count", "position")}
        assert self.labels is not None
        own = {"labels": self.labels, "best_loss": self.best_loss, "best_images": self.best_images}
        return {**super().tensors(), **pool, **own}

    def fixed_in_steps(self) -> list[Tensor]:
        return [self.pool.images, self.pool.labels]

    def state_dict(self) -> dict[str, Any]:
        rest = {name: value for name, value in super().state_dict().items() if not name.startswith("pool.")}
        return {**rest, "pool": self.pool.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pool.load_state_dict(state["pool"])
        pool = {name: value for name, value in self.tensors().items() if name.startswith("pool.")}
        super().load_state_dict({**state, **pool})
