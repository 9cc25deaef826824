"""Frozen copies of a network that compute the same with less work: BatchNorms folded, weights in low precision.

In eval mode a BatchNorm is an affine map of each channel, and so is a convolution's output in its weight and bias:
``bn(conv(x; W, b)) = conv(x; s W, s (b - mean) + beta)`` with ``s = gamma / sqrt(var + eps)``.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dfkd_fast.graph.extract import FeatureModel
from dfkd_fast.graph.fusion import gives_statistics, with_activation
from dfkd_fast.graph.tracing import Root, alike, dummy_image, eval_forward, follow, hooked, library, run

__all__ = ["cast_weights", "fold_batchnorm"]

log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Pair(NamedTuple):
    """A layer, the BatchNorm at ``path`` that only reads its output, and both as one layer in float64."""

    path: str
    layer: Any
    norm: Any
    weight: Tensor
    bias: Tensor

    def fold(self, dtype: torch.dtype) -> None:
        weight = torch.empty_like(self.layer.weight, dtype=dtype).copy_(self.weight)  # keeps the memory format
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        self.layer.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)


def _is_plain(module: nn.Module) -> bool:
    """Whether a convolution or linear layer uses its own weight and bias: not computed ones, and without hooks."""
    timm: Any = library("timm.layers")
    kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear]
    kinds += [] if timm is None else [timm.Conv2dSame, timm.Linear]
    forwards = [(kind.forward, getattr(kind, "_conv_forward", None)) for kind in kinds]
    known = (type(module).forward, getattr(type(module), "_conv_forward", None)) in forwards
    return known and {"weight", "bias"} <= module._parameters.keys() and not hooked(module)


def _can_fold(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> bool:
    if not _is_plain(layer) or hooked(norm) or not {"weight", "bias"} <= norm._parameters.keys():
        return False
    if isinstance(layer, nn.Conv2d) and gives_statistics(norm):
        return not with_activation(norm) or isinstance(norm.drop, nn.Identity)
    vectors = isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and len(shape) == 2
    return vectors and type(norm).forward is _BatchNorm.forward and norm.running_mean is not None


def _find(made: FeatureModel, image: Tensor, dtype: torch.dtype) -> list[_Pair]:
    """The pairs that can be folded, in network order.

    Raises:
        ValueError: the forward cannot be followed.
    """
    root: Any = made if made.programs else Root(made.model)
    graph = made.programs[False].graph if made.programs else follow(root, training=False).graph
    run(root, graph, image)
    called = {node: root.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")}
    # A module may also be called by another one that the graph holds whole, and its tensors be read without a call.
    uses = Counter(inner for module in called.values() for inner in module.modules())
    read = {id(operator.attrgetter(str(node.target))(root)) for node in graph.find_nodes(op="get_attr")}

    def once(module: nn.Module) -> bool:
        return uses[module] == 1 and read.isdisjoint(map(id, [*module.parameters(), *module.buffers()]))

    pairs = []
    for node, norm in called.items():
        source: Any = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if source not in called or list(source.users) != [node] or not once(called[source]) or not once(norm):
            continue
        layer: Any = called[source]
        if not _can_fold(layer, norm, source.meta["shape"]):
            continue
        bn: Any = norm
        tensors = (layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        w, b, mean, var, *affine = (None if t is None else t.detach().double() for t in tensors)
        weight, bias = (t.detach() for t in fuse_conv_bn_weights(w, b, mean, var, bn.eps, *affine))  # type: ignore
        # Rounding must cost no channel more than the type's precision: float16 may overflow, or lose small weights.
        error = (weight.to(dtype).double() - weight).flatten(1).norm(dim=1)
        kept = error <= torch.finfo(dtype).eps * weight.flatten(1).norm(dim=1)
        if kept.all() and bias.to(dtype).isfinite().all():
            pairs.append(_Pair(str(node.target).removeprefix("model."), layer, norm, weight, bias))
    return pairs


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    cast: dict[nn.Parameter, nn.Parameter] = {}  # shared parameters stay shared
    for module in filter(_is_plain, model.modules()):
        for name in ("weight", "bias"):
            parameter = module._parameters[name]
            if parameter is not None and parameter.is_floating_point():
                if parameter not in cast:
                    cast[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                setattr(module, name, cast[parameter])


def _gives(model: nn.Module, image: Tensor, expected: Any) -> bool:
    """Whether a network gives some outputs up to rounding; after a wrong fold it is far off."""
    try:
        return alike(eval_forward(model, image), expected, 2e-2)
    except ValueError:  # it needs something of a BatchNorm that is gone
        return False


def _copy(features: FeatureModel, dtype: torch.dtype) -> FeatureModel:
    if not isinstance(features, FeatureModel):
        raise TypeError(f"features must be a FeatureModel, as extract gives it, got {type(features).__name__}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    return copy.deepcopy(features).requires_grad_(False)


def cast_weights(features: FeatureModel, dtype: torch.dtype) -> FeatureModel:
    """A frozen copy for use under ``torch.autocast(device, dtype)``, which then has no weight to cast at every call.

    Weights and biases of convolutions and linear layers are held in ``dtype``. Everything else stays as it is:
    BatchNorms, and layers whose weight is computed at every call (spectral norm) or that have hooks. The copy gives the
    outputs of ``features`` under the same autocast.

    Args:
        features: any network with or without statistics, in either mode.
        dtype: of autocast: float16, bfloat16, float32 or float64.

    Returns:
        A copy that shares no tensor with ``features`` and requires no gradient, in the same modes and memory format.

    Raises:
        TypeError: features is not a FeatureModel.
        ValueError: another dtype.
    """
    made = _copy(features, dtype)
    _cast(made.model, dtype)
    return made


def fold_batchnorm(features: FeatureModel, *, dtype: torch.dtype = torch.float32, image_size: int) -> FeatureModel:
    """A frozen copy with each BatchNorm folded into the convolution or linear layer before it, where that is possible.

    It is where only the BatchNorm reads that layer's output, which is not a stage, both are called once, neither has
    hooks or computed weights, and ``dtype`` holds the product, which is computed in float64. The other convolutions and
    linear layers are held in ``dtype`` too (see :func:`cast_weights`). A network whose forward gives :class:`Outputs`
    itself is folded if its forward can be followed and then gives the same for a random image.

    Args:
        features: a network in eval mode, without statistics.
        dtype: of autocast, or of the network: float16, bfloat16, float32 or float64.
        image_size: height and width of the random image that is sent through the copy.

    Returns:
        A copy for eval mode only, which shares no tensor with ``features`` and requires no gradient; ``folded`` names
        the BatchNorms that are gone.

    Raises:
        TypeError: features is not a FeatureModel.
        ValueError: a network in training mode or with statistics, another dtype, or an image size that the network does
            not take.
    """
    made, pairs, why = _copy(features, dtype), [], ""
    name = type(made.model).__name__
    if made.programs and made.batchnorms:
        raise ValueError(
            f"{name} gives the statistics of its BatchNorms, which cannot be folded then; use cast_weights"
        )
    for path, module in made.model.named_modules():
        if module.training:
            raise ValueError(f"{name} must be in eval mode to be folded; {path or 'the network'!r} is in training mode")
    norms = sum(isinstance(module, _BatchNorm) for module in made.model.modules())
    image = dummy_image(made.model, image_size)
    expected = eval_forward(made.model, image)
    try:
        pairs = _find(made, image, dtype)
    except ValueError:
        why = ": its forward cannot be followed by torch.fx"
    gone = {pair.norm: pair.norm.act if with_activation(pair.norm) else nn.Identity() for pair in pairs}
    for module in list(made.model.modules()):
        module._modules.update({at: gone[child] for at, child in module._modules.items() if child in gone})
    for pair in pairs:
        pair.fold(pair.layer.weight.dtype)
    if not made.programs and not _gives(made.model, image, expected):
        made, pairs, why = _copy(features, dtype), [], ": its forward does something that torch.fx does not see"
    _cast(made.model, dtype)
    for pair in pairs:
        pair.fold(dtype)
    made.folded = tuple(pair.path for pair in pairs)
    log.info("%s: %d of %d BatchNorms folded, weights in %s%s", name, len(pairs), norms, dtype, why)
    return made.eval()
