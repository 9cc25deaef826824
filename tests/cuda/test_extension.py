"""The CUDA extension: its build, and the fallback to Triton without it or for unsupported calls."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dfkd_fast.ops import choices, extension
from dfkd_fast.ops.backend import UnsupportedError, _registry, dispatch

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))


def missing(folder: Path = ROOT, **environment: str) -> str:
    """Returns what setup.missing() of a folder returns, as text."""
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


def test_extension_is_built_or_gives_a_reason() -> None:
    if extension.UNAVAILABLE is None:
        info = extension.build()
        assert info is not None
        assert info["architecture"] == "sm_90a"
        for name in ("contrastive_loss", "spatial_attention", "high_order_attention"):
            for suffix in ("", "_backward"):
                assert hasattr(torch.ops.dfkd_fast_cuda, name + suffix)
    else:
        assert extension.build() is None
        assert "CUDA" in extension.UNAVAILABLE
        with pytest.raises(RuntimeError, match="CUDA"):
            extension.unsupported_reason("contrastive_loss", count=129, dim=8)


class FakeCudaTensor:
    """Stands in for a tensor on a GPU."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def numel(self) -> int:
        return 2**30  # large enough for eager mode to use a fused backend


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The current GPU's properties, initially of an H100."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    extension._cached_reason.cache_clear()
    return properties


def contrastive_call(count: int, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = {
        "temperature": 0.1,
        "symmetric": False,
        "negatives": "all",
        "normalize": True,
        "reduction": "mean",
        **options,
    }
    return (FakeCudaTensor(count, 64), FakeCudaTensor(count, 64)), given


def test_device_and_build_are_checked_first(device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "UNAVAILABLE", None)
    reason = extension.unsupported_by_extension
    cpu, gpu = torch.zeros(2, 2, dtype=torch.bfloat16), contrastive_call(200)
    assert reason("contrastive_loss", cpu) == "its kernels run on CUDA devices, not on cpu"
    for device.major, device.minor in ((7, 5), (8, 0), (10, 0), (12, 0)):
        extension._cached_reason.cache_clear()
        found = _registry["contrastive_loss"]["cuda"].unsupported_reason(*gpu[0], **gpu[1])
        assert found == f"its kernels need a device of compute capability 9.0, not {device.major}.{device.minor}"
    monkeypatch.setattr(extension, "UNAVAILABLE", "it is not built")
    assert reason("contrastive_loss", cpu) == "it is not built"


@built
def test_unsupported_calls_use_triton_or_raise_if_cuda_is_requested(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "triton"):
        entry = dataclasses.replace(_registry["contrastive_loss"][name], function=lambda *a, name=name, **o: name)
        if name == "triton":
            entry = dataclasses.replace(entry, unsupported_reason=lambda *a, **o: None)
        monkeypatch.setitem(_registry["contrastive_loss"], name, entry)
    monkeypatch.setattr(choices, "faster", lambda op, x: "cuda")

    def chosen(count: int, backend: str | None = None, **options: Any) -> Any:
        tensors, given = contrastive_call(count, **options)
        return dispatch("contrastive_loss", backend, *tensors, **given)

    assert chosen(200) == chosen(200, "cuda") == "cuda"
    for count, options, why in (
        (128, {}, "N of anchors .* is 128; the kernel supports 129 to 8388608"),
        (200, {"normalize": False}, "normalize is False"),
        (200, {"negatives": "cross"}, 'its kernels support only negatives="all"'),
        (200, {"temperature": 0.01}, "temperature is 0.01"),
    ):
        assert chosen(count, **options) == "triton"
        with pytest.raises(UnsupportedError, match=f"'cuda', .* contrastive_loss: {why}"):
            chosen(count, "cuda", **options)


@built
def test_each_op_checks_forward_and_backward_launchers(device: SimpleNamespace) -> None:
    def reason(op: str, *tensors: Any, **options: Any) -> str | None:
        return _registry[op]["cuda"].unsupported_reason(*tensors, **options)

    def spatial(channels: int, form: str = "spatial") -> str | None:
        maps = FakeCudaTensor(2, channels, 20, 30), FakeCudaTensor(2, 8, 20, 30)
        return reason("spatial_attention", *maps, FakeCudaTensor(channels, 8), None, scale=1.0, form=form)

    def high_order(order: int, hidden: int = 16) -> str | None:
        weights = FakeCudaTensor(order * (order + 1) // 2, hidden, 64), FakeCudaTensor(order, 64, hidden)
        return reason("high_order_attention", FakeCudaTensor(2, 64, 20, 30), *weights, mode="joint")

    assert spatial(64) is spatial(256) is high_order(3) is high_order(1, 128) is None
    assert "C of features (N, C, H, W) is 60" in str(spatial(60))
    assert "form is 'channel'" in str(spatial(64, "channel"))
    assert "R of out_weight (R, C, K) is 4" in str(high_order(4))
    assert "K of out_weight (R, C, K) is 136" in str(high_order(3, 136))
    device.multi_processor_count = 4
    extension._cached_reason.cache_clear()
    assert "spatial_attention_backward takes 6 multiprocessors at once; the device has 4" in str(spatial(64))


@built
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_checks_the_launchers(
    dynamic: bool, device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a graph break: the reason is a constant of the graph."""

    def run(x: torch.Tensor, temperature: float) -> torch.Tensor:
        count, dim = x.shape
        sizes = {"count": count, "dim": dim, "temperature": temperature, "normalize": True, "dtype": torch.bfloat16}
        return x + (1 if extension._launcher_reason("contrastive_loss", 0, sizes) is None else 2)

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=dynamic)
    for count, temperature, expected in ((200, 0.1, 1), (128, 0.1, 2), (200, 0.01, 2), (300, 0.1, 1)):
        assert compiled(torch.zeros(count, 3), temperature)[0, 0] == expected


def test_missing_build_requirements_are_reported(tmp_path: Path) -> None:
    assert missing(DFKD_FAST_CUDA="0") == "DFKD_FAST_CUDA is 0"
    shutil.copyfile(ROOT / "setup.py", tmp_path / "setup.py")
    assert missing(tmp_path) == "this source tree has no csrc/*.cu"
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.cu").touch()
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert missing(tmp_path, PATH="", CUDA_HOME="") == "no nvcc is on the PATH or under CUDA_HOME"
