"""The networks and objectives that a step calls: eager, optimized, or compiled.

The forms are interchangeable: a step only uses the calls of :class:`StepNetworks`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.engine.state import DistillState
from dfkd_fast.engine.weight_cast import weight_cast
from dfkd_fast.graph import fold_batchnorm, held_in
from dfkd_fast.nvtx import nvtx_range

__all__ = ["CompiledRegion", "Networks", "StepNetworks", "compiled_networks", "eager_networks", "optimized_networks"]


class CompiledRegion:
    """A call of a step: a region that torch.compile may compile, and what runs before it.

    Args:
        region: called with the result of ``first``, if there is one, in front of the arguments.
        first: is never compiled.
    """

    def __init__(self, region: Callable[..., Any], first: Callable[[], Any] | None = None) -> None:
        self.region, self.first = region, first

    def __call__(self, *arguments: Any) -> Any:
        return self.region(*arguments) if self.first is None else self.region(self.first(), *arguments)

    def compiled(self, name: str, **options: Any) -> CompiledRegion:
        """The same with its region compiled, without graph breaks and for static shapes."""
        region = torch.compile(_with_own_code(name, self.region), fullgraph=True, dynamic=False, **options)
        return CompiledRegion(region, self.first)

    def with_nvtx(self, name: str) -> CompiledRegion:
        """The same in a profiler range."""

        def ranged(*arguments: Any) -> Any:
            with nvtx_range("network", name):
                return self(*arguments)

        return CompiledRegion(ranged)


@dataclass(frozen=True, kw_only=True)
class StepNetworks:
    """The calls of one kind of step, in order.

    Attributes:
        generator: noise (N, latent_dim) to the teacher's input (N, 3, H, W), normalised.
        teacher: images to outputs, with BatchNorm statistics if a term of the step needs them.
        student: images to outputs.
        objective: both outputs to the scalar to minimise and the values of its terms.
    """

    generator: CompiledRegion
    teacher: CompiledRegion
    student: CompiledRegion
    objective: CompiledRegion

    def each(self, change: Callable[[str, CompiledRegion], CompiledRegion]) -> StepNetworks:
        """The same with each call changed, given its name."""
        return replace(self, **{field.name: change(field.name, getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The calls of both kinds of step. The two kinds call a network in different ways and share no region."""

    generator_step: StepNetworks
    student_step: StepNetworks

    def each(self, change: Callable[[str, CompiledRegion], CompiledRegion]) -> Networks:
        return Networks(generator_step=self.generator_step.each(change), student_step=self.student_step.each(change))

    def compiled(self, **options: Any) -> Networks:
        """Each call compiled as a separate region, so that a profile can attribute kernels to networks.

        Args:
            **options: of :func:`torch.compile`: ``mode``, ``backend``, ``options``.
        """
        return self.each(lambda name, call: call.compiled(name, **options))

    def with_nvtx(self) -> Networks:
        """Each call in its profiler range."""
        return self.each(lambda name, call: call.with_nvtx(name))


def _with_own_code(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` as a function with a separate code object.

    Dynamo counts recompilations per code object. Modules of one class, and closures of one function, share theirs, so
    compiling one network would count against the next.
    """

    def region(*arguments: Any) -> Any:
        return call(*arguments)

    code = region.__code__.replace(co_name=f"region_{name}")
    return types.FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)


def _normalized(state: DistillState, generate: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    normalize = state.normalize

    def generator(*arguments: Any) -> Tensor:
        return normalize(generate(*arguments)).to(dtype)

    return generator


def _networks(
    state: DistillState, generator: CompiledRegion, teachers: tuple[nn.Module, nn.Module], student: CompiledRegion
) -> Networks:
    steps = [
        StepNetworks(
            generator=generator,
            teacher=CompiledRegion(teacher),
            student=student,
            objective=CompiledRegion(side.objective),
        )
        for side, teacher in zip(state.sides.values(), teachers, strict=True)
    ]
    return Networks(generator_step=steps[0], student_step=steps[1])


def eager_networks(state: DistillState) -> Networks:
    """The state's networks as they are."""
    generator = CompiledRegion(_normalized(state, state.generator.module, torch.float32))
    teachers = (state.teacher_statistics or state.teacher, state.teacher)
    return _networks(state, generator, teachers, CompiledRegion(state.student.module))


def optimized_networks(state: DistillState) -> Networks:
    """Networks that compute the same with fewer operations.

    The frozen teacher is copied: its weights are held in the dtype of autocast, and its BatchNorms are folded into
    convolutions if no loss needs their statistics. The weights of generator and student are cast together. Images have
    the dtype to which autocast would round them in both networks.
    """
    dtype = state.runtime.autocast or torch.float32
    if dtype == torch.float32:
        regions = {name: CompiledRegion(side.module) for name, side in state.sides.items()}
    else:
        casts = {name: weight_cast(side.module, dtype) for name, side in state.sides.items()}
        regions = {name: CompiledRegion(call, cast) for name, (cast, call) in casts.items()}
    generate = regions["generator"]
    generator = CompiledRegion(_normalized(state, generate.region, dtype), generate.first)
    folded = fold_batchnorm(state.teacher, dtype=dtype, image_size=state.generator.module.image_size)
    measured = held_in(state.teacher_statistics, dtype) if state.teacher_statistics is not None else folded
    return _networks(state, generator, (measured, folded), regions["student"])


def compiled_networks(state: DistillState, *, backend: str = "inductor") -> Networks:
    """:func:`optimized_networks` through torch.compile."""
    options: dict[str, Any] = {"fallback_random": True}  # dropout draws the same numbers as in eager mode
    if state.config.autotune:
        options["max_autotune"] = True
    given: dict[str, Any] = {"options": options} if backend == "inductor" else {}
    return optimized_networks(state).compiled(backend=backend, **given)
