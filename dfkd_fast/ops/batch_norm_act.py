"""BatchNorm in training mode with the residual and activation that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.collectives import Group, all_gather, all_reduce
from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.batchnorm_statistics import new_map, new_mask
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.custom_op import differentiable, operator, unsupported_reason
from dfkd_fast.reference import batch_norm_act as reference

__all__ = ["batch_norm_act", "require_batch_norm"]


def _allocate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate y, the mean, the reciprocal of the standard deviation, and the activation's mask."""
    mean, rstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return new_map(x), mean, rstd, new_mask(x, keep_mask)


def _allocate_backward(
    grad_y: Tensor,
    more_grad_y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_dtype: torch.dtype | None,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Allocate the gradients of x, weight, bias and residual. The residual is not saved, so its dtype is given."""
    like = ((x, None), (weight, None), (bias, None), (x, residual_dtype))
    return [new_map(t, dtype) for (t, dtype), need in zip(like, needs_grad, strict=True) if need and t is not None]


def _allocate_synchronized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    statistics: Tensor,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like :func:`_allocate`. ``statistics`` has the mean and variance of each process, (P, 2, C)."""
    mean, rstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return new_map(x), mean, rstd, new_mask(x, keep_mask)


def _allocate_sums(
    grad_y: Tensor,
    more_grad_y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_dtype: torch.dtype | None,
) -> Tensor:
    """Allocate the gradients of bias and weight, (2, C)."""
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _allocate_backward_synchronized(
    grad_y: Tensor,
    more_grad_y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    processes: int,
    activation: str,
    negative_slope: float,
    residual_dtype: torch.dtype | None,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Allocate the gradients of x and residual. ``sums`` are those of :func:`_allocate_sums` of all processes."""
    return [new_map(x, dtype) for dtype, need in zip((None, residual_dtype), needs_grad, strict=True) if need]


_running = ("running_mean", "running_var")
_forward = operator("batch_norm_act", _allocate, "batch_norm_act.forward", mutates=_running)
_backward = operator("batch_norm_act_backward", _allocate_backward, "batch_norm_act.backward")
_normalize = operator(
    "batch_norm_act_synchronized", _allocate_synchronized, "batch_norm_act.forward_synchronized", mutates=_running
)
_sums = operator("batch_norm_act_sums", _allocate_sums, "batch_norm_act.gradient_sums")
_backward_synchronized = operator(
    "batch_norm_act_synchronized_backward", _allocate_backward_synchronized, "batch_norm_act.backward_synchronized"
)


def _forward_fork(*arguments: Any) -> tuple[Tensor, ...]:
    """Return y twice."""
    y, *rest = _forward(*arguments)
    return y, y.view_as(y), *rest


def _save(inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Sequence[Tensor | None], tuple[Any, ...]]:
    x, weight, bias, residual, *_, activation, negative_slope, keep_mask = inputs
    *_, mean, rstd, mask = results
    saved = (x, weight, bias, mean, rstd, mask if keep_mask else None)
    return saved, (activation, negative_slope, None if residual is None else residual.dtype)


def _gradients(
    needs_grad: Sequence[bool],
    saved: Sequence[Tensor | None],
    options: tuple[str, float, torch.dtype | None],
    *grads: Tensor | None,
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * 4  # of x, weight, bias and residual
    given = [grad for grad in grads if grad is not None]
    if not given:
        return gradients
    activation, _, residual_dtype = options
    needs = [bool(need) for need in needs_grad[:4]]
    if needs[3] and activation == "none":
        gradients[3], needs[3] = sum(given[1:], given[0]).to(residual_dtype), False
    if any(needs):
        found = _backward(given[0], given[1] if len(given) == 2 else None, *saved, *options, needs)
        gradients = [a if b is None else b for a, b in zip(gradients, found, strict=True)]
    return gradients


_fused = differentiable("batch_norm_act", _forward, _save, _gradients, signature=_allocate)
_fused_fork = differentiable("batch_norm_act", _forward_fork, _save, _gradients, outputs=2, signature=_allocate)


def _forward_of_group(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    keep_mask: bool,
    group: Group,
) -> tuple[Tensor, ...]:
    """Normalize by the statistics of all processes of a group. Return y twice."""
    statistics = all_gather(torch.stack(torch.ops.dfkd_fast.channel_statistics(x)), group)
    tensors = (x, weight, bias, residual, running_mean, running_var, statistics)
    y, *rest = _normalize(*tensors, momentum, eps, activation, negative_slope, keep_mask)
    return y, y.view_as(y), *rest


def _save_of_group(
    inputs: tuple[Any, ...], results: tuple[Tensor, ...]
) -> tuple[Sequence[Tensor | None], tuple[Any, ...]]:
    *inputs, group = inputs  # type: ignore[assignment]
    saved, options = _save(tuple(inputs), results)
    return saved, (*options, group)


def _gradients_of_group(
    needs_grad: Sequence[bool], saved: Sequence[Tensor | None], options: tuple[Any, ...], *grads: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the sum of the processes' losses, except that those of weight and bias are of the own loss."""
    gradients: list[Tensor | None] = [None] * 4  # of x, weight, bias and residual
    *options, group = options  # type: ignore[assignment]
    given = [grad for grad in grads if grad is not None]
    if not given:
        return gradients
    of_y = (given[0], given[1] if len(given) == 2 else None)
    _, weight, bias, *_ = saved
    sums = _sums(*of_y, *saved, *options)
    for place, vector, found in ((1, weight, sums[1]), (2, bias, sums[0])):
        gradients[place] = found.to(vector.dtype) if needs_grad[place] and vector is not None else None
    needs = [bool(needs_grad[0]), bool(needs_grad[3])]
    if any(needs):
        total = all_reduce(sums, group)
        found = _backward_synchronized(*of_y, *saved, total, group.size, *options, needs)
        gradients[0], gradients[3] = found
    return gradients


_of_group = differentiable("batch_norm_act", _forward_of_group, _save_of_group, _gradients_of_group, outputs=2)


def _triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *running: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    residual: Tensor | None,
    training: bool,
    fork: bool,
    group: Group | None,
) -> Tensor | tuple[Tensor, Tensor]:
    # Without a residual, backward recomputes the mask from x, which it reads in any case.
    keep_mask = residual is not None and activation != "none" and torch.is_grad_enabled()
    options = (float(momentum), float(eps), activation, float(negative_slope), keep_mask)
    if group is not None:
        ys = _of_group(x, weight, bias, residual, *running, *options, group)[:2]
        return ys if fork else ys[0]
    if fork:
        return _fused_fork(x, weight, bias, residual, *running, *options)[:2]
    return _fused(x, weight, bias, residual, *running, *options)[0]


def _unsupported_reason(x: Tensor, *_: Any, residual: Tensor | None, training: bool, **__: Any) -> str | None:
    if not training:
        return "its kernels normalize by batch statistics, and training is False"
    return unsupported_reason(x, residual)


register("batch_norm_act", "reference", reference.batch_norm_act)
register("batch_norm_act", "triton", _triton, _unsupported_reason)


def require_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
    training: bool,
    processes: int = 1,
) -> None:
    """Check the arguments that :func:`batch_norm_act` and :func:`batch_norm_act_conv1x1` share. x is checked before."""
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None:
            require_tensor(name, vector, ("C",), ("x", x), C=x.shape[1])
        elif name.startswith("running") and not training:
            raise ValueError(f"{name} must not be None if training is False")
    require_number("momentum", momentum)
    require_number("eps", eps, above=0)
    require_number("negative_slope", negative_slope)
    if training and x.numel() * processes == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Literal["none", "relu", "leaky_relu"] = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    training: bool = True,
    update_running_stats: bool = True,
    fork: bool = False,
    group: Group | None = None,
    backend: str | None = None,
) -> Any:
    """Apply ``F.batch_norm``, add a residual and apply an activation (Ioffe & Szegedy, 2015).

    ::

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and var are the mean and the biased variance of each channel of x, and the running statistics are
    updated in place as ``running = (1 - momentum) * running + momentum * new``, with the unbiased variance. The
    gradients are those of all of these steps.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; N may be 0: then the running statistics do not change.
        weight: (C,), any floating dtype; None means 1.
        bias: (C,), any floating dtype; None means 0.
        running_mean: (C,), any floating dtype; None if it is not tracked.
        running_var: (C,), any floating dtype; None if it is not tracked.
        momentum: weight of the new statistics.
        eps: greater than 0.
        activation: applied after the residual is added.
        negative_slope: slope of ``leaky_relu`` for negative values.
        residual: same shape as x, any floating dtype; None means 0.
        training: normalize by batch statistics. If False, normalize by the running statistics; only ``"reference"``
            supports this.
        update_running_stats: whether training updates the running statistics.
        fork: return y twice, for two users: the backward adds their gradients while it reads them. Otherwise, autograd
            adds the gradients of several users in a separate pass.
        group: processes whose values together have the statistics, for training; all have tensors of the same shape.
            One collective in each direction exchanges (2, C) numbers. None is only this process.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        y, with the shape, dtype and memory format of x, differentiable with respect to x, weight, bias and residual.
        With ``fork``, a tuple of two tensors that share memory. The Triton kernels compute in float32 and round once.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor, or momentum, eps or negative_slope is not a number.
        ValueError: shapes or devices do not match, eps is not positive, activation or backend is unknown, training has
            only one value per channel, or running statistics are missing without training.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    processes = 1 if group is None else group.size
    numbers = (momentum, eps, negative_slope, training, processes)
    require_batch_norm(x, weight, bias, running_mean, running_var, *numbers)
    require_choice("activation", activation, ("none", "relu", "leaky_relu"))
    if residual is not None:
        require_tensor("residual", residual, ("N", "C", "..."), ("x", x))
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    running = (running_mean, running_var) if update_running_stats or not training else (None, None)
    options: dict[str, Any] = {"momentum": momentum, "eps": eps, "activation": activation, "training": bool(training)}
    options |= {"negative_slope": negative_slope, "residual": residual, "fork": bool(fork)}
    options["group"] = group if training else None
    return dispatch("batch_norm_act", backend, x, weight, bias, *running, **options)
