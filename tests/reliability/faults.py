"""Injects errors of the operating system into tiny runs and commands.

A run with a fault ends with the same result as one without, or with one clear error. After an error all files are
readable, no partial file is left, and a second run without the fault gives the undisturbed result, bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfkd_fast import report
from dfkd_fast.config import ModelConfig
from dfkd_fast.engine import export
from dfkd_fast.models import create_model, load_weights, save_weights
from tests import tiny
from tests.data import trees

from ..engine.system_faults import CALLS, DISKS, LIMITS, SPACE, failing, strace
from .harness import Lost, Tally, command, empty, forked, snapshot

HALF: dict[str, Any] = {"rounds_per_epoch": 1, "generator_steps": 1, "student_steps": 1, "epochs": 1}
HALF["optimizer"] = tiny.OptimizerConfig(student_lr=0.05, student_schedule="constant")
WHOLE = HALF | {"epochs": 2}
RUN = Path("run")
EVALUATE = "evaluate --weights in/w.safetensors --data.name folder --data.root in --device cpu --data.workers"


def _evaluate(workers: int) -> str:
    output = command([*EVALUATE.split(), str(workers)])
    return "\n".join(line for line in output.splitlines() if "images/s" not in line and ", ms" not in line)


def _files() -> None:
    save_weights(tiny.network(), RUN / "w.safetensors")
    load_weights(tiny.network(), RUN / "w.safetensors")
    report.read_results(report.write_results(RUN / "r.json", {"values": [0.5] * 2000}))
    report.save_image_grid(torch.zeros(4, 3, 32, 32), RUN / "grid.png")
    report.save_curves({"round": [0, 1], "kd": [1.0, 2.0]}, {}, RUN / "curves.png")


# They use the folders "in" and "run", and can be repeated after a fault.
ACTIONS: dict[str, Callable[[], Any]] = {
    "distill": partial(tiny.run, RUN, resume=True, **WHOLE),
    "resume": partial(tiny.run, RUN, resume=True, **WHOLE),
    "teach": partial(tiny.teach, RUN, resume=True),
    "evaluate": partial(_evaluate, 0),
    "evaluate with workers": partial(_evaluate, 2),
    "files": _files,
    "export": lambda: export(tiny.network(), RUN, image_size=tiny.SIZE),
}


def check(fault: str, error: Exception) -> None:
    """Raise an error if ``error`` is unclear, or files are torn. Without memory, other libraries raise errors."""
    text = str(error)
    if "memory" not in fault and "ENOMEM" not in fault:
        assert type(error) not in (RuntimeError, MemoryError), f"an error of another library: {error!r}"
        named = "clone" in fault or any(name in text for name in ("run", "in/", "worker processes"))
        assert named, f"an error without a path: {error!r}"
        assert len(text.splitlines()) == 1, f"more than one line: {error!r}"
    left = [] if "unlink" in fault else list(RUN.rglob("*.partial"))
    assert not left, f"temporary files are left: {left}"
    snapshot(RUN)


def results(action: str, output: Any) -> dict[str, Any]:
    """The output of an action and the files of the run; for logs and settings, which contain times, their names."""
    fixed = (".safetensors", ".json", ".onnx", ".png", ".pt")
    files = {path: content if path.endswith(fixed) else "" for path, content in snapshot(RUN).items()}
    return {**files, "output": output if action.startswith("evaluate") else None}


def attempt(action: str, fault: str, at: float, log: str) -> tuple[str, Any]:
    """Run an action with a fault. Return how it ends, and the output of a command."""
    try:
        with failing(fault, log, at) if fault in CALLS else (LIMITS | DISKS)[fault](at):
            output = ACTIONS[action]()
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        check(fault, error)
        return "clear error, then the undisturbed result", None
    return "undisturbed result", output if action.startswith("evaluate") else None


def survive(inputs: Path, action: str, fault: str, at: float, undisturbed: tuple[dict[str, Any], str]) -> str:
    """Run an action with a fault and return how it ends. Raises AssertionError if something is lost."""
    prepare(inputs, action)
    expected, log = undisturbed
    checkpoints = set(RUN.rglob("*.pt"))
    try:
        ((outcome, output),) = forked(lambda send: send(attempt(action, fault, at, log)), seconds=50)
    except Lost as error:
        if "crashed" not in str(error) or "ENOMEM" not in fault:
            raise
        outcome = "crash of CPython, then the undisturbed result"
    if outcome != "undisturbed result":
        assert not checkpoints or checkpoints & set(RUN.rglob("*.pt")), "all checkpoints are lost"
        output = ACTIONS[action]()
    found = results(action, output)
    differ = [name for name in {**found, **expected} if found.get(name, "none") != expected.get(name, "none")]
    assert not differ, f"{action}: {outcome}: these differ: {differ}"
    return outcome


def prepare(inputs: Path, action: str) -> None:
    """Create a working folder with the inputs of an action."""
    os.chdir(empty(inputs / "case"))
    shutil.copytree(inputs / "in", "in")
    if action == "resume":
        shutil.copytree(inputs / "half", RUN)


def undisturbed(inputs: Path, action: str) -> tuple[dict[str, Any], str]:
    """The results of an action, and the log of its system calls."""
    prepare(inputs, action)
    ACTIONS[action]()  # imports modules
    prepare(inputs, action)
    log = inputs / "log"
    log.touch()
    with strace(",".join(fault.split()[0] for fault in CALLS), "-f", "-o", str(log)):
        output = ACTIONS[action]()
    return results(action, output), log.read_text(errors="replace")


def run(tally: Tally) -> None:
    """Run every action with every fault."""
    mount = ["mount", "-t", "tmpfs", "-o", SPACE, "none", str(tally.folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    faults = [*LIMITS, *(DISKS if mounted else ()), *(CALLS if shutil.which("strace") else ())]
    for fault in {*DISKS, *CALLS} - {*faults}:
        tally.skip(fault, "needs the right to mount" if fault in DISKS else "strace is not installed")
    plan = list(itertools.product(faults, ACTIONS))
    random.Random(tally.seed).shuffle(plan)
    try:
        trees.folder_tree(tally.folder / "in")
        model = ModelConfig(name="resnet8", options={"widths": [4, 4, 6, 8]})
        network, metadata = create_model(model, num_classes=2), {"image_size": "16", **model.metadata()}
        save_weights(network, tally.folder / "in" / "w.safetensors", metadata)
        tiny.run(tally.folder / "half", **HALF)
        results_of = functools.cache(partial(undisturbed, tally.folder))
        for (fault, action), rng in tally.turns(plan):
            tally.judge(fault, partial(survive, tally.folder, action, fault, rng.random(), results_of(action)))
    finally:
        os.chdir("/")
        if mounted:
            subprocess.run(["umount", "-l", str(tally.folder)], check=True)
