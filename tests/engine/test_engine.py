"""All engines run the same algorithm. The tests run on the CPU with a stand-in for CUDA graphs, and on a GPU."""

from __future__ import annotations

import copy
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfkd_fast
from dfkd_fast import ops
from dfkd_fast.config import InversionContrastConfig, ObjectiveConfig, SynthesisConfig
from dfkd_fast.engine import (
    CompiledEngine,
    DistillState,
    EagerEngine,
    Engine,
    GraphEngine,
    NonFiniteError,
    Runtime,
    background,
    create_engine,
    engines,
    resolve_engine,
)
from dfkd_fast.engine.background import Background
from dfkd_fast.engine.capture import CudaRecorder
from dfkd_fast.engine.networks import Networks, StepNetworks, eager_networks, optimized_networks
from dfkd_fast.engine.rounds import Round, Rounds
from dfkd_fast.graph import extract
from dfkd_fast.objectives import TERMS

from .. import tiny
from .replay import READS_BACK, ReplayRecorder

# In float32, compiled and captured steps differ from eager ones only by BatchNorm folding and summation order. Adam
# amplifies the difference, because the length of its first steps does not depend on the gradient's magnitude.
TOLERANCE = {"rtol": 2e-3, "atol": 1e-4}


def run_rounds(engine: Engine, rounds: int, after_step: Callable[[], object] = lambda: None) -> list[Tensor]:
    """Run whole rounds and return the trace of each."""
    traces = []
    for _ in range(rounds):
        engine.start_round()
        while engine.state.position.step < engine.state.steps_per_round:
            engine.step()
            after_step()
        traces.append(engine.state.trace.clone())
        engine.state.position.round += 1
        engine.state.position.step = 0
    return traces


def values(state: DistillState) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state.mutable_tensors()]


def all_equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def state_on(device: str, **changes: Any) -> DistillState:
    return tiny.state(replace(tiny.config(), **{"device": device, "precision": "fp32", **changes}))


class CountingRecorder(CudaRecorder):
    """Counts its recordings, like :class:`ReplayRecorder`."""

    recordings = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        return super().record(work)


def eager_engine(state: DistillState, networks: Networks | None = None) -> EagerEngine:
    """The eager engine over networks that are not optimized."""
    return EagerEngine(state, networks or eager_networks(state))


def graph_engine(state: DistillState, networks: Networks | None = None) -> GraphEngine:
    """The graph engine over networks that are not compiled."""
    device = state.runtime.device
    recorder = ReplayRecorder() if device.type == "cpu" else CountingRecorder(device, [state.noise])
    return GraphEngine(state, networks or eager_networks(state), recorder=recorder)


def graph_engine_optimized(state: DistillState) -> GraphEngine:
    return graph_engine(state, optimized_networks(state))


