"""Engines combine the networks that a step calls with an executor that runs or replays the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.config import EngineName
from dfkd_fast.engine.capture import CudaRecorder
from dfkd_fast.engine.networks import Networks, compiled_networks, optimized_networks
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
Step = tuple[Kind, int]

_WARM_UPS = 3  # steps of each kind before the capture. Libraries choose algorithms and allocate workspaces in them.


class Engine:
    """Runs the generator and student steps of a distillation run.

    Args:
        name: "eager", "compiled" or "graph".
        state: the state to train.
        networks: the networks that the steps call, or a function that builds them from the state.
        executor: runs or replays a step.
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
        """Rebuild ``networks`` from the current state. Networks that were passed in are kept."""
        self.networks = self._build(self.state)

    @property
    def steps(self) -> list[Step]:
        """The different steps of a round: their kind and the stage of the synthesis."""
        loop = self.state.config.loop
        generator: list[Step] = [("generator", stage) for stage in range(self.state.synthesizer.stages)]
        return [*(generator if loop.generator_steps else ()), *([("student", 0)] if loop.student_steps else ())]

    def prepare(self) -> None:
        """Compile and capture the steps. The state does not change.

        Raises:
            CaptureError: the graph engine cannot capture a step.
        """
        self._start_synthesizer()
        self.executor.prepare(self)

    def start_round(self) -> None:
        """Start or continue the round at ``state.position``."""
        self._start_synthesizer()
        self.executor.start_round(self)
        self.state.start_round()

    def _start_synthesizer(self) -> None:
        self.state.synthesizer.start_round(self.state.generator.objective.weights, self.state.position.round)

    def _take(self, kind: Kind) -> None:
        with nvtx_range("step", kind):
            self.executor.execute(self, (kind, self.state.synthesizer.stage if kind == "generator" else 0))
        self.state.position.step += 1

    def generator_step(self) -> None:
        """Queue one generator step on the device, and the start or end of its synthesis."""
        self.state.start_synthesis()
        self._take("generator")
        self.state.finish_synthesis()

    def student_step(self) -> None:
        """Queue one student step on the device."""
        self._take("student")
        self.state.student_updates += 1

    def step(self) -> None:
        """Queue the next step of the round. Generator steps come first."""
        first = self.state.position.step < self.state.config.loop.generator_steps
        (self.generator_step if first else self.student_step)()

    def run(self, kind: Kind, stage: int) -> None:
        """Run the device work of one step."""
        if kind == "generator":
            self.state.synthesizer.stage = stage
            generator_step(self.state, self.networks.generator_step)
        else:
            student_step(self.state, self.networks.student_step)

    def warm_up_step(self, kind: Kind, stage: int) -> None:
        """Run one step to warm up.

        Write its losses to the first row of ``state.trace``, because a resumed round may have no row left.
        """
        self.state.cursor.zero_()
        self.run(kind, stage)


class EagerExecutor:
    """Runs steps directly.

    Args:
        warm_up: run each of the different steps in :meth:`prepare`, so that torch.compile compiles the networks there.
    """

    def __init__(self, *, warm_up: bool = False) -> None:
        self.warm_up = warm_up

    def prepare(self, engine: Engine) -> None:
        if self.warm_up:
            start = time.perf_counter()
            with engine.state.preserve_state():
                for step in engine.steps:
                    engine.warm_up_step(*step)
            engine.state.runtime.synchronize()
            log.info("compiled in %.1f s", time.perf_counter() - start)

    def start_round(self, engine: Engine) -> None:
        pass

    def execute(self, engine: Engine, step: Step) -> None:
        engine.run(*step)


class GraphExecutor:
    """Captures whole steps (forward, backward and optimizer) and replays them with one launch per step.

    A graph depends on shapes, precision, the addresses of the state's tensors and a few options. If any of them has
    changed at the start of a round, the steps are captured again. If a learning rate is changed in place, as schedulers
    do, the next replay uses the new value. If another tensor or a number replaces it, the next round uses that one.

    Args:
        recorder: captures the steps.
    """

    def __init__(self, recorder: CudaRecorder) -> None:
        self.recorder = recorder
        self._replays: dict[Step, Callable[[], None]] = {}
        self._captured: dict[str, Any] = {}

    def prepare(self, engine: Engine) -> None:
        start, state = time.perf_counter(), engine.state
        self._replays = {}
        with state.preserve_state():
            for step in engine.steps:
                for _ in range(_WARM_UPS):
                    self.recorder.warm_up(partial(engine.warm_up_step, *step))
            state.runtime.synchronize()
            log.info("compiled and warmed up in %.1f s", time.perf_counter() - start)
            # Without this flag, Adam refuses to be captured. The flag does not change what fused Adam computes.
            groups = [group for group in state.generator.optimizer.param_groups if "capturable" in group]
            try:
                for group in groups:
                    group["capturable"] = True
                for step in engine.steps:
                    state.cursor.zero_()
                    self._replays[step] = self.recorder.record(partial(engine.run, *step))
            finally:
                for group in groups:
                    group["capturable"] = False
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

    def execute(self, engine: Engine, step: Step) -> None:
        if not self._replays:
            self.prepare(engine)
        self._replays[step]()


