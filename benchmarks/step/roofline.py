"""The least that a round of distillation must compute and move, counted from the networks' layers.

docs/performance.md says what counts. In short: operations of convolutions, linear layers, attention products and
similarities, with gradients of inputs and of weights only where a step needs them; bytes in bf16 of each layer's input,
weights and output in forward, and of both gradients, the weights and the stored input in backward; optimisers in
float32. Everything pointwise counts as fused into its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd_fast.benchmarks.ops.measure import Ceilings
from dfkd_fast.engine import DistillState
from dfkd_fast.graph import preserve_train_mode
from dfkd_fast.nn import HighOrderAttention, SpatialAttention
from dfkd_fast.objectives import HighOrderAttentionDistillation, SemanticFeatureContrast

__all__ = ["Layer", "Roofline", "Work", "layers", "roofline", "round_work"]

_BF16, _FLOAT = 2, 4
_ADAM, _SGD = 3 * 2 * _FLOAT, 2 * 2 * _FLOAT  # bytes per parameter: it and its moments, read and written


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer on one image: elements of its input, weights and output, and operations of its forward."""

    name: str
    inputs: int
    weights: int
    outputs: int
    flops: float

    def forward(self, batch: int) -> Work:
        moved = batch * (self.inputs + self.outputs) + self.weights
        return Work(flops=batch * self.flops, bytes=_BF16 * moved)

    def backward(self, batch: int, *, to_input: bool, to_weights: bool) -> Work:
        moved = batch * (self.outputs + self.inputs)
        if to_input:
            moved += self.weights + batch * self.inputs
        return Work(flops=(to_input + to_weights) * batch * self.flops, bytes=_BF16 * moved)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Least milliseconds of either step and of a round."""

    generator_step_ms: float
    student_step_ms: float
    round_ms: float


def _attention_layer(name: str, module: HighOrderAttention, positions: int) -> Layer:
    products = module.proj_weight.numel() + module.out_weight.numel()
    elements = module.channels * positions
    return Layer(name=name, inputs=elements, weights=products, outputs=elements, flops=2.0 * products * positions)


def layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """The layers that a network runs on one input, in their order, in eval mode. ``example`` is a batch of one."""
    found: list[Layer] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, outputs = inputs[0], output.numel()
        # An output of a plain convolution, and an input of a transposed one, meets the weights of a channel.
        positions = 1 if isinstance(module, nn.Linear) else output[0, 0].numel()
        if isinstance(module, nn.ConvTranspose2d):
            positions = x[0, 0].numel()
        elements = x.numel()
        if isinstance(module, SpatialAttention):  # its last convolution is part of its op
            module = module.expand
            elements = module.in_channels * positions
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
        weights = module.weight.numel()
        flops = 2.0 * weights * positions
        found.append(Layer(name=name, inputs=elements, weights=weights, outputs=outputs, flops=flops))

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, SpatialAttention)
    handles = [
        module.register_forward_hook(functools.partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad(), preserve_train_mode(model, False):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _passes(found: Iterable[Layer], batch: int, *, to_input: bool, to_weights: bool, first: bool) -> Work:
    """Forward and backward; ``first`` says whether the first layer's input gets a gradient too."""
    work = Work()
    for number, layer in enumerate(found):
        goes_on = to_input and (first or number > 0)
        work = work + layer.forward(batch) + layer.backward(batch, to_input=goes_on, to_weights=to_weights)
    return work


def _forward(found: Iterable[Layer], batch: int) -> Work:
    return sum((layer.forward(batch) for layer in found), Work())


def _distillation_work(state: DistillState, image: Tensor, batch: int) -> Work:
    """Of the student's terms: attention on both sides, adapters and projection heads, forward and backward."""
    with torch.no_grad(), preserve_train_mode(state.student.module, False):
        teacher, student = state.teacher(image), state.student.module(image)
    work = Work()
    terms = state.student.objective.terms
    if "mhad" in terms:
        mhad = terms["mhad"]
        assert isinstance(mhad, HighOrderAttentionDistillation)
        pairs = zip(teacher.features[-mhad.stages :], student.features[-mhad.stages :], strict=True)
        for stage, (t, s) in enumerate(pairs):
            positions = min(t.shape[-2], s.shape[-2]) * min(t.shape[-1], s.shape[-1])
            own = mhad.student_attention[stage]
            other = own if mhad.config.shared else mhad.teacher_attention[stage]
            assert isinstance(own, HighOrderAttention)
            assert isinstance(other, HighOrderAttention)
            work = work + _attention_layer("teacher", other, positions).forward(batch)
            used = [_attention_layer("student", own, positions)]
            adapter = mhad.adapters[stage]
            if isinstance(adapter, nn.Conv2d):
                count = adapter.weight.numel()
                inside, outside = adapter.in_channels * positions, adapter.out_channels * positions
                flops = 2.0 * count * positions
                used.append(Layer(name="adapter", inputs=inside, weights=count, outputs=outside, flops=flops))
            work = work + _passes(used, batch, to_input=True, to_weights=True, first=True)
    if "sfcl" in terms:
        contrast = terms["sfcl"]
        assert isinstance(contrast, SemanticFeatureContrast)
        for head, features in ((contrast.teacher_head, teacher), (contrast.student_head, student)):
            found = layers(head, features.penultimate.float())
            ours = head is contrast.student_head
            work = work + _passes(found, batch, to_input=True, to_weights=True, first=ours)
        rows = 2 * batch if contrast.config.symmetric else batch
        # Forward, and gradients to both sides of the product; few enough numbers to stay in a cache.
        work = work + Work(flops=3 * 2.0 * rows * 2 * batch * contrast.config.dim)
    return work


def round_work(state: DistillState, *, image_size: int) -> tuple[Work, Work]:
    """Work of one generator step and of one student step, optimisers included, of the preset ``dfkd-fgvc`` or less."""
    batch, device = state.config.loop.batch_size, state.runtime.device
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    generator = layers(state.generator.module, torch.zeros(1, state.generator.module.latent_dim, device=device))
    teacher, student = layers(state.teacher.model, image), layers(state.student.module.model, image)

    def optimizer(parameters: Iterable[nn.Parameter], each: int) -> Work:
        return Work(bytes=float(each * sum(p.numel() for p in parameters)))

    trained = [group["params"] for group in state.student.optimizer.param_groups]
    for_generator = _passes(generator, batch, to_input=True, to_weights=True, first=False)
    for network, needed in ((teacher, True), (student, "student" in state.generator.objective.needs)):
        if needed:
            for_generator = for_generator + _passes(network, batch, to_input=True, to_weights=False, first=True)
    for_generator = for_generator + optimizer(state.generator.module.parameters(), _ADAM)
    for_student = _forward(generator, batch) + _forward(teacher, batch) + _distillation_work(state, image, batch)
    for_student = for_student + _passes(student, batch, to_input=True, to_weights=True, first=False)
    for_student = for_student + optimizer((p for group in trained for p in group), _SGD)
    return for_generator, for_student


def roofline(work: tuple[Work, Work], rates: Ceilings, *, generator_steps: int, student_steps: int) -> Roofline:
    """The least time of a round at the measured rates."""
    generator, student = (rates.roofline_us(each.bytes, each.flops) / 1e3 for each in work)
    total = generator_steps * generator + student_steps * student
    return Roofline(generator_step_ms=generator, student_step_ms=student, round_ms=total)
