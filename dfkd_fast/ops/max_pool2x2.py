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

# The gradients need only the codes. The backward of each op is the forward of the other, except for the layout.
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
    """Apply 2 x 2 max pooling, as ``F.max_pool2d(x, 2)``, and return a uint8 code instead of an int64 index.

    The last row of an odd height and the last column of an odd width are ignored.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; H and W at least 2, N may be 0.
        relu: apply ``F.relu`` first. Values, ties at zero and gradients are those of PyTorch's two functions.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        The maxima and their codes, both (N, C, H // 2, W // 2) and channels-last if x is. The maxima have the dtype of
        x and are differentiable; NaN counts as the maximum. The code is 2 dy + dx for the maximum in row dy and column
        dx of its window, the first one among equals as in PyTorch. With ``relu``, code 4 marks windows that are all
        zero after ReLU: their first element is the maximum, and it receives no gradient.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is not (N, C, H, W), H or W is less than 2, or the backend is unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("x", x, ("N", "C", "H", "W"))
    if x.shape[2] < 2 or x.shape[3] < 2:
        raise ValueError(f"x must have H and W of at least 2, got shape {tuple(x.shape)}")
    return dispatch("max_pool2x2", backend, x, relu=bool(relu))


def max_unpool2x2(
    y: Tensor, code: Tensor, output_size: Sequence[int] | None = None, *, backend: str | None = None
) -> Tensor:
    """Invert :func:`max_pool2x2`, as ``F.max_unpool2d``: place values at their codes' positions and zeros elsewhere.

    Args:
        y: (N, C, h, w), float16, bfloat16, float32 or float64; N may be 0.
        code: (N, C, h, w), uint8, as returned by :func:`max_pool2x2`; only the lowest two bits are read.
        output_size: H and W of the result: 2 h or 2 h + 1, and 2 w or 2 w + 1; by default the even sizes.
        backend: ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        (N, C, H, W), with the dtype of y, channels-last if y is. Differentiable with respect to y.

    Raises:
        TypeError: y is not a floating-point tensor, or code is not a uint8 tensor.
        ValueError: y is not (N, C, h, w), code does not match its shape or device, or output_size or backend is
            invalid.
        RuntimeError: the requested backend does not support the arguments.
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
    if len(size) != 2 or any(given not in (low, low + 1) for given, low in zip(size, even, strict=True)):
        raise ValueError(
            f"output_size must be ({even[0]} or {even[0] + 1}, {even[1]} or {even[1] + 1}) for y of shape "
            f"{tuple(y.shape)}, got {size}"
        )
    return dispatch("max_unpool2x2", backend, y, code, (size[0], size[1]))
