"""Configs of runs: frozen, keyword-only dataclasses that jsonargparse fills from YAML files and the command line.

Every choice that the paper leaves open is a field. The defaults are the paper's values, or the results of
docs/ablation.md. Fields hold values only; the code that uses them defines the behavior. Paths may contain ``~`` and
environment variables, which :func:`expand` replaces when a path is used.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import functools
import json
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

__all__ = [
    "BNConfig",
    "DataConfig",
    "DemoConfig",
    "DistillConfig",
    "EngineName",
    "ExperimentConfig",
    "GeneratorConfig",
    "InversionContrastConfig",
    "KDConfig",
    "LoopConfig",
    "MHADConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Precision",
    "SFCLConfig",
    "SynthesisConfig",
    "TargetConfig",
    "TeachConfig",
    "expand",
    "find",
    "is_factory",
    "one_line",
    "read",
    "read_text",
    "reading",
    "recipe",
    "require_file",
    "to_dict",
]

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
EngineName = Literal["auto", "eager", "compiled", "graph"]


def _at_least(owner: object, **minimum: float) -> None:
    for name, least in minimum.items():
        value = getattr(owner, name)
        if not value >= least:
            raise ValueError(f"{type(owner).__name__}.{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labeled images for supervised training and evaluation. Distillation never uses them.

    Args:
        name: a registered data set: ``aircraft``, ``cars196`` or ``cub200``; ``digits`` or ``rendered``, which need no
            download; or ``folder`` for any ImageFolder tree.
        root: root folder of the data set. For ``rendered`` it is the image cache; None uses the user's cache folder.
        image_size: height and width of the images, in pixels.
        classes: number of classes (``rendered`` only).
        train_per_class: number of training images per class (``rendered`` only).
        test_per_class: number of held-out images per class (``rendered`` only).
        seed: random seed of the rendering (``rendered``) or of the train-test split (``digits``).
        augment: apply random transforms to training images.
        workers: number of data loader processes.
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
        name: ``timm:resnet34``, ``torchvision:resnet18``, ``package.module:factory``, or a built-in network such as
            ``wrn_40_2`` or ``resnet8x4``; ``dfkd_fast.models.names()`` lists them. Commands that read the metadata of
            ``weights`` take it from there by default.
        weights: path of a safetensors file, or of a torch file that ``weights_only=True`` can read, or
            ``hf:OWNER/NAME[/FILE][@REVISION]`` for a file of the Hugging Face hub.
        new_head: do not load the last layer of ``weights``, which may be of a network with other classes.
        pretrained: without ``weights``, start from timm's pretrained weights with a new last layer. They come from the
            local cache, or are downloaded.
        stages: paths of the modules whose outputs are the stage features, from shallow to deep; None uses the last
            feature map of each resolution.
        options: keyword arguments of the model's factory.
    """

    name: str = ""
    weights: str | None = None
    new_head: bool = False
    pretrained: bool = False
    stages: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """Name and options as strings: the metadata that identifies the network of a weights file."""
        return {"model": self.name, "options": json.dumps(self.options)}


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The generator. The defaults are those of the paper's attention generator (table 6).

    Args:
        name: ``attention``, another registered generator, or ``package.module:factory``, a function of ``image_size``,
            ``latent_dim`` and the options. ``dfkd_fast.nn.GENERATORS`` lists the registered ones.
        options: keyword arguments of generators other than ``attention``, to which only ``latent_dim`` applies.
        latent_dim: length of the noise vector z.
        channels: number of channels of the first feature map and of each of the four blocks.
        batch_norm: add a BatchNorm to each block (not in the paper's table).
        spectral_norm: apply spectral norm to the transposed convolutions.
        attention: form of the gate (see ``dfkd_fast.nn.SpatialAttention``), or ``none`` (lambda = 0 in the paper).
            ``spatial`` is the literal reading of Eq. 6, which changes no bf16 output of maps of 28 x 28 and above.
        attention_scale: lambda in Eq. 6.
        attention_reduction: r, the channel reduction factor of the attention module.
        gain: factor of each block's convolution output, for generators without BatchNorm. With spectral norm, a block
            divides the signal by about 4.
    """

    name: str = "attention"
    options: dict[str, Any] = field(default_factory=dict)
    latent_dim: int = 256
    channels: tuple[int, int, int, int, int] = (512, 256, 128, 64, 64)
    batch_norm: bool = True
    spectral_norm: bool = True
    attention: Literal["spatial", "spatial_mean1", "channel", "none"] = "spatial_mean1"
    attention_scale: float = 5e-2
    attention_reduction: int = 8
    gain: float = 1.0

    def __post_init__(self) -> None:
        _at_least(self, latent_dim=1, attention_reduction=1)
        if self.options and self.name == "attention":
            raise ValueError("GeneratorConfig.options are for generators other than 'attention', which has fields")
        if self.batch_norm and self.gain != 1:
            raise ValueError(f"GeneratorConfig.gain must be 1 with batch_norm, which cancels it, got {self.gain}")
        if min(self.channels) < 1:
            raise ValueError(f"GeneratorConfig.channels must be positive, got {self.channels}")


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """The source of the student's images.

    Args:
        name: ``online`` trains the generator next to the student and makes new images in each student step. Other
            synthesizers fill a pool; ``dfkd_fast.synthesis.SYNTHESIZERS`` lists them.
        options: options of the synthesizer.
        per_round: number of syntheses per round, which divides ``loop.generator_steps``.
        pool_size: maximum number of images in the pool; new images replace the oldest.
        crop: pad the pool's images by this number of pixels, crop them at random and flip half of them; None uses them
            as they are.
    """

    name: str = "online"
    options: dict[str, Any] = field(default_factory=dict)
    per_round: int = 1
    pool_size: int = 40_960
    crop: int | None = 4

    def __post_init__(self) -> None:
        _at_least(self, per_round=1, pool_size=1)
        if self.crop is not None:
            _at_least(self, crop=0)


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """L_KD, the distillation loss (Eq. 2).

    Args:
        temperature: divides the logits of both networks.
        direction: ``forward`` is KL(teacher || student), which all released implementations compute; ``reverse`` is
            KL(student || teacher).
    """

    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True, kw_only=True)
class BNConfig:
    """L_BN, the distance to the teacher's BatchNorm statistics (Eq. 3).

    Args:
        first: weight of the teacher's first BatchNorm; the others have weight 1.
        momentum: weight of an average over previous syntheses, which the batch statistics are mixed with (Fast).
    """

    first: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"BNConfig.momentum must be in [0, 1), got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class InversionContrastConfig:
    """The contrastive term of CMI.

    Args:
        dim: dimension of the embeddings that are compared.
        temperature: temperature of the contrast.
        bank_size: maximum number of images of previous syntheses whose features are kept.
        negatives: number of these that a step compares with; 0 compares only the batch.
    """

    dim: int = 256
    temperature: float = 0.1
    bank_size: int = 40_960
    negatives: int = 4096

    def __post_init__(self) -> None:
        _at_least(self, dim=1, bank_size=1, negatives=0)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The cross-entropy with the labels of a synthesis.

    Args:
        temperature: divides the teacher's logits.
    """

    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MHADConfig:
    """L_MHAD, mixed high-order attention distillation (Eq. 7).

    Args:
        order: R, the highest order of the attention polynomial.
        reduction: C / K, the number of channels C of a stage divided by the hidden channels K of its attention module.
        mode: ``joint`` applies one sigmoid to the sum of all orders; ``per_order`` averages one sigmoid per order.
        target: compare the ``attention`` maps A, or the attended ``features`` A * x, where x are the stage features.
        average: ``elements`` averages over (N, C, H, W); ``channels`` averages over (N, C) and sums over positions.
        teacher: attention module of the teacher: ``frozen`` keeps a separate one at its initialization; ``shared`` uses
            the student's, which is trained.
        level: ``stages`` compares maps at the ends of the stages; ``penultimate`` compares the penultimate features, as
            the paper does for students of another architecture (section 5.2).
        adapter: maps the student's channels to the teacher's if they differ: ``conv`` is a 1 x 1 convolution, ``mlp`` a
            network with two hidden layers (section 5.2).
        stages: number of stages to pair, counted from the deepest; None pairs all, and then both networks must have
            the same number of stages.
    """

    order: int = 3
    reduction: int = 4
    mode: Literal["joint", "per_order"] = "joint"
    target: Literal["features", "attention"] = "features"
    average: Literal["elements", "channels"] = "elements"
    teacher: Literal["frozen", "shared"] = "frozen"
    level: Literal["stages", "penultimate"] = "stages"
    adapter: Literal["conv", "mlp"] = "conv"
    stages: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, order=1, reduction=1)
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"MHADConfig.stages must be None or at least 1, got {self.stages}")
        if self.stages is not None and self.level == "penultimate":
            raise ValueError("MHADConfig.stages must be None if MHADConfig.level is 'penultimate'")


