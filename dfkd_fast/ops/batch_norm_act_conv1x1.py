"""BatchNorm in training mode with the leaky ReLU and the narrow 1 x 1 convolution that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.batch_norm_act import batch_norm_act, require_batch_norm
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.custom_op import differentiable, matmul_dtype, operator, unsupported_reason
from dfkd_fast.ops.spatial_attention import Norm
from dfkd_fast.reference import batch_norm_act_conv1x1 as reference

__all__ = ["batch_norm_act_conv1x1"]

_MAX_CHANNELS, _MAX_HIDDEN = 256, 32  # of the kernels' tiles


def _allocate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the convolution, the mean, and the reciprocal of the standard deviation. x is channels-last."""
    shape = (x.shape[0], conv_weight.shape[0], *x.shape[2:])
    reduced = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return reduced, mean, rstd


def _allocate_backward(
    grad_reduced: Tensor | None,
    grad_features: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    negative_slope: float,
    conv_bias_dtype: torch.dtype | None,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Allocate the gradients of x, weight, bias, conv_weight and conv_bias, which is not saved."""
    like = (weight, bias, conv_weight, conv_weight.new_empty(conv_weight.shape[0], dtype=conv_bias_dtype))
    found = [torch.empty_like(x, memory_format=torch.channels_last)] if needs_grad[0] else []
    needed = [t for t, need in zip(like, needs_grad[1:], strict=True) if need and t is not None]
    return found + [torch.empty_like(t, memory_format=torch.contiguous_format) for t in needed]


_forward = operator(
    "batch_norm_act_conv1x1",
    _allocate,
    "batch_norm_act_conv1x1.forward",
    mutates=("running_mean", "running_var"),
)
_backward = operator("batch_norm_act_conv1x1_backward", _allocate_backward, "batch_norm_act_conv1x1.backward")


def _forward_with_features(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return x as the features, so that backward receives the gradient of the activated map, which is not written."""
    reduced, mean, rstd = _forward(x, *arguments)
    return reduced, x.view_as(x), mean, rstd


def _save(inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Sequence[Tensor | None], tuple[Any, ...]]:
    x, weight, bias, _, _, conv_weight, conv_bias, _, _, negative_slope, _ = inputs
    *_, mean, rstd = results
    saved = (x, weight, bias, conv_weight, mean, rstd)
    return saved, (negative_slope, None if conv_bias is None else conv_bias.dtype)


def _gradients(
    needs_grad: Sequence[bool],
    saved: Sequence[Tensor | None],
    options: tuple[float, torch.dtype | None],
    *grad_outputs: Tensor | None,
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * 7  # x, weight, bias, running_mean, running_var, conv_weight, conv_bias
    differentiated = (0, 1, 2, 5, 6)
    needs = [bool(needs_grad[i]) for i in differentiated]
    if any(needs) and any(g is not None for g in grad_outputs):
        found = _backward(*grad_outputs, *saved, *options, needs)
        for i, gradient in zip(differentiated, found, strict=True):
            gradients[i] = gradient
    return gradients


_fused = differentiable(
    "batch_norm_act_conv1x1", _forward_with_features, _save, _gradients, outputs=2, signature=_allocate
)


def _fits(x: Tensor, conv_weight: Tensor) -> bool:
    """Return whether a tile of the kernels holds all channels of a position, and the channels are contiguous."""
    _, c, h, w = x.shape
    hidden = conv_weight.shape[0]
    return hidden <= _MAX_HIDDEN and 1 < c <= _MAX_CHANNELS and h * w > 1 and x.stride() == (h * w * c, 1, w * c, c)


def _triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    momentum: float,
    eps: float,
    negative_slope: float,
    training: bool,
) -> tuple[Tensor, Tensor, Norm | None]:
    vectors = (weight, bias, running_mean, running_var)
    options: dict[str, Any] = {"momentum": momentum, "eps": eps, "negative_slope": negative_slope}
    if not _fits(x, conv_weight):
        f = batch_norm_act(x, *vectors, activation="leaky_relu", backend="triton", **options)
        conv_bias = None if conv_bias is None else conv_bias.to(f.dtype)
        return F.conv2d(f, conv_weight.to(f.dtype)[:, :, None, None], conv_bias), f, None
    numbers = (float(momentum), float(eps), float(negative_slope), matmul_dtype(x))
    reduced, features, mean, rstd = _fused(x, *vectors, conv_weight, conv_bias, *numbers)
    return reduced, features, Norm(mean, rstd, weight, bias, float(negative_slope))


def _reference(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, None]:
    return *reference.batch_norm_act_conv1x1(*arguments, **options), None


def _unsupported_reason(*tensors: Tensor | None, training: bool, **_: Any) -> str | None:
    if not training:
        return "its kernels normalize by batch statistics, and training is False"
    return unsupported_reason(tensors[0])


register("batch_norm_act_conv1x1", "reference", _reference)
register("batch_norm_act_conv1x1", "triton", _triton, _unsupported_reason)


def batch_norm_act_conv1x1(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    training: bool = True,
    update_running_stats: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Norm | None]:
    """Apply ``F.batch_norm``, a leaky ReLU and a 1 x 1 convolution, for :func:`dfkd_fast.ops.spatial_attention`.

    ::

        f = leaky_relu((x - mean) / sqrt(var + eps) * weight + bias)      reduced = conv_weight f + conv_bias

    The gate of a spatial attention module reads f again. If the Triton kernels support the call, they do not write f:
    ``features`` is then x, and ``norm`` holds the normalization that the gate repeats. Otherwise ``features`` is f, and
    ``norm`` is None. In both cases, use ``features`` and ``norm`` only as arguments of one call of
    :func:`dfkd_fast.ops.spatial_attention`: the gradient of ``features`` is that of f.

    Statistics are those of :func:`dfkd_fast.ops.batch_norm_act`.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0: then the running statistics do not change.
        weight: (C,), any floating dtype; None means 1.
        bias: (C,), any floating dtype; None means 0.
        running_mean: (C,), any floating dtype; None if it is not tracked.
        running_var: (C,), any floating dtype; None if it is not tracked.
        conv_weight: (K, C), any floating dtype.
        conv_bias: (K,), any floating dtype; None means 0.
        momentum: weight of the new statistics.
        eps: greater than 0.
        negative_slope: slope of the leaky ReLU for negative values.
        training: normalize by batch statistics. If False, normalize by the running statistics; only ``"reference"``
            supports this.
        update_running_stats: whether training updates the running statistics.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        - reduced: (N, K, H, W) in the memory format of x. The matrix product runs and returns in the autocast dtype or,
          without autocast, in that of x.
        - features: (N, C, H, W), f or x.
        - norm: None if features is f.

        They are differentiable with respect to x, weight, bias, conv_weight and conv_bias. The Triton kernels leave f
        out if x is channels-last, C is at most 256 and K at most 32.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor, or momentum, eps or negative_slope is not a number.
        ValueError: shapes or devices do not match, eps is not positive, the backend is unknown, training has only one
            value per channel, or running statistics are missing without training.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("x", x, ("N", "C", "H", "W"))
    require_batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, negative_slope, training)
    require_tensor("conv_weight", conv_weight, ("K", "C"), ("x", x), C=x.shape[1])
    if conv_bias is not None:
        require_tensor("conv_bias", conv_bias, ("K",), ("x", x), K=conv_weight.shape[0])
    running = (running_mean, running_var) if update_running_stats or not training else (None, None)
    options = {"momentum": momentum, "eps": eps, "negative_slope": negative_slope, "training": bool(training)}
    tensors = (x, weight, bias, *running, conv_weight, conv_bias)
    return dispatch("batch_norm_act_conv1x1", backend, *tensors, **options)
