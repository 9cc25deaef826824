"""``create_model``: published sizes, any image size, options, weights and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dfkd_fast.config import ModelConfig
from dfkd_fast.models import create_model, extract, names, normalization, save_weights

# Number of parameters with 100 classes (Tian et al., "Contrastive Representation Distillation", ICLR 2020).
PUBLISHED = {
    "wrn_40_2": 2_255_156,
    "wrn_40_1": 569_780,
    "wrn_16_2": 703_284,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
}


def build(name: str, num_classes: int = 5, **config: object) -> nn.Module:
    return create_model(ModelConfig(name=name, **config), num_classes=num_classes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_match_the_literature(name: str) -> None:
    assert sum(p.numel() for p in build(name, 100).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["wrn_10_1", "wrn_16_2", "wrn_22_1", "resnet8", "resnet8x4"])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (37, 37)])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    logits = build(name).eval()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_every_name_can_be_built() -> None:
    assert {"wrn_40_2", "wrn_16_2", "resnet8", "resnet20", "resnet8x4", "resnet32x4"} <= set(names())
    with torch.device("meta"):
        for name in names():
            assert build(name, 3).fc.out_features == 3


def test_initial_logits_have_a_moderate_scale() -> None:
    for name in ("wrn_16_2", "resnet20", "resnet8x4"):
        logits = build(name, 10).train()(torch.randn(16, 3, 32, 32))
        assert 0.05 < logits.std() < 5, name


def test_options_reach_the_network() -> None:
    narrow = build("resnet8", options={"widths": [4, 8, 8, 12], "stem_stride": 2})
    assert narrow.fc.in_features == 12
    assert extract(narrow, image_size=32).feature_channels == (8, 8, 12)
    assert narrow.conv1.stride == (2, 2)
    assert build("wrn_10_1", options={"drop_rate": 0.3}).block1[0].dropout.p == 0.3
    assert build("timm:resnet18", options={"drop_rate": 0.25}).drop_rate == 0.25
    assert build("torchvision:mobilenet_v2", options={"width_mult": 0.25}).classifier[1].out_features == 5


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [
        ("resnet18", r"named 'resnet18'; did you mean 'resnet8'.*'timm:resnet18'", {}),
        ("zzz", r"named 'zzz'; there are resnet8, resnet14.*'package.module:factory'", {}),
        ("wrn_41_2", r"depth must be 6 n \+ 4 .*, got 41", {}),
        ("wrn_40_0", r"the width, must be at least 1", {}),
        ("timm:resnet81", r"no timm model named 'resnet81'; did you mean .*'resnet18'", {}),
        ("torchvision:resnt18", r"no torchvision classifier named 'resnt18'; did you mean 'resnet18'", {}),
        ("torchvision:deeplabv3_resnet50", r"no torchvision classifier named", {}),
        ("no_such_package.sub:net", r"cannot import the module 'no_such_package'; install it or add its folder", {}),
        ("json:dumpz", r"json has no 'dumpz'; did you mean 'dump'", {}),
        ("json:__doc__", r"'json:__doc__' must be callable, got a str", {}),
        ("resnet8", "num_classes must be at least 1, got 0", {"num_classes": 0}),
        *((name, "widths must be four positive", {"options": {"widths": [4, 8]}}) for name in ("resnet8", "wrn_10_1")),
        *(
            (
                "timm:resnet18",
                f"options must not contain '{option}'.*ModelConfig\\.weights or ModelConfig\\.pretrained",
                {"options": {option: True}},
            )
            for option in ("pretrained", "weights", "num_classes", "checkpoint_path")
        ),
        ("resnet8", "pretrained needs a network of timm, got 'resnet8'", {"pretrained": True}),
    ],
)
def test_errors(name: str, message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


def factory(num_classes: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class Zoo:
    net = staticmethod(factory)
    text = staticmethod(lambda num_classes: "a network")


def test_factory_in_another_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (f"{__name__}:factory", f"{__name__}:Zoo.net"):
        model = build(name, 7, options={"width": 6})
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 7)
        assert model[0].out_channels == 6
    with pytest.raises(TypeError, match=r":Zoo.text' must return a torch.nn.Module, got a str"):
        build(f"{__name__}:Zoo.text")
    (tmp_path / "broken_networks.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):  # raised by the module itself
        build("broken_networks:net")


def test_pretrained_weights_come_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot load the pretrained weights of 'timm:test_resnet' \(.*: connect to"):
        build("timm:test_resnet", 3, pretrained=True)
    published = timm.create_model("test_resnet").state_dict()
    repository, revision = tmp_path / "models--timm--test_resnet.r160_in1k", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    save_file(published, repository / "snapshots" / revision / "model.safetensors")
    model = build("timm:test_resnet", 3, pretrained=True)
    found = model.state_dict()
    assert {name for name in found if not found[name].equal(published[name])} == {"fc.weight", "fc.bias"}
    assert found["fc.bias"].shape == (3,)
    save_weights(build("timm:test_resnet", 7), tmp_path / "w.safetensors")  # a file takes precedence
    config = ModelConfig(
        name="timm:test_resnet", pretrained=True, weights=str(tmp_path / "w.safetensors"), new_head=True
    )
    assert not create_model(config, num_classes=3).state_dict()["conv1.0.weight"].equal(published["conv1.0.weight"])


def test_new_head_keeps_the_other_weights(tmp_path: Path) -> None:
    for name, head in (("resnet8", "fc"), ("timm:resnet18", "fc"), ("torchvision:mobilenet_v2", "classifier.1")):
        trained = build(name, 10)
        save_weights(trained, tmp_path / "w.safetensors")
        model = create_model(
            ModelConfig(name=name, weights=str(tmp_path / "w.safetensors")), num_classes=4, new_head=True
        )
        old, new = trained.state_dict(), model.state_dict()
        differing = {key for key in new if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])}
        assert differing == {f"{head}.weight", f"{head}.bias"}
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_googlenet_returns_logits_in_training_mode() -> None:
    model = build("torchvision:googlenet", 3)
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_normalization() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalization(build("timm:resnet18")) == imagenet
    assert normalization(build("timm:mobilenetv2_100")) == imagenet
    assert normalization(build("torchvision:mobilenet_v2")) == imagenet
    small = build("resnet8")
    assert normalization(small) == half
    assert normalization(extract(small, image_size=32)) == half
    small.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert normalization(extract(small, image_size=32)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
