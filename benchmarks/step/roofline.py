"""The least that a round of distillation must compute and move, counted from the networks' layers.

Operations, a multiply-add being two, of convolutions, transposed convolutions, linear layers, the matrix products of
both attention modules and the similarities of the contrast, and of nothing else:

- forward, of every layer that the step runs;
- gradients of inputs, as many operations as forward, where a gradient has to go on: in all layers of teacher and
  student in a generator step, whose gradient goes to the images; in all layers of a trained network but those that read
  noise or images (the generator's linear layer, the student's stem) and those that read something detached (the first
  layer of the teacher's projection head);
- gradients of weights, as many again, for trained weights alone: the generator's in a generator step; the student's,
  its adapters', attention modules' and both projection heads' in a student step.

Bytes, in bf16: of each of these layers in forward its input, its weights and its output; in backward the gradient of
its output, its weights where a gradient goes on, its stored input (which the gradient of weights, the derivative of a
BatchNorm and that of a rectifier all need), and the gradient of its input where there is one. All that is pointwise,
all norms, poolings, statistics and losses ride along for nothing, as if fused into these layers, and a gradient of
weights goes into its optimiser as it is made. The optimiser reads and writes in float32 a trained parameter and its
moments: two for Adam, one for SGD with momentum.

A step's floor is the larger of operations over the measured rate of bf16 matrix products and bytes over the measured
bandwidth of a copy; a round's is the sum over its steps. It is one of layers that run one after the other with memory
between them. A map small enough to stay in the L2 from one layer to the next would save bytes that are counted here; on
the other hand a layer that is bound by bytes does not hide behind one that is bound by operations, as it does here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd_fast.benchmarks.ops.measure import Ceilings
from dfkd_fast.engine import DistillState
from dfkd_fast.graph import modes_kept
from dfkd_fast.nn import HighOrderAttention, SpatialAttention
from dfkd_fast.objectives import HighOrderAttentionDistillation, SemanticFeatureContrast

__all__ = ["Layer", "Roofline", "Work", "layers", "roofline", "round_work"]

_BF16, _FLOAT = 2, 4
_ADAM, _SGD = 3 * 2 * _FLOAT, 2 * 2 * _FLOAT  # bytes a parameter: it and its moments, read and written


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
    """The layers that a network runs on one input, in their order, in eval mode.

    Args:
        model: any network.
        example: a batch of one on the network's device.
    """
    found: list[Layer] = []

    def note(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            if isinstance(module, SpatialAttention):  # whose last convolution is part of its op
                module, positions = module.expand, x[0, 0].numel()
                weights = module.weight.numel()
                flops, inside = 2.0 * weights * positions, module.in_channels * positions
                found.append(Layer(name=name, inputs=inside, weights=weights, outputs=output.numel(), flops=flops))
                return
            assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
            weights = module.weight.numel()
            if isinstance(module, nn.Linear):
                flops = 2.0 * weights
            else:
                # An output of a plain convolution, and an input of a transposed one, meets the weights of a channel.
                spread = x if isinstance(module, nn.ConvTranspose2d) else output
                flops = 2.0 * weights * spread[0, 0].numel()
            found.append(Layer(name=name, inputs=x.numel(), weights=weights, outputs=output.numel(), flops=flops))

        return hook

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, SpatialAttention)
    handles = [
        module.register_forward_hook(note(name))  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
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
    with torch.no_grad(), modes_kept(state.student.module, False):
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
    """What one generator step and one student step must do, optimisers included.

    Args:
        state: of the preset ``dfkd-fgvc`` or with fewer terms; read, not changed.
        image_size: height and width of the images.
    """
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
    """The least time of a round, given what the device does at best.

    Args:
        work: of a generator step and of a student step.
        rates: as measured.
        generator_steps: t, of a round.
        student_steps: k, of a round.
    """
    generator, student = (rates.roofline_us(each.bytes, each.flops) / 1e3 for each in work)
    total = generator_steps * generator + student_steps * student
    return Roofline(generator_step_ms=generator, student_step_ms=student, round_ms=total)
