"""Argument checks of the public ops. They run before any computation and do not synchronize the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["require_choice", "require_number", "require_tensor"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_tensor(
    name: str, value: object, layout: tuple[str, ...], like: tuple[str, Tensor] | None = None, **sizes: int
) -> Tensor:
    """Check that an argument is a floating-point tensor with the given shape and device.

    Args:
        name: name of the argument, for the message.
        value: the argument.
        layout: the name of each dimension. A final ``...`` stands for any number of further dimensions. Only N and the
            dimensions that ``...`` stands for may be 0.
        like: name and value of a tensor that must be on the same device.
        **sizes: required sizes of named dimensions.

    Returns:
        The argument.

    Raises:
        TypeError: the argument is not a dense tensor of dtype float16, bfloat16, float32 or float64.
        ValueError: the shape or the device is wrong.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {value.layout}; use to_dense()")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be of dtype float16, bfloat16, float32 or float64, got {value.dtype}")
    open_ended = layout[-1] == "..."
    named = layout[:-1] if open_ended else layout
    fits = value.ndim >= len(named) if open_ended else value.ndim == len(named)
    if fits:
        for label, size in zip(named, value.shape, strict=False):
            if size != sizes.get(label, size) or (size == 0 and label != "N"):
                fits = False
    if not fits:
        known = ", ".join(f"{label} = {size}" for label, size in sizes.items() if label in named)
        raise ValueError(
            f"{name} must have shape ({', '.join(layout)}){f' with {known}' if known else ''}"
            f"{', where only N may be 0' if 0 in value.shape else ''}, got {tuple(value.shape)}"
        )
    if like is not None and value.device != like[1].device:
        raise ValueError(f"{name} must be on the device of {like[0]}, {like[1].device}, got {value.device}")
    return value


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that an argument is one of the given strings.

    Raises:
        ValueError: the argument is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices[:-1])
        raise ValueError(f"{name} must be {listed} or {choices[-1]!r}, got {value!r}")


def require_number(name: str, value: object, *, above: float | None = None) -> None:
    """Check that an argument is a finite Python number.

    Raises:
        TypeError: the argument is not an int or a float.
        ValueError: the argument is not finite, or not greater than ``above``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    low = float("-inf") if above is None else above
    # NaN fails this comparison too. PyTorch cannot convert larger integers.
    if not (low < value < float("inf")) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError(f"{name} must be a finite number{'' if above is None else f' above {above}'}, got {value}")
