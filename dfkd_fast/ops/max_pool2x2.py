"""Maximum pooling of 2 x 2 and its inverse: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import max_pool2x2 as reference

__all__ = ["max_pool2x2", "max_unpool2x2"]


def _empty(like: Tensor, height: int, width: int, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        (like.shape[0], like.shape[1], height, width),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _is_channels_last(x: Tensor) -> bool:
    return reference.memory_format(x) == torch.channels_last


def _allocate_pool(x: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    height, width, channels_last = x.shape[2] // 2, x.shape[3] // 2, _is_channels_last(x)
    return _empty(x, height, width, channels_last), _empty(x, height, width, channels_last, torch.uint8)


def _launch_pool(*arguments: Any) -> None:
    from dfkd_fast.kernels import max_pool2x2 as kernels

    kernels.pool(*arguments)


def _allocate_unpool(y: Tensor, code: Tensor, height: int, width: int, channels_last: bool, gradient: bool) -> Tensor:
    return _empty(y, height, width, channels_last)


def _launch_unpool(
    y: Tensor, code: Tensor, height: int, width: int, channels_last: bool, gradient: bool, out: Tensor
) -> None:
    from dfkd_fast.kernels import max_pool2x2 as kernels

    kernels.unpool(y, code, gradient, out)


def _allocate_gather(x: Tensor, code: Tensor, channels_last: bool) -> Tensor:
    return _empty(x, code.shape[2], code.shape[3], channels_last)


def _launch_gather(x: Tensor, code: Tensor, channels_last: bool, y: Tensor) -> None:
    from dfkd_fast.kernels import max_pool2x2 as kernels

    kernels.gather(x, code, y)


_pool = operator("max_pool2x2(Tensor x, bool relu) -> (Tensor, Tensor)", _allocate_pool, _launch_pool)
_unpool = operator(
    "max_unpool2x2(Tensor y, Tensor code, SymInt height, SymInt width, bool channels_last, bool gradient) -> Tensor",
    _allocate_unpool,
    _launch_unpool,
)
_gather = operator(
    "max_unpool2x2_backward(Tensor x, Tensor code, bool channels_last) -> Tensor", _allocate_gather, _launch_gather
)


class _MaxPool(FusedFunction):
    """Pooling; its gradient needs the code alone."""

    @staticmethod
    def forward(x: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
        return _pool(x, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.relu = inputs
        ctx.height, ctx.width = x.shape[2:]
        ctx.channels_last = _is_channels_last(x)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        (code,) = ctx.saved_tensors
        dx = _unpool(upstream, code, ctx.height, ctx.width, ctx.channels_last, ctx.relu)
        return *no_second_derivative("max_pool2x2", (dx,), upstream), None


class _MaxUnpool(FusedFunction):
    """Unpooling; its gradient needs the code alone."""

    @staticmethod
    def forward(y: Tensor, code: Tensor, height: int, width: int) -> Tensor:
        return _unpool(y, code, height, width, _is_channels_last(y), False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, code, _, _ = inputs
        ctx.channels_last = _is_channels_last(y)
        ctx.save_for_backward(code)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (code,) = ctx.saved_tensors
        dy = _gather(upstream, code, ctx.channels_last)
        return *no_second_derivative("max_unpool2x2", (dy,), upstream), None, None, None


def _pool_triton(x: Tensor, *, relu: bool) -> tuple[Tensor, Tensor]:
    return _MaxPool.apply(x, relu)


def _pool_served(x: Tensor, *, relu: bool) -> str | None:
    return unserved(x)


def _unpool_triton(y: Tensor, code: Tensor, output_size: tuple[int, int]) -> Tensor:
    return _MaxUnpool.apply(y, code, *output_size)


def _unpool_served(y: Tensor, code: Tensor, output_size: tuple[int, int]) -> str | None:
    return unserved(y)


register("max_pool2x2", "reference", reference.max_pool2x2)
register("max_pool2x2", "triton", _pool_triton, _pool_served)
register("max_unpool2x2", "reference", reference.max_unpool2x2)
register("max_unpool2x2", "triton", _unpool_triton, _unpool_served)


def max_pool2x2(x: Tensor, *, relu: bool = False, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The largest of each 2 x 2, and which of the four it is: ``F.max_pool2d(x, 2)`` with a byte in place of its index.

    The last row of an odd height belongs to no 2 x 2 and is left out, as is the last column of an odd width.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; H and W at least 2, N may be 0.
        relu: pool max(0, x). The result is that of ``F.relu`` before, ties at zero and gradients included.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        Both (N, C, H // 2, W // 2), channels-last where x is. First the maxima, in the dtype of x, differentiable; NaN
        wins over any number. Second the code, uint8, not differentiable: 2 dy + dx, 0 to 3, of the element that won,
        the first of equals as in PyTorch. With ``relu``, 4 stands for four that are all zero after it: the first won,
        as code 0 says, and no gradient passes.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x is not (N, C, H, W), or H or W is below 2, or an unknown backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_tensor("x", x, ("N", "C", "H", "W"))
    if x.shape[2] < 2 or x.shape[3] < 2:
        raise ValueError(f"x must have H and W of at least 2, got shape {tuple(x.shape)}")
    return dispatch("max_pool2x2", backend, x, relu=bool(relu))


def max_unpool2x2(
    y: Tensor, code: Tensor, output_size: Sequence[int] | None = None, *, backend: str | None = None
) -> Tensor:
    """Each value to where :func:`max_pool2x2` found it, zeros elsewhere: ``F.max_unpool2d`` with a byte for its index.

    Args:
        y: (N, C, h, w), float16, bfloat16, float32 or float64; N may be 0.
        code: (N, C, h, w), uint8, as :func:`max_pool2x2` returns it; of a code the lowest two bits count.
        output_size: H and W of the result: 2 h or 2 h + 1 and 2 w or 2 w + 1; None is the even ones.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        (N, C, H, W) in the dtype of y, channels-last where y is. Differentiable in y.

    Raises:
        TypeError: y is no floating-point tensor, or code no tensor of dtype uint8.
        ValueError: y is not (N, C, h, w), code has another shape or device, output_size is none of the above, or an
            unknown backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_tensor("y", y, ("N", "C", "h", "w"))
    if not isinstance(code, Tensor):
        raise TypeError(f"code must be a tensor, got {type(code).__name__}")
    if code.dtype != torch.uint8:
        raise TypeError(f"code must be of dtype uint8, got {code.dtype}")
    if code.shape != y.shape:
        raise ValueError(f"code must have the shape of y, {tuple(y.shape)}, got {tuple(code.shape)}")
    if code.device != y.device:
        raise ValueError(f"code must be on the device of y, {y.device}, got {code.device}")
    even = (2 * y.shape[2], 2 * y.shape[3])
    size = even if output_size is None else tuple(output_size)
    if len(size) != 2 or any(a not in (b, b + 1) for a, b in zip(size, even, strict=True)):
        raise ValueError(
            f"output_size must be ({even[0]} or {even[0] + 1}, {even[1]} or {even[1] + 1}) for y of shape "
            f"{tuple(y.shape)}, got {size}"
        )
    return dispatch("max_unpool2x2", backend, y, code, (size[0], size[1]))
