"""The CUDA extension: whether it is here, and why not.

It is built by CMakeLists.txt into this package's folder: ``_operators.so`` defines ``torch.ops.dfkd_fast_cuda``,
``libdfkd_kernels.so`` holds the kernels, ``_C`` tells of both. Nothing of it is loaded where torch is built without
CUDA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HOPPER",
    "UNAVAILABLE",
    "aligned",
    "as_rows",
    "build",
    "filled_as_rows",
    "kernel_name",
    "launches",
    "supported",
    "unavailable",
    "unserved_by_extension",
    "unserved_processors",
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
    """``toolkit``, ``architectures``, ``commit`` and ``hopper`` of the extension; None where there is none."""
    if UNAVAILABLE is not None:
        return None
    from dfkd_fast import _C

    return _C.build()


HOPPER = bool((build() or {}).get("hopper"))
"""Whether it holds the kernels in the instructions of sm_90a."""


def unavailable(backend: str) -> str | None:
    """Why the kernels of ``cuda`` or ``hopper`` cannot be called, on any device; None where they can."""
    if UNAVAILABLE is None and backend == "hopper" and not HOPPER:
        return "the CUDA extension is built without code for sm_90a (docs/building.md)"
    return UNAVAILABLE


_DTYPES = (torch.float16, torch.bfloat16)
_ALIGNMENT = 16  # bytes; of every pointer that a launcher is given


def unserved_by_extension(backend: str, *tensors: Tensor) -> str | None:
    """Why the kernels of ``cuda`` or ``hopper`` cannot take these tensors; None where they can."""
    reason = unavailable(backend)
    if reason is not None:
        return reason
    first = tensors[0]
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"its kernels run on CUDA devices, not on {tensor.device.type}"
        if tensor.dtype not in _DTYPES:
            return f"its kernels take float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.dtype != first.dtype:
            return "its kernels take tensors of one dtype"
    capability = torch.cuda.get_device_capability(first.device)
    if backend == "hopper":
        return None if capability == (9, 0) else "its kernels need a device of compute capability 9.0"
    return None if capability >= (8, 0) else "its kernels need a device of compute capability 8.0 or later"


_PROCESSORS = 132  # of the devices that csrc/ is written for; as many blocks wait for each other


def unserved_processors(x: Tensor) -> str | None:
    """Why kernels whose blocks must all run at the same time cannot run where a tensor is; None where they can."""
    found = torch.cuda.get_device_properties(x.device).multi_processor_count
    return None if found >= _PROCESSORS else f"its kernels need {_PROCESSORS} multiprocessors, the device has {found}"


def aligned(x: Tensor) -> Tensor:
    """A contiguous tensor with the alignment that launchers ask for: x itself, or a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def as_rows(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) as (N, H W, C) without gaps; of channels-last maps a view."""
    return aligned(x.permute(0, 2, 3, 1).flatten(1, 2))


@contextmanager
def filled_as_rows(result: Tensor) -> Iterator[Tensor]:
    """What a launcher fills instead of maps (N, C, H, W); an empty result stands for one that nobody wants."""
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


def _sizes(reason: str | None, **sizes: Any) -> dict[str, Any]:
    if reason is not None:
        raise RuntimeError(reason)
    return {name: str(size).removeprefix("torch.") if "dtype" in name else size for name, size in sizes.items()}


def supported(op: str, backend: str = "cuda", **sizes: Any) -> bool:
    """Whether the launcher of a backend serves an op of these sizes and options, as it says itself; needs no GPU.

    Args:
        op: ``contrastive_loss``, ``spatial_attention``, ``high_order_attention``, or one with ``_backward``.
        backend: ``cuda`` or ``hopper``.
        **sizes: as csrc/launchers.h names them: ``count`` and ``dim``; ``samples``, ``channels``, ``maps`` and
            ``positions``; ``positions``, ``channels``, ``hidden`` and ``order``. Options as the public functions name
            them, ``dtype``, and ``want_...`` of a backward.

    Raises:
        RuntimeError: there is no extension, or not this backend in it.
    """
    from dfkd_fast import _C

    return _C.supported(op, backend, **_sizes(unavailable(backend), **sizes))


def launches(op: str, backend: str = "cuda", *, resources: bool = True, **sizes: Any) -> list[dict[str, Any]]:
    """What that launcher would launch, in order; nothing is launched.

    Args:
        op: as in :func:`supported`.
        backend: as there.
        resources: also what each launch takes of the present GPU; without it, none is needed.
        **sizes: as there.

    Returns:
        A dict a kernel: ``kernel`` (its name), ``grid``, ``block``, ``cluster`` (blocks along x), ``cooperative`` and
        ``dynamic_shared`` (bytes); with resources also ``registers``, ``local`` (bytes a thread), ``static_shared``,
        ``blocks_per_multiprocessor``, ``occupancy``, ``active_clusters`` and ``multiprocessors``.

    Raises:
        ValueError: the backend does not serve these sizes.
        RuntimeError: there is no extension or not this backend in it, or resources are wanted and there is no GPU.
    """
    from dfkd_fast import _C

    found = _C.launches(op, backend, resources, **_sizes(unavailable(backend), **sizes))
    return [{**each, "kernel": kernel_name(each["kernel"])} for each in found]
