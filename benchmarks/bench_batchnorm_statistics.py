"""batchnorm_statistics and channel_statistics: the layers of a ResNet-34, together and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK"]


@dataclass(frozen=True)
class _Layer:
    """One BatchNorm: the map that it reads, and what follows it.

    Attributes:
        shape: (N, C, ...).
        activation: as the op's.
        residual: whether one is added.
        count: how many such layers there are.
    """

    shape: tuple[int, ...]
    activation: Literal["none", "relu", "relu6"] = "relu"
    residual: bool = False
    count: int = 1

    def elements(self) -> int:
        return self.count * torch.Size(self.shape).numel()


def _resnet34(batch: int, size: int, *, residuals: bool) -> list[_Layer]:
    """Its 36 BatchNorms on images of size x size; without residuals each is followed by a ReLU alone."""
    layers = [_Layer((batch, 64, size // 2, size // 2))]
    for channels, side, blocks in ((64, size // 4, 3), (128, size // 8, 4), (256, size // 16, 6), (512, size // 32, 3)):
        shape = (batch, channels, side, side)
        layers.append(_Layer(shape, count=blocks))
        layers.append(_Layer(shape, residual=residuals, count=blocks))
        if channels > 64:
            layers.append(_Layer(shape, activation="none" if residuals else "relu"))
    return layers


def _map(make: Make, shape: tuple[int, ...], grad: bool) -> Tensor:
    return make.map(*shape, grad=grad) if len(shape) == 4 else make.tensor(*shape, grad=grad)


def _case(name: str, layers: Sequence[_Layer], **more: Any) -> Case:
    """All layers one after the other, the gradients of all three results taken back to maps and residuals."""
    each = [layer for layer in layers for _ in range(layer.count)]

    def inputs(make: Make) -> Inputs:
        made: list[Tensor] = []
        for layer in each:
            channels = layer.shape[1]
            made.append(_map(make, layer.shape, grad=True))
            made.append(make.tensor(channels, dtype=torch.float32))
            made.append(make.tensor(channels, dtype=torch.float32).abs() + 0.5)
            made += [make.tensor(channels, dtype=torch.float32), make.tensor(channels, dtype=torch.float32)]
            if layer.residual:
                made.append(_map(make, layer.shape, grad=True))
        return tuple(made)

    def call(*given: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        waiting = iter(given)
        for layer in each:
            x, mean, var, weight, bias = (next(waiting) for _ in range(5))
            residual = next(waiting) if layer.residual else None
            results += ops.batchnorm_statistics(
                x, mean, var, weight, bias, 1e-5, activation=layer.activation, residual=residual, backend=backend
            )
        return tuple(results)

    def work(size: int) -> Work:
        total = sum(layer.elements() for layer in layers)
        added = sum(layer.elements() for layer in layers if layer.residual)
        # A residual's gradient is written once more, and a bit an element says where it passes.
        return Work(
            forward_bytes=size * (2 * total + added) + added / 8,
            backward_bytes=size * (3 * total + added) + added / 8,
        )

    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _alone(name: str, layers: Sequence[_Layer], **more: Any) -> Case:
    """The statistics without the norm."""
    each = [layer for layer in layers for _ in range(layer.count)]

    def inputs(make: Make) -> Inputs:
        return tuple(_map(make, layer.shape, grad=True) for layer in each)

    def call(*maps: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        return tuple(result for x in maps for result in ops.channel_statistics(x, backend=backend))

    def work(size: int) -> Work:
        total = sum(layer.elements() for layer in layers)
        return Work(forward_bytes=size * total, backward_bytes=2 * size * total)

    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _single(*shape: int, **more: Any) -> Case:
    layer = _Layer(shape, residual=more.pop("residual", False), activation=more.pop("activation", "relu"))
    name = "x".join(map(str, shape)) + (" with residual" if layer.residual else "")
    return _case(name, [layer], **more)


_PLAIN = _resnet34(64, 224, residuals=False)
_WITH_RESIDUALS = _resnet34(64, 224, residuals=True)

BENCHMARK = Benchmark(
    op="batchnorm_statistics",
    cases=[
        _case("resnet34 batch 64", _PLAIN),
        _case("resnet34 batch 64 with residuals", _WITH_RESIDUALS),
        _alone("statistics alone resnet34 batch 64", _PLAIN),
        _single(64, 64, 112, 112),
        _single(64, 64, 56, 56),
        _single(64, 128, 28, 28),
        _single(64, 256, 14, 14),
        _single(64, 512, 7, 7),
        _single(64, 64, 56, 56, residual=True),
        _single(64, 512, 7, 7, residual=True),
        _alone("statistics alone 64x64x112x112", [_Layer((64, 64, 112, 112))]),
        _alone("statistics alone 64x512x7x7", [_Layer((64, 512, 7, 7))]),
        _single(256, 256, 56, 56, shapes="large"),
        _single(256, 256, 56, 56, residual=True, shapes="large"),
        _single(3, 37, 5, 7, shapes="odd", activation="relu6"),
        _single(3, 37, 5, 7, shapes="odd", residual=True),
        _single(3, 24, 9, 9, shapes="odd", residual=True, activation="relu6"),
        _single(2, 1, 3, shapes="odd"),
        _single(7, 19, 333, shapes="odd", residual=True),
        _single(4, 20, 3, 5, 7, shapes="odd"),
        _single(5, 130, shapes="odd", activation="none"),
        _alone("statistics alone 3x37x5x7", [_Layer((3, 37, 5, 7))], shapes="odd"),
        _alone("statistics alone 7x19x333", [_Layer((7, 19, 333))], shapes="odd"),
    ],
    make=_single,
)
