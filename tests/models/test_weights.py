"""``load_weights`` and ``save_weights``: layouts of files, mismatches, and files that are refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dfkd_fast.config import ModelConfig
from dfkd_fast.models import (
    WeightsDescription,
    WeightsFormatError,
    WeightsMismatch,
    create_model,
    load_weights,
    read_description,
    read_metadata,
    save_weights,
    weights,
)

from .programs import WRITERS, Program


def network(num_classes: int = 3) -> nn.Module:
    """A small network whose tensors all differ."""
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
def test_every_prefix_and_file_format(tmp_path: Path, prefix: str, form: str) -> None:
    source, target = network(), network()
    state = OrderedDict((prefix + name, value) for name, value in source.state_dict().items())
    path = tmp_path / "weights.bin"  # the content determines the format
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


def _partly(name: str) -> str:
    return name.replace("layer1.", "layer1._orig_mod.").replace("fc.", "module.fc.")


NAMES: dict[str, Callable[[str], str]] = {
    "Lightning": lambda name: f"model.{name}",
    "Lightning, compiled": lambda name: f"model._orig_mod.{name}",
    "network": lambda name: f"module.net.{name}",
    "partly": _partly,
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_names_of_other_libraries(tmp_path: Path, rename: Callable[[str], str]) -> None:
    source, target = network(), network()
    state = {rename(name): value for name, value in source.state_dict().items()}
    extra = {"n_averaged": torch.tensor(3), rename("fc.total_ops"): torch.zeros(1), "epoch": 3, "note": "text"}
    torch.save({"epoch": 3, "state_dict": state | extra}, tmp_path / "w.pt")
    report = load_weights(target, tmp_path / "w.pt")
    assert same(source, target)
    assert {name.rpartition(".")[2] for name in report.ignored} == {"n_averaged", "total_ops"}
    wrapped = AveragedModel(nn.DataParallel(network()))
    load_weights(wrapped, tmp_path / "w.pt")
    assert same(wrapped.module.module, source)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict", "ema"])
def test_averaged_weights_are_used_if_there_are_no_others(tmp_path: Path, key: str) -> None:
    source, averaged, target = network(), AveragedModel(network()), network()
    checkpoint = {"epoch": 3, "state_dict": None, key: averaged.state_dict()}
    torch.save(checkpoint, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(averaged.module, target)
    torch.save(checkpoint | {"state_dict": source.state_dict()}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def test_two_values_of_one_weight_are_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(state | {"module.fc.bias": state["fc.bias"] + 1}, tmp_path / "w.pt")
    complex_bias, small = torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to(torch.float8_e5m2)
    torch.save(state | {"fc.bias": complex_bias, "module.fc.bias": small}, tmp_path / "types.pt")
    with pytest.raises(WeightsFormatError, match=r"two values of 'fc\.bias'"):
        load_weights(network(), tmp_path / "types.pt")
    with pytest.raises(WeightsFormatError, match=r"two values of 'fc\.bias': 'fc\.bias' and 'module\.fc\.bias'"):
        load_weights(network(), tmp_path / "w.pt")


def test_only_counters_do_not_fit(tmp_path: Path) -> None:
    torch.save({"n_averaged": torch.tensor(3)}, tmp_path / "w.pt")
    with pytest.raises(WeightsMismatch, match=r"missing \(\d+\): conv1\.weight"):
        load_weights(network(), tmp_path / "w.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source, target, before = network(), network(), network()
    before.load_state_dict(target.state_dict())
    with torch.no_grad():
        source.fc.bias[0] = torch.nan
        source.bn1.running_var.fill_(torch.inf)
    save_weights(source, tmp_path / "w.safetensors")
    found = r"w\.safetensors has weights .* NaN or infinite: .*bn1\.running_var \(4 of 4 values\).*fc\.bias \(1 of 3"
    with pytest.raises(ValueError, match=found):
        load_weights(target, tmp_path / "w.safetensors")
    assert same(target, before)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda model: torch.compile(model, backend="eager")])
def test_the_network_in_a_wrapper_is_saved(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    source, target = network(), network()
    save_weights(wrap(source), tmp_path / "w.safetensors")
    target.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
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


def test_files_are_deterministic(tmp_path: Path) -> None:
    model = network()
    metadata = {f"{i} ü": str(i) for i in range(9)}
    for name in ("a", "b"):
        save_weights(model, tmp_path / name, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_metadata(tmp_path / "a") == metadata


class _Tied(nn.Module):
    """Tied weights in a child that is named like a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        self.module["b"].weight = self.module["a"].weight


