"""Where a step's time goes: traces of this machine's CPU, and one of a GPU as kineto writes it, made by hand."""

from __future__ import annotations

import ast
import gzip
import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from dfkd_fast import ops, profiling
from dfkd_fast.cli import main
from dfkd_fast.models import extract
from dfkd_fast.nvtx import nvtx_range
from dfkd_fast.ops.backend import Implementation, _registry, dispatch
from dfkd_fast.profiling import Activity, Timeline, anatomy, attribute_by_order, events_of, op_class, record
from dfkd_fast.profiling.anatomy import summary_table, table
from dfkd_fast.profiling.classes import GAP, OURS, kernel_ops
from dfkd_fast.profiling.timeline import OUTSIDE, UNKNOWN

from . import tiny


def read(events: list[dict[str, Any]]) -> Timeline:
    return profiling.timeline({"schemaVersion": 1, "traceEvents": events})


def activity(name: str = "k", **changes: Any) -> Activity:
    fields = {"start": 0.0, "duration": 1.0, "stream": 7, "step": 0, "network": "student", "direction": "forward"}
    return Activity(**{"name": name, **fields, **changes})


class Trace:
    """A trace of a GPU, event by event, in the form in which kineto writes it."""

    MAIN, AUTOGRAD, STREAM = 100, 101, 7

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.correlation = 1000

    def add(self, cat: str, name: str, ts: float, dur: float, tid: int, pid: int = 100, **args: Any) -> None:
        given = {"External id": len(self.events) + 1, **args}
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": 4e12 + ts, "dur": dur, "args": given}
        )

    def range(self, name: str, ts: float, dur: float, tid: int = MAIN) -> None:
        self.add("user_annotation", f"dfkd_fast/{name}", ts, dur, tid, **{"Record function id": 0})
        # Kineto repeats a range on the stream, over the kernels launched in it: no work of its own.
        self.add("gpu_user_annotation", f"dfkd_fast/{name}", ts + 500, dur, self.STREAM, pid=0)

    def op(self, name: str, ts: float, dur: float, *, seq: int | None = None, fwd: int = 0, tid: int = MAIN) -> None:
        numbers = {} if seq is None else {"Sequence number": seq, "Fwd thread id": fwd}
        self.add("cpu_op", name, ts, dur, tid, **numbers)

    def launch(
        self,
        ts: float,
        *kernels: tuple[str, float, float],
        call: str = "cudaLaunchKernel",
        cat: str = "kernel",
        tid: int = MAIN,
    ) -> None:
        """A call at ``ts`` that starts kernels of (name, start, duration)."""
        self.correlation += 1
        driver = "cuda_driver" if call.startswith("cuL") else "cuda_runtime"
        self.add(driver, call, ts, 3.0, tid, cbid=211, correlation=self.correlation)
        for node, (name, start, duration) in enumerate(kernels):
            where = {"device": 0, "context": 1, "stream": self.STREAM, "correlation": self.correlation}
            graph = {"graph id": 1, "graph node id": node} if call == "cudaGraphLaunch" else {}
            self.add(cat, name, start, duration, self.STREAM, pid=0, **where, **graph)
        flow = {"id": self.correlation, "cat": "ac2g", "name": "ac2g"}
        self.events.append({"ph": "s", "pid": 100, "tid": tid, "ts": 4e12 + ts, **flow})
        self.events.append({"ph": "f", "pid": 0, "tid": self.STREAM, "ts": 4e12 + kernels[0][1], "bp": "e", **flow})

    def student_step(self, at: float, seq: int) -> None:
        """Noise, the teacher's convolution, the student's and its gradient, an op and its gradient, SGD."""
        device = at + 1000  # kernels run later than they are launched: the step is not told by their time
        self.range("step/student", at, 400)
        self.op("aten::normal_", at + 1, 8)
        noise = "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>"
        self.launch(at + 2, (noise, device, 10))
        self.range("network/teacher", at + 20, 40)
        self.op("aten::cudnn_convolution", at + 22, 30, seq=seq)  # makes no node: the number is the next node's
        self.launch(at + 25, ("sm90_xmma_gemm_bf16bf16_tn_n", device + 10, 20))
        self.range("network/student", at + 70, 60)
        self.op("aten::conv2d", at + 72, 30, seq=seq)
        self.op("aten::convolution", at + 74, 26, seq=seq)
        self.launch(at + 80, ("nchwToNhwcKernel", device + 35, 5))  # nothing ran for 5 us before it
        self.launch(at + 86, ("sm90_xmma_fprop_implicit_gemm_bf16", device + 40, 30), call="cudaLaunchKernelExC")
        self.range("network/objective", at + 140, 50)
        self.range("op/distillation_kl", at + 142, 40)
        self.op("_DistillationKL", at + 143, 38, seq=seq + 1)
        self.op("dfkd_fast::distillation_kl", at + 145, 30)
        self.launch(at + 150, ("_forward_kernel", device + 70, 4), call="cuLaunchKernelEx")
        self.op("aten::ones_like", at + 192, 8)
        self.launch(at + 194, ("Memset (Device)", device + 74, 1), call="cudaMemsetAsync", cat="gpu_memset")
        # On autograd's thread, where no range is open.
        engine, thread = "autograd::engine::evaluate_function: ", {"tid": self.AUTOGRAD}
        self.op(f"{engine}_DistillationKLBackward", at + 200, 30, seq=seq + 1, fwd=1, **thread)
        self.op("_DistillationKLBackward", at + 202, 26, seq=seq + 1, fwd=1, **thread)
        self.op("dfkd_fast::distillation_kl_backward", at + 205, 20, **thread)
        self.launch(at + 210, ("_backward_kernel", device + 75, 5), call="cuLaunchKernelEx", **thread)
        self.op(f"{engine}ConvolutionBackward0", at + 240, 40, seq=seq, fwd=1, **thread)
        self.op("ConvolutionBackward0", at + 242, 36, seq=seq, fwd=1, **thread)
        self.op("aten::convolution_backward", at + 244, 30, **thread)
        self.launch(at + 250, ("sm90_xmma_wgrad_implicit_gemm_bf16", device + 80, 40), **thread)
        self.op(f"{engine}torch::autograd::AccumulateGrad", at + 285, 10, **thread)
        self.op("aten::add_", at + 287, 6, **thread)
        add = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
        self.launch(at + 288, (add, device + 120, 2), **thread)
        self.range("network/optimizer", at + 310, 60)
        self.op("aten::_fused_sgd_", at + 315, 40)
        sgd = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor>"
        self.launch(at + 320, (sgd, device + 130, 10))  # 8 us of nothing before it
        copy = ("Memcpy DtoD (Device -> Device)", device + 140, 1)
        self.launch(at + 380, copy, call="cudaMemcpyAsync", cat="gpu_memcpy")

    def replayed_step(self, at: float, kernels: list[tuple[str, float, float]]) -> None:
        self.range("step/student", at, 20)
        self.launch(at + 5, *[(name, at + 10 + start, dur) for name, start, dur in kernels], call="cudaGraphLaunch")


