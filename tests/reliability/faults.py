"""Injects errors of the operating system into tiny runs and commands.

A disturbed run must end with the same result as an undisturbed one, or with one clear error. After an error no partial
file is left, all files are readable, and a second run without the fault gives the undisturbed result, bit for bit.
strace makes single system calls fail, also those of C++ and Rust code. Full and read-only disks are real ones (tmpfs).
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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

from .harness import Tally, command, empty, snapshot

HALF: dict[str, Any] = {"rounds_per_epoch": 1, "generator_steps": 1, "student_steps": 1, "epochs": 1}
HALF["optimizer"] = tiny.OptimizerConfig(student_lr=0.05, student_schedule="constant")
WHOLE = HALF | {"epochs": 2}
RUN, SPACE = Path("run"), "size=200m"
EVALUATE = "evaluate --weights in/w.safetensors --data.name folder --data.root in --device cpu --data.workers"


def _evaluate(workers: int, again: bool) -> str:
    output = command([*EVALUATE.split(), str(workers)])
    return "\n".join(line for line in output.splitlines() if "images/s" not in line)


def _files(again: bool) -> None:
    save_weights(tiny.network(), RUN / "w.safetensors")
    load_weights(tiny.network(), RUN / "w.safetensors")
    report.read_results(report.write_results(RUN / "r.json", {"values": [0.5] * 2000}))
    report.save_image_grid(torch.zeros(4, 3, 32, 32), RUN / "grid.png")
    report.save_curves({"round": [0, 1], "kd": [1.0, 2.0]}, {}, RUN / "curves.png")


# The argument says whether it is the second run, after the fault. All use the folders "in" and "run".
ACTIONS: dict[str, Callable[[bool], Any]] = {
    "distill": lambda again: tiny.run(RUN, resume=again, **WHOLE),
    "resume": lambda again: tiny.run(RUN, resume=True, **WHOLE),
    "teach": lambda again: tiny.teach(RUN),
    "evaluate": partial(_evaluate, 0),
    "evaluate with workers": partial(_evaluate, 2),
    "files": _files,
    "export": lambda again: export(tiny.network(), RUN, image_size=tiny.SIZE),
}


@contextmanager
def strace(calls: str, *options: str) -> Iterator[None]:
    """Trace this process; ``-f`` also traces its threads and children."""
    command = ["strace", "-p", str(os.getpid()), "-o", "/dev/null", "--quiet=all", "-e", f"trace={calls}", *options]
    tracer = subprocess.Popen(command) if shutil.which("strace") else None
    while tracer and "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        assert tracer.poll() is None, "strace cannot attach"
    try:
        yield
    finally:
        if tracer:
            tracer.terminate()
            tracer.wait()


# System calls with their error. All later calls fail too if the last word is "+".
CALLS = (
    *("write ENOSPC +", "write EIO", "read,pread64 EIO", "openat EMFILE", "openat EACCES +", "fsync EIO +"),
    *("rename EIO", "mkdir ENOSPC +", "unlink EIO", "newfstatat EIO", "getdents64 EIO", "flock ENOLCK", "mmap ENOMEM"),
    *("clone,clone3 EAGAIN +", "read,write,openat,fsync,flock EINTR +3"),
)


def failing(fault: str, log: str, at: float) -> AbstractContextManager[None]:
    """Let the system call at this share of the undisturbed run's calls fail."""
    calls, error, *later = fault.split()
    number = 1 + int(at * sum(log.count(f" {call}(") for call in calls.split(",")))
    options = ["-e", f"inject={calls}:error={error}:when={number}{''.join(later)}"]
    if fault == "read,pread64 EIO":  # matplotlib draws other letters if it cannot read its fonts
        options += itertools.chain.from_iterable(("-P", str(path)) for path in Path.cwd().rglob("*"))
    # CPython before 3.13 waits forever for a new thread that has no memory.
    return strace(calls, *options, *([] if error == "ENOMEM" else ["-f"]))


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def _memory(at: float) -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(2e6 * at)


LIMITS: dict[str, Callable[[float], AbstractContextManager[Any]]] = {
    "limit of open files": lambda at: limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + int(8 * at)),
    "limit of memory": lambda at: limit(resource.RLIMIT_AS, _memory(at)),
    "limit of file sizes": lambda at: limit(resource.RLIMIT_FSIZE, int(80_000 * at**2)),
}


@contextmanager
def full_disk(at: float) -> Iterator[None]:
    """Leave the tmpfs of the working folder only some free blocks."""
    now, remount = os.statvfs("."), ["mount", "-o", "remount", str(Path.cwd().parent)]
    size = (now.f_blocks - now.f_bfree + int(100 * at**2)) * now.f_bsize
    subprocess.run([*remount, "-o", f"size={size}"], check=True)
    try:
        yield
    finally:
        subprocess.run([*remount, "-o", SPACE], check=True)


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


def survive(inputs: Path, action: str, fault: str, at: float, undisturbed: tuple[dict[str, Any], str]) -> str:
    """Run an action with a fault and return how it ends. Raises AssertionError if something is lost."""
    prepare(inputs, action)
    (expected, log), outcome = undisturbed, "undisturbed result"
    checkpoints = set(RUN.rglob("*.pt"))
    try:
        with failing(fault, log, at) if fault in CALLS else LIMITS[fault](at):
            output = ACTIONS[action](False)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        check(fault, error)
        assert not checkpoints or checkpoints & set(RUN.rglob("*.pt")), "all checkpoints are lost"
        outcome, output = "clear error, then the undisturbed result", ACTIONS[action](True)
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
    ACTIONS[action](False)  # imports modules
    prepare(inputs, action)
    log = inputs / "log"
    log.touch()
    with strace(",".join(fault.split()[0] for fault in CALLS), "-f", "-o", str(log)):
        output = ACTIONS[action](False)
    return results(action, output), log.read_text(errors="replace")


def run(tally: Tally) -> None:
    """Run every action with every fault."""
    mount = ["mount", "-t", "tmpfs", "-o", SPACE, "none", str(tally.folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if mounted:
        LIMITS["disk full"] = full_disk
    else:
        tally.skip("disk full", "needs the right to mount")
    faults = [*LIMITS, *(CALLS if shutil.which("strace") else ())]
    for fault in {*CALLS} - {*faults}:
        tally.skip(fault, "strace is not installed")
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
