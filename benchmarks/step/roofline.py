"""Computes the least time of a round of distillation from the operations and bytes of its eager steps.

docs/performance.md defines the work. In short: ``torch.utils.flop_counter`` counts the operations of convolutions,
linear layers, attention products and similarities, forward and backward. Hooks count the bytes of each layer in bf16:
in the forward the input, weights and output; in the backward the gradients and the tensors that they are computed from.
Optimizers read and write float32. Pointwise operations are not counted, as if they were fused into their neighbors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfkd_fast.benchmarks.ops.measure import PeakRates
from dfkd_fast.engine import Engine
from dfkd_fast.nn import HighOrderAttention, SpatialAttention

__all__ = ["Roofline", "Work", "counted", "roofline", "round_work"]

_BF16, _FLOAT = 2, 4
_ADAM, _SGD = 3 * 2 * _FLOAT, 2 * 2 * _FLOAT  # bytes to read and write a parameter and its moments
_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, HighOrderAttention, SpatialAttention)


@dataclass(kw_only=True)
class Work:
    """Number of operations, where a multiply-add counts as two, and bytes of memory traffic."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least milliseconds of a generator step, a student step and a round."""

    generator_step_ms: float
    student_step_ms: float
    round_ms: float


@contextlib.contextmanager
def counted(modules: Iterable[nn.Module]) -> Iterator[Work]:
    """Count the operations that run inside the context, and the bytes of the layers of ``modules``."""
    work = Work()

    def add_bytes(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight = inputs[0], getattr(module, "weight", None)  # the weights of attention modules are negligible
        size, trained = (0, False) if weight is None else (weight.numel(), weight.requires_grad)
        elements = x.numel() + output.numel() + size
        if x.requires_grad:
            elements += output.numel() + size + x.numel()
        if trained:
            elements += x.numel() + (0 if x.requires_grad else output.numel())
        work.bytes += _BF16 * elements

    layers = {layer for module in modules for layer in module.modules() if isinstance(layer, _LAYERS)}
    handles = [layer.register_forward_hook(add_bytes) for layer in layers]
    try:
        with FlopCounterMode(display=False) as counter:
            yield work
    finally:
        for handle in handles:
            handle.remove()
    work.flops += counter.get_total_flops()


def round_work(engine: Engine) -> tuple[Work, Work]:
    """Run one generator step and one student step, and return the work of each, including the optimizer."""
    state = engine.state
    modules = [state.generator.module, state.teacher, state.student.module, state.student.objective]
    sides = [
        (state.generator.optimizer, _ADAM, engine.generator_step),
        (state.student.optimizer, _SGD, engine.student_step),
    ]
    engine.start_round()
    found = []
    for optimizer, bytes_per_parameter, step in sides:
        with counted(modules) as work:
            step()
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        work.bytes += bytes_per_parameter * trained
        found.append(work)
    return found[0], found[1]


def roofline(work: tuple[Work, Work], rates: PeakRates, *, generator_steps: int, student_steps: int) -> Roofline:
    """Return the least times at the measured rates from the work of a generator step and of a student step."""
    generator, student = (rates.roofline_us(each.bytes, each.flops) / 1e3 for each in work)
    total = generator_steps * generator + student_steps * student
    return Roofline(generator_step_ms=generator, student_step_ms=student, round_ms=total)
