"""The queue behind `make gpu`, with stages of our own in place of those that need a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfkd_fast.benchmarks import ablation, bench_step_parts, common, gpu, gpu_tests
from dfkd_fast.benchmarks import report as tables
from dfkd_fast.config import DataConfig, DistillConfig, GeneratorConfig, LoopConfig, ModelConfig, TeachConfig
from dfkd_fast.engine import NonFiniteError
from dfkd_fast.report import read_results, write_results

FAKE = """
import argparse, json, os, sys, time
from datetime import datetime, UTC
parser = argparse.ArgumentParser()
for name in ("--stage", "--version", "--out", "--since"):
    parser.add_argument(name)
parser.add_argument("--seconds", type=float)
parser.add_argument("--rows", type=int, default=1)     # in all
parser.add_argument("--a-turn", type=int, default=99)  # most of them in one turn
parser.add_argument("--hang", action="store_true")
parser.add_argument("--silent", action="store_true")
parser.add_argument("--status", type=int, default=0)
o = parser.parse_args()
with open("log", "a") as log:
    log.write(json.dumps([o.stage, o.seconds, o.since, os.getpid()]) + "\\n")
if o.silent:
    sys.exit(o.status)
content = {"stage": o.stage, "version": o.version, "rows": [], "environments": []}
if os.path.exists(o.out) and json.load(open(o.out))["version"] == o.version:
    content = json.load(open(o.out))
now = datetime.now(UTC).isoformat(timespec="seconds")
rows = content["rows"]
if o.since:
    rows[:] = [{**row, "date": now} for row in rows]
rows += [{"n": n, "date": now} for n in range(len(rows), min(o.rows, len(rows) + o.a_turn))]
content["complete"] = len(rows) >= o.rows
with open(o.out + ".part", "w") as part:
    json.dump(content, part)
os.replace(o.out + ".part", o.out)
if o.hang:
    time.sleep(60)
sys.exit(o.status)
"""


def stage(name: str, *arguments: str, version: str = "1", limit_s: float = 30, least_s: float = 0) -> gpu.Stage:
    command = (sys.executable, "-S", "-E", "-c", FAKE, "--stage", name, "--version", version, *arguments)
    return gpu.Stage(name=name, version=version, command=command, limit_s=limit_s, least_s=least_s)


def saved(folder: Path, name: str, *dates: str, version: str = "1", complete: bool = True) -> None:
    rows = [{"n": n, "date": date} for n, date in enumerate(dates)]
    write_results(folder / f"{name}.json", {"stage": name, "version": version, "complete": complete, "rows": rows})


def turns() -> list[list]:
    log = Path("log")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run(*stages: gpu.Stage, budget_s: float = 60) -> dict[str, gpu.Outcome]:
    outcomes = gpu.run_queue(stages, out=Path("out"), committed=Path("committed"), budget_s=budget_s)
    return {outcome.stage: outcome for outcome in outcomes}


def ended(process: int, seconds: float = 5) -> bool:
    """Whether a process that is no child of ours is gone, or waits only to be collected, within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


