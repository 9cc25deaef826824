"""Engines: the networks that a step calls, and an executor that runs, or captures and replays, the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.config import EngineName
from dfkd_fast.engine.capture import CudaRecorder, Recorder
from dfkd_fast.engine.networks import Networks, compiled_networks, eager_networks
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.engine.state import DistillState
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.nvtx import nvtx_range

__all__ = [
    "CompiledEngine",
    "EagerEngine",
    "EagerExecutor",
    "Engine",
    "GraphEngine",
    "GraphExecutor",
    "create_engine",
    "resolve_engine",
]

log = logging.getLogger(__name__)

Kind = Literal["generator", "student"]

_WARM_UPS = 3  # steps of each kind before the capture: libraries choose algorithms, allocators find their sizes


class Engine:
    """Takes the steps of a run.

    Args:
        name: of the engine.
        state: what is trained.
        networks: what the steps call, or how to build it from the state.
        executor: runs the work of a step, or replays it.
    """

    def __init__(
        self,
        name: EngineName,
        state: DistillState,
        networks: Networks | Callable[[DistillState], Networks],
        executor: EagerExecutor | GraphExecutor,
    ) -> None:
        self.name, self.state, self.executor = name, state, executor
        self._build = (lambda _: networks) if isinstance(networks, Networks) else networks
        self.build_networks()

    def build_networks(self) -> None:
        """Build ``networks`` from the state as it is now; networks that were given stay."""
        self.networks = self._build(self.state)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of step in a round."""
        loop = self.state.config.loop
        counts: dict[Kind, int] = {"generator": loop.generator_steps, "student": loop.student_steps}
        return [kind for kind, count in counts.items() if count]

    def prepare(self) -> None:
        """Compile and capture before the first step; the state is unchanged afterwards."""
        self.executor.prepare(self)

    def start_round(self) -> None:
        """Begin or continue the round of ``state.position``."""
        self.executor.start_round(self)
        self.state.start_round()

    def generator_step(self) -> None:
        """One generator step, queued on the device."""
        with nvtx_range("step", "generator"):
            self.executor.execute(self, "generator")
        self.state.position.step += 1

    def student_step(self) -> None:
        """One student step, queued on the device."""
        with nvtx_range("step", "student"):
            self.executor.execute(self, "student")
        self.state.position.step += 1
        self.state.student_updates += 1

    def step(self) -> None:
        """The next step of the round: the generator's come first."""
        first = self.state.position.step < self.state.config.loop.generator_steps
        (self.generator_step if first else self.student_step)()

    def run(self, kind: Kind) -> None:
        """The device work of a step."""
        if kind == "generator":
            generator_step(self.state, self.networks.generator_step)
        else:
            student_step(self.state, self.networks.student_step)

    def rehearse(self, kind: Kind) -> None:
        """The same work on the first row of the trace: at the end of a round no row is left."""
        self.state.cursor.zero_()
        self.run(kind)


class EagerExecutor:
    """Runs the steps.

    Args:
        rehearse: take a step of each kind in :meth:`prepare`, so that torch.compile compiles the networks there.
    """

    def __init__(self, *, rehearse: bool = False) -> None:
        self.rehearse = rehearse

    def prepare(self, engine: Engine) -> None:
        if self.rehearse:
            start = time.perf_counter()
            with engine.state.preserve_state():
                for kind in engine.kinds:
                    engine.rehearse(kind)
            engine.state.runtime.synchronize()
            log.info("compiled in %.1f s", time.perf_counter() - start)

    def start_round(self, engine: Engine) -> None:
        pass

    def execute(self, engine: Engine, kind: Kind) -> None:
        engine.run(kind)


