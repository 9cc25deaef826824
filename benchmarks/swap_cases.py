"""What the stage `swap` compares: every drop-in of `dfkd_fast.compat`, as its users call it, beside its original."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.benchmarks import originals
from dfkd_fast.compat import cpsc, datafree, deepinversion, lightly, mdistiller, repdistiller
from dfkd_fast.config import ModelConfig
from dfkd_fast.models import create_model

__all__ = [
    "DTYPES",
    "HOOKS",
    "SIZES",
    "Both",
    "Case",
    "Loss",
    "Pair",
    "Setting",
    "Size",
    "averaged",
    "cases",
    "hooked",
    "installed",
    "logits",
    "nt_xent",
    "self_supervised",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Inputs = tuple[Tensor, ...]
Loss = Callable[..., Tensor]

PLAIN = "plain PyTorch"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes of the experiment, and how long it goes on.

    Attributes:
        logits: (N, classes).
        features: (N, dim).
        network: whose BatchNorms and stages there are.
        image: side of its images.
        batch: their number.
        bank: vectors in lightly's memory bank.
        examples: side and number of images.
        steps: timed steps of an example.
        repeats: how often an example is run before and after.
        turns: how often a drop-in and its original take turns.
        seconds: about how long a turn of one of them is.
        least: calls in it at the least.
    """

    logits: tuple[tuple[int, int], ...]
    features: tuple[tuple[int, int], ...]
    network: str
    image: int
    batch: int
    bank: int
    examples: tuple[tuple[int, int], ...]
    steps: int
    repeats: int
    turns: int
    seconds: float
    least: int


