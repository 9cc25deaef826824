"""Fused ops in a user's model: :func:`patch` and :func:`unpatch`.

Only the ``forward`` of single modules is replaced, on the instance, and only after the fused one gave the same values.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from dfkd_fast.graph.extract import FeatureModel
from dfkd_fast.graph.fusion import find, fuse, fuse_pools, gives_statistics, indexed
from dfkd_fast.graph.modes import attributes_kept, preserve_state
from dfkd_fast.graph.tracing import Root, Trace, alike, compile_graph, first_line, follow, hooked, run

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]

_SIZES = (64, 32, 224)  # image sizes that are tried without an example
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A module that :func:`patch` replaced: its path in the model, and the op, with the operations fused into it."""

    path: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Left:
    """A module that :func:`patch` recognised and left: its path in the model, and the reason."""

    path: str
    why: str


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """The result of :func:`patch`: each BatchNorm and pooling with indices, in the order of ``named_modules``."""

    replaced: tuple[Replaced, ...] = ()
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {one.path or '(the model)'}: {one.by}" for one in self.replaced]
        for why, count in Counter(one.why for one in self.left).items():
            first = next(one.path for one in self.left if one.why == why) or "(the model)"
            lines.append(f"  left {first}{f' and {count - 1} more' if count > 1 else ''}: {why}")
        return "\n".join(lines)


class _Refused(Exception):
    """The reason why a module is left."""


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A forward may fail in any way, as may a graph that took the wrong turn."""
    try:
        yield
    except Exception as error:
        raise _Refused(f"{what}: {first_line(error)}") from error


class _PatchedForward:
    """The forward of one module with fused ops in it; an entry of the module's ``__dict__``.

    The class's forward runs instead for other arguments than one map, with a norm in training mode, or with a hook on a
    module that would be skipped.
    """

    def __init__(self, found: Trace, replaced: dict[nn.Module, str], skipped: list[nn.Module], eval_only: bool) -> None:
        self.model, self.replaced, self.skipped, self.eval_only = found.root.model, replaced, skipped, eval_only
        # As a function, so that copies share it; its paths start from this object.
        self.program: Callable[..., Any] = type(compile_graph(found.root, found.graph)).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = any(module.training and isinstance(module, _BatchNorm) for module in self.skipped)
        training |= self.eval_only and self.model.training
        if training or kwargs or not _is_map(args) or any(map(hooked, self.skipped)):
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.program(self, args[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> _PatchedForward:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> Any:
        # A pickled model is loaded without the patch: while it is being built, this is the class's forward.
        return getattr, (self.model, "forward")


def _is_map(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim == 4


def _fuse_norms(found: Trace, x: Tensor) -> tuple[dict[nn.Module, str], list[nn.Module]]:
    """Fuse BatchNorms with what follows them; returns them, and the modules that are skipped with them."""
    replaced: dict[nn.Module, str] = {}
    skipped: list[nn.Module] = []
    with _refusing(f"the graph of {type(found.root.model).__name__} does not run on the example"):
        run(found.root, found.graph, x.clone())
    for fusion in find(found):
        norm = found.module(fusion.norm)
        if norm is not None and str(fusion) and not hooked(norm):
            replaced[norm] = f"batchnorm_statistics ({fusion})"
            after = [found.module(node) for node in (*fusion.between, fusion.last)]
            skipped += [inner for each in after if each is not None for inner in each.modules()]
            found.graph.erase_node(fuse(found.graph, fusion))
    return replaced, skipped


def _fused(module: nn.Module, x: Tensor, unfrozen: str | None, training: bool) -> _PatchedForward | None:
    """A module's forward with everything fused that can be; None where nothing can."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise _Refused(f"{name} is compiled by TorchScript")
    own = MethodType(type(module).forward, module)
    if module.__dict__.get("forward", own) != own:
        raise _Refused(f"the forward of {name} was set on the instance")
    try:
        with attributes_kept(module) as written:
            found = other = follow(Root(module), training=False, shallow=True)
            if any(map(indexed, module.modules())):
                other = follow(Root(module), training=True, shallow=True)
    except ValueError as error:
        raise _Refused(str(error)) from error
    if written:
        raise _Refused(f"the forward of {name} sets {', '.join(sorted(written))}")
    if any(not str(node.target).startswith("model.") for node in found.graph.find_nodes(op="get_attr")):
        raise _Refused(f"the forward of {name} makes tensors of its own")
    eval_only = unfrozen is None or str(found.graph) != str(other.graph)
    replaced = {} if training and eval_only else fuse_pools(found)
    norms, skipped = _fuse_norms(found, x) if unfrozen is None else ({}, [])
    if not replaced | norms:
        return None
    forward = _PatchedForward(found, replaced | norms, [*skipped, *replaced, *norms], eval_only)
    with _refusing(f"{name} cannot be tried"):
        expected, given = own(x.clone()), forward.program(forward, x.clone())
    # Convolutions may run in TF32 on CUDA devices; wrong values are further off than that.
    if not alike(given, expected, 1e-4 if x.dtype in (torch.float32, torch.float64) and not x.is_cuda else 2e-2):
        raise _Refused(f"the fused form of {name} gives other values on the example")
    return forward


