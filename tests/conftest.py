"""What every test gets: one thread, fixed seeds, no network, a working folder and caches of its own."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: its thread pools are sized on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes too, where the patched socket below does not reach

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is decorated: without a GPU, Triton's kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def _no_cuda() -> str | None:
    """Why tests marked ``gpu`` cannot run; None where they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # On a card cuDNN rounds what float32 convolutions multiply to TF32, unless told not to: no test is as lenient.
    torch.backends.cudnn.allow_tf32 = False
    # The same examples each time: what fails, fails again.
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


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout's: a test's limit does not count the wait
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run tests marked ``large_memory`` one at a time, and give back the memory that they used.

    A lock, which ends with its process, since the xdist_group of pytest-xdist 3.8 hangs when a worker process dies
    (pytest-xdist issues 1323 and 1378), as happens in the tests of a GPU.
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
    """Refuse connections beyond this machine, so that a test that needs the network fails everywhere alike."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests do not use the network: connection to {host} refused")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", local_only)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Drawn images are cached for the session, not in the user's home."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder))
    # matplotlib would look for its list of fonts there and, for want of one, scan the machine's fonts in every worker.
    patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib")))
    yield folder
    patch.undo()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without ``out`` writes ``runs/`` into the working folder: never the repository's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: on the CPU in the interpreter, or on the card."""
    if request.param == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("the interpreter is for machines without a GPU (TRITON_INTERPRET=1)")
        return "cpu"
    return "cuda"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a whole run of :func:`tests.tiny.config`, for tests that only read it."""
    from . import tiny  # not for every test: it imports the engine

    return tiny.run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
