"""The paper's cases under pytest-benchmark, forward and backward: ``pytest benchmarks/ops/test_ops.py``.

pytest-benchmark measures the wall time until the device is done, including launches. With ``--benchmark-json=FILE``,
``extra_info`` in the file has the device time, measured as in ``dfkd-fast bench``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dfkd_fast.benchmarks.ops.bench import Subject, subjects
from dfkd_fast.benchmarks.ops.cases import BENCHMARKS
from dfkd_fast.benchmarks.ops.measure import Trial

_CUDA = torch.device("cuda")
_SUBJECTS = subjects(list(BENCHMARKS.values()), _CUDA, backends=("reference", "triton"))


def _name(subject: Subject) -> str:
    return f"{subject.op} {subject.case.name} {str(subject.dtype).removeprefix('torch.')} {subject.backend}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("subject", _SUBJECTS, ids=_name)
def test_op(benchmark: Any, subject: Subject, which: str) -> None:
    """Time one pass of one case."""
    trial = Trial(subject.case, subject.dtype, _CUDA, subject.function)
    if which not in trial.passes:
        pytest.skip("nothing requires a gradient")
    measured = trial.measure(which, "cold")
    benchmark.extra_info.update(device_us=measured.median_us, peak_bytes=measured.peak_bytes)

    def call() -> None:
        trial.run(which)
        torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20, warmup_rounds=3)
