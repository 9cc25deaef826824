"""Lets ``pytest benchmarks/bench_<op>.py`` run a file's benchmark through pytest-benchmark.

Each of the paper's cases is run forward and backward by the reference and by Triton's kernels. What pytest-benchmark
shows is the host's time until the device is done, launches included; the device's own, as ``dfkd-fast bench`` takes it,
is in ``extra_info`` (``--benchmark-json=FILE``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dfkd_fast.benchmarks.cases import Benchmark
from dfkd_fast.benchmarks.measure import Trial
from dfkd_fast.benchmarks.ops import Subject, subjects

_BACKENDS = ("reference", "triton")
_PASSES = ("forward", "backward")


def _test(subject: Subject, which: str) -> Callable[[Any], None]:
    def run(benchmark: Any) -> None:
        device = torch.device("cuda")
        trial = Trial(subject.case, subject.dtype, device, subject.function)
        if which not in trial.passes:
            pytest.skip("nothing requires a gradient")
        measured = trial.measure(which, "cold")
        benchmark.extra_info.update(device_us=measured.median_us, peak_bytes=measured.peak_bytes)

        def call() -> None:
            trial.run(which)
            torch.cuda.synchronize(device)

        benchmark.pedantic(call, rounds=20, warmup_rounds=3)

    return run


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> list[pytest.Item] | None:
    """Tests of a module's ``BENCHMARK``."""
    if name != "BENCHMARK" or not isinstance(obj, Benchmark):
        return None
    found, _ = subjects([obj], torch.device("cuda"), shapes=("paper",), backends=_BACKENDS)
    items: list[pytest.Item] = []
    for subject in found:
        for which in _PASSES:
            dtype = str(subject.dtype).removeprefix("torch.")
            title = f"test_{obj.op}[{subject.case.name}-{dtype}-{subject.backend}-{which}]"
            item = pytest.Function.from_parent(collector, name=title, callobj=_test(subject, which))
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
            items.append(item)
    return items
