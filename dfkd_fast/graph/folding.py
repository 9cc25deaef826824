"""Makes frozen copies that do less work: BatchNorms are folded into the layers before them, weights are cast once.

In eval mode a BatchNorm with weight gamma and bias beta is an affine map per channel. The layer before it, with weight
W and bias b, absorbs it: ``bn(conv(x; W, b)) = conv(x; s W, s (b - mean) + beta)``, ``s = gamma / sqrt(var + eps)``.
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

from dfkd_fast.graph.conv2d_act import fuse_convolutions
from dfkd_fast.graph.extract import FeatureModel
from dfkd_fast.graph.fusion import is_batchnorm_act, supports_statistics
from dfkd_fast.graph.tracing import (
    Root,
    all_close,
    compile_graph,
    dummy_image,
    eval_forward,
    loaded_library,
    run,
    symbolic_trace,
)
from dfkd_fast.nn.norm import has_hooks

__all__ = ["cast_weights", "fold_batchnorm"]

log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Pair(NamedTuple):
    """A layer, the BatchNorm at ``path`` after it, and the folded weight and bias in float64."""

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
    """Whether a module is a convolution or linear layer without parametrizations and hooks."""
    timm: Any = loaded_library("timm.layers")
    kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear]
    kinds += [] if timm is None else [timm.Conv2dSame, timm.Linear]
    forwards = [(kind.forward, getattr(kind, "_conv_forward", None)) for kind in kinds]
    known = (type(module).forward, getattr(type(module), "_conv_forward", None)) in forwards
    return known and {"weight", "bias"} <= module._parameters.keys() and not has_hooks(module)


def _can_fold(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> bool:
    if (
        not _is_plain(layer)
        or has_hooks(norm)
        or not {"weight", "bias"} <= norm._parameters.keys() | norm._buffers.keys()
    ):
        return False
    if isinstance(layer, nn.Conv2d) and supports_statistics(norm):
        return not is_batchnorm_act(norm) or isinstance(norm.drop, nn.Identity)
    vectors = isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and len(shape) == 2
    return vectors and type(norm).forward is _BatchNorm.forward and norm.running_mean is not None


def _find(result: FeatureModel, image: Tensor, dtype: torch.dtype) -> list[_Pair]:
    """The pairs that can be folded, in execution order.

    Raises:
        ValueError: torch.fx cannot trace the forward.
    """
    root: Any = result if result.programs else Root(result.model)
    graph = result.programs[False].graph if result.programs else symbolic_trace(root, training=False).graph
    run(root, graph, image)
    called = {node: root.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")}
    # A leaf of the graph may also call a module, and the forward may read a tensor, or pass a module to a function.
    uses = Counter(inner for module in called.values() for inner in module.modules())
    read = {id(operator.attrgetter(str(node.target))(root)) for node in graph.find_nodes(op="get_attr")}

    def once(module: nn.Module) -> bool:
        return uses[module] == 1 and read.isdisjoint(map(id, [module, *module.parameters(), *module.buffers()]))

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
        # In each channel the rounding error must be within the dtype's precision: float16 may overflow or underflow.
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


def _matches(model: nn.Module, image: Tensor, expected: Any) -> bool:
    """Whether a network returns the expected outputs up to rounding."""
    try:
        return all_close(eval_forward(model, image), expected, 2e-2)
    except ValueError:  # the forward reads an attribute of a folded BatchNorm
        return False


def _copy(features: FeatureModel, dtype: torch.dtype) -> FeatureModel:
    if not isinstance(features, FeatureModel):
        raise TypeError(f"features must be a FeatureModel from extract, got {type(features).__name__}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    return copy.deepcopy(features).requires_grad_(False)


def cast_weights(features: FeatureModel, dtype: torch.dtype) -> FeatureModel:
    """A frozen copy for ``torch.autocast(device, dtype)``, which then casts no weight at each call.

    Convolutions and linear layers store their weights and biases in ``dtype``, except layers with parametrizations
    (spectral norm) or hooks. All other parameters keep their dtype. Under the same autocast the outputs are identical.

    Args:
        features: a network with or without statistics, in either mode.
        dtype: dtype of autocast: float16, bfloat16, float32 or float64.

    Returns:
        A copy that shares no tensor with ``features`` and requires no gradient, in the same modes and memory format.

    Raises:
        TypeError: features is not a FeatureModel.
        ValueError: unsupported dtype.
    """
    result = _copy(features, dtype)
    _cast(result.model, dtype)
    return result


def _fuse_convolutions(result: FeatureModel, image: Tensor, dtype: torch.dtype) -> None:
    formats = [
        parameter.is_contiguous(memory_format=torch.channels_last) and not parameter.is_contiguous()
        for parameter in result.model.parameters()
        if parameter.ndim == 4
    ]
    images = image.contiguous(memory_format=torch.channels_last if any(formats) else torch.contiguous_format)
    graph = result.programs[False].graph
    fuse_convolutions(result, graph, images, dtype)
    result.programs[False] = compile_graph(result, graph)


def fold_batchnorm(
    features: FeatureModel,
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int,
    batch_size: int | None = None,
) -> FeatureModel:
    """A frozen copy with BatchNorms folded into the convolutions or linear layers before them.

    A BatchNorm is folded if it is the only reader of the layer's output, the output is not a stage, the layer and the
    BatchNorm are called once and have no hooks or parametrizations, and ``dtype`` can represent the folded weights.
    Products are computed in float64 and rounded once. The other layers are cast as in :func:`cast_weights`. A network
    that returns :class:`Outputs` is folded if torch.fx can trace it and the outputs for a random image stay the same.

    Args:
        features: a network in eval mode, without statistics.
        dtype: dtype of autocast or of the network: float16, bfloat16, float32 or float64.
        image_size: height and width of the random image that is used to find shapes and to check outputs.
        batch_size: if given, calls without gradients compute each convolution with the residual addition and the ReLU
            that follow it as one cuDNN kernel. On CUDA, this is done only where a trial with a batch of this size and
            the current backend flags succeeds and is faster. Networks that return Outputs do not change.

    Returns:
        A copy for eval mode that shares no tensor with ``features`` and requires no gradient. Its ``folded`` names the
        BatchNorms.

    Raises:
        TypeError: features is not a FeatureModel.
        ValueError: the network is in training mode or returns statistics, does not accept the image size, or the dtype
            is unsupported.
    """
    result, pairs, reason = _copy(features, dtype), [], ""
    name = type(result.model).__name__
    if result.programs and result.batchnorms:
        raise ValueError(f"{name} returns BatchNorm statistics and cannot be folded; use cast_weights")
    for path, module in result.model.named_modules():
        if module.training:
            raise ValueError(f"{name} must be in eval mode to be folded; {path or 'the network'!r} is in training mode")
    norms = sum(isinstance(module, _BatchNorm) for module in result.model.modules())
    image = dummy_image(result.model, image_size)
    expected = eval_forward(result.model, image)
    try:
        pairs = _find(result, image, dtype)
    except ValueError:
        reason = ": torch.fx cannot trace its forward"
    replacement = {pair.norm: pair.norm.act if is_batchnorm_act(pair.norm) else nn.Identity() for pair in pairs}
    for module in list(result.model.modules()):
        module._modules.update(
            {at: replacement[child] for at, child in module._modules.items() if child in replacement}
        )
    for pair in pairs:
        pair.fold(pair.layer.weight.dtype)
    if not result.programs and not _matches(result.model, image, expected):
        result, pairs = _copy(features, dtype), []
        reason = ": its forward depends on values that torch.fx does not record"
    _cast(result.model, dtype)
    for pair in pairs:
        pair.fold(dtype)
    if batch_size is not None and result.programs:
        _fuse_convolutions(result, image.expand(batch_size, -1, -1, -1), dtype)
    result.folded = tuple(pair.path for pair in pairs)
    log.info("%s: %d of %d BatchNorms folded, weights in %s%s", name, len(pairs), norms, dtype, reason)
    return result.eval()
