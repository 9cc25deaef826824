"""Times every drop-in of ``dfkd_fast.compat`` and its original: forward and backward in eager mode, with launches.

Drop-in and original alternate on the same sets of inputs. The sets rotate, so that no input is in the L2 cache. The
original is the library's code, or a definition in plain PyTorch (:mod:`~dfkd_fast.benchmarks.ops.originals`) if the
project is on no package index. Losses of student and teacher compute the student's gradient; losses of two views, both.

    python -m dfkd_fast.benchmarks.ops.drop_ins --out drop_ins.json
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from dfkd_fast.benchmarks.ops import originals
from dfkd_fast.benchmarks.results import Results, dtype_name, measured_on, parser
from dfkd_fast.compat import cpsc, datafree, deepinversion, lightly, mdistiller, metric_learning, repdistiller
from dfkd_fast.compat import torchdistill as td
from dfkd_fast.report import markdown_table

__all__ = ["KEY", "DropIn", "compare", "drop_ins", "drop_ins_section", "main"]

KEY = ("drop_in", "shape", "dtype")

Loss = Callable[..., Tensor]
Shapes = tuple[tuple[int, ...], ...]
Table = dict[str, tuple[Loss, Loss]]

LOGITS: Shapes = ((256, 100), (64, 200))
FEATURES: Shapes = ((256, 512), (64, 128))
MAPS: Shapes = ((256, 32, 32, 32), (256, 64, 16, 16), (256, 128, 8, 8))  # the stages of WRN-40-2 at 32 x 32
IMAGES: Shapes = ((256, 3, 32, 32),)

_LIBRARIES = {"lightly": "lightly", "metric_learning": "pytorch-metric-learning", "torchdistill": "torchdistill"}


@dataclass(frozen=True, kw_only=True)
class DropIn:
    """A drop-in and its original.

    Each of ``shapes`` is one comparison, in which the loss gets ``inputs`` inputs of this shape. The first ``trained``
    require a gradient. With ``together``, one call gets the inputs of all shapes, as for maps of several stages.
    """

    name: str
    loss: Loss
    original: Loss
    shapes: Shapes
    inputs: int = 2
    trained: int = 1
    together: bool = False

    @property
    def source(self) -> str:
        """The origin of the original: a library with its version, or a definition in plain PyTorch."""
        library = _library(self.name)
        return f"{library} {importlib.metadata.version(library)}" if library else "plain PyTorch"


def _library(name: str) -> str | None:
    """The library of a drop-in, if it is installed."""
    library = _LIBRARIES.get(name.partition(".")[0])
    return library if library and importlib.util.find_spec(library.replace("-", "_")) else None


# Adapters to the signature (student, teacher), (view, view) or (*student maps, *teacher maps).


def _stacked(loss: Loss) -> Loss:
    """Stack two views into the (N, 2, dim) of SupConLoss, normalized, and average a result per anchor."""
    return lambda a, b: loss(torch.stack([F.normalize(a), F.normalize(b)], 1)).mean()


def _sum(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _pairs(distance: Loss) -> Loss:
    """Sum a distance of maps over stages."""
    return lambda *maps: _sum(map(distance, maps[: len(MAPS)], maps[len(MAPS) :]))


def _kd_loss(kind: Any) -> Loss:
    side = ("fc", "output")
    loss = kind(*side, *side, temperature=4.0, alpha=0.0)
    return lambda s, t: loss({"fc": {"output": s}}, {"fc": {"output": t}}, None)


def _at_loss(kind: Any) -> Loss:
    names = [f"block{stage}" for stage in range(len(MAPS))]
    path = {name: {side: {"path": name, "io": "output"} for side in ("student", "teacher")} for name in names}
    loss = kind(path, "code")

    def call(*maps: Tensor) -> Tensor:
        sides = (maps[: len(MAPS)], maps[len(MAPS) :])
        return loss(*({n: {"output": x} for n, x in zip(names, side, strict=True)} for side in sides))

    return call


def _hooked(kind: Any, device: torch.device) -> Loss:
    """Run a frozen BatchNorm with a hook on each map and sum the hooks' distances."""
    norms = [nn.BatchNorm2d(shape[1]).to(device).eval().requires_grad_(False) for shape in MAPS]
    hooks = [kind(norm) for norm in norms]

    def loss(*maps: Tensor) -> Tensor:
        for norm, x in zip(norms, maps, strict=True):
            norm(x)
        return _sum(hook.r_feature for hook in hooks)

    return loss


