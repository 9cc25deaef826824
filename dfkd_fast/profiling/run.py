"""Running some steps under torch.profiler, in one engine or several."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dfkd_fast.config import DistillConfig, EngineName
from dfkd_fast.engine import Engine, Position, Runtime, build_state, create_engine, resolve_engine
from dfkd_fast.engine.runtime import new_run_folder
from dfkd_fast.graph import FeatureModel, frozen, modes_kept
from dfkd_fast.models import normalization
from dfkd_fast.profiling.anatomy import anatomy, summary_table, table
from dfkd_fast.profiling.figure import save_anatomy
from dfkd_fast.profiling.timeline import Timeline, attribute_by_order, read_trace, timeline
from dfkd_fast.report import environment, result_table, write_results

__all__ = ["ProfileResult", "profile", "record"]


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """What a profile leaves.

    Attributes:
        folder: with ``anatomy.json``, ``anatomy.png`` and, for each engine, a trace.
        traces: the traces by engine, for Perfetto or chrome://tracing.
        content: what ``anatomy.json`` holds.
    """

    folder: Path
    traces: dict[str, Path]
    content: dict[str, Any]


def record(work: Callable[[], object], path: Path, *, cuda: bool) -> Timeline:
    """Run ``work`` twice, the second time recorded, since the profiler's own start slows the first.

    Args:
        work: steps, each in its range.
        path: the trace to write, ``.json.gz``. Missing folders are made.
        cuda: record the GPU too.

    Raises:
        ValueError: no step in what was recorded.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profiler:
        for _ in range(2):
            work()
            if cuda:
                torch.cuda.synchronize()
            profiler.step()
    profiler.export_chrome_trace(str(path))
    return timeline(read_trace(path))


def _round(engine: Engine) -> dict[str, float]:
    """A whole round, from its first step; microseconds a step of each kind, by the host's clock."""
    state, loop = engine.state, engine.state.config.loop
    state.position = Position()
    engine.start_round()
    took = {}
    for kind, count in (("generator", loop.generator_steps), ("student", loop.student_steps)):
        if count:
            state.runtime.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                engine.step()
            state.runtime.synchronize()
            took[kind] = 1e6 * (time.perf_counter() - start) / count
    return took


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
    """Write a trace of some steps, and say where their time goes.

    A graph's kernels are told apart by those of the compiled form, which is therefore profiled first where the graph
    form is, asked for or not.

    Args:
        teacher: the network that knows; its weights do not matter here.
        student: the network that learns; its weights change.
        config: the run. Of its loop, the numbers of steps a round are replaced.
        engines: which to run, one after the other.
        steps: of each kind to record; a kind that the config's rounds have none of is left out.
        networks: what teacher and student are called; None is by their classes.
        out: folder; None makes a new one under ``runs/``.
        console: where the tables are printed; None is the terminal.

    Returns:
        The files and their content: ``environment``, ``precision``, ``batch``, ``image_size``, ``networks``, and for
        each of ``engines`` what :func:`dfkd_fast.profiling.anatomy` returns with ``engine``, ``ranges``, which says
        where the attribution comes from, ``unattributed``, the number of kernels in all recorded steps without one, and
        ``unprofiled_us``, how long a step of each kind took before the profiler, which slows the host, was started.

    Raises:
        ValueError: no engine, less than one step, or a config that does not fit.
    """
    config, runtime, names = _checked(config, engines, steps)
    loop = config.loop
    folder = new_run_folder(out, "profile")
    console = console or Console()
    timelines: dict[EngineName, Timeline] = {}
    unprofiled: dict[EngineName, dict[str, float]] = {}
    missed: dict[EngineName, int] = {}
    needed: list[EngineName] = ["compiled"] if "graph" in names else []
    for name in dict.fromkeys([*needed, *names]):
        console.print(f"profiling engine {name}: {steps} steps of each kind", highlight=False)
        timelines[name], unprofiled[name] = _run(teacher, student, replace(config, engine=name), runtime, folder)
        missed[name] = 0
        gc.collect()  # nothing of it is left on the device for the next
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
    if "graph" in names:
        timelines["graph"], missed["graph"] = attribute_by_order(timelines["graph"], timelines["compiled"])
    contents = [
        {
            "engine": name,
            "ranges": "order of the compiled form's kernels" if name == "graph" else "launches",
            "unattributed": missed[name],
            "unprofiled_us": {kind: round(took, 2) for kind, took in unprofiled[name].items()},
            **anatomy(timelines[name]),
        }
        for name in names
    ]
    content = {
        "environment": environment(),
        "precision": _precision(runtime),
        "batch": loop.batch_size,
        "image_size": config.image_size,
        "networks": dict(zip(("teacher", "student"), networks or (_name(teacher), _name(student)), strict=True)),
        "engines": contents,
    }
    write_results(folder / "anatomy.json", content)
    save_anatomy(content, folder / "anatomy.png")
    _print(console, content)
    return ProfileResult(folder=folder, traces={name: _trace(folder, name) for name in timelines}, content=content)


