"""Replaces patterns in a user's model by fused ops: :func:`patch` and :func:`unpatch`.

``patch`` sets ``forward`` on module instances. It first checks that the fused forward returns the same values.
"""

from __future__ import annotations

import copy
import inspect
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
from dfkd_fast.graph.fusion import find, fuse, fuse_pools, has_indices, supports_statistics
from dfkd_fast.graph.modes import not_compiled, preserve_attributes, preserve_state
from dfkd_fast.graph.tracing import (
    Root,
    Trace,
    all_close,
    compile_graph,
    first_line,
    run,
    symbolic_trace,
    unwrap,
)
from dfkd_fast.nn.norm import has_hooks

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]

_SIZES = (64, 32, 224)  # tried in this order if no example is given
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A module that :func:`patch` replaced: its path in the model, and the op with the operations that it fuses."""

    path: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Left:
    """A module that :func:`patch` did not replace: its path in the model and the reason."""

    path: str
    why: str


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """The result of :func:`patch`: all BatchNorms and poolings with indices, in the order of ``named_modules``."""

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
    """The reason why a module is not replaced."""


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns any exception into :class:`_Refused`: a forward, or the graph of one, may fail in any way."""
    try:
        yield
    except Exception as error:
        raise _Refused(f"{what}: {first_line(error)}") from error


class _PatchedForward:
    """A module's forward with fused ops, stored in the module's ``__dict__``.

    It calls the class's forward if the arguments are not one map (N, C, H, W), if a fused BatchNorm is in training mode
    (with ``eval_only``: or the module itself), if a module that the fused ops bypass has a hook, or while the model is
    exported or traced by TorchScript.
    """

    def __init__(self, trace: Trace, replaced: dict[nn.Module, str], skipped: list[nn.Module], eval_only: bool) -> None:
        self.model, self.replaced, self.skipped, self.eval_only = trace.root.model, replaced, skipped, eval_only
        # A plain function, which copies share. Called with this object as ``self``, it finds modules in ``self.model``.
        self.program: Callable[..., Any] = type(compile_graph(trace.root, trace.graph)).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = any(module.training and isinstance(module, _BatchNorm) for module in self.skipped)
        training |= self.eval_only and self.model.training
        # Programs that read an exported graph do not have the ops. Dynamo always takes is_exporting as true.
        exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        exporting |= torch.jit.is_tracing()
        if exporting or training or kwargs or not _is_map(args) or any(map(has_hooks, self.skipped)):
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.program(self, args[0])

    @property
    def __code__(self) -> Any:
        return type(self.model).forward.__code__  # torch.export reads it, and the signature

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    def __deepcopy__(self, memo: dict[int, Any]) -> _PatchedForward:
        result = memo[id(self)] = object.__new__(type(self))
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    def __reduce__(self) -> Any:
        # A model is unpickled without the patch: ``getattr`` then returns the forward of the model's class.
        return getattr, (self.model, "forward")


