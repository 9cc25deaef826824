"""`distill`: its files and results, resuming, and the errors that it raises."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import dfkd_fast
from dfkd_fast.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from dfkd_fast.engine import CheckpointError, Checkpoints, NonFiniteError, engines, loop
from dfkd_fast.engine.checkpoint import fingerprint
from dfkd_fast.engine.interrupt import catch_signals
from dfkd_fast.engine.progress import ProgressLine
from dfkd_fast.models import create_model, extract, load_weights, read_metadata

from .. import tiny


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_result(one: dfkd_fast.DistillResult, other: dfkd_fast.DistillResult) -> None:
    assert tiny.same_weights(one.student, other.student)
    assert tiny.same_weights(one.generator, other.generator)
    assert (one.rounds, one.epochs, one.agreement) == (other.rounds, other.epochs, other.agreement)


def test_distill_writes_its_files_and_preserves_the_teacher(tmp_path: Path) -> None:
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
    assert checkpoint_names(tmp_path) == ["round-000003-step-0000.pt", "round-000004-step-0000.pt"]
    fresh = tiny.network(seed=99)
    load_weights(fresh, tmp_path / "student.safetensors")
    assert tiny.same_weights(fresh, student)
    assert set(load_file(tmp_path / "student.safetensors")) == set(student.state_dict())  # no adapters or heads
    metadata = read_metadata(tmp_path / "student.safetensors")
    assert metadata["model"] == "resnet8"
    assert json.loads(metadata["mean"]) == list(tiny.HALF)
    assert metadata["num_classes"] == str(tiny.CLASSES)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["distill"]["loop"]["batch_size"] == 6


def test_seed_determines_the_result(tmp_path: Path, uninterrupted_run: dfkd_fast.DistillResult) -> None:
    assert_same_result(tiny.run(tmp_path / "again"), uninterrupted_run)
    assert not tiny.same_weights(tiny.run(tmp_path / "other", seed=1).generator, uninterrupted_run.generator)


def test_distill_takes_feature_models_without_data(tmp_path: Path) -> None:
    teacher = extract(tiny.teacher(), stages=["layer1", "layer3"], image_size=16)
    student = extract(tiny.network(), stages=["layer2", "layer3"], image_size=16)
    result = dfkd_fast.distill(teacher, student, tiny.config(tmp_path), progress=False)
    assert result.student is student.model
    assert result.accuracy is None
    assert "accuracy" not in result.epochs


@pytest.mark.parametrize("step", [3, 14], ids=["before the first checkpoint", "in a round after one"])
def test_resumed_run_ends_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, uninterrupted_run: dfkd_fast.DistillResult
) -> None:
    with monkeypatch.context() as patch:
        tiny.die_before_step(patch, step)
        with pytest.raises(tiny.Killed):
            tiny.run(tmp_path, checkpoint_every=2)
    assert_same_result(tiny.run(tmp_path, checkpoint_every=2, resume=True), uninterrupted_run)


def test_tensorboard_shows_each_round_of_a_killed_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoints.save

    def shown() -> list[int]:
        return [event.step for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("student/kd")]

    def checked(self: Checkpoints, state: dict[str, Any]) -> Path:
        assert shown() == list(range(1, state["position"][0] + 1))  # a kill would lose what is not on the disk yet
        return save(self, state)

    monkeypatch.setattr(Checkpoints, "save", checked)
    for step in (6, 9):  # in the second round, without a checkpoint, and in the third one, after a checkpoint
        with monkeypatch.context() as patch:
            tiny.die_before_step(patch, step)
            with pytest.raises(tiny.Killed):
                tiny.run(tmp_path, checkpoint_every=2, resume=step > 6)
    tiny.run(tmp_path, checkpoint_every=2, resume=True)
    assert shown() == [1, 2, 3, 4]


def test_resumed_run_deletes_the_checkpoints_that_a_killed_one_left(finished: Path) -> None:
    names = checkpoint_names(finished)
    shutil.copy(finished / "checkpoints" / names[0], finished / "checkpoints" / "round-000002-step-0000.pt")
    tiny.run(finished, resume=True)
    assert checkpoint_names(finished) == names


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signal_saves_a_checkpoint_before_leaving(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    expected: type[BaseException],
    uninterrupted_run: dfkd_fast.DistillResult,
) -> None:
    step, handler = engines.student_step, signal.getsignal(number)

    def signalled(*arguments: Any) -> None:
        step(*arguments)
        for _ in range(2):  # torchrun sends Ctrl-C to processes that have got it from the terminal
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "student_step", signalled)
        with pytest.raises(expected) as stopped:
            tiny.run(tmp_path, checkpoint_every=100)
    if expected is SystemExit:
        assert stopped.value.code == 143
    assert signal.getsignal(number) == handler
    assert checkpoint_names(tmp_path) == ["round-000000-step-0003.pt"]
    assert_same_result(tiny.run(tmp_path, resume=True, checkpoint_every=100), uninterrupted_run)


def test_a_second_signal_has_its_usual_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    with catch_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.received is signal.SIGINT


@pytest.fixture
def finished(tmp_path: Path, uninterrupted_run: dfkd_fast.DistillResult) -> Path:
    """A copy of a finished run's folder."""
    shutil.copytree(uninterrupted_run.run_dir, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_damaged_checkpoint_falls_back_to_the_previous_one(
    finished: Path, caplog: pytest.LogCaptureFixture, uninterrupted_run: dfkd_fast.DistillResult
) -> None:
    newest = finished / "checkpoints" / "round-000004-step-0000.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    again = tiny.run(finished, resume=True)
    assert "round-000004-step-0000.pt is damaged" in caplog.text
    assert tiny.same_weights(again.student, uninterrupted_run.student)
    flipped = bytearray(newest.read_bytes())
    for index in range(len(flipped) // 2, len(flipped) // 2 + 256):  # more than the padding between two records
        flipped[index] ^= 0xFF
    newest.write_bytes(flipped)
    assert tiny.same_weights(tiny.run(finished, resume=True).student, uninterrupted_run.student)
    assert caplog.text.count("is damaged") == 2


def test_checkpoint_of_another_run_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="already contains checkpoints of a run"):
        tiny.run(finished)
    with pytest.raises(CheckpointError, match=r"another config: optimizer.student_lr was 0.05 and is now 0.1"):
        tiny.run(finished, resume=True, optimizer=OptimizerConfig(student_lr=0.1))
    with pytest.raises(CheckpointError, match="was written with another teacher"):
        dfkd_fast.distill(
            tiny.network((4, 4, 8, 12), seed=5), tiny.network(), tiny.config(finished, resume=True), progress=False
        )
    whole = torch.load(next((finished / "checkpoints").iterdir()), weights_only=True)
    for path in (finished / "checkpoints").iterdir():
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)
    with pytest.raises(CheckpointError, match=r"has format None, expected dfkd_fast.checkpoint/2"):
        tiny.run(finished, resume=True)
    for changes in ({"state": {}}, {"settings": None}, {"settings": [1]}, {"state": 3}):
        for path in (finished / "checkpoints").iterdir():
            torch.save({**whole, **changes}, path)
        with pytest.raises(CheckpointError, match=r"is damaged or not a checkpoint: its settings or state are invalid"):
            tiny.run(finished, resume=True)
    for path in (finished / "checkpoints").iterdir():
        torch.save({"format": "dfkd_fast.checkpoint/1"}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint/1, expected .*/2; continue this run with the version that"):
        tiny.run(finished, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "loop.batch_size was 6 and is now 7; set it back, or choose another folder for out"),
        (
            {"seed": 3, "generator_steps": 1},
            "loop.generator_steps was 2 and is now 1; .*seed was 0 and is now 3|seed.*gen",
        ),
        ({"precision": "bf16"}, "precision was fp32 and is now bf16"),
        ({"mean": (0.4, 0.5, 0.5)}, r"mean was \[0.5, 0.5, 0.5\] and is now \[0.4, 0.5, 0.5\]"),
        ({"image_size": 32}, "image_size was 16 and is now 32"),
        ({"objective": ObjectiveConfig()}, "objective.student.sfcl was 1.0 and is now not set"),
        (
            {"epochs": 3},
            "loop.epochs was 2 and is now 3; only a run with optimizer.student_schedule 'constant' can get",
        ),
        ({"epochs": 1}, "loop.epochs was 2 and is now 1; only a run with"),
        (
            {"select": "agreement", "epochs": 3},
            "loop.epochs was 2 and is now 3; loop.select was last and is now agreement",
        ),
    ],
)
def test_resume_names_the_settings_that_differ(finished: Path, changes: dict[str, Any], message: str) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=message) as refused:
        tiny.run(finished, resume=True, **changes)
    assert len(str(refused.value).splitlines()) == 1
    assert before == {path: path.read_bytes() for path in before}  # nothing is written


