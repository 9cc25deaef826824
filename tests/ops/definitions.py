"""The ops as formulas, for comparisons in float64, and in lower precision for the error of plain PyTorch.

They take the inputs of the cases in table.py, and give the gradients of the ops too. Unlike the definitions in
:mod:`dfkd_fast.reference`, they cast nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public names for these
from torch.utils._pytree import tree_leaves

__all__ = ["DEFINITIONS", "cast", "results", "truth_and_errors"]


def _kl(
    s: Tensor, t: Tensor, *, temperature: float, direction: str = "forward", reduction: str = "batchmean"
) -> Tensor:
    log_p, log_q = (x / temperature - (x / temperature).detach().amax(1, keepdim=True) for x in (t, s))
    log_p, log_q = (x - x.exp().sum(1, keepdim=True).log() for x in (log_p, log_q))
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    absent = log_p.exp() == 0
    terms = log_p.exp() * (log_p.masked_fill(absent, 0) - log_q.masked_fill(absent, 0)) * temperature**2
    return terms if reduction == "none" else terms.sum() / len(s)


def _contrast(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float,
    symmetric: bool = False,
    negatives: str = "all",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    v = torch.cat([a, b])
    if normalize:
        largest = v.detach().abs().amax(1, keepdim=True)
        zero = largest == 0
        v = v / largest.masked_fill(zero, 1)
        v = v / v.square().sum(1, keepdim=True).masked_fill(zero, 1).sqrt()
        v = v.masked_fill(zero, 0)
    s = (v @ v.T) / temperature
    side = torch.arange(len(s)) if negatives == "all" else torch.arange(len(s)) < len(a)
    others = s.masked_fill(side[:, None] == side, -math.inf)
    loss = torch.logsumexp(others, 1) - s.roll(len(a), 1).diagonal()
    loss = loss if symmetric else loss[: len(a)]
    return loss if reduction == "none" else loss.mean()


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return torch.einsum("kc,nchw->nkhw", weight, x)
    return F.conv2d(x, weight[:, :, None, None])


def _gate(f: Tensor, h: Tensor, w: Tensor, b: Tensor | None, *, scale: float, form: str = "spatial") -> Tensor:
    logits = _pointwise(h, w)
    if form == "channel":
        return f + scale * (logits if b is None else logits + b[:, None, None]).softmax(1) * f
    gate = logits.flatten(2).softmax(2).view_as(f) * (f.shape[2] * f.shape[3] if form == "spatial_mean1" else 1)
    return f + scale * gate * f + (0 if b is None else 0 * b.sum())


def _sigmoid(x: Tensor) -> Tensor:
    # The derivative of torch.sigmoid loses its digits for large x.
    return 1 / (1 + (-x).clamp(max=700).exp()) if x.dtype == torch.float64 else x.sigmoid()


def _attention(x: Tensor, proj: Tensor, out: Tensor, *, mode: str = "joint", result: str = "") -> Tensor:
    products, maps = [], [_pointwise(x, each) for each in proj]
    for r in range(len(out)):
        z = maps.pop(0)
        for _ in range(r):
            z = z * maps.pop(0)
        products.append(_pointwise(z.relu(), out[r]))
    gates = [_sigmoid(each) for each in ([sum(products)] if mode == "joint" else products)]
    gate = sum(gates) / len(gates)
    return gate if result == "map" else gate * x


def _mse(x: Tensor, proj: Tensor, out: Tensor, target: Tensor, *, mode: str = "joint") -> Tensor:
    return (_attention(x, proj, out, mode=mode) - target).square().mean()


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.sum((0, 2, 3), keepdim=True) / x[:, 0].numel()  # the sum may overflow
    return mean.flatten(), (x - mean.detach()).square().mean((0, 2, 3))  # the gradient through the mean is zero


def _norm(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, activation: str = "none") -> Tensor:
    """Normalize by the given statistics or by those of x."""
    if x.dtype == torch.float64:
        mean, var = _statistics(x) if mean is None else (mean, var)
        y = (x - mean[:, None, None]) / (var + 1e-3).sqrt()[:, None, None]
        y = y if weight is None else y * weight[:, None, None]
        y = y if bias is None else y + bias[:, None, None]
    else:
        y = F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=1e-3)
    y = y if residual is None else y + residual
    slope = {"none": 1.0, "leaky_relu": 0.2}.get(activation, 0.0)
    return torch.where(y > 0, y.clamp(max=6) if activation == "relu6" else y, slope * y)


def _frozen(x: Tensor, *vectors: Any, activation: str = "none") -> tuple[Tensor, ...]:
    return _norm(x, *vectors, activation=activation), *_statistics(x)


def _two_layers(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, **options: str) -> Any:
    y, *first = _frozen(x, mean, var, weight, bias, residual, **options)
    z, *second = _frozen(y, mean, var, weight, None, None, **options)
    return z, *first, *second


def _act(x: Tensor, weight: Any, bias: Any, *running: Any, activation: str = "none", fork: bool = False) -> Any:
    y = _norm(x, None, None, weight, bias, running[2], activation)
    return (y, y) if fork else y


def _conv1x1(x: Tensor, weight: Any, bias: Any, *others: Any, form: str = "spatial") -> tuple[Tensor, Tensor]:
    f = _norm(x, None, None, weight, bias, None, "leaky_relu")
    reduced = _pointwise(f, others[2])
    reduced = reduced if others[3] is None else reduced + others[3][:, None, None]
    hidden, channels = others[2].shape
    gate = torch.linspace(-1, 1, channels * hidden, dtype=x.dtype).view(channels, hidden)
    scale = float(channels if form == "channel" else f[0, 0].numel())
    return reduced, _gate(f, reduced.sin(), gate, None, scale=scale, form=form)


def _distance(*statistics: Tensor) -> Tensor:
    pairs = [p for i in range(0, len(statistics), 4) for p in ((i, i + 2), (i + 1, i + 3))]
    squares = torch.stack([(statistics[i] - statistics[j].detach()).square().sum() for i, j in pairs])
    return squares.masked_fill(squares == 0, 1).sqrt().masked_fill(squares == 0, 0).sum()


def _pool(x: Tensor, **_: Any) -> Tensor:
    y, index = F.max_pool2d(x.relu(), 2, return_indices=True)
    return F.max_unpool2d(3 * y, index, 2, output_size=list(x.shape[2:]))


def _unpool(y: Tensor) -> Tensor:
    code = (torch.arange(y.numel()) % 7 & 3).view(y.shape)
    n, c, h, w = y.shape
    at = (2 * torch.arange(h)[:, None] + code // 2) * 2 * w + 2 * torch.arange(w) + code % 2
    return y.new_zeros(n, c, 4 * h * w).scatter(2, at.flatten(2), y.flatten(2)).view(n, c, 2 * h, 2 * w)


DEFINITIONS: dict[str, Callable[..., Any]] = {
    "distillation_kl": _kl,
    "contrastive_loss": _contrast,
    "spatial_attention": _gate,
    "high_order_attention": _attention,
    "high_order_attention_map": partial(_attention, result="map"),
    "high_order_attention_mse": _mse,
    "batchnorm_statistics": _frozen,
    "batchnorm_statistics, two layers": _two_layers,
    "batch_norm_act": _act,
    "batch_norm_act_conv1x1": _conv1x1,
    "channel_statistics": _statistics,
    "statistics_distance": lambda x, mean, var: _distance(*_statistics(x), mean, var),
    "statistics_distances": _distance,
    "max_pool2x2": _pool,
    "max_unpool2x2": _unpool,
}
"""The definitions by name of an op, or of a case that differs."""


class _Largest(TorchDispatchMode):
    """Notes the largest finite value that an operator returns."""

    seen = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.seen = max(self.seen, float(t[t.isfinite()].abs().max())) if t.isfinite().any() else self.seen
        return result


def cast(inputs: Sequence[Any], dtype: torch.dtype, noise: float = 0.0) -> list[Any]:
    """The inputs in another dtype, with relative noise."""
    factors = [1 + noise * torch.rand(() if t is None else t.shape, dtype=torch.float64).sub(0.5) for t in inputs]
    pairs = zip(inputs, factors, strict=True)
    return [
        t if t is None else (t.detach() * f).to(dtype).contiguous().requires_grad_(t.requires_grad) for t, f in pairs
    ]


def results(function: Callable[..., Any], inputs: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients. The gradients of the outputs are drawn by the first call."""
    outputs = [t for t in tree_leaves(function(*inputs)) if isinstance(t, Tensor)]
    if not grads:
        grads += [torch.randn(o.shape, dtype=torch.float64).add(0.5).to(o.dtype) for o in outputs]
    needs = [leaf for leaf in inputs if leaf is not None and leaf.requires_grad]
    given = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if not needs:
        return [t.detach() for t in outputs]
    assert given, "no output has a gradient"
    used, slopes = zip(*given, strict=True)
    gradients = torch.autograd.grad(used, needs, slopes, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (*outputs, *gradients)]


