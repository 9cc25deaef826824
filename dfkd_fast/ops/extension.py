"""The CUDA extension: whether it is here, and why not.

It is built by CMakeLists.txt into this package's folder: ``_operators.so`` defines ``torch.ops.dfkd_fast_cuda``,
``libdfkd_kernels.so`` holds the kernels, ``_C`` tells of both. Nothing of it is loaded where torch is built without
CUDA. Its kernels are for devices of compute capability 9.0; what they serve their launchers say (csrc/launchers.h).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "UNAVAILABLE",
    "aligned",
    "as_rows",
    "build",
    "filled_as_rows",
    "kernel_name",
    "kernels",
    "launches",
    "or_empty",
    "unsupported_by_extension",
    "unsupported_reason",
]

_FOLDER = Path(__file__).resolve().parents[1]


def _load() -> str | None:
    library = _FOLDER / "_operators.so"
    if not library.exists():
        return "the CUDA extension is not built (docs/building.md)"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another torch or another machine
        cause = error.__cause__ or error
        return f"the CUDA extension does not load: {cause}"
    return None


UNAVAILABLE = _load()
"""Why the kernels of csrc/ cannot be called; None where they can."""


def build() -> dict[str, Any] | None:
    """``toolkit``, ``architecture`` and ``commit`` of the extension; None if there is none."""
    if UNAVAILABLE is not None:
        return None
    from dfkd_fast import _C

    return _C.build()


_ALIGNMENT = 16  # bytes; of every pointer that a launcher is given


@functools.lru_cache(1024)
def _refusal(op: str, device: int, sizes: tuple[tuple[str, Any], ...]) -> str | None:
    """Why a device or the launchers cannot compute an op, forward or backward."""
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) != (9, 0):
        return f"its kernels need a device of compute capability 9.0, not {found.major}.{found.minor}"
    for name in (op, f"{op}_backward"):
        reason = unsupported_reason(name, num_sms=found.multi_processor_count, **dict(sizes))
        if reason is not None:
            return reason
    return None


@torch.compiler.assume_constant_result
def _constant_refusal(op: str, device: int, sizes: tuple[tuple[str, Any], ...]) -> str | None:
    return _refusal(op, device, sizes)


def unsupported_by_extension(op: str, x: Tensor, *dtypes: torch.dtype, **sizes: Any) -> str | None:
    """Why the kernels of csrc/ cannot compute an op, forward and backward; None if they can.

    Args:
        op: ``contrastive_loss``, ``spatial_attention`` or ``high_order_attention``.
        x: its first tensor.
        *dtypes: of the other tensors that must have the dtype of x.
        **sizes: as in :func:`unsupported_reason`, without ``dtype``.
    """
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    if not x.is_cuda:
        return f"its kernels run on CUDA devices, not on {x.device.type}"
    for dtype in dtypes:
        if dtype != x.dtype:
            return f"its kernels take tensors of one dtype, not {_word(x.dtype)} and {_word(dtype)}"
    words = tuple((name, _word(size)) for name, size in {"dtype": x.dtype, **sizes}.items())
    return _constant_refusal(op, x.device.index or 0, words)


def _word(size: Any) -> Any:
    """A size or option as csrc/ takes it."""
    if isinstance(size, torch.dtype):
        return str(size).removeprefix("torch.")
    if torch.compiler.is_compiling():
        # What launchers serve has limits at many sizes: the graph is for these numbers.
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        return size if isinstance(size, str) else guard_scalar(size)
    return size


def aligned(x: Tensor) -> Tensor:
    """A contiguous tensor with the alignment that launchers ask for: x itself, or a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def as_rows(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) as (N, H W, C) without gaps; of channels-last maps a view."""
    return aligned(x.permute(0, 2, 3, 1).flatten(1, 2))


def or_empty(like: Tensor, *gradients: Tensor | None) -> list[Tensor]:
    """The gradients; for each that is None, an empty tensor, which the launchers take for one that is not needed."""
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


@contextmanager
def filled_as_rows(result: Tensor) -> Iterator[Tensor]:
    """What a launcher fills instead of maps (N, C, H, W); empty results stay as they are."""
    if result.numel() == 0:
        yield result
        return
    there = result.permute(0, 2, 3, 1)
    if there.is_contiguous() and result.data_ptr() % _ALIGNMENT == 0:
        yield there.flatten(1, 2)
        return
    rows = result.new_empty(there.shape)
    yield rows.flatten(1, 2)
    there.copy_(rows)


def kernel_name(name: str) -> str:
    """A kernel's name as it stands in the source, with its template arguments, from the demangled one."""
    name = re.sub(r"\(anonymous namespace\)::|dfkd::|_GLOBAL__N__\w+::", "", name)
    name = re.sub(r">\(.*", ">", name) if "<" in name.partition("(")[0] else name.partition("(")[0]
    return name.removeprefix("void ").strip()


def unsupported_reason(op: str, *, num_sms: int | None = None, **sizes: Any) -> str | None:
    """Why the launcher of an op does not serve these sizes and options, in its own words; None if it does.

    Needs no GPU.

    Args:
        op: ``contrastive_loss``, ``spatial_attention``, ``high_order_attention``, or one with ``_backward``.
        num_sms: multiprocessors of the device, for kernels whose blocks must all be resident; None if any number will
            do.
        **sizes: as csrc/launchers.h names them: ``count`` and ``dim``; ``samples``, ``channels``, ``maps`` and
            ``positions``; ``positions``, ``channels``, ``hidden`` and ``order``. Options as the public functions name
            them, ``dtype``, and ``needs_grad_...`` of a backward.

    Raises:
        RuntimeError: there is no extension.
    """
    return _module().unsupported_reason(op, num_sms, **{name: _word(size) for name, size in sizes.items()})


def launches(op: str, *, resources: bool = True, **sizes: Any) -> list[dict[str, Any]]:
    """What that launcher would launch, in order; nothing is launched.

    Args:
        op: as in :func:`unsupported_reason`.
        resources: also what each launch takes of the present GPU; without it, no GPU is needed.
        **sizes: as in :func:`unsupported_reason`.

    Returns:
        A dict per kernel: ``kernel`` (its name), ``grid``, ``block``, ``cluster`` (blocks along x), ``cooperative`` and
        ``dynamic_shared`` (bytes); with resources also ``registers``, ``local`` (bytes a thread), ``static_shared``,
        ``blocks_per_multiprocessor``, ``occupancy``, ``active_clusters`` and ``multiprocessors``.

    Raises:
        ValueError: the launcher does not serve these sizes.
        RuntimeError: there is no extension, or resources are asked for and there is no GPU.
    """
    found = _module().launches(op, resources, **{name: _word(size) for name, size in sizes.items()})
    return [{**each, "kernel": kernel_name(each["kernel"])} for each in found]


def kernels() -> set[str]:
    """The names of all kernels of the extension.

    Raises:
        RuntimeError: there is no extension.
    """
    return {kernel_name(name) for name in _module().kernels()}


def _module() -> Any:
    if UNAVAILABLE is not None:
        raise RuntimeError(UNAVAILABLE)
    from dfkd_fast import _C

    return _C
