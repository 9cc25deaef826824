"""Casts all float32 weights of one or more modules to low precision with one kernel.

Autocast makes the same copies, but launches a kernel per layer, and another one per layer to cast the gradients back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from dfkd_fast.nn import HighOrderAttention

__all__ = ["weight_cast"]


class _CastWeights(torch.autograd.Function):
    """Casts float32 weights to another dtype. Gradients are float32, in each weight's memory format.

    Copies of frozen weights require no gradient.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        ctx.mark_non_differentiable(
            *(copy for copy, needed in zip(copies, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        given = [grad_output for grad_output in grad_outputs if grad_output is not None]
        grads = [
            None if grad_output is None else torch.empty_like(weight)
            for weight, grad_output in zip(ctx.saved_tensors, grad_outputs, strict=True)
        ]
        if given:
            torch._foreach_copy_([grad for grad in grads if grad is not None], given)
        return None, *grads


def _cast_names(module: nn.Module) -> list[str]:
    """The names of the parameters that autocast or an op would cast."""
    parameters: dict[type[nn.Module], tuple[str, ...]] = {
        **{_ConvNd: ("weight", "bias"), nn.Linear: ("weight", "bias")},
        HighOrderAttention: ("proj_weight", "out_weight"),
    }
    return [
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules()
        for kind, names in parameters.items()
        if isinstance(layer, kind)
        for name in names
        if layer._parameters.get(name) is not None
    ]


def weight_cast(
    dtype: torch.dtype, *modules: nn.Module
) -> list[tuple[Callable[[], tuple[Tensor, ...]], Callable[..., Any]]]:
    """Split the calls of modules into one cast of all their weights and a call per module with its copies.

    Weights and biases of convolutions and linear layers, and the weights of high-order attention, are cast. Autocast
    still casts everything else, such as weights that spectral norm computes. Frozen weights are cast in each step too,
    since loading a checkpoint changes them in place.

    Args:
        dtype: low-precision dtype of the copies.
        *modules: float32 modules that are called in this order under autocast to ``dtype``.

    Returns:
        For each module, a function that returns its copies, and one that takes the copies and the module's arguments.
        The first module's function casts the weights of all modules. In each step, the functions must be called once
        and in order.
    """
    names = [_cast_names(module) for module in modules]
    weights = [module.get_parameter(name) for module, each in zip(modules, names, strict=True) for name in each]
    pending: list[tuple[Tensor, ...]] = []

    def cast() -> tuple[Tensor, ...]:
        copies = iter(_CastWeights.apply(dtype, *weights) if weights else ())
        pending[:] = [tuple(islice(copies, len(each))) for each in names]
        return pending.pop(0)

    def take() -> tuple[Tensor, ...]:
        return pending.pop(0)

    def call(module: nn.Module, names: list[str], copies: tuple[Tensor, ...], *arguments: Any) -> Any:
        return functional_call(module, dict(zip(names, copies, strict=True)), arguments)

    casts = [cast, *[take] * (len(modules) - 1)]
    calls = [partial(call, module, each) for module, each in zip(modules, names, strict=True)]
    return list(zip(casts, calls, strict=True))