def _checked(
    config: DistillConfig, engines: Sequence[EngineName], steps: int
) -> tuple[DistillConfig, Runtime, list[EngineName]]:
    """The config with ``steps`` of each kind that it has, where to run, and the engines without repetition."""
    if not engines or steps < 1:
        raise ValueError(f"at least one engine and one step are needed, got {len(engines)} engines, {steps} steps")
    if config.image_size is None:
        raise ValueError("DistillConfig.image_size must be given: a profile has no data to take it from")
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    names = list(dict.fromkeys(resolve_engine(name, runtime) for name in engines))
    if "graph" in names and runtime.device.type != "cuda":
        raise ValueError(f"engine 'graph' needs a CUDA device, got {str(runtime.device)!r}")
    counts: dict[str, Any] = {
        name: steps for name in ("generator_steps", "student_steps") if getattr(config.loop, name)
    }
    return replace(config, loop=replace(config.loop, **counts)), runtime, names


def _run(
    teacher: FeatureModel, student: FeatureModel, config: DistillConfig, runtime: Runtime, folder: Path
) -> tuple[Timeline, dict[str, float]]:
    """Record one engine; also microseconds a step of each kind without the profiler."""
    assert config.image_size is not None
    student.train()
    mean, std = normalization(teacher.model)
    sizes: dict[str, Any] = {"image_size": config.image_size, "mean": config.mean or mean, "std": config.std or std}
    with runtime.backends(), frozen(teacher), modes_kept(teacher, False):
        engine = create_engine(build_state(teacher, student, config, runtime, **sizes))
        engine.prepare()
        _round(engine)
        unprofiled = _round(engine)
        cuda = runtime.device.type == "cuda"
        return record(lambda: _round(engine), _trace(folder, config.engine), cuda=cuda), unprofiled


def _trace(folder: Path, engine: str) -> Path:
    return folder / f"trace_{engine}.json.gz"


def _precision(runtime: Runtime) -> str:
    if runtime.autocast is None:
        return "tf32" if runtime.tf32 else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[runtime.autocast]


def _name(network: FeatureModel) -> str:
    return type(network.model).__name__


def _print(console: Console, content: dict[str, Any]) -> None:
    for each in content["engines"]:
        for step in each["steps"]:
            title = f"{each['engine']}: {step['step']} step, median of {step['profiled']}"
            console.print(result_table(table(each, step["step"]), title))
        if each["unattributed"]:
            console.print(
                f"{each['engine']}: {each['unattributed']} kernels of all recorded steps have no counterpart in the "
                "compiled form; their network is 'unknown'",
                highlight=False,
            )
    console.print(result_table(summary_table(content["engines"]), "steps; alone: without the profiler"))
    if content["engines"][0]["device"] == "cpu":
        console.print("On the CPU an activity is a host operator, and what is not busy is outside of operators.")
