"""The ops as tests call them: inputs drawn from a seed, tilings, and the calls of tests/ops/test_contract.py."""

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dfkd_fast import ops
from dfkd_fast.testing import LAYOUTS, assert_close, random, value_and_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of Triton's kernels."""

Make = Callable[[int], list[Any]]
"""Draws an op's inputs from a seed; None is an argument left out."""


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
    """Checks that a function returns the values and gradients of its definition, for a random output gradient."""
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
    """Two (N, D): of :func:`ops.contrastive_loss`. ``other`` is the dtype of the second."""
    return _drawn(
        *(partial(random, *shape, dtype=d, **options) for d in (dtype, other or dtype)), needs_grad=needs_grad
    )


def logits(shape=(4, 7), *, scale=2.0, **options: Any) -> Make:
    """Two (N, classes): of :func:`ops.distillation_kl`."""
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
    """Of :func:`ops.spatial_attention`: logits of deviation 1. ``parameters`` is the dtype of weight and bias."""
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
    """A scale at which what spatial_attention adds to the features is as large as they are."""
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
    """Of :func:`ops.high_order_attention`: weights of deviation 1.5 / sqrt(fan in), at which all orders matter.

    With ``target`` of :func:`ops.high_order_attention_mse`, all but the target requiring a gradient.
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
    """x, running mean and variance, weight, bias and residual, in the order of :func:`call_norm`."""
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


def stored(shape=(3, 5, 4, 2), *, dtype=torch.float32, other=None, layout="contiguous", device="cpu", needs_grad=(0,)):
    """x, running mean and variance: of :func:`ops.statistics_distance`. ``other`` is the dtype of the statistics."""
    fixed = {"dtype": other or dtype, "device": device}
    return _drawn(
        partial(random, *shape, scale=3.0, shift=1.0, dtype=dtype, layout=layout, device=device),
        partial(random, shape[1], **fixed),
        partial(_variance, shape[1], **fixed),
        needs_grad=needs_grad,
    )


def maps(shape=(2, 6, 5, 4), *, needs_grad=(), **options: Any) -> Make:
    """Of ops that take a map only."""
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
    """Few different values, most of them not positive: windows with equals, and windows without anything positive."""
    return random(*shape, dtype=dtype, **options).round().clamp(-2, 1)


def special_values(dtype: torch.dtype = torch.float64) -> Tensor:
    """Every window of four special values."""
    special = (math.nan, -math.inf, -1.0, -0.0, 0.0, 1.0, math.inf)
    return torch.tensor(list(itertools.product(special, repeat=4)), dtype=dtype).view(7, 7 * 7 * 7, 2, 2)


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal to the bit but for the sign of zero, NaN where NaN is, in equal strides and dtype."""
    assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def there_and_back(x, *, relu=True, backend=None):
    """Pooling, something in between, and unpooling."""
    y, code = ops.max_pool2x2(x, relu=relu, backend=backend)
    return ops.max_unpool2x2(y * 3, code, x.shape[2:], backend=backend)


def unpool(y, *, backend=None):
    """Unpooling by codes of all kinds."""
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
    """Tiles of 16 rows by so many channels: fewer than there are is the form that splits them."""
    names = ("high_order_attention", "high_order_attention_backward", "high_order_attention_weights")
    return _tiles(names, {"BLOCK_M": 16, "BLOCK_C": channels, "BLOCK_K": 16})


def spatial_tiles(**changed: int) -> AbstractContextManager[None]:
    """Several tiles to a map, a channel and a chunk, where shapes are small."""
    names = [f"spatial_attention_{name}" for name in ("statistics", "slopes", "gate", "rows", "gradients")]
    tile = {"BLOCK_M": 16, "BLOCK_C": 16, "BLOCK_K": 16, "TILES": 1, "PROGRAMS": 2, "MEGABYTES": 0}
    return _tiles(names, {**tile, **changed})


def distance_tiles() -> AbstractContextManager[None]:
    """32 channels at a time: thousands of them take the interpreter too long."""
    return _tiles(["statistics_distance"], {"BLOCK": 32}, num_warps=1)


@contextmanager
def contrastive_tiles(split: int = 1) -> Iterator[None]:
    """Columns split over many programs, where few vectors would be served in one."""
    from dfkd_fast.kernels import contrastive_loss as kernels

    with mock.patch.multiple(kernels, SMALL=0, tiles_a_program=lambda blocks, tiles, available: split):
        yield


class RecordedOperators(TorchDispatchMode):
    """Keeps the calls of the library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "dfkd_fast":
            self.calls.append((function, tree_map_only(Tensor, Tensor.detach, arguments)))
        return function(*arguments, **(keywords or {}))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A public function with options, and how its contract is tested.

    Attributes:
        function: takes the inputs and ``backend``.
        make: draws inputs of a shape.
        shapes: three small ones, the first of which no tile fits.
        needs_grad: arguments that may require a gradient.
        tiling: context in which Triton's kernels run.
        batched: arguments with a dimension for samples.
        autocast: whether autocast changes nothing.
        many: a shape that takes several programs.
        graph: a shape for a GPU.
        atol: absolute tolerance in float32, relative to one.
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
    "channel_statistics": Case(function=ops.channel_statistics, make=maps, **_MAPS),
    "statistics_distance": Case(function=ops.statistics_distance, make=stored, **_MAPS),
    "max_pool2x2": Case(
        function=there_and_back, make=maps, **{**_MAPS, "shapes": ((2, 7, 5, 3), (3, 3, 4, 6), (2, 3, 4, 6))}
    ),
    "max_unpool2x2": Case(function=unpool, make=maps, **_MAPS),
}
