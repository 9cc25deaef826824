"""Runs the CUDA kernels of csrc/ on the CPU, compiled as C++ with the CPU emulation and sanitizers.

The kernels run in a child process, because AddressSanitizer must be the first library that a process loads. Tensors are
pickled through pipes. An access out of bounds ends the child process, and the test fails with the sanitizer's report.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the child process must not import torch
    from torch import Tensor

__all__ = ["HostError", "HostKernels", "build", "toolchain"]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

_FLAGS = (
    # -Og compiles in a third of the time of -O1, and the kernels run as fast.
    *("-std=c++20", "-DDFKD_HOST", "-Og", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fno-var-tracking"),
    *("-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-Wno-unused-function"),  # CUDA's pragmas and __host__ __device__ functions
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)


class HostError(RuntimeError):
    """A sanitizer or the shim found an error and the child process ended. The message is its report."""


@functools.cache
def toolchain() -> tuple[str, str] | None:
    """Returns a C++ compiler and its AddressSanitizer runtime, or None."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    command = [compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return (compiler, runtime) if Path(runtime).is_absolute() else None


def build(folder: Path, sources: Sequence[str]) -> Path:
    """Compiles files of csrc/ with the shim. Results are cached in ``folder`` by a digest of their inputs.

    Args:
        folder: where to write the library.
        sources: file names in csrc/, such as ``contrastive_loss.cu``.

    Raises:
        RuntimeError: compilation fails; the message is the compiler's.
    """
    objects = [
        _compile(folder, ("-c",), [CSRC / name], ".o")
        for name in ("host/shim.cpp", "host/sm90.cpp", "launchers.cpp", *sources)
    ]
    return _compile(folder, ("-shared",), objects, ".so")


def _compile(folder: Path, options: Sequence[str], inputs: Sequence[Path], suffix: str) -> Path:
    """Runs the compiler unless the output exists."""
    tools = toolchain()
    assert tools is not None
    digest = hashlib.sha256(repr((_FLAGS, tuple(map(str, inputs)))).encode())
    for path in sorted(CSRC.rglob("*")):
        if path in inputs or path.suffix == ".h":
            digest.update(path.read_bytes())
    output = folder / f"{digest.hexdigest()[:24]}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may build the same file
        if not output.exists():
            partial = output.with_suffix(".partial")
            language = ("-x", "c++") if suffix == ".o" else ()
            command = [tools[0], *_FLAGS, *options, *language, *map(str, inputs), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-6000:])
            os.replace(partial, output)
    return output


def _storage(argument: Any) -> Tensor | None:
    """The memory of a tensor or array, from its first to its last element, as bytes; None for other arguments."""
    import torch

    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        argument = torch.from_numpy(argument)
    if not isinstance(argument, torch.Tensor):
        return None
    steps = zip(argument.shape, argument.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps) if argument.numel() else 0
    return argument.detach().as_strided((extent,), (1,)).view(torch.uint8)


class HostKernels:
    """Kernels in a child process. It is restarted after an error and exits with its parent.

    Args:
        library: from :func:`build`.
    """

    def __init__(self, library: Path) -> None:
        self._library = library
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        tools = toolchain()
        assert tools is not None
        environment = {
            **os.environ,
            "LD_PRELOAD": tools[1],
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=86:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-I", __file__, str(self._library)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._errors.seek(0)
        self._errors.truncate()
        return subprocess.Popen(command, **pipes, env=environment)

    def __call__(self, name: str, *arguments: Tensor | np.ndarray | float | None, order: int = 0) -> None:
        """Calls a launcher. The kernel updates tensors and arrays in place.

        Args:
            name: name of the C function.
            *arguments: tensors and C-contiguous arrays (passed as pointers), ints, floats, and None for a null pointer.
            order: thread order; see csrc/host/shim.h.

        Raises:
            HostError: a sanitizer or the shim found an error.
            ValueError: the launcher returned an error; the message has the status and the reason.
        """
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        storages = {i: storage.numpy() for i, a in enumerate(arguments) if (storage := _storage(a)) is not None}
        try:
            pickle.dump((name, [storages.get(i, a) for i, a in enumerate(arguments)], order), self._process.stdin)
            self._process.stdin.flush()
            status, reason, results = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError):
            self._process.wait()
            self._process = None
            self._errors.seek(0)
            raise HostError(self._errors.read().decode(errors="replace")[-8000:]) from None
        if status:
            raise ValueError(f"{name} returned {status}" + (f": {reason}" if status == 1 else ""))
        for i, result in results.items():
            storages[i][...] = result

    def scratch(self, name: str, *arguments: int) -> np.ndarray:
        """Returns exactly as many bytes as a scratch function asks for, NaN in every dtype."""
        size = 0
        try:
            self(name, *arguments)
        except ValueError as found:  # the function returns the size where launchers return a status
            size = int(str(found).split("returned ")[1].split(":")[0])
        return np.full(size, 0xFF, dtype=np.uint8)


def _serve(library: str) -> None:
    functions = ctypes.CDLL(library)
    functions.dfkd_unsupported_reason.restype = ctypes.c_char_p
    while True:
        try:
            name, request, order = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        # Copies, so that each array is a separate allocation and the sanitizer sees accesses beyond its end.
        arrays = {i: a.copy() for i, a in enumerate(request) if isinstance(a, np.ndarray)}
        arguments: list[Any] = []
        for i, argument in enumerate(request):
            if argument is None or i in arrays:
                arguments.append(ctypes.c_void_p(arrays[i].ctypes.data if i in arrays else None))
            else:
                arguments.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
        functions.dfkd_host_order(order)
        status = getattr(functions, name)(*arguments)
        pickle.dump((status, functions.dfkd_unsupported_reason().decode(), arrays), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
