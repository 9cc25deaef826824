"""Fused ops in a user's model: :func:`patch` and :func:`unpatch`.

Only the ``forward`` of single modules is replaced, on the instance: modules, parameters, buffers, their names and their
flags stay the same. These patterns are recognised in a module's forward:

* a BatchNorm2d (or timm's BatchNormAct2d) with the addition, ReLU or ReLU6 that follows it. The module and all below it
  must be frozen and in eval mode;
* ``MaxPool2d(2, return_indices=True)`` whose indices only go to ``MaxUnpool2d(2)``, in any mode, trainable or not.

A fused forward takes the place of the original only after it gave the same values for an example.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from dfkd_fast import ops
from dfkd_fast.graph.batchnorm import gives_statistics
from dfkd_fast.graph.extract import FeatureModel
from dfkd_fast.graph.fusion import find, fuse
from dfkd_fast.graph.modes import undisturbed
from dfkd_fast.graph.tracing import Root, Trace, compile_graph, first_line, follow, hooked, run

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]

_SIZES = (64, 32, 224)  # image sizes that are tried without an example
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A module that :func:`patch` replaced.

    Attributes:
        path: of the module, in the model.
        by: the op, and what it computes besides.
    """

    path: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Left:
    """A module that :func:`patch` recognised and left.

    Attributes:
        path: of the module, in the model.
        why: the reason, in words.
    """

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