def recordings(engine: Engine) -> int:
    return engine.executor.recorder.recordings  # type: ignore[attr-defined]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_runs_close(one: DistillState, other: DistillState, traces: tuple[list[Tensor], list[Tensor]]) -> None:
    """Compare every loss, weight, buffer and optimizer state.

    Generator weights whose gradient is only rounding noise are excluded, because the length of Adam's step does not
    depend on the gradient's magnitude. These are biases in front of a softmax over positions, and single weights whose
    gradients stay below the rounding error of the largest one.
    """
    rms = {p: one.generator.optimizer.state[p]["exp_avg_sq"].sqrt() for p in one.generator.module.parameters()}
    rounding = torch.finfo(torch.float32).eps * max(value.max() for value in rms.values())
    compared: dict[int, Tensor] = {}
    for name, parameter in one.generator.module.named_parameters():
        mask = (rms[parameter] > rounding) & (not name.endswith("attention.expand.bias"))
        for tensor in (parameter, *one.generator.optimizer.state[parameter].values()):
            compared[id(tensor)] = mask if tensor.shape == mask.shape else torch.tensor(True)
    for a, b in zip(*traces, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    for a, b in zip(one.mutable_tensors(), other.mutable_tensors(), strict=True):
        mask = compared.get(id(a), torch.tensor(True)).to(a.device)
        torch.testing.assert_close(torch.where(mask, a, 0), torch.where(mask, b, 0), **TOLERANCE)
    # The excluded weights differ by at most the summed length of Adam's steps in both runs.
    for a, b in zip(one.generator.module.parameters(), other.generator.module.parameters(), strict=True):
        steps = one.generator.optimizer.state[a]["step"]
        assert ((a - b).abs() <= 2 * one.config.optimizer.generator_lr * steps).all()


def assert_same_run(eager: DistillState, other: DistillState, traces: tuple[list[Tensor], list[Tensor]]) -> None:
    """Compare bit for bit on the CPU. On a GPU the summation order of convolution gradients varies."""
    if eager.runtime.device.type == "cuda":
        assert_runs_close(eager, other, traces)
    else:
        assert all_equal(*traces)
        assert all_equal(eager.mutable_tensors(), other.mutable_tensors())


def compare_with_eager(device: str, work: Callable[[Engine], list[Tensor]]) -> Engine:
    """Run ``work`` with the eager and the graph engine, compare the runs and return the graph engine."""
    eager, other = eager_engine(state_on(device)), graph_engine(state_on(device))
    assert_same_run(eager.state, other.state, (work(eager), work(other)))
    return other


@contextmanager
def assert_state_preserved(state: DistillState) -> Iterator[None]:
    def snapshot() -> list[Any]:
        groups = [{**group, "params": None} for group in state.generator.optimizer.param_groups]
        modules = state.student.module.modules()
        flags = [(module.training, getattr(module, "track_running_stats", None)) for module in modules]
        addresses = [tensor.data_ptr() for tensor in state.mutable_tensors()]
        return [addresses, flags, groups, copy.copy(state.position), state.student_updates]

    tensors, rest = [*values(state), state.noise.get_state(), torch.get_rng_state()], snapshot()
    yield
    assert all_equal(tensors, [*values(state), state.noise.get_state(), torch.get_rng_state()])
    assert rest == snapshot()
    assert all(p.grad is None for p in [*state.student.module.parameters(), *state.generator.module.parameters()])
    assert not hasattr(state.generator.optimizer, "found_inf")


@pytest.mark.parametrize("mode", ["batch", "update", "eval"])
@pytest.mark.parametrize("create", [graph_engine_optimized, EagerEngine])
def test_optimized_networks_match_eager_ones(create: Callable[[DistillState], Engine], mode: str) -> None:
    eager, other = (tiny.state(tiny.config(student_in_generator_step=mode)) for _ in range(2))
    engine = create(other)
    engine.prepare()
    assert_runs_close(eager, other, (run_rounds(eager_engine(eager), 3), run_rounds(engine, 3)))
    assert other.position == eager.position
    assert other.student_updates == eager.student_updates


def test_compiled_engine_matches_eager_without_graph_breaks() -> None:
    """Runs torch.compile without Inductor, which takes minutes on a CPU."""
    eager, other = tiny.state(), tiny.state()
    with ops.backend("reference"):  # which compiled code runs on the CPU
        expected = run_rounds(eager_engine(eager), 3)
    engine, counters = CompiledEngine(other, backend="aot_eager"), torch._dynamo.utils.counters
    counters.clear()
    with assert_state_preserved(other):
        engine.prepare()
    assert counters["stats"]["unique_graphs"] == 8  # generator, teacher, student, objective; in each kind of step
    assert_runs_close(eager, other, (expected, run_rounds(engine, 3)))
    assert counters["stats"]["unique_graphs"] == 8
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("device", "kind", "precision"),
    [
        *(pytest.param("cpu", CompiledEngine, name, marks=pytest.mark.slow) for name in ("fp32", "bf16")),
        *(pytest.param("cuda", kind, "fp32", marks=pytest.mark.gpu) for kind in (CompiledEngine, GraphEngine)),
    ],
)
def test_inductor_matches_eager(device: str, kind: type[CompiledEngine], precision: str) -> None:
    """On a CPU, Inductor's C++ code takes minutes to compile."""
    eager, other = state_on(device, precision=precision), state_on(device, precision=precision)
    engine = kind(other)
    with eager.runtime.backends():
        with assert_state_preserved(other):
            engine.prepare()
        traces = run_rounds(eager_engine(eager), 3), run_rounds(engine, 3)
    if precision == "fp32":
        assert_runs_close(eager, other, traces)
    else:
        torch.testing.assert_close(torch.stack(traces[0]), torch.stack(traces[1]), rtol=0.1, atol=0.05)
    assert torch.equal(eager.noise.get_state(), other.noise.get_state())
    torch.compiler.reset()


