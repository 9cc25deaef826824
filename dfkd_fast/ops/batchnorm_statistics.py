"""A frozen BatchNorm that also returns the statistics of its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.custom_op import differentiable, fused_op, operator, unsupported_reason
from dfkd_fast.reference import batchnorm_statistics as reference
from dfkd_fast.reference.common import contiguous, one_format, suggested_format, upcast

__all__ = ["batchnorm_statistics", "channel_statistics", "merge_statistics", "new_map", "new_mask"]


def new_map(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a tensor with the shape of x: channels-last if x is, else contiguous."""
    return torch.empty_like(x, dtype=dtype, memory_format=suggested_format(x) or torch.contiguous_format)


def new_mask(x: Tensor, keep: bool) -> Tensor:
    """Allocate one bit per element of x, 8 channels per byte: (N, ceil(C / 8), positions), uint8. Empty if not kept."""
    count, octets, positions = (x.shape[0], (x.shape[1] + 7) // 8, math.prod(x.shape[2:])) if keep else (0, 0, 0)
    strides = (1, octets) if x.ndim == 2 or suggested_format(x) is not None else (positions, 1)
    return x.new_empty_strided((count, octets, positions), (octets * positions, *strides), dtype=torch.uint8)


def _allocate_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


def _allocate(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    keep_mask: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate y, the statistics of chunks of x and their numbers of values, and the activation's mask."""
    from dfkd_fast.kernels.batchnorm_statistics import num_parts  # Triton may not be installed

    chunks, channels = num_parts(x), x.shape[1]
    parts = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, chunks, channels), (chunks,)))
    return new_map(x), *parts, new_mask(x, keep_mask)  # type: ignore[return-value]


