"""Low-precision copies of float32 master weights, made by one kernel and freed after the step.

Autocast makes the same copies one by one, and casts their gradients back one by one: two launches per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["cast_together", "weight_cast"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*masters)
        copies = [torch.empty_like(master, dtype=dtype) for master in masters]
        torch._foreach_copy_(copies, masters)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        back = [torch.empty_like(master) for master in ctx.saved_tensors]
        torch._foreach_copy_(back, gradients)
        return None, *back


def cast_together(masters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies of float32 tensors in another type; gradients flow back in float32, in each master's own layout."""
    return _CastTogether.apply(dtype, *masters)


def weight_cast(module: nn.Module, dtype: torch.dtype) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[..., Any]]:
    """Split a module's call into the cast of its weights and the call with them.

    The weights and biases of convolutions and linear layers are cast, as autocast would; computed weights (spectral
    norm) and everything else are left to it.

    Args:
        module: float32, to be called under autocast to ``dtype``.
        dtype: of the copies.

    Returns:
        A function that makes the copies, and one that takes them and the module's own arguments.
    """
    names = [
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules()
        if isinstance(layer, _LAYERS)
        for name in ("weight", "bias")
        if name in layer._parameters and layer._parameters[name] is not None
    ]
    known = dict(module.named_parameters(remove_duplicate=False))
    masters = [known[name] for name in names]

    def cast() -> tuple[Tensor, ...]:
        return cast_together(masters, dtype)

    def call(copies: tuple[Tensor, ...], *arguments: Any) -> Any:
        return functional_call(module, dict(zip(names, copies, strict=True)), arguments)

    return cast, call