class TestOrder:
    def test_no_evidence_then_incomplete_then_oldest(self):
        old, new = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
        saved(Path("committed"), "newest", new)
        saved(Path("committed"), "oldest", new, old)
        saved(Path("committed"), "part", new, complete=False)
        saved(Path("committed"), "outdated", old, version="0")
        stages = [stage(name, "--rows", "2") for name in ("newest", "oldest", "part", "never", "outdated")]
        outcomes = run(*stages)
        assert [turn[0] for turn in turns()] == ["never", "outdated", "part", "oldest", "newest"]
        assert {outcome.status for outcome in outcomes.values()} == {"complete"}

    def test_complete_evidence_is_renewed_and_only_that(self):
        saved(Path("committed"), "done", "2026-01-01T00:00:00+00:00")
        run(stage("done"), stage("never"))
        assert {turn[0]: turn[2] is not None for turn in turns()} == {"done": True, "never": False}
        assert gpu.evidence(stage("done"), Path("out")).oldest > "2026-01-02"
        assert gpu.evidence(stage("done"), Path("committed")).oldest < "2026-01-02"

    def test_a_partial_stage_lets_others_of_its_rank_go_before_it_goes_on(self):
        outcomes = run(stage("a", "--rows", "3", "--a-turn", "1"), stage("b", "--rows", "2", "--a-turn", "1"))
        assert [turn[0] for turn in turns()] == ["a", "b", "a", "b", "a"]
        assert outcomes["a"].turns == 3
        assert outcomes["a"].rows == 3
        assert not outcomes["a"].failed

    def test_goes_on_where_a_cut_run_stopped(self):
        saved(Path("out"), "a", "2026-01-01T00:00:00+00:00", complete=False)
        assert run(stage("a", "--rows", "3"))["a"].rows == 3
        dates = [row["date"] for row in read_results("out/a.json")["rows"]]
        assert dates[0].startswith("2026-01-01")
        assert not dates[1].startswith("2026-01-01")

    def test_a_stage_that_gains_nothing_is_not_run_again(self):
        assert run(stage("a", "--rows", "3", "--a-turn", "0"))["a"].status == "partial"
        assert len(turns()) == 1


class TestBudget:
    def test_nothing_begins_without_time_for_it(self):
        outcomes = run(stage("long", least_s=100), stage("short"), budget_s=50)
        assert [turn[0] for turn in turns()] == ["short"]
        assert outcomes["long"].status == "no time left"
        assert not outcomes["long"].failed

    def test_a_stage_gets_less_than_what_is_left(self):
        run(stage("a", limit_s=480), budget_s=10)
        assert 0 < turns()[0][1] < 10

    def test_no_budget(self):
        assert run(stage("a", least_s=1), budget_s=0)["a"].status == "no time left"


class TestFailure:
    def test_a_stage_past_its_limit_is_stopped_with_its_rows_kept(self):
        start = time.monotonic()
        outcomes = run(stage("slow", "--hang", limit_s=1.5), stage("next"))
        assert time.monotonic() - start < 20
        assert outcomes["slow"].status == "timed out"
        assert outcomes["slow"].failed
        assert outcomes["slow"].rows == 1
        assert outcomes["next"].status == "complete"
        with pytest.raises(ProcessLookupError):
            os.kill(turns()[0][3], 0)

    def test_children_end_with_their_stage(self):
        code = (
            "import subprocess, sys, time; sleep = [sys.executable, '-c', 'import time; time.sleep(60)'];"
            "child = subprocess.Popen(sleep);"
            "open('child', 'w').write(str(child.pid)); time.sleep(60)"
        )
        orphaning = gpu.Stage(name="a", version="1", command=(sys.executable, "-c", code), limit_s=2, least_s=0)
        assert run(orphaning)["a"].status == "timed out"
        child = int(Path("child").read_text())
        assert ended(child)

    def test_exit_status_and_silence_are_failures_and_do_not_stop_the_queue(self):
        outcomes = run(stage("broken", "--status", "3"), stage("silent", "--silent"), stage("sound"))
        assert outcomes["broken"].status == "failed (exit status 3)"
        assert outcomes["silent"].status == "failed (wrote no result)"
        assert [outcomes[name].failed for name in ("broken", "silent", "sound")] == [True, True, False]
        assert len(turns()) == 3

    def test_a_stage_that_carries_rows_over_is_given_those_of_another_version(self):
        saved(Path("committed"), "a", "2026-01-01T00:00:00+00:00", version="0")
        carrying = replace(stage("a", "--rows", "2", "--a-turn", "1"), carries=True)
        assert gpu.evidence(stage("a"), Path("committed")).rank == 0
        assert gpu.evidence(carrying, Path("committed")) == gpu.Evidence(rank=1)
        outcome = run(carrying)["a"]
        assert (outcome.status, outcome.rows, outcome.turns) == ("complete", 2, 2)
        assert turns()[0][2] is None  # goes on, and renews nothing

    def test_a_torn_file_is_no_evidence(self):
        saved(Path("committed"), "a", "2026-01-01T00:00:00+00:00")
        (Path("committed") / "a.json").write_text('{"version": "1", "rows": [')
        assert gpu.evidence(stage("a"), Path("committed")).rank == 0


