"""Loads the CUDA extension and asks its launchers what they support.

CMakeLists.txt builds the extension into this package: ``_operators.so`` defines ``torch.ops.dfkd_fast_cuda``,
``libdfkd_kernels.so`` holds the kernels, and ``_C`` describes both. They are not loaded if torch is built without CUDA.
The kernels need compute capability 9.0; csrc/launchers.h lists the supported sizes.
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
        return (
            "the CUDA extension is not built (pip install --no-build-isolation --editable . builds it: docs/install.md)"
        )
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another torch or another machine
        cause = error.__cause__ or error
        return f"the CUDA extension does not load: {cause}"
    return None


UNAVAILABLE = _load()
"""Why the kernels in csrc/ cannot be called, or None if they can."""


def build() -> dict[str, Any] | None:
    """Return ``toolkit``, ``architecture`` and ``commit`` of the extension, or None if it is unavailable."""
    if UNAVAILABLE is not None:
        return None
    from dfkd_fast import _C

    return _C.build()


_ALIGNMENT = 16  # bytes, of each pointer passed to a launcher


@functools.lru_cache(1024)
def _cached_reason(op: str, device: int, sizes: tuple[tuple[str, Any], ...]) -> str | None:
    """Return why the device or the launchers do not support an op's forward or backward, or None if they do."""
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) != (9, 0):
        return f"its kernels need a device of compute capability 9.0, not {found.major}.{found.minor}"
    for name in (op, f"{op}_backward"):
        reason = unsupported_reason(name, num_sms=found.multi_processor_count, **dict(sizes))
        if reason is not None:
            return reason
    return None


@torch.compiler.assume_constant_result
def _constant_reason(op: str, device: int, sizes: tuple[tuple[str, Any], ...]) -> str | None:
    return _cached_reason(op, device, sizes)


def unsupported_by_extension(op: str, x: Tensor, *dtypes: torch.dtype, **sizes: Any) -> str | None:
    """Return why the kernels in csrc/ do not support a call of an op, or None if they do.

    Args:
        op: ``contrastive_loss``, ``spatial_attention`` or ``high_order_attention``.
        x: the op's first tensor.
        *dtypes: dtypes of the other tensors, which must equal that of x.
        **sizes: as in :func:`unsupported_reason`, without ``dtype``.
    """
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    if not x.is_cuda:
        return f"its kernels run on CUDA devices, not on {x.device.type}"
    for dtype in dtypes:
        if dtype != x.dtype:
            return f"its kernels need tensors of one dtype, not {_argument(x.dtype)} and {_argument(dtype)}"
    return _launcher_reason(op, x.device.index or 0, {"dtype": x.dtype, **sizes})


def _launcher_reason(op: str, device: int, sizes: dict[str, Any]) -> str | None:
    return _constant_reason(op, device, tuple((name, _argument(size)) for name, size in sizes.items()))


def _argument(size: Any) -> Any:
    """Convert a size or option to what csrc/ expects."""
    if isinstance(size, torch.dtype):
        return str(size).removeprefix("torch.")
    if torch.compiler.is_compiling():
        # Launchers limit many sizes, so the graph is specialized to these. torch.fx.experimental has the only function
        # that guards on a symbolic float or bool as well as on an int.
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        return size if isinstance(size, str) else guard_scalar(size)
    return size


def aligned(x: Tensor) -> Tensor:
    """Return x if it is contiguous and aligned to 16 bytes, as launchers require, else a copy that is both."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def as_rows(x: Tensor) -> Tensor:
    """Return maps (N, C, H, W) as contiguous (N, H W, C): a view if they are channels-last, else a copy."""
    return aligned(x.permute(0, 2, 3, 1).flatten(1, 2))


def or_empty(like: Tensor, *gradients: Tensor | None) -> list[Tensor]:
    """Replace each None by an empty tensor, which tells launchers that the gradient is not needed."""
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


@contextmanager
def filled_as_rows(result: Tensor) -> Iterator[Tensor]:
    """Context manager that yields rows (N, H W, C) to fill: a view of the maps, or a buffer that is copied to them."""
    if result.numel() == 0:
        yield result
        return
    permuted = result.permute(0, 2, 3, 1)
    if permuted.is_contiguous() and result.data_ptr() % _ALIGNMENT == 0:
        yield permuted.flatten(1, 2)
        return
    rows = result.new_empty(permuted.shape)
    yield rows.flatten(1, 2)
    permuted.copy_(rows)


def kernel_name(name: str) -> str:
    """Convert a kernel's demangled name to its name and template arguments in the source code."""
    name = re.sub(r"\(anonymous namespace\)::|dfkd::|_GLOBAL__N__\w+::", "", name)
    name = re.sub(r">\(.*", ">", name) if "<" in name.partition("(")[0] else name.partition("(")[0]
    return name.removeprefix("void ").strip()


def unsupported_reason(op: str, *, num_sms: int | None = None, **sizes: Any) -> str | None:
    """Return why a launcher does not support these sizes and options, or None if it does. Needs no GPU.

    Args:
        op: ``contrastive_loss``, ``spatial_attention`` or ``high_order_attention``, or one of them with ``_backward``.
        num_sms: number of SMs of the device, for kernels whose blocks must all be resident; None skips that check.
        **sizes: the sizes in csrc/launchers.h, for the three ops in this order: ``count`` and ``dim``; ``samples``,
            ``channels``, ``hidden`` and ``positions``; ``positions``, ``channels``, ``hidden`` and
            ``order``. Also the public function's options, ``dtype``, and for a backward ``needs_grad_...``.

    Raises:
        RuntimeError: the extension is unavailable.
    """
    return _module().unsupported_reason(op, num_sms, **{name: _argument(size) for name, size in sizes.items()})


def launches(op: str, *, resources: bool = True, **sizes: Any) -> list[dict[str, Any]]:
    """Return the launches that a launcher would make, in order, without making them.

    Args:
        op: as in :func:`unsupported_reason`.
        resources: include the resources that each launch uses on the current GPU.
        **sizes: as in :func:`unsupported_reason`.

    Returns:
        A dict per kernel: ``kernel`` (its name), ``grid``, ``block``, ``cluster`` (blocks along x), ``cooperative`` and
        ``dynamic_shared`` (bytes); with resources also ``registers``, ``local`` (bytes per thread), ``static_shared``,
        ``blocks_per_multiprocessor``, ``occupancy``, ``active_clusters`` and ``multiprocessors``.

    Raises:
        ValueError: the launcher does not support these sizes.
        RuntimeError: the extension is unavailable, or resources are requested without a GPU.
    """
    found = _module().launches(op, resources, **{name: _argument(size) for name, size in sizes.items()})
    return [{**each, "kernel": kernel_name(each["kernel"])} for each in found]


def kernels() -> set[str]:
    """Return the names of the extension's kernels.

    Raises:
        RuntimeError: the extension is unavailable.
    """
    return {kernel_name(name) for name in _module().kernels()}


def _module() -> Any:
    if UNAVAILABLE is not None:
        raise RuntimeError(UNAVAILABLE)
    from dfkd_fast import _C

    return _C
