"""Atomic writes, full disks, and the lock of a run's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dfkd_fast import report
from dfkd_fast.config import reading
from dfkd_fast.engine import export, teach
from dfkd_fast.engine.trackers import TensorBoard, TrackedRun
from dfkd_fast.files import (
    FolderInUseError,
    WriteError,
    _RecordingFile,
    atomic_write,
    lock_folder,
    write_file,
    zip_damage,
)
from dfkd_fast.models import load_weights, save_weights

from .. import tiny
from .test_teach import config as teach_config

CONSTANT = tiny.OptimizerConfig(student_lr=0.05, student_schedule="constant")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _torch_file(path: Path) -> None:
    with atomic_write(path) as file:
        torch.save({"x": torch.zeros(10_000)}, file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "w.safetensors": lambda path: save_weights(nn.Linear(100, 100), path),
    "checkpoint.pt": _torch_file,
    "history.json": lambda path: report.write_results(path, {"values": [0.5] * 5_000}),
    "grid.png": lambda path: report.save_image_grid(torch.rand(4, 3, 64, 64), path),
    "curves.png": lambda path: report.save_curves({"round": [0, 1], "kd": [1.0, 2.0]}, {}, path),
    "config.yaml": lambda path: write_file(path, b"x" * 20_000),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("before", [None, b"before"], ids=["new", "existing"])
def test_failed_writes_keep_the_previous_file(tmp_path: Path, name: str, before: bytes | None) -> None:
    path = tmp_path / "folder" / name
    if before is not None:
        write_file(path, before)
    with limited(4_000), pytest.raises(WriteError, match=r"File too large; raise the limit on file sizes") as failed:
        WRITERS[name](path)
    assert failed.value.errno == errno.EFBIG
    assert str(failed.value).startswith(f"cannot write {path}: ")
    assert files(tmp_path) == (set() if before is None else {f"folder/{name}"})
    assert before is None or path.read_bytes() == before
    WRITERS[name](path)
    assert path.stat().st_size > 4_000
    assert files(tmp_path) == {f"folder/{name}"}


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space on this disk"),
        (errno.EDQUOT, "free space in the disk quota"),
        (errno.EIO, "check the disk"),
        (errno.EROFS, "make the folder writable"),
    ],
)
def test_write_errors_name_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match=f"{os.strerror(number)}; {remedy}"):
        write_file(tmp_path / "x", b"content")
    assert files(tmp_path) == set()


def test_folders_that_are_files_and_other_errors(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"")
    with pytest.raises(WriteError, match="choose another folder"):
        write_file(tmp_path / "file" / "x", b"")
    with pytest.raises(KeyError), atomic_write(tmp_path / "x") as file:
        raise KeyError(file.write(b"half"))
    assert files(tmp_path) == {"file"}
    with pytest.raises(ValueError, match=r"the suffix of a picture must be one such as \.png"):
        report.save_image_grid(torch.rand(1, 3, 8, 8), tmp_path / "grid.xyz")


def test_run_on_a_full_disk_keeps_history_and_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dfkd_fast")
    with limited(30_000), pytest.raises(WriteError, match=r"checkpoints/round-000001-step-0000\.pt: File too large"):
        tiny.run(tmp_path)
    assert json.loads((tmp_path / "history.json").read_text())["rounds"]["round"] == [0]
    assert "curves.png: File too large" in caplog.text
    assert files(tmp_path) <= {"history.json", "config.yaml", *(f"tensorboard/{p.name}" for p in tmp_path.glob("t*/*"))}

    tiny.run(tmp_path, epochs=1, optimizer=CONSTANT)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert len(before) == 2
    with limited(30_000), pytest.raises(WriteError, match="checkpoints/round-000003"):
        tiny.run(tmp_path, resume=True, optimizer=CONSTANT)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    assert json.loads((tmp_path / "history.json").read_text())["rounds"]["round"] == [0, 1, 2]
    assert "set resume to continue this run from" in caplog.text
    resumed = tiny.run(tmp_path, resume=True, optimizer=CONSTANT)
    assert tiny.same_weights(resumed.student, tiny.run(tmp_path / "whole", optimizer=CONSTANT).student)


def test_tensorboard_log_on_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dfkd_fast.engine import trackers

    def fail(file: IO[bytes]) -> None:
        file.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trackers, "RecordWriter", fail)
    tiny.run(tmp_path)
    assert caplog.text.count("tensorboard: No space left on device; free space on this disk") == 1


def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    run = TrackedRun(folder=tmp_path, config={"seed": 3})
    with_images = TensorBoard(run)
    with_images.add_scalars({"a/b": 1.5}, 1)
    with_images.add_images("pictures", torch.rand(2, 3, 8, 8), 1)
    with_images.close(failed=False)
    resumed = TensorBoard(run)
    resumed.add_scalars({"a/b": 2.5}, 1)
    resumed.flush()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in found.Scalars("a/b")] == [(1, 2.5)]
    assert found.Tags()["images"] == ["pictures"]
    assert b"seed: 3" in found.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]
    resumed.close(failed=False)


HOLDER = """
import os, sys, time
from pathlib import Path
from dfkd_fast.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(20)  # a worker that outlives its parent
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / ".round.pt.1.partial").write_bytes(b"half")
        for run in (
            lambda: tiny.run(tmp_path),
            lambda: tiny.run(tmp_path, resume=True),
            lambda: teach(tiny.network(), tiny.data(), teach_config(tmp_path), progress=False),
        ):
            with pytest.raises(FolderInUseError, match=rf"in use by another run \(process {holder.pid} on .*choose an"):
                run()
        assert files(tmp_path) == {"checkpoints/.round.pt.1.partial"}
        holder.kill()
        holder.wait()
        teach(tiny.network(), tiny.data(), teach_config(tmp_path), progress=False)
        assert files(tmp_path / "checkpoints") == {"epoch-000002-step-0000.pt", "epoch-000003-step-0000.pt"}
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_lock_ends_with_its_block_and_excludes_threads(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(FolderInUseError), lock_folder(tmp_path):
        pass
    with pytest.raises(KeyError), lock_folder(tmp_path):
        raise KeyError
    with lock_folder(tmp_path):
        pass


def test_folders_without_locks_are_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock_folder(tmp_path):
        assert "this file system has no locks" in caplog.text
    with pytest.raises(WriteError, match=r"cannot write .*missing/\.lock"), lock_folder(tmp_path / "missing"):
        pass


def test_killed_writer_leaves_no_file_after_the_next_run(tmp_path: Path) -> None:
    (tmp_path / ".student.safetensors.1.partial").write_bytes(b"half")
    tiny.run(tmp_path, epochs=1, rounds_per_epoch=1)
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]
    load_weights(tiny.network(), tmp_path / "student.safetensors")


