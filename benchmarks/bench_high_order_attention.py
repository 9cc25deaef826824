"""high_order_attention: gradients to the features and both weights, as a student's step needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK", "inputs_of", "work_of"]


def inputs_of(make: Make, shape: tuple[int, int, int, int], order: int, hidden: int | None) -> Inputs:
    """Features and weights of deviation 1.5 / sqrt(fan in), at which all orders matter and few gates saturate."""
    channels = shape[1]
    hidden = hidden or channels // 4
    return (
        make.map(*shape, grad=True),
        make.tensor(order * (order + 1) // 2, hidden, channels, grad=True, scale=1.5 / channels**0.5),
        make.tensor(order, channels, hidden, grad=True, scale=1.5 / hidden**0.5),
    )


def work_of(
    shape: tuple[int, int, int, int],
    order: int,
    hidden: int | None,
    size: int,
    *,
    forward_maps: int,
    backward_maps: int,
) -> Work:
    """So many maps moved each way, beside the weights; two products forward, and six backward, maps computed anew."""
    samples, channels, height, width = shape
    hidden = hidden or channels // 4
    features = samples * channels * height * width
    weights = (order * (order + 1) // 2 + order) * channels * hidden
    flops = 2 * weights * samples * height * width
    return Work(
        forward_bytes=(forward_maps * features + weights) * size,
        backward_bytes=(backward_maps * features + 2 * weights) * size,
        forward_flops=flops,
        backward_flops=3 * flops,
    )


def _case(
    samples: int,
    channels: int,
    height: int,
    width: int,
    *,
    order: int = 3,
    hidden: int | None = None,
    mode: str = "joint",
    **more: Any,
) -> Case:
    shape = (samples, channels, height, width)

    def inputs(make: Make) -> Inputs:
        return inputs_of(make, shape, order, hidden)

    def call(x: Tensor, proj_weight: Tensor, out_weight: Tensor, backend: str | None) -> Tensor:
        return ops.high_order_attention(x, proj_weight, out_weight, mode=mode, backend=backend)  # type: ignore[arg-type]

    def work(size: int) -> Work:
        return work_of(shape, order, hidden, size, forward_maps=2, backward_maps=3)

    different = "" if order == 3 and mode == "joint" else f" order {order} {mode}"
    return Case(name="x".join(map(str, shape)) + different, inputs=inputs, call=call, work=work, **more)


BENCHMARK = Benchmark(
    op="high_order_attention",
    cases=[
        _case(64, 64, 56, 56),
        _case(64, 128, 28, 28),
        _case(64, 256, 14, 14),
        _case(64, 512, 7, 7),
        _case(256, 64, 112, 112, shapes="large"),
        _case(256, 512, 28, 28, shapes="large"),
        _case(3, 37, 5, 7, shapes="odd"),
        _case(2, 320, 3, 5, shapes="odd"),
        _case(2, 24, 5, 3, order=1, shapes="odd"),
        _case(2, 100, 5, 3, order=2, hidden=19, shapes="odd"),
        _case(2, 200, 5, 3, order=4, shapes="odd"),
        _case(4, 64, 14, 14, mode="per_order", shapes="odd"),
        _case(4, 128, 14, 14, mode="per_order", shapes="odd"),
        _case(4, 256, 14, 14, mode="per_order", shapes="odd"),
        _case(4, 512, 14, 14, mode="per_order", shapes="odd"),
    ],
    make=_case,
)
