"""The measurement of whole rounds, at a size that a CPU can do: everything but the numbers."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dfkd_fast import ops
from dfkd_fast.benchmarks import bench_step, engine_accuracy, step_endurance, step_report, step_variants, timeline
from dfkd_fast.benchmarks import report as tables
from dfkd_fast.benchmarks.measure import Ceilings
from dfkd_fast.benchmarks.peer_loop import PeerLoop, PlainGate
from dfkd_fast.benchmarks.step_floor import Layer, Work, floor, layers, round_work
from dfkd_fast.benchmarks.step_variants import SIZES, VARIANTS
from dfkd_fast.config import ObjectiveConfig
from dfkd_fast.engine import EagerEngine
from dfkd_fast.models import frozen
from dfkd_fast.nn import SpatialAttention
from dfkd_fast.report import read_results, write_results

from . import tiny

CPU = torch.device("cpu")
SMALL = SIZES["small"]
ROOT = Path(__file__).parents[1]


class TestPeer:
    """Losses agree to 1e-5 of their size: float32 sums in another order, through twelve steps of two optimisers."""

    def test_it_is_the_same_algorithm(self):
        config = tiny.config(
            student_in_generator_step="update", generator_steps=3, student_steps=3, precision="fp32", engine="eager"
        )
        ours, theirs = tiny.state(config), tiny.state(config)
        engine, peer = EagerEngine(ours), PeerLoop(theirs, mean=tiny.HALF, std=tiny.HALF)
        for _ in range(2):
            engine.start_round()
            for row in range(6):
                engine.step()
                total, terms = (peer.generator_step if row < 3 else peer.student_step)()
                objective = ours.generator.objective if row < 3 else ours.student.objective
                values = torch.stack([terms[name] for name in objective.names])
                torch.testing.assert_close(values, ours.trace[row, : len(values)], rtol=1e-5, atol=1e-5)
                wanted = sum(objective.weights[name] * float(terms[name]) for name in objective.names)
                assert total == pytest.approx(wanted, rel=1e-5)
            ours.position.round, ours.position.step = ours.position.round + 1, 0
        for name, value in ours.student.module.model.state_dict().items():
            torch.testing.assert_close(theirs.student.module.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)

    def test_it_has_the_traits_of_the_field(self):
        state = tiny.state(tiny.config())
        peer = PeerLoop(state, mean=tiny.HALF, std=tiny.HALF)
        before = {name: value.clone() for name, value in state.student.module.model.named_buffers()}
        with ops.backend("cuda"):  # no op of ours: choosing one that there is none of would be an error
            assert isinstance(peer.generator_step()[0], float)
            moved = {n for n, value in state.student.module.model.named_buffers() if not torch.equal(value, before[n])}
            assert moved == set(before)
            dropped = [*state.teacher.model.parameters(), *state.student.module.model.parameters()]
            assert all(parameter.requires_grad for parameter in state.student.module.model.parameters())
            assert all(p.grad is not None for p in dropped if p.requires_grad)
            assert isinstance(peer.student_step()[0], float)

    def test_other_terms_are_refused(self):
        state = tiny.state(tiny.config(objective=ObjectiveConfig(preset="baseline")))
        with pytest.raises(ValueError, match="dfkd-fgvc"):
            PeerLoop(state, mean=tiny.HALF, std=tiny.HALF)
        with pytest.raises(ValueError, match="spatial"):
            PlainGate(SpatialAttention(8, form="channel"))


class TestFloor:
    def test_operations_are_those_that_a_step_does(self):
        """torch's counter sees the same convolutions and products in the eager engine's steps with plain ops."""
        state, teacher = step_variants.build(SMALL, 8, CPU, precision="fp32")
        work = round_work(state, image_size=SMALL.image)
        with frozen(teacher), ops.backend("reference"):
            engine = EagerEngine(state)
            engine.start_round()
            for kind, counted in zip(("generator", "student"), work, strict=True):
                with FlopCounterMode(display=False) as counter:
                    getattr(engine, f"{kind}_step")()
                assert counted.flops == counter.get_total_flops()

    def test_nothing_of_the_state_moves(self):
        state, _ = step_variants.build(SMALL, 4, CPU, precision="fp32")
        before = [tensor.clone() for tensor in state.changing()]
        modes = [module.training for module in state.student.module.modules()]
        round_work(state, image_size=SMALL.image)
        assert all(torch.equal(a, b) for a, b in zip(before, state.changing(), strict=True))
        assert modes == [module.training for module in state.student.module.modules()]

    def test_a_layer_by_hand(self):
        (layer,) = layers(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), torch.zeros(1, 3, 8, 8))
        assert (layer.inputs, layer.weights, layer.outputs) == (3 * 64, 8 * 27, 8 * 16)
        assert layer.flops == 2 * 8 * 16 * 27
        (transposed,) = layers(torch.nn.ConvTranspose2d(3, 8, 3, stride=2), torch.zeros(1, 3, 8, 8))
        assert transposed.flops == 2 * 3 * 64 * 8 * 9

    def test_bytes_by_hand(self):
        layer = Layer(name="", inputs=10, weights=7, outputs=4, flops=3.0)
        assert layer.forward(2) == Work(flops=6, bytes=2 * (20 + 8 + 7))
        assert layer.backward(2, to_input=False, to_weights=True) == Work(flops=6, bytes=2 * (8 + 20))
        assert layer.backward(2, to_input=True, to_weights=False) == Work(flops=6, bytes=2 * (8 + 20 + 7 + 20))

    def test_the_larger_of_both_bounds_a_step(self):
        rates = Ceilings(copy_gbps=1.0, matmul_tflops=1.0)
        found = floor(
            (Work(flops=1e9, bytes=5e6), Work(flops=3e9, bytes=1e6)), rates, generator_steps=2, student_steps=1
        )
        assert (found.generator_step_ms, found.student_step_ms) == pytest.approx((5.0, 3.0))
        assert found.round_ms == pytest.approx(13.0)


class TestTimeline:
    def test_overlaps_count_once(self):
        assert timeline.covered([(5, 7), (0, 2), (1, 4), (1, 3), (6, 6.5)]) == 6
        assert timeline.covered([]) == 0

    def test_intervals_on_the_host(self):
        line = timeline.Timeline(CPU)
        line.mark()
        line.start()
        for _ in range(3):
            line.mark()
            time.sleep(0.002)
        assert len(line.intervals_ms()) == 2
        assert min(line.intervals_ms()) >= 1.5


NUMBERS = ("images_per_s", "generator_step_ms", "student_step_ms", "seconds_to_first_step", "round_ms")


class TestVariants:
    @pytest.mark.parametrize(
        "variant",
        # Either form of torch.compile takes the same way through here.
        [pytest.param(each, marks=pytest.mark.slow if each == "compile_max_autotune" else ()) for each in VARIANTS],
    )
    def test_each_writes_what_it_measured(self, variant, tmp_path):
        arguments = [variant, "--out", str(tmp_path / "row"), "--device", "cpu", "--size", "small", "--batch", "4"]
        started = time.time()
        given = ["--started", str(started - 100), "--compile-backend", "eager"]
        assert step_variants.main([*arguments, *given]) == 0
        row = json.loads((tmp_path / "row").read_text())
        assert row["status"] == "ok"
        assert all(row[name] > 0 for name in NUMBERS)
        assert 100 < row["seconds_to_first_step"] <= row["seconds_to_first_round"] < 100 + time.time() - started
        assert row["images_per_s"] == pytest.approx(1e3 * 4 * 4 / row["round_ms"])
        assert row["peak_bytes"] is row["gpu_busy"] is row["kernels_per_step"] is None  # there is no GPU
        assert row["engine"] == {"peer": "peer", "eager": "eager", "dfkd_fast": "eager"}.get(variant, "torch.compile")

    def test_out_of_memory_is_said(self, monkeypatch, tmp_path):
        def measure(*arguments: Any, **more: Any) -> dict[str, Any]:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(step_variants, "measure", measure)
        assert step_variants.main(["peer", "--out", str(tmp_path / "row"), "--device", "cpu", "--size", "small"]) == 0
        assert json.loads((tmp_path / "row").read_text()) == {"status": "out of memory"}

    def test_a_loss_that_is_not_finite_is_no_measurement(self, monkeypatch):
        build = step_variants.build

        def poisoned(*arguments: Any, **more: Any) -> Any:
            state, teacher = build(*arguments, **more)
            state.shift.fill_(float("nan"))
            return state, teacher

        monkeypatch.setattr(step_variants, "build", poisoned)
        with pytest.raises(RuntimeError, match="not finite"):
            step_variants.measure("eager", SMALL, 4, CPU, started=time.time())

    def test_an_unknown_one_is_refused(self):
        with pytest.raises(ValueError, match="peer"), step_variants.make_loop("fastest", SMALL, 4, CPU):
            pass

    def test_random_teachers_have_plausible_statistics(self):
        state, _ = step_variants.build(SMALL, 4, CPU)
        norms = [m for m in state.teacher.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        assert all(
            norm.momentum == 0.1 and not torch.equal(norm.running_var, torch.ones(len(norm.weight))) for norm in norms
        )


def run_of(speed: float = 100.0, **more: Any) -> dict[str, Any]:
    return {
        "status": "ok", "images_per_s": speed, "round_ms": 1600 / speed, "round_p10_ms": 15.0, "round_p90_ms": 17.0,
        "generator_step_ms": 4.0, "student_step_ms": 4.0, "rounds": 5, "peak_bytes": 2**31, "steady_bytes": 2**30,
        "reserved_bytes": 2**32, "gpu_busy": 0.98, "kernels_per_step": 500.0, "kernel_ms": 15.0, "profiled_ms": 16.0,
        "seconds_to_first_step": 20.0, "seconds_to_first_round": 22.0, "cache": "warm", "engine": "eager", **more,
    }  # fmt: skip


STEADY = {"status": "ok", "steady": True, "rounds": 10, "first_ms": 1.0, "last_ms": 1.0, "drift": 0.0, "host_growth": 0,
          "engine": "eager"}  # fmt: skip
LIMITS = {
    "copy_gbps": 100.0,
    "matmul_tflops": 1.0,
    "floors": {
        "4": {
            "generator_step": {"flops": 1e9, "bytes": 1e6, "floor_ms": 1.0},
            "student_step": {"flops": 1e9, "bytes": 2e8, "floor_ms": 2.0},
            "round_ms": 6.0,
        }
    },
}


class Processes:
    """In place of the processes that the stage starts."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.answers: dict[str, tuple[dict[str, Any] | None, str]] = {}
        self.takes = 0.0

    def __call__(self, module: str, arguments: list[str], limit_s: float) -> tuple[dict[str, Any] | None, str]:
        what = "endurance" if module == "step_endurance" else arguments[0]
        self.started.append(what)
        time.sleep(self.takes if what in VARIANTS else 0)
        if what in self.answers:
            return self.answers[what]
        return ({"limits": LIMITS, "endurance": STEADY}.get(what) or run_of(100 + len(self.started))), ""