def test_tied_weights_views_and_prefixes(tmp_path: Path) -> None:
    source, target = _Tied(), _Tied()
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)
    assert target.module["b"].weight is target.module["a"].weight
    for model in (source, target):
        model.register_buffer("whole", torch.arange(6.0))
        model.register_buffer("part", model.whole[2:4])
        model.register_buffer("empty", torch.zeros(0))
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_mismatches_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model, before = network(), network()
    before.load_state_dict(model.state_dict())
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    del state["conv1.weight"]
    state |= {"fc.weight": torch.zeros(7, 8), "head.bias": torch.zeros(2)}
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
    assert same(model, before)
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsMismatch, match=r"and \d+ more\n") as caught:
        load_weights(model, tmp_path / "w.pt")
    assert len(caught.value.missing) == sum("num_batches" not in name for name in model.state_dict())


def test_missing_counters_skipped_modules_and_dtypes(tmp_path: Path) -> None:
    """Missing counters and skipped modules keep their values; loaded tensors keep the network's dtypes."""
    source, target = network(5), network(3)
    kept = {name: value.clone() for name, value in target.state_dict().items() if re.search("fc|num_batches", name)}
    state = {name: value.half() for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pt")
    report = load_weights(target, tmp_path / "w.pt", skip=["fc"])
    assert report.skipped == ("fc.weight", "fc.bias")
    assert {*report.absent_counters, *report.skipped} == set(kept)
    for name, value in target.state_dict().items():
        expected = kept[name] if name in kept else state[name].float()
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch zip", "torch legacy", "pickle"])
def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "hostile.pt", tmp_path / "pwned"
    WRITERS[form](path, {"state_dict": {"conv1.weight": torch.zeros(1)}, "extra": Program(marker)})
    with pytest.raises(WeightsFormatError, match=r"hostile.pt is refused: it contains pickled objects") as caught:
        load_weights(network(), path)
    assert "weights_only=False" not in str(caught.value)
    assert not marker.exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
        assert marker.exists()
    torch.save(network(), path)
    with pytest.raises(WeightsFormatError, match=r"refused: it contains pickled objects .*CifarResNet"):
        load_weights(network(), path)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / f"truncated.{form}"
    if form == "safetensors":
        save_weights(network(), path)
    else:
        torch.save(network().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsFormatError, match=r"truncated|not a weights file"):
        load_weights(network(), path)
    if form == "safetensors":
        with pytest.raises(WeightsFormatError, match="truncated"):
            read_metadata(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "must contain a mapping of names to tensors, got list"),
        ({"epoch": 3, "lr": 0.1}, r"at the top level or under one of state_dict.*'epoch' \(int\), 'lr' \(float\)"),
        ({}, "it is empty"),
        ("text", r"neither safetensors nor written by torch\.save"),
    ],
)
def test_files_without_weights(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "w.pt"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    with pytest.raises(WeightsFormatError, match=message):
        load_weights(network(), path)
    for read in (read_metadata, lambda path: load_weights(network(), path)):
        with pytest.raises(FileNotFoundError, match="no weights file"):
            read(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"format": "pt"}, {}),
        ({"image_size": "32", "num_classes": "3", "model": "resnet8"}, {"image_size": 32, "num_classes": 3}),
        ({"mean": "0.5", "std": "[0.25]"}, {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}),
        ({"classes": '["a", "b"]', "options": '{"width": 2}'}, {"classes": ("a", "b"), "num_classes": 2}),
        ({"image_size": "0"}, "image_size '0', which is not a positive integer"),
        ({"image_size": "32.5"}, "image_size '32.5', which is not a positive integer"),
        ({"num_classes": "many"}, "num_classes 'many', which is not JSON"),
        ({"mean": "[0.5, Infinity, 0.5]"}, "which is not one finite number per channel"),
        ({"mean": "[0.5, 0.5]"}, "which is not one finite number per channel"),
        ({"mean": f"[{10**400}]"}, "which is not"),
        ({"std": "[0.5, 0, 0.5]"}, "which is not one positive number per channel"),
        ({"classes": '"cat"'}, "which is not a list of class names"),
        ({"classes": "[" * 100_000}, "which is not JSON"),
        ({"classes": '["a", "b"]', "num_classes": "3"}, "num_classes 3, but 2 names in classes"),
    ],
)
def test_descriptions_are_read_or_refused(
    tmp_path: Path, metadata: dict[str, str], expected: dict[str, object] | str
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(nn.Linear(1, 1), path, metadata)
    if isinstance(expected, str):
        with pytest.raises(WeightsFormatError, match=f"w.safetensors: its metadata has .*{re.escape(expected)}"):
            read_description(path)
        return
    found = read_description(path)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.model == metadata.get("model")
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "w.pt")
    assert read_description(tmp_path / "w.pt") == WeightsDescription()


