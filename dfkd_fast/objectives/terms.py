"""The loss terms. A term is a module that maps the outputs of teacher and student to a scalar.

``needs`` declares what a term reads besides the teacher's outputs: ``statistics`` are the teacher's BatchNorm
statistics, ``student`` is a forward pass of the student, ``batch`` are the images and their labels. A step computes
only what its terms need.

Equations 2 to 9 are those of Shao et al., ICCV 2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.collectives import current_group, gather, gather_columns
from dfkd_fast.config import InversionContrastConfig, KDConfig, MHADConfig, ObjectiveConfig, SFCLConfig
from dfkd_fast.graph import FeatureModel, LayerStatistics, Outputs
from dfkd_fast.nn import HighOrderAttention
from dfkd_fast.nn import SemanticFeatureContrast as FeatureContrast
from dfkd_fast.registry import Registry


@dataclass(frozen=True, kw_only=True)
class FeatureShapes:
    """Channels per stage and lengths of the penultimate features of both networks."""

    teacher_channels: tuple[int, ...]
    student_channels: tuple[int, ...]
    teacher_dim: int
    student_dim: int

    @classmethod
    def of(cls, teacher: FeatureModel, student: FeatureModel) -> FeatureShapes:
        return cls(
            teacher_channels=tuple(teacher.feature_channels),
            student_channels=tuple(student.feature_channels),
            teacher_dim=teacher.penultimate_dim,
            student_dim=student.penultimate_dim,
        )


class Batch(NamedTuple):
    """The images of a generator step.

    Attributes:
        images: (N, 3, H, W), the teacher's input.
        labels: classes (N,) int64 or probabilities (N, classes); None if the synthesizer has none.
        view: the teacher's outputs for another view of each image; None if the synthesizer makes one view.
    """

    images: Tensor
    labels: Tensor | None
    view: Outputs | None = None


class Term(nn.Module):
    """Base class of loss terms.

    Attributes:
        needs: a subset of ``{"statistics", "student", "batch"}``. With ``batch``, the forward's third argument is a
            :class:`Batch`; only generator steps have one.
        reads_features: whether the term reads stage features or penultimate features. A step whose terms do not can
            cut their gradients, which would be zeros.
        reads_stages: whether a term that reads features reads stage features; :meth:`uses_stages` can depend on the
            config.
        sides: the objectives that may contain the term: ``"generator"``, ``"student"`` or both.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_features: ClassVar[bool] = True
    reads_stages: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        """Build the term for two networks."""
        return cls()

    @classmethod
    def uses_stages(cls, config: ObjectiveConfig) -> bool:
        """Whether the term reads stage features with this config."""
        return cls.reads_features and cls.reads_stages

    def prepare(self, teacher: FeatureModel) -> None:
        """Called once with the teacher that returns statistics, if the term needs them."""

    def allocate(self, batch_size: int) -> None:
        """Called once with the number of images per step, before the first forward."""

    def keep(self, better: Tensor | None) -> None:
        """Called in a generator step with whether its images are the best of the synthesis, a bool of shape (1,)."""

    def finish_synthesis(self) -> None:
        """Called on the host at the end of each synthesis."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a float32 scalar, of (teacher, student) or, with ``batch`` in ``needs``, (teacher, student, batch).

        ``student`` is None if no term of the objective needs it. In a run on several processes, the outputs are those
        for the images of this process, and the loss of the run is the mean of the processes' losses. A term that is not
        a mean over images must call :func:`dfkd_fast.collectives.gather`.
        """
        raise TypeError(f"{type(self).__name__} must define forward(teacher, student)")


TERMS: Registry[type[Term]] = Registry("loss term", "ObjectiveConfig")
"""The registered terms by name."""


