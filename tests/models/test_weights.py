"""Weights in and out: every usual layout is read, nothing is unpickled, and what does not fit is listed."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd_fast.config import ModelConfig
from dfkd_fast.models import (
    WeightsFormatError,
    WeightsMismatch,
    create_model,
    load_weights,
    read_metadata,
    save_weights,
)


def network(num_classes: int = 3) -> nn.Module:
    """A small one whose every tensor is its own."""
    model = create_model(ModelConfig(name="resnet8", options={"widths": [4, 4, 6, 8]}), num_classes=num_classes)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand_like(tensor.float()) * 9 + 1)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("form", ["safetensors", "torch", "torch legacy"])
def test_every_layout_of_names(tmp_path: Path, prefix: str, form: str) -> None:
    source, target = network(), network()
    state = OrderedDict((prefix + name, value) for name, value in source.state_dict().items())
    path = tmp_path / "weights.bin"  # the content tells the format, not the name
    if form == "safetensors":
        safetensors.torch.save_file(dict(state), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "torch")
    report = load_weights(target, path)
    assert same(source, target)
    assert set(report.loaded) == set(target.state_dict())
    assert (report.skipped, report.absent_counters, report.path) == ((), (), path)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "network"])
def test_weights_inside_a_checkpoint(tmp_path: Path, key: str) -> None:
    source, target = network(), network()
    wrapped = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"epoch": 3, key: wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "c.pt")
    load_weights(target, tmp_path / "c.pt")
    assert same(source, target)
    torch.save({"checkpoint": 1, "model": {"state_dict": wrapped}}, tmp_path / "deeper.pt")
    load_weights(target := network(), tmp_path / "deeper.pt")
    assert same(source, target)


def test_a_network_whose_child_is_called_module(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    source, target = Wrapped(), Wrapped()
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)


def test_round_trip_with_metadata(tmp_path: Path) -> None:
    source, target = network().to(memory_format=torch.channels_last), network()
    path = tmp_path / "w.safetensors"
    save_weights(source, path, {"num_classes": "3", "model": "resnet8"})
    assert read_metadata(path) == {"num_classes": "3", "model": "resnet8"}
    report = load_weights(target, path)
    assert report.metadata == {"num_classes": "3", "model": "resnet8"}
    assert same(source, target)
    save_weights(source, path)
    assert read_metadata(path) == {}
    torch.save(source.state_dict(), tmp_path / "w.pt")
    assert read_metadata(tmp_path / "w.pt") == {}
    with pytest.raises(TypeError, match="metadata must map strings to strings, got 'classes': 3"):
        save_weights(source, path, {"classes": 3})  # type: ignore[dict-item]


def test_the_same_weights_make_the_same_file(tmp_path: Path) -> None:
    model = network()
    metadata = {f"{i} ü": str(i) for i in range(9)}
    for name in ("a", "b"):
        save_weights(model, tmp_path / name, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_metadata(tmp_path / "a") == metadata


def test_tied_weights_and_empty_ones(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.register_buffer("whole", torch.arange(6.0))
            self.register_buffer("part", self.whole[2:4])
            self.register_buffer("empty", torch.zeros(0))

    source, target = Tied(), Tied()
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)
    assert target.b.weight is target.a.weight


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    source = network()
    save_weights(source, path)

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_weights(network(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    load_weights(target := network(), path)
    assert same(source, target)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in before.items()}
    del state["conv1.weight"]
    state["fc.weight"] = torch.zeros(7, 8)
    state["head.bias"] = torch.zeros(2)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsMismatch) as caught:
        load_weights(model, tmp_path / "w.pt")
    error = caught.value
    assert error.missing == ("conv1.weight",)
    assert error.unexpected == ("head.bias",)
    assert error.mismatched == (("fc.weight", (7, 8), (3, 8)),)
    for part in ("w.pt does not fit CifarResNet", "missing (1): conv1.weight", "unexpected (1): head.bias"):
        assert part in str(error)
    assert "of another shape (1): fc.weight (7, 8) instead of (3, 8)" in str(error)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    model = network()
    with pytest.raises(WeightsMismatch, match=r"and \d+ more\n") as caught:
        load_weights(model, tmp_path / "w.pt")
    assert len(caught.value.missing) == sum("num_batches" not in name for name in model.state_dict())


def test_counters_may_be_absent(tmp_path: Path) -> None:
    source, target = network(), network()
    counters = {name: value.clone() for name, value in target.state_dict().items() if "num_batches" in name}
    state = {name: value for name, value in source.state_dict().items() if name not in counters}
    torch.save(state, tmp_path / "w.pt")
    report = load_weights(target, tmp_path / "w.pt")
    assert set(report.absent_counters) == set(counters)
    loaded = target.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in (state | counters).items())


def test_skipped_modules_stay(tmp_path: Path) -> None:
    source, target = network(5), network(3)
    head = target.fc.weight.clone()
    save_weights(source, tmp_path / "w")
    report = load_weights(target, tmp_path / "w", skip=["fc"])
    assert report.skipped == ("fc.weight", "fc.bias")
    assert torch.equal(target.fc.weight, head)
    assert torch.equal(target.conv1.weight, source.conv1.weight)


def test_types_of_the_network_are_kept(tmp_path: Path) -> None:
    source = network()
    torch.save({name: value.half() for name, value in source.state_dict().items()}, tmp_path / "w.pt")
    load_weights(target := network(), tmp_path / "w.pt")
    assert target.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(target.conv1.weight, source.conv1.weight.half().float())


class _Hostile:
    """What a malicious file does on unpickling."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (_write, ("pwned", "yes"))


