"""Measures whole distillation steps in several implementations of the same loop, each in its own process.

The variants run the same algorithm on the same networks from the same seed:

- ``peer``: the loop as in published code (:mod:`~dfkd_fast.benchmarks.step.peer_loop`);
- ``eager``: this project's eager engine with the reference ops, channels-last, in bf16, without gradients of frozen
  weights;
- ``compile_max_autotune`` and ``compile_reduce_overhead``: the networks and objectives of ``eager`` through
  torch.compile in these two modes, which capture CUDA graphs;
- ``dfkd_fast``: the default engine of ``dfkd-fast distill`` on the device.

``cudnn.benchmark`` is on in all of them. With ``roofline`` instead of a variant, the program measures the device's peak
rates and writes the least time of each step.

    python -m dfkd_fast.benchmarks.step.variants dfkd_fast --out step.json --batch 64
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.benchmarks.ops.measure import measure_peak_rates
from dfkd_fast.benchmarks.results import Results, parser
from dfkd_fast.benchmarks.step.peer_loop import PeerLoop
from dfkd_fast.benchmarks.step.roofline import roofline, round_work
from dfkd_fast.config import DistillConfig, GeneratorConfig, LoopConfig, ModelConfig
from dfkd_fast.engine import DistillState, EagerEngine, Engine, Runtime, build_state, create_engine, is_main, join
from dfkd_fast.engine.engines import EagerExecutor
from dfkd_fast.engine.networks import eager_networks
from dfkd_fast.models import FeatureModel, create_model, extract, frozen

__all__ = [
    "KEY",
    "SIZES",
    "VARIANTS",
    "Loop",
    "Size",
    "bench_step",
    "build",
    "cifar_resnet",
    "engine_loop",
    "main",
    "make_loop",
    "measure",
    "peer_loop",
    "run_round",
]

KEY = ("variant", "batch", "run")

VARIANTS = ("peer", "eager", "compile_max_autotune", "compile_reduce_overhead", "dfkd_fast")

_MODES = {"compile_max_autotune": "max-autotune", "compile_reduce_overhead": "reduce-overhead"}
_HALF = (0.5, 0.5, 0.5)
_STARTED = time.time()
_CIFAR = "dfkd_fast.benchmarks.step.variants:cifar_resnet"
_KEPT = 16  # rounds whose losses are kept for the check


@dataclass(frozen=True, kw_only=True)
class Size:
    """An experiment with random weights. ``steps`` are generator and student steps per round.

    At least five rounds are timed, for about ``seconds``.
    """

    teacher: ModelConfig
    student: ModelConfig
    image: int
    classes: int
    batch: int
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    steps: tuple[int, int] = (20, 15)
    seconds: float = 8.0


SIZES = {
    "full": Size(
        teacher=ModelConfig(name="timm:resnet34"),
        student=ModelConfig(name="timm:resnet18"),
        image=224,
        classes=200,
        batch=64,
    ),
    **{
        f"cifar{image}": Size(
            teacher=ModelConfig(name=_CIFAR, options={"depth": 34}),
            student=ModelConfig(name=_CIFAR, options={"depth": 18}),
            image=image,
            classes=100,
            batch=16,
            steps=(4, 3),
        )
        for image in (32, 64)
    },
    "small": Size(
        teacher=ModelConfig(name="resnet8", options={"widths": [8, 8, 16, 16]}),
        student=ModelConfig(name="resnet8", options={"widths": [4, 4, 8, 8]}),
        image=32,
        classes=10,
        batch=4,
        generator=GeneratorConfig(latent_dim=8, channels=(8, 8, 8, 8, 8)),
        steps=(2, 2),
        seconds=0.0,
    ),
}


def cifar_resnet(depth: int, *, num_classes: int) -> nn.Module:
    """ResNet-18 or ResNet-34 for small images, as in code for CIFAR: a 3 x 3 stem without stride and pooling."""
    model = create_model(ModelConfig(name=f"timm:resnet{depth}"), num_classes=num_classes)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def _with_statistics(model: nn.Module, size: Size, device: torch.device) -> nn.Module:
    """Set BatchNorm statistics to those of random images, to resemble a trained teacher."""
    model.to(device).train()
    images = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # take over the statistics of the batch
        model(torch.randn(16, 3, size.image, size.image, device=device, generator=images))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # the default
    return model.eval()


def build(
    size: Size, batch: int, device: torch.device, *, precision: str = "bf16", channels_last: bool = True, **changes: Any
) -> tuple[DistillState, FeatureModel]:
    """Return the initial state of a run and its teacher, which the caller must freeze.

    Args:
        size: networks, images and steps.
        batch: images per step.
        device: the device of the state.
        precision: see :class:`dfkd_fast.config.DistillConfig`.
        channels_last: see there.
        **changes: other fields of the config.
    """
    torch.manual_seed(0)
    teacher = _with_statistics(create_model(size.teacher, num_classes=size.classes), size, device)
    student = create_model(size.student, num_classes=size.classes)
    config = DistillConfig(
        generator=size.generator,
        loop=LoopConfig(generator_steps=size.steps[0], student_steps=size.steps[1], batch_size=batch),
        image_size=size.image,
        mean=_HALF,
        std=_HALF,
        precision=precision,  # type: ignore[arg-type]  # checked by Runtime
        channels_last=channels_last,
        device=str(device),
        **changes,
    )
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    features = [extract(model.to(device), image_size=size.image) for model in (teacher, student)]
    features[0].eval()
    features[1].train()
    state = build_state(features[0], features[1], config, runtime, image_size=size.image, mean=_HALF, std=_HALF)
    return state, features[0]


@dataclass
class Loop:
    """A variant. Its steps queue device work, and ``end_round`` queues the copy of the round's losses to the host.

    ``losses`` waits for the device and returns the losses of the last rounds, NaN where a gradient was not finite.
    """

    name: str
    generator_step: Callable[[], object]
    student_step: Callable[[], object]
    losses: Callable[[], Tensor]
    prepare: Callable[[], object] = lambda: None
    start_round: Callable[[], object] = lambda: None
    end_round: Callable[[], object] = lambda: None


class _MarkingExecutor(EagerExecutor):
    """Marks the start of each step for the CUDA graphs that torch.compile captures."""

    def execute(self, engine: Engine, step: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().execute(engine, step)


def peer_loop(state: DistillState) -> Loop:
    peer = PeerLoop(state, mean=_HALF, std=_HALF)
    for side in state.sides.values():
        side.optimizer.state.clear()  # PeerLoop has its own optimizers, so this memory would be counted twice
    losses: deque[float] = deque(maxlen=_KEPT * state.steps_per_round)
    return Loop(
        "peer",
        lambda: losses.append(peer.generator_step()[0]),
        lambda: losses.append(peer.student_step()[0]),
        lambda: torch.tensor(list(losses)),
    )


def engine_loop(engine: Engine, name: str = "") -> Loop:
    state = engine.state
    # Allocated once, because pinning memory waits for the device.
    kept = torch.zeros(_KEPT, *state.trace.shape, pin_memory=state.runtime.device.type == "cuda")

    def end_round() -> None:
        kept[state.position.round % _KEPT].copy_(state.trace, non_blocking=True)
        state.position.round += 1
        state.position.step = 0

    def losses() -> Tensor:
        state.runtime.synchronize()
        trace = kept[: state.position.round].flatten(0, 1)
        return torch.where(trace[:, -1:] == 1, trace, torch.nan)

    steps = engine.generator_step, engine.student_step
    return Loop(name or engine.name, *steps, losses, engine.prepare, engine.start_round, end_round)


@contextlib.contextmanager
def make_loop(variant: str, size: Size, batch: int, device: torch.device) -> Iterator[tuple[Loop, DistillState]]:
    """Make a variant under the process-wide settings that it needs.

    On a CPU, torch.compile uses the backend "eager": Inductor takes minutes.
    """
    state, teacher = build(size, batch, device, channels_last=variant != "peer")
    with contextlib.ExitStack() as stack:
        stack.enter_context(state.runtime.backends())
        if variant != "dfkd_fast":
            stack.enter_context(ops.backend("reference"))
        if variant == "peer":
            yield peer_loop(state), state
            return
        stack.enter_context(frozen(teacher))
        if variant == "dfkd_fast":
            stack.enter_context(state.synchronized())
            yield engine_loop(create_engine(state)), state
        elif variant == "eager":
            yield engine_loop(EagerEngine(state, eager_networks(state))), state
        else:
            options = {"mode": _MODES[variant]} if device.type == "cuda" else {"backend": "eager"}
            engine = Engine("eager", state, eager_networks(state, compile=options), _MarkingExecutor())
            yield engine_loop(engine, "torch.compile"), state


def run_round(loop: Loop, steps: tuple[int, int], mark: Callable[[], None] = lambda: None) -> None:
    """Run one round; ``mark`` is called at its start and at its first student step."""
    mark()
    loop.start_round()
    for _ in range(steps[0]):
        loop.generator_step()
    mark()
    for _ in range(steps[1]):
        loop.student_step()
    loop.end_round()


def _timed(loop: Loop, size: Size, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return medians over rounds, which are queued back to back and, on a GPU, timed with events."""
    events: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        else:
            events.append(time.perf_counter())

    for _ in range(rounds):
        run_round(loop, size.steps, mark)
    mark()
    pairs = list(itertools.pairwise(events))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        times = [first.elapsed_time(second) for first, second in pairs]
    else:
        times = [1e3 * (second - first) for first, second in pairs]
    whole = [generator + student for generator, student in zip(times[::2], times[1::2], strict=True)]
    p10, *_, p90 = statistics.quantiles(whole, n=10, method="inclusive")
    return {
        "round_ms": statistics.median(whole),
        "round_p10_ms": p10,
        "round_p90_ms": p90,
        "generator_step_ms": statistics.median(times[::2]) / size.steps[0],
        "student_step_ms": statistics.median(times[1::2]) / size.steps[1],
        "rounds": rounds,
    }


