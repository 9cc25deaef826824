"""Seeded inputs, tile sizes and the table of cases for tests of ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public names for these
from torch.utils._pytree import tree_map_only

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, assert_close, random, value_and_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes supported by the Triton kernels."""

Make = Callable[[int], list[Any]]
"""Returns an op's inputs for a seed; None is an omitted argument."""


def _drawn(*draws: Callable[..., Tensor] | None, needs_grad: Sequence[int] = ()) -> Make:
    def make(seed: int = 1) -> list[Any]:
        inputs = [None if draw is None else draw(seed=seed + i) for i, draw in enumerate(draws)]
        return [x.requires_grad_() if i in needs_grad and x is not None else x for i, x in enumerate(inputs)]

    return make


def assert_matches(
    function: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    *,
    atol: float = 1e-12,
    gradient_atol: float | None = None,
    rtol: float = 1e-12,
) -> None:
    """Assert that a function has the values and gradients of its definition, for random output gradients."""
    values, gradients = value_and_gradients(function, inputs)
    expected, expected_gradients = value_and_gradients(definition, inputs)
    for i, (a, b) in enumerate(zip(values, expected, strict=True)):
        assert_close(a, b, atol=atol, rtol=rtol, name=f"output {i}")
    for i, (a, b) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, atol=gradient_atol or atol, rtol=rtol, name=f"gradient of input {i}")


def _variance(*shape: int, **options: Any) -> Tensor:
    return random(*shape, **options).square() + 0.1


def vectors(shape=(5, 7), *, dtype=torch.float32, other=None, needs_grad=(), **options: Any) -> Make:
    """Inputs of :func:`ops.contrastive_loss`: two tensors (N, D). ``other`` is the dtype of the second."""
    return _drawn(
        *(partial(random, *shape, dtype=d, **options) for d in (dtype, other or dtype)), needs_grad=needs_grad
    )


def logits(shape=(4, 7), *, scale=2.0, **options: Any) -> Make:
    """Inputs of :func:`ops.distillation_kl`: two tensors (N, classes)."""
    return vectors(shape, scale=scale, **options)


def attention(
    shape=(2, 8, 4, 4),
    *,
    hidden=3,
    dtype=torch.float32,
    parameters=None,
    layout="contiguous",
    device="cpu",
    bias=True,
    needs_grad=(),
) -> Make:
    """Inputs of :func:`ops.spatial_attention`. ``parameters`` is the dtype of weight and bias."""
    n, c, h, w = shape
    maps = {"dtype": dtype, "layout": layout, "device": device}
    fixed = {"dtype": parameters or dtype, "device": device}
    return _drawn(
        partial(random, *shape, **maps),
        partial(random, n, hidden, h, w, **maps),
        partial(random, c, hidden, scale=hidden**-0.5, **fixed),
        partial(random, c, **fixed) if bias else None,
        needs_grad=needs_grad,
    )


def near(form: str, shape: Sequence[int]) -> float:
    """Return a scale at which the term that spatial_attention adds is about as large as the features."""
    return {"spatial": float(shape[2] * shape[3]), "spatial_mean1": 1.0, "channel": float(shape[1])}[form]


