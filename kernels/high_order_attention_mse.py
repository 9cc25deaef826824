"""Mean squared error of attended features to a target, without writing the attended features.

The mean over all elements of ``(A x - target)^2``, with A the gate of mixed high-order attention. With s the upstream
gradient times 2 / numel, ``g = s (A x - target)`` takes the place of the gradient of ``A x``; from there on the
gradients are those of :mod:`dfkd_fast.kernels.high_order_attention`, whose kernels these are.

Memory traffic: forward reads x and target; backward reads both again, computes A anew and writes dx.
"""

from __future__ import annotations

from torch import Tensor

from dfkd_fast.kernels.high_order_attention import gradients, value

__all__ = ["backward", "forward"]


def forward(x: Tensor, proj: Tensor, out: Tensor, target: Tensor, mode: str, error: Tensor) -> None:
    """The error.

    Args:
        x: (N, C, H, W), any strides.
        proj: (R(R+1)/2, K, C), R up to 4, in the type of the matrix products.
        out: (R, C, K) in the same.
        target: of the shape of x, any strides.
        mode: as the op's.
        error: a float32 scalar.
    """
    value(x, target, proj, out, mode, "error", error)


def backward(
    grad_output: Tensor,
    x: Tensor,
    proj: Tensor,
    out: Tensor,
    target: Tensor,
    mode: str,
    dx: Tensor | None,
    dproj: Tensor | None,
    dout: Tensor | None,
) -> None:
    """Gradients of :func:`forward`.

    Args:
        grad_output: gradient of ``error``.
        x: as in forward, like all up to ``mode``.
        proj: (R(R+1)/2, K, C).
        out: (R, C, K).
        target: of the shape of x.
        mode: the op's.
        dx: of the shape of x; None if it is not needed.
        dproj: of the shape of proj, contiguous, or None.
        dout: of the shape of out, contiguous, or None.
    """
    gradients(grad_output, x, target, proj, out, mode, "error", dx, dproj, dout)
