"""The CUDA extension: built where it can be, told where it cannot, never in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dfkd_fast.ops import backend, extension

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"_operators.so", "libdfkd_kernels.so"}


def can_build() -> str | None:
    found = subprocess.run(
        [sys.executable, "-c", "import setup; print(setup.missing() or '')"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or None


def test_it_is_here_or_says_why_not() -> None:
    if extension.UNAVAILABLE is None:
        found = extension.build()
        assert found is not None
        assert found["architectures"]
        assert hasattr(torch.ops, "dfkd_fast_cuda")
    else:
        assert extension.build() is None
        assert "CUDA" in extension.UNAVAILABLE


def test_kernels_that_were_never_measured_serve_when_named_alone() -> None:
    implementation = backend.Implementation(lambda x: x, measured=False)
    assert not implementation.unasked(torch.zeros(1))
    assert implementation.supports(torch.zeros(1)) is None


def missing(folder: Path, **environment: str) -> str:
    """What setup.py says is missing, in an environment."""
    code = "import setuptools; setuptools.setup = lambda **given: None; import setup; print(setup.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert missing(tmp_path, DFKD_FAST_CUDA="0") == "DFKD_FAST_CUDA is 0"
    shutil.copyfile(ROOT / "setup.py", tmp_path / "setup.py")
    assert missing(tmp_path, PYTHONPATH=str(tmp_path)) == "this source tree has no csrc/*.cu"