def test_every_term_can_be_captured() -> None:
    sides = ("generator", "student")
    weights = {side: {name: 0.1 for name, term in TERMS.items() if side in term.sides} for side in sides}
    synthesis = SynthesisConfig(name="cmi", pool_size=8)
    contrast = InversionContrastConfig(dim=4, bank_size=16, negatives=8)
    config = tiny.config(objective=ObjectiveConfig(**weights, contrast=contrast), synthesis=synthesis)
    eager, other = (tiny.state(config) for _ in range(2))
    assert sum(len(side.objective.names) for side in other.sides.values()) == len(TERMS) + 2  # two are of both sides
    engine, traces = graph_engine(other), []
    engine.prepare()
    for each in (eager_engine(eager), engine):
        torch.manual_seed(0)  # the term `contrast` draws from torch's global generator
        traces.append(run_rounds(each, 2))
    assert_same_run(eager, other, (traces[0], traces[1]))


def test_teacher_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics model reuses the teacher's graph and matches a separate trace."""
    tiny.state()  # caches its traces
    features = extract(tiny.teacher(), image_size=tiny.SIZE)
    expected = extract(features.model, statistics=True, image_size=tiny.SIZE)
    monkeypatch.setattr(sys.modules["dfkd_fast.graph.extract"], "symbolic_trace", None)
    found = extract(features, statistics=True).train()  # statistics imply eval mode, whatever the flags
    assert (found.stages, found.batchnorms, found.fused) == (expected.stages, expected.batchnorms, expected.fused)
    assert len(found.batchnorms) > 5
    assert not features.batchnorms
    x = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    assert all_equal(tree_leaves(found(x)), tree_leaves(expected(x)))
    assert optimized_networks(tiny.state())  # building a state and folding do not trace either
    with pytest.raises(TypeError, match="not callable"):
        extract(features, stages=["layer3"], statistics=True, image_size=tiny.SIZE)


def test_prepare_in_the_middle_of_a_round_preserves_the_state() -> None:
    """A resumed run may start on the last row of the trace."""
    eager, other = tiny.state(), tiny.state()
    for state in (eager, other):
        engine = eager_engine(state)
        run_rounds(engine, 1)  # so that momentum, moments and buffers differ from their initial values
        engine.start_round()
        for _ in range(3):
            engine.step()
    for engine in (eager_engine(eager), graph_engine(other)):
        with assert_state_preserved(engine.state):
            engine.prepare()
        engine.start_round()
        engine.step()
    assert all_equal(eager.mutable_tensors(), other.mutable_tensors())


