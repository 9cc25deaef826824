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

from dfkd_fast.engine.weight_cast import weight_cast
from dfkd_fast.engine.state import DistillState
from dfkd_fast.graph import fold_batchnorm, held_in
from dfkd_fast.nvtx import nvtx_range

__all__ = ["Networks", "StepNetworks", "plain", "ready"]


class Call:
    """A call of a step, as a region that can be compiled and what goes before it.

    Args:
        region: what is called, with the results of ``first`` as its first argument where there is one.
        first: stays as it is when the region is compiled.
    """

    def __init__(self, region: Callable[..., Any], first: Callable[[], Any] | None = None) -> None:
        self.region, self.first = region, first

    def __call__(self, *arguments: Any) -> Any:
        return self.region(*arguments) if self.first is None else self.region(self.first(), *arguments)

    def compiled(self, name: str, **options: Any) -> Call:
        """The same with its region compiled, without a graph break and for the present shapes alone."""
        return Call(torch.compile(_own_code(name, self.region), fullgraph=True, dynamic=False, **options), self.first)

    def ranged(self, name: str) -> Call:
        """The same inside of a range."""

        def ranged(*arguments: Any) -> Any:
            with nvtx_range("network", name):
                return self(*arguments)

        return Call(ranged)


@dataclass(frozen=True, kw_only=True)
class StepNetworks:
    """The calls of one kind of step, in its order.

    Attributes:
        generator: noise (N, latent_dim) to the teacher's input (N, 3, H, W): images, normalised.
        teacher: images to outputs, with BatchNorm statistics where a term of the step needs them.
        student: images to outputs.
        objective: both outputs to the scalar to descend and the terms' values.
    """

    generator: Call
    teacher: Call
    student: Call
    objective: Call

    def each(self, change: Callable[[str, Call], Call]) -> StepNetworks:
        """The same with each call changed, given its name."""
        return replace(self, **{field.name: change(field.name, getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The calls of both kinds of step. One network is called in two ways, so that the two share nothing here."""

    generator_step: StepNetworks
    student_step: StepNetworks

    def each(self, change: Callable[[str, Call], Call]) -> Networks:
        return Networks(generator_step=self.generator_step.each(change), student_step=self.student_step.each(change))

    def compiled(self, **options: Any) -> Networks:
        """Each call compiled as a region of its own.

        Whole steps as one region would be fused a little more, and could not be told apart by network in a profile.

        Args:
            **options: of :func:`torch.compile`: ``mode``, ``backend``, ``options``.
        """
        return self.each(lambda name, call: call.compiled(name, **options))

    def ranged(self) -> Networks:
        """Each call inside of its range."""
        return self.each(lambda name, call: call.ranged(name))


def _own_code(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` as a function with a code object of its own.

    Dynamo counts recompilations by code object, and the modules of one class, or the closures of one function, share
    theirs: what one network is compiled for would count against the next.
    """

    def region(*arguments: Any) -> Any:
        return call(*arguments)

    code = region.__code__.replace(co_name=f"region_{name}")
    return types.FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)


def _paint(state: DistillState, generate: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    scale, shift = state.scale, state.shift

    def paint(*arguments: Any) -> Tensor:
        return (generate(*arguments).float() * scale + shift).to(dtype)

    return paint


def plain(state: DistillState) -> Networks:
    """The networks as they are."""
    generator, student = Call(_paint(state, state.generator, torch.float32)), Call(state.student)
    teachers = (state.teacher_statistics or state.teacher, state.teacher)
    objectives = (state.generator_objective, state.student_objective)
    steps = [
        StepNetworks(generator=generator, teacher=Call(teacher), student=student, objective=Call(objective))
        for teacher, objective in zip(teachers, objectives, strict=True)
    ]
    return Networks(generator_step=steps[0], student_step=steps[1]).ranged()


def ready(state: DistillState) -> Networks:
    """The same networks made ready for speed, not ranged.

    The frozen teacher is copied: its convolutions and linear layers are held in the type that they are computed in, and
    where no statistics are asked for, its BatchNorms are folded into the convolutions. The weights of generator and
    student are cast together. Images are handed over in the type that both networks would round them to first.
    """
    dtype = state.runtime.autocast or torch.float32
    folded = fold_batchnorm(state.teacher, dtype=dtype, image_size=state.generator.image_size)
    measured = held_in(state.teacher_statistics, dtype) if state.teacher_statistics is not None else folded
    if dtype == torch.float32:
        generator, student = Call(_paint(state, state.generator, dtype)), Call(state.student)
    else:
        cast, generate = weight_cast(state.generator, dtype)
        generator = Call(_paint(state, generate, dtype), cast)
        cast, call = weight_cast(state.student, dtype)
        student = Call(call, cast)
    objectives = (state.generator_objective, state.student_objective)
    steps = [
        StepNetworks(generator=generator, teacher=Call(teacher), student=student, objective=Call(objective))
        for teacher, objective in zip((measured, folded), objectives, strict=True)
    ]
    return Networks(generator_step=steps[0], student_step=steps[1])
