"""Adds stage features, penultimate features and BatchNorm statistics to the outputs of a network.

torch.fx traces the forward, and outputs are added to the graph. Forward hooks would suffice in eager mode, but under
``torch.compile`` they cause graph breaks.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dfkd_fast.graph.fusion import (
    find,
    find_unfused,
    fork,
    fuse,
    fuse_training,
    merge_statistics,
    unfused_statistics,
)
from dfkd_fast.graph.outputs import Outputs
from dfkd_fast.graph.tracing import (
    Root,
    Trace,
    all_close,
    compile_graph,
    dropouts,
    dummy_image,
    eval_forward,
    graph_from_list,
    graph_to_list,
    image_channels,
    require_finite,
    run,
    symbolic_trace,
    unwrap,
    weights_of,
)

__all__ = ["FeatureModel", "extract"]

log = logging.getLogger(__name__)

# Operations after the last linear layer that only reshape or cast.
_RESHAPES: set[Any] = {torch.flatten, torch.squeeze, torch.reshape, "flatten", "view", "reshape", "squeeze", "squeeze_"}
_RESHAPES |= {"float", "double", "half", "bfloat16", "to", "type", "type_as", "contiguous", "clone", torch.clone}
_DROPOUTS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_OUTPUTS_HINT = "Pass a network whose forward returns dfkd_fast.models.Outputs(logits, features, penultimate) instead"


class FeatureModel(nn.Module):
    """A classifier that returns :class:`Outputs`. :func:`extract` builds it.

    It shares parameters, buffers and modules with ``model``; save ``model.state_dict()``. The training flag of
    ``model`` selects the traced forward. Copying and pickling work if they work for ``model``.

    With statistics the forward is always that of eval mode: running statistics normalize and dropout is off.

    Attributes:
        model: the plain network.
        programs: the traced forwards as ``torch.fx.GraphModule``, by the training flag of ``model``; empty if
            ``model`` returns Outputs itself, or if only its logits are needed and torch.fx cannot trace it.
        stages: paths of the modules in ``model`` whose outputs are the features, shallow to deep.
        image_channels: C of the images (N, C, H, W): 3, or another number if the first convolution has it.
        feature_channels: number of channels per stage.
        penultimate_dim: D, the length of the penultimate features; 0 if there are none.
        num_classes: number of logits.
        batchnorms: paths of the BatchNorms in the order of ``Outputs.statistics``.
        fused: the operations fused with each BatchNorm: "add", "relu", "relu6", joined by "+"; an empty string if none.
        other_batchnorms: paths of the other BatchNorms: their inputs are not maps, they have no running statistics, or
            they are in a module that is not traced. They follow their training flags, and so do BatchNorms of other
            libraries and those that override ``forward``.
            ``batchnorms``, ``fused`` and ``other_batchnorms`` are empty if statistics are not requested.
        folded: paths of the BatchNorms that :func:`dfkd_fast.models.fold_batchnorm` has folded, in execution order.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.stages: tuple[str, ...] = ()
        self.feature_channels: tuple[int, ...] = ()
        self.penultimate_dim = self.num_classes = 0
        self.image_channels = image_channels(model)
        self.batchnorms: tuple[str, ...] = ()
        self.fused: tuple[str, ...] = ()
        self.other_batchnorms: tuple[str, ...] = ()
        self.folded: tuple[str, ...] = ()
        # The programs are in a dictionary, so that their parameters are not registered a second time.
        self.programs: dict[bool, fx.GraphModule] = {}

    def forward(self, x: Tensor) -> Outputs:
        """Compute :class:`Outputs` of normalized images (N, image_channels, H, W)."""
        if not self.programs:
            outputs = self.model(x)
            if isinstance(outputs, Tensor):
                return Outputs(outputs, (), outputs[:, :0])
            features = tuple(outputs.features[int(stage)] for stage in self.stages)
            return Outputs(outputs.logits, features, outputs.penultimate, tuple(outputs.statistics))
        logits, features, penultimate, statistics = self.programs[self.model.training](x)
        return Outputs(logits, tuple(features), penultimate, tuple(statistics))

    def __getstate__(self) -> dict[str, Any]:
        graphs = {training: graph_to_list(program.graph) for training, program in self.programs.items()}
        return {**self.__dict__, "programs": graphs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        graphs: dict[bool, Any] = state["programs"]
        self.programs = {training: compile_graph(self, graph_from_list(graph)) for training, graph in graphs.items()}

    def extra_repr(self) -> str:
        return f"stages={self.stages}, penultimate_dim={self.penultimate_dim}, batchnorms={len(self.batchnorms)}"


def extract(
    model: nn.Module,
    *,
    stages: Sequence[str] | None = None,
    statistics: bool = False,
    image_size: int = 64,
    needs: Literal["stages", "penultimate", "logits"] = "stages",
) -> FeatureModel:
    """Add features and BatchNorm statistics to a classifier's outputs.

    Args:
        model: maps images (N, 3, H, W) to logits (N, classes), on any device and in any floating-point dtype. Images of
            a network whose first convolution has 1, 2 or 4 channels have as many. A network
            that returns :class:`Outputs` is not traced; its stages are the positions of its features, ``"0"``, ``"1"``,
            ... A :class:`FeatureModel` is replaced by its plain network and its stages; its graph is reused if only
            statistics are added. So is a network in torch.compile, (Distributed)DataParallel, AveragedModel or timm's
            ModelEma.
        stages: module paths whose outputs are the features, shallow to deep. None selects the last map of each
            resolution, at most the deepest four: ``layer1`` to ``layer4`` of a ResNet.
        statistics: return the batch and running statistics of each BatchNorm2d's input (Eq. 3). The forward is then
            that of eval mode.
        image_size: height and width of the random image that determines the shapes.
        needs: the outputs that the result must have. "penultimate": a network whose stages cannot be chosen
            automatically, such as a vision transformer, has none. "logits": a network that cannot be traced returns
            only its logits.

    Returns:
        The network with these outputs added; it shares the parameters and buffers of ``model``. The penultimate
        features are the flattened input of the last linear layer, before dropout.

    Raises:
        TypeError: model is not a module, or stages is a string.
        ValueError: torch.fx cannot trace the forward, a stage does not exist or is not a map (N, C, H, W), the network
            does not accept the image size, or a weight is NaN or infinite. The message says how to proceed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrapper, model = model, unwrap(model)
    if isinstance(model, FeatureModel):
        if statistics and model.programs and stages in (None, model.stages):
            return _with_statistics(model)
        if stages is None and model.num_classes and not model.stages:
            needs = "penultimate" if model.programs else "logits"
        else:
            stages = model.stages if stages is None else stages
        model = unwrap(model.model)
    if isinstance(stages, str):
        raise TypeError(f"stages must be a sequence of module paths, got the string {stages!r}")
    if stages is not None and (not stages or len(set(stages)) < len(stages)):
        raise ValueError(f"stages must name at least one module and none twice, got {list(stages)}")
    if stages is not None and model is not wrapper:
        prefix = next((path for path, module in wrapper.named_modules() if module is model), "")
        stages = [stage.removeprefix(f"{prefix}.") for stage in stages]
    require_finite(type(model).__name__, weights_of(model))
    image = dummy_image(model, image_size)
    outputs = eval_forward(model, image)
    if isinstance(outputs, Outputs):
        return _wrap_outputs(model, outputs, stages)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"{type(model).__name__} must return logits (N, classes), got {shape}")
    try:
        return _extract_traced(model, outputs, image, stages, statistics, needs)
    except ValueError as error:
        if needs != "logits" or stages is not None or statistics:
            raise
        log.info("only the logits of %s are used: %s", type(model).__name__, error)
    return _set_shapes(FeatureModel(model), tuple(outputs.shape), [], (1, 0))


def _wrap_outputs(model: nn.Module, outputs: Outputs, stages: Sequence[str] | None) -> FeatureModel:
    result = FeatureModel(model)
    known = [str(i) for i in range(len(outputs.features))]
    if stages is not None and not set(stages) <= set(known):
        raise ValueError(f"stages: {type(model).__name__} returns its features itself, {known}; got {list(stages)}")
    result.stages = tuple(stages if stages is not None else known)
    result.batchnorms = tuple(str(i) for i in range(len(outputs.statistics)))
    result.fused = ("",) * len(result.batchnorms)
    shapes = [tuple(outputs.features[int(stage)].shape) for stage in result.stages]
    return _set_shapes(result, tuple(outputs.logits.shape), shapes, tuple(outputs.penultimate.shape))


def _extract_traced(
    model: nn.Module, logits: Tensor, image: Tensor, stages: Sequence[str] | None, statistics: bool, needs: str
) -> FeatureModel:
    root, name = Root(model), type(model).__name__
    trace = _trace_with_hint(root, training=False, evaluating=statistics)
    head = _find_head(trace)
    if not all_close(run(root, trace.graph, image), logits, 1e-2):  # a missed branch differs more
        raise ValueError(
            f"the traced graph of {name} returns other logits than its forward, which depends on values that "
            f"torch.fx does not record. {_OUTPUTS_HINT}"
        )
    result = FeatureModel(model)
    try:
        result.stages = tuple(stages) if stages is not None else _default_stages(trace, head)
    except ValueError:
        if needs == "stages":
            raise
    nodes = [trace.stage(path) for path in result.stages]
    penultimate: tuple[int, ...] = head.penultimate.meta["shape"]
    flat = (penultimate[0], math.prod(penultimate[1:]))
    _set_shapes(result, tuple(logits.shape), [node.meta.get("shape", ()) for node in nodes], flat)
    classifier = trace.module(head.classifier)
    in_features = getattr(classifier, "in_features", getattr(classifier, "in_channels", flat[1]))
    if in_features != flat[1]:
        raise ValueError(
            f"the last linear layer of {name} is applied at many positions: its input {penultimate} is not a "
            f"penultimate vector (N, {in_features})"
        )
    statistics_node = _fuse_batchnorms(result, trace, {*nodes, head.penultimate, head.logits}) if statistics else None
    result.programs[False] = result.programs[True] = _program(result, trace, head, statistics_node)
    if not statistics:
        trace = _trace_with_hint(root, training=True)
        head = _find_head(trace)
        run(root, trace.graph, image)
        head = _follow_training_flag(result, trace, head)
        fuse_training(trace, {*(trace.stage(path) for path in result.stages), head.penultimate, head.logits})
        result.programs[True] = _program(result, trace, head)
    return result


class _Dropout(nn.Module):
    """A function that drops values in training mode.

    Args:
        function: for example :func:`torch.nn.functional.dropout`.
        off: the keyword arguments that turn it off in eval mode.
    """

    def __init__(self, function: Callable[..., Tensor], off: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.off = function, off

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **(kwargs if self.training else {**kwargs, **self.off}))


def _follow_training_flag(result: FeatureModel, trace: Trace, head: _Head) -> _Head:
    """Replace dropout functions, which a trace records as active, by modules with a training flag."""
    moved: dict[fx.Node, fx.Node] = {}
    for node in list(trace.graph.nodes):
        if node.op != "call_function":
            continue
        args, kwargs = node.args, dict(node.kwargs)
        if kwargs.get("dropout_p"):  # of scaled_dot_product_attention
            off: dict[str, Any] = {"dropout_p": 0.0}
        elif node.target in _DROPOUTS or getattr(node.target, "__name__", "") == "stochastic_depth":
            args, off = (), {"training": False}
            kwargs = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        else:
            continue
        name = f"dropout_{len(moved)}"
        result.add_module(name, _Dropout(node.target, off))
        trace.root.add_module(name, result.get_submodule(name))
        with trace.graph.inserting_before(node):
            moved[node] = trace.graph.call_module(name, args, kwargs)
        moved[node].meta = dict(node.meta)
        node.replace_all_uses_with(moved[node])
        trace.graph.erase_node(node)
    for path, node in trace.outputs.items():
        trace.outputs[path] = moved.get(node, node)
    return _Head(*(moved.get(node, node) for node in head))


def _with_statistics(features: FeatureModel) -> FeatureModel:
    """Adds statistics to the graph of a network that has been traced."""
    if features.batchnorms:
        return features
    result = FeatureModel(features.model)
    for name in ("stages", "feature_channels", "penultimate_dim", "num_classes", "image_channels"):
        setattr(result, name, getattr(features, name))
    trace = Trace(features, copy.deepcopy(features.programs[False].graph), {}, {})
    for node in trace.graph.find_nodes(op="call_module"):
        if isinstance(trace.module(node), dropouts()):
            node.replace_all_uses_with(node.args[0])
            trace.graph.erase_node(node)
    statistics_node = _fuse_batchnorms(result, trace, set())  # the output node also uses features, so they are kept
    output = trace.graph.output_node()
    output.args = ((*output.args[0][:3], statistics_node),)  # type: ignore[index, misc]
    result.programs[False] = result.programs[True] = _compile(result, trace)
    return result


def _trace_with_hint(root: Root, *, training: bool, evaluating: bool = False) -> Trace:
    try:
        return symbolic_trace(root, training=training, evaluating=evaluating)
    except ValueError as error:
        raise ValueError(f"{error} {_OUTPUTS_HINT}") from error


class _Head(NamedTuple):
    """The last nodes of a graph; ``classifier`` is the last linear layer, ``penultimate`` its input before dropout."""

    logits: fx.Node
    classifier: fx.Node
    penultimate: fx.Node


def _find_head(trace: Trace) -> _Head:
    name, logits = type(trace.root.model).__name__, trace.graph.output_node().args[0]
    if not isinstance(logits, fx.Node):
        raise ValueError(f"{name}.forward must return only logits (N, classes), got a {type(logits).__name__}")

    def is_any(node: fx.Node, targets: set[Any], *kinds: type) -> bool:
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        return isinstance(trace.module(node), kinds) if node.op == "call_module" else node.target in targets

    node: Any = logits
    while is_any(node, _RESHAPES | _DROPOUTS, nn.Identity, nn.Flatten, _DropoutNd):
        node = node.args[0]
    if not is_any(node, {F.linear}, nn.Linear, nn.Conv2d):
        module = trace.module(node)
        source = f"{str(node.target).removeprefix('model.')!r}" + (f" ({type(module).__name__})" if module else "")
        raise ValueError(
            f"{name}: the logits must come from a linear layer, whose input is the penultimate features; they come "
            f"from {source}. {_OUTPUTS_HINT}"
        )
    classifier, node = node, node.args[0]
    while is_any(node, _DROPOUTS, nn.Identity, _DropoutNd):
        node = node.args[0]
    return _Head(logits, classifier, node)


def _default_stages(trace: Trace, head: _Head) -> tuple[str, ...]:
    """The last map of each resolution, at most the deepest four; the deepest is the map that is pooled.

    Candidates are the outermost modules that keep or halve the resolution: layers, blocks, and stages of blocks.
    timm's ``feature_info`` is no substitute: for some families its deepest stage precedes the final convolution
    (MobileNet, EfficientNet), and torchvision's networks have none.

    Raises:
        ValueError: the pooled tensor is not a map (N, C, H, W).
    """

    def size(node: fx.Node | None) -> int:
        shape: tuple[int, ...] = node.meta.get("shape", ()) if node is not None else ()
        return shape[2] if len(shape) == 4 and shape[2] == shape[3] else 0

    def pools(node: fx.Node) -> bool:
        module = trace.module(node)
        name = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
        return "pool" in name.lower() or name in ("mean", "amax")

    chain = [head.penultimate]
    while chain[-1].args and isinstance(before := chain[-1].args[0], fx.Node):
        chain.append(before)
    pool = next((i for i, node in enumerate(chain) if pools(node)), -1)
    last = next(node for node in chain[pool + 1 :] if not isinstance(trace.module(node), nn.Identity))
    blocks = {
        path
        for path, node in trace.outputs.items()
        if node.target == f"model.{path}" or size(node) <= size(trace.inputs.get(path)) <= 2 * size(node) + 1
    }
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    ends: dict[int, str] = {}
    for path, node in trace.outputs.items():
        outer = any(path[:i] in blocks for i, letter in enumerate(path) if letter == ".")
        inside = order[node] <= order[last] and not isinstance(trace.module(node), nn.Identity)
        if path in blocks and not outer and inside and size(node) >= size(last) > 0:
            ends[size(node)] = path
    if not ends:
        raise ValueError(
            f"stages of {type(trace.root.model).__name__} cannot be chosen automatically, because the tensor "
            "that is pooled for the classifier is not the output (N, C, H, W) of a module; pass stages"
        )
    return tuple(ends[at] for at in sorted(ends, reverse=True)[-4:])


def _set_shapes(
    result: FeatureModel, logits: tuple[int, ...], features: Sequence[tuple[int, ...]], penultimate: tuple[int, ...]
) -> FeatureModel:
    name = type(result.model).__name__
    for stage, shape in zip(result.stages, features, strict=True):
        # For a square image, the last two dimensions of a map (N, C, H, W) are equal; those of (N, H, W, C) are not.
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(
                f"stages: {stage!r} of {name} returns {shape or 'no tensor'}; a stage must return a map (N, C, H, W), "
                "square for a square image"
            )
    if len(penultimate) != 2 or len(logits) != 2:
        raise ValueError(
            f"{name} must return penultimate features (N, D) and logits (N, classes), got {penultimate} and {logits}"
        )
    result.feature_channels = tuple(shape[1] for shape in features)
    result.penultimate_dim, result.num_classes = penultimate[1], logits[1]
    return result


def _fuse_batchnorms(result: FeatureModel, trace: Trace, kept: set[fx.Node]) -> fx.Node:
    """Fuses the BatchNorms of a graph and returns the node of their statistics."""
    fusions, others = {fusion.norm: fusion for fusion in find(trace, kept)}, find_unfused(trace)
    norms = [node for node in trace.graph.nodes if node in fusions or node in others]
    result.batchnorms = tuple(str(norm.target).removeprefix("model.") for norm in norms)
    result.fused = tuple(str(fusions.get(norm, "")) for norm in norms)
    counts = ", ".join(f"{count} {what or 'unfused'}" for what, count in sorted(Counter(result.fused).items()))
    log.info("%s: statistics of %d BatchNorms (%s)", type(result.model).__name__, len(norms), counts or "none")
    result.other_batchnorms = tuple(
        path
        for path, module in result.model.named_modules()
        if path not in result.batchnorms and (isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__)
    )
    statistics, calls = [], []
    for norm in norms:
        if norm not in fusions:
            with trace.graph.inserting_before(norm):  # which may overwrite its input
                module, x = trace.graph.get_attr(str(norm.target)), norm.all_input_nodes[0]
                statistics.append(trace.graph.call_function(unfused_statistics, (module, x)))
            continue
        call = fuse(trace.graph, fusions[norm])
        calls.append((call, fusions[norm].last))
        with trace.graph.inserting_after(call):
            statistics.append(trace.graph.call_function(operator.getitem, (call, 1)))
    for call, y in calls:
        fork(trace.graph, call, y, 2)
    with trace.graph.inserting_before(trace.graph.output_node()):
        return trace.graph.call_function(merge_statistics, (statistics,))


def _program(result: FeatureModel, trace: Trace, head: _Head, statistics: fx.Node | None = None) -> fx.GraphModule:
    """Compiles the graph with the fields of :class:`Outputs` as its outputs; clones features that are overwritten."""
    graph, features = trace.graph, []
    for path in result.stages:
        node = trace.stage(path)
        if any(user.args and user.args[0] is node and trace.writes_in_place(user) for user in node.users):
            with graph.inserting_after(node):
                node = graph.call_function(torch.clone, (node,))
        features.append(node)
    with graph.inserting_before(graph.output_node()):
        penultimate = graph.call_function(torch.flatten, (head.penultimate, 1))
    graph.output_node().args = ((head.logits, features, penultimate, () if statistics is None else statistics),)
    return _compile(result, trace)


def _compile(result: FeatureModel, trace: Trace) -> fx.GraphModule:
    # The tracer stores tensors that a forward creates in its root. As buffers they follow the network's device.
    for node in trace.graph.find_nodes(op="get_attr"):
        constant = getattr(trace.root, str(node.target), None) if "." not in str(node.target) else None
        if isinstance(constant, Tensor) and not hasattr(result, str(node.target)):
            result.register_buffer(str(node.target), constant, persistent=False)
    return compile_graph(result, trace.graph)
