"""Writes synthetic images of a generator or a pool synthesizer to a folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast import report
from dfkd_fast.collectives import collect
from dfkd_fast.config import DistillConfig, expand, to_dict
from dfkd_fast.engine.distributed import is_main, locked_folder, require_divisible
from dfkd_fast.engine.engines import create_engine
from dfkd_fast.engine.loop import prepare_networks
from dfkd_fast.engine.progress import Listener, ProgressLine
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.engine.state import DistillState, build_state
from dfkd_fast.engine.steps import synthesize
from dfkd_fast.graph import frozen, preserve_train_mode, unwrap
from dfkd_fast.synthesis import PoolSynthesizer, to_uint8, write_pool

__all__ = ["make_images"]


def make_images(
    teacher: nn.Module,
    config: DistillConfig,
    *,
    count: int,
    out: str | Path,
    student: nn.Module | None = None,
    generator: nn.Module | None = None,
    png: bool = False,
    description: Mapping[str, Any] | None = None,
    progress: bool | Listener = True,
) -> Path:
    """Write synthetic images to a folder, with their labels and a ``manifest.json``.

    A pool synthesizer runs syntheses until there are enough images. Without ``student``, the teacher takes its place,
    so adversarial terms have no effect. Online generators need trained weights: pass ``generator``.

    Args:
        teacher: a trained classifier; see :func:`dfkd_fast.engine.distill`.
        config: the synthesizer and its settings.
        count: number of images.
        out: the folder, which must not contain images yet.
        student: a network for adversarial terms. It is not changed.
        generator: a trained generator. It is not changed.
        png: write PNG files in one folder per class instead of ``pool.safetensors``.
        description: further entries of the manifest.
        progress: show a progress bar, or a function that is called with the progress instead.

    Returns:
        The folder. The label of an image is its class in the synthesis, or else the one that the teacher predicts.

    Raises:
        ValueError: config, networks and generator do not fit together, the pool is smaller than ``count``, or the
            folder is not empty.
        dfkd_fast.files.WriteError: a file could not be written.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    with locked_folder(lambda: _empty_folder(out)) as folder:
        return _make_images(teacher, config, count, folder, student, generator, png, description, progress)


def _empty_folder(out: str | Path) -> Path:
    folder = expand(out)
    if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder for out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_images(
    teacher: nn.Module,
    config: DistillConfig,
    count: int,
    folder: Path,
    student: nn.Module | None,
    generator: nn.Module | None,
    png: bool,
    description: Mapping[str, Any] | None,
    progress: bool | Listener,
) -> Path:
    require_divisible(config.loop.batch_size, "LoopConfig.batch_size")
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    if student is None:  # in eval mode, equal networks agree
        config = replace(config, loop=replace(config.loop, student_in_generator_step="eval"))
    other = copy.deepcopy(unwrap(teacher if student is None else student)).float().requires_grad_(True)
    networks = prepare_networks(teacher, other, config, None)
    with runtime.backends(), frozen(networks[0]), preserve_train_mode(networks[0], False):
        networks[1].train()
        state = build_state(*networks[:2], config, runtime, given=copy.deepcopy(generator), **networks[2])
        pooled = isinstance(state.synthesizer, PoolSynthesizer)
        if not pooled and generator is None:
            raise ValueError(
                f"synthesizer {config.synthesis.name!r} needs a trained generator: generator.safetensors of a run"
            )
        if pooled and config.synthesis.pool_size < count:
            raise ValueError(
                f"SynthesisConfig.pool_size must be at least count, {count}; got {config.synthesis.pool_size}"
            )
        shown = progress if is_main() else False
        with state.synchronized(), ProgressLine("synthesize", total=count, unit="images", enabled=shown) as line:
            images, labels = (_pooled if pooled else _generated)(state, count, line)
        manifest = {
            "images": count,
            "image_size": state.image_size,
            "classes": state.teacher.num_classes,
            "per_class": torch.bincount(labels.cpu(), minlength=state.teacher.num_classes).tolist(),
            "teacher": state.teacher_digest(),
            "distill": to_dict(config),
            **(description or {}),
        }
        if is_main():  # the others do not wait: many PNG files take longer than the timeout of a collective
            write_pool(folder, images, labels, png=png)
            report.write_results(folder / "manifest.json", manifest)
    return folder


def _pooled(state: DistillState, count: int, line: ProgressLine) -> tuple[Tensor, Tensor]:
    """Run syntheses until the pool has enough images."""
    engine, pool = create_engine(state), state.synthesizer.pool  # type: ignore[attr-defined]
    engine.prepare()
    while int(pool.count) < count:
        engine.start_round()
        for _ in range(state.config.loop.generator_steps):
            engine.generator_step()
        state.position.round += 1
        state.position.step = 0
        line.show(min(count, int(pool.count)), {}, 0.0)
    return pool.images[:count], pool.labels[:count]


def _generated(state: DistillState, count: int, line: ProgressLine) -> tuple[Tensor, Tensor]:
    """Draw images of a trained generator, and label them with the teacher."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    while sum(len(each) for each in images) < count:
        with torch.no_grad():
            made = synthesize(state, *state.synthesizer.draw_samples(state.config.loop.batch_size)).float()
            labels.append(collect(state.teacher(state.normalize(made)).logits.argmax(1)))
        images.append(collect(to_uint8(made)))
        line.show(min(count, sum(len(each) for each in images)), {}, 0.0)
    return torch.cat(images)[:count], torch.cat(labels)[:count]