def test_evaluate_every_is_fixed_when_it_decides_which_student_is_returned(tmp_path: Path) -> None:
    tiny.run(tmp_path, select="test_accuracy")
    with pytest.raises(CheckpointError, match=r"loop\.evaluate_every was 1 and is now 2"):
        tiny.run(tmp_path, select="test_accuracy", evaluate_every=2, resume=True)


def test_resume_allows_settings_that_do_not_change_the_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted_run: dfkd_fast.DistillResult
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})  # "auto" is fp32
    with monkeypatch.context() as patch:
        tiny.die_before_step(patch, 3, "student_step")
        with pytest.raises(tiny.Killed):
            tiny.run(tmp_path, evaluate_every=0, mean=None, std=None, image_size=None, precision="auto")
    shutil.move(tmp_path / "checkpoints", tmp_path / "moved" / "checkpoints")
    free = {"checkpoint_every": 3, "keep_checkpoints": 4, "engine": "eager", "autotune": True}
    resumed = tiny.run(tmp_path / "moved", resume=True, precision="fp32", **free)
    assert tiny.same_weights(resumed.student, uninterrupted_run.student)
    assert resumed.rounds == uninterrupted_run.rounds


def test_run_with_a_constant_rate_can_get_longer(tmp_path: Path) -> None:
    constant = OptimizerConfig(student_lr=0.05, student_schedule="constant")
    tiny.run(tmp_path / "longer", optimizer=constant, epochs=1)
    longer = tiny.run(tmp_path / "longer", optimizer=constant, resume=True)
    assert_same_result(longer, tiny.run(tmp_path / "whole", optimizer=constant))
    with pytest.raises(CheckpointError, match=r"loop.epochs was 2 and is now 1; this run is already at round 4"):
        tiny.run(tmp_path / "longer", optimizer=constant, resume=True, epochs=1)


