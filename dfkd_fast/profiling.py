"""Where the time of a step goes: torch.profiler over the ranges of :mod:`dfkd_fast.nvtx`.

Times are sums over the events of ``torch.profiler.profile.events()``: device time of kernels, copies and fills on CUDA,
self CPU time on the CPU. The backward of an operator is attributed to the network and the op of its forward, through
autograd's sequence numbers. Kernels of a replayed CUDA graph belong to no range: for engine ``graph`` only their
total time and their number are known.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.autograd import DeviceType

from dfkd_fast.config import DistillConfig, EngineName
from dfkd_fast.engine import Engine, Position, Runtime, build_state, create_engine, resolve_engine
from dfkd_fast.engine.runtime import new_run_folder
from dfkd_fast.graph import FeatureModel, frozen, preserve_train_mode
from dfkd_fast.models import normalization
from dfkd_fast.nvtx import PREFIX
from dfkd_fast.report import environment, result_table, write_results

__all__ = ["OUTSIDE", "REPLAYED", "ProfileResult", "attribute", "profile", "summary_table", "table", "time_by_range"]

OUTSIDE = "loop"
"""Network of the time that no network's range contains."""

REPLAYED = "replayed graph"
"""Network of the kernels of a replayed CUDA graph."""

_NODE = "autograd::engine::evaluate_function: "  # how autograd names the event around one node's backward
_MIN_SHARE = 0.005  # table() adds up smaller rows

Key = tuple[str, str, str]  # network, direction, op; no op is ""


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """The result of :func:`profile`.

    Attributes:
        folder: contains ``breakdown.json`` and the traces.
        traces: a Chrome trace for each engine and kind of step, by ``"<engine>_<kind>"``.
        content: the content of ``breakdown.json``.
    """

    folder: Path
    traces: dict[str, Path]
    content: dict[str, Any]


def attribute(events: Iterable[Any]) -> Iterator[tuple[Any, Key]]:
    """Yield each host event with the network, the direction and the op range that it belongs to.

    Args:
        events: of ``torch.profiler.profile.events()``, which are ordered by start.
    """
    keys: dict[int, Key] = {}
    forward: dict[int, Key] = {}  # by sequence number; of several operators with one number the last made the node
    latest: dict[int, Key] = {}  # the last node of each thread: AccumulateGrad has no number and follows its producer
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        key = network, direction, op = keys.get(id(event.cpu_parent), (OUTSIDE, "forward", ""))
        prefix, _, kind_and_name = event.name.partition("/")
        kind, _, name = kind_and_name.partition("/")
        if event.name.startswith(_NODE):
            origin = forward.get(event.sequence_nr) or latest.get(event.thread, (OUTSIDE, "", ""))
            key = latest[event.thread] = (origin[0], "backward", origin[2])
        elif prefix == PREFIX and kind == "network":
            key = (name, "optimizer" if name == "optimizer" else direction, op)
        elif prefix == PREFIX and kind == "op":
            key = (network, direction, name)
        if event.sequence_nr >= 0 and key[1] != "backward":
            forward[event.sequence_nr] = key
        keys[id(event)] = key
        yield event, key


def time_by_range(events: Sequence[Any], steps: int, *, cuda: bool, replayed: bool = False) -> list[dict[str, Any]]:
    """Add up the time of recorded steps by network, direction and op.

    Args:
        events: of ``torch.profiler.profile.events()``.
        steps: how many steps were recorded; the numbers are per step.
        cuda: add up device time and kernels; otherwise self CPU time.
        replayed: the steps are replays of a CUDA graph, whose kernels belong to no range.

    Returns:
        Rows by descending time: ``network``, ``direction``, ``op``, ``microseconds``, ``kernels`` (None on the CPU) and
        ``share`` of the total.
    """
    spent: dict[Key, float] = defaultdict(float)
    kernels: dict[Key, int] = defaultdict(int)
    if not replayed:
        for event, key in attribute(events):
            spent[key] += sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
            kernels[key] += len(event.kernels)
    if cuda:
        # Launches outside of any operator, such as a graph's, are linked to no host event.
        device = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
        rest = (REPLAYED if replayed else OUTSIDE, "forward", "")
        spent[rest] += sum(event.time_range.elapsed_us() for event in device) - sum(spent.values())
        kernels[rest] += len(device) - sum(kernels.values())
    total = sum(spent.values())
    return [
        {
            "network": network,
            "direction": direction,
            "op": op,
            "microseconds": round(microseconds / steps, 2),
            "kernels": kernels[network, direction, op] / steps if cuda else None,
            "share": round(microseconds / total, 5),
        }
        for (network, direction, op), microseconds in sorted(spent.items(), key=lambda item: -item[1])
        if microseconds > 0
    ]


