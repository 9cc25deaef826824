"""Injects NaN and infinities into the steps of distillation runs and of training.

A fault must end the run with an error that names the step. Only finite values may be written, and a resumed run must
end with the weights and losses of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from dfkd_fast import report
from dfkd_fast.config import recipe
from dfkd_fast.engine import engines, loop, networks, training
from dfkd_fast.objectives import PRESETS

from .. import tiny
from ..engine.faults import CALLS, TENSORS, Fault
from ..engine.replay import ReplayRecorder
from .harness import Tally, digest

FP16 = ("gradient in fp16", "loss scale in fp16")
KINDS = (*CALLS, "gradient", *TENSORS, "compiled engine", "graph engine", *FP16, "teach")
STEP = re.compile(r"round (\d+), (\w*) ?step (\d+): \S.* not finite")


def _run(folder: Path, preset: str, engine: str, precision: Any, resume: bool = False) -> str:
    """A digest of the final weights and losses of a run."""
    changes: Any = {"engine": engine, "precision": precision, "resume": resume, "rounds_per_epoch": 1, "epochs": 3}
    config = tiny.config(folder, **tiny.method(preset), batch_size=4, **changes)
    result = tiny.distill(tiny.teacher(), tiny.network(), config, progress=False)
    return digest([dict(result.student.state_dict()), dict(result.generator.state_dict()), result.rounds])


def _broken_files(folder: Path) -> list[str]:
    """The files with values that are not finite."""
    contents: dict[str, Any] = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    contents |= {path.name: torch.load(path, weights_only=True) for path in folder.glob("checkpoints/*.pt")}
    losses = tree_leaves(json.loads((folder / "history.json").read_text()).get("rounds"))
    contents["history.json"] = torch.tensor([math.nan if loss is None else loss for loss in losses])
    tensors = {name: [t for t in tree_leaves(each) if isinstance(t, Tensor)] for name, each in contents.items()}
    return [name for name, each in tensors.items() if not all(t.isfinite().all() for t in each)]


def _distill(fault: Fault, folder: Path, variant: tuple[str, str, str], undisturbed: Any) -> str:
    error, weights, original = "", "", engines.Engine._take
    with mock.patch.object(engines.Engine, "_take", lambda engine, kind: fault.take(original, engine, kind)):
        try:
            weights = _run(folder, *variant)
        except ArithmeticError as stopped:
            error = str(stopped)
    found = STEP.search(error)
    named = (int(found[1]), int(found[3]) + 2 * (found[2] == "student")) if found else (-1, -1)
    broken = _broken_files(folder)
    assert not broken, f"values in {', '.join(broken)} are not finite: {error}"
    if not error and weights == undisturbed(*variant):
        return "no effect: the step does not read the value" if fault.hit else "no effect: not computed in this step"
    if not error and (fault.place == FP16[0] or (fault.value < 0 and fault.hit == "output 0")):
        return "tolerated, weights finite: " + ("fp16 skips the step" if fault.place in FP16 else "-inf masks a class")
    assert fault.at <= named <= (fault.at[0] + 1, 4), f"the error does not name the step: {error}"
    assert not (folder / "student.safetensors").exists(), f"there is a student after {error}"
    assert _run(folder, *variant, resume=True) == undisturbed(*variant), f"the resumed run differs: {error}"
    return "stopped by name; resumed, equal"


def _teach(fault: Fault, folder: Path) -> str:
    model, count = tiny.network(), itertools.count()

    def hook(*_: Any) -> None:
        if next(count) == fault.at[1]:
            gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
            fault.poison_one({**dict(model.named_parameters()), **dict(model.named_buffers()), **gradients})

    handle = register_optimizer_step_pre_hook(hook)
    message = ""
    try:
        tiny.teach(folder, model, epochs=2)
    except ArithmeticError as error:
        message = str(error)
    finally:
        handle.remove()
    assert "epoch" in message, f"the error does not name the epoch: {message}"
    assert not list(folder.glob("*.safetensors")), "there are weights after an error"
    return "stopped by name"


def run(tally: Tally) -> None:
    """Inject one value per case, in turn over the places and, more slowly, over presets and precisions."""
    logging.getLogger("dfkd_fast").setLevel(logging.ERROR)
    online = [name for name in PRESETS if recipe(name).synthesis.name in ("online", "momentum")]
    variants = list(itertools.product(("fp32", "bf16"), online))
    undisturbed = cache(lambda *variant: _run(tally.folder / "-".join(variant), *variant))
    compiled = partial(engines.CompiledEngine, backend="eager")  # compiles in a second
    graph = lambda s: engines.GraphEngine(s, networks.eager_networks(s), recorder=ReplayRecorder())  # noqa: E731
    with (
        mock.patch.dict(engines._ENGINES, compiled=compiled, graph=graph),
        mock.patch.multiple(report, save_curves=mock.DEFAULT, save_image_grid=mock.DEFAULT),  # drawing is slow
        mock.patch.object(loop, "Trackers"),
        mock.patch.object(training, "Trackers"),
    ):
        for kind, rng in tally.turns(KINDS):
            precision, preset = variants[int(rng.integers(len(variants)))]
            places, engine = {"c": (*TENSORS, *CALLS), "g": TENSORS}.get(kind[0]), kind.split()[0]
            places, engine = (places, engine) if kind.endswith("engine") else ([kind], "eager")
            fault, folder = Fault(str(rng.choice(places)), rng), tally.folder / str(tally.index)
            variant = (preset, engine, "fp16" if kind in FP16 else precision)
            try:
                taught = kind == "teach" and _teach(fault, folder)
                tally.count(kind, taught or _distill(fault, folder, variant, undisturbed))
            except AssertionError as error:
                tally.lose(kind, f"{error}: {vars(fault)}, {variant}")