def _images(model: nn.Module) -> list[tuple[Tensor]]:
    """Two random images of each of some sizes, if the model begins with a layer of images."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, _BatchNorm)
    first: Any = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if not isinstance(first, nn.Conv2d | nn.BatchNorm2d):
        return []
    like = next(iter([*first.parameters(), *first.buffers()]), torch.zeros(()))
    channels = first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, channels, size, size, generator=generator).to(like),) for size in _SIZES]


def _inputs(model: nn.Module, owners: Sequence[nn.Module], example: Any) -> dict[nn.Module, Tensor | str]:
    """The map that each module is called with first, or why there is none."""
    seen: dict[nn.Module, Tensor | str] = {}

    def record(module: nn.Module, args: Any) -> None:
        if module in owners and module not in seen:
            wrong = f"{type(module).__name__} is called with something else than one map (N, C, H, W)"
            seen[module] = args[0].detach().clone() if _is_map(args) else wrong

    examples = _images(model) if example is None else [example if isinstance(example, tuple) else (example,)]
    missing = f"the model takes no random image of {', '.join(map(str, _SIZES))} pixels: give an example"
    with register_module_forward_pre_hook(record):
        for each in examples if owners else []:
            try:
                model(*each)
                missing = "the example does not reach it"
                break
            except Exception as error:  # a forward may fail in many ways on an image that does not suit it
                seen.clear()
                if example is not None:
                    name = type(model).__name__
                    raise ValueError(f"{name} does not take the example. {first_line(error)}") from error
    return {owner: seen.get(owner, missing) for owner in owners}


def _unfrozen(module: nn.Module, flags: dict[nn.Module, bool]) -> str | None:
    """Why a module is not frozen and in eval mode with all below it; None if it is."""
    if any(flags[each] for each in module.modules()):
        return "in training mode: call eval() first"
    if any(parameter.requires_grad for parameter in module.parameters()):
        return "trainable: call requires_grad_(False) first where it is to stay as it is"
    return None


def patch(model: nn.Module, *, example: Any = None) -> PatchReport:
    """Replace patterns in the forwards of a model's modules by fused ops:

    * a BatchNorm2d (or timm's BatchNormAct2d) with the addition, ReLU or ReLU6 that follows it, in a module that is
      frozen and in eval mode with all below it: :func:`dfkd_fast.ops.batchnorm_statistics`;
    * ``MaxPool2d(2, return_indices=True)`` whose indices only go to ``MaxUnpool2d(2)``, in any mode, trainable or not:
      :func:`dfkd_fast.ops.max_pool2x2`.

    The model stays the same object, as do all modules in it: state dict, names, flags and hooks are untouched. A
    patched forward steps aside for the class's own in training mode, for further arguments, and for hooks on a module
    that it would skip. A copy (``copy.deepcopy``) is patched too; a pickled model is loaded without the patch.

    Values and gradients are those of before up to rounding; fused backends have no second derivative. The fused ops are
    for CUDA devices; elsewhere plain PyTorch computes the same values in more passes. Patch anew after modules were
    exchanged or an attribute was set that steers a forward. Not for ``nn.DataParallel``, whose replicas would all run
    the first one's forward, nor for TorchScript.

    Args:
        model: any module; it may hold a frozen teacher, which is patched, and a student, which is left.
        example: an input of the model, to try the fused forms in eval mode: a tensor or a tuple of arguments. None is
            random images of 64, 32 or 224 pixels a side, the first size that the model takes.

    Returns:
        The modules that were replaced and those that were left, with the reason.

    Raises:
        TypeError: model is not a module, or is the result of :func:`dfkd_fast.models.extract`, which is fused already.
        ValueError: the model does not take the example.
    """
    unpatch(model)
    if isinstance(model, FeatureModel):
        raise TypeError("model must be a plain network, got a FeatureModel, which runs a graph of its own")
    paths = {module: path for path, module in model.named_modules()}
    flags = {module: module.training for module in paths}
    known = {module for module in paths if isinstance(module, _BatchNorm) or indexed(module)}
    owners = [m for m in paths if m not in known and not isinstance(m, _CONTAINERS) and known.intersection(m.modules())]
    unfrozen = {owner: _unfrozen(owner, flags) for owner in owners}
    tried = [owner for owner in owners if unfrozen[owner] is None or any(map(indexed, owner.modules()))]
    why: dict[nn.Module, str] = {}
    forwards: list[_PatchedForward] = []
    with attributes_kept(model), preserve_state(model, next(model.parameters(), torch.zeros(())).device):
        for owner, x in _inputs(model, tried, example).items():
            try:
                if isinstance(x, str):
                    raise _Refused(x)
                if forward := _fused(owner, x, unfrozen[owner], flags[owner]):
                    forwards.append(forward)
            except _Refused as refused:
                why[owner] = str(refused)
    replaced = {module: by for forward in forwards for module, by in forward.replaced.items()}
    for forward in forwards:
        forward.model.__dict__["forward"] = forward

    def reason(module: nn.Module) -> str:
        path, owner = paths[module], module
        while path and (owner is module or isinstance(owner, _CONTAINERS)):
            path = path.rpartition(".")[0]
            owner = model.get_submodule(path)
        norm = isinstance(module, _BatchNorm)
        if norm and not gives_statistics(module):
            return "not a BatchNorm2d with stored statistics and its own forward"
        if hooked(module):
            return "a hook watches it"
        default = (
            "nothing follows it that can be fused" if norm else "its indices go elsewhere, or it is not a 2 x 2 pooling"
        )
        return (unfrozen.get(owner) if norm else None) or why.get(owner) or default

    return PatchReport(
        replaced=tuple(Replaced(path=paths[module], by=replaced[module]) for module in paths if module in replaced),
        left=tuple(Left(path=paths[m], why=reason(m)) for m in paths if m in known and m not in replaced),
    )


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: every module's forward is that of its class again.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _PatchedForward):
            del module.__dict__["forward"]
