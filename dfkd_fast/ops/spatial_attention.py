"""Gating in the generator's spatial attention modules."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.custom_op import empty_map_like, fused_op, matmul_dtype, unsupported_reason
from dfkd_fast.ops.extension import aligned, as_rows, filled_as_rows, or_empty, unsupported_by_extension
from dfkd_fast.reference import spatial_attention as reference

__all__ = ["Norm", "spatial_attention"]

_FORMS = ("spatial", "spatial_mean1", "channel")  # the index of each is its code in csrc/launchers.h


class Norm(NamedTuple):
    """The BatchNorm and the leaky ReLU of features that :func:`dfkd_fast.ops.batch_norm_act_conv1x1` did not write."""

    mean: Tensor  # (C,), float32
    rstd: Tensor  # (C,), float32
    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    negative_slope: float


def _allocate(
    features: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    form: str,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Allocate the gated features and, for backward, each channel's maximum logit and sum of exponentials."""
    samples, channels = features.shape[:2]
    saved = features.new_empty(0 if form == "channel" else (2, samples, channels), dtype=torch.float32)
    return empty_map_like(features, preserve=True), saved


def _cuda_forward(*arguments: Any) -> None:
    features, hidden, weight, _, scale, form, *_, result, saved = arguments
    with filled_as_rows(result) as rows:
        torch.ops.dfkd_fast_cuda.spatial_attention(
            as_rows(features), as_rows(hidden), aligned(weight), scale, _FORMS.index(form), rows, saved
        )


def _cuda_backward(*arguments: Any) -> None:
    grad_output, features, hidden, weight, _, scale, form, *_, saved = arguments[:-4]
    inputs = (as_rows(grad_output), as_rows(features), as_rows(hidden), aligned(weight))
    d_features, d_hidden, *parameters = or_empty(features, *arguments[-4:])
    with filled_as_rows(d_features) as to_features, filled_as_rows(d_hidden) as to_hidden:
        torch.ops.dfkd_fast_cuda.spatial_attention_backward(
            *inputs, saved, scale, _FORMS.index(form), to_features, to_hidden, *parameters
        )


_fused = fused_op(
    "spatial_attention",
    _allocate,
    constants=("mean", "rstd", "norm_weight", "norm_bias"),
    new_gradient=empty_map_like,
    triton=("spatial_attention.forward", "spatial_attention.backward"),
    cuda=(_cuda_forward, _cuda_backward),
)


def _run(
    backend: str,
    features: Tensor,
    hidden: Tensor,
    *parameters: Tensor | None,
    scale: float,
    form: str,
    norm: Norm | None = None,
) -> Tensor:
    tensors = (features, hidden.to(matmul_dtype(hidden)), *parameters)
    return _fused[backend](*tensors, scale, form, *(norm or (None, None, None, None, 0.0)))


def _unsupported_by_cuda(
    features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, form: str, **options: Any
) -> str | None:
    samples, channels, height, width = features.shape
    sizes = {"samples": samples, "channels": channels, "hidden": weight.shape[1], "positions": height * width}
    parameters = {"weight_dtype": weight.dtype, "bias_dtype": weight.dtype if bias is None else bias.dtype}
    dtype = matmul_dtype(hidden)
    return unsupported_by_extension("spatial_attention", features, dtype, form=form, **sizes, **parameters)


register("spatial_attention", "reference", reference.spatial_attention)
register("spatial_attention", "triton", partial(_run, "triton"), lambda *tensors, **_: unsupported_reason(*tensors))
register("spatial_attention", "cuda", partial(_run, "cuda"), _unsupported_by_cuda)


def spatial_attention(
    features: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 0.05,
    form: Literal["spatial", "spatial_mean1", "channel"] = "spatial",
    norm: Norm | None = None,
    backend: str | None = None,
) -> Tensor:
    """Gate features F by the softmax of logits l: ``F + scale k softmax(l) F`` (paper, Eq. 6).

    The logits are ``l = weight hidden + bias`` at each position. The form selects the softmax and the factor k::

        "spatial"        softmax over the H W positions of each channel, k = 1 (the paper's text)
        "spatial_mean1"  the same with k = H W, so that k softmax(l) averages 1
        "channel"        softmax over the C channels at each position, k = 1

    Args:
        features: F, (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        hidden: (N, K, H, W), any floating dtype.
        weight: (C, K), any floating dtype.
        bias: (C,), any floating dtype, or None. The two spatial forms do not depend on it and give it zero gradient.
        scale: lambda, any finite number.
        form: "spatial", "spatial_mean1" or "channel".
        norm: None, or the norm that :func:`dfkd_fast.ops.batch_norm_act_conv1x1` returned with the features. F is then
            a leaky ReLU of the normalized features, and their gradient is that of F. Only the Triton kernels do this.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        (N, C, H, W), with the dtype and memory format of features. The matrix product runs in the autocast dtype or,
        without autocast, in that of hidden; softmax and gate in float32 (float64 if features are). Differentiable with
        respect to all tensors.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor, or scale is not a number.
        ValueError: shapes or devices do not match, scale is not finite, form or backend is unknown, or there is a norm
            and another backend than ``"triton"``.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("features", features, ("N", "C", "H", "W"))
    batch, channels, height, width = features.shape
    like = ("features", features)
    require_tensor("hidden", hidden, ("N", "K", "H", "W"), like, N=batch, H=height, W=width)
    require_tensor("weight", weight, ("C", "K"), like, C=channels, K=hidden.shape[1])
    if bias is not None:
        require_tensor("bias", bias, ("C",), like, C=channels)
    require_number("scale", scale)
    require_choice("form", form, ("spatial", "spatial_mean1", "channel"))
    options: dict[str, Any] = {"scale": scale, "form": form}
    if norm is not None:
        if backend not in (None, "triton"):
            raise ValueError(f"backend must be 'triton' or None with a norm, got {backend!r}")
        backend, options["norm"] = "triton", norm  # the backend that returned the norm
    return dispatch("spatial_attention", backend, features, hidden, weight, bias, **options)
