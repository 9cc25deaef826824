"""The gate of the generator's spatial attention modules: the public function."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.reference import spatial_attention as reference

__all__ = ["spatial_attention"]

register("spatial_attention", "reference", reference.spatial_attention)


def spatial_attention(
    features: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 0.05,
    form: Literal["spatial", "spatial_mean1", "channel"] = "spatial",
    backend: str | None = None,
) -> Tensor:
    """Expand narrow maps to a logit per feature and gate by their softmax: ``F + scale k softmax(l) F`` (paper, Eq. 6).

    The logits are ``l = weight hidden + bias`` at each position::

        "spatial"        softmax over the H W positions of each channel, k = 1 (the paper's text)
        "spatial_mean1"  the same with k = H W, so that k softmax(l) averages 1
        "channel"        softmax over the C channels at each position, k = 1

    Args:
        features: F, (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        hidden: (N, K, H, W), any floating dtype.
        weight: (C, K), any floating dtype.
        bias: (C,) or None. The two spatial forms do not depend on it: its gradient there is exactly zero.
        scale: lambda, any finite number.
        form: which softmax.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        (N, C, H, W), in the dtype and memory format of features. The matrix product runs in the autocast type, without
        autocast in that of hidden; softmax and gate in float32 (float64 for float64). Differentiable in all tensors.

    Raises:
        TypeError: a tensor argument is no floating-point tensor, or scale is no number.
        ValueError: shapes or devices that do not agree, a scale that is not finite, an unknown form or backend.
        RuntimeError: the backend asked for cannot serve these arguments.
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
    return dispatch("spatial_attention", backend, features, hidden, weight, bias, scale=scale, form=form)
