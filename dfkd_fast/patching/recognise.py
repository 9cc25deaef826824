"""What is recognised, and the fused form of each: the whole list."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.models import BatchNormWithStatistics
from dfkd_fast.models.fusion import Values, find
from dfkd_fast.models.tracing import Root, Trace, compile_graph
from dfkd_fast.patching.following import Followed, follow
from dfkd_fast.patching.forward import PatchedForward, Refused, first_line, hooked, own_forward, verify

__all__ = ["ORDER_MODULES", "fused", "indexed", "order_module"]

ORDER_MODULES = ("HighDivModule", "PCBHighDivModule")
"""MHN's classes."""


class _Norm(BatchNormWithStatistics):
    """The norm with what follows it, and no statistics: they cost no pass of their own."""

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:  # type: ignore[override]
        self.batchnorm._check_input_dim(x)
        return super().forward(x, residual)[0]


def _unpool(y: Tensor, code: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """MaxUnpool2d's arguments: its size may have all four dimensions."""
    return ops.max_unpool2x2(y, code, None if output_size is None else tuple(output_size)[-2:])


class _OrderModule:
    """The maps of one of MHN's order modules as the stacked weights of the op."""

    def __init__(self, module: nn.Module) -> None:
        order = cast(int, module.order)
        names = [f"order{order}_{r}_{i}" for r in range(1, order + 1) for i in range(1, r + 1)]
        self.inner = [cast(nn.Conv2d, module.get_submodule(f"{name}.0")) for name in names]
        self.outer = [cast(nn.Conv2d, module.get_submodule(f"convb{order}_{r}.0")) for r in range(1, order + 1)]

    def __call__(self) -> tuple[Tensor, Tensor]:
        proj, out = (torch.stack([layer.weight.flatten(1) for layer in layers]) for layers in (self.inner, self.outer))
        return proj, out


def _weighted(forward: Any, x: Tensor) -> Tensor:
    # Chen et al. sum one sigmoid an order, and divide by their number.
    return ops.high_order_attention(x, *forward.weights(), mode="per_order")


def _is_pointwise(layer: nn.Module, inputs: int, outputs: int) -> bool:
    return (
        type(layer) is nn.Conv2d
        and (layer.in_channels, layer.out_channels, layer.groups) == (inputs, outputs, 1)
        and (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))
        and layer.bias is None
        and "weight" in layer._parameters  # not so where it is parametrised
    )


def order_module(module: nn.Module) -> PatchedForward:
    """The fused form of one of MHN's order modules: recognised by class name and by structure, then tried."""
    own_forward(module)
    name, order = type(module).__name__, getattr(module, "order", None)
    children = dict(module.named_children())
    if not isinstance(order, int) or order < 1:
        raise Refused(f"{name} without an order is not MHN's")
    wanted = {f"order{order}_{r}_{i}": 1 for r in range(1, order + 1) for i in range(1, r + 1)}
    wanted |= {f"convb{order}_{r}": 2 for r in range(1, order + 1)}
    fits = {key: len(part) for key, part in children.items() if type(part) is nn.Sequential} == wanted
    fits = fits and len(children) == len(wanted)
    first = children[f"order{order}_1_1"][0] if fits else None  # type: ignore[index]
    if not isinstance(first, nn.Conv2d):
        raise Refused(f"{name} does not have the parts of MHN's")
    channels, hidden = first.in_channels, first.out_channels
    for key, part in children.items():
        assert isinstance(part, nn.Sequential)
        inner = key.startswith("order")
        sizes = (channels, hidden) if inner else (hidden, channels)
        if not _is_pointwise(part[0], *sizes) or not (inner or type(part[1]) is nn.Sigmoid):
            raise Refused(f"{name}: {key!r} is not the layer that MHN's has there")
    if any(map(hooked, module.modules())):
        raise Refused(f"a hook watches a part of {name}")
    forward = PatchedForward(module)
    forward.program = _weighted
    forward.__dict__["weights"] = _OrderModule(module)
    forward.passed_by = [each for each in module.modules() if each is not module]
    forward.replaced = [(module, f"high_order_attention (order {order}, per_order)")]
    weight = first.weight
    x = torch.randn(2, channels, 3, 3, generator=torch.Generator().manual_seed(0))
    verify(forward, x.to(device=weight.device, dtype=weight.dtype), gradients=True)
    return forward


