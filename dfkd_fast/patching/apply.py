"""The two functions, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.models import BatchNormWithStatistics, FeatureModel
from dfkd_fast.models.extract import undisturbed
from dfkd_fast.patching.following import attributes_kept
from dfkd_fast.patching.forward import PatchedForward, Refused, first_line, hooked
from dfkd_fast.patching.losses import LOSSES, loss
from dfkd_fast.patching.recognise import ORDER_MODULES, fused, indexed, order_module

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]

_SIZES = (64, 32, 224)
"""Image sizes that are tried where no example is given."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""They have no forward."""


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """What :func:`patch` replaced.

    Attributes:
        path: of the module, in the model.
        by: the op, and what it computes besides.
    """

    path: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Left:
    """What :func:`patch` recognised and left.

    Attributes:
        path: of the module, in the model.
        why: the reason, in words.
    """

    path: str
    why: str


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """What became of each module that :func:`patch` knows something about, in the order of ``named_modules``."""

    replaced: tuple[Replaced, ...] = ()
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {one.path or '(the model)'}: {one.by}" for one in self.replaced]
        for why, count in Counter(one.why for one in self.left).items():
            first = next(one.path for one in self.left if one.why == why) or "(the model)"
            lines.append(f"  left {first}{f' and {count - 1} more' if count > 1 else ''}: {why}")
        return "\n".join(lines)


def _unfrozen(module: nn.Module, flags: dict[nn.Module, bool]) -> str | None:
    """Why a module is not frozen and in eval mode with all below it; None where it is."""
    if any(flags[each] for each in module.modules()):
        return "in training mode: call eval() first"
    if any(parameter.requires_grad for parameter in module.parameters()):
        return "trainable: call requires_grad_(False) first where it is to stay as it is"
    return None


