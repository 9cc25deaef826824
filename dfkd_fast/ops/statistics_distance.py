"""One layer's term of L_BN."""

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
    """The distance; for backward the mean of x and the directions of the two differences."""
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
    """How far a batch's statistics are from stored ones: one layer's term of L_BN (paper, Eq. 3; Yin et al., Eq. 4).

    With the statistics of :func:`~dfkd_fast.ops.channel_statistics`, neither norm squared::

        ||mean(x) - running_mean|| + ||var(x) - running_var||

    The gradient of a norm at zero is taken as zero.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; N may be 0.
        running_mean: (C,), any floating dtype; a constant, which gets no gradient.
        running_var: (C,), likewise; compared with the biased variance.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar, in float32 (float64 for float64), NaN for N = 0. Differentiable in x.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices that do not agree, an unknown backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        require_tensor(name, vector, ("C",), ("x", x), C=x.shape[1])
    return dispatch("statistics_distance", backend, x, running_mean, running_var)
