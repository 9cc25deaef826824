"""What a line of a module's ``COVERAGE`` says."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Case"]


class Case(NamedTuple):
    """One way to call a drop-in, and what computes it.

    Attributes:
        name: the function or class.
        case: the arguments meant, in words.
        op: the function of :mod:`dfkd_fast.ops` behind it; None for plain PyTorch.
    """

    name: str
    case: str
    op: str | None