def register(name: str, *sides: str) -> Callable[[type[Term]], type[Term]]:
    """Class decorator that registers a term.

    Args:
        name: key in ``ObjectiveConfig.generator`` and ``ObjectiveConfig.student``.
        *sides: the objectives that may contain the term: "generator", "student" or both.
    """

    def add(cls: type[Term]) -> type[Term]:
        cls.sides = sides
        return TERMS.register(name)(cls)

    return add


@register("kd", "generator", "student")
class Distillation(Term):
    """L_KD (Eq. 2): KL divergence of the softmax outputs, (N, classes), mean over N, times temperature squared.

    The default is KL(teacher || student), which all released code computes; the paper writes KL(student || teacher).
    """

    needs = frozenset({"student"})
    reads_features = False

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        return cls(config.kd)

    def __init__(self, config: KDConfig | None = None) -> None:
        super().__init__()
        self.config = config or KDConfig()

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        assert student is not None
        return ops.distillation_kl(
            student.logits, teacher.logits, temperature=self.config.temperature, direction=self.config.direction
        )


@register("l1", "generator", "student")
class LogitDistance(Term):
    """Mean absolute difference of the logits, (N, classes) (DFAD; Fang et al., 2019, Eq. 3)."""

    needs = frozenset({"student"})
    reads_features = False

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        assert student is not None
        return F.l1_loss(student.logits.float(), teacher.logits.float())


def _of_all_processes(layers: Sequence[LayerStatistics]) -> Sequence[LayerStatistics]:
    """The statistics of the images of all processes, which have equal numbers of images."""
    if current_group() is None:
        return layers
    gathered = gather(torch.cat([torch.stack(layer[:2]) for layer in layers], 1)[None])  # (P, 2, channels)
    result = []
    for layer, found in zip(layers, gathered.split([len(layer.mean) for layer in layers], 2), strict=True):
        means, variances = found.unbind(1)
        mean = means.mean(0)
        result.append(layer._replace(mean=mean, var=(variances + (means - mean).square()).mean(0)))
    return result


@register("bn", "generator")
class BatchNormStatistics(Term):
    """L_BN (Eq. 3): distance between the batch statistics and the running statistics of the teacher's BatchNorms.

    The loss is the sum, over all layers, of two Euclidean norms, not squared: that of the difference of the means (C,)
    and that of the difference of the biased variances (C,). The subgradient of a norm at zero is zero.

    Args:
        first: weight of the first BatchNorm (10 in DeepInversion).
        momentum: m; ``(1 - m) * batch + m * average`` is compared instead of the batch's statistics. The average over
            previous syntheses is updated with the same momentum (Fast; Fang et al., AAAI 2022).

    Raises:
        ValueError: the teacher returns no statistics.
    """

    needs = frozenset({"statistics"})
    reads_features = False
    average: Tensor
    last: Tensor
    weight: Tensor

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        return cls(config.bn.first, config.bn.momentum)

    def __init__(self, first: float = 1.0, momentum: float = 0.0) -> None:
        super().__init__()
        self.first, self.momentum = first, momentum

    def prepare(self, teacher: FeatureModel) -> None:
        if self.momentum:
            norms = [teacher.model.get_submodule(path) for path in teacher.batchnorms]
            self.sizes = [int(size) for norm in norms for size in [norm.num_features] * 2]  # type: ignore[arg-type]
            device = next(teacher.model.parameters()).device
            for name in ("average", "last"):
                self.register_buffer(name, torch.zeros(sum(self.sizes), dtype=torch.float32, device=device))
            # 0 in the first synthesis
            self.register_buffer("weight", torch.zeros((), dtype=torch.float32, device=device))

    def finish_synthesis(self) -> None:
        if self.momentum:
            kept = self.momentum * self.average + (1 - self.momentum) * self.last
            self.average.copy_(torch.where(self.weight > 0, kept, self.last))
            self.weight.fill_(self.momentum)

    def _mixed(self, layers: Sequence[LayerStatistics]) -> list[LayerStatistics]:
        self.last.copy_(torch.cat([each for layer in layers for each in layer[:2]]).detach())
        averages = iter(self.average.split(self.sizes))
        return [
            layer._replace(
                mean=torch.lerp(layer.mean, next(averages), self.weight),
                var=torch.lerp(layer.var, next(averages), self.weight),
            )
            for layer in layers
        ]

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        if not teacher.statistics:
            raise ValueError("term 'bn' needs BatchNorm2d layers, but the teacher has none: set the term's weight to 0")
        # ops.statistics_distance would read the maps again; the BatchNorms have computed the statistics already.
        layers = _of_all_processes(teacher.statistics)
        layers = self._mixed(layers) if self.momentum else layers
        total = ops.statistics_distances(layers)
        if self.first != 1:
            total = total + (self.first - 1) * ops.statistics_distances(layers[:1])
        return total


