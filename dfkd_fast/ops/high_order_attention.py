"""Mixed high-order attention: the gated features and the gate."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_tensor
from dfkd_fast.ops.custom_op import empty_map_like, fused_op, matmul_dtype, unsupported_reason
from dfkd_fast.ops.extension import aligned, as_rows, filled_as_rows, or_empty, unsupported_by_extension
from dfkd_fast.reference import high_order_attention as reference

__all__ = [
    "high_order_attention",
    "high_order_attention_map",
    "new_gradient",
    "product_weights",
    "require_arguments",
    "unsupported_order",
]

_MODES, _RESULTS = ("joint", "per_order"), ("features", "map")  # the index of each is its code in csrc/launchers.h


def _allocate(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str, result: str) -> Tensor:
    """Allocate the gated features or the gate. Backward recomputes the products from x."""
    return empty_map_like(x, preserve=result == "features")


def new_gradient(tensor: Tensor) -> Tensor:
    """Allocate a gradient: with the strides of the tensor if it holds maps, contiguous if it is a weight."""
    return torch.empty_like(tensor) if tensor.ndim == 4 else tensor.new_empty(tensor.shape)


def _cuda_forward(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str, result: str, y: Tensor) -> None:
    codes = _MODES.index(mode), _RESULTS.index(result)
    with filled_as_rows(y) as rows:
        torch.ops.dfkd_fast_cuda.high_order_attention(
            as_rows(x), aligned(proj_weight), aligned(out_weight), *codes, rows
        )


def _cuda_backward(*arguments: Any) -> None:
    grad_output, x, proj_weight, out_weight, mode, result, *gradients = arguments
    inputs = (as_rows(grad_output), as_rows(x), aligned(proj_weight), aligned(out_weight))
    dx, *weights = or_empty(x, *gradients)
    with filled_as_rows(dx) as rows:
        torch.ops.dfkd_fast_cuda.high_order_attention_backward(
            *inputs, _MODES.index(mode), _RESULTS.index(result), rows, *weights
        )


_fused = fused_op(
    "high_order_attention",
    _allocate,
    new_gradient=new_gradient,
    triton=("high_order_attention.forward", "high_order_attention.backward"),
    cuda=(_cuda_forward, _cuda_backward),
)


def product_weights(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Cast weights to the dtype of the matrix products, as the reference does."""
    return tuple(weight.to(x.dtype).to(matmul_dtype(x)) for weight in weights)


def unsupported_order(out_weight: Tensor) -> str | None:
    """Return why the kernels do not support the order, or None if they do."""
    order = out_weight.shape[0]
    return None if order <= 4 else f"its kernels support orders up to 4, not {order}"


def _run(backend: str, result: str, x: Tensor, *weights: Tensor, mode: str) -> Tensor:
    return _fused[backend](x, *product_weights(x, *weights), mode, result)


def _unsupported_by_cuda(x: Tensor, proj_weight: Tensor, out_weight: Tensor, *, mode: str) -> str | None:
    samples, channels, height, width = x.shape
    order, _, hidden = out_weight.shape
    sizes = {"positions": samples * height * width, "channels": channels, "hidden": hidden, "order": order}
    return unsupported_by_extension("high_order_attention", x, matmul_dtype(x), mode=mode, **sizes)


register("high_order_attention", "reference", reference.high_order_attention)
register("high_order_attention_map", "reference", reference.high_order_attention_map)
for _op, _result in (("high_order_attention", "features"), ("high_order_attention_map", "map")):
    register(
        _op,
        "triton",
        partial(_run, "triton", _result),
        lambda x, _, out, **__: unsupported_reason(x) or unsupported_order(out),
    )
    register(_op, "cuda", partial(_run, "cuda", _result), _unsupported_by_cuda)


def high_order_attention(
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    *,
    mode: Literal["joint", "per_order"] = "joint",
    backend: str | None = None,
) -> Tensor:
    """Apply mixed high-order attention, ``y = A * x`` (paper, section 4.2; Chen et al., ICCV 2019).

    Order r = 1..R multiplies r linear maps from C to K channels. The gate A is a sigmoid of the rectified products::

        z_r = prod over i = 1..r of proj_{r,i} x           l_r = out_r relu(z_r)
        A   = sigmoid(sum over r of l_r)                    "joint" (the paper's figure 3)
        A   = mean over r of sigmoid(l_r)                   "per_order" (Chen et al.)

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        proj_weight: proj_{r,i} in the order (1, 1), (2, 1), (2, 2), (3, 1), ...; (R(R+1)/2, K, C), any floating dtype.
        out_weight: out_r; (R, C, K), any floating dtype.
        mode: "joint" or "per_order".
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        y, (N, C, H, W), with the dtype and memory format of x. The matrix products run in the autocast dtype, or that
        of x without autocast; the products over i and the sigmoid in float32 (float64 if x is). Differentiable with
        respect to all three tensors.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor.
        ValueError: shapes or devices do not match, or mode or backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_arguments(x, proj_weight, out_weight, mode)
    return dispatch("high_order_attention", backend, x, proj_weight, out_weight, mode=mode)


def high_order_attention_map(
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    *,
    mode: Literal["joint", "per_order"] = "joint",
    backend: str | None = None,
) -> Tensor:
    """Compute the gate A of :func:`high_order_attention`, where R and K are defined (paper, section 4.2).

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        proj_weight: (R(R+1)/2, K, C), any floating dtype.
        out_weight: (R, C, K), any floating dtype.
        mode: "joint" or "per_order", as in :func:`high_order_attention`.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A, (N, C, H, W), in [0, 1], with the dtype and memory format of x. Differentiable with respect to all tensors.

    Raises:
        TypeError: a tensor argument is not a floating-point tensor.
        ValueError: shapes or devices do not match, or mode or backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_arguments(x, proj_weight, out_weight, mode)
    return dispatch("high_order_attention_map", backend, x, proj_weight, out_weight, mode=mode)


def require_arguments(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str) -> None:
    """Check the arguments that all forms of the op share; raises the errors of :func:`high_order_attention`."""
    require_tensor("x", x, ("N", "C", "H", "W"))
    require_tensor("out_weight", out_weight, ("R", "C", "K"), ("x", x), C=x.shape[1])
    order, _, hidden = out_weight.shape
    require_tensor(
        "proj_weight",
        proj_weight,
        ("R(R+1)/2", "K", "C"),
        ("x", x),
        **{"R(R+1)/2": order * (order + 1) // 2, "K": hidden, "C": x.shape[1]},
    )
    require_choice("mode", mode, ("joint", "per_order"))
