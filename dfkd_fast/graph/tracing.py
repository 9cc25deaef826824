"""Traces a network with torch.fx and records which node is the output of which module."""

from __future__ import annotations

import difflib
import linecache
import math
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from dfkd_fast.graph.modes import not_compiled, preserve_buffers, preserve_state, preserve_train_mode


def loaded_library(name: str) -> ModuleType | None:
    """The library if it has been imported, else None. Code that builds a network with a library has imported it."""
    return sys.modules.get(name)


def dropouts() -> tuple[type[nn.Module], ...]:
    """Classes of modules that return their input in eval mode."""
    timm, torchvision = loaded_library("timm.layers"), loaded_library("torchvision.ops")
    found: tuple[type[nn.Module], ...] = (_DropoutNd,)
    found += () if timm is None else (timm.DropPath,)
    return found if torchvision is None else (*found, torchvision.StochasticDepth)


def unwrap(model: nn.Module) -> nn.Module:
    """The plain network in a wrapper: torch.compile, (Distributed)DataParallel, AveragedModel, timm's ModelEma."""
    dynamo: Any = loaded_library("torch._dynamo.eval_frame")
    timm, averaged = loaded_library("timm.utils"), loaded_library("torch.optim.swa_utils")
    wrappers: tuple[type[nn.Module], ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrappers += () if timm is None else (timm.ModelEmaV2, timm.ModelEmaV3)
    wrappers += () if averaged is None else (averaged.AveragedModel,)
    while True:
        if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, wrappers):
            model = model.get_submodule("module")
        else:
            return model


def has_running_statistics(module: nn.Module | None) -> bool:
    """Whether a module is a BatchNorm of any library: it stores a mean and a variance per channel."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    found = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    return all(isinstance(each, Tensor) and each.ndim == 1 for each in found)


def require_finite(owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        ValueError: at least one weight is not finite; the message names the first ones.
    """
    wrong = {name: ~each.isfinite() for name, each in tensors.items() if each.is_floating_point()}
    found = [f"{name} ({int(each.sum())} of {each.numel()} values)" for name, each in wrong.items() if each.any()]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{owner} has weights that are NaN or infinite: {', '.join(found[:5])}{more}; use weights from before the "
            "training diverged"
        )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics by name. Other buffers, such as masks, may contain infinite values."""
    running = ("running_mean", "running_var")
    buffers = {name: each for name, each in model.named_buffers() if name.rpartition(".")[2] in running}
    return dict(model.named_parameters()) | buffers


def require_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse networks that share a module with state, a dropout or a tensor: training the student changes the teacher.

    Raises:
        ValueError: the message names what they share.
    """
    names = {id(module): path for path, module in student.named_modules()}
    stateful: Any = (_BatchNorm, *dropouts())
    for path, module in teacher.named_modules():
        if id(module) in names and (isinstance(module, stateful) or weights_of(module)):
            other = names[id(module)]
            same = "the same network" if path == other == "" else f"module {path!r} is the student's {other!r}"
            raise ValueError(
                f"teacher and student share modules ({type(module).__name__}): {same}. Give the student a copy, "
                "copy.deepcopy(...)"
            )
    tensors = {each.data_ptr(): name for name, each in student.state_dict().items() if each.numel()}
    for name, each in teacher.state_dict().items():
        if each.numel() and each.data_ptr() and each.data_ptr() in tensors:
            raise ValueError(
                f"teacher and student share a tensor: the teacher's {name!r} is the student's "
                f"{tensors[each.data_ptr()]!r}. Give the student a copy, copy.deepcopy(...)"
            )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(filter(str.strip, str(error).splitlines()), '')}"