@dataclass(frozen=True, kw_only=True)
class SFCLConfig:
    """L_SFCL, semantic feature contrast learning (Eq. 8 and 9).

    Args:
        dim: D, the dimension of the embeddings that are compared.
        temperature: tau, the temperature of the contrastive loss.
        symmetric: use the student's embeddings as anchors too.
        head: ``separate`` trains one projection head per network; ``shared`` trains one for both, as the paper writes,
            whose penultimate features must then have the same length.
    """

    dim: int = 128
    temperature: float = 0.1
    symmetric: bool = False
    head: Literal["separate", "shared"] = "separate"

    def __post_init__(self) -> None:
        _at_least(self, dim=1)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Loss terms and their weights.

    Args:
        preset: the method whose weights are the defaults; ``dfkd_fast.objectives.PRESETS`` lists them.
        generator: weights of generator terms, which override the preset's; 0 removes a term.
        student: weights of student terms, which override the preset's; 0 removes a term.
        bn: options of L_BN.
        contrast: options of the term ``contrast``.
        kd: options of L_KD.
        target: options of the term ``target``.
        mhad: options of L_MHAD.
        sfcl: options of L_SFCL.
    """

    preset: str = "dfkd-fgvc"
    generator: dict[str, float] = field(default_factory=dict)
    student: dict[str, float] = field(default_factory=dict)
    bn: BNConfig = field(default_factory=BNConfig)
    contrast: InversionContrastConfig = field(default_factory=InversionContrastConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    mhad: MHADConfig = field(default_factory=MHADConfig)
    sfcl: SFCLConfig = field(default_factory=SFCLConfig)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The generator's Adam and the student's SGD (paper, section 5.1).

    Args:
        generator_lr: initial learning rate of Adam.
        generator_betas: coefficients of Adam's running averages.
        generator_schedule: ``constant`` keeps the rate; ``cosine`` anneals it to zero over all generator steps.
        generator_reset: ``round`` resets Adam's running averages at the start of each round; ``never`` keeps them.
        student_lr: initial learning rate of SGD.
        student_momentum: momentum of SGD.
        student_weight_decay: weight decay of SGD, also for adapters and heads.
        student_schedule: ``cosine`` anneals the rate to zero over all student steps; ``constant`` keeps it; ``steps``
            divides it by 10 at each milestone.
        student_milestones: fractions of all student steps, for ``steps``.
    """

    generator_lr: float = 1e-3
    generator_betas: tuple[float, float] = (0.5, 0.99)
    generator_schedule: Literal["constant", "cosine"] = "constant"
    generator_reset: Literal["never", "round"] = "never"
    student_lr: float = 1e-2
    student_momentum: float = 0.9
    student_weight_decay: float = 5e-4
    student_schedule: Literal["cosine", "constant", "steps"] = "cosine"
    student_milestones: tuple[float, ...] = (0.6, 0.75, 0.9)

    def __post_init__(self) -> None:
        _at_least(self, generator_lr=0, student_lr=0, student_momentum=0, student_weight_decay=0)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of the run and intervals within it (paper, section 5.1: 200 epochs, t = 20, k = 15, batch 64).

    Args:
        epochs: number of epochs.
        rounds_per_epoch: number of rounds per epoch (50 in the authors' other released code).
        generator_steps: t, number of generator steps per round.
        student_steps: k, number of student steps per round.
        batch_size: number of synthetic images per step.
        student_in_generator_step: statistics of the student's BatchNorms in the generator step. ``batch`` uses batch
            statistics without updating the buffers, ``update`` also updates them, ``eval`` uses the stored statistics.
        evaluate_every: number of epochs between evaluations on held-out images, if there are any; 0 evaluates only at
            the end.
        checkpoint_every: number of rounds between checkpoints.
        keep_checkpoints: number of checkpoints to keep; at least 2, in case the newest is damaged.
        select: the student to return: the ``last``; the one with the best ``agreement`` with the teacher on synthetic
            images; or the one with the best ``test_accuracy`` on held-out images, which makes the run no longer
            data-free.
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
        _at_least(self, generator_steps=0, student_steps=0, evaluate_every=0)
        _at_least(self, epochs=1, rounds_per_epoch=1, batch_size=2, checkpoint_every=1, keep_checkpoints=2)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A distillation run.

    Args:
        generator: the generator.
        synthesis: the source of the student's images.
        objective: loss terms and weights.
        optimizer: optimizers and learning rates.
        loop: length of the run and intervals within it.
        image_size: height and width of the synthetic images in pixels, for the attention generator a multiple of 16;
            None uses the evaluation data's.
        mean: mean of the teacher's input normalization for red, green and blue in [0, 1]; None uses the evaluation
            data's, or without data the teacher's default.
        std: standard deviation of the teacher's input normalization, like ``mean``.
        engine: how steps are executed. ``eager`` runs them, ``compiled`` runs networks and objectives through
            torch.compile, and ``graph`` replays each compiled step as one CUDA graph. ``auto`` is ``graph`` on a CUDA
            device (``compiled`` in fp16) and ``eager`` elsewhere.
        autotune: let torch.compile benchmark kernel variants, which makes compilation take minutes longer.
        precision: ``auto`` is bf16 autocast if the device has instructions for it (compute capability 8.0, AMX or
            AVX512-BF16), otherwise fp32.
        channels_last: keep activations in channels-last memory format.
        sync_batchnorm: with several processes, BatchNorms of generator and student use the statistics of all images;
            false uses those of each process.
        device: a torch device; ``auto`` is ``cuda`` if available, otherwise ``cpu``.
        seed: random seed of the run.
        trackers: where losses, pictures and results are recorded: ``tensorboard``, ``jsonl``, ``wandb``, ``mlflow``, or
            one that an installed package registers.
        out: folder of the run; None creates a new one under ``runs/``.
        resume: continue from the newest usable checkpoint in ``out``.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
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
    sync_batchnorm: bool = True
    device: str = "auto"
    seed: int = 0
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None:
            _at_least(self, image_size=8)
        if self.loop.generator_steps % self.synthesis.per_round:
            raise ValueError(
                f"LoopConfig.generator_steps must be a multiple of SynthesisConfig.per_round, got "
                f"{self.loop.generator_steps} and {self.synthesis.per_round}"
            )


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """Supervised training of a classifier on labeled images (paper, section 5.1).

    Args:
        epochs: number of passes over the training images.
        batch_size: number of images per step.
        lr: initial learning rate of SGD, annealed to zero by a cosine schedule.
        warmup_epochs: number of epochs in which the learning rate rises linearly to ``lr``, before the cosine schedule.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        label_smoothing: probability that is spread evenly over all classes in the targets of the cross-entropy.
        ema: decay per step of an exponential moving average of weights and buffers, which is then evaluated and saved
            instead of the trained network; 0 turns it off.
        evaluate_every: number of epochs between evaluations on the held-out images, which never select the weights; 0
            evaluates only at the end.
        checkpoint_every: number of epochs between checkpoints.
        precision: like ``DistillConfig.precision``.
        channels_last: keep activations in channels-last memory format.
        sync_batchnorm: like ``DistillConfig.sync_batchnorm``.
        device: a torch device; ``auto`` is ``cuda`` if available, otherwise ``cpu``.
        seed: random seed of the training.
        trackers: like ``DistillConfig.trackers``.
        out: folder of the run; None creates a new one under ``runs/``.
        resume: continue from the newest usable checkpoint in ``out``, if there is one.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-2
    warmup_epochs: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    ema: float = 0.0
    evaluate_every: int = 5
    checkpoint_every: int = 1
    precision: Precision = "auto"
    channels_last: bool = True
    sync_batchnorm: bool = True
    device: str = "auto"
    seed: int = 0
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        _at_least(self, epochs=1, batch_size=1, lr=0, momentum=0, weight_decay=0)
        _at_least(self, warmup_epochs=0, evaluate_every=0, checkpoint_every=1)
        for name in ("label_smoothing", "ema"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"TeachConfig.{name} must be in [0, 1), got {value}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"TeachConfig.warmup_epochs must be less than epochs, got {self.warmup_epochs} and {self.epochs}"
            )


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment, shared by the commands ``teach``, ``distill``, ``evaluate`` and ``profile``.

    Args:
        data: labeled images for supervised training and evaluation.
        teacher: the teacher network.
        student: the student network.
        teach: supervised training on the data.
        distill: distillation of the teacher into the student, without the data.
    """

    data: DataConfig | None = None
    teacher: ModelConfig | None = None
    student: ModelConfig | None = None
    teach: TeachConfig = field(default_factory=TeachConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ExperimentConfig):
    """An experiment of the demo. Data, teacher and student are required.

    Args:
        presets: presets to distill with. The student of the first one must reach ``least``.
        least: fraction of the teacher's top-1 accuracy below which the demo fails.
    """

    data: DataConfig = field()
    teacher: ModelConfig = field()
    student: ModelConfig = field()
    presets: list[str]
    least: float


T = TypeVar("T")


def expand(path: str | os.PathLike[str]) -> Path:
    """Replace ``~`` and environment variables in a path.

    Raises:
        ValueError: a variable is not set or the home folder is unknown, and no such name exists.
    """
    text = os.path.expanduser(os.path.expandvars(os.fspath(path)))
    unknown = re.match(r"~[^/]*|.*?(\$[A-Za-z_]\w*|\$\{[^}]*\})[^/]*", text, re.DOTALL)
    if unknown is not None and not os.path.lexists(unknown[0]):
        user = f"there is no user {unknown[0][1:]}" if unknown[0] != "~" else "HOME is not set"
        reason = f"the environment variable {unknown[1]} is not set" if unknown[1] else user
        raise ValueError(f"cannot expand the path {os.fspath(path)!r}: {reason}; set it or write the full path")
    return Path(text)


def require_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file that can be read without waiting.

    Raises:
        OSError: it does not exist, or it is a folder, a pipe or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "Is a directory" if stat.S_ISDIR(mode) else "Not a regular file", os.fspath(path))
    return Path(path)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the path to errors of the operating system: those of reads, unlike those of opens, do not name the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks."""
    return " ".join(str(error).split())


def find(name: str) -> Path:
    """Find a config file: the file ``name`` if it exists, otherwise the packaged config, method or sweep ``NAME.yaml``.

    Raises:
        FileNotFoundError: none exists. The message lists the packaged ones.
    """
    path = expand(name)
    if path.is_file():
        return path
    root = resources.files("dfkd_fast.configs")
    known: dict[str, dict[str, Path]] = {
        kind: {each.name.removesuffix(".yaml"): Path(str(each)) for each in folder.iterdir() if ".yaml" in each.name}
        for kind, folder in (("configs", root), ("methods", root / "methods"), ("sweeps", root / "sweeps"))
    }
    for found in known.values():
        if name in found:
            return found[name]
    listed = "; ".join(f"packaged {kind}: {', '.join(sorted(found))}" for kind, found in known.items())
    raise FileNotFoundError(f"no config file {name!r}; {listed}")


def recipe(method: str) -> DistillConfig:
    """Return the published settings of a method: loss weights, loop, rates, generator and synthesizer.

    Raises:
        FileNotFoundError: no packaged method has the name. The message lists them.
    """
    return read(ExperimentConfig, find(method)).distill


def _check_fields(kind: type, values: Mapping[Any, Any], *, where: str = "", more: Container[str] = ()) -> None:
    """Raise ValueError if nested values have names that are not fields of the config."""
    known = get_type_hints(kind)
    for name, value in values.items():
        if name in more and name not in known:
            continue
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"unknown field {where}{name}" + (f"; did you mean {where}{close[0]}?" if close else ""))
        inner = _field_config(kind, name)
        if inner is None or value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}{name} must be a mapping of fields, got {value!r}")
        _check_fields(inner, value, where=f"{where}{name}.")


def read_text(kind: type, path: str | Path, *, more: Container[str] = ()) -> str:
    """Read a YAML file in UTF-8 or UTF-16 and check the names of its fields.

    Args:
        kind: the config that the file describes.
        path: the file.
        more: further names that are accepted at the top level.

    Raises:
        ValueError: the file is not YAML of plain values, or a field is unknown. The message names it.
    """
    import yaml

    with reading(path):
        content = require_file(expand(path)).read_bytes()
    try:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise ValueError(f"a config must map names to values, got {values!r}")
        _check_fields(kind, values, more=more)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return text


def is_factory(name: str, libraries: Container[str] = ("timm", "torchvision")) -> bool:
    """Whether a name is ``package.module:factory``, which imports and runs code.

    Args:
        name: the name of a network, or with ``libraries=()`` that of a generator.
        libraries: prefixes that are not modules.
    """
    source, colon, _ = name.partition(":")
    return bool(colon) and source not in libraries


def read(kind: type[T], path: str | Path, *more: str | Path, changes: Mapping[str, Any] | None = None) -> T:
    """Read and validate a config of type ``kind`` from YAML files.

    The name of a network or generator can be ``package.module:factory``, which ``create_model`` and ``distill`` import
    and run, so check the names in a file that you do not trust (:func:`is_factory`).

    Args:
        kind: the config that the files describe.
        path: the first file.
        more: further files, whose fields replace those of the files before.
        changes: fields to set last, by dotted paths. The last name may be a key of a dict field.

    Raises:
        ValueError: a field is unknown, missing or invalid. The message names it.
    """
    import yaml

    values: dict[str, Any] = {}
    for each in (path, *more):
        values = _merged(kind, values, yaml.safe_load(read_text(kind, each)))
    for name, value in (changes or {}).items():
        _set(values, name, value)
    try:
        if changes:
            _check_fields(kind, values)
        parser = _parser(kind)  # type: ignore[arg-type]  # mypy: Hashable
        return parser.instantiate(parser.parse_object({"config": values})).config
    except Exception as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


@functools.cache  # it takes longer than parsing
def _parser(kind: type) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", type=kind)
    return parser


def _field_config(kind: Any, name: str) -> Any:
    """The type of a field if it is a config, otherwise None."""
    known = get_type_hints(kind)[name]
    return next((each for each in (known, *get_args(known)) if is_dataclass(each)), None)


def _merged(kind: Any, values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Replace fields of nested values by those of ``more``. Fields that are dicts are replaced as a whole."""
    merged = dict(values)
    for name, value in more.items():
        inner = _field_config(kind, name)
        nested = inner is not None and isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(inner, merged[name], value) if nested else value
    return merged


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a field of nested values by its dotted path."""
    *parents, last = path.split(".")
    for name in parents:
        values[name] = dict(values.get(name) or {})
        values = values[name]
    values[last] = value


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested dicts, lists and scalars, for YAML, JSON or a checkpoint."""
    return json.loads(json.dumps(asdict(config)))