def test_steps_are_captured_again_after_a_change(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    eager, other = eager_engine(tiny.state()), graph_engine_optimized(tiny.state())
    for engine in (eager, other):
        run_rounds(engine, 2)
    assert recordings(other) == 2
    assert not caplog.records
    for engine in (eager, other):
        loop = replace(engine.state.config.loop, batch_size=4)
        engine.state.config = replace(engine.state.config, loop=loop)
    traces = run_rounds(eager, 1), run_rounds(other, 1)
    assert recordings(other) == 4
    assert [record.getMessage() for record in caplog.records] == ["capturing again: batch size changed"]
    assert_runs_close(eager.state, other.state, traces)
    student = other.state.student
    student.optimizer.param_groups[0]["weight_decay"] = 0.0
    student.module.model.conv1.weight.data = student.module.model.conv1.weight.data.clone()
    other.start_round()
    assert "capturing again: optimizers, state tensors changed" in caplog.text


def random_states(state: DistillState) -> list[Tensor]:
    """States of the run's random stream and of the device's default one."""
    cuda = state.runtime.device.type == "cuda"
    return [state.noise.get_state(), torch.cuda.get_rng_state() if cuda else torch.get_rng_state()]


def test_replays_draw_new_noise(device: str) -> None:
    """Replays draw the same noise as eager steps. Rates, trace rows and buffers advance with each replay too."""
    eager, other = state_on(device), state_on(device)
    noise: list[list[Tensor]] = []
    traces = []
    for state, create in ((eager, eager_engine), (other, graph_engine)):
        networks, drawn = eager_networks(state), []  # type: tuple[Networks, list[Tensor]]
        seen = torch.zeros(state.config.loop.batch_size, state.generator.module.latent_dim, device=device)

        def watch(step: StepNetworks, seen: Tensor = seen) -> StepNetworks:
            return replace(step, generator=lambda noise: step.generator(seen.copy_(noise)))

        steps = {name: watch(getattr(networks, name)) for name in ("generator_step", "student_step")}
        engine = create(state, Networks(**steps))
        engine.prepare()
        traces.append(run_rounds(engine, 3, lambda drawn=drawn, seen=seen: drawn.append(seen.clone())))  # type: ignore[misc]
        noise.append(drawn)
    steps_taken = 3 * other.steps_per_round
    assert len({tuple(z.flatten().tolist()) for z in noise[1]}) == len(noise[1]) == steps_taken
    assert all_equal(*noise)
    assert len({tuple(row.tolist()) for trace in traces[1] for row in trace}) == steps_taken
    assert_same_run(eager, other, (traces[0], traces[1]))


def test_random_streams_advance_and_resume_as_in_eager_mode(device: str) -> None:
    """Checks the run's own stream and the default one, and a checkpoint loaded into a graph engine."""

    def with_dropout(step: StepNetworks) -> StepNetworks:
        return replace(step, student=lambda x: step.student(F.dropout(x, 0.25)))

    def engine_of(state: DistillState, create: Callable[[DistillState, Networks], Engine]) -> Engine:
        networks = optimized_networks(state)
        steps = {name: with_dropout(getattr(networks, name)) for name in ("generator_step", "student_step")}
        engine = create(state, Networks(**steps))
        engine.prepare()
        torch.manual_seed(3)
        return engine

    eager, other = state_on(device), state_on(device)
    start = random_states(eager)
    expected = run_rounds(engine_of(eager, eager_engine), 3)
    after = random_states(eager)
    assert not any(torch.equal(a, b) for a, b in zip(start, after, strict=True))

    engine = engine_of(other, graph_engine)
    found = run_rounds(engine, 2)
    saved = copy.deepcopy(other.state_dict())
    found += run_rounds(engine, 1)
    assert all_equal(after, random_states(other))
    assert_same_run(eager, other, (expected, found))

    resumed = state_on(device, seed=5)  # other weights and noise: everything must come from the checkpoint
    engine = engine_of(resumed, graph_engine)
    run_rounds(engine, 1)
    resumed.load_state_dict(saved)
    found[2:] = run_rounds(engine, 1)
    assert recordings(engine) == 2  # the checkpoint was loaded in place
    assert all_equal(after, random_states(resumed))
    assert_same_run(eager, resumed, (expected, found))


@pytest.mark.parametrize("create", [eager_engine, graph_engine])
def test_generator_schedule_is_a_cosine_and_its_averages_are_reset(
    device: str, create: Callable[[DistillState], Engine]
) -> None:
    optimizer = tiny.OptimizerConfig(generator_lr=0.01, generator_schedule="cosine", generator_reset="round")
    state = state_on(device, optimizer=optimizer)
    engine, rates, counts = create(state), [], []  # type: tuple[Engine, list[float], list[float]]

    def record() -> None:
        if state.position.step <= state.config.loop.generator_steps:
            rates.append(state.generator.optimizer.param_groups[0]["lr"].item())
            counts.append(next(iter(state.generator.optimizer.state.values()))["step"].item())

    run_rounds(engine, 4, record)
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)], rel=1e-6)
    assert counts == [1, 2] * 4


def test_without_a_reset_the_averages_continue(device: str) -> None:
    state = state_on(device)
    run_rounds(eager_engine(state), 2)
    assert {each["step"].item() for each in state.generator.optimizer.state.values()} == {4}


