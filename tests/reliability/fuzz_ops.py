"""Fuzzes the arguments of every public op: results equal float64, or an error names an argument."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.ops.backend import UnsupportedError
from dfkd_fast.ops.custom_op import INTERPRETED

from ..ops.definitions import cast, results
from ..ops.odd_inputs import laid_out, pick, spoiled
from ..ops.table import CASES
from ..ops.test_contract import OPTIONS, tensors
from .harness import LOST, Lost, Tally, forked

BATCH, HANG_S = 500, 120
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Allowed error, relative to the largest true value."""
NUMBERS = {"temperature": (0.1, 1, 20), "eps": (1e-5, 1), "scale": (-1, 0, 9.0), "negative_slope": (0, 0.2, 1)}
CHOICES = NUMBERS | {"momentum": (0, 0.1, 1), "training": (True, False), "squared": (True, False)}
WRONG = (math.nan, math.inf, -math.inf, 10**400, 2**70, "", "MEAN", None, 1j, (1,), torch.tensor(1.0))
LIMITS = ("Expected more than 1 value per channel", "must have H and W of at least 2")
"""Errors of arguments that are right, except that an op does not support their sizes."""


def _compare(found: list[Tensor], truth: list[Tensor], near: Sequence[list[Tensor]], limits: list[float]) -> None:
    """Compare with the truth. The true results for inputs nearby add their distance to the allowed error."""
    for i, (a, b, limit, *others) in enumerate(zip(found, truth, limits, *near, strict=True)):
        assert a.shape == b.shape, f"result {i} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        finite = b.isfinite() & (b.abs() < torch.finfo(a.dtype).max)
        error, size = (a.double() - b).abs()[finite], b.abs()[finite]
        bound = max(limit, TOLERANCE[a.dtype]) * (1 + float(size.max()) if len(size) else 1)
        bound += 8 * max((float((other - b).abs()[finite].max()) for other in others if len(size)), default=0.0)
        assert (error <= bound).all(), f"result {i} is off by {float(error.max()):.3e}, allowed {bound:.3e}"


def _check(op: str, function: Callable[..., Any], inputs: Sequence[Any], backend: str | None, *, finite: bool) -> None:
    before = [(t.clone(), t._version) if isinstance(t, Tensor) and t.layout == torch.strided else None for t in inputs]
    given, grads = [t for t in inputs if isinstance(t, Tensor)], list[Tensor]()
    if any(t.is_meta for t in given):
        outputs = tensors(function(*inputs, backend=backend))
        assert not given[0].is_meta or all(t.is_meta for t in outputs if isinstance(t, Tensor)), "outputs are not meta"
        return
    found = results(partial(function, backend=backend), inputs, grads)
    for t, kept in zip(inputs, before, strict=True):
        if kept is not None:
            assert t._version == kept[1], "an input was written"
            assert torch.equal(t.nan_to_num(), kept[0].nan_to_num()), "an input was changed"
    assert {t.dtype for t in given} <= {*TOLERANCE}, "a dtype is accepted that the op does not support"
    if finite:
        definition, limit = partial(function, backend="reference"), max(TOLERANCE[t.dtype] for t in given)
        slope = limit * (20 if "batch" in op and limit > 1e-3 else 1)  # they cancel, most of all those of two values
        limits = [limit] * len(grads) + [slope] * (len(found) - len(grads))
        truth = results(definition, cast(inputs, torch.float64), grads)
        try:
            _compare(found, truth, (), limits)
        except AssertionError:  # the inputs of a BatchNorm may be nearly equal
            eps = max(torch.finfo(t.dtype).eps for t in given)
            near = [results(definition, cast(inputs, torch.float64, 4 * eps), grads) for _ in range(4)]
            _compare(found, truth, near, limits)