def test_finished_run_resumes_as_a_no_op(finished: Path, uninterrupted_run: dfkd_fast.DistillResult) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    again = tiny.run(finished, resume=True)
    assert_same_result(again, uninterrupted_run)
    assert (again.images_per_s, again.seconds) == (0.0, 0.0)
    assert again.accuracy == uninterrupted_run.accuracy
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after.pop(finished / ".lock")
    before.pop(finished / ".lock", None)
    assert after == before


@pytest.mark.parametrize("first", [True, False])
def test_resumed_run_can_start_or_stop_to_evaluate(tmp_path: Path, first: bool) -> None:
    constant = OptimizerConfig(student_lr=0.05, student_schedule="constant")
    networks, images = (
        [(tiny.teacher(), tiny.network()) for _ in range(2)],
        [tiny.data() if first else None, tiny.data()],
    )
    if first:
        images[1] = None
    for each, data, epochs in zip(networks, images, (1, 2), strict=True):
        config = tiny.config(tmp_path, resume=True, epochs=epochs, optimizer=constant)
        result = dfkd_fast.distill(*each, config, data=data, progress=False)
    accuracy = [math.isfinite(value) for value in result.epochs["accuracy"]]
    assert accuracy == [first, not first]
    assert json.loads((tmp_path / "history.json").read_text())["epochs"]["accuracy"].count(None) == 1


