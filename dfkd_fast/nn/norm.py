"""BatchNorm modules with the residual and activation that follow them, as one op."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast import ops
from dfkd_fast.collectives import Group
from dfkd_fast.ops.spatial_attention import Norm

__all__ = ["batch_norm_act", "batch_norm_act_conv1x1", "count_batches", "has_hooks", "synchronize_batchnorm"]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of the module runs hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _calls_module(bn: _BatchNorm) -> bool:
    """Return whether a call of the module does more than the op can: hooks, another forward, a cumulative average."""
    cumulative = bn.momentum is None and bn.training and bn.track_running_stats
    return cumulative or type(bn).forward is not _BatchNorm.forward or has_hooks(bn)


def _counts(bn: _BatchNorm) -> bool:
    """Return whether :func:`batch_norm_act` updates the running statistics and the batch count."""
    return bn.training and bn.track_running_stats and not _calls_module(bn)


def count_batches(norms: Iterable[_BatchNorm]) -> None:
    """Increment ``num_batches_tracked`` of several BatchNorms with one kernel, for calls with ``count=False``."""
    counters = [bn.num_batches_tracked for bn in norms if _counts(bn) and bn.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)


def _arguments(bn: _BatchNorm) -> dict[str, Any]:
    """Return the arguments of the ops that are the module's parameters, buffers and settings."""
    return {
        "weight": bn.weight,
        "bias": bn.bias,
        "running_mean": bn.running_mean,
        "running_var": bn.running_var,
        "momentum": 0.0 if bn.momentum is None else bn.momentum,
        "eps": bn.eps,
        "training": bn.training or (bn.running_mean is None and bn.running_var is None),
        "update_running_stats": bn.training and bn.track_running_stats,
        **({"group": bn.sync_group} if bn.training and hasattr(bn, "sync_group") else {}),
    }


def _forward(bn: _BatchNorm, x: Tensor) -> Tensor:
    """The forward of a synchronized BatchNorm, and of timm's BatchNorm with dropout and activation."""
    bn._check_input_dim(x)
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    y: Tensor = ops.batch_norm_act(x, **_arguments(bn))
    timm: Any = bn
    return timm.act(timm.drop(y)) if hasattr(bn, "act") else y


@contextmanager
def synchronize_batchnorm(
    networks: Mapping[str, nn.Module], group: Group | None, *, leave: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Context manager in which BatchNorms in training mode use the batch statistics of all processes of a group.

    Unlike ``nn.SyncBatchNorm``, it supports CPUs, and modules keep their classes.

    Args:
        networks: networks by name.
        group: the processes; with None, nothing changes.
        leave: modules that do not change.

    Raises:
        ValueError: a BatchNorm cannot be synchronized, because its class overrides ``forward`` or it has no momentum.
            The message names it.
    """
    norms: dict[_BatchNorm, str] = {}
    for name, network in networks.items() if group is not None else ():
        found = ((path, bn) for path, bn in network.named_modules() if isinstance(bn, _BatchNorm) and bn not in leave)
        norms |= {bn: f"{path} of the {name}" for path, bn in found}
    for bn, path in norms.items():
        plain = type(bn).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if not plain and type(bn).__name__ != "BatchNormAct2d":
            raise ValueError(f"{path} ({type(bn).__name__}) overrides forward: set sync_batchnorm to false")
        if bn.momentum is None and bn.track_running_stats:
            raise ValueError(f"{path} has momentum=None: set a momentum, or sync_batchnorm to false")
    try:
        for bn in norms:
            bn.sync_group = group  # type: ignore[assignment]
            bn.forward = partial(_forward, bn)  # type: ignore[method-assign]
        yield
    finally:
        for bn in norms:
            for attribute in ("sync_group", "forward"):
                vars(bn).pop(attribute, None)


def batch_norm_act(
    bn: _BatchNorm,
    x: Tensor,
    *,
    activation: Literal["none", "relu", "leaky_relu"] = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    count: bool = True,
    fork: bool = False,
) -> Any:
    """Return ``activation(bn(x) + residual)``, computed by :func:`dfkd_fast.ops.batch_norm_act`.

    The module's flags, running statistics and ``num_batches_tracked`` are used and updated as in ``bn(x)``. The module
    itself is called if it has hooks, has no momentum (cumulative average), or is not a plain BatchNorm.

    Args:
        bn: ``nn.BatchNorm1d``, ``nn.BatchNorm2d`` or ``nn.BatchNorm3d``.
        x: (N, C, ...), as for ``bn``.
        activation: applied after the residual is added.
        negative_slope: slope of ``leaky_relu`` for negative values.
        residual: same shape as x; None means 0.
        count: increment ``num_batches_tracked``; see :func:`count_batches`.
        fork: return the result twice, for two users; see :func:`dfkd_fast.ops.batch_norm_act`.

    Returns:
        A tensor with the shape and dtype of x; with ``fork``, a tuple of two.

    Raises:
        ValueError: shapes do not match, ``activation`` is unknown, or training has only one value per channel.
    """
    if _calls_module(bn):
        y = bn(x)
        y = y if residual is None else (y + residual).to(y.dtype)
        if activation != "none":
            y = F.relu(y) if activation == "relu" else F.leaky_relu(y, negative_slope)
        return (y, y) if fork else y
    bn._check_input_dim(x)
    if count:
        count_batches([bn])
    options: Any = {"activation": activation, "negative_slope": negative_slope, "residual": residual, "fork": fork}
    return ops.batch_norm_act(x, **_arguments(bn), **options)


def batch_norm_act_conv1x1(
    bn: nn.BatchNorm2d, conv: nn.Conv2d, x: Tensor, *, negative_slope: float = 0.01, count: bool = True
) -> tuple[Tensor, Tensor, Norm | None]:
    """Return ``conv(f)`` with ``f = leaky_relu(bn(x))``, and f for :func:`dfkd_fast.ops.spatial_attention`.

    :func:`dfkd_fast.ops.batch_norm_act_conv1x1` computes them. The modules are called as in :func:`batch_norm_act`, and
    also if the convolution has hooks or is not a plain ``nn.Conv2d``.

    Args:
        bn: the BatchNorm.
        conv: a convolution with a 1 x 1 kernel.
        x: (N, C, H, W).
        negative_slope: slope of the leaky ReLU for negative values.
        count: increment ``num_batches_tracked``; see :func:`count_batches`.

    Returns:
        The convolution, features and norm: see :func:`dfkd_fast.ops.batch_norm_act_conv1x1`.

    Raises:
        ValueError: shapes do not match, or training has only one value per channel.
    """
    unfused = _calls_module(bn) or hasattr(bn, "sync_group")
    if unfused or has_hooks(conv) or type(conv).forward is not nn.Conv2d.forward:
        f = batch_norm_act(bn, x, activation="leaky_relu", negative_slope=negative_slope, count=count)
        return conv(f), f, None
    bn._check_input_dim(x)
    if count:
        count_batches([bn])
    convolution: Any = {"conv_weight": conv.weight.flatten(1), "conv_bias": conv.bias}
    return ops.batch_norm_act_conv1x1(x, **_arguments(bn), **convolution, negative_slope=negative_slope)
