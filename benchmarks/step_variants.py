"""One variant of the distillation loop, measured in this process; `bench_step` starts one process a measurement.

The variants run the same algorithm on the same networks, from the same seed:

- ``peer``: the loop as the field writes it (`peer_loop`);
- ``eager``: this project's eager engine with the plain ops, channels-last, bf16, nothing computed in frozen networks
  that is not needed;
- ``compile_max_autotune`` and ``compile_reduce_overhead``: every network and every objective of ``eager`` through
  torch.compile in that mode, both of which capture what they compile into CUDA graphs;
- ``dfkd_fast``: what ``dfkd-fast distill`` runs on this device, ops and engine chosen by themselves.

``cudnn.benchmark`` is on in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.benchmarks.measure import ceilings
from dfkd_fast.benchmarks.peer_loop import PeerLoop
from dfkd_fast.benchmarks.step_floor import floor, round_work
from dfkd_fast.benchmarks.timeline import Timeline, profile_once
from dfkd_fast.config import DistillConfig, GeneratorConfig, LoopConfig, ModelConfig
from dfkd_fast.engine import DistillState, EagerEngine, Runtime, build_state, create_engine
from dfkd_fast.engine.networks import plain
from dfkd_fast.models import FeatureModel, create_model, extract, frozen

__all__ = ["SIZES", "VARIANTS", "Loop", "Size", "build", "main", "make_loop", "measure", "run_round"]

VARIANTS = ("peer", "eager", "compile_max_autotune", "compile_reduce_overhead", "dfkd_fast")

_MODES = {"compile_max_autotune": "max-autotune", "compile_reduce_overhead": "reduce-overhead"}
_HALF = (0.5, 0.5, 0.5)
_KEPT = 16  # rounds whose losses are kept


@dataclass(frozen=True, kw_only=True)
class Size:
    """An experiment, and how long to measure it.

    Attributes:
        teacher, student: the networks; weights are random.
        image: height and width.
        classes: number of classes.
        batches: images a step, the most important first.
        generator: the generator.
        steps: t and k, generator and student steps a round.
        warm_ups: rounds before the timed ones.
        seconds: about how long the timed rounds take together.
        least, most: timed rounds.
    """

    teacher: ModelConfig
    student: ModelConfig
    image: int
    classes: int
    batches: tuple[int, ...]
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    steps: tuple[int, int] = (20, 15)
    warm_ups: int = 2
    seconds: float = 8.0
    least: int = 5
    most: int = 40


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "full": Size(
            teacher=ModelConfig(name="timm:resnet34"),
            student=ModelConfig(name="timm:resnet18"),
            image=224,
            classes=200,
            batches=(64, 128, 256),
        ),
        "small": Size(
            teacher=ModelConfig(name="resnet8", options={"widths": [8, 8, 16, 16]}),
            student=ModelConfig(name="resnet8", options={"widths": [4, 4, 8, 8]}),
            image=32,
            classes=10,
            batches=(4,),
            generator=GeneratorConfig(latent_dim=8, channels=(8, 8, 8, 8, 8)),
            steps=(2, 2),
            warm_ups=1,
            seconds=0.2,
            least=2,
            most=3,
        ),
    }
)


def _settled(model: nn.Module, size: Size, device: torch.device) -> nn.Module:
    """BatchNorm statistics of a few random images, which plain initialisation does not have."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    model.to(device).train()
    images = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, size.image, size.image, device=device, generator=images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def build(
    size: Size, batch: int, device: torch.device, *, precision: str = "bf16", channels_last: bool = True
) -> tuple[DistillState, FeatureModel]:
    """The state of a run at its beginning, and its teacher, which is for the caller to freeze.

    Args:
        size: the experiment.
        batch: images a step.
        device: where to run.
        precision: of the run.
        channels_last: memory format of the run.
    """
    torch.manual_seed(0)
    teacher = _settled(create_model(size.teacher, num_classes=size.classes), size, device)
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
    )
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    features = [extract(model.to(device), image_size=size.image) for model in (teacher, student)]
    features[0].eval()
    features[1].train()
    state = build_state(features[0], features[1], config, runtime, image_size=size.image, mean=_HALF, std=_HALF)
    return state, features[0]


