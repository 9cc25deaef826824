"""The CUDA extension: built where it can be, told where it cannot, never in the way."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dfkd_fast.ops import choices, extension
from dfkd_fast.ops.backend import UnsupportedError, _registry, dispatch

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"_operators.so", "libdfkd_kernels.so"}
built = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))


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
        assert found["architecture"] == "sm_90a"
        for name in ("contrastive_loss", "spatial_attention", "high_order_attention"):
            for end in ("", "_backward"):
                assert hasattr(torch.ops.dfkd_fast_cuda, name + end)
    else:
        assert extension.build() is None
        assert "CUDA" in extension.UNAVAILABLE
        with pytest.raises(RuntimeError, match="CUDA"):
            extension.unsupported_reason("contrastive_loss", count=129, dim=8)


def test_what_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "UNAVAILABLE", None)
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    served = extension.unsupported_by_extension
    assert served("contrastive_loss", x) == "its kernels run on CUDA devices, not on cpu"
    monkeypatch.setattr(extension, "UNAVAILABLE", "it is not built")
    assert served("contrastive_loss", x) == "it is not built"


class OnDevice:
    """In the place of a tensor on a GPU."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def numel(self) -> int:
        return 2**30  # large enough for a fused backend in eager mode


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The GPU there is, an H100 at first."""
    found = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    extension._cached_reason.cache_clear()
    return found


def contrast(count: int, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = {"temperature": 0.1, "symmetric": False, "normalize": True, "reduction": "mean", **options}
    return (OnDevice(count, 64), OnDevice(count, 64)), given


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (10, 0), (12, 0)])
def test_other_devices_are_refused(
    capability: tuple[int, int], device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "UNAVAILABLE", None)
    device.major, device.minor = capability
    tensors, options = contrast(200)
    reason = _registry["contrastive_loss"]["cuda"].unsupported_reason(*tensors, **options)
    assert reason == f"its kernels need a device of compute capability 9.0, not {capability[0]}.{capability[1]}"


@built
def test_a_refused_call_goes_on_to_triton_or_raises_if_named(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "triton"):
        entry = dataclasses.replace(_registry["contrastive_loss"][name], function=lambda *a, name=name, **o: name)
        if name == "triton":
            entry = dataclasses.replace(entry, unsupported_reason=lambda *a, **o: None)
        monkeypatch.setitem(_registry["contrastive_loss"], name, entry)
    monkeypatch.setattr(choices, "faster", lambda op, x: "cuda")

    def chosen(count: int, backend: str | None = None, **options: Any) -> Any:
        tensors, given = contrast(count, **options)
        return dispatch("contrastive_loss", backend, *tensors, **given)

    assert chosen(200) == chosen(200, "cuda") == "cuda"
    for count, options, said in (
        (128, {}, "N of anchors .* is 128; the kernel serves 129 to 8388608"),
        (200, {"normalize": False}, "normalize is False"),
        (200, {"temperature": 0.01}, "temperature is 0.01"),
    ):
        assert chosen(count, **options) == "triton"
        with pytest.raises(
            UnsupportedError,
            match=f"'cuda', requested by backend, does not support this call of contrastive_loss: {said}",
        ):
            chosen(count, "cuda", **options)


@built
def test_each_op_asks_its_launchers_forward_and_backward(device: SimpleNamespace) -> None:
    def reason(op: str, *tensors: Any, **options: Any) -> str | None:
        return _registry[op]["cuda"].unsupported_reason(*tensors, **options)

    def spatial(channels: int, form: str = "spatial") -> str | None:
        maps = OnDevice(2, channels, 20, 30), OnDevice(2, 8, 20, 30)
        return reason("spatial_attention", *maps, OnDevice(channels, 8), None, scale=1.0, form=form)

    def high_order(order: int, hidden: int = 16) -> str | None:
        weights = OnDevice(order * (order + 1) // 2, hidden, 64), OnDevice(order, 64, hidden)
        return reason("high_order_attention", OnDevice(2, 64, 20, 30), *weights, mode="joint")

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
def test_compiled_code_asks_too(dynamic: bool, device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph break: the launcher's answer is a constant of the graph."""

    def work(x: torch.Tensor, temperature: float) -> torch.Tensor:
        count, dim = x.shape
        sizes = {"count": count, "dim": dim, "temperature": temperature, "normalize": True, "dtype": torch.bfloat16}
        return x + (1 if extension._launcher_reason("contrastive_loss", 0, sizes) is None else 2)

    compiled = torch.compile(work, fullgraph=True, backend="eager", dynamic=dynamic)
    for count, temperature, expected in ((200, 0.1, 1), (128, 0.1, 2), (200, 0.01, 2), (300, 0.1, 1)):
        assert compiled(torch.zeros(count, 3), temperature)[0, 0] == expected


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
