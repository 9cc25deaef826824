"""Step profiles: one recorded on the CPU, and hand-written events of a GPU profile."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.autograd import DeviceType

from dfkd_fast import profiling
from dfkd_fast.cli import main
from dfkd_fast.models import extract
from dfkd_fast.nvtx import nvtx_range
from dfkd_fast.profiling import OUTSIDE, REPLAYED, time_by_range

from .. import tiny


class Events(list[Any]):
    """Events as torch.profiler returns them for a GPU: host events that list their kernels, and kernel events."""

    def host(self, name: str, parent: Any = None, *, seq: int = -1, thread: int = 1, kernels: tuple = ()) -> Any:
        event = SimpleNamespace(name=name, cpu_parent=parent, sequence_nr=seq, thread=thread)
        event.device_type, event.kernels = DeviceType.CPU, [SimpleNamespace(duration=each) for each in kernels]
        self.append(event)
        for duration in kernels:
            self.kernel(duration)
        return event

    def kernel(self, duration: float, *, annotation: bool = False) -> None:
        time_range = SimpleNamespace(elapsed_us=lambda: duration)
        self.append(SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=annotation, time_range=time_range))


@pytest.fixture
def step():
    events = Events()
    whole = events.host("dfkd_fast/step/student")
    events.host("aten::normal_", whole, kernels=(10.0,))
    teacher = events.host("dfkd_fast/network/teacher", whole)
    events.host("aten::conv2d", teacher, seq=10, kernels=(20.0,))  # creates no node, so the next node has this number
    student = events.host("dfkd_fast/network/student", whole)
    outer = events.host("aten::conv2d", student, seq=10)
    events.host("aten::convolution", outer, seq=10, kernels=(5.0, 30.0))
    objective = events.host("dfkd_fast/network/objective", whole)
    op = events.host("dfkd_fast/op/distillation_kl", objective)
    events.host("_DistillationKL", op, seq=11, kernels=(4.0,))
    node = "autograd::engine::evaluate_function: "
    loss = events.host(f"{node}_DistillationKLBackward", seq=11, thread=2)
    again = events.host("dfkd_fast/op/distillation_kl", loss, thread=2)
    events.host("dfkd_fast::distillation_kl_backward", again, seq=12, thread=2, kernels=(6.0,))
    convolution = events.host(f"{node}ConvolutionBackward0", seq=10, thread=2)
    events.host("aten::convolution_backward", convolution, thread=2, kernels=(40.0,))
    accumulate = events.host(f"{node}torch::autograd::AccumulateGrad", thread=2)
    events.host("aten::add_", accumulate, thread=2, kernels=(2.0,))
    optimizer = events.host("dfkd_fast/network/optimizer", whole)
    events.host("aten::_fused_sgd_", optimizer, kernels=(8.0,))
    events.kernel(3.0)  # a launch outside of any operator
    events.kernel(500.0, annotation=True)  # a range that is repeated on the device's timeline
    return events


def test_device_time_is_attributed_to_network_direction_and_op(step):
    rows = {(r["network"], r["direction"], r["op"]): r for r in time_by_range(step, 2, cuda=True)}
    assert {key: (row["microseconds"], row["kernels"]) for key, row in rows.items()} == {
        (OUTSIDE, "forward", ""): (6.5, 1.0),
        ("teacher", "forward", ""): (10.0, 0.5),
        ("student", "forward", ""): (17.5, 1.0),
        ("student", "backward", ""): (21.0, 1.0),
        ("objective", "forward", "distillation_kl"): (2.0, 0.5),
        ("objective", "backward", "distillation_kl"): (3.0, 0.5),
        ("optimizer", "optimizer", ""): (4.0, 0.5),
    }
    assert rows["student", "backward", ""]["share"] == round(42 / 128, 5)


def test_replayed_graph_has_only_totals(step):
    total = {"microseconds": 128.0, "kernels": 10, "share": 1.0}
    row = {"network": REPLAYED, "direction": "forward", "op": "", **total}
    assert time_by_range(step, 1, cuda=True, replayed=True) == [row]


def test_gpu_tables(step):
    rows = [{"step": "student", **row} for row in time_by_range(step, 1, cuda=True)]
    rows += [{**rows[0], "network": f"small {i}", "microseconds": 0.25, "kernels": 1, "share": 0.002} for i in range(2)]
    steps = [{"step": "student", "recorded": 1, "unprofiled_us": 450.0, "microseconds": 128.0, "kernels": 10}]
    content = {"engine": "eager", "device": "cuda", "steps": steps, "rows": rows}
    shown = [tuple(row.values()) for row in profiling.table(content, "student")]
    assert shown[0] == ("student", "backward", "", "2", "42.0", "32.8%")
    assert shown[-1] == ("2 rows below 0.5%", "", "", "2", "0.5", "0.4%")
    assert profiling.summary_table([content]) == [
        {"engine": "eager", "step": "student", "ms": "0.450", "device ms": "0.128", "kernels": "10"}
    ]


def test_compiled_backward_is_attributed_to_its_network():
    compiled = torch.compile(nn.Conv2d(3, 4, 3), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    compiled(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        with nvtx_range("network", "student"):
            output = compiled(x)
        output.sum().backward()
    found = {event.name: key for event, key in profiling.attribute(profiler.events())}
    assert found["aten::convolution"] == ("student", "forward", "")
    assert found["aten::convolution_backward"] == ("student", "backward", "")
    assert found["aten::sum"] == (OUTSIDE, "forward", "")


def profiled(out, config=tiny.config, **options):
    networks = [extract(network, image_size=tiny.SIZE) for network in (tiny.teacher(), tiny.network())]
    return profiling.profile(*networks, config(), out=str(out), **options)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    console = Console(file=io.StringIO(), width=120)
    done = profiled(tmp_path_factory.mktemp("profile"), engines=["eager"], steps=2, console=console)
    return done, console.file.getvalue()


def test_profile_writes_traces_and_breakdown(result):
    done, text = result
    traces = {f"eager_{kind}": done.folder / f"trace_eager_{kind}.json.gz" for kind in ("generator", "student")}
    assert done.traces == traces
    assert {path.name for path in done.folder.iterdir()} == {"breakdown.json", *(path.name for path in traces.values())}
    content = json.loads((done.folder / "breakdown.json").read_text())
    assert content == done.content
    assert (content["precision"], content["environment"]["torch"]) == ("fp32", torch.__version__)
    assert [step["recorded"] for step in content["engines"][0]["steps"]] == [2, 2]
    assert "eager: student step, mean of 2" in text
    assert "high_order_attention_mse" in text


def test_self_times_sum_to_the_recorded_window(result):
    done, _ = result
    for step in done.content["engines"][0]["steps"]:
        events = json.loads(gzip.decompress(done.traces[f"eager_{step['step']}"].read_bytes()))["traceEvents"]
        ranges = [e["dur"] for e in events if e.get("name") == f"dfkd_fast/step/{step['step']}"]
        (window,) = [e["dur"] for e in events if e.get("name", "").startswith("ProfilerStep#")]
        assert len(ranges) == 2
        assert sum(ranges) <= 2 * step["microseconds"] <= 1.01 * window + 1
        rows = [row for row in done.content["engines"][0]["rows"] if row["step"] == step["step"]]
        assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-3)


def test_trained_networks_have_forward_and_backward_rows(result):
    rows = result[0].content["engines"][0]["rows"]
    found = {(row["step"], row["network"], row["direction"]) for row in rows}
    ways = ("forward", "backward")
    trained = {("generator", name, way) for name in ("generator", "teacher", "student", "objective") for way in ways}
    trained |= {("student", name, way) for name in ("student", "objective") for way in ways}
    assert trained | {("student", "optimizer", "optimizer"), ("student", "teacher", "forward")} <= found
    # In the student step, generator and teacher have no backward.
    assert not {("student", "teacher", "backward"), ("student", "generator", "backward")} & found
    assert not {row["network"] for row in rows if row["direction"] == "backward"} & {OUTSIDE, "optimizer"}
    ops = {("generator", "spatial_attention"), ("teacher", "batchnorm_statistics"), ("objective", "contrastive_loss")}
    assert ops <= {(row["network"], row["op"]) for row in rows}


@pytest.mark.parametrize("changes", [{"engines": []}, {"steps": 0}, {"engines": ["eager", "graph"]}], ids=str)
def test_invalid_arguments_raise_before_anything_runs(changes, tmp_path):
    message = "needs a CUDA device" if changes.get("engines") else "at least one engine and one step"
    with pytest.raises(ValueError, match=message):
        profiled(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_all_engines_can_be_profiled_on_cuda(tmp_path):
    names = ["eager", "compiled", "graph"]
    done = profiled(tmp_path, lambda: tiny.config(device="cuda"), engines=names, steps=3)
    *launched, graph = done.content["engines"]
    for engine in launched:
        assert {"generator", "teacher", "student", "objective", "optimizer"} <= {r["network"] for r in engine["rows"]}
        assert sum(row["share"] for row in engine["rows"] if row["network"] == OUTSIDE) < 0.5
    assert {row["network"] for row in graph["rows"]} == {REPLAYED}
    assert all(step["kernels"] >= 1 and step["microseconds"] > 0 for step in graph["steps"])


def test_profile_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = "--teacher.name resnet8 --student.name resnet8 --data.name digits --data.image_size 16"
    small = "--distill.device cpu --distill.loop.batch_size 2 --distill.loop.generator_steps 0"
    main(f"profile {networks} {small} --engines eager --steps 1 --out profiled".split())
    assert "breakdown.json" in capsys.readouterr().out
    content = json.loads((tmp_path / "profiled" / "breakdown.json").read_text())
    assert content["networks"] == {"teacher": "resnet8", "student": "resnet8"}
    assert [step["step"] for step in content["engines"][0]["steps"]] == ["student"]
