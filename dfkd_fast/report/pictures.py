"""Image grids and curves of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dfkd_fast.config import expand
from dfkd_fast.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_beside", "save_curves", "save_image_grid"]

_NOT_FINITE = (1.0, 0.0, 1.0)
"""Magenta: a pixel that is not finite must not look black or white."""

_COLUMNS = 3


def save_image_grid(images: Tensor, path: str | Path, *, columns: int = 8) -> Path:
    """Save a grid of images.

    Args:
        images: floating-point, (N, 3, H, W) with N >= 1, values in [-1, 1]. Other values are clipped; pixels that are
            not finite become magenta.
        path: the file; its suffix selects the format. Missing folders are created.
        columns: images per row.

    Returns:
        The path.

    Raises:
        TypeError: images is not a floating-point tensor.
        ValueError: images is not (N, 3, H, W) with N >= 1, or columns is below 1.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            f"images must be a floating-point tensor, got {getattr(images, 'dtype', type(images).__name__)}"
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be (N, 3, H, W) and not empty, got {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    from torchvision.utils import save_image

    pixels = images.detach().float().cpu() / 2 + 0.5
    broken = ~pixels.isfinite().all(dim=1, keepdim=True)
    pixels = torch.where(broken, torch.tensor(_NOT_FINITE).view(1, 3, 1, 1), pixels.nan_to_num()).clamp(0, 1)
    content = io.BytesIO()
    save_image(pixels, content, _image_format(path), nrow=columns, padding=2, pad_value=1.0)
    return write_file(path, content.getvalue())


def _image_format(path: str | Path) -> str:
    """Pillow's name of the format for the path's suffix."""
    from PIL import Image

    suffix, known = Path(path).suffix.lower(), Image.registered_extensions()
    if suffix not in known:
        raise ValueError(f"the suffix of a picture must be one such as .png or .jpg, got {str(path)!r}")
    return known[suffix]


def save_beside(pictures: Sequence[str | Path], path: str | Path, *, scale: int = 1, gap: int = 16) -> Path:
    """Save several image files side by side as one image, enlarged without smoothing.

    Args:
        pictures: the files, left to right.
        path: the PNG file. Missing folders are created.
        scale: integer factor of enlargement.
        gap: white pixels between two images.

    Returns:
        The path.

    Raises:
        ValueError: there is no image, or scale is below 1.
    """
    from PIL import Image

    if not pictures or scale < 1:
        raise ValueError(f"pictures must be at least one and scale at least 1, got {len(pictures)} and {scale}")
    opened = [Image.open(expand(picture)).convert("RGB") for picture in pictures]
    enlarged = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in opened]
    width = sum(image.width for image in enlarged) + gap * (len(enlarged) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in enlarged)), "white")
    left = 0
    for image in enlarged:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    content = io.BytesIO()
    sheet.save(content, _image_format(path))
    return write_file(path, content.getvalue())


def save_curves(rounds: Mapping[str, Sequence[float]], epochs: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Plot a run's history: one panel per loss term, and one panel for accuracy and agreement.

    Positive losses that span more than two decades have a logarithmic axis. Values that are not finite leave a gap in
    a loss; in the other panel NaN means "not measured" and the line continues.

    Args:
        rounds: ``round`` and one series of the same length per loss term.
        epochs: ``epoch`` and one series of the same length per share in [0, 1].
        path: the file; its suffix selects the format. Missing folders are created.

    Returns:
        The path.

    Raises:
        ValueError: series have different lengths, or ``round`` or ``epoch`` is missing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    _check_lengths("rounds", rounds, "round")
    _check_lengths("epochs", epochs, "epoch")
    terms = [name for name in rounds if name != "round" and len(rounds[name])]
    shares = [name for name in epochs if name != "epoch" and len(epochs[name])]
    panels = len(terms) + bool(shares)
    columns = min(_COLUMNS, max(1, panels))
    lines = max(1, math.ceil(panels / columns))
    width, height = 4.2 * columns, 2.8 * lines
    # pyplot keeps global state and may need a display. Fixed margins, because a layout engine draws everything twice.
    figure = Figure(figsize=(width, height), dpi=110)
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.2 / width, bottom=0.45 / height, top=1 - 0.3 / height, wspace=0.2, hspace=0.35
    )
    grid = [axes for line in figure.subplots(lines, columns, squeeze=False) for axes in line]
    for axes in grid:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[panels:]:
        axes.set_axis_off()
    if not panels:
        grid[0].text(0.5, 0.5, "no finished round", ha="center", va="center", transform=grid[0].transAxes)
    for axes, name in zip(grid, terms, strict=False):
        _draw_term(axes, name, np.asarray(rounds["round"], float), np.asarray(rounds[name], float))
    if shares:
        _draw_shares(grid[len(terms)], epochs, shares)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:] or None)
    return write_file(path, content.getvalue())


def _check_lengths(argument: str, series: Mapping[str, Sequence[float]], axis: str) -> None:
    if series and axis not in series:
        raise ValueError(f"{argument} must have a series {axis!r}, got {sorted(series)}")
    for name, values in series.items():
        if len(values) != len(series[axis]):
            raise ValueError(
                f"{argument}[{name!r}] must be as long as {axis!r}, got {len(values)} for {len(series[axis])}"
            )


def _clean(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, linewidth=0.4, alpha=0.5)


def _draw_term(axes: Axes, name: str, x: np.ndarray, y: np.ndarray) -> None:
    _clean(axes, name, "round")
    y = np.where(np.isfinite(y), y, np.nan)
    finite = y[np.isfinite(y)]
    color = "tab:orange" if name.startswith("generator") else "tab:blue"
    axes.plot(x, y, color=color, linewidth=1.0, marker="." if len(y) < 30 else None)
    if len(finite) and finite.min() > 0 and finite.max() > 100 * finite.min():
        axes.set_yscale("log")


def _draw_shares(axes: Axes, epochs: Mapping[str, Sequence[float]], names: Sequence[str]) -> None:
    _clean(axes, ", ".join(names), "epoch")
    x = np.asarray(epochs["epoch"], float)
    for name in names:
        y = 100 * np.asarray(epochs[name], float)
        known = np.isfinite(y)
        if known.any():
            axes.plot(x[known], y[known], label=f"{name}: {y[known][-1]:.1f} %", linewidth=1.4, marker=".")
    axes.set_ylabel("%", fontsize=8)
    axes.set_ylim(0, 101)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)