@pytest.fixture(scope="module")
def launched() -> Timeline:
    trace = Trace()
    trace.launch(-50, ("of_no_step", 900, 40))
    trace.student_step(0, seq=10)
    trace.student_step(500, seq=20)
    trace.student_step(1000, seq=30)
    return read(trace.events)


CONV, KL = "convolution", "distillation_kl"
STEP = [  # of Trace.student_step, in the stream's order
    (OUTSIDE, "forward", "random numbers"),
    ("teacher", "forward", CONV),
    ("student", "forward", "copy"),
    ("student", "forward", CONV),
    ("objective", "forward", KL),
    (OUTSIDE, "forward", "copy"),
    ("objective", "backward", KL),
    ("student", "backward", CONV),
    ("student", "backward", "element-wise"),  # summing the weight's gradient, of no forward operator
    ("optimizer", "optimizer", "optimizer"),
    (OUTSIDE, "forward", "copy"),
]


class TestCuda:
    def test_kernels_have_step_network_direction_and_class(self, launched):
        assert launched.device == "cuda"
        assert launched.steps == ("student",) * 3
        for index in range(3):
            found = [(a.network, a.direction, op_class(a)) for a in launched.of_step(index)]
            assert found == STEP

    def test_what_belongs_to_no_step_is_left_out(self, launched):
        assert "of_no_step" not in {a.name for a in launched.activities}

    def test_gaps_and_windows(self, launched):
        content = anatomy(launched)
        (step,) = content["steps"]
        # 141 us of work, in which 13 are idle; the next step's first kernel comes at 500, and the last step ends.
        assert step == {
            "step": "student",
            "profiled": 3,
            "window_us": 500.0,
            "busy_us": 128.0,
            "gap_us": 372.0,
            "largest_gap_us": 359.0,
            "busy": 0.256,
            "kernels": 11,
        }
        gaps = {(r["network"], r["direction"]): r["microseconds"] for r in content["rows"] if r["op_class"] == GAP}
        assert gaps == {("student", "forward"): 5.0, ("optimizer", "optimizer"): 8.0, (OUTSIDE, "forward"): 359.0}
        assert sum(row["microseconds"] for row in content["rows"]) == 500
        assert sum(row["share"] for row in content["rows"]) == pytest.approx(1, abs=1e-3)
        assert sum(row["kernels"] for row in content["rows"]) == 11

    def test_timeline_in_the_file_is_the_steps(self, launched):
        drawn = anatomy(launched)["timeline"]["student"]
        found = events_of(json.loads(json.dumps(drawn)))
        assert [(network, label) for _, _, network, label, _ in found] == [(n, label) for n, _, label in STEP]
        assert found[3][:2] == (40.0, 30.0)
        assert found[3][4] == "sm90_xmma_fprop_implicit_gemm_bf16"

    def test_overlapping_streams_are_counted_once(self):
        one = [activity(start=0.0, duration=10.0), activity(start=4.0, duration=10.0, stream=8)]
        content = anatomy(Timeline(device="cuda", steps=("student",), activities=tuple(one)))
        assert content["steps"][0]["busy_us"] == 14
        assert content["steps"][0]["gap_us"] == 0
        assert [row["microseconds"] for row in content["rows"]] == [14]

    def test_tables_show_the_gaps(self, launched):
        content = anatomy(launched)
        rows = table(content, "student")
        assert rows[0] == {"network": "loop, forward", "op": "launch gaps", "kernels": None} | {
            "us": "359.0",
            "share": "71.8%",
        }
        assert sum(float(row["us"]) for row in rows) == pytest.approx(500)
        named = {"engine": "eager", "unprofiled_us": {"student": 450.0}, **content}
        assert (
            summary_table([named])[0] | {"ms": "0.500", "ms alone": "0.450", "us gaps": "372"}
            == summary_table([named])[0]
        )


