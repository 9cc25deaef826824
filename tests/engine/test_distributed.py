"""Runs on several processes with gloo: equal to runs of one process, also after failures."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dfkd_fast import cli
from dfkd_fast.engine import distributed

from .. import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DFKD_FAST_TIMEOUT_S": "60", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Torchrun:
    """Processes that torchrun starts. Their output goes to a file, because a pipe that is not read blocks them."""

    def __init__(self, *arguments: str, processes: int, restarts: int = 0, **environment: str) -> None:
        options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, "-m", *arguments],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def finish(self, status: int = 0) -> str:
        """Wait for the processes, which must end with this status, and return their output."""
        self.agent.wait(timeout=3000)
        assert self.agent.returncode == status, self.output()
        return self.output()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("processes", "rounds", "presets"),
    [
        (2, 4, ("dfkd-fgvc",)),
        *(pytest.param(count, 20, (), marks=pytest.mark.slow) for count in (2, 3, 4)),
    ],
)
def test_float64(processes: int, rounds: int, presets: tuple[str, ...]) -> None:
    """Losses, weights, buffers and pools are those of one process; without presets, of all presets."""
    Torchrun("tests.engine.ranks", "presets", str(rounds), *presets, "--float64", processes=processes).finish()


@pytest.mark.parametrize("processes", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))])
def test_float32(processes: int, tmp_path: Path) -> None:
    """BatchNorms, evaluation, ``teach``, ``synthesize``, and runs that continue with other numbers of processes."""
    job = ("tests.engine.ranks", "all", str(tmp_path))
    Torchrun(*job, processes=processes, TRITON_INTERPRET="1").finish()


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return sorted(child for child, command in commands.items() if b"tests.engine.ranks" in command)


def newest_round(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoints/*.pt")), default=0)


def kill_repeatedly(run: Torchrun, folder: Path, kills: int) -> None:
    """Kill a random process: most after a new checkpoint, some while they start."""
    choose, before = random.Random(0), 0
    while kills:
        deadline, starting = time.monotonic() + choose.uniform(0, 5), choose.random() < 0.1
        while True:
            assert run.agent.poll() is None, run.output()
            if newest_round(folder) > before or (starting and time.monotonic() > deadline):
                break
            time.sleep(0.02)
        time.sleep(choose.uniform(0, 0.3))
        before = newest_round(folder)
        try:
            os.kill(choose.choice(workers(run.agent.pid)), signal.SIGKILL)
        except (IndexError, ProcessLookupError):  # between two starts
            continue
        kills -= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_processes_are_restarted(tmp_path: Path) -> None:
    kills = 100
    rounds = str(kills + 10)
    job = ("tests.engine.ranks", "run")
    run = Torchrun(*job, str(tmp_path / "killed"), rounds, processes=2, restarts=3 * kills)
    kill_repeatedly(run, tmp_path / "killed", kills)
    run.finish()
    Torchrun(*job, str(tmp_path / "undisturbed"), rounds, processes=2).finish()
    found, expected = (load_file(tmp_path / name / "student.safetensors") for name in ("killed", "undisturbed"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "error"), [("fail", "ValueError: 'fault' is not in list"), ("hang", "Timed out waiting 5000ms")]
)
def test_a_fault_of_one_process_ends_all_with_its_traceback(job: str, error: str, tmp_path: Path) -> None:
    run = Torchrun("tests.engine.ranks", job, str(tmp_path), processes=2, DFKD_FAST_TIMEOUT_S="5")
    output = run.finish(status=1)
    assert "Traceback (most recent call last)" in output
    assert error in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, which the terminal sends to all processes, and SIGTERM, which torchrun passes on."""
    run = Torchrun("tests.engine.ranks", "run", str(tmp_path), "10000", "10", processes=2)
    while not newest_round(tmp_path):
        assert run.agent.poll() is None, run.output()
        time.sleep(0.02)
    os.killpg(run.agent.pid, number) if number is signal.SIGINT else run.agent.send_signal(number)
    run.finish(status=1)
    assert newest_round(tmp_path) % 10, "the newest checkpoint is not that of the signal"


def test_errors_are_one_line() -> None:
    output = Torchrun("dfkd_fast", "methods", processes=2).finish(status=1)
    assert output.count("error: methods runs in one process: start it without torchrun") == 1


def test_a_broken_rendezvous_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in {**environment, "DFKD_FAST_TIMEOUT_S": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["distill"])
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: cannot join the other processes at 127.0.0.1:9; start them with torchrun: ")


def test_missing_nccl_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU: there are 1"), distributed.join():
        pass
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch with NCCL"), distributed.join():
        pass


def test_restarts_need_a_folder_and_a_new_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(ValueError, match="--out is required with torchrun's --max-restarts"):
        distributed.restartable(tiny.config())
    with pytest.raises(ValueError, match="needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.restartable(tiny.config(Path("run")))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.restartable(tiny.config(Path("run"))).resume
