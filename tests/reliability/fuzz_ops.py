"""Fuzzes the arguments of every public op, on the backends that run on the CPU.

Results must agree with the reference in float64, or the op must raise an error that names an argument. Inputs are made
in forked processes, which a crash or a hang ends.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.ops.backend import UnsupportedError
from dfkd_fast.ops.custom_op import INTERPRETED
from dfkd_fast.testing import LAYOUTS, random, with_layout

from ..ops.table import CASES, Case
from .harness import Tally

HANG_S = 120
BATCH = 500
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Allowed error, relative to the largest true value."""
FLOATS = tuple(TOLERANCE)
OTHERS = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
NUMBERS = (0, 0.0, -1.0, math.nan, math.inf, -math.inf, 10**400, 2**70, "1", None, True, 1j, torch.tensor(1.0))
LIMITS = ("Expected more than 1 value per channel", "must have H and W of at least 2")
"""Errors for shapes that some ops do not support."""
TEXTS = ("", "MEAN", None, 1, ("mean",))
OPTIONS: dict[str, dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "distillation_kl": {
        "temperature": ((0.5, 1, 2.0, 20), NUMBERS),
        "direction": (("forward", "reverse"), TEXTS),
        "reduction": (("batchmean", "sum", "mean", "none"), TEXTS),
        "squared": ((True, False, 0, 1), ()),
    },
    "contrastive_loss": {
        "temperature": ((0.1, 0.5, 1, np.float64(2)), NUMBERS),
        "reduction": (("mean", "sum", "none"), TEXTS),
        "symmetric": ((True, False), ()),
        "normalize": ((True, False), ()),
    },
    "spatial_attention": {
        "scale": ((0.05, 1, 9.0, 0, -1), NUMBERS[3:]),
        "form": (("spatial", "spatial_mean1", "channel"), TEXTS),
    },
    "batchnorm_statistics": {"activation": (("none", "relu", "relu6"), TEXTS), "eps": ((1e-5, 1e-3, 1), NUMBERS)},
    "batch_norm_act": {
        "activation": (("none", "relu", "leaky_relu"), TEXTS),
        "negative_slope": ((0.01, 0.2, 1, 0), NUMBERS[3:]),
        "momentum": ((0.1, 0, 1), NUMBERS[3:]),
        "eps": ((1e-5, 1), NUMBERS),
        "training": ((True, False), ()),
    },
    "batch_norm_act_conv1x1": {"negative_slope": ((0.01, 0.2, 1), NUMBERS[3:]), "eps": ((1e-5, 1), NUMBERS)},
}
for _name in ("high_order_attention", "high_order_attention_map", "high_order_attention_mse"):
    OPTIONS[_name] = {"mode": (("joint", "per_order"), TEXTS)}


class _Fault(Exception):
    """A result or an error that is wrong."""