class TestGraph:
    def kernels(self, launched: Timeline) -> list[tuple[str, float, float]]:
        """Those of a launched step, one after the other."""
        return [(a.name, 20.0 * place, 15.0) for place, a in enumerate(launched.of_step(0))]

    def replay(self, kernels: list[tuple[str, float, float]]) -> Timeline:
        trace = Trace()
        for at in (0, 600, 1200):
            trace.replayed_step(at, kernels)
        return read(trace.events)

    def test_before_attribution_all_is_unknown(self, launched):
        timeline = self.replay(self.kernels(launched))
        assert {(a.network, a.direction, a.replayed) for a in timeline.activities} == {(UNKNOWN, UNKNOWN, True)}
        assert [len(timeline.of_step(index)) for index in range(3)] == [11] * 3

    def test_same_kernels_are_attributed_one_by_one(self, launched):
        timeline, missed = attribute_by_order(self.replay(self.kernels(launched)), launched)
        assert missed == 0
        for index in range(3):
            assert [(a.network, a.direction, op_class(a)) for a in timeline.of_step(index)] == STEP
        assert anatomy(timeline)["steps"][0]["gap_us"] == pytest.approx(600 - 11 * 15)

    def test_an_extra_and_a_missing_kernel_cost_nothing_else(self, launched):
        kernels = self.kernels(launched)
        kernels[4] = ("unheard_of", 80.0, 15.0)
        del kernels[8]
        timeline, missed = attribute_by_order(self.replay(kernels), launched)
        assert missed == 3  # one in each replay
        expected = [place for place in STEP if place[2] != "element-wise"]
        expected[4] = (UNKNOWN, UNKNOWN, "other")
        assert [(a.network, a.direction, op_class(a)) for a in timeline.of_step(1)] == expected

    def test_work_beside_the_graph_keeps_its_own_ranges(self, launched):
        trace = Trace()
        trace.replayed_step(0, self.kernels(launched))
        trace.range("network/optimizer", 16, 3)
        trace.launch(17, ("rate", 400, 1))
        timeline, _ = attribute_by_order(read(trace.events), launched)
        assert [a.network for a in timeline.activities if a.name == "rate"] == ["optimizer"]

    def test_without_a_launched_step_of_the_kind_all_is_missed(self, launched):
        other = replace(launched, steps=("generator",) * 3)
        timeline, missed = attribute_by_order(self.replay(self.kernels(launched)), other)
        assert missed == len(timeline.activities) == 33