@dataclass(kw_only=True)
class Loop:
    """A variant made ready: what a round is made of.

    Attributes:
        name: of the engine that runs.
        prepare: what comes before the first step.
        start_round, generator_step, student_step: device work is queued.
        end_round: queues what a training loop would read back.
        losses: what was read back of the last rounds, NaN where a gradient was not finite; waits for the device.
    """

    name: str
    prepare: Callable[[], None]
    start_round: Callable[[], None]
    generator_step: Callable[[], object]
    student_step: Callable[[], object]
    end_round: Callable[[], None]
    losses: Callable[[], Tensor]


class _MarkedEngine(EagerEngine):
    """Steps whose regions torch.compile captures: each is told where one step ends and the next begins."""

    def _execute(self, kind: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super()._execute(kind)


def _peer_loop(state: DistillState) -> Loop:
    peer = PeerLoop(state, mean=_HALF, std=_HALF)
    for optimizer in (state.generator_optimizer, state.student_optimizer):
        optimizer.state.clear()  # the loop has optimisers of its own: their memory would be counted twice
    read: deque[float] = deque(maxlen=_KEPT * state.steps_per_round)

    def step(which: Callable[[], tuple[float, object]]) -> None:
        read.append(which()[0])

    return Loop(
        name="peer",
        prepare=lambda: None,
        start_round=lambda: None,
        generator_step=lambda: step(peer.generator_step),
        student_step=lambda: step(peer.student_step),
        end_round=lambda: None,
        losses=lambda: torch.tensor(list(read)),
    )


def _engine_loop(engine: EagerEngine) -> Loop:
    state = engine.state
    # Made once: the host waits where it pins memory.
    read = torch.zeros(_KEPT, *state.trace.shape, pin_memory=state.runtime.device.type == "cuda")

    def end_round() -> None:
        read[state.position.round % _KEPT].copy_(state.trace, non_blocking=True)
        state.position.round += 1
        state.position.step = 0

    def losses() -> Tensor:
        state.runtime.synchronize()
        trace = read[: state.position.round].flatten(0, 1)
        return torch.where(trace[:, -1:] == 1, trace, torch.nan)

    return Loop(
        name=engine.name,
        prepare=engine.prepare,
        start_round=engine.start_round,
        generator_step=engine.generator_step,
        student_step=engine.student_step,
        end_round=end_round,
        losses=losses,
    )


@contextlib.contextmanager
def make_loop(
    variant: str, size: Size, batch: int, device: torch.device, *, compile_options: Mapping[str, Any] | None = None
) -> Iterator[tuple[Loop, DistillState]]:
    """A variant, with the process-wide switches that it runs under.

    Args:
        variant: one of :data:`VARIANTS`.
        size: the experiment.
        batch: images a step.
        device: where to run.
        compile_options: of torch.compile, in place of the variant's mode: Inductor is slow in tests.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    state, teacher = build(size, batch, device, channels_last=variant != "peer")
    with contextlib.ExitStack() as stack:
        stack.enter_context(state.runtime.backends())
        if variant != "dfkd_fast":
            stack.enter_context(ops.backend("reference"))
        if variant == "peer":
            yield _peer_loop(state), state
            return
        stack.enter_context(frozen(teacher))
        if variant == "dfkd_fast":
            yield _engine_loop(create_engine(state)), state
        elif variant == "eager":
            yield _engine_loop(EagerEngine(state)), state
        else:
            networks = plain(state).compiled(**(compile_options or {"mode": _MODES[variant]}))
            yield replace(_engine_loop(_MarkedEngine(state, networks)), name="torch.compile"), state


def run_round(loop: Loop, steps: tuple[int, int], mark: Callable[[], None] = lambda: None) -> None:
    """One round; ``mark`` is called where it begins and where its student steps begin."""
    mark()
    loop.start_round()
    for _ in range(steps[0]):
        loop.generator_step()
    mark()
    for _ in range(steps[1]):
        loop.student_step()
    loop.end_round()


def _timed(loop: Loop, size: Size, timeline: Timeline, rounds: int) -> dict[str, Any]:
    timeline.start()
    for _ in range(rounds):
        run_round(loop, size.steps, timeline.mark)
    timeline.mark()
    times = timeline.intervals_ms()
    firsts, seconds = times[::2], times[1::2]
    whole = [first + second for first, second in zip(firsts, seconds, strict=True)]
    deciles = statistics.quantiles(whole, n=10, method="inclusive")
    return {
        "round_ms": statistics.median(whole),
        "round_p10_ms": deciles[0],
        "round_p90_ms": deciles[-1],
        "generator_step_ms": statistics.median(firsts) / size.steps[0],
        "student_step_ms": statistics.median(seconds) / size.steps[1],
        "rounds": rounds,
    }


def _pool_bytes() -> int:
    """Bytes that private pools of captured graphs hold and that the allocator does not count as allocated.

    A tensor made during capture dies with it; its memory is used in every replay all the same.
    """
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _cache() -> str | None:
    """Whether torch.compile found all that it made in its cache; None where it made nothing."""
    from torch._dynamo.utils import counters

    found = {
        what: sum(
            count
            for group, names in counters.items()
            for name, count in names.items()
            if group in ("inductor", "aot_autograd") and name in (f"fxgraph_cache_{what}", f"autograd_cache_{what}")
        )
        for what in ("hit", "miss")
    }
    if not any(found.values()):
        return None
    return "cold" if found["miss"] else "warm"


def measure(
    variant: str,
    size: Size,
    batch: int,
    device: torch.device,
    *,
    started: float,
    compile_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that is measured of a variant in one process.

    Args:
        variant: one of :data:`VARIANTS`.
        size: the experiment.
        batch: images a step.
        device: where to run.
        started: when this process was started, as ``time.time()`` counts.
        compile_options: see :func:`make_loop`.

    Raises:
        RuntimeError: a loss was not finite.
    """
    cuda = device.type == "cuda"
    with make_loop(variant, size, batch, device, compile_options=compile_options) as (loop, state):
        synchronize = state.runtime.synchronize
        loop.prepare()
        loop.start_round()
        loop.generator_step()
        synchronize()
        first_step = time.time() - started
        for _ in range(size.steps[0] - 1):
            loop.generator_step()
        for _ in range(size.steps[1]):
            loop.student_step()
        loop.end_round()
        synchronize()
        first_round = time.time() - started
        took = math.inf
        for _ in range(size.warm_ups):
            start = time.perf_counter()
            run_round(loop, size.steps)
            synchronize()
            took = min(took, time.perf_counter() - start)
        gc.collect()
        before = torch.cuda.max_memory_allocated(device) if cuda else None
        reserved = torch.cuda.max_memory_reserved(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        rounds = max(size.least, min(size.most, round(size.seconds / took)))
        row = _timed(loop, size, Timeline(device), rounds)
        row["images_per_s"] = 1e3 * sum(size.steps) * batch / row["round_ms"]
        row |= {"peak_bytes": None, "steady_bytes": None, "reserved_bytes": None}
        if before is not None:
            steady = torch.cuda.max_memory_allocated(device) + _pool_bytes()
            row["peak_bytes"], row["steady_bytes"] = max(before, steady), steady
            row["reserved_bytes"] = max(reserved, torch.cuda.max_memory_reserved(device))
        row |= profile_once(lambda: run_round(loop, size.steps), synchronize, device=device, steps=sum(size.steps))
        if not torch.isfinite(loop.losses()).all():
            raise RuntimeError(f"{variant}: a loss or a gradient was not finite")
    row |= {"seconds_to_first_step": first_step, "seconds_to_first_round": first_round, "cache": _cache()}
    row |= {"engine": loop.name, "status": "ok"}
    return row


def limits(size: Size, device: torch.device) -> dict[str, Any]:
    """What rows are set against: the device's ceilings, and the least work of a round at each batch size."""
    rates = ceilings(device)
    floors = {}
    for batch in size.batches:
        state, _ = build(size, batch, device)
        work = round_work(state, image_size=size.image)
        least = floor(work, rates, generator_steps=size.steps[0], student_steps=size.steps[1])
        floors[str(batch)] = {
            "generator_step": {**asdict(work[0]), "floor_ms": least.generator_step_ms},
            "student_step": {**asdict(work[1]), "floor_ms": least.student_step_ms},
            "round_ms": least.round_ms,
        }
    return {"copy_gbps": rates.copy_gbps, "matmul_tflops": rates.matmul_tflops, "floors": floors}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one variant, or what all are set against, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*VARIANTS, "limits"])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--started", type=float, default=None, help="when the process was started, in Unix seconds")
    parser.add_argument("--compile-backend", default=None, help="of torch.compile, in place of the variant's mode")
    options = parser.parse_args(arguments)

    started = options.started if options.started is not None else time.time()
    device, size = torch.device(options.device), SIZES[options.size]
    if options.what == "limits":
        found = limits(size, device)
    else:
        given = {"backend": options.compile_backend} if options.compile_backend else None
        try:
            found = measure(options.what, size, options.batch, device, started=started, compile_options=given)
        except torch.OutOfMemoryError:
            found = {"status": "out of memory"}
    options.out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
