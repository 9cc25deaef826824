"""The benchmark cases of every op: inputs, the least work and competing implementations.

``BENCHMARKS`` maps each op to its cases, whose shapes are in ``cases.yaml``. On meta tensors the same cases also
determine which kernel launches are compiled and checked without a GPU.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dfkd_fast import ops

__all__ = ["BENCHMARKS", "Benchmark", "Case", "Make", "Work", "case_of", "gradients", "tensors"]

Inputs = tuple[Any, ...]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Make:
    """Makes random tensors on one device with a default dtype. Tensors on the device ``meta`` have no data."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def tensor(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """A contiguous tensor of normally distributed values."""
        dtype = dtype or self.dtype
        if self._generator is None:
            return torch.empty(shape, device=self.device, dtype=dtype, requires_grad=grad)
        x = torch.randn(shape, device=self.device, generator=self._generator, dtype=torch.float32)
        return x.mul_(scale).to(dtype).requires_grad_(grad)

    def map(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Feature maps (N, C, H, W) in channels-last format; tensors of other ranks are contiguous."""
        x = self.tensor(*shape, dtype=dtype, scale=scale)
        return (x.to(memory_format=torch.channels_last) if len(shape) == 4 else x).requires_grad_(grad)


@dataclass(frozen=True)
class Work:
    """The least work of a case, for its roofline.

    Bytes: each input is read once and each result written once. The backward includes the recomputation that its
    derivation requires. A multiply-add counts as two operations.
    """

    forward_bytes: float
    backward_bytes: float
    forward_flops: float = 0.0
    backward_flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of an op.

    Attributes:
        name: as in result files, for example ``64x256x14x14``.
        inputs: makes new inputs. The backward computes gradients for those that require one.
        call: takes (*inputs, backend) and returns the results of the public op.
        work: takes the number of bytes per element and returns the least work.
        shapes: ``paper`` for the shapes of the method, ``large`` for shapes bound by bandwidth or arithmetic, ``odd``
            for irregular shapes that are compiled and checked but not timed, ``file`` for shapes from a user's file.
        dtypes: dtypes that are timed.
        compiled: takes (*inputs); the best known PyTorch formulation for torch.compile. None is the reference.
    """

    name: str
    inputs: Callable[[Make], Inputs]
    call: Callable[..., Any]
    work: Callable[[int], Work]
    shapes: str = "paper"
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    compiled: Callable[..., Any] | None = None

    @property
    def seed(self) -> int:
        """A seed for the inputs, the same in every process and different for each case."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The cases of one op.

    Attributes:
        op: name of the op.
        cases: its cases.
        peers: public kernels for the same work, by library. Each entry takes the name of a case and returns a function
            of (*inputs), or None if the kernel does not support the case. It raises ImportError without its library.
    """

    op: str
    cases: Sequence[Case]
    peers: dict[str, Callable[[str], Callable[..., Any] | None]] = field(default_factory=dict)


def tensors(value: Any) -> list[Tensor]:
    """Returns all tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def gradients(
    results: Sequence[Tensor], inputs: Any, grad_outputs: Sequence[Tensor] | None = None, *, retain_graph: bool = False
) -> list[Tensor]:
    """Returns the gradients of all inputs that require one; empty if no result requires a gradient.

    ``grad_outputs`` has one gradient per result that requires one; by default they are not initialized.
    """
    outputs = [result for result in results if result.requires_grad]
    leaves = [tensor for tensor in tensors(inputs) if tensor.requires_grad]
    if not outputs or not leaves:
        return []
    if grad_outputs is None:
        grad_outputs = [torch.empty_like(output) for output in outputs]
    return tensors(torch.autograd.grad(outputs, leaves, grad_outputs, retain_graph=retain_graph, allow_unused=True))


def _name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# --- high_order_attention, high_order_attention_mse