class TestResults:
    def open(self, version: str = "1") -> common.Results:
        return common.Results(Path("r.json"), stage="s", version=version, key=("cell", "seed"))

    def test_every_row_is_on_disk_at_once_and_goes_over_its_predecessor(self):
        results = self.open()
        results.add({"cell": "a", "seed": 0, "value": 1.0})
        assert read_results("r.json")["rows"][0]["value"] == 1.0
        results.add({"cell": "a", "seed": 1, "value": 2.0})
        results.add({"cell": "a", "seed": 0, "value": 3.0})
        again = self.open()
        assert [(row["seed"], row["value"]) for row in again.rows] == [(1, 2.0), (0, 3.0)]
        assert not again.complete

    def test_rows_name_their_environment(self, monkeypatch):
        results = self.open()
        results.add({"cell": "a", "seed": 0})
        self.open().add({"cell": "b", "seed": 0})
        assert len(self.open().environments) == 1
        monkeypatch.setattr(common, "environment", lambda: {"torch": "other", "date": "now"})
        self.open().add({"cell": "c", "seed": 0})
        content = read_results("r.json")
        assert [content["environments"][row["environment"]]["torch"] for row in content["rows"]] == [
            torch.__version__,
            torch.__version__,
            "other",
        ]

    def test_another_version_starts_afresh(self):
        self.open().add({"cell": "a", "seed": 0})
        assert self.open("2").rows == []

    def test_another_version_may_keep_rows_and_is_not_complete(self):
        results = self.open()
        results.head["device"] = {"name": "x"}
        results.add({"cell": "a", "seed": 0})
        results.add({"cell": "b", "seed": 0})
        results.finish(complete=True)
        key = ("cell", "seed")
        again = common.Results(Path("r.json"), stage="s", version="2", key=key, keep=lambda row: row["cell"] == "b")
        assert [row["cell"] for row in again.rows] == ["b"]
        assert not again.complete
        again.write()
        assert list(read_results("r.json")) == ["device", "stage", "version", "complete", "environments", "rows"]

    def test_rows_name_what_was_known_of_their_run(self):
        for rate in (1, 2):
            key = ("cell", "seed")
            results = common.Results(Path("r.json"), stage="s", version="1", key=key, facts={"rate": rate})
            results.add({"cell": "a", "seed": rate})
        assert [block["rate"] for block in read_results("r.json")["environments"]] == [1, 2]

    def test_todo_is_missing_first_then_oldest(self):
        results = self.open()
        results.rows = [
            {"cell": "a", "seed": 0, "date": "2026-03"},
            {"cell": "b", "seed": 0, "date": "2026-01"},
            {"cell": "c", "seed": 0, "date": "2026-09"},
        ]
        keys = [(cell, 0) for cell in "abcd"]
        assert results.todo(keys) == [("d", 0)]
        assert results.todo(keys, since="2026-06") == [("d", 0), ("b", 0), ("a", 0)]

    def test_the_clock_lets_nothing_begin_that_would_not_end(self):
        clock = common.Clock(10.0)
        assert clock.fits()
        clock.took(9.0)
        assert not clock.fits()
        assert not common.Clock(0.0).fits()


class TestTimer:
    def test_median_and_deciles_of_what_ran(self):
        seen = []

        def call(number: int) -> None:
            seen.append(number)
            time.sleep(0.002)

        timing = common.time_calls(call, torch.device("cpu"), seconds=0.05)
        assert 2 <= timing.p10 <= timing.ms <= timing.p90
        assert timing.calls >= 10
        assert seen[6:] == list(range(timing.calls))

    def test_the_cpu_needs_no_rotation(self):
        assert common.input_sets(1, torch.device("cpu")) == 1


