"""The parts of a bird: filled outlines from back to front. Some of them belong only to certain subcategories.

In the coordinates of a limb, x points toward the beak and y down. The body is about one unit long and centered at 0.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PARTS", "Part", "parts"]

PARTS: dict[str, tuple[str, ...]] = {
    "beak": ("short", "long", "heavy"),
    "crest": ("no", "upright", "swept"),
    "tail": ("square", "forked", "long"),
    "wing": ("plain", "barred"),
    "face": ("plain", "masked"),
    "belly": ("plain", "pale"),
    "breast": ("red", "yellow", "blue", "white", "black"),
}
"""The attributes of subcategories and their values."""


class Part(NamedTuple):
    """A filled outline.

    Args:
        limb: the limb that it moves with: body, head, crest, wing or tail.
        role: name of its color.
        outline: corners, (n, 2).
        condition: the attribute and value that a bird must have; None for all birds.
    """

    limb: str
    role: str
    outline: NDArray[np.float64]
    condition: tuple[str, str] | None = None


def _sharp(corners: str) -> NDArray[np.float64]:
    """The polygon through the points ``x y, x y, ...``."""
    return np.array([[float(number) for number in corner.split()] for corner in corners.split(",")])


def _smooth(corners: str, steps: int = 6) -> NDArray[np.float64]:
    """The closed Catmull-Rom curve through the points ``x y, x y, ...``."""
    points = _sharp(corners)
    t = np.arange(steps)[:, None] / steps
    before, start, end, after = (np.roll(points, shift, axis=0)[:, None] for shift in (1, 0, -1, -2))
    curve = (
        2 * start
        + (end - before) * t
        + (2 * before - 5 * start + 4 * end - after) * t**2
        + (3 * start - before - 3 * end + after) * t**3
    )
    return 0.5 * curve.reshape(-1, 2)


def _disc(x: float, y: float, radius: float) -> NDArray[np.float64]:
    angle = np.arange(20) * (2 * np.pi / 20)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


_BACK_TO_FRONT = (
    Part("body", "leg", _sharp("-.02 .28, .03 .28, .05 .62, .02 .62")),
    Part("body", "leg", _sharp(".12 .26, .17 .26, .17 .62, .14 .62")),
    Part("tail", "wing", _sharp("-.40 -.12, -.80 -.06, -.75 .20, -.38 .14"), ("tail", "square")),
    Part("tail", "wing", _sharp("-.40 -.12, -1.0 -.18, -.66 .06, -.90 .36, -.38 .16"), ("tail", "forked")),
    Part(
        "tail",
        "wing",
        _smooth("-.38 -.08, -.78 .02, -1.10 .14, -1.14 .22, -1.04 .24, -.72 .16, -.38 .10"),
        ("tail", "long"),
    ),
    Part(
        "crest",
        "dark",
        _sharp(".08 -.50, .02 -.80, .16 -.70, .22 -.95, .30 -.71, .41 -.82, .40 -.54"),
        ("crest", "upright"),
    ),
    Part(
        "crest",
        "dark",
        _smooth(".34 -.60, .12 -.68, -.14 -.70, -.36 -.62, -.12 -.56, .08 -.40, .22 -.46"),
        ("crest", "swept"),
    ),
    Part(
        "body",
        "body",
        _smooth(
            ".42 -.26, .47 -.02, .34 .23, .04 .34, -.26 .25, -.50 .08, -.48 -.10, -.16 -.24, .06 -.40, .26 -.44",
        ),
    ),
    Part("body", "shade", _smooth(".30 .18, .03 .30, -.30 .19, -.44 .04, -.1 .14, .2 .06")),
    Part(
        "body",
        "pale",
        _smooth(".36 .17, .26 .28, .02 .33, -.26 .25, -.38 .15, -.06 .14, .2 .1"),
        ("belly", "pale"),
    ),
    Part("body", "breast", _smooth(".44 -.22, .47 -.02, .38 .16, .27 .13, .20 -.04, .26 -.20")),
    Part("head", "beak", _sharp(".44 -.46, .53 -.43, .64 -.375, .53 -.355, .44 -.34"), ("beak", "short")),
    Part("head", "beak", _sharp(".44 -.46, .53 -.44, .95 -.345, .53 -.355, .44 -.34"), ("beak", "long")),
    Part("head", "beak", _smooth(".38 -.56, .58 -.54, .76 -.40, .75 -.23, .64 -.27, .42 -.26"), ("beak", "heavy")),
    Part("head", "body", _smooth(".50 -.42, .43 -.55, .27 -.62, .11 -.54, .07 -.38, .17 -.25, .36 -.22, .48 -.30")),
    Part("head", "light", _smooth(".40 -.53, .27 -.585, .14 -.53, .12 -.44, .28 -.49")),
    Part("head", "mask", _smooth(".51 -.44, .50 -.35, .32 -.34, .09 -.36, .08 -.45, .30 -.50"), ("face", "masked")),
    Part("head", "ring", _disc(0.345, -0.425, 0.045)),
    Part("head", "pupil", _disc(0.35, -0.425, 0.032)),
    Part("head", "glint", _disc(0.36, -0.437, 0.010)),
    Part("wing", "wing", _smooth(".19 -.12, .13 .08, -.10 .16, -.40 .14, -.68 .10, -.46 -.06, -.12 -.21, .08 -.22")),
    Part("wing", "dark", _sharp("-.16 .10, -.40 .085, -.64 .095, -.40 .115")),
    Part("wing", "dark", _sharp("-.14 .03, -.38 .025, -.58 .05, -.38 .05")),
    Part("wing", "body", _smooth(".14 -.12, .09 .0, -.04 -.05, -.22 -.10, -.08 -.18, .08 -.19")),
    Part("wing", "bar", _smooth("-.02 -.19, .06 -.10, .0 .12, -.13 .145, -.12 -.02"), ("wing", "barred")),
)


@cache
def parts(word: tuple[int, ...]) -> tuple[Part, ...]:
    """The parts of a subcategory, back to front; ``word`` has one index per attribute in ``PARTS``."""
    has = {(attribute, values[index]) for (attribute, values), index in zip(PARTS.items(), word, strict=True)}
    return tuple(part for part in _BACK_TO_FRONT if part.condition is None or part.condition in has)
