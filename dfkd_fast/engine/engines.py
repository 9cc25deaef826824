"""The three ways to execute the same steps: eager, compiled, captured into CUDA graphs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.config import EngineName
from dfkd_fast.engine.capture import CudaRecorder, Recorder
from dfkd_fast.engine.networks import Networks, plain, ready
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.engine.state import DistillState
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.nvtx import nvtx_range

__all__ = ["CompiledEngine", "EagerEngine", "Engine", "GraphEngine", "create_engine", "resolve_engine"]

log = logging.getLogger(__name__)

Kind = Literal["generator", "student"]

_WARM_UPS = 3  # of each step before its capture: libraries choose their algorithms, allocators find their sizes


class EagerEngine:
    """Steps as they are written.

    Args:
        state: what is trained.
        networks: what the steps call; None is what suits the engine.

    Attributes:
        state: what is trained.
        networks: what the steps call.
    """

    name: ClassVar[EngineName] = "eager"

    def __init__(self, state: DistillState, networks: Networks | None = None) -> None:
        self.state = state
        self.networks = networks or self._networks()

    def _networks(self) -> Networks:
        return plain(self.state)

    def prepare(self) -> None:
        """Whatever has to happen once, before the first step; the state is as it was afterwards."""

    def start_round(self) -> None:
        """Begin, or go on with, the round that ``state.position`` is in."""
        self.state.start_round()

    def generator_step(self) -> None:
        """One generator step, queued on the device."""
        with nvtx_range("step", "generator"):
            self._execute("generator")
        self.state.position.step += 1

    def student_step(self) -> None:
        """One student step, queued on the device."""
        with nvtx_range("step", "student"):
            self._execute("student")
        self.state.position.step += 1
        self.state.student_updates += 1

    def step(self) -> None:
        """The step that is next in the round: the generator's come first."""
        first = self.state.position.step < self.state.config.loop.generator_steps
        (self.generator_step if first else self.student_step)()

    def _execute(self, kind: Kind) -> None:
        self._work(kind)

    def _work(self, kind: Kind) -> None:
        """A step's device work."""
        if kind == "generator":
            generator_step(self.state, self.networks.generator_step)
        else:
            student_step(self.state, self.networks.student_step)

    def _rehearse(self, kind: Kind) -> None:
        """The same work, of the round's first row: where the run stands, there may be no row left."""
        self.state.cursor.zero_()
        self._work(kind)

    def _kinds(self) -> list[Kind]:
        """The kinds of step that a round has."""
        loop = self.state.config.loop
        kinds: list[tuple[Kind, int]] = [("generator", loop.generator_steps), ("student", loop.student_steps)]
        return [kind for kind, count in kinds if count]


Engine = EagerEngine
"""Any of the engines: they are used alike."""


class CompiledEngine(EagerEngine):
    """Networks and objectives through torch.compile, each a region of its own; the frozen teacher made ready.

    Args:
        state: what is trained.
        networks: what the steps call; None compiles those that are made ready.
        backend: of torch.compile.
    """

    name: ClassVar[EngineName] = "compiled"

    def __init__(self, state: DistillState, networks: Networks | None = None, *, backend: str = "inductor") -> None:
        self._backend = backend
        super().__init__(state, networks)

    def _networks(self) -> Networks:
        # Dropout then draws the same numbers as in eager mode.
        options: dict[str, Any] = {"fallback_random": True}
        if self.state.config.autotune:
            options["max_autotune"] = True
        given: dict[str, Any] = {"options": options} if self._backend == "inductor" else {}
        return ready(self.state).compiled(backend=self._backend, **given).ranged()

    def prepare(self) -> None:
        start = time.perf_counter()
        with self.state.undisturbed():
            for kind in self._kinds():
                self._rehearse(kind)
        self.state.runtime.synchronize()
        log.info("compiled in %.1f s", time.perf_counter() - start)