@register("one_hot", "generator")
class OneHot(Term):
    """Cross-entropy of the teacher's logits with their argmax as target (DAFL; Chen et al., ICCV 2019, Eq. 2)."""

    reads_features = False

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        logits = teacher.logits.float()
        return F.cross_entropy(logits, logits.detach().argmax(1))


@register("activation", "generator")
class ActivationNorm(Term):
    """Negative mean absolute value of the teacher's penultimate features, (N, D) (DAFL, Eq. 3)."""

    reads_stages = False

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        return -teacher.penultimate.float().abs().mean()


@register("balance", "generator")
class ClassBalance(Term):
    """Negative entropy of the class probabilities averaged over the batch, which balances the classes (DAFL, Eq. 4)."""

    reads_features = False

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        return -torch.special.entr(gather(teacher.logits.float()).softmax(1).mean(0)).sum()


def _require_labels(batch: Batch, term: str) -> Tensor:
    if batch.labels is None:
        raise ValueError(f"term {term!r} needs a synthesizer with labels, such as 'fast'")
    return batch.labels


@register("target", "generator")
class TargetClass(Term):
    """Cross-entropy of the teacher's logits with the labels of the images, classes or probabilities (CMI, ADI, ZSKD).

    Args:
        temperature: divides the logits.
    """

    needs = frozenset({"batch"})
    reads_features = False

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        return cls(config.target.temperature)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, teacher: Outputs, student: Outputs | None, batch: Batch) -> Tensor:
        return F.cross_entropy(teacher.logits.float() / self.temperature, _require_labels(batch, "target"))


@register("masked_kl", "generator")
class MaskedDivergence(Term):
    """KL(teacher || student) of the images that both assign to the same class, summed, divided by N (Fast, NAYER).

    With a negative weight, it is the adversarial term of the DataFree family: a student that already disagrees is not
    pushed further.
    """

    needs = frozenset({"student"})
    reads_features = False

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        assert student is not None
        divergence = ops.distillation_kl(student.logits, teacher.logits, reduction="none").sum(1)
        return (divergence * (student.logits.argmax(1) == teacher.logits.argmax(1))).mean()


@register("js", "generator")
class JensenShannon(Term):
    """1 - clamp(JS, 0, 1), the competition term of Adaptive DeepInversion (Yin et al., CVPR 2020, Eq. 7).

    JS is the Jensen-Shannon divergence of both networks' probabilities at temperature 3, clamped to [0.01, 0.99]. As in
    the released code, it is the mean of KL(M || P) and KL(M || Q), M = (P + Q) / 2.
    """

    needs = frozenset({"student"})
    reads_features = False

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        assert student is not None
        p, q = ((each.logits.float() / 3).softmax(1).clamp(0.01, 0.99) for each in (teacher, student))
        m = ((p + q) / 2).clamp(0.01, 0.99)
        rows = gather_columns(*((m * (m.log() - each.log())).sum(1, keepdim=True) for each in (p, q)))
        divergences = [each.mean() for each in rows]
        return 1 - (0.5 * (divergences[0] + divergences[1])).clamp(0, 1)


