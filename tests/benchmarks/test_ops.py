"""Benchmarks of the ops: timing, order, rows and tables. Most times are made up."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks import results as results_module
from dfkd_fast.benchmarks.ops import bench, measure, tables, test_smoke, tune
from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Benchmark, Case, Work
from dfkd_fast.benchmarks.results import Results
from dfkd_fast.cli import main as cli
from dfkd_fast.kernels import config
from dfkd_fast.ops.backend import UnsupportedError
from dfkd_fast.ops.choices import read_choices
from dfkd_fast.report import read_results

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RATES = measure.PeakRates(copy_gbps=4000.0, matmul_tflops=800.0)
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in the interpreter")


def a_case(name: str = "4x6", grad: bool = True, **more) -> Case:
    rows, classes = map(int, name.split("x"))
    return Case(
        name=name,
        inputs=lambda make: (make.tensor(rows, classes, grad=grad), make.tensor(rows, classes)),
        call=lambda a, b, backend: ops.distillation_kl(a, b, backend=backend),
        work=lambda size: Work(forward_bytes=4e6 * size, backward_bytes=8e6 * size, forward_flops=32e9),
        **more,
    )


def a_benchmark(*cases: Case, **more) -> Benchmark:
    return Benchmark(op="distillation_kl", cases=cases or (a_case(),), **more)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Replace the description of the machine, which takes seconds."""
    here = {"device": {"name": "cpu"}, "torch": "2", "triton": "3", "cuda": None, "commit": "a", "source": "b"}
    monkeypatch.setattr(results_module, "_environment", lambda: dict(here))


