"""A network that also gives its stage features, penultimate features and BatchNorm statistics, without hooks.

The network's forward is followed once by torch.fx, and the graph given more outputs. Hooks would do in eager mode, but
``torch.compile(fullgraph=True)`` does not follow them.
"""

from __future__ import annotations

import logging
import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.models.batchnorm import BatchNormWithStatistics
from dfkd_fast.models.fusion import Values, find
from dfkd_fast.models.outputs import Outputs
from dfkd_fast.models.tracing import Program, Root, Shape, Trace, compile_graph, default_stages, modes_kept, trace

__all__ = ["FeatureModel", "answer", "extract", "probe", "undisturbed"]

log = logging.getLogger(__name__)


class FeatureModel(nn.Module):
    """A classifier whose forward gives :class:`Outputs`; made by :func:`extract`.

    Parameters, buffers and modules are those of ``model``: what happens to one happens to the other, and the weights to
    save are ``model.state_dict()``. ``train()`` and ``eval()`` reach ``model``, whose flag says which forward is run.

    With statistics the forward is that of eval mode whatever the flags: stored statistics normalise, dropout does
    nothing.

    Attributes:
        model: the plain network.
        stages: module paths in ``model`` whose outputs are the features, shallow to deep.
        feature_channels: channels of each stage's map.
        penultimate_dim: D, the length of the penultimate features.
        num_classes: number of logits.
        batchnorms: paths of the BatchNorms whose statistics are given, in the order of ``Outputs.statistics``.
        fused: for each of them what is computed with it in one pass over its map: "add" for what is added to its
            output, "relu" or "relu6" for the activation, joined by "+", and empty for the norm alone.
        other_batchnorms: paths of those that are used as they are, and follow their flags: of another kind than
            BatchNorm2d, without stored statistics, or inside a module that cannot be followed. All three are empty
            without statistics.
        folded: paths of the BatchNorms that are part of the layer before them now, in network order; empty but in what
            :func:`dfkd_fast.models.fold_batchnorm` gives.
    """

    stages: tuple[str, ...]
    feature_channels: tuple[int, ...]
    penultimate_dim: int
    num_classes: int
    batchnorms: tuple[str, ...]
    fused: tuple[str, ...]
    other_batchnorms: tuple[str, ...]
    folded: tuple[str, ...]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.rewritten = nn.ModuleList()
        self.batchnorms = self.fused = self.other_batchnorms = self.folded = ()
        self.training = model.training
        self._training_program: Program = _delegate
        self._eval_program: Program = _delegate

    def forward(self, x: Tensor) -> Outputs:
        """Images (N, 3, H, W), normalised, to logits, features, penultimate features and statistics."""
        program = self._training_program if self.model.training else self._eval_program
        logits, features, penultimate, statistics = program(self, x)
        return Outputs(logits, tuple(features), penultimate, tuple(statistics))

    def extra_repr(self) -> str:
        return f"stages={self.stages}, penultimate_dim={self.penultimate_dim}, batchnorms={len(self.batchnorms)}"