class TestClasses:
    @pytest.mark.parametrize(
        ("expected", "name", "operators"),
        [
            ("fused element-wise", "triton_poi_fused_add_convolution_relu_5", ()),
            ("fused reduction", "triton_red_fused__to_copy_mean_3", ()),
            ("fused reduction", "triton_per_fused_native_batch_norm_2", ()),
            ("convolution", "triton_tem_fused_convolution_12", ()),
            ("matrix product", "triton_tem_fused_addmm_1", ()),
            ("convolution", "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", ()),
            ("convolution", "sm90_xmma_gemm_bf16", ("aten::cudnn_convolution", "aten::convolution")),
            ("matrix product", "nvjet_tst_128x64_64x5_1x3_h_bz_coopA_NTn", ()),
            ("matrix product", "ampere_sgemm_32x32_sliced1x4_tn", ("aten::addmm", "aten::linear")),
            ("batch norm", "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", ()),
            ("batch norm", "void at::native::batch_norm_collect_statistics_channels_last_kernel<float>", ()),
            ("optimizer", "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", ()),
            ("copy", "Memcpy DtoD (Device -> Device)", ()),
            ("copy", "void at::native::elementwise_kernel<128, 4>", ("aten::copy_", "aten::convolution")),
            ("element-wise", "void at::native::vectorized_elementwise_kernel<4>", ()),
            ("reduction", "void at::native::reduce_kernel<512, 1>", ()),
            ("pooling", "void at::native::max_pool_forward_nhwc<float>", ()),
            ("other", "mystery", ("aten::mystery",)),
            ("max_pool2x2", "_unpool_kernel", ()),
            ("contrastive_loss", "_merge_kernel", ("dfkd_fast::contrastive_loss",)),
            ("high_order_attention_mse", "_sum_kernel", ("dfkd_fast::high_order_attention_mse_backward",)),
            (OURS, "_merge_kernel", ()),
        ],
    )
    def test_class(self, expected, name, operators):
        assert op_class(activity(name, operators=operators)) == expected

    def test_an_op_range_beats_all(self):
        assert op_class(activity("sm90_fprop", op="spatial_attention", operators=("aten::conv2d",))) == (
            "spatial_attention"
        )

    def test_every_kernel_of_the_project_leads_to_its_op(self, repository):
        """By its name, or, where several ops have one of that name, by the operator that launches it."""
        for path in (repository / "kernels").glob("*.py"):
            op = path.stem.removesuffix("_bwd")
            functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            for function in functions:
                if "triton.jit" not in [ast.unparse(decorator) for decorator in function.decorator_list]:
                    continue
                found = kernel_ops()[function.name]
                assert op_class(activity(function.name)) == (op if len(found) == 1 else OURS)
                if op != "common":
                    assert op in found
                    assert op_class(activity(function.name, operators=(f"dfkd_fast::{op}_backward",))) == op

    def test_every_operator_of_the_project_names_its_op(self):
        for name in dir(torch.ops.dfkd_fast):
            # Other tests in this process define operators of their own.
            if hasattr(getattr(torch.ops.dfkd_fast, name), "default") and not name.startswith("test_"):
                assert op_class(activity(operators=(f"dfkd_fast::{name}",))) in ops.backends()