@pytest.fixture
def processes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = Processes()
    monkeypatch.setattr(bench_step, "_call", made)
    return made


def stage(*more: str) -> int:
    return bench_step.main(["--out", "step.json", "--device", "cpu", "--size", "small", *more])


class TestStage:
    def test_variants_take_turns_and_rows_are_medians(self, processes):
        assert stage() == 0
        runs = processes.started[1:]
        assert processes.started[0] == "limits"
        rounds = [runs[:5], runs[5:10], runs[10:15]]
        assert all(sorted(each) == sorted(VARIANTS) for each in rounds)
        assert rounds[0] == list(bench_step.TURNS)
        assert len({each[0] for each in rounds}) == 3
        assert runs[15:] == ["endurance"]
        content = read_results("step.json")
        assert content["complete"]
        assert content["device"]["copy_gbps"] == 100.0
        assert content["environments"][0]["matmul_tflops"] == 1.0
        row = next(row for row in content["rows"] if row["variant"] == "peer")
        assert row["images_per_s"] == sorted(row["images_per_s_by_repeat"])[1]
        assert len(row["runs"]) == bench_step.REPEATS
        assert row["floor_fraction"] == pytest.approx(6.0 / row["round_ms"], rel=1e-4)

    def test_it_goes_on_where_it_stopped(self, processes):
        processes.takes = 0.3
        assert stage("--seconds", "1.5") == 0
        begun = processes.started[1:]
        content = read_results("step.json")
        assert 0 < len(begun) < 8
        assert not content["complete"]
        assert len(content["rows"]) == len(begun)
        processes.takes = 0.0
        assert stage() == 0
        assert len(processes.started) == 2 + 3 * 5 + 1  # nothing twice but the ceilings
        assert read_results("step.json")["complete"]
        assert stage() == 0
        assert len(processes.started) == 2 + 3 * 5 + 1

    def test_a_measurement_of_other_sources_is_not_added_to(self, processes, monkeypatch):
        assert stage("--variants", "peer") == 0
        content = read_results("step.json")
        content["rows"][0]["runs"].pop()
        content["rows"][0]["source"] = "other"
        write_results("step.json", content)
        assert stage("--variants", "peer") == 0
        (row,) = read_results("step.json")["rows"]
        assert len(row["runs"]) == bench_step.REPEATS
        assert len(processes.started) == 2 * (1 + bench_step.REPEATS)

    def test_old_rows_are_renewed(self, processes):
        assert stage() == 0
        before = len(processes.started)
        assert stage("--since", "2000-01-01T00:00:00+00:00") == 0
        assert len(processes.started) == before
        assert stage("--since", "2999-01-01T00:00:00+00:00", "--variants", "eager") == 0
        assert processes.started[before:] == ["limits", "eager", "eager", "eager"]
        row = next(row for row in read_results("step.json")["rows"] if row["variant"] == "eager")
        assert len(row["runs"]) == bench_step.REPEATS

    def test_one_that_fails_hides_no_other(self, processes, capsys):
        processes.answers["eager"] = (None, "exit status 1\nit broke")
        assert stage() == 1
        content = read_results("step.json")
        assert {row["variant"] for row in content["rows"]} == set(VARIANTS) - {"eager"}
        assert processes.started.count("eager") == 1
        assert not content["complete"]
        assert "it broke" in capsys.readouterr().out

    def test_without_ceilings_there_is_no_row(self, processes):
        processes.answers["limits"] = (None, "exit status 1")
        assert stage() == 1
        assert not Path("step.json").exists()

    def test_one_that_never_fits_waits_behind_the_others(self, processes):
        processes.answers["compile_max_autotune"] = (None, bench_step._CUT)
        assert stage() == 0
        assert not read_results("step.json")["complete"]
        processes.started.clear()
        assert stage("--since", "2999-01-01T00:00:00+00:00") == 0
        ran = [name for name in processes.started if name != "limits"]
        assert ran[-3:] == ["compile_max_autotune"] * 3

    def test_out_of_memory_is_a_row_and_is_not_tried_again(self, processes):
        processes.answers["peer"] = ({"status": "out of memory"}, "")
        assert stage() == 0
        content = read_results("step.json")
        assert content["complete"]
        row = next(row for row in content["rows"] if row["variant"] == "peer")
        assert row["status"] == "out of memory"
        assert row["images_per_s"] is None
        assert processes.started.count("peer") == 1

    def test_time_to_the_first_step_is_that_of_a_warm_cache(self):
        runs = [run_of(cache="cold", seconds_to_first_step=300.0), run_of(seconds_to_first_step=30.0)]
        row = bench_step.row_of(("step", "dfkd_fast", 4), runs, 6.0)
        assert (row["seconds_to_first_step"], row["cache"]) == (30.0, "warm")
        assert row["cold_seconds_to_first_step"] == 300.0
        row = bench_step.row_of(("step", "dfkd_fast", 4), runs[:1], 6.0)
        assert (row["seconds_to_first_step"], row["cache"]) == (300.0, "cold")

    def test_a_process_of_its_own(self, tmp_path):
        """The real thing, once: one variant, started, measured and read back."""
        out = tmp_path / "step.json"
        arguments = ["--out", str(out), "--device", "cpu", "--size", "small", "--variants", "peer", "--seconds", "60"]
        found, why = bench_step._call("no_such_module", [], 60)
        assert found is None
        assert "exit status 1\n" in why
        assert "no_such_module" in why
        assert bench_step._call("step_variants", ["limits", "--device", "cpu"], 0.1) == (None, bench_step._CUT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench_step, "REPEATS", 1)
            assert bench_step.main(arguments) == 0
        (row,) = read_results(out)["rows"]
        assert row["status"] == "ok"
        assert row["floor_fraction"] > 0
        assert row["seconds_to_first_step"] > 1  # imports are in it

    @pytest.mark.slow
    def test_all_of_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bench_step, "REPEATS", 1)
        arguments = ["--out", str(tmp_path / "step.json"), "--device", "cpu", "--size", "small", "--rounds", "20"]
        assert bench_step.main([*arguments, "--compile-backend", "aot_eager"]) == 0
        content = read_results(tmp_path / "step.json")
        assert content["complete"]
        assert {row["variant"] for row in content["rows"]} == set(VARIANTS)


