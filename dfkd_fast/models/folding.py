"""Copies of a frozen network that compute the same with less: BatchNorms folded away, weights held in a low precision.

In eval mode a BatchNorm is an affine map of each channel, and so is a convolution's output in its weight and bias:
``bn(conv(x; W, b)) = conv(x; s W, s (b - mean) + beta)`` with ``s = gamma / sqrt(var + eps)``.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dfkd_fast.models.batchnorm import BatchNormWithStatistics
from dfkd_fast.models.extract import FeatureModel, answer, probe, undisturbed
from dfkd_fast.models.fusion import Values
from dfkd_fast.models.outputs import Outputs
from dfkd_fast.models.tracing import Root, Trace, follow

__all__ = ["fold_batchnorm", "held_in"]

log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(kw_only=True)
class _Pair:
    """A layer and the BatchNorm that only reads its output.

    Attributes:
        path: of the BatchNorm, in the network.
        layer: the convolution or linear layer.
        norm: the BatchNorm.
        after: what is in its place once it is folded: its activation, if it has one inside.
        weight, bias: of the layer that computes both, float64.
    """

    path: str
    layer: nn.Module
    norm: _BatchNorm
    after: nn.Module
    weight: Tensor
    bias: Tensor


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer of its own two parameters and of nothing else.

    Not one whose weight is computed (weight or spectral norm, standardised weights) or that someone watches.
    """
    timm: Any = sys.modules.get("timm.layers")  # a network that was made with timm has loaded it
    forwards = [kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)]
    forwards += [timm.Conv2dSame.forward, timm.Linear.forward] if timm is not None else []
    if type(module).forward not in forwards or _hooked(module):
        return False
    if isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    return all(name in module._parameters for name in ("weight", "bias"))  # not so where they are parametrised


def _activation_after(layer: nn.Module, norm: nn.Module, values: Values, source: fx.Node) -> nn.Module | None:
    """What remains of ``norm`` once it is folded into ``layer``; None where it cannot be folded."""
    if not _is_plain(layer) or not isinstance(norm, _BatchNorm) or _hooked(norm):
        return None
    if not all(name in norm._parameters for name in ("weight", "bias")):
        return None
    if isinstance(layer, nn.Conv2d) and BatchNormWithStatistics.fits(norm):
        if type(norm).forward is _BatchNorm.forward:
            return nn.Identity()
        # timm's with an activation inside, and with a dropout that is hardly ever there
        return norm.get_submodule("act") if isinstance(norm.drop, nn.Identity) else None
    vectors = isinstance(norm, nn.BatchNorm1d) and len(values.shapes.get(source, ())) == 2
    if isinstance(layer, nn.Linear) and vectors and type(norm).forward is _BatchNorm.forward:
        return nn.Identity() if norm.running_mean is not None and norm.running_var is not None else None
    return None


