"""Differentiable calls of launchers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["HostFunction"]


class HostFunction(torch.autograd.Function):
    """Calls ``op.forward(*tensors)``, and ``op.backward(grad_output, *tensors, saved, needs_grad)`` in backward."""

    @staticmethod
    def forward(ctx: Any, op: Any, *tensors: Tensor | None) -> Tensor:
        ctx.op = op
        out, saved = op.forward(*tensors)
        ctx.save_for_backward(*tensors, saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return None, *ctx.op.backward(grad_output, *ctx.saved_tensors, ctx.needs_input_grad[1:])
