"""Casts all float32 weights of a network to low precision with one kernel.

Autocast makes the same copies, but launches a kernel per layer, and another one per layer to cast the gradients back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

__all__ = ["weight_cast"]


class _CastWeights(torch.autograd.Function):
    """Casts float32 weights to another dtype. Gradients are float32, in each weight's memory format."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grads = [torch.empty_like(weight) for weight in ctx.saved_tensors]
        torch._foreach_copy_(grads, grad_outputs)
        return None, *grads


def weight_cast(module: nn.Module, dtype: torch.dtype) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[..., Any]]:
    """Split a module's call into a cast of its weights and a call with the copies.

    Weights and biases of convolutions and linear layers are cast. Autocast still casts everything else, such as weights
    that spectral norm computes.

    Args:
        module: a float32 module that is called under autocast to ``dtype``.
        dtype: low-precision dtype of the copies.

    Returns:
        A function that returns the copies, and one that takes the copies and the module's arguments.
    """
    names = [
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules()
        if isinstance(layer, (_ConvNd, nn.Linear))
        for name in ("weight", "bias")
        if name in layer._parameters and layer._parameters[name] is not None
    ]
    weights = [module.get_parameter(name) for name in names]

    def cast() -> tuple[Tensor, ...]:
        return _CastWeights.apply(dtype, *weights)

    def call(copies: tuple[Tensor, ...], *arguments: Any) -> Any:
        return functional_call(module, dict(zip(names, copies, strict=True)), arguments)

    return cast, call