@pytest.mark.parametrize("create", [eager_engine, graph_engine])
def test_student_schedule_is_a_cosine(device: str, create: Callable[[DistillState], Engine]) -> None:
    """The rate changes with each step of a round, and follows a config that changes between rounds."""
    state = state_on(device)
    engine, rates = create(state), []  # type: tuple[Engine, list[float]]

    def record_rate() -> None:
        if state.position.step > state.config.loop.generator_steps:
            rates.append(state.student.optimizer.param_groups[0]["lr"].item())

    run_rounds(engine, 1, record_rate)
    state.config = replace(state.config, optimizer=replace(state.config.optimizer, student_lr=0.5))
    run_rounds(engine, 3, record_rate)
    peaks = (0.05, 0.05, *(0.5,) * 6)
    expected = [lr / 2 * (1 + math.cos(math.pi * step / 8)) for step, lr in enumerate(peaks)]
    assert rates == pytest.approx(expected, rel=1e-6)
    if create is graph_engine:
        assert recordings(engine) == 2


def test_replays_read_a_learning_rate_that_is_changed_in_place(device: str) -> None:
    """A scheduler multiplies the generator's rate by 0.1. The test then sets it to zero, which freezes the weights."""

    def work(engine: Engine) -> list[Tensor]:
        state, optimizer = engine.state, engine.state.generator.optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: (1.0, 0.1)[count])
        losses = run_rounds(engine, 1)
        for factor in (0.1, 0.0):
            if factor > 0:
                scheduler.step()
            else:
                optimizer.param_groups[0]["lr"].zero_()
            before = [p.detach().clone() for p in state.generator.module.parameters()]
            losses += run_rounds(engine, 1)
            after = state.generator.module.parameters()
            moved = max((a - b).abs().max().item() for a, b in zip(before, after, strict=True))
            # With these betas a step of Adam is at most (1 - 0.5) / sqrt(1 - 0.99) = 5 times its rate.
            steps = state.config.loop.generator_steps
            assert moved <= 5 * steps * factor * state.config.optimizer.generator_lr
            assert (moved > 0) == (factor > 0)
        return losses

    assert recordings(compare_with_eager(device, work)) == 2


