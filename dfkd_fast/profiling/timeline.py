"""A trace of torch.profiler, read back as work on the device: what ran when, for which step, network and op.

On a GPU the work is its kernels, copies and fills. A kernel belongs to the ranges (:mod:`dfkd_fast.nvtx`) that were
open on the host when it was launched; in backward, which autograd runs on a thread of its own, to those of the forward
operator with the same sequence number. On the CPU the work is what the host's operators do themselves, without what
they call.

The kernels of a replayed CUDA graph were all launched by one call, so they have no range but their step's; see
:func:`attribute_by_order`.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from dfkd_fast.nvtx import PREFIX

__all__ = ["OUTSIDE", "UNKNOWN", "Activity", "Timeline", "attribute_by_order", "read_trace", "timeline"]

UNKNOWN = "unknown"
"""Network and direction of work that could not be attributed."""

OUTSIDE = "loop"
"""Network of work in a step but in none of its networks: noise, the start of backward, the loss terms' record."""

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_HOST = ("cpu_op", "user_annotation", *_LAUNCHES)
_BACKWARD = "autograd::engine::evaluate_function: "


@dataclass(frozen=True, kw_only=True)
class Activity:
    """A piece of work.

    Attributes:
        name: of the kernel, or of the host's operator.
        start: microseconds from the first event of the trace.
        duration: microseconds.
        stream: CUDA stream; on the CPU the thread.
        step: index into :attr:`Timeline.steps`.
        network: that it was launched for; in backward, whose forward it differentiates.
        direction: ``forward``, ``backward`` or ``optimizer``.
        op: innermost op range, None outside.
        operators: the host operators that it was launched in, innermost first.
        continued: a later piece of an operator that was interrupted by one that it called (CPU alone).
        replayed: launched as part of a CUDA graph.
    """

    name: str
    start: float
    duration: float
    stream: int
    step: int
    network: str
    direction: str
    op: str | None = None
    operators: tuple[str, ...] = ()
    continued: bool = False
    replayed: bool = False

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a trace holds of steps.

    Attributes:
        device: ``cuda`` or ``cpu``.
        steps: what each step was, ``generator`` or ``student``, in order.
        activities: those that belong to a step, by start.
    """

    device: str
    steps: tuple[str, ...]
    activities: tuple[Activity, ...]

    def of_step(self, index: int) -> list[Activity]:
        """The activities of one step, by start."""
        return [activity for activity in self.activities if activity.step == index]


@dataclass(frozen=True, slots=True)
class _Context:
    """What encloses a moment on a host thread."""

    network: str | None = None
    op: str | None = None
    operators: tuple[str, ...] = ()
    sequence: int | None = None
    backward: bool = False


@dataclass(frozen=True, slots=True)
class _Span:
    """A host event, and what it encloses its contents in."""

    event: dict[str, Any]
    end: float
    context: _Context


def read_trace(path: str | Path) -> dict[str, Any]:
    """A trace that torch.profiler exported, ``.json`` or ``.json.gz``.

    Raises:
        ValueError: it is not such a trace.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        content = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (ValueError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a trace of torch.profiler: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise ValueError(f"{path} is not a trace of torch.profiler: it has no list of traceEvents")
    return content


def timeline(trace: dict[str, Any]) -> Timeline:
    """Read a trace.

    Args:
        trace: as :func:`read_trace` gives it.

    Raises:
        ValueError: no step range in it.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    host = _by_thread(event for event in events if event.get("cat") in _HOST)
    steps = _steps(events)
    if not steps:
        raise ValueError(f"the trace has no range {PREFIX}/step/...: no step ran while it was recorded")
    walk = _Walk(host, [step["ts"] for step in steps], [step["ts"] + step["dur"] for step in steps])
    device = [event for event in events if event.get("cat") in _DEVICE]
    found = list(walk.launched(device)) if device else list(walk.operators())
    origin = min(event["ts"] for event in events)
    return Timeline(
        device="cuda" if device else "cpu",
        steps=tuple(_range(step, "step") or "" for step in steps),
        activities=tuple(
            sorted((replace(a, start=a.start - origin) for a in found), key=lambda activity: activity.start)
        ),
    )


def attribute_by_order(replayed: Timeline, launched: Timeline) -> tuple[Timeline, int]:
    """Give the kernels of a replayed graph the ranges of the same step's kernels launched one by one.

    A graph replays, on one stream and in the same order, what was launched while it was captured; so the k-th kernel
    of a replay is the k-th of a launched step. Where the names differ, the longest common runs of names are matched.

    Args:
        replayed: of the graph form.
        launched: of the compiled form, with one step of each kind at least; of several the last is taken.

    Returns:
        The timeline, and how many of its activities found no partner; their network is ``unknown``.
    """
    models = {kind: launched.of_step(index) for index, kind in enumerate(launched.steps)}
    orphans: dict[int, list[Activity]] = defaultdict(list)
    found: list[Activity] = []
    for activity in replayed.activities:
        (orphans[activity.step] if activity.replayed else found).append(activity)
    partners: dict[Any, list[Activity | None]] = {}  # replays of one graph are alike
    missed = 0
    for index, of_step in orphans.items():
        kind = replayed.steps[index]
        names = tuple(activity.name for activity in of_step)
        if (kind, names) not in partners:
            partners[kind, names] = _partners(names, models.get(kind, []))
        for activity, model in zip(of_step, partners[kind, names], strict=True):
            missed += model is None
            if model is not None:
                activity = replace(
                    activity,
                    network=model.network,
                    direction=model.direction,
                    op=model.op,
                    operators=model.operators,
                )
            found.append(activity)
    return replace(replayed, activities=tuple(sorted(found, key=lambda activity: activity.start))), missed


def _partners(names: tuple[str, ...], models: Sequence[Activity]) -> list[Activity | None]:
    known = tuple(model.name for model in models)
    if known == names:
        return list(models)
    partners: list[Activity | None] = [None] * len(names)
    for first, second, size in SequenceMatcher(None, known, names, autojunk=False).get_matching_blocks():
        partners[second : second + size] = models[first : first + size]
    return partners


def _range(event: dict[str, Any], kind: str) -> str | None:
    """Of what an event is the range of this kind; None where it is none."""
    name = event["name"]
    start = f"{PREFIX}/{kind}/"
    return name[len(start) :] if event["cat"] == "user_annotation" and name.startswith(start) else None


def _steps(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [event for event in events if event.get("cat") == "user_annotation" and _range(event, "step") is not None]
    return sorted(found, key=lambda event: event["ts"])


def _by_thread(events: Iterable[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """Host events of each thread, an enclosing one before what it encloses."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for found in threads.values():
        found.sort(key=lambda event: (event["ts"], -event["dur"]))
    return threads


class _Walk:
    """The nesting of the host's events, and from it what was launched or done where."""

    def __init__(self, threads: dict[Any, list[dict[str, Any]]], starts: list[float], ends: list[float]) -> None:
        self.threads = threads
        self.starts, self.ends = starts, ends
        self.origins: dict[int, tuple[float, _Context]] = {}  # by sequence number: the operator that made the node
        self.spans = {thread: list(self._nested(events)) for thread, events in threads.items()}

    def _nested(self, events: list[dict[str, Any]]) -> Iterator[_Span]:
        stack: list[_Span] = []
        last_node: int | None = None
        for event in events:
            while stack and stack[-1].end <= event["ts"]:
                stack.pop()
            context = self._inside(event, stack[-1].context if stack else _Context(), last_node)
            if context.backward:
                last_node = context.sequence
            span = _Span(event, event["ts"] + event["dur"], context)
            stack.append(span)
            yield span

    def _inside(self, event: dict[str, Any], outer: _Context, last_node: int | None) -> _Context:
        if event["cat"] == "user_annotation":
            network, op = _range(event, "network"), _range(event, "op")
            return replace(outer, network=network or outer.network, op=op or outer.op)
        if event["cat"] != "cpu_op":
            return outer
        name, args = event["name"], event.get("args", {})
        sequence = args.get("Sequence number")
        backward = outer.backward or name.startswith(_BACKWARD) or bool(args.get("Fwd thread id"))
        if outer.backward:
            sequence = outer.sequence
        elif backward and sequence is None:
            sequence = last_node  # summing a parameter's gradient goes with the node that computed it
        context = _Context(outer.network, outer.op, (name, *outer.operators), sequence, backward)
        # Operators that make no node carry the number of the next one, so the last to carry it is the one.
        if not backward and sequence is not None and event["ts"] >= self.origins.get(sequence, (0.0,))[0]:
            self.origins[sequence] = (event["ts"], context)
        return context

    def _step(self, moment: float) -> int | None:
        """The step that was running at a moment, on whatever thread."""
        index = bisect.bisect_right(self.starts, moment) - 1
        return index if index >= 0 and moment <= self.ends[index] else None

    def _activity(self, context: _Context, **fields: Any) -> Activity:
        network, op = context.network, context.op
        direction = "optimizer" if network == "optimizer" else "forward"
        if context.backward:
            direction = "backward"
            _, origin = self.origins.get(-1 if context.sequence is None else context.sequence, (0.0, None))
            if origin is not None:
                network, op = origin.network, op or origin.op
        return Activity(network=network or OUTSIDE, direction=direction, op=op, operators=context.operators, **fields)

    def launched(self, device: list[dict[str, Any]]) -> Iterator[Activity]:
        """Kernels, copies and fills, through the calls that launched them."""
        calls = {
            span.event["args"]["correlation"]: span
            for spans in self.spans.values()
            for span in spans
            if span.event["cat"] in _LAUNCHES and "correlation" in span.event.get("args", {})
        }
        for event in device:
            args = event.get("args", {})
            call = calls.get(args.get("correlation"))
            step = None if call is None else self._step(call.event["ts"])
            if call is None or step is None:
                continue  # of the warm-up or of the profiler
            fields = {
                "name": event["name"],
                "start": event["ts"],
                "duration": event["dur"],
                "stream": args.get("stream", event["tid"]),
                "step": step,
            }
            if "GraphLaunch" in call.event["name"]:
                yield Activity(network=UNKNOWN, direction=UNKNOWN, replayed=True, **fields)
            else:
                yield self._activity(call.context, **fields)

    def operators(self) -> Iterator[Activity]:
        """What the host's operators do themselves: their time without that of the operators that they call."""
        for number, spans in enumerate(self.spans.values()):
            yield from self._own(number, [span for span in spans if span.event["cat"] == "cpu_op"])

    def _own(self, thread: int, spans: list[_Span]) -> Iterator[Activity]:
        stack: list[tuple[_Span, bool]] = []  # and whether a piece of it has been given
        cursor = 0.0

        def piece(until: float) -> Iterator[Activity]:
            nonlocal cursor
            span, continued = stack[-1]
            step = self._step(cursor)
            if step is not None and until > cursor:
                yield self._activity(
                    span.context,
                    name=span.event["name"],
                    start=cursor,
                    duration=until - cursor,
                    stream=thread,
                    step=step,
                    continued=continued,
                )
                stack[-1] = (span, True)
            cursor = max(cursor, until)

        for span in spans:
            while stack and stack[-1][0].end <= span.event["ts"]:
                yield from piece(stack[-1][0].end)
                stack.pop()
            if stack:
                yield from piece(span.event["ts"])
            cursor = max(cursor, span.event["ts"]) if stack else span.event["ts"]
            stack.append((span, False))
        while stack:
            yield from piece(stack[-1][0].end)
            stack.pop()
