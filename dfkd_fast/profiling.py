"""Profiles steps by network and op, with torch.profiler and the ranges of :mod:`dfkd_fast.nvtx`.

Times are sums over the events of ``torch.profiler.profile.events()``. On CUDA, they are the device time of kernels,
copies and fills. On the CPU, they are the self CPU time. An operator's backward is attributed to the network and op of
its forward, which autograd's sequence numbers identify. Kernels of a replayed CUDA graph belong to no range, so for
engine ``graph`` only their total time and number are known.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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

__all__ = [
    "OUTSIDE",
    "REPLAYED",
    "ProfileResult",
    "attribute",
    "profile",
    "summary_table",
    "table",
    "time_by_range",
    "time_steps",
]

OUTSIDE = "loop"
"""Name of the network in rows for time outside of all network ranges."""

REPLAYED = "replayed graph"
"""Name of the network in the row for a replayed CUDA graph."""

_NODE = "autograd::engine::evaluate_function: "  # prefix of autograd's event for the backward of one node
_MIN_SHARE = 0.005  # table() combines rows with a smaller share

Key = tuple[str, str, str]  # network, direction, op ("" outside of ops)


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """The result of :func:`profile`.

    Attributes:
        folder: contains ``breakdown.json`` and the traces.
        traces: path of the Chrome trace of each engine and kind of step, by ``"<engine>_<kind>"``.
        content: the content of ``breakdown.json``.
    """

    folder: Path
    traces: dict[str, Path]
    content: dict[str, Any]


def attribute(events: Iterable[Any]) -> Iterator[tuple[Any, Key]]:
    """Yield each host event with its network, direction and op.

    Args:
        events: events of ``torch.profiler.profile.events()``, which are ordered by start time.
    """
    keys: dict[int, Key] = {}
    forward: dict[int, Key] = {}  # by sequence number. The last operator with a number creates its node.
    latest: dict[int, Key] = {}  # last node of each thread. AccumulateGrad has no number, but follows its input's node.
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
    """Sum the time of recorded steps by network, direction and op.

    Args:
        events: events of ``torch.profiler.profile.events()``.
        steps: number of recorded steps, by which the results are divided.
        cuda: sum device time and count kernels; otherwise sum self CPU time.
        replayed: whether the steps are replays of a CUDA graph, whose kernels belong to no range.

    Returns:
        Rows in descending order of time, with ``network``, ``direction``, ``op``, ``microseconds`` and ``kernels`` per
        step (``kernels`` is None on the CPU) and ``share`` of the total time, in [0, 1].
    """
    spent: dict[Key, float] = defaultdict(float)
    kernels: dict[Key, int] = defaultdict(int)
    if not replayed:
        for event, key in attribute(events):
            spent[key] += sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
            kernels[key] += len(event.kernels)
    if cuda:
        # Launches outside of any operator, such as those of a graph, have no host event.
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
    """Format the rows of one kind of step for printing. The last row combines all rows below half a percent.

    Args:
        content: an entry of ``engines`` from :func:`profile`.
        step: ``generator`` or ``student``.
    """
    rows = [row for row in content["rows"] if row["step"] == step]
    small = [row for row in rows if row["share"] < _MIN_SHARE]
    if small:
        rest = {name: sum(row[name] or 0 for row in small) for name in ("microseconds", "kernels", "share")}
        named = {"network": f"{len(small)} rows below {_MIN_SHARE:.1%}", "direction": "", "op": ""}
        rows = [*(row for row in rows if row["share"] >= _MIN_SHARE), named | rest]
    formats = {"kernels": "{:g}"} if content["device"] == "cuda" else {}
    formats = {"network": "{}", "direction": "{}", "op": "{}", **formats, "microseconds": "{:.1f}", "share": "{:.1%}"}
    return [
        {name.replace("microseconds", "us"): form.format(row[name]) for name, form in formats.items()} for row in rows
    ]


def summary_table(contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Format rows that compare engines for printing, with one row per engine and kind of step.

    Args:
        contents: ``engines`` from :func:`profile`.
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
    """Record steps of each kind, write Chrome traces and print the time by network and op.

    Args:
        teacher: the teacher. Its weights do not affect the times.
        student: the student. Its weights change.
        config: the run. Its numbers of steps per round are replaced.
        engines: the engines to profile, one after the other.
        steps: number of steps to record of each kind. Kinds without steps in the config's rounds are left out.
        networks: names of teacher and student; None uses their class names.
        out: output folder; None creates a new one under ``runs/``.
        console: console for the tables; None uses the terminal.

    Returns:
        The files and the content of ``breakdown.json``: ``environment``, ``precision``, ``batch``, ``image_size``,
        ``networks`` and ``engines``. Each engine has ``engine``, ``device`` (``cuda`` or ``cpu``), ``steps`` and
        ``rows``. Each of ``steps`` has ``step`` (its kind), ``recorded`` (the number of steps), ``microseconds`` and
        ``kernels`` per step, and ``unprofiled_us``, the wall time per step without the profiler's overhead. ``rows``
        are those of :func:`time_by_range`, with ``step``.

    Raises:
        ValueError: there is no engine or less than one step, the config has no ``image_size``, or an engine does not
            support the device.
    """
    networks = networks or (type(teacher.model).__name__, type(student.model).__name__)
    if not engines or steps < 1:
        raise ValueError(f"at least one engine and one step are needed, got {len(engines)} engines, {steps} steps")
    if config.image_size is None:
        raise ValueError("DistillConfig.image_size must be given for a profile")
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
        gc.collect()  # free this engine's device memory before the next one starts
        if cuda:
            torch.cuda.empty_cache()
    console.print(result_table(summary_table(contents), "wall time per step, without the profiler"))
    result = {
        "environment": environment(),
        "precision": runtime.precision,
        "batch": loop.batch_size,
        "image_size": config.image_size,
        "networks": dict(zip(("teacher", "student"), networks, strict=True)),
        "engines": contents,
    }
    write_results(folder / "breakdown.json", result)
    return ProfileResult(folder=folder, traces=traces, content=result)


def _add_step(content: dict[str, Any], kind: str, events: Sequence[Any], steps: int, unprofiled: float) -> None:
    """Add the results of one kind of step to an engine's content."""
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
    """Yield each kind of step, its profiler after recording, and the microseconds per step without the profiler."""
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
            time_steps(engine, first, count)
            unprofiled = time_steps(engine, first, count)
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
            with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profiler:
                time_steps(engine, first, count)  # warm-up: starting the profiler slows these steps
                time_steps(engine, first, count, started=profiler.step)
            yield kind, profiler, unprofiled


def time_steps(engine: Engine, first: int, count: int, started: Callable[[], None] = lambda: None) -> float:
    """Call ``started``, run ``count`` steps from step ``first`` of a round, and return microseconds per step."""
    engine.state.position = Position(step=first)
    engine.start_round()
    engine.state.runtime.synchronize()
    started()
    start = time.perf_counter()
    for _ in range(count):
        engine.step()
    engine.state.runtime.synchronize()
    return 1e6 * (time.perf_counter() - start) / count
