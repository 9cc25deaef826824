"""Mean squared error between high-order attention and a target, without writing the attended features.

With the features x and the gate A of mixed high-order attention::

    error = mean of (A x - target)^2

Gradient: ``g = 2 / numel * grad_output * (A x - target)`` replaces the gradient of ``A x`` in
:mod:`dfkd_fast.kernels.high_order_attention`, which has the kernels and their launch heuristics.

Memory traffic for elements of b bytes: forward reads x and target, 2 b bytes per element; backward reads both again,
recomputes A and writes dx, 3 b bytes.
"""

from __future__ import annotations

from torch import Tensor

from dfkd_fast.kernels.high_order_attention import gradients, value

__all__ = ["backward", "forward"]


def forward(x: Tensor, proj: Tensor, out: Tensor, target: Tensor, mode: str, error: Tensor) -> None:
    """Computes the error.

    Args:
        x: (N, C, H, W), any strides.
        proj: (R(R+1)/2, K, C), order R up to 4, K hidden units, in the dtype of the matrix products.
        out: (R, C, K), same dtype as proj.
        target: Same shape as x, any strides.
        mode: "joint" or "per_order".
        error: Output, scalar, float32.
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
        grad_output: Gradient of ``error``, a scalar.
        x: As in forward.
        proj: As in forward.
        out: As in forward.
        target: As in forward.
        mode: As in forward.
        dx: Output, same shape as x; None if it is not needed.
        dproj: Output, same shape as proj, contiguous; None if it is not needed.
        dout: Output, same shape as out, contiguous; None if it is not needed.
    """
    gradients(grad_output, x, target, proj, out, mode, "error", dx, dproj, dout)
