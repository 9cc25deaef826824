"""Hook and image prior of DeepInversion (NVlabs/DeepInversion, ``deepinversion.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import differences, input_distance

__all__ = ["COVERAGE", "DeepInversionFeatureHook", "get_image_prior_losses"]

COVERAGE = (
    Case("DeepInversionFeatureHook", "maps (N, C, H, W)", "statistics_distance"),
    Case("get_image_prior_losses", "always", None),
)


class DeepInversionFeatureHook:
    """Compares batch statistics of a BatchNorm's input with its running statistics in each forward.

    Args:
        module: a module with ``running_mean`` and ``running_var`` (C,) and inputs (N, C, H, W).

    Attributes:
        hook: handle of the forward hook.
        r_feature: ``||running_var - var|| + ||running_mean - mean||`` of the last forward, with biased var; a scalar,
            differentiable with respect to the input (Yin et al., CVPR 2020, Eq. 4).
    """

    r_feature: Tensor

    def __init__(self, module: nn.Module) -> None:
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.r_feature = input_distance(input[0], module.running_mean, module.running_var)

    def close(self) -> None:
        """Remove the hook from the module."""
        self.hook.remove()


def get_image_prior_losses(inputs_jit: Tensor) -> tuple[Tensor, Tensor]:
    """Return two total variations: sums of mean absolute differences and of L2 norms (Yin et al., CVPR 2020).

    Args:
        inputs_jit: images (N, C, H, W), any floating dtype.

    Raises:
        IndexError: images have fewer than four dimensions.
    """
    found = differences(inputs_jit)
    return (
        torch.stack([d.abs().mean() for d in found]).sum(),
        torch.stack([torch.linalg.vector_norm(d) for d in found]).sum(),
    )