class GraphEngine(CompiledEngine):
    """A whole compiled step - forward, backward, optimiser - as one graph, replayed.

    A step then costs the host one launch. What a graph has frozen (shapes, precision, the addresses of the state's
    tensors) is compared at the start of each round; where it changed, the steps are captured again. A learning rate
    that is written in place, as a scheduler does, takes effect in the next replay; one that is replaced by another
    tensor or a number takes effect from the next round on.

    Args:
        state: what is trained.
        networks: what the steps call; None compiles those that are made ready.
        backend: of torch.compile.
        recorder: how steps are recorded; None is into CUDA graphs.

    Raises:
        ValueError: another device than a CUDA one without a recorder of its own, fp16, or a network that counts on the
            host.
    """

    name: ClassVar[EngineName] = "graph"

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
        if state.generator_scaler.is_enabled():
            raise ValueError("engine 'graph' has no loss scaling, which fp16 needs: choose bf16, or engine 'compiled'")
        _refuse_host_counts(state)
        super().__init__(state, networks, backend=backend)
        self._own_networks = networks is None
        self._recorder = recorder
        self._replays: dict[Kind, Callable[[], None]] = {}
        self._frozen: dict[str, Any] = {}

    def prepare(self) -> None:
        start, state = time.perf_counter(), self.state
        self._replays = {}
        with state.undisturbed():
            for kind in self._kinds():
                for _ in range(_WARM_UPS):
                    self._recorder.warm_up(partial(self._rehearse, kind))
            state.runtime.synchronize()
            log.info("compiled and warmed up in %.1f s", time.perf_counter() - start)
            with _capturable(state):
                for kind in self._kinds():
                    state.cursor.zero_()
                    self._replays[kind] = self._recorder.record(partial(self._work, kind))
        state.runtime.synchronize()
        self._frozen = _frozen_values(state)
        log.info("captured %d graphs; ready after %.1f s", len(self._replays), time.perf_counter() - start)

    def start_round(self) -> None:
        now = _frozen_values(self.state)
        changed = [name for name, value in now.items() if self._frozen and self._frozen[name] != value]
        if changed:
            log.warning("capturing again: %s changed", ", ".join(changed))
            if self._own_networks:
                self.networks = self._networks()
        if changed or not self._replays:
            self.prepare()
        super().start_round()

    def _execute(self, kind: Kind) -> None:
        if not self._replays:
            self.prepare()
        self._replays[kind]()


def _refuse_host_counts(state: DistillState) -> None:
    for side, network in (("student", state.student), ("generator", state.generator)):
        for path, module in network.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats and module.momentum is None:
                raise ValueError(
                    f"engine 'graph' cannot run {path} of the {side}: with momentum=None a BatchNorm reads its count "
                    "of batches back to the host. Set a momentum, or choose engine 'compiled'"
                )


@contextmanager
def _capturable(state: DistillState) -> Iterator[None]:
    """Adam refuses to be captured unless it is told to allow it. Fused, it does the same either way."""
    groups = [group for group in state.generator_optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _frozen_values(state: DistillState) -> dict[str, Any]:
    """What a captured step holds fast, by what a user would call it."""
    loop, runtime = state.config.loop, state.runtime
    groups = [*state.generator_optimizer.param_groups, *state.student_optimizer.param_groups]
    networks = (state.student, state.generator, state.generator_objective, state.student_objective)
    modules = [module for network in networks for module in network.modules()]
    return {
        "batch size": loop.batch_size,
        "noise": state.generator.latent_dim,
        "steps a round": (loop.generator_steps, loop.student_steps),
        "student_in_generator_step": loop.student_in_generator_step,
        "precision": (runtime.autocast, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "optimisers": [{n: v for n, v in g.items() if n not in ("params", "lr", "capturable")} for g in groups],
        # A rate that is a tensor is read at each replay, from its address; a number is part of the graph.
        "learning rates": [
            (lr.data_ptr(), lr.dtype) if isinstance(lr, Tensor) else lr for lr in (group["lr"] for group in groups)
        ],
        "loss weights": (dict(state.generator_objective.weights), dict(state.student_objective.weights)),
        "training mode": [module.training for module in modules],
        "which weights are trained": [p.requires_grad for network in networks for p in network.parameters()],
        "tensors of the state": [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in state.changing()],
    }


_ENGINES: dict[str, type[EagerEngine]] = {engine.name: engine for engine in (EagerEngine, CompiledEngine, GraphEngine)}


def resolve_engine(name: EngineName, runtime: Runtime) -> EngineName:
    """The engine that ``auto`` means on a device: a CUDA graph, which fp16's loss scaling has none of, or eager.

    Eager on the CPU: torch.compile needs a C++ compiler there, and minutes.

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
    """The engine that the run's config asks for, to be prepared before its first step.

    Raises:
        ValueError: an engine that does not exist, or that cannot run this state.
    """
    return _ENGINES[resolve_engine(state.config.engine, state.runtime)](state)
