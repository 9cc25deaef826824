"""Distance between batch statistics and running statistics: one layer's term of L_BN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.batchnorm_statistics import new_map
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.custom_op import differentiable, fused_op, operator, unsupported_reason
from dfkd_fast.reference import statistics_distance as reference

__all__ = ["statistics_distance", "statistics_distances"]


def _allocate(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the distance and, for backward, the mean of x and the two unit difference vectors."""
    return x.new_empty((), dtype=torch.float32), x.new_empty((3, x.shape[1]), dtype=torch.float32)


_fused = fused_op(
    "statistics_distance",
    _allocate,
    reads=("x",),
    new_gradient=new_map,
    triton=("statistics_distance.forward", "statistics_distance.backward"),
)


def _allocate_layers(
    means: list[Tensor], variances: list[Tensor], running_means: list[Tensor], running_vars: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Allocate one distance per layer and the gradients of their sum with respect to all means and variances."""
    size = (2 * sum(len(mean) for mean in means),)
    return tuple(means[0].new_empty(shape, dtype=torch.float32) for shape in ((len(means),), size))  # type: ignore[return-value]


_layers = operator("statistics_distances", _allocate_layers, "statistics_distance.forward_layers")


def _sum_layers(*tensors: Any) -> tuple[Tensor, Tensor]:
    # Without gradients, Dynamo prepends a context, because the number of arguments varies.
    tensors = tensors[len(tensors) % 4 :]
    distances, directions = _layers(*(list(tensors[i::4]) for i in range(4)))
    return distances.sum(), directions


def _save(inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> tuple[Sequence[Tensor], tuple[Any, ...]]:
    return results[1:], tuple(None if i % 4 > 1 else (len(x), x.dtype) for i, x in enumerate(inputs))


def _gradients(
    needs_grad: Sequence[bool], saved: Sequence[Tensor], options: tuple[Any, ...], grad_output: Tensor | None
) -> list[Tensor | None]:
    if grad_output is None:
        return [None] * len(options)
    # One product for all layers: their gradients are parts of it.
    parts = iter((saved[0] * grad_output).split([option[0] for option in options if option is not None]))
    gradients = [None if option is None else next(parts).to(option[1]) for option in options]
    return [gradient if need else None for gradient, need in zip(gradients, needs_grad, strict=True)]


_fused_layers = differentiable("statistics_distances", _sum_layers, _save, _gradients)

register("statistics_distance", "reference", reference.statistics_distance)
register("statistics_distance", "triton", _fused["triton"], lambda x, *stored: unsupported_reason(x))
register("statistics_distances", "reference", reference.statistics_distances)
register(
    "statistics_distances",
    "triton",
    lambda *tensors: _fused_layers(*tensors)[0],
    lambda *tensors: unsupported_reason(*(x for i, x in enumerate(tensors) if i % 4 < 2)),
)


def statistics_distance(x: Tensor, running_mean: Tensor, running_var: Tensor, *, backend: str | None = None) -> Tensor:
    """Compute one layer's term of L_BN (paper, Eq. 3; Yin et al., CVPR 2020, Eq. 4).

    With the mean and biased variance of :func:`~dfkd_fast.ops.channel_statistics`::

        ||mean(x) - running_mean|| + ||var(x) - running_var||

    The gradient of a norm at zero is zero.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; N may be 0.
        running_mean: (C,), any floating dtype; a constant without gradient.
        running_var: (C,), any floating dtype; a constant without gradient.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar, float32 (float64 if x is), NaN if N = 0. Differentiable with respect to x.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor.
        ValueError: shapes or devices do not match, or the backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        require_tensor(name, vector, ("C",), ("x", x), C=x.shape[1])
    return dispatch("statistics_distance", backend, x, running_mean, running_var)


def statistics_distances(
    layers: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], *, backend: str | None = None
) -> Tensor:
    """Compute L_BN (paper, Eq. 3) from the batch statistics of all layers.

    ::

        sum over layers of ||mean - running_mean|| + ||var - running_var||

    The gradient of a norm at zero is zero.

    Args:
        layers: at least one; mean, var, running_mean and running_var of each layer, (C,), any floating dtype. The
            running statistics are constants without gradient.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar, float32 (float64 if a mean is). Differentiable with respect to each mean and var.

    Raises:
        TypeError: a statistic is not a floating-point tensor.
        ValueError: there is no layer, shapes or devices do not match, or the backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    if not layers:
        raise ValueError("layers must contain at least one layer")
    first = layers[0][0]
    for mean, *others in layers:
        require_tensor("mean", mean, ("C",), ("the first mean", first))
        for name, vector in zip(("var", "running_mean", "running_var"), others, strict=True):
            require_tensor(name, vector, ("C",), ("mean", mean), C=len(mean))
    return dispatch("statistics_distances", backend, *(vector for layer in layers for vector in layer))
