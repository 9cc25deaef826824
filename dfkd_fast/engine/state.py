"""The state of a distillation run: everything that its steps change, built and saved in one place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dfkd_fast.config import DistillConfig, GeneratorConfig
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.graph import FeatureModel, extract
from dfkd_fast.nn import AttentionGenerator
from dfkd_fast.objectives import Objective, generator_objective, student_objective

__all__ = ["DistillState", "Normalize", "Position", "Side", "build_generator", "build_state"]

M = TypeVar("M", bound=nn.Module)


@dataclass
class Position:
    """The next step: ``step`` of ``round``, both from zero. The generator's steps come first in a round."""

    round: int = 0
    step: int = 0


@dataclass(kw_only=True)
class Side(Generic[M]):
    """A network that is trained, with what trains it.

    Attributes:
        module: the network.
        objective: its loss. The student's has parameters (adapters, attention, heads), which are trained with it.
        optimizer: updates the parameters of both.
        scaler: loss scaling in fp16; disabled in other precisions.
    """

    module: M
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass(frozen=True)
class Normalize:
    """Images in [-1, 1], (N, 3, H, W), to the teacher's input in float32: ``((x + 1) / 2 - mean) / std``.

    One multiplication and one addition, by ``scale`` and ``shift``, (1, 3, 1, 1) each.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Normalize:
        """From the mean and standard deviation of images in [0, 1], one value per channel."""
        values = [0.5 / s for s in std], [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
        return cls(*(torch.tensor(each, device=device).view(1, 3, 1, 1) for each in values))

    def __call__(self, images: Tensor) -> Tensor:
        return images.float() * self.scale + self.shift


@dataclass(kw_only=True)
class DistillState:
    """Networks, objectives, optimizers, random streams and the position in the run.

    Attributes:
        teacher: gives logits, stage features and penultimate features.
        teacher_statistics: the same weights with BatchNorm statistics as outputs; None if no term needs them.
        generator: noise to images in [-1, 1].
        student: shares its parameters with the network that the user gave.
        normalize: images in [-1, 1] to the teacher's input.
        noise: the random stream of z. Nothing else draws from it.
        student_updates: number of student steps taken; the learning rate schedule is a function of it.
        trace: one row per step of the current round: the value of each term, then 1 if the gradient was finite.
        cursor: (1,) int64, the row of the next step; each step advances it on the device. A captured graph would
            hold a Python number as a constant.
        rates: the student's learning rate in each row of the current round.
        student_rate: 0-dim, the learning rate tensor of the student's optimizer.
    """

    config: DistillConfig
    runtime: Runtime
    teacher: FeatureModel
    teacher_statistics: FeatureModel | None
    generator: Side[AttentionGenerator]
    student: Side[FeatureModel]
    normalize: Normalize
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
    def sides(self) -> dict[str, Side[Any]]:
        """Generator and student, by name."""
        return {"generator": self.generator, "student": self.student}

    @property
    def total_rounds(self) -> int:
        return self.config.loop.epochs * self.config.loop.rounds_per_epoch

    @property
    def steps_per_round(self) -> int:
        return self.config.loop.generator_steps + self.config.loop.student_steps

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise z ~ N(0, 1), (count, latent_dim), from ``generator`` or the run's own stream."""
        size = (count, self.generator.module.latent_dim)
        return torch.randn(size, device=self.runtime.device, generator=generator or self.noise)

    def student_lr(self, ahead: int = 0) -> float:
        """The student's learning rate, ``ahead`` steps after the next one."""
        optimizer, loop = self.config.optimizer, self.config.loop
        if optimizer.student_schedule == "constant":
            return optimizer.student_lr
        total = max(1, loop.epochs * loop.rounds_per_epoch * loop.student_steps)
        return optimizer.student_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (self.student_updates + ahead) / total)))

    def start_round(self) -> None:
        """Write the position in the round and the student's learning rates from there on to the device.

        Does not wait for the device: the values come from pinned memory or as a kernel's argument.
        """
        first = max(self.position.step, self.config.loop.generator_steps)
        rates = [self.student_lr(max(0, row - first)) for row in range(len(self.rates))]
        pinned = self.runtime.device.type == "cuda"
        self.rates.copy_(torch.tensor(rates, dtype=torch.float32, pin_memory=pinned), non_blocking=True)
        self.cursor.fill_(self.position.step)

    def changing(self) -> Iterator[Tensor]:
        """Every tensor that a step may write to, each once."""
        candidates = [self.trace, self.cursor, self.rates, self.student_rate]
        for side in self.sides.values():
            for module in (side.module, side.objective):
                candidates += [*module.parameters(), *module.buffers()]
            values = (value for state in side.optimizer.state.values() for value in state.values())
            candidates += [value for value in values if isinstance(value, Tensor)]
        yield from {id(tensor): tensor for tensor in candidates}.values()

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Undo the steps taken inside: tensors keep their addresses and get their values back.

        Random streams are restored too, the run's own and torch's global ones.
        """
        tensors = list(self.changing())
        values = [tensor.detach().clone() for tensor in tensors]
        scalers = [(side.scaler, side.scaler.state_dict()) for side in self.sides.values()]
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
        parts: dict[str, Any] = {"student": self.student.module.model, "generator": self.generator.module}
        for name, side in self.sides.items():
            parts |= {f"{name}_{part}": getattr(side, part) for part in ("objective", "optimizer", "scaler")}
        return parts

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue the run with the same results: tensors, numbers, and containers of them."""
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
        """Continue from :meth:`state_dict`. The networks must have been built from the same config.

        State is loaded in place: captured graphs hold raw addresses.
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
    return AttentionGenerator(image_size, **vars(config))


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """In place. Learning rates and other numbers come from the config, which is the checkpoint's too."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state[parameter].items():
            value.copy_(saved["state"][number][name])


