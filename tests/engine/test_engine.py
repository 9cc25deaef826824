"""Three ways to execute one algorithm: eager, compiled, captured. Here on the CPU, with a stand-in for graphs."""

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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfkd_fast
from dfkd_fast.config import ObjectiveConfig
from dfkd_fast.engine import (
    CaptureError,
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

# Folding a BatchNorm, and another order of summation, are all that compiled and captured steps differ by in float32.
# After a few steps of Adam, whose first ones are as long where a gradient is noise as where it is not, that is:
TOLERANCE = {"rtol": 2e-3, "atol": 1e-4}


def take(engine: Engine, rounds: int, after_step: Callable[[], object] = lambda: None) -> list[Tensor]:
    """Whole rounds; the trace of each."""
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
    return [tensor.detach().clone() for tensor in state.changing()]


def graph(state: DistillState, *, as_it_is: bool = False) -> GraphEngine:
    """The graph engine over uncompiled networks: what is looked at here is the recording."""
    networks = eager_networks(state) if as_it_is else optimized_networks(state)
    return GraphEngine(state, networks, recorder=ReplayRecorder())


def compiled(state: DistillState) -> CompiledEngine:
    """All of torch.compile but its code generator, which takes minutes on a CPU."""
    return CompiledEngine(state, backend="aot_eager")


def assert_same_algorithm(one: DistillState, other: DistillState, traces: tuple[list[Tensor], list[Tensor]]) -> None:
    """Every loss, weight, buffer and optimiser state.

    But for weights of the generator whose gradients are zero but for rounding: Adam's step has a length of its own,
    whatever the gradient's. These are the biases before a BatchNorm, whose mean takes them with it, and before a
    softmax over positions, and single weights whose gradients never rose above the rounding of the largest one.
    """
    unseen = ("attention.expand.bias", "project.bias", "upsample.bias")
    squares = {p: one.generator.optimizer.state[p]["exp_avg_sq"].sqrt() for p in one.generator.module.parameters()}
    rounding = torch.finfo(torch.float32).eps * max(square.max() for square in squares.values())
    seen: dict[int, Tensor] = {}
    for name, parameter in one.generator.module.named_parameters():
        where = (squares[parameter] > rounding) & (not name.endswith(unseen))
        for tensor in (parameter, *one.generator.optimizer.state[parameter].values()):
            seen[id(tensor)] = where if tensor.shape == where.shape else torch.tensor(True)
    norms = [one.generator.module.project_norm, *(block.norm for block in one.generator.module.blocks)]  # type: ignore[union-attr]
    after_biases = {id(norm.running_mean) for norm in norms}
    for a, b in zip(*traces, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    for a, b in zip(one.changing(), other.changing(), strict=True):
        if id(a) not in after_biases:
            where = seen.get(id(a), torch.tensor(True)).to(a.device)
            torch.testing.assert_close(torch.where(where, a, 0), torch.where(where, b, 0), **TOLERANCE)
    # What is left out cannot have gone further apart than Adam's steps are long, each way.
    for a, b in zip(one.generator.module.parameters(), other.generator.module.parameters(), strict=True):
        steps = one.generator.optimizer.state[a]["step"]
        assert ((a - b).abs() <= 2 * one.config.optimizer.generator_lr * steps).all()


@pytest.mark.parametrize("mode", ["batch", "update", "eval"])
def test_a_recorded_step_is_the_same_algorithm(mode: str) -> None:
    """Three rounds from the same start, the teacher made ready."""
    eager, other = (tiny.state(tiny.config(student_in_generator_step=mode)) for _ in range(2))
    engine = graph(other)
    engine.prepare()
    assert_same_algorithm(eager, other, (take(EagerEngine(eager), 3), take(engine, 3)))
    assert other.position == eager.position
    assert other.student_updates == eager.student_updates


def test_a_compiled_step_is_the_same_algorithm_without_a_graph_break() -> None:
    """Each region is compiled once; preparing leaves no trace; three rounds agree."""
    eager, other = tiny.state(), tiny.state()
    engine, counters = compiled(other), torch._dynamo.utils.counters
    counters.clear()
    with leaves_no_trace(other):
        engine.prepare()
    assert counters["stats"]["unique_graphs"] == 8  # generator, teacher, student, objective; in each kind of step
    assert_same_algorithm(eager, other, (take(EagerEngine(eager), 3), take(engine, 3)))
    assert counters["stats"]["unique_graphs"] == 8
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_generated_code_is_the_same_algorithm(precision: Any) -> None:
    """With Inductor, whose C++ takes minutes to compile."""
    eager, other = (tiny.state(replace(tiny.config(), precision=precision)) for _ in range(2))
    engine = CompiledEngine(other)
    engine.prepare()
    traces = take(EagerEngine(eager), 3), take(engine, 3)
    if precision == "fp32":
        assert_same_algorithm(eager, other, traces)
    else:
        torch.testing.assert_close(torch.stack(traces[0]), torch.stack(traces[1]), rtol=0.1, atol=0.05)
    torch.compiler.reset()


def test_every_term_can_be_recorded() -> None:
    sides = ("generator", "student")
    weights = {side: {name: 0.1 for name, term in TERMS.items() if side in term.sides} for side in sides}
    eager, other = (tiny.state(tiny.config(objective=ObjectiveConfig(**weights))) for _ in range(2))
    assert [len(side.objective.names) for side in other.sides.values()] == [6, 5]
    engine = graph(other, as_it_is=True)
    engine.prepare()
    traces = take(EagerEngine(eager), 2), take(engine, 2)
    for a, b in zip(*traces, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(eager.changing(), other.changing(), strict=True))


@contextmanager
def leaves_no_trace(state: DistillState) -> Iterator[None]:
    before, addresses = values(state), [tensor.data_ptr() for tensor in state.changing()]
    streams = state.noise.get_state(), torch.get_rng_state()
    flags = [
        (module.training, getattr(module, "track_running_stats", None)) for module in state.student.module.modules()
    ]
    groups = [{**group, "params": None} for group in state.generator.optimizer.param_groups]
    position = copy.copy(state.position), state.student_updates
    yield
    assert all(torch.equal(a, b) for a, b in zip(before, state.changing(), strict=True))
    assert addresses == [tensor.data_ptr() for tensor in state.changing()]
    assert torch.equal(streams[0], state.noise.get_state())
    assert torch.equal(streams[1], torch.get_rng_state())
    assert flags == [(m.training, getattr(m, "track_running_stats", None)) for m in state.student.module.modules()]
    assert groups == [{**group, "params": None} for group in state.generator.optimizer.param_groups]
    assert position == (state.position, state.student_updates)
    assert all(p.grad is None for p in [*state.student.module.parameters(), *state.generator.module.parameters()])
    assert not hasattr(state.generator.optimizer, "found_inf")


def test_a_teacher_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics come from the graph that it has, and are those of a trace of its own."""
    tiny.state()  # which keeps its traces
    features = extract(tiny.teacher(), image_size=tiny.SIZE)
    expected = extract(features.model, statistics=True, image_size=tiny.SIZE)
    monkeypatch.setattr(sys.modules["dfkd_fast.graph.extract"], "symbolic_trace", None)
    found = extract(features, statistics=True).train()  # statistics mean eval mode, whatever the flags
    assert (found.stages, found.batchnorms, found.fused) == (expected.stages, expected.batchnorms, expected.fused)
    assert len(found.batchnorms) > 5
    assert not features.batchnorms
    x = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    for a, b in zip(tree_leaves(found(x)), tree_leaves(expected(x)), strict=True):
        assert torch.equal(a, b)
    assert optimized_networks(tiny.state())  # a state and folding trace nothing either
    with pytest.raises(TypeError, match="not callable"):
        extract(features, stages=["layer3"], statistics=True, image_size=tiny.SIZE)


def test_preparing_leaves_no_trace() -> None:
    state = tiny.state()
    take(EagerEngine(state), 1)  # momentum, moments and buffers that are not what they started as
    engine = graph(state)
    with leaves_no_trace(state):
        engine.prepare()


def test_prepared_in_the_middle_of_a_round() -> None:
    """Where a resumed run stands, no row of the trace may be left for a rehearsal."""
    eager, other = tiny.state(), tiny.state()
    for state in (eager, other):
        engine = EagerEngine(state)
        engine.start_round()
        for _ in range(3):
            engine.step()
    for engine in (EagerEngine(eager), graph(other, as_it_is=True)):
        engine.prepare()
        engine.start_round()
        engine.step()
    assert all(torch.equal(a, b) for a, b in zip(eager.changing(), other.changing(), strict=True))


def test_resumed_in_the_graph_form_goes_on_with_the_same_random_stream() -> None:
    """Loaded before the capture; into a captured engine: test_random_streams_advance_as_in_eager_mode."""
    whole, broken = tiny.state(), tiny.state()
    engine = graph(whole)
    expected = take(engine, 3)
    take(graph(broken), 1)
    saved = copy.deepcopy(broken.state_dict())
    fresh = tiny.state(replace(tiny.config(), seed=5))  # other weights, other noise: all of it comes from the file
    resumed = graph(fresh)
    fresh.load_state_dict(saved)
    found = take(resumed, 2)
    assert resumed.executor.recorder.recordings == 2  # type: ignore[attr-defined]  # tensors were written to where they are
    for a, b in zip(expected[1:], found, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(whole.changing(), fresh.changing(), strict=True))


def test_what_a_graph_has_frozen_is_recorded_again_where_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    eager, other = tiny.state(), tiny.state()
    engines_ = EagerEngine(eager), graph(other)
    for engine in engines_:
        take(engine, 1)
    recorder = engines_[1].executor.recorder  # type: ignore[attr-defined]
    take(engines_[1], 1)
    take(engines_[0], 1)
    assert recorder.recordings == 2
    assert not caplog.records
    for engine in engines_:
        loop = replace(engine.state.config.loop, batch_size=4)
        engine.state.config = replace(engine.state.config, loop=loop)
    traces = [take(engine, 1) for engine in engines_]
    assert recorder.recordings == 4
    assert [record.getMessage() for record in caplog.records] == ["capturing again: batch size changed"]
    assert_same_algorithm(eager, other, (traces[0], traces[1]))
    other.student.optimizer.param_groups[0]["weight_decay"] = 0.0
    other.student.module.model.conv1.weight.data = other.student.module.model.conv1.weight.data.clone()
    engines_[1].start_round()
    assert "capturing again: optimisers, tensors of the state changed" in caplog.text


# ---- hazards of captured steps: with the stand-in on the CPU, with CUDA graphs on a card ----------------------------


class _CountingRecorder(CudaRecorder):
    """Counts its recordings, as the stand-in does."""

    recordings = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        return super().record(work)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def state_on(device: str, **changes: Any) -> DistillState:
    return tiny.state(replace(tiny.config(), **{"device": device, "precision": "fp32", **changes}))


def on_card(**changes: Any) -> DistillState:
    return state_on("cuda", **changes)


def captured(state: DistillState, networks: Networks | None = None) -> GraphEngine:
    """The graph engine over uncompiled networks."""
    where = state.runtime.device
    recorder = ReplayRecorder() if where.type == "cpu" else _CountingRecorder(where, [state.noise])
    return GraphEngine(state, networks or eager_networks(state), recorder=recorder)


def recordings(engine: Engine) -> int:
    return engine.executor.recorder.recordings  # type: ignore[attr-defined]


def assert_same_run(eager: DistillState, other: DistillState, traces: tuple[list[Tensor], list[Tensor]]) -> None:
    """Bit for bit on the CPU. A card sums gradients of convolutions in an order that varies."""
    if eager.runtime.device.type == "cuda":
        assert_same_algorithm(eager, other, traces)
    else:
        assert all(torch.equal(a, b) for a, b in zip(*traces, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(eager.changing(), other.changing(), strict=True))


def streams(state: DistillState) -> list[Tensor]:
    """States of the run's random stream and of the device's default one."""
    cuda = state.runtime.device.type == "cuda"
    return [state.noise.get_state(), torch.cuda.get_rng_state() if cuda else torch.get_rng_state()]


def watched(state: DistillState) -> tuple[Networks, Tensor]:
    """The state's networks, and a tensor into which each step, replayed or not, copies the noise that it drew."""
    seen = torch.zeros(state.config.loop.batch_size, state.generator.module.latent_dim, device=state.runtime.device)

    def watch(step: StepNetworks) -> StepNetworks:
        return replace(step, generator=lambda noise: step.generator(seen.copy_(noise)))

    networks = eager_networks(state)
    return Networks(generator_step=watch(networks.generator_step), student_step=watch(networks.student_step)), seen


def test_replays_draw_new_noise(device: str) -> None:
    """The noise of eager steps, bit for bit; rates, rows of the trace and buffers move on from replay to replay too."""
    eager, other = state_on(device), state_on(device)
    noise: dict[str, list[Tensor]] = {"eager": [], "graph": []}
    traces = []
    for state, create in ((eager, EagerEngine), (other, captured)):
        networks, seen = watched(state)
        engine = create(state, networks)
        engine.prepare()
        traces.append(take(engine, 3, lambda drawn=noise[engine.name], seen=seen: drawn.append(seen.clone())))  # type: ignore[misc]
    steps = 3 * other.steps_per_round
    assert len({tuple(z.flatten().tolist()) for z in noise["graph"]}) == len(noise["graph"]) == steps
    assert all(torch.equal(a, b) for a, b in zip(*noise.values(), strict=True))
    assert len({tuple(row.tolist()) for trace in traces[1] for row in trace}) == steps
    assert_same_run(eager, other, (traces[0], traces[1]))


class _Dropping(nn.Module):
    """A network that draws from the device's default stream."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(nn.functional.dropout(x, 0.25))


def test_random_streams_advance_as_in_eager_mode(device: str) -> None:
    """The run's own and the default one, also over a checkpoint that is loaded into a captured engine."""

    def engine_of(state: DistillState, create: Callable[[DistillState, Networks], Engine]) -> Engine:
        plain, dropping = eager_networks(state), _Dropping(state.student.module)
        steps = (replace(step, student=dropping) for step in (plain.generator_step, plain.student_step))
        engine = create(state, Networks(**dict(zip(("generator_step", "student_step"), steps, strict=True))))
        engine.prepare()
        torch.manual_seed(3)
        return engine

    eager, other = state_on(device), state_on(device)
    start = streams(eager)
    expected = take(engine_of(eager, EagerEngine), 3)
    after = streams(eager)
    assert not any(torch.equal(a, b) for a, b in zip(start, after, strict=True))

    engine = engine_of(other, captured)
    found = take(engine, 2)
    saved = copy.deepcopy(other.state_dict())
    found += take(engine, 1)
    assert all(torch.equal(a, b) for a, b in zip(after, streams(other), strict=True))
    assert_same_run(eager, other, (expected, found))

    resumed = state_on(device, seed=5)
    engine = engine_of(resumed, captured)
    take(engine, 1)
    resumed.load_state_dict(saved)
    found[2:] = take(engine, 1)
    assert recordings(engine) == 2
    assert all(torch.equal(a, b) for a, b in zip(after, streams(resumed), strict=True))
    assert_same_run(eager, resumed, (expected, found))


def test_replays_follow_the_students_schedule(device: str) -> None:
    """Step by step within a round, and from a rate that the config is given between rounds."""
    state = state_on(device)
    engine, rates = captured(state), []  # type: tuple[GraphEngine, list[float]]

    def note() -> None:
        if state.position.step > state.config.loop.generator_steps:
            rates.append(state.student.optimizer.param_groups[0]["lr"].item())

    take(engine, 1, note)
    state.config = replace(state.config, optimizer=replace(state.config.optimizer, student_lr=0.5))
    take(engine, 1, note)
    expected = [lr / 2 * (1 + math.cos(math.pi * step / 8)) for step, lr in enumerate((0.05, 0.05, 0.5, 0.5))]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert recordings(engine) == 2


def test_replays_follow_a_changed_learning_rate(device: str) -> None:
    """The generator's optimiser reads its rate from memory. At a rate of zero, weights stay as they are.

    The scheduler writes 0.1 times the rate in place, and the test itself zero.
    """
    eager, other = state_on(device), state_on(device)
    traces: list[list[Tensor]] = []
    for state, create in ((eager, EagerEngine), (other, captured)):
        optimizer = state.generator.optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: (1.0, 0.1)[count])
        engine = create(state)
        losses = take(engine, 1)
        for factor in (0.1, 0.0):
            if factor > 0:
                scheduler.step()
            else:
                optimizer.param_groups[0]["lr"].zero_()
            before = [p.detach().clone() for p in state.generator.module.parameters()]
            losses += take(engine, 1)
            after = state.generator.module.parameters()
            moved = [(a - b).abs().max().item() for a, b in zip(before, after, strict=True)]
            steps = state.config.loop.generator_steps
            # Adam's step is at most (1 - 0.5) / sqrt(1 - 0.99) = 5 times its rate, with these betas.
            assert max(moved) <= 5 * steps * factor * state.config.optimizer.generator_lr
            assert (max(moved) > 0) == (factor > 0)
        traces.append(losses)
    assert recordings(engine) == 2
    assert_same_run(eager, other, (traces[0], traces[1]))


@pytest.mark.parametrize(("side", "kind"), [("generator", "number"), ("student", "tensor")])
def test_a_replaced_learning_rate_is_captured_again(
    device: str, side: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph holds the address of the rate that it was captured with: another one takes effect in the next round."""
    caplog.set_level(logging.WARNING)
    eager, other = state_on(device), state_on(device)
    traces: list[list[Tensor]] = []
    for state, create in ((eager, EagerEngine), (other, captured)):
        engine = create(state)
        losses = take(engine, 1)
        optimizer = {"generator": state.generator.optimizer, "student": state.student.optimizer}[side]
        optimizer.param_groups[0]["lr"] = 0.0 if kind == "number" else torch.zeros((), device=device)
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        traces.append(losses + take(engine, 2))
        after = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [record.getMessage() for record in caplog.records] == ["capturing again: learning rates changed"]
    assert recordings(engine) == 4
    assert_same_run(eager, other, (traces[0], traces[1]))


class _HostReads(TorchDispatchMode):
    """Refuses what makes the host wait for values of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS_BACK, f"{func} {READS_BACK[func]}"
        return func(*args, **(kwargs or {}))


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Fail where the host waits for the device, or a graph's replay allocates memory of it."""
    if device == "cpu":
        with _HostReads():
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


def fastest(device: str) -> GraphEngine:
    """The engine that a card is given, Inductor's code in bf16; on the CPU the stand-in."""
    engine = create_engine(on_card(precision="bf16")) if device == "cuda" else captured(state_on(device))
    assert isinstance(engine, GraphEngine)
    return engine


def test_a_round_of_replays_neither_waits_nor_allocates(device: str) -> None:
    """From the start of the round to the queued copy of its losses, which are read when the next round is queued."""
    finished: list[Round] = []
    rounds = Rounds(fastest(device), finished.append)
    for _ in range(2):
        rounds.run(lambda: False)
    rounds.drain()
    with without_waiting(device):
        rounds.run(lambda: False)
    if device == "cuda":  # reading them waits for an event of the round before, not for the device
        with without_waiting(device):
            rounds.run(lambda: False)
    rounds.drain()
    assert [done.number for done in finished] == list(range(3 if device == "cpu" else 4))


def test_host_reads_are_refused() -> None:
    with pytest.raises(AssertionError, match="reads a value back to the host"), without_waiting("cpu"):
        torch.ones(()).item()


def test_memory_is_flat_over_replays(device: str) -> None:
    """Device memory, or the number of live tensors; no tensor of the state is replaced."""
    engine = fastest(device)
    rounds = Rounds(engine, lambda done: None)

    def memory_after(count: int) -> tuple[Any, ...]:
        for _ in range(count):
            rounds.run(lambda: False)
        rounds.drain()
        gc.collect()
        addresses = [tensor.data_ptr() for tensor in engine.state.changing()]
        if device == "cuda":
            return addresses, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return addresses, sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    first = memory_after(3)
    assert memory_after(7) == first


class _Reading(nn.Module):
    """A network that looks at its activations on the host."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        outputs = self.network(x)
        assert outputs.logits.sum().item() < 1e9
        return outputs


def test_what_cannot_be_recorded_is_an_error() -> None:
    state = tiny.state()
    engine = graph(state, as_it_is=True)
    step = replace(engine.networks.student_step, student=_Reading(state.student.module))
    engine.networks = replace(engine.networks, student_step=step)
    before = values(state)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        engine.prepare()
    assert all(torch.equal(a, b) for a, b in zip(before, state.changing(), strict=True))


def test_a_batchnorm_that_counts_on_the_host_is_refused() -> None:
    state = tiny.state()
    state.student.module.model.bn1.momentum = None
    with pytest.raises(ValueError, match=r"cannot run model\.bn1 of the student.*momentum=None"):
        graph(state)


def test_engines_by_name() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def runtime(device: torch.device, autocast: torch.dtype | None) -> Runtime:
        return Runtime(device=device, autocast=autocast, tf32=False, channels_last=True)

    assert resolve_engine("auto", runtime(cuda, torch.bfloat16)) == "graph"
    assert resolve_engine("auto", runtime(cuda, None)) == "graph"
    assert resolve_engine("auto", runtime(cuda, torch.float16)) == "compiled"  # loss scaling has no graph
    assert resolve_engine("auto", runtime(cpu, None)) == "eager"
    assert resolve_engine("compiled", runtime(cpu, None)) == "compiled"
    with pytest.raises(ValueError, match="engine must be one of auto, eager, compiled, graph, got 'fast'"):
        resolve_engine("fast", runtime(cpu, None))  # type: ignore[arg-type]
    assert type(create_engine(tiny.state())) is EagerEngine
    with pytest.raises(ValueError, match="engine 'graph' needs a CUDA device, got 'cpu'"):
        create_engine(tiny.state(replace(tiny.config(), engine="graph")))
    with pytest.raises(ValueError, match="loss scaling"):
        GraphEngine(tiny.state(replace(tiny.config(), precision="fp16")), recorder=ReplayRecorder())


def curve(state: DistillState, engine: Engine, rounds: int) -> Tensor:
    """The student's distillation loss and the generator's statistics loss, a round."""
    traces = torch.stack(take(engine, rounds))
    first = state.config.loop.generator_steps
    return torch.stack([traces[:, first:, 0].mean(1), traces[:, :first, 0].mean(1)])


def test_in_bf16_loss_curves_agree_within_their_seed_to_seed_spread() -> None:
    def states(**changes: Any) -> list[DistillState]:
        return [tiny.state(replace(tiny.config(), seed=seed, **changes)) for seed in range(4)]

    exact = torch.stack([curve(state, EagerEngine(state), 6) for state in states()])
    rough = torch.stack([curve(state, graph(state), 6) for state in states(precision="bf16")])
    spread = exact.std(0)
    assert ((rough - exact).mean(0).abs() <= spread).all()
    assert ((rough - exact).abs().mean(0) <= 2 * spread).all()


def test_a_skipped_step_is_told_with_its_round_step_and_term() -> None:
    state = tiny.state()
    finished: list[Round] = []
    rounds = Rounds(graph(state, as_it_is=True), finished.append)
    assert rounds.run(lambda: False)
    rounds.drain()
    shift, parameters = state.normalize.shift.clone(), [p.detach().clone() for p in state.student.module.parameters()]
    state.normalize.shift.fill_(float("nan"))  # a replay reads it from memory
    assert rounds.run(lambda: False)
    state.normalize.shift.copy_(shift)
    with pytest.raises(NonFiniteError, match=r"round 1, generator step 0: .*not finite"):
        rounds.drain()
    assert [done.number for done in finished] == [0]
    assert all(torch.equal(a, b) for a, b in zip(parameters, state.student.module.parameters(), strict=True))


def test_losses_are_read_a_round_late_and_in_order() -> None:
    state, finished = tiny.state(), []  # type: tuple[DistillState, list[Round]]
    rounds = Rounds(EagerEngine(state), finished.append)
    for number in range(3):
        assert rounds.run(lambda: False)
        assert [done.number for done in finished] == list(range(number))
    rounds.drain()
    assert [done.number for done in finished] == state.rounds["round"] == [0, 1, 2]
    assert set(finished[0].means) == set(state.rounds) - {"round"}
    assert finished[-1].student_lr < finished[0].student_lr < 0.05
    assert rounds.images == 3 * state.steps_per_round * state.config.loop.batch_size
    assert rounds.seconds > 0


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the background, as on a GPU."""
    start = Background.__init__
    monkeypatch.setattr(background.Background, "__init__", lambda self, device: start(self, device, overlap=True))


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dfkd_fast.DistillResult:
    """Of the three ways to select a student, the one that waits for the evaluations."""
    return tiny.run(tmp_path_factory.mktemp("inline"), select="test_accuracy")


def test_work_in_the_background_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: dfkd_fast.DistillResult
) -> None:
    overlapping(monkeypatch)
    beside = tiny.run(tmp_path / "beside", select="test_accuracy")
    assert same_weights(inline.student, beside.student)
    assert inline.rounds == beside.rounds
    assert inline.epochs == beside.epochs
    files = [
        sorted(p.relative_to(made.run_dir).as_posix() for p in made.run_dir.rglob("*.p*")) for made in (inline, beside)
    ]
    assert files[0] == files[1]


def test_a_checkpoint_does_not_wait_for_an_evaluation_that_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: dfkd_fast.DistillResult
) -> None:
    """Killed while an epoch is evaluated: its checkpoint is there, and resumed the epoch is measured from it."""
    overlapping(monkeypatch)
    evaluate, calls = dfkd_fast.engine.loop.evaluate, 0
    written = tmp_path / "broken" / "checkpoints" / "round-000002-step-0000.pt"

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
            tiny.run(tmp_path / "broken", checkpoint_every=2, select="test_accuracy")
    assert list(written.parent.iterdir()) == [written]
    resumed = tiny.run(tmp_path / "broken", checkpoint_every=2, select="test_accuracy", resume=True)
    assert resumed.epochs == inline.epochs
    assert resumed.rounds == inline.rounds
    assert same_weights(resumed.student, inline.student)


