"""Generators, callbacks, terms and presets that are not part of this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from dfkd_fast import distill
from dfkd_fast.config import GeneratorConfig
from dfkd_fast.engine import DistillResult, generator_step, student_step
from dfkd_fast.engine.rounds import Round
from dfkd_fast.models import save_weights
from dfkd_fast.nn import GENERATORS, UpsamplingGenerator

from .. import tiny


class Own(nn.Module):
    """Has the state that a forward in training mode changes: BatchNorm, spectral norm by a hook, and dropout."""

    def __init__(self, latent_dim: int = 5, size: int = 20) -> None:
        super().__init__()
        self.latent_dim, self.size = latent_dim, size
        self.layer, self.norm = spectral_norm(nn.Linear(latent_dim, 3 * size**2)), nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.1)

    def forward(self, noise: Tensor) -> Tensor:
        return self.norm(self.dropout(self.layer(noise).view(-1, 3, self.size, self.size))).tanh()


def run(out: Path, generator: nn.Module | None = None, **changes: Any) -> DistillResult:
    config = tiny.config(out, image_size=20, **changes)
    return distill(tiny.teacher(), tiny.network(), config, generator=generator, progress=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_own_generator_is_trained_in_place(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = Own()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    result = run(tmp_path, generator, precision=precision)
    assert result.generator is generator
    assert not [name for name, value in generator.state_dict().items() if torch.equal(value, before[name])]
    resumed = run(tmp_path, Own(), precision=precision, resume=True)
    assert tiny.same_weights(resumed.generator, generator)
    assert tiny.same_weights(resumed.student, result.student)


def test_student_steps_do_not_change_an_own_generator(tmp_path: Path) -> None:
    from dfkd_fast.engine import Runtime, build_state
    from dfkd_fast.models import extract

    features = [extract(each, image_size=20) for each in (tiny.teacher().eval(), tiny.network())]
    features[0].requires_grad_(False)
    sizes = {"image_size": 20, "mean": tiny.HALF, "std": tiny.HALF}
    runtime = Runtime.of("cpu", "fp32", channels_last=True)
    state = build_state(*features, tiny.config(image_size=20), runtime, given=Own(), **sizes)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in state.generator.module.state_dict().items()}
    student_step(state)
    assert all(torch.equal(value, before[name]) for name, value in state.generator.module.state_dict().items())
    generator_step(state)
    assert not torch.equal(state.generator.module.layer.weight_u, before["layer.weight_u"])


def test_generators_of_the_config(tmp_path: Path) -> None:
    config = GeneratorConfig(name="upsampling", latent_dim=7, options={"width": 4, "normalize_image": True})
    result = distill(
        tiny.teacher(), tiny.network(), tiny.config(tmp_path, image_size=20, generator=config), progress=False
    )
    assert isinstance(result.generator, UpsamplingGenerator)
    assert result.generator(torch.randn(2, 7)).shape == (2, 3, 20, 20)
    factory = GeneratorConfig(name=f"{__name__}:make", latent_dim=4)
    changed = tiny.config(tmp_path / "b", image_size=20, generator=factory)
    made = distill(tiny.teacher(), tiny.network(), changed, progress=False)
    assert isinstance(made.generator, Own)


def make(image_size: int, latent_dim: int) -> nn.Module:
    return Own(latent_dim, image_size)


def test_a_generator_in_eval_mode_and_in_another_dtype(tmp_path: Path) -> None:
    generator = Own().to(torch.bfloat16).eval()
    before = generator.norm.running_mean.clone()
    run(tmp_path, generator)
    assert not torch.equal(generator.norm.running_mean, before)
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.bfloat16}


class NoLatent(nn.Module):
    def forward(self, noise: Tensor) -> Tensor:
        return noise


class Wrong(Own):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, noise: Tensor) -> Tensor:
        return self.change(super().forward(noise))


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (NoLatent(), r"NoLatent\.latent_dim must be the length of the noise vector, got None"),
        (Own(size=16), r"Own must return images \(2, 3, 20, 20\) of noise \(2, 5\), got \(2, 3, 16, 16\)"),
        (Wrong(lambda x: 3 * x), r"Wrong must return images in \[-1, 1\], got values up to "),
        (Wrong(lambda x: x * torch.nan), r"Wrong must return images in \[-1, 1\], got values up to nan"),
        (Wrong(list), r"got list"),
        (Own().requires_grad_(False), r"Own has no weight that requires a gradient: call requires_grad_\(True\)"),
    ],
)
def test_generators_that_are_refused(generator: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, generator)


def test_unknown_generators_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"GeneratorConfig\.name: no generator named 'upsample'; did you mean 'ups"):
        GENERATORS.find("upsample")
    with pytest.raises(ValueError, match=r"no generator named 'zzz'; there are attention, upsampling"):
        GENERATORS.find("zzz")
    with pytest.raises(ValueError, match="must not contain a colon"):
        GENERATORS.register("a:b")


def test_callbacks_see_rounds_and_can_stop_the_run(tmp_path: Path) -> None:
    seen = []

    def watch(done: Round, state: Any) -> None:
        seen.append((done.number, state.position.round, set(done.means) >= {"generator/bn", "student/kd"}))

    def stop(done: Round, state: Any) -> bool:
        return done.number == 1

    result = distill(tiny.teacher(), tiny.network(), tiny.config(tmp_path), callbacks=[watch, stop], progress=False)
    assert seen == [(0, 1, True), (1, 2, True)]
    assert result.rounds["round"] == [0, 1]
    assert (tmp_path / "student.safetensors").is_file()
    again = distill(
        tiny.teacher(), tiny.network(), tiny.config(tmp_path, resume=True), callbacks=[watch], progress=False
    )
    assert seen[2:] == [(2, 3, True), (3, 4, True)]
    whole = distill(tiny.teacher(), tiny.network(), tiny.config(tmp_path / "whole"), progress=False)
    assert tiny.same_weights(again.student, whole.student)


def test_a_run_that_ends_within_an_epoch_is_evaluated(tmp_path: Path) -> None:
    changes = {"rounds_per_epoch": 3, "epochs": 1, "select": "agreement"}
    first = [np.bool_(False), np.bool_(True)]
    networks = tiny.teacher(), tiny.network()
    result = distill(
        *networks, tiny.config(tmp_path, **changes), callbacks=[lambda done, state: first[done.number]], progress=False
    )
    assert result.epochs["epoch"] == [1]
    resumed = distill(*networks, tiny.config(tmp_path, resume=True, **changes), progress=False)
    assert resumed.epochs["epoch"] == [1]
    assert len(resumed.epochs["agreement"]) == 1
    assert resumed.rounds["round"] == [0, 1, 2]


PACKAGE = """
import torch
from torch import nn
from dfkd_fast.nn import GENERATORS
from dfkd_fast.objectives import PRESETS, Preset, Term, register