class TestStepParts:
    def test_cases_have_names_of_their_own(self):
        names = [
            (c.part, c.case, c.direction)
            for c in bench_step_parts.cases(torch.device("cpu"), bench_step_parts.SIZES["full"])
        ]
        assert len(set(names)) == len(names)
        assert ("high_order_attention", "64x64x56x56", "forward") in names
        assert ("spatial_attention", "64x64x224x224", "forward+backward") in names

    def test_operations_of_resnet18_are_the_known_number(self):
        make = bench_step_parts._Maker(torch.device("cpu"), bench_step_parts.SIZES["full"])
        setup = bench_step_parts._convolutions(make, "student", "forward")
        assert setup.flops / make.size.batch == pytest.approx(2 * 1.814e9, rel=0.01)  # 1.81 GMAC an image at 224

    def test_every_part_runs_at_a_small_size(self):
        arguments = ["--out", "parts.json", "--device", "cpu", "--size", "small", "--modes", "eager"]
        with pytest.MonkeyPatch.context() as patch:
            quick = common.time_calls
            patch.setattr(bench_step_parts, "time_calls", lambda call, device: quick(call, device, seconds=0, least=2))
            assert bench_step_parts.main(arguments) == 0
        content = read_results("parts.json")
        small = bench_step_parts.SIZES["small"]
        assert len(content["rows"]) == len(list(bench_step_parts.cases(torch.device("cpu"), small)))
        assert all(row["ms"] > 0 for row in content["rows"])
        assert not content["complete"]  # the compiled half is missing


class TestAblation:
    def test_overrides_reach_their_fields(self):
        for overrides in ablation.CELLS.values():
            config = ablation.override(DistillConfig(), overrides)
            for path, value in overrides.items():
                here = config
                for name in path.split("."):
                    here = here[name] if isinstance(here, dict) else getattr(here, name)
                assert here == value

    @pytest.mark.parametrize("path", ["generator.colour", "objective.student.kd.more", "nothing", "seed.x"])
    def test_a_wrong_path_is_refused(self, path):
        with pytest.raises((ValueError, KeyError), match=r"colour|more|nothing|seed|kd"):
            ablation.override(DistillConfig(), {path: 1})

    def test_cells_go_round_the_seeds_and_go_on_where_they_stopped(self, monkeypatch):
        ran = []

        def cell(profile, name, seed, device, teacher, accuracy):
            ran.append((name, seed))
            return {
                "cell": name, "seed": seed, "overrides": dict(ablation.CELLS[name]), "accuracy": 0.5 + 0.1 * seed,
                "agreement": 0.5, "teacher_accuracy": accuracy, "rounds": 1, "seconds": 0.0,
            }  # fmt: skip

        class Here:
            """Runs at once what is submitted, in this process."""

            def __init__(self, *arguments, **more):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

            def submit(self, function, *arguments):
                future = ablation.futures.Future()
                future.set_result(function(*arguments))
                return future

        monkeypatch.setattr(ablation, "run_cell", cell)
        monkeypatch.setattr("dfkd_fast.data.load", lambda config: None)
        monkeypatch.setattr(ablation, "trained_teacher", lambda profile, device: (Path("t"), 0.8))
        monkeypatch.setattr(ablation.futures, "ProcessPoolExecutor", Here)
        arguments = ["--out", "ablation.json", "--device", "cpu", "--size", "small", "--jobs", "1"]
        assert ablation.main([*arguments, "--cells", "baseline", "both", "--seeds", "0", "1"]) == 0
        assert ran == [("baseline", 0), ("both", 0), ("baseline", 1), ("both", 1)]
        assert not read_results("ablation.json")["complete"]
        assert ablation.main(arguments) == 0
        assert len(ran) == len(set(ran)) == len(ablation.CELLS) * len(ablation.SEEDS)
        assert read_results("ablation.json")["complete"]


