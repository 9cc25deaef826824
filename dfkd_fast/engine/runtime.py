"""Device, precision and output folder of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd_fast.collectives import current_group
from dfkd_fast.config import Precision
from dfkd_fast.files import make_folder

__all__ = ["Runtime", "float32_weights", "new_run_folder", "rng_states", "set_rng_states", "supports_bf16"]


@contextlib.contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Convert the floating-point weights and buffers to float32, and back to their dtypes at the end."""
    tensors = [each for each in (*model.parameters(), *model.buffers()) if each.is_floating_point()]
    dtypes = [each.dtype for each in tensors]

    def convert(dtype: torch.dtype | None) -> None:
        for tensor, before in zip(tensors, dtypes, strict=True):
            if before != torch.float32:
                tensor.data = tensor.data.to(dtype or before)

    convert(torch.float32)
    try:
        yield
    finally:
        convert(None)


def rng_states() -> dict[str, Any]:
    """The states of torch's global random generators, for a checkpoint."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"rng_cpu": torch.get_rng_state(), "rng_cuda": cuda}


def set_rng_states(states: Mapping[str, Any]) -> None:
    """Set the states of :func:`rng_states`. Those of CUDA are ignored on a machine with other devices.

    In a run on several processes, each process sets its device to the state of the first one's.
    """
    torch.set_rng_state(states["rng_cpu"])
    if current_group() is not None:
        if torch.cuda.is_available() and states["rng_cuda"]:
            torch.cuda.set_rng_state(states["rng_cuda"][0])
        return
    if torch.cuda.is_available() and len(states["rng_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["rng_cuda"])


def supports_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions for matrix products: compute capability 8.0, AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def _available(name: str) -> torch.device:
    """The torch device of this name. Raises ValueError if it is unknown or not available on this machine."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto' or a torch device, got {name!r}; use for example 'cuda:0'") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {name!r}, but no CUDA device is available; `dfkd-fast doctor` shows why")
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise ValueError(f"device is {name!r}, but the last CUDA device is 'cuda:{count - 1}'")
        return device
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each backend raises another type
        raise ValueError(
            f"device is {name!r}, but this torch, {torch.__version__}, cannot use {device.type!r} on this machine; "
            "set 'auto' or 'cpu', or install a torch built for that device"
        ) from error
    return device


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device, precision and memory format.

    Attributes:
        device: device of the networks.
        autocast: autocast dtype; None disables autocast.
        tf32: compute float32 matrix products and convolutions in TF32.
        channels_last: keep activations in channels-last memory format.
    """

    device: torch.device
    autocast: torch.dtype | None
    tf32: bool
    channels_last: bool

    @classmethod
    def of(cls, device: str, precision: Precision, *, channels_last: bool) -> Runtime:
        """Create a runtime from config values, with ``auto`` resolved.

        Args:
            device: a torch device or ``auto``.
            precision: a precision or ``auto``.
            channels_last: keep activations in channels-last memory format.

        Raises:
            ValueError: the device or precision is unknown or not available on this machine.
        """
        name = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        resolved = _available(name)
        if resolved.type == "cuda" and current_group() is not None:
            if resolved.index is not None:
                raise ValueError(f"device must be 'auto' or 'cuda' with several processes, got {name!r}")
            resolved = torch.device("cuda", torch.cuda.current_device())  # also in other threads
        known = ("auto", "fp32", "tf32", "bf16", "fp16")
        if precision not in known:
            raise ValueError(f"precision must be one of {', '.join(known)}, got {precision!r}")
        if precision == "auto":
            precision = "bf16" if supports_bf16(resolved) else "fp32"
        if precision == "tf32" and resolved.type != "cuda":
            raise ValueError(f"precision 'tf32' needs a CUDA device, got {name!r}")
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        return cls(device=resolved, autocast=autocast, tf32=precision == "tf32", channels_last=channels_last)

    def cast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context for the forward pass of networks and losses."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and memory format of the run."""
        return module.to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def backends(self) -> Iterator[None]:
        """Set PyTorch's global backend flags for this precision, and restore them on exit."""
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        # Shapes do not change, so it pays to benchmark cuDNN's algorithms once per shape.
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
            torch.backends.cudnn.benchmark = benchmark

    @property
    def precision(self) -> Precision:
        """The name of the precision."""
        if self.autocast is None:
            return "tf32" if self.tf32 else "fp32"
        return "bf16" if self.autocast is torch.bfloat16 else "fp16"

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def new_run_folder(out: str | None, stem: str) -> Path:
    """Create and return the folder ``out``, or a new folder ``runs/STEM-TIME`` if ``out`` is None."""
    if out is not None:
        return make_folder(out)
    name, suffix = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    while True:
        folder = Path("runs") / (name if suffix == 1 else f"{name}-{suffix}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        suffix += 1
