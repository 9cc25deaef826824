"""Mixed high-order attention: the public function and the map alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_tensor
from dfkd_fast.ops.extension import aligned, as_rows, filled_as_rows, unserved_by_extension
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import high_order_attention as reference

__all__ = [
    "allocate_gradients",
    "high_order_attention",
    "high_order_attention_map",
    "product_weights",
    "require_arguments",
    "unserved_order",
]


def _allocate(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str, result: str) -> Tensor:
    _, channels, height, width = x.shape
    if x.stride(1) == 1 and channels != 1 and height * width != 1:
        return torch.empty_like(x, memory_format=torch.channels_last)
    if result == "map" or x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x)


def _launch(x: Tensor, *arguments: Any) -> None:
    from dfkd_fast.kernels import high_order_attention as kernels

    kernels.value(x, x, *arguments)


def allocate_gradients(
    x: Tensor, proj_weight: Tensor, out_weight: Tensor, want_x: bool, want_proj: bool, want_out: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to be filled, empty where they are not wanted."""
    return (
        torch.empty_like(x) if want_x else x.new_empty(0),
        proj_weight.new_empty(proj_weight.shape if want_proj else 0),
        out_weight.new_empty(out_weight.shape if want_out else 0),
    )


def _allocate_backward(
    upstream: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    mode: str,
    result: str,
    want_x: bool,
    want_proj: bool,
    want_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return allocate_gradients(x, proj_weight, out_weight, want_x, want_proj, want_out)


def _launch_backward(upstream: Tensor, x: Tensor, *arguments: Any) -> None:
    from dfkd_fast.kernels import high_order_attention as kernels

    proj_weight, out_weight, mode, result, *wanted, dx, dproj, dout = arguments
    kernels.gradients(x, x, upstream, proj_weight, out_weight, mode, result, tuple(wanted), dx, dproj, dout)


_forward = operator(
    "high_order_attention(Tensor x, Tensor proj_weight, Tensor out_weight, str mode, str result) -> Tensor",
    _allocate,
    _launch,
)
_backward = operator(
    "high_order_attention_backward(Tensor upstream, Tensor x, Tensor proj_weight, Tensor out_weight, str mode, "
    "str result, bool want_x, bool want_proj, bool want_out) -> (Tensor, Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


_MODES, _RESULTS = ("joint", "per_order"), ("features", "map")  # in the order of csrc/launchers.h


def _launch_cuda(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str, result: str, y: Tensor) -> None:
    codes = _MODES.index(mode), _RESULTS.index(result)
    with filled_as_rows(y) as rows:
        torch.ops.dfkd_fast_cuda.high_order_attention(
            as_rows(x), aligned(proj_weight), aligned(out_weight), *codes, rows
        )


def _launch_cuda_backward(
    upstream: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    mode: str,
    result: str,
    want_x: bool,
    want_proj: bool,
    want_out: bool,
    dx: Tensor,
    dproj: Tensor,
    dout: Tensor,
) -> None:
    codes = _MODES.index(mode), _RESULTS.index(result)
    inputs = (as_rows(upstream), as_rows(x), aligned(proj_weight), aligned(out_weight))
    with filled_as_rows(dx) as rows:
        torch.ops.dfkd_fast_cuda.high_order_attention_backward(*inputs, *codes, rows, dproj, dout)


_OPERATORS = {
    "triton": (_forward, _backward),
    "cuda": (
        operator(
            "high_order_attention_cuda(Tensor x, Tensor proj_weight, Tensor out_weight, str mode, str result) "
            "-> Tensor",
            _allocate,
            _launch_cuda,
        ),
        operator(
            "high_order_attention_cuda_backward(Tensor upstream, Tensor x, Tensor proj_weight, Tensor out_weight, "
            "str mode, str result, bool want_x, bool want_proj, bool want_out) -> (Tensor, Tensor, Tensor)",
            _allocate_backward,
            _launch_cuda_backward,
        ),
    ),
}


class _HighOrderAttention(FusedFunction):
    """The features that pass, or the gate; backward computes the maps anew from x."""

    @staticmethod
    def forward(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str, result: str, kernels: str) -> Tensor:
        return _OPERATORS[kernels][0](x, proj_weight, out_weight, mode, result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.mode, ctx.result, ctx.kernels = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, proj_weight, out_weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        backward = _OPERATORS[ctx.kernels][1]
        computed = backward(upstream, x, proj_weight, out_weight, ctx.mode, ctx.result, *wanted)
        gradients = [g if want else None for g, want in zip(computed, wanted, strict=True)]
        gradients = no_second_derivative("high_order_attention", gradients, upstream, *ctx.saved_tensors)
        return *gradients, None, None, None


def _product_type(x: Tensor) -> torch.dtype:
    """The dtype that the matrix products run in, as in the reference."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def product_weights(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Weights in the dtype that the matrix products run in, as in the reference."""
    return tuple(weight.to(x.dtype).to(_product_type(x)) for weight in weights)


def unserved_order(out_weight: Tensor) -> str | None:
    """Why the kernels cannot take so many orders; None where they can."""
    order = out_weight.shape[0]
    return None if order <= 4 else f"its kernels go up to order 4, not {order}"


def _with(kernels: str, result: str) -> Any:
    def run(x: Tensor, proj_weight: Tensor, out_weight: Tensor, *, mode: str) -> Tensor:
        return _HighOrderAttention.apply(x, *product_weights(x, proj_weight, out_weight), mode, result, kernels)

    return run


def _served(x: Tensor, proj_weight: Tensor, out_weight: Tensor, *, mode: str) -> str | None:
    return unserved(x) or unserved_order(out_weight)


def _served_by_cuda(x: Tensor, proj_weight: Tensor, out_weight: Tensor, *, mode: str) -> str | None:
    samples, channels, height, width = x.shape
    order, _, hidden = out_weight.shape
    sizes = {"positions": samples * height * width, "channels": channels, "hidden": hidden, "order": order}
    return unserved_by_extension("high_order_attention", x, _product_type(x), mode=mode, **sizes)


register("high_order_attention", "reference", reference.high_order_attention)
register("high_order_attention", "triton", _with("triton", "features"), _served)
register("high_order_attention", "cuda", _with("cuda", "features"), _served_by_cuda)
register("high_order_attention_map", "reference", reference.high_order_attention_map)
register("high_order_attention_map", "triton", _with("triton", "map"), _served)
register("high_order_attention_map", "cuda", _with("cuda", "map"), _served_by_cuda)


def high_order_attention(
    x: Tensor,
    proj_weight: Tensor,
    out_weight: Tensor,
    *,
    mode: Literal["joint", "per_order"] = "joint",
    backend: str | None = None,
) -> Tensor:
    """Features gated by a polynomial of themselves: ``y = A * x`` (paper, section 3.3; Chen et al., ICCV 2019).

    Order r multiplies r linear maps of each position's features, and a sigmoid of the rectified products is the gate::

        z_r = prod over i = 1..r of proj_{r,i} x           l_r = out_r relu(z_r)
        A   = sigmoid(sum over r of l_r)                    "joint" (the paper's figure 3)
        A   = mean over r of sigmoid(l_r)                   "per_order" (Chen et al.)

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; N may be 0.
        proj_weight: (R(R+1)/2, K, C), any floating dtype, factors ordered (1, 1), (2, 1), (2, 2), (3, 1), ...
        out_weight: (R, C, K), any floating dtype.
        mode: one sigmoid over all orders, or the mean of one an order.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        y, (N, C, H, W), in the dtype and memory format of x. The two matrix products run in the autocast type, without
        autocast in that of x; products of maps and the sigmoid in float32 (float64 for float64). Differentiable in all
        three tensors.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices that do not agree, an unknown mode or backend.
        RuntimeError: the backend asked for cannot serve these arguments.
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
    """The gate A of :func:`high_order_attention` alone, each value in [0, 1].

    Args:
        x: (N, C, H, W).
        proj_weight: (R(R+1)/2, K, C).
        out_weight: (R, C, K).
        mode: as there.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A, (N, C, H, W), in the dtype and memory format of x. Differentiable in all three tensors.

    Raises:
        TypeError: as there.
        ValueError: as there.
        RuntimeError: as there.
    """
    require_arguments(x, proj_weight, out_weight, mode)
    return dispatch("high_order_attention_map", backend, x, proj_weight, out_weight, mode=mode)


def require_arguments(x: Tensor, proj_weight: Tensor, out_weight: Tensor, mode: str) -> None:
    """Checks what all forms of the op share; raises as :func:`high_order_attention`."""
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
