"""The CUDA kernels of csrc/ on the CPU: compiled as C++ with the execution shim and sanitizers, called over a pipe.

A process of its own runs them, since AddressSanitizer must be the first library that is loaded. Arrays go there and
back as files; a kernel that touches what is not its own ends that process, and the test with its report.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["HostError", "HostKernels", "build", "compiler"]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

_FLAGS = (
    # -Og compiles in a third of the time of -O1, and the kernels run as fast.
    *("-std=c++20", "-DDFKD_HOST", "-Og", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fno-var-tracking"),
    *("-Wall", "-Wextra", "-Werror"),
)
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# CUDA's pragmas, and its functions' two faces, which a plain compiler does not know.
_QUIET = ("-Wno-unknown-pragmas", "-Wno-unused-function")


class HostError(RuntimeError):
    """The process that runs kernels ended: a sanitizer or the shim found something. The message is its report."""


def compiler() -> str | None:
    """A C++ compiler with sanitizers, or None."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        return None
    runtime = subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return found if Path(runtime.stdout.strip()).is_absolute() else None


def build(folder: Path, sources: Sequence[str]) -> Path:
    """Compile files of csrc/ with the shim; kept in ``folder`` by the digest of what they were made of.

    Args:
        folder: where to.
        sources: names in csrc/, such as ``contrastive_loss.cu``.

    Raises:
        RuntimeError: they do not compile; the message is the compiler's.
    """
    objects = [
        _made(folder, ("-c",), [CSRC / name], ".o")
        for name in ("host/shim.cpp", "host/sm90.cpp", "launchers.cpp", *sources)
    ]
    return _made(folder, ("-shared",), objects, ".so")


def _made(folder: Path, how: Sequence[str], inputs: Sequence[Path], suffix: str) -> Path:
    """What the compiler makes of files, once."""
    found = compiler()
    assert found is not None
    digest = hashlib.sha256(repr((_FLAGS, _SANITIZERS, tuple(map(str, inputs)))).encode())
    for path in sorted(CSRC.rglob("*")):
        if path in inputs or path.suffix == ".h":
            digest.update(path.read_bytes())
    made = folder / f"{digest.hexdigest()[:24]}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes ask for the same at the same time
        if not made.exists():
            partial = made.with_suffix(".partial")
            language = ("-x", "c++") if suffix == ".o" else ()
            command = [found, *_FLAGS, *_QUIET, *_SANITIZERS, *how, *language, *map(str, inputs), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-6000:])
            os.replace(partial, made)
    return made


class HostKernels:
    """Kernels in their own process, which starts again after it has ended with an error.

    Args:
        library: from :func:`build`.
    """

    def __init__(self, library: Path) -> None:
        self._library = library
        self._folder = tempfile.TemporaryDirectory(prefix="dfkd_fast_host_")
        self._errors = Path(self._folder.name) / "errors"
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        found = compiler()
        assert found is not None
        runtime = subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=86:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        with self._errors.open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-I", __file__, str(self._library)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )

    def __call__(self, name: str, *arguments: np.ndarray | float | None, order: int = 0) -> None:
        """Call a launcher. Arrays are passed as pointers, and hold what the kernel wrote afterwards.

        Args:
            name: of the function.
            *arguments: C-contiguous arrays, ints, floats, and None for a null pointer.
            order: in which threads run; see csrc/host/shim.h.

        Raises:
            HostError: something was wrong; the report.
            ValueError: the launcher refused; its status and reason.
        """
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told: list[Any] = []
        for number, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                path = Path(self._folder.name) / f"{number}.npy"
                np.save(path, argument)
                told.append({"array": str(path)})
            else:
                told.append(argument)
        try:
            self._process.stdin.write(json.dumps([name, told, order]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._process = None
            raise HostError(self._errors.read_text(errors="replace")[-8000:])
        status, reason = json.loads(answer)
        if status:
            raise ValueError(f"{name} returned {status}" + (f": {reason}" if status == 1 else ""))
        for number, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                argument[...] = np.load(Path(self._folder.name) / f"{number}.npy")

    def scratch(self, name: str, *arguments: int) -> np.ndarray:
        """As many bytes as a function of a launcher asks for and no more; NaN in every dtype."""
        size = 0
        try:
            self(name, *arguments)
        except ValueError as found:  # it returns the size, as a launcher returns a status
            size = int(str(found).split("returned ")[1].split(":")[0])
        return np.full(size, 0xFF, dtype=np.uint8)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._folder.cleanup()


def _serve(library: str) -> None:
    functions = ctypes.CDLL(library)
    functions.dfkd_unsupported_reason.restype = ctypes.c_char_p
    for line in sys.stdin:
        name, told, order = json.loads(line)
        # A copy whose end is the end of its allocation, so that the sanitizer sees the first element beyond.
        arrays = {n: np.load(a["array"]) for n, a in enumerate(told) if isinstance(a, dict)}
        given: list[Any] = []
        for number, argument in enumerate(told):
            if number in arrays:
                given.append(ctypes.c_void_p(arrays[number].ctypes.data))
            elif argument is None:
                given.append(ctypes.c_void_p(None))
            else:
                given.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
        functions.dfkd_host_order(order)
        status = getattr(functions, name)(*given)
        for number, array in arrays.items():
            np.save(told[number]["array"], array)
        print(json.dumps([status, functions.dfkd_unsupported_reason().decode()]), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
