"""What a step calls: the run's networks and objectives as they are, made ready, or compiled.

The forms are interchangeable: a step asks for nothing but the calls of :class:`StepNetworks`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.engine.state import DistillState
from dfkd_fast.models import FeatureModel, Outputs, fold_batchnorm, held_in
from dfkd_fast.ranges import span

__all__ = ["Networks", "StepNetworks", "plain", "ready"]


@dataclass(frozen=True, kw_only=True)
class StepNetworks:
    """The calls of one kind of step, in its order.

    Attributes:
        generator: noise (N, latent_dim) to the teacher's input (N, 3, H, W): images, normalised.
        teacher: images to outputs, with BatchNorm statistics where a term of the step needs them.
        student: images to outputs.
        objective: both outputs to the scalar to descend and the terms' values.
    """

    generator: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Outputs]
    student: Callable[[Tensor], Outputs]
    objective: Callable[[Outputs, Outputs | None], tuple[Tensor, Tensor]]

    def each(self, change: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> StepNetworks:
        """The same with each call changed, given its name."""
        return replace(self, **{field.name: change(field.name, getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The calls of both kinds of step. One network is called in two ways, so that the two share nothing here."""

    generator_step: StepNetworks
    student_step: StepNetworks

    def compiled(self, **options: Any) -> Networks:
        """Each call compiled as a region of its own, without a graph break and for the present shapes alone.

        Whole steps as one region would be fused a little more, and could not be told apart by network in a profile.

        Args:
            **options: of :func:`torch.compile`: ``mode``, ``backend``, ``options``.
        """

        def change(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(_own_code(name, call), fullgraph=True, dynamic=False, **options)

        return Networks(generator_step=self.generator_step.each(change), student_step=self.student_step.each(change))

    def ranged(self) -> Networks:
        """Each call inside of its range."""

        def change(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def ranged(*arguments: Any) -> Any:
                with span("network", name):
                    return call(*arguments)

            return ranged

        return Networks(generator_step=self.generator_step.each(change), student_step=self.student_step.each(change))


def _own_code(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` as a function with a code object of its own.

    Dynamo counts recompilations by code object, and the modules of one class, or the closures of one function, share
    theirs: what one network is compiled for would count against the next.
    """

    def region(*arguments: Any) -> Any:
        return call(*arguments)

    code = region.__code__.replace(co_name=f"region_{name}")
    return types.FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)


def _painter(state: DistillState, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    generator, scale, shift = state.generator, state.scale, state.shift

    def paint(noise: Tensor) -> Tensor:
        return (generator(noise).float() * scale + shift).to(dtype)

    return paint


def _assemble(
    state: DistillState, teachers: tuple[FeatureModel, FeatureModel], dtype: torch.dtype = torch.float32
) -> Networks:
    paint = _painter(state, dtype)
    objectives = (state.generator_objective, state.student_objective)
    steps = [
        StepNetworks(generator=paint, teacher=teacher, student=state.student, objective=objective)
        for teacher, objective in zip(teachers, objectives, strict=True)
    ]
    return Networks(generator_step=steps[0], student_step=steps[1])


def plain(state: DistillState) -> Networks:
    """The networks as they are."""
    return _assemble(state, (state.teacher_statistics or state.teacher, state.teacher)).ranged()


def ready(state: DistillState) -> Networks:
    """The same networks with the frozen one made ready, in copies of its own; not ranged.

    Convolutions and linear layers of the teacher are held in the type that they are computed in. Where no statistics
    are asked for, its BatchNorms are folded into the convolutions. Images are handed over in that type too: the first
    thing that either network would do with them is to round them to it.
    """
    dtype = state.runtime.autocast or torch.float32
    folded = fold_batchnorm(state.teacher, dtype=dtype, image_size=state.generator.image_size)
    with_statistics = state.teacher_statistics
    first = held_in(with_statistics, dtype) if with_statistics is not None else folded
    return _assemble(state, (first, folded), dtype)