def table(content: dict[str, Any], step: str) -> list[dict[str, Any]]:
    """Rows to print for one kind of step; rows below half a percent are added up in the last.

    Args:
        content: one of the ``engines`` of :func:`profile`.
        step: ``generator`` or ``student``.
    """
    rows = [row for row in content["rows"] if row["step"] == step]
    small = [row for row in rows if row["share"] < _MIN_SHARE]
    if small:
        rest = {name: sum(row[name] or 0 for row in small) for name in ("microseconds", "kernels", "share")}
        named = {"network": f"{len(small)} rows below {_MIN_SHARE:.1%}", "direction": "", "op": ""}
        rows = [*(row for row in rows if row["share"] >= _MIN_SHARE), named | rest]
    cuda = content["device"] == "cuda"
    return [
        {
            "network": row["network"],
            "direction": row["direction"],
            "op": row["op"],
            **({"kernels": f"{row['kernels']:g}"} if cuda else {}),
            "us": f"{row['microseconds']:.1f}",
            "share": f"{row['share']:.1%}",
        }
        for row in rows
    ]


def summary_table(contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows to print that compare engines: one row for each engine and kind of step.

    Args:
        contents: the ``engines`` of :func:`profile`.
    """
    rows = []
    for content in contents:
        for step in content["steps"]:
            row = {"engine": content["engine"], "step": step["step"], "ms": f"{step['unprofiled_us'] / 1000:.3f}"}
            if content["device"] == "cuda":
                row |= {"device ms": f"{step['microseconds'] / 1000:.3f}", "kernels": f"{step['kernels']:g}"}
            rows.append(row)
    return rows


def profile(
    teacher: FeatureModel,
    student: FeatureModel,
    config: DistillConfig,
    *,
    engines: Sequence[EngineName] = ("auto",),
    steps: int = 10,
    networks: tuple[str, str] | None = None,
    out: str | None = None,
    console: Console | None = None,
) -> ProfileResult:
    """Record some steps of each kind, write Chrome traces and print the time by network and op.

    Args:
        teacher: the network that knows; its weights do not matter here.
        student: the network that learns; its weights change.
        config: the run. The numbers of steps per round are replaced.
        engines: which to run, one after the other.
        steps: of each kind to record; a kind of which the config's rounds have no step is left out.
        networks: names of teacher and student; None uses their classes' names.
        out: folder; None makes a new one under ``runs/``.
        console: where the tables are printed; None is the terminal.

    Returns:
        The files and their content: ``environment``, ``precision``, ``batch``, ``image_size``, ``networks``, and for
        each of ``engines``: ``engine``, ``device`` (``cuda`` or ``cpu``), ``steps`` and ``rows``. ``steps`` has for
        each kind ``step``, ``recorded`` (how many), ``microseconds`` and ``kernels`` per step, and ``unprofiled_us``,
        the wall time per step without the profiler, which slows the host. ``rows`` are those of
        :func:`time_by_range` with ``step``.

    Raises:
        ValueError: no engine, less than one step, or a config that does not fit.
    """
    if not engines or steps < 1:
        raise ValueError(f"at least one engine and one step are needed, got {len(engines)} engines, {steps} steps")
    if config.image_size is None:
        raise ValueError("DistillConfig.image_size must be given: a profile has no data to take it from")
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    names = list(dict.fromkeys(resolve_engine(name, runtime) for name in engines))
    cuda = runtime.device.type == "cuda"
    if "graph" in names and not cuda:
        raise ValueError(f"engine 'graph' needs a CUDA device, got {str(runtime.device)!r}")
    loop = replace(
        config.loop,
        generator_steps=steps if config.loop.generator_steps else 0,
        student_steps=steps if config.loop.student_steps else 0,
    )
    folder = new_run_folder(out, "profile")
    console = console or Console()
    traces: dict[str, Path] = {}
    contents = []
    for name in names:
        console.print(f"profiling engine {name}: {steps} steps of each kind", highlight=False)
        content: dict[str, Any] = {"engine": name, "device": runtime.device.type, "steps": [], "rows": []}
        for kind, profiler, unprofiled in _record(teacher, student, replace(config, loop=loop, engine=name), runtime):
            traces[f"{name}_{kind}"] = folder / f"trace_{name}_{kind}.json.gz"
            profiler.export_chrome_trace(str(traces[f"{name}_{kind}"]))
            _add_step(content, kind, profiler.events(), steps, unprofiled)
            console.print(result_table(table(content, kind), f"{name}: {kind} step, mean of {steps}"))
        contents.append(content)
        gc.collect()  # frees this engine's device memory before the next one starts
        if cuda:
            torch.cuda.empty_cache()
    console.print(result_table(summary_table(contents), "wall time of a step, without the profiler"))
    result = {
        "environment": environment(),
        "precision": _precision(runtime),
        "batch": loop.batch_size,
        "image_size": config.image_size,
        "networks": dict(zip(("teacher", "student"), networks or (_name(teacher), _name(student)), strict=True)),
        "engines": contents,
    }
    write_results(folder / "anatomy.json", result)
    return ProfileResult(folder=folder, traces=traces, content=result)


def _add_step(content: dict[str, Any], kind: str, events: Sequence[Any], steps: int, unprofiled: float) -> None:
    """Add the times of one kind of step to the content of an engine."""
    cuda = content["device"] == "cuda"
    rows = time_by_range(events, steps, cuda=cuda, replayed=content["engine"] == "graph")
    content["rows"] += [{"step": kind, **row} for row in rows]
    content["steps"].append(
        {
            "step": kind,
            "recorded": steps,
            "microseconds": round(sum(row["microseconds"] for row in rows), 2),
            "kernels": sum(row["kernels"] for row in rows) if cuda else None,
            "unprofiled_us": round(unprofiled, 2),
        }
    )


def _record(
    teacher: FeatureModel, student: FeatureModel, config: DistillConfig, runtime: Runtime
) -> Iterator[tuple[str, torch.profiler.profile, float]]:
    """For each kind of step: the profiler after recording, and microseconds per step without it."""
    assert config.image_size is not None
    student.train()
    mean, std = normalization(teacher.model)
    sizes: dict[str, Any] = {"image_size": config.image_size, "mean": config.mean or mean, "std": config.std or std}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if runtime.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with runtime.backends(), frozen(teacher), preserve_train_mode(teacher, False):
        engine = create_engine(build_state(teacher, student, config, runtime, **sizes))
        engine.prepare()
        generator_steps, student_steps = config.loop.generator_steps, config.loop.student_steps
        for kind, first, count in (("generator", 0, generator_steps), ("student", generator_steps, student_steps)):
            if not count:
                continue
            _steps(engine, first, count)
            unprofiled = _steps(engine, first, count)
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
            with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profiler:
                _steps(engine, first, count)  # the start of the profiler slows these
                _start(engine, first)
                profiler.step()
                _steps(engine, None, count)
            yield kind, profiler, unprofiled


def _start(engine: Engine, first: int) -> None:
    """Start a round at its step ``first``."""
    engine.state.position = Position(step=first)
    engine.start_round()
    engine.state.runtime.synchronize()


def _steps(engine: Engine, first: int | None, count: int) -> float:
    """Microseconds per step of ``count`` steps from ``first``, or from where the round is, by the host's clock."""
    if first is not None:
        _start(engine, first)
    start = time.perf_counter()
    for _ in range(count):
        engine.step()
    engine.state.runtime.synchronize()
    return 1e6 * (time.perf_counter() - start) / count


def _precision(runtime: Runtime) -> str:
    if runtime.autocast is None:
        return "tf32" if runtime.tf32 else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[runtime.autocast]


def _name(network: FeatureModel) -> str:
    return type(network.model).__name__