def _profiled(loop: Loop, size: Size, synchronize: Callable[[], None]) -> dict[str, Any]:
    """Return the share of a round in which the GPU is busy, and the number of kernels, copies and fills per step."""
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], schedule=schedule) as profiler:
        run_round(loop, size.steps)
        synchronize()
        profiler.step()
        start = time.perf_counter()
        run_round(loop, size.steps)
        synchronize()
        wall_us = 1e6 * (time.perf_counter() - start)
    kernels = [
        event
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    busy, reached = 0.0, -math.inf
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        busy += max(0.0, event.time_range.end - max(event.time_range.start, reached))
        reached = max(reached, event.time_range.end)
    return {"gpu_busy": busy / wall_us, "kernels_per_step": len(kernels) / sum(size.steps)}


def measure(
    variant: str, size: Size, batch: int, device: torch.device, *, compile_only: bool = False
) -> dict[str, Any]:
    """Measure a variant. ``compile_only`` fills the compilers' caches with the first steps of each kind and stops.

    Returns:
        Times in milliseconds, images per second, peak memory in bytes, and seconds from the start of this process to
        the first step.

    Raises:
        RuntimeError: a loss was not finite.
    """
    cuda = device.type == "cuda"
    with make_loop(variant, size, batch, device) as (loop, state):
        synchronize = state.runtime.synchronize
        row: dict[str, Any] = {"prepare_s": 0.0}
        start = time.perf_counter()
        loop.prepare()
        loop.start_round()
        for step, count in zip((loop.generator_step, loop.student_step), size.steps, strict=True):
            # torch.compile's CUDA graphs are captured by the third call.
            for _ in range(min(3, count)):
                step()
                synchronize()
                row.setdefault("seconds_to_first_step", time.time() - _STARTED)
            row["prepare_s"] += time.perf_counter() - start
            for _ in range(0 if compile_only else count - 3):
                step()
            synchronize()
            start = time.perf_counter()
        if compile_only:
            return row
        loop.end_round()
        for _ in range(2):  # rounds to warm up
            start = time.perf_counter()
            run_round(loop, size.steps)
            synchronize()
        rounds = round(size.seconds / (time.perf_counter() - start))
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        row |= _timed(loop, size, device, max(5, min(40, rounds)))
        row["images_per_s"] = 1e3 * sum(size.steps) * batch / row["round_ms"]
        row["hours_per_350k_steps"] = row["round_ms"] * 350_000 / sum(size.steps) / 3.6e6
        if cuda:
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device) + _pool_bytes()
            row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            row |= _profiled(loop, size, synchronize)
        if not torch.isfinite(loop.losses()).all():
            raise RuntimeError(f"{variant}: a loss or a gradient was not finite")
        return row | {"engine": loop.name, "status": "ok"}