class GraphExecutor:
    """Captures whole steps - forward, backward, optimizer - and replays them, one launch per step.

    A graph holds shapes, precision and the addresses of the state's tensors. They are compared at the start of each
    round; if any changed, the steps are captured again. A learning rate that is written in place, as a scheduler does,
    takes effect in the next replay; one that is replaced by another tensor or a number, in the next round.

    Args:
        recorder: how steps are captured.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._replays: dict[Kind, Callable[[], None]] = {}
        self._captured: dict[str, Any] = {}

    def prepare(self, engine: Engine) -> None:
        start, state = time.perf_counter(), engine.state
        self._replays = {}
        with state.preserve_state():
            for kind in engine.kinds:
                for _ in range(_WARM_UPS):
                    self.recorder.warm_up(partial(engine.rehearse, kind))
            state.runtime.synchronize()
            log.info("compiled and warmed up in %.1f s", time.perf_counter() - start)
            with _capturable(state):
                for kind in engine.kinds:
                    state.cursor.zero_()
                    self._replays[kind] = self.recorder.record(partial(engine.run, kind))
        state.runtime.synchronize()
        self._captured = _captured_values(state)
        log.info("captured %d graphs; ready after %.1f s", len(self._replays), time.perf_counter() - start)

    def start_round(self, engine: Engine) -> None:
        now = _captured_values(engine.state)
        changed = [name for name, value in now.items() if self._captured and self._captured[name] != value]
        if changed:
            log.warning("capturing again: %s changed", ", ".join(changed))
            engine.build_networks()
        if changed or not self._replays:
            self.prepare(engine)

    def execute(self, engine: Engine, kind: Kind) -> None:
        if not self._replays:
            self.prepare(engine)
        self._replays[kind]()


@contextmanager
def _capturable(state: DistillState) -> Iterator[None]:
    """Adam refuses capture without this flag. Fused Adam computes the same with and without it."""
    groups = [group for group in state.generator.optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _captured_values(state: DistillState) -> dict[str, Any]:
    """The values that a captured step holds, by the names that a recapture is logged with."""
    loop, runtime, sides = state.config.loop, state.runtime, state.sides.values()
    groups = [group for side in sides for group in side.optimizer.param_groups]
    networks = [network for side in sides for network in (side.module, side.objective)]
    return {
        "batch size": loop.batch_size,
        "noise": state.generator.module.latent_dim,
        "steps a round": (loop.generator_steps, loop.student_steps),
        "student_in_generator_step": loop.student_in_generator_step,
        "precision": (runtime.autocast, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "optimisers": [{n: v for n, v in g.items() if n not in ("params", "lr", "capturable")} for g in groups],
        # A replay reads a tensor from its address; a number is part of the graph.
        "learning rates": [
            (lr.data_ptr(), lr.dtype) if isinstance(lr, Tensor) else lr for lr in (group["lr"] for group in groups)
        ],
        "loss weights": [dict(side.objective.weights) for side in sides],
        "training mode": [module.training for network in networks for module in network.modules()],
        "which weights are trained": [p.requires_grad for network in networks for p in network.parameters()],
        "tensors of the state": [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in state.changing()],
    }


class EagerEngine(Engine):
    """The eager executor over the state's own networks, or over those given."""

    def __init__(self, state: DistillState, networks: Networks | None = None) -> None:
        super().__init__("eager", state, networks or eager_networks, EagerExecutor())


class CompiledEngine(Engine):
    """The eager executor over networks that torch.compile compiles, each as a separate region.

    Args:
        state: what is trained.
        networks: what the steps call; None is :func:`dfkd_fast.engine.networks.compiled_networks`.
        backend: of torch.compile.
    """

    def __init__(self, state: DistillState, networks: Networks | None = None, *, backend: str = "inductor") -> None:
        build = networks or partial(compiled_networks, backend=backend)
        super().__init__("compiled", state, build, EagerExecutor(rehearse=True))


class GraphEngine(Engine):
    """The graph executor over compiled networks.

    Args:
        state: what is trained.
        networks: what the steps call; None is :func:`dfkd_fast.engine.networks.compiled_networks`.
        backend: of torch.compile.
        recorder: how steps are captured; None is into CUDA graphs.

    Raises:
        ValueError: a device other than CUDA without a recorder, fp16, or a BatchNorm with ``momentum=None``.
    """

    def __init__(
        self,
        state: DistillState,
        networks: Networks | None = None,
        *,
        backend: str = "inductor",
        recorder: Recorder | None = None,
    ) -> None:
        if recorder is None:
            if state.runtime.device.type != "cuda":
                raise ValueError(f"engine 'graph' needs a CUDA device, got {str(state.runtime.device)!r}")
            recorder = CudaRecorder(state.runtime.device, [state.noise])
        if state.generator.scaler.is_enabled():
            raise ValueError("engine 'graph' has no loss scaling, which fp16 needs: choose bf16, or engine 'compiled'")
        for name, side in state.sides.items():
            for path, module in side.module.named_modules():
                if isinstance(module, _BatchNorm) and module.track_running_stats and module.momentum is None:
                    raise ValueError(
                        f"engine 'graph' cannot run {path} of the {name}: with momentum=None a BatchNorm reads its "
                        "count of batches back to the host. Set a momentum, or choose engine 'compiled'"
                    )
        build = networks or partial(compiled_networks, backend=backend)
        super().__init__("graph", state, build, GraphExecutor(recorder))


_ENGINES: dict[str, Callable[[DistillState], Engine]] = {
    "eager": EagerEngine,
    "compiled": CompiledEngine,
    "graph": GraphEngine,
}


def resolve_engine(name: EngineName, runtime: Runtime) -> EngineName:
    """The engine that ``auto`` stands for on a device: graph on CUDA (compiled in fp16), eager elsewhere.

    Eager on the CPU, since torch.compile needs a C++ compiler there, and minutes.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        if runtime.device.type != "cuda":
            return "eager"
        return "compiled" if runtime.autocast is torch.float16 else "graph"
    if name not in _ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(_ENGINES)}, got {name!r}")
    return name


def create_engine(state: DistillState) -> Engine:
    """The engine that the run's config names; call ``prepare`` before its first step.

    Raises:
        ValueError: an engine that does not exist, or that cannot run this state.
    """
    return _ENGINES[resolve_engine(state.config.engine, state.runtime)](state)