class Small:
    """A student step of small modules on the CPU, in the project's ranges."""

    def __init__(self, *, compiled: bool = False) -> None:
        self.teacher = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9, fused=True)
        self.call = torch.compile(self.student, fullgraph=True, backend="aot_eager") if compiled else self.student

    def __call__(self) -> None:
        with nvtx_range("step", "student"):
            images = torch.randn(2, 3, 8, 8)
            with nvtx_range("network", "teacher"):
                target = self.teacher(images)
            with nvtx_range("network", "student"):
                output = self.call(images)
            with nvtx_range("network", "objective"):
                loss = dispatch("squared", None, output, target)
            loss.backward()
            with nvtx_range("network", "optimizer"):
                self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture(autouse=True)
def _op(monkeypatch):
    monkeypatch.setitem(_registry, "squared", {"reference": Implementation(lambda a, b: (a - b).square().mean())})


class TestCpu:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_real_trace(self, compiled, tmp_path):
        step = Small(compiled=compiled)
        step()
        timeline = record(lambda: (step(), step()), tmp_path / "trace.json.gz", cuda=False)
        assert timeline.device == "cpu"
        assert timeline.steps == ("student", "student")
        found = {(a.network, a.direction, op_class(a)) for a in timeline.of_step(1)}
        assert {
            (OUTSIDE, "forward", "random numbers"),
            ("teacher", "forward", CONV),
            ("student", "forward", CONV),
            ("student", "forward", "batch norm"),
            ("student", "backward", CONV),
            ("student", "backward", "batch norm"),
            ("objective", "forward", "squared"),
            ("objective", "backward", "squared"),
            ("optimizer", "optimizer", "optimizer"),
        } <= found
        assert not {(network, direction) for network, direction, _ in found} & {
            ("teacher", "backward"),
            ("optimizer", "backward"),
            (OUTSIDE, "backward"),
        }

    def test_times_are_the_operators_own(self, tmp_path):
        step = Small()
        step()
        path = tmp_path / "trace.json.gz"
        timeline = record(step, path, cuda=False)
        ordered = timeline.activities
        assert all(later.start >= earlier.end - 1e-2 for earlier, later in pairwise(ordered))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        operators = sum(event.get("cat") == "cpu_op" for event in events)
        whole = next(e["dur"] for e in events if e.get("name") == "dfkd_fast/step/student")
        content = anatomy(timeline)
        assert content["steps"][0]["kernels"] <= operators
        assert 0 < content["steps"][0]["busy_us"] <= whole
        convolution = next(e["dur"] for e in events if e.get("name") == "aten::conv2d")
        own = sum(a.duration for a in ordered if a.network == "teacher")
        assert own == pytest.approx(convolution, rel=1e-2)


class TestReading:
    def test_plain_and_compressed(self, tmp_path):
        trace = Trace()
        trace.student_step(0, seq=1)
        text = json.dumps({"traceEvents": trace.events})
        (tmp_path / "a.json").write_text(text)
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.encode()))
        plain, packed = (profiling.timeline(profiling.read_trace(tmp_path / name)) for name in ("a.json", "a.json.gz"))
        assert plain == packed

    @pytest.mark.parametrize("text", ["{", "[]", '{"traceEvents": 1}'])
    def test_another_file_is_refused(self, text, tmp_path):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not a trace"):
            profiling.read_trace(tmp_path / "a.json")

    def test_a_file_that_is_not_compressed_is_refused(self, tmp_path):
        (tmp_path / "a.json.gz").write_text("{}")
        with pytest.raises(ValueError, match="is not a trace"):
            profiling.read_trace(tmp_path / "a.json.gz")

    def test_a_trace_without_steps_is_refused(self):
        trace = Trace()
        trace.range("network/student", 0, 5)
        with pytest.raises(ValueError, match="no step ran"):
            read(trace.events)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    networks = [extract(network, image_size=tiny.SIZE) for network in (tiny.teacher(), tiny.network())]
    console = Console(file=io.StringIO(), width=100)
    out = tmp_path_factory.mktemp("profile")
    done = profiling.profile(*networks, tiny.config(), engines=["eager"], steps=2, out=str(out), console=console)
    return done, console.file.getvalue()


