"""A rewritten BatchNorm: it uses its stored statistics and returns those of its input."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.models.outputs import LayerStatistics

__all__ = ["Activation", "BatchNormWithStatistics", "activation_of"]

Activation = Literal["none", "relu", "relu6"]


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, where :func:`dfkd_fast.ops.batchnorm_statistics` has it; None else.

    A module with hooks is more than its activation.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(module) is nn.Identity:
        return "none"
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) in (nn.ReLU6, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6):
        return "relu6"
    return None


def _with_activation() -> Any:
    """timm's BatchNorm with dropout and activation inside, where timm is loaded: else no network can hold one."""
    layers = sys.modules.get("timm.layers")
    return None if layers is None else layers.BatchNormAct2d


class BatchNormWithStatistics(nn.Module):
    """What ``batchnorm`` computes in eval mode, and the statistics of its input beside it (paper, Eq. 3).

    It reads weights and buffers of ``batchnorm`` itself at every call, so that the two never differ. They belong to the
    network that holds ``batchnorm``, not to this module, which has no parameters, buffers or state of its own.

    Args:
        batchnorm: a BatchNorm2d, or timm's BatchNormAct2d, with stored statistics.
        activation: what follows it in the network and is computed here, in the same pass. A ReLU or ReLU6 inside of
            ``batchnorm`` is found by itself.

    Attributes:
        activation: the activation that is computed in the same pass.

    Raises:
        TypeError: ``batchnorm`` is another module.
        ValueError: an activation is to follow one that ``batchnorm`` has inside.
    """

    batchnorm: nn.BatchNorm2d
    act: nn.Module | None

    def __init__(self, batchnorm: nn.BatchNorm2d, activation: Activation = "none") -> None:
        super().__init__()
        if not self.fits(batchnorm):
            raise TypeError(f"batchnorm must be a BatchNorm2d with stored statistics, got {batchnorm!r}")
        # Past nn.Module's registration, which would list every weight twice.
        object.__setattr__(self, "batchnorm", batchnorm)
        with_activation = _with_activation()
        # In eval mode its dropout does nothing.
        act = batchnorm.act if with_activation is not None and isinstance(batchnorm, with_activation) else None
        inside = "none" if act is None else activation_of(act)
        if activation != "none" and inside != "none":
            raise ValueError(f"an activation {activation!r} follows one inside of {batchnorm!r}")
        self.activation: Activation = activation if inside in (None, "none") else inside
        object.__setattr__(self, "act", act if inside is None else None)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this one can stand for ``module``: not for a subclass with a forward of its own."""
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.running_var is None:
            return False
        with_activation = _with_activation()
        forwards = [nn.BatchNorm2d.forward, *([with_activation.forward] if with_activation is not None else [])]
        return type(module).forward in forwards

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, LayerStatistics]:
        """x (N, C, H, W) to y of its shape and the statistics of x; a residual is added before the activation."""
        bn = self.batchnorm
        assert bn.running_mean is not None
        assert bn.running_var is not None
        # Other shapes and dtypes are broadcast and promoted, as the network's own addition does it.
        alike = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        y, mean, var = ops.batchnorm_statistics(
            x,
            bn.running_mean,
            bn.running_var,
            bn.weight,
            bn.bias,
            bn.eps,
            activation=self.activation if alike else "none",
            residual=residual if alike else None,
        )
        if residual is not None and not alike:
            y = y + residual
            if self.activation != "none":
                y = F.relu(y) if self.activation == "relu" else F.relu6(y)
        if self.act is not None:
            y = self.act(y)
        return y, LayerStatistics(mean, var, bn.running_mean.to(mean.dtype), bn.running_var.to(mean.dtype))
