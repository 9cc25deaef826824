"""A frozen BatchNorm that also says what statistics its input had: the public functions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import batchnorm_statistics as reference

__all__ = ["batchnorm_statistics", "channel_statistics", "new_map"]


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """The channels-last format where the strides of x are in its order, as PyTorch's own norms choose it."""
    if x.ndim not in (4, 5) or x.shape[1] == 1 or all(size == 1 for size in x.shape[2:]):
        return None
    least = 0
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if x.stride(dim) < least:
            return None
        least = x.stride(dim) * max(x.shape[dim], 1)
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def new_map(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of the shape of x: channels-last where x is, else contiguous."""
    return torch.empty_like(x, dtype=dtype, memory_format=_channels_last(x) or torch.contiguous_format)


def _new_vector(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


def _allocate_forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, octets = x.shape[0], (x.shape[1] + 7) // 8
    positions = 1
    for size in x.shape[2:]:
        positions = positions * size
    if not keep_mask:
        mask = x.new_empty(0, dtype=torch.uint8)
    elif x.ndim == 2 or _channels_last(x) is not None:
        mask = x.new_empty((count, positions, octets), dtype=torch.uint8)
    else:
        mask = x.new_empty((count, octets, positions), dtype=torch.uint8)
    return new_map(x), _new_vector(x), _new_vector(x), mask


def _octets_second(x: Tensor, mask: Tensor) -> Tensor:
    """The mask as (N, octets of channels, positions), however it lies."""
    return mask.transpose(1, 2) if x.ndim == 2 or _channels_last(x) is not None else mask


def _launch_forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    keep_mask: bool,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    mask: Tensor,
) -> None:
    from dfkd_fast.kernels import batchnorm_statistics as kernels

    kept = _octets_second(x, mask) if keep_mask else None
    kernels.forward(x, running_mean, running_var, weight, bias, eps, activation, residual, y, mean, var, kept)


def _allocate_backward(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    mask: Tensor | None,
    eps: float,
    activation: str,
    residual_dtype: torch.dtype | None,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        new_map(x) if want_x else x.new_empty(0),
        weight.new_empty(weight.shape) if want_weight and weight is not None else x.new_empty(0),
        bias.new_empty(bias.shape) if want_bias and bias is not None else x.new_empty(0),
        new_map(x, residual_dtype) if residual_dtype is not None else x.new_empty(0),
    )


def _launch_backward(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    mask: Tensor | None,
    eps: float,
    activation: str,
    residual_dtype: torch.dtype | None,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dresidual: Tensor,
) -> None:
    from dfkd_fast.kernels import batchnorm_statistics_bwd as kernels

    kernels.backward(
        dy,
        dmean,
        dvar,
        x,
        running_mean,
        running_var,
        weight,
        bias,
        mean,
        None if mask is None else _octets_second(x, mask),
        eps,
        activation,
        dx if want_x else None,
        dweight if want_weight else None,
        dbias if want_bias else None,
        dresidual if residual_dtype is not None else None,
    )


def _allocate_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return _new_vector(x), _new_vector(x)


def _launch_statistics(x: Tensor, mean: Tensor, var: Tensor) -> None:
    from dfkd_fast.kernels import batchnorm_statistics as kernels

    kernels.statistics(x, mean, var)


def _allocate_statistics_backward(dmean: Tensor | None, dvar: Tensor | None, x: Tensor, mean: Tensor) -> Tensor:
    return new_map(x)


def _launch_statistics_backward(dmean: Tensor | None, dvar: Tensor | None, x: Tensor, mean: Tensor, dx: Tensor) -> None:
    from dfkd_fast.kernels import batchnorm_statistics_bwd as kernels

    kernels.backward(None, dmean, dvar, x, None, None, None, None, mean, None, 1.0, "none", dx, None, None, None)


_forward = operator(
    "batchnorm_statistics(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps, "
    "str activation, Tensor? residual, bool keep_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_forward,
    _launch_forward,
)
_backward = operator(
    "batchnorm_statistics_backward(Tensor? dy, Tensor? dmean, Tensor? dvar, Tensor x, Tensor running_mean, "
    "Tensor running_var, Tensor? weight, Tensor? bias, Tensor mean, Tensor? mask, float eps, str activation, "
    "ScalarType? residual_dtype, bool want_x, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)
_statistics = operator(
    "channel_statistics(Tensor x) -> (Tensor, Tensor)",
    _allocate_statistics,
    _launch_statistics,
)
_statistics_backward = operator(
    "channel_statistics_backward(Tensor? dmean, Tensor? dvar, Tensor x, Tensor mean) -> Tensor",
    _allocate_statistics_backward,
    _launch_statistics_backward,
)


def _missing_stay_missing(ctx: Any) -> None:
    """Gradients that did not come are None, and what would be computed of them is not.

    Not while compiling: Dynamo has zeros in their place always.
    """
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


class _BatchNormStatistics(FusedFunction):
    """The op, and what backward needs of it: x, the vectors and, with a residual, where the activation passes."""

    @staticmethod
    def forward(
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str,
        residual: Tensor | None,
        keep_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(x, running_mean, running_var, weight, bias, eps, activation, residual, keep_mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, running_mean, running_var, weight, bias, ctx.eps, ctx.activation, residual, keep_mask = inputs
        _, mean, _, mask = output
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(mask)
        _missing_stay_missing(ctx)
        ctx.save_for_backward(x, running_mean, running_var, weight, bias, mean, mask if keep_mask else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, _: Tensor | None) -> Any:
        x, running_mean, running_var, weight, bias, mean, mask = ctx.saved_tensors
        want_x, _, _, want_weight, want_bias, _, _, want_residual, _ = ctx.needs_input_grad
        want_weight, want_bias = want_weight and dy is not None, want_bias and dy is not None
        dresidual = None
        if want_residual and dy is not None and ctx.activation == "none":
            dresidual, want_residual = dy.to(ctx.residual_dtype), False
        want_residual = want_residual and dy is not None
        dx = dweight = dbias = None
        if want_x or want_weight or want_bias or want_residual:
            results = _backward(
                dy,
                dmean,
                dvar,
                x,
                running_mean,
                running_var,
                weight,
                bias,
                mean,
                mask,
                ctx.eps,
                ctx.activation,
                ctx.residual_dtype if want_residual else None,
                want_x,
                want_weight,
                want_bias,
            )
            dx = results[0] if want_x else None
            dweight = results[1] if want_weight else None
            dbias = results[2] if want_bias else None
            dresidual = results[3] if want_residual else dresidual
        origins = (dy, dmean, dvar, x, weight, bias)
        dx, dweight, dbias, dresidual = no_second_derivative(
            "batchnorm_statistics", (dx, dweight, dbias, dresidual), *origins
        )
        return dx, None, None, dweight, dbias, None, None, dresidual, None


class _ChannelStatistics(FusedFunction):
    """The op, and what backward needs of it: x and its mean."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return _statistics(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        _missing_stay_missing(ctx)
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dvar: Tensor | None) -> Any:
        x, mean = ctx.saved_tensors
        dx = _statistics_backward(dmean, dvar, x, mean)
        return no_second_derivative("channel_statistics", (dx,), dmean, dvar, x)[0]


