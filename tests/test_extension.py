"""The CUDA extension: built where it can be, told where it cannot, never in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast.ops import extension

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"_operators.so", "libdfkd_kernels.so"}


def missing(folder: Path = ROOT, **environment: str) -> str:
    """What setup.py of a folder says is missing, in an environment."""
    code = "import setuptools; setuptools.setup = lambda **given: None; import setup; print(setup.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_here_or_says_why_not() -> None:
    if extension.UNAVAILABLE is None:
        found = extension.build()
        assert found is not None
        assert found["architectures"]
        assert found["hopper"] == extension.HOPPER == ("9.0a" in found["architectures"])
        assert hasattr(torch.ops, "dfkd_fast_cuda")
        assert all("bool hopper" in str(operator.default._schema) for operator in operators())
    else:
        assert extension.build() is None
        assert not extension.HOPPER
        assert "CUDA" in extension.UNAVAILABLE


def operators() -> list[Any]:
    names = ("contrastive_loss", "spatial_attention", "high_order_attention")
    return [getattr(torch.ops.dfkd_fast_cuda, name + end) for name in names for end in ("", "_backward")]


def test_each_backend_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "UNAVAILABLE", None)
    monkeypatch.setattr(extension, "HOPPER", False)
    assert extension.unavailable("cuda") is None
    assert "without code for sm_90a" in str(extension.unavailable("hopper"))
    monkeypatch.setattr(extension, "HOPPER", True)
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    for backend in ("cuda", "hopper"):
        assert extension.unavailable(backend) is None
        assert extension.unserved_by_extension(backend, x) == "its kernels run on CUDA devices, not on cpu"
    monkeypatch.setattr(extension, "UNAVAILABLE", "it is not built")
    assert extension.unavailable("hopper") == extension.unserved_by_extension("hopper", x) == "it is not built"


@pytest.mark.parametrize(
    ("capability", "served"), [((7, 5), ()), ((8, 0), ("cuda",)), ((9, 0), ("cuda", "hopper")), ((10, 0), ("cuda",))]
)
def test_devices_have_what_their_architecture_runs(
    capability: tuple[int, int], served: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnDevice:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    monkeypatch.setattr(extension, "UNAVAILABLE", None)
    monkeypatch.setattr(extension, "HOPPER", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for backend in ("cuda", "hopper"):
        reason = extension.unserved_by_extension(backend, OnDevice())  # type: ignore[arg-type]
        assert (reason is None) == (backend in served), reason


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert missing(DFKD_FAST_CUDA="0") == "DFKD_FAST_CUDA is 0"
    shutil.copyfile(ROOT / "setup.py", tmp_path / "setup.py")
    assert missing(tmp_path) == "this source tree has no csrc/*.cu"
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.cu").touch()
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert missing(tmp_path, PATH="", CUDA_HOME="") == "no nvcc is on the PATH or under CUDA_HOME"


@pytest.mark.slow
def test_a_wheel_holds_the_extension_or_is_pure(tmp_path: Path) -> None:
    """From a copy of the sources, so that nothing that was built here is found."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)

    def wheel(folder: str, **environment: str) -> Path:
        command = ["pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(tmp_path / folder), "."]
        subprocess.run([sys.executable, "-m", *command], cwd=source, env={**os.environ, **environment}, check=True)
        (made,) = (tmp_path / folder).glob("*.whl")
        return made

    pure = wheel("pure", DFKD_FAST_CUDA="0")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]
    reason = missing(source)
    if reason != "None":
        pytest.skip(f"the extension cannot be built here: {reason}")
    full = wheel("full", DFKD_FAST_CUDA="1")
    held = {Path(name).name for name in zipfile.ZipFile(full).namelist() if name.endswith(".so")}
    assert held > LIBRARIES
    assert any(name.startswith("_C.") for name in held)
