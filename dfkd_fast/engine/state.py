"""The state of a distillation run: everything that its steps change."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dfkd_fast.collectives import current_group
from dfkd_fast.config import DistillConfig, GeneratorConfig
from dfkd_fast.engine.runtime import Runtime, rng_states, set_rng_states
from dfkd_fast.graph import FeatureModel, extract
from dfkd_fast.graph.modes import preserve_state
from dfkd_fast.graph.tracing import weights_of
from dfkd_fast.nn import GENERATORS, AttentionGenerator
from dfkd_fast.nn.norm import synchronize_batchnorm
from dfkd_fast.objectives import Objective, generator_objective, student_objective
from dfkd_fast.synthesis import SYNTHESIZERS, Setting, Synthesizer, create_synthesizer

__all__ = ["DistillState", "Normalize", "Position", "Side", "build_generator", "build_state"]

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_PLAIN = ("student_updates", "rounds", "epochs", "best")  # fields of a DistillState without tensors


@dataclass
class Position:
    """The next step of the run, as indices from zero. Generator steps come first in a round."""

    round: int = 0
    step: int = 0


@dataclass(kw_only=True)
class Side(Generic[M]):
    """A network with its objective, optimizer and gradient scaler.

    Attributes:
        module: the network.
        objective: the network's loss. The student's objective has trained parameters (adapters, attention and heads).
        optimizer: updates the parameters of ``module`` and ``objective``.
        scaler: scales the loss in fp16; disabled in other precisions.
    """

    module: M
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass(frozen=True)
class Normalize:
    """Normalizes images x (N, 3, H, W) from [-1, 1] to the teacher's float32 input: ``((x + 1) / 2 - mean) / std``.

    Attributes:
        scale: ``0.5 / std``, (1, 3, 1, 1) float32.
        shift: ``(0.5 - mean) / std``, (1, 3, 1, 1) float32.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Normalize:
        """Create the normalization for a mean and standard deviation per channel of images in [0, 1]."""
        values = [0.5 / s for s in std], [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
        return cls(*(torch.tensor(each, dtype=torch.float32, device=device).view(1, 3, 1, 1) for each in values))

    def __call__(self, images: Tensor) -> Tensor:
        return images.float() * self.scale + self.shift


@dataclass(kw_only=True)
class DistillState:
    """Networks, objectives, optimizers, random streams and the position in the run.

    Attributes:
        config: the run's config.
        runtime: device and precision.
        teacher: the frozen teacher, with logits, stage features and penultimate features as outputs.
        teacher_statistics: the teacher with BatchNorm statistics as outputs too; None if no loss term needs them.
        generator: the module that generator steps train, such as the generator, which maps noise to images in [-1, 1].
        synthesizer: makes the images of the steps.
        student: the student, which shares its parameters with the user's network.
        image_size: height and width of the images.
        builds_generator: whether the generator was built from the config, not given.
        normalize: maps images in [-1, 1] to the teacher's input.
        noise: random generator that draws only the generator's input noise z.
        trace: (steps per round, maximum number of terms + 1) float32. A step's row has the values of its terms, zeros
            up to the last column, and there 1 if the gradient was finite (in fp16 always), otherwise 0.
        cursor: (1,) int64, the row of the next step. Steps advance it on the device, because a captured graph would
            treat a Python number as a constant.
        rates: (steps per round,) float32, the learning rate of each step.
        generator_rate: 0-dim float32, the learning rate of the generator's optimizer.
        student_rate: 0-dim float32, the learning rate of the student's optimizer.
        student_updates: number of student steps so far, which determines the learning rate.
        position: the next step.
        rounds: mean of each loss term per round.
        epochs: evaluation results per epoch.
        best: score and epoch of the best student so far.
    """

    config: DistillConfig
    runtime: Runtime
    teacher: FeatureModel
    teacher_statistics: FeatureModel | None
    generator: Side[Any]
    synthesizer: Synthesizer
    student: Side[FeatureModel]
    image_size: int
    builds_generator: bool
    normalize: Normalize
    noise: torch.Generator
    trace: Tensor
    cursor: Tensor
    rates: Tensor
    generator_rate: Tensor
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

    def student_lr(self, ahead: int = 0) -> float:
        """The student's learning rate ``ahead`` student steps after the next one."""
        optimizer = self.config.optimizer
        if optimizer.student_schedule == "constant":
            return optimizer.student_lr
        total = max(1, self.total_rounds * self.config.loop.student_steps)
        progress = (self.student_updates + ahead) / total
        if optimizer.student_schedule == "steps":
            return optimizer.student_lr * 0.1 ** sum(progress >= each for each in optimizer.student_milestones)
        return _cosine(optimizer.student_lr, progress)

    def generator_lr(self, step: int) -> float:
        """The generator's learning rate in a generator step of the current round."""
        optimizer, steps = self.config.optimizer, self.config.loop.generator_steps
        rate = optimizer.generator_lr * self.synthesizer.rate(step % self.synthesizer.setting.iterations)
        if optimizer.generator_schedule == "constant":
            return rate
        return _cosine(rate, (self.position.round * steps + step) / (self.total_rounds * steps))

    def update_generator_rates(self) -> None:
        """Set the learning rates of the generator's optimizer for the next step, on the device, if they change."""
        if not self.scheduled:
            return
        torch.index_select(self.rates, 0, self.cursor, out=self.generator_rate.view(1))
        # Further groups, such as heads of terms, have the first rate.
        for group, (_, factor) in zip(
            self.generator.optimizer.param_groups, self.synthesizer.parameters(), strict=False
        ):
            if factor != 1:
                torch.mul(self.generator_rate, factor, out=group["lr"])

    @functools.cached_property
    def scheduled(self) -> bool:
        """Whether the generator's learning rate changes."""
        iterations = range(self.synthesizer.setting.iterations)
        own = any(self.synthesizer.rate(iteration) != 1 for iteration in iterations)
        return own or self.config.optimizer.generator_schedule != "constant"

    def synchronized(self) -> AbstractContextManager[None]:
        """The context of a run on several processes, in which BatchNorms use the statistics of all images."""
        group = current_group() if self.config.sync_batchnorm else None
        made = nn.ModuleList([self.synthesizer.module, self.synthesizer.sampler])
        return synchronize_batchnorm(
            {"generator": made, "student": self.student.module.model}, group, leave=self.synthesizer.replicated
        )

    def start_synthesis(self) -> None:
        """Prepare a synthesis or a stage of it, if the next generator step is its first."""
        synthesizer, iteration = self.synthesizer, self.position.step % self.synthesizer.setting.iterations
        synthesizer.stage = synthesizer.stage_of(iteration)
        if iteration == 0:
            synthesizer.start()
        if iteration == 0 or synthesizer.stage != synthesizer.stage_of(iteration - 1):
            synthesizer.start_stage()
            if synthesizer.resets_optimizer:
                self._reset_generator_optimizer()

    def finish_synthesis(self) -> None:
        """End a synthesis, if the last generator step was its last."""
        if self.position.step % self.synthesizer.setting.iterations == 0:
            self.synthesizer.finish()
            for term in self.generator.objective.kinds().values():
                term.finish_synthesis()

    def _reset_generator_optimizer(self) -> None:
        """Reset Adam for the synthesizer's parameters. Heads of terms keep their averages."""
        state = self.generator.optimizer.state
        parameters = [parameter for each, _ in self.synthesizer.parameters() for parameter in each]
        torch._foreach_zero_([value for parameter in parameters for value in state[parameter].values()])

    def start_round(self) -> None:
        """Write the position in the round and the learning rates of its steps to the device.

        Also resets the generator's optimizer if the config says so. Does not wait for the device, because the values
        are copied from pinned memory or passed as kernel arguments.
        """
        steps = self.config.loop.generator_steps
        first = max(self.position.step, steps)
        rates = [
            self.generator_lr(row) if row < steps else self.student_lr(max(0, row - first))
            for row in range(len(self.rates))
        ]
        if self.config.optimizer.generator_reset == "round" and self.position.step == 0:
            self._reset_generator_optimizer()
        pinned = self.runtime.device.type == "cuda"
        self.rates.copy_(torch.tensor(rates, dtype=torch.float32, pin_memory=pinned), non_blocking=True)
        self.cursor.fill_(self.position.step)

    def mutable_tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that a step can write to, once."""
        candidates = [*self.synthesizer.tensors().values()]
        candidates += [self.trace, self.cursor, self.rates, self.generator_rate, self.student_rate]
        for side in self.sides.values():
            for module in (side.module, side.objective):
                candidates += [*module.parameters(), *module.buffers()]
            values = (value for state in side.optimizer.state.values() for value in state.values())
            candidates += [value for value in values if isinstance(value, Tensor)]
        yield from {id(tensor): tensor for tensor in candidates}.values()

    def buffers(self) -> Iterator[Tensor]:
        """Yield the buffers of generator and student, such as running statistics."""
        for module in (self.synthesizer.module, self.synthesizer.sampler, self.student.module):
            yield from module.buffers()

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Undo the steps that run inside the context. Tensors keep their addresses.

        Restores the random state of ``noise`` and of torch's global generators too.
        """
        fixed = {id(tensor) for tensor in self.synthesizer.fixed_in_steps()}
        tensors = [tensor for tensor in self.mutable_tensors() if id(tensor) not in fixed]
        values = [tensor.detach().clone() for tensor in tensors]
        scalers = [(side.scaler, side.scaler.state_dict()) for side in self.sides.values()]
        noise, stage = self.noise.get_state(), self.synthesizer.stage
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
                self.synthesizer.stage = stage

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"student": self.student.module.model, "generator": self.generator.module}
        for name, side in self.sides.items():
            parts |= {f"{name}_{part}": getattr(side, part) for part in ("objective", "optimizer", "scaler")}
        if self.synthesizer.state_dict():
            parts["synthesizer"] = self.synthesizer
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue the run with the same results, as tensors and plain values."""
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "noise": self.noise.get_state(),
            **rng_states(),
            "position": [self.position.round, self.position.step],
            "trace": self.trace.cpu(),
            **{name: copy.deepcopy(getattr(self, name)) for name in _PLAIN},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict` from a run with the same config.

        State is loaded in place, because captured graphs hold raw addresses.
        """
        for name, part in self._parts().items():
            if isinstance(part, torch.optim.Optimizer):
                _load_optimizer(part, state[name])
            else:
                part.load_state_dict(state[name])
        self.noise.set_state(state["noise"])
        set_rng_states(state)
        self.position = Position(*state["position"])
        self.trace.copy_(state["trace"])
        for name in _PLAIN:
            setattr(self, name, copy.deepcopy(state[name]))
        self.start_round()

    def non_finite(self) -> list[str]:
        """Names of the weights, statistics, optimizer states and loss scales that contain NaN or infinite values.

        A loss does not show them: a step writes them after its loss, and no step of training reads running statistics.
        Waits for the device.
        """
        named: dict[str, Tensor] = {}
        for side_name, side in self.sides.items():
            networks = (side.module.model if side is self.student else side.module, side.objective)
            values = {key: value for network in networks for key, value in weights_of(network).items()}
            if side is self.generator:
                values |= dict(side.module.named_buffers())
            names = {parameter: key for key, parameter in values.items()}
            for parameter, state in side.optimizer.state.items():
                values |= {f"{key} of {names[parameter]}": value for key, value in state.items()}
            if side.scaler.is_enabled():
                # With a scale of zero or infinity, every step is skipped.
                values["loss scale"] = torch.tensor(side.scaler.get_scale() or math.nan)
            named |= {f"{side_name}'s {key}": value for key, value in values.items() if value.is_floating_point()}
        made = self.synthesizer.tensors().items()  # a best loss is infinite before the first step of a synthesis
        named |= {f"synthesizer's {key}": v for key, v in made if v.is_floating_point() and key != "best_loss"}
        # Some optimizers have their step counts on the CPU.
        device = self.runtime.device
        finite = torch.stack([value.isfinite().all().to(device) for value in named.values()]).tolist()
        return [name for name, good in zip(named, finite, strict=True) if not good]

    def teacher_digest(self) -> str:
        """Hash the teacher's weights. The hash identifies the teacher of a checkpoint."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.teacher.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _cosine(rate: float, progress: float) -> float:
    return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_generator(config: GeneratorConfig, image_size: int) -> nn.Module:
    """Build the generator for images of (3, image_size, image_size).

    Raises:
        ValueError: no generator has the name, or it cannot make images of this size.
        TypeError: the generator does not accept the options.
    """
    if config.name == "attention":
        options = {name: value for name, value in vars(config).items() if name not in ("name", "options")}
        return AttentionGenerator(image_size, **options)
    return GENERATORS.find(config.name)(image_size=image_size, latent_dim=config.latent_dim, **config.options)


def _check_generator(generator: nn.Module, image_size: int, device: torch.device) -> None:
    """Raise if a generator does not map noise to images in [-1, 1]."""
    name, latent_dim = type(generator).__name__, getattr(generator, "latent_dim", None)
    if not isinstance(generator, nn.Module):
        raise TypeError(f"the generator must be a torch.nn.Module, got {name}")
    if not isinstance(latent_dim, int) or latent_dim < 1:
        raise ValueError(f"{name}.latent_dim must be the length of the noise vector, got {latent_dim!r}")
    if not any(parameter.requires_grad for parameter in generator.parameters()):
        raise ValueError(f"{name} has no weight that requires a gradient: call requires_grad_(True) first")
    noise = torch.randn(2, latent_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with preserve_state(generator, device):
        images = generator(noise.to(device))
    expected = (2, 3, image_size, image_size)
    if not isinstance(images, Tensor) or images.shape != expected:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must return images {expected} of noise {tuple(noise.shape)}, got {found}")
    if not images.abs().max() <= 1.001:  # also for NaN
        raise ValueError(f"{name} must return images in [-1, 1], got values up to {images.abs().max():.3g}")


def _warn_without_effect(config: GeneratorConfig, image_size: int, dtype: torch.dtype) -> None:
    """Warn if the mean gate of the literal form is below the resolution of the dtype in every block."""
    size = image_size // 8  # of the first block's output, where the gate is largest
    if config.attention == "spatial" and config.attention_scale / size**2 < torch.finfo(dtype).eps / 4:
        log.warning(
            "GeneratorConfig.attention 'spatial' has no effect at %d pixels in %s, because its gate is below the "
            "rounding error; use 'spatial_mean1', whose mean is 1 instead of 1 / (H W)",
            image_size,
            str(dtype).removeprefix("torch."),
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the optimizer's tensors in place. Learning rates and other options come from the config."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state[parameter].items():
            value.copy_(saved["state"][index][name])


def _adam(groups: list[tuple[list[nn.Parameter], float]], config: DistillConfig, rate: Tensor) -> torch.optim.Optimizer:
    """Adam with one group per list of parameters, and a factor of the learning rate for each."""
    given = [{"params": each, "lr": rate if factor == 1 else rate * factor} for each, factor in groups]
    optimizer = torch.optim.Adam(given, lr=rate, betas=config.optimizer.generator_betas, fused=True)
    for parameter in (parameter for each, _ in groups for parameter in each):
        # Adam creates this state in its first step, but a step may be captured before that.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _sgd(parameters: list[nn.Parameter], config: DistillConfig, rate: Tensor) -> torch.optim.Optimizer:
    momentum, decay = config.optimizer.student_momentum, config.optimizer.student_weight_decay
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay, fused=True)
    for parameter in parameters if momentum else ():
        # Fused SGD creates this buffer in its first step, but leaves it uninitialized if that step is skipped
        # (found_inf). A buffer of zeros gives the same first step.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _place_generator(
    config: DistillConfig, runtime: Runtime, image_size: int, given: nn.Module | None
) -> nn.Module | None:
    """Build the generator of the config, or check the given one, and move it to the device of the run.

    Returns:
        The generator, or None if the synthesizer uses none.
    """
    generator = given
    if given is None:
        if not SYNTHESIZERS.find(config.synthesis.name).uses_generator:
            return None
        generator = build_generator(config.generator, image_size)
    assert generator is not None
    if isinstance(generator, nn.Module):
        runtime.place(generator.float()).train()
    if isinstance(generator, AttentionGenerator):
        _warn_without_effect(config.generator, image_size, runtime.autocast or torch.float32)
    else:
        _check_generator(generator, image_size, runtime.device)
    return generator


def _with_statistics(teacher: FeatureModel, objective: Objective, image_size: int) -> FeatureModel | None:
    """The teacher with BatchNorm statistics, if a term needs them."""
    if "statistics" not in objective.needs:
        return None
    found = extract(teacher, statistics=True, image_size=image_size)
    if found.programs and not found.batchnorms and found.other_batchnorms:
        raise ValueError(
            "term 'bn' needs BatchNorms of maps (N, C, H, W) with running statistics; the teacher only has "
            f"{', '.join(found.other_batchnorms[:5])}: set the term's weight to 0"
        )
    for term in objective.kinds().values():
        term.prepare(found)
    return found


def _setting(
    config: DistillConfig, generator: nn.Module | None, teacher: FeatureModel, image_size: int, normalize: Normalize
) -> Setting:
    device = normalize.scale.device
    sizes: dict[str, Any] = {"image_size": image_size, "batch_size": config.loop.batch_size}
    rates: dict[str, Any] = {"learning_rate": config.optimizer.generator_lr, "betas": config.optimizer.generator_betas}
    return Setting(
        generator=generator,
        teacher=teacher,
        steps=config.loop.generator_steps,
        iterations=max(1, config.loop.generator_steps // config.synthesis.per_round),
        scale=normalize.scale,
        shift=normalize.shift,
        random=torch.Generator(device=device).manual_seed(config.seed),
        config=config.synthesis,
        **sizes,
        **rates,
    )


def build_state(
    teacher: FeatureModel,
    student: FeatureModel,
    config: DistillConfig,
    runtime: Runtime,
    *,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    given: nn.Module | None = None,
) -> DistillState:
    """Build the initial state of a run. Seeds torch's global generators with ``config.seed``.

    Args:
        teacher: the teacher, in eval mode and frozen. It is moved to the device of the run.
        student: the student, which is moved to the device of the run.
        config: the run's config.
        runtime: device and precision.
        image_size: height and width of the synthetic images, in pixels.
        mean: mean of the teacher's input normalization per channel, for images in [0, 1].
        std: standard deviation of the teacher's input normalization per channel.
        given: the generator to train, which is moved to the device of the run; None builds that of the config.

    Raises:
        ValueError: the networks do not fit each other or the objective.
    """
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            "teacher and student must have the same number of classes, "
            f"got {teacher.num_classes} and {student.num_classes}"
        )
    torch.manual_seed(config.seed)
    generator = _place_generator(config, runtime, image_size, given)
    # Initialize weights on the CPU, so that a seed gives the same weights on every device.
    objectives = [build(config.objective, teacher, student) for build in (generator_objective, student_objective)]
    for module in (teacher, student, *objectives):
        runtime.place(module.float())  # torch's default dtype may be float64
    with_statistics = _with_statistics(teacher, objectives[0], image_size)
    trained = [*student.model.parameters(), *(p for p in objectives[1].parameters() if p.requires_grad)]
    device, steps = runtime.device, config.loop.generator_steps + config.loop.student_steps
    width = max(len(objective.names) for objective in objectives) + 1
    initial = (config.optimizer.generator_lr, config.optimizer.student_lr)
    generator_rate, student_rate = (torch.tensor(rate, dtype=torch.float32, device=device) for rate in initial)
    normalize = Normalize.of(mean, std, device)
    setting = _setting(config, generator, teacher, image_size, normalize)
    synthesizer = create_synthesizer(setting)
    heads = [each for each in objectives[0].parameters() if each.requires_grad]
    groups = [*synthesizer.parameters(), *([(heads, 1.0)] if heads else [])]
    for term in objectives[0].kinds().values():
        term.allocate(config.loop.batch_size)

    def side(module: M, objective: Objective, optimizer: torch.optim.Optimizer) -> Side[M]:
        scaler = torch.amp.GradScaler(device.type, enabled=runtime.autocast is torch.float16)
        return Side(module=module, objective=objective, optimizer=optimizer, scaler=scaler)

    state = DistillState(
        config=config,
        runtime=runtime,
        teacher=teacher,
        teacher_statistics=with_statistics,
        generator=side(synthesizer.module, objectives[0], _adam(groups, config, generator_rate)),
        synthesizer=synthesizer,
        student=side(student, objectives[1], _sgd(trained, config, student_rate)),
        image_size=image_size,
        builds_generator=given is None,
        normalize=normalize,
        noise=setting.random,
        trace=torch.zeros(steps, width, dtype=torch.float32, device=device),
        cursor=torch.zeros(1, dtype=torch.int64, device=device),
        rates=torch.zeros(steps, dtype=torch.float32, device=device),
        generator_rate=generator_rate,
        student_rate=student_rate,
    )
    state.start_round()
    return state