@register("variation", "generator")
class TotalVariation(Term):
    """Total variation of the images (Yin et al., CVPR 2020, Eq. 3): the norms of the differences to four neighbors.

    The differences are those to the right, below, and along both diagonals, each as one vector for the whole batch.
    """

    needs = frozenset({"batch"})
    reads_features = False

    def forward(self, teacher: Outputs, student: Outputs | None, batch: Batch) -> Tensor:
        x = batch.images.float()
        differences = (
            x[:, :, :, :-1] - x[:, :, :, 1:],
            x[:, :, :-1, :] - x[:, :, 1:, :],
            x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
            x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        )
        norms = [torch.linalg.vector_norm(each) for each in differences]
        if current_group() is not None:
            norms = [*torch.linalg.vector_norm(gather(torch.stack(norms)[None]), dim=0)]
        return norms[0] + norms[1] + norms[2] + norms[3]


@register("l2", "generator")
class ImageNorm(Term):
    """Mean Euclidean norm of the images, as the teacher's input (Yin et al., CVPR 2020, Eq. 3)."""

    needs = frozenset({"batch"})
    reads_features = False

    def forward(self, teacher: Outputs, student: Outputs | None, batch: Batch) -> Tensor:
        return torch.linalg.vector_norm(batch.images.float().flatten(1), dim=1).mean()


@register("contrast", "generator")
class InversionContrast(Term):
    """The contrastive term of CMI (Fang et al., IJCAI 2021): images differ from each other and from previous ones.

    Features are the spatial means of the teacher's stages. A head maps those of two views of each image, and those of
    images in a bank, to unit vectors. The vectors of the local views are classified among the global views, which get
    no gradient. The means over the batch and over the bank are added. The best batch of each synthesis goes to the
    bank.

    Args:
        shapes: channels of the teacher's stages.
        config: see :class:`dfkd_fast.config.InversionContrastConfig`.
    """

    needs = frozenset({"batch"})
    last: Tensor
    best: Tensor
    count: Tensor
    position: Tensor
    bank: Tensor

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        return cls(shapes, config.contrast)

    def __init__(self, shapes: FeatureShapes, config: InversionContrastConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or InversionContrastConfig()
        width = sum(shapes.teacher_channels)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.dim))
        self.register_buffer("bank", torch.zeros(config.bank_size, 2 * width))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    def allocate(self, batch_size: int) -> None:
        if batch_size > self.config.bank_size:
            raise ValueError(
                f"InversionContrastConfig.bank_size must be at least the batch size, got {self.config.bank_size} and "
                f"{batch_size}"
            )
        for name in ("last", "best"):
            self.register_buffer(name, torch.zeros_like(self.bank[:batch_size]))

    def keep(self, better: Tensor | None) -> None:
        self.best.copy_(self.last if better is None else torch.where(better, self.last, self.best))

    def finish_synthesis(self) -> None:
        size = len(self.bank)
        where = (self.position + torch.arange(len(self.best), device=self.bank.device)) % size
        self.bank.index_copy_(0, where, self.best)
        self.position.add_(len(self.best)).remainder_(size)
        self.count.add_(len(self.best)).clamp_(max=size)

    def forward(self, teacher: Outputs, student: Outputs | None, batch: Batch) -> Tensor:
        if batch.view is None:
            raise ValueError("term 'contrast' needs a synthesizer with two views of each image, such as 'cmi'")
        views = [torch.cat([x.float().mean((2, 3)) for x in each.features], 1) for each in (batch.view, teacher)]
        views = [*gather_columns(*views)]
        self.last.copy_(torch.cat(views, 1).detach())
        # A random selection of the bank's valid rows, and then of the others, which are masked.
        order = torch.rand(len(self.bank), dtype=torch.float32, device=self.bank.device)
        order = order + 2 * (torch.arange(len(self.bank), device=order.device) >= self.count)
        chosen = self.bank[order.argsort()[: self.config.negatives]]
        current, temperature = len(views[0]), self.config.temperature
        valid = torch.arange(len(chosen), device=order.device) < self.count
        local, other = (
            F.normalize(self.head(torch.cat([view, banked])).float(), dim=1)
            for view, banked in zip(views, chosen.chunk(2, 1), strict=True)
        )
        # One more coordinate gives the others' similarities a softmax of exactly zero.
        masked = local.new_zeros(len(valid)).masked_fill(~valid, -2 - 200 * temperature)
        losses = ops.contrastive_loss(
            F.pad(local, (0, 1), value=1.0),
            torch.cat([other.detach(), F.pad(masked, (current, 0))[:, None]], 1),
            temperature=temperature,
            negatives="cross",
            normalize=False,
            reduction="none",
        )
        banked = torch.where(valid, losses[current:], 0).sum() / valid.sum().clamp_min(1)
        return losses[:current].mean() + banked