def _adam(parameters: list[nn.Parameter], config: DistillConfig, rate: Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=config.optimizer.generator_betas, fused=True)
    for parameter in parameters:
        # Adam creates this state in its first step; a step may be captured before that.
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _sgd(parameters: list[nn.Parameter], config: DistillConfig, rate: Tensor) -> torch.optim.Optimizer:
    momentum, decay = config.optimizer.student_momentum, config.optimizer.student_weight_decay
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay, fused=True)
    for parameter in parameters if momentum else ():
        # Fused SGD leaves a new momentum buffer uninitialised if its first step is skipped (found_inf); with a buffer
        # of zeros the first step is the same, and may be skipped.
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
    """The state at the start of a run. Seeds torch's global stream with ``config.seed``.

    Args:
        teacher: in eval mode and frozen by the caller; moved to the device of the run, like the student.
        student: the network to train.
        config: the run.
        runtime: device and precision.
        image_size: height and width of the synthetic images.
        mean: of the teacher's input, per channel, for images in [0, 1].
        std: standard deviation, per channel.

    Raises:
        ValueError: networks that do not fit each other or the objective.
    """
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            f"teacher and student must have the same classes, got {teacher.num_classes} and {student.num_classes}"
        )
    torch.manual_seed(config.seed)
    # Weights are drawn on the CPU, so that a seed means the same run on every device.
    generator = build_generator(config.generator, image_size)
    objectives = [build(config.objective, teacher, student) for build in (generator_objective, student_objective)]
    for module in (teacher, student, generator, *objectives):
        runtime.place(module)
    with_statistics = None
    if "statistics" in objectives[0].needs:
        with_statistics = extract(teacher, statistics=True, image_size=image_size)
    trained = [*student.model.parameters(), *(p for p in objectives[1].parameters() if p.requires_grad)]
    device, steps = runtime.device, config.loop.generator_steps + config.loop.student_steps
    width = max(len(objective.names) for objective in objectives) + 1
    generator_rate, student_rate = (
        torch.tensor(rate, device=device) for rate in (config.optimizer.generator_lr, config.optimizer.student_lr)
    )

    def side(module: M, objective: Objective, optimizer: torch.optim.Optimizer) -> Side[M]:
        scaler = torch.amp.GradScaler(device.type, enabled=runtime.autocast is torch.float16)
        return Side(module=module, objective=objective, optimizer=optimizer, scaler=scaler)

    state = DistillState(
        config=config,
        runtime=runtime,
        teacher=teacher,
        teacher_statistics=with_statistics,
        generator=side(generator, objectives[0], _adam(list(generator.parameters()), config, generator_rate)),
        student=side(student, objectives[1], _sgd(trained, config, student_rate)),
        normalize=Normalize.of(mean, std, device),
        noise=torch.Generator(device=device).manual_seed(config.seed),
        trace=torch.zeros(steps, width, device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
        rates=torch.zeros(steps, device=device),
        student_rate=student_rate,
    )
    state.start_round()
    return state
