"""The loop: what it leaves, how it goes on after a stop, what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import dfkd_fast
from dfkd_fast.config import DistillConfig, ObjectiveConfig, OptimizerConfig
from dfkd_fast.engine import CheckpointError, Checkpoints, NonFiniteError, engines, loop
from dfkd_fast.engine.checkpoint import fingerprint
from dfkd_fast.engine.progress import ProgressLine
from dfkd_fast.models import create_model, extract, load_weights, read_metadata

from .. import tiny


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    student = tiny.network()
    teacher = tiny.teacher().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    result = dfkd_fast.distill(
        teacher, student, tiny.config(tmp_path), data=tiny.data(), description={"model": "resnet8"}, progress=False
    )
    assert result.student is student
    assert not student.training
    assert teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    terms = {"generator/bn", "generator/kd", "student/kd", "student/mhad", "student/sfcl"}
    assert set(result.rounds) == {"round", *terms}
    assert result.rounds["round"] == [0, 1, 2, 3]
    assert result.epochs["epoch"] == [1, 2]
    assert len(result.epochs["accuracy"]) == len(result.epochs["agreement"]) == 2
    assert result.accuracy == result.epochs["accuracy"][-1]
    assert 0 <= result.agreement <= 1
    assert result.images_per_s > 0
    for name in ("config.yaml", "curves.png", "history.json", "images/epoch-0001.png", "images/epoch-0002.png"):
        assert (tmp_path / name).is_file(), name
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "round-000003-step-0000.pt",
        "round-000004-step-0000.pt",
    ]
    fresh = tiny.network(seed=99)
    load_weights(fresh, tmp_path / "student.safetensors")
    assert same(fresh, student)
    assert set(load_file(tmp_path / "student.safetensors")) == set(student.state_dict())  # the plain network alone
    metadata = read_metadata(tmp_path / "student.safetensors")
    assert metadata["model"] == "resnet8"
    assert json.loads(metadata["mean"]) == list(tiny.HALF)
    assert metadata["num_classes"] == str(tiny.CLASSES)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["distill"]["loop"]["batch_size"] == 6


def test_a_seed_is_a_run(tmp_path: Path, whole: dfkd_fast.DistillResult) -> None:
    again = tiny.run(tmp_path / "again")
    assert same(again.student, whole.student)
    assert same(again.generator, whole.generator)
    assert again.rounds == whole.rounds
    assert not same(tiny.run(tmp_path / "other", seed=1).generator, whole.generator)


def test_a_user_gives_stages_or_a_network_of_their_own(tmp_path: Path) -> None:
    teacher = extract(tiny.teacher(), stages=["layer1", "layer3"], image_size=16)
    student = extract(tiny.network(), stages=["layer2", "layer3"], image_size=16)
    result = dfkd_fast.distill(teacher, student, tiny.config(tmp_path), progress=False)
    assert result.student is student.model
    assert result.accuracy is None
    assert "accuracy" not in result.epochs


class Stopped(BaseException):
    """As if the process had died here."""


@pytest.mark.parametrize("step", [3, 14], ids=["before the first checkpoint", "in a round after one"])
def test_resumed_anywhere_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, whole: dfkd_fast.DistillResult
) -> None:
    calls = 0

    def dying(original: Any) -> Any:
        def take(*arguments: Any) -> None:
            nonlocal calls
            if calls == step:
                raise Stopped
            calls += 1
            original(*arguments)

        return take

    with monkeypatch.context() as patch:
        for name in ("generator_step", "student_step"):
            patch.setattr(engines, name, dying(getattr(engines, name)))
        with pytest.raises(Stopped):
            tiny.run(tmp_path / "broken", checkpoint_every=2)
    resumed = tiny.run(tmp_path / "broken", checkpoint_every=2, resume=True)
    assert same(resumed.student, whole.student)
    assert same(resumed.generator, whole.generator)
    assert resumed.rounds == whole.rounds
    assert resumed.epochs == whole.epochs
    assert resumed.agreement == whole.agreement


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_before_leaving(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    expected: type[BaseException],
    whole: dfkd_fast.DistillResult,
) -> None:
    step, handler = engines.student_step, signal.getsignal(number)

    def signalled(*arguments: Any) -> None:
        step(*arguments)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "student_step", signalled)
        with pytest.raises(expected) as stopped:
            tiny.run(tmp_path / "stopped", checkpoint_every=100)
    if expected is SystemExit:
        assert stopped.value.code == 143
    assert signal.getsignal(number) == handler
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["round-000000-step-0003.pt"]
    resumed = tiny.run(tmp_path / "stopped", resume=True, checkpoint_every=100)
    assert same(resumed.student, whole.student)
    assert resumed.rounds == whole.rounds


def test_a_torn_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: dfkd_fast.DistillResult
) -> None:
    shutil.copytree(whole.run_dir, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "round-000004-step-0000.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    again = tiny.run(tmp_path, resume=True)
    assert "round-000004-step-0000.pt is torn" in caplog.text
    assert same(again.student, whole.student)
    flipped = bytearray(newest.read_bytes())
    for index in range(len(flipped) // 2, len(flipped) // 2 + 256):  # more than the padding between two records
        flipped[index] ^= 0xFF
    newest.write_bytes(flipped)
    assert same(tiny.run(tmp_path, resume=True).student, whole.student)
    assert caplog.text.count("is torn") == 2


def test_a_foreign_checkpoint_is_refused_with_its_reason(tmp_path: Path, whole: dfkd_fast.DistillResult) -> None:
    shutil.copytree(whole.run_dir, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="written with another config"):
        tiny.run(tmp_path, resume=True, optimizer=OptimizerConfig(student_lr=0.1))
    with pytest.raises(CheckpointError, match="written with another teacher"):
        dfkd_fast.distill(
            tiny.network((4, 4, 8, 12), seed=5), tiny.network(), tiny.config(tmp_path, resume=True), progress=False
        )
    for path in folder.iterdir():
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)
    with pytest.raises(CheckpointError, match=r"is foreign: it is not a dfkd_fast.checkpoint/1 file"):
        tiny.run(tmp_path, resume=True)


def test_a_checkpoint_is_never_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harmed",))

    config = tiny.config(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config, "teacher")
    checkpoints.folder.mkdir()
    path = checkpoints.folder / "round-000001-step-0000.pt"
    torch.save({"format": "dfkd_fast.checkpoint/1", "state": Harm()}, path)
    with pytest.raises(CheckpointError, match="is foreign"):
        checkpoints.read(path)
    assert not (tmp_path / "harmed").exists()


def test_what_may_change_between_a_run_and_its_resumption() -> None:
    config = tiny.config()
    for free in (replace(config, out="elsewhere"), replace(config, resume=True), tiny.config(checkpoint_every=7)):
        assert fingerprint(free) == fingerprint(config)
    for bound in (replace(config, seed=1), tiny.config(batch_size=7), replace(config, precision="bf16")):
        assert fingerprint(bound) != fingerprint(config)


def test_a_folder_with_another_run_is_not_written_over(whole: dfkd_fast.DistillResult) -> None:
    with pytest.raises(ValueError, match="holds checkpoints of a run already"):
        tiny.run(whole.run_dir)


def test_the_format_of_a_checkpoint_is_that_of_its_first_version() -> None:
    """Files of a run that was stopped under an earlier version go on."""
    state = tiny.state()
    parts = {
        *("student", "generator"),
        *(f"{side}_{part}" for side in ("generator", "student") for part in ("objective", "optimizer", "scaler")),
    }
    rest = {"noise", "rng_cpu", "rng_cuda", "student_updates", "position", "trace", "rounds", "epochs", "best"}
    saved = state.state_dict()
    assert saved.keys() == parts | rest
    assert saved["student"].keys() == tiny.network().state_dict().keys()
    assert {"blocks.0.attention.expand.weight", "project.weight"} <= saved["generator"].keys()
    assert all(name.startswith("terms.") for name in saved["student_objective"])
    fresh = tiny.state(replace(tiny.config(), seed=5))
    fresh.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(state.changing(), fresh.changing(), strict=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = engines.student_step, 0

    def poisoned(state: Any, networks: Any) -> None:
        nonlocal count
        count += 1
        keep = state.normalize.shift.clone()
        if count == 4:  # the second student step of the second round
            state.normalize.shift.fill_(float("nan"))
        step(state, networks)
        state.normalize.shift.copy_(keep)

    monkeypatch.setattr(engines, "student_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"round 1, student step 1: kd, mhad, sfcl not finite"):
        tiny.run(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-000001-step-0000.pt"]


@pytest.mark.parametrize("select", ["agreement", "test_accuracy"])
def test_the_best_student_by_the_criterion_asked_for_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    scores = iter([0.9, 0.4, 0.4, 0.4])
    students: list[dict[str, torch.Tensor]] = []

    def score(network: nn.Module) -> float:
        students.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return next(scores)

    if select == "agreement":
        monkeypatch.setattr(loop, "agreement", lambda state: score(state.student.module.model))
    else:
        monkeypatch.setattr(loop._Run, "accuracy", lambda self, student: score(student))
    result = tiny.run(tmp_path, select=select)
    assert all(torch.equal(tensor, result.student.state_dict()[name]) for name, tensor in students[0].items())
    assert not all(torch.equal(tensor, result.student.state_dict()[name]) for name, tensor in students[1].items())


def _distill(config: DistillConfig, **arguments: Any) -> None:
    networks = {"teacher": tiny.teacher(), "student": tiny.network(), **arguments}
    dfkd_fast.distill(networks.pop("teacher"), networks.pop("student"), config, progress=False, **networks)


def test_what_does_not_fit_together_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    with pytest.raises(ValueError, match="image_size must be given without evaluation data"):
        _distill(replace(config, image_size=None))
    with pytest.raises(ValueError, match="'test_accuracy', which needs evaluation data"):
        _distill(tiny.config(tmp_path, select="test_accuracy"))
    other = create_model(tiny.ModelConfig(name="resnet8"), num_classes=3)
    with pytest.raises(ValueError, match="must have the same classes, got 5 and 3"):
        _distill(config, student=other)
    with pytest.raises(ValueError, match="data has 5 classes, the teacher 3"):
        _distill(config, teacher=other, data=tiny.data())
    with pytest.raises(ValueError, match="precision 'tf32' needs a CUDA device"):
        _distill(replace(config, precision="tf32"))
    with pytest.raises(ValueError, match="device must be 'auto' or a torch device, got 'gpu'"):
        _distill(replace(config, device="gpu"))
    with pytest.raises(ValueError, match="did you mean 'mhad'"):
        _distill(replace(config, objective=ObjectiveConfig(student={"mhda": 1.0})))
    assert not (tmp_path / "checkpoints").exists()


def test_progress_shows_rounds_terms_speed_and_time_left() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    terms = {"generator/bn": 12.345, "generator/kd": 0.25, "student/kd": 0.5, "student/mhad": 0.125}
    with ProgressLine("distil", total=4, unit="rounds", console=console) as line:
        line.update(1, terms, 744.4)
        line.print("saved at round 1, step 2")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    shown = " ".join(shown.split())  # a line that is too long for the terminal is wrapped, not cut
    for words in (
        "distil",
        "1/4",
        "rounds",
        "left",
        "generator/bn 12.3",
        "student/mhad 0.125",
        "744 images/s",
        "saved at",
    ):
        assert words in shown
    silent = Console(width=80, file=io.StringIO(), force_terminal=True)
    with ProgressLine("distil", total=4, unit="rounds", enabled=False, console=silent) as line:
        line.update(1, terms)
        line.print("nothing")
    assert silent.file.getvalue() == ""  # type: ignore[attr-defined]