def _logits() -> Table:
    """Losses of the logits of student and teacher: drop-in and original by name."""
    kl, js = (partial(f, temperature=4.0) for f in (originals.kldiv, originals.jsdiv))
    found: Table = {
        "datafree.kldiv": (partial(datafree.kldiv, T=4.0), kl),
        "datafree.kldiv, both gradients": (partial(datafree.kldiv, T=4.0), kl),
        "datafree.KLDiv": (datafree.KLDiv(T=4.0), kl),
        "datafree.jsdiv": (partial(datafree.jsdiv, T=4.0), js),
        "cpsc.kdloss": (cpsc.kdloss, originals.kldiv),
        "repdistiller.DistillKL": (repdistiller.DistillKL(4.0), kl),
        "mdistiller.kd_loss": (partial(mdistiller.kd_loss, temperature=4.0), kl),
    }
    if _library("torchdistill.KDLoss"):
        from torchdistill.losses.mid_level import KDLoss

        found["torchdistill.KDLoss"] = _kd_loss(td.KDLoss), _kd_loss(KDLoss)
    return found


def _features() -> Table:
    """Losses of the features of two views."""
    found: Table = {}
    for name, kind in (("datafree.ContrastLoss", datafree.ContrastLoss), ("cpsc.SupConLoss", cpsc.SupConLoss)):
        for mode in ("all", "one"):
            original = partial(originals.contrast_loss, mode=mode)
            found[f"{name}, {mode}"] = _stacked(kind(contrast_mode=mode)), _stacked(original)
    if _library("lightly.NTXentLoss"):
        from lightly.loss.ntx_ent_loss import NTXentLoss

        found["lightly.NTXentLoss"] = lightly.NTXentLoss(), NTXentLoss()
    if _library("metric_learning.SelfSupervisedLoss"):
        from pytorch_metric_learning import losses

        for name in ("NTXentLoss", "SupConLoss"):
            loss, original = (m.SelfSupervisedLoss(getattr(m, name)()) for m in (metric_learning, losses))
            found[f"metric_learning.SelfSupervisedLoss, {name}"] = loss, original
    return found


def _maps() -> Table:
    """Losses of the stages of student and teacher."""
    attention, transfer, half = repdistiller.Attention(), _pairs(originals.attention_transfer), len(MAPS)
    found: Table = {
        "repdistiller.Attention": (lambda *maps: _sum(attention(maps[:half], maps[half:])), transfer),
        "mdistiller.at_loss": (lambda *m: torch.as_tensor(mdistiller.at_loss(m[:half], m[half:], 2)), transfer),
        "mdistiller.single_stage_at_loss": (_pairs(partial(mdistiller.single_stage_at_loss, p=2)), transfer),
    }
    if _library("torchdistill.ATLoss"):
        from torchdistill.losses.mid_level import ATLoss

        found["torchdistill.ATLoss"] = _at_loss(td.ATLoss), _at_loss(ATLoss)
    return found


def _hooks(device: torch.device) -> Table:
    """Hooks on BatchNorms."""
    hooks = {
        "datafree.DeepInversionHook": datafree.DeepInversionHook,
        "deepinversion.DeepInversionFeatureHook": deepinversion.DeepInversionFeatureHook,
        "cpsc.DeepInversionFeatureHook": cpsc.DeepInversionFeatureHook,
    }
    return {name: (_hooked(kind, device), _hooked(originals.DeepInversionHook, device)) for name, kind in hooks.items()}


def _images() -> Table:
    """Losses of images."""
    return {
        "datafree.get_image_prior_losses": (datafree.get_image_prior_losses, originals.absolute_variation),
        "deepinversion.get_image_prior_losses": (
            *(lambda x: _sum(deepinversion.get_image_prior_losses(x)), originals.image_prior),
        ),
    }


def drop_ins(device: torch.device) -> Iterator[DropIn]:
    """Yield every comparison that the installed libraries allow."""
    groups: list[tuple[Table, dict[str, Any]]] = [
        (_logits(), {"shapes": LOGITS}),
        (_features(), {"shapes": FEATURES, "trained": 2}),
        (_hooks(device), {"shapes": MAPS, "inputs": 1, "together": True}),
        (_maps(), {"shapes": MAPS, "together": True}),
        (_images(), {"shapes": IMAGES, "inputs": 1}),
    ]
    for table, more in groups:
        for name, (loss, original) in table.items():
            both: dict[str, Any] = {"trained": 2} if name.endswith("both gradients") else {}
            yield DropIn(name=name, loss=loss, original=original, **more, **both)


