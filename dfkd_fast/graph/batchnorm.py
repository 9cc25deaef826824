"""BatchNorm that normalises with its stored statistics and also returns those of its input."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.graph.outputs import LayerStatistics
from dfkd_fast.graph.tracing import hooked, library

__all__ = ["Activation", "activation_of", "batchnorm_with_statistics", "gives_statistics", "with_activation"]

Activation = Literal["none", "relu", "relu6"]


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, if :func:`dfkd_fast.ops.batchnorm_statistics` has it; None otherwise."""
    if hooked(module):
        return None
    if type(module) is nn.Identity:
        return "none"
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) in (nn.ReLU6, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6):
        return "relu6"
    return None


def with_activation(module: nn.Module) -> bool:
    """Whether a module is timm's BatchNorm with dropout and activation inside."""
    timm: Any = library("timm.layers")
    return timm is not None and isinstance(module, timm.BatchNormAct2d)


def gives_statistics(module: nn.Module | None) -> bool:
    """Whether :func:`batchnorm_with_statistics` can take the place of a module, a subclass's own forward excluded."""
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.running_var is None:
        return False
    timm: Any = library("timm.layers")
    plain = timm.BatchNormAct2d.forward if with_activation(module) else nn.BatchNorm2d.forward
    return type(module).forward is plain


def batchnorm_with_statistics(
    bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None, activation: Activation = "none"
) -> tuple[Tensor, LayerStatistics]:
    """``activation(bn(x) + residual)`` in eval mode, and the statistics of x (N, C, H, W) (the paper, Eq. 3)."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    # Other shapes and dtypes are broadcast and promoted, as the network's addition does it.
    alike = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    y, mean, var = ops.batchnorm_statistics(
        x,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        bn.eps,
        activation=activation if alike else "none",
        residual=residual if alike else None,
    )
    if residual is not None and not alike:
        y = y + residual
        if activation != "none":
            y = F.relu(y) if activation == "relu" else F.relu6(y)
    return y, LayerStatistics(mean, var, bn.running_mean.to(mean.dtype), bn.running_var.to(mean.dtype))