def _write(path: str, text: str) -> None:
    Path(path).write_text(text)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "torch legacy", "pickle"])
def test_a_hostile_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path = tmp_path / "hostile.pt"
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "extra": _Hostile()}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(WeightsFormatError, match=r"hostile.pt is refused: it holds more than tensors") as caught:
        load_weights(network(), path)
    assert "weights_only=False" not in str(caught.value)
    assert not Path("pwned").exists()  # the test's working folder is its own
    if form == "pickle":
        pickle.loads(path.read_bytes())
        assert Path("pwned").exists()


def test_a_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(
        WeightsFormatError, match=r"refused: it holds more than tensors in plain containers .*CifarResNet"
    ):
        load_weights(network(), tmp_path / "whole.pt")


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_torn_files(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / f"torn.{form}"
    if form == "safetensors":
        save_weights(network(), path)
    else:
        torch.save(network().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsFormatError, match=r"torn|no file of weights"):
        load_weights(network(), path)
    if form == "safetensors":
        with pytest.raises(WeightsFormatError, match="torn"):
            read_metadata(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "must hold a mapping of names to tensors, got list"),
        ({"epoch": 3, "lr": 0.1}, r"at the top or under one of state_dict.*'epoch' \(int\), 'lr' \(float\)"),
        ({}, "it holds none"),
    ],
)
def test_files_without_weights(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsFormatError, match=message):
        load_weights(network(), tmp_path / "w.pt")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(WeightsFormatError, match=r"neither safetensors nor written by torch\.save"):
        load_weights(network(), tmp_path / "notes.txt")
    for read in (read_metadata, lambda path: load_weights(network(), path)):
        with pytest.raises(FileNotFoundError, match="no weights file"):
            read(tmp_path / "none.safetensors")


def test_create_model_reads_weights(tmp_path: Path) -> None:
    source = network()
    save_weights(source, tmp_path / "w")
    config = ModelConfig(name="resnet8", weights=str(tmp_path / "w"), options={"widths": [4, 4, 6, 8]})
    assert same(create_model(config, num_classes=3), source)
    with pytest.raises(WeightsMismatch, match=r"fc.weight \(3, 8\) instead of \(4, 8\)"):
        create_model(config, num_classes=4)


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 1}

        def set_extra_state(self, state: dict[str, int] | Tensor) -> None:
            raise AssertionError("nothing is loaded here")

    with pytest.raises(TypeError, match="state must be tensors, got dict for '_extra_state'"):
        save_weights(Extra(1, 1), tmp_path / "w")
    assert not list(tmp_path.glob("*"))