@pytest.mark.parametrize(("side", "kind"), [("generator", "number"), ("student", "tensor")])
def test_replaced_learning_rate_is_captured_again(
    device: str, side: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph holds the address of its learning rate. Another tensor or a number takes effect in the next round."""
    caplog.set_level(logging.WARNING)

    def work(engine: Engine) -> list[Tensor]:
        losses = run_rounds(engine, 1)
        (group,) = engine.state.sides[side].optimizer.param_groups
        group["lr"] = 0.0 if kind == "number" else torch.zeros((), device=device)
        before = [p.detach().clone() for p in group["params"]]
        losses += run_rounds(engine, 2)
        assert all_equal(before, group["params"])
        return losses

    assert recordings(compare_with_eager(device, work)) == 4
    assert [record.getMessage() for record in caplog.records] == ["capturing again: learning rates changed"]


class _RefuseHostReads(TorchDispatchMode):
    """Raises on operators that make the host wait for a value on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS_BACK, f"{func} {READS_BACK[func]}"
        return func(*args, **(kwargs or {}))


@contextmanager
def assert_no_wait_and_no_allocation(device: str) -> Iterator[None]:
    """Fail if the host waits for the device, or, on CUDA, if device memory is allocated."""
    if device == "cpu":
        with _RefuseHostReads():
            yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def default_engine(device: str) -> GraphEngine:
    """Create a GPU's default engine (Inductor's code in bf16), or on the CPU a graph engine with the stand-in."""
    engine = create_engine(state_on("cuda", precision="bf16")) if device == "cuda" else graph_engine(state_on(device))
    assert isinstance(engine, GraphEngine)
    return engine


def test_replayed_rounds_neither_wait_nor_allocate(device: str) -> None:
    """Covers a round from its start to the queued copy of its losses, which are read while the next round runs.

    Over more rounds, the used device memory is constant. On the CPU, the number of live tensors is compared.
    """
    finished: list[Round] = []
    engine = default_engine(device)
    rounds = Rounds(engine, finished.append)

    def memory_after(count: int) -> tuple[Any, ...]:
        for _ in range(count):
            rounds.run(lambda: False)
        rounds.drain()
        gc.collect()
        addresses = [tensor.data_ptr() for tensor in engine.state.mutable_tensors()]
        if device == "cuda":
            return addresses, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return addresses, sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    memory_after(2)
    with assert_no_wait_and_no_allocation(device):
        rounds.run(lambda: False)
    if device == "cuda":  # reading the losses waits for an event of the previous round, not for the device
        with assert_no_wait_and_no_allocation(device):
            rounds.run(lambda: False)
    first = memory_after(3)
    assert memory_after(7) == first
    assert [done.number for done in finished] == list(range(13 if device == "cpu" else 14))


def test_stand_in_refuses_host_reads() -> None:
    with pytest.raises(AssertionError, match="reads a value back"), assert_no_wait_and_no_allocation("cpu"):
        torch.ones(()).item()


def test_failed_capture_raises_and_preserves_the_state(device: str) -> None:
    state = state_on(device)
    networks = eager_networks(state)

    def reading(x: Tensor) -> Any:
        outputs = state.student.module(x)
        assert outputs.logits.sum().item() < 1e9
        return outputs

    engine = graph_engine(state, replace(networks, student_step=replace(networks.student_step, student=reading)))
    before = values(state)
    cuda = device == "cuda"
    message = "could not be captured into a CUDA graph" if cuda else "not permitted when stream is capturing"
    with pytest.raises(RuntimeError, match=message):
        engine.prepare()
    assert all_equal(before, state.mutable_tensors())
    assert torch.isfinite(run_rounds(eager_engine(state), 1)[0]).all()


def test_unsupported_states_are_refused() -> None:
    with pytest.raises(ValueError, match="engine 'graph' needs a CUDA device, got 'cpu'"):
        create_engine(tiny.state(replace(tiny.config(), engine="graph")))
    with pytest.raises(ValueError, match="loss scaling"):
        graph_engine(state_on("cpu", precision="fp16"))
    state = tiny.state()
    state.student.module.model.bn1.momentum = None
    with pytest.raises(ValueError, match=r"cannot run model\.bn1 of the student.*momentum=None"):
        graph_engine(state)


def test_engine_names_are_resolved() -> None:
    def resolved(name: str, device: str, autocast: torch.dtype | None = None) -> str:
        runtime = Runtime(device=torch.device(device), autocast=autocast, tf32=False, channels_last=True)
        return resolve_engine(name, runtime)  # type: ignore[arg-type]

    assert resolved("auto", "cuda", torch.bfloat16) == resolved("auto", "cuda") == "graph"
    assert resolved("auto", "cuda", torch.float16) == "compiled"  # graphs do not support loss scaling
    assert resolved("auto", "cpu") == "eager"
    assert resolved("compiled", "cpu") == "compiled"
    with pytest.raises(ValueError, match="engine must be one of auto, eager, compiled, graph, got 'fast'"):
        resolved("fast", "cpu")
    assert type(create_engine(tiny.state())) is EagerEngine


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_default_precision_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert Runtime.of("cpu", "auto", channels_last=True).precision == precision
    assert Runtime.of("cpu", "fp32", channels_last=True).autocast is None


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device must be 'auto' or a torch device, got 'gpu'"),
        ("", "device must be 'auto' or a torch device, got ''"),
        ("cuda:x", "device must be 'auto' or a torch device, got 'cuda:x'"),
        ("cuda:-1", "device must be 'auto' or a torch device, got 'cuda:-1'"),
        ("cuda:2", "device is 'cuda:2', but the last CUDA device is 'cuda:1'"),
        *((name, f"device is '{name}', but this torch") for name in ("meta", "hpu", "vulkan", "xla", "mtia")),
        pytest.param(
            "mps", "device is 'mps', but", marks=pytest.mark.skipif(torch.mps.is_available(), reason="has it")
        ),
        pytest.param(
            "xpu", "device is 'xpu', but", marks=pytest.mark.skipif(torch.xpu.is_available(), reason="has it")
        ),
    ],
)
def test_missing_devices_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    if device in ("mps", "xpu") and getattr(torch, device).is_available():
        pytest.skip(f"{device} is available")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Runtime.of(device, "fp32", channels_last=True)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:1', but no CUDA device is available; `dfkd-fast doctor`"):
        Runtime.of("cuda:1", "fp32", channels_last=True)


