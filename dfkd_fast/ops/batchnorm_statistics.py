"""A frozen BatchNorm that also says what statistics its input had: the public functions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.reference import batchnorm_statistics as reference

__all__ = ["batchnorm_statistics", "channel_statistics"]

register("batchnorm_statistics", "reference", reference.batchnorm_statistics)
register("channel_statistics", "reference", reference.channel_statistics)


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
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

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
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        mean and var, (C,), in float32 (float64 for float64), NaN for N = 0. Differentiable.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has fewer than two dimensions or no channel; an unknown backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    return dispatch("channel_statistics", backend, x)
