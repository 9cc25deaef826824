"""``export`` of networks in wrappers, other dtypes and patched ones, which stay as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfkd_fast import engine, patch
from dfkd_fast.cli import main
from dfkd_fast.config import ModelConfig
from dfkd_fast.engine import ExportError, ExportResult, export, model_card
from dfkd_fast.models import WeightsDescription, extract, load_weights, save_weights

from .. import tiny


def patched() -> nn.Module:
    model = tiny.network().eval().requires_grad_(False)
    assert patch(model).replaced
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DataParallel": lambda: nn.DataParallel(tiny.network()),
    "compiled, averaged": lambda: torch.compile(AveragedModel(tiny.network()), backend="eager"),
    "traced, float16": lambda: extract(tiny.network().half(), image_size=tiny.SIZE),
    "float64": lambda: tiny.network().double().to(memory_format=torch.channels_last),
    "patched": patched,
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_is_exported(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()

    def state() -> list[object]:
        tensors = [(key, t.dtype, t.stride(), t.tolist()) for key, t in model.state_dict().items()]
        return [*tensors, [(m.training, "forward" in m.__dict__) for m in model.modules()]]

    before = state()
    result = export(model, tmp_path, image_size=tiny.SIZE)
    assert result.difference < 1e-3
    assert state() == before
    student = tiny.network(seed=3)
    load_weights(student, result.safetensors)
    expected = tiny.network().half().float() if "float16" in name else tiny.network()
    assert tiny.same_weights(student, expected)


class Scaled(nn.Module):
    """Has weights with the names of the graph's input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny.network()
        self.logits, self.images = nn.Parameter(torch.full((1,), 2.0)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * self.logits + self.images


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_weights_named_as_the_input_or_output(tmp_path: Path) -> None:
    assert export(Scaled(), tmp_path, image_size=tiny.SIZE).difference < 1e-3


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * 1e38 * 1e38


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def not_finite() -> nn.Module:
    model = tiny.network()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    return model


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (not_finite, ValueError, r"CifarResNet has weights .* NaN or infinite: fc\.weight \(1 of 40 values\)"),
        (Overflow, ExportError, r"the logits of Overflow for random images are NaN or infinite in PyTorch"),
        (Branch, ExportError, r"torch\.onnx cannot export Branch: "),
        (lambda: nn.Conv2d(7, 3, 3), ValueError, r"Conv2d does not accept an image \(2, 3, 16, 16\)"),
    ],
)
def test_networks_that_cannot_be_exported(
    model: Callable[[], nn.Module], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(model(), tmp_path, image_size=tiny.SIZE)
    assert not (tmp_path / "student.safetensors").exists()


def write_card(folder: Path, **changes: Any) -> ModelCard:
    given = {"weights": folder / "student.safetensors", "model": ModelConfig(name="resnet8"), "num_classes": 30}
    given |= {"description": WeightsDescription(classes=("a|b", *map(str, range(29)))), "image_size": 16}
    return ModelCard.load(model_card.write_card(folder, **(given | changes)))


def test_card_without_a_run_names_what_is_known(tmp_path: Path) -> None:
    card = write_card(tmp_path, license="apache-2.0", repo="us/bird-net")
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results is None
    assert "# bird-net" in card.content
    assert r"| classes | 30: `a\|b`, `0`, " in card.content
    assert "`18`, and 10 more |" in card.content
    for absent in ("teacher", "method", "accuracy", "Normalize"):
        assert absent not in card.text
    assert "weights='hf:us/bird-net'," in card.content
    assert 'hf_hub_download("us/bird-net", "student.onnx")' in card.content


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("last", {"accuracy": 0.4, "agreement": 0.7}),
        ("agreement", {"agreement": 0.8}),  # in the second epoch, which was not evaluated
        ("test_accuracy", {"accuracy": 0.5, "agreement": 0.6}),
    ],
)
def test_card_has_the_numbers_of_the_saved_weights(select: str, expected: dict[str, float], tmp_path: Path) -> None:
    config = {"objective": {"preset": "fast"}, "synthesis": {"name": "fast"}, "loop": {"select": select}}
    (tmp_path / "config.yaml").write_text(json.dumps({"distill": config}))
    series = {"epoch": [1, 2, 3], "agreement": [0.6, 0.8, 0.7], "accuracy": [0.5, None, 0.4]}
    (tmp_path / "history.json").write_text(json.dumps({"rounds": {}, "epochs": series}))
    card = write_card(tmp_path)
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == expected
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ValueError, match=r"history\.json is damaged"):
        write_card(tmp_path)


def test_another_readme_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_card(tmp_path)
    assert "# name" in write_card(tmp_path, repo="us/name").content  # a card is replaced
    (tmp_path / "README.md").write_text("# Mine")
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"
    assert "README.md is not a model card of dfkd-fast, and is kept" in caplog.text


class Api:
    """Stands in for the hub; ``public`` exists."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def create_repo(self, repo: str, **options: Any) -> None:
        if repo == "us/full":
            raise OSError("403 Forbidden\nmore")
        self.calls.append((repo, options))

    def model_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=repo != "us/public")

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        uploaded = [name for name in files if name in options["allow_patterns"]]
        self.calls.append((options["repo_id"], {"files": uploaded}))
        return SimpleNamespace(commit_url="https://hub/us/net/commit/1")


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    description = {"model": "resnet8", "options": '{"widths": [4, 4, 6, 8]}', "num_classes": "5", "image_size": "16"}
    save_weights(tiny.network(), tmp_path / "student.safetensors", description)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("not for the hub")
    command = ["export", "--weights", str(tmp_path / "student.safetensors"), "--out", str(tmp_path / "out")]

    def quick_export(model: nn.Module, out: Path, *, image_size: int, metadata: dict[str, str]) -> ExportResult:
        paths = [out / f"student.{suffix}" for suffix in ("safetensors", "onnx")]
        for path in paths:
            path.touch()
        return ExportResult(safetensors=paths[0], onnx=paths[1], difference=0.0)

    monkeypatch.setattr(engine, "export", quick_export)
    monkeypatch.setattr(model_card, "HfApi", Api)
    monkeypatch.setattr(model_card, "get_token", lambda: None)

    def error(*options: str) -> str:
        with pytest.raises(SystemExit):
            main([*command, *options])
        return capsys.readouterr().err.strip()

    assert error("--push_to_hub", "us/net").endswith("log in with `hf auth login` or set HF_TOKEN")
    assert error("--push_to_hub", "net") == "error: a repository of the Hugging Face hub is OWNER/NAME, got 'net'"
    monkeypatch.setattr(model_card, "get_token", lambda: "secret")
    main([*command, "--push_to_hub", "us/net", "--private"])
    files = ["README.md", "student.onnx", "student.safetensors"]
    assert Api.calls == [("us/net", {"private": True, "exist_ok": True}), ("us/net", {"files": files})]
    assert "https://hub/us/net/commit/1" in capsys.readouterr().out
    assert "weights='hf:us/net'" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ExportError, match=r"^us/public exists on the Hugging Face hub and is public"):
        model_card.push_to_hub(tmp_path, "us/public", private=True)
    with pytest.raises(
        ExportError, match=r"^cannot upload to us/full on the Hugging Face hub: OSError: 403 Forbidden$"
    ):
        model_card.push_to_hub(tmp_path, "us/full")
