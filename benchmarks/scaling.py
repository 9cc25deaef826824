"""Collectives of a distillation step on P processes, and a model of the time that they take.

:func:`step_collectives` derives the collectives from the networks, terms and parameters of a run, without running it.
:func:`collective_time` is a latency-bandwidth model. docs/scaling.md explains both.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.benchmarks.results import measured_on
from dfkd_fast.benchmarks.step.variants import SIZES
from dfkd_fast.config import DistillConfig, LoopConfig
from dfkd_fast.engine import DistillState, Runtime, build_generator, build_state
from dfkd_fast.models import create_model, extract
from dfkd_fast.objectives import Objective
from dfkd_fast.report import markdown_table
from dfkd_fast.synthesis import Momentum

__all__ = [
    "Collective",
    "collective_time",
    "paper_state",
    "scaling_section",
    "scaling_times_section",
    "step_collectives",
]

# Assumptions, not measurements: bandwidths are data-sheet values, and latencies are typical ones.
GPUS_PER_NODE = 8
NVLINK_BYTES_PER_S = 450e9  # NVLink 4, per GPU and direction
NETWORK_BYTES_PER_S = 50e9  # InfiniBand NDR, 400 Gb/s per GPU
NODE_LATENCY_S = 15e-6  # a small NCCL collective inside a node, with its launch
HOP_LATENCY_S = 5e-6  # one hop between nodes

PROCESSES = (1, 2, 4, 8, 16, 64, 256, 1024)


class Collective(NamedTuple):
    """One collective of a step.

    Attributes:
        kind: the operation.
        part: the part of the step that needs it.
        numbers: the number of float32 values that each process sends. An all_gather returns P times as many.
    """

    kind: Literal["all_gather", "all_reduce"]
    part: str
    numbers: int


def step_collectives(
    state: DistillState, processes: int, *, batch_size: int | None = None, fused: bool = True
) -> dict[str, list[Collective]]:
    """Return the collectives of a ``generator_step`` and of a ``student_step`` on some number of processes.

    Registered loss terms of other packages are not included. All trained parameters are assumed to get gradients.

    Args:
        state: the state of the run.
        processes: P, the number of processes.
        batch_size: the number of images of all processes; None is that of ``state``.
        fused: BatchNorms use the fused kernels, whose backward reduces (2, C) numbers; otherwise they use the
            reference, whose backward reduces (P, 2, C).
    """
    synthesizer, student, objective = state.synthesizer, state.student.module.model, state.generator.objective
    repeated = 1 if fused else processes
    rows = (batch_size or state.config.loop.batch_size) // processes

    def norms(part: str, network: nn.Module, *, backward: bool) -> list[Collective]:
        found = [bn for bn in network.modules() if isinstance(bn, _BatchNorm) and bn not in synthesizer.replicated]
        sizes = [2 * bn.num_features for bn in found if state.config.sync_batchnorm]
        forward = [Collective("all_gather", f"BatchNorms of the {part}, forward", size) for size in sizes]
        reduced = [Collective("all_reduce", f"BatchNorms of the {part}, backward", repeated * size) for size in sizes]
        return forward + reduced * backward

    generator_step = norms("generator", synthesizer.module, backward=True)
    if "student" in objective.needs and state.config.loop.student_in_generator_step != "eval":
        generator_step += norms("student", student, backward=True)
    student_step = norms("generator", synthesizer.sampler, backward=False)
    student_step += norms("student", student, backward=True)
    sampled = rows * (2 if isinstance(synthesizer, Momentum) else 1)
    parts = max(1, len(synthesizer.sample_weights))  # the objective is called for each
    generator_step += [*_terms(state, objective, rows), _gradients(state.generator)]
    student_step += [*_terms(state, state.student.objective, sampled // parts) * parts, _gradients(state.student)]
    return {"generator_step": generator_step, "student_step": student_step}


def _terms(state: DistillState, objective: Objective, rows: int) -> list[Collective]:
    """The collectives of the loss terms, with ``rows`` images on this process."""
    teacher, channels = state.teacher_statistics, 0
    if teacher is not None:
        layers: list[Any] = [teacher.model.get_submodule(path) for path in teacher.batchnorms]
        channels = sum(layer.num_features for layer in layers)
    numbers = {
        "balance": rows * state.teacher.num_classes,
        "bn": 2 * channels,
        "contrast": 2 * sum(state.teacher.feature_channels) * rows,
        "js": 2 * rows,
        "sfcl": 2 * state.config.objective.sfcl.dim * rows,
        "variation": 4,
    }
    return [Collective("all_gather", f"term `{name}`", numbers[name]) for name in objective.names if name in numbers]


def _gradients(side: Any) -> Collective:
    sizes = (p.numel() for group in side.optimizer.param_groups for p in group["params"] if p.requires_grad)
    return Collective("all_reduce", "gradients and losses", sum(sizes) + 1 + len(side.objective.names))


def collective_time(collective: Collective, processes: int) -> float:
    """Return the modeled time of a collective in seconds.

    An all_reduce first adds inside each node, then between nodes, where each GPU has an equal part, and then gathers
    inside each node. An all_gather gathers between nodes first. The number of hops between nodes is logarithmic.
    """
    local, nodes = min(processes, GPUS_PER_NODE), math.ceil(processes / GPUS_PER_NODE)
    size, hops = 4 * collective.numbers, math.ceil(math.log2(nodes))
    if processes == 1:
        return 0.0
    if collective.kind == "all_reduce":
        nvlink, network, hops = 2 * (local - 1) / local * size, 2 * (nodes - 1) / nodes * size / local, 2 * hops
    else:
        nvlink, network = float((local - 1) * nodes * size), float((nodes - 1) * size)
    latency = NODE_LATENCY_S + hops * HOP_LATENCY_S
    return latency + nvlink / NVLINK_BYTES_PER_S + network / NETWORK_BYTES_PER_S


@functools.cache
def paper_state() -> DistillState:
    """Return a state with the networks and settings of the paper, with random weights, on the CPU.

    It cannot run steps: to save time, teacher and student are traced with small images.
    """
    size, small, half = SIZES["full"], 32, (0.5, 0.5, 0.5)
    loop = LoopConfig(generator_steps=size.steps[0], student_steps=size.steps[1], batch_size=size.batch)
    config = DistillConfig(generator=size.generator, loop=loop, image_size=small, mean=half, std=half, device="cpu")
    with torch.random.fork_rng(devices=[]):
        models = [create_model(each, num_classes=size.classes) for each in (size.teacher, size.student)]
        teacher, student = (extract(model, image_size=small) for model in models)
        generator, runtime = build_generator(size.generator, size.image), Runtime.of("cpu", "fp32", channels_last=True)
        given: dict[str, Any] = {"image_size": small, "mean": half, "std": half, "given": generator}
        return build_state(teacher, student, config, runtime, **given)


def _collective_lines(steps: dict[str, list[Collective]]) -> list[dict[str, str]]:
    lines = []
    for step, collectives in steps.items():
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for each in collectives:
            groups[each.part, each.kind].append(each.numbers)
        groups["all", ""] = [each.numbers for each in collectives]
        for index, ((part, kind), numbers) in enumerate(groups.items()):
            label = "" if index else step.replace("_", " ")
            line = {"step": label, "for": part, "operation": f"`{kind}`" * bool(kind)}
            lines.append({**line, "collectives": f"{len(numbers):,}", "float32 values": f"{sum(numbers):,}"})
    return lines


def _time_line(processes: int, batch: int, least: dict[str, float]) -> dict[str, str]:
    """The line of a batch of images on P processes. ``least`` has the least seconds of each step with 64 images."""
    line = {"processes": f"{processes:,}", "batch": f"{batch:,}", "images per process": f"{batch // processes}"}
    for step, collectives in step_collectives(paper_state(), processes, batch_size=batch).items():
        spent, name = sum(collective_time(each, processes) for each in collectives), step.replace("_", " ")
        line[f"{name}, ms"] = f"{spent * 1e3:.2f}"
        if step in least:
            share = spent / (spent + least[step] * batch / processes / SIZES["full"].batch)
            line[f"{name}, largest share"] = f"{share:.0%}"
    return line


def _contrast_gflop(batch: int) -> float:
    """Operations of L_SFCL: each of (B, D) anchors with 2 B vectors, once in forward and three times in backward."""
    return 4 * 2.0 * batch * 2 * batch * paper_state().config.objective.sfcl.dim / 1e9


def scaling_times_section(content: dict[str, Any], folder: str) -> str:
    """Return the measured times of rounds on several GPUs, one line per number of processes."""
    lines = [
        {
            "processes": row["processes"],
            "batch": row["batch"],
            "round, ms": f"{row['round_ms']:.1f}",
            "images/s": f"{row['images_per_s']:,.0f}",
        }
        for row in sorted(content["rows"], key=lambda row: row["processes"])
        if row["status"] == "ok"
    ]
    return "\n".join([*markdown_table(lines), "", f"Measured on: {measured_on(content)}."])


def scaling_section(content: dict[str, Any], folder: str) -> str:
    """Return the tables of docs/scaling.md. ``content`` is ``step_counts.json``, which has the least times of steps."""
    rows = {row["step"]: row for row in content["rows"] if row["variant"] == "dfkd_fast"}
    least = {step: row["least_us"] / 1e6 for step, row in rows.items()}
    batch, loss = SIZES["full"].batch, "contrastive loss, GFLOP"
    steps = step_collectives(paper_state(), GPUS_PER_NODE, batch_size=GPUS_PER_NODE * batch)
    weak = [(_time_line(each, batch * each, least), _contrast_gflop(batch * each)) for each in PROCESSES]
    tables = {
        f"{GPUS_PER_NODE} processes with {batch} images each:": _collective_lines(steps),
        f"{batch} images per process:": [{**line, loss: f"{gflop:,.2f}"} for line, gflop in weak],
        f"A batch of {batch} images:": [_time_line(each, batch, least) for each in PROCESSES if batch % each == 0],
    }
    facts = (
        f"Assumed: {NVLINK_BYTES_PER_S / 1e9:.0f} GB/s per GPU and direction inside a node, "
        f"{NETWORK_BYTES_PER_S / 1e9:.0f} GB/s per GPU between nodes, {GPUS_PER_NODE} GPUs per node, "
        f"{NODE_LATENCY_S * 1e6:.0f} us per collective and {HOP_LATENCY_S * 1e6:.0f} us per hop between nodes."
    )
    for step, row in rows.items():
        work = f"{row['least_us'] / 1e3:.2f} ms and {row['flops'] / 1e12:.2f} TFLOP"
        facts += f" Least work of a {step.replace('_', ' ')} with {batch} images: {work}."
    return "\n\n".join([*("\n".join([title, "", *markdown_table(each)]) for title, each in tables.items()), facts])
