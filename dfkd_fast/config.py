"""What a run is made of: frozen, keyword-only dataclasses, filled from YAML and the command line by jsonargparse.

Every choice that the paper leaves open is a field here. Defaults are the paper's, or what docs/ablation.md settled.
The fields hold values, never behaviour; what they mean is written where they are used.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = [
    "DataConfig",
    "DemoConfig",
    "DistillConfig",
    "EngineName",
    "ExperimentConfig",
    "GeneratorConfig",
    "KDConfig",
    "LoopConfig",
    "MHADConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Precision",
    "SFCLConfig",
    "TeachConfig",
    "find",
    "read",
    "to_dict",
]

Preset = Literal["dfkd-fgvc", "baseline", "dfad", "dafl", "zskt", "dfq"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
EngineName = Literal["auto", "eager", "compiled", "graph"]


def _at_least(owner: object, **minimum: float) -> None:
    for name, least in minimum.items():
        value = getattr(owner, name)
        if not value >= least:
            raise ValueError(f"{type(owner).__name__}.{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled images: for teacher training and evaluation, never for distillation.

    Args:
        name: a registered set: ``aircraft``, ``cars196``, ``cub200``, ``digits`` and ``rendered``, which need no
            download, or ``folder``, any ImageFolder tree.
        root: folder that holds the published tree (``rendered``: its cache; None is the user's cache folder).
        image_size: height and width in pixels.
        classes: number of subcategories (only ``rendered``).
        train_per_class: training images a subcategory (only ``rendered``).
        test_per_class: held-out images a subcategory (only ``rendered``).
        seed: seed of the drawing (only ``rendered``) and of the split (``digits``).
        augment: random transforms on training images.
        workers: loader processes.
    """

    name: str = "rendered"
    root: str | None = None
    image_size: int = 224
    classes: int = 10
    train_per_class: int = 200
    test_per_class: int = 50
    seed: int = 0
    augment: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        _at_least(self, image_size=8, classes=2, train_per_class=1, test_per_class=1, workers=0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A classifier by name.

    Args:
        name: ``timm:resnet34``, ``torchvision:resnet18``, ``package.module:factory``, or one of our own small networks
            (``wrn_40_2``, ``resnet8x4``, ...; ``dfkd_fast.models.names()`` lists them).
        weights: path of a safetensors file or of a torch file that ``weights_only=True`` can read.
        stages: module paths whose outputs are the stage features, shallow to deep; None is the family's default.
        options: keyword arguments for the model's factory.
    """

    name: str
    weights: str | None = None
    stages: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """Name and options as strings, for a weights file to say which network it belongs to."""
        return {"model": self.name, "options": json.dumps(self.options)}


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The attention generator (paper, table 6).

    Args:
        latent_dim: length of the noise vector z.
        channels: width of the first map and of each of the four blocks.
        batch_norm: a BatchNorm in each block (the paper's table has none).
        spectral_norm: spectral norm on the transposed convolutions.
        attention: the gate's form, or ``none`` for a generator without attention (the paper's lambda = 0).
        attention_scale: lambda of Eq. 6.
        attention_reduction: r, the factor by which the attention module narrows the channels.
    """

    latent_dim: int = 256
    channels: tuple[int, int, int, int, int] = (512, 256, 128, 64, 64)
    batch_norm: bool = True
    spectral_norm: bool = True
    attention: Literal["spatial", "spatial_mean1", "channel", "none"] = "spatial"
    attention_scale: float = 5e-2
    attention_reduction: int = 8

    def __post_init__(self) -> None:
        _at_least(self, latent_dim=1, attention_reduction=1)
        if min(self.channels) < 1:
            raise ValueError(f"GeneratorConfig.channels must be positive, got {self.channels}")


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """L_KD (Eq. 2). ``forward`` is KL(teacher || student), which every released code computes."""

    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True, kw_only=True)