def high_order(
    shape=(2, 8, 4, 4),
    *,
    order=3,
    hidden=None,
    dtype=torch.float32,
    layout="contiguous",
    device="cpu",
    scale=1.0,
    target=False,
    needs_grad=None,
) -> Make:
    """Inputs of :func:`ops.high_order_attention`, with weights large enough for all orders to matter.

    With ``target``, inputs of :func:`ops.high_order_attention_mse`; all except the target require a gradient.
    """
    channels = shape[1]
    hidden = hidden or max(1, channels // 4)
    fixed = {"dtype": dtype, "device": device}
    return _drawn(
        partial(random, *shape, layout=layout, scale=scale, **fixed),
        partial(random, order * (order + 1) // 2, hidden, channels, scale=1.5 / channels**0.5, **fixed),
        partial(random, order, channels, hidden, scale=1.5 / hidden**0.5, **fixed),
        *([partial(random, *shape, layout=layout, **fixed)] if target else []),
        needs_grad=needs_grad if needs_grad is not None else (0, 1, 2) if target else (),
    )


def norm(
    shape=(3, 5, 4, 2),
    *,
    dtype=torch.float32,
    layout="contiguous",
    other_layout=None,
    residual=False,
    affine=True,
    device="cpu",
    needs_grad=(0, 3, 4, 5),
) -> Make:
    """Inputs of :func:`call_norm`: x, running mean and variance, weight, bias and residual."""
    fixed = {"dtype": dtype, "device": device}
    vector = partial(random, shape[1], **fixed)
    return _drawn(
        partial(random, *shape, scale=3.0, shift=1.0, layout=layout, **fixed),
        partial(vector, shift=1.0),
        partial(_variance, shape[1], **fixed),
        partial(vector, shift=1.0) if affine else None,
        vector if affine else None,
        partial(random, *shape, layout=other_layout or layout, **fixed) if residual else None,
        needs_grad=needs_grad,
    )


def call_norm(x, running_mean, running_var, weight, bias, residual, *, eps=1e-3, **options: Any):
    return ops.batchnorm_statistics(x, running_mean, running_var, weight, bias, eps, residual=residual, **options)


def call_norms(x, running_mean, running_var, weight, bias, residual, **options: Any):
    """Two BatchNorms whose statistics are merged together."""
    y, *first = call_norm(x, running_mean, running_var, weight, bias, residual, merge=False, **options)
    z, *second = call_norm(y, running_mean, running_var, weight, None, None, merge=False, **options)
    return z, *(t for pair in ops.merge_statistics([first, second]) for t in pair)


def call_act(x, weight, bias, running_mean, running_var, residual, **options: Any):
    """Call :func:`ops.batch_norm_act`; by default the running statistics are checked, but not updated."""
    options = {"eps": 1e-3, "negative_slope": 0.2, "update_running_stats": False, **options}
    return ops.batch_norm_act(x, weight, bias, running_mean, running_var, residual=residual, **options)


def norm_act(shape=(3, 5, 4, 2), *, needs_grad=(0, 1, 2, 5), **options: Any) -> Make:
    """Inputs of :func:`call_act`: those of :func:`norm`, with weight and bias before the running statistics."""
    make = norm(shape, needs_grad=[(0, 3, 4, 1, 2, 5)[i] for i in needs_grad], **options)

    def reordered(seed: int = 1) -> list[Any]:
        # Output gradients have seed 1. If they were a linear function of x, the gradient of x would be zero.
        inputs = make(seed + 100)
        return [inputs[i] for i in (0, 3, 4, 1, 2, 5)]

    return reordered


def conv1x1(
    shape=(2, 8, 4, 4),
    *,
    hidden=3,
    affine=True,
    dtype=torch.float32,
    layout="channels_last",
    device="cpu",
    needs_grad=(0, 1, 2, 5, 6),
) -> Make:
    """Inputs of :func:`call_conv1x1`."""
    fixed = {"dtype": dtype, "device": device}
    vector = partial(random, shape[1], **fixed)
    return _drawn(
        partial(random, *shape, scale=3.0, shift=1.0, layout=layout, **fixed),
        partial(vector, shift=1.0) if affine else None,
        vector if affine else None,
        partial(vector, shift=1.0),
        partial(_variance, shape[1], **fixed),
        partial(random, hidden, shape[1], scale=shape[1] ** -0.5, **fixed),
        partial(random, hidden, **fixed) if affine else None,
        needs_grad=needs_grad,
    )


def call_conv1x1(
    x, weight, bias, running_mean, running_var, conv_weight, conv_bias, *, form="spatial", backend=None, **options: Any
):
    """Call :func:`ops.batch_norm_act_conv1x1` and gate the features by a softmax of a product with sin(reduced).

    The hidden map is not linear, because the gate's gradient of a linear map's bias would be a sum that cancels.
    """
    inputs = (x, weight, bias, running_mean, running_var, conv_weight, conv_bias)
    options = {"eps": 1e-3, "negative_slope": 0.2, "update_running_stats": False, **options}
    reduced, features, norm = ops.batch_norm_act_conv1x1(*inputs, backend=backend, **options)
    hidden, channels = conv_weight.shape
    gate = torch.linspace(-1, 1, channels * hidden, dtype=x.dtype, device=x.device).view(channels, hidden)
    scale = near(form, x.shape)
    return reduced, ops.spatial_attention(
        features, reduced.sin(), gate, scale=scale, form=form, norm=norm, backend=backend
    )


def stored(shape=(3, 5, 4, 2), *, dtype=torch.float32, other=None, layout="contiguous", device="cpu", needs_grad=(0,)):
    """Inputs of :func:`ops.statistics_distance`. ``other`` is the dtype of the running statistics."""
    fixed = {"dtype": other or dtype, "device": device}
    return _drawn(
        partial(random, *shape, scale=3.0, shift=1.0, dtype=dtype, layout=layout, device=device),
        partial(random, shape[1], **fixed),
        partial(_variance, shape[1], **fixed),
        needs_grad=needs_grad,
    )


def layers(shape=(1, 5, 7), *, dtype=torch.float32, other=None, layout="contiguous", device="cpu", needs_grad=(0, 1)):
    """Inputs of :func:`call_distances`: mean, var, running_mean and running_var of layers with shape[1:] channels.

    ``needs_grad`` counts within a layer. ``layout`` has no effect on vectors.
    """
    draws = []
    for channels in shape[1:]:
        for kind in (dtype, other or dtype):
            draws += [partial(draw, channels, dtype=kind, device=device) for draw in (random, _variance)]
    return _drawn(*draws, needs_grad=[i for i in range(len(draws)) if i % 4 in needs_grad])


def call_distances(*statistics, backend=None):
    return ops.statistics_distances([statistics[i : i + 4] for i in range(0, len(statistics), 4)], backend=backend)


def maps(shape=(2, 6, 5, 4), *, needs_grad=(), **options: Any) -> Make:
    """Inputs of ops with one map."""
    return _drawn(partial(random, *shape, **options), needs_grad=needs_grad)


POOL_SHAPES = {
    "plain": (2, 8, 4, 4),
    "odd": (3, 7, 5, 3),
    "one channel": (2, 1, 3, 2),
    "one window": (1, 5, 2, 2),
    "one window, one channel": (1, 1, 2, 2),
    "odd height, vectors of four": (1, 12, 7, 4),
    "odd width": (2, 16, 2, 9),
    "more channels than a tile": (1, 70, 4, 3),
    "empty batch": (0, 5, 3, 4),
}


def ties(*shape: int, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """Return few distinct values, mostly not positive, so that windows have ties or no positive element."""
    return random(*shape, dtype=dtype, **options).round().clamp(-2, 1)


def special_values(dtype: torch.dtype = torch.float64) -> Tensor:
    """Return all 2 x 2 windows of special values."""
    special = (math.nan, -math.inf, -1.0, -0.0, 0.0, 1.0, math.inf)
    return torch.tensor(list(itertools.product(special, repeat=4)), dtype=dtype).view(7, 7 * 7 * 7, 2, 2)


def assert_same(a: Tensor, b: Tensor) -> None:
    """Assert equal values (except for the sign of zero), dtypes and strides; NaN equals NaN."""
    assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def pool_and_unpool(x, *, relu=True, backend=None):
    """Pool, multiply, and unpool."""
    y, code = ops.max_pool2x2(x, relu=relu, backend=backend)
    return ops.max_unpool2x2(y * 3, code, x.shape[2:], backend=backend)


def unpool(y, *, backend=None):
    """Unpool with every code."""
    code = (torch.arange(y.numel(), device=y.device) % 7).to(torch.uint8).view(y.shape)
    return ops.max_unpool2x2(y, code, backend=backend)


@contextmanager
def _tiles(kernels: Sequence[str], tile: dict[str, int], **launch: Any) -> Iterator[None]:
    from dfkd_fast.kernels.config import Launch, forced

    with ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(forced(kernel, Launch(tile=tile, **launch)))
        yield


def high_order_tiles(channels: int) -> AbstractContextManager[None]:
    """Use tiles of 16 rows and the given number of channels; fewer than C select the split kernels."""
    names = ["high_order_attention", *(f"high_order_attention_{name}" for name in ("backward", "hidden", "weights"))]
    return _tiles(names, {"BLOCK_M": 16, "BLOCK_C": channels, "BLOCK_K": 16})


def spatial_tiles(**changed: int) -> AbstractContextManager[None]:
    """Use several tiles per map, channel and chunk for small shapes."""
    names = [f"spatial_attention_{name}" for name in ("statistics", "delta", "gate", "rows", "gradients")]
    tile = {"BLOCK_M": 16, "BLOCK_C": 16, "BLOCK_K": 16, "TILES": 1, "PROGRAMS": 2, "MEGABYTES": 0}
    return _tiles(names, {**tile, **changed})


def conv1x1_tiles() -> AbstractContextManager[None]:
    """Use tiles of 16 positions and, in backward, 16 channels, and fewer programs than tiles."""
    stack = ExitStack()
    tile = {"BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_K": 16, "LOOP_STAGES": 2, "PROGRAMS": 1}
    stack.enter_context(_tiles(["batch_norm_act_conv1x1"], tile))
    names = ["batch_norm_act_conv1x1_sums", "batch_norm_act_conv1x1_backward"]
    stack.enter_context(_tiles(names, {**tile, "BLOCK_C": 16}))
    return stack


def distance_tiles() -> AbstractContextManager[None]:
    """Use 32 channels per tile, because the interpreter is slow with thousands."""
    return _tiles(["statistics_distance"], {"BLOCK": 32}, num_warps=1)


@contextmanager
def contrastive_tiles(split: int = 1) -> Iterator[None]:
    """Split columns over many programs, even for few vectors."""
    from dfkd_fast.kernels import contrastive_loss as kernels

    with mock.patch.multiple(kernels, SMALL=0, tiles_per_program=lambda blocks, tiles, available: split):
        yield


class RecordedOperators(TorchDispatchMode):
    """Records calls of dfkd_fast operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "dfkd_fast":
            self.calls.append((function, tree_map_only(Tensor, Tensor.detach, tuple(arguments))))
        return function(*arguments, **(keywords or {}))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A public function with options, for the tests in test_contract.py.

    Attributes:
        function: takes the inputs and ``backend``.
        make: returns the inputs for a shape.
        shapes: three small shapes; the first is not a multiple of any tile.
        needs_grad: indices of the differentiable arguments.
        tiling: context in which Triton kernels run.
        batched: indices of arguments with a batch dimension.
        autocast: whether autocast has no effect.
        many: a shape that needs several programs.
        graph: a shape for CUDA graphs.
        atol: absolute tolerance in float32.
    """

    function: Callable[..., Any]
    make: Callable[..., Make]
    shapes: Sequence[tuple[int, ...]]
    needs_grad: tuple[int, ...]
    tiling: Callable[[], AbstractContextManager[None]] = nullcontext
    batched: tuple[int, ...] = (0, 1)
    autocast: bool = True
    many: tuple[int, ...] = (9, 24, 7, 5)
    graph: tuple[int, ...] = (8, 64, 14, 14)
    atol: float = 1e-5

    @property
    def layouts(self) -> tuple[Any, ...]:
        return LAYOUTS if len(self.shapes[0]) == 4 else tuple(name for name in LAYOUTS if name != "channels_last")


_ROWS: dict[str, Any] = {"shapes": ((5, 9), (6, 7), (4, 7)), "needs_grad": (0, 1), "atol": 1e-6}
_KL = {**_ROWS, "make": logits, "many": (70, 500), "graph": (64, 200)}
_CONTRAST = {**_ROWS, "make": vectors, "many": (37, 9), "graph": (700, 96)}
_MAPS: dict[str, Any] = {"shapes": ((2, 19, 5, 3), (3, 8, 5, 2), (2, 8, 4, 4)), "needs_grad": (0,), "batched": (0,)}
_PARAMETERS = {**_MAPS, "many": (2, 20, 5, 4), "autocast": False}
_SPATIAL = {**_PARAMETERS, "make": attention, "needs_grad": (0, 1, 2, 3), "batched": (0, 1), "graph": (4, 16, 15, 14)}
_HIGH = {**_PARAMETERS, "make": high_order, "needs_grad": (0, 1, 2), "shapes": ((2, 20, 3, 3), *_MAPS["shapes"][1:])}
_NORM_ACT = {**_MAPS, "make": partial(norm_act, residual=True), "needs_grad": (0, 1, 2, 5), "batched": (0, 5)}
_CONV = {**_MAPS, "make": conv1x1, "needs_grad": (0, 1, 2, 5, 6), "many": (2, 20, 5, 4), "autocast": False}
_CONV["atol"] = 3e-5  # gradients of the weights are sums of large numbers
_NORM = {**_MAPS, "make": partial(norm, residual=True), "needs_grad": (0, 3, 4, 5), "batched": (0, 5)}

CASES: dict[str, Case] = {
    "distillation_kl": Case(function=partial(ops.distillation_kl, temperature=2.0), **_KL),
    "distillation_kl, reverse, none": Case(
        function=partial(ops.distillation_kl, direction="reverse", reduction="none"), **{**_KL, "many": (5, 9)}
    ),
    "contrastive_loss": Case(function=ops.contrastive_loss, **_CONTRAST),
    "contrastive_loss, symmetric, none": Case(
        function=partial(ops.contrastive_loss, symmetric=True, reduction="none"),
        **{**_CONTRAST, "tiling": contrastive_tiles, "graph": (64, 96)},
    ),
    "contrastive_loss, cross": Case(
        function=partial(ops.contrastive_loss, negatives="cross"),
        **{**_CONTRAST, "tiling": contrastive_tiles, "graph": (64, 96)},
    ),
    "spatial_attention": Case(function=partial(ops.spatial_attention, scale=9.0), **_SPATIAL),
    "spatial_attention, mean 1, tiles": Case(
        function=partial(ops.spatial_attention, scale=2.0, form="spatial_mean1"), tiling=spatial_tiles, **_SPATIAL
    ),
    "spatial_attention, channel": Case(
        function=partial(ops.spatial_attention, scale=2.0, form="channel"),
        tiling=partial(spatial_tiles, BLOCK_C=32),
        **_SPATIAL,
    ),
    "high_order_attention": Case(function=ops.high_order_attention, **{**_HIGH, "graph": (8, 512, 7, 7)}),
    "high_order_attention, tiles": Case(
        function=ops.high_order_attention, tiling=partial(high_order_tiles, 16), **_HIGH
    ),
    "high_order_attention_map, per order, tiles": Case(
        function=partial(ops.high_order_attention_map, mode="per_order"), tiling=partial(high_order_tiles, 32), **_HIGH
    ),
    "high_order_attention_mse, tiles": Case(
        function=ops.high_order_attention_mse,
        tiling=partial(high_order_tiles, 16),
        **{**_HIGH, "make": partial(high_order, target=True), "batched": (0, 3)},
    ),
    "batchnorm_statistics": Case(function=partial(call_norm, activation="relu"), **_NORM),
    "batchnorm_statistics, relu6": Case(
        function=partial(call_norm, activation="relu6"),
        **{**_NORM, "make": norm, "needs_grad": (0, 3, 4), "batched": (0,)},
    ),
    "batchnorm_statistics, none, no affine": Case(
        function=call_norm, **{**_NORM, "make": partial(norm, affine=False, residual=True), "needs_grad": (0, 5)}
    ),
    "batchnorm_statistics, two layers": Case(function=partial(call_norms, activation="relu"), **_NORM),
    "batch_norm_act": Case(function=partial(call_act, activation="relu"), **_NORM_ACT),
    "batch_norm_act, fork": Case(function=partial(call_act, activation="relu", fork=True), **_NORM_ACT),
    "batch_norm_act, leaky_relu": Case(
        function=partial(call_act, activation="leaky_relu"),
        **{**_NORM_ACT, "make": norm_act, "needs_grad": (0, 1, 2), "batched": (0,)},
    ),
    "batch_norm_act, leaky_relu with residual": Case(
        function=partial(call_act, activation="leaky_relu"),
        **{**_NORM_ACT, "make": partial(norm_act, affine=False, residual=True), "needs_grad": (0, 5)},
    ),
    "batch_norm_act, none": Case(
        function=call_act,
        **{**_NORM_ACT, "make": partial(norm_act, affine=False), "needs_grad": (0,), "batched": (0,)},
    ),
    "batch_norm_act_conv1x1": Case(function=call_conv1x1, **_CONV),
    "batch_norm_act_conv1x1, channel, no affine, tiles": Case(
        function=partial(call_conv1x1, form="channel"),
        tiling=conv1x1_tiles,
        **{**_CONV, "make": partial(conv1x1, affine=False), "needs_grad": (0, 5)},
    ),
    "channel_statistics": Case(function=ops.channel_statistics, make=maps, **_MAPS),
    "statistics_distance": Case(function=ops.statistics_distance, make=stored, **_MAPS),
    "statistics_distances": Case(
        function=call_distances,
        make=layers,
        shapes=((1, 19, 3), (1, 5, 8), (1, 4, 7)),
        needs_grad=(0, 1, 4, 5),
        batched=(0, 5),
        many=(1, 24, 40, 7),
        graph=(1, 64, 512),
    ),
    "max_pool2x2": Case(
        function=pool_and_unpool, make=maps, **{**_MAPS, "shapes": ((2, 7, 5, 3), (3, 3, 4, 6), (2, 3, 4, 6))}
    ),
    "max_unpool2x2": Case(function=unpool, make=maps, **_MAPS),
}
