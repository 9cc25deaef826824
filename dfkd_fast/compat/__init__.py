"""Drop-in replacements for losses and hooks of other distillation projects, computed by this package's ops.

Change one import of a script::

    from datafree.criterions import kldiv                # before
    from dfkd_fast.compat.datafree import kldiv          # after

=====================  ====================================================  ==========================================
module                 replaces                                              provides
=====================  ====================================================  ==========================================
``datafree``           DataFree and CMI, Fast-Datafree, NAYER (zju-vipa,     kldiv, KLDiv, jsdiv, cross_entropy,
                       tmtuan1307): criterions.py, hooks.py,                 class_balance_loss, onehot_loss,
                       synthesis/contrastive.py                              get_image_prior_losses, DeepInversionHook,
                                                                             FeatureHook and its kin, register_hooks,
                                                                             ContrastLoss
``deepinversion``      NVlabs/DeepInversion: deepinversion.py                DeepInversionFeatureHook,
                                                                             get_image_prior_losses
``cpsc``               RoryShao/CPSC-DFKD: metric/loss.py,                   kdloss, SupConLoss,
                       metric/DeepInversion.py                               DeepInversionFeatureHook
``lightly``            lightly 1.6: loss/ntx_ent_loss.py                     NTXentLoss, MemoryBankModule
``metric_learning``    pytorch-metric-learning 2.9, which it needs           NTXentLoss, SupConLoss, SelfSupervisedLoss
``repdistiller``       HobbitLong/RepDistiller: distiller_zoo/KD.py, AT.py   DistillKL, Attention
``mdistiller``         megvii-research/mdistiller: distillers/KD.py, AT.py   kd_loss, single_stage_at_loss, at_loss
``torchdistill``       torchdistill 1.1: losses/mid_level.py                 KDLoss, ATLoss, in its registry
=====================  ====================================================  ==========================================

Each module has a table ``COVERAGE`` of :class:`Case`: the op that computes each kind of call, or plain PyTorch. Names,
signatures, attributes, values, gradients and errors are those of the originals, with these differences:

* For float16 and bfloat16 inputs the ops compute and return float32; the originals round each step to that dtype.
* A softened probability of exactly zero contributes zero to a divergence; an original can return NaN.
* Zero rows have similarity 0 and get zero gradient; an original divides them by a small number.
* ``SupConLoss`` and ``ContrastLoss`` stay finite for unnormalized features; the originals' exponentials can underflow.
* PyTorch's warnings (``size_average``, reduction "mean" of a divergence) are not repeated.

Tensors may have any floating dtype unless stated otherwise. Calls that no op supports raise PyTorch's errors. Import
the modules one by one; only ``metric_learning`` needs the original project.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MODULES", "Case"]

MODULES = (
    "datafree",
    "deepinversion",
    "cpsc",
    "lightly",
    "metric_learning",
    "repdistiller",
    "mdistiller",
    "torchdistill",
)
"""The modules, in the order of the table."""


class Case(NamedTuple):
    """One entry of ``COVERAGE``: a kind of call and what computes it.

    Attributes:
        name: name of the function or class.
        case: description of the arguments.
        op: name of the function in :mod:`dfkd_fast.ops` that computes it; None for plain PyTorch.
    """

    name: str
    case: str
    op: str | None