class FakeDevice:
    """Replaces torch.cuda. A captured graph records its calls, and ``timed`` lists the calls of replayed graphs."""

    def __init__(self, monkeypatch, memory: int = 2**40):
        self.capturing, self.forbidden, self.inputs, self.timed = None, False, [], []
        outer = self

        class Graph:
            def replay(self):
                outer.timed += self.calls

        @contextlib.contextmanager
        def capture(graph, stream):
            outer.capturing = graph.calls = []
            try:
                yield
            finally:
                outer.capturing = None

        def times(call, device):
            call()
            return [1000.0, 2000.0, 3000.0]

        nothing, no_context = (lambda *given: None), (lambda *given: contextlib.nullcontext())
        for name, value in {
            "CUDAGraph": Graph, "graph": capture, "device": no_context, "stream": no_context,
            "synchronize": nothing, "empty_cache": nothing, "reset_peak_memory_stats": nothing,
            "mem_get_info": lambda device: (memory, memory), "memory_allocated": lambda device: 5,
            "max_memory_allocated": lambda device: 105, "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: setattr(self, "forbidden", mode == "error"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(measure, "_times", times)

    def trial(self, capturable: bool = True, waits: bool = False) -> measure.Trial:
        fake = self

        def record(what: str) -> None:
            if fake.capturing is not None:
                fake.capturing.append(what)

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                record("forward")
                if (fake.capturing and not capturable) or (waits and fake.forbidden):
                    raise RuntimeError("refused")
                assert not (waits and fake.capturing)
                fake.inputs.append(x.data_ptr())
                return 2 * x

            @staticmethod
            def backward(ctx, g):
                record("backward")
                return 2 * g

        case = replace(a_case(), inputs=lambda make: (make.tensor(8, grad=True),))
        trial = measure.Trial(case, torch.float32, CPU, Double.apply)
        trial.cuda = True
        return trial


class TestMeasure:
    @pytest.mark.parametrize("l2", measure.CACHES)
    @pytest.mark.parametrize(
        ("which", "one_call"), [("forward", ["forward"]), ("backward", ["backward"]), ("both", ["forward", "backward"])]
    )
    def test_graph_of_several_calls_is_timed(self, which, one_call, l2, monkeypatch):
        fake = FakeDevice(monkeypatch)
        measured = fake.trial().measure(which, l2)
        assert (measured.timer, measured.repeats, measured.peak_bytes) == ("graph", 3, 100)
        assert measured.calls > 1
        assert measured.median_us == 2000.0 / measured.calls
        assert fake.timed == one_call * measured.calls
        assert len(set(fake.inputs)) == (measured.calls if l2 == "cold" else 1)

    def test_number_of_cold_calls_is_limited_by_memory(self, monkeypatch):
        fake = FakeDevice(monkeypatch, memory=1000)
        assert fake.trial().measure("forward", "cold").calls == 4  # of 100 bytes each, in 40 % of 1000

    @pytest.mark.parametrize("how", [{"capturable": False}, {"waits": True}])
    def test_single_calls_are_timed_if_no_graph_can_be_captured(self, how, monkeypatch):
        fake = FakeDevice(monkeypatch)
        measured = fake.trial(**how).measure("both", "cold")
        assert not fake.forbidden
        assert (measured.timer, measured.calls) == ("events", 1)
        assert fake.timed == []

    def test_cpu_is_timed_by_the_host(self):
        trial = measure.Trial(a_case(), torch.float32, CPU, ops.distillation_kl)
        assert trial.passes == measure.PASSES
        for which in trial.passes:
            measured = trial.measure(which, "warm")
            assert 0 < measured.p10_us <= measured.median_us <= measured.p90_us
            assert (measured.timer, measured.repeats, measured.peak_bytes) == ("host", 5, None)
        assert measure.Trial(a_case(grad=False), torch.float32, CPU, torch.add).passes == ("forward",)

    def test_backward_uses_random_output_gradients(self):
        seen = []
        case = replace(a_case(), inputs=lambda make: ([make.tensor(3, grad=True)], {"b": make.tensor(3)}))
        trial = measure.Trial(case, torch.float32, CPU, lambda a, b: (a[0] * 2, (b["b"], a[0].detach() > 0)))
        trial.run("forward")[0].register_hook(seen.append)
        (gradient,) = trial.run("backward")
        assert torch.equal(gradient, 2 * seen[0])
        assert len(set(seen[0].tolist())) == 3

    def test_peak_rates_and_summaries(self):
        rates = measure.measure_peak_rates(CPU)
        assert rates.copy_gbps > 0
        assert rates.matmul_tflops > 0
        measured = measure.Measurement.of([float(us) for us in range(11)], timer="host")
        assert (measured.median_us, measured.p10_us, measured.p90_us, measured.repeats) == (5, 1, 9, 11)


class FakeTrial:
    """Made-up times, or errors, by pass."""

    def __init__(self, **times: float | Exception):
        self.times, self.made = times, []

    def __call__(self, case, dtype, device, function):
        self.made.append(case.name)
        return self

    def measure(self, which: str, l2: str) -> measure.Measurement:
        us = self.times.get(which, 10.0)
        if isinstance(us, Exception):
            raise us
        return measure.Measurement(median_us=us, p10_us=us, p90_us=us, peak_bytes=7, repeats=20, calls=4, timer="graph")


def run(trial, *cases: Case, backends=None, **more) -> tuple[bool, list[dict]]:
    found = bench.subjects([a_benchmark(*cases)], CUDA, backends=backends)
    results = Results(Path("ops.json"), key=bench.KEY)
    with mock.patch.object(bench, "measure_peak_rates", return_value=RATES):
        all_ok = bench.measure(found, results, device=CPU, trial=trial, **more)
    return all_ok, results.rows


class TestBench:
    def test_gpu_has_all_backends_passes_and_caches(self):
        def absent(case: str):
            raise ImportError("no such library")

        peers = {"there": lambda case: lambda a, b: a, "other work": lambda case: None, "absent": absent}
        found = bench.subjects([a_benchmark(peers=peers)], CUDA)
        backends = {"triton", "reference", "compile", "compile_max_autotune", "peer:there"}
        assert {subject.backend for subject in found} == backends
        assert found[0].keys[0][:3] == ("distillation_kl", "4x6", "bfloat16")
        assert {key[4:] for key in found[0].keys} == {(p, c) for p in measure.PASSES for c in measure.CACHES}
        (forward,) = bench.subjects([a_benchmark(a_case(grad=False))], CUDA, backends=["triton"])
        assert {key[4] for key in forward.keys} == {"forward"}

    def test_cpu_has_small_cases_two_backends_and_one_cache(self):
        small = replace(a_case("5x5"), work=lambda size: Work(forward_bytes=1, backward_bytes=1))
        found = bench.subjects([a_benchmark(a_case(), small)], CPU)
        assert {subject.case.name for subject in found} == {"5x5"}
        assert {subject.backend for subject in found} == {"reference", "compile"}
        assert {key[5] for subject in found for key in subject.keys} == {"warm"}

    def test_ops_alternate_and_odd_shapes_are_left_out(self):
        first = a_benchmark(a_case("2x2"), a_case("3x3", shapes="odd"), a_case("4x4"))
        found = bench.subjects([first, replace(first, op="contrastive_loss")], CUDA, backends=["triton", "compile"])
        order = list(dict.fromkeys((subject.op, subject.case.name) for subject in found))
        assert [name for _, name in order] == ["2x2", "2x2", "4x4", "4x4"]
        assert [op for op, _ in order] == ["distillation_kl", "contrastive_loss"] * 2

    def test_keys_are_unique_and_work_is_positive(self):
        every = list(BENCHMARKS.values())
        found = [each for shapes in ("paper", "large") for each in bench.subjects(every, CUDA, shapes=shapes)]
        keys = [key for subject in found for key in subject.keys]
        assert len(set(keys)) == len(keys)
        assert {key[0] for key in keys} == set(BENCHMARKS)
        assert all(subject.case.work(2).forward_bytes > 0 for subject in found)

    def test_roofline_is_larger_of_bytes_and_flops(self):
        rows = {row["pass"]: row for row in run(FakeTrial(), backends=["triton"])[1] if row["l2"] == "cold"}
        assert rows["forward"]["bytes"] == 8e6
        assert rows["forward"]["roofline_us"] == 40.0  # 32 GFLOP at 800 TFLOP/s; the bytes take 2 us
        assert rows["backward"]["roofline_us"] == 4.0  # 16 MB at 4 TB/s
        assert rows["both"]["bytes"] == 24e6
        assert rows["backward"]["fraction"] == 0.4

    @pytest.mark.parametrize(
        ("error", "status", "backends", "all_ok"),
        [
            (torch.OutOfMemoryError("too much"), "out of memory", None, True),
            (UnsupportedError("odd"), "not supported", ["triton"], True),
            (RuntimeError("broken\nmore"), "RuntimeError: broken", ["compile"], True),
            (RuntimeError("broken\nmore"), "RuntimeError: broken", ["triton"], False),
        ],
    )
    def test_failure_is_a_row_and_fails_the_run_only_for_own_kernels(self, error, status, backends, all_ok):
        done, rows = run(FakeTrial(backward=error), backends=backends)
        assert done is all_ok
        bad = [row for row in rows if row["pass"] == "backward"]
        assert {row["status"] for row in bad} == {status}
        assert all(row["median_us"] is None and row["fraction"] is None and row["roofline_us"] > 0 for row in bad)
        assert {row["status"] for row in rows if row["pass"] != "backward"} == {"ok"}

    def test_inputs_that_do_not_fit_are_rows_and_nothing_starts_after_the_deadline(self):
        def trial(*given):
            raise torch.OutOfMemoryError("too much")

        _, rows = run(trial, backends=["triton"])
        assert [row["status"] for row in rows] == ["out of memory"] * 6
        fake = FakeTrial()
        run(fake, a_case("2x2"), seconds=-1.0)
        assert fake.made == []

    @pytest.mark.parametrize(
        "sizes", ["[4, 6]", "{shape: [4, 6]}", "{shape: [4], classes: 6}", "{rows: 4, classes: 6, dtypes: [float32]}"]
    )
    def test_file_lists_sizes_in_order_or_by_name(self, sizes):
        Path("shapes.yaml").write_text(f"distillation_kl: [{sizes}]")
        ((case,),) = (each.cases for each in bench.from_file(Path("shapes.yaml")))
        assert (case.name, case.shapes) == ("4x6", "file")
        assert case.dtypes == [torch.float32 if "float32" in sizes else torch.bfloat16]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("nonsense: []", "no benchmark of nonsense"),
            ("{}", "must hold a list of shapes for each op"),
            ("[1, 2]", "must hold a list of shapes for each op"),
            ("distillation_kl: [3]", "must be a list or a mapping of sizes, got 3"),
            ("distillation_kl: [{rows: 3, classes: 4, lines: 3}]", "is not a shape of distillation_kl: .*lines"),
            ("distillation_kl: [{rows: 3, classes: 4, dtypes: [int8]}]", "dtypes must be a list of float32"),
            ("a: b: c", "neither YAML nor JSON"),
            ("[" * 1000, "neither YAML nor JSON"),
        ],
    )
    def test_malformed_file_raises(self, text, message):
        Path("shapes.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            bench.from_file(Path("shapes.yaml"))

    def test_command_on_a_cpu_writes_rows_plot_and_table(self, capsys):
        Path("shapes.yaml").write_text("distillation_kl: [{rows: 4, classes: 6, dtypes: [float32]}]")
        arguments = ["distillation_kl", "--shapes", "shapes.yaml", "--device", "cpu", "--backends", "reference"]
        cli(["bench", *arguments, "--out", "out"])
        rows = read_results("out/ops.json")["rows"]
        expected = [("4x6", "float32", which) for which in measure.PASSES]
        assert [(row["case"], row["dtype"], row["pass"]) for row in rows] == expected
        assert Path("out/ops.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        shown = capsys.readouterr().out
        assert "distillation_kl, microseconds per call" in shown
        assert "distillation_kl 4x6 float32 reference forward warm " in shown
        assert read_results("out/ops.json")["copy_gbps"] > 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "bench needs a CUDA device, but none is available"),
            (["--device", "cpu", "--tune"], "--tune searches launch configurations of a GPU"),
            (["--device", "cpu", "--shapes", "none.yaml"], "there is no file none.yaml"),
            (["nonsense", "other", "--device", "cpu"], "no benchmark of nonsense, other"),
            (["distillation_kl", "--device", "cpu", "--backends", "triton"], "nothing to measure"),
        ],
    )
    def test_wrong_arguments_are_errors(self, arguments, message, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit) as left:
            cli(["bench", *arguments])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
        assert not Path("runs").exists()


