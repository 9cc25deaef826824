"""Each op saves no more for backward than its kernels read."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dfkd_fast import ops

from ..ops.table import (
    attention,
    call_act,
    call_conv1x1,
    call_norm,
    conv1x1,
    logits,
    maps,
    norm,
    norm_act,
    pool_and_unpool,
    stored,
    vectors,
)

GATE = attention((2, 8, 6, 4), needs_grad=(0, 1, 2))
GATE_INPUTS = [(2, 8, 6, 4), (2, 3, 6, 4), (8, 3), (8,)]
# Function, inputs, and the shapes of the saved tensors.
CASES = {
    "contrastive_loss": (ops.contrastive_loss, vectors((5, 7), needs_grad=(0, 1)), [(5, 7), (5, 7), (5,)]),
    "distillation_kl": (ops.distillation_kl, logits((4, 7), needs_grad=(0, 1)), [(4, 7), (4, 7), (5, 4)]),
    "spatial_attention": (ops.spatial_attention, GATE, [*GATE_INPUTS, (2, 2, 8)]),
    "spatial_attention, channel": (partial(ops.spatial_attention, form="channel"), GATE, [*GATE_INPUTS, (0,)]),
    "batchnorm_statistics": (  # a bit per element, with the channels rounded up to whole bytes
        *(partial(call_norm, activation="relu"), norm((2, 9, 3, 2), residual=True)),
        [(2, 9, 3, 2), *[(9,)] * 4, (2, 2, 6), (9,)],
    ),
    "batch_norm_act": (partial(call_act, activation="relu"), norm_act((2, 9, 3, 2)), [(2, 9, 3, 2), *[(9,)] * 4]),
    "batch_norm_act, residual": (
        *(partial(call_act, activation="relu"), norm_act((2, 9, 3, 2), residual=True)),
        [(2, 9, 3, 2), *[(9,)] * 4, (2, 2, 6)],
    ),
    "batch_norm_act_conv1x1": (  # one of the sine between the ops, and eight of the gate
        *(call_conv1x1, conv1x1((2, 9, 3, 2))),
        [
            (2, 9, 3, 2),
            (9,),
            (9,),
            (3, 9),
            (9,),
            (9,),
            (2, 3, 3, 2),
            (2, 9, 3, 2),
            (2, 3, 3, 2),
            (9, 3),
            *[(9,)] * 4,
            (2, 2, 9),
        ],
    ),
    "statistics_distance": (ops.statistics_distance, stored((2, 9, 3, 2)), [(2, 9, 3, 2), (3, 9)]),
    "max_pool2x2 and max_unpool2x2": (pool_and_unpool, maps((2, 8, 6, 4), needs_grad=(0,)), [(2, 8, 3, 2)] * 2),
}


@pytest.mark.parametrize("case", CASES)
def test_saves_only_what_backward_reads(kernel_device, case):
    function, make, shapes = CASES[case]
    saved = []
    inputs = [t if t is None else t.detach().to(kernel_device).requires_grad_(t.requires_grad) for t in make(0)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*inputs, backend="triton")
    assert [t.shape for t in saved] == shapes
    codes = {"batchnorm_statistics": 1, "batch_norm_act, residual": 1, "max_pool2x2 and max_unpool2x2": 2}
    assert sum(t.dtype == torch.uint8 for t in saved) == codes.get(case, 0)