def test_a_background_job_that_fails_stops_the_run() -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dfkd_fast.DistillResult
) -> None:
    monkeypatch.setitem(engines._ENGINES, "graph", graph)
    result = tiny.run(tmp_path / "graph", engine="graph")
    for term, losses in whole.rounds.items():
        torch.testing.assert_close(torch.tensor(result.rounds[term]), torch.tensor(losses), **TOLERANCE)
    for a, b in zip(whole.student.parameters(), result.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [CompiledEngine, GraphEngine])
def test_on_a_card_every_form_is_the_same_algorithm(kind: type[CompiledEngine]) -> None:
    eager, other = on_card(), on_card()
    engine = kind(other)
    with eager.runtime.backends():
        with leaves_no_trace(other):
            engine.prepare()
        traces = take(EagerEngine(eager), 3), take(engine, 3)
    assert_same_algorithm(eager, other, traces)
    assert torch.equal(eager.noise.get_state(), other.noise.get_state())


@pytest.mark.gpu
def test_on_a_card_bf16_losses_are_those_of_float32() -> None:
    exact, rough = on_card(), on_card(precision="bf16")
    curves = curve(exact, EagerEngine(exact), 4), curve(rough, create_engine(rough), 4)
    torch.testing.assert_close(curves[1], curves[0], rtol=0.1, atol=0.05)


