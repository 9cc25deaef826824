"""`dfkd-fast doctor` reports every feature, available or not."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch

from dfkd_fast import doctor, ops


def line(name: str) -> doctor.Item:
    found = [item for item in doctor.report() if item.item == name]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def test_report_has_versions_and_every_op_with_its_backends():
    lines = doctor.report()
    assert all(isinstance(item.ok, bool) and item.detail for item in lines)
    details = {item.item: item.detail for item in lines}
    assert {"bf16 autocast", "triton", "nvcc", "build tools", "CUDA extension", "onnx export", "nvtx"} <= set(details)
    assert platform.python_version() in details["python"]
    assert details["torch"].startswith(torch.__version__)
    text = " ".join(item.detail for item in lines if item.item == "ops")
    for name, backends in ops.backends().items():
        assert name in text
        assert all(backend in text for backend in backends)


def test_doctor_prints_the_report(capsys):
    doctor.doctor()
    printed = capsys.readouterr().out
    assert platform.python_version() in printed
    assert len(printed.splitlines()) < 30


def test_failed_check_is_reported(monkeypatch):
    def broken(*command: str) -> str:
        raise subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(doctor, "_run", broken)
    monkeypatch.setattr(doctor, "find_nvcc", lambda: "/somewhere/nvcc")
    item = line("nvcc")
    assert not item.ok
    assert "CalledProcessError" in item.detail


class TestNoDevice:
    @pytest.fixture(autouse=True)
    def _none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def test_torch_without_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "built without CUDA" in line("CUDA device").detail
        assert "built without CUDA" in line("torch").detail

    def test_devices_hidden_by_the_environment(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert "CUDA_VISIBLE_DEVICES" in line("CUDA device").detail

    @pytest.mark.parametrize("bf16", [False, True])
    def test_cpu_is_used(self, monkeypatch, bf16):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": bf16})
        item = line("CUDA device")
        assert not item.ok
        assert item.detail.endswith("everything runs on the CPU")
        assert line("bf16 autocast").ok is bf16


class TestNvcc:
    @pytest.mark.parametrize(
        ("built", "ok", "word"), [("13.0", True, "13.1"), ("12.8", False, "major"), (None, False, "CUDA")]
    )
    def test_version_is_compared_with_torch(self, monkeypatch, built, ok, word):
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(doctor, "find_nvcc", lambda: "/somewhere/nvcc")
        release = "Cuda compilation tools, release 13.1, V13.1.2"
        monkeypatch.setattr(doctor, "_run", lambda *command: release if "nvcc" in command[0] else "tool 1.0")
        item = line("nvcc")
        assert item.ok is ok
        assert word in item.detail

    def test_missing_nvcc_is_reported(self, monkeypatch):
        monkeypatch.setattr(doctor, "find_nvcc", lambda: None)
        assert "not found on PATH" in line("nvcc").detail

    def test_cuda_home_comes_first(self, monkeypatch, tmp_path):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").touch()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert doctor.find_nvcc() == str(tmp_path / "bin" / "nvcc")


def test_missing_onnx_packages_are_listed(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "onnxscript" else "1.0")
    item = line("onnx export")
    assert not item.ok
    assert "onnxscript" in item.detail
    assert "onnxruntime" not in item.detail


@pytest.mark.gpu
def test_cuda_device_is_named():
    item = line("CUDA device 0")
    assert item.ok
    assert torch.cuda.get_device_name(0) in item.detail
