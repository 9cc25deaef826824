"""NVTX ranges appear in the active profiler and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import nvtx, ops
from dfkd_fast.engine import EagerEngine
from dfkd_fast.nvtx import nvtx_range

from .. import tiny


def recorded(work: Any) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        work()
    return [event.name for event in profiler.events() if event.name.startswith(nvtx.PREFIX + "/")]


def test_round_has_ranges_for_steps_networks_and_ops() -> None:
    state = tiny.state()
    engine = EagerEngine(state)

    def work() -> None:
        with nvtx_range("round", "0"):
            engine.start_round()
            for _ in range(state.steps_per_round):
                engine.step()

    names = recorded(work)
    assert names[0] == "dfkd_fast/round/0"
    assert [n for n in names if "/step/" in n] == ["dfkd_fast/step/generator"] * 2 + ["dfkd_fast/step/student"] * 2
    for network in ("generator", "teacher", "student", "objective", "optimizer"):
        assert names.count(f"dfkd_fast/network/{network}") == 4, network
    assert "dfkd_fast/op/spatial_attention" in names
    assert "dfkd_fast/op/distillation_kl" in names


def test_compiled_code_has_no_ranges() -> None:
    def work(x: Tensor) -> Tensor:
        with nvtx_range("op", "anything"):
            return ops.distillation_kl(x, x + 1)

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5)
    torch.testing.assert_close(compiled(x), work(x))
    assert recorded(lambda: compiled(x)) == []


@pytest.mark.skipif(nvtx.nvtx is None, reason="nvtx is not installed")
def test_nvtx_is_called_only_without_a_torch_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def annotate(name: str, **options: Any) -> Any:
        calls.append((name, options["domain"]))
        return nvtx.nvtx.annotate(name, **options)

    monkeypatch.setattr(nvtx, "_annotate", annotate)
    with nvtx_range("network", "teacher"):
        assert recorded(lambda: nvtx_range("op", "x").__enter__()) == ["dfkd_fast/op/x"]
    assert calls == [("network teacher", "dfkd_fast")]


def test_range_is_a_null_context_without_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvtx, "_annotate", None)
    assert nvtx_range("step", "student") is nvtx_range("round", "1")