class TestEndurance:
    def test_rounds_are_sampled(self):
        found = step_endurance.endurance(SMALL, CPU, rounds=12, every=2)
        assert [sample["round"] for sample in found["samples"]] == [2, 4, 6, 8, 10, 12]
        assert found["finite"]
        assert found["status"] == "ok"

    @pytest.mark.parametrize(
        ("changed", "steady"),
        [
            ({}, True),
            ({"allocated_bytes": 1}, False),
            ({"reserved_bytes": 2**20}, False),
            ({"host_bytes": 2**16}, True),
            ({"host_bytes": 2**20}, False),
            ({"round_ms": 0.01}, False),
            ({"round_ms": -0.01}, True),
        ],
    )
    def test_the_verdict(self, changed, steady):
        samples = [
            {"round": 20 * n, "round_ms": 1.0, "allocated_bytes": 10, "reserved_bytes": 20, "host_bytes": 2**30}
            for n in range(1, 51)
        ]
        samples = [{**s, **{name: s[name] + n * step for name, step in changed.items()}} for n, s in enumerate(samples)]
        found = step_endurance.verdict(samples)
        assert found["steady"] == steady
        assert found["slope"] == pytest.approx(1e3 * changed.get("round_ms", 0) / 20, abs=1e-9)


class TestAccuracy:
    def rows(self, graph: list[float | None]) -> list[dict[str, Any]]:
        values = {"eager": [0.90, 0.94, 0.92], "graph": graph}
        return [
            {"experiment": "digits", "objective": "dfkd-fgvc", "engine": engine, "seed": seed, "accuracy": value}
            for engine, each in values.items()
            for seed, value in enumerate(each)
        ]

    @pytest.mark.parametrize(
        ("graph", "equal"),
        [
            ([0.91, 0.9, 0.92], True),
            ([0.87, 0.85, 0.88], False),
            ([0.99, 0.98, 0.97], False),
            ([0.92, None, 0.9], False),
        ],
    )
    def test_the_verdict(self, graph, equal):
        (verdict,) = engine_accuracy.verdicts(self.rows(graph))
        assert verdict["equal"] == equal
        assert verdict["seeds"] == {"eager": 3, "graph": 3}

    def test_one_engine_alone_has_none(self):
        assert not engine_accuracy.verdicts(self.rows([]))

    def test_rows_are_resumed(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        ran = []

        def run(config: Any, key: Any, device: str) -> dict[str, Any]:
            ran.append(key)
            row = dict(zip(engine_accuracy.KEY, key, strict=True))
            return {**row, "accuracy": 0.9 + 0.01 * row["seed"], "seconds": 1.0}

        monkeypatch.setattr(engine_accuracy, "run", run)
        arguments = ["--out", "accuracy.json", "--device", "cpu"]
        assert engine_accuracy.main([*arguments, "--experiments", "digits"]) == 0
        assert len(ran) == 6
        assert not read_results("accuracy.json")["complete"]
        assert engine_accuracy.main(arguments) == 0
        assert sorted(ran) == sorted(set(engine_accuracy.keys()))
        content = read_results("accuracy.json")
        assert content["complete"]
        assert [verdict["equal"] for verdict in content["verdicts"]] == [True, True, True]

    def test_either_engine_runs_the_demo(self, tmp_path):
        config = engine_accuracy._config("digits")
        short = replace(config.distill.loop, epochs=1, rounds_per_epoch=1, generator_steps=1, student_steps=1)
        config = replace(
            config, teach=replace(config.teach, epochs=1), distill=replace(config.distill, loop=short, engine="auto")
        )
        row = engine_accuracy.run(config, ("digits", "dfkd-fgvc", "graph", 0), "cpu", kept=tmp_path)
        assert 0 <= row["accuracy"] <= 1
        assert row["precision"] == "bf16"
        assert 0 < row["teacher_accuracy"] <= 1


ENVIRONMENT = {"device": {"name": "A GPU"}, "torch": "2.11.0", "commit": "0123456789abcdef", "source": "s"}


def measured() -> dict[str, Any]:
    speeds = dict(zip(VARIANTS, (100.0, 200.0, 300.0, 290.0, 410.0), strict=True))
    rows = [bench_step.row_of(("step", name, 64), [run_of(speed)], 6.0) for name, speed in speeds.items()]
    rows.append(bench_step.row_of(("step", "peer", 256), [{"status": "out of memory"}], 6.0))
    key = dict(zip(bench_step.KEY, ("endurance", "dfkd_fast", 4), strict=True))
    rows.append({**key, "status": "ok", "steady": True, "runs": [STEADY]})
    return {
        "device": {"copy_gbps": 4000.0, "matmul_tflops": 700.0},
        "floors": {"64": LIMITS["floors"]["4"]},
        "complete": False,
        "environments": [ENVIRONMENT],
        "rows": rows,
    }


class TestPage:
    def test_the_tables_of_a_device(self):
        text = step_report.step_section(measured(), "a-gpu")
        assert text.startswith("### a-gpu (not complete)\n")
        lines = text.splitlines()
        (peer,) = [line for line in lines if line.startswith("| peer | 100 ")]
        assert "| 4.10 |" in peer
        widths = {line.count("|") for line in lines if line.startswith(("| variant", "| peer", "| dfkd_fast"))}
        assert len(widths) == 1
        assert "| peer | out of memory |" in text
        assert "| images/s over peer: at least 4 | 4.10 | yes |" in lines
        assert "| images/s over eager: at least 2 | 2.05 | yes |" in lines
        assert "| images/s over the faster torch.compile: at least 1.3 | 1.37 | yes |" in lines
        assert "| memory (peak) over peer: at most 0.6 | 1.00 | **no** |" in lines
        assert "| GPU busy: at least 97 % | 98.0% | yes |" in lines
        assert "10 rounds on a small configuration" in text
        assert "commit: 0123456789ab." in text
        assert "| 64 | student | 1.0 | 200 | 2.00 | bytes |" in lines
        assert "| 64 | generator | 1.0 | 1 | 1.00 | operations |" in lines

    def test_the_page_is_filled_between_its_markers(self, tmp_path, capsys):
        page = tmp_path / "docs" / "performance.md"
        page.parent.mkdir()
        shutil.copyfile(ROOT / "docs" / "performance.md", page)
        folder = tmp_path / "benchmarks" / "results" / "a-gpu"
        write_results(folder / "step.json", measured())
        rows = [{**row, "environment": 0} for row in TestAccuracy().rows([0.91, 0.9, 0.92])]
        write_results(folder / "accuracy.json", {"environments": [ENVIRONMENT], "complete": True, "rows": rows})
        assert tables.main(root=tmp_path) == 0
        text = page.read_text()
        assert text.count("### a-gpu") == 2
        assert "| dfkd_fast | 410 |" in text
        assert (
            "| digits | dfkd-fgvc | 92.0% (90.0% to 94.0%, n = 3) | 91.0% (90.0% to 92.0%, n = 3) | -1.0% | yes |"
            in text
        )
        again = page.read_text()
        tables.main(root=tmp_path)
        assert page.read_text() == again

    def test_without_results_the_page_says_so(self, tmp_path):
        page = tmp_path / "docs" / "performance.md"
        page.parent.mkdir()
        shutil.copyfile(ROOT / "docs" / "performance.md", page)
        tables.main(root=tmp_path)
        between = page.read_text().split("<!-- begin: step -->")[1].split("<!-- end: step -->")[0]
        assert between.strip() == "Nothing has been measured yet."
