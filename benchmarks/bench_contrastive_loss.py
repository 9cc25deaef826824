"""contrastive_loss: gradients to both sides, with the teacher's vectors as anchors and with all as anchors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK"]


def _case(vectors: int, dim: int, symmetric: bool = False, **more: Any) -> Case:
    """``vectors`` counts both sides'."""

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
    """lightly's loss has all vectors as anchors."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.1) if case.endswith("symmetric") else None


BENCHMARK = Benchmark(
    op="contrastive_loss",
    cases=[
        *(_case(vectors, 128, symmetric) for vectors in (128, 8192, 65536, 131072) for symmetric in (False, True)),
        _case(74, 50, shapes="odd"),
        _case(10, 300, shapes="odd"),
        _case(2, 3, True, shapes="odd"),
    ],
    peers={"lightly": _lightly},
    make=_case,
)
