"""Collectives of a run on P processes, which computes what one process would compute for the whole batch.

Each process (rank) has B / P consecutive images of the batch of B. All other state, such as weights, optimizers and
pools, is the same on all ranks. The loss of the run is the mean of the ranks' losses, so gradients of weights are
averaged over the ranks. The loss of a rank may depend on the images of others, through :func:`gather` and synchronized
BatchNorms.

Functions without a ``group`` argument use the group of :func:`distributed`, and outside of it return their argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Group",
    "all_gather",
    "all_reduce",
    "average",
    "collect",
    "complete_",
    "current_group",
    "differentiable_all_gather",
    "distributed",
    "gather",
    "gather_columns",
    "shard",
]


class Group(NamedTuple):
    """A process group of ``torch.distributed``, as constants that torch.compile can read.

    Attributes:
        name: its ``group_name``.
        size: the number of processes.
        rank: the index of this process.
    """

    name: str
    size: int
    rank: int


_group: Group | None = None


@contextmanager
def distributed(group: Group | None) -> Iterator[None]:
    """Context manager of a run on the processes of a group; None for one process."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def current_group() -> Group | None:
    """The group of the run that this process takes part in, or None for one process."""
    return _group


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of a tensor over the ranks, without gradient."""
    return _wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.name))


def all_gather(x: Tensor, group: Group) -> Tensor:
    """The tensors (...) of all ranks as one tensor (P, ...), without gradient."""
    return _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous()[None], group.size, group.name))


def _wait(x: Tensor) -> Tensor:
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return waited


class _AllGather(torch.autograd.Function):
    """The gradient is the sum of all ranks' gradients, or P times the own one if all are known to be equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, equal: bool) -> Tensor:
        ctx.group, ctx.equal = group, equal
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        total = grad * ctx.group.size if ctx.equal else all_reduce(grad, ctx.group)
        return total[ctx.group.rank], None, None


def differentiable_all_gather(x: Tensor, group: Group) -> Tensor:
    """:func:`all_gather` with exact gradients, which need one more collective."""
    gathered: Tensor = _AllGather.apply(x, group, False)
    return gathered


def gather(x: Tensor) -> Tensor:
    """Concatenate the rows (B / P, ...) of all ranks to (B, ...), for a loss that is not a mean over images.

    All ranks must compute the same loss from the result. They then have the same gradient, and backward needs no
    collective. It multiplies the gradient of the own rows by P, because the run averages the gradients of weights.
    """
    if _group is None:
        return x
    return _AllGather.apply(x, _group, True).flatten(0, 1)


def gather_columns(*tensors: Tensor) -> tuple[Tensor, ...]:
    """:func:`gather` of several tensors (B / P, ...) of one dtype, with one collective."""
    if _group is None:
        return tensors
    rows = gather(torch.cat([tensor.flatten(1) for tensor in tensors], 1))
    parts = rows.split([tensor[0].numel() for tensor in tensors], 1)
    return tuple(part.reshape(-1, *tensor.shape[1:]) for part, tensor in zip(parts, tensors, strict=True))


def shard(x: Tensor) -> Tensor:
    """The rows of this rank, (B / P, ...), of a tensor (B, ...) that all ranks have.

    Raises:
        ValueError: the number of processes does not divide B.
    """
    if _group is None:
        return x
    if len(x) % _group.size:
        raise ValueError(f"{len(x)} images cannot be divided evenly among {_group.size} processes")
    return x.chunk(_group.size)[_group.rank]


def collect(x: Tensor) -> Tensor:
    """Concatenate the rows (B / P, ...) of all ranks to (B, ...), without gradient."""
    return x if _group is None else all_gather(x.detach(), _group).flatten(0, 1)


def complete_(x: Tensor) -> None:
    """Fill a tensor (B, ...) of which each rank has only its own rows."""
    if _group is not None:
        x.copy_(collect(shard(x)))


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their means over the ranks, with one collective."""
    if _group is None or not tensors:
        return
    tensors = [tensor.detach() for tensor in tensors]
    flat = all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), _group).div_(_group.size)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])