def _images(model: nn.Module) -> list[tuple[Any, ...]]:
    """Two random images each of some sizes, where the model begins with a layer of images."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, _BatchNorm)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.Conv2d):
        channels, like = first.in_channels, first.weight
    elif isinstance(first, nn.BatchNorm2d) and first.running_mean is not None:
        channels, like = first.num_features, first.running_mean
    else:
        return []
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, channels, size, size, generator=generator) for size in _SIZES]
    return [(image.to(device=like.device, dtype=like.dtype),) for image in images]


def _inputs(
    model: nn.Module, owners: Sequence[nn.Module], examples: Sequence[tuple[Any, ...]], given: bool
) -> dict[nn.Module, Tensor | None] | None:
    """The map that each module is called with first, None where that is something else; None for no answer at all.

    Raises:
        ValueError: the model does not take the example that was given.
    """
    for example in examples:
        seen: dict[nn.Module, Tensor | None] = {}

        def record(module: nn.Module, args: Any, kwargs: Any, seen: dict[nn.Module, Tensor | None] = seen) -> None:
            if module not in seen:
                one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4
                seen[module] = args[0].detach().clone() if one else None

        handles = [owner.register_forward_pre_hook(record, with_kwargs=True) for owner in owners]
        try:
            model(*example)
            return seen
        except Exception as error:  # a forward may say in many ways that an image does not suit it
            if given:
                raise ValueError(f"{type(model).__name__} does not take the example. {first_line(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
    return None


def _by_name(module: nn.Module) -> Callable[[nn.Module], PatchedForward] | None:
    name = type(module).__name__
    return order_module if name in ORDER_MODULES else loss if name in LOSSES else None


def patch(model: nn.Module, *, example: Any = None) -> PatchReport:
    """Put fused forms in the place of what is recognised in a model; see :mod:`dfkd_fast.patching` for the list.

    The model stays the object that it is, as do all modules in it: state dict, names, flags and hooks are untouched,
    and what is called from elsewhere runs as before. Only the ``forward`` of some modules is another, and steps aside
    for the class's own where it does not hold: in training mode, for further arguments, for hooks on a module that it
    would pass by. A copy (``copy.deepcopy``) is patched too; a pickled model is loaded without the patch.

    Values and gradients are those of before up to rounding; fused backends have no second derivative. The fused forms
    are for CUDA devices; elsewhere plain PyTorch computes the same values, and the statistics that BatchNorm's op gives
    are passes more. A second call starts anew: it is needed after modules were exchanged or an attribute was set that
    steers a forward. Not for ``nn.DataParallel``, whose replicas would all run the first one's forward; nor does
    TorchScript follow it.

    Args:
        model: any module. Every part of it that is frozen and in eval mode is looked at, so that a module may hold a
            patched teacher and a student that is left.
        example: what the model is called with once, in eval mode, to try the fused forms: a tensor or a tuple of
            arguments. None is random images of 64, 32 or 224 pixels a side, the first size that the model takes.

    Returns:
        What was replaced and what was left, with the reason.

    Raises:
        TypeError: model is no module, or is one that :func:`dfkd_fast.models.extract` made, which is fused already.
        ValueError: the model does not take the example.
    """
    unpatch(model)
    if isinstance(model, FeatureModel):
        raise TypeError("model must be a plain network, got a FeatureModel, which runs a graph of its own")
    flags = {module: module.training for module in model.modules()}
    paths = {module: path for path, module in model.named_modules()}
    why: dict[nn.Module, str] = {}
    forwards: list[PatchedForward] = []
    tensor = next(model.parameters(), torch.zeros(()))
    examples = _images(model) if example is None else [example if isinstance(example, tuple) else (example,)]
    with attributes_kept(model), undisturbed(model, tensor.device):
        taken: set[nn.Module] = set()
        for module in model.modules():
            if recognise := _by_name(module):
                taken |= set(module.modules())
                try:
                    forwards.append(recognise(module))
                except Refused as refused:
                    why[module] = str(refused)
        known = [each for each in model.modules() if isinstance(each, _BatchNorm) or indexed(each)]
        owners: dict[nn.Module, str | None] = {}
        for module in model.modules():
            if module in taken | set(known) or isinstance(module, _CONTAINERS):
                continue
            if not set(module.modules()).isdisjoint(known):
                unfrozen = _unfrozen(module, flags)
                if unfrozen is None or any(map(indexed, module.modules())):
                    owners[module] = unfrozen
                else:
                    why[module] = unfrozen
        inputs = _inputs(model, list(owners), examples, example is not None) if owners else {}
        for owner, unfrozen in owners.items():
            try:
                forwards.append(fused(owner, _input(owner, inputs), unfrozen, flags[owner]))
            except Refused as refused:
                why[owner] = str(refused)
    replaced: dict[nn.Module, str] = {}
    for forward in forwards:
        if forward.replaced:
            forward.model.__dict__["forward"] = forward
            replaced |= dict(forward.replaced)
    left = {module: why[module] for module in taken if module in why}
    for module in known:
        if module not in replaced:
            left[module] = _reason(module, paths, why, flags)
    return PatchReport(
        replaced=tuple(
            Replaced(path=path, by=replaced[module]) for module, path in paths.items() if module in replaced
        ),
        left=tuple(Left(path=path, why=left[module]) for module, path in paths.items() if module in left),
    )


def _input(owner: nn.Module, inputs: dict[nn.Module, Tensor | None] | None) -> Tensor:
    name = type(owner).__name__
    if inputs is None:
        raise Refused(f"the model takes no random image of {', '.join(map(str, _SIZES))} pixels: give an example")
    if owner not in inputs:
        raise Refused(f"the example does not reach {name}")
    x = inputs[owner]
    if x is None:
        raise Refused(f"{name} is called with something else than one map (N, C, H, W)")
    return x


def _reason(
    module: nn.Module, paths: dict[nn.Module, str], why: dict[nn.Module, str], flags: dict[nn.Module, bool]
) -> str:
    """Why a norm or a pooling is left."""
    norm = isinstance(module, _BatchNorm)
    if norm and not BatchNormWithStatistics.fits(module):
        return "not a BatchNorm2d with stored statistics and its own forward"
    if hooked(module):
        return "a hook watches it"
    if norm and (unfrozen := _unfrozen(module, flags)) is not None:
        return unfrozen
    modules = {path: each for each, path in paths.items()}
    path = paths[module]
    while path:
        path = path.rpartition(".")[0]
        owner = modules[path]
        if owner in why:
            return why[owner]
        if not isinstance(owner, _CONTAINERS):
            break
    if norm:
        return "nothing follows it that is computed with it"
    return "its indices go elsewhere, or it is not a 2 x 2 pooling"


def unpatch(model: nn.Module) -> None:
    """Take away what :func:`patch` put into a model: every module's forward is that of its class again.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), PatchedForward):
            del module.__dict__["forward"]
