"""Contrastive loss of lightly (lightly 1.6, ``loss/ntx_ent_loss.py`` and ``models/modules/memory_bank.py``).

Does not require lightly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.compat import Case
from dfkd_fast.compat._common import matching, positive

__all__ = ["COVERAGE", "MemoryBankModule", "NTXentLoss"]

COVERAGE = (
    Case("NTXentLoss", "no memory bank, one process", "contrastive_loss"),
    Case("NTXentLoss", "negatives gathered from several processes", None),
    Case("NTXentLoss", "memory bank", None),
    Case("NTXentLoss", "negative temperature", None),
    Case("MemoryBankModule", "always", None),
)


def _processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; 0 and 1 without a process group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _gather(x: Tensor) -> Tensor:
    """Return the rows of all processes. Gradients flow back to each process."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


class MemoryBankModule(nn.Module):
    """Ring buffer of features from earlier batches.

    Args:
        size: (number of features, dim), or 0 for no bank.
        gather_distributed: store the features of all processes.
        feature_dim_first: return the bank as (dim, number) instead of (number, dim).

    Attributes:
        size: the size as a tuple.
        bank: (number, dim), float32, initialized with random unit rows; a non-persistent buffer.
        bank_ptr: (1,), int64, index of the next row to write; a non-persistent buffer.

    Raises:
        ValueError: size is negative, or neither 0 nor two numbers.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if min(sizes, default=0) < 0:
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative")
        if isinstance(size, int) and size > 0:
            raise ValueError(f"Memory bank size {size} does not specify the feature dimension: pass ({size}, dim)")
        if sizes != (0,) and len(sizes) != 2:
            raise ValueError(f"Illegal memory bank size {size}: pass (number of features, dim), or 0 for no bank")
        self.size = sizes
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        bank = torch.empty(0) if len(sizes) == 1 else F.normalize(torch.randn(sizes), dim=-1)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the features, and a copy of the bank before the update (None if there is no bank).

        Args:
            output: features (N, dim), any floating dtype; returned unchanged.
            labels: unused.
            update: write the features to the bank.
        """
        if self.size[0] == 0:
            return output, None
        bank = self.bank.clone().detach()
        if update:
            self._enqueue(output.detach())
        return output, bank.T if self.feature_dim_first else bank

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        if self.gather_distributed and _processes()[1] > 1:
            rows = _gather(rows)
        start = int(self.bank_ptr)
        end = start + rows.shape[0]
        # As in lightly, rows past the end are dropped.
        self.bank[start:end] = rows[: self.size[0] - start]
        self.bank_ptr[0] = end if end < self.size[0] else 0


class NTXentLoss(nn.Module):
    """NT-Xent loss (SimCLR, Chen et al., ICML 2020); with a memory bank, the loss of MoCo (He et al., CVPR 2020).

    Args:
        temperature: temperature of the cosine similarities.
        memory_bank_size: (number of features, dim), or 0 for no bank.
        gather_distributed: without a bank, use the vectors of all processes as negatives; with one, store them in it.

    Attributes:
        memory_bank: the :class:`MemoryBankModule`, updated if ``out0`` requires a gradient.

    Raises:
        ValueError: the temperature is within 1e-8 of zero, the bank's size is invalid, or gather_distributed is set and
            PyTorch is built without ``torch.distributed``.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.memory_bank = MemoryBankModule(size=memory_bank_size, gather_distributed=gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = 1e-8
        if abs(temperature) < self.eps:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed is True but torch.distributed is not available")

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Compute the loss, a scalar, of two views (N, dim), any floating dtype; rows of equal index are positives.

        Raises:
            ValueError: out0 does not have two dimensions.
            IndexError: the numbers of rows differ, without a bank.
            RuntimeError: dim differs; or without a bank, N = 0 or the dtype differs.
        """
        count, _ = out0.shape
        rank, processes = _processes() if self.gather_distributed else (0, 1)
        bank = self.memory_bank.size[0] > 0
        mixed = out0.dtype != out1.dtype and not torch.is_autocast_enabled(out0.device.type)
        if (
            not bank
            and processes == 1
            and positive(self.temperature)
            and count > 0
            and matching(out0, out1)
            and not mixed
        ):
            return ops.contrastive_loss(out0, out1, temperature=self.temperature, symmetric=True)
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        if bank:
            return self._against_bank(out0, out1)
        if count == 0:
            raise RuntimeError(f"there is no vector in out0 {tuple(out0.shape)}")
        if out1.shape[0] != count:
            raise IndexError(f"out0 and out1 must have the same number of rows, got {count} and {out1.shape[0]}")
        if mixed:
            raise RuntimeError(f"out0 and out1 must have the same dtype, got {out0.dtype} and {out1.dtype}")
        all0, all1 = (_gather(out0), _gather(out1)) if processes > 1 else (out0, out1)
        everything = torch.cat([all0, all1])
        own = rank * count + torch.arange(count, device=out0.device)
        itself, other = torch.cat([own, own + len(all0)]), torch.cat([own + len(all0), own])
        similarity = torch.cat([out0, out1]) @ everything.T / self.temperature
        return self.cross_entropy(similarity.scatter(1, itself[:, None], -torch.inf), other)

    def _against_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss of out0 with its positives in out1 and the bank as negatives."""
        out1, negatives = self.memory_bank(out1, update=out0.requires_grad)
        similar = (out0 * out1).sum(1, keepdim=True)
        logits = torch.cat([similar, out0 @ negatives.to(out0.device)], dim=1) / self.temperature
        return self.cross_entropy(logits, logits.new_zeros(logits.shape[0], dtype=torch.long))
