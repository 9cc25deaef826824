"""A rewritten BatchNorm: it uses its stored statistics and returns those of its input."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.models.outputs import LayerStatistics

__all__ = ["BatchNormWithStatistics"]


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
    """

    batchnorm: nn.BatchNorm2d
    act: nn.Module | None

    def __init__(self, batchnorm: nn.BatchNorm2d) -> None:
        super().__init__()
        if not self.fits(batchnorm):
            raise TypeError(f"batchnorm must be a BatchNorm2d with stored statistics, got {batchnorm!r}")
        # Past nn.Module's registration, which would list every weight twice.
        object.__setattr__(self, "batchnorm", batchnorm)
        with_activation = _with_activation()
        # In eval mode its dropout does nothing.
        act = batchnorm.act if with_activation is not None and isinstance(batchnorm, with_activation) else None
        object.__setattr__(self, "act", act)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this one can stand for ``module``: not for a subclass with a forward of its own."""
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.running_var is None:
            return False
        with_activation = _with_activation()
        forwards = [nn.BatchNorm2d.forward, *([with_activation.forward] if with_activation is not None else [])]
        return type(module).forward in forwards

    def forward(self, x: Tensor) -> tuple[Tensor, LayerStatistics]:
        """x (N, C, H, W) to y of its shape and the statistics of x."""
        bn = self.batchnorm
        assert bn.running_mean is not None
        assert bn.running_var is not None
        y, mean, var = ops.batchnorm_statistics(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
        if self.act is not None:
            y = self.act(y)
        return y, LayerStatistics(mean, var, bn.running_mean.to(mean.dtype), bn.running_var.to(mean.dtype))
