"""Comparisons that report the worst element, and tolerances derived from dtypes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["assert_close", "assert_no_worse", "describe_difference", "unit_roundoff"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to ``dtype``: half of ``torch.finfo(dtype).eps``.

    Raises:
        TypeError: dtype is not a floating-point dtype.
    """
    return torch.finfo(dtype).eps / 2


def assert_close(
    actual: Tensor, expected: Tensor | float, *, atol: float | Tensor, rtol: float = 0.0, name: str = "value"
) -> None:
    """Assert that every element is within ``atol + rtol |expected|`` of its expected value, in float64.

    NaN matches NaN, and an infinity matches the same infinity. Dtypes may differ.

    Args:
        actual: the values to check, any shape and dtype.
        expected: the expected values, with the same shape, or one number for all elements.
        atol: absolute tolerance, one for all elements or a tensor that broadcasts to them.
        rtol: relative tolerance.
        name: name of the quantity, for the message.

    Raises:
        AssertionError: an element or the shape differs. The message states the number of differing elements, the worst
            one with both values and its tolerance, and the positions of unmatched NaN.
    """
    difference = describe_difference(actual, expected, atol=atol, rtol=rtol, name=name)
    if difference:
        raise AssertionError(difference)


def describe_difference(
    actual: Tensor, expected: Tensor | float, *, atol: float | Tensor, rtol: float = 0.0, name: str = "value"
) -> str:
    """Return the error message of :func:`assert_close`, which takes the same arguments; empty if it would pass."""
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
    comparable = off & ~(a.isnan() | b.isnan())
    if comparable.any():
        excess = torch.where(comparable, (error - allowed).nan_to_num(nan=torch.inf), -torch.inf)
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), off.shape))
        values = f"{float(a[at])!r}, expected {float(b[at])!r}"
        lines.append(
            f"worst at {at}: {values}, off by {float(error[at]):.3e}, allowed {float(allowed.expand_as(b)[at]):.3e}"
        )
    for side, mask in (("actual", a.isnan() & ~b.isnan()), ("expected", b.isnan() & ~a.isnan())):
        if mask.any():
            places = [tuple(place) for place in mask.nonzero()[:5].tolist()]
            more = f" and {int(mask.sum()) - 5} more" if mask.sum() > 5 else ""
            lines.append(f"NaN only in {side} at {', '.join(map(str, places))}{more}")
    return "; ".join(lines)


def assert_no_worse(
    actual: Tensor, *, than: Tensor, truth: Tensor, factor: float = 2.0, floor: float = 0.0, name: str = "value"
) -> float:
    """Assert that the error of ``actual`` is at most ``factor`` times the error of plain PyTorch in the same dtype.

    This derives a kernel's tolerance instead of guessing it. Both the root mean square error and the largest error over
    all elements must be within this bound.

    Args:
        actual: the kernel's result, any shape and dtype.
        than: PyTorch's result in the same dtype, with the same shape.
        truth: PyTorch's result in float64, with the same shape.
        factor: allowed ratio of errors.
        floor: absolute error that is always allowed, because PyTorch may be exact by chance.
        name: name of the quantity, for the message.

    Returns:
        The root mean square error of ``actual`` divided by that of ``than``; 0 if both are exact.

    Raises:
        AssertionError: an error is larger than allowed, or shapes differ.
    """
    for tensor, which in ((actual, "actual"), (than, "than")):
        if tensor.shape != truth.shape:
            raise AssertionError(f"{name}: shape of {which} {tuple(tensor.shape)}, expected {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    t = truth.detach().double()
    error, plain = ((tensor.detach().double() - t).abs() for tensor in (actual, than))
    rms, plain_rms = (float(e.square().mean().sqrt()) for e in (error, plain))
    for measure, a, b in (
        ("root mean square", rms, plain_rms),
        ("largest", float(error.max()), float(plain.max())),
    ):
        # NaN fails this comparison.
        if not a <= factor * b + floor:
            worst = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(nan=torch.inf).argmax(), error.shape))
            raise AssertionError(
                f"{name}: {measure} error {a:.3e} is more than {factor} times that of plain PyTorch, {b:.3e}; "
                f"worst at {worst}: {float(actual[worst])!r}, truth {float(t[worst])!r}"
            )
    if plain_rms == 0:
        return 0.0 if rms == 0 else math.inf
    return rms / plain_rms