class Root(nn.Module):
    """Holds the module to trace as ``model`` and passes it only the first argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Records the nodes of each module's output and first input.

    A leaf is one node. Modules that read their training flag are leaves, so that a graph follows the flag when it runs.
    """

    def __init__(self, *, evaluating: bool, shallow: bool) -> None:
        timm, torchvision = loaded_library("timm.layers"), loaded_library("torchvision.ops")
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
        norm = has_running_statistics(m) and next(m.children(), None) is None
        return norm or isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

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
    """A graph with one input.

    Attributes:
        root: the traced module, with the network as ``model``.
        graph: the graph of ``root``. The targets of its nodes are paths in ``root``.
        outputs: the output node of each module, by the module's path in the network, in execution order (inner first).
        inputs: the node of each module's first argument, by the module's path.
    """

    root: Any
    graph: fx.Graph
    outputs: dict[str, fx.Node]
    inputs: dict[str, fx.Node]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def stage(self, path: str) -> fx.Node:
        """The output node of the module at ``path``.

        Raises:
            ValueError: the forward does not call this module, or the module does not return a tensor.
        """
        if path in self.outputs:
            return self.outputs[path]
        close = difflib.get_close_matches(path, self.outputs, n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else "."
        outer = [name for name in self.outputs if name.count(".") < 2]
        raise ValueError(
            f"stages: {type(self.root.model).__name__} has no module {path!r} that is called and returns a tensor"
            f"{hint} It has {', '.join(outer[:40])}{', ...' if len(outer) > 40 else ''}"
        )

    def writes_in_place(self, node: fx.Node) -> bool:
        """Whether a node modifies its first argument."""
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
            n.meta |= {"shape": tuple(result.shape), "stride": result.stride(), "dtype": result.dtype}
        return result


def run(root: nn.Module, graph: fx.Graph, image: Tensor) -> Any:
    """Run a graph in eval mode and store each tensor's shape, stride and dtype in its node's ``meta``."""
    with preserve_state(root, image.device):
        return _Interpreter(root, graph=graph).run(image)


def symbolic_trace(root: Root, *, training: bool, evaluating: bool = False, shallow: bool = False) -> Trace:
    """Trace a network.

    Args:
        root: contains the network.
        training: trace in training mode instead of eval mode.
        evaluating: trace through dropouts, so that the graph ignores their training flags.
        shallow: treat the network's submodules as leaves.

    Raises:
        ValueError: torch.fx cannot trace the forward; the message names the module and the reason.
    """
    tracer = _Tracer(evaluating=evaluating, shallow=shallow)
    try:
        with preserve_train_mode(root.model, training), preserve_buffers(root.model), not_compiled(root.model):
            graph = tracer.trace(root)
    except Exception as error:  # a forward may fail in any way on a proxy
        path = tracer.inside[-1] if tracer.inside else "model"
        inner = root.get_submodule(path)
        at = "" if inner is root.model else f", in {path.removeprefix('model.')!r} ({type(inner).__name__})"
        raise ValueError(
            f"the forward of {type(root.model).__name__} cannot be traced by torch.fx{at}: {first_line(error)}"
        ) from error
    return Trace(root, graph, tracer.outputs, tracer.inputs)


def compile_graph(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that shares the submodules, parameters and buffers of ``root``."""
    program = fx.GraphModule(root, graph)
    # GraphModule copies references. Sharing root's dictionaries instead makes a replaced tensor (``.double()``,
    # ``load_state_dict(assign=True)``) visible here too.
    program._modules, program._parameters, program._buffers = root._modules, root._parameters, root._buffers
    weakref.finalize(program, _forget_source, type(program).forward.__code__.co_filename)
    return program


def _forget_source(name: str) -> None:
    """Delete the source of a GraphModule's forward. Otherwise torch.fx keeps it as long as the process lives."""
    linecache.cache.pop(name, None)
    loader = getattr(fx.graph_module, "_loader", None)
    if loader is not None:
        loader.eval_cache.pop(name, None)


@dataclass(frozen=True)
class _Reference:
    name: str


def graph_to_list(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph as a list that can be pickled. ``Node.meta`` is dropped.

    A Graph itself is a linked list, on which pickle exceeds Python's recursion limit.
    """

    def refer(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    map_nodes: Any = fx.node.map_aggregate
    return [(n.name, n.op, n.target, map_nodes(n.args, refer), map_nodes(n.kwargs, refer)) for n in graph.nodes]


def graph_from_list(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """The inverse of :func:`graph_to_list`."""
    graph, created = fx.Graph(), dict[str, fx.Node]()

    def resolve(value: Any) -> Any:
        return created[value.name] if isinstance(value, _Reference) else value

    map_references: Any = fx.node.map_aggregate
    for name, op, target, args, kwargs in nodes:
        given = map_references(args, resolve), map_references(kwargs, resolve)
        created[name] = graph.create_node(op, target, *given, name)
    return graph


def all_close(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether tensors agree in shape, dtype and value, each to ``tolerance`` times its largest expected magnitude."""
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


def image_channels(model: nn.Module) -> int:
    """The number of channels of a network's images: 3, or that of its first convolution if none has 3 and it is small.

    Images with 12 channels and more are RGB images after a rearrangement of pixels.
    """
    channels = [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    return channels[0] if channels and 3 not in channels and channels[0] <= 4 else 3


def dummy_image(model: nn.Module, image_size: int) -> Tensor:
    """A random image (1, C, S, S) of the network's dtype and device. The global generators are not used."""
    tensor = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    size = (1, image_channels(model), image_size, image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(tensor)


def eval_forward(model: nn.Module, image: Tensor) -> Any:
    """The output of a network in eval mode.

    Raises:
        ValueError: the network fails on the image.
    """
    with preserve_state(model, image.device):
        try:
            return model(image)
        except Exception as error:  # a forward may fail in any way on an unsuitable image
            raise ValueError(
                f"{type(model).__name__} does not accept an image {tuple(image.shape)}; try another image_size. "
                f"{first_line(error)}"
            ) from error