def _step(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return a loss and its gradients."""
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad])


def compare(
    drop_in: DropIn,
    shapes: Shapes,
    device: torch.device,
    dtype: torch.dtype,
    *,
    turns: int = 5,
    seconds: float = 0.05,
) -> dict[str, Any]:
    """Time a drop-in and its original in ``turns`` turns of ``seconds`` each. Every other turn starts with the drop-in.

    Returns:
        ``ours_us`` and ``original_us``, medians over turns; ``ratios`` of original to ours by turn; ``difference``, the
        largest relative difference of the value and the gradients.
    """

    def inputs() -> list[Tensor]:
        return [
            torch.randn(shape, device=device).to(dtype).requires_grad_(number < drop_in.trained)
            for number in range(drop_in.inputs)
            for shape in shapes
        ]

    losses = {"ours": drop_in.loss, "original": drop_in.original}
    first = inputs()
    results = [_step(loss, first) for loss in losses.values()]
    difference = max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-8))
        for a, b in zip(*results, strict=True)
    )
    del results
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = [first]
    while len(sets) < min(16, math.ceil(2 * cache / sum(x.nbytes for x in first))):
        sets.append(inputs())
    times: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(turns):
        for name in sorted(losses, reverse=bool(turn % 2)):
            names = {"step": _step, "loss": losses[name], "sets": itertools.cycle(sets)}
            timer = Timer("step(loss, next(sets))", globals=names, num_threads=torch.get_num_threads())
            times[name].append(1e6 * timer.blocked_autorange(min_run_time=seconds).median)
    return {
        "original": drop_in.source,
        "difference": difference,
        "ratios": [original / new for new, original in zip(times["ours"], times["original"], strict=True)],
        **{f"{name}_us": statistics.median(each) for name, each in times.items()},
    }


def drop_ins_section(content: dict[str, Any], folder: str) -> str:
    """Return one device's table for docs/swapping.md, from its ``drop_ins.json``."""
    table = [
        {
            "drop-in": row["drop_in"],
            "shape": row["shape"],
            "dtype": row["dtype"],
            "original, us": f"{row['original_us']:.1f}",
            "drop-in, us": f"{row['ours_us']:.1f}",
            "speed-up": f"{row['original_us'] / row['ours_us']:.2f} x "
            f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
            "original is": row["original"],
        }
        for row in content["rows"]
    ]
    slower = sum(max(row["ratios"]) < 1 for row in content["rows"])
    last = f"Slower in every turn: {slower} of {len(table)}. Measured on {measured_on(content)}."
    return "\n".join([f"### {folder}", "", *markdown_table(table), "", last])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare as many drop-ins as time allows. Returns 1 if a comparison failed."""
    command = parser(__doc__, small="batches of 4")
    command.add_argument("--seconds", type=float, default=math.inf, help="start no comparison after this")
    options = command.parse_args(arguments)

    device, start, failed = torch.device(options.device), time.monotonic(), False
    results = Results(options.out, key=KEY)
    quick: dict[str, Any] = {"turns": 2, "seconds": 0.0} if options.size == "small" else {}
    for dtype in (torch.float32, torch.bfloat16):
        for drop_in in drop_ins(device):
            for shapes in [drop_in.shapes] if drop_in.together else [(shape,) for shape in drop_in.shapes]:
                if time.monotonic() - start > options.seconds:
                    return int(failed)
                if quick:
                    shapes = tuple((4, *shape[1:]) for shape in shapes)
                name = ", ".join("x".join(map(str, shape)) for shape in shapes)
                key = {"drop_in": drop_in.name, "shape": name, "dtype": dtype_name(dtype)}
                torch.manual_seed(0)
                try:
                    row = compare(drop_in, shapes, device, dtype, **quick)
                except Exception as error:  # the other comparisons continue
                    failed |= dtype == torch.float32  # some originals do not support bfloat16
                    print(f"{' '.join(key.values())}: {type(error).__name__}: {error}", flush=True)
                    continue
                results.add({**key, **row})
                print(" ".join(key.values()), f"{row['original_us']:.5g} us, drop-in {row['ours_us']:.5g}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
