"""What follows a BatchNorm in a traced network and can be computed with it, in the same pass over the map.

That is ``activation(batchnorm(x) + residual)``, each of the two optional, where nothing else sees what lies between.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfkd_fast.models.batchnorm import Activation, BatchNormWithStatistics, activation_of
from dfkd_fast.models.tracing import Shape, Trace

__all__ = ["Fusion", "Values", "find"]

_RELU: set[Any] = {F.relu, torch.relu, F.relu_, torch.relu_, Tensor.relu, Tensor.relu_, "relu", "relu_"}
_ADD: set[Any] = {operator.add, torch.add, Tensor.add, "add"}
_ADD_IN_PLACE: set[Any] = {operator.iadd, Tensor.add_, "add_"}


@dataclass(kw_only=True)
class Fusion:
    """One BatchNorm of a graph with what follows it.

    Attributes:
        norm: its node.
        last: the node whose value the fused call gives; ``norm`` where nothing is fused.
        activation: after the norm, outside of its module.
        add: the node of the addition, or None.
        residual: the node of what is added.
        between: nodes from ``norm`` on that nothing needs any more, in network order.
    """

    norm: fx.Node
    last: fx.Node
    activation: Activation = "none"
    add: fx.Node | None = None
    residual: fx.Node | None = None
    between: list[fx.Node] = field(default_factory=list)

    def describe(self, module: BatchNormWithStatistics) -> str:
        """What is computed with the norm: "add", "relu", "relu6", "add+relu", ...; empty for nothing."""
        parts = ["add"] if self.residual is not None else []
        return "+".join([*parts, *([module.activation] if module.activation != "none" else [])])


class Values(fx.Interpreter):
    """Runs a graph and keeps what is to be known of every tensor.

    Attributes:
        shapes: by node.
        dtypes: by node.
        overwritten: BatchNorms whose input was written into between the norm and what reads its output; an Identity
            does not count as such.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph, garbage_collect_values=True)
        self.shapes: dict[fx.Node, Shape] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        self.overwritten: set[fx.Node] = set()
        self._read: dict[fx.Node, tuple[fx.Node, Tensor, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        read = [self._read[source] for source in n.all_input_nodes if source in self._read]
        for norm, x, version in read:
            # A view shares the count of writes with what it is a view of; inference mode does not count.
            if x.is_inference() or x._version != version:
                self.overwritten.add(norm)
        given = [self.env[source] for source in n.all_input_nodes]
        result = super().run_node(n)
        if read and len(given) == 1 and result is given[0]:
            self._read[n] = read[0]
        if isinstance(result, Tensor):
            self.shapes[n], self.dtypes[n] = tuple(result.shape), result.dtype
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), nn.BatchNorm2d):
            x = self.env[n.all_input_nodes[0]]
            self._read[n] = (n, x, 0 if x.is_inference() else x._version)
        return result


def _activation(found: Trace, node: fx.Node, value: fx.Node) -> Activation | None:
    """The activation that a node applies to a value, None where it does something else."""
    if not node.args or node.args[0] is not value:
        return None
    if node.op == "call_module":
        module = found.module(node)
        return None if module is None or len(node.args) > 1 or node.kwargs else activation_of(module)
    if node.op not in ("call_function", "call_method"):
        return None
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
    """What a node adds to a value, where it adds two values; None else.

    An addition that writes into what is added is none: others may read that.
    """
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if left is value and node.target in _ADD | _ADD_IN_PLACE:
        return right
    if right is value and node.target in _ADD:
        return left
    return None


def _follow(found: Trace, values: Values, kept: Collection[fx.Node], norm: fx.Node, taken: set[fx.Node]) -> Fusion:
    """As much after a BatchNorm as can be computed with it; no addition that is ``taken``."""
    fusion = Fusion(norm=norm, last=norm)
    inside = BatchNormWithStatistics(found.module(norm))  # type: ignore[arg-type]
    if inside.act is not None or inside.activation != "none":
        return fusion
    node, passed = norm, [norm]
    while len(node.users) == 1 and node not in kept:
        user = next(iter(node.users))
        activation = _activation(found, user, node)
        other = _added(user, node) if fusion.residual is None and norm not in values.overwritten else None
        if activation is None and (other is None or user in taken):
            break
        if other is not None:
            alike = (values.shapes, values.dtypes)
            if not all(table.get(norm) is not None and table[norm] == table.get(other) for table in alike):
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


def find(found: Trace, values: Values, kept: Collection[fx.Node]) -> list[Fusion]:
    """The BatchNorms of a graph that can give their input's statistics, in its order, with what follows each.

    Where both sides of an addition are BatchNorms, the one on the left takes the other as its residual.

    Args:
        found: the graph.
        values: of a run of it in eval mode.
        kept: nodes whose own values are wanted.
    """
    norms = [
        node
        for node in found.graph.nodes
        if (module := found.module(node)) is not None and BatchNormWithStatistics.fits(module)
    ]
    fusions = {norm: _follow(found, values, kept, norm, set()) for norm in norms}
    both: dict[fx.Node, list[Fusion]] = {}
    for fusion in fusions.values():
        if fusion.add is not None:
            both.setdefault(fusion.add, []).append(fusion)
    for add, rivals in both.items():
        if len(rivals) > 1:
            right = next(fusion for fusion in rivals if fusion.residual is add.args[0])
            fusions[right.norm] = _follow(found, values, kept, right.norm, {add})
    return list(fusions.values())
