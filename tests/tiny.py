"""The smallest complete run: networks with a few thousand weights, 16 x 16 images, and four steps per round."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dfkd_fast import engine
from dfkd_fast.config import (
    DistillConfig,
    GeneratorConfig,
    InversionContrastConfig,
    LoopConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TeachConfig,
    recipe,
)
from dfkd_fast.data import ImageData
from dfkd_fast.engine import DistillResult, DistillState, Runtime, build_state, distill
from dfkd_fast.models import FeatureModel, create_model, extract

CLASSES = 5
SIZE = 16
HALF = (0.5, 0.5, 0.5)


def network(widths: tuple[int, int, int, int] = (4, 4, 6, 8), *, seed: int = 0) -> nn.Module:
    """A ResNet-8 whose BatchNorm statistics differ from the initial ones."""
    torch.manual_seed(seed)
    config = ModelConfig(name="resnet8", options={"widths": list(widths)})
    model = create_model(config, num_classes=CLASSES)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, SIZE, SIZE))
    return model


def teacher() -> nn.Module:
    return network((4, 4, 8, 12), seed=1)


def data(count: int = 20) -> ImageData:
    """Labeled noise images."""
    generator = torch.Generator().manual_seed(0)
    images = TensorDataset(
        torch.randn(count, 3, SIZE, SIZE, generator=generator), torch.arange(count).remainder(CLASSES)
    )
    return ImageData(images, images, tuple(f"class {i}" for i in range(CLASSES)), HALF, HALF, SIZE)


def config(out: Path | None = None, **changes: Any) -> DistillConfig:
    """A config of the full method: two epochs of two rounds, each with two generator steps and two student steps."""
    base = DistillConfig(
        generator=GeneratorConfig(latent_dim=6, channels=(8, 8, 8, 8, 8)),
        objective=ObjectiveConfig(student={"sfcl": 1.0}),
        optimizer=OptimizerConfig(student_lr=0.05),
        loop=LoopConfig(
            epochs=2, rounds_per_epoch=2, generator_steps=2, student_steps=2, batch_size=6, checkpoint_every=1
        ),
        image_size=SIZE,
        mean=HALF,
        std=HALF,
        device="cpu",
        precision="fp32",  # the default depends on the CPU
        out=None if out is None else str(out),
    )
    loop = {name: changes.pop(name) for name in list(changes) if hasattr(base.loop, name)}
    return replace(base, loop=replace(base.loop, **loop), **changes)


def method(preset: str) -> dict[str, Any]:
    """Changes of :func:`config`: the loss weights and the synthesizer of a method."""
    published = recipe(preset)
    contrast = InversionContrastConfig(dim=4, bank_size=16, negatives=8)
    options = {name: 1 if name == "half" else value for name, value in published.synthesis.options.items()}
    synthesis = replace(published.synthesis, options=options, pool_size=16, per_round=1)
    return {"objective": replace(published.objective, contrast=contrast), "synthesis": synthesis}


def run(out: Path, **changes: Any) -> DistillResult:
    """A complete run with evaluation data."""
    return distill(teacher(), network(), config(out, **changes), data=data(), progress=False)


def teach(out: Path, model: nn.Module | None = None, **changes: Any) -> None:
    """Supervised training, four steps of it in two epochs."""
    config = TeachConfig(epochs=1, batch_size=10, device="cpu", precision="fp32", out=str(out))
    engine.teach(model or network(), data(), replace(config, **changes), progress=False)


@functools.cache
def _traced() -> tuple[FeatureModel, FeatureModel]:
    return extract(teacher(), image_size=SIZE), extract(network(), image_size=SIZE)


def state(changed: DistillConfig | None = None) -> DistillState:
    """The initial state of a run."""
    run = changed or config()
    features = copy.deepcopy(_traced())
    features[0].eval()
    features[0].requires_grad_(False)
    features[1].train()
    runtime = Runtime.of(run.device, run.precision, channels_last=run.channels_last)
    return build_state(features[0], features[1], run, runtime, image_size=SIZE, mean=HALF, std=HALF)


class Killed(BaseException):
    """Ends the run at this point, as if the process had been killed."""


def die_before_step(patch: pytest.MonkeyPatch, step: int, *kinds: Literal["generator_step", "student_step"]) -> None:
    """Raise :class:`Killed` before the given step, from 0, among the steps of these kinds (default: of both)."""
    calls = 0

    def dying(original: Any) -> Any:
        def take(*arguments: Any) -> None:
            nonlocal calls
            if calls == step:
                raise Killed
            calls += 1
            original(*arguments)

        return take

    for kind in kinds or ("generator_step", "student_step"):
        patch.setattr(engine.engines, kind, dying(getattr(engine.engines, kind)))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have equal parameters and buffers under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