SIZES = {
    "full": Size(
        logits=((256, 100), (64, 200)),
        features=((256, 512), (64, 128)),
        network="wrn_40_2",
        image=32,
        batch=256,
        bank=4096,
        examples=((64, 256), (224, 64)),
        steps=10,
        repeats=5,
        turns=9,
        seconds=0.05,
        least=10,
    ),
    "small": Size(
        logits=((6, 5),),
        features=((6, 8),),
        network="wrn_10_1",
        image=8,
        batch=2,
        bank=16,
        examples=((32, 4),),
        steps=1,
        repeats=1,
        turns=2,
        seconds=0.0,
        least=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A drop-in and its original, made ready.

    Attributes:
        ours: inputs to a scalar.
        original: likewise.
        inputs: a fresh set of inputs; gradients are taken for those that require one.
        source: what the original is, with its version.
    """

    ours: Loss
    original: Loss
    inputs: Callable[[], Inputs]
    source: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where, in what type and of what shape a pair is made ready."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: Size

    def tensor(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype).requires_grad_(grad)

    def labels(self, classes: int) -> Tensor:
        return torch.arange(self.shape[0], device=self.device) % classes


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row's name, and how to make it ready; nothing is allocated before that.

    Attributes:
        setup: makes it ready.
        needs: the library without which there is nothing to compare; None where there is a definition.
    """

    kind: str
    case: str
    shape: str
    dtype: str
    setup: Callable[[], Pair]
    needs: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.kind, self.case, self.shape, self.dtype

    @property
    def possible(self) -> bool:
        return self.needs is None or installed(self.needs)


def installed(library: str) -> bool:
    """Whether a distribution of this name can be imported."""
    return importlib.util.find_spec(library.replace("-", "_")) is not None


def _library(name: str) -> str | None:
    """The library that a drop-in's original comes from, where it is installed."""
    library = _LIBRARIES.get(name.partition(".")[0])
    return library if library is not None and installed(library) else None


_BANK = "lightly.NTXentLoss, memory bank"

_LIBRARIES = {"lightly": "lightly", "metric_learning": "pytorch-metric-learning", "torchdistill": "torchdistill"}

Both = tuple[Loss, Loss]
Table = dict[str, Callable[[], Both]]
"""Drop-in and original, by the name of the case."""


def _total(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    for value in others:
        first = first + value
    return first


# Losses of logits (N, classes), the student's and the teacher's.


def _hinton(setting: Setting, alpha: float) -> Both:
    """torchdistill's KDLoss, with labels where alpha is above zero."""
    from dfkd_fast.compat.torchdistill import KDLoss

    targets = setting.labels(setting.shape[1]) if alpha else None

    def of(kind: Any) -> Loss:
        side = ("fc", "output")
        loss = kind(*side, *side, temperature=4.0, alpha=alpha)
        return lambda s, t: loss({"fc": {"output": s}}, {"fc": {"output": t}}, targets)

    def definition(s: Tensor, t: Tensor) -> Tensor:
        soft = originals.kldiv(s, t, 4.0) / 16
        return soft if targets is None else alpha * F.cross_entropy(s, targets) + (1 - alpha) * 16 * soft

    if _library("torchdistill") is None:
        return of(KDLoss), originals.Module(definition)
    from torchdistill.losses.mid_level import KDLoss as Original

    return of(KDLoss), of(Original)


def _cross_entropy(setting: Setting) -> Both:
    targets = setting.labels(setting.shape[1])
    return lambda s, t: datafree.cross_entropy(s, targets), lambda s, t: originals.cross_entropy(s, targets)


def logits(setting: Setting) -> Table:
    def kl(ours: Loss, original: Loss) -> Callable[[], Both]:
        return lambda: (ours, original)

    function = partial(originals.kldiv, temperature=4.0)
    module = originals.Module(originals.kldiv, temperature=4.0)

    def alone(ours: Loss, original: Loss) -> Callable[[], Both]:
        return lambda: (lambda s, t: ours(s), lambda s, t: original(s))

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return originals.kldiv(s, t, 4.0, "none").sum(1).mean()

    return {
        "datafree.kldiv": kl(partial(datafree.kldiv, T=4.0), function),
        "datafree.kldiv, both gradients": kl(partial(datafree.kldiv, T=4.0), function),
        "datafree.kldiv, not reduced": lambda: (
            lambda s, t: datafree.kldiv(s, t, T=4.0, reduction="none").sum(1).mean(),
            rows,
        ),
        "datafree.KLDiv": kl(datafree.KLDiv(T=4.0), module),
        "datafree.jsdiv": lambda: (partial(datafree.jsdiv, T=4.0), partial(originals.jsdiv, temperature=4.0)),
        "datafree.cross_entropy": partial(_cross_entropy, setting),
        "datafree.class_balance_loss": alone(datafree.class_balance_loss, originals.class_balance_loss),
        "datafree.onehot_loss": alone(datafree.onehot_loss, originals.onehot_loss),
        "cpsc.kdloss": kl(cpsc.kdloss, originals.kldiv),
        "repdistiller.DistillKL": kl(repdistiller.DistillKL(4.0), module),
        "mdistiller.kd_loss": lambda: (partial(mdistiller.kd_loss, temperature=4.0), rows),
        "torchdistill.KDLoss": partial(_hinton, setting, 0.0),
        "torchdistill.KDLoss, labels": partial(_hinton, setting, 0.5),
    }


# Losses of features (N, dim) of two views.


def averaged(loss: Loss) -> Loss:
    """A loss whose values are averaged where it has not done so itself."""

    def call(*inputs: Tensor) -> Tensor:
        value = loss(*inputs)
        return value.mean() if value.ndim else value

    return call


def _contrast(setting: Setting, kind: Any, mode: str = "all", labelled: bool = False) -> Both:
    """SupConLoss, which averages, and ContrastLoss, whose callers do."""
    ours, original = kind(contrast_mode=mode), originals.Module(originals.contrast_loss, mode=mode)
    labels = setting.labels(10) if labelled else None

    def stacked(loss: Loss) -> Loss:
        return lambda a, b: averaged(loss)(torch.stack([F.normalize(a), F.normalize(b)], 1))

    return stacked(lambda x: ours(x, labels)), stacked(lambda x: original(x, labels))


def nt_xent(setting: Setting, bank: bool = False) -> Both:
    """lightly's; the two banks begin with the same vectors."""
    size = (setting.size.bank, setting.shape[1]) if bank else 0

    def made(kind: Any) -> Loss:
        torch.manual_seed(0)
        return kind(memory_bank_size=size).to(setting.device)

    if _library("lightly") is None:
        return made(lightly.NTXentLoss), originals.Module(originals.nt_xent)
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return made(lightly.NTXentLoss), made(NTXentLoss)


def self_supervised(name: str) -> Both:
    from pytorch_metric_learning import losses

    from dfkd_fast.compat import metric_learning

    ours, original = (module.SelfSupervisedLoss(getattr(module, name)()) for module in (metric_learning, losses))
    return ours, original


def _features(setting: Setting) -> Table:
    found: Table = {}
    for name, kind in (("datafree.ContrastLoss", datafree.ContrastLoss), ("cpsc.SupConLoss", cpsc.SupConLoss)):
        found |= {
            name: partial(_contrast, setting, kind),
            f"{name}, one": partial(_contrast, setting, kind, "one"),
            f"{name}, labels": partial(_contrast, setting, kind, labelled=True),
        }
    found["lightly.NTXentLoss"] = partial(nt_xent, setting)
    found[_BANK] = partial(nt_xent, setting, bank=True)
    for name in ("NTXentLoss", "SupConLoss"):
        found[f"metric_learning.SelfSupervisedLoss, {name}"] = partial(self_supervised, name)
    return found


# The BatchNorms of a network.


def _network(size: Size) -> tuple[list[tuple[nn.BatchNorm2d, torch.Size]], list[torch.Size]]:
    """The BatchNorms with the shapes of what they are given, and the shapes that the stages give; of one image."""
    network = create_model(ModelConfig(name=size.network), num_classes=10).eval().requires_grad_(False)
    norms: list[tuple[nn.BatchNorm2d, torch.Size]] = []
    stages: list[torch.Size] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            module.register_forward_pre_hook(lambda norm, inputs: norms.append((norm, inputs[0].shape)))
        elif name in ("block1", "block2", "block3"):
            module.register_forward_hook(lambda block, inputs, output: stages.append(output.shape))
    network(torch.zeros(1, 3, size.image, size.image))
    return norms, stages


def hooked(norms: list[nn.BatchNorm2d], kind: Any, read: Callable[[Any], Tensor], momentum: bool) -> Loss:
    """All BatchNorms on their maps, a hook on each, and the sum of what the hooks keep."""
    hooks = [kind(norm) for norm in norms]

    def loss(*maps: Tensor) -> Tensor:
        for norm, x in zip(norms, maps, strict=True):
            norm(x)
        total = sum(read(hook) for hook in hooks)
        if momentum:
            for hook in hooks:
                hook.update_mmt()
        assert isinstance(total, Tensor)
        return total

    return loss


def _r_feature(hook: Any) -> Tensor:
    return hook.r_feature


HOOKS: dict[str, tuple[Any, Any, Callable[[Any], Tensor]]] = {
    "datafree.DeepInversionHook": (datafree.DeepInversionHook, originals.DeepInversionHook, _r_feature),
    "datafree.DeepInversionHook, mmt_rate": (
        partial(datafree.DeepInversionHook, mmt_rate=0.9),
        partial(originals.DeepInversionHook, rate=0.9),
        _r_feature,
    ),
    "deepinversion.DeepInversionFeatureHook": (
        deepinversion.DeepInversionFeatureHook,
        originals.DeepInversionHook,
        _r_feature,
    ),
    "cpsc.DeepInversionFeatureHook": (cpsc.DeepInversionFeatureHook, originals.DeepInversionHook, _r_feature),
    "datafree.FeatureMeanVarHook": (
        datafree.FeatureMeanVarHook,
        originals.FeatureMeanVarHook,
        lambda hook: hook.mean.square().sum() + hook.var.square().sum(),
    ),
    "datafree.InstanceMeanHook": (
        datafree.InstanceMeanHook,
        originals.InstanceMeanHook,
        lambda hook: hook.instance_mean.square().sum(),
    ),
}


def _batchnorms(setting: Setting, name: str) -> Pair:
    found, _ = _network(setting.size)
    ours, original, read = HOOKS[name]

    def side(kind: Any) -> Loss:
        # Afresh, without the hook by which they were found.
        norms = []
        for norm, _ in found:
            own = nn.BatchNorm2d(norm.num_features).eval().requires_grad_(False)
            own.load_state_dict(norm.state_dict())
            norms.append(own.to(setting.device))
        return hooked(norms, kind, read, name.endswith("mmt_rate"))

    def inputs() -> Inputs:
        return tuple(setting.tensor(setting.size.batch, *shape[1:]) for _, shape in found)

    return Pair(ours=side(ours), original=side(original), inputs=inputs, source=PLAIN)


# Maps of a network's stages, the student's and then the teacher's; and images.


def _attention_transfer(mode: str) -> Both:
    """torchdistill's ATLoss."""
    from dfkd_fast.compat.torchdistill import ATLoss

    paths = ("block1", "block2", "block3")
    pairs = {path: {side: {"path": path, "io": "output"} for side in ("student", "teacher")} for path in paths}

    def of(kind: Any) -> Loss:
        loss = kind(pairs, mode)

        def call(*maps: Tensor) -> Tensor:
            halves = (maps[:3], maps[3:])
            return loss(*({path: {"output": x} for path, x in zip(paths, half, strict=True)} for half in halves))

        return call

    if _library("torchdistill") is None:
        return of(ATLoss), originals.Module(_paired(partial(originals.attention_transfer, mode=mode)))
    from torchdistill.losses.mid_level import ATLoss as Original

    return of(ATLoss), of(Original)


def _paired(distance: Loss) -> Loss:
    return lambda *maps: _total(distance(s, t) for s, t in zip(maps[:3], maps[3:], strict=True))


def _maps() -> Table:
    attention = repdistiller.Attention()
    definition = _paired(originals.attention_transfer)

    def at_loss(*maps: Tensor) -> Tensor:
        total = mdistiller.at_loss(maps[:3], maps[3:], 2)
        assert isinstance(total, Tensor)
        return total

    return {
        "repdistiller.Attention": lambda: (
            lambda *maps: _total(attention(maps[:3], maps[3:])),
            originals.Module(definition),
        ),
        "mdistiller.at_loss": lambda: (at_loss, definition),
        "mdistiller.single_stage_at_loss": lambda: (_paired(partial(mdistiller.single_stage_at_loss, p=2)), definition),
        "torchdistill.ATLoss": partial(_attention_transfer, "code"),
        "torchdistill.ATLoss, paper": partial(_attention_transfer, "paper"),
    }


_IMAGES: dict[str, Both] = {
    "datafree.get_image_prior_losses": (datafree.get_image_prior_losses, originals.absolute_variation),
    "deepinversion.get_image_prior_losses": (
        lambda x: _total(deepinversion.get_image_prior_losses(x)),
        originals.image_prior,
    ),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Every case, by what it takes: logits, features, the maps of BatchNorms and of stages, images."""

    def pair(table: Callable[[Setting], Table], setting: Setting, name: str, grads: tuple[bool, bool]) -> Pair:
        ours, original = table(setting)[name]()
        library = _library(name)
        return Pair(
            ours=ours,
            original=original,
            inputs=lambda: tuple(setting.tensor(*setting.shape, grad=grad) for grad in grads),
            source=PLAIN if library is None else f"{library} {importlib.metadata.version(library)}",
        )

    def stages(setting: Setting, name: str) -> Pair:
        _, shapes = _network(setting.size)
        made = pair(lambda _: _maps(), setting, name, (True, False))
        batch = [(setting.size.batch, *shape[1:]) for shape in shapes]
        return replace(
            made, inputs=lambda: tuple(setting.tensor(*shape, grad=grad) for grad in (True, False) for shape in batch)
        )

    def images(setting: Setting, name: str) -> Pair:
        ours, original = _IMAGES[name]
        return Pair(ours=ours, original=original, inputs=lambda: (setting.tensor(*setting.shape),), source=PLAIN)

    whole = (size.batch, 3, size.image, size.image)
    for dtype, torch_dtype in DTYPES.items():

        def setting(shape: tuple[int, ...], torch_dtype: torch.dtype = torch_dtype) -> Setting:
            return Setting(device=device, dtype=torch_dtype, shape=shape, size=size)

        for shape in size.logits:
            for name in logits(setting(shape)):
                grads = (True, name.endswith("both gradients"))
                setup = partial(pair, logits, setting(shape), name, grads)
                yield Case(kind="logits", case=name, shape=_times(shape), dtype=dtype, setup=setup)
        for shape in size.features:
            for name in _features(setting(shape)):
                setup = partial(pair, _features, setting(shape), name, (True, True))
                needs = _LIBRARIES[name.partition(".")[0]] if name == _BANK or name.startswith("metric") else None
                yield Case(kind="features", case=name, shape=_times(shape), dtype=dtype, setup=setup, needs=needs)
        where = f"{size.network} at {_times(whole)}"
        for name in HOOKS:
            setup = partial(_batchnorms, setting(whole), name)
            yield Case(kind="BatchNorms", case=name, shape=where, dtype=dtype, setup=setup)
        for name in _maps():
            setup = partial(stages, setting(whole), name)
            yield Case(kind="stages", case=name, shape=where, dtype=dtype, setup=setup)
        for name in _IMAGES:
            setup = partial(images, setting(whole), name)
            yield Case(kind="images", case=name, shape=_times(whole), dtype=dtype, setup=setup)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