def _is_2x2(module: nn.Module | None, kind: type) -> bool:
    def pair(value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value, value)

    if module is None or type(module) is not kind or hooked(module):
        return False
    sizes: Any = module
    if pair(sizes.kernel_size) != (2, 2) or pair(sizes.stride) != (2, 2) or pair(sizes.padding) != (0, 0):
        return False
    return kind is nn.MaxUnpool2d or (sizes.return_indices and pair(sizes.dilation) == (1, 1) and not sizes.ceil_mode)


def _fuse_pools(forward: PatchedForward, found: Trace) -> None:
    """Each pooling whose indices only unpoolings read, and those: with a byte in the place of an index."""
    for node in list(found.graph.nodes):
        pool = found.module(node)
        if not _is_2x2(pool, nn.MaxPool2d) or len(node.args) != 1 or node.kwargs:
            continue
        parts = list(node.users)
        if not all(part.target is operator.getitem and part.args[1] in (0, 1) for part in parts):
            continue
        users = [(part, user) for part in parts if part.args[1] == 1 for user in part.users]
        fits = [
            _is_2x2(found.module(user), nn.MaxUnpool2d)
            and len(user.args) > 1
            and (user.args[0] is not part and user.args[1] is part and user.kwargs.keys() <= {"output_size"})
            for part, user in users
        ]
        if not fits or not all(fits):
            continue
        assert pool is not None
        forward.replaced.append((pool, "max_pool2x2"))
        node.op, node.target = "call_function", ops.max_pool2x2
        for _, user in users:
            unpool = found.module(user)
            assert unpool is not None
            forward.replaced.append((unpool, "max_unpool2x2"))
            user.op, user.target = "call_function", _unpool


def _fuse_norms(forward: PatchedForward, found: Trace, x: Tensor) -> None:
    """Each BatchNorm that an addition or an activation follows, and those: in one pass."""
    values = Values(found.root, found.graph)
    try:
        values.run(x.clone())
    except Exception as error:  # a graph that took the wrong turn may fail in any way
        name = type(forward.model).__name__
        raise Refused(f"the graph of {name} does not run on the example: {first_line(error)}") from error
    for fusion in find(found, values, ()):
        module = found.module(fusion.norm)
        assert isinstance(module, nn.BatchNorm2d)
        norm = _Norm(module, fusion.activation)
        what = fusion.describe(norm)
        if not what or hooked(module):
            continue
        after = [found.module(node) for node in (*fusion.between, fusion.last)]
        forward.passed_by += [inner for each in after if each is not None for inner in each.modules()]
        name = f"norm{len(forward.norms)}"
        forward.__dict__[name] = norm
        forward.norms.append(module)
        forward.replaced.append((module, f"batchnorm_statistics ({what})"))
        given = (fusion.norm.all_input_nodes[0], *([fusion.residual] if fusion.residual is not None else []))
        # At the addition, since the residual may be written into after it.
        with found.graph.inserting_before(fusion.add if fusion.add is not None else fusion.norm):
            call = found.graph.call_module(name, given)
        fusion.last.replace_all_uses_with(call)
        for node in dict.fromkeys((fusion.last, *reversed(fusion.between))):
            found.graph.erase_node(node)


def indexed(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxUnpool2d) or (isinstance(module, nn.MaxPool2d) and module.return_indices)


def fused(module: nn.Module, x: Tensor, unfrozen: str | None, training: bool) -> PatchedForward:
    """A module's forward with what can be fused in it; empty where that is nothing."""
    own_forward(module)
    forward, graph = PatchedForward(module), follow(module)
    if any(map(indexed, module.modules())):
        module.training = True
        try:
            forward.evaluating = str(follow(module)) != str(graph)
        finally:
            module.training = False
        if not (training and forward.evaluating):
            _fuse_pools(forward, Followed(Root(module), graph))
    if unfrozen is None:
        forward.evaluating = True
        _fuse_norms(forward, Followed(Root(module), graph), x)
    if forward.replaced:
        forward.passed_by += [module for module, _ in forward.replaced]
        forward.program = compile_graph(graph)
        verify(forward, x)
    return forward