def loss_curves(state: DistillState, engine: Engine, rounds: int) -> Tensor:
    """The student's distillation loss and the generator's statistics loss per round."""
    traces = torch.stack(run_rounds(engine, rounds))
    first = state.config.loop.generator_steps
    return torch.stack([traces[:, first:, 0].mean(1), traces[:, :first, 0].mean(1)])


def test_bf16_loss_curves_stay_within_the_seed_to_seed_spread() -> None:
    def curves(precision: str, create: Callable[[DistillState], Engine]) -> Tensor:
        states = [state_on("cpu", seed=seed, precision=precision) for seed in range(4)]
        return torch.stack([loss_curves(state, create(state), 6) for state in states])

    exact, rough = curves("fp32", eager_engine), curves("bf16", graph_engine_optimized)
    spread = exact.std(0)
    assert ((rough - exact).mean(0).abs() <= spread).all()
    assert ((rough - exact).abs().mean(0) <= 2 * spread).all()


def test_nonfinite_error_names_round_and_step() -> None:
    state = tiny.state()
    finished: list[Round] = []
    rounds = Rounds(graph_engine(state), finished.append)
    assert rounds.run(lambda: False)
    rounds.drain()
    shift, parameters = state.normalize.shift.clone(), [p.detach().clone() for p in state.student.module.parameters()]
    state.normalize.shift.fill_(float("nan"))  # a replay reads it from memory
    assert rounds.run(lambda: False)
    state.normalize.shift.copy_(shift)
    with pytest.raises(NonFiniteError, match=r"round 1, generator step 0: .*not finite"):
        rounds.drain()
    assert [done.number for done in finished] == [0]
    assert all_equal(parameters, state.student.module.parameters())


def _first(values: Any) -> Tensor:
    return next(iter(values))


@pytest.mark.parametrize(
    ("find", "name"),
    [
        (lambda s: _first(s.student.module.model.parameters()), "student's conv1.weight"),
        (lambda s: s.student.module.model.bn1.running_var, "student's bn1.running_var"),
        (lambda s: _first(s.student.optimizer.state.values())["momentum_buffer"], "momentum_buffer of conv1.weight"),
        (lambda s: _first(s.generator.optimizer.state.values())["exp_avg_sq"], "generator's exp_avg_sq of "),
        (lambda s: _first(b for n, b in s.generator.module.named_buffers() if n.endswith("_u")), r"generator's .*\._u"),
    ],
)
def test_values_that_no_loss_shows_are_checked_before_saving(find: Callable[[Any], Tensor], name: str) -> None:
    state = tiny.state()
    rounds = Rounds(eager_engine(state), lambda done: None)
    assert rounds.run(lambda: False)
    rounds.drain()
    for value in (math.nan, math.inf):
        tensor = find(state).data
        before = tensor.clone()
        tensor[0] = value
        with pytest.raises(NonFiniteError, match=rf"before round 1, step 0: .*{name}.* not finite; the last good"):
            rounds.drain()
        tensor.copy_(before)
    rounds.drain()


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_loss_scale_that_skips_every_step_is_an_error(value: float) -> None:
    state = tiny.state(replace(tiny.config(), precision="fp16"))
    assert state.non_finite() == []
    state.student.scaler.load_state_dict({**state.student.scaler.state_dict(), "scale": value})
    assert state.non_finite() == ["student's loss scale"]


