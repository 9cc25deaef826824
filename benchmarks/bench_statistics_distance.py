"""statistics_distance: the hooks on a ResNet-34 and on a WRN-40-2, together and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK"]

Shape = tuple[int, ...]


def _resnet34(batch: int, size: int) -> list[Shape]:
    """What its 36 BatchNorms are given, of images of size x size."""
    shapes: list[Shape] = [(batch, 64, size // 2, size // 2)]
    for channels, side, norms in ((64, size // 4, 6), (128, size // 8, 9), (256, size // 16, 13), (512, size // 32, 7)):
        shapes += [(batch, channels, side, side)] * norms
    return shapes


def _wrn_40_2(batch: int, size: int) -> list[Shape]:
    """What its 37 BatchNorms are given: a stage's first has the map of the stage before, the last that of the last."""
    shapes: list[Shape] = []
    before: Shape = (batch, 16, size, size)
    for channels, side in ((32, size), (64, size // 2), (128, size // 4)):
        shapes += [before, *[(batch, channels, side, side)] * 11]
        before = (batch, channels, side, side)
    return [*shapes, before]


def _case(name: str, maps: Sequence[Shape], **more: Any) -> Case:
    """All layers one after the other, and the gradients of all distances."""

    def inputs(make: Make) -> Inputs:
        made: list[Tensor] = []
        for shape in maps:
            made.append(make.map(*shape, grad=True) if len(shape) == 4 else make.tensor(*shape, grad=True))
            made.append(make.tensor(shape[1], dtype=torch.float32))
            made.append(make.tensor(shape[1], dtype=torch.float32).abs() + 0.5)
        return tuple(made)

    def call(*given: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        layers = zip(given[::3], given[1::3], given[2::3], strict=True)
        return tuple(ops.statistics_distance(x, mean, var, backend=backend) for x, mean, var in layers)

    def work(size: int) -> Work:
        total = size * sum(torch.Size(shape).numel() for shape in maps)
        channels = sum(shape[1] for shape in maps)
        # Forward reads two vectors and writes three, which backward reads.
        return Work(forward_bytes=total + 20 * channels, backward_bytes=2 * total + 12 * channels)

    return Case(name=name, inputs=inputs, call=call, work=work, **more)


def _single(*shape: int, **more: Any) -> Case:
    return _case("x".join(map(str, shape)), [shape], **more)


BENCHMARK = Benchmark(
    op="statistics_distance",
    cases=[
        _case("resnet34 batch 64", _resnet34(64, 224)),
        _case("wrn_40_2 batch 256", _wrn_40_2(256, 32)),
        _single(64, 64, 112, 112),
        _single(64, 256, 14, 14),
        _single(64, 512, 7, 7),
        _single(256, 32, 32, 32),
        _single(256, 64, 16, 16),
        _single(256, 128, 8, 8),
        _single(256, 256, 56, 56, shapes="large"),
        _single(3, 37, 5, 7, shapes="odd"),
        _single(2, 1, 3, shapes="odd"),
        _single(7, 19, 333, shapes="odd"),
        _single(4, 20, 3, 5, 7, shapes="odd"),
        _single(5, 130, shapes="odd"),
        _single(3, 4999, 2, 2, shapes="odd"),
    ],
    make=_single,
)
