"""Tuning: which launch configurations win, and what is written of them; times are invented."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks import tune
from dfkd_fast.benchmarks.cases import Benchmark, Case, Work
from dfkd_fast.kernels import config

CPU = torch.device("cpu")


def a_case(name: str = "4x6", **more) -> Case:
    rows, classes = map(int, name.split("x"))
    return Case(
        name=name,
        inputs=lambda make: (make.tensor(rows, classes, grad=True), make.tensor(rows, classes)),
        call=lambda a, b, backend: ops.distillation_kl(a, b, backend=backend),
        work=lambda size: Work(forward_bytes=1, backward_bytes=1),
        **more,
    )


def benchmark_of(*cases: Case) -> Benchmark:
    return Benchmark(op="distillation_kl", cases=cases)


class TestDecision:
    """Candidates are told apart by their number of warps; the timer and the results are invented."""

    LAUNCHES = tuple(config.Launch(tile={"ROWS": 1, "BLOCK": 16}, num_warps=warps) for warps in (1, 2, 4, 8))

    @pytest.fixture(autouse=True)
    def _rule(self, monkeypatch):
        monkeypatch.setitem(config._RULES, "invented", lambda arch, dtype, *, n: list(self.LAUNCHES))
        monkeypatch.setattr(config, "_tuned", lambda: {})
        config._tuned.cache_clear = lambda: None

    @property
    def choice(self) -> tune.Choice:
        asked = ("invented", 90, torch.float32, {"n": 16})
        return tune.Choice(key=config.key(*asked), asked=asked, case=a_case(), dtype=torch.float32, passes=("forward",))

    def decide(self, times: dict[int, list[float]], wrong: dict[int, Tensor | Exception] | None = None):
        calls = {warps: iter(each) for warps, each in times.items()}

        def now() -> int:
            kernel, arch, dtype, sizes = self.choice.asked
            return config.choose(kernel, arch, dtype, **sizes).num_warps

        def results(choice):
            result = (wrong or {}).get(now(), torch.ones(3))
            if isinstance(result, Exception):
                raise result
            return [result]

        said: list[str] = []
        return tune.decide(
            self.choice, timer=lambda choice: next(calls[now()]), results=results, tell=said.append
        ), said

    def test_the_fastest_wins_if_it_does_so_twice(self):
        tried, _ = self.decide({1: [10, 10.5], 2: [9], 4: [8, 8.2], 8: [12]})
        assert tried.winner.num_warps == 4
        assert (tried.first_us, tried.best_us, tried.tried) == (10.5, 8.2, 4)

    @pytest.mark.parametrize("again", [[9.9], [10.4]])
    def test_luck_does_not_last(self, again):
        tried, _ = self.decide({1: [10, 10], 2: [10], 4: [9, *again], 8: [12]})
        assert tried.winner is None
        assert tried.first_us == tried.best_us

    def test_little_is_not_enough(self):
        assert self.decide({1: [10], 2: [9.8], 4: [9.75], 8: [12]})[0].winner is None

    def test_wrong_results_and_failures_are_refused_before_they_are_timed(self):
        wrong = {2: torch.full((3,), 1.1), 4: RuntimeError("out of resource"), 8: torch.tensor([1, 1, torch.nan])}
        tried, said = self.decide({1: [10]}, wrong)
        assert (tried.winner, tried.tried, tried.refused) == (None, 1, 3)
        assert "off by 0.1" in said[0]
        assert "out of resource" in said[1]
        assert len(said) == 3

    def test_winners_are_saved_with_the_reason_and_go_when_they_lose(self):
        path = Path("tuned.json")
        tried, _ = self.decide({1: [10, 10], 2: [9], 4: [8, 8], 8: [12]})
        tune.save([tried], "H200, abc", path)
        (entry,) = json.loads(path.read_text()).values()
        assert entry["num_warps"] == 4
        assert entry["why"] == "8 us; the first candidate 10 us, 4 tried, H200, abc"
        tune.save([replace(tried, winner=None)], "H200, abc", path)
        assert json.loads(path.read_text()) == {}

    def test_a_choice_is_forced_alone(self):
        with config.forced(self.choice.key, self.LAUNCHES[2]):
            assert config.choose("invented", 90, torch.float32, n=16).num_warps == 4
            assert config.choose("invented", 90, torch.float32, n=32).num_warps == 1
        assert config.choose("invented", 90, torch.float32, n=16).num_warps == 1

    def test_integers_must_be_equal(self):
        codes = torch.arange(3, dtype=torch.uint8)
        assert not tune.difference([codes], [codes.clone()], torch.bfloat16)
        assert tune.difference([codes], [codes + 1], torch.bfloat16)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in the interpreter")
class TestKernels:
    def test_what_kernels_ask_for_is_found_once_with_its_passes(self):
        benchmark = benchmark_of(a_case("1100x20"), a_case("1100x30"), a_case("600x60"), a_case("2x5", shapes="odd"))
        found = tune.choices(benchmark, CPU)
        assert [choice.key for choice in found] == [
            config.key("distillation_kl", 90, torch.bfloat16, {"classes": classes}) for classes in (32, 64)
        ]
        assert {choice.passes for choice in found} == {("forward", "backward")}

    def test_the_whole_of_it(self):
        # The second candidate takes half the time.
        def timer(choice: tune.Choice) -> float:
            kernel, arch, dtype, sizes = choice.asked
            return 5.0 if config.choose(kernel, arch, dtype, **sizes) == choice.candidates()[1] else 10.0

        path = Path("tuned.json")
        benchmark = benchmark_of(a_case("1100x20", dtypes=(torch.float32,)))
        (tried,) = tune.tune(benchmark, CPU, where="here", timer=timer, path=path)
        assert tried.refused == 0
        assert list(json.loads(path.read_text())) == ["distillation_kl/sm_90/float32/classes=32"]