class TestCell:
    """One cell, run in full at the least size that there is."""

    @pytest.fixture(scope="class")
    @classmethod
    def taught(cls, tmp_path_factory):
        small = ablation.PROFILES["small"]
        profile = ablation.Profile(
            data=DataConfig(image_size=32, classes=2, train_per_class=8, test_per_class=4),
            teacher=ModelConfig(name="resnet8", options={"stem_stride": 2}),
            student=ModelConfig(name="resnet8", options={"stem_stride": 2}),
            teach=TeachConfig(epochs=1, batch_size=8),
            distill=replace(
                small.distill,
                generator=GeneratorConfig(channels=(16, 8, 8, 8, 8), latent_dim=8),
                loop=LoopConfig(epochs=1, rounds_per_epoch=1, generator_steps=1, student_steps=1, batch_size=4),
            ),
        )
        folder = tmp_path_factory.mktemp("teacher")
        return profile, folder, *ablation.trained_teacher(profile, "cpu", folder)

    def test_the_teacher_is_trained_once(self, taught, monkeypatch):
        profile, folder, weights, accuracy = taught
        monkeypatch.setattr("dfkd_fast.engine.teach", None)
        assert ablation.trained_teacher(profile, "cpu", folder) == (weights, accuracy)

    def test_the_row_is_what_the_table_needs(self, taught):
        profile, _, weights, accuracy = taught
        row = ablation.run_cell(profile, "R = 1", 1, "cpu", weights, accuracy)
        assert (row["cell"], row["seed"], row["rounds"]) == ("R = 1", 1, 1)
        assert row["overrides"] == {"objective.mhad.order": 1}
        assert 0 <= row["accuracy"] <= 1
        assert row["teacher_accuracy"] == accuracy
        assert row["seconds"] > 0
        assert not list(Path().iterdir())

    def test_workers_die_with_the_process_that_started_them(self):
        code = (
            "import concurrent.futures as futures, multiprocessing, os, time\n"
            "from dfkd_fast.benchmarks import ablation\n"
            "if __name__ == '__main__':\n"
            "    context = multiprocessing.get_context('spawn')\n"
            "    pool = futures.ProcessPoolExecutor(1, mp_context=context, initializer=ablation._start_worker)\n"
            "    print(pool.submit(os.getpid).result(), flush=True)\n"
            "    pool.submit(time.sleep, 60).result()\n"
        )
        Path("pool.py").write_text(code)
        with subprocess.Popen([sys.executable, "pool.py"], stdout=subprocess.PIPE, text=True) as parent:
            worker = int(parent.stdout.readline())
            os.kill(worker, 0)
            parent.kill()
        assert ended(worker)

    def test_losses_that_do_not_stay_finite_are_a_result(self, taught, monkeypatch):
        profile, _, weights, accuracy = taught

        def distill(*arguments, **more):
            raise NonFiniteError("round 3, student step 1: mhad not finite")

        monkeypatch.setattr("dfkd_fast.engine.distill", distill)
        row = ablation.run_cell(profile, "both", 0, "cpu", weights, accuracy)
        assert row["accuracy"] is None
        assert "mhad" in row["error"]