def _triton(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Without a residual the mask costs no more to recompute than to keep: backward reads x anyway.
    keep_mask = residual is not None and activation != "none" and torch.is_grad_enabled()
    y, mean, var, _ = _BatchNormStatistics.apply(
        x, running_mean, running_var, weight, bias, float(eps), activation, residual, keep_mask
    )
    return y, mean, var


def _served(x: Tensor, *vectors: Any, activation: str, residual: Tensor | None) -> str | None:
    return unserved(x, residual)


register("batchnorm_statistics", "reference", reference.batchnorm_statistics)
register("batchnorm_statistics", "triton", _triton, _served)
register("channel_statistics", "reference", reference.channel_statistics)
register("channel_statistics", "triton", _ChannelStatistics.apply, unserved)


def batchnorm_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    activation: Literal["none", "relu", "relu6"] = "none",
    residual: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm with stored statistics, and the statistics of the batch beside it (paper, Eq. 3).

    ::

        y = activation((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)
        mean_c, var_c = mean and biased variance of x[:, c] over all else

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; N may be 0.
        running_mean: (C,), any floating dtype; a constant, which gets no gradient.
        running_var: (C,), likewise.
        weight: (C,), or None for one.
        bias: (C,), or None for zero.
        eps: above 0.
        activation: what follows the norm, after the residual is added.
        residual: shape of x, or None for zero.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        y, in shape, dtype and memory format of x; mean and var, (C,), in float32 (float64 for float64), NaN for N = 0.
        Computed in float32, rounded once. All three are differentiable: y in x, weight, bias and residual, mean and var
        in x.

    Raises:
        TypeError: a tensor argument is no floating-point tensor, or eps is no number.
        ValueError: shapes or devices that do not agree, eps <= 0, an unknown activation or backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    channels = x.shape[1]
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        require_tensor(name, vector, ("C",), ("x", x), C=channels)
    for name, optional in (("weight", weight), ("bias", bias)):
        if optional is not None:
            require_tensor(name, optional, ("C",), ("x", x), C=channels)
    require_number("eps", eps, above=0)
    require_choice("activation", activation, ("none", "relu", "relu6"))
    if residual is not None:
        require_tensor("residual", residual, ("N", "C", "..."), ("x", x))
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    return dispatch(
        "batchnorm_statistics",
        backend,
        x,
        running_mean,
        running_var,
        weight,
        bias,
        eps,
        activation=activation,
        residual=residual,
    )


def channel_statistics(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, as :func:`batchnorm_statistics` gives them.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; N may be 0.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        mean and var, (C,), in float32 (float64 for float64), NaN for N = 0. Differentiable.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has fewer than two dimensions or no channel; an unknown backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    return dispatch("channel_statistics", backend, x)