def test_folders_of_runs_that_cannot_be_created(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"")
    for run in (
        lambda: tiny.run(tmp_path / "file" / "run"),
        lambda: teach(tiny.network(), tiny.data(), teach_config(tmp_path / "file" / "run"), progress=False),
        lambda: export(tiny.network(), tmp_path / "file" / "run", image_size=tiny.SIZE),
    ):
        with pytest.raises(WriteError, match=r"cannot write .*/file/run: Not a directory; choose another folder"):
            run()


def test_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "Not a regular file" in str(zip_damage(tmp_path / "pipe"))
    with pytest.raises(OSError, match=r"Not a regular file: '.*pipe'"):
        report.read_results(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("absent")
    with pytest.raises(FileNotFoundError, match="link"):  # not the same as no results
        report.read_results(tmp_path / "link")
    assert report.read_results(tmp_path / "absent") is None


def test_errors_of_reads_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Input/output error: '.*x\.json'"), reading(tmp_path / "x.json"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_next_write_deletes_temporary_files_of_killed_processes(tmp_path: Path) -> None:
    """Also outside of runs, but never one that a living process or thread writes, or that of another file."""
    for name in (".x.1.partial", ".other.1.partial"):
        (tmp_path / name).write_bytes(b"half")
    with atomic_write(tmp_path / "x") as file, lock_folder(tmp_path):
        file.write(b"first")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(write_file, tmp_path / "x", b"second").result()
        assert (tmp_path / "x").read_bytes() == b"second"
    assert (tmp_path / "x").read_bytes() == b"first"
    assert files(tmp_path) == {"x"}  # lock_folder deleted the other one


def test_ctrl_c_in_a_checkpoint_is_not_replaced_by_an_error_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, content: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(_RecordingFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _torch_file(tmp_path / "x")
    assert files(tmp_path) == set()
