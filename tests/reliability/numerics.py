"""Compares each op with its definition in float64 at the edges of its dtypes, forward and backward, on every backend.

The error may be a few times that of plain PyTorch in the dtype in which the op computes, on inputs nearby. A result is
infinite or NaN only if the true result, or an intermediate value of the definition, is too large for that dtype.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_fast.ops.backend import UnsupportedError, backends

from ..ops.definitions import DEFINITIONS, results, truth_and_errors
from ..ops.odd_inputs import edge_inputs
from ..ops.table import CASES
from .harness import Tally

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KINDS = [op for op in DEFINITIONS if "," not in op]
IN_DTYPE = ("spatial_attention", "high_order", "batch_norm_act")  # matrix products and F.batch_norm in the dtype of x
ROUNDED = ("contrastive_loss", "batchnorm_statistics")  # gradients are sums of values rounded to the dtype


def _noise(op: str, inputs: list[Any], loss: Tensor, temperature: float) -> tuple[float, float]:
    """Rounding errors of outputs and of gradients, in units of eps of float32, from softmaxes and from unit vectors."""
    if op == "distillation_kl":  # its gradient contains the difference of the divergence and one logarithm
        return temperature**2, temperature + float(loss.abs().max()) / temperature
    if op == "contrastive_loss":
        lengths = torch.cat([t.detach().double() for t in inputs]).norm(dim=1)
        shortest = float(lengths[lengths > 0].min()) if lengths.any() else 1.0
        weights = max(1.0, torch.finfo(inputs[0].dtype).eps * 2**20)  # softmax weights are rounded to the dtype
        return 1 / temperature, weights / (shortest * temperature)
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
        word = "wrong" if (finite := wrong & a.isfinite()).any() else "infinite"
        at = tuple((finite if finite.any() else wrong).nonzero()[0].tolist())
        return f"{word} at {at}: {a[at].item()!r}, expected {truth[at].item()!r} within {bound[at].item():.2e}"
    return "within the bound" if inside.all() else "overflow as in the definition"


def _case(tally: Tally, op: str, rng: np.random.Generator) -> None:
    name = str(rng.choice([name for name in CASES if name.split(",")[0] == op]))
    case, dtype = CASES[name], DTYPES[rng.integers(len(DTYPES))]
    inputs, described = edge_inputs(case, op, dtype, rng)
    options = dict(getattr(case.function, "keywords", {}))
    if op in ("distillation_kl", "contrastive_loss"):
        options["temperature"] = float(rng.choice([0.5, 10 ** rng.uniform(-3, 4)]))
    definition = partial(DEFINITIONS.get(name, DEFINITIONS[op]), **options)
    compute = dtype if op.startswith(IN_DTYPE) or name in DEFINITIONS else torch.promote_types(dtype, torch.float32)
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    tiny = 16 * info.tiny * ("pool" not in op)
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
        truth, errors, largest = expected = expected or truth_and_errors(definition, inputs, grads, compute)
        value, slope = _noise(op, inputs, truth[0], options.get("temperature", 1.0))
        noises = [8 * info.eps * (value if i < len(grads) else slope) + tiny for i in range(len(found))]
        verdicts = [_verdict(*each, op in ROUNDED) for each in zip(found, truth, errors, noises, strict=True)]
        wrong = [f"result {i} is {each}" for i, each in enumerate(verdicts) if " at " in each]
        # Sums in another order can overflow before those of the definition.
        if wrong and largest < (1 if any("wrong" in each for each in wrong) else 1 / 64):
            where = f"{name}, {backend}, {dtype}, {', '.join(described)}, {options}"
            tally.lose(op, f"{where}: {wrong[0]} ({len(grads)} outputs, then gradients)")
        else:
            tally.count(op, "an intermediate value overflows, as in the definition" if wrong else min(verdicts))


def run(tally: Tally) -> None:
    """Run one op per case with a random edge, dtype, shape and options, on all backends."""
    with np.errstate(all="ignore"):  # Triton's interpreter
        for op, rng in tally.turns(KINDS):
            _case(tally, op, rng)
