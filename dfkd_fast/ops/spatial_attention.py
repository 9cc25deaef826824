"""The gate of the generator's spatial attention modules: the public function."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.extension import aligned, as_rows, filled_as_rows, unserved_by_extension
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import spatial_attention as reference

__all__ = ["spatial_attention"]


def _new_map(x: Tensor) -> Tensor:
    """Channels-last like x, unless what is no channels-last map to PyTorch: one channel, one position."""
    if x.stride(1) == 1 and x.shape[1] != 1 and x.shape[2] * x.shape[3] != 1:
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _allocate_forward(
    features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, form: str
) -> tuple[Tensor, Tensor]:
    """The result, and of each channel the largest logit and the sum of exponentials below it."""
    samples, channels, height, width = features.shape
    saved = features.new_empty(0 if form == "channel" else (2, samples, channels), dtype=torch.float32)
    channels_last = features.stride(1) == 1 and channels != 1 and height * width != 1
    if channels_last or features.is_contiguous():
        return _new_map(features), saved
    # Other strides without gaps stay, as they do in the reference.
    return torch.empty_like(features), saved


def _launch_forward(*arguments: Any) -> None:
    from dfkd_fast.kernels import spatial_attention as kernels

    kernels.forward(*arguments)


def _allocate_backward(
    upstream: Tensor,
    features: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    scale: float,
    form: str,
    want_features: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _new_map(features) if want_features else features.new_empty(0),
        _new_map(hidden) if want_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if want_weight else 0),
        bias.new_empty(bias.shape) if bias is not None and want_bias else weight.new_empty(0),
    )


def _launch_backward(
    upstream: Tensor,
    features: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    scale: float,
    form: str,
    want_features: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    *results: Tensor,
) -> None:
    from dfkd_fast.kernels import spatial_attention as kernels

    wanted = (want_features, want_hidden, want_weight, want_bias and bias is not None)
    filled = [result if want else None for result, want in zip(results, wanted, strict=True)]
    kernels.backward(upstream, saved, filled, features, hidden, weight, bias, scale, form)


_forward = operator(
    "spatial_attention(Tensor features, Tensor hidden, Tensor weight, Tensor? bias, float scale, str form) "
    "-> (Tensor, Tensor)",
    _allocate_forward,
    _launch_forward,
)
_backward = operator(
    "spatial_attention_backward(Tensor upstream, Tensor features, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor saved, float scale, str form, bool want_features, bool want_hidden, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


_FORMS = ("spatial", "spatial_mean1", "channel")  # in the order of csrc/launchers.h


def _launch_cuda_forward(
    features: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    form: str,
    result: Tensor,
    saved: Tensor,
) -> None:
    with filled_as_rows(result) as rows:
        torch.ops.dfkd_fast_cuda.spatial_attention(
            as_rows(features), as_rows(hidden), aligned(weight), scale, _FORMS.index(form), rows, saved
        )


def _launch_cuda_backward(
    upstream: Tensor,
    features: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    scale: float,
    form: str,
    want_features: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    d_features: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    inputs = (as_rows(upstream), as_rows(features), as_rows(hidden), aligned(weight))
    with filled_as_rows(d_features) as to_features, filled_as_rows(d_hidden) as to_hidden:
        torch.ops.dfkd_fast_cuda.spatial_attention_backward(
            *inputs, saved, scale, _FORMS.index(form), to_features, to_hidden, d_weight, d_bias
        )


_OPERATORS = {
    "triton": (_forward, _backward),
    "cuda": (
        operator(
            "spatial_attention_cuda(Tensor features, Tensor hidden, Tensor weight, Tensor? bias, float scale, "
            "str form) -> (Tensor, Tensor)",
            _allocate_forward,
            _launch_cuda_forward,
        ),
        operator(
            "spatial_attention_cuda_backward(Tensor upstream, Tensor features, Tensor hidden, Tensor weight, "
            "Tensor? bias, Tensor saved, float scale, str form, bool want_features, bool want_hidden, "
            "bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
            _allocate_backward,
            _launch_cuda_backward,
        ),
    ),
}


class _SpatialAttention(FusedFunction):
    """The gated features; backward computes logits anew, from two numbers a channel for softmaxes over positions.

    All backends save the same.
    """

    @staticmethod
    def forward(
        features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, form: str, kernels: str
    ) -> tuple[Tensor, Tensor]:
        return _OPERATORS[kernels][0](features, hidden, weight, bias, scale, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.form, ctx.kernels = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        wanted = ctx.needs_input_grad[:4]
        backward = _OPERATORS[ctx.kernels][1]
        computed = backward(upstream, *ctx.saved_tensors, ctx.scale, ctx.form, *wanted)
        gradients = [g if want else None for g, want in zip(computed, wanted, strict=True)]
        return *no_second_derivative("spatial_attention", gradients, upstream, *ctx.saved_tensors[:4]), None, None, None


def _product_type(hidden: Tensor) -> torch.dtype:
    """That of the matrix product; the weight takes it inside the kernels."""
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def _with(kernels: str) -> Any:
    def run(
        features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, form: str
    ) -> Tensor:
        hidden = hidden.to(_product_type(hidden))
        return _SpatialAttention.apply(features, hidden, weight, bias, float(scale), form, kernels)[0]

    return run


def _served(features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> str | None:
    return unserved(features, hidden, weight, bias)


def _served_by_cuda(
    features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, form: str, **options: Any
) -> str | None:
    samples, channels, height, width = features.shape
    sizes = {"samples": samples, "channels": channels, "maps": weight.shape[1], "positions": height * width}
    parameters = {"weight_dtype": weight.dtype, "bias_dtype": weight.dtype if bias is None else bias.dtype}
    dtype = _product_type(hidden)
    return unserved_by_extension("spatial_attention", features, dtype, form=form, **sizes, **parameters)


register("spatial_attention", "reference", reference.spatial_attention)
register("spatial_attention", "triton", _with("triton"), _served)
register("spatial_attention", "cuda", _with("cuda"), _served_by_cuda)


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
