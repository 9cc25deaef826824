"""high_order_attention_mse: gradients to the features and both weights, as a student's step needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.bench_high_order_attention import inputs_of, work_of
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK"]


def _case(
    samples: int, channels: int, height: int, width: int, *, order: int = 3, mode: str = "joint", **more: Any
) -> Case:
    shape = (samples, channels, height, width)

    def inputs(make: Make) -> Inputs:
        return *inputs_of(make, shape, order, None), make.map(*shape)

    def call(x: Tensor, proj_weight: Tensor, out_weight: Tensor, target: Tensor, backend: str | None) -> Tensor:
        return ops.high_order_attention_mse(
            x,
            proj_weight,
            out_weight,
            target,
            mode=mode,  # type: ignore[arg-type]
            backend=backend,
        )

    def work(size: int) -> Work:
        # Forward reads features and target; backward reads both and writes the gradient of the features.
        return work_of(shape, order, None, size, forward_maps=2, backward_maps=3)

    different = "" if order == 3 and mode == "joint" else f" order {order} {mode}"
    return Case(name="x".join(map(str, shape)) + different, inputs=inputs, call=call, work=work, **more)


BENCHMARK = Benchmark(
    op="high_order_attention_mse",
    cases=[
        _case(64, 64, 56, 56),
        _case(64, 128, 28, 28),
        _case(64, 256, 14, 14),
        _case(64, 512, 7, 7),
        _case(256, 64, 112, 112, shapes="large"),
        _case(3, 37, 5, 7, shapes="odd"),
        _case(2, 320, 3, 5, shapes="odd"),
        _case(2, 200, 5, 3, order=4, shapes="odd"),
        _case(4, 64, 14, 14, mode="per_order", shapes="odd"),
        _case(4, 256, 14, 14, mode="per_order", shapes="odd"),
        _case(4, 512, 14, 14, mode="per_order", shapes="odd"),
    ],
    make=_case,
)
