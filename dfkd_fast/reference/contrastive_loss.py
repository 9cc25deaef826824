"""The contrastive loss in plain PyTorch. Formulas: :func:`dfkd_fast.ops.contrastive_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast.reference.common import upcast

__all__ = ["contrastive_loss"]


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    symmetric: bool,
    negatives: str,
    normalize: bool,
    reduction: str,
) -> Tensor:
    """Compute the contrastive loss of anchors and positives (N, D)."""
    count = anchors.shape[0]
    # Autocast is off, because rounding errors of the similarities are multiplied by 1 / temperature.
    device = anchors.device.type if anchors.device.type != "meta" else "cpu"  # meta tensors have no autocast
    with torch.autocast(device, enabled=False):
        vectors = torch.cat([upcast(anchors), upcast(positives)])
        if normalize:
            vectors = _unit_rows(vectors)
        if negatives == "cross":
            similarity = vectors[:count] @ vectors[count:].T / temperature
            loss = torch.cat([similarity.logsumexp(dim) for dim in ((1, 0) if symmetric else (1,))])
            loss = loss - similarity.diagonal().repeat(2 if symmetric else 1)
        else:
            rows = vectors if symmetric else vectors[:count]
            similarity = rows @ vectors.T / temperature
            itself = torch.eye(rows.shape[0], 2 * count, dtype=torch.bool, device=similarity.device)
            positive = similarity.diagonal(count)
            if symmetric:
                positive = torch.cat([positive, similarity.diagonal(-count)])
            loss = similarity.masked_fill(itself, -torch.inf).logsumexp(1) - positive
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _unit_rows(x: Tensor) -> Tensor:
    """Scale rows to unit length. Zero rows stay zero and get zero gradient."""
    largest = x.detach().abs().amax(1, keepdim=True)
    zero = largest == 0
    # Dividing by a constant first keeps squares of very long and very short rows in range. It changes no derivative,
    # because the unit row does not depend on the length.
    x = x / largest.masked_fill(zero, 1)
    length = x.square().sum(1, keepdim=True).masked_fill(zero, 1).sqrt()
    return (x / length).masked_fill(zero, 0)
