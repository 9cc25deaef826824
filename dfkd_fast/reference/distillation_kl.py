"""The distillation loss on logits in plain PyTorch. Formulas: :func:`dfkd_fast.ops.distillation_kl`."""

from __future__ import annotations

from torch import Tensor

from dfkd_fast.reference.common import upcast

__all__ = ["distillation_kl"]


def distillation_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    direction: str,
    reduction: str,
    squared: bool = True,
) -> Tensor:
    """Compute the KL divergence of softened probabilities for logits (N, classes)."""
    log_p = (upcast(teacher_logits) / temperature).log_softmax(1)
    log_q = (upcast(student_logits) / temperature).log_softmax(1)
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    p = log_p.exp()
    # 0 log 0 = 0. The logarithms are masked before the product, because 0 * inf and its gradient are NaN.
    absent = p == 0
    terms = p * (log_p.masked_fill(absent, 0) - log_q.masked_fill(absent, 0))
    if squared:
        terms = terms * temperature**2
    if reduction == "none":
        return terms
    if reduction == "mean":
        return terms.mean()
    return terms.sum() / terms.shape[0] if reduction == "batchmean" else terms.sum()
