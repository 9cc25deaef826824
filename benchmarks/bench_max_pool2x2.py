"""max_pool2x2 and max_unpool2x2 on the maps of the generator's attention modules, 2 C / 8 channels, batch 64.

Both move 5 elements and a byte a window, each way: four elements on one side, one and the code on the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK"]

_HOURGLASS = ((64, 64, 28, 28), (64, 32, 56, 56), (64, 16, 112, 112), (64, 16, 224, 224))
_ODD = ((3, 17, 15, 9), (2, 1, 7, 6), (5, 200, 4, 5))

Shape = tuple[int, int, int, int]


def _work(shape: Shape, size: int) -> Work:
    n, c, h, w = shape
    moved = n * c * (h // 2) * (w // 2) * (5 * size + 1)
    return Work(forward_bytes=moved, backward_bytes=moved)


def _pool(shape: Shape, *, relu: bool = True, **more: Any) -> Case:
    def inputs(make: Make) -> Inputs:
        return (make.map(*shape, grad=True),)

    def call(x: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        return ops.max_pool2x2(x, relu=relu, backend=backend)

    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        """The reference with its ReLU on a quarter of the elements: the same, since four zeros have a code apart."""
        y, index = F.max_pool2d(x, 2, return_indices=True)
        code = (2 * (index // shape[3] % 2) + index % shape[3] % 2).to(torch.uint8)
        if relu:
            y = y.relu()
            code = code.masked_fill(y <= 0, 4)
        return y, code

    name = f"pool {'x'.join(map(str, shape))}"
    return Case(name=name, inputs=inputs, call=call, work=lambda size: _work(shape, size), compiled=compiled, **more)


def _unpool(shape: Shape, **more: Any) -> Case:
    n, c, h, w = shape

    def inputs(make: Make) -> Inputs:
        code = make.map(n, c, h // 2, w // 2, dtype=torch.float32).abs().mul(4).to(torch.uint8).bitwise_and_(3)
        return make.map(n, c, h // 2, w // 2, grad=True), code

    def call(y: Tensor, code: Tensor, backend: str | None) -> Tensor:
        return ops.max_unpool2x2(y, code, (h, w), backend=backend)

    name = f"unpool {'x'.join(map(str, shape))}"
    return Case(name=name, inputs=inputs, call=call, work=lambda size: _work(shape, size), **more)


BENCHMARK = Benchmark(
    op="max_pool2x2",
    cases=[
        *(make(shape) for shape in _HOURGLASS for make in (_pool, _unpool)),
        *(make((256, 64, 224, 224), shapes="large") for make in (_pool, _unpool)),
        *(make(shape, shapes="odd") for shape in _ODD for make in (_pool, _unpool)),
        _pool((3, 24, 13, 9), relu=False, shapes="odd"),
    ],
    make=lambda *shape, unpool=False, **more: (_unpool if unpool else _pool)(shape, **more),
)