@GENERATORS.register("noise")
class Noise(nn.Module):
    def __init__(self, image_size, latent_dim, scale=1.0):
        super().__init__()
        self.latent_dim, self.size, self.scale = latent_dim, image_size, scale
        self.layer = nn.Linear(latent_dim, 3 * image_size**2)

    def forward(self, noise):
        return (self.scale * self.layer(noise)).view(-1, 3, self.size, self.size).tanh()

@register("brightness", "generator")
class Brightness(Term):
    reads_features = False

    def forward(self, teacher, student):
        return teacher.logits.float().mean()

PRESETS.register("mine")(Preset(generator={"brightness": 2.0}, student={"kd": 1.0}, source="this test"))
"""


def test_a_package_adds_a_generator_a_term_and_a_preset(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    (folder / "other_package").mkdir(parents=True)
    (folder / "other_package" / "__init__.py").write_text(PACKAGE)
    (folder / "other_package-1.0.dist-info").mkdir()
    (folder / "other_package-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\n")
    (folder / "other_package-1.0.dist-info" / "entry_points.txt").write_text(
        "[dfkd_fast.plugins]\nother = other_package\n"
    )
    save_weights(tiny.network(), tmp_path / "t.safetensors", {"model": "resnet8", "num_classes": "5"})
    widths = '{"widths": [4, 4, 6, 8]}'
    command = [sys.executable, "-m", "dfkd_fast", "distill", "--out", "run", "--teacher.weights", "t.safetensors"]
    command += ["--student.name", "resnet8", "--teacher.name", "resnet8", "--teacher.options", widths]
    command += ["--distill.image_size", "20", "--distill.objective.preset", "mine", "--distill.device", "cpu"]
    command += ["--distill.generator.name", "noise", "--distill.generator.options", '{"scale": 0.5}']
    command += ["--distill.loop.epochs", "1", "--distill.loop.rounds_per_epoch", "1", "--distill.loop.batch_size", "4"]
    command += ["--distill.loop.generator_steps", "1", "--distill.loop.student_steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generator/brightness" in (tmp_path / "run" / "history.json").read_text()
    refused = subprocess.run(
        [*command, "--out", "b", "--distill.objective.preset", "theirs"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "ObjectiveConfig.preset: no preset named 'theirs'; there are dfkd-fgvc, baseline" in refused.stderr
    assert "mine" in refused.stderr
