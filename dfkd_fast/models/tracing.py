"""A network's forward as a torch.fx graph, and where in it stages, penultimate features and logits are."""

from __future__ import annotations

import difflib
import linecache
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["Root", "Trace", "compile_graph", "default_stages", "follow", "modes_kept", "trace"]

Shape = tuple[int, ...]
Program = Callable[[nn.Module, Tensor], tuple[Any, ...]]

# What may stand after the last linear layer, and changes no value.
_RESHAPES: set[Any] = {torch.flatten, torch.squeeze, torch.reshape, "flatten", "view", "reshape", "squeeze"}
_DROPOUTS: set[Any] = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout}


class Root(nn.Module):
    """What is traced: the network under the path ``model``, with none of its forward's further arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


@contextmanager
def modes_kept(model: nn.Module, training: bool) -> Iterator[None]:
    """``model`` in train or eval mode inside; every module's flag is put back on leaving."""
    saved = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in saved:
            module.training = flag


def _library(name: str) -> ModuleType | None:
    """A library where it is loaded: a network that was made with it has loaded it."""
    return sys.modules.get(name)


class _Tracer(fx.Tracer):
    """Keeps, beside the graph, which node is the output of which module.

    Modules whose behaviour depends on their own training flag stay whole, so that the flag acts when the graph runs.
    With ``evaluating`` the dropouts among them are followed instead, and so vanish from a graph of eval mode.
    """

    def __init__(self, *, evaluating: bool) -> None:
        timm, torchvision = _library("timm.layers"), _library("torchvision.ops")
        wrapped = tuple(timm.get_notrace_functions()) if timm is not None else ()
        modules: Any = (math, torchvision) if torchvision is not None else (math,)
        super().__init__(autowrap_modules=modules, autowrap_functions=wrapped)
        self.leaves: tuple[type, ...] = (_BatchNorm, nn.Linear)
        dropouts: tuple[type, ...] = (_DropoutNd,)
        if timm is not None:
            self.leaves += tuple(timm.get_notrace_modules())
            dropouts += (timm.DropPath,)
        if torchvision is not None:
            self.leaves += (torchvision.FrozenBatchNorm2d,)
            dropouts += (torchvision.StochasticDepth,)
        if not evaluating:
            self.leaves += dropouts
        self.followed = dropouts if evaluating else ()
        self.outputs: dict[str, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self.followed) or module_qualified_name == "model":
            return False
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        if isinstance(result, fx.Proxy):
            # Outer modules come after what they hold: of the names of a node the outermost is the last.
            self.outputs.pop(path, None)
            self.outputs[path] = result.node
            if args and isinstance(args[0], fx.Proxy):
                self.inputs[path] = args[0].node
        return result


class Trace:
    """A graph of ``root`` with one input and the logits as its output.

    Attributes:
        graph: nodes that call modules below ``root.model``.
        modules: the node that is the output of each module, by its path in the network, inner modules first.
        inputs: the node that each of them reads.
        logits, classifier, penultimate: nodes; the classifier is the last linear layer.
        statistics: nodes that give a BatchNorm's statistics, where some were put in.
    """

    def __init__(self, root: Root, graph: fx.Graph, outputs: dict[str, fx.Node], inputs: dict[str, fx.Node]) -> None:
        self.root, self.graph = root, graph
        self.modules, self.inputs = (
            {path.removeprefix("model."): node for path, node in nodes.items() if path != "model"}
            for nodes in (outputs, inputs)
        )
        self.statistics: list[fx.Node] = []
        name = type(root.model).__name__
        result = graph.output_node().args[0]
        if not isinstance(result, fx.Node):
            raise ValueError(
                f"{name}.forward must return the logits alone, a tensor (N, classes), got a {type(result).__name__}"
            )
        self.logits = result
        node = result
        while self._is(node, _RESHAPES | _DROPOUTS, nn.Identity, nn.Flatten, _DropoutNd):
            node = node.args[0]  # type: ignore[assignment]
        if not self._is(node, {F.linear}, nn.Linear, nn.Conv2d):
            module = self.module(node)
            source = f"{str(node.target).removeprefix('model.')!r}" + (f" ({type(module).__name__})" if module else "")
            raise ValueError(
                f"{name}: the logits must come from a linear layer, whose input is the penultimate features; they come "
                f"from {source}. Give a network whose forward returns dfkd_fast.models.Outputs instead"
            )
        self.classifier = node
        node = node.args[0]  # type: ignore[assignment]
        while self._is(node, _DROPOUTS, nn.Identity, _DropoutNd):
            node = node.args[0]  # type: ignore[assignment]
        self.penultimate = node

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        path = str(node.target)
        return self.root.get_submodule(path) if node.op == "call_module" and path.startswith("model.") else None

    def _is(self, node: Any, targets: set[Any], *kinds: type) -> bool:
        if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if node.op == "call_module":
            return isinstance(self.module(node), kinds)
        return node.op in ("call_function", "call_method") and node.target in targets

    def stage(self, path: str) -> fx.Node:
        """The output of the module at ``path``.

        Raises:
            ValueError: the forward calls no such module, or it does not return one tensor.
        """
        if path in self.modules:
            return self.modules[path]
        close = difflib.get_close_matches(path, self.modules, n=3)
        hint = f"did you mean {', '.join(map(repr, close))}? " if close else ""
        outer = [name for name in self.modules if name.count(".") < 2]
        listed = ", ".join(outer[:40]) + (", ..." if len(outer) > 40 else "")
        raise ValueError(
            f"stages: {type(self.root.model).__name__} has no module {path!r} that its forward calls for one tensor; "
            f"{hint}It has {listed}"
        )

    def changed_in_place(self, node: fx.Node) -> bool:
        """Whether a node that reads this one's output also writes into it."""
        for user in node.users:
            if not user.args or user.args[0] is not node:
                continue
            target = user.target
            by_module = bool(getattr(self.module(user), "inplace", False))
            by_name = user.op == "call_method" and str(target).endswith("_") and not str(target).endswith("__")
            by_name |= user.op == "call_function" and getattr(target, "__name__", "").endswith("_")
            operators = (operator.iadd, operator.imul, operator.isub, operator.itruediv)
            if by_module or by_name or target in operators or user.kwargs.get("inplace") is True:
                return True
        return False