def row(backend: str, us: float | None, *, which="forward", l2="cold", case="64x200", **more) -> dict:
    return {
        "op": "distillation_kl", "case": case, "dtype": "bfloat16", "backend": backend, "pass": which, "l2": l2,
        "median_us": us, "roofline_us": 2.0, "fraction": us and 2.0 / us, "peak_bytes": 2**20, "shapes": "paper",
        "status": "ok" if us else "out of memory", "environment": 0, "date": "2026-01-02T00:00:00+00:00", **more,
    }  # fmt: skip


ROWS = [
    row("reference", None), row("compile", 8.0), row("compile_max_autotune", 6.0), row("triton", 4.0),
    row("compile", 3.0, which="backward"), row("triton", 4.0, which="backward"), row("triton", 3.5, l2="warm"),
]  # fmt: skip


class TestTables:
    def test_line_per_case_pass_and_cache(self):
        line, *others = tables.terminal_rows(ROWS)["distillation_kl"]
        assert line == {
            "case": "64x200", "pass": "forward", "L2": "cold", "reference": "out of memory", "compile": "8.00",
            "compile max autotune": "6.00", "triton": "4.00", "roofline": "2.00", "share": "50%", "MiB": "1.0",
        }  # fmt: skip
        assert [(each["pass"], each["L2"]) for each in others] == [("backward", "cold"), ("forward", "warm")]
        failed = tables.terminal_rows([row("compile", None, status="RuntimeError: x")])["distillation_kl"]
        assert failed[0]["compile"] == "failed"

    def test_speedups_are_geometric_means_over_the_faster_compile(self):
        rows = [*ROWS, row("compile", 24.0, case="4096x1000"), row("triton", 2.0, case="4096x1000")]
        found = tables.speedups(rows)["distillation_kl"]
        assert found["forward"] == pytest.approx((1.5 * 12.0) ** 0.5)
        assert found["backward"] == 0.75
        for more in ({"l2": "warm"}, {"shapes": "large"}, {"dtype": "float32"}, {"backend": "reference"}):
            assert not tables.speedups({**each, **more} for each in ROWS)
        assert not tables.speedups([row("compile", None), row("triton", 3.0)])

    def test_section_of_a_device_has_versions_commit_and_tables(self):
        block = {
            "device": {"name": "NVIDIA H200", "driver": "1"}, "torch": "2.11", "triton": "3.6", "cuda": "13.0",
            "commit": "a" * 40, "source": "b", "copy_gbps": 4300.0, "matmul_tflops": 790.0,
        }  # fmt: skip
        page = tables.ops_section({"environments": [block], "rows": ROWS}, "nvidia-h200")
        assert page.startswith("## nvidia-h200\n\nNVIDIA H200, driver 1, torch 2.11, triton 3.6, CUDA 13.0; commit ")
        assert "commit aaaaaaaaaaaa; 2026-01-02. Measured peaks: copy 4,300 GB/s, bf16 matmul 790 TFLOP/s" in page
        assert "| distillation_kl | 1.50 x | 0.75 x |  |" in page
        assert "| 64x200 | forward | cold | out of memory | 8.00 | 6.00 | 4.00 | 2.00 | 50% | 1.0 |" in page

    def test_faster_of_two_measured_backends_is_chosen(self, tmp_path):
        first, second = (case.name for case in BENCHMARKS["contrastive_loss"].cases[:2])
        file, table = tmp_path / "some-gpu" / "ops.json", tmp_path / "choices.json"

        def pair(case: str, backend: str, *times: float) -> list[dict]:
            passes = zip(("forward", "backward"), times, strict=True)
            return [row(backend, us, which=which, case=case, op="contrastive_loss") for which, us in passes]

        def written(rows: list[dict]) -> list[dict]:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"rows": rows, "environments": [{"device": {"capability": "9.0"}}]}))
            count = tables.write_choices(tmp_path, table)
            rows = json.loads(table.read_text())["rows"] if table.exists() else []
            assert len(rows) == count
            return rows

        rows = [*pair(first, "cuda", 5, 5), *pair(first, "triton", 4, 8), *pair(second, "cuda", 1, 1)]
        rows += [row("triton", 1.0, l2="warm", case=first, op="contrastive_loss")]
        (only,) = written(rows)
        assert (only["backend"], only["arch"], only["cuda_over_triton"], only["cases"]) == ("cuda", 90, 0.8333, 1)
        assert read_choices(table) == {("contrastive_loss", 90, "bfloat16", tuple(only["shape_class"])): "cuda"}
        # The second case is in the same class of shapes. The mean sqrt(10 / 12 * 2 / 1) is above 1.
        (only,) = written([*rows, *pair(second, "triton", 0.5, 0.5)])
        assert (only["backend"], only["cuda_over_triton"], only["cases"]) == ("triton", 1.291, 2)
        assert written([]) == []


