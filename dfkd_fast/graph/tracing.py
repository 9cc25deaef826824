"""A network's forward as a torch.fx graph that knows which node is the output of which module."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from dfkd_fast.graph.modes import preserve_state, preserve_train_mode


def library(name: str) -> ModuleType | None:
    """A library if it is loaded: a network that was made with it has loaded it."""
    return sys.modules.get(name)


def dropouts() -> tuple[type[nn.Module], ...]:
    """Modules that return their input in eval mode."""
    timm, torchvision = library("timm.layers"), library("torchvision.ops")
    found: tuple[type[nn.Module], ...] = (_DropoutNd,)
    found += () if timm is None else (timm.DropPath,)
    return found if torchvision is None else (*found, torchvision.StochasticDepth)


def hooked(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(len(table) > 0 for table in hooks)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(filter(str.strip, str(error).splitlines()), '')}"


class Root(nn.Module):
    """The module to trace, under the path ``model``, without the further arguments of its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Records the node of each module's output and first input.

    Modules whose behaviour depends on their training flag are leaves, so that the flag acts when the graph runs.
    """

    def __init__(self, *, evaluating: bool, shallow: bool) -> None:
        timm, torchvision = library("timm.layers"), library("torchvision.ops")
        modules: Any = (math,) if torchvision is None else (math, torchvision)
        functions = () if timm is None else tuple(timm.get_notrace_functions())
        super().__init__(autowrap_modules=modules, autowrap_functions=functions)
        leaves: tuple[type, ...] = (nn.Module,) if shallow else (_BatchNorm, nn.Linear)
        if timm is not None:
            leaves += tuple(timm.get_notrace_modules())
        if torchvision is not None:
            leaves += (torchvision.FrozenBatchNorm2d,)
        self.leaves, self.followed = (leaves, dropouts()) if evaluating else (leaves + dropouts(), ())
        self.outputs: dict[str, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == "model" or isinstance(m, self.followed):
            return False
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        if isinstance(result, fx.Proxy) and path != "model":
            name = path.removeprefix("model.")
            self.outputs.pop(name, None)  # a module that is called twice moves to the end
            self.outputs[name] = result.node
            if args and isinstance(args[0], fx.Proxy):
                self.inputs[name] = args[0].node
        return result


@dataclass
class Trace:
    """A graph with one input. Its paths start from ``root``, which holds the network as ``model``.

    Attributes:
        root: the traced module.
        graph: its graph.
        outputs: the output node of each module by its path in the network, in network order, inner modules first.
        inputs: the first argument of each of them.
    """

    root: Any
    graph: fx.Graph
    outputs: dict[str, fx.Node]
    inputs: dict[str, fx.Node]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def stage(self, path: str) -> fx.Node:
        """The output of the module at ``path``.

        Raises:
            ValueError: the forward calls no such module, or it does not return one tensor.
        """
        if path in self.outputs:
            return self.outputs[path]
        close = difflib.get_close_matches(path, self.outputs, n=3)
        hint = f"did you mean {', '.join(map(repr, close))}? " if close else ""
        outer = [name for name in self.outputs if name.count(".") < 2]
        raise ValueError(
            f"stages: {type(self.root.model).__name__} has no module {path!r} that its forward calls for one tensor; "
            f"{hint}It has {', '.join(outer[:40])}{', ...' if len(outer) > 40 else ''}"
        )

    def writes_in_place(self, node: fx.Node) -> bool:
        """Whether a node writes into its first argument."""
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        return (
            any(option is True for option in (*node.args[1:], node.kwargs.get("inplace")))  # F.relu(x, True)
            or (name.endswith("_") and not name.endswith("__"))
            or name in ("iadd", "imul", "isub", "itruediv")
        )


class _Interpreter(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(result.shape), result.dtype
        return result


def run(root: nn.Module, graph: fx.Graph, image: Tensor) -> Any:
    """The output of a graph for an image in eval mode; nodes keep shape and dtype of their tensors in ``meta``."""
    with preserve_state(root, image.device):
        return _Interpreter(root, graph=graph).run(image)


def follow(root: Root, *, training: bool, evaluating: bool = False, shallow: bool = False) -> Trace:
    """The graph of a network's forward in train or eval mode.

    Args:
        root: holds the network.
        training: the mode.
        evaluating: leave out dropouts, so that the graph computes eval mode whatever the modules' flags are.
        shallow: do not follow the modules below the network.

    Raises:
        ValueError: the forward cannot be followed; the message says where and why.
    """
    tracer = _Tracer(evaluating=evaluating, shallow=shallow)
    try:
        with preserve_train_mode(root.model, training):
            graph = tracer.trace(root)
    except Exception as error:  # a forward may fail in any way when its input is no tensor
        where = tracer.inside[-1] if tracer.inside else "model"
        inner = root.get_submodule(where)
        at = "" if inner is root.model else f", in {where.removeprefix('model.')!r} ({type(inner).__name__})"
        raise ValueError(
            f"the forward of {type(root.model).__name__} cannot be followed by torch.fx{at}: {first_line(error)}"
        ) from error
    return Trace(root, graph, tracer.outputs, tracer.inputs)


def compile_graph(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph as a module that shares the submodules and tensors of ``root``, where its paths start."""
    program = fx.GraphModule(root, graph)
    # GraphModule copies the references that the graph uses. With root's own tables, what is replaced in the network
    # (a buffer by ``.double()``, a parameter by ``load_state_dict(assign=True)``) is replaced here too.
    program._modules, program._parameters, program._buffers = root._modules, root._parameters, root._buffers
    return program


@dataclass(frozen=True)
class _Reference:
    name: str


def graph_to_list(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph as plain values: a graph is a linked list, which pickle follows to Python's recursion limit.

    The shapes and dtypes of :func:`run` are not kept.
    """

    def refer(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    map_nodes: Any = fx.node.map_aggregate
    return [(n.name, n.op, n.target, map_nodes(n.args, refer), map_nodes(n.kwargs, refer)) for n in graph.nodes]


def graph_from_list(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph of :func:`graph_to_list`."""
    graph, made = fx.Graph(), dict[str, fx.Node]()

    def resolve(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Reference) else value

    map_references: Any = fx.node.map_aggregate
    for name, op, target, args, kwargs in nodes:
        given = map_references(args, resolve), map_references(kwargs, resolve)
        made[name] = graph.create_node(op, target, *given, name)
    return graph


def alike(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether all tensors have the same shapes and dtypes, and values within ``tolerance`` of the largest."""
    left, right = tree_leaves(found), tree_leaves(expected)
    return len(left) == len(right) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        and torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance * _largest(b), equal_nan=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in zip(left, right, strict=True)
    )


def _largest(x: Tensor) -> float:
    return x.float().nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0


def dummy_image(model: nn.Module, image_size: int) -> Tensor:
    """A random image of the network's dtype and device; the global random streams are not used."""
    tensor = next(model.parameters(), torch.zeros(()))
    return torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(tensor)


def eval_forward(model: nn.Module, image: Tensor) -> Any:
    """The output of a network in eval mode for an image.

    Raises:
        ValueError: the network does not take the image.
    """
    with preserve_state(model, image.device):
        try:
            return model(image)
        except Exception as error:  # a forward may fail in many ways on an image that does not suit it
            raise ValueError(
                f"{type(model).__name__} does not take an image {tuple(image.shape)}; another image_size may do. "
                f"{first_line(error)}"
            ) from error
