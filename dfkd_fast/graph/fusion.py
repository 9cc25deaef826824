"""Finds patterns of a graph and replaces them by fused ops.

* ``activation(batchnorm(x) + residual)`` with an optional residual and activation, if nothing else reads the
  intermediate values: in eval mode, one pass over the map, which also computes the statistics of x; in training mode,
  ``ops.batch_norm_act``.
* 2 x 2 max pooling with indices and its unpooling.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfkd_fast import ops
from dfkd_fast.graph.outputs import LayerStatistics
from dfkd_fast.graph.tracing import Trace, has_running_statistics, loaded_library
from dfkd_fast.nn.norm import batch_norm_act, count_batches, has_hooks

__all__ = [
    "Fusion",
    "find",
    "find_unfused",
    "fork",
    "fuse",
    "fuse_pools",
    "fuse_training",
    "has_indices",
    "is_batchnorm_act",
    "merge_statistics",
    "supports_statistics",
    "unfused_statistics",
]

Unmerged = tuple[list[Tensor], Tensor, Tensor]
"""Statistics of one BatchNorm's input for :func:`merge_statistics`, running mean and running variance."""

Activation = Literal["none", "relu", "relu6"]
_RELU: set[Any] = {F.relu, torch.relu, F.relu_, torch.relu_, Tensor.relu, Tensor.relu_, "relu", "relu_"}
_ADD: set[Any] = {operator.add, torch.add, Tensor.add, "add"}
_ADD_IN_PLACE: set[Any] = {operator.iadd, Tensor.add_, "add_"}


def is_batchnorm_act(module: nn.Module | None) -> bool:
    """Whether a module is timm's BatchNormAct2d, which contains dropout and an activation."""
    timm: Any = loaded_library("timm.layers")
    return timm is not None and isinstance(module, timm.BatchNormAct2d)


def _trains(module: nn.Module | None) -> bool:
    """Whether a module is a BatchNorm2d with running statistics that does not override ``forward``."""
    return isinstance(module, nn.BatchNorm2d) and supports_statistics(module)


def supports_statistics(module: nn.Module | None) -> bool:
    """Whether :func:`batchnorm_with_statistics` can replace a module: its class must not override ``forward``.

    These are BatchNorm2d, SyncBatchNorm, timm's BatchNormAct2d and torchvision's FrozenBatchNorm2d.
    """
    timm: Any = loaded_library("timm.layers")
    torchvision: Any = loaded_library("torchvision.ops")
    kinds: list[Any] = [nn.BatchNorm2d, nn.SyncBatchNorm]
    kinds += [] if timm is None else [timm.BatchNormAct2d]
    kinds += [] if torchvision is None else [torchvision.FrozenBatchNorm2d]
    known = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    return known and has_running_statistics(module)


def _on_maps(node: fx.Node) -> bool:
    """Whether a node's value is a map (N, C, H, W): SyncBatchNorm also takes vectors."""
    return len(node.meta.get("shape", (0,) * 4)) == 4


