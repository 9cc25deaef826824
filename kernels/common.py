"""Kernel launches, and device functions that kernels share.

Triton 3.6's interpreter multiplies bfloat16 matrices incorrectly, truncates to bfloat16 instead of rounding, and rounds
the product of a fused multiply-add. Kernels therefore use :func:`dot`, :func:`cast` and :func:`fma` instead of
``tl.dot``, ``.to`` and ``tl.fma``.

Accuracy of float32 functions. On a GPU, ``tl.log`` and ``tl.log2`` are accurate to one ulp, and ``tl.div_rn`` and
``tl.sqrt_rn`` are correctly rounded. ``tl.exp2`` is one instruction with a relative error of 2^-22.5. ``tl.exp(x)``
adds the rounding error of a product, x 2^-24. ``/`` has an error of two ulp. PyTorch's functions are more accurate, so
kernels use :func:`exp`, :func:`sigmoid`, :func:`divide` or ``tl.div_rn`` where float32 results depend on it.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkd_fast.kernels.config import Launch

__all__ = [
    "INTERPRETED",
    "RecordedLaunch",
    "architecture",
    "cast",
    "cdiv",
    "divide",
    "dot",
    "exp",
    "fma",
    "launch",
    "next_power_of_2",
    "num_sms",
    "precision",
    "record_launches",
    "select",
    "sigmoid",
    "sum_partials",
    "traffic",
]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

_LOG2_E = tl.constexpr(1.44269502162933349609375)  # in float32
_LOG2_E_LOW = tl.constexpr(1.92596299112661746887e-8)  # log2(e) - _LOG2_E
_LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round float32 to the nearest value of another dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # The sum keeps the bits of an infinity, but not those of every NaN.
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """``acc + a @ b`` in float32 for operands of one dtype; ``precision`` is the input precision of float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def fma(x, y, z):
    """``x * y + z`` in float32, rounded once."""
    if INTERPRETED:
        return (tl.cast(x, tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def divide(a, b, dtype: tl.constexpr):
    """``a / b``, as accurate as a result of ``dtype`` requires."""
    if dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def exp(x, dtype: tl.constexpr):
    """e^x for x <= 0, as accurate as a result of ``dtype`` requires.

    In float32, it is 2^(x log2(e)), corrected by the rounding error of the product.
    """
    if dtype == tl.float32:
        # The correction of minus infinity would be NaN.
        x = tl.maximum(x, -128.0, propagate_nan=tl.PropagateNan.ALL)
        scaled = x * _LOG2_E
        error = fma(x, _LOG2_E_LOW, fma(x, _LOG2_E, -scaled))
        e = tl.exp2(scaled)
        return fma(e, error * _LOG_2, e)
    else:
        return tl.exp(x)


@triton.jit
def sigmoid(x, dtype: tl.constexpr):
    """1 / (1 + e^-x), as accurate as a result of ``dtype`` requires."""
    if dtype == tl.float32:
        e = exp(-tl.abs(x), dtype)
        return tl.div_rn(tl.where(x < 0, e, 1.0), 1.0 + e)
    else:
        return tl.sigmoid(x)


@triton.jit
def select(values, index):
    """``values[index]`` for a tuple of pointers of one dtype, or of integers, and an index known at run time."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(index == i, values[i], found)
    return found


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a dtype: float32 uses TF32 only if ``torch.backends.cuda.matmul`` allows it."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@dataclass(frozen=True, kw_only=True)
class RecordedLaunch:
    """A launch recorded by :func:`record_launches`, with all that is needed to compile it."""

    kernel: Any
    arguments: dict[str, Any]
    config: Launch
    constants: dict[str, Any]


def traffic(
    *, writes: str, updates: str = "", reads: str | None = None, parts: dict[str, Callable[[Any], float]] | None = None
) -> Callable[[Any], Any]:
    """Declare which arguments of a kernel it reads and writes, to count its memory traffic.

    Names are separated by spaces. ``args.hidden`` is a field of the argument ``args``. Arguments that are None have no
    traffic. A kernel counts each byte that it touches once, however often its programs load it.

    Args:
        writes: tensors that are only written.
        updates: tensors that are read and written.
        reads: tensors that are only read; by default all others.
        parts: for a tensor that is not touched as a whole, a function that takes the kernel's arguments and constants
            by name and returns the fraction.
    """

    def declare(kernel: Any) -> Any:
        kernel.traffic = {"writes": writes, "updates": updates, "reads": reads, "parts": parts or {}}
        return kernel

    return declare


_recorder: tuple[int, list[RecordedLaunch]] | None = None


@contextmanager
def record_launches(arch: int) -> Iterator[list[RecordedLaunch]]:
    """Record launches for a device of architecture ``arch`` (90 for sm_90) instead of launching."""
    global _recorder
    before, _recorder = _recorder, (arch, [])
    try:
        yield _recorder[1]
    finally:
        _recorder = before


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _num_sms(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def architecture(x: Tensor) -> int:
    """Architecture of the device of x, 90 for sm_90. Inside :func:`record_launches` it is ``arch``; on a CPU, 90."""
    if _recorder is not None:
        return _recorder[0]
    return _capability(x.device.index) if x.is_cuda else 90


def num_sms(x: Tensor) -> int:
    """Number of streaming multiprocessors of the device of x.

    Inside :func:`record_launches` it is 132, as on an H200. In the interpreter it is 2, because programs run serially.
    """
    if x.is_cuda and _recorder is None:
        return _num_sms(x.device.index)
    return 2 if INTERPRETED and _recorder is None else 132


def _raise_wrong_arguments(kernel: Any, count: int, tile: dict[str, int], constants: dict[str, Any]) -> NoReturn:
    meta = {**tile, **constants}
    problems = []
    if count > len(kernel.arg_names):
        problems.append(f"takes {len(kernel.arg_names)} arguments, got {count} positional ones")
    if missing := [name for name in kernel.arg_names[count:] if name not in meta]:
        problems.append(f"is missing {', '.join(missing)}")
    if unknown := [name for name in meta if name not in kernel.arg_names]:
        problems.append(f"has no argument {', '.join(unknown)}")
    repeated = [name for name in meta if name in kernel.arg_names[:count] or (name in tile and name in constants)]
    if repeated:
        problems.append(f"got {', '.join(repeated)} twice")
    raise TypeError(f"{kernel.fn.__name__} {'; '.join(problems)}")


def launch(
    kernel: Any, grid: Sequence[int] | Callable[..., Sequence[int]], *args: Any, config: Launch, **constants: Any
) -> None:
    """Launch a kernel on the device of its first tensor.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Number of programs along each axis. If one is 0, nothing is launched.
        *args: The kernel's arguments up to its compile-time constants. At least one of them is a tensor.
        config: ``num_warps``, ``num_stages`` and, in its tile, compile-time constants.
        **constants: The other compile-time constants.

    Raises:
        TypeError: The arguments do not match the kernel's. Only Triton's just-in-time compiler rejects unknown
            constants. Its interpreter and its ahead-of-time compiler ignore them.
    """
    meta = {**config.tile, **constants}
    count = len(args) + len(config.tile) + len(constants)
    if count != len(kernel.arg_names) or not meta.keys() >= set(kernel.arg_names[len(args) :]):
        _raise_wrong_arguments(kernel, len(args), config.tile, constants)
    grid = tuple(grid(meta)) if callable(grid) else tuple(grid)
    if 0 in grid:
        return
    if _recorder is not None:
        names = kernel.arg_names[: len(args)]
        _recorder[1].append(
            RecordedLaunch(kernel=kernel, arguments=dict(zip(names, args, strict=True)), config=config, constants=meta)
        )
        return
    first = next(a for a in args if isinstance(a, Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, **meta, num_warps=config.num_warps, num_stages=config.num_stages)
    else:
        kernel[grid](*args, **meta, num_warps=config.num_warps, num_stages=config.num_stages)


@traffic(writes="out_ptr")
@triton.jit
def _sum_kernel(
    x_ptr,  # [count]
    out_ptr,  # []
    count,
    scale,
    BLOCK: tl.constexpr,
):
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(x_ptr + offs, mask=offs < count, other=0.0)
    tl.store(out_ptr, tl.sum(acc) * scale)


def sum_partials(parts: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """``out = scale * parts.sum()`` in one program and a fixed order, so that the result is deterministic.

    Args:
        parts: (count,) float32, contiguous: one value per program of the previous kernel.
        out: Scalar, float32.
        scale: Factor.
    """
    launch(_sum_kernel, (1,), parts, out, parts.numel(), scale, config=Launch(tile={"BLOCK": 1024}))
