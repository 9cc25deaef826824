"""Draws a fine-grained data set: subcategories of one bird that differ only in parts.

All birds share body, head, wing and legs. A subcategory is a word of seven attributes, one per part (``PARTS``). Six
are free; the seventh, the breast's color, is their sum modulo five. Any two of the 216 subcategories therefore differ
in at least two parts, so a leaf that covers one part does not make them equal.

All other properties of an image are nuisances (``NUISANCES``), each drawn uniformly from its range. A range consists of
sixteen strata: training images use the even ones, test images the odd ones, and the outer tenth at both ends of a
stratum is not used. No nuisance value occurs in both splits.

An image is a function of its subcategory and its nuisances. The nuisances are a function of ``(seed, split,
subcategory, index)``. ``n`` is a dictionary of an image's nuisances by name.
"""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dfkd_fast.data.synthetic.bird_parts import PARTS, parts

DRAWING_VERSION = 1
"""Increase it when the same arguments draw other pixels; it is part of the cache key."""

STRATA = 16
GUARD = 0.1

Split = Literal["train", "test"]
Points = NDArray[np.float64]
Color = tuple[float, float, float]  # hue, saturation and value, each in [0, 1]


_BLOB = {
    "x": (-1, 1),
    "y": (-1, 1),
    "radius": (0.15, 0.6),
    "hue": (0, 1),
    "saturation": (0.05, 0.6),
    "value": (0.25, 1),
}
_STICK = {"x": (-1, 1), "y": (-1, 1), "angle": (-1.5, 1.5), "width": (-0.03, 0.06), "value": (0.2, 0.7)}
_LEAF = {
    "x": (-0.85, 0.75),
    "y": (-0.75, 0.55),
    "angle": (-3.1, 3.1),
    "length": (-0.2, 0.3),
    "hue": (0.08, 0.42),
    "value": (0.3, 0.8),
}


NUISANCES: dict[str, tuple[float, float]] = {
    # Pose: lengths in units of half the image's size, angles in radians. A negative yaw turns the bird to the left.
    "yaw": (-0.62, 0.62),
    "rotation": (-0.32, 0.32),
    "shear": (-0.16, 0.16),
    "scale": (0.74, 0.94),
    "shift_x": (-0.09, 0.09),
    "shift_y": (-0.10, 0.10),
    "neck": (-0.30, 0.30),
    "wing": (-0.16, 0.16),
    "tail": (-0.28, 0.28),
    "crest": (-0.15, 0.15),
    # Plumage.
    "body_hue": (0, 1),
    "body_saturation": (0.10, 0.42),
    "body_value": (0.42, 0.70),
    "wing_value": (0.55, 0.80),
    "beak_hue": (0.05, 0.14),
    "beak_value": (0.25, 0.90),
    "patch_jitter": (-0.02, 0.02),
    # Light.
    "gain": (0.75, 1.20),
    "gamma": (0.75, 1.30),
    "warmth": (-0.10, 0.10),
    "light_angle": (-3.1, 3.1),
    "light_slope": (0.0, 0.30),
    # Background: a gradient, blurred blobs, sticks (a negative width means none), and the perch.
    "sky_hue": (0, 1),
    "sky_saturation": (0.05, 0.55),
    "sky_value": (0.40, 1.0),
    "ground_hue": (0, 1),
    "ground_saturation": (0.05, 0.55),
    "ground_value": (0.25, 0.90),
    "horizon": (-0.8, 0.8),
    **{f"blob{i}_{name}": span for i in range(4) for name, span in _BLOB.items()},
    **{f"stick{i}_{name}": span for i in range(2) for name, span in _STICK.items()},
    "perch_angle": (-0.30, 0.30),
    "perch_width": (0.04, 0.10),
    "perch_hue": (0.04, 0.13),
    "perch_value": (0.20, 0.60),
    # Occlusion: leaves in front of the bird (a length below LEAST_LEAF means none).
    **{f"leaf{i}_{name}": span for i in range(2) for name, span in _LEAF.items()},
}
LEAST_LEAF = 0.08
_LOW = np.array([low for low, _ in NUISANCES.values()], dtype=np.float64)
_SPAN = np.array([high - low for low, high in NUISANCES.values()], dtype=np.float64)


@cache
def class_words() -> tuple[tuple[int, ...], ...]:
    """The 216 subcategories as indices into the values of ``PARTS``.

    They are sorted by a hash, so that the first few already vary every part.
    """
    free = list(PARTS.values())[:-1]
    words = [(*word, sum(word) % len(PARTS["breast"])) for word in product(*(range(len(part)) for part in free))]
    return tuple(sorted(words, key=lambda word: hashlib.blake2b(bytes(word), digest_size=8).digest()))


