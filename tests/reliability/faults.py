"""Injects errors of the operating system into tiny runs and commands.

A disturbed run must end with the same result as an undisturbed one, or with one clear error. After an error no partial
file is left, all files are readable, and a second run without the fault gives the undisturbed result, bit for bit.
strace makes single system calls fail, also those of C++ and Rust code. Full and read-only disks are real ones (tmpfs).
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from dfkd_fast import files, report
from dfkd_fast.cli import main
from dfkd_fast.config import ModelConfig, TeachConfig
from dfkd_fast.engine import export, teach
from dfkd_fast.files import zip_damage
from dfkd_fast.models import create_model, load_weights, read_metadata, save_weights
from tests import tiny
from tests.data import trees

from .harness import Tally

SHORT = {"epochs": 2, "rounds_per_epoch": 1, "generator_steps": 1, "student_steps": 1}
CONSTANT = tiny.OptimizerConfig(student_lr=0.05, student_schedule="constant")
RUN = Path("run")
META = {"image_size": "16"}


# Each of these actions writes to the folder "run" or reads from the folder "in", both in the working folder.


def _distill(again: bool) -> None:
    tiny.run(RUN, optimizer=CONSTANT, resume=again, **SHORT)


def _resume(again: bool) -> None:
    tiny.run(RUN, optimizer=CONSTANT, resume=True, **SHORT)


def _teach(again: bool) -> None:
    config = TeachConfig(epochs=1, batch_size=10, device="cpu", out=str(RUN))
    teach(tiny.network(), tiny.data(), config, progress=False)


_programs: list[Any] = []
_to_onnx = torch.onnx.export


def _kept_program(*arguments: Any, **options: Any) -> Any:
    """torch.onnx.export takes seconds, so it runs once."""
    if not _programs:
        _programs.append(_to_onnx(*arguments, **options))
    return _programs[0]


def _export(again: bool) -> None:
    with mock.patch("torch.onnx.export", _kept_program):
        export(tiny.network(), RUN, image_size=tiny.SIZE, metadata=META)


def _command(workers: int, again: bool) -> str:
    """``dfkd-fast evaluate``; raises OSError if it reports an error."""
    out, error = io.StringIO(), io.StringIO()
    arguments = "evaluate --weights in/w.safetensors --data.name folder --data.root in --device cpu --data.workers"
    try:
        with redirect_stdout(out), redirect_stderr(error):
            main([*arguments.split(), str(workers)])
    except SystemExit as end:
        raise OSError(error.getvalue().removeprefix("error: ").strip()) from end
    return "\n".join(line for line in out.getvalue().splitlines() if "images/s" not in line)


def _files(again: bool) -> None:
    network = tiny.network()
    save_weights(network, RUN / "w.safetensors", META)
    load_weights(network, RUN / "w.safetensors")
    report.write_results(RUN / "r.json", {"values": [0.5] * 2000})
    report.read_results(RUN / "r.json")
    report.save_image_grid(torch.zeros(4, 3, 32, 32), RUN / "grid.png")
    report.save_curves({"round": [0, 1], "kd": [1.0, 2.0]}, {}, RUN / "curves.png")


ACTIONS: dict[str, Callable[[bool], str | None]] = {
    "distill": _distill,
    "resume": _resume,
    "teach": _teach,
    "evaluate": partial(_command, 0),
    "evaluate with workers": partial(_command, 2),
    "files": _files,
    "export": _export,
}


# Each of these contexts injects a fault. ``at`` in [0, 1) is the share of a run's calls before it.


@contextmanager
def failing(calls: str, error: str, when: str, log: str = "/dev/null") -> Iterator[None]:
    """Let system calls of this process and its children fail while strace traces it."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-o", log, "-p", str(os.getpid()), "-e", f"trace={calls}", "--quiet=all"]
        + ([] if not error else ["-e", f"inject={calls}:error={error}:when={when}"])
    )
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        assert tracer.poll() is None, "strace cannot attach"
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def files_limit(at: float) -> AbstractContextManager[None]:
    return limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + int(8 * at))


