"""BatchNorm, leaky ReLU and 1 x 1 convolution in plain PyTorch.

Formulas: :func:`dfkd_fast.ops.batch_norm_act_conv1x1`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.reference.batch_norm_act import batch_norm_act

__all__ = ["batch_norm_act_conv1x1"]


def batch_norm_act_conv1x1(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the convolution (N, K, H, W) of the activated map (N, C, H, W), and the activated map."""
    vectors = (weight, bias, running_mean, running_var)
    f = batch_norm_act(x, *vectors, activation="leaky_relu", residual=None, fork=False, **options)
    conv_bias = None if conv_bias is None else conv_bias.to(f.dtype)
    return F.conv2d(f, conv_weight.to(f.dtype)[:, :, None, None], conv_bias), f
