"""A module's forward with fused forms in it: how it stands in a module, and when it steps aside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PatchedForward", "Refused", "first_line", "hooked", "own_forward", "verify"]


class Refused(Exception):
    """Why a module is left."""


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(filter(str.strip, str(error).splitlines()), '')}"


def hooked(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(len(table) > 0 for table in hooks)


class PatchedForward:
    """The forward of one module with fused forms in it; held in the module's ``__dict__`` under that name.

    The class's own forward runs where this one does not hold: more arguments than one tensor, a norm in training mode,
    a hook on a module that would be passed by.

    Attributes:
        model: the module, under the name that :class:`dfkd_fast.models.tracing.Root` has it.
        program: takes this object and the arguments.
        one_map: the program takes one tensor (N, C, H, W) and no more.
        passed_by: modules whose own forward does not run.
        norms: BatchNorms among them.
        evaluating: the program is that of eval mode alone.
        replaced: modules, and what by.
    """

    program: Callable[..., Any]

    def __init__(self, model: nn.Module, *, one_map: bool = True) -> None:
        self.model, self.one_map = model, one_map
        self.passed_by: list[nn.Module] = []
        self.norms: list[nn.Module] = []
        self.evaluating = False
        self.replaced: list[tuple[nn.Module, str]] = []

    def holds(self, *args: Any, **kwargs: Any) -> bool:
        if self.one_map and not (len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4):
            return False
        if self.evaluating and self.model.training:
            return False
        return not any(norm.training for norm in self.norms) and not any(hooked(module) for module in self.passed_by)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.holds(*args, **kwargs):
            return self.program(self, *args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedForward:
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    def __reduce__(self) -> Any:
        # A pickled model is loaded without the patch: while it is being built, this is the class's own forward.
        return getattr, (self.model, "forward")


def own_forward(module: nn.Module) -> None:
    """Refuses a module whose forward is not that of its class."""
    bound = MethodType(type(module).forward, module)
    if module.__dict__.get("forward", bound) != bound:
        raise Refused(f"the forward of {type(module).__name__} was set on the instance")
    if isinstance(module, torch.jit.ScriptModule):
        raise Refused(f"{type(module).__name__} is compiled by TorchScript")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _answer(function: Callable[..., Any], args: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    """The tensors that a function gives and, with ``gradients``, those of a weighted sum of them in its arguments."""
    given = [arg.clone().requires_grad_(gradients and arg.is_floating_point()) for arg in args]
    with torch.set_grad_enabled(gradients):
        found = list(_tensors(function(*given)))
        if not gradients:
            return found
        total = torch.zeros(()).requires_grad_()
        for tensor in found:
            weights = torch.arange(1, tensor.numel() + 1, device=tensor.device)
            total = total + (tensor.float().flatten() * weights).mean().cpu()
        wanted = [arg for arg in given if arg.requires_grad]
        known = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*found, *(torch.zeros_like(arg) if g is None else g for arg, g in zip(wanted, known, strict=True))]


def verify(forward: PatchedForward, *args: Tensor, gradients: bool = False) -> None:
    """Refuses a forward that gives something else than the class's own: in exact arithmetic they are equal.

    Args:
        forward: what is to be tried.
        *args: what it is tried on.
        gradients: those in the arguments must agree too.
    """
    module, name = forward.model, type(forward.model).__name__
    try:
        wanted = _answer(partial(type(module).forward, module), args, gradients)
    except Exception as error:  # a forward may fail in any way
        raise Refused(f"{name} cannot be tried: {first_line(error)}") from error
    try:
        found = _answer(partial(forward.program, forward), args, gradients)
    except Exception as error:  # a graph that took the wrong turn too
        raise Refused(f"the fused form of {name} fails: {first_line(error)}") from error
    if len(found) != len(wanted) or not wanted or not all(map(_close, found, wanted)):
        raise Refused(f"the fused form of {name} gives other values on the example")


def _close(found: Tensor, wanted: Tensor) -> bool:
    # Convolutions may run in TF32 on CUDA devices; what is wrong is further off than that.
    exact = wanted.dtype in (torch.float32, torch.float64) and not wanted.is_cuda
    tolerance = 1e-4 if exact else 2e-2
    scale = wanted.float().nan_to_num(0, 0, 0).abs().max().item() if wanted.numel() else 0.0
    return (found.shape, found.dtype) == (wanted.shape, wanted.dtype) and torch.allclose(
        found.float(), wanted.float(), rtol=0, atol=tolerance * scale, equal_nan=True
    )
