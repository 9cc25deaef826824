"""DeepInversion's hook and image prior (NVlabs/DeepInversion, ``deepinversion.py``)."""

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
    """Compares what a BatchNorm is given with what it has stored, at each forward of it.

    Args:
        module: with ``running_mean`` and ``running_var`` (C,), given maps (N, C, H, W).

    Attributes:
        hook: the handle of the forward hook.
        r_feature: after a forward, ``||running_var - var|| + ||running_mean - mean||`` of its input, var biased; a
            scalar, differentiable in the input.
    """

    r_feature: Tensor

    def __init__(self, module: nn.Module) -> None:
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.r_feature = input_distance(input[0], module.running_mean, module.running_var)

    def close(self) -> None:
        """Take the hook off the module."""
        self.hook.remove()


def get_image_prior_losses(inputs_jit: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation of images (N, C, H, W): the mean absolute differences summed, and the norms summed."""
    found = differences(inputs_jit)
    return (
        torch.stack([d.abs().mean() for d in found]).sum(),
        torch.stack([torch.linalg.vector_norm(d) for d in found]).sum(),
    )