class TestTune:
    """Candidates differ in their number of warps; times and results are made up."""

    LAUNCHES = tuple(config.Launch(tile={"ROWS": 1, "BLOCK": 16}, num_warps=warps) for warps in (1, 2, 4, 8))

    @pytest.fixture(autouse=True)
    def _rule(self, monkeypatch):
        monkeypatch.setitem(config._RULES, "invented", lambda arch, dtype, *, n: list(self.LAUNCHES))
        monkeypatch.setattr(config, "_tuned", lambda: {})
        config._tuned.cache_clear = lambda: None

    def decide(self, times: dict[int, list[float]], wrong: dict[int, Tensor | Exception] | None = None):
        asked = ("invented", 90, torch.float32, {"n": 16})
        calls, lines = {warps: iter(each) for warps, each in times.items()}, []

        def num_warps() -> int:
            return config.choose("invented", 90, torch.float32, n=16).num_warps

        class Choice(tune.Choice):
            def time_us(self, device):
                return next(calls[num_warps()])

            def results(self, device):
                result = (wrong or {}).get(num_warps(), torch.ones(3))
                if isinstance(result, Exception):
                    raise result
                return [result]

        more = {"case": a_case(), "dtype": torch.float32, "passes": ("forward",)}
        return tune.decide(Choice(key=config.key(*asked), asked=asked, **more), CPU, lines.append), lines

    def test_fastest_candidate_wins_if_it_is_faster_twice(self):
        tried, _ = self.decide({1: [10, 10.5], 2: [9], 4: [8, 8.2], 8: [12]})
        assert tried.winner.num_warps == 4
        assert (tried.first_us, tried.best_us, tried.tried) == (10.5, 8.2, 4)
        for again in (9.9, 10.4):
            assert self.decide({1: [10, 10], 2: [10], 4: [9, again], 8: [12]})[0].winner is None
        assert self.decide({1: [10], 2: [9.8], 4: [9.75], 8: [12]})[0].winner is None  # less than 3 %

    def test_wrong_results_and_failures_are_refused_before_they_are_timed(self):
        wrong = {2: torch.full((3,), 1.1), 4: RuntimeError("out of resource"), 8: torch.tensor([1, 1, torch.nan])}
        tried, lines = self.decide({1: [10]}, wrong)
        assert (tried.winner, tried.tried, tried.refused) == (None, 1, 3)
        assert "off by 0.1" in lines[0]
        assert "out of resource" in lines[1]
        assert len(lines) == 3
        codes = torch.arange(3, dtype=torch.uint8)
        assert not tune.difference([codes], [codes.clone()], torch.bfloat16)
        assert tune.difference([codes], [codes + 1], torch.bfloat16)

    def test_winners_are_saved_with_the_reason_and_removed_when_they_lose(self):
        path = Path("tuned.json")
        tried, _ = self.decide({1: [10, 10], 2: [9], 4: [8, 8], 8: [12]})
        tried.save("H200, abc", path)
        (entry,) = json.loads(path.read_text()).values()
        assert entry["num_warps"] == 4
        assert entry["why"] == "8 us; the first candidate 10 us, 4 tried, H200, abc"
        replace(tried, winner=None).save("H200, abc", path)
        assert json.loads(path.read_text()) == {}

    @interpreted
    def test_op_is_tuned_in_the_cases_that_launch_its_kernels(self, monkeypatch):
        more = {"dtypes": (torch.float32,)}
        benchmark = a_benchmark(
            a_case("1100x20", **more), a_case("1100x30", **more), a_case("600x60", **more), a_case("2x5", shapes="odd")
        )
        found = tune.choices(benchmark, CPU)
        assert [choice.key for choice in found] == [
            config.key("distillation_kl", 90, torch.float32, {"classes": classes}) for classes in (32, 64)
        ]
        assert {choice.passes for choice in found} == {("forward", "backward")}

        def time_us(choice: tune.Choice, device) -> float:  # the second candidate takes half the time
            kernel, arch, dtype, sizes = choice.asked
            return 5.0 if config.choose(kernel, arch, dtype, **sizes) == choice.candidates()[1] else 10.0

        monkeypatch.setattr(tune.Choice, "time_us", time_us)
        benchmark = replace(benchmark, cases=benchmark.cases[:1])
        tried = tune.tune([benchmark], CPU, "paper", path=Path("tuned.json"))
        assert [each.refused for each in tried] == [0]
        assert list(json.loads(Path("tuned.json").read_text())) == ["distillation_kl/sm_90/float32/classes=32"]