def class_name(word: Sequence[int]) -> str:
    """A subcategory as text: ``red breast, long beak, no crest, forked tail, barred wing, plain face, pale belly``."""
    named = {part: f"{values[value]} {part}" for (part, values), value in zip(PARTS.items(), word, strict=True)}
    return ", ".join([named.pop("breast"), *named.values()])


def nuisances(seed: int, split: Split, label: int, index: int) -> NDArray[np.float64]:
    """The nuisance vector of one image.

    Args:
        seed: seed of the data set.
        split: ``train`` uses the even strata of every range, ``test`` the odd ones.
        label: index of the subcategory.
        index: index of the image within its subcategory and split.

    Returns:
        float64 values in the order of ``NUISANCES``.
    """
    odd = {"train": 0, "test": 1}[split]
    # NumPy guarantees the stream of a bit generator's raw values, but not that of its distributions.
    raw = np.random.PCG64(np.random.SeedSequence([seed, odd, label, index])).random_raw(len(NUISANCES))
    position = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 * (STRATA // 2)
    stratum = np.floor(position)
    within = GUARD + (1 - 2 * GUARD) * (position - stratum)
    return _LOW + _SPAN * (2 * stratum + odd + within) / STRATA


BREASTS: dict[str, Color] = {
    "red": (0.00, 0.85, 0.80),
    "yellow": (0.14, 0.88, 0.95),
    "blue": (0.61, 0.85, 0.82),
    "white": (0.12, 0.04, 0.98),
    "black": (0.60, 0.20, 0.07),
}


def _bytes(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(saturation, 1.0), min(value, 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


def _plumage(word: Sequence[int], n: dict[str, float]) -> dict[str, tuple[int, int, int]]:
    hue, saturation, value = n["body_hue"], n["body_saturation"], n["body_value"]
    breast = BREASTS[PARTS["breast"][word[-1]]]
    return {
        "body": _bytes(hue, saturation, value),
        "light": _bytes(hue, 0.8 * saturation, 1.12 * value),
        "shade": _bytes(hue, 1.1 * saturation, 0.88 * value),
        "wing": _bytes(hue, 1.1 * saturation, n["wing_value"] * value),
        "dark": _bytes(hue, 1.2 * saturation, 0.45 * value),
        "pale": _bytes(0.12, 0.10, 0.97),
        "bar": _bytes(0.12, 0.03, 1.0),
        "breast": _bytes(breast[0] + n["patch_jitter"], breast[1], breast[2]),
        "beak": _bytes(n["beak_hue"], 0.65, n["beak_value"]),
        "leg": _bytes(n["beak_hue"], 0.45, 0.35),
        "mask": (14, 12, 16),
        "ring": (235, 230, 220),
        "pupil": (12, 10, 10),
        "glint": (255, 255, 255),
    }


def _turn(angle: float, x: float, y: float) -> Points:
    """The affine map (2, 3) of a rotation about a point."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _after(outer: Points, inner: Points) -> Points:
    joined = outer[:, :2] @ inner
    joined[:, 2] += outer[:, 2]
    return joined


def _limbs(n: dict[str, float]) -> dict[str, Points]:
    """Affine maps (2, 3) from the coordinates of each limb to those of the image, [-1, 1]."""
    side = 1.0 if n["yaw"] >= 0 else -1.0
    # Centers the bird, whose parts extend further back and up than forward and down.
    center = np.array([[1.0, 0.0, 0.09], [0.0, 1.0, 0.13]])
    pose = np.array([[side * np.cos(n["yaw"]), n["shear"], 0.0], [0.0, 1.0, 0.0]])
    scaled = n["scale"] * _turn(n["rotation"], 0.0, 0.0)
    scaled[:, 2] = n["shift_x"], n["shift_y"]
    body = _after(scaled, _after(pose, center))
    head = _after(body, _turn(n["neck"], 0.20, -0.30))
    return {
        "body": body,
        "head": head,
        "crest": _after(head, _turn(n["crest"], 0.22, -0.50)),
        "wing": _after(body, _turn(n["wing"], 0.10, -0.10)),
        "tail": _after(body, _turn(n["tail"], -0.42, 0.0)),
    }


_GRID = 24
_AXIS = (np.arange(_GRID) + 0.5) * (2 / _GRID) - 1


def _background(n: dict[str, float], size: int) -> Image.Image:
    sky = np.array(_bytes(n["sky_hue"], n["sky_saturation"], n["sky_value"]), dtype=np.float64)
    ground = np.array(_bytes(n["ground_hue"], n["ground_saturation"], n["ground_value"]), dtype=np.float64)
    blend = 1 / (1 + np.exp(-3 * (_AXIS - n["horizon"])))
    field = np.repeat((sky + blend[:, None] * (ground - sky))[:, None], _GRID, axis=1)
    for i in range(4):
        color = _bytes(n[f"blob{i}_hue"], n[f"blob{i}_saturation"], n[f"blob{i}_value"])
        radius = n[f"blob{i}_radius"]
        across = np.exp(-(((_AXIS - n[f"blob{i}_x"]) / radius) ** 2))
        down = np.exp(-(((_AXIS - n[f"blob{i}_y"]) / radius) ** 2))
        field += (0.85 * down[:, None] * across)[..., None] * (np.array(color) - field)
    small = Image.fromarray(np.rint(field).astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def _strip(x: float, y: float, angle: float, width: float, length: float = 3.0) -> Points:
    along = length * np.array([np.cos(angle), np.sin(angle)])
    across = 0.5 * width * np.array([-np.sin(angle), np.cos(angle)])
    corners = [-along - across, along - across, along + across, across - along]
    return np.array([x, y]) + np.stack(corners)


_EDGE = np.array([[-1.0, 0.0], [-0.5, 0.36], [0.1, 0.42], [0.6, 0.25], [1.0, 0.0]])
_BLADE = np.concatenate([_EDGE, (_EDGE * (1, -1))[-2:0:-1]])
_VEIN = np.array([[-1.0, 0.0], [0.0, -0.03], [0.9, 0.0], [0.0, 0.03]])


def _leaf_outlines(x: float, y: float, angle: float, length: float) -> tuple[Points, Points]:
    """The outlines of a leaf's blade and vein."""
    turn = length * _turn(angle, 0.0, 0.0)[:, :2].T
    return _BLADE @ turn + (x, y), _VEIN @ turn + (x, y)


def _lit(image: NDArray[np.uint8], n: dict[str, float]) -> NDArray[np.uint8]:
    """Applies gain, gamma, warmth and a brightness gradient to an image (S, S, 3); returns it as (3, S, S)."""
    levels = np.linspace(0.0, 1.0, 256) ** n["gamma"]
    gains = 255 * n["gain"] * np.array([1 + n["warmth"], 1.0, 1 - n["warmth"]])
    table = (levels[:, None] * gains).astype(np.float32)
    axis = np.linspace(-1.0, 1.0, image.shape[0])
    slope = n["light_slope"]
    field = 1 + slope * (np.cos(n["light_angle"]) * axis[None, :] + np.sin(n["light_angle"]) * axis[:, None])
    light = field.astype(np.float32)
    lit = np.empty((3, *image.shape[:2]), dtype=np.uint8)
    for channel in range(3):
        values = table[:, channel][image[..., channel]] * light
        lit[channel] = np.rint(np.minimum(values, 255))
    return lit


def draw(word: Sequence[int], values: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Draw one image.

    Args:
        word: a subcategory from :func:`class_words`.
        values: a nuisance vector from :func:`nuisances`.
        size: height and width in pixels.

    Returns:
        uint8, (3, size, size).
    """
    n = dict(zip(NUISANCES, values.tolist(), strict=True))
    oversampling = 4 if size <= 64 else 3 if size <= 128 else 2
    large = size * oversampling
    canvas = _background(n, large)
    pen = ImageDraw.Draw(canvas)

    def fill(outline: Points, color: tuple[int, int, int]) -> None:
        # Corners are rounded to 1/4 pixel of the canvas, so that the last bit of a sine does not change the image.
        pen.polygon((np.rint((outline + 1) * (2 * large)) * 0.25).ravel().tolist(), fill=color)

    for i in range(2):
        if n[f"stick{i}_width"] > 0:
            stick = _strip(*(n[f"stick{i}_{name}"] for name in ("x", "y", "angle", "width")))
            fill(stick, _bytes(0.09, 0.3, n[f"stick{i}_value"]))
    limbs = _limbs(n)
    feet = limbs["body"] @ np.array([0.09, 0.64, 1.0])
    fill(_strip(feet[0], feet[1], n["perch_angle"], n["perch_width"]), _bytes(n["perch_hue"], 0.45, n["perch_value"]))
    colors = _plumage(word, n)
    for part in parts(tuple(word)):
        frame = limbs[part.limb]
        fill(part.outline @ frame[:, :2].T + frame[:, 2], colors[part.role])
    for i in range(2):
        if n[f"leaf{i}_length"] > LEAST_LEAF:
            blade, vein = _leaf_outlines(*(n[f"leaf{i}_{name}"] for name in ("x", "y", "angle", "length")))
            fill(blade, _bytes(n[f"leaf{i}_hue"], 0.65, n[f"leaf{i}_value"]))
            fill(vein, _bytes(n[f"leaf{i}_hue"], 0.55, 0.75 * n[f"leaf{i}_value"]))
    return _lit(np.asarray(canvas.reduce(oversampling)), n)
