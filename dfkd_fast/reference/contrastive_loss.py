"""The contrastive loss in plain PyTorch. Formulas: :func:`dfkd_fast.ops.contrastive_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_fast.reference.common import upcast

__all__ = ["contrastive_loss"]


def contrastive_loss(
    anchors: Tensor, positives: Tensor, *, temperature: float, symmetric: bool, normalize: bool, reduction: str
) -> Tensor:
    """NT-Xent for anchors and positives (N, D); one value an anchor before the reduction."""
    count = anchors.shape[0]
    # A loss: rounding the similarities to an autocast type would cost as much as 1 / temperature of it.
    with torch.autocast(anchors.device.type, enabled=False):
        vectors = torch.cat([upcast(anchors), upcast(positives)])
        if normalize:
            vectors = _unit_rows(vectors)
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
    """Rows scaled to unit length; rows of zeros stay so, and get no gradient."""
    largest = x.detach().abs().amax(1, keepdim=True)
    zero = largest == 0
    # The unit row does not change with the length, so dividing by a constant first changes no derivative, and keeps the
    # squares of very long and very short rows in range.
    x = x / largest.masked_fill(zero, 1)
    length = x.square().sum(1, keepdim=True).masked_fill(zero, 1).sqrt()
    return (x / length).masked_fill(zero, 0)