def memory_limit(at: float) -> AbstractContextManager[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return limit(resource.RLIMIT_AS, used + int(3e7 * at**2))


def clock_steps(at: float) -> AbstractContextManager[Any]:
    """Each look at the clock finds it up to ten years later or earlier."""
    generator = random.Random(at)
    return mock.patch("time.time", lambda: 1.7e9 + 3e8 * generator.uniform(-1, 1))


def short_writes(at: float) -> AbstractContextManager[Any]:
    def write(file: io.FileIO, data: Any) -> int:
        return io.FileIO.write(file, memoryview(data)[: 1 + int(5000 * at)])

    return mock.patch.object(files._RecordingFile, "write", write)


@contextmanager
def timer(seconds: float, handler: Callable[..., None]) -> Iterator[None]:
    """Interrupt system calls by a signal at regular times."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def disk(fault: str, at: float) -> Iterator[None]:
    """Make the tmpfs of the working folder full or read-only."""
    free = os.statvfs(".")
    blocks, inodes = free.f_blocks - free.f_bfree, free.f_files - free.f_ffree
    size = f"size={(blocks + int(100 * at**2)) * free.f_bsize}"
    options = {"full": size, "without inodes": f"nr_inodes={inodes + int(16 * at)}", "read-only": "ro"}[fault]
    remount = ["mount", "-o", "remount", str(Path.cwd().parent)]
    done = subprocess.run([*remount, "-o", options])
    if done.returncode:
        print(
            "OPEN", os.popen("ls -l /proc/*/fd /proc/*/map_files 2>/dev/null | grep " + str(Path.cwd().parent)).read()
        )
    assert done.returncode == 0
    try:
        yield
    finally:
        subprocess.run([*remount, "-o", f"rw,{SPACE}"], check=True)


SPACE = "size=200m,nr_inodes=50000"
REAL: dict[str, Callable[[float], AbstractContextManager[Any]]] = {
    "limit of open files": files_limit,
    "limit of memory": memory_limit,
    "limit of file sizes": lambda at: limit(resource.RLIMIT_FSIZE, int(80_000 * at**2)),
    "short writes": short_writes,
    "clock steps": clock_steps,
    "interrupted system calls": lambda at: timer(0.001 + 0.01 * at, lambda *_: None),
}
DISKS = {f"disk {fault}": partial(disk, fault) for fault in ("full", "without inodes", "read-only")}
# System calls, their error, and whether all later calls fail too.
CALLS: dict[str, tuple[str, str, bool]] = {
    "ENOSPC in write": ("write", "ENOSPC", True),
    "EIO in write": ("write", "EIO", False),
    "EIO in read": ("read,pread64", "EIO", False),
    "EMFILE in open": ("openat", "EMFILE", False),
    "EACCES in open": ("openat", "EACCES", True),
    "EIO in fsync": ("fsync", "EIO", True),
    "EIO in rename": ("rename", "EIO", False),
    "ENOSPC in mkdir": ("mkdir", "ENOSPC", True),
    "EIO in unlink": ("unlink", "EIO", False),
    "EIO in stat": ("newfstatat", "EIO", False),
    "EIO in the reading of folders": ("getdents64", "EIO", False),
    "ENOMEM in mmap": ("mmap", "ENOMEM", False),
    "EAGAIN in fork": ("clone,clone3", "EAGAIN", True),
    "ENOLCK in flock": ("flock", "ENOLCK", False),
}


def results() -> dict[str, bytes | None]:
    """The files of the run. None stands for content that contains times or depends on the start of the process."""
    compared = (".safetensors", ".json", ".txt", ".onnx", ".png")
    found = sorted(path for path in RUN.rglob("*") if path.is_file() and path.name != ".lock")
    return {
        str(path): path.read_bytes() if path.suffix in compared else None
        for path in found
        if "tensorboard" not in path.parts
    }


def check_files(fault: str) -> None:
    """Raise AssertionError if a file is torn or temporary."""
    for path in map(Path, results()):
        assert path.suffix != ".partial" or "unlink" in fault or "memory" in fault, f"a temporary file is left: {path}"
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            assert zip_damage(path) is None, f"a torn checkpoint is left: {path}"
        elif path.suffix == ".safetensors":
            read_metadata(path)


def require_clear(fault: str, error: Exception) -> None:
    """Raise AssertionError if a user cannot understand an error. Without memory, also other libraries raise it."""
    text, foreign = str(error), type(error) is RuntimeError or isinstance(error, MemoryError)
    if "memory" in fault or "ENOMEM" in fault:
        return
    assert not foreign, f"an error of another library: {error!r}"
    named = "fork" in fault or any(name in text for name in (str(RUN), "in/", "worker processes"))
    assert named, f"an unclear error: {error!r}"
    assert len(text.splitlines()) == 1, f"an unclear error: {error!r}"


def survive(action: str, fault: str, context: AbstractContextManager[Any], expected: dict[str, Any]) -> str:
    """Run an action with a fault and return how it ends. Raises AssertionError if something is lost."""
    run, before = ACTIONS[action], set(results())
    outcome = "undisturbed result"
    try:
        with context:
            output = run(False)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        require_clear(fault, error)
        check_files(fault)
        if action == "resume":
            assert {path for path in before if path.endswith(".pt")} & set(results()), "all checkpoints are lost"
        outcome, output = "clear error, then the undisturbed result", run(True)
    found = {**results(), "output": output}
    assert found.keys() == expected.keys(), f"{outcome}: files differ: {sorted(found.keys() ^ expected.keys())}"
    differ = [path for path, content in expected.items() if found[path] != content]
    assert not differ, f"{outcome}: contents differ: {differ}"
    return outcome


def prepare(folder: Path, inputs: Path, action: str) -> bool:
    """Copy the inputs of an action into a new working folder."""
    os.chdir(inputs)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs / "in", folder / "in")
    if action == "resume":
        shutil.copytree(inputs / "half", folder / RUN)
    os.chdir(folder)
    warnings.simplefilter("ignore")
    logging.disable()
    return False


def _undisturbed(folder: Path, inputs: Path, action: str) -> tuple[dict[str, Any], str]:
    """The results of an action, and the log of its system calls."""
    ACTIONS[action](prepare(folder, inputs, action))  # imports modules
    log, context = inputs / "log", contextlib.nullcontext()
    prepare(folder, inputs, action)
    with (
        failing(",".join(calls for calls, *_ in CALLS.values()), "", "", str(log))
        if shutil.which("strace")
        else context
    ):
        output = ACTIONS[action](False)
    return {**results(), "output": output}, log.read_text(errors="replace") if log.exists() else ""


def _inputs(folder: Path) -> Path:
    """The files that actions read, and a run that is half done."""
    trees.folder_tree(folder / "in")
    model = ModelConfig(name="resnet8", options={"widths": [4, 4, 6, 8]})
    save_weights(create_model(model, num_classes=2), folder / "in" / "w.safetensors", {**META, **model.metadata()})
    os.chdir(folder)
    tiny.run(RUN, optimizer=CONSTANT, **{**SHORT, "epochs": 1})
    return RUN.rename("half").resolve().parent


def run(tally: Tally) -> None:
    """Run every action with every fault."""
    faults = [*REAL, *(CALLS if shutil.which("strace") else ())]
    if mounted := _mount(tally.folder / "disk"):
        faults += DISKS
    for fault in {*REAL, *DISKS, *CALLS} - {*faults}:
        tally.skip(fault, "needs the right to mount" if fault in DISKS else "strace is not installed")
    try:
        _run(tally, faults)
    finally:
        os.chdir("/")
        if mounted:
            subprocess.run(["umount", "-l", str(tally.folder / "disk")], check=True)


def _mount(folder: Path) -> bool:
    folder.mkdir()
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", SPACE, "none", str(folder)], capture_output=True).returncode == 0
    )


def _run(tally: Tally, faults: list[str]) -> None:
    inputs, folder = _inputs(tally.folder / "disk"), tally.folder / "disk" / "case"
    plan = [(action, fault) for fault in faults for action in ACTIONS]
    np.random.default_rng(tally.seed).shuffle(plan)
    undisturbed = functools.cache(partial(_undisturbed, folder, inputs))
    for rng in tally.cases():
        action, fault = plan[tally.index % len(plan)]
        (expected, log), at = undisturbed(action), rng.random()
        if fault in CALLS:
            calls, error, lasting = CALLS[fault]
            count = sum(log.count(f" {call}(") for call in calls.split(","))
            context = failing(calls, error, f"{1 + int(at * count)}{'+' if lasting else ''}")
        else:
            context = {**REAL, **DISKS}[fault](at)
        prepare(folder, inputs, action)
        tally.judge(fault, partial(survive, action, fault, context, expected))
