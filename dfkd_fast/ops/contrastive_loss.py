"""The contrastive loss between teacher and student vectors: the public function."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.ops.backend import dispatch, register
from dfkd_fast.ops.checks import require_choice, require_number, require_tensor
from dfkd_fast.ops.extension import unserved_by_extension
from dfkd_fast.ops.library import FusedFunction, no_second_derivative, operator, unserved
from dfkd_fast.reference import contrastive_loss as reference

__all__ = ["contrastive_loss"]


def _allocate_forward(
    anchors: Tensor, positives: Tensor, temperature: float, symmetric: bool, normalize: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    count = (2 if symmetric else 1) * anchors.shape[0]
    shape = (count,) if reduction == "none" else ()
    return anchors.new_empty(shape, dtype=torch.float32), anchors.new_empty(count, dtype=torch.float32)


def _launch_forward(*arguments: Any) -> None:
    from dfkd_fast.kernels import contrastive_loss as kernels

    kernels.forward(*arguments)


def _allocate_backward(
    upstream: Tensor,
    anchors: Tensor,
    positives: Tensor,
    saved: Tensor,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    want_anchors: bool,
    want_positives: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(anchors) if want_anchors else anchors.new_empty(0),
        torch.empty_like(positives) if want_positives else positives.new_empty(0),
    )


def _launch_backward(*arguments: Any) -> None:
    from dfkd_fast.kernels import contrastive_loss_bwd as kernels

    kernels.backward(*arguments)


_forward = operator(
    "contrastive_loss(Tensor anchors, Tensor positives, float temperature, bool symmetric, bool normalize, "
    "str reduction) -> (Tensor, Tensor)",
    _allocate_forward,
    _launch_forward,
)
_backward = operator(
    "contrastive_loss_backward(Tensor upstream, Tensor anchors, Tensor positives, Tensor saved, float temperature, "
    "bool symmetric, bool normalize, bool want_anchors, bool want_positives, bool mean) -> (Tensor, Tensor)",
    _allocate_backward,
    _launch_backward,
)


_REDUCTIONS = ("mean", "sum", "none")  # in the order of csrc/launchers.h


def _launch_cuda_forward(
    anchors: Tensor,
    positives: Tensor,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    out: Tensor,
    saved: Tensor,
) -> None:
    code = _REDUCTIONS.index(reduction)
    torch.ops.dfkd_fast_cuda.contrastive_loss(anchors, positives, temperature, symmetric, normalize, code, out, saved)


def _launch_cuda_backward(
    upstream: Tensor,
    anchors: Tensor,
    positives: Tensor,
    saved: Tensor,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    want_anchors: bool,
    want_positives: bool,
    mean: bool,
    d_anchors: Tensor,
    d_positives: Tensor,
) -> None:
    code = _REDUCTIONS.index("none" if upstream.ndim else "mean" if mean else "sum")
    torch.ops.dfkd_fast_cuda.contrastive_loss_backward(
        upstream, anchors, positives, saved, temperature, symmetric, normalize, code, d_anchors, d_positives
    )


_OPERATORS = {
    "triton": (_forward, _backward),
    "cuda": (
        operator(
            "contrastive_loss_cuda(Tensor anchors, Tensor positives, float temperature, bool symmetric, "
            "bool normalize, str reduction) -> (Tensor, Tensor)",
            _allocate_forward,
            _launch_cuda_forward,
        ),
        operator(
            "contrastive_loss_cuda_backward(Tensor upstream, Tensor anchors, Tensor positives, Tensor saved, "
            "float temperature, bool symmetric, bool normalize, bool want_anchors, bool want_positives, bool mean) "
            "-> (Tensor, Tensor)",
            _allocate_backward,
            _launch_cuda_backward,
        ),
    ),
}


class _ContrastiveLoss(FusedFunction):
    """The loss, and what backward needs of it: one logarithm of a sum an anchor. All backends save the same."""

    @staticmethod
    def forward(
        anchors: Tensor,
        positives: Tensor,
        temperature: float,
        symmetric: bool,
        normalize: bool,
        reduction: str,
        kernels: str,
    ) -> tuple[Tensor, Tensor]:
        return _OPERATORS[kernels][0](anchors, positives, temperature, symmetric, normalize, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        anchors, positives, ctx.temperature, ctx.symmetric, ctx.normalize, ctx.reduction, ctx.kernels = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(anchors, positives, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        anchors, positives, saved = ctx.saved_tensors
        want_anchors, want_positives, *_ = ctx.needs_input_grad
        da, db = _OPERATORS[ctx.kernels][1](
            upstream,
            anchors,
            positives,
            saved,
            ctx.temperature,
            ctx.symmetric,
            ctx.normalize,
            want_anchors,
            want_positives,
            ctx.reduction == "mean",
        )
        gradients = (da if want_anchors else None, db if want_positives else None)
        gradients = no_second_derivative("contrastive_loss", gradients, upstream, anchors, positives)
        return *gradients, None, None, None, None, None


def _with(kernels: str) -> Any:
    def run(
        anchors: Tensor, positives: Tensor, *, temperature: float, symmetric: bool, normalize: bool, reduction: str
    ) -> Tensor:
        options = (float(temperature), symmetric, normalize, reduction, kernels)
        return _ContrastiveLoss.apply(anchors, positives, *options)[0]

    return run


def _served(anchors: Tensor, positives: Tensor, **options: Any) -> str | None:
    return unserved(anchors, positives)


def _served_by_cuda(
    anchors: Tensor, positives: Tensor, *, temperature: float, normalize: bool, **options: Any
) -> str | None:
    count, dim = anchors.shape
    sizes = {"count": count, "dim": dim, "temperature": float(temperature), "normalize": normalize}
    return unserved_by_extension("contrastive_loss", anchors, positives.dtype, **sizes)


register("contrastive_loss", "reference", reference.contrastive_loss)
register("contrastive_loss", "triton", _with("triton"), _served)
register("contrastive_loss", "cuda", _with("cuda"), _served_by_cuda)


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """Each anchor against its positive and all other vectors (paper, Eq. 8 and 9; NT-Xent, Chen et al., ICML 2020).

    With v the 2N vectors, anchors then positives, and S their scalar products over the temperature::

        loss_i = log(sum over j != i of exp(S_ij)) - S_{i, N + i}        i = 1..N

    Only the anchor itself is left out of the sum; the other anchors are negatives too.

    Args:
        anchors: (N, D), the teacher's, float16, bfloat16, float32 or float64; N may be 0.
        positives: (N, D), the student's; row i belongs to anchor i.
        temperature: tau, above 0.
        symmetric: the positives are anchors too: 2N anchors, and "mean" is over them all.
        normalize: scale the rows to unit length first. A row of zero length then has similarity zero with every other
            and receives exactly zero gradient. Without it the rows are taken as they are.
        reduction: "mean" over anchors (NaN for N = 0), "sum", or "none": one value an anchor, (N,), and with
            ``symmetric`` (2N,), first those of ``anchors``, then those of ``positives``.
        backend: ``"cuda"``, ``"triton"``, ``"reference"`` or None; see :class:`dfkd_fast.ops.backend`.

    Returns:
        A scalar or one value an anchor, in float32 (float64 where an input is). Computed in float32 throughout, under
        autocast too. Differentiable in both tensors.

    Raises:
        TypeError: anchors or positives are no floating-point tensors, or temperature is no number.
        ValueError: shapes or devices that do not agree, temperature <= 0, an unknown reduction or backend.
        RuntimeError: the backend asked for cannot serve these arguments.
    """
    require_tensor("anchors", anchors, ("N", "D"))
    count, dim = anchors.shape
    require_tensor("positives", positives, ("N", "D"), ("anchors", anchors), N=count, D=dim)
    require_number("temperature", temperature, above=0)
    require_choice("reduction", reduction, ("mean", "sum", "none"))
    return dispatch(
        "contrastive_loss",
        backend,
        anchors,
        positives,
        temperature=temperature,
        symmetric=bool(symmetric),
        normalize=bool(normalize),
        reduction=reduction,
    )
