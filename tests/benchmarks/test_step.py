"""The measurement of whole rounds at a size that fits a CPU, and its tables with made-up rows."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.benchmarks.ops.measure import PeakRates
from dfkd_fast.benchmarks.report import step_section
from dfkd_fast.benchmarks.step import breakdown, cpu, variants
from dfkd_fast.benchmarks.step.cpu import step_cpu_rows, step_cpu_section
from dfkd_fast.benchmarks.step.peer_loop import PeerLoop, PlainGate
from dfkd_fast.benchmarks.step.roofline import Work, counted, roofline
from dfkd_fast.benchmarks.step.variants import SIZES, VARIANTS
from dfkd_fast.config import ObjectiveConfig
from dfkd_fast.engine import EagerEngine
from dfkd_fast.engine.networks import eager_networks
from dfkd_fast.nn import SpatialAttention
from dfkd_fast.report import read_results

from .. import tiny

CPU = torch.device("cpu")
SMALL = SIZES["small"]


class TestPeer:
    """Tolerances allow for float32 sums in another order, accumulated in twelve steps of two optimizers."""

    def test_losses_and_weights_match_the_eager_engine(self):
        config = tiny.config(
            student_in_generator_step="update", generator_steps=3, student_steps=3, precision="fp32", engine="eager"
        )
        config = replace(config, seed=1)  # with seed 0, rounding errors decide the side of a ReLU's kink
        state, peer_state = tiny.state(config), tiny.state(config)
        engine, peer = EagerEngine(state, eager_networks(state)), PeerLoop(peer_state, mean=tiny.HALF, std=tiny.HALF)
        for _ in range(2):
            engine.start_round()
            for row in range(6):
                engine.step()
                total, terms = (peer.generator_step if row < 3 else peer.student_step)()
                objective = (state.generator if row < 3 else state.student).objective
                values = torch.stack([terms[name] for name in objective.names])
                torch.testing.assert_close(values, state.trace[row, : len(values)], rtol=1e-5, atol=1e-5)
                expected = sum(objective.weights[name] * float(terms[name]) for name in objective.names)
                assert total == pytest.approx(expected, rel=1e-5)
            state.position.round, state.position.step = state.position.round + 1, 0
        for name, value in state.student.module.model.state_dict().items():
            torch.testing.assert_close(peer_state.student.module.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)

    def test_peer_has_the_properties_of_published_loops(self):
        state = tiny.state(tiny.config())
        peer = PeerLoop(state, mean=tiny.HALF, std=tiny.HALF)
        before = {name: value.clone() for name, value in state.student.module.model.named_buffers()}
        with ops.backend("cuda"):  # every op of this project would raise an error here
            assert isinstance(peer.generator_step()[0], float)
            moved = {n for n, value in state.student.module.model.named_buffers() if not torch.equal(value, before[n])}
            assert moved == set(before)
            dropped = [*state.teacher.model.parameters(), *state.student.module.model.parameters()]
            assert all(parameter.requires_grad for parameter in state.student.module.model.parameters())
            assert all(p.grad is not None for p in dropped if p.requires_grad)
            assert isinstance(peer.student_step()[0], float)

    def test_other_terms_and_forms_raise(self):
        state = tiny.state(tiny.config(objective=ObjectiveConfig(preset="baseline")))
        with pytest.raises(ValueError, match="dfkd-fgvc"):
            PeerLoop(state, mean=tiny.HALF, std=tiny.HALF)
        with pytest.raises(ValueError, match="spatial"):
            PlainGate(SpatialAttention(8, form="channel"))


class TestRoofline:
    def test_work_of_a_layer(self):
        """A convolution has 3 * 64 input and 8 * 16 output elements per image, and 8 * 27 weights."""
        layer, x = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), torch.zeros(2, 3, 8, 8)
        forward, flops, inputs, weights, outputs = 2 * (384 + 216 + 256), 2 * 2 * 8 * 16 * 27, 384, 216, 256

        def work(trained: bool, to_input: bool) -> Work:
            layer.requires_grad_(trained)
            with counted([layer]) as found:
                layer(x.clone().requires_grad_(to_input)).sum().backward() if trained or to_input else layer(x)
            return found

        assert work(trained=False, to_input=False) == Work(flops=flops, bytes=forward)
        to_weights = 2 * (inputs + outputs)
        assert work(trained=True, to_input=False) == Work(flops=2 * flops, bytes=forward + to_weights)
        to_input = 2 * (outputs + weights + inputs)
        assert work(trained=False, to_input=True) == Work(flops=2 * flops, bytes=forward + to_input)
        assert work(trained=True, to_input=True) == Work(flops=3 * flops, bytes=forward + to_input + 2 * inputs)

    def test_time_is_the_larger_of_both_bounds(self):
        rates = PeakRates(copy_gbps=1.0, matmul_tflops=1.0)
        work = (Work(flops=1e9, bytes=5e6), Work(flops=3e9, bytes=1e6))
        found = roofline(work, rates, generator_steps=2, student_steps=1)
        assert (found.generator_step_ms, found.student_step_ms) == pytest.approx((5.0, 3.0))
        assert found.round_ms == pytest.approx(13.0)


class TestCpu:
    def test_all_variants_have_times_in_both_precisions(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # more threads are slow on a busy machine
        assert cpu.main(["--out", "step_cpu.json", "--sizes", "small", "--rounds", "2"]) == 0
        content = read_results("step_cpu.json")
        assert len(content["rows"]) == len(cpu.VARIANTS) * 2
        for row in content["rows"]:
            assert 0 < row["least_ms"] <= row["round_ms"] <= row["most_ms"]
            assert row["round_ms"] == pytest.approx(2 * row["generator_step_ms"] + 2 * row["student_step_ms"], rel=0.5)
            if row["variant"] == "dfkd_fast":
                assert 0 < row["convolutions"] < 1
                assert 0 < row["convolution_gflops"] < row["peak_gflops"]
        assert step_cpu_section(content, "cpu").count("| 32 x 32 |") == 2

    def test_table_has_speedups_and_their_geometric_mean(self):
        block = {"device": {"name": "cpu"}, "cpu": "A CPU", "torch": "2.11.0", "commit": "c" * 40, "source": "s"}
        rows = []
        for size, peer, nchw in (("a", 200.0, 110.0), ("b", 800.0, 100.0)):
            for variant, ms in (("peer", peer), ("eager", 150.0), ("nchw", nchw), ("dfkd_fast", 100.0)):
                row = {"size": size, "precision": "fp32", "threads": 1, "variant": variant, "image": 32, "rounds": 3}
                row |= {"round_ms": ms, "generator_step_ms": ms, "student_step_ms": 100.0}
                row |= {"convolutions": 0.7, "convolution_gflops": 90.0, "peak_gflops": 100.0}
                rows.append(row)
        first, second = step_cpu_rows(rows)
        assert (first["generator step, speed-up"], first["student step, speed-up"]) == ("2.00 x", "1.00 x")
        assert (first["round, speed-up"], second["round, speed-up"]) == ("2.00 x", "8.00 x")
        assert (first["convolutions"], first["their rate / peak"]) == ("70%", "90%")
        text = step_cpu_section({"rows": rows, "environments": [block]}, "cpu")
        assert "| `peer` | fp32 | 4.00 x | 2.00 x to 8.00 x |" in text
        assert "A CPU" in text


class TestVariants:
    @pytest.mark.parametrize(
        "variant",
        # Both modes of torch.compile run the same code here.
        [pytest.param(each, marks=pytest.mark.slow if each == "compile_max_autotune" else ()) for each in VARIANTS],
    )
    def test_row_of_each_variant_has_times_and_speed(self, variant):
        arguments = [variant, "--out", "step.json", "--device", "cpu", "--size", "small"]
        assert variants.main(arguments) == 0
        if variant == "eager":
            assert variants.main([*arguments, "--run", "2", "--compile-only"]) == 0
        (row,) = read_results("step.json")["rows"]
        assert (row["status"], row["variant"], row["batch"], row["run"]) == ("ok", variant, 4, 1)
        times = ("generator_step_ms", "student_step_ms", "seconds_to_first_step", "round_ms", "prepare_s")
        assert all(row[name] >= 0 for name in times)
        assert row["images_per_s"] == pytest.approx(1e3 * 4 * 4 / row["round_ms"], rel=1e-3)
        assert row["hours_per_350k_steps"] == pytest.approx(row["round_ms"] * 350_000 / 4 / 3.6e6, rel=1e-3)
        assert row["engine"] == {"peer": "peer", "eager": "eager", "dfkd_fast": "eager"}.get(variant, "torch.compile")

    def test_roofline_is_a_row(self):
        assert variants.main(["roofline", "--out", "step.json", "--device", "cpu", "--size", "small"]) == 0
        (row,) = read_results("step.json")["rows"]
        assert row["round_ms"] == pytest.approx(2 * row["generator_step_ms"] + 2 * row["student_step_ms"], rel=1e-3)
        assert row["copy_gbps"] > 0
        # The generator step runs the backward of teacher and student, the student step only that of the student.
        assert 0 < row["student_step"]["flops"] < row["generator_step"]["flops"]
        assert min(row[step]["bytes"] for step in ("generator_step", "student_step")) > 0

    def test_out_of_memory_is_a_row(self, monkeypatch):
        def measure(*arguments: Any, **more: Any) -> dict[str, Any]:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(variants, "measure", measure)
        assert variants.main(["peer", "--out", "step.json", "--device", "cpu", "--size", "small"]) == 0
        assert read_results("step.json")["rows"][0]["status"] == "out of memory"

    def test_non_finite_loss_raises(self, monkeypatch):
        build = variants.build

        def poisoned(*arguments: Any, **more: Any) -> Any:
            state, teacher = build(*arguments, **more)
            state.normalize.shift.fill_(float("nan"))
            return state, teacher

        monkeypatch.setattr(variants, "build", poisoned)
        with pytest.raises(RuntimeError, match="not finite"):
            variants.measure("eager", SMALL, 4, CPU)

    def test_random_teachers_have_statistics_of_images(self):
        state, _ = variants.build(SMALL, 4, CPU)
        norms = [m for m in state.teacher.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        for norm in norms:
            assert norm.momentum == 0.1
            assert not torch.equal(norm.running_var, torch.ones(len(norm.weight)))


def test_breakdown_is_a_row_per_engine():
    assert breakdown.main(["--out", "breakdown.json", "--device", "cpu", "--size", "small"]) == 0
    content = read_results("breakdown.json")
    assert [row["engine"] for row in content["rows"]] == ["eager"]
    section = breakdown.breakdown_section(content, "cpu")
    assert section.startswith("### cpu\n")
    assert "| eager | generator |" in section
    assert "Engine `eager`, student step:" in section


ENVIRONMENT = {"device": {"name": "A GPU"}, "torch": "2.11.0", "commit": "0123456789abcdef", "source": "s"}


class TestSections:
    def rows(self) -> list[dict[str, Any]]:
        speeds = dict(zip(VARIANTS, (100.0, 200.0, 300.0, 290.0, 410.0), strict=True))
        rows = [
            {
                "variant": name, "batch": 64, "run": run, "status": "ok", "images_per_s": speed * run,
                "round_ms": 1600 / speed, "generator_step_ms": 4.0, "student_step_ms": 3.0, "peak_bytes": 2**31,
                "gpu_busy": 0.98, "hours_per_350k_steps": 2.0, "seconds_to_first_step": 20.0, "prepare_s": 9.0,
            }
            for name, speed in speeds.items() for run in (1, 3)
        ]  # fmt: skip
        least = {"round_ms": 2.0, "generator_step_ms": 1.0, "student_step_ms": 0.5, "status": "ok"}
        rows.append({"variant": "roofline", "batch": 64, "run": 1, **least})
        rows.append({"variant": "peer", "batch": 256, "run": 1, "status": "out of memory"})
        return rows

    def test_steps(self):
        text = step_section({"environments": [ENVIRONMENT], "rows": self.rows()}, "a-gpu")
        assert text.startswith("### a-gpu\n")
        lines = text.splitlines()
        (roof,) = [line for line in lines if line.startswith("| roofline |")]
        assert "|  | 2.0 | 1.00 | 0.50 |  |" in roof
        (peer,) = [line for line in lines if line.startswith("| peer | 200 ")]
        assert "| 200 (100 to 300, n = 2) | 16.0 | 4.00 | 3.00 | 12.5% | 98.0% | 2.00 |" in peer
        assert any(line.startswith("| peer | out of memory |") for line in lines)
        assert "4.10 x `peer`" in text
        assert "1.37 x `compile_max_autotune`" in text
        assert "A GPU, torch 2.11.0, commit 0123456789ab." in text