def truth_and_errors(
    definition: Callable[..., Any], inputs: Sequence[Any], grads: list[Tensor], compute: torch.dtype
) -> tuple[list[Tensor], list[Tensor], float]:
    """Results in float64, the errors of plain PyTorch, and the largest value of the formula, relative to the dtype's.

    The errors are those of the formula in the dtype ``compute`` and of rounding its inputs, the largest of four draws.
    Those of float64 are those of float32, scaled; infinite if they are over 1 % of the result.
    """
    low = torch.float32 if compute == torch.float64 else compute
    scale = 32 * torch.finfo(compute).eps / torch.finfo(low).eps if compute == torch.float64 else 1.0
    with _Largest() as largest:
        truth = results(definition, cast(inputs, torch.float64), grads)
    errors = [torch.zeros_like(t) for t in truth]
    for _ in range(4):
        near = cast(inputs, low, 4 * torch.finfo(low).eps)
        plain, exact = (results(definition, cast(near, to), grads) for to in (low, torch.float64))
        for i, (p, e, t) in enumerate(zip(plain, exact, truth, strict=True)):
            error = (p - e).abs() + (e - t).abs()
            unknown = (error > 0.01 * t.abs()) & (scale < 1)
            errors[i] = torch.maximum(errors[i], (scale * error).masked_fill(unknown, math.inf))
    return truth, errors, largest.seen / torch.finfo(low).max