def _captured_values(state: DistillState) -> dict[str, Any]:
    """Return the values that a captured step depends on, keyed by their names in log messages."""
    loop, runtime, sides = state.config.loop, state.runtime, state.sides.values()
    groups = [group for side in sides for group in side.optimizer.param_groups]
    networks = [network for side in sides for network in (side.module, side.objective)]
    return {
        "batch size": loop.batch_size,
        "noise": getattr(state.generator.module, "latent_dim", None),
        "steps per round": (loop.generator_steps, loop.student_steps),
        "student_in_generator_step": loop.student_in_generator_step,
        "precision": (runtime.autocast, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "optimizers": [{n: v for n, v in g.items() if n not in ("params", "lr", "capturable")} for g in groups],
        # A replay reads a tensor from its address, but a number is a constant of the graph.
        "learning rates": [
            (lr.data_ptr(), lr.dtype) if isinstance(lr, Tensor) else lr for lr in (group["lr"] for group in groups)
        ],
        "loss weights": [dict(side.objective.weights) for side in sides],
        "training mode": [module.training for network in networks for module in network.modules()],
        "trained weights": [p.requires_grad for network in networks for p in network.parameters()],
        "state tensors": [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in state.mutable_tensors()],
    }


class EagerEngine(Engine):
    """Runs networks without compilation.

    Args:
        state: the state to train.
        networks: the networks that the steps call; None uses :func:`dfkd_fast.engine.networks.optimized_networks`.
    """

    def __init__(self, state: DistillState, networks: Networks | None = None) -> None:
        super().__init__("eager", state, networks or optimized_networks, EagerExecutor())


class CompiledEngine(Engine):
    """Runs networks that torch.compile compiles, each as a separate region.

    Args:
        state: the state to train.
        networks: the networks that the steps call; None uses :func:`dfkd_fast.engine.networks.compiled_networks`.
        backend: backend of torch.compile.
    """

    def __init__(self, state: DistillState, networks: Networks | None = None, *, backend: str = "inductor") -> None:
        build = networks or partial(compiled_networks, backend=backend)
        super().__init__("compiled", state, build, EagerExecutor(warm_up=True))


class GraphEngine(Engine):
    """Captures steps over compiled networks and replays them.

    Args:
        state: the state to train.
        networks: the networks that the steps call; None uses :func:`dfkd_fast.engine.networks.compiled_networks`.
        backend: backend of torch.compile.
        recorder: captures the steps; None captures CUDA graphs.

    Raises:
        ValueError: the device is not CUDA and there is no recorder, the precision is fp16, or a BatchNorm has
            ``momentum=None``.
    """

    def __init__(
        self,
        state: DistillState,
        networks: Networks | None = None,
        *,
        backend: str = "inductor",
        recorder: CudaRecorder | None = None,
    ) -> None:
        if recorder is None:
            if state.runtime.device.type != "cuda":
                raise ValueError(f"engine 'graph' needs a CUDA device, got {str(state.runtime.device)!r}")
            recorder = CudaRecorder(state.runtime.device, [state.noise])
        if state.generator.scaler.is_enabled():
            raise ValueError("engine 'graph' does not support the loss scaling of fp16: use bf16, or engine 'compiled'")
        for name, side in state.sides.items():
            for path, module in side.module.named_modules():
                if isinstance(module, _BatchNorm) and module.track_running_stats and module.momentum is None:
                    raise ValueError(
                        f"engine 'graph' cannot run {path} of the {name}: a BatchNorm with momentum=None reads its "
                        "batch count back to the host. Set a momentum, or use engine 'compiled'"
                    )
        build = networks or partial(compiled_networks, backend=backend)
        super().__init__("graph", state, build, GraphExecutor(recorder))


_ENGINES: dict[str, Callable[[DistillState], Engine]] = {
    "eager": EagerEngine,
    "compiled": CompiledEngine,
    "graph": GraphEngine,
}


def resolve_engine(name: EngineName, runtime: Runtime) -> EngineName:
    """Resolve ``auto`` for a device: ``graph`` on CUDA (``compiled`` in fp16) and ``eager`` elsewhere.

    On the CPU, torch.compile needs a C++ compiler and takes minutes.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "auto":
        if runtime.device.type != "cuda":
            return "eager"
        return "compiled" if runtime.autocast is torch.float16 else "graph"
    if name not in _ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(_ENGINES)}, got {name!r}")
    return name


def create_engine(state: DistillState) -> Engine:
    """Create the engine that the state's config names. Call its ``prepare`` before the first step.

    Raises:
        ValueError: the engine does not exist or cannot run this state.
    """
    return _ENGINES[resolve_engine(state.config.engine, state.runtime)](state)
