"""The contrastive loss between teacher and student vectors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.custom_op import fused_op, unsupported_reason
from dfkd_fast.ops.extension import or_empty, unsupported_by_extension
from dfkd_fast.reference import contrastive_loss as reference

__all__ = ["contrastive_loss"]

_REDUCTIONS = ("mean", "sum", "none")  # the index of each is its code in csrc/launchers.h


def _allocate(
    anchors: Tensor,
    positives: Tensor,
    temperature: float,
    symmetric: bool,
    negatives: str,
    normalize: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Allocate the loss and, for backward, the log-sum-exp of each anchor."""
    count = (2 if symmetric else 1) * anchors.shape[0]
    shape = (count,) if reduction == "none" else ()
    return anchors.new_empty(shape, dtype=torch.float32), anchors.new_empty(count, dtype=torch.float32)


def _cuda_forward(*arguments: Any) -> None:
    *inputs, _negatives, normalize, reduction, out, saved = arguments
    torch.ops.dfkd_fast_cuda.contrastive_loss(*inputs, normalize, _REDUCTIONS.index(reduction), out, saved)


def _cuda_backward(*arguments: Any) -> None:
    grad_output, anchors, positives, *options, _negatives, normalize, reduction, saved, d_anchors, d_positives = (
        arguments
    )
    torch.ops.dfkd_fast_cuda.contrastive_loss_backward(
        *(grad_output, anchors, positives, saved, *options, normalize, _REDUCTIONS.index(reduction)),
        *or_empty(anchors, d_anchors, d_positives),
    )


_fused = fused_op(
    "contrastive_loss",
    _allocate,
    triton=("contrastive_loss.forward", "contrastive_loss_bwd.backward"),
    cuda=(_cuda_forward, _cuda_backward),
)


def _unsupported_by_cuda(
    anchors: Tensor, positives: Tensor, *, temperature: float, negatives: str, normalize: bool, **_: Any
) -> str | None:
    if negatives != "all":
        return 'its kernels support only negatives="all"'
    count, dim = anchors.shape
    options = {"count": count, "dim": dim, "temperature": float(temperature), "normalize": normalize}
    return unsupported_by_extension("contrastive_loss", anchors, positives.dtype, **options)


register("contrastive_loss", "reference", reference.contrastive_loss)
register("contrastive_loss", "triton", _fused["triton"], lambda *vectors, **options: unsupported_reason(*vectors))
register("contrastive_loss", "cuda", _fused["cuda"], _unsupported_by_cuda)


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    negatives: Literal["all", "cross"] = "all",
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """Compute the contrastive loss NT-Xent (paper, Eq. 8 and 9; Chen et al., ICML 2020), or InfoNCE of two tensors.

    With S_ij the dot product of vectors i and j among all 2N (anchors first), divided by the temperature::

        loss_i = log(sum over j != i of exp(S_ij)) - S_{i, N + i}        i = 1..N

    The sum excludes only the anchor itself: the other anchors are negatives too. With ``negatives="cross"`` it is over
    the vectors of the other tensor only, as in CMI, MoCo v3 and, with ``symmetric=True``, CLIP.

    Args:
        anchors: (N, D), the teacher's vectors, float16, bfloat16, float32 or float64; N may be 0.
        positives: (N, D), the student's vectors, any floating dtype; row i is the positive of anchor i.
        temperature: tau, greater than 0.
        symmetric: use the positives as anchors too, which gives 2N anchors.
        negatives: vectors in an anchor's sum: "all" except itself, or "cross", those of the other tensor.
        normalize: scale rows to unit length first. A zero row has similarity 0 with all others and gets zero gradient.
        reduction: "mean" over anchors (NaN if N = 0), "sum", or "none" for one value per anchor: (N,), or (2N,) if
            symmetric, with the values of ``anchors`` first.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        The loss, a scalar or one value per anchor, float32 (float64 if an input is). Computed in float32, under
        autocast too. Differentiable with respect to both tensors.

    Raises:
        TypeError: anchors or positives is not a floating-point tensor, or temperature is not a number.
        ValueError: shapes or devices do not match, temperature is not positive, or negatives, reduction or backend is
            unknown.
        RuntimeError: the requested backend does not support the arguments.
    """
    require_tensor("anchors", anchors, ("N", "D"))
    count, dim = anchors.shape
    require_tensor("positives", positives, ("N", "D"), ("anchors", anchors), N=count, D=dim)
    require_number("temperature", temperature, above=0)
    require_choice("negatives", negatives, ("all", "cross"))
    require_choice("reduction", reduction, ("mean", "sum", "none"))
    options: dict[str, Any] = {"temperature": temperature, "symmetric": bool(symmetric), "negatives": negatives}
    options |= {"normalize": bool(normalize), "reduction": reduction}
    return dispatch("contrastive_loss", backend, anchors, positives, **options)
