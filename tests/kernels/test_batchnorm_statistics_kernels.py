"""Compares the Triton kernels of batchnorm_statistics and channel_statistics with the float64 reference."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import (
    LAYOUTS,
    MAP_SHAPES,
    assert_backend_no_worse,
    assert_close,
    random,
    unit_roundoff,
    value_and_gradients,
    with_layout,
)

from ..ops.table import DTYPES, call_norm, maps, norm

ACTIVATIONS = ("none", "relu", "relu6")
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}
# Activation, and whether there is a residual.
FORMS = (("none", False), ("relu", True), ("relu6", False), ("none", True), ("relu", False), ("relu6", True))
# The cases cover each shape with rotating dtype and form; each dtype and each layout with each activation; residuals in
# a different layout; more tiles than programs, with and without vector loads; channels that do not fill a block.
CASES = {
    **{
        name: (shape, *FORMS[i % 6], {"dtype": DTYPES[(i + i // 6) % 3]})
        for i, (name, shape) in enumerate(SHAPES.items())
    },
    **{
        f"{layout}, {activation}": (
            *((3, 13, 5, 3), activation, (i + j) % 2 == 0),
            {"dtype": DTYPES[(i + j) % 3], "layout": layout},
        )
        for i, layout in enumerate(LAYOUTS)
        for j, activation in enumerate(ACTIVATIONS)
    },
    **{
        f"{layout} with {other}": ((3, 16, 4, 2), "relu6", True, {"layout": layout, "other_layout": other})
        for layout, other in (
            ("channels_last", "contiguous"),
            ("contiguous", "channels_last"),
            ("channels_last", "strided"),
            ("offset", "transposed"),
        )
    },
    "more tiles than programs": ((40, 24, 7, 5), "relu", True, {"dtype": torch.bfloat16, "layout": "channels_last"}),
    "more tiles, contiguous": ((5, 8, 24, 24), "relu", True, {"dtype": torch.bfloat16}),
    "odd channels": ((1, 70, 50, 3), "relu", True, {"dtype": torch.bfloat16, "layout": "channels_last"}),
    "odd channels, contiguous": ((1, 70, 50, 3), "relu", True, {"dtype": torch.bfloat16}),
}
relu = partial(call_norm, activation="relu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("count", [1, 5])
def test_merges_layers_of_any_size_and_number(kernel_device, count, layout, monkeypatch):
    """Samples of a contiguous map of the first size have more tiles than a layer has chunks."""
    from dfkd_fast.kernels import batchnorm_statistics as kernels

    monkeypatch.setattr(kernels, "num_parts", lambda x: 4)
    monkeypatch.setattr(kernels, "MAX_LAYERS", 2)
    sizes = [(2, 8, 40, 40), (3, 9, 2, 2), (1, 5, 1, 1), (40, 3, 5, 2), (2, 70, 3, 2)][:count]

    def statistics(*maps, backend):
        layers = []
        for x in maps:
            zero, one = (torch.full((x.shape[1],), v, device=x.device) for v in (0.0, 1.0))
            layers.append(ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, merge=False, backend=backend)[1:])
        return tuple(t for pair in ops.merge_statistics(layers) for t in pair)

    def inputs(seed):
        options = {"scale": 2.0, "shift": 1.0, "device": kernel_device}
        made = [random(*size, seed=seed + i, layout=layout, **options) for i, size in enumerate(sizes)]
        return [x.requires_grad_() for x in made]

    assert_backend_no_worse(statistics, inputs, draws=2)


def test_a_second_merge_with_gradients_raises(kernel_device):
    x = random(2, 5, 3, 2, device=kernel_device)
    zero, one = (torch.full((5,), v, device=kernel_device) for v in (0.0, 1.0))

    def unmerged(x):
        return ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, merge=False, backend="triton")[1:]

    layer = unmerged(x)
    first, second = (ops.merge_statistics([layer])[0] for _ in range(2))  # without gradients, any number of times
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])

    layer = unmerged(x.requires_grad_())
    ops.merge_statistics([layer])
    with pytest.raises(RuntimeError, match="merged twice"):
        ops.merge_statistics([layer])
    with pytest.raises(RuntimeError, match="merged twice"):
        ops.merge_statistics([each := unmerged(x), each])


def test_unused_statistics_add_no_gradient(kernel_device):
    """Also if only one of mean and variance is used."""
    inputs = norm((2, 9, 3, 2), device=kernel_device)(1)
    for used in ((0,), (1,), (2,), (0, 2)):
        results = []
        for backend in ("triton", "reference"):
            found = call_norm(*inputs, activation="relu", backend=backend)
            total = sum(found[i].square().sum() for i in used)
            results.append(torch.autograd.grad(total, inputs[0])[0])
        assert_close(*results, atol=16 * unit_roundoff(torch.float32) * float(results[1].abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_matches_float64_reference(kernel_device, case):
    shape, activation, residual, drawn = CASES[case]
    inputs = norm(shape, residual=residual, device=kernel_device, **drawn)
    draws = 2 if math.prod(shape) > 60 else 4
    assert_backend_no_worse(partial(call_norm, activation=activation), inputs, draws=draws)


@pytest.mark.parametrize("shape", [(3, 7, 5, 3), (9, 40, 4, 4)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("float32", "contiguous"), ("bfloat16", "channels_last"), ("float16", "strided"), ("bfloat16", "contiguous")],
)
def test_channel_statistics_match_float64_reference(kernel_device, shape, dtype, layout):
    inputs = maps(shape, dtype=getattr(torch, dtype), layout=layout, shift=2.0, device=kernel_device)
    assert_backend_no_worse(ops.channel_statistics, inputs)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("results", [(0,), (1,), (2,), (1, 2), (0, 1), (0, 2)], ids=str)
def test_gradients_of_a_subset_of_the_results(kernel_device, results, residual):
    shape, activation = (3, 9, 4, 2), ACTIVATIONS[(sum(results) + residual) % 3]
    inputs = norm(shape, residual=residual, device=kernel_device)(0)
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    found, expected = (
        torch.autograd.grad(
            [call_norm(*inputs, activation=activation, backend=backend)[i] for i in results],
            leaves,
            [random(*(shape if i == 0 else shape[1:2]), seed=i + 1, device=kernel_device) for i in results],
            allow_unused=True,
        )
        for backend in ("triton", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert all(t is None or not t.any() for t in (a, b))
        else:
            assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (5, 5, 0, 3)], ids=str)
def test_empty_maps_have_no_statistics(kernel_device, shape):
    x = torch.zeros(shape, device=kernel_device, requires_grad=True)
    mean, var = ops.channel_statistics(x, backend="triton")
    assert mean.isnan().all()
    assert var.isnan().all()
    assert torch.autograd.grad(mean.sum() + var.sum(), x)[0].shape == shape


def test_equal_values_whose_squares_overflow_have_variance_zero(kernel_device):
    x = torch.full((64, 8, 6, 6), 3e19, device=kernel_device)
    for layout in (torch.contiguous_format, torch.channels_last):
        mean, var = ops.channel_statistics(x.contiguous(memory_format=layout), backend="triton")
        assert torch.equal(mean, x[0, :, 0, 0])
        assert not var.any()


def test_variance_is_stable_if_the_mean_jumps(kernel_device):
    """The mean of the first tile is far from the mean of the later tiles."""
    x = random(64, 8, 6, 6, seed=3, layout="channels_last", device=kernel_device)
    x[1:] += 1000
    _, var = ops.channel_statistics(x, backend="triton")
    assert_close(var, x.double().var((0, 2, 3), unbiased=False), atol=0.0, rtol=64 * unit_roundoff(torch.float32))


def test_each_input_may_have_its_own_dtype(kernel_device):
    x, rm, rv, w, b, res = norm((3, 9, 4, 2), dtype=torch.bfloat16, residual=True, device=kernel_device)(0)
    inputs = (x, rm.double(), rv.half(), w.double(), b.float(), res.float())
    found, expected = (value_and_gradients(partial(relu, backend=each), inputs) for each in ("triton", "reference"))
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            assert_close(a, b, atol=2e-2 if b.dtype == torch.bfloat16 else 1e-4, rtol=1e-2)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_grad_output_in_any_layout(kernel_device, layout):
    inputs = norm((3, 8, 4, 2), residual=True, layout="channels_last", device=kernel_device)(0)
    dy = random(3, 8, 4, 2, seed=9, device=kernel_device)
    dy = dy[:, :, :1, :1].expand_as(dy) if layout == "expanded" else with_layout(dy, layout)
    found, expected = (
        torch.autograd.grad(relu(*inputs, backend=backend)[0], [inputs[0], inputs[5]], g)
        for backend, g in (("triton", dy), ("reference", dy.clone(memory_format=torch.contiguous_format)))
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_more_than_two_to_the_31_elements(layout):
    memory = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
    x = torch.empty(70, 64, 704, 704, dtype=torch.bfloat16, device="cuda", memory_format=memory)
    assert x.numel() > 2**31
    x.normal_().requires_grad_()
    zero, one = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y, mean, var = ops.batchnorm_statistics(x, zero, one, None, None, 1e-5, activation="relu", backend="triton")
    dx = torch.autograd.grad((y, var), x, (torch.ones_like(y), torch.ones_like(var)))[0]
    end = x[-1].detach().float()
    assert_close(y[-1], end.relu(), atol=0.05)
    assert_close(dx[-1], (end > 0).float(), atol=1e-2)
    assert_close(mean, 0.0, atol=1e-3)
    assert_close(var, 1.0, atol=1e-3)
