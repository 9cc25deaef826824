"""Fusing a BatchNorm with the operations that follow it, in one pass over the map.

The pattern is ``activation(batchnorm(x) + residual)``, each of the two optional, where nothing else reads the values in
between.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfkd_fast.graph.batchnorm import (
    Activation,
    activation_of,
    batchnorm_with_statistics,
    gives_statistics,
    with_activation,
)
from dfkd_fast.graph.tracing import Trace

__all__ = ["Fusion", "find", "fuse"]

_RELU: set[Any] = {F.relu, torch.relu, F.relu_, torch.relu_, Tensor.relu, Tensor.relu_, "relu", "relu_"}
_ADD: set[Any] = {operator.add, torch.add, Tensor.add, "add"}
_ADD_IN_PLACE: set[Any] = {operator.iadd, Tensor.add_, "add_"}


@dataclass(kw_only=True)
class Fusion:
    """A BatchNorm of a graph with the operations that follow it.

    Attributes:
        norm: its node.
        last: the node whose value the fused call gives; ``norm`` where nothing follows.
        activation: the fused activation, after the norm or inside of its module.
        act: path of an activation inside of its module that cannot be fused, or None.
        add: the node of the addition, or None.
        residual: the node of the other summand.
        between: nodes from ``norm`` to before ``last``, in network order.
    """

    norm: fx.Node
    last: fx.Node
    activation: Activation = "none"
    act: str | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    between: list[fx.Node] = field(default_factory=list)

    def __str__(self) -> str:
        """The fused operations: "add", "relu", "relu6", "add+relu", ...; empty for none."""
        activation = [self.activation] if self.activation != "none" else []
        return "+".join(["add", *activation] if self.residual is not None else activation)


def _activation(found: Trace, node: fx.Node, value: fx.Node) -> Activation | None:
    """The activation that a node applies to a value, None for another operation."""
    if not node.args or node.args[0] is not value:
        return None
    if node.op == "call_module":
        module = found.module(node)
        return None if module is None or len(node.args) > 1 or node.kwargs else activation_of(module)
    options = {name: option for name, option in node.kwargs.items() if name != "inplace"}
    if node.target in _RELU and not options:
        return "relu"
    if node.target is F.relu6 and not options:
        return "relu6"
    if node.target in (F.hardtanh, F.hardtanh_):
        limits = dict(zip(("min_val", "max_val"), node.args[1:3], strict=False)) | options
        return "relu6" if limits == {"min_val": 0, "max_val": 6} else None
    return None


def _added(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The node that an addition adds to a value; None for another operation.

    An addition that writes into the other summand does not count: others may read that.
    """
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if left is value and node.target in _ADD | _ADD_IN_PLACE:
        return right
    return left if right is value and node.target in _ADD else None


def _can_add(found: Trace, norm: fx.Node, add: fx.Node, other: fx.Node) -> bool:
    """Whether both summands have one shape and dtype, and the norm's input can still be read at the addition."""
    if any(name not in norm.meta or norm.meta[name] != other.meta.get(name) for name in ("shape", "dtype")):
        return False
    node = norm.next
    while node is not add:
        if found.writes_in_place(node):
            return False
        node = node.next
    return True


def _follow(found: Trace, kept: Collection[fx.Node], norm: fx.Node, taken: fx.Node | None = None) -> Fusion:
    """As much after a BatchNorm as can be fused with it, without the addition ``taken``."""
    fusion, module = Fusion(norm=norm, last=norm), found.module(norm)
    assert module is not None
    if with_activation(module):  # the dropout inside does nothing in eval mode
        inside = activation_of(module.get_submodule("act"))
        if inside is None:
            fusion.act = f"{norm.target}.act"
        elif inside != "none":
            fusion.activation = inside
        if inside != "none":
            return fusion
    node, passed = norm, [norm]
    while len(node.users) == 1 and node not in kept:
        user = next(iter(node.users))
        activation, other = _activation(found, user, node), None
        if activation is None:
            other = _added(user, node) if fusion.add is None and user is not taken else None
            if other is None or not _can_add(found, norm, user, other):
                break
            fusion.add, fusion.residual = user, other
        if activation != "none":
            fusion.last, fusion.between = user, list(passed)
        if activation in ("relu", "relu6"):
            fusion.activation = activation
            break
        passed.append(user)
        node = user
    return fusion


def find(found: Trace, kept: Collection[fx.Node] = ()) -> list[Fusion]:
    """The BatchNorms of a graph that can give their input's statistics, in network order, with what can be fused.

    Where both summands of an addition are BatchNorms, the left one takes the other as its residual.

    Args:
        found: a graph that :func:`dfkd_fast.graph.tracing.run` ran in eval mode.
        kept: nodes whose values must stay.
    """
    norms = [node for node in found.graph.nodes if gives_statistics(found.module(node))]
    fusions = {norm: _follow(found, kept, norm) for norm in norms}
    rivals: dict[fx.Node, Fusion] = {}
    for norm, fusion in fusions.items():
        if fusion.add is None:
            continue
        if fusion.add in rivals:
            other = rivals[fusion.add]
            right = norm if fusion.residual is fusion.add.args[0] else other.norm
            fusions[right] = _follow(found, kept, right, taken=fusion.add)
        rivals[fusion.add] = fusion
    return list(fusions.values())


def fuse(graph: fx.Graph, fusion: Fusion) -> fx.Node:
    """Put the fused call into a graph; returns the node of the statistics. ``fusion.last`` keeps its users."""
    # At the addition, since the other summand may be computed after the norm, and written into after the addition.
    with graph.inserting_before(fusion.add if fusion.add is not None else fusion.norm):
        norm = graph.get_attr(str(fusion.norm.target))
        arguments = (norm, fusion.norm.all_input_nodes[0], fusion.residual, fusion.activation)
        call = graph.call_function(batchnorm_with_statistics, arguments)
        statistics = graph.call_function(operator.getitem, (call, 1))
    last = fusion.last
    last.op, last.target, last.args, last.kwargs = "call_function", operator.getitem, (call, 0), {}
    if fusion.act is not None:
        with graph.inserting_before(last):
            y = graph.call_function(operator.getitem, (call, 0))
        last.op, last.target, last.args = "call_module", fusion.act, (y,)
    for node in reversed(fusion.between):
        graph.erase_node(node)
    return statistics
