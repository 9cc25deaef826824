"""One layer's term of L_BN: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.batchnorm_statistics import new_map
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import statistics_distance as reference

__all__ = ["statistics_distance"]


def _allocate_forward(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), x.new_empty((3, x.shape[1]), dtype=torch.float32)


def _launch_forward(*arguments: Any) -> None:
    from dfkd_fast.kernels import statistics_distance as kernels

    kernels.forward(*arguments)


def _allocate_backward(upstream: Tensor, x: Tensor, saved: Tensor) -> Tensor:
    return new_map(x)


def _launch_backward(*arguments: Any) -> None:
    from dfkd_fast.kernels import statistics_distance as kernels

    kernels.backward(*arguments)


_forward = operator(
    "statistics_distance(Tensor x, Tensor running_mean, Tensor running_var) -> (Tensor, Tensor)",
    _allocate_forward,
    _launch_forward,
)
_backward = operator(
    "statistics_distance_backward(Tensor upstream, Tensor x, Tensor saved) -> Tensor",
    _allocate_backward,
    _launch_backward,
)


class _StatisticsDistance(FusedFunction):
    """The op, and what backward needs of it: x, its mean and the directions of the two differences."""

    @staticmethod
    def forward(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(x, running_mean, running_var)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        x, saved = ctx.saved_tensors
        dx = _backward(upstream, x, saved) if ctx.needs_input_grad[0] else None
        return *no_second_derivative("statistics_distance", (dx,), upstream, x), None, None


def _triton(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    return _StatisticsDistance.apply(x, running_mean, running_var)[0]


def _served(x: Tensor, running_mean: Tensor, running_var: Tensor) -> str | None:
    return unserved(x)


register("statistics_distance", "reference", reference.statistics_distance)
register("statistics_distance", "triton", _triton, _served)


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