def test_create_model_reads_weights(tmp_path: Path) -> None:
    source = network()
    save_weights(source, tmp_path / "w")
    config = ModelConfig(name="resnet8", weights=str(tmp_path / "w"), options={"widths": [4, 4, 6, 8]})
    assert same(create_model(config, num_classes=3), source)
    with pytest.raises(WeightsMismatch, match=r"fc.weight \(3, 8\) instead of \(4, 8\)"):
        create_model(config, num_classes=4)


def test_state_must_be_tensors(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    model.state_dict = lambda: {"_extra_state": {"steps": 1}}  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="all values must be tensors, got dict for '_extra_state'"):
        save_weights(model, tmp_path / "w")
    assert not list(tmp_path.glob("*"))


def test_every_changed_byte_of_saved_weights_is_noticed(tmp_path: Path) -> None:
    source, path = network(), tmp_path / "w.safetensors"
    save_weights(source, path, {"num_classes": "3", "model": "resnet8"})
    assert read_metadata(path) == {"num_classes": "3", "model": "resnet8"}  # the checksum is not shown
    content = path.read_bytes()
    for place in range(0, len(content), 499):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(WeightsFormatError, match=r"w\.safetensors is (damaged: its checksum|truncated)"):
            load_weights(network(), path)
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = {**safetensors.torch.load_file(path), "fc.bias": torch.zeros(3)}
    safetensors.torch.save_file(changed, path, metadata=metadata)
    with pytest.raises(WeightsFormatError, match=r"changed it on purpose, remove 'dfkd_fast\.checksum' from its"):
        read_description(path)
    del metadata["dfkd_fast.checksum"]
    safetensors.torch.save_file(changed, path, metadata=metadata)
    load_weights(target := network(), path)
    assert not target.fc.bias.any()


