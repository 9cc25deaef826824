"""The networks and objectives that steps call: eager or optimized, optionally compiled."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.collectives import current_group
from dfkd_fast.engine.state import DistillState, Side
from dfkd_fast.engine.weight_cast import weight_cast
from dfkd_fast.graph import Outputs, cast_weights, fold_batchnorm
from dfkd_fast.nvtx import nvtx_range
from dfkd_fast.objectives import Objective

__all__ = ["Networks", "StepNetworks", "compiled_networks", "eager_networks", "optimized_networks"]

Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class StepNetworks:
    """The functions that one kind of step calls, in order.

    Attributes:
        generator: maps what the synthesizer draws, such as noise (N, latent_dim), to normalized images (N, 3, H, W).
        teacher: maps images to outputs, with BatchNorm statistics if a loss term of the step needs them.
        student: maps images to outputs.
        objective: maps the outputs of teacher and student to the scalar loss and a tensor of its terms' values.
    """

    generator: Call
    teacher: Call
    student: Call
    objective: Call


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The functions of both kinds of steps. The kinds do not share compiled regions."""

    generator_step: StepNetworks
    student_step: StepNetworks


def _region(name: str, call: Call, *, first: Call | None = None, compile: Mapping[str, Any] | None) -> Call:
    """Wrap a call in an NVTX range, and compile it without graph breaks for static shapes.

    Each network is a separate region, so that a profile can attribute kernels to networks.

    Args:
        name: name of the network.
        call: the function to compile.
        first: a function that is not compiled and returns the first argument of ``call``.
        compile: options of :func:`torch.compile`; None does not compile.
    """
    if compile is not None:
        call = torch.compile(_with_own_code(name, call), fullgraph=True, dynamic=False, **compile)

    def region(*arguments: Any) -> Any:
        with nvtx_range("network", name):
            return call(*arguments) if first is None else call(first(), *arguments)

    return region


def _with_own_code(name: str, call: Call) -> Call:
    """Wrap ``call`` in a function with a separate code object.

    Dynamo counts recompilations per code object. Modules of one class share a code object, and so do closures of one
    function. Without the wrapper, compiling one network would count as a recompilation of another.
    """

    def region(*arguments: Any) -> Any:
        return call(*arguments)

    code = region.__code__.replace(co_name=f"region_{name}")
    return types.FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)


def _differentiable_outputs(call: Call, objective: Objective) -> Call:
    """Detach features that the objective does not read. The backward would otherwise add zeros to their gradients."""
    if objective.reads_features:
        return call

    def logits_and_statistics(*arguments: Any) -> Outputs:
        outputs = call(*arguments)
        features = tuple(feature.detach() for feature in outputs.features)
        return Outputs(outputs.logits, features, outputs.penultimate.detach(), outputs.statistics)

    return logits_and_statistics


def _networks(
    state: DistillState,
    teachers: tuple[nn.Module, nn.Module],
    dtype: torch.dtype,
    compile: Mapping[str, Any] | None,
) -> Networks:
    """Build the networks of both steps, each with one of ``teachers``, for images and cast weights in ``dtype``."""
    normalize = state.normalize
    region = partial(_region, compile=compile)

    def calls(*modules: nn.Module) -> list[tuple[Call | None, Call]]:
        return [(None, module) for module in modules] if dtype == torch.float32 else [*weight_cast(dtype, *modules)]

    def step(side: Side[Any], teacher: nn.Module, source: nn.Module) -> StepNetworks:
        ((cast_generator, generate),) = calls(source)
        # A generator step may not call the student, whose call would cast the objective's weights too.
        together = [side.objective] if side is state.student else []
        (cast_student, student), *rest = calls(state.student.module, *together)
        cast_objective, objective = rest[0] if rest else calls(side.objective)[0]

        def generator(*arguments: Any) -> Tensor:
            return normalize(generate(*arguments)).to(dtype)

        return StepNetworks(
            generator=region("generator", generator, first=cast_generator),
            teacher=region("teacher", _differentiable_outputs(teacher, side.objective)),
            student=region("student", _differentiable_outputs(student, side.objective), first=cast_student),
            objective=region("objective", objective, first=cast_objective),
        )

    sources = (state.synthesizer.module, state.synthesizer.sampler)
    steps = [step(*each) for each in zip(state.sides.values(), teachers, sources, strict=True)]
    return Networks(generator_step=steps[0], student_step=steps[1])


def eager_networks(state: DistillState, *, compile: Mapping[str, Any] | None = None) -> Networks:
    """Return the state's networks without changes. With ``compile``, options of :func:`torch.compile`, compile them."""
    teachers = (state.teacher_statistics or state.teacher, state.teacher)
    return _networks(state, teachers, torch.float32, compile)


def optimized_networks(state: DistillState, *, compile: Mapping[str, Any] | None = None) -> Networks:
    """Return equivalent networks with fewer operations. With ``compile``, options of torch.compile, compile them.

    The frozen teacher is copied with its weights in the autocast dtype. If no loss needs their statistics, its
    BatchNorms are folded into convolutions, and cuDNN computes these with the ReLUs that follow. One kernel casts all
    weights of the generator, and one those of the student and its objective. Images have the autocast dtype.
    """
    dtype = state.runtime.autocast or torch.float32
    group = current_group()
    batch_size = state.config.loop.batch_size // (1 if group is None else group.size)
    sizes = {"image_size": state.image_size, "batch_size": batch_size}
    folded = fold_batchnorm(state.teacher, dtype=dtype, **sizes)
    statistics = state.teacher_statistics
    teachers = (folded if statistics is None else cast_weights(statistics, dtype), folded)
    return _networks(state, teachers, dtype, compile)


def compiled_networks(state: DistillState, *, backend: str = "inductor") -> Networks:
    """Return the networks of :func:`optimized_networks`, compiled with a backend of torch.compile."""
    options: dict[str, Any] = {"fallback_random": True}  # dropout draws the same values as in eager mode
    if state.config.autotune:
        options["max_autotune"] = True
    given = {"options": options} if backend == "inductor" else {}
    return optimized_networks(state, compile={"backend": backend, **given})