def _allocate_backward(
    grad_y: Tensor | None,
    more_grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    mean: Tensor | None,
    mask: Tensor | None,
    residual_dtype: torch.dtype | None,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Allocate the gradients of x, weight, bias and residual. The residual is not saved, so its dtype is given."""
    like = ((x, None), (weight, None), (bias, None), (x, residual_dtype))
    return [new_map(t, dtype) for (t, dtype), need in zip(like, needs_grad, strict=True) if need and t is not None]


_forward = operator("batchnorm_statistics", _allocate, "batchnorm_statistics.forward")
_backward = operator("batchnorm_statistics_backward", _allocate_backward, "batchnorm_statistics_bwd.backward")


def _forward_with_tokens(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Return y, three tokens, and the operator's further results.

    A second function merges the chunks of all layers, so the mean and variance are not known here. The tokens connect
    both functions in backward and have no values: their gradients are that of the mean, that of the variance, and, in
    place of a third gradient, the mean itself, which the formula for the gradient of x contains.
    """
    y, *further = _forward(x, *others)
    return y, *(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(3)), *further


def _forward_fork(*arguments: Any) -> tuple[Tensor, ...]:
    """Return y twice."""
    y, *further = _forward_with_tokens(*arguments)
    return y, y.view_as(y), *further


def _save(inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Sequence[Tensor | None], tuple[Any, ...]]:
    *norm, eps, activation, keep_mask, residual = inputs
    saved = (*norm, results[-1] if keep_mask else None)
    return saved, (eps, activation, None if residual is None else residual.dtype)


def _gradients(
    needs_grad: Sequence[bool], saved: Sequence[Tensor | None], options: tuple[Any, ...], *grads: Tensor | None
) -> list[Tensor | None]:
    (*norm, mask), (eps, activation, residual_dtype), (*of_y, grad_mean, grad_var, mean) = saved, options, grads
    given: list[Tensor | None] = [grad for grad in of_y if grad is not None]
    grad_y, more_grad_y, *_ = (*given, None, None)
    gradients: list[Tensor | None] = [None] * 9
    with_grad = (0, 3, 4, 8)  # x, weight, bias and residual
    # Only x receives a gradient through mean and var.
    needs = [bool(needs_grad[i]) and (i == 0 or grad_y is not None) for i in with_grad]
    if needs[3] and activation == "none" and grad_y is not None:
        total = grad_y if more_grad_y is None else grad_y + more_grad_y
        gradients[8], needs[3] = total.to(residual_dtype), False
    if any(needs):
        found = _backward(
            grad_y, more_grad_y, grad_mean, grad_var, *norm, eps, activation, mean, mask, residual_dtype, needs
        )
        for i, gradient in zip(with_grad, found, strict=True):
            gradients[i] = gradient if gradient is not None else gradients[i]
    return gradients


def _allocate_merged(parts: list[Tensor], counts: list[Tensor]) -> list[Tensor]:
    """Allocate mean and variance of each layer."""
    return [each.new_empty(each.shape[2]) for each in parts for _ in range(2)]


_merge_layers = operator("batchnorm_statistics_merge", _allocate_merged, "batchnorm_statistics.merge")


def _merge(*tensors: Any) -> tuple[Tensor, ...]:
    """Merge the chunks of layers, each given by three tokens, parts and counts."""
    # Without gradients, Dynamo prepends a context, because the number of arguments varies.
    tensors = tensors[len(tensors) % 5 :]
    return tuple(_merge_layers(list(tensors[3::5]), list(tensors[4::5])))


def _save_means(inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Sequence[Tensor], tuple[Any, ...]]:
    return results[::2], ()


def _gradients_of_tokens(
    needs_grad: Sequence[bool], means: Sequence[Tensor], options: tuple[Any, ...], *grads: Tensor | None
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = []
    for mean, grad_mean, grad_var in zip(means, grads[::2], grads[1::2], strict=True):
        used = grad_mean is not None or grad_var is not None
        gradients += [grad_mean, grad_var, mean if used else None, None, None]
    return gradients


_fused = differentiable("batchnorm_statistics", _forward_with_tokens, _save, _gradients, outputs=4, signature=_allocate)
_fused_fork = differentiable("batchnorm_statistics", _forward_fork, _save, _gradients, outputs=5, signature=_allocate)
_merged = differentiable("batchnorm_statistics", _merge, _save_means, _gradients_of_tokens, outputs=None)
_statistics = fused_op(
    "channel_statistics",
    _allocate_statistics,
    outputs=2,
    saved=(0,),
    new_gradient=new_map,
    triton=("batchnorm_statistics.statistics", "batchnorm_statistics_bwd.statistics_backward"),
)


def _triton(*norm: Any, activation: str, residual: Tensor | None, fork: bool) -> tuple[Tensor, ...]:
    # Without a residual, backward recomputes the mask from x, which it reads in any case.
    keep_mask = residual is not None and activation != "none" and torch.is_grad_enabled()
    if fork:
        return _fused_fork(*norm, activation, keep_mask, residual)[:7]
    return _fused(*norm, activation, keep_mask, residual)[:6]


def _cpu_forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, mean and var with fewer passes over maps than the reference."""
    upcast_x = upcast(x)
    mean, var, scale, shift = contiguous((running_mean, running_var, weight, bias), upcast_x.dtype)
    # Without a residual, PyTorch rounds a half-precision result once.
    y = F.batch_norm(one_format(x if residual is None else upcast_x), mean, var, scale, shift, eps=eps)
    if residual is not None:
        y.add_(residual)
    if activation != "none":
        y = y.relu_() if activation == "relu" else F.hardtanh_(y, 0, 6)
    others = [dim for dim in range(x.ndim) if dim != 1]
    batch_mean = upcast_x.mean(others, keepdim=True)
    deviation = upcast_x - batch_mean if upcast_x is x else upcast_x.sub_(batch_mean)
    return y.to(x.dtype), batch_mean.flatten(), deviation.square_().mean(others)


def _cpu_save(inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Sequence[Tensor | None], tuple[Any, ...]]:
    *norm, eps, activation, residual = inputs
    y, mean, _ = results
    saved = (*norm[:4], mean, None if activation == "none" else y)
    return saved, (eps, activation, None if residual is None else residual.dtype)


@torch.no_grad()
def _cpu_gradients(
    needs_grad: Sequence[bool], saved: Sequence[Any], options: tuple[Any, ...], *grads: Tensor | None
) -> list[Tensor | None]:
    (x, running_mean, running_var, weight, mean, y), (eps, activation, residual_dtype) = saved, options
    grad_y, grad_mean, grad_var = grads
    gradients: list[Tensor | None] = [None] * 8
    x = one_format(x)
    if grad_y is not None:
        grad_y = one_format(grad_y)
        if activation == "relu":
            grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
        elif activation == "relu6":
            grad_y = torch.ops.aten.hardtanh_backward(grad_y, y, 0, 6)
        needs = [bool(needs_grad[i]) for i in (0, 3, 4)]
        vectors = contiguous((weight, running_mean, running_var), mean.dtype)
        of_norm = torch.ops.aten.native_batch_norm_backward(grad_y, x, *vectors, None, None, False, eps, needs)
        gradients[0], gradients[3], gradients[4] = (g if need else None for g, need in zip(of_norm, needs, strict=True))
        gradients[7] = grad_y.to(residual_dtype) if needs_grad[7] else None
    if needs_grad[0] and not (grad_mean is None and grad_var is None):
        # grad_mean / M + 2 grad_var (x - mean) / M for M values per channel. As an affine map of x, as F.batch_norm
        # computes it, it would cancel if the mean is much larger than the deviations.
        shape = [1, -1, *[1] * (x.ndim - 2)]
        of_mean, of_var = (
            (torch.zeros_like(mean) if g is None else g * (factor * x.shape[1] / x.numel())).view(shape)
            for g, factor in ((grad_mean, 1), (grad_var, 2))
        )
        of_statistics = torch.addcmul(of_mean, x - mean.view(shape), of_var)
        gradients[0] = of_statistics.to(x.dtype) if gradients[0] is None else gradients[0].add_(of_statistics)
    return gradients


_cpu_op = differentiable("batchnorm_statistics", _cpu_forward, _cpu_save, _cpu_gradients, outputs=3)


def _cpu(*norm: Any, activation: str, residual: Tensor | None, fork: bool) -> tuple[Tensor, ...]:
    y, mean, var = _cpu_op(*norm, activation, residual)
    return *([y] * (1 + fork)), mean, var


def _cpu_unsupported(x: Tensor, *_: Any, activation: str, **__: Any) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device.type}"
    if torch.compiler.is_compiling():
        return "torch.compile fuses the reference"
    if x.dtype == torch.float64:
        return "it has no second derivatives, which float64 is used to check"
    if activation == "relu6" and x.dtype != torch.float32:
        return "rounded values do not show whether relu6 has cut them"
    return None if x.numel() else "x is empty"


register("batchnorm_statistics", "cpu", _cpu, _cpu_unsupported)
register("batchnorm_statistics", "reference", reference.batchnorm_statistics)
register("batchnorm_statistics", "triton", _triton, lambda x, *_, residual, **__: unsupported_reason(x, residual))
register("channel_statistics", "reference", reference.channel_statistics)
register("channel_statistics", "triton", _statistics["triton"], unsupported_reason)


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
    merge: bool = True,
    fork: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Apply a BatchNorm with running statistics and return the batch statistics of its input (paper, Eq. 3).

    ::

        y = activation((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)
        mean_c, var_c = mean and biased variance of x[:, c]

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; N may be 0.
        running_mean: (C,), any floating dtype; a constant without gradient.
        running_var: (C,), any floating dtype; a constant without gradient.
        weight: (C,), any floating dtype; None means 1.
        bias: (C,), any floating dtype; None means 0.
        eps: greater than 0.
        activation: applied after the residual is added.
        residual: same shape as x, any floating dtype; None means 0.
        merge: False returns statistics for :func:`merge_statistics`, which finishes those of many layers in one launch.
        fork: return y twice, for two users: the backward adds their gradients while it reads them.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        y, with the shape, dtype and memory format of x; mean and var, (C,), float32 (float64 if x is), NaN if N = 0. y
        is computed in float32 and rounded once. y is differentiable with respect to x, weight, bias and residual; mean
        and var are differentiable with respect to x. If ``merge`` is False: y and the tensors of which
        :func:`merge_statistics` computes mean and var.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor, or eps is not a number.
        ValueError: shapes or devices do not match, eps is not positive, or activation or backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, vector in vectors.items():
        if vector is not None or name.startswith("running"):
            require_tensor(name, vector, ("C",), ("x", x), C=x.shape[1])
    require_number("eps", eps, above=0)
    require_choice("activation", activation, ("none", "relu", "relu6"))
    if residual is not None:
        require_tensor("residual", residual, ("N", "C", "..."), ("x", x))
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    norm = (x, running_mean, running_var, weight, bias, eps)
    options: Any = {"activation": activation, "residual": residual, "fork": bool(fork)}
    results = dispatch("batchnorm_statistics", backend, *norm, **options)
    ys, statistics = results[: 1 + fork], results[1 + fork :]
    return *ys, *(merge_statistics([statistics])[0] if merge else statistics)


def merge_statistics(layers: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return mean and var of layers from the results of :func:`batchnorm_statistics` with ``merge=False``.

    Args:
        layers: the results after y of one call per layer. With gradients, they can be merged once.

    Returns:
        mean and var of each layer, as :func:`batchnorm_statistics` returns them.

    Raises:
        RuntimeError: the results of a call are merged a second time, with gradients. Compiled code does not check this.
    """
    if not torch.compiler.is_compiling():
        for token in (layer[0] for layer in layers if len(layer) > 2 and layer[0].requires_grad):
            # Gradients travel through the tokens, with the mean as one of them: autograd would add two means.
            if getattr(token, "is_merged", False):
                raise RuntimeError("merge_statistics: the results of a batchnorm_statistics call are merged twice")
            token.is_merged = True  # type: ignore[attr-defined]
    # The reference and user-defined backends return mean and var.
    unmerged = [tensor for layer in layers if len(layer) > 2 for tensor in layer]
    merged = iter(_merged(*unmerged) if unmerged else ())
    return [(next(merged), next(merged)) if len(layer) > 2 else (layer[0], layer[1]) for layer in layers]


def channel_statistics(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of each channel, as :func:`batchnorm_statistics` does (paper, Eq. 3).

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; N may be 0.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        mean and var, (C,), float32 (float64 if x is), NaN if N = 0. Differentiable.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has fewer than two dimensions or no channels, or the backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("x", x, ("N", "C", "..."))
    return dispatch("channel_statistics", backend, x)