@pytest.mark.gpu
def test_resumed_on_a_card_goes_on_with_the_same_random_stream() -> None:
    whole, broken = on_card(), on_card()
    take(create_engine(whole), 3)
    take(create_engine(broken), 1)
    fresh = on_card(seed=5)
    engine = create_engine(fresh)
    take(engine, 1)
    fresh.load_state_dict(copy.deepcopy(broken.state_dict()))
    take(engine, 2)
    assert torch.equal(whole.noise.get_state(), fresh.noise.get_state())
    for a, b in zip(whole.student.module.parameters(), fresh.student.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_says_so_and_leaves_the_card_usable() -> None:
    state = on_card()
    networks = eager_networks(state)
    student = replace(networks.student_step, student=_Reading(state.student.module))
    before = values(state)
    with pytest.raises(CaptureError, match="could not be captured into a CUDA graph"):
        GraphEngine(state, replace(networks, student_step=student)).prepare()
    assert all(torch.equal(a, b) for a, b in zip(before, state.changing(), strict=True))
    assert torch.isfinite(take(EagerEngine(state), 1)[0]).all()


@pytest.mark.gpu
def test_distill_on_a_card_evaluates_and_saves_beside_its_steps(tmp_path: Path) -> None:
    result = tiny.run(tmp_path, device="cuda", precision="bf16", select="test_accuracy")
    assert len(result.epochs["accuracy"]) == 2
    again = tiny.run(tmp_path, device="cuda", precision="bf16", select="test_accuracy", resume=True)
    assert again.epochs == result.epochs
    assert same_weights(again.student, result.student)