def test_resume_names_a_network_that_differs(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"written with another student: .*had shape .* now has shape"):
        dfkd_fast.distill(
            tiny.teacher(), tiny.network((4, 4, 6, 10)), tiny.config(finished, resume=True), progress=False
        )


def test_checkpoint_of_an_earlier_version_is_read(finished: Path, uninterrupted_run: dfkd_fast.DistillResult) -> None:
    """Before, a checkpoint contained only the fingerprint of its settings."""
    for path in (finished / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        del content["settings"]
        torch.save(content, path)
    assert_same_result(tiny.run(finished, resume=True), uninterrupted_run)
    with pytest.raises(CheckpointError, match="was written with another config, or choose another folder for out"):
        tiny.run(finished, resume=True, seed=1)


def test_checkpoint_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harmed",))

    config = tiny.config(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config, "teacher")
    checkpoints.folder.mkdir()
    path = checkpoints.folder / "round-000001-step-0000.pt"
    torch.save({"format": "dfkd_fast.checkpoint/1", "state": Harm()}, path)
    with pytest.raises(CheckpointError, match="contains more than tensors and plain values"):
        checkpoints.read(path)
    assert not (tmp_path / "harmed").exists()


def test_fingerprint_covers_the_fields_that_determine_the_weights() -> None:
    config = tiny.config()
    for free in (replace(config, out="elsewhere"), replace(config, resume=True), tiny.config(checkpoint_every=7)):
        assert fingerprint(free) == fingerprint(config)
    for bound in (replace(config, seed=1), tiny.config(batch_size=7), replace(config, precision="bf16")):
        assert fingerprint(bound) != fingerprint(config)


def test_checkpoint_keys_do_not_change() -> None:
    """A run that was stopped under an earlier version can be resumed."""
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
    assert all(torch.equal(a, b) for a, b in zip(state.mutable_tensors(), fresh.mutable_tensors(), strict=True))


def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
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
    assert checkpoint_names(tmp_path) == ["round-000001-step-0000.pt"]


def test_weights_that_are_not_finite_after_the_last_step_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = engines.student_step, 0

    def poisoned(state: Any, networks: Any) -> None:
        nonlocal count
        count += 1
        if count == 8:  # the last one: no later loss shows its weights
            state.rates.fill_(math.nan)
        step(state, networks)

    monkeypatch.setattr(engines, "student_step", poisoned)
    with pytest.raises(
        NonFiniteError, match=r"before round 4, step 0: student's conv1\.weight, .* and \d+ more not finite"
    ):
        tiny.run(tmp_path)
    assert checkpoint_names(tmp_path) == ["round-000002-step-0000.pt", "round-000003-step-0000.pt"]
    assert not (tmp_path / "student.safetensors").exists()


def test_checkpoints_of_earlier_versions_may_contain_values_that_are_not_finite(tmp_path: Path) -> None:
    tiny.run(tmp_path, epochs=1)
    path = tmp_path / "checkpoints" / "round-000002-step-0000.pt"
    content = torch.load(path, weights_only=True)
    content["state"]["student"]["bn1.running_var"][0] = math.nan
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"round 2, step 0, student's bn1\.running_var are not finite; delete it"):
        tiny.run(tmp_path, epochs=1, resume=True)
    path.unlink()
    tiny.run(tmp_path, epochs=1, resume=True)


