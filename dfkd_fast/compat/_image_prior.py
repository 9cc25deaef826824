"""Total variation of images, to their neighbours in four directions. No op has it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["differences"]


def differences(images: Tensor) -> tuple[Tensor, ...]:
    """(N, C, H, W) to the differences right, down and along both diagonals."""
    return (
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, :] - images[:, :, :-1, :],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
    )