def _exact(layer: Any, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of both as one layer, in float64."""
    vectors = (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, var, scale, shift = (None if v is None else v.detach().double() for v in vectors)
    assert weight is not None
    assert mean is not None
    assert var is not None
    folded = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)
    return folded[0].detach(), folded[1].detach()


def _survives(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding costs no channel more than the type's precision: float16 may overflow, or lose small weights."""
    error = (weight.to(dtype).double() - weight).flatten(1).norm(dim=1)
    kept = error <= torch.finfo(dtype).eps * weight.flatten(1).norm(dim=1)
    return bool(kept.all() & bias.to(dtype).isfinite().all())


def _find(made: FeatureModel, image: Tensor, dtype: torch.dtype) -> tuple[list[_Pair], bool]:
    """What can be folded, in network order, and whether the forward gives Outputs itself.

    Raises:
        ValueError: the forward cannot be followed.
    """
    root = Root(made.model)
    graph, tracer = follow(root, training=False)
    result = graph.output_node().args[0]
    made_by = result.target if isinstance(result, fx.Node) else None
    delegated = isinstance(made_by, type) and issubclass(made_by, Outputs)
    kept: set[fx.Node] = set()
    if not delegated:
        found = Trace(root, graph, tracer.outputs, tracer.inputs)
        kept = {found.stage(path) for path in made.stages}
    values = Values(root, graph)
    with undisturbed(made.model, image.device):
        values.run(image)
    called = {node: root.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")}
    # A module may also be called by another one that the graph holds whole.
    calls = Counter(inner for module in called.values() for inner in module.modules())
    # What the forward reads of a module beside calling it must stay what it is.
    read = {id(functools.reduce(getattr, str(n.target).split("."), root)) for n in graph.find_nodes(op="get_attr")}

    def once(module: nn.Module) -> bool:
        return calls[module] == 1 and not read & {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}

    pairs = []
    for node, norm in called.items():
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source not in called or source in kept or list(source.users) != [node]:
            continue
        layer = called[source]
        after = _activation_after(layer, norm, values, source) if once(layer) and once(norm) else None
        if after is None:
            continue
        assert isinstance(norm, _BatchNorm)
        weight, bias = _exact(layer, norm)
        if _survives(weight, bias, dtype):
            path = str(node.target).removeprefix("model.")
            pairs.append(_Pair(path=path, layer=layer, norm=norm, after=after.eval(), weight=weight, bias=bias))
    return pairs, delegated


def _set(pair: _Pair, dtype: torch.dtype) -> None:
    """Give the layer the weights of both, in the memory format of its own."""
    layer: Any = pair.layer
    weight = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False).copy_(pair.weight)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(pair.bias.to(dtype), requires_grad=False)


def _fold(model: nn.Module, pairs: list[_Pair]) -> None:
    instead = {pair.norm: pair.after for pair in pairs}
    for module in list(model.modules()):
        for name, child in module._modules.items():  # under each of its names
            if isinstance(child, _BatchNorm) and child in instead:
                module._modules[name] = instead[child]
    for pair in pairs:
        _set(pair, pair.layer.weight.dtype)  # type: ignore[arg-type]


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    cast: dict[nn.Parameter, nn.Parameter] = {}  # what was shared is shared again
    for module in filter(_is_plain, model.modules()):
        for name in ("weight", "bias"):
            parameter = module._parameters[name]
            if parameter is not None and parameter.is_floating_point():
                if parameter not in cast:
                    cast[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                setattr(module, name, cast[parameter])


def _gives(model: nn.Module, image: Tensor, wanted: Outputs) -> bool:
    """Whether a network gives some Outputs, up to rounding: after a fold that is wrong it is far off."""
    try:
        found = answer(model, image)
    except ValueError:  # it needs something of a BatchNorm that is gone
        return False
    left, right = (
        [outputs.logits, *outputs.features, outputs.penultimate, *(v for layer in outputs.statistics for v in layer)]
        for outputs in (found, wanted)
    )
    return all(
        torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2 * b.abs().max().item(), equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def _copy(features: FeatureModel, dtype: torch.dtype) -> FeatureModel:
    if not isinstance(features, FeatureModel):
        raise TypeError(f"features must be a FeatureModel, as extract gives it, got {type(features).__name__}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    return copy.deepcopy(features).requires_grad_(False)


def held_in(features: FeatureModel, dtype: torch.dtype) -> FeatureModel:
    """A frozen copy for use under ``torch.autocast(device, dtype)``, which then has no weight to cast at every call.

    Weights and biases of convolutions and linear layers are held in ``dtype``; all else stays as it is, BatchNorms
    among it. So does a layer whose weight is computed at every call (spectral norm), or that has hooks: autocast casts
    those. The copy gives what ``features`` gives under the same autocast.

    Args:
        features: any network with or without statistics, in either mode.
        dtype: autocast's.

    Returns:
        A copy that shares no tensor with ``features`` and requires no gradient; flags, stages and memory format are
        those of ``features``.

    Raises:
        TypeError: features is no FeatureModel.
        ValueError: dtype is not one of float16, bfloat16, float32 and float64.
    """
    made = _copy(features, dtype)
    _cast(made.model, dtype)
    return made


def fold_batchnorm(features: FeatureModel, *, dtype: torch.dtype = torch.float32, image_size: int) -> FeatureModel:
    """A frozen copy with each BatchNorm folded into the convolution or linear layer before it, where that can be.

    It can where nothing else reads that layer's output, which is no stage either, both are called once, neither has
    hooks or computed weights, and ``dtype`` holds the product. What cannot be folded stays as it is. Folding computes
    in float64 and rounds to ``dtype`` at the end. The other convolutions and linear layers are held in ``dtype`` too
    (see :func:`held_in`), and all else stays as it is.

    A network whose forward gives :class:`Outputs` itself is folded if its forward can be followed and then gives the
    same for a probe; else its weights are cast and no more.

    Args:
        features: a network in eval mode, without rewritten BatchNorms.
        dtype: autocast's, or the network's own where there is no autocast.
        image_size: height and width of the one random image that is sent through the copy.

    Returns:
        A copy in eval mode that shares no tensor with ``features``, requires no gradient and is of use in eval mode
        alone; ``folded`` names the BatchNorms that are gone. Its outputs mean what those of ``features`` mean.

    Raises:
        TypeError: features is no FeatureModel.
        ValueError: a network in training mode or with statistics, a dtype that is not one of float16, bfloat16, float32
            and float64, or an image size that the network does not take.
    """
    made = _copy(features, dtype)
    name = type(made.model).__name__
    if len(made.rewritten):
        raise ValueError(f"{name} gives the statistics of its BatchNorms, which cannot be folded then; use held_in")
    for path, module in made.model.named_modules():
        if module.training:
            raise ValueError(f"{name} must be in eval mode to be folded; {path or 'the network'!r} is in training mode")
    made.eval()
    norms = sum(isinstance(module, _BatchNorm) for module in made.model.modules())
    image = probe(made.model, image_size)
    wanted, unfolded, why = answer(made.model, image), made, ""
    try:
        pairs, delegated = _find(made, image, dtype)
    except ValueError:
        pairs, delegated, why = [], False, ": its forward cannot be followed by torch.fx"
    if delegated:
        unfolded = copy.deepcopy(made)
    _fold(made.model, pairs)
    if delegated and not _gives(made.model, image, wanted):
        made, pairs, why = unfolded, [], ": its forward does something that torch.fx does not see"
    _cast(made.model, dtype)
    for pair in pairs:
        _set(pair, dtype)
    made.folded = tuple(pair.path for pair in pairs)
    log.info("%s: %d of %d BatchNorms folded, weights in %s%s", name, len(pairs), norms, dtype, why)
    return made