def _add_act(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """``activation(y + residual)`` for calls that the ops do not fuse."""
    y = y if residual is None else y + residual
    return y if activation == "none" else F.relu(y) if activation == "relu" else F.relu6(y)


def batchnorm_with_statistics(
    bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, activation: Activation, *, fork: bool = False
) -> tuple[Any, ...]:
    """``activation(bn(x) + residual)`` in eval mode, and statistics of x (N, C, H, W) for :func:`merge_statistics`.

    With ``fork``, the former is returned again as a third result, for a second user, so that the backward adds the
    gradients of both users while it reads them.
    """
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None
    assert var is not None
    # The fused op neither broadcasts nor promotes.
    fusible = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    fused: Any = {"activation": activation, "residual": residual} if fusible else {}
    fork_op = fork and fusible
    norm = (mean, var, bn.weight, bn.bias, bn.eps)
    results = ops.batchnorm_statistics(x, *norm, merge=False, fork=fork_op, **fused)
    y, statistics = results[0], list(results[1 + fork_op :])
    if residual is not None and not fusible:
        y = _add_act(y, residual, activation)
    unmerged = (statistics, mean, var)
    return (y, unmerged, results[1] if fork_op else y) if fork else (y, unmerged)


def find_unfused(trace: Trace) -> list[fx.Node]:
    """The other BatchNorms with maps and running statistics. Only the statistics of their inputs are computed."""
    nodes = trace.graph.find_nodes(op="call_module")
    others = [node for node in nodes if _on_maps(node) and len(node.all_input_nodes) == 1]
    modules = [trace.module(node) for node in others]
    return [
        node
        for node, module in zip(others, modules, strict=True)
        if has_running_statistics(module) and not supports_statistics(module)
    ]


def unfused_statistics(bn: Any, x: Tensor) -> Unmerged:
    """Statistics of the input of a BatchNorm that :func:`batchnorm_with_statistics` does not replace."""
    return list(ops.channel_statistics(x)), bn.running_mean, bn.running_var


def merge_statistics(layers: Sequence[Unmerged]) -> list[LayerStatistics]:
    """The statistics of all BatchNorms of a network (Eq. 3); the fused ops merge them in one launch."""
    merged = ops.merge_statistics([statistics for statistics, *_ in layers])
    return [
        LayerStatistics(mean, var, running_mean.to(mean.dtype), running_var.to(var.dtype))
        for (mean, var), (_, running_mean, running_var) in zip(merged, layers, strict=True)
    ]


@dataclass(kw_only=True)
class Fusion:
    """A BatchNorm of a graph and the operations after it that are fused with it.

    Attributes:
        norm: the BatchNorm's node.
        last: the node whose value the fused call computes; ``norm`` if nothing follows.
        activation: the fused activation, after the BatchNorm or inside its module.
        unfused_act: path of an activation inside the BatchNorm's module that cannot be fused, or None.
        add, residual: nodes of the addition and of its other summand, or None.
        between: nodes from ``norm`` up to but excluding ``last``, in execution order.
    """

    norm: fx.Node
    last: fx.Node
    activation: Activation = "none"
    unfused_act: str | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    between: list[fx.Node] = field(default_factory=list)

    def __str__(self) -> str:
        """The fused operations, for example "add+relu"; empty for none."""
        activation = [self.activation] if self.activation != "none" else []
        return "+".join(["add", *activation] if self.residual is not None else activation)


def _module_activation(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None if it cannot be fused."""
    if has_hooks(module):
        return None
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    return "none" if type(module) is nn.Identity else "relu" if type(module) is nn.ReLU else None


def _activation(trace: Trace, node: fx.Node, value: fx.Node) -> Activation | None:
    """The activation that a node applies to a value, or None if it cannot be fused."""
    options = {name: option for name, option in node.kwargs.items() if name != "inplace"}
    if not node.args or node.args[0] is not value:
        return None
    if node.op == "call_module":
        module = trace.module(node)
        return None if module is None or len(node.args) > 1 or node.kwargs else _module_activation(module)
    if node.target in (F.hardtanh, F.hardtanh_):
        options |= zip(("min_val", "max_val"), node.args[1:3], strict=False)
        return "relu6" if options == {"min_val": 0, "max_val": 6} else None
    if options:
        return None
    return "relu" if node.target in _RELU else "relu6" if node.target is F.relu6 else None


def _summand(trace: Trace, norm: fx.Node, value: fx.Node, add: fx.Node) -> fx.Node | None:
    """The node that ``add`` adds to the value of a BatchNorm, or None if it cannot be fused."""
    if len(add.args) != 2 or add.kwargs or add.args[0] is add.args[1]:
        return None
    left, right = add.args
    # An in-place addition to the other summand is not fused: later nodes may read the sum from that tensor.
    other = right if left is value else left
    if not isinstance(other, fx.Node) or add.target not in (_ADD | _ADD_IN_PLACE if left is value else _ADD):
        return None
    if any(norm.meta.get(name, ()) != other.meta.get(name) for name in ("shape", "dtype")):
        return None
    # The fused call reads the BatchNorm's input at the addition: no node before the addition may overwrite this input.
    node = norm.next
    while node is not add:
        if trace.writes_in_place(node):
            return None
        node = node.next
    return other


def _match(trace: Trace, kept: Collection[fx.Node], norm: fx.Node, taken: fx.Node | None = None) -> Fusion:
    """The longest fusion that starts at a BatchNorm and does not contain the addition ``taken``."""
    fusion, module = Fusion(norm=norm, last=norm), trace.module(norm)
    if module is not None and is_batchnorm_act(module):  # its dropout is off in eval mode
        inside = _module_activation(module.get_submodule("act"))
        fusion.unfused_act = f"{norm.target}.act" if inside is None else None
        fusion.activation = inside or "none"
        if inside != "none":
            return fusion
    node, passed = norm, [norm]
    while len(node.users) == 1 and node not in kept and fusion.activation == "none":
        user = next(iter(node.users))
        activation = _activation(trace, user, node)
        if activation is None:
            other = _summand(trace, norm, node, user) if fusion.add is None and user is not taken else None
            if other is None:
                break
            fusion.add, fusion.residual = user, other
        if activation != "none":
            fusion.last, fusion.between = user, list(passed)
            fusion.activation = activation or "none"
        passed.append(user)
        node = user
    return fusion


def find(
    trace: Trace,
    kept: Collection[fx.Node] = (),
    starts: Callable[[nn.Module | None], bool] = supports_statistics,
) -> list[Fusion]:
    """The BatchNorms that :func:`batchnorm_with_statistics` can replace, in execution order, with what is fused.

    If both summands of an addition are BatchNorms, the left one is fused with the addition.

    Args:
        trace: a graph after :func:`dfkd_fast.graph.tracing.run`.
        kept: nodes whose values must remain in the graph.
        starts: whether a module can be fused with the operations after it; other layers than BatchNorms are possible.
    """
    norms = [node for node in trace.graph.nodes if starts(trace.module(node)) and _on_maps(node)]
    fusions = {norm: _match(trace, kept, norm) for norm in norms}
    additions: dict[fx.Node, Fusion] = {}
    for fusion in list(fusions.values()):
        if fusion.add in additions:
            right = fusion if fusion.residual is fusion.add.args[0] else additions[fusion.add]
            fusions[right.norm] = _match(trace, kept, right.norm, taken=fusion.add)
        elif fusion.add is not None:
            additions[fusion.add] = fusion
    return list(fusions.values())


def _train(
    bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, activation: Activation, *, fork: bool = False
) -> tuple[Tensor, ...]:
    """``activation(bn(x) + residual)`` in the mode of ``bn``, except that ``num_batches_tracked`` does not change.

    Returned once, or with ``fork`` twice.
    """
    fusible = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if fusible and activation != "relu6":
        y = batch_norm_act(bn, x, activation=activation, residual=residual, count=False, fork=fork)
        return y if fork else (y,)
    y = _add_act(batch_norm_act(bn, x, count=False), residual, activation)
    return (y, y) if fork else (y,)


def fork(graph: fx.Graph, call: fx.Node, y: fx.Node, index: int) -> None:
    """Let a fused call return y again, as result ``index``, if y has two users: two branches of a residual network."""
    users = [user for user in y.users if user.op != "output"]
    if len(users) == 2:
        call.kwargs = {"fork": True}
        with graph.inserting_after(y):
            users[1].replace_input_with(y, graph.call_function(operator.getitem, (call, index)))


def fuse_training(trace: Trace, kept: Collection[fx.Node]) -> None:
    """Replace BatchNorms and the additions and activations that follow them by :func:`dfkd_fast.nn.batch_norm_act`.

    Args:
        trace: a graph after :func:`dfkd_fast.graph.tracing.run`.
        kept: nodes whose values must remain in the graph.
    """
    fusions = [each for each in find(trace, kept, _trains) if not is_batchnorm_act(trace.module(each.norm))]
    with trace.graph.inserting_before(next(iter(trace.graph.nodes))):
        norms = [trace.graph.get_attr(str(fusion.norm.target)) for fusion in fusions]
        trace.graph.call_function(count_batches, (norms,))
    calls = [(fuse(trace.graph, fusion, _train), fusion.last) for fusion in fusions]
    for call, y in calls:
        fork(trace.graph, call, y, 1)


def fuse(graph: fx.Graph, fusion: Fusion, function: Callable[..., Any] = batchnorm_with_statistics) -> fx.Node:
    """Insert the call of a fused function, which returns y and more, and return its node. ``fusion.last`` becomes y."""
    last = fusion.last
    # Insert before the addition: the residual may be computed after the norm and overwritten after the addition.
    with graph.inserting_before(fusion.add if fusion.add is not None else fusion.norm):
        norm = graph.get_attr(str(fusion.norm.target))
        arguments = (norm, fusion.norm.all_input_nodes[0], fusion.residual, fusion.activation)
        call = graph.call_function(function, arguments)
        y = graph.call_function(operator.getitem, (call, 0))
    if fusion.unfused_act is not None:
        last.op, last.target, last.args, last.kwargs = "call_module", fusion.unfused_act, (y,), {}
    else:
        last.op, last.target, last.args, last.kwargs = "call_function", operator.getitem, (call, 0), {}
        graph.erase_node(y)
    for node in reversed(fusion.between):
        graph.erase_node(node)
    return call


def has_indices(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxUnpool2d) or (isinstance(module, nn.MaxPool2d) and module.return_indices)


def _is_2x2(module: Any, kind: type) -> bool:
    if not isinstance(module, nn.Module) or type(module) is not kind or has_hooks(module):
        return False
    sizes: list[Any] = [module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1)]
    pairs = [each if isinstance(each, tuple) else (each, each) for each in sizes]
    return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] and has_indices(module) and not getattr(module, "ceil_mode", False)


def _unpool(y: Tensor, code: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """Takes MaxUnpool2d's arguments; ``output_size`` may have four dimensions."""
    return ops.max_unpool2x2(y, code, None if output_size is None else tuple(output_size)[-2:])


def fuse_pools(trace: Trace) -> dict[nn.Module, str]:
    """Replace poolings whose indices are read only by unpoolings, and these unpoolings, by the ops with uint8 codes."""
    replaced: dict[nn.Module, str] = {}
    for node in trace.graph.find_nodes(op="call_module"):
        pool, users = trace.module(node), [(part, user) for part in node.users for user in part.users]
        users = [(part, user) for part, user in users if part.args[1:] == (1,)]
        fits = _is_2x2(pool, nn.MaxPool2d) and len(node.args) == 1 and not node.kwargs and len(users) > 0
        fits = fits and all(part.target is operator.getitem for part in node.users)
        for part, user in users:
            fits = fits and _is_2x2(trace.module(user), nn.MaxUnpool2d) and user.kwargs.keys() <= {"output_size"}
            fits = fits and user.args[1:] == (part,) and user.args[0] is not part
        if fits:
            for each, function in [(node, ops.max_pool2x2), *((user, _unpool) for _, user in users)]:
                module = trace.module(each)
                if module is not None:
                    replaced[module] = "max_pool2x2" if each is node else "max_unpool2x2"
                each.op, each.target = "call_function", function
    return replaced