def _is_map(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim == 4


def _fuse_norms(trace: Trace, x: Tensor) -> tuple[dict[nn.Module, str], list[nn.Module]]:
    """Fuses BatchNorms; returns the op of each and the modules that the fused ops bypass."""
    replaced: dict[nn.Module, str] = {}
    skipped: list[nn.Module] = []
    with _refusing(f"the graph of {type(trace.root.model).__name__} does not run on the example"):
        run(trace.root, trace.graph, x.clone())
    for fusion in find(trace):
        norm = trace.module(fusion.norm)
        if norm is not None and str(fusion) and not has_hooks(norm):
            replaced[norm] = f"batchnorm_statistics ({fusion})"
            after = [trace.module(node) for node in (*fusion.between, fusion.last)]
            skipped += [inner for each in after if each is not None for inner in each.modules()]
            fuse(trace.graph, fusion)
    return replaced, skipped


def _fused(module: nn.Module, x: Tensor, unfrozen: str | None, training: bool) -> _PatchedForward | None:
    """The fused forward of a module, or None if nothing can be fused."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise _Refused(f"{name} is compiled by TorchScript")
    own = MethodType(type(module).forward, module)
    if module.__dict__.get("forward", own) != own:
        raise _Refused(f"the forward of {name} was set on the instance")
    try:
        with preserve_attributes(module) as written:
            trace = other = symbolic_trace(Root(module), training=False, shallow=True)
            if any(map(has_indices, module.modules())):
                other = symbolic_trace(Root(module), training=True, shallow=True)
    except ValueError as error:
        raise _Refused(str(error)) from error
    if written:
        raise _Refused(f"the forward of {name} sets {', '.join(sorted(written))}")
    if any(not str(node.target).startswith("model.") for node in trace.graph.find_nodes(op="get_attr")):
        raise _Refused(f"the forward of {name} creates tensors")
    # The patched forward then runs in eval mode only: its BatchNorms are fused, or the forward depends on the mode.
    eval_only = unfrozen is None or str(trace.graph) != str(other.graph)
    replaced = {} if training and eval_only else fuse_pools(trace)
    norms, skipped = _fuse_norms(trace, x) if unfrozen is None else ({}, [])
    if not replaced | norms:
        return None
    forward = _PatchedForward(trace, replaced | norms, [*skipped, *replaced, *norms], eval_only)
    with _refusing(f"{name} failed on the example"):
        expected, given = own(x.clone()), forward.program(forward, x.clone())
    # Convolutions may run in TF32 on CUDA devices; a wrong graph has a larger error than TF32.
    if not all_close(given, expected, 1e-4 if x.dtype in (torch.float32, torch.float64) and not x.is_cuda else 2e-2):
        raise _Refused(f"the fused form of {name} returns other values on the example")
    return forward


def _images(model: nn.Module) -> list[tuple[Tensor]]:
    """Batches of two random images in several sizes; none if the first layer does not take images."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, _BatchNorm)
    first: Any = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if not isinstance(first, nn.Conv2d | nn.BatchNorm2d):
        return []
    like = next(iter([*first.parameters(), *first.buffers()]), torch.zeros(()))
    channels = first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, channels, size, size, generator=generator).to(like),) for size in _SIZES]


def _inputs(model: nn.Module, owners: Sequence[nn.Module], example: Any) -> dict[nn.Module, Tensor | str]:
    """The map that each module receives in its first call, or the reason why there is none."""
    seen: dict[nn.Module, Tensor | str] = {}

    def record(module: nn.Module, args: Any) -> None:
        if module in owners and module not in seen:
            wrong = f"{type(module).__name__} is not called with exactly one map (N, C, H, W)"
            seen[module] = args[0].detach().clone() if _is_map(args) else wrong

    examples = _images(model) if example is None else [example if isinstance(example, tuple) else (example,)]
    missing = f"the model accepts no random image of {', '.join(map(str, _SIZES))} pixels: pass an example"
    with register_module_forward_pre_hook(record):
        for each in examples if owners else []:
            try:
                model(*each)
                missing = "the example does not reach it"
                break
            except Exception as error:  # a forward may fail in any way on an unsuitable image
                seen.clear()
                if example is not None:
                    name = type(model).__name__
                    raise ValueError(f"{name} does not accept the example. {first_line(error)}") from error
    return {owner: seen.get(owner, missing) for owner in owners}


def _unfrozen(module: nn.Module, flags: dict[nn.Module, bool]) -> str | None:
    """The reason why a module and its submodules are not frozen and in eval mode; None if they are."""
    if any(flags[each] for each in module.modules()):
        return "in training mode: call eval() first"
    if any(parameter.requires_grad for parameter in module.parameters()):
        return "trainable: call requires_grad_(False) first if it is not to be trained"
    return None


