"""spatial_attention on the maps of the generator, K = C / 8, batch 64; gradients to features, narrow maps and weight.

Of P positions, F and the result are 2PC elements and h is PK: 4.25PC bytes forward in a two-byte type. Backward reads
F, g and h and writes dF and dh, 6.5PC bytes; a softmax over positions moves as little only where its second pass comes
from cache. Logits are formed twice forward and once backward, then dh and dw: 2PCK operations each.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK"]


def _case(
    n: int,
    c: int,
    h: int,
    w: int,
    *,
    k: int | None = None,
    form: Literal["spatial", "spatial_mean1", "channel"] = "spatial",
    bias: bool = False,
    channels_last: bool = True,
    **more: Any,
) -> Case:
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
        return Work(
            forward_bytes=size * (positions * (2 * c + narrow) + c * narrow),
            backward_bytes=size * (positions * (3 * c + 2 * narrow) + 2 * c * narrow),
            forward_flops=product if form == "channel" else 2 * product,
            backward_flops=3 * product,
        )

    shape = f"{n}x{c}x{h}x{w}"
    name = shape if form == "spatial" else f"{form} {shape}"
    if k is not None:
        name += f" K={k}"
    if not channels_last:
        name += " contiguous"
    return Case(name=name, inputs=inputs, call=call, work=work, **more)


_ODD = (((3, 37, 5, 7), 5), ((2, 200, 9, 3), None), ((1, 24, 15, 15), None), ((2, 300, 7, 7), 70), ((2, 1, 3, 3), None))

BENCHMARK = Benchmark(
    op="spatial_attention",
    cases=[
        _case(64, 256, 28, 28),
        _case(64, 128, 56, 56, dtypes=(torch.bfloat16, torch.float32)),
        _case(64, 64, 112, 112),
        _case(64, 64, 224, 224),
        _case(64, 128, 56, 56, form="spatial_mean1"),
        _case(64, 128, 56, 56, form="channel", bias=True),
        _case(256, 64, 224, 224, shapes="large"),
        *(
            _case(*shape, k=k, form=form, bias=True, shapes="odd")
            for shape, k in _ODD
            for form in ("spatial", "channel")
        ),
        _case(3, 64, 9, 7, channels_last=False, shapes="odd"),
        _case(3, 64, 9, 7, form="channel", bias=True, channels_last=False, shapes="odd"),
    ],
    make=_case,
)
