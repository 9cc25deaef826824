"""Common setup: one thread, fixed seeds, no network, and a separate working folder per test."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before torch is imported, because it sizes its thread pools on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # also for child processes, which do not use the patched socket below

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cpu.get_capabilities().get("avx512_f"):
    # On CPUs without AVX-512, oneDNN corrupts memory in the weight gradient of channels-last 1 x 1 convolutions with
    # stride 2 and fewer than 8 input channels. Networks in use have more. Child processes inherit the setting.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

if not torch.cuda.is_available():
    # Set before any kernel is decorated: without a GPU, Triton kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def _speed_up_interpreter() -> None:
    """Patch ``triton.language`` once per launch.

    Triton 3.6 also does it in each call of a function in a kernel, which takes most of a small kernel's time. Only
    Triton's own functions need that, once: they use ``triton.language.core``, which Triton never restores.
    """
    from triton.runtime import interpreter

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if interpreter.tl.core.is_builtin(interpreter.tl.core.load):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _speed_up_interpreter()


def _no_cuda() -> str | None:
    """The reason why tests marked ``gpu`` cannot run, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # By default cuDNN computes float32 convolutions in TF32, which is too inexact for the tests.
    torch.backends.cudnn.allow_tf32 = False
    # Use the same examples in every run, so that failures are reproducible.
    hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("reproducible")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))
    reason = _no_cuda()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {reason}"))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout, so that waiting does not count
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run tests marked ``large_memory`` one at a time, and release their memory afterwards.

    Uses a file lock instead of pytest-xdist's xdist_group, which hangs in version 3.8 when a worker process dies
    (pytest-xdist issues 1323 and 1378).
    """
    if item.get_closest_marker("large_memory") is None:
        return (yield)
    with open(Path(tempfile.gettempdir()) / f"dfkd_fast_large_memory_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return (yield)
        finally:
            if torch.cuda.is_initialized():
                gc.collect()
                torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse connections to other machines, so that tests that need the network always fail."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests must not use the network: connection to {host} refused")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", local_only)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Cache rendered images in a folder of the session, not in the user's home."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder))
    # Keep matplotlib's cache, because otherwise every worker would scan the machine's fonts.
    patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib")))
    yield folder
    patch.undo()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a temporary folder, because a run without ``out`` writes ``runs/`` to the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """The device of Triton kernels: the CPU in the interpreter, or a GPU."""
    if request.param == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the interpreter is only used without a GPU (TRITON_INTERPRET=1)")
        return "cpu"
    return "cuda"


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a complete run of :func:`tests.tiny.config`, for tests that only read it."""
    from . import tiny  # imported late, because it imports the engine

    return tiny.run(tmp_path_factory.mktemp("uninterrupted_run"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