def test_changed_bytes_of_torch_files_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(network().state_dict(), path)
    content = path.read_bytes()
    weights = network().fc.weight.detach().numpy().tobytes()  # the length of one record
    place = len(content) // 2
    path.write_bytes(content[:place] + bytes(len(weights) // 4) + content[place + len(weights) // 4 :])
    with pytest.raises(WeightsFormatError, match=r"w\.pt is truncated or not a weights file: .*checksum of its record"):
        load_weights(network(), path)


def test_errors_of_the_system_name_the_weights_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(network(), path)

    for error, kind in ((MemoryError, MemoryError), (RuntimeError, OSError)):  # torch raises RuntimeError
        fail = Mock(side_effect=error("Cannot allocate memory (os error 12)"))
        monkeypatch.setattr(safetensors, "safe_open", fail)
        with pytest.raises(kind, match=r"cannot read .*w\.safetensors: Cannot allocate memory"):
            load_weights(network(), path)


def test_weights_that_are_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"no weights file .*w\.pt"):
        load_weights(network(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("meta", r"must contain dense tensors with values; these have none: conv1\.weight"),
        ("sparse", "must contain dense tensors with values"),
        ("complex", r"has complex weights, and the network has real ones: conv1\.weight"),
    ],
)
def test_tensors_that_cannot_be_weights_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    model, before, path = network(), network(), tmp_path / "w.pt"
    before.load_state_dict(model.state_dict())
    change = {"meta": lambda t: t.to("meta"), "sparse": torch.Tensor.to_sparse, "complex": lambda t: t + 1j}[kind]
    state = {name: change(t) if name == "conv1.weight" else t for name, t in network().state_dict().items()}
    torch.save(state, path)
    with pytest.raises(WeightsFormatError, match=message):
        load_weights(model, path)
    assert same(model, before)


class Hub(BaseHTTPRequestHandler):
    """Answers downloads like the Hugging Face hub: files by (repository, revision, name), and error codes."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requests.append(self.path)
        content, revision = self.files.get(self.path), self.path.split("/")[4]
        codes = {"private": "RepoNotFound", "gated": "GatedRepo"}
        missing = "EntryNotFound" if revision == "main" else "RevisionNotFound"
        self.send_response(200 if content is not None else 404)
        if content is None:
            self.send_header("X-Error-Code", codes.get(self.path.split("/")[2], missing))
        else:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    weights._download.cache_clear()
    yield Hub
    server.shutdown()
    server.server_close()
    Hub.files.clear()
    Hub.requests.clear()


def test_weights_of_the_hub(tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [network() for _ in range(3)]
    names = ("ours/resolve/main/student", "ours/resolve/refs%2Fpr%2F1/a/b", "timms/resolve/main/model")
    for each, name in zip(networks, names, strict=True):
        save_weights(each, tmp_path / "saved", {"model": "resnet8"})
        hub.files[f"/us/{name}.safetensors"] = (tmp_path / "saved").read_bytes()
    for each, name in zip(networks, ("hf:us/ours", "hf:us/ours/a/b.safetensors@refs/pr/1", "hf:us/timms"), strict=True):
        loaded = create_model(
            ModelConfig(name="resnet8", weights=name, options={"widths": [4, 4, 6, 8]}), num_classes=3
        )
        assert same(loaded, each)
    count = len(hub.requests)
    assert read_description("hf:us/ours").model == "resnet8"
    assert len(hub.requests) == count  # a process asks once
    weights._download.cache_clear()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_metadata("hf:us/timms") == {"model": "resnet8"}  # from the cache
    assert len(hub.requests) == count
    with pytest.raises(
        OSError, match=r"^hf:us/ours/c: the Hugging Face hub cannot be reached, and the file is not in "
    ):
        read_metadata("hf:us/ours/c")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("hf:us", ValueError, r"is hf:OWNER/NAME\[/FILE\]\[@REVISION\], got 'hf:us'"),
        ("hf:us/ours", FileNotFoundError, r"us/ours has no file student\.safetensors or model\.safetensors"),
        ("hf:us/ours/x.pth", FileNotFoundError, r"us/ours has no file x\.pth"),
        ("hf:us/ours/x@v1", FileNotFoundError, r"us/ours has no revision 'v1'"),
        ("hf:us/private", FileNotFoundError, r"no repository us/private, or it is private and log in with `hf auth"),
        ("hf:us/gated", FileNotFoundError, r"access to us/gated must be granted on its page, and log in"),
        ("hf:us/--ours", OSError, r"hf:us/--ours: cannot download it: HFValidationError"),
    ],
)
def test_errors_of_the_hub(name: str, error: type[Exception], message: str, hub: type[Hub]) -> None:
    with pytest.raises(error, match=message):
        read_metadata(name)