def _delegate(owner: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """The forward of a network that gives Outputs itself; its stages are positions in ``Outputs.features``."""
    assert isinstance(owner, FeatureModel)
    outputs = owner.model(x)
    return outputs.logits, [outputs.features[int(i)] for i in owner.stages], outputs.penultimate, outputs.statistics


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, and every random stream as it was afterwards."""
    devices = [device] if device.type == "cuda" else []
    with modes_kept(model, False), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield


def probe(model: nn.Module, image_size: int) -> Tensor:
    """One random image of the network's type and device, from a random stream of its own."""
    tensor = next(model.parameters(), torch.zeros(()))
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return image.to(device=tensor.device, dtype=tensor.dtype)


def answer(model: nn.Module, image: Tensor) -> Any:
    """What a network gives for an image, with nothing disturbed.

    Raises:
        ValueError: it does not take the image.
    """
    with undisturbed(model, image.device):
        try:
            return model(image)
        except Exception as error:  # a forward may say in many ways that an image does not suit it
            raise ValueError(
                f"{type(model).__name__} does not take an image {tuple(image.shape)}; another image_size may do. "
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            ) from error


def extract(
    model: nn.Module, *, stages: Sequence[str] | None = None, statistics: bool = False, image_size: int = 64
) -> FeatureModel:
    """Let a classifier give what a distillation needs of it.

    Args:
        model: images (N, 3, H, W) to logits (N, classes), on any device. One whose forward returns :class:`Outputs` is
            used as it is; its stages are the positions of its features, ``"0"``, ``"1"``, ... A
            :class:`FeatureModel` stands for its plain network and its stages.
        stages: module paths whose outputs are the features, shallow to deep; None is the last map of each resolution,
            the deepest four at most: ``layer1`` to ``layer4`` of a ResNet. The deepest is the map that is pooled.
        statistics: give the statistics of each BatchNorm2d's input beside the stored ones; the network is then used as
            in eval mode.
        image_size: height and width of the one random image that is sent through the network to learn its shapes.

    Returns:
        The network with more outputs, sharing its parameters and buffers. The penultimate features are what the last
        linear layer reads, before dropout, flattened.

    Raises:
        TypeError: model is no module.
        ValueError: a forward that cannot be followed, stages that it does not have or that are no maps (N, C, H, W), or
            an image size that it does not take. The message says which, and what would do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, FeatureModel):
        stages = model.stages if stages is None else stages
        model = model.model
    if isinstance(stages, str):
        raise TypeError(f"stages must be a sequence of module paths, got the string {stages!r}")
    if stages is not None and (not stages or len(set(stages)) < len(stages)):
        raise ValueError(f"stages must name at least one module, none of them twice, got {list(stages)}")
    image = probe(model, image_size)
    plain = answer(model, image)
    if isinstance(plain, Outputs):
        return _as_it_is(model, plain, stages)
    if not isinstance(plain, Tensor) or plain.ndim != 2:
        found = tuple(plain.shape) if isinstance(plain, Tensor) else type(plain).__name__
        raise ValueError(f"{type(model).__name__} must give logits (N, classes), got {found}")
    return _traced(model, plain, image, stages, statistics)


def _as_it_is(model: nn.Module, outputs: Outputs, stages: Sequence[str] | None) -> FeatureModel:
    made = FeatureModel(model)
    known = [str(i) for i in range(len(outputs.features))]
    if stages is not None and not set(stages) <= set(known):
        raise ValueError(f"stages: {type(model).__name__} gives its features itself, {known}; got {list(stages)}")
    made.stages = tuple(stages if stages is not None else known)
    made.batchnorms = tuple(str(i) for i in range(len(outputs.statistics)))
    made.fused = ("",) * len(made.batchnorms)
    shapes = [tuple(outputs.features[int(stage)].shape) for stage in made.stages]
    _describe(made, tuple(outputs.logits.shape), shapes, tuple(outputs.penultimate.shape))
    return made


def _traced(
    model: nn.Module, plain: Tensor, image: Tensor, stages: Sequence[str] | None, statistics: bool
) -> FeatureModel:
    root = Root(model)
    found = trace(root, training=False, evaluating=statistics)
    runner = Values(root, found.graph)
    with undisturbed(model, image.device):
        logits = runner.run(image)
    # In exact arithmetic these are equal; a graph that missed a branch is far off.
    tolerance = 1e-2 * plain.abs().max().item()
    if not torch.allclose(logits.float(), plain.float(), rtol=1e-2, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"the forward of {type(model).__name__} depends on something that torch.fx does not see: the graph gives "
            "other logits. Give a network whose forward returns dfkd_fast.models.Outputs instead"
        )
    made = FeatureModel(model)
    made.stages = tuple(stages) if stages is not None else default_stages(found, runner.shapes)
    nodes = [found.stage(path) for path in made.stages]
    penultimate = runner.shapes[found.penultimate]
    flat = (penultimate[0], math.prod(penultimate[1:]))
    _describe(made, tuple(plain.shape), [runner.shapes.get(n, ()) for n in nodes], flat)
    classifier = found.module(found.classifier)
    reads = getattr(classifier, "in_features", getattr(classifier, "in_channels", flat[1]))
    if reads != flat[1]:
        raise ValueError(
            f"the last linear layer of {type(model).__name__} is applied at many places, so that its input "
            f"{penultimate} is no penultimate vector (N, {reads})"
        )
    if statistics:
        _rewrite_batchnorms(made, found, runner)
    made._eval_program = made._training_program = _program(made, found)
    if not statistics:
        made._training_program = _program(made, trace(root, training=True))
    return made


def _describe(made: FeatureModel, logits: Shape, features: Sequence[Shape], penultimate: Shape) -> None:
    name = type(made.model).__name__
    for stage, shape in zip(made.stages, features, strict=True):
        # The image is square, so a map (N, C, H, W) is too; (N, H, W, C) shows by not being.
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(
                f"stages: {stage!r} of {name} gives {shape or 'no tensor'}; a stage must give a map (N, C, H, W), "
                "which is square for a square image"
            )
    if len(penultimate) != 2 or len(logits) != 2:
        raise ValueError(
            f"{name} must give penultimate features (N, D) and logits (N, classes), got {penultimate} and {logits}"
        )
    made.feature_channels = tuple(shape[1] for shape in features)
    made.penultimate_dim, made.num_classes = penultimate[1], logits[1]


def _rewrite_batchnorms(made: FeatureModel, found: Trace, values: Values) -> None:
    """Put a BatchNorm that returns statistics in the place of each that there is one for, and of what follows it."""
    graph = found.graph
    kept = {found.stage(path) for path in made.stages} | {found.penultimate, found.logits}
    paths, fused, fusions = [], [], find(found, values, kept)
    for fusion in fusions:
        module = found.module(fusion.norm)
        assert isinstance(module, nn.BatchNorm2d)
        norm = BatchNormWithStatistics(module, fusion.activation)
        given = (fusion.norm.all_input_nodes[0], *([fusion.residual] if fusion.residual is not None else []))
        paths.append(str(fusion.norm.target).removeprefix("model."))
        # At the addition, since the residual may be written into after it.
        with graph.inserting_before(fusion.add if fusion.add is not None else fusion.norm):
            call = graph.call_module(f"rewritten.{len(made.rewritten)}", given)
            found.statistics.append(graph.call_function(operator.getitem, (call, 1)))
        made.rewritten.append(norm)
        fused.append(fusion.describe(norm))
        # To all others the last node stays what it was.
        last = fusion.last
        last.op, last.target, last.args, last.kwargs = "call_function", operator.getitem, (call, 0), {}
        for node in reversed(fusion.between):
            graph.erase_node(node)
    made.batchnorms, made.fused = tuple(paths), tuple(fused)
    counts = ", ".join(f"{count} {what or 'alone'}" for what, count in sorted(Counter(fused).items()))
    log.info("%s: %d BatchNorms give statistics (%s)", type(made.model).__name__, len(fused), counts or "none")
    made.other_batchnorms = tuple(
        path
        for path, module in made.model.named_modules()
        if path not in paths and (isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__)
    )


def _program(made: FeatureModel, found: Trace) -> Program:
    """The graph with the outputs of :class:`Outputs`, as a function of ``made`` and the images."""
    graph, features = found.graph, []
    for path in made.stages:
        node = found.stage(path)
        if found.changed_in_place(node):
            with graph.inserting_after(node):
                node = graph.call_function(torch.clone, (node,))
        features.append(node)
    with graph.inserting_before(graph.output_node()):
        penultimate = graph.call_function(torch.flatten, (found.penultimate, 1))
    graph.output_node().args = ((found.logits, features, penultimate, found.statistics),)
    # Tensors that the forward makes of nothing are kept by the tracer; here they follow the network's device.
    for node in graph.find_nodes(op="get_attr"):
        constant = getattr(found.root, str(node.target), None) if "." not in str(node.target) else None
        if isinstance(constant, Tensor) and not hasattr(made, str(node.target)):
            made.register_buffer(str(node.target), constant, persistent=False)
    return compile_graph(graph)
