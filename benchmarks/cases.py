"""What a microbenchmark consists of: cases of one op, with their inputs, their work and what they are compared with.

Each ``bench_<op>.py`` holds one :class:`Benchmark`; timing, tables and files are elsewhere. The same cases, on tensors
without data, are what the kernels are compiled ahead of time for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Benchmark", "Case", "Make", "Work"]

Inputs = tuple[Any, ...]


class Make:
    """Random tensors on one device, in one dtype; each call draws anew.

    Args:
        device: ``meta`` makes tensors without data.
        dtype: of what is not asked for in another.
        seed: of the draws.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def tensor(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normally distributed, contiguous."""
        dtype = dtype or self.dtype
        if self._generator is None:
            return torch.empty(shape, device=self.device, dtype=dtype, requires_grad=grad)
        x = torch.randn(shape, device=self.device, generator=self._generator, dtype=torch.float32)
        return x.mul_(scale).to(dtype).requires_grad_(grad)

    def map(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Feature maps (N, C, H, W), channels-last."""
        x = self.tensor(*shape, dtype=dtype, scale=scale)
        return x.to(memory_format=torch.channels_last).requires_grad_(grad)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a case must move and compute, forward and backward: what its floor is made of.

    Attributes:
        forward_bytes: inputs read once and results written once.
        backward_bytes: likewise, recomputation from the inputs included where the derivation has it.
        forward_flops: a multiply-add is two.
        backward_flops: likewise.
    """

    forward_bytes: float
    backward_bytes: float
    forward_flops: float = 0.0
    backward_flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of an op.

    Attributes:
        name: as it stands in results, ``64x256x14x14`` for example.
        inputs: a fresh set of inputs; those that require a gradient are what the backward is taken to.
        call: (*inputs, backend) to what the public op returns.
        work: for elements of so many bytes.
        shapes: ``paper`` are those of the method, ``large`` the same op where it is bound by bandwidth or arithmetic,
            ``odd`` are not timed, but compiled: no power of two, nothing divisible; ``file`` come from a user's file.
        dtypes: that it is measured in.
        compiled: the best PyTorch formulation known, (*inputs), for torch.compile; None is the reference.
    """

    name: str
    inputs: Callable[[Make], Inputs]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    work: Callable[[int], Work]
    shapes: Literal["paper", "large", "odd", "file"] = "paper"
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    compiled: Callable[..., Any] | None = None

    def seed(self) -> int:
        """Another one for each case, the same in each process."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The cases of one op.

    Attributes:
        op: its name.
        cases: its cases.
        peers: public kernels for the same work by name. Each takes a case's name and gives a function of (*inputs), or
            None where the kernel does not reach the case; it raises ImportError where the library is not installed.
        make: a case of another shape, for ``dfkd-fast bench --shapes FILE``, which gives it the file's sizes, by name
            or in order, and the case's ``shapes`` and ``dtypes``; None where there is none.
    """

    op: str
    cases: Sequence[Case]
    peers: dict[str, Callable[[str], Callable[..., Any] | None]] = field(default_factory=dict)
    make: Callable[..., Case] | None = None
