"""Synthetic images as a product: written to a folder, and read from one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dfkd_fast import distill
from dfkd_fast.cli import main
from dfkd_fast.config import LoopConfig, SynthesisConfig, to_dict
from dfkd_fast.engine import DistillResult, make_images
from dfkd_fast.models import read_metadata, save_weights
from dfkd_fast.synthesis import read_pool, write_pool

from .. import tiny
from .test_synthesis import config


def from_folder(folder: Path, out: Path, **changes: Any) -> DistillResult:
    loop = LoopConfig(epochs=1, rounds_per_epoch=2, generator_steps=0, student_steps=2, batch_size=6)
    base = tiny.config(out)
    resume = changes.pop("resume", False)
    synthesis = SynthesisConfig(name="folder", options={"folder": str(folder)}, **changes)
    return distill(
        tiny.teacher(), tiny.network(), replace(base, loop=loop, synthesis=synthesis, resume=resume), progress=False
    )


@pytest.mark.parametrize("png", [False, True])
@pytest.mark.parametrize("name", ["fast", "deep_inversion"])
def test_images_of_a_pool_train_a_student(name: str, png: bool, tmp_path: Path) -> None:
    teacher = tiny.teacher()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    folder = make_images(teacher, config(name), count=10, out=tmp_path / "pool", png=png, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["images"], sum(manifest["per_class"]), manifest["distill"]["synthesis"]["name"]) == (10, 10, name)
    images = read_pool(folder, tiny.SIZE, 100)
    assert images.shape == (10, 3, tiny.SIZE, tiny.SIZE)
    if png:
        per_class = [len(list((folder / f"{label:04d}").glob("*.png"))) for label in range(5)]
        assert per_class == manifest["per_class"]
    else:
        labels = load_file(folder / "pool.safetensors")["labels"]
        assert torch.bincount(labels, minlength=5).tolist() == manifest["per_class"]
    result = from_folder(folder, tmp_path / "run")
    assert not tiny.same_weights(result.student, tiny.network())
    assert result.generator is None
    assert set(result.rounds) == {"round", "student/kd", "student/mhad", "student/sfcl"}
    write_pool(folder, images.flip(0), torch.zeros(10, dtype=torch.int64), png=png)
    for path in folder.glob("000[1-4]/*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="are not those that the run started with"):
        from_folder(folder, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="is not empty: choose another folder"):
        make_images(teacher, config(name), count=10, out=folder, progress=False)


def test_both_formats_have_the_same_images(tmp_path: Path) -> None:
    images, labels = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8), torch.arange(7) % 3
    for png in (False, True):
        write_pool(tmp_path / str(png), images, labels, png=png)
    assert torch.equal(read_pool(tmp_path / "False", 8, 7), images)
    assert torch.equal(read_pool(tmp_path / "True", 8, 7), images[labels.argsort(stable=True)])


def test_a_generator_of_a_run_makes_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.run(tmp_path / "run")
    generator = tmp_path / "run" / "generator.safetensors"
    assert json.loads(read_metadata(generator)["generator"])["latent_dim"] == 6
    metadata = {"model": "resnet8", "options": '{"widths": [4, 4, 8, 12]}', "num_classes": "5", "image_size": "16"}
    save_weights(tiny.teacher(), tmp_path / "t.safetensors", metadata)
    command = ["synthesize", "--teacher.name", "resnet8", "--teacher.weights", "t.safetensors", "--count", "9"]
    main([*command, "--generator", str(generator), "--out", "pool", "--distill.device", "cpu"])
    assert read_pool("pool", 16, 9).float().std() > 1
    with pytest.raises(SystemExit):
        main([*command, "--out", "none", "--distill.device", "cpu"])
    assert "synthesizer 'online' needs a trained generator: generator.safetensors of a run" in capsys.readouterr().err


def test_the_command_line_makes_a_pool_and_trains_on_it(tmp_path: Path) -> None:
    content = {
        "teacher": {"name": "resnet8", "options": {"widths": [4, 4, 8, 12]}, "weights": "t.safetensors"},
        "student": {"name": "resnet8", "options": {"widths": [4, 4, 6, 8]}},
        "distill": to_dict(config("fast", epochs=1, rounds_per_epoch=1)),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    save_weights(tiny.teacher(), tmp_path / "t.safetensors", {"num_classes": "5"})
    main(["synthesize", "--config", "c.yaml", "--count", "8", "--out", "pool", "--format", "png"])
    main(["distill", "--config", "c.yaml", "--pool", "pool", "--out", "run"])
    assert list(json.loads((tmp_path / "run" / "history.json").read_text())["rounds"]) == ["round", "student/kd"]


def test_errors_of_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must have between 1 and 9 images \(.*pool_size\), got 0"):
        from_folder(tmp_path / "empty", tmp_path / "run", pool_size=9)
    for index in range(3):
        Image.fromarray(np.full((20, 30, 3), 40 * index, np.uint8)).save(tmp_path / "empty" / f"{index}.jpg")
    assert read_pool(tmp_path / "empty", 16, 3).float().mean((1, 2, 3)).tolist() == pytest.approx([0, 40, 80], abs=2)
    with pytest.raises(ValueError, match=r"has 3 images, more than SynthesisConfig\.pool_size, 2"):
        read_pool(tmp_path / "empty", 16, 2)
    (tmp_path / "empty" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.jpg"):
        read_pool(tmp_path / "empty", 16, 3)
    save_file({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, tmp_path / "pool.safetensors")
    with pytest.raises(ValueError, match=r"must have uint8 images \(N, 3, 16, 16\), got uint8 \(2, 3, 8, 8\)"):
        read_pool(tmp_path, 16, 3)
    save_file({"others": torch.zeros(2)}, tmp_path / "pool.safetensors")
    with pytest.raises(ValueError, match=r"must have uint8 images \(N, 3, 16, 16\), got float32 \(0,\)"):
        read_pool(tmp_path, 16, 3)
    write_pool(tmp_path, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    content = (tmp_path / "pool.safetensors").read_bytes()
    (tmp_path / "pool.safetensors").write_bytes(content[:-400] + b"1" + content[-399:])
    with pytest.raises(ValueError, match=r"pool\.safetensors is damaged: its checksum does not match"):
        read_pool(tmp_path, 16, 3)
    with pytest.raises(ValueError, match="pool_size must be at least count, 17; got 16"):
        make_images(tiny.teacher(), config("fast"), count=17, out=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"SynthesisConfig\.options of 'folder': .*folder"):
        tiny.state(config("fast", synthesis=SynthesisConfig(name="folder")))
