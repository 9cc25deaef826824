"""The microbenchmarks: what is measured, in which rows, and what is made of them; times are invented but for a few."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops as public
from dfkd_fast.benchmarks import command, common, conftest, measure, ops_report, targets
from dfkd_fast.benchmarks import ops as stage
from dfkd_fast.benchmarks.bench_distillation_kl import BENCHMARK as KL
from dfkd_fast.benchmarks.cases import Benchmark, Case, Work
from dfkd_fast.benchmarks.common import Clock
from dfkd_fast.benchmarks.compile_kernels import benchmarks
from dfkd_fast.cli import main as cli
from dfkd_fast.ops.backend import UnsupportedError
from dfkd_fast.report import read_results

CPU = torch.device("cpu")
RATES = measure.Ceilings(copy_gbps=4000.0, matmul_tflops=800.0)
FIELDS = {
    "op", "case", "dtype", "backend", "pass", "l2", "median_us", "p10_us", "p90_us", "bytes", "flops", "floor_us",
    "fraction", "peak_bytes",
}  # fmt: skip


def a_case(name: str = "4x6", grad: bool = True, **more) -> Case:
    rows, classes = map(int, name.split("x"))

    def call(a: Tensor, b: Tensor, backend: str | None) -> Tensor:
        return public.distillation_kl(a, b, backend=backend)

    return Case(
        name=name,
        inputs=lambda make: (make.tensor(rows, classes, grad=grad), make.tensor(rows, classes)),
        call=call,
        work=lambda size: Work(forward_bytes=4e6 * size, backward_bytes=8e6 * size, forward_flops=32e9),
        **more,
    )


def a_benchmark(*cases: Case, **more) -> Benchmark:
    return Benchmark(op="distillation_kl", cases=cases or (a_case(),), **more)


class FakeTrial:
    """Times of one's own: microseconds by what the provider is."""

    times: dict[str, float | Exception] = {}  # noqa: RUF012
    made: list[str] = []  # noqa: RUF012

    def __init__(self, case, dtype, device, function):
        self.passes = measure.PASSES
        self.made.append(case.name)

    def measure(self, which: str, l2: str) -> measure.Measurement:
        us = self.times.get(which, 10.0)
        if isinstance(us, Exception):
            raise us
        return measure.Measurement(median_us=us, p10_us=us, p90_us=us, peak_bytes=7, laps=20, calls=4, timer="graph")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Describing the machine starts processes, and keeping rows through a loss of power waits for the disk."""
    here = {"device": {"name": "cpu"}, "torch": "2", "triton": "3", "cuda": None, "commit": "a", "source": "b"}
    for module in (stage, common, command):
        monkeypatch.setattr(module, "environment", lambda: dict(here))
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def fake():
    FakeTrial.times, FakeTrial.made = {}, []
    return FakeTrial


def found_on(device: str, *given: Benchmark, **more):
    return stage.subjects(given or [a_benchmark()], torch.device(device), **more)


def run(found, fake, path: str = "ops.json", device: torch.device = CPU, **more) -> tuple[bool, dict]:
    results = stage.open_results(Path(path), RATES)
    sound = stage.measure(found, results, device=device, rates=RATES, trial=fake, **more)
    results.finish(complete=not results.todo(key for subject in found for key in subject.keys))
    return sound, read_results(path)


class TestSubjects:
    def test_every_provider_pass_and_cache_on_a_gpu(self):
        def absent(case: str):
            raise ImportError("no such library")

        peers = {"there": lambda case: lambda a, b: a, "not reached": lambda case: None, "absent": absent}
        found, missing = found_on("cuda", a_benchmark(peers=peers))
        assert [subject.backend for subject in found] == [
            "triton", "compile", "reference", "peer:there", "compile_max_autotune",
        ]  # fmt: skip
        assert found[0].keys[0] == ("distillation_kl", "4x6", "bfloat16", "triton", "forward", "cold")
        assert len(set(found[0].keys)) == 6
        assert [(each.backend, each.why) for each in missing] == [("peer:absent", "no such library")]

    def test_the_papers_shapes_come_first_and_odd_ones_never(self):
        cases = [a_case("2x2", shapes="large"), a_case("3x3", shapes="odd"), a_case("4x4")]
        found, _ = found_on("cuda", a_benchmark(*cases))
        assert list(dict.fromkeys(subject.case.name for subject in found)) == ["4x4", "2x2"]

    def test_without_gradients_there_is_the_forward_alone(self):
        found, _ = found_on("cuda", a_benchmark(a_case(grad=False)))
        assert {key[4] for subject in found for key in subject.keys} == {"forward"}

    def test_a_cpu_has_two_providers_one_cache_and_small_cases(self):
        small = replace(a_case("5x5"), work=lambda size: Work(forward_bytes=1, backward_bytes=1))
        found, _ = found_on("cpu", a_benchmark(a_case("4x6"), small))
        assert {subject.case.name for subject in found} == {"5x5"}
        assert {subject.backend for subject in found} == {"reference", "compile"}
        assert {key[5] for subject in found for key in subject.keys} == {"warm"}

    def test_every_benchmark_of_the_repository(self):
        found, _ = stage.subjects(list(benchmarks().values()), torch.device("cuda"))
        keys = [key for subject in found for key in subject.keys]
        assert len(set(keys)) == len(keys)
        assert {key[0] for key in keys} == set(benchmarks())
        assert all(subject.case.work(2).forward_bytes > 0 for subject in found)


class TestRows:
    def test_the_file_holds_what_was_agreed(self, fake):
        sound, content = run(found_on("cuda")[0], fake)
        assert sound
        assert content["complete"]
        assert content["device"].keys() == {
            "name", "driver", "torch", "triton", "cuda", "commit", "copy_gbps", "matmul_tflops",
        }  # fmt: skip
        assert content["device"]["copy_gbps"] == 4000.0
        assert content["environments"][0]["matmul_tflops"] == 800.0
        assert len(content["rows"]) == 4 * 6
        assert all(row.keys() >= FIELDS for row in content["rows"])

    def test_the_floor_is_the_larger_of_the_two(self, fake):
        rows = {row["pass"]: row for row in run(found_on("cuda")[0], fake)[1]["rows"]}
        assert rows["forward"]["bytes"] == 8e6
        assert rows["forward"]["floor_us"] == 40.0  # 32 GFLOP at 800 TFLOP/s, over 2 us of bytes
        assert rows["backward"]["floor_us"] == 4.0  # 16 MB at 4 TB/s
        assert rows["both"]["bytes"] == 24e6
        assert rows["backward"]["fraction"] == 0.4

    def test_goes_on_where_it_stopped_and_renews_what_is_old(self, fake):
        found, _ = found_on("cuda", a_benchmark(a_case("2x2"), a_case("3x3")))
        clock = Clock(1e9)
        clock.took(1e8)
        run(found[:3], fake, clock=clock)
        assert fake.made == ["2x2", "3x3", "2x2"]
        run(found, fake)
        assert len(fake.made) == len(found)
        run(found, fake)
        assert len(fake.made) == len(found)
        run(found, fake, since="2999")
        assert len(fake.made) == 2 * len(found)

    def test_the_version_changes_with_what_runs_and_not_with_its_comments(self, tmp_path):
        for name, text in {"a": "x = 1", "b": "x = 1  # one", "c": "x = 2"}.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "k.py").write_text(text)
        plain, commented, changed = (stage._digest([tmp_path / name / "k.py"]) for name in "abc")
        assert plain == commented != changed
        assert re.fullmatch(r"[0-9a-f]{12}", stage.version())

    def test_nothing_begins_without_time(self, fake):
        _, content = run(found_on("cuda")[0], fake, clock=Clock(0.0))
        assert not content["rows"]
        assert not content["complete"]

    def test_another_version_keeps_the_rows_whose_sources_are_the_same(self, fake, monkeypatch):
        run(found_on("cuda")[0], fake)
        kept = stage.sources("distillation_kl", "reference")
        monkeypatch.setattr(stage, "version", lambda: "new")
        monkeypatch.setattr(stage, "sources", lambda op, backend: "other" if backend == "triton" else kept)
        content = read_results("ops.json")
        for row in content["rows"]:
            row["sources"] = kept
        Path("ops.json").write_text(json.dumps(content))
        results = stage.open_results(Path("ops.json"), RATES)
        assert {row["backend"] for row in results.rows} == {"compile", "compile_max_autotune", "reference"}
        assert not results.complete

    def test_sources_are_those_that_the_provider_runs(self, monkeypatch):
        names = {path.name for path in stage._kernel_modules("distillation_kl")}
        assert names == {"distillation_kl.py", "common.py", "config.py", "plans.py", "tuned.json"}
        assert stage.sources("distillation_kl", "triton") != stage.sources("distillation_kl", "reference")
        assert stage.sources("distillation_kl", "compile") == stage.sources("distillation_kl", "reference")

    def test_out_of_memory_is_a_row_that_says_so(self, fake):
        fake.times = {"both": torch.OutOfMemoryError("too much")}
        sound, content = run(found_on("cuda")[0], fake)
        assert sound
        assert content["complete"]
        rows = [row for row in content["rows"] if row["pass"] == "both"]
        assert {row["status"] for row in rows} == {"out of memory"}
        assert all(row["median_us"] is None and row["fraction"] is None and row["floor_us"] > 0 for row in rows)
        assert {row["status"] for row in content["rows"] if row["pass"] != "both"} == {"ok"}

    def test_no_room_for_the_inputs_tells_of_every_pass(self):
        def trial(*arguments):
            raise torch.OutOfMemoryError("too much")

        _, content = run(found_on("cuda")[0], trial)
        assert {row["status"] for row in content["rows"]} == {"out of memory"}
        assert content["complete"]

    def test_a_row_out_of_memory_in_the_papers_largest_case_leaves_the_others(self, fake):
        found, _ = found_on("cuda", a_benchmark(a_case("2x2"), a_case("3x3")))
        first = [subject for subject in found if subject.case.name == "2x2"]

        class Trial(fake):
            def measure(self, which, l2):
                if self.made[-1] == "2x2":
                    raise torch.OutOfMemoryError("too much")
                return super().measure(which, l2)

        _, content = run(found, Trial)
        assert sum(row["status"] == "out of memory" for row in content["rows"]) == 6 * len(first)
        assert sum(row["status"] == "ok" for row in content["rows"]) == 6 * (len(found) - len(first))

    def test_a_failing_compiler_is_a_row_and_a_failing_kernel_is_none(self, fake):
        fake.times = {"backward": RuntimeError("broken\nmore")}
        said = []
        sound, content = run(found_on("cuda")[0], fake, complain=said.append)
        assert not sound
        assert not content["complete"]
        rows = [row for row in content["rows"] if row["pass"] == "backward"]
        assert {row["backend"] for row in rows} == {"compile", "compile_max_autotune"}
        assert {row["status"] for row in rows} == {"RuntimeError: broken"}
        assert len(said) == 8
        assert "distillation_kl 4x6 bfloat16 triton backward cold: RuntimeError: broken" in said

    def test_a_case_that_a_backend_does_not_serve_is_a_row_and_no_failure(self, fake):
        fake.times = {"forward": UnsupportedError("not this one")}
        said = []
        sound, content = run(found_on("cuda")[0][:1], fake, complain=said.append)
        assert sound
        assert not said
        rows = [row for row in content["rows"] if row["pass"] == "forward"]
        assert {(row["status"], row["median_us"]) for row in rows} == {("not served", None)}

    def test_a_peer_without_a_gradient_says_so(self, fake, monkeypatch):
        monkeypatch.setattr(fake, "measure", lambda self, which, l2: pytest.fail("must not be timed"))
        subject = found_on("cuda")[0][0]
        backward = replace(subject, keys=tuple(key for key in subject.keys if key[4] == "backward"))
        monkeypatch.setattr(measure, "PASSES", ("forward",))
        _, content = run([backward], fake)
        assert {row["status"] for row in content["rows"]} == {"no gradient"}


def row(backend: str, us: float | None, *, which="forward", l2="cold", case="64x200", **more) -> dict:
    return {
        "op": "distillation_kl", "case": case, "dtype": "bfloat16", "backend": backend, "pass": which, "l2": l2,
        "median_us": us, "p10_us": us, "p90_us": us, "bytes": 1.0, "flops": 0.0, "floor_us": 2.0,
        "fraction": us and 2.0 / us, "peak_bytes": 2**20, "status": "ok" if us else "out of memory",
        "shapes": "paper", "timer": "graph", "environment": 0, "date": "2026-01-02T00:00:00+00:00", **more,
    }  # fmt: skip


def content(*rows: dict, name: str = "NVIDIA H200") -> dict:
    device = {"name": name, "driver": "1", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "commit": "a" * 40}
    block = {"commit": "a" * 40, "source": "b", "copy_gbps": 4300.0, "matmul_tflops": 790.0}
    return {"device": device, "complete": True, "environments": [block], "rows": list(rows)}


class TestMeans:
    def test_over_shapes_against_the_faster_compile(self):
        rows = [row("compile", 8.0), row("compile_max_autotune", 6.0), row("triton", 3.0), row("reference", 90.0)]
        rows += [row("compile", 16.0, case="4096x1000"), row("triton", 2.0, case="4096x1000")]
        found = ops_report.means(rows)
        assert found["distillation_kl", "forward"] == pytest.approx(4.0)  # of 2 and 8
        assert found["all ops", "forward"] == pytest.approx(4.0)

    @pytest.mark.parametrize(
        "more", [{"l2": "warm"}, {"shapes": "large"}, {"dtype": "float32"}, {"backend": "reference"}]
    )
    def test_what_does_not_count(self, more):
        pair = [row("compile", 8.0), row("triton", 3.0)]
        assert not ops_report.means({**each, **more} for each in pair)

    def test_out_of_memory_has_no_part(self):
        assert not ops_report.means([row("compile", None), row("triton", 3.0)])
        found = ops_report.means([row("compile", None), row("compile_max_autotune", 6.0), row("triton", 3.0)])
        assert found["distillation_kl", "forward"] == pytest.approx(2.0)


class TestPage:
    def rows(self) -> list[dict]:
        return [
            row("reference", None), row("compile", 8.0), row("compile_max_autotune", 6.0), row("triton", 4.0),
            row("triton", 3.5, l2="warm"), row("compile", 3.0, which="backward"), row("triton", 4.0, which="backward"),
            row("triton", 2.5, case="odd", which="both", timer="events"),
        ]  # fmt: skip

    def test_tables_means_and_misses(self, monkeypatch):
        monkeypatch.setitem(targets.NOTES, ("distillation_kl", "64x200", "forward"), "One node cannot be faster.")
        page = ops_report.ops_page(content(*self.rows()), "nvidia-h200")
        assert page.startswith("## nvidia-h200\n\nNVIDIA H200, driver 1, torch 2.11")
        assert "commit aaaaaaaaaaaa; 2026-01-02" in page
        assert "copy 4,300 GB/s, bf16 matrix products 790 TFLOP/s" in page
        header = "| case | pass | reference | compile | triton | warm | floor | of the floor | peak, MiB | target |"
        assert header in page
        assert "| 64x200 | forward | out of memory | 6.00 | 4.00 | 3.50 | 2.00 | 50% | 1.0 | 3.00 |" in page
        assert "| distillation_kl | 1.50 x | 0.75 x |  | 0.75 x, 64x200 backward |" in page
        assert "- distillation_kl 64x200 backward: 0.75 x" in page
        missed = (
            "- distillation_kl 64x200 forward: 4.00 us, 1.33 times its target of 3.00; the floor is 2.00. One node "
            "cannot be faster."
        )
        assert missed in page
        assert "no graph could be captured: distillation_kl odd triton." in page

    def test_targets_are_for_their_device_alone(self):
        page = ops_report.ops_page(content(*self.rows(), name="NVIDIA A10"), "nvidia-a10")
        assert "target" not in page.lower()

    def test_the_document_is_made_of_committed_results_alone(self, tmp_path):
        from dfkd_fast.benchmarks import report

        report.main(root=tmp_path)
        page = tmp_path / "docs" / "benchmarks.md"
        assert "Nothing has been measured yet." in page.read_text()
        assert "measuring.md#one-op" in page.read_text()
        folder = tmp_path / "benchmarks" / "results" / "nvidia-h200"
        folder.mkdir(parents=True)
        (folder / "ops.json").write_text(json.dumps(content(*self.rows())))
        report.main(root=tmp_path)
        assert "## nvidia-h200" in page.read_text()
        assert "Nothing has been measured yet." not in page.read_text()

    def test_the_committed_document_is_up_to_date(self, repository, tmp_path):
        from dfkd_fast.benchmarks import report

        (tmp_path / "benchmarks").symlink_to(repository / "benchmarks")
        report.main(root=tmp_path)
        assert (tmp_path / "docs" / "benchmarks.md").read_text() == (repository / "docs" / "benchmarks.md").read_text()

    def test_every_target_is_of_a_case_that_is_measured(self):
        known = {(op, case.name) for op, benchmark in benchmarks().items() for case in benchmark.cases}
        assert {(op, case) for op, case, _ in targets.TARGETS} <= known
        assert targets.NOTES.keys() <= targets.TARGETS.keys()

    def test_plot_and_table(self, tmp_path):
        assert ops_report.save_plot(self.rows(), tmp_path / "deep" / "ops.png").stat().st_size > 0
        line = ops_report.terminal_rows(self.rows())["distillation_kl"][0]
        assert line == {
            "case": "64x200", "pass": "forward", "L2": "cold", "reference": "out of memory", "compile": "8.00",
            "max autotune": "6.00", "triton": "4.00", "floor": "2.00", "of it": "50%", "MiB": "1.0",
        }  # fmt: skip


class TestCommand:
    SHAPES = "distillation_kl: [{rows: 4, classes: 6, dtypes: [float32]}]"

    def test_ones_own_shapes_on_a_cpu(self, capsys, monkeypatch):
        Path("shapes.yaml").write_text(self.SHAPES)
        arguments = ["distillation_kl", "--shapes", "shapes.yaml", "--device", "cpu", "--backends", "reference"]
        cli(["bench", *arguments, "--out", "out"])
        content = read_results("out/ops.json")
        assert [(each["case"], each["dtype"], each["pass"]) for each in content["rows"]] == [
            ("4x6", "float32", which) for which in measure.PASSES
        ]
        assert content["complete"]
        assert Path("out/ops.png").is_file()
        shown = capsys.readouterr().out
        assert "distillation_kl, microseconds a call" in shown
        assert "ceilings: copy" in shown

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "bench needs a CUDA device and finds none"),
            (["nonsense"], "no benchmark of nonsense; there are"),
            (["--device", "cpu", "--tune"], "--tune finds launch configurations of a GPU"),
            (["--device", "cpu", "--shapes", "none.yaml"], "there is no file none.yaml"),
            (["--device", "cpu", "--ops", "nonsense,other"], "no benchmark of nonsense, other"),
            (["distillation_kl", "--device", "cpu", "--backends", "triton"], "nothing to measure"),
            (["--device", "tpu"], "tpu"),
        ],
    )
    def test_mistakes(self, arguments, message, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit) as left:
            cli(["bench", *arguments])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("nonsense: []", "no benchmark of nonsense"),
            ("[1, 2]", "must hold a list of shapes for each op"),
            ("distillation_kl: [3]", "must be a list or a mapping of sizes, got 3"),
            ("distillation_kl: [{rows: 3, classes: 4, lines: 3}]", "is no shape of distillation_kl: .*lines"),
            ("distillation_kl: [{rows: 3, classes: 4, dtypes: [int8]}]", "dtypes must be a list of float32"),
            ("a: b: c", "neither YAML nor JSON"),
        ],
    )
    def test_mistakes_in_a_file(self, text, message):
        Path("shapes.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            command.from_file(benchmarks(), Path("shapes.yaml"))

    @pytest.mark.parametrize(
        "sizes", ["[4, 6]", "{shape: [4, 6]}", "{shape: [4], classes: 6}", "{rows: 4, classes: 6}"]
    )
    def test_sizes_in_order_or_by_name(self, sizes):
        Path("shapes.yaml").write_text(f"distillation_kl: [{sizes}]")
        ((case,),) = (each.cases for each in command.from_file(benchmarks(), Path("shapes.yaml")))
        assert (case.name, case.shapes, case.dtypes) == ("4x6", "file", [torch.bfloat16])

    def test_an_op_without_a_constructor_says_so(self):
        Path("shapes.yaml").write_text(self.SHAPES)
        with pytest.raises(ValueError, match="has no shapes of one's own"):
            command.from_file({"distillation_kl": a_benchmark()}, Path("shapes.yaml"))

    def test_the_stage(self, monkeypatch):
        monkeypatch.setattr(stage, "benchmarks", lambda: {"distillation_kl": a_benchmark(a_case("4x6"))})
        monkeypatch.setattr(stage, "_fits_a_cpu", lambda case: case.name == "4x6")
        monkeypatch.setattr(stage, "ceilings", lambda device: RATES)
        monkeypatch.setattr(stage, "version", lambda: "now")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda function, **more: function)
            assert stage.main(["--out", "ops.json", "--device", "cpu", "--child"]) == 0
        content = read_results("ops.json")
        assert content["complete"]
        assert content["stage"] == "ops"
        assert content["version"] == "now"
        assert len(content["rows"]) == 6

    def test_pytest_finds_a_files_benchmark(self, request):
        module = request.node.getparent(pytest.Module)
        items = conftest.pytest_pycollect_makeitem(
            module, "BENCHMARK", a_benchmark(a_case(), a_case("3x3", shapes="odd"))
        )
        assert [item.name for item in items] == [
            f"test_distillation_kl[4x6-bfloat16-{backend}-{which}]"
            for backend in ("triton", "reference")
            for which in ("forward", "backward")
        ]
        assert all(item.get_closest_marker("gpu") and "benchmark" in item.fixturenames for item in items)
        assert conftest.pytest_pycollect_makeitem(module, "other", object()) is None


@pytest.mark.gpu
def test_the_paper_cases_of_an_op():
    device = torch.device("cuda")
    found, _ = stage.subjects([replace(KL, cases=KL.cases[:1])], device, backends=["triton", "compile"])
    results = stage.open_results(Path("ops.json"), RATES)
    assert stage.measure(found, results, device=device, rates=RATES)
    assert len(results.rows) == 12
    assert {row["timer"] for row in results.rows} == {"graph"}


def test_rows_of_the_extension_stand_for_the_sources_of_their_op():
    names = {path.name for path in stage._cuda_sources("contrastive_loss")}
    assert names == {"contrastive_loss.cu", "contrastive_loss_bwd.cu", "contrastive_loss.h", "sm90.h", "ops.cpp"}


def test_the_extension_compared_with_triton():
    times = {
        ("128", "triton"): (4, 4), ("128", "cuda"): (None, None),
        ("8192", "triton"): (30, 60), ("8192", "cuda"): (20, 40),
        ("65536", "triton"): (30, 60), ("65536", "cuda"): (40, 60),
        ("131072", "cuda"): (1, 1),
    }  # fmt: skip
    rows = [
        row(backend, us, which=which, case=case)
        for (case, backend), each in times.items()
        for which, us in zip(("forward", "backward"), each, strict=True)
    ]
    rows += [row("cuda", 1, which="both", case="128"), row("cuda", 1, case="8192", l2="warm")]
    head, _, line = ops_report._lead_table(rows)
    assert head == "| op | ahead at | mean | by case |"
    assert line == "| distillation_kl | 1 of 2 | 1.16 x | 8192 1.50 x, 65536 0.90 x |"
    assert ops_report._lead_table([each for each in rows if each["backend"] != "triton"]) == []
    assert ops_report._cell(row("cuda", None, status="not served")) == "not served"