def _pool_bytes() -> int:
    """Return the bytes in private pools of captured graphs that the allocator does not count as allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def rooflines(size: Size, batch: int, device: torch.device) -> dict[str, Any]:
    """Return the least time of each step at the device's measured peak rates, the rates, and the work of each step."""
    rates = measure_peak_rates(device)
    state, teacher = build(size, batch, device)
    with state.runtime.backends(), ops.backend("reference"), frozen(teacher):
        work = round_work(EagerEngine(state, eager_networks(state)))
    least = roofline(work, rates, generator_steps=size.steps[0], student_steps=size.steps[1])
    steps = {f"{kind}_step": asdict(each) for kind, each in zip(("generator", "student"), work, strict=True)}
    return {**asdict(least), **asdict(rates), **steps, "status": "ok"}


def bench_step(out: Path, device: str) -> int:
    """Measure all variants of a device, each in its own process, into ``out``. Return 0, or the first exit status."""
    if device == "cpu":
        from dfkd_fast.benchmarks.step.cpu import main as main_cpu

        return main_cpu(["--out", str(out / "step_cpu.json")])
    for variant in ("roofline", *VARIANTS):
        command = [sys.executable, "-m", "dfkd_fast.benchmarks.step.variants", variant, "--out", str(out / "step.json")]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one variant or the roofline and add its row to a result file."""
    command = parser(__doc__, small="small networks", sizes=tuple(SIZES))
    command.add_argument("variant", choices=[*VARIANTS, "roofline"])
    command.add_argument(
        "--batch", type=int, default=None, help="images per step and process (default: that of the size)"
    )
    command.add_argument("--run", type=int, default=1, help="number of this repeat")
    command.add_argument("--compile-only", action="store_true", help="fill the compilers' caches and time nothing")
    options = command.parse_args(arguments)

    device, size = torch.device(options.device), SIZES[options.size]
    with join() as group:
        processes = 1 if group is None else group.size
        batch = (options.batch or size.batch) * processes
        try:
            if options.variant == "roofline":
                row = rooflines(size, batch, device)
            else:
                row = measure(options.variant, size, batch, device, compile_only=options.compile_only)
        except torch.OutOfMemoryError:
            row = {"status": "out of memory"}
        row = {"variant": options.variant, "batch": batch, "run": options.run, "processes": processes, **row}
        if is_main():
            shown = ("variant", "batch", "images_per_s", "round_ms", "prepare_s")
            print({name: row.get(name) for name in shown}, flush=True)
            if not options.compile_only:
                Results(options.out, key=KEY).add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