class TestProfile:
    def test_files(self, result):
        done, _ = result
        assert {path.name for path in done.folder.iterdir()} == {"anatomy.json", "anatomy.png", "trace_eager.json.gz"}
        content = json.loads((done.folder / "anatomy.json").read_text())
        assert content == done.content
        assert content["precision"] == "fp32"
        assert content["environment"]["torch"] == torch.__version__
        (engine,) = content["engines"]
        assert {step["step"]: step["profiled"] for step in engine["steps"]} == {"generator": 2, "student": 2}
        assert set(engine["unprofiled_us"]) == {"generator", "student"}

    def test_every_network_has_its_forward_and_its_backward(self, result):
        rows = result[0].content["engines"][0]["rows"]
        found = {(row["step"], row["network"], row["direction"]) for row in rows if row["op_class"] != GAP}
        trained = {
            ("generator", network, way)
            for network in ("generator", "teacher", "student", "objective")
            for way in ("forward", "backward")
        }
        trained |= {
            ("student", network, way) for network in ("student", "objective") for way in ("forward", "backward")
        }
        assert trained <= found
        # The student step asks for no gradient of what made its images and targets.
        assert not {("student", "teacher", "backward"), ("student", "generator", "backward")} & found

    def test_the_methods_ops_are_named(self, result):
        classes = {row["op_class"] for row in result[0].content["engines"][0]["rows"]}
        assert {"spatial_attention", "batchnorm_statistics", "distillation_kl", "contrastive_loss"} <= classes

    def test_tables(self, result):
        text = result[1]
        assert "outside operators" in text
        assert "generator, backward" in text
        assert "eager: student step, median of 2" in text

    def test_a_figure_from_the_file_alone(self, result, tmp_path):
        content = json.loads((result[0].folder / "anatomy.json").read_text())
        content["engines"] = [content["engines"][0], {**content["engines"][0], "engine": "other", "device": "cuda"}]
        path = profiling.save_anatomy(content, tmp_path / "new" / "anatomy.png")
        assert path.stat().st_size > 10_000

    @pytest.mark.parametrize("changes", [{"engines": []}, {"steps": 0}])
    def test_nothing_to_do_is_refused(self, changes):
        networks = [extract(tiny.network(), image_size=tiny.SIZE) for _ in range(2)]
        with pytest.raises(ValueError, match="at least one engine and one step"):
            profiling.profile(*networks, tiny.config(), **changes)

    def test_a_graph_without_a_gpu_is_refused_before_anything_runs(self, tmp_path):
        networks = [extract(tiny.network(), image_size=tiny.SIZE) for _ in range(2)]
        with pytest.raises(ValueError, match="needs a CUDA device"):
            profiling.profile(*networks, tiny.config(), engines=["eager", "graph"], out=str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.gpu
    def test_a_graphs_kernels_are_all_attributed(self, tmp_path):
        networks = [extract(network, image_size=tiny.SIZE) for network in (tiny.teacher(), tiny.network())]
        config = tiny.config(device="cuda")
        done = profiling.profile(*networks, config, engines=["eager", "graph"], steps=3, out=str(tmp_path))
        eager, graph = done.content["engines"]
        assert graph["unattributed"] == 0
        assert graph["steps"][0]["gap_us"] < eager["steps"][0]["gap_us"]
        assert all(row["network"] != UNKNOWN for row in graph["rows"])


EXPERIMENT = {
    "data": {"name": "digits", "image_size": 16},
    "teacher": {"name": "resnet8", "options": {"widths": [4, 4, 8, 12]}},
    "student": {"name": "resnet8", "options": {"widths": [4, 4, 6, 8]}},
    "distill": {
        "device": "cpu",
        "generator": {"latent_dim": 6, "channels": [8, 8, 8, 8, 8]},
        "loop": {"generator_steps": 0, "student_steps": 1, "batch_size": 4},
    },
}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT))
    main(["profile", "--config", str(path), "--engines", "auto,eager", "--steps", "1", "--out", "profiled"])
    text = capsys.readouterr().out
    assert "random" in text
    assert "anatomy.json" in text
    content = json.loads((tmp_path / "profiled" / "anatomy.json").read_text())
    assert content["networks"] == {"teacher": "resnet8", "student": "resnet8"}
    assert [[step["step"] for step in engine["steps"]] for engine in content["engines"]] == [["student"]]
