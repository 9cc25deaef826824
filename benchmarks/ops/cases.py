"""The benchmark cases of every op: inputs, the least work, and competing implementations.

The same cases on tensors without data say which kernels are launched, and so what is compiled and checked without a
GPU. ``BENCHMARKS`` holds them by op.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast import ops

__all__ = ["BENCHMARKS", "Benchmark", "Case", "Make", "Work", "tensors"]

Inputs = tuple[Any, ...]


class Make:
    """Random tensors of one device and dtype. Each call draws new numbers.

    Args:
        device: ``meta`` makes tensors without data.
        dtype: default dtype.
        seed: of the random numbers.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def tensor(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normally distributed, contiguous."""
        dtype = dtype or self.dtype
        if self._generator is None:
            return torch.empty(shape, device=self.device, dtype=dtype, requires_grad=grad)
        x = torch.randn(shape, device=self.device, generator=self._generator, dtype=torch.float32)
        return x.mul_(scale).to(dtype).requires_grad_(grad)

    def map(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Feature maps (N, C, H, W) in channels-last; other ranks are contiguous."""
        x = self.tensor(*shape, dtype=dtype, scale=scale)
        return (x.to(memory_format=torch.channels_last) if len(shape) == 4 else x).requires_grad_(grad)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a case must move and compute, for its roofline.

    Attributes:
        forward_bytes: inputs read once and results written once.
        backward_bytes: the same for the backward pass, with the recomputation that its derivation has.
        forward_flops: a multiply-add counts as two.
        backward_flops: the same for the backward pass.
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
        inputs: makes new inputs. The backward pass computes gradients for those that require one.
        call: (*inputs, backend) to the results of the public op.
        work: for a given number of bytes per element.
        shapes: ``paper`` for the shapes of the method, ``large`` for shapes bound by bandwidth or arithmetic, ``odd``
            for awkward shapes that are compiled and checked but not timed, ``file`` for shapes from a user's file.
        dtypes: dtypes that are timed.
        compiled: the best known PyTorch formulation, (*inputs), for torch.compile; None for the reference.
    """

    name: str
    inputs: Callable[[Make], Inputs]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    work: Callable[[int], Work]
    shapes: Literal["paper", "large", "odd", "file"] = "paper"
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    compiled: Callable[..., Any] | None = None

    @property
    def seed(self) -> int:
        """A seed that differs from case to case and is the same in every process."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The cases of one op.

    Attributes:
        op: its name.
        cases: its cases.
        make: builds a case from sizes, for ``dfkd-fast bench --shapes FILE``.
        peers: public kernels for the same work, by library. Each takes a case's name and returns a function of
            (*inputs), or None where the kernel does not compute the case; it raises ImportError without its library.
    """

    op: str
    cases: Sequence[Case]
    make: Callable[..., Case]
    peers: dict[str, Callable[[str], Callable[..., Any] | None]] = field(default_factory=dict)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in tensors(each)] if isinstance(value, tuple | list) else []


def _name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# --- high_order_attention, high_order_attention_mse


def _attention(
    *shape: int, order: int = 3, hidden: int | None = None, mode: str = "joint", mse: bool = False, **more: Any
) -> Case:
    """Gradients for the features and both weights, as a student step needs them."""
    samples, channels, height, width = shape
    k = hidden or channels // 4
    weights = (order * (order + 1) // 2 + order) * channels * k
    flops = 2.0 * weights * samples * height * width

    def inputs(make: Make) -> Inputs:
        # Weights of standard deviation 1.5 / sqrt(fan in): every order contributes and few gates saturate.
        x = make.map(*shape, grad=True)
        proj = make.tensor(order * (order + 1) // 2, k, channels, grad=True, scale=1.5 / channels**0.5)
        out = make.tensor(order, channels, k, grad=True, scale=1.5 / k**0.5)
        return (x, proj, out, make.map(*shape)) if mse else (x, proj, out)

    def call(*given: Tensor, backend: str | None) -> Tensor:
        function: Callable[..., Tensor] = ops.high_order_attention_mse if mse else ops.high_order_attention
        return function(*given, mode=mode, backend=backend)

    def work(size: int) -> Work:
        features = samples * channels * height * width
        return Work(
            forward_bytes=(2 * features + weights) * size,
            backward_bytes=(3 * features + 2 * weights) * size,
            forward_flops=flops,
            backward_flops=3 * flops,
        )

    different = "" if order == 3 and mode == "joint" else f" order {order} {mode}"
    return Case(name=_name(shape) + different, inputs=inputs, call=call, work=work, **more)


def _attention_mse(*shape: int, **more: Any) -> Case:
    return _attention(*shape, mse=True, **more)


_STAGES = ((64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7))  # of ResNets at 224 x 224

_HIGH_ORDER_ATTENTION = Benchmark(
    op="high_order_attention",
    cases=[
        *(_attention(*shape) for shape in _STAGES),
        _attention(256, 64, 112, 112, shapes="large"),
        _attention(256, 512, 28, 28, shapes="large"),
        _attention(3, 37, 5, 7, shapes="odd"),
        _attention(2, 320, 3, 5, shapes="odd"),
        _attention(2, 24, 5, 3, order=1, shapes="odd"),
        _attention(2, 100, 5, 3, order=2, hidden=19, shapes="odd"),
        _attention(2, 200, 5, 3, order=4, shapes="odd"),
        *(_attention(4, channels, 14, 14, mode="per_order", shapes="odd") for channels in (64, 128, 256, 512)),
    ],
    make=_attention,
)

_HIGH_ORDER_ATTENTION_MSE = Benchmark(
    op="high_order_attention_mse",
    cases=[
        *(_attention_mse(*shape) for shape in _STAGES),
        _attention_mse(256, 64, 112, 112, shapes="large"),
        _attention_mse(3, 37, 5, 7, shapes="odd"),
        _attention_mse(2, 320, 3, 5, shapes="odd"),
        _attention_mse(2, 200, 5, 3, order=4, shapes="odd"),
        *(_attention_mse(4, channels, 14, 14, mode="per_order", shapes="odd") for channels in (64, 256, 512)),
    ],
    make=_attention_mse,
)


# --- spatial_attention


def _spatial(
    *shape: int,
    k: int | None = None,
    form: Literal["spatial", "spatial_mean1", "channel"] = "spatial",
    bias: bool = False,
    channels_last: bool = True,
    **more: Any,
) -> Case:
    """Gradients for features, hidden maps and weight, as a generator step needs them. k is C / 8 by default."""
    n, c, h, w = shape
    narrow = k or max(1, c // 8)

    def inputs(make: Make) -> Inputs:
        new = make.map if channels_last else make.tensor
        return (
            new(n, c, h, w, grad=True),
            new(n, narrow, h, w, grad=True),
            make.tensor(c, narrow, grad=True, scale=narrow**-0.5),
            make.tensor(c, grad=True) if bias else None,
        )

    def call(features: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
        return ops.spatial_attention(features, hidden, weight, bias, form=form, backend=backend)

    def work(size: int) -> Work:
        positions = n * h * w
        product = 2.0 * positions * c * narrow
        # Backward moves this little only where its second pass over the positions reads from the L2 cache.
        return Work(
            forward_bytes=size * (positions * (2 * c + narrow) + c * narrow),
            backward_bytes=size * (positions * (3 * c + 2 * narrow) + 2 * c * narrow),
            forward_flops=product if form == "channel" else 2 * product,
            backward_flops=3 * product,
        )

    name = _name(shape) if form == "spatial" else f"{form} {_name(shape)}"
    name += (f" K={k}" if k is not None else "") + ("" if channels_last else " contiguous")
    return Case(name=name, inputs=inputs, call=call, work=work, **more)


_ODD_MAPS = (
    *(((3, 37, 5, 7), 5), ((2, 200, 9, 3), None), ((1, 24, 15, 15), None)),
    *(((2, 300, 7, 7), 70), ((2, 1, 3, 3), None)),
)

_SPATIAL_ATTENTION = Benchmark(
    op="spatial_attention",
    cases=[
        _spatial(64, 256, 28, 28),
        _spatial(64, 128, 56, 56, dtypes=(torch.bfloat16, torch.float32)),
        _spatial(64, 64, 112, 112),
        _spatial(64, 64, 224, 224),
        _spatial(64, 128, 56, 56, form="spatial_mean1"),
        _spatial(64, 128, 56, 56, form="channel", bias=True),
        _spatial(256, 64, 224, 224, shapes="large"),
        *(
            _spatial(*shape, k=k, form=form, bias=True, shapes="odd")
            for shape, k in _ODD_MAPS
            for form in ("spatial", "channel")
        ),
        _spatial(3, 64, 9, 7, channels_last=False, shapes="odd"),
        _spatial(3, 64, 9, 7, form="channel", bias=True, channels_last=False, shapes="odd"),
    ],
    make=_spatial,
)


# --- contrastive_loss


def _contrastive(vectors: int, dim: int, symmetric: bool = False, **more: Any) -> Case:
    """Gradients for both sides; ``vectors`` counts the vectors of both."""

    def inputs(make: Make) -> Inputs:
        return make.tensor(vectors // 2, dim, grad=True), make.tensor(vectors // 2, dim, grad=True)

    def call(anchors: Tensor, positives: Tensor, backend: str | None) -> Tensor:
        return ops.contrastive_loss(anchors, positives, symmetric=symmetric, backend=backend)

    def work(size: int) -> Work:
        read, products = vectors * dim * size, float(vectors) ** 2 * dim
        return Work(
            forward_bytes=read,
            backward_bytes=2 * read,
            forward_flops=(2 if symmetric else 1) * products,
            backward_flops=(4 if symmetric else 3) * products,
        )

    name = f"{vectors}x{dim}{' symmetric' if symmetric else ''}"
    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _lightly(case: str) -> Callable[..., Any] | None:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.1) if case.endswith("symmetric") else None


_CONTRASTIVE_LOSS = Benchmark(
    op="contrastive_loss",
    cases=[
        *(_contrastive(count, 128, symmetric) for count in (128, 8192) for symmetric in (False, True)),
        *(
            _contrastive(count, 128, symmetric, shapes="large")
            for count in (65536, 131072)
            for symmetric in (False, True)
        ),
        _contrastive(74, 50, shapes="odd"),
        _contrastive(10, 300, shapes="odd"),
        _contrastive(2, 3, True, shapes="odd"),
    ],
    make=_contrastive,
    peers={"lightly": _lightly},
)


# --- distillation_kl


def _kl(rows: int, classes: int, **more: Any) -> Case:
    """Gradients for both sides, as a generator step needs them."""

    def inputs(make: Make) -> Inputs:
        return make.tensor(rows, classes, grad=True), make.tensor(rows, classes, grad=True)

    def call(student: Tensor, teacher: Tensor, backend: str | None) -> Tensor:
        return ops.distillation_kl(student, teacher, temperature=4.0, backend=backend)

    def work(size: int) -> Work:
        logits = rows * classes * size
        return Work(forward_bytes=2 * logits, backward_bytes=4 * logits)

    return Case(name=f"{rows}x{classes}", inputs=inputs, call=call, work=work, **more)


def _liger(case: str) -> Callable[..., Any] | None:
    """Liger-Kernel's KL takes log-probabilities and has no gradient for the target: half of the work."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, p = (student / 4.0).log_softmax(1), (teacher.detach() / 4.0).softmax(1)
        return 16.0 * LigerKLDivLossFunction.apply(log_q, p, "batchmean", False)

    return run


_DISTILLATION_KL = Benchmark(
    op="distillation_kl",
    cases=[
        _kl(64, 200),
        _kl(64, 1000),
        _kl(4096, 1000, dtypes=(torch.bfloat16, torch.float32)),
        _kl(4096, 32000, shapes="large"),
        _kl(37, 129, shapes="odd"),
        _kl(3, 5001, shapes="odd"),
    ],
    make=_kl,
    peers={"liger": _liger},
)


# --- batchnorm_statistics, channel_statistics, statistics_distance


@dataclass(frozen=True)
class _Layer:
    """One BatchNorm layer: its input (N, C, ...) and what follows it."""

    shape: tuple[int, ...]
    activation: Literal["none", "relu", "relu6"] = "relu"
    residual: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def _resnet34(batch: int, size: int, *, residuals: bool) -> list[_Layer]:
    """Its 36 BatchNorms for images of size x size. Without residuals, each is followed by a ReLU."""
    layers = [_Layer((batch, 64, size // 2, size // 2))]
    for channels, side, blocks in ((64, size // 4, 3), (128, size // 8, 4), (256, size // 16, 6), (512, size // 32, 3)):
        shape = (batch, channels, side, side)
        layers += [_Layer(shape)] * blocks + [_Layer(shape, residual=residuals)] * blocks
        if channels > 64:
            layers.append(_Layer(shape, activation="none" if residuals else "relu"))
    return layers


def _wrn_40_2(batch: int, size: int) -> list[_Layer]:
    """Its 37 BatchNorms. The first of a stage normalises the map of the stage before."""
    layers: list[_Layer] = []
    before = _Layer((batch, 16, size, size))
    for channels, side in ((32, size), (64, size // 2), (128, size // 4)):
        layer = _Layer((batch, channels, side, side))
        layers += [before, *[layer] * 11]
        before = layer
    return [*layers, before]


def _batchnorm(name: str, layers: Sequence[_Layer], **more: Any) -> Case:
    """All layers in turn. The gradients of all three results flow back to maps and residuals."""

    def inputs(make: Make) -> Inputs:
        made: list[Tensor] = []
        for layer in layers:
            channels = layer.shape[1]
            made.append(make.map(*layer.shape, grad=True))
            made.append(make.tensor(channels, dtype=torch.float32))
            made.append(make.tensor(channels, dtype=torch.float32).abs() + 0.5)
            made += [make.tensor(channels, dtype=torch.float32), make.tensor(channels, dtype=torch.float32)]
            if layer.residual:
                made.append(make.map(*layer.shape, grad=True))
        return tuple(made)

    def call(*given: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        rest = iter(given)
        for layer in layers:
            x, mean, var, weight, bias = (next(rest) for _ in range(5))
            residual = next(rest) if layer.residual else None
            results += ops.batchnorm_statistics(
                x, mean, var, weight, bias, 1e-5, activation=layer.activation, residual=residual, backend=backend
            )
        return tuple(results)

    def work(size: int) -> Work:
        total = sum(layer.numel for layer in layers)
        added = sum(layer.numel for layer in layers if layer.residual)
        # A residual's gradient is one more write, and one bit per element says where it passes.
        return Work(
            forward_bytes=size * (2 * total + added) + added / 8,
            backward_bytes=size * (3 * total + added) + added / 8,
        )

    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _statistics(name: str, layers: Sequence[_Layer], **more: Any) -> Case:
    """channel_statistics: mean and variance without the normalisation."""

    def inputs(make: Make) -> Inputs:
        return tuple(make.map(*layer.shape, grad=True) for layer in layers)

    def call(*maps: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        return tuple(result for x in maps for result in ops.channel_statistics(x, backend=backend))

    def work(size: int) -> Work:
        total = sum(layer.numel for layer in layers)
        return Work(forward_bytes=size * total, backward_bytes=2 * size * total)

    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _distance(name: str, layers: Sequence[_Layer], **more: Any) -> Case:
    """statistics_distance of each layer."""

    def inputs(make: Make) -> Inputs:
        made: list[Tensor] = []
        for layer in layers:
            made.append(make.map(*layer.shape, grad=True))
            made.append(make.tensor(layer.shape[1], dtype=torch.float32))
            made.append(make.tensor(layer.shape[1], dtype=torch.float32).abs() + 0.5)
        return tuple(made)

    def call(*given: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        each = zip(given[::3], given[1::3], given[2::3], strict=True)
        return tuple(ops.statistics_distance(x, mean, var, backend=backend) for x, mean, var in each)

    def work(size: int) -> Work:
        total = size * sum(layer.numel for layer in layers)
        channels = sum(layer.shape[1] for layer in layers)
        # Per channel, forward reads two numbers and writes three, which backward reads.
        return Work(forward_bytes=total + 20 * channels, backward_bytes=2 * total + 12 * channels)

    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _one_batchnorm(*shape: int, residual: bool = False, activation: Any = "relu", **more: Any) -> Case:
    name = _name(shape) + (" with residual" if residual else "")
    return _batchnorm(name, [_Layer(shape, residual=residual, activation=activation)], **more)


def _one_statistics(*shape: int, **more: Any) -> Case:
    return _statistics(f"statistics only {_name(shape)}", [_Layer(shape)], **more)


def _one_distance(*shape: int, **more: Any) -> Case:
    return _distance(_name(shape), [_Layer(shape)], **more)


_BATCHNORM_STATISTICS = Benchmark(
    op="batchnorm_statistics",
    cases=[
        _batchnorm("resnet34 batch 64", _resnet34(64, 224, residuals=False)),
        _batchnorm("resnet34 batch 64 with residuals", _resnet34(64, 224, residuals=True)),
        _statistics("statistics only resnet34 batch 64", _resnet34(64, 224, residuals=False)),
        _one_batchnorm(64, 64, 112, 112),
        *(_one_batchnorm(*shape) for shape in _STAGES),
        _one_batchnorm(64, 64, 56, 56, residual=True),
        _one_batchnorm(64, 512, 7, 7, residual=True),
        _one_statistics(64, 64, 112, 112),
        _one_statistics(64, 512, 7, 7),
        _one_batchnorm(256, 256, 56, 56, shapes="large"),
        _one_batchnorm(256, 256, 56, 56, residual=True, shapes="large"),
        _one_batchnorm(3, 37, 5, 7, shapes="odd", activation="relu6"),
        _one_batchnorm(3, 37, 5, 7, shapes="odd", residual=True),
        _one_batchnorm(3, 24, 9, 9, shapes="odd", residual=True, activation="relu6"),
        _one_batchnorm(2, 1, 3, shapes="odd"),
        _one_batchnorm(7, 19, 333, shapes="odd", residual=True),
        _one_batchnorm(4, 20, 3, 5, 7, shapes="odd"),
        _one_batchnorm(5, 130, shapes="odd", activation="none"),
        _one_statistics(3, 37, 5, 7, shapes="odd"),
        _one_statistics(7, 19, 333, shapes="odd"),
    ],
    make=_one_batchnorm,
)

_STATISTICS_DISTANCE = Benchmark(
    op="statistics_distance",
    cases=[
        _distance("resnet34 batch 64", _resnet34(64, 224, residuals=False)),
        _distance("wrn_40_2 batch 256", _wrn_40_2(256, 32)),
        _one_distance(64, 64, 112, 112),
        _one_distance(64, 256, 14, 14),
        _one_distance(64, 512, 7, 7),
        _one_distance(256, 32, 32, 32),
        _one_distance(256, 64, 16, 16),
        _one_distance(256, 128, 8, 8),
        _one_distance(256, 256, 56, 56, shapes="large"),
        _one_distance(3, 37, 5, 7, shapes="odd"),
        _one_distance(2, 1, 3, shapes="odd"),
        _one_distance(7, 19, 333, shapes="odd"),
        _one_distance(4, 20, 3, 5, 7, shapes="odd"),
        _one_distance(5, 130, shapes="odd"),
        _one_distance(3, 4999, 2, 2, shapes="odd"),
    ],
    make=_one_distance,
)


# --- max_pool2x2, max_unpool2x2


def _pool_work(shape: Sequence[int], size: int) -> Work:
    """Four elements on one side of each window, one element and a one-byte code on the other."""
    n, c, h, w = shape
    moved = n * c * (h // 2) * (w // 2) * (5 * size + 1)
    return Work(forward_bytes=moved, backward_bytes=moved)


def _pool(*shape: int, relu: bool = True, unpool: bool = False, **more: Any) -> Case:
    if unpool:
        return _unpool(*shape, **more)

    def inputs(make: Make) -> Inputs:
        return (make.map(*shape, grad=True),)

    def call(x: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        return ops.max_pool2x2(x, relu=relu, backend=backend)

    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        # ReLU after pooling, on a quarter of the elements. Code 4 marks windows without a positive element.
        y, index = F.max_pool2d(x, 2, return_indices=True)
        code = (2 * (index // shape[3] % 2) + index % shape[3] % 2).to(torch.uint8)
        if relu:
            y = y.relu()
            code = code.masked_fill(y <= 0, 4)
        return y, code

    def work(size: int) -> Work:
        return _pool_work(shape, size)

    return Case(name=f"pool {_name(shape)}", inputs=inputs, call=call, work=work, compiled=compiled, **more)


def _unpool(*shape: int, **more: Any) -> Case:
    n, c, h, w = shape

    def inputs(make: Make) -> Inputs:
        code = make.map(n, c, h // 2, w // 2, dtype=torch.float32).abs().mul(4).to(torch.uint8).bitwise_and_(3)
        return make.map(n, c, h // 2, w // 2, grad=True), code

    def call(y: Tensor, code: Tensor, backend: str | None) -> Tensor:
        return ops.max_unpool2x2(y, code, (h, w), backend=backend)

    def work(size: int) -> Work:
        return _pool_work(shape, size)

    return Case(name=f"unpool {_name(shape)}", inputs=inputs, call=call, work=work, **more)


_HOURGLASS = ((64, 64, 28, 28), (64, 32, 56, 56), (64, 16, 112, 112), (64, 16, 224, 224))  # of the generator
_ODD_POOLS = ((3, 17, 15, 9), (2, 1, 7, 6), (5, 200, 4, 5))

_MAX_POOL2X2 = Benchmark(
    op="max_pool2x2",
    cases=[
        *(make(*shape) for shape in _HOURGLASS for make in (_pool, _unpool)),
        *(make(256, 64, 224, 224, shapes="large") for make in (_pool, _unpool)),
        *(make(*shape, shapes="odd") for shape in _ODD_POOLS for make in (_pool, _unpool)),
        _pool(3, 24, 13, 9, relu=False, shapes="odd"),
    ],
    make=_pool,
)

BENCHMARKS: dict[str, Benchmark] = {
    each.op: each
    for each in (
        *(_HIGH_ORDER_ATTENTION, _HIGH_ORDER_ATTENTION_MSE, _SPATIAL_ATTENTION, _CONTRASTIVE_LOSS, _DISTILLATION_KL),
        *(_BATCHNORM_STATISTICS, _STATISTICS_DISTANCE, _MAX_POOL2X2),
    )
}
"""Every op's benchmark by its name. ``max_pool2x2`` includes ``max_unpool2x2``."""