def _pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _laid_out(rng: np.random.Generator, t: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype in another layout; expanded and overlapping ones repeat values."""
    # In half precision, repeated values near the kink of an activation add up to large errors.
    repeated = ("expanded", "overlapping") if t.dtype in (torch.float32, torch.float64) else ()
    layout = _pick(rng, (*LAYOUTS, *repeated, "reversed"))
    if t.ndim == 0 or t.numel() == 0:
        return t
    if layout == "expanded":
        dim = int(rng.integers(t.ndim))
        return t.narrow(dim, 0, 1).expand(t.shape)
    if layout == "overlapping":
        strides = [int(rng.integers(1, 3)) for _ in t.shape]
        needed = 1 + sum(stride * (size - 1) for stride, size in zip(strides, t.shape, strict=True))
        return t.flatten().repeat(1 + needed // t.numel()).as_strided(t.shape, strides)
    if layout == "reversed":
        order = list(range(t.ndim))[::-1]
        return t.permute(order).contiguous().permute(order)
    return with_layout(t, layout if t.ndim == 4 or (layout != "channels_last" and t.ndim > 1) else "offset")


def _spoiled(rng: np.random.Generator, t: Tensor, first: int = 0) -> Any:
    """Return a wrong argument in place of a tensor."""
    how, dim = int(rng.integers(first, 7)), int(rng.integers(max(t.ndim, 1)))
    if how == 0:
        return _pick(rng, ("text", 1.0, [t], t.numpy() if t.dtype != torch.bfloat16 else 1))
    if how == 1:
        return t.to(_pick(rng, OTHERS))
    if how == 2:
        return t.to("meta")
    if how == 3:
        return _pick(rng, (t[None], t.flatten(), t.sum(), t[..., None]))
    if how == 4:
        return t.narrow(dim, 0, int(rng.integers(t.shape[dim])) if t.shape[dim] else 0)
    if how == 5:
        return torch.cat([t, t], dim)
    return t.to_sparse() if rng.random() < 0.5 else t.mT if t.ndim > 1 else t[:0]


def _evaluate(function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the outputs and the gradients of the inputs that require one."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else [each for each in outputs if isinstance(each, Tensor)]
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    used = [(each, i) for i, each in enumerate(outputs) if each.requires_grad]
    if leaves and not used:
        raise _Fault("no output has a gradient")
    if not leaves or outputs[0].is_meta:
        return outputs, []
    grad_output = [random(*o.shape, dtype=o.dtype, seed=i, shift=0.5) for o, i in used]
    gradients = torch.autograd.grad([o for o, _ in used], leaves, grad_output, allow_unused=True)
    return [o.detach() for o in outputs], list(gradients)


def _compare(found: Sequence[Tensor | None], truth: Sequence[Tensor | None], what: str, coarse: torch.dtype) -> None:
    """Check values, shapes and missing gradients. ``coarse`` is the least precise dtype of the inputs."""
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        if (a is None) != (b is None):
            raise _Fault(f"{what} {i} is {'missing' if a is None else 'not None'}")
        if a is None or b is None:
            continue
        if a.shape != b.shape:
            raise _Fault(f"{what} {i} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        slack = 20 if what == "gradient" and coarse.itemsize == 2 else 1  # gradients of a BatchNorm cancel
        limit = slack * TOLERANCE[max((coarse, a.dtype), key=lambda dtype: TOLERANCE[dtype])]
        finite = b.isfinite() & (b.abs() < torch.finfo(a.dtype).max)
        error = (a.double() - b).abs()[finite]
        bound = limit * (1 + float(b[finite].abs().max()) if error.numel() else 1)
        if not (error <= bound).all():
            raise _Fault(f"{what} {i} is off by {float(error.max()):.3e}, allowed {bound:.3e}, dtype {a.dtype}")


def _shape(rng: np.random.Generator, case: Case) -> tuple[int, ...]:
    sizes = (1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 17)
    first = 0 if rng.random() < 0.05 and case.batched != (0, 5) else _pick(rng, sizes)
    return (first, *(_pick(rng, sizes) for _ in case.shapes[0][1:]))


def _one(rng: np.random.Generator) -> tuple[str, str, str]:
    """Run one input. Return its op, its outcome and, if it is lost, the reason."""
    name = _pick(rng, list(CASES))
    case, op = CASES[name], name.split(",")[0]
    dtype, shape = _pick(rng, FLOATS), _shape(rng, case)
    wrong, huge = rng.random() < 0.35, False
    options, ordinary = {}, True
    for option, (good, bad) in OPTIONS.get(op, {}).items():
        if rng.random() < 0.5:
            spoil = wrong and bad and rng.random() < 0.3
            options[option] = _pick(rng, bad if spoil else good)
            ordinary &= not spoil
    made = case.make(shape, dtype=dtype)(int(rng.integers(2**20)))
    inputs: list[Any] = [None if t is None else _laid_out(rng, t.detach()) for t in made]
    for i, t in enumerate(inputs):
        if t is not None and rng.random() < 0.15 and i not in case.batched:
            inputs[i] = t.to(_pick(rng, FLOATS))
    spoiled = wrong and ordinary
    if spoiled:
        i = _pick(rng, [i for i, t in enumerate(inputs) if t is not None])
        inputs[i] = _spoiled(rng, inputs[i], op == "max_unpool2x2")
    elif ordinary and rng.random() < 0.1:
        inputs = [None if t is None else t.to("meta") for t in inputs]
        if huge := op != "statistics_distances" and shape[0] and rng.random() < 0.5:
            grown = {
                i: t[:1].expand(2**28, *t.shape[1:])
                for i, t in enumerate(inputs)
                if i in case.batched and t is not None
            }
            inputs = [grown.get(i, t) for i, t in enumerate(inputs)]
    needs = [i in case.needs_grad and rng.random() < 0.7 for i in range(len(inputs))]
    inputs = [
        t.detach().requires_grad_(need) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) else t
        for t, need in zip(inputs, needs, strict=True)
    ]
    backend = _pick(rng, (None, "reference", "cpu", None, "reference", "cpu", *(["triton"] * INTERPRETED)))
    if backend == "triton" and rng.random() < 0.8:
        backend = "reference"
    described = [
        f"{str(t.dtype)[6:]}{list(t.shape)} strides {t.stride() if t.layout == torch.strided else t.layout} "
        f"{t.device.type}{' grad' * t.requires_grad}" if isinstance(t, Tensor) else repr(t)
        for t in inputs
    ]  # fmt: skip
    text = f"{name}, backend {backend}, {options}: {'; '.join(described)}"
    dense = [isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta for t in inputs]
    before = [(t.clone(), t._version) if kept else None for t, kept in zip(inputs, dense, strict=True)]
    try:
        with case.tiling():
            found, gradients = _evaluate(partial(case.function, **options, backend=backend), inputs)
    except Exception as error:
        if isinstance(error, UnsupportedError) or "does not implement" in str(error):
            return op, "not supported by the backend", ""
        names = [*inspect.signature(getattr(ops, op)).parameters, "mean", "var", *LIMITS]
        clear = type(error) in (ValueError, TypeError) and any(each in str(error) for each in names)
        if not clear or (not spoiled and ordinary and not any(each in str(error) for each in LIMITS)):
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            return op, "lost", f"{type(error).__name__}: {str(error)[:300]} ({place}); {text}"
        return op, "refused with a reason", ""
    try:
        for t, kept in zip(inputs, before, strict=True):
            if kept is not None and (t._version != kept[1] or not torch.equal(t.nan_to_num(), kept[0].nan_to_num())):
                raise _Fault("an input was changed")
        if any(isinstance(t, Tensor) and t.dtype not in FLOATS for t in inputs):
            raise _Fault("a dtype is accepted that the op does not support")
        if huge:
            if not all(t.is_meta for t in found):
                raise _Fault("meta tensors give others")
        elif any(isinstance(t, Tensor) and t.is_meta for t in inputs):
            real = [None if t is None else torch.zeros(t.shape, dtype=t.dtype) for t in inputs]
            expected, _ = _evaluate(partial(case.function, **options, backend=backend), real)
            if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in expected]:
                raise _Fault("meta tensors give another shape or dtype")
        elif ordinary:
            exact = [
                None if t is None else t.detach().double().contiguous().requires_grad_(t.requires_grad) for t in inputs
            ]
            values, slopes = _evaluate(partial(case.function, **options, backend="reference"), exact)
            coarse = max((t.dtype for t in inputs if t is not None), key=lambda each: TOLERANCE[each])
            _compare(found, values, "output", coarse)
            _compare(gradients, slopes, "gradient", coarse)
    except _Fault as fault:
        return op, "lost", f"{fault}; {text}"
    return op, "equal to float64", ""


def _batch(seeds: Sequence[int], seconds: float, path: Path) -> None:
    """Run inputs in a forked process; write each one's number before, and its outcome after it."""
    end = time.monotonic() + seconds
    with path.open("w", buffering=1) as file:
        for i in range(BATCH):
            file.write(json.dumps([i]) + "\n")
            file.write(json.dumps(_one(np.random.default_rng([*seeds, i]))) + "\n")
            if time.monotonic() > end:
                return


def run(tally: Tally) -> None:
    """Run batches of inputs until the time is over."""
    path = tally.folder / "outcomes"
    for _ in tally.cases():
        path.write_text("")
        process = os.fork()
        if process == 0:
            code = 1
            try:
                _batch((tally.seed, tally.index), max(tally.left(), 5.0), path)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        size, moved, status = 0, time.monotonic(), None
        while status is None:
            time.sleep(0.02)
            ended, code = os.waitpid(process, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
            elif (now := path.stat().st_size) != size:
                size, moved = now, time.monotonic()
            elif time.monotonic() > moved + HANG_S:
                os.kill(process, signal.SIGKILL)
                status = -os.waitpid(process, 0)[1]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if len(row) == 3:
                op, outcome, reason = row
                tally.lose(op, reason) if outcome == "lost" else tally.count(op, outcome)
        if status:
            tally.lose("process", f"input {rows[-1] if rows else None} ended the process with status {status}")