def follow(root: Root, *, training: bool, evaluating: bool = False) -> tuple[fx.Graph, _Tracer]:
    """The graph of the network's forward in train or eval mode, whatever it returns, and what was seen on the way.

    Args:
        root: holds the network.
        training: which of the two.
        evaluating: the graph is to compute what eval mode does whatever the modules' flags are when it runs.

    Raises:
        ValueError: the forward cannot be followed; the message says where and what then.
    """
    tracer = _Tracer(evaluating=evaluating)
    try:
        with modes_kept(root.model, training):
            return tracer.trace(root), tracer
    except Exception as error:  # whatever a forward does when its input is no tensor
        where = tracer.inside[-1] if tracer.inside else "model"
        inner = root.get_submodule(where)
        at = "" if inner is root.model else f", in {where.removeprefix('model.')!r} ({type(inner).__name__})"
        raise ValueError(
            f"the forward of {type(root.model).__name__} cannot be followed by torch.fx{at}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} "
            "Give a network whose forward returns dfkd_fast.models.Outputs(logits, features, penultimate) instead: it "
            "is used as it is."
        ) from error


def trace(root: Root, *, training: bool, evaluating: bool = False) -> Trace:
    """Follow a forward that returns logits; see :func:`follow`.

    Raises:
        ValueError: the forward cannot be followed, or its logits do not come from a linear layer.
    """
    graph, tracer = follow(root, training=training, evaluating=evaluating)
    return Trace(root, graph, tracer.outputs, tracer.inputs)


def _is_pool(found: Trace, node: fx.Node) -> bool:
    module = found.module(node)
    name = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
    return "pool" in name.lower() or name in ("mean", "amax")


def default_stages(found: Trace, shapes: Mapping[fx.Node, Shape]) -> tuple[str, ...]:
    """The last map of each resolution, the deepest four; the deepest is the map that is pooled for the classifier.

    That is the end of each stage in every family whose stages halve the resolution. Modules name the maps: where the
    map that is pooled is no module's output, the last of its size that is one stands for it.

    Raises:
        ValueError: what is pooled is no map (N, C, H, W).
    """

    def size(node: Any) -> int | None:
        shape = shapes.get(node, ())
        return shape[2] if len(shape) == 4 and shape[2] == shape[3] else None

    node: Any = found.penultimate
    while isinstance(node, fx.Node) and node.args and not _is_pool(found, node):
        node = node.args[0]
    last: Any = node.args[0] if isinstance(node, fx.Node) and node.args else found.penultimate
    while isinstance(last, fx.Node) and isinstance(found.module(last), nn.Identity):
        last = last.args[0]
    # A module that takes one size and gives the next smaller one begins a stage: what is inside of it at the larger
    # size is not the end of the stage before.
    sizes = sorted({at for node in found.modules.values() if (at := size(node)) is not None})
    steps = dict(zip(sizes[1:], sizes, strict=False))
    narrowing = {
        path: at
        for path, read in found.inputs.items()
        if (at := size(read)) is not None and size(found.modules[path]) == steps.get(at, 0)
    }
    by_node: dict[fx.Node, list[str]] = {}
    for path, output in found.modules.items():
        by_node.setdefault(output, []).append(path)

    def begins_next(path: str, at: int) -> bool:
        parts = path.split(".")
        return any(narrowing.get(".".join(parts[:depth])) == at for depth in range(1, len(parts)))

    ends: dict[int, fx.Node] = {}
    fallback: dict[int, fx.Node] = {}
    for node in found.graph.nodes:
        at = size(node)
        if at is not None and node in by_node:
            fallback[at] = node
            if not all(begins_next(path, at) for path in by_node[node]):
                ends[at] = node
        if node is last:
            break
    ends = fallback | ends
    # Gates and pyramids make smaller maps on the way; those are no stages.
    smallest = size(last)
    kept = [ends[at] for at in sorted(ends, reverse=True) if smallest is not None and at >= smallest][-4:]
    if not kept:
        raise ValueError(
            f"stages must be named for {type(found.root.model).__name__}: what it pools for the classifier is no map "
            "(N, C, H, W) of a module"
        )
    taken = {path for node in kept for path in by_node[node]}

    def name(paths: Sequence[str]) -> str:
        """The outermost that does not hold another stage."""
        alone = [path for path in paths if not any(other.startswith(f"{path}.") for other in taken - set(paths))]
        return alone[-1] if alone else paths[0]

    return tuple(name(by_node[node]) for node in kept)


_compiled = 0


def compile_graph(graph: fx.Graph) -> Program:
    """The graph as a function of the module that its paths start from, and the images."""
    global _compiled
    code = graph.python_code("self")
    name = f"<traced forward {_compiled}>"
    _compiled += 1
    # For tracebacks that show the line.
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    return scope["forward"]