def test_losses_are_read_one_round_late_and_in_order() -> None:
    state, finished = tiny.state(), []  # type: tuple[DistillState, list[Round]]
    rounds = Rounds(eager_engine(state), finished.append)
    for number in range(3):
        assert rounds.run(lambda: False)
        assert [done.number for done in finished] == list(range(number))
    rounds.drain()
    assert [done.number for done in finished] == state.rounds["round"] == [0, 1, 2]
    assert set(finished[0].means) == set(state.rounds) - {"round"}
    assert finished[-1].student_lr < finished[0].student_lr < 0.05
    assert rounds.images == 3 * state.steps_per_round * state.config.loop.batch_size
    assert rounds.seconds > 0


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run background jobs concurrently, as on a GPU."""
    start = Background.__init__
    monkeypatch.setattr(background.Background, "__init__", lambda self, device: start(self, device, overlap=True))


@pytest.fixture(scope="module")
def run_without_overlap(tmp_path_factory: pytest.TempPathFactory) -> dfkd_fast.DistillResult:
    """A run whose evaluations and file writes do not overlap with the steps."""
    return tiny.run(tmp_path_factory.mktemp("run_without_overlap"), select="test_accuracy")


def test_checkpoint_does_not_wait_for_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlapping: None, run_without_overlap: dfkd_fast.DistillResult
) -> None:
    """If a run is killed while an epoch is evaluated, the epoch's checkpoint exists, and the resumed run evaluates it.

    Overlapping work does not change the results.
    """
    evaluate, calls = dfkd_fast.engine.loop.evaluate, 0
    written = tmp_path / "checkpoints" / "round-000002-step-0000.pt"

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            while not written.exists():
                time.sleep(0.01)
            raise KeyError("the first epoch's evaluation")
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dfkd_fast.engine.loop, "evaluate", dying)
        with pytest.raises(KeyError, match="the first epoch's evaluation"):
            tiny.run(tmp_path, checkpoint_every=2, select="test_accuracy")
    assert list(written.parent.iterdir()) == [written]
    resumed = tiny.run(tmp_path, checkpoint_every=2, select="test_accuracy", resume=True)
    assert resumed.epochs == run_without_overlap.epochs
    assert resumed.rounds == run_without_overlap.rounds
    assert tiny.same_weights(resumed.student, run_without_overlap.student)
    pictures, expected = ({path.name for path in run.rglob("*.png")} for run in (tmp_path, run_without_overlap.run_dir))
    assert pictures == expected


def test_background_jobs_run_in_order_and_raise_their_errors() -> None:
    def fail() -> None:
        raise OSError("no space left")

    work = Background(torch.device("cpu"), overlap=True)
    order: list[int] = []
    for number in range(3):
        work.submit(lambda number=number: order.append(number))  # type: ignore[misc]
    work.wait()
    assert order == [0, 1, 2]
    work.submit(fail)
    with pytest.raises(OSError, match="no space left"):
        work.wait()
    work.close()
    with pytest.raises(OSError, match="no space left"):
        Background(torch.device("cpu")).submit(fail)


def test_distill_takes_an_engine_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted_run: dfkd_fast.DistillResult
) -> None:
    monkeypatch.setitem(engines._ENGINES, "graph", graph_engine_optimized)
    result = tiny.run(tmp_path / "graph", engine="graph")
    for term, losses in uninterrupted_run.rounds.items():
        torch.testing.assert_close(torch.tensor(result.rounds[term]), torch.tensor(losses), **TOLERANCE)
    for a, b in zip(uninterrupted_run.student.parameters(), result.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.gpu
def test_bf16_losses_match_float32_on_cuda() -> None:
    exact, rough = state_on("cuda"), state_on("cuda", precision="bf16")
    curves = loss_curves(exact, eager_engine(exact), 4), loss_curves(rough, create_engine(rough), 4)
    torch.testing.assert_close(curves[1], curves[0], rtol=0.1, atol=0.05)


@pytest.mark.gpu
def test_distill_on_cuda_resumes_with_the_same_result(tmp_path: Path) -> None:
    options = {"device": "cuda", "precision": "bf16", "select": "test_accuracy"}
    result = tiny.run(tmp_path, **options)
    assert len(result.epochs["accuracy"]) == 2
    again = tiny.run(tmp_path, **options, resume=True)
    assert again.epochs == result.epochs
    assert tiny.same_weights(again.student, result.student)
