"""Compares the kernels of each op with the float64 reference: random calls, and on a GPU the shapes of the paper."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, assert_backend_no_worse

from ..ops.table import (
    DTYPES,
    attention,
    call_act,
    call_conv1x1,
    call_norm,
    conv1x1,
    conv1x1_tiles,
    high_order,
    high_order_tiles,
    logits,
    maps,
    near,
    norm,
    norm_act,
    pool_and_unpool,
    spatial_tiles,
    stored,
    vectors,
)

size = st.integers
choice = st.sampled_from
dtype = choice(DTYPES)


def spatial(*inputs, form, backend):
    """The output, and what it adds to the features."""
    y = ops.spatial_attention(*inputs, scale=near(form, inputs[0].shape), form=form, backend=backend)
    return y, y.to(torch.promote_types(y.dtype, torch.float32)) - inputs[0]


@dataclass(frozen=True)
class Sweep:
    """Strategies for the first input's shape, for other arguments of ``make`` and for options; and the tilings."""

    function: Any
    make: Any
    shape: Any
    drawn: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    tilings: tuple[Any, ...] = (nullcontext,)
    draws: int = 16


_MAP = st.tuples(size(0, 3), size(1, 40), size(1, 9), size(1, 9))
_ANY_RANK = st.one_of(*(st.tuples(size(0, 9), size(1, 70), *[size(1, 9)] * n) for n in range(4)))
# With fewer elements, the reference's error can be less than an ulp by chance.
_HIGH: dict[str, Any] = {
    "shape": st.tuples(size(2, 3), size(12, 40), size(3, 6), size(3, 6)),
    "drawn": {"order": size(1, 4), "hidden": size(4, 35), "scale": st.just(0.5)},
    "options": {"mode": choice(("joint", "per_order"))},
    "tilings": (partial(high_order_tiles, 16), partial(high_order_tiles, 64)),
    "draws": 8,
}
_CONTRAST = st.tuples(size(0, 90), size(1, 300))
SWEEPS = {
    "distillation_kl": Sweep(
        *(ops.distillation_kl, logits),
        # Rows that fit into one tile, and rows that do not. The loss of one row is one value per draw: hence the draws.
        st.one_of(st.tuples(size(1, 40), size(1, 70)), st.tuples(size(1, 2), size(4_090, 4_200))),
        {"other": dtype},
        {
            "temperature": choice((0.25, 1.0, 4.0)),
            "direction": choice(("forward", "reverse")),
            "reduction": choice(("batchmean", "sum", "mean", "none")),
        },
        draws=24,
    ),
    "contrastive_loss": Sweep(
        *(ops.contrastive_loss, vectors, _CONTRAST),
        options={
            **{"symmetric": st.booleans(), "negatives": choice(("all", "cross"))},
            "reduction": choice(("mean", "sum", "none")),
        },
    ),
    "contrastive_loss, not normalized": Sweep(  # with similarities of the order of ten
        *(partial(ops.contrastive_loss, normalize=False), vectors, _CONTRAST),
        {"scale": st.just(0.3)},
        {
            **{"symmetric": st.booleans(), "negatives": choice(("all", "cross"))},
            **{"reduction": choice(("mean", "sum", "none")), "temperature": st.just(0.5)},
        },
    ),
    "spatial_attention": Sweep(
        *(spatial, attention, _MAP, {"hidden": size(1, 40)}),
        {"form": choice(("spatial", "spatial_mean1", "channel"))},
        (nullcontext, spatial_tiles),
        4,
    ),
    "high_order_attention": Sweep(ops.high_order_attention, high_order, **_HIGH),
    "high_order_attention_map": Sweep(ops.high_order_attention_map, high_order, **_HIGH),
    "high_order_attention_mse": Sweep(ops.high_order_attention_mse, partial(high_order, target=True), **_HIGH),
    "batchnorm_statistics": Sweep(
        *(call_norm, norm, _ANY_RANK, {"residual": st.booleans(), "affine": st.booleans()}),
        {"activation": choice(("none", "relu", "relu6"))},
        draws=4,
    ),
    "batch_norm_act": Sweep(
        *(call_act, norm_act),
        # With few values per channel, the gradient of x is the rounding error of a sum that cancels.
        st.one_of(*(st.tuples(size(9, 20), size(1, 70), *[size(1, 9)] * n) for n in range(4))),
        {"residual": st.booleans(), "affine": st.booleans()},
        {"activation": choice(("none", "relu", "leaky_relu"))},
        draws=4,
    ),
    "batch_norm_act_conv1x1": Sweep(
        *(call_conv1x1, conv1x1, st.tuples(size(9, 20), size(2, 32), size(2, 9), size(2, 9))),
        {"hidden": size(1, 16), "affine": st.booleans()},
        {"form": choice(("spatial", "spatial_mean1", "channel"))},
        (nullcontext, conv1x1_tiles),
        4,
    ),
    "statistics_distance": Sweep(
        ops.statistics_distance, stored, _ANY_RANK, {"other": choice((*DTYPES, torch.float64))}
    ),
    "max_pool2x2": Sweep(
        *(pool_and_unpool, maps, st.tuples(size(0, 3), size(1, 40), size(2, 9), size(2, 9))),
        options={"relu": st.booleans()},
        draws=1,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", SWEEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_calls(kernel_device, op, data):
    sweep = SWEEPS[op]
    shape = data.draw(sweep.shape)
    # An empty batch is contiguous, because the reference would keep any other strides.
    layouts = [name for name in LAYOUTS if len(shape) == 4 or name != "channels_last"] if shape[0] else ["contiguous"]
    drawn, options = ({k: data.draw(v) for k, v in chosen.items()} for chosen in (sweep.drawn, sweep.options))
    inputs = sweep.make(shape, dtype=data.draw(dtype), layout=data.draw(choice(layouts)), device=kernel_device, **drawn)
    seed = data.draw(size(0, 1000))
    with data.draw(choice(sweep.tilings))():
        assert_backend_no_worse(partial(sweep.function, **options), lambda i: inputs(seed + i), draws=sweep.draws)


_STAGES = ((64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7))
_VECTORS = ((64, 128), (4096, 128))
_LOGITS = ((64, 200), (64, 1000), (4096, 1000), (4096, 32_000))
_target = partial(high_order, target=True)
# Function, inputs, shapes and draws.
PAPER = {
    **{
        f"distillation_kl, {direction}": (
            *(partial(ops.distillation_kl, temperature=4.0, direction=direction), logits, _LOGITS, 16),
        )
        for direction in ("forward", "reverse")
    },
    "contrastive_loss": (ops.contrastive_loss, vectors, _VECTORS, 1),
    "contrastive_loss, symmetric": (partial(ops.contrastive_loss, symmetric=True), vectors, _VECTORS, 1),
    "high_order_attention": (ops.high_order_attention, high_order, _STAGES, 1),
    "high_order_attention, per order": (partial(ops.high_order_attention, mode="per_order"), high_order, _STAGES, 1),
    "high_order_attention_mse": (ops.high_order_attention_mse, _target, _STAGES, 2),
    "high_order_attention_mse, per order": (
        *(partial(ops.high_order_attention_mse, mode="per_order"), _target, _STAGES, 2),
    ),
    **{
        f"batchnorm_statistics, residual {residual}": (
            partial(call_norm, activation="relu"),
            partial(norm, residual=residual, needs_grad=(0, 5)),
            ((64, 64, 112, 112), (64, 128, 28, 28), (64, 512, 7, 7)),
            1,
        )
        for residual in (False, True)
    },
    **{
        f"batch_norm_act, residual {residual}": (
            partial(call_act, activation="leaky_relu"),
            partial(norm_act, residual=residual),
            ((64, 64, 112, 112), (64, 256, 28, 28), (64, 512, 7, 7)),
            1,
        )
        for residual in (False, True)
    },
    "batch_norm_act_conv1x1": (
        *(call_conv1x1, partial(conv1x1, hidden=8), ((64, 64, 112, 112), (64, 128, 56, 56), (64, 256, 28, 28)), 1),
    ),
    "statistics_distance": (
        ops.statistics_distance,
        partial(stored, other=torch.float32),
        ((16, 64, 112, 112), (64, 512, 7, 7), (256, 32, 32, 32), (256, 128, 8, 8)),
        8,
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in PAPER for shape in PAPER[name][2]])
def test_shapes_of_the_paper(name, shape, dtype):
    function, make, _, draws = PAPER[name]
    layout = "channels_last" if len(shape) == 4 else "contiguous"
    inputs = make(shape, dtype=dtype, layout=layout, device="cuda")
    assert_backend_no_worse(function, inputs, draws=4 if shape == (4096, 32_000) else draws)
