"""Lets system calls fail, limits the resources of this process, and changes its disk and its clock."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from dfkd_fast import files

__all__ = ["CALLS", "DISKS", "LIMITS", "SPACE", "failing", "strace"]

SPACE = "size=200m"
"""Options of the tmpfs that :data:`DISKS` change."""


@contextlib.contextmanager
def strace(calls: str, *options: str) -> Iterator[None]:
    """Trace this process; ``-f`` also traces its threads and children."""
    command = ["strace", "-p", str(os.getpid()), "-o", "/dev/null", "--quiet=all", "-e", f"trace={calls}", *options]
    tracer = subprocess.Popen(command) if shutil.which("strace") else None
    with contextlib.suppress(OSError):  # this read may fail already
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


@contextlib.contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def _memory(at: float) -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(2e6 * at)


def _short_writes(at: float) -> AbstractContextManager[Any]:
    def write(file: files._RecordingFile, data: Any) -> int:
        return io.FileIO.write(file, memoryview(data)[: 1 + int(5000 * at)])

    return mock.patch.object(files._RecordingFile, "write", write)


def _clock_steps(at: float) -> AbstractContextManager[Any]:
    draw = random.Random(at)
    return mock.patch.multiple(
        "time", time=lambda: draw.uniform(1.4e9, 2e9), time_ns=lambda: draw.randrange(14 * 10**17, 2 * 10**18)
    )


LIMITS: dict[str, Callable[[float], AbstractContextManager[Any]]] = {
    "limit of open files": lambda at: limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + int(8 * at)),
    "limit of memory": lambda at: limit(resource.RLIMIT_AS, _memory(at)),
    "limit of file sizes": lambda at: limit(resource.RLIMIT_FSIZE, int(80_000 * at**2)),
    "short writes": _short_writes,
    "clock steps": _clock_steps,
}


@contextlib.contextmanager
def _full_disk(at: float) -> Iterator[None]:
    """Leave the tmpfs of the working folder only some free blocks."""
    now, remount = os.statvfs("."), ["mount", "-o", "remount", str(Path.cwd().parent)]
    size = (now.f_blocks - now.f_bfree + int(100 * at**2)) * now.f_bsize
    subprocess.run([*remount, "-o", f"size={size}"], check=True)
    try:
        yield
    finally:
        subprocess.run([*remount, "-o", SPACE], check=True)


@contextlib.contextmanager
def _read_only_disk(at: float) -> Iterator[None]:
    """Make the folder "run" read-only before one of its files is written.

    A second mount covers the folder, because the first one cannot become read-only while its files are open.
    """
    create, left = files._create, iter(range(int(8 * at**2), -1, -1))

    def reach(partial: Path) -> files._RecordingFile:
        if next(left, None) == 0:
            subprocess.run(["mount", "-o", "bind,ro", "run", "run"], check=True)
        return create(partial)

    try:
        with mock.patch.object(files, "_create", reach):
            yield
    finally:
        subprocess.run(["umount", "-l", "run"], capture_output=True)  # fails if it was not reached


DISKS = {"disk full": _full_disk, "disk read-only": _read_only_disk}
"""Faults of the tmpfs that has the working folder."""