def _pool_to_smaller(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools the larger of the teacher's map t and the student's map s to the size of the smaller."""
    size = (min(t.shape[-2], s.shape[-2]), min(t.shape[-1], s.shape[-1]))
    t, s = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (t, s))
    return t, s


def _paired(teacher: tuple[int, ...], student: tuple[int, ...], name: str) -> int:
    if len(teacher) != len(student) or not teacher:
        raise ValueError(
            f"term {name!r} pairs the stages of teacher and student one to one, but they have {len(teacher)} and "
            f"{len(student)}: set the stages to pair in ModelConfig.stages (or in extract(model, stages=...))"
        )
    return len(teacher)


@register("mhad", "student")
class HighOrderAttentionDistillation(Term):
    """L_MHAD (Eq. 7): mixed high-order attention distillation.

    In each pair of stages, the larger map (N, C, H, W) is average-pooled to the size of the smaller, and an adapter
    maps the student's channels to the teacher's if they differ. The loss is the mean squared error between the outputs
    of both attention modules, summed over stages. If both modules were trained, they could collapse: the teacher's is
    not.
    At the level of the penultimate features (N, D), these are maps (N, D, 1, 1).

    Args:
        shapes: channels of the stages of both networks.
        config: order, mode, target, average and level; see :class:`dfkd_fast.config.MHADConfig`.

    Raises:
        ValueError: the networks have different numbers of stages, or fewer than config.stages.
    """

    needs = frozenset({"student"})

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        return cls(shapes, config.mhad)

    def __init__(self, shapes: FeatureShapes, config: MHADConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MHADConfig()
        channels = shapes.teacher_channels, shapes.student_channels
        if config.level == "penultimate":
            channels = (shapes.teacher_dim,), (shapes.student_dim,)
        counts = (len(channels[0]), len(channels[1]))
        if config.stages is not None and config.stages > min(counts):
            raise ValueError(f"MHADConfig.stages is {config.stages}, but the networks have {counts} stages")
        self.stages = config.stages or _paired(*channels, "mhad")
        self.adapters = nn.ModuleList()
        self.student_attention = nn.ModuleList()
        self.teacher_attention = nn.ModuleList()
        for teacher, student in zip(*(each[-self.stages :] for each in channels), strict=True):
            self.adapters.append(self._adapter(student, teacher))
            self.student_attention.append(self._attention(teacher))
            if config.teacher == "frozen":
                self.teacher_attention.append(self._attention(teacher).requires_grad_(False))

    @classmethod
    def uses_stages(cls, config: ObjectiveConfig) -> bool:
        return config.mhad.level == "stages"

    def _adapter(self, student: int, teacher: int) -> nn.Module:
        if student == teacher:
            return nn.Identity()
        if self.config.adapter == "conv":
            return nn.Conv2d(student, teacher, 1, bias=False)
        widths = itertools.pairwise((student, teacher, teacher, teacher))
        first, second, last = (nn.Conv2d(inputs, outputs, 1) for inputs, outputs in widths)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def _maps(self, outputs: Outputs) -> tuple[Tensor, ...]:
        if self.config.level == "penultimate":
            return (outputs.penultimate[:, :, None, None],)
        return outputs.features[-self.stages :]

    def _attention(self, channels: int) -> HighOrderAttention:
        return HighOrderAttention(
            channels, order=self.config.order, reduction=self.config.reduction, mode=self.config.mode
        )

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        assert student is not None
        total = teacher.logits.new_zeros((), dtype=torch.float32)
        references = self.teacher_attention if self.config.teacher == "frozen" else self.student_attention
        for t, s, adapter, attention, reference in zip(
            self._maps(teacher),
            self._maps(student),
            self.adapters,
            self.student_attention,
            references,
            strict=True,
        ):
            t, s = _pool_to_smaller(t.detach(), s)
            with torch.no_grad():
                expected = self._target(reference, t)
            error = self._error(attention, adapter(s), expected)
            if self.config.average == "channels":
                error = error * (t.shape[-2] * t.shape[-1])
            total = total + error
        return total

    def _target(self, attention: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(attention, HighOrderAttention)
        return attention(x) if self.config.target == "features" else attention.attention(x)

    def _error(self, attention: nn.Module, x: Tensor, expected: Tensor) -> Tensor:
        if self.config.target == "attention":
            return F.mse_loss(self._target(attention, x).float(), expected.float())
        assert isinstance(attention, HighOrderAttention)
        # Fused: the student's attended features are never written to memory.
        weights = attention.proj_weight, attention.out_weight
        return ops.high_order_attention_mse(x, *weights, expected, mode=attention.mode).float()


@register("sfcl", "student")
class SemanticFeatureContrast(FeatureContrast, Term):
    """L_SFCL (Eq. 8, 9) of the penultimate features, (N, D): :class:`dfkd_fast.nn.SemanticFeatureContrast` as a term.

    Args:
        shapes: lengths of the penultimate features of both networks.
        config: dimension of the common space, temperature and anchors; see :class:`dfkd_fast.config.SFCLConfig`.
    """

    needs = frozenset({"student"})
    reads_stages = False

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        return cls(shapes, config.sfcl)

    def __init__(self, shapes: FeatureShapes, config: SFCLConfig | None = None) -> None:
        config = config or SFCLConfig()
        options = {"temperature": config.temperature, "symmetric": config.symmetric, "shared": config.head == "shared"}
        super().__init__(shapes.teacher_dim, shapes.student_dim, config.dim, **options)  # type: ignore[arg-type]
        self.config = config

    # A term takes Outputs; the base class takes features. The heads are inherited and not in a submodule, so their
    # parameter names in checkpoints have no prefix.
    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:  # type: ignore[override]
        assert student is not None
        return super().forward(teacher.penultimate, student.penultimate)


@register("attention_transfer", "student")
class AttentionTransfer(Term):
    """Distance between spatial attention maps (Zagoruyko and Komodakis, ICLR 2017, Eq. 2), as ZSKT uses it.

    The attention map of a stage (N, C, H, W) is the mean over channels of the squared features, (N, H W), scaled to
    unit length. The loss is the mean squared difference, summed over stages.

    Raises:
        ValueError: the networks have different numbers of stages.
    """

    needs = frozenset({"student"})

    @classmethod
    def build(cls, shapes: FeatureShapes, config: ObjectiveConfig) -> Term:
        return cls(shapes)

    def __init__(self, shapes: FeatureShapes) -> None:
        super().__init__()
        _paired(shapes.teacher_channels, shapes.student_channels, "attention_transfer")

    def forward(self, teacher: Outputs, student: Outputs | None) -> Tensor:
        assert student is not None
        total = teacher.logits.new_zeros((), dtype=torch.float32)
        for t, s in zip(teacher.features, student.features, strict=True):
            expected, found = (F.normalize(x.float().square().mean(1).flatten(1)) for x in _pool_to_smaller(t, s))
            total = total + F.mse_loss(found, expected)
        return total