class TestTables:
    def content(self) -> dict:
        row = {
            "cell": "both",
            "overrides": {},
            "agreement": 0.9,
            "teacher_accuracy": 0.8,
            "rounds": 20,
            "environment": 0,
        }
        rows = [{**row, "seed": seed, "accuracy": accuracy} for seed, accuracy in enumerate((0.5, 0.6, 0.7))]
        rows.append(
            {**rows[0], "cell": "R = 1", "overrides": {"objective.mhad.order": 1}, "accuracy": None, "agreement": None}
        )
        block = {"device": {"name": "cpu"}, "torch": "2.11.0", "commit": "0123456789abcdef", "source": "x"}
        return {"complete": False, "rows": rows, "environments": [block]}

    def test_mean_spread_and_count(self):
        table = tables.ablation_table(self.content())
        assert "| both |  | 60.0% ± 10.0 | 75.0% ± 12.5 | 90.0% ± 0.0 | 3 |" in table
        assert "| R = 1 | `objective.mhad.order=1` | - | - | - | 0 (not finite: 1) |" in table
        assert "cpu, torch 2.11.0; commit: 0123456789ab." in table

    def test_only_what_is_between_the_markers_changes(self, tmp_path):
        write_results(tmp_path / "benchmarks" / "results" / "cpu" / "ablation.json", self.content())
        (tmp_path / "docs").mkdir()
        page = tmp_path / "docs" / "ablation.md"
        page.write_text("before\n<!-- begin: ablation -->\nold\n<!-- end: ablation -->\nafter\n")
        assert tables.main(root=tmp_path) == 0
        text = page.read_text()
        assert text.startswith("before\n<!-- begin: ablation -->\n### cpu (not complete)\n")
        assert text.endswith("\n<!-- end: ablation -->\nafter\n")
        assert "old" not in text
        tables.main(root=tmp_path)
        assert page.read_text() == text

    def test_a_page_without_markers_is_refused(self):
        with pytest.raises(ValueError, match="markers"):
            tables.between_markers("text", "ablation", "table")


class TestCommand:
    def test_the_queue_has_one_file_a_stage_and_at_most_eight(self):
        stages = gpu.stages()
        assert len({stage.name for stage in stages}) == len(stages) <= 8
        assert all(stage.limit_s <= 480 for stage in stages)
        assert [stage.name for stage in stages] == [
            "tests",
            "ops",
            "swap",
            "step",
            "anatomy",
            "accuracy",
            "step_parts",
            "ablation",
        ]

    def test_without_a_device_says_so(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.main(["--out", "out"]) == 2
        assert "CUDA device" in capsys.readouterr().err
        assert not Path("out").exists()

    def test_an_unknown_stage_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            gpu.main(["--out", "out", "--only", "nonsense"])
        assert "no stage nonsense" in capsys.readouterr().err

    def test_the_stage_of_tests_writes_one_row_a_test(self, monkeypatch, tmp_path, repository):
        tests = tmp_path / "tests"
        tests.mkdir()
        (tests / "test_a.py").write_text(
            "import os, time, pytest\n"
            "@pytest.mark.gpu\ndef test_good(): pass\n"
            "@pytest.mark.gpu\ndef test_bad(): assert 1 == 2\n"
            "@pytest.mark.gpu\n@pytest.mark.timeout(1)\ndef test_endless(): time.sleep(60)\n"
            "@pytest.mark.gpu\ndef test_fatal(): os.abort()\n"
            "@pytest.mark.gpu\ndef test_last(record_property): record_property('ratio', 1.25)\n"
            "def test_other(): assert False\n"
        )
        (tests / "test_b.py").write_text("import no_such_module\n")
        code = (
            "import sys; from pathlib import Path; from dfkd_fast.benchmarks import gpu_tests; "
            f"gpu_tests.TESTS = Path({str(tests)!r}); sys.exit(gpu_tests.main(['--out', 'tests.json']))"
        )
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        content = read_results("tests.json")
        outcomes = {row["test"].rsplit("/")[-1]: row["outcome"] for row in content["rows"]}
        assert outcomes == {
            "test_a.py::test_good": "passed",
            "test_a.py::test_bad": "failed",
            "test_a.py::test_endless": "failed",
            "test_a.py::test_fatal": "failed",
            "test_a.py::test_last": "passed",
            "test_b.py": "not collected",
        }
        assert {row["test"].rsplit("::")[-1]: row["ratio"] for row in content["rows"] if "ratio" in row} == {
            "test_last": 1.25
        }
        assert content["complete"]

    def test_a_change_of_a_test_asks_for_a_new_run(self, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu_tests, "TESTS", tmp_path)
        before = gpu_tests.version()
        (tmp_path / "test_new.py").write_text("")
        assert gpu_tests.version() != before


@pytest.mark.gpu
def test_the_timer_sees_the_device():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    timing = common.time_calls(lambda number: x @ x, device)
    assert 0.05 < timing.ms < 50
    assert common.input_sets(2**20, device) > 1
