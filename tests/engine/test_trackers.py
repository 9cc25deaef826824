"""Trackers: what they record, resumed runs, and failures."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast.engine import TRACKERS, TrackedRun, Tracker, TrackerError, distill, trackers

from .. import tiny


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_jsonl_has_the_config_the_history_and_the_results(tmp_path: Path) -> None:
    result = tiny.run(tmp_path, trackers=["jsonl"])
    config, *steps, results = lines(tmp_path)
    assert config["config"]["distill"]["trackers"] == ["jsonl"]
    assert results == {"results": {"agreement": result.agreement, "accuracy": result.accuracy}}
    rounds = [line for line in steps if "student/lr" in line]
    epochs = [line for line in steps if "student/lr" not in line]
    assert [line["step"] for line in rounds] == [1, 2, 3, 4]
    assert [line["student/kd"] for line in rounds] == result.rounds["student/kd"]
    assert [line["epoch/accuracy"] for line in epochs] == result.epochs["accuracy"]
    assert not (tmp_path / "tensorboard").exists()


def test_jsonl_of_a_killed_run_has_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"trackers": ["jsonl"], "checkpoint_every": 3}
    for step in (10, 3):  # in the third round, without a checkpoint, and in the last one, after a checkpoint
        with monkeypatch.context() as patch:
            tiny.die_before_step(patch, step)
            with pytest.raises(tiny.Killed):
                tiny.run(tmp_path, resume=True, **options)
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 3, "stud')  # the end of a process that is killed
    resumed = tiny.run(tmp_path, resume=True, **options)
    whole = tiny.run(tmp_path / "whole", **options)
    assert tiny.same_weights(resumed.student, whole.student)
    assert lines(tmp_path)[1:] == lines(tmp_path / "whole")[1:]
    tiny.run(tmp_path, **(options | {"resume": True}))  # the run is finished
    assert lines(tmp_path)[1:] == lines(tmp_path / "whole")[1:]


class Memory(Tracker):
    """Keeps the calls, and fails at the first epoch."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        if "epoch/agreement" in values:
            raise ConnectionError("no route to host")
        self.calls.append((step, *values))

    def close(self, *, failed: bool) -> None:
        self.calls.append(("closed", failed))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    monkeypatch.setitem(TRACKERS, "memory", Memory)
    yield Memory.calls
    Memory.calls.clear()


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(
    tmp_path: Path, memory: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    result = tiny.run(tmp_path, trackers=["memory", "jsonl"])
    assert [call[0] for call in memory] == [1, 2]  # nothing after the first epoch
    text = "ConnectionError: no route to host; the rest of the run is not recorded by the tracker 'memory'"
    assert caplog.messages.count(text) == 1
    assert len(result.rounds["round"]) == 4
    assert len(lines(tmp_path)) == 1 + 4 + 2 + 1


def test_a_full_disk_ends_only_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trackers, "write_file", fail)
    tiny.run(tmp_path, epochs=1, trackers=["jsonl"])
    assert caplog.text.count("log.jsonl: No space left on device; free space on this disk") == 1


def test_an_exception_of_the_run_closes_the_trackers(
    tmp_path: Path, memory: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        tiny.die_before_step(patch, 1)
        with pytest.raises(tiny.Killed):
            tiny.run(tmp_path, trackers=["memory"])
    with pytest.raises(ArithmeticError, match="lower lr"):
        tiny.teach(tmp_path / "taught", trackers=["memory"], lr=1e30, epochs=3)
    assert [call for call in memory if call[0] == "closed"] == [("closed", True)] * 2


def test_trackers_are_free_when_a_run_is_resumed(tmp_path: Path) -> None:
    tiny.run(tmp_path, epochs=1, optimizer=tiny.config().optimizer)
    resumed = tiny.run(tmp_path, epochs=1, resume=True, trackers=["jsonl"])
    assert lines(tmp_path)[1:] == [{"results": {"agreement": resumed.agreement, "accuracy": resumed.accuracy}}]


def test_teach_records_its_losses(tmp_path: Path) -> None:
    for _ in range(2):  # the second call finds a finished run
        tiny.teach(tmp_path, trackers=["jsonl"], epochs=2, resume=True)
    config, *steps, accuracy, results = lines(tmp_path)
    assert config["config"]["teach"]["epochs"] == 2
    assert [sorted(line) for line in steps] == [["step", "teach/loss"]] * 2
    assert accuracy["teach/accuracy"] == results["results"]["accuracy"]


def failing(run: TrackedRun) -> Tracker:
    raise ConnectionRefusedError("no server\nat this address")


def test_a_tracker_that_cannot_start_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "failing", failing)
    with pytest.raises(TrackerError, match=r"^the tracker 'failing' cannot start: ConnectionRefusedError: no server$"):
        tiny.run(tmp_path, trackers=["failing"])
    with pytest.raises(ValueError, match="trackers: no tracker named 'json'; did you mean 'jsonl'"):
        tiny.run(tmp_path, trackers=["json"])
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(TrackerError, match=rf"^the tracker '{name}' .* pip install 'dfkd-fast\[{name}\]'$"):
            tiny.run(tmp_path, trackers=[name])


def stopped_and_resumed(folder: Path, name: str) -> dict[str, list[float]]:
    """Two rounds, and after a resume two more, with one tracker."""
    options: dict[str, Any] = {"data": tiny.data(), "progress": False}
    networks, stop = (tiny.teacher(), tiny.network()), [lambda done, state: done.number == 1]
    distill(*networks, tiny.config(folder, trackers=[name]), callbacks=stop, **options)
    result = distill(*networks, tiny.config(folder, trackers=[name], resume=True), **options)
    return {**result.rounds, "results": [result.agreement, result.accuracy or 0.0]}


@pytest.mark.slow
def test_mlflow_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    history = stopped_and_resumed(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = (each for each in client.search_experiments() if each.name == "dfkd-fast")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    found = sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, "student/kd"))
    assert found == list(zip([1, 2, 3, 4], history["student/kd"], strict=True))
    accuracies = [each.value for each in client.get_metric_history(run.info.run_id, "results/accuracy")]
    assert accuracies[-1] == history["results"][1]
    listed = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert listed >= {"config.yaml", "images"}


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run: a header of 7 bytes, and LevelDB's log format in blocks of 32 KiB."""
    content, position, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:  # a block ends with zeros if it has no space for a header
            position += 2**15 - position % 2**15
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # complete, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    history = stopped_and_resumed(tmp_path / "run", "wandb")
    values, identities, results = [], set(), {}

    def complete() -> list[list[Any]]:
        """The records of both processes' files, once wandb's own process has written their ends."""
        paths = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        found = [[Record.FromString(each) for each in wandb_records(path)] for path in paths]
        return found if len(found) == 2 and all(any(r.HasField("exit") for r in each) for each in found) else []

    until = time.monotonic() + 60
    while not (files := complete()) and time.monotonic() < until:
        time.sleep(0.1)
    for records in files:
        for record in records:
            if record.HasField("run"):
                identities.add((record.run.run_id, record.run.project, record.run.display_name))
            row = {each.key or "/".join(each.nested_key): each.value_json for each in record.history.item}
            if "student/kd" in row:
                values.append((int(row["step"]), float(row["student/kd"])))
            for each in record.summary.update:
                results["/".join(each.nested_key) or each.key] = each.value_json
    assert values == list(zip([1, 2, 3, 4], history["student/kd"], strict=True))
    assert identities == {((tmp_path / "run" / "wandb_run.txt").read_text().strip(), "dfkd-fast", "run")}
    assert float(results["results/accuracy"]) == history["results"][1]
