"""2x2 max pooling with uint8 argmax codes, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_tensor
from dfkd_fast.ops.custom_op import differentiable, operator, unsupported_reason
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


def _allocate_unpool(y: Tensor, code: Tensor, height: int, width: int, channels_last: bool, gradient: bool) -> Tensor:
    return _empty(y, height, width, channels_last)


def _allocate_gather(x: Tensor, code: Tensor, channels_last: bool) -> Tensor:
    return _empty(x, code.shape[2], code.shape[3], channels_last)


_pool = operator("max_pool2x2", _allocate_pool, "max_pool2x2.pool")
_unpool = operator("max_unpool2x2", _allocate_unpool, "max_pool2x2.unpool")
_gather = operator("max_unpool2x2_backward", _allocate_gather, "max_pool2x2.gather")

# The gradients need only the codes. The backward of each is the forward of the other, but for the layout.
_max_pool = differentiable(
    "max_pool2x2",
    _pool,
    lambda inputs, results: ((results[1],), (*inputs[0].shape[2:], _is_channels_last(inputs[0]), inputs[1])),
    lambda needs_grad, saved, options, grad_y: (None if grad_y is None else _unpool(grad_y, *saved, *options),),
    signature=_allocate_pool,
)
_max_unpool = differentiable(
    "max_unpool2x2",
    lambda y, code, height, width: _unpool(y, code, height, width, _is_channels_last(y), False),
    lambda inputs, results: ((inputs[1],), (_is_channels_last(inputs[0]),)),
    lambda needs_grad, saved, options, grad_x: (None if grad_x is None else _gather(grad_x, *saved, *options),),
)

register("max_pool2x2", "reference", reference.max_pool2x2)
register("max_pool2x2", "triton", lambda x, *, relu: _max_pool(x, relu), lambda x, *, relu: unsupported_reason(x))
register("max_unpool2x2", "reference", reference.max_unpool2x2)
register(
    "max_unpool2x2",
    "triton",
    lambda y, code, output_size: _max_unpool(y, code, *output_size),
    lambda y, code, output_size: unsupported_reason(y),
)


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
