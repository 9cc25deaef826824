"""distillation_kl: gradients to both sides, as a generator step needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks.cases import Benchmark, Case, Inputs, Make, Work

__all__ = ["BENCHMARK"]


def _case(rows: int, classes: int, **more: Any) -> Case:
    def inputs(make: Make) -> Inputs:
        return make.tensor(rows, classes, grad=True), make.tensor(rows, classes, grad=True)

    def call(student: Tensor, teacher: Tensor, backend: str | None) -> Tensor:
        return ops.distillation_kl(student, teacher, temperature=4.0, backend=backend)

    def work(size: int) -> Work:
        logits = rows * classes * size
        return Work(forward_bytes=2 * logits, backward_bytes=4 * logits)

    return Case(name=f"{rows}x{classes}", inputs=inputs, call=call, work=work, **more)


def _liger(case: str) -> Callable[..., Any] | None:
    """Liger-Kernel's KL takes log-probabilities and gives no gradient to the target: it reaches the student's half."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, p = (student / 4.0).log_softmax(1), (teacher.detach() / 4.0).softmax(1)
        return 16.0 * LigerKLDivLossFunction.apply(log_q, p, "batchmean", False)

    return run


BENCHMARK = Benchmark(
    op="distillation_kl",
    cases=[
        _case(64, 200),
        _case(64, 1000),
        _case(4096, 1000, dtypes=(torch.bfloat16, torch.float32)),
        _case(4096, 32000, shapes="large"),
        _case(37, 129, shapes="odd"),
        _case(3, 5001, shapes="odd"),
    ],
    peers={"liger": _liger},
    make=_case,
)
