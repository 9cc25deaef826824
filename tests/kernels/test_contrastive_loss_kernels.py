"""Compares the Triton kernels of contrastive_loss with the float64 reference."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse, assert_close, extreme, random, unit_roundoff, value_and_gradients

from ..ops.table import DTYPES, contrastive_tiles, vectors

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
fused = partial(ops.contrastive_loss, backend="triton")


@pytest.fixture(params=["one program", "tiles"])
def form(request):
    """Selects the kernels: one program for all vectors, or tiles with columns split between many programs."""
    with contrastive_tiles() if request.param == "tiles" else nullcontext():
        yield request.param


# In each form, the cases cover each dtype, pair of dtypes, layout, reduction, temperature and boolean option.
CROSS = {"negatives": "cross"}
SYMMETRIC, PLAIN = {"symmetric": True}, {"normalize": False, "temperature": 1.0}
CASES = {
    "float32": ({"dtype": FLOAT32}, {}),
    "bfloat16, symmetric": ({"dtype": BFLOAT16}, SYMMETRIC),
    "float16, not normalized": ({"dtype": FLOAT16}, PLAIN),
    "float32, symmetric, not normalized": ({"dtype": FLOAT32}, {**SYMMETRIC, **PLAIN}),
    "bfloat16, not normalized": ({"dtype": BFLOAT16}, PLAIN),
    "float16, symmetric": ({"dtype": FLOAT16}, SYMMETRIC),
    "bfloat16, sum": ({"dtype": BFLOAT16}, {"reduction": "sum"}),
    "float16, none": ({"dtype": FLOAT16}, {"reduction": "none"}),
    "float32, symmetric, sum": ({"dtype": FLOAT32}, {**SYMMETRIC, "reduction": "sum"}),
    "bfloat16, symmetric, none": ({"dtype": BFLOAT16}, {**SYMMETRIC, "reduction": "none"}),
    "float32, sharp": ({"dtype": FLOAT32}, {"temperature": 0.02}),
    "bfloat16, sharp": ({"dtype": BFLOAT16}, {"temperature": 0.02}),
    "float16, sharp": ({"dtype": FLOAT16}, {"temperature": 0.02}),
    "float16, warm": ({"dtype": FLOAT16}, {"temperature": 1.7}),
    "float32, cross": ({"dtype": FLOAT32}, CROSS),
    "bfloat16, cross, symmetric": ({"dtype": BFLOAT16}, {**CROSS, **SYMMETRIC, "reduction": "sum"}),
    "float16, cross, symmetric, not normalized": ({"dtype": FLOAT16}, {**CROSS, **SYMMETRIC, **PLAIN}),
    "float32, cross, none": ({"dtype": FLOAT32}, {**CROSS, "reduction": "none", "temperature": 0.02}),
    "strided": ({"dtype": BFLOAT16, "layout": "strided"}, {}),
    "transposed": ({"dtype": BFLOAT16, "layout": "transposed"}, {}),
    "offset": ({"dtype": BFLOAT16, "layout": "offset"}, {}),
    "bfloat16 and float32": ({"dtype": BFLOAT16, "other": FLOAT32}, {}),
    "float16 and bfloat16": ({"dtype": FLOAT16, "other": BFLOAT16}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_float64_reference(kernel_device, form, case):
    drawn, options = CASES[case]
    inputs = vectors((37, 9) if form == "tiles" else (9, 6), device=kernel_device, **drawn)
    assert_backend_no_worse(partial(ops.contrastive_loss, **options), inputs, draws=2)


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "tiling", "draws"),
    [
        ((1, 3), FLOAT32, SYMMETRIC, nullcontext, 2),
        ((1, 1), BFLOAT16, SYMMETRIC, nullcontext, 2),
        ((2, 300), BFLOAT16, {}, nullcontext, 1),
        ((2, 300), FLOAT32, {}, nullcontext, 1),
        ((33, 17), BFLOAT16, {}, nullcontext, 2),
        ((70, 20), FLOAT32, {}, nullcontext, 2),
        # With 200 vectors per side, some tiles hold neither anchors nor positives nor the last column.
        ((200, 9), FLOAT32, {}, contrastive_tiles, 1),
        ((200, 9), FLOAT32, {**CROSS, **SYMMETRIC}, contrastive_tiles, 1),
        ((200, 9), BFLOAT16, {**CROSS, **SYMMETRIC, **PLAIN}, partial(contrastive_tiles, 9), 1),
        ((201, 9), FLOAT32, CROSS, partial(contrastive_tiles, 2), 1),
        ((224, 9), FLOAT16, CROSS, partial(contrastive_tiles, 3), 1),
        ((200, 9), BFLOAT16, SYMMETRIC, partial(contrastive_tiles, 9), 1),
        ((200, 9), FLOAT16, {"temperature": 0.02}, partial(contrastive_tiles, 2), 1),
    ],
)
def test_shapes_match_float64_reference(kernel_device, shape, dtype, options, tiling, draws):
    inputs = vectors(shape, dtype=dtype, device=kernel_device)
    with tiling():
        assert_backend_no_worse(partial(ops.contrastive_loss, **options), inputs, draws=draws)


def test_accepts_expanded_rows_and_gradients(kernel_device, form):
    row = random(1, 6, device=kernel_device).expand(4, -1)
    s = random(4, 6, device=kernel_device, seed=1, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        value = ops.contrastive_loss(row, s, reduction="none", backend=backend)
        results.append((value, *torch.autograd.grad(value.sum(), s)))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "symmetric"), [(FLOAT32, False), (BFLOAT16, True), (FLOAT16, False)])
def test_rows_of_zeros_have_zero_gradients(kernel_device, form, symmetric, dtype):
    def make(seed):
        t, s = vectors(dtype=dtype, device=kernel_device)(seed)
        t[1], t[3], s[1], s[4] = 0, 0, 0, 0
        return t, s

    assert_backend_no_worse(partial(ops.contrastive_loss, symmetric=symmetric), make)
    dt, ds = value_and_gradients(partial(fused, symmetric=symmetric), make(0))[1]
    assert not any(row.any() for row in (dt[1], dt[3], ds[1], ds[4]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_rows(kernel_device, form, dtype):
    """Rows are very long or very short. The gradients of short rows may overflow."""
    t, s = extreme(12, 9, dtype=dtype).to(kernel_device), random(12, 9, dtype=dtype, device=kernel_device)
    if dtype == torch.bfloat16 and kernel_device == "cpu":
        t[4::6] *= 1024  # the interpreter misreads denormal bfloat16 values
    op = partial(ops.contrastive_loss, reduction="none")
    values, gradients = value_and_gradients(partial(op, backend="triton"), (t, s))
    expected, expected_gradients = value_and_gradients(partial(op, backend="reference"), (t.double(), s.double()))
    assert_close(values[0], expected[0], atol=1e-4, rtol=1e-5)
    assert not any(g.isnan().any() for g in gradients)
    scale = float(expected_gradients[1].abs().max())
    assert_close(gradients[1], expected_gradients[1], atol=2 * scale * max(unit_roundoff(dtype), 1e-5))
    long = [row for row in range(12) if row % 6 < 4]
    largest = expected_gradients[0][long].abs().amax(1, keepdim=True).cpu()
    atol = 4 * largest * unit_roundoff(dtype) * 64 + torch.finfo(dtype).smallest_normal
    assert_close(gradients[0][long], expected_gradients[0][long], atol=atol)


@pytest.mark.parametrize("factor", [2.0**-105, 2.0**100])
def test_length_of_a_row_does_not_change_the_loss(kernel_device, form, factor):
    t, s = vectors(dtype=torch.bfloat16, device=kernel_device)(0)
    (expected,), expected_gradients = value_and_gradients(fused, (t, s))
    (value,), gradients = value_and_gradients(fused, (t * factor, s))
    assert torch.equal(value, expected)
    assert torch.equal(gradients[1], expected_gradients[1])


@pytest.mark.parametrize("grad_output", [1e-30, 0.0, 65536.0])
def test_rounding_does_not_depend_on_the_size_of_grad_output(kernel_device, form, grad_output):
    for reduction in ("mean", "none"):
        results = []
        t, s = vectors(dtype=torch.float32 if grad_output < 1 else torch.float16, device=kernel_device)(0)
        for backend in ("triton", "reference"):
            leaf = s.clone().requires_grad_()
            value = ops.contrastive_loss(t, leaf, reduction=reduction, backend=backend)
            g = random(*value.shape, device=kernel_device, seed=4) * grad_output
            results.append(torch.autograd.grad(value, leaf, g)[0])
        largest = float(results[1].abs().max())
        assert_close(results[0], results[1], atol=largest * 4 * unit_roundoff(s.dtype) * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_131072_vectors_need_little_memory(symmetric):
    """The op needs at most 1 GiB beyond inputs and gradients. Some anchors are compared with float64."""
    t, s = (x.requires_grad_() for x in vectors((65_536, 128), dtype=torch.bfloat16, device="cuda")(0))
    op = partial(fused, symmetric=symmetric, reduction="none")
    torch.autograd.grad(op(t, s).mean(), (t, s))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = op(t, s)
    dt, ds = torch.autograd.grad(value.mean(), (t, s))
    assert torch.cuda.max_memory_allocated() - before <= dt.nbytes + ds.nbytes + 2**30
    unit = torch.nn.functional.normalize(torch.cat([t, s]).detach().double())
    some = torch.arange(0, 65_536, 1_021, device="cuda")
    similarity = unit[some] @ unit.T / 0.1
    similarity[torch.arange(len(some), device="cuda"), some] = -torch.inf
    expected = similarity.logsumexp(1) - similarity.gather(1, (some + 65_536)[:, None])[:, 0]
    assert_close(value[some], expected, atol=1e-5)
    assert dt.isfinite().all()
    assert ds.isfinite().all()


@pytest.mark.gpu
@pytest.mark.large_memory
def test_more_than_two_to_the_31_elements():
    dim = 1_100_000
    x = torch.randn(2_000, dim, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    value = fused(x, x, temperature=0.5, reduction="none")
    unit = torch.nn.functional.normalize(x[0].double(), dim=0)
    assert value.isfinite().all()
    # Random rows are nearly orthogonal: one other row is the same, and 3,998 have a similarity near zero.
    assert_close(value[[0, -1]], float(math.log(math.exp(2) + 3998) - 2 * (unit @ unit)), atol=1e-2)