def _require_one_device(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"nn.DataParallel on {len(module.device_ids)} devices is not supported: its replicas would run the "
                "patched forward of the first device; use DistributedDataParallel"
            )


def patch(model: nn.Module, *, example: Any = None) -> PatchReport:
    """Replace patterns in a model's forward by fused ops:

    * a BatchNorm2d (or SyncBatchNorm, timm's BatchNormAct2d, torchvision's FrozenBatchNorm2d) and the addition, ReLU or
      ReLU6 that follows it, in a module that is frozen and in eval mode: :func:`dfkd_fast.ops.batchnorm_statistics`;
    * ``MaxPool2d(2, return_indices=True)`` whose indices are read only by ``MaxUnpool2d(2)``, in any mode, trainable or
      not: :func:`dfkd_fast.ops.max_pool2x2`.

    The model and its modules stay the same objects; state dict, names, flags and hooks do not change. A patched module
    runs its original forward in training mode if it was frozen and in eval mode when patched or if its forward depends
    on the mode, and always with further arguments, in ``torch.export`` and ``torch.jit.trace``, or if a module that
    the fused ops bypass has a hook. A copy (``copy.deepcopy``) is patched; an unpickled model is not.

    Values and gradients stay the same up to rounding; fused backends compute no second derivative. Without CUDA devices
    the ops run in plain PyTorch. Patch again after replacing modules or changing an attribute that the forward reads.
    In a wrapper (``torch.compile``, ``DistributedDataParallel``, ``AveragedModel``), the plain network is patched, and
    paths are those in it; code that torch.compile has compiled before is discarded. ``nn.DataParallel`` on several
    devices (all replicas would run the forward of the first) and TorchScript are not supported.

    Args:
        model: any module. It may contain both a frozen teacher, which is patched, and a student in training, which is
            not.
        example: an input of the model to check the fused forward with: a tensor or a tuple of arguments. None tries
            random images of 64, 32 and 224 pixels.

    Returns:
        The modules that were replaced, and the others with the reason why they were not.

    Raises:
        TypeError: model is not a module, or is a :class:`dfkd_fast.models.FeatureModel`, which is already fused.
        ValueError: the model does not accept the example, or is in ``nn.DataParallel`` on several devices.
    """
    unpatch(model)
    _require_one_device(model)
    model = unwrap(model)
    if isinstance(model, FeatureModel):
        raise TypeError("model must be a plain network, got a FeatureModel, which is already fused")
    paths = {module: path for path, module in model.named_modules()}
    flags = {module: module.training for module in paths}
    known = {module for module in paths if isinstance(module, _BatchNorm) or has_indices(module)}
    known |= {module for module in paths if supports_statistics(module)}
    owners = [m for m in paths if m not in known and not isinstance(m, _CONTAINERS) and known.intersection(m.modules())]
    unfrozen = {owner: _unfrozen(owner, flags) for owner in owners}
    tried = [owner for owner in owners if unfrozen[owner] is None or any(map(has_indices, owner.modules()))]
    why: dict[nn.Module, str] = {}
    forwards: list[_PatchedForward] = []
    device = next(model.parameters(), torch.zeros(())).device
    with preserve_attributes(model), preserve_state(model, device), not_compiled(model):
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
        norm = not has_indices(module)
        if norm and not supports_statistics(module):
            return "not a BatchNorm of maps with running statistics, or it overrides forward"
        if has_hooks(module):
            return "it has a hook"
        default = "no operation to fuse follows" if norm else "not a 2 x 2 pooling whose indices only unpoolings read"
        return (unfrozen.get(owner) if norm else None) or why.get(owner) or default

    return PatchReport(
        replaced=tuple(Replaced(path=paths[module], by=replaced[module]) for module in paths if module in replaced),
        left=tuple(Left(path=paths[m], why=reason(m)) for m in paths if m in known and m not in replaced),
    )


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _PatchedForward):
            del module.__dict__["forward"]
