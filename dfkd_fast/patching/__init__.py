"""Fused forms in the place of what a user's model computes: :func:`patch` and :func:`unpatch`.

Nothing is replaced but the ``forward`` of single modules, on the instance: modules, parameters, buffers, their names
and their flags stay what they are. What is recognised is this list and no more:

* in a module's forward, a BatchNorm2d (or timm's BatchNormAct2d) with what follows it: an addition, a ReLU or ReLU6, or
  both. The module and all below it must be frozen and in eval mode;
* in a module's forward, ``MaxPool2d(2, return_indices=True)`` whose indices only go to ``MaxUnpool2d(2)``;
* MHN's order modules (Chen et al., ICCV 2019; chenbinghui1/MHN, model.py): ``HighDivModule``, ``PCBHighDivModule``,
  which are :func:`dfkd_fast.ops.high_order_attention` with one sigmoid an order;
* the losses ``KLDiv``, ``DistillKL``, ``SupConLoss`` and ``ContrastLoss`` of :mod:`dfkd_fast.compat`.

The last two kinds are recognised by the class's name and by all its parts, in any mode, trainable or not.

Whatever is recognised is run beside the original before it takes its place: the first two kinds on an example of the
model's input, the others on numbers of their own, gradients included.
"""

from dfkd_fast.patching.apply import Left, PatchReport, Replaced, patch, unpatch

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]
