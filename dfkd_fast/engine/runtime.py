"""Device, precision and output folder of a run."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd_fast.config import Precision

__all__ = ["Runtime", "new_run_folder"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A device and a precision.

    Attributes:
        device: where the networks are.
        autocast: the type that matrix products and convolutions compute in, None for float32.
        tf32: float32 products in TF32.
        channels_last: whether activations are kept channels-last.
    """

    device: torch.device
    autocast: torch.dtype | None
    tf32: bool
    channels_last: bool

    @classmethod
    def of(cls, device: str, precision: Precision, *, channels_last: bool) -> Runtime:
        """Resolve ``auto`` and refuse what the device cannot do.

        Raises:
            ValueError: an unknown device or precision, or one that this machine does not have.
        """
        name = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            where = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"device must be 'auto' or a torch device, got {device!r}") from error
        if where.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but no CUDA device is available: see `dfkd-fast doctor`")
        known = ("auto", "fp32", "tf32", "bf16", "fp16")
        if precision not in known:
            raise ValueError(f"precision must be one of {', '.join(known)}, got {precision!r}")
        if precision == "auto":
            precision = "bf16" if where.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
        if precision == "tf32" and where.type != "cuda":
            raise ValueError(f"precision 'tf32' needs a CUDA device, got {name!r}")
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        return cls(device=where, autocast=autocast, tf32=precision == "tf32", channels_last=channels_last)

    def cast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast for the forward of networks and losses; disabled in float32."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module here, in the run's memory format."""
        return module.to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def backends(self) -> Iterator[None]:
        """Set the process-wide switches of this precision; leaving restores them."""
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        # Shapes do not change, so timing cuDNN's algorithms once per shape pays off.
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
            torch.backends.cudnn.benchmark = benchmark

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def new_run_folder(out: str | None, stem: str) -> Path:
    """``out``, or a new folder under ``runs/`` named by ``stem`` and the time; made if it is not there."""
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = f"{re.sub('[^A-Za-z0-9]+', '_', stem).strip('_')}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ["", *(f"-{number}" for number in range(2, 1000))]:
        folder = Path("runs") / (name + suffix)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(f"runs/{name} and a thousand more like it exist")
