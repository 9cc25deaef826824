"""Everything that a distillation run changes, built in one place and saved in one place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.config import DistillConfig, GeneratorConfig
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.graph import FeatureModel, extract
from dfkd_fast.nn import AttentionGenerator
from dfkd_fast.objectives import Objective, generator_objective, student_objective

__all__ = ["DistillState", "Position", "build_generator", "build_state"]


@dataclass
class Position:
    """What comes next: ``step`` of ``round``, both from zero, the generator's steps first."""

    round: int = 0
    step: int = 0


@dataclass(kw_only=True)
class DistillState:
    """Networks, objectives, optimisers, random streams and the place in the run.

    Attributes:
        teacher: gives logits, stage features and penultimate features.
        teacher_statistics: the same weights, which also give BatchNorm statistics; None where no term needs them.
        student: trained; shares its parameters with the network that the user gave.
        generator: noise to images in [-1, 1].
        scale, shift: images to the teacher's input, (1, 3, 1, 1) each.
        noise: the random stream of z, its own so that nothing else that is random moves it.
        student_updates: student steps taken, which is what the schedule reads.
        trace: one row a step of the present round: each term's value, then 1 where the gradient was finite.
        cursor: (1,) int64, the row of the step to come, which each step moves on. A number of the host would be
            frozen into a captured graph.
        rates: the student's rate in each row of the present round.
        student_rate: 0-dim, what the student's optimiser reads.
    """

    config: DistillConfig
    runtime: Runtime
    teacher: FeatureModel
    teacher_statistics: FeatureModel | None
    student: FeatureModel
    generator: AttentionGenerator
    generator_objective: Objective
    student_objective: Objective
    generator_optimizer: torch.optim.Optimizer
    student_optimizer: torch.optim.Optimizer
    generator_scaler: torch.amp.GradScaler
    student_scaler: torch.amp.GradScaler
    scale: Tensor
    shift: Tensor
    noise: torch.Generator
    trace: Tensor
    cursor: Tensor
    rates: Tensor
    student_rate: Tensor
    student_updates: int = 0
    position: Position = field(default_factory=Position)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    epochs: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    @property
    def total_rounds(self) -> int:
        return self.config.loop.epochs * self.config.loop.rounds_per_epoch

    @property
    def steps_per_round(self) -> int:
        return self.config.loop.generator_steps + self.config.loop.student_steps

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise z ~ N(0, 1), (count, latent_dim), from the run's own stream unless another is given."""
        return torch.randn(
            count, self.generator.latent_dim, device=self.runtime.device, generator=generator or self.noise
        )

    def student_lr(self, ahead: int = 0) -> float:
        """The student's rate for its next step: a function of the steps taken, so nothing else has to be saved.

        Args:
            ahead: steps after the next one.
        """
        optimizer, loop = self.config.optimizer, self.config.loop
        if optimizer.student_schedule == "constant":
            return optimizer.student_lr
        total = max(1, loop.epochs * loop.rounds_per_epoch * loop.student_steps)
        return optimizer.student_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (self.student_updates + ahead) / total)))

    def start_round(self) -> None:
        """Tell the device where in the round the run is, and the student's rates from there on.

        Without waiting for it: all comes from pinned memory or as a kernel's argument.
        """
        first = max(self.position.step, self.config.loop.generator_steps)
        rates = [self.student_lr(max(0, row - first)) for row in range(len(self.rates))]
        pinned = self.runtime.device.type == "cuda"
        self.rates.copy_(torch.tensor(rates, dtype=torch.float32, pin_memory=pinned), non_blocking=True)
        self.cursor.fill_(self.position.step)

    def changing(self) -> Iterator[Tensor]:
        """Every tensor that a step may write to, each once."""
        seen: set[int] = set()
        modules = (self.student, self.generator, self.generator_objective, self.student_objective)
        optimizers = (self.generator_optimizer, self.student_optimizer)
        candidates = [
            *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers())),
            *(
                value
                for optimizer in optimizers
                for state in optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ),
            *(self.trace, self.cursor, self.rates, self.student_rate),
        ]
        for tensor in candidates:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Whatever steps are taken inside leave no trace: tensors keep their addresses and get their values back.

        Random streams are put back too, this run's own and torch's global ones.
        """
        tensors = list(self.changing())
        values = [tensor.detach().clone() for tensor in tensors]
        scalers = [(scaler, scaler.state_dict()) for scaler in (self.generator_scaler, self.student_scaler)]
        noise = self.noise.get_state()
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor, value in zip(tensors, values, strict=True):
                        tensor.copy_(value)
                for scaler, saved in scalers:
                    if saved:
                        scaler.load_state_dict(saved)
                self.noise.set_state(noise)

    def _parts(self) -> dict[str, Any]:
        return {
            "student": self.student.model,
            "generator": self.generator,
            "generator_objective": self.generator_objective,
            "student_objective": self.student_objective,
            "generator_optimizer": self.generator_optimizer,
            "student_optimizer": self.student_optimizer,
            "generator_scaler": self.generator_scaler,
            "student_scaler": self.student_scaler,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on as if it had never stopped: tensors, numbers, and containers of them."""
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "noise": self.noise.get_state(),
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "student_updates": self.student_updates,
            "position": [self.position.round, self.position.step],
            "trace": self.trace.cpu(),
            "rounds": {name: list(values) for name, values in self.rounds.items()},
            "epochs": {name: list(values) for name, values in self.epochs.items()},
            "best": dict(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`. The networks must have been built from the same config.

        Tensors are written to where they are, since a captured graph knows their addresses alone.
        """
        for name, part in self._parts().items():
            if isinstance(part, torch.optim.Optimizer):
                _load_optimizer(part, state[name])
            else:
                part.load_state_dict(state[name])
        self.noise.set_state(state["noise"])
        torch.set_rng_state(state["rng_cpu"])
        if torch.cuda.is_available() and len(state["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        self.student_updates = state["student_updates"]
        self.position = Position(*state["position"])
        self.trace.copy_(state["trace"])
        self.rounds = {name: list(values) for name, values in state["rounds"].items()}
        self.epochs = {name: list(values) for name, values in state["epochs"].items()}
        self.best = dict(state["best"])
        self.start_round()

    def teacher_digest(self) -> str:
        """A hash of the teacher's weights: a checkpoint belongs to one teacher."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.teacher.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def build_generator(config: GeneratorConfig, image_size: int) -> AttentionGenerator:
    """The generator that a config describes."""
    return AttentionGenerator(
        image_size,
        latent_dim=config.latent_dim,
        channels=config.channels,
        batch_norm=config.batch_norm,
        spectral_norm=config.spectral_norm,
        attention=config.attention,
        attention_scale=config.attention_scale,
        attention_reduction=config.attention_reduction,
    )


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """In place. Rates and other numbers are the config's, which a checkpoint must share."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state[parameter].items():
            value.copy_(saved["state"][number][name])


def _adam(parameters: list[nn.Parameter], config: DistillConfig, rate: Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=config.optimizer.generator_betas, fused=True)
    for parameter in parameters:
        # What Adam makes in its first step: made here, a graph can be captured before that.
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _sgd(parameters: list[nn.Parameter], config: DistillConfig, rate: Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(
        parameters,
        lr=rate,
        momentum=config.optimizer.student_momentum,
        weight_decay=config.optimizer.student_weight_decay,
        fused=True,
    )
    if config.optimizer.student_momentum:
        # Fused SGD leaves a new momentum buffer uninitialised where its first step is skipped (found_inf); a buffer of
        # zeros makes the first step the same and the skip safe.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_state(
    teacher: FeatureModel,
    student: FeatureModel,
    config: DistillConfig,
    runtime: Runtime,
    *,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> DistillState:
    """Put a run together. Seeds torch's global stream with ``config.seed``.

    Raises:
        ValueError: networks that do not fit each other or the objective.
    """
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            f"teacher and student must tell the same classes apart, got {teacher.num_classes} and {student.num_classes}"
        )
    torch.manual_seed(config.seed)
    # Weights are drawn on the CPU, so that a seed means the same run on every device.
    generator = build_generator(config.generator, image_size)
    objectives = [build(config.objective, teacher, student) for build in (generator_objective, student_objective)]
    for module in (teacher, student, generator, *objectives):
        runtime.place(module)
    with_statistics = None
    if "statistics" in objectives[0].needs:
        with_statistics = extract(teacher.model, stages=teacher.stages, statistics=True, image_size=image_size)
    trained = [*student.model.parameters(), *(p for p in objectives[1].parameters() if p.requires_grad)]
    width = max(len(objective.names) for objective in objectives) + 1
    steps = config.loop.generator_steps + config.loop.student_steps

    def affine(values: list[float]) -> Tensor:
        return torch.tensor(values, device=runtime.device).view(1, 3, 1, 1)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler(runtime.device.type, enabled=runtime.autocast is torch.float16)

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=runtime.device)

    student_rate = scalar(config.optimizer.student_lr)
    state = DistillState(
        config=config,
        runtime=runtime,
        teacher=teacher,
        teacher_statistics=with_statistics,
        student=student,
        generator=generator,
        generator_objective=objectives[0],
        student_objective=objectives[1],
        generator_optimizer=_adam(list(generator.parameters()), config, scalar(config.optimizer.generator_lr)),
        student_optimizer=_sgd(trained, config, student_rate),
        generator_scaler=scaler(),
        student_scaler=scaler(),
        # (x / 2 + 1 / 2 - mean) / std as one multiplication and one addition
        scale=affine([0.5 / s for s in std]),
        shift=affine([(0.5 - m) / s for m, s in zip(mean, std, strict=True)]),
        noise=torch.Generator(device=runtime.device).manual_seed(config.seed),
        trace=torch.zeros(steps, width, device=runtime.device),
        cursor=torch.zeros(1, dtype=torch.int64, device=runtime.device),
        rates=torch.zeros(steps, device=runtime.device),
        student_rate=student_rate,
    )
    state.start_round()
    return state
