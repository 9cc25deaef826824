"""A short run of each target of the reliability harness."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .reliability.harness import TARGETS, Tally

SECONDS = 3


FAST = ("fuzz_files", "fuzz_ops", "injection")


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in TARGETS]
)
def test_nothing_is_lost(target: str, repository: Path) -> None:
    command = [sys.executable, "-m", "tests.reliability", target, "--minutes", str(SECONDS / 60)]
    done = subprocess.run(command, cwd=repository, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"(?m)^{target}: .*: [1-9]", done.stdout), done.stdout


def test_cases_are_repeatable_and_counted(tmp_path: Path) -> None:
    drawn = []
    for case in (None, 2):
        tally = Tally("kill", seconds=1, seed=3, folder=tmp_path, case=case)
        for generator in tally.cases():
            drawn.append((tally.index, generator.random()))
            tally.count("kind", "survived", times=2)
            if tally.index == 2:
                tally.lose("kind", "why")
                break
    assert drawn[2] == drawn[3]
    (row,) = tally.rows()
    assert row["cases"] == 3
    assert row["lost"] == 1
    assert row["outcomes"] == {"survived": 2, "lost": 1}
