"""The interface of synthesizers, which make the images of a run, and the online generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dfkd_fast.collectives import shard
from dfkd_fast.config import SynthesisConfig
from dfkd_fast.graph import FeatureModel
from dfkd_fast.registry import Registry

__all__ = ["SYNTHESIZERS", "NoOptions", "Online", "Setting", "Synthesizer", "create_synthesizer"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The run that a synthesizer is built for.

    Attributes:
        generator: the run's generator, on the device of the run; None for synthesizers that use none.
        teacher: the frozen teacher.
        image_size: height and width of the images, in pixels.
        batch_size: number of images per step.
        steps: number of generator steps per round.
        iterations: number of generator steps per synthesis.
        scale, shift: (1, 3, 1, 1) float32; ``images * scale + shift`` is the teacher's input.
        learning_rate: ``OptimizerConfig.generator_lr``.
        betas: ``OptimizerConfig.generator_betas``.
        random: random generator on the device of the run, whose state is part of a checkpoint.
        config: pool size and augmentation.
    """

    generator: Any
    teacher: FeatureModel
    image_size: int
    batch_size: int
    steps: int
    iterations: int
    scale: Tensor
    shift: Tensor
    learning_rate: float
    betas: tuple[float, float]
    random: torch.Generator
    config: SynthesisConfig

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def num_classes(self) -> int:
        return self.teacher.num_classes


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a synthesizer without options."""


class Synthesizer:
    """Makes the images that the student is trained on.

    A round has one or more syntheses of ``setting.iterations`` generator steps each, and then the student steps. A
    generator step trains ``module`` along the generator's objective. A student step calls ``sampler``, without
    gradients. :meth:`start`, :meth:`start_stage`, :meth:`finish` and :meth:`start_round` run on the host between steps.
    All other methods run inside steps, which can be captured into CUDA graphs: they only queue work on the device, and
    write to tensors in place. In a run on several processes (:mod:`dfkd_fast.collectives`), ``module`` and ``sampler``
    make the images of their process; everything else is the same in all processes.

    Args:
        setting: the run.
        options: an instance of ``Options``.

    Attributes:
        Options: dataclass of the options in ``SynthesisConfig.options``.
        generator: the trained generator, or None if images are optimized directly.
        module: maps the results of :meth:`draw` to images (N, 3, H, W) in [-1, 1].
        sampler: maps the results of :meth:`draw_samples` to images (N, 3, H, W) in [-1, 1].
        labels: classes (N,) int64 or probabilities (N, classes) of the images of a generator step; None if there are
            none.
        views: 2 if ``module`` returns two views of each image, (2 N, 3, H, W), for terms that compare them; else 1.
        sample_weights: weights of the student's loss on equal parts of the images of a student step; empty if they are
            equal. The loss is the mean over the parts.
        resets_optimizer: whether each synthesis, and each of its stages, starts with a new optimizer state.
        stage: index of the current stage.
        uses_generator: whether ``setting.generator`` is required.
        replicated: modules that all processes call with the same inputs.
    """

    Options: ClassVar[type] = NoOptions
    resets_optimizer: ClassVar[bool] = False
    uses_generator: ClassVar[bool] = True
    views: ClassVar[int] = 1
    generator: nn.Module | None
    module: nn.Module
    sampler: nn.Module
    labels: Tensor | None = None
    sample_weights: tuple[float, ...] = ()
    stage: int = 0
    replicated: tuple[nn.Module, ...] = ()

    def __init__(self, setting: Setting, options: Any) -> None:
        self.setting, self.options = setting, options

    def parameters(self) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of trained parameters, and for each the factor of ``OptimizerConfig.generator_lr``."""
        return [(list(self.module.parameters()), 1.0)]

    def rate(self, iteration: int) -> float:
        """A factor of the learning rate in an iteration of a synthesis."""
        return 1.0

    def start_round(self, weights: dict[str, float], round: int) -> None:
        """Change the weights of the generator's objective, for example to 0 while warming up."""

    def stage_of(self, iteration: int) -> int:
        """The stage of an iteration of a synthesis. Steps of different stages may have different shapes."""
        return 0

    @property
    def stages(self) -> int:
        """The number of stages. The steps of each are captured."""
        return self.stage_of(self.setting.iterations - 1) + 1

    def start(self) -> None:
        """Prepare a synthesis."""

    def start_stage(self) -> None:
        """Prepare a stage of a synthesis."""

    def finish(self) -> None:
        """End a synthesis."""

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """Draw the random inputs of ``module`` for a generator step with ``count`` images on all processes together."""
        raise NotImplementedError

    def draw_samples(self, count: int, random: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Draw the random inputs of ``sampler``, from ``random`` or from the run's random generator.

        ``count`` is the number of images on all processes together.
        """
        raise NotImplementedError

    def after_forward(self, loss: Tensor) -> Tensor | None:
        """Called with the loss of a generator step. Return whether it is the best of the synthesis, a bool (1,)."""
        return None

    def after_backward(self, scale: Tensor | None) -> None:
        """Called when the gradients of a generator step are computed, which are multiplied by ``scale`` in fp16."""

    def after_step(self) -> None:
        """Called when a generator step has updated ``module``."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that steps or syntheses change, except those of ``module`` and its optimizer, by unique names."""
        return {}

    def fixed_in_steps(self) -> list[Tensor]:
        """Those of :meth:`tensors` that change between steps, but not in steps."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The tensors of :meth:`tensors`, for a checkpoint."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state_dict` in place."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(state[name])


SYNTHESIZERS: Registry[type[Synthesizer]] = Registry("synthesizer", "SynthesisConfig.name")
"""Subclasses of :class:`Synthesizer` by name."""


def create_synthesizer(setting: Setting) -> Synthesizer:
    """Create the synthesizer that ``setting.config`` names.

    Raises:
        ValueError: no synthesizer has the name, an option is unknown, or the teacher or generator does not fit.
    """
    config = setting.config
    kind = SYNTHESIZERS.find(config.name)
    known = {field.name for field in fields(kind.Options)}
    if unknown := set(config.options) - known:
        raise ValueError(
            f"SynthesisConfig.options: {config.name!r} has no option {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(known)) or 'none'}"
        )
    try:
        options = kind.Options(**config.options)
    except TypeError as error:
        raise ValueError(f"SynthesisConfig.options of {config.name!r}: {error}") from error
    return kind(setting, options)


@SYNTHESIZERS.register("online")
class Online(Synthesizer):
    """A generator that is trained next to the student, and makes new images in each student step."""

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        self.generator = self.module = self.sampler = setting.generator

    def noise(self, count: int, random: torch.Generator | None = None) -> Tensor:
        """Draw z ~ N(0, 1), (count, latent_dim) float32."""
        size = (count, int(self.setting.generator.latent_dim))
        random = random or self.setting.random
        return torch.randn(size, dtype=torch.float32, device=self.setting.device, generator=random)

    def draw(self, count: int) -> tuple[Tensor, ...]:
        return (shard(self.noise(count)),)

    def draw_samples(self, count: int, random: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return (shard(self.noise(count, random)),)
