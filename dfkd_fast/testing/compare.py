"""Comparisons that name the worst element, and tolerances that follow from a dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["assert_close", "assert_no_worse", "describe_difference", "unit_roundoff"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest: half of ``torch.finfo(dtype).eps``."""
    return torch.finfo(dtype).eps / 2


def assert_close(
    actual: Tensor, expected: Tensor | float, *, atol: float | Tensor, rtol: float = 0.0, name: str = "value"
) -> None:
    """Every element within ``atol + rtol |expected|`` of the expected one, compared in float64.

    NaN matches NaN and an infinity matches the same infinity; dtypes may differ, shapes may not.

    Args:
        actual: what came.
        expected: the expected values; every element must be a number.
        atol: absolute tolerance, one for all or a tensor with one an element (an error bound worked out elementwise).
        rtol: relative tolerance.
        name: of the quantity, for the message.

    Raises:
        AssertionError: with the worst element's index, both values and its allowance, how many are off, and where NaN
            stands on one side alone.
    """
    difference = describe_difference(actual, expected, atol=atol, rtol=rtol, name=name)
    if difference:
        raise AssertionError(difference)


def describe_difference(
    actual: Tensor, expected: Tensor | float, *, atol: float | Tensor, rtol: float = 0.0, name: str = "value"
) -> str:
    """What :func:`assert_close` would say; empty where it would be content."""
    if not isinstance(expected, Tensor):
        expected = torch.full_like(actual, expected, dtype=torch.float64)
    if actual.shape != expected.shape:
        return f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return ""
    a, b = (t.detach().to("cpu", torch.float64) for t in (actual, expected))
    allowed = torch.as_tensor(atol, dtype=torch.float64).detach().cpu() + rtol * b.abs()
    error = (a - b).abs()
    close = a.isfinite() & b.isfinite() & (error <= allowed)
    off = ~(close | (a == b) | (a.isnan() & b.isnan()))
    if not off.any():
        return ""
    lines = [f"{name}: {int(off.sum())} of {off.numel()} elements differ"]
    numbers = off & ~(a.isnan() | b.isnan())
    if numbers.any():
        excess = torch.where(numbers, (error - allowed).nan_to_num(nan=torch.inf), -torch.inf)
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), off.shape))
        values = f"{float(a[at])!r}, expected {float(b[at])!r}"
        lines.append(
            f"worst at {at}: {values}, off by {float(error[at]):.3e}, allowed {float(allowed.expand_as(b)[at]):.3e}"
        )
    for side, mask in (("actual", a.isnan() & ~b.isnan()), ("expected", b.isnan() & ~a.isnan())):
        if mask.any():
            places = [tuple(place) for place in mask.nonzero()[:5].tolist()]
            more = f" and {int(mask.sum()) - 5} more" if mask.sum() > 5 else ""
            lines.append(f"NaN in {side} alone at {', '.join(map(str, places))}{more}")
    return "; ".join(lines)


def assert_no_worse(
    actual: Tensor, *, than: Tensor, truth: Tensor, factor: float = 2.0, floor: float = 0.0, name: str = "value"
) -> float:
    """The error of ``actual`` against the truth is at most ``factor`` times that of a plain computation in its dtype.

    This is how a kernel's tolerance is derived rather than guessed. The error is the root mean square and the maximum
    over all elements; both must hold.

    Args:
        actual: the kernel's result.
        than: what plain PyTorch gives in the same dtype.
        truth: what it gives in float64.
        factor: how many times worse is still right.
        floor: an absolute error that is always allowed, for quantities on which the plain computation is exact by luck.
        name: of the quantity, for the message.

    Returns:
        The root mean square error of ``actual`` over that of ``than``; 0 where both are exact.

    Raises:
        AssertionError: it is worse; the message has both errors and the worst element.
    """
    for tensor, which in ((actual, "actual"), (than, "than")):
        if tensor.shape != truth.shape:
            raise AssertionError(f"{name}: shape of {which} {tuple(tensor.shape)}, expected {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    t = truth.detach().double()
    mine, plain = ((tensor.detach().double() - t).abs() for tensor in (actual, than))
    mean_mine, mean_plain = (float(error.square().mean().sqrt()) for error in (mine, plain))
    for measure, a, b in (
        ("root mean square", mean_mine, mean_plain),
        ("largest", float(mine.max()), float(plain.max())),
    ):
        # Not written as a > b: NaN must fail.
        if not a <= factor * b + floor:
            worst = tuple(int(i) for i in torch.unravel_index(mine.nan_to_num(nan=torch.inf).argmax(), mine.shape))
            raise AssertionError(
                f"{name}: {measure} error {a:.3e} against {b:.3e} of the plain computation, allowed "
                f"{factor} times that; worst at {worst}: {float(actual[worst])!r}, truth {float(t[worst])!r}"
            )
    if mean_plain == 0:
        return 0.0 if mean_mine == 0 else math.inf
    return mean_mine / mean_plain
