"""Distance between batch statistics and running statistics: one layer's term of L_BN."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.batchnorm_statistics import new_map
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.custom_op import fused_op, unsupported_reason
from dfkd_fast.reference import statistics_distance as reference

__all__ = ["statistics_distance"]


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

register("statistics_distance", "reference", reference.statistics_distance)
register("statistics_distance", "triton", _fused["triton"], lambda x, *stored: unsupported_reason(x))


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
