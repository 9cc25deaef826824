"""A run that is killed at random points and resumed gives the same result as an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dfkd_fast.config import ModelConfig
from dfkd_fast.models import create_model, save_weights

TEACHER = ModelConfig(name="resnet8", options={"widths": [4, 4, 8, 12]})
ARGUMENTS = [
    *("--teacher.name", "resnet8", "--teacher.options", '{"widths": [4, 4, 8, 12]}'),
    *("--teacher.weights", "t.safetensors", "--num_classes", "5"),
    *("--student.name", "resnet8", "--student.options", '{"widths": [4, 4, 6, 8]}'),
    *("--distill.image_size", "16", "--distill.device", "cpu", "--distill.generator.channels", "[8, 8, 8, 8, 8]"),
    *("--distill.loop.epochs", "3", "--distill.loop.rounds_per_epoch", "10", "--distill.loop.batch_size", "8"),
    *("--distill.loop.generator_steps", "3", "--distill.loop.student_steps", "2"),
    *("--distill.loop.checkpoint_every", "2"),
]


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "dfkd_fast", "distill", *ARGUMENTS, *more]


@pytest.mark.timeout(600)
def test_killed_and_resumed_run_gives_the_same_result(tmp_path: Path) -> None:
    save_weights(create_model(TEACHER, num_classes=5), tmp_path / "t.safetensors", {})
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    subprocess.run(command("--out", "whole"), check=True, **options)

    def checkpoints() -> int:
        folder = tmp_path / "killed" / "checkpoints"
        return max((int(path.name[6:12]) for path in folder.glob("round-*.pt")), default=0)

    generator = random.Random(os.getpid())
    killed = 0
    for _ in range(2):
        seen = checkpoints()
        process = subprocess.Popen(command("--out", "killed", "--resume"), **options)
        while checkpoints() == seen and process.poll() is None:  # until this process has written a checkpoint
            time.sleep(0.01)
        time.sleep(generator.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    subprocess.run(command("--out", "killed", "--resume"), check=True, **options)
    whole, resumed = (load_file(tmp_path / run / "student.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert (tmp_path / "whole" / "history.json").read_text() == (tmp_path / "killed" / "history.json").read_text()
