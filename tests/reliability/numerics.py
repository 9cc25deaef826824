"""Compares each op with its definition in float64 at the edges of its dtypes, forward and backward, on every backend.

The error may be a few times that of plain PyTorch in the dtype in which the op computes, on inputs nearby. A result is
infinite or NaN only if the true result, or an intermediate value of the definition, is too large for that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_fast.ops.backend import UnsupportedError, backends

from ..ops.definitions import DEFINITIONS, results, truth_and_errors
from ..ops.table import CASES
from .harness import Tally

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = {2: ((1, 1), (1, 5), (4, 1)), 3: ((1, 1, 1), (1, 3, 5)), 4: ((2, 1, 3, 2), (1, 5, 2, 2), (3, 4, 4, 3))}
EDGES: dict[str, Callable[[Tensor, Any], Tensor]] = {  # of x, about normally distributed
    "plain": lambda x, info: x,
    "denormal": lambda x, info: x * info.tiny / 16,
    "tiny": lambda x, info: x * info.tiny * 16,
    "small": lambda x, info: x * info.tiny**0.5,
    "large": lambda x, info: x * info.max**0.5,
    "huge": lambda x, info: x * info.max / 8,
    "largest": lambda x, info: x.sign() * info.max,
    "zero": lambda x, info: x * 0,  # of both signs
    "ties": lambda x, info: x.round(),
    "equal": lambda x, info: torch.ones_like(x),
    "offset": lambda x, info: 1e4 + x * 1e-2,
    "eps": lambda x, info: 1 + (4 * x).round() * info.eps,
    "mixed": lambda x, info: x * 10.0 ** torch.linspace(-6, 4, x.numel(), dtype=x.dtype).view(x.shape),
    "one large": lambda x, info: x * torch.where(x == x.max(), 1e4, 1.0),
    "masked": lambda x, info: torch.where(torch.arange(x.shape[-1]) % 3 == 1, -math.inf, x),  # only logits
}
KINDS = [op for op in DEFINITIONS if "," not in op]
IN_DTYPE = ("spatial_attention", "high_order", "batch_norm_act")  # matrix products and F.batch_norm in the dtype of x
ROUNDED = ("contrastive_loss", "batchnorm_statistics")  # gradients are sums of values rounded to the dtype
EXACT = ("max_pool2x2", "max_unpool2x2")


def _inputs(case: Any, op: str, dtype: torch.dtype, rng: np.random.Generator) -> tuple[list[Any], list[str]]:
    """Inputs of a random shape with an edge in one tensor or in all, and their descriptions."""
    shapes = (*case.shapes, *SHAPES[len(case.shapes[0])])
    inputs = case.make(shapes[rng.integers(len(shapes))], needs_grad=case.needs_grad)(int(rng.integers(1 << 20)))
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)  # the definition must not overflow
    edge = str(rng.choice(list(EDGES)[: None if op == "distillation_kl" else -1]))
    names = [edge if chosen else "plain" for chosen in rng.permutation(len(inputs)) < rng.choice([1, 10])]
    for i, (x, name) in enumerate(zip(inputs, names, strict=True)):
        if x is not None:
            value = EDGES[name](x.detach().double(), info).clamp(None if name == "masked" else -info.max, info.max)
            inputs[i] = value.to(dtype).requires_grad_(x.requires_grad)
    return inputs, [f"{name} {tuple(x.shape)}" for name, x in zip(names, inputs, strict=True) if x is not None]


def _noise(op: str, inputs: list[Any], temperature: float) -> tuple[float, float]:
    """Rounding errors of outputs and of gradients, in units of eps, from softmaxes and from unit vectors."""
    if op == "distillation_kl":
        return temperature**2, temperature
    if op == "contrastive_loss":
        lengths = torch.cat([t.detach().double() for t in inputs]).norm(dim=1)
        shortest = float(lengths[lengths > 0].min()) if lengths.any() else 1.0
        return 1 / temperature, 1 / (shortest * temperature)
    return 0.0, 0.0


def _verdict(found: Tensor, truth: Tensor, error: Tensor, noise: float, rounded: bool) -> str:
    """Whether a result is wrong. ``error`` is that of plain PyTorch, not finite where its result is not."""
    info, a = torch.finfo(found.dtype), found.double()
    inside = truth.abs() <= info.max * (1 - 8 * info.eps)
    known = inside & error.isfinite()
    bound = 8 * info.eps * (truth.abs() + info.tiny) + noise
    if known.any():
        bound = bound + 8 * error[known].max() + rounded * info.eps * truth[known].abs().max()
    wrong = inside & ~torch.where(known, (a - truth).abs() <= bound, a.isfinite())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        return f"wrong at {at}: {a[at].item()!r}, expected {truth[at].item()!r} within {bound[at].item():.2e}"
    return "within the bound" if inside.all() else "overflow as in the definition"


def _case(tally: Tally, op: str, rng: np.random.Generator) -> None:
    name = str(rng.choice([name for name in CASES if name.split(",")[0] == op]))
    case, dtype = CASES[name], DTYPES[rng.integers(len(DTYPES))]
    inputs, described = _inputs(case, op, dtype, rng)
    options = dict(getattr(case.function, "keywords", {}))
    if op in ("distillation_kl", "contrastive_loss"):
        options["temperature"] = float(rng.choice([0.5, 10 ** rng.uniform(-3, 4)]))
    definition = partial(DEFINITIONS.get(name, DEFINITIONS[op]), **options)
    compute = dtype if op.startswith(IN_DTYPE) or name in DEFINITIONS else torch.promote_types(dtype, torch.float32)
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    tiny = 16 * info.tiny * (op not in EXACT)
    floors = [8 * info.eps * each + tiny for each in _noise(op, inputs, options.get("temperature", 1.0))]
    denormal = any(t is not None and ((t != 0) & (t.abs() < torch.finfo(dtype).tiny)).any() for t in inputs)
    torch.manual_seed(int(rng.integers(1 << 30)))
    grads: list[Tensor] = []
    expected: Any = None
    for backend in backends()[op]:
        if backend == "triton" and dtype == torch.bfloat16 and denormal:
            tally.skip("bfloat16 denormals in Triton kernels", "Triton's interpreter converts them to other values")
            continue
        try:
            with case.tiling():
                found = results(partial(case.function, backend=backend, **options), inputs, grads)
        except UnsupportedError:
            continue
        truth, errors, overflow = expected = expected or truth_and_errors(definition, inputs, grads, compute)
        noises = [floors[i >= len(grads)] for i in range(len(found))]
        verdicts = [_verdict(*each, op in ROUNDED) for each in zip(found, truth, errors, noises, strict=True)]
        wrong = [f"result {i} is {each}" for i, each in enumerate(verdicts) if each.startswith("wrong")]
        if wrong and not overflow:
            where = f"{name}, {backend}, {dtype}, {', '.join(described)}, {options}"
            tally.lose(op, f"{where}: {wrong[0]} ({len(grads)} outputs, then gradients)")
        else:
            tally.count(op, "an intermediate value overflows, as in the definition" if wrong else min(verdicts))


def run(tally: Tally) -> None:
    """Run one op per case with a random edge, dtype, shape and options, on all backends."""
    with np.errstate(all="ignore"):  # Triton's interpreter
        for op, rng in tally.turns(KINDS):
            _case(tally, op, rng)
