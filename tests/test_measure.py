"""The timer of the microbenchmarks: what is timed, in which order, with which inputs."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dfkd_fast import ops as public
from dfkd_fast.benchmarks import measure
from dfkd_fast.benchmarks.cases import Case, Work

CPU = torch.device("cpu")


def a_case(grad: bool = True) -> Case:
    return Case(
        name="4x6",
        inputs=lambda make: (make.tensor(4, 6, grad=grad), make.tensor(4, 6)),
        call=lambda a, b, backend: public.distillation_kl(a, b, backend=backend),
        work=lambda size: Work(forward_bytes=1, backward_bytes=1),
    )


class TestTrial:
    def test_on_the_host(self):
        trial = measure.Trial(a_case(), torch.float32, CPU, lambda a, b: public.distillation_kl(a, b), laps=3)
        assert trial.passes == measure.PASSES
        for which in trial.passes:
            measured = trial.measure(which, "warm")
            assert 0 < measured.p10_us <= measured.median_us <= measured.p90_us
            assert (measured.timer, measured.laps, measured.peak_bytes) == ("host", 3, None)

    def test_backward_is_to_the_inputs_with_random_upstream_gradients(self):
        seen = []
        case = Case(
            name="pair",
            inputs=lambda make: ([make.tensor(3, grad=True)], {"b": make.tensor(3)}),
            call=lambda a, b, backend: (a[0] * 2, (b["b"], a[0].detach() > 0)),
            work=lambda size: Work(forward_bytes=1, backward_bytes=1),
        )
        trial = measure.Trial(case, torch.float32, CPU, lambda a, b: case.call(a, b, None))
        trial.run("forward")
        trial._first.outputs[0].register_hook(seen.append)
        (gradient,) = trial.run("backward")
        assert torch.equal(gradient, 2 * seen[0])
        assert len(set(seen[0].tolist())) == 3
        assert [output.shape for output in trial._first.outputs] == [(3,)]

    def test_no_gradient_no_backward(self):
        trial = measure.Trial(a_case(grad=False), torch.float32, CPU, lambda a, b: a + b)
        assert trial.passes == ("forward",)

    def test_ceilings(self):
        rates = measure.ceilings(CPU)
        assert rates.copy_gbps > 0
        assert rates.matmul_tflops > 0


class FakeDevice:
    """In place of torch.cuda: graphs that count what they hold, events that count time, and a log of what happened."""

    def __init__(self, monkeypatch, memory: int = 2**40):
        self.log: list[str] = []
        self.now, self.capturing, self.no_waiting = 0.0, False, False
        outer = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                outer.log.append("mark")
                self.time = outer.now

            def elapsed_time(self, other):
                return other.time - self.time

        class Graph:
            def replay(self):
                outer.log.append(self.name)
                outer.now += self.calls

        class capture:
            def __init__(self, graph, stream):
                self.graph = graph

            def __enter__(self):
                outer.capturing, outer.calls = True, []

            def __exit__(self, *error):
                outer.capturing = False
                self.graph.name = "+".join(dict.fromkeys(outer.calls))
                self.graph.calls = len(outer.calls)

        properties = type("Properties", (), {"L2_cache_size": 2**10})
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": lambda device: None,
            "device": lambda device: contextlib.nullcontext(), "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda device=None: None, "empty_cache": lambda: None,
            "mem_get_info": lambda device: (memory, memory), "memory_allocated": lambda device: 5,
            "max_memory_allocated": lambda device: 105, "reset_peak_memory_stats": lambda device: None,
            "get_device_properties": lambda device: properties,
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": self.forbid_waiting,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(measure, "_is_gpu", lambda device: True)
        monkeypatch.setattr(measure, "_LAPS_S", 0.0)
        monkeypatch.setattr(measure._Stopwatch, "flush", lambda watch: self.flush())

    def forbid_waiting(self, mode):
        self.no_waiting = mode == "error"

    def flush(self):
        self.log.append("flush")
        self.now += 50.0

    def ran(self, what: str) -> None:
        if self.capturing:
            self.calls.append(what)

    def timed(self) -> list[str]:
        """What stood between marks, from the last lap."""
        at = [i for i, what in enumerate(self.log) if what == "mark"]
        return [" ".join(self.log[a + 1 : b]) for a, b in zip(at[::2], at[1::2], strict=True)]

    def trial(self, capturable: bool = True, waits: bool = False) -> measure.Trial:
        fake = self

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                fake.ran("forward")
                if fake.capturing and not capturable:
                    raise RuntimeError("capture")
                if waits and fake.no_waiting:
                    raise RuntimeError("waits")
                assert not (waits and fake.capturing)
                fake.inputs.append(x.data_ptr())
                return 2 * x

            @staticmethod
            def backward(ctx, g):
                fake.ran("backward")
                return 2 * g

        case = Case(
            name="x",
            inputs=lambda make: (make.tensor(8, grad=True),),
            call=lambda x, backend: Double.apply(x),
            work=lambda size: Work(forward_bytes=1, backward_bytes=1),
        )
        self.inputs: list[int] = []
        return measure.Trial(case, torch.float32, CPU, Double.apply)


class TestDevicePath:
    """The order of flushes, replays and events, on a device that only counts: one a call."""

    @pytest.mark.parametrize(
        ("which", "l2", "pieces"),
        [
            ("forward", "cold", ["forward"]),
            ("backward", "cold", ["backward"]),
            ("both", "cold", ["forward", "backward"]),
            ("forward", "warm", ["forward"]),
            ("backward", "warm", ["backward"]),
            ("both", "warm", ["forward+backward"]),
        ],
    )
    def test_what_is_timed(self, which, l2, pieces, monkeypatch):
        fake = FakeDevice(monkeypatch)
        trial = fake.trial()
        measured = trial.measure(which, l2)
        assert measured.timer == "graph"
        assert measured.laps >= 20
        assert measured.calls > 1
        assert measured.median_us == 1e3 * (2 if which == "both" else 1)  # events give milliseconds
        assert measured.peak_bytes == 100
        assert fake.timed()[-len(pieces) :] == pieces
        before = [fake.log[i - 1] for i, what in enumerate(fake.log) if what == "mark"][-2 * len(pieces) :: 2]
        assert before == (["flush"] * len(pieces) if l2 == "cold" else pieces)

    def test_cold_calls_have_inputs_of_their_own_as_far_as_memory_goes(self, monkeypatch):
        fake = FakeDevice(monkeypatch)
        measured = fake.trial().measure("forward", "cold")
        assert len(set(fake.inputs)) == measured.calls
        fake = FakeDevice(monkeypatch, memory=1000)
        assert fake.trial().measure("forward", "cold").calls == 4  # of 100 bytes each, in four tenths of 1000

    @pytest.mark.parametrize("how", [{"capturable": False}, {"waits": True}])
    def test_what_cannot_be_captured_is_timed_call_by_call(self, how, monkeypatch):
        fake = FakeDevice(monkeypatch)
        measured = fake.trial(**how).measure("both", "cold")
        assert not fake.no_waiting
        assert (measured.timer, measured.calls) == ("events", 1)
        assert fake.timed()[-2:] == ["", ""]

    def test_ceilings(self, monkeypatch):
        FakeDevice(monkeypatch)
        monkeypatch.setattr(measure._Stopwatch, "laps", lambda watch, pieces, cold: [100.0])
        monkeypatch.setattr(measure, "_CEILING", (2**20, 64))
        rates = measure.ceilings(CPU)
        assert rates.copy_gbps == round(2 * 2**21 / 1e5, 1)


@pytest.mark.gpu
class TestOnTheDevice:
    DEVICE = torch.device("cuda")

    def trial(self, elements: int, function, grad: bool = True) -> measure.Trial:
        case = Case(
            name="x",
            inputs=lambda make: (make.tensor(elements, grad=grad),),
            call=lambda x, backend: function(x),
            work=lambda size: Work(forward_bytes=1, backward_bytes=1),
        )
        return measure.Trial(case, torch.bfloat16, self.DEVICE, function)

    def test_a_copy_of_what_exceeds_the_cache_takes_its_bytes_over_the_bandwidth(self):
        rates = measure.ceilings(self.DEVICE)
        trial = self.trial(2**28, lambda x: x * 2)
        for which, l2 in (("forward", "cold"), ("forward", "warm"), ("backward", "cold")):
            measured = trial.measure(which, l2)
            assert measured.timer == "graph"
            assert 0.85 < measured.median_us / rates.floor_us(2**30, 0) < 1.4
        assert trial.measure("both", "cold").median_us > 1.5 * measured.median_us
        assert 2**29 <= trial.measure("forward", "cold").peak_bytes < 2**29 + 2**22

    def test_a_small_call_is_timed_without_the_hosts_share_and_warm_is_no_slower(self):
        trial = self.trial(2**20, lambda x: x * 2)
        cold, warm = (trial.measure("forward", l2) for l2 in measure.CACHES)
        assert cold.calls > 10
        assert 0.5 < warm.median_us < 20
        assert warm.median_us < 1.1 * cold.median_us

    def test_what_cannot_be_captured_is_timed_call_by_call(self):
        measured = self.trial(2**10, lambda x: x * x.detach().sum().item()).measure("both", "cold")
        assert measured.timer == "events"
        assert measured.median_us > 0

    def test_out_of_memory_is_an_error_and_leaves_the_device_usable(self):
        with contextlib.suppress(torch.OutOfMemoryError):
            self.trial(2**40, lambda x: x)
            pytest.fail("there was room")
        assert float(torch.ones(3, device=self.DEVICE).sum()) == 3.0