class _PatchedForward:
    """The forward of one module with fused ops in it; an entry of the module's ``__dict__``.

    The class's forward runs instead where this one does not hold: for other arguments than one map, with a norm in
    training mode, or with a hook on a module whose own forward would not run.
    """

    def __init__(self, found: Trace, replaced: dict[nn.Module, str], skipped: list[nn.Module], eval_only: bool) -> None:
        self.model, self.replaced, self.skipped, self.eval_only = found.root.model, replaced, skipped, eval_only
        self.norms = [module for module in replaced if isinstance(module, _BatchNorm)]
        # As a function, so that copies share it; its paths start from this object.
        self.program: Callable[..., Any] = type(compile_graph(found.root, found.graph)).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            _is_map(args, kwargs)
            and not (self.eval_only and self.model.training)
            and not any(norm.training for norm in self.norms)
            and not any(hooked(module) for module in self.skipped)
        ):
            return self.program(self, args[0])
        return type(self.model).forward(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _PatchedForward:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    def __reduce__(self) -> Any:
        # A pickled model is loaded without the patch: while it is being built, this is the class's forward.
        return getattr, (self.model, "forward")


def _is_map(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[set[str]]:
    """Leaving undoes what a forward set on its modules, and puts the names of that into the set that is yielded."""
    saved = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    for now, before in saved:  # inside, a forward writes into copies
        now.update({name: copy.copy(held) for name, held in before.items() if type(held) in (list, dict, set)})
    written: set[str] = set()
    try:
        yield written
    finally:
        for now, before in saved:
            written |= {name for name in now.keys() | before.keys() if not _same(now.get(name), before.get(name))}
            now.clear()
            now.update(before)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or type(a) not in (list, dict, set):
        return a is b
    left, right = ([*map(id, each), *map(id, each.values() if type(each) is dict else ())] for each in (a, b))
    return left == right


def _is_2x2(module: nn.Module | None, kind: type) -> bool:
    def pair(value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value, value)

    if module is None or type(module) is not kind or hooked(module):
        return False
    sizes: Any = module
    if [pair(each) for each in (sizes.kernel_size, sizes.stride, sizes.padding)] != [(2, 2), (2, 2), (0, 0)]:
        return False
    return kind is nn.MaxUnpool2d or (sizes.return_indices and pair(sizes.dilation) == (1, 1) and not sizes.ceil_mode)


def _unpool(y: Tensor, code: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """MaxUnpool2d's arguments: its size may have all four dimensions."""
    return ops.max_unpool2x2(y, code, None if output_size is None else tuple(output_size)[-2:])


def _fuse_pools(found: Trace) -> dict[nn.Module, str]:
    """Each pooling whose indices only unpoolings read, and those: with uint8 codes instead of indices."""
    replaced: dict[nn.Module, str] = {}
    for node in found.graph.find_nodes(op="call_module"):
        pool, parts = found.module(node), list(node.users)
        if not _is_2x2(pool, nn.MaxPool2d) or len(node.args) != 1 or node.kwargs:
            continue
        users = [(part, user) for part in parts if part.args[1:] == (1,) for user in part.users]
        if not users or any(part.target is not operator.getitem for part in parts):
            continue
        if all(
            _is_2x2(found.module(user), nn.MaxUnpool2d)
            and (user.args[0] is not part and user.args[1:2] == (part,) and user.kwargs.keys() <= {"output_size"})
            for part, user in users
        ):
            replaced |= {pool: "max_pool2x2"} | {found.module(user): "max_unpool2x2" for _, user in users}
            for each, function in [(node, ops.max_pool2x2), *((user, _unpool) for _, user in users)]:
                each.op, each.target = "call_function", function
    return replaced


def _indexed(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxUnpool2d) or (isinstance(module, nn.MaxPool2d) and module.return_indices)


def _fused(module: nn.Module, x: Tensor, unfrozen: str | None, training: bool) -> _PatchedForward | None:
    """A module's forward with everything fused that can be; None where nothing can."""
    name, own = type(module).__name__, MethodType(type(module).forward, module)
    if module.__dict__.get("forward", own) != own:
        raise _Refused(f"the forward of {name} was set on the instance")
    if isinstance(module, torch.jit.ScriptModule):
        raise _Refused(f"{name} is compiled by TorchScript")
    try:
        with _attributes_kept(module) as written:
            found, other = (follow(Root(module), training=mode, shallow=True) for mode in (False, True))
    except ValueError as error:
        raise _Refused(str(error)) from error
    if written:
        raise _Refused(f"the forward of {name} sets {', '.join(sorted(written))}")
    if any(not str(node.target).startswith("model.") for node in found.graph.find_nodes(op="get_attr")):
        raise _Refused(f"the forward of {name} makes tensors of its own")
    eval_only = unfrozen is None or str(found.graph) != str(other.graph)
    replaced = {} if training and eval_only else _fuse_pools(found)
    skipped: list[nn.Module] = []
    if unfrozen is None:
        try:
            run(found.root, found.graph, x.clone())
        except Exception as error:  # a graph that took the wrong turn may fail in any way
            raise _Refused(f"the graph of {name} does not run on the example: {first_line(error)}") from error
        for fusion in find(found):
            norm = found.module(fusion.norm)
            if norm is not None and str(fusion) and not hooked(norm):
                replaced[norm] = f"batchnorm_statistics ({fusion})"
                after = [found.module(node) for node in (*fusion.between, fusion.last)]
                skipped += [inner for each in after if each is not None for inner in each.modules()]
                found.graph.erase_node(fuse(found.graph, fusion))
    if not replaced:
        return None
    forward = _PatchedForward(found, replaced, [*skipped, *replaced], eval_only)
    try:
        expected, given = (tree_leaves(f(x.clone())) for f in (own, lambda y: forward.program(forward, y)))
    except Exception as error:
        raise _Refused(f"{name} cannot be tried: {first_line(error)}") from error
    if len(given) != len(expected) or not all(map(_close, given, expected)):
        raise _Refused(f"the fused form of {name} gives other values on the example")
    return forward


def _close(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return bool(found == expected)
    # Convolutions may run in TF32 on CUDA devices; wrong values are further off than that.
    exact = expected.dtype in (torch.float32, torch.float64) and not expected.is_cuda
    scale = expected.float().nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0.0
    return (found.shape, found.dtype) == (expected.shape, expected.dtype) and torch.allclose(
        found.float(), expected.float(), rtol=0, atol=(1e-4 if exact else 2e-2) * scale, equal_nan=True
    )


def _images(model: nn.Module) -> list[tuple[Any, ...]]:
    """Two random images of each of some sizes, if the model begins with a layer of images."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, _BatchNorm)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.Conv2d):
        channels, like = first.in_channels, first.weight
    elif isinstance(first, nn.BatchNorm2d) and first.running_mean is not None:
        channels, like = first.num_features, first.running_mean
    else:
        return []
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, channels, size, size, generator=generator).to(like),) for size in _SIZES]


def _inputs(model: nn.Module, owners: Sequence[nn.Module], example: Any) -> dict[nn.Module, Tensor | str]:
    """The map that each module is called with first, or why there is none.

    Raises:
        ValueError: the model does not take the example.
    """
    seen: dict[nn.Module, Tensor | str] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in seen:
            wrong = f"{type(module).__name__} is called with something else than one map (N, C, H, W)"
            seen[module] = args[0].detach().clone() if _is_map(args, kwargs) else wrong

    examples = _images(model) if example is None else [example if isinstance(example, tuple) else (example,)]
    handles = [owner.register_forward_pre_hook(record, with_kwargs=True) for owner in owners]
    try:
        for each in examples if owners else []:
            try:
                seen.clear()
                model(*each)
                return {owner: f"the example does not reach {type(owner).__name__}" for owner in owners} | seen
            except Exception as error:  # a forward may fail in many ways on an image that does not suit it
                if example is not None:
                    name = type(model).__name__
                    raise ValueError(f"{name} does not take the example. {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    sizes = ", ".join(map(str, _SIZES))
    return dict.fromkeys(owners, f"the model takes no random image of {sizes} pixels: give an example")


def _unfrozen(module: nn.Module, flags: dict[nn.Module, bool]) -> str | None:
    """Why a module is not frozen and in eval mode with all below it; None if it is."""
    if any(flags[each] for each in module.modules()):
        return "in training mode: call eval() first"
    if any(parameter.requires_grad for parameter in module.parameters()):
        return "trainable: call requires_grad_(False) first where it is to stay as it is"
    return None


def patch(model: nn.Module, *, example: Any = None) -> PatchReport:
    """Replace patterns in a model by fused ops; see :mod:`dfkd_fast.graph.patching` for the list.

    The model stays the same object, as do all modules in it: state dict, names, flags and hooks are untouched. Only the
    ``forward`` of some modules is another. It steps aside for the class's own in training mode, for further arguments,
    and for hooks on a module that it would skip. A copy (``copy.deepcopy``) is patched too; a pickled model is loaded
    without the patch.

    Values and gradients are those of before up to rounding; fused backends have no second derivative. The fused ops are
    for CUDA devices; elsewhere plain PyTorch computes the same values in more passes. A second call starts anew: it is
    needed after modules were exchanged or an attribute was set that steers a forward. Not for ``nn.DataParallel``,
    whose replicas would all run the first one's forward; nor does TorchScript follow it.

    Args:
        model: any module. Every part of it is looked at, so that a module may hold a frozen teacher, which is patched,
            and a student that is left.
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
    flags = {module: module.training for module in model.modules()}
    known = {module for module in flags if isinstance(module, _BatchNorm) or _indexed(module)}
    why: dict[nn.Module, str] = {}
    unfrozen: dict[nn.Module, str | None] = {}
    for module in flags.keys() - known:
        if not isinstance(module, _CONTAINERS) and not known.isdisjoint(module.modules()):
            reason = _unfrozen(module, flags)
            if reason is None or any(map(_indexed, module.modules())):
                unfrozen[module] = reason
            else:
                why[module] = reason
    forwards: list[_PatchedForward] = []
    with _attributes_kept(model), undisturbed(model, next(model.parameters(), torch.zeros(())).device):
        for module, x in _inputs(model, list(unfrozen), example).items():
            try:
                if isinstance(x, str):
                    raise _Refused(x)
                if forward := _fused(module, x, unfrozen[module], flags[module]):
                    forwards.append(forward)
            except _Refused as refused:
                why[module] = str(refused)
    replaced: dict[nn.Module, str] = {}
    for forward in forwards:
        forward.model.__dict__["forward"] = forward
        replaced |= forward.replaced
    report: tuple[list[Replaced], list[Left]] = [], []
    for path, module in model.named_modules():
        if module in replaced:
            report[0].append(Replaced(path=path, by=replaced[module]))
        elif module in known:
            report[1].append(Left(path=path, why=_reason(model, path, why, flags)))
    return PatchReport(replaced=tuple(report[0]), left=tuple(report[1]))


def _reason(model: nn.Module, path: str, why: dict[nn.Module, str], flags: dict[nn.Module, bool]) -> str:
    """Why a norm or a pooling is left."""
    module = model.get_submodule(path)
    norm = isinstance(module, _BatchNorm)
    if norm and not gives_statistics(module):
        return "not a BatchNorm2d with stored statistics and its own forward"
    if hooked(module):
        return "a hook watches it"
    if norm and (unfrozen := _unfrozen(module, flags)) is not None:
        return unfrozen
    owner = module
    while path and (owner is module or (isinstance(owner, _CONTAINERS) and owner not in why)):
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
    default = (
        "nothing follows it that is computed with it"
        if norm
        else "its indices go elsewhere, or it is not a 2 x 2 pooling"
    )
    return why.get(owner, default)


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
