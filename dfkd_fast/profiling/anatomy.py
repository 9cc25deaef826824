"""Where a step's time goes: by network, direction and class of op, with the time in which nothing ran.

The content of a result file, JSON's types throughout, so that figures can be drawn from a committed file alone.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dfkd_fast.profiling.classes import GAP, op_class
from dfkd_fast.profiling.timeline import OUTSIDE, Activity, Timeline

__all__ = ["anatomy", "events_of", "gap_name", "summary_table", "table"]

_SHORTEST_NAME = 80  # characters of a kernel's name that are kept: templates run to many hundreds
_LEAST_SHARE = 0.005  # rows below it are summed in a printed table

Key = tuple[str, str, str]  # network, direction, class of op


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One step's window on the device, taken apart; times in microseconds.

    Attributes:
        window: from the step's first activity to the next step's, or to the end of its own last.
        time: the part of the window that goes to each key. Where two activities overlap, it goes to the one that began
            first. A gap goes to the network that runs after it.
        count: activities of each key.
        largest_gap: the longest time in which nothing ran.
    """

    index: int
    window: float
    time: dict[Key, float]
    count: Counter[Key]
    largest_gap: float

    @property
    def gap(self) -> float:
        return sum(time for (_, _, label), time in self.time.items() if label == GAP)


def _take_apart(timeline: Timeline, index: int, activities: Sequence[Activity], following: float | None) -> _Step:
    start = cursor = activities[0].start
    end = max(activity.end for activity in activities) if following is None else following
    time: dict[Key, float] = defaultdict(float)
    count: Counter[Key] = Counter()
    largest = 0.0
    for activity in activities:
        key = (activity.network, activity.direction, op_class(activity))
        count[key] += not activity.continued
        gap = min(activity.start, end) - cursor
        if gap > 0:
            time[activity.network, activity.direction, GAP] += gap
            largest = max(largest, gap)
        until = min(activity.end, end)
        time[key] += max(0.0, until - max(cursor, activity.start))
        cursor = max(cursor, until)
    if end > cursor:
        time[OUTSIDE, "forward", GAP] += end - cursor
        largest = max(largest, end - cursor)
    return _Step(index=index, window=end - start, time=dict(time), count=count, largest_gap=largest)


def _steps(timeline: Timeline) -> dict[str, list[_Step]]:
    by_step: dict[int, list[Activity]] = defaultdict(list)
    for activity in timeline.activities:
        by_step[activity.step].append(activity)
    present = [(index, by_step[index]) for index in range(len(timeline.steps)) if by_step[index]]
    found: dict[str, list[_Step]] = defaultdict(list)
    for position, (index, activities) in enumerate(present):
        following = present[position + 1][1][0].start if position + 1 < len(present) else None
        found[timeline.steps[index]].append(_take_apart(timeline, index, activities, following))
    return found


