"""Losses and hooks of other distillation projects under their own names, with this package's ops behind them.

A script keeps its loop and changes one import::

    from datafree.criterions import kldiv                # before
    from dfkd_fast.compat.datafree import kldiv          # after

=====================  ====================================================  ==========================================
module                 stands for                                            gives
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

Each module has a table ``COVERAGE`` of :class:`Case`: which arguments go to which op, and which are computed in plain
PyTorch. Names, signatures, attributes, values, gradients and errors are the originals', with these differences:

* Of float16 and bfloat16 tensors the ops give float32, computed in float32, where an original rounds every step to the
  dtype of its input.
* A softened probability of exactly zero adds zero to a divergence, where an original can give NaN.
* Rows of zero length have similarity zero and get no gradient; an original divides them by a small number.
* What loses all digits in an original comes out finite here: the sum of exponentials in ``SupConLoss`` and
  ``ContrastLoss`` of features that are not normalised.
* PyTorch's warnings on the way (``size_average``, reduction "mean" of a divergence) are not repeated.

Nothing is imported here: ``dfkd_fast.compat.lightly`` and the others are imported one by one, and need none of the
projects but where the table says so.
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
    """One way to call a drop-in, and what computes it: a line of a module's ``COVERAGE``.

    Attributes:
        name: the function or class.
        case: the arguments meant, in words.
        op: the function of :mod:`dfkd_fast.ops` behind it; None for plain PyTorch.
    """

    name: str
    case: str
    op: str | None