class MHADConfig:
    """L_MHAD (Eq. 7), the mixed high-order attention distillation.

    Args:
        order: R, the highest order of the attention polynomial.
        reduction: C / K, the factor by which the attention narrows the channels.
        mode: ``joint`` is one sigmoid over the summed orders, ``per_order`` the mean of one sigmoid an order.
        target: what is compared: the attended ``features`` (A * x) or the ``attention`` maps A.
        average: ``elements`` is the mean over (N, C, H, W); ``channels`` is 1 / (N C) and a sum over positions.
        shared: one module for both sides instead of a frozen one for the teacher and a trained one for the student.
        stages: how many of the deepest stages are paired; None is all, and then both networks must have as many.
    """

    order: int = 3
    reduction: int = 4
    mode: Literal["joint", "per_order"] = "joint"
    target: Literal["features", "attention"] = "features"
    average: Literal["elements", "channels"] = "elements"
    shared: bool = False
    stages: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, order=1, reduction=1)
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"MHADConfig.stages must be None or at least 1, got {self.stages}")


@dataclass(frozen=True, kw_only=True)
class SFCLConfig:
    """L_SFCL (Eq. 8, 9), the semantic feature contrast.

    Args:
        dim: D, the width of the space in which both sides are compared.
        temperature: tau.
        symmetric: the student's vectors are anchors too.
    """

    dim: int = 128
    temperature: float = 0.1
    symmetric: bool = False

    def __post_init__(self) -> None:
        _at_least(self, dim=1)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Named loss terms with their weights.

    Args:
        preset: where the weights start from; ``dfkd_fast.objectives.PRESETS`` lists them.
        generator: weights of the generator's terms, over those of the preset; 0 removes a term.
        student: weights of the student's terms, over those of the preset; 0 removes a term.
        kd: how L_KD is computed.
        mhad: how L_MHAD is computed.
        sfcl: how L_SFCL is computed.
    """

    preset: Preset = "dfkd-fgvc"
    generator: dict[str, float] = field(default_factory=dict)
    student: dict[str, float] = field(default_factory=dict)
    kd: KDConfig = field(default_factory=KDConfig)
    mhad: MHADConfig = field(default_factory=MHADConfig)
    sfcl: SFCLConfig = field(default_factory=SFCLConfig)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The generator's Adam and the student's SGD (paper, section 4.1).

    Args:
        generator_lr: constant over the run.
        generator_betas: Adam's moments.
        student_lr: at the start of the schedule.
        student_momentum: SGD's momentum.
        student_weight_decay: on every parameter that SGD trains, adapters and heads too.
        student_schedule: ``cosine`` anneals to zero, one step of the schedule a student step.
    """

    generator_lr: float = 1e-3
    generator_betas: tuple[float, float] = (0.5, 0.99)
    student_lr: float = 1e-2
    student_momentum: float = 0.9
    student_weight_decay: float = 5e-4
    student_schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        _at_least(self, generator_lr=0, student_lr=0, student_momentum=0, student_weight_decay=0)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often, how much (paper, section 4.1: 200 epochs, t = 20, k = 15, batch 64).

    Args:
        epochs: number of epochs.
        rounds_per_epoch: an epoch is this many rounds (50 in the authors' other released code).
        generator_steps: t, generator steps a round.
        student_steps: k, student steps a round.
        batch_size: synthetic images a step.
        student_in_generator_step: BatchNorms of the student in the generator step: ``batch`` statistics without
            touching its buffers, batch statistics with ``update`` of them, or ``eval`` (the stored ones).
        evaluate_every: epochs between two evaluations on held-out images, if there are any; 0 is only at the end.
        checkpoint_every: rounds between two checkpoints.
        keep_checkpoints: how many are kept; two at least, so that a torn one leaves another.
        select: the student to return: the ``last``; the best by its ``agreement`` with the teacher on synthetic images,
            which needs no data; or the best by ``test_accuracy``, which looks at held-out labels and is therefore no
            longer data-free.
    """

    epochs: int = 200
    rounds_per_epoch: int = 50
    generator_steps: int = 20
    student_steps: int = 15
    batch_size: int = 64
    student_in_generator_step: Literal["batch", "update", "eval"] = "batch"
    evaluate_every: int = 1
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    select: Literal["last", "agreement", "test_accuracy"] = "last"

    def __post_init__(self) -> None:
        _at_least(
            self,
            epochs=1,
            rounds_per_epoch=1,
            generator_steps=0,
            student_steps=0,
            batch_size=2,
            evaluate_every=0,
            checkpoint_every=1,
            keep_checkpoints=2,
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A distillation run.

    Args:
        generator: the generator.
        objective: loss terms and weights.
        optimizer: rates and schedules.
        loop: length and cadence.
        image_size: height and width of the synthetic images, a multiple of 16; None takes that of the
            evaluation data.
        mean: of the teacher's input normalisation, red, green, blue in [0, 1]; None takes the evaluation data's, else
            the teacher's own default.
        std: as mean.
        engine: how a step is executed, by the same step functions: ``eager``; ``compiled``, networks and objectives
            through torch.compile; ``graph``, a whole compiled step captured into one CUDA graph and replayed. ``auto``
            is graph on a CUDA device (compiled in fp16) and eager elsewhere.
        autotune: let torch.compile time variants of its kernels; compiling then takes minutes longer.
        precision: ``auto`` is bf16 autocast where the device computes in it, else fp32.
        channels_last: keep activations channels-last.
        device: ``auto`` is cuda where there is one.
        seed: of everything random in the run.
        out: folder of the run; None makes a new one under ``runs/``.
        resume: go on from the newest sound checkpoint in ``out``.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    engine: EngineName = "auto"
    autotune: bool = False
    precision: Precision = "auto"
    channels_last: bool = True
    device: str = "auto"
    seed: int = 0
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None and (self.image_size < 16 or self.image_size % 16):
            raise ValueError(f"DistillConfig.image_size must be a positive multiple of 16, got {self.image_size}")


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """Supervised training of a classifier on labelled images (method: the authors' loader and rates).

    Args:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: at the start of the cosine.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        precision: as in :class:`DistillConfig`.
        channels_last: keep activations channels-last.
        device: ``auto`` is cuda where there is one.
        seed: of everything random in the run.
        out: folder of the run; None makes a new one under ``runs/``.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    precision: Precision = "auto"
    channels_last: bool = True
    device: str = "auto"
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, epochs=1, batch_size=1, lr=0, momentum=0, weight_decay=0)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment, which the commands ``teach``, ``distill``, ``evaluate`` and ``profile`` share.

    Args:
        data: labelled images for supervised training and evaluation.
        teacher: the trained network.
        student: the network to train.
        teach: supervised training on the data.
        distill: training of the student without the data.
    """

    data: DataConfig | None = None
    teacher: ModelConfig | None = None
    student: ModelConfig | None = None
    teach: TeachConfig = field(default_factory=TeachConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ExperimentConfig):
    """An experiment of the demo, with all three inputs.

    Args:
        presets: objectives to distil with; the student of the first must reach ``least``.
        least: the share of the teacher's top-1 below which the demo fails.
    """

    data: DataConfig = field()
    teacher: ModelConfig = field()
    student: ModelConfig = field()
    presets: list[Preset]
    least: float


T = TypeVar("T")


def find(name: str) -> Path:
    """The path of a config: ``name`` itself where there is such a file, else the packaged ``configs/NAME.yaml``.

    Raises:
        FileNotFoundError: neither; the message lists what is packaged.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = {entry.name.removesuffix(".yaml"): entry for entry in resources.files("dfkd_fast.configs").iterdir()}
    if name in packaged:
        return Path(str(packaged[name]))
    known = ", ".join(sorted(key for key, entry in packaged.items() if entry.name.endswith(".yaml")))
    raise FileNotFoundError(f"no config file {name!r}; by name there are {known}")


def read(kind: type[T], path: str | Path) -> T:
    """A config of type ``kind`` from a YAML file, checked field by field.

    Raises:
        ValueError: a field that does not exist, is missing, or holds a wrong value; the message names it.
    """
    import yaml
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", type=kind)
    try:
        parsed = parser.parse_object({"config": yaml.safe_load(Path(path).read_text())})
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    return parser.instantiate(parsed).config


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values, ready for YAML, JSON or a checkpoint."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(asdict(config))
