"""The networks and objectives that a step calls: eager or optimized, and optionally compiled."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.engine.state import DistillState
from dfkd_fast.engine.weight_cast import weight_cast
from dfkd_fast.graph import cast_weights, fold_batchnorm
from dfkd_fast.nvtx import nvtx_range

__all__ = ["Networks", "StepNetworks", "compiled_networks", "eager_networks", "optimized_networks"]

Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class StepNetworks:
    """The calls of one kind of step, in order.

    Attributes:
        generator: noise (N, latent_dim) to the teacher's input (N, 3, H, W), normalised.
        teacher: images to outputs, with BatchNorm statistics if a term of the step needs them.
        student: images to outputs.
        objective: both outputs to the scalar to minimise and the values of its terms.
    """

    generator: Call
    teacher: Call
    student: Call
    objective: Call


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The calls of both kinds of step. The two kinds call a network in different ways and share no compiled region."""

    generator_step: StepNetworks
    student_step: StepNetworks


def _region(name: str, call: Call, *, first: Call | None = None, compile: Mapping[str, Any] | None) -> Call:
    """A call in its profiler range, compiled without graph breaks and for static shapes if there are options for that.

    Each network is a separate region, so that a profile can attribute kernels to networks.

    Args:
        name: of the network.
        call: what is compiled.
        first: runs before it, is not compiled, and gives its first argument.
        compile: options of :func:`torch.compile`, or None.
    """
    if compile is not None:
        call = torch.compile(_with_own_code(name, call), fullgraph=True, dynamic=False, **compile)

    def region(*arguments: Any) -> Any:
        with nvtx_range("network", name):
            return call(*arguments) if first is None else call(first(), *arguments)

    return region


def _with_own_code(name: str, call: Call) -> Call:
    """``call`` as a function with a separate code object.

    Dynamo counts recompilations per code object. Modules of one class, and closures of one function, share theirs, so
    compiling one network would count against the next.
    """

    def region(*arguments: Any) -> Any:
        return call(*arguments)

    code = region.__code__.replace(co_name=f"region_{name}")
    return types.FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)


def _networks(
    state: DistillState,
    teachers: tuple[nn.Module, nn.Module],
    dtype: torch.dtype,
    compile: Mapping[str, Any] | None,
) -> Networks:
    """Networks with images in ``dtype``; if that is not float32, the weights of trained networks are cast together."""
    normalize = state.normalize
    calls: dict[str, tuple[Call | None, Call]] = {name: (None, side.module) for name, side in state.sides.items()}
    if dtype != torch.float32:
        calls = {name: weight_cast(side.module, dtype) for name, side in state.sides.items()}
    (cast_generator, generate), (cast_student, student) = calls["generator"], calls["student"]

    def generator(*arguments: Any) -> Tensor:
        return normalize(generate(*arguments)).to(dtype)

    region = partial(_region, compile=compile)
    steps = [
        StepNetworks(
            generator=region("generator", generator, first=cast_generator),
            teacher=region("teacher", teacher),
            student=region("student", student, first=cast_student),
            objective=region("objective", side.objective),
        )
        for side, teacher in zip(state.sides.values(), teachers, strict=True)
    ]
    return Networks(generator_step=steps[0], student_step=steps[1])


def eager_networks(state: DistillState, *, compile: Mapping[str, Any] | None = None) -> Networks:
    """The state's networks as they are; compiled if there are options of torch.compile."""
    teachers = (state.teacher_statistics or state.teacher, state.teacher)
    return _networks(state, teachers, torch.float32, compile)


def optimized_networks(state: DistillState, *, compile: Mapping[str, Any] | None = None) -> Networks:
    """Networks that compute the same with fewer operations; compiled if there are options of torch.compile.

    The frozen teacher is copied: its weights are held in the dtype of autocast, and its BatchNorms are folded into
    convolutions if no loss needs their statistics. The weights of generator and student are cast together. Images have
    the dtype to which autocast would round them in both networks.
    """
    dtype = state.runtime.autocast or torch.float32
    folded = fold_batchnorm(state.teacher, dtype=dtype, image_size=state.generator.module.image_size)
    measured = cast_weights(state.teacher_statistics, dtype) if state.teacher_statistics is not None else folded
    return _networks(state, (measured, folded), dtype, compile)


def compiled_networks(state: DistillState, *, backend: str = "inductor") -> Networks:
    """:func:`optimized_networks` through torch.compile."""
    options: dict[str, Any] = {"fallback_random": True}  # dropout draws the same numbers as in eager mode
    if state.config.autotune:
        options["max_autotune"] = True
    given = {"options": options} if backend == "inductor" else {}
    return optimized_networks(state, compile={"backend": backend, **given})