@pytest.mark.parametrize("select", ["agreement", "test_accuracy"])
def test_best_student_by_the_selected_criterion_is_returned(
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


@pytest.mark.parametrize("scores", [[math.nan, 0.4], [0.4, math.nan], [math.nan, math.nan]])
def test_nan_is_never_the_best_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    values = iter([*scores, 0.0, 0.0])
    monkeypatch.setattr(loop._Run, "accuracy", lambda self, student: next(values))
    if not any(map(math.isfinite, scores)):
        with pytest.raises(NonFiniteError, match="no epoch has a finite score for select='test_accuracy'"):
            tiny.run(tmp_path, select="test_accuracy")
        return
    tiny.run(tmp_path, select="test_accuracy")
    best = torch.load(next((tmp_path / "checkpoints").glob("*4-step*")), weights_only=True)["state"]["best"]
    assert best == {"score": 0.4, "epoch": 1 + scores.index(0.4)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sides", [("student",), ("teacher", "student")])
def test_logits_that_are_not_finite_agree_with_nothing(value: float, sides: tuple[str, ...]) -> None:
    state = tiny.state()
    assert 0 <= loop.agreement(state) <= 1
    for network in (state.teacher.model if side == "teacher" else state.student.module.model for side in sides):
        with torch.no_grad():
            network.fc.bias[0] = value  # argmax is 0
    assert loop.agreement(state) == 0


def test_history_is_strict_json(tmp_path: Path) -> None:
    """Epochs that were not evaluated are null, because JSON has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"history.json contains {constant}")

    result = tiny.run(tmp_path, evaluate_every=2)
    history = json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    assert history["epochs"]["accuracy"] == [None, result.accuracy]
    assert history["rounds"] == result.rounds


THREE_CLASSES = create_model(ModelConfig(name="resnet8"), num_classes=3)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"image_size": None}, {}, "image_size must be set, because no evaluation data is given"),
        ({"select": "test_accuracy"}, {}, "'test_accuracy', which needs evaluation data"),
        ({}, {"student": THREE_CLASSES}, "must have the same number of classes, got 5 and 3"),
        ({}, {"teacher": THREE_CLASSES, "data": tiny.data()}, "data has 5 classes, the teacher has 3"),
        ({"precision": "tf32"}, {}, "precision 'tf32' needs a CUDA device"),
        ({"device": "gpu"}, {}, "device must be 'auto' or a torch device, got 'gpu'"),
        ({"objective": ObjectiveConfig(student={"mhda": 1.0})}, {}, "did you mean 'mhad'"),
    ],
)
def test_mismatched_arguments_are_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    networks = {"teacher": tiny.teacher(), "student": tiny.network()}
    with pytest.raises(ValueError, match=message):
        dfkd_fast.distill(config=tiny.config(tmp_path, **changes), progress=False, **{**networks, **arguments})
    assert not (tmp_path / "checkpoints").exists()


def test_progress_shows_rounds_terms_and_speed() -> None:
    shown = []
    for enabled in (True, False):
        console = Console(width=80, file=io.StringIO(), force_terminal=True)
        with ProgressLine("distill", total=4, unit="rounds", enabled=enabled, console=console) as line:
            line.show(1, {"generator/bn": 12.345, "student/kd": 0.5, "student/mhad": 0.125}, 744.4)
            line.message("saved at round 1, step 2")
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
        shown.append(" ".join(text.split()))  # lines that are too long for the terminal wrap
    for words in ("distill", "1/4 rounds", "left", "bn 12.3", "student/mhad 0.125", "744 images/s", "saved at"):
        assert words in shown[0]
    assert shown[1] == ""


def test_the_student_is_saved_before_the_curves_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("a broken font")

    monkeypatch.setattr(loop.report, "save_curves", fail)
    with pytest.raises(OSError, match="a broken font"):
        tiny.run(tmp_path)
    load_weights(tiny.network(), tmp_path / "student.safetensors")