class TestSmoke:
    CASE = BENCHMARKS["distillation_kl"].cases[-2]  # 37 x 129

    @interpreted
    def test_correct_kernels_pass(self):
        assert test_smoke.check_case(self.CASE, CPU, torch.bfloat16) > 0

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda value, number: value * 1.01, "result 0: root mean square error"),
            (lambda value, number: value + number, "two runs differ"),
            (lambda value, number: value * torch.nan, "root mean square error nan"),
        ],
    )
    def test_wrong_values_unequal_runs_and_nan_are_reported(self, wrong, message):
        count = iter(range(100))

        def call(a: Tensor, b: Tensor, backend: str | None) -> Tensor:
            value = ops.distillation_kl(a, b, backend="reference")
            return value if backend == "reference" else wrong(value, next(count))

        with pytest.raises(AssertionError, match=message):
            test_smoke.check_case(replace(self.CASE, call=call), CPU, torch.float32)


@pytest.mark.gpu
class TestOnTheDevice:
    def trial(self, elements: int, function) -> measure.Trial:
        case = replace(a_case(), inputs=lambda make: (make.tensor(elements, grad=True),))
        return measure.Trial(case, torch.bfloat16, CUDA, function)

    def test_time_of_a_large_copy_is_its_bytes_divided_by_the_bandwidth(self):
        rates, trial = measure.measure_peak_rates(CUDA), self.trial(2**28, lambda x: x * 2)
        for which, l2 in (("forward", "cold"), ("forward", "warm"), ("backward", "cold")):
            measured = trial.measure(which, l2)
            assert measured.timer == "graph"
            assert 0.85 < measured.median_us / rates.roofline_us(2**30, 0) < 1.4
        assert 2**29 <= trial.measure("forward", "cold").peak_bytes < 2**29 + 2**22

    def test_time_of_a_small_call_excludes_the_cpu_and_warm_is_no_slower(self):
        trial = self.trial(2**20, lambda x: x * 2)
        cold, warm = (trial.measure("forward", l2) for l2 in measure.CACHES)
        assert cold.calls > 10
        assert 0.5 < warm.median_us < 20
        assert warm.median_us < 1.1 * cold.median_us

    def test_single_calls_are_timed_if_no_graph_can_be_captured(self):
        assert self.trial(2**10, lambda x: x * x.detach().sum().item()).measure("both", "cold").timer == "events"

    def test_case_of_the_paper_is_measured(self):
        whole = BENCHMARKS["distillation_kl"]
        benchmark = replace(whole, cases=whole.cases[:1])
        found = bench.subjects([benchmark], CUDA, backends=["triton", "compile"])
        results = Results(Path("ops.json"), key=bench.KEY)
        assert bench.measure(found, results, device=CUDA)
        assert len(results.rows) == 12
        assert {row["timer"] for row in results.rows} == {"graph"}