def _one(rng: np.random.Generator) -> tuple[str, str, str]:
    """Run an input. Return its op, its outcome and, if it is lost, the reason."""
    name, sizes = pick(rng, [*CASES]), (1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 17)
    case, op, spoil = CASES[name], name.split(",")[0], rng.choice(["nothing", "tensor", "option"], p=[0.65, 0.2, 0.15])
    parameters = inspect.signature(getattr(ops, op)).parameters
    known = OPTIONS.get(op, {}) | {key: value for key, value in CHOICES.items() if key in parameters}
    options = {option: pick(rng, good) for option, good in known.items() if rng.random() < 0.5}
    if spoil == "option":
        checked = [each for each in options if each not in ("training", "squared", "symmetric", "normalize")]
        options[pick(rng, checked or ["backend"])] = pick(rng, WRONG)
    slow = {"triton"} if INTERPRETED and rng.random() < 0.8 else set()
    backend = options.pop("backend", pick(rng, [None, *(each for each in ops.backends()[op] if each not in slow)]))
    first = 0 if rng.random() < 0.05 and op != "statistics_distances" else pick(rng, sizes)
    shape = (first, *(pick(rng, sizes) for _ in case.shapes[0][1:]))
    made = case.make(shape, dtype=pick(rng, [*TOLERANCE]))(int(rng.integers(2**20)))
    inputs: list[Any] = [None if t is None else laid_out(rng, t.detach()) for t in made]
    for i, t in enumerate(inputs):
        if t is not None and rng.random() < 0.15 and i not in case.batched:
            inputs[i] = t.to(pick(rng, [*TOLERANCE]))
    if spoil == "tensor":
        i = pick(rng, [i for i, t in enumerate(inputs) if t is not None])
        wrong = spoiled(rng, inputs[i])
        inputs[i] = wrong if isinstance(wrong, Tensor) or op != "max_unpool2x2" else inputs[i][None]
    elif rng.random() < 0.1:
        huge = 2**28 if op != "statistics_distances" and first and rng.random() < 0.5 else 0
        inputs = [t if t is None else t.to("meta") for t in inputs]
        inputs = [t[:1].expand(huge, *t.shape[1:]) if huge and i in case.batched else t for i, t in enumerate(inputs)]
    for i, t in enumerate(inputs):
        if isinstance(t, Tensor) and t.is_floating_point() and i in case.needs_grad and rng.random() < 0.7:
            inputs[i] = t.detach().requires_grad_()
    try:
        with case.tiling():
            _check(op, partial(case.function, **options), inputs, backend, finite=spoil != "option")
        return op, "equal to float64", ""
    except UnsupportedError:
        return op, "not supported by the backend", ""
    except Exception as error:
        names = (*LIMITS, *(() if spoil == "nothing" else (*parameters, "mean", "var")))
        if type(error) in (ValueError, TypeError) and any(each in str(error) for each in names):
            return op, "refused with a reason", ""
        given = [(t.dtype, *t.shape, t.device) if isinstance(t, Tensor) else t for t in inputs]
        return op, LOST, f"{traceback.format_exc()[-1500:]}; {name}, {backend}, {options}: {given}"


def _batch(seeds: tuple[int, int], send: Callable[[Any], None]) -> None:
    for i in range(BATCH):
        send(_one(np.random.default_rng([*seeds, i])))


def run(tally: Tally) -> None:
    """Run batches of inputs in forked processes. Each batch is a case."""
    for case in CASES.values() if INTERPRETED else ():  # imports kernels before processes are forked
        case.function(*case.make(case.shapes[2])(1), backend="triton")
    for _ in tally.cases():
        batch, count = forked(partial(_batch, (tally.seed, tally.index)), seconds=HANG_S), 0
        try:
            for count, (op, outcome, reason) in enumerate(batch, 1):  # noqa: B007
                tally.lose(op, reason) if outcome == LOST else tally.count(op, outcome)
                if tally.left() < 0:
                    break
        except Lost as error:
            tally.lose("process", f"input {count} of the batch: {error}")
        batch.close()
