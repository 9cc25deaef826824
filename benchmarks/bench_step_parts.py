"""What a training step is made of, part by part: the numbers that plans for fused kernels rest on.

ResNet-34 teaches ResNet-18 at 224 x 224, batch 64, bf16, channels-last. Measured are the device's two ceilings (copy
bandwidth, bf16 matrix product), the networks whole, their convolutions alone, BatchNorm with and without the statistics
that L_BN needs, both attention modules at every shape that they meet, and the losses: eager, and under torch.compile's
default mode.

A row holds milliseconds a call (median, tenth and ninetieth percentile), and the operations and the least bytes that
the part must do and move, counted by hand below, with the rates that follow. Inputs rotate past the last-level cache.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfkd_fast.benchmarks.common import Clock, Results, input_sets, stage_arguments, time_calls

__all__ = ["SIZES", "VERSION", "Case", "Setup", "Size", "cases", "main"]

VERSION = "1"

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes of the experiment."""

    batch: int
    image: int
    classes: int
    copy_bytes: int
    matrix: int


SIZES = {
    "full": Size(batch=64, image=224, classes=200, copy_bytes=2**30, matrix=8192),
    "small": Size(batch=2, image=32, classes=10, copy_bytes=2**20, matrix=128),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A case made ready.

    Attributes:
        forward: the work, on one set of inputs; what torch.compile compiles.
        inputs: a fresh set of inputs.
        wanted: of a set of inputs, the tensors whose gradients belong to the work; None for the forward alone.
        flops: floating-point operations, a multiply-add being two.
        bytes: each input read once and each output written once.
    """

    forward: Callable[..., Any]
    inputs: Callable[[], Inputs]
    wanted: Callable[[Inputs], Sequence[Tensor]] | None = None
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row's name, and how to make it ready; nothing is allocated before that."""

    part: str
    case: str
    direction: str
    setup: Callable[[], Setup]
    modes: tuple[str, ...] = ("eager", "compile")


class _Maker:
    """Tensors and networks on one device."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.size = device, size

    def tensor(self, *shape: int, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.randn(shape, device=self.device, dtype=dtype)
        if len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        return x.requires_grad_(grad)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    def resnet(self, depth: int) -> nn.Module:
        from dfkd_fast.config import ModelConfig
        from dfkd_fast.models import create_model

        return create_model(ModelConfig(name=f"timm:resnet{depth}"), num_classes=self.size.classes)

    def generator(self) -> nn.Module:
        from dfkd_fast.nn import AttentionGenerator

        return AttentionGenerator(self.size.image)

    def images(self, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.tensor(self.size.batch, 3, self.size.image, self.size.image, grad=grad, dtype=dtype)


def _shapes(
    model: nn.Module, example: Tensor, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[nn.Module, torch.Size]]:
    """The layers of some kinds with the shapes that they are given, in the order in which they run."""
    seen: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, inputs: Inputs) -> None:
        seen.append((module, inputs[0].shape))

    handles = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, kinds)]
    with torch.no_grad():
        model.eval()(example)
    for handle in handles:
        handle.remove()
    return seen


def _gradients(outputs: Tensor | Sequence[Tensor], wanted: Sequence[Tensor]) -> object:
    """Gradients of ``outputs`` for an upstream gradient of their own size (ones would let kernels off lightly)."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return torch.autograd.grad(outputs, list(wanted), [output.detach() for output in outputs])


def _convolutions(make: _Maker, network: str, direction: str) -> Setup:
    model = make.generator() if network == "generator" else make.resnet(34 if network == "teacher" else 18)
    example = torch.zeros(1, 256) if network == "generator" else torch.zeros(1, 3, make.size.image, make.size.image)
    layers, shapes, flops, traffic = [], [], 0.0, 0.0
    for layer, shape in _shapes(model, example, (nn.Conv2d, nn.ConvTranspose2d)):
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        alone = copy.deepcopy(layer)
        if parametrize.is_parametrized(alone):
            parametrize.remove_parametrizations(alone, "weight")
        layers.append(make.place(alone).to(torch.bfloat16))
        full = (make.size.batch, *shape[1:])
        shapes.append(full)
        inside = full[0] * full[1] * full[2] * full[3]
        moved = alone.stride[0] * alone.stride[1]
        positions = inside / full[1] * moved if isinstance(layer, nn.ConvTranspose2d) else inside / full[1] / moved
        outside = positions * alone.out_channels
        # Each input of a transposed convolution, and each output of a plain one, takes part in weight.numel() /
        # channels.
        spread = inside / alone.in_channels if isinstance(layer, nn.ConvTranspose2d) else positions
        flops += 2 * spread * alone.weight.numel()
        traffic += 2 * (inside + outside + alone.weight.numel())
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    to_weights = direction == "forward+backward"
    for parameter in weights:
        parameter.requires_grad_(to_weights)

    factor = {"forward": 1, "forward+backward to inputs": 2, "forward+backward": 3}[direction]
    return Setup(
        forward=lambda *inputs: [layer(x) for layer, x in zip(layers, inputs, strict=True)],
        inputs=lambda: tuple(make.tensor(*shape, grad=direction != "forward") for shape in shapes),
        wanted=None if direction == "forward" else lambda inputs: [*inputs, *(weights if to_weights else [])],
        flops=factor * flops,
        bytes=factor * traffic,
    )


class _Flat(nn.Module):
    """Logits and every mean and variance, as the generator step uses them."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = self.features(x)
        return [outputs.logits, *(value for layer in outputs.statistics for value in layer[:2])]


def _logits_and_statistics(model: nn.Module, image_size: int) -> nn.Module:
    from dfkd_fast.models import extract

    return _Flat(extract(model, statistics=True, image_size=image_size)).eval()


def _network(make: _Maker, network: str, direction: str) -> Setup:
    model = make.generator() if network == "generator" else make.resnet(18 if network == "student" else 34)
    model = make.place(model).train(not network.startswith("teacher"))
    if network == "teacher with statistics":
        model = _logits_and_statistics(model, make.size.image)
    to_inputs = direction == "forward+backward to inputs"
    weights = list(model.parameters())
    for parameter in weights:
        parameter.requires_grad_(direction == "forward+backward")

    def forward(x: Tensor) -> Any:
        with make.autocast():
            return model(x)

    def inputs() -> Inputs:
        if network == "generator":
            return (make.tensor(make.size.batch, 256, dtype=torch.float32),)
        return (make.images(grad=to_inputs),)

    wanted = None if direction == "forward" else lambda inputs: inputs if to_inputs else weights
    return Setup(forward=forward, inputs=inputs, wanted=wanted)


def _batch_norms(make: _Maker, form: str, direction: str) -> Setup:
    """All BatchNorms of the teacher, one after the other, in eval mode."""
    from dfkd_fast import ops

    found = _shapes(make.resnet(34), torch.zeros(1, 3, make.size.image, make.size.image), (nn.BatchNorm2d,))
    shapes = [(make.size.batch, *shape[1:]) for _, shape in found]
    constants = [tuple(make.tensor(shape[1], dtype=torch.float32).abs() + 0.5 for _ in range(4)) for shape in shapes]

    def forward(*inputs: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for x, (mean, var, weight, bias) in zip(inputs, constants, strict=True):
            if form == "plain":
                outputs.append(F.batch_norm(x, mean, var, weight, bias))
            elif form == "statistics alone":
                outputs.extend(ops.channel_statistics(x))
            else:
                outputs.extend(ops.batchnorm_statistics(x, mean, var, weight, bias, 1e-5))
        return outputs

    elements = sum(shape[0] * shape[1] * shape[2] * shape[3] for shape in shapes)
    passes = 1 if form == "statistics alone" else 2
    backward = {"plain": 2, "statistics alone": 2, "with statistics": 3}[form]
    return Setup(
        forward=forward,
        inputs=lambda: tuple(make.tensor(*shape, grad=direction != "forward") for shape in shapes),
        wanted=None if direction == "forward" else lambda inputs: inputs,
        bytes=2 * elements * (passes + (backward if direction != "forward" else 0)),
    )


def _attention(make: _Maker, module: nn.Module, shape: tuple[int, ...], direction: str, flops: float) -> Setup:
    module = make.place(module).train()

    def forward(x: Tensor) -> Tensor:
        with make.autocast():
            return module(x)

    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return Setup(
        forward=forward,
        inputs=lambda: (make.tensor(*shape, grad=direction != "forward"),),
        wanted=None if direction == "forward" else lambda inputs: [*inputs, *module.parameters()],
        flops=flops * (1 if direction == "forward" else 3),
        bytes=2 * elements * (2 if direction == "forward" else 5),
    )


def _high_order(make: _Maker, shape: tuple[int, int, int, int], direction: str) -> Setup:
    from dfkd_fast.nn import HighOrderAttention

    channels, order, positions = shape[1], 3, shape[0] * shape[2] * shape[3]
    products = order * (order + 1) // 2 + order
    flops = 2.0 * positions * channels * (channels // 4) * products
    return _attention(make, HighOrderAttention(channels, order=order), shape, direction, flops)


def _spatial(make: _Maker, shape: tuple[int, int, int, int], direction: str) -> Setup:
    from dfkd_fast.nn import SpatialAttention

    return _attention(make, SpatialAttention(shape[1]), shape, direction, 0.0)


def _loss(make: _Maker, name: str, direction: str) -> Setup:
    from dfkd_fast import ops

    functions: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
        "distillation_kl": (make.size.classes, lambda a, b: ops.distillation_kl(a, b)),
        "contrastive_loss": (128, lambda a, b: ops.contrastive_loss(a, b)),
    }
    width, function = functions[name]
    grad = direction != "forward"

    def inputs() -> Inputs:
        a, b = (make.tensor(make.size.batch, width, grad=grad, dtype=torch.float32) for _ in range(2))
        return a, b

    return Setup(forward=function, inputs=inputs, wanted=(lambda inputs: inputs) if grad else None)


def _copy(make: _Maker) -> Setup:
    count = make.size.copy_bytes
    target = torch.empty(count, dtype=torch.uint8, device=make.device)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=make.device)
    return Setup(forward=lambda x: target.copy_(x), inputs=lambda: (source,), bytes=2.0 * count)


def _matmul(make: _Maker) -> Setup:
    side = make.size.matrix
    return Setup(
        forward=lambda a, b: a @ b,
        inputs=lambda: (make.tensor(side, side), make.tensor(side, side)),
        flops=2.0 * side**3,
    )


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Every case, ceilings first. Shapes are those of ResNet stages (four) and of the generator's blocks (four)."""
    make = _Maker(device, size)

    def case(part: str, name: str, direction: str, setup: Callable[..., Setup], *arguments: Any, **more: Any) -> Case:
        return Case(part=part, case=name, direction=direction, setup=lambda: setup(make, *arguments), **more)

    yield case("ceiling", "copy", "forward", _copy, modes=("eager",))
    yield case("ceiling", "bf16 matrix product", "forward", _matmul, modes=("eager",))
    both = ("forward", "forward+backward")
    frozen = ("forward", "forward+backward to inputs")
    directions = {"teacher": frozen, "student": (*frozen, "forward+backward"), "generator": both}
    for network, ways in directions.items():
        for way in ways:
            yield case("convolutions", network, way, _convolutions, network, way, modes=("eager",))
            yield case("network", network, way, _network, network, way)
    for way in frozen:
        yield case("network", "teacher with statistics", way, _network, "teacher with statistics", way)
    for form in ("plain", "with statistics", "statistics alone"):
        for way in both:
            yield case("BatchNorm of the teacher", form, way, _batch_norms, form, way)
    for stage, channels in enumerate((64, 128, 256, 512)):
        side = max(1, size.image // 2 ** (stage + 2))
        shape = (size.batch, channels, side, side)
        for way in both:
            yield case("high_order_attention", "x".join(map(str, shape)), way, _high_order, shape, way)
    for block, channels in enumerate((256, 128, 64, 64)):
        side = size.image // 16 * 2 ** (block + 1)
        shape = (size.batch, channels, side, side)
        for way in both:
            yield case("spatial_attention", "x".join(map(str, shape)), way, _spatial, shape, way)
    for name in ("distillation_kl", "contrastive_loss"):
        for way in both:
            yield case("loss", name, way, _loss, name, way)


def measure(case: Case, mode: str, device: torch.device) -> dict[str, Any]:
    """One row."""
    setup = case.setup()
    first = setup.inputs()
    moved = sum(x.numel() * x.element_size() for x in first)
    sets = [first, *(setup.inputs() for _ in range(input_sets(moved, device) - 1))]
    forward = torch.compile(setup.forward, dynamic=False) if mode == "compile" else setup.forward

    def call(number: int) -> None:
        inputs = sets[number % len(sets)]
        outputs = forward(*inputs)
        if setup.wanted is not None:
            _gradients(outputs, setup.wanted(inputs))

    timing = time_calls(call, device)
    row = {"part": case.part, "case": case.case, "direction": case.direction, "mode": mode, **timing.row()}
    if setup.flops:
        row |= {"flops": setup.flops, "tflops_s": round(setup.flops / timing.ms / 1e9, 3)}
    if setup.bytes:
        row |= {"bytes": setup.bytes, "gb_s": round(setup.bytes / timing.ms / 1e6, 2)}
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, as far as time allows."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compile"], default=["eager", "compile"])
    options = parser.parse_args(arguments)

    device, clock = torch.device(options.device), Clock(options.seconds)
    version = VERSION if options.size == "full" else f"{VERSION}-{options.size}"
    results = Results(options.out, stage="step_parts", version=version, key=("part", "case", "direction", "mode"))
    known = {
        (case.part, case.case, case.direction, mode): case
        for mode in ("eager", "compile")
        for case in cases(device, SIZES[options.size])
        if mode in case.modes
    }
    asked = [key for key in known if key[-1] in options.modes]
    failed = False
    for key in results.todo(asked, options.since):
        if not clock.fits():
            break
        start = time.perf_counter()
        torch.compiler.reset()
        try:
            row = measure(known[key], key[-1], device)
        except Exception as error:  # one part that fails must not hide the others; its row says so, the stage fails
            failed = True
            print(f"{' '.join(key)}: {type(error).__name__}: {error}", flush=True)
            continue
        results.add(row)
        print(f"{' '.join(key)}: {row['ms']:.4g} ms", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        clock.took(time.perf_counter() - start)
    results.finish(complete=not results.todo(known))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
