"""The anatomy of a step as a picture, from a result file alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_fast.profiling.anatomy import events_of, gap_name
from dfkd_fast.profiling.classes import GAP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_anatomy"]

# Okabe and Ito's palette, which is told apart with every kind of colour vision; time in which nothing runs is white.
_NETWORKS = {
    "generator": "#0072B2",
    "teacher": "#E69F00",
    "student": "#009E73",
    "objective": "#CC79A7",
    "optimizer": "#56B4E9",
    "loop": "#999999",
    "unknown": "#000000",
}
_CLASSES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_OTHER = "other"
_REST = "#999999"
_LABELLED = 0.06  # share of the longest bar from which a segment carries its share as text
_DETAIL = 40  # activities that the enlarged part of a step shows, of the engine that has most


def save_anatomy(content: dict[str, Any], path: str | Path) -> Path:
    """Draw stacked bars of each kind of step, by network and by class of op, and one step of each on a line of time.

    Args:
        content: what :func:`dfkd_fast.profiling.profile` wrote into ``anatomy.json``.
        path: where to; the suffix names the format. Missing folders are made.

    Returns:
        The path written.

    Raises:
        ValueError: no engine in the content.
    """
    from matplotlib.figure import Figure

    engines = content["engines"]
    if not engines:
        raise ValueError("the content must hold at least one engine")
    kinds = list(dict.fromkeys(step["step"] for each in engines for step in each["steps"]))
    heights = [0.62 + 0.42 * len(engines)] * (2 * len(kinds)) + [0.62] * (len(engines) * len(kinds))
    # A Figure of its own, not pyplot: no state outside this call, and no display is needed.
    figure = Figure(figsize=(10, 0.6 + sum(heights)), layout="constrained", dpi=120)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(7, 3))
    device = content["environment"]["device"]["name"]
    where = content["environment"]["cpu"] if device == "cpu" else device
    networks = f"{content['networks']['teacher']} to {content['networks']['student']}"
    figure.suptitle(
        f"{networks}, batch {content['batch']}, {content['image_size']} px, {content['precision']}, {where}",
        fontsize=10,
    )
    row = 0
    for by, colors in (("network", _NETWORKS), ("op_class", _class_colors(engines))):
        first = figure.add_subplot(grid[row, :])
        shown = set()
        for place, kind in enumerate(kinds):
            axes = figure.add_subplot(grid[row + place, :]) if place else first
            shown |= _bars(axes, engines, kind, by, colors)
        _legend(first, [name for name in _order(engines, colors) if name in shown], colors)
        row += len(kinds)
    for kind in kinds:
        longest = max(step["window_us"] for each in engines for step in each["steps"] if step["step"] == kind)
        most = max(len(each["timeline"].get(kind, {"events": ()})["events"]) for each in engines)
        detail = longest * _DETAIL / max(most, _DETAIL)
        for each in engines:
            _strip(figure.add_subplot(grid[row, 0]), each, kind, (0.0, 1.02 * longest), "ms")
            middle = next((step["window_us"] / 2 for step in each["steps"] if step["step"] == kind), 0.0)
            _strip(figure.add_subplot(grid[row, 1]), each, kind, (middle, middle + detail), "us")
            row += 1
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _order(engines: list[dict[str, Any]], colors: dict[str, str]) -> list[str]:
    return [*colors, _OTHER, *dict.fromkeys(gap_name(each["device"]) for each in engines)]


def _legend(axes: Axes, names: list[str], colors: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="white", edgecolor="black", linewidth=0.5, hatch="////", label=name)
        if name not in colors and name != _OTHER
        else Patch(facecolor=colors.get(name, _REST), label=name)
        for name in names
    ]
    axes.legend(
        handles=handles, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.1), borderaxespad=0.0
    )


def _class_colors(engines: list[dict[str, Any]]) -> dict[str, str]:
    """Colours for the classes that take most time over all engines, each engine counting alike; the rest share one."""
    total: dict[str, float] = defaultdict(float)
    for each in engines:
        for row in each["rows"]:
            if row["op_class"] != GAP:
                total[row["op_class"]] += row["share"]
    largest = sorted(total, key=lambda name: -total[name])[: len(_CLASSES)]
    return dict(zip(largest, _CLASSES, strict=False))


def _bars(axes: Axes, engines: list[dict[str, Any]], kind: str, by: str, colors: dict[str, str]) -> set[str]:
    """One bar an engine; what is drawn in it."""
    totals = [sum(row["microseconds"] for row in each["rows"] if row["step"] == kind) for each in engines]
    longest = max(totals)
    shown: set[str] = set()
    for place, each in enumerate(engines):
        nothing = gap_name(each["device"])
        parts: dict[str, float] = defaultdict(float)
        for row in each["rows"]:
            if row["step"] == kind:
                label = nothing if row["op_class"] == GAP else row[by] if row[by] in colors else _OTHER
                parts[label] += row["microseconds"]
        left = 0.0
        for label in sorted(parts, key=_order(engines, colors).index):
            spent = parts[label]
            axes.barh(
                place,
                spent / 1000,
                left=left / 1000,
                height=0.72,
                color="white" if label == nothing else colors.get(label, _REST),
                edgecolor="black" if label == nothing else "white",
                linewidth=0.5,
                hatch="////" if label == nothing else None,
            )
            if spent > _LABELLED * longest:
                share = f"{spent / totals[place]:.0%}"
                text = axes.text((left + spent / 2) / 1000, place, share, ha="center", va="center", fontsize=7)
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})
            left += spent
        shown |= parts.keys()
    axes.set_yticks(range(len(engines)), [each["engine"] for each in engines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * longest / 1000)
    axes.set_title(f"{kind} step by {'network' if by == 'network' else 'op'}, ms", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return shown


def _strip(axes: Axes, content: dict[str, Any], kind: str, limits: tuple[float, float], unit: str) -> None:
    """A step's activities side by side, coloured by network; where it is white inside of the frame nothing ran.

    Args:
        axes: to draw on.
        content: of one engine.
        kind: of step.
        limits: what part of the step is shown, in microseconds.
        unit: of the axis, ``ms`` or ``us``; in microseconds it begins at 0.
    """
    drawn = content["timeline"].get(kind)
    start, scale = (limits[0], 1.0) if unit == "us" else (0.0, 1000.0)
    axes.set_yticks([])
    axes.set_xlim((limits[0] - start) / scale, (limits[1] - start) / scale)
    axes.set_ylim(0, 1)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    title = f"{content['engine']}: one {kind} step, ms" if unit == "ms" else "from its middle on, us"
    axes.set_title(title, fontsize=8, loc="left")
    if drawn is None:
        return
    bars: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for begin, duration, network, _, _ in events_of(drawn):
        if begin < limits[1] and begin + duration > limits[0]:
            bars[network].append(((begin - start) / scale, duration / scale))
    window = next(step["window_us"] for step in content["steps"] if step["step"] == kind)
    axes.broken_barh([(-start / scale, window / scale)], (0, 1), facecolors="none", edgecolors="black", linewidth=0.8)
    for network, ranges in bars.items():
        axes.broken_barh(ranges, (0, 1), facecolors=_NETWORKS.get(network, _REST), linewidth=0)