def anatomy(timeline: Timeline) -> dict[str, Any]:
    """Take the steps of a timeline apart.

    Returns:
        ``device``: ``cuda`` or ``cpu``, where an activity is a piece of a host operator, not a kernel.
        ``steps``: a row a kind of step, medians over the profiled ones: ``step``, ``profiled`` (how many),
        ``window_us``, ``busy_us``, ``gap_us``, ``largest_gap_us``, ``busy`` (share), ``kernels``.
        ``rows``: medians likewise, by time: ``step``, ``network``, ``direction``, ``op_class``, ``kernels``,
        ``microseconds`` a step, ``share`` of all rows' time. Class ``gap`` is time in which nothing ran before an
        activity of this network and direction; at the end of a step, of network ``loop``.
        ``timeline``: for each kind of step the one of median length: ``networks``, ``classes``, ``names`` and
        ``events``, each of which is ``"start duration network class name"``: microseconds from the step's first
        activity, and positions in the three lists. :func:`events_of` reads them.
    """
    steps = _steps(timeline)
    summaries: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    drawn = {}
    for kind, of_kind in steps.items():
        window = statistics.median(step.window for step in of_kind)
        gap = statistics.median(step.gap for step in of_kind)
        summaries.append(
            {
                "step": kind,
                "profiled": len(of_kind),
                "window_us": round(window, 2),
                "busy_us": round(window - gap, 2),
                "gap_us": round(gap, 2),
                "largest_gap_us": round(statistics.median(step.largest_gap for step in of_kind), 2),
                "busy": round(1 - gap / window, 5),
                "kernels": statistics.median(step.count.total() for step in of_kind),
            }
        )
        keys = dict.fromkeys(key for step in of_kind for key in step.time)
        spent = {key: statistics.median(step.time.get(key, 0.0) for step in of_kind) for key in keys}
        whole = sum(spent.values())
        rows += [
            {
                "step": kind,
                "network": network,
                "direction": direction,
                "op_class": label,
                "kernels": statistics.median(step.count[network, direction, label] for step in of_kind),
                "microseconds": round(spent[network, direction, label], 2),
                "share": round(spent[network, direction, label] / whole, 5),
            }
            for network, direction, label in sorted(keys, key=lambda key: -spent[key])
        ]
        typical = sorted(of_kind, key=lambda step: step.window)[(len(of_kind) - 1) // 2]
        drawn[kind] = _events(timeline, typical.index)
    return {"device": timeline.device, "steps": summaries, "rows": rows, "timeline": drawn}


def _events(timeline: Timeline, index: int) -> dict[str, Any]:
    """One step's activities in few bytes. On the CPU, pieces that touch and are of one class become one."""
    networks: dict[str, int] = {}
    classes: dict[str, int] = {}
    names: dict[str, int] = {}
    activities = timeline.of_step(index)
    origin = activities[0].start
    joined: list[list[Any]] = []
    for activity in activities:
        label, name = op_class(activity), activity.name[:_SHORTEST_NAME]
        last = joined[-1] if joined else None
        if (
            timeline.device == "cpu"
            and last is not None
            and last[2:4] == [activity.network, label]
            and activity.start - last[0] - last[1] < 0.1
        ):
            last[1] = activity.end - last[0]
        else:
            joined.append([activity.start, activity.duration, activity.network, label, name])
    events = []
    for start, duration, network, label, name in joined:
        places = [
            table.setdefault(key, len(table)) for table, key in ((networks, network), (classes, label), (names, name))
        ]
        events.append(" ".join([f"{start - origin:.1f}", f"{duration:.2f}", *map(str, places)]))
    return {"networks": list(networks), "classes": list(classes), "names": list(names), "events": events}


def events_of(drawn: dict[str, Any]) -> list[tuple[float, float, str, str, str]]:
    """One step of :func:`anatomy`'s ``timeline`` as (start, duration, network, class, name), times in microseconds."""
    found = []
    for event in drawn["events"]:
        start, duration, network, label, name = event.split()
        found.append(
            (
                float(start),
                float(duration),
                drawn["networks"][int(network)],
                drawn["classes"][int(label)],
                drawn["names"][int(name)],
            )
        )
    return found


def gap_name(device: str) -> str:
    """What :data:`GAP` is called where it is shown."""
    return "launch gaps" if device == "cuda" else "outside operators"


def _counted(device: str) -> str:
    return "kernels" if device == "cuda" else "operators"


def table(content: dict[str, Any], step: str) -> list[dict[str, Any]]:
    """Rows to print of one kind of step; those below half a percent are summed in the last.

    Args:
        content: what :func:`anatomy` returns.
        step: ``generator`` or ``student``.
    """
    counted = _counted(content["device"])
    printed, small = [], []
    for row in content["rows"]:
        if row["step"] != step:
            continue
        if row["share"] < _LEAST_SHARE:
            small.append(row)
            continue
        gap = row["op_class"] == GAP
        printed.append(
            {
                "network": f"{row['network']}, {row['direction']}",
                "op": gap_name(content["device"]) if gap else row["op_class"],
                counted: None if gap else f"{row['kernels']:g}",
                "us": f"{row['microseconds']:.1f}",
                "share": f"{row['share']:.1%}",
            }
        )
    if small:
        printed.append(
            {
                "network": f"{len(small)} rows below {_LEAST_SHARE:.1%}",
                counted: f"{sum(row['kernels'] for row in small):g}",
                "us": f"{sum(row['microseconds'] for row in small):.1f}",
                "share": f"{sum(row['share'] for row in small):.1%}",
            }
        )
    return printed


def summary_table(contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows to print that set engines side by side: one an engine and a kind of step.

    Args:
        contents: the ``engines`` of a result file; see :func:`dfkd_fast.profiling.profile`.
    """
    return [
        {
            "engine": content["engine"],
            "step": step["step"],
            "ms alone": f"{content['unprofiled_us'][step['step']] / 1000:.3f}",
            "ms": f"{step['window_us'] / 1000:.3f}",
            "busy": f"{step['busy']:.1%}",
            "us gaps": f"{step['gap_us']:.0f}",
            _counted(content["device"]): f"{step['kernels']:g}",
        }
        for content in contents
        for step in content["steps"]
    ]