def _attention(
    *shape: int, order: int = 3, hidden: int | None = None, mode: str = "joint", mse: bool = False, **more: Any
) -> Case:
    """The features and both weights require gradients, as in a student step."""
    samples, channels, height, width = shape
    k = hidden or channels // 4
    features, weights = math.prod(shape), (order * (order + 1) // 2 + order) * channels * k
    flops = 2.0 * weights * samples * height * width
    op: Callable[..., Tensor] = ops.high_order_attention_mse if mse else ops.high_order_attention

    def inputs(make: Make) -> Inputs:
        # With a standard deviation of 1.5 / sqrt(fan in) every order contributes and few gates saturate.
        x = make.map(*shape, grad=True)
        proj = make.tensor(order * (order + 1) // 2, k, channels, grad=True, scale=1.5 / channels**0.5)
        out = make.tensor(order, channels, k, grad=True, scale=1.5 / k**0.5)
        return (x, proj, out, make.map(*shape)) if mse else (x, proj, out)

    return Case(
        name=_name(shape) + ("" if order == 3 and mode == "joint" else f" order {order} {mode}"),
        inputs=inputs,
        call=lambda *given, backend: op(*given, mode=mode, backend=backend),
        work=lambda size: Work((2 * features + weights) * size, (3 * features + 2 * weights) * size, flops, 3 * flops),
        **more,
    )


# --- spatial_attention


def _spatial(
    *shape: int,
    k: int | None = None,
    form: Any = "spatial",
    bias: bool = False,
    channels_last: bool = True,
    **more: Any,
) -> Case:
    """Features, hidden maps and weight require gradients, as in a generator step. ``k``: hidden channels, or C / 8."""
    n, c, h, w = shape
    narrow, positions = k or max(1, c // 8), n * h * w
    product = 2.0 * positions * c * narrow

    def inputs(make: Make) -> Inputs:
        new = make.map if channels_last else make.tensor
        features, hidden = new(n, c, h, w, grad=True), new(n, narrow, h, w, grad=True)
        weight = make.tensor(c, narrow, grad=True, scale=narrow**-0.5)
        return features, hidden, weight, make.tensor(c, grad=True) if bias else None

    def work(size: int) -> Work:
        # The backward moves as little as this only if its second pass over the positions hits the L2 cache.
        forward = size * (positions * (2 * c + narrow) + c * narrow)
        backward = size * (positions * (3 * c + 2 * narrow) + 2 * c * narrow)
        return Work(forward, backward, product if form == "channel" else 2 * product, 3 * product)

    name = _name(shape) if form == "spatial" else f"{form} {_name(shape)}"
    name += (f" K={k}" if k is not None else "") + ("" if channels_last else " contiguous")
    return Case(
        name=name,
        inputs=inputs,
        call=lambda *given, backend: ops.spatial_attention(*given, form=form, backend=backend),
        work=work,
        **more,
    )


# --- contrastive_loss


def _contrastive(vectors: int, dim: int, symmetric: bool = False, cross: bool = False, **more: Any) -> Case:
    """Both sides require gradients. ``vectors`` is the number of vectors of both sides together."""
    products, twice = float(vectors) ** 2 * dim, 2 if symmetric else 1
    forward, backward = (twice / 2, 2) if cross else (twice, 2 + twice)
    options: dict[str, Any] = {"symmetric": symmetric, "negatives": "cross" if cross else "all"}
    return Case(
        name=f"{vectors}x{dim}{' cross' if cross else ''}{' symmetric' if symmetric else ''}",
        inputs=lambda make: tuple(make.tensor(vectors // 2, dim, grad=True) for _ in range(2)),
        call=lambda a, b, backend: ops.contrastive_loss(a, b, backend=backend, **options),
        work=lambda size: Work(vectors * dim * size, 2 * vectors * dim * size, forward * products, backward * products),
        **more,
    )


def _lightly(case: str) -> Callable[..., Any] | None:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.1) if case.endswith("symmetric") and "cross" not in case else None


# --- distillation_kl


def _kl(rows: int, classes: int, **more: Any) -> Case:
    """Both sides require gradients, as in a generator step."""
    return Case(
        name=f"{rows}x{classes}",
        inputs=lambda make: tuple(make.tensor(rows, classes, grad=True) for _ in range(2)),
        call=lambda a, b, backend: ops.distillation_kl(a, b, temperature=4.0, backend=backend),
        work=lambda size: Work(2 * rows * classes * size, 4 * rows * classes * size),
        **more,
    )


def _liger(case: str) -> Callable[..., Any] | None:
    """Liger-Kernel's KL takes log-probabilities and computes no gradient for the target, which is half the work."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, p = (student / 4.0).log_softmax(1), (teacher.detach() / 4.0).softmax(1)
        return 16.0 * LigerKLDivLossFunction.apply(log_q, p, "batchmean", False)

    return run


# --- batchnorm_statistics, channel_statistics, statistics_distance


@dataclass(frozen=True)
class _Layer:
    """One BatchNorm layer: its input (N, C, ...) and the operations that follow it."""

    shape: tuple[int, ...]
    activation: Literal["none", "relu", "relu6"] = "relu"
    residual: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _resnet34(batch: int, size: int, *, residuals: bool) -> list[_Layer]:
    """The 36 BatchNorms of ResNet-34 for ``size`` x ``size`` images. Without residuals, a ReLU follows each."""
    layers = [_Layer((batch, 64, size // 2, size // 2))]
    for channels, side, blocks in ((64, size // 4, 3), (128, size // 8, 4), (256, size // 16, 6), (512, size // 32, 3)):
        shape = (batch, channels, side, side)
        layers += [_Layer(shape)] * blocks + [_Layer(shape, residual=residuals)] * blocks
        if channels > 64:
            layers.append(_Layer(shape, activation="none" if residuals else "relu"))
    return layers


def _wrn_40_2(batch: int, size: int) -> list[_Layer]:
    """The 37 BatchNorms of WRN-40-2. The first one of a stage normalizes the output of the previous stage."""
    sizes = [(16, size), *[(32, size)] * 12, *[(64, size // 2)] * 12, *[(128, size // 4)] * 12]
    return [_Layer((batch, channels, side, side)) for channels, side in sizes]


def _running_statistics(make: Make, channels: int) -> Inputs:
    """Running mean and variance of a BatchNorm."""
    mean = make.tensor(channels, dtype=torch.float32)
    return mean, make.tensor(channels, dtype=torch.float32).abs() + 0.5


_NETWORKS = {
    "resnet34 batch 64": _resnet34(64, 224, residuals=False),
    "resnet34 batch 64 with residuals": _resnet34(64, 224, residuals=True),
    "wrn_40_2 batch 256": _wrn_40_2(256, 32),
}

# The following cases run one layer of the given shape, or all layers of a network.


def _batchnorm(
    *shape: int,
    residual: bool = False,
    activation: Any = "relu",
    network: str = "",
    statistics_only: bool = False,
    fork: bool = False,
    **more: Any,
) -> Case:
    """Maps and residuals get gradients from all three results: normalized maps, means and variances."""
    if statistics_only:
        return _statistics(*shape, network=network, **more)
    layers = _NETWORKS[network] if network else [_Layer(shape, activation, residual)]
    total = sum(layer.numel for layer in layers)
    added = sum(layer.numel for layer in layers if layer.residual)

    def one(make: Make, layer: _Layer) -> Inputs:
        channels = layer.shape[1]
        x, statistics = make.map(*layer.shape, grad=True), _running_statistics(make, channels)
        affine = [make.tensor(channels, dtype=torch.float32) for _ in range(2)]
        return x, *statistics, *affine, make.map(*layer.shape, grad=True) if layer.residual else None

    def call(*given: Inputs, backend: str | None) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        statistics: list[list[Tensor]] = []
        for layer, (x, mean, var, weight, bias, residual) in zip(layers, given, strict=True):
            options: dict[str, Any] = {"activation": layer.activation, "residual": residual, "backend": backend}
            norm = (mean, var, weight, bias, 1e-5)
            results = ops.batchnorm_statistics(x, *norm, merge=False, fork=fork, **options)
            maps += results[: 1 + fork]
            statistics.append([*results[1 + fork :]])
        return *maps, *(each for pair in ops.merge_statistics(statistics) for each in pair)

    return Case(
        name=network or _name(shape) + (" with residual" if residual else "") + (" fork" if fork else ""),
        inputs=lambda make: tuple(one(make, layer) for layer in layers),
        call=call,
        # A residual adds one read to the forward, one write to the backward, and a mask of one bit per element to both.
        work=lambda size: Work(size * (2 * total + added) + added / 8, size * (3 * total + added) + added / 8),
        **more,
    )


def _statistics(*shape: int, network: str, **more: Any) -> Case:
    """A case of channel_statistics, which computes mean and variance without normalizing."""
    layers = _NETWORKS[network] if network else [_Layer(shape)]
    total = sum(layer.numel for layer in layers)
    return Case(
        name=f"statistics only {network or _name(shape)}",
        inputs=lambda make: tuple(make.map(*layer.shape, grad=True) for layer in layers),
        call=lambda *maps, backend: tuple(r for x in maps for r in ops.channel_statistics(x, backend=backend)),
        work=lambda size: Work(size * total, 2 * size * total),
        **more,
    )


def _batchnorm_act(
    *shape: int,
    activation: Any = "relu",
    residual: bool = False,
    needs_grad_x: bool = True,
    fork: bool = False,
    **more: Any,
) -> Case:
    """A BatchNorm in training mode. All tensors get gradients, or only weight and bias without ``needs_grad_x``."""
    channels, total = shape[1], math.prod(shape)

    def inputs(make: Make) -> Inputs:
        affine = [make.tensor(channels, grad=True, dtype=torch.float32) for _ in range(2)]
        added = make.map(*shape, grad=needs_grad_x) if residual else None
        return make.map(*shape, grad=needs_grad_x), *affine, *_running_statistics(make, channels), added

    def call(*given: Any, backend: str | None) -> Any:
        *norm, added = given
        options: Any = {"activation": activation, "negative_slope": 0.2, "residual": added, "fork": fork}
        return ops.batch_norm_act(*norm, **options, backend=backend)

    def work(size: int) -> Work:
        """Both directions read x twice. The mask of a residual has one bit per element."""
        more = total * (size + 1 / 8) if residual else 0
        return Work(3 * total * size + more, (5 if needs_grad_x else 2) * total * size + more + residual * total / 8)

    name = _name(shape) + ("" if activation == "relu" else f" {activation}") + (" with residual" if residual else "")
    name += " fork" if fork else ""
    return Case(name=name + ("" if needs_grad_x else " only affine"), inputs=inputs, call=call, work=work, **more)


def _batchnorm_conv1x1(*shape: int, k: int | None = None, needs_grad: bool = True, **more: Any) -> Case:
    """A block of the generator without its hourglass: the gate's hidden map is the result of the convolution."""
    n, c, h, w = shape
    narrow, positions = k or max(1, c // 8), n * h * w
    product = 2.0 * positions * c * narrow

    def inputs(make: Make) -> Inputs:
        affine = [make.tensor(c, grad=needs_grad, dtype=torch.float32) for _ in range(2)]
        conv = make.tensor(narrow, c, grad=needs_grad, scale=c**-0.5), make.tensor(narrow, grad=needs_grad)
        expand = make.tensor(c, narrow, grad=needs_grad, scale=narrow**-0.5)
        return make.map(*shape, grad=needs_grad), *affine, *_running_statistics(make, c), *conv, expand

    def call(*given: Any, backend: str | None) -> Tensor:
        *arguments, expand = given
        reduced, features, norm = ops.batch_norm_act_conv1x1(*arguments, negative_slope=0.2, backend=backend)
        return ops.spatial_attention(features, reduced, expand, norm=norm, backend=backend)

    def work(size: int) -> Work:
        """Forward reads x three times and writes the result; backward reads ten maps or writes them."""
        forward = size * positions * (4 * c + 3 * narrow)
        return Work(forward, size * positions * (10 * c + 5 * narrow), 3 * product, 7 * product)

    name = _name(shape) + (f" K={k}" if k is not None else "") + ("" if needs_grad else " forward")
    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _distance(*shape: int, network: str = "", from_statistics: bool = False, **more: Any) -> Case:
    """A case that calls statistics_distance for each layer, or statistics_distances for the statistics of all."""
    if from_statistics:
        return _distances(network, **more)
    layers = _NETWORKS[network] if network else [_Layer(shape)]
    total, channels = sum(layer.numel for layer in layers), sum(layer.shape[1] for layer in layers)
    return Case(
        name=network or _name(shape),
        inputs=lambda make: tuple(
            (make.map(*layer.shape, grad=True), *_running_statistics(make, layer.shape[1])) for layer in layers
        ),
        call=lambda *given, backend: tuple(ops.statistics_distance(*each, backend=backend) for each in given),
        # Per channel, the forward reads two float32 values and writes three, which the backward reads.
        work=lambda size: Work(size * total + 20 * channels, 2 * size * total + 12 * channels),
        **more,
    )


def _distances(network: str, **more: Any) -> Case:
    """A case of statistics_distances. Means and variances get gradients."""
    widths = [layer.shape[1] for layer in _NETWORKS[network]]

    def one(make: Make, channels: int) -> Inputs:
        batch = (make.tensor(channels, grad=True, dtype=torch.float32) for _ in range(2))
        return *batch, *_running_statistics(make, channels)

    return Case(
        name=f"from statistics {network}",
        inputs=lambda make: tuple(one(make, channels) for channels in widths),
        call=lambda *given, backend: ops.statistics_distances(given, backend=backend),
        # Per channel, the forward reads four float32 values and writes two, which the backward reads and scales.
        work=lambda size: Work(24 * sum(widths), 16 * sum(widths)),
        **more,
    )


# --- max_pool2x2, max_unpool2x2


def _pool(*shape: int, relu: bool = True, unpool: bool = False, **more: Any) -> Case:
    n, c, h, w = shape
    pooled = (n, c, h // 2, w // 2)

    def codes(make: Make) -> Tensor:
        return make.map(*pooled, dtype=torch.float32).abs().mul(4).to(torch.uint8).bitwise_and_(3)

    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        # ReLU runs after the pooling, on a quarter of the elements. Code 4 marks a window without positive elements.
        y, index = F.max_pool2d(x, 2, return_indices=True)
        code = (2 * (index // w % 2) + index % w % 2).to(torch.uint8)
        if relu:
            y = y.relu()
            code = code.masked_fill(y <= 0, 4)
        return y, code

    def work(size: int) -> Work:
        """Per window, one side has four elements, and the other has one element and a one-byte code."""
        moved = math.prod(pooled) * (5 * size + 1)
        return Work(moved, moved)

    if unpool:
        return Case(
            name=f"unpool {_name(shape)}",
            inputs=lambda make: (make.map(*pooled, grad=True), codes(make)),
            call=lambda y, code, backend: ops.max_unpool2x2(y, code, (h, w), backend=backend),
            work=work,
            **more,
        )
    return Case(
        name=f"pool {_name(shape)}",
        inputs=lambda make: (make.map(*shape, grad=True),),
        call=lambda x, backend: ops.max_pool2x2(x, relu=relu, backend=backend),
        work=work,
        compiled=compiled,
        **more,
    )


_PEERS: dict[str, dict[str, Callable[[str], Callable[..., Any] | None]]] = {
    "contrastive_loss": {"lightly": _lightly},
    "distillation_kl": {"liger": _liger},
}
_MAKERS: dict[str, Callable[..., Case]] = {
    "high_order_attention": _attention,
    "high_order_attention_mse": functools.partial(_attention, mse=True),
    "spatial_attention": _spatial,
    "contrastive_loss": _contrastive,
    "distillation_kl": _kl,
    "batchnorm_statistics": _batchnorm,
    "batch_norm_act": _batchnorm_act,
    "batch_norm_act_conv1x1": _batchnorm_conv1x1,
    "statistics_distance": _distance,
    "max_pool2x2": _pool,
}


def case_of(op: str, sizes: Any, shapes: str) -> Case:
    """Returns the case of an op for a list of sizes, or for a mapping of sizes and options as in ``cases.yaml``.

    Raises:
        ValueError: the sizes, options or dtypes do not fit the op.
    """
    if not isinstance(sizes, dict | list):
        raise ValueError(f"a shape of {op} must be a list or a mapping of sizes, got {sizes!r}")
    named = dict(sizes) if isinstance(sizes, dict) else {"shape": sizes}
    shape, dtypes = named.pop("shape", []), named.pop("dtypes", ["bfloat16"])
    if not isinstance(dtypes, list) or not set(dtypes) <= _DTYPES.keys():
        raise ValueError(f"dtypes must be a list of {', '.join(_DTYPES)}, got {dtypes!r}")
    try:
        return _MAKERS[op](*shape, **named, shapes=shapes, dtypes=[_DTYPES[name] for name in dtypes])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{sizes} is not a shape of {op}: {error}") from error


BENCHMARKS: dict[str, Benchmark] = {
    op: Benchmark(
        op=op,
        cases=[case_of(op, sizes, shapes) for shapes, listed in groups.items() for sizes in listed],
        peers=_PEERS.get(op, {}),
    )
    for op, groups in yaml.safe_load(Path(__file__).with_name("cases.yaml").read_text(encoding="utf-8")).items()
}
"""Benchmarks by op. ``max_pool2x2`` includes ``max_unpool2x2``."""
