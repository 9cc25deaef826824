"""The Triton kernels of contrastive_loss against the reference."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.testing import assert_backend_no_worse, assert_close, extreme, random, unit_roundoff, value_and_gradients

from ..ops.table import DTYPES, contrastive_tiles, vectors

SINGLE, BRAIN, HALF = DTYPES
FORMS = ("one program", "tiles")


@pytest.fixture(params=FORMS)
def form(request):
    """How the kernels work: few vectors in one program, or tiles with columns split over many programs."""
    with contrastive_tiles() if request.param == "tiles" else nullcontext():
        yield request.param


def loss(**options):
    return lambda *a, backend: ops.contrastive_loss(*a, backend=backend, **options)


# In one program and in tiles: each dtype, pair of dtypes, layout, reduction and temperature; symmetric or not with and
# without normalizing in each.
SYMMETRIC, PLAIN = {"symmetric": True}, {"normalize": False, "temperature": 1.0}
CASES = {
    "float32": ({"dtype": SINGLE}, {}),
    "bfloat16, symmetric": ({"dtype": BRAIN}, SYMMETRIC),
    "float16, not normalized": ({"dtype": HALF}, PLAIN),
    "float32, symmetric, not normalized": ({"dtype": SINGLE}, {**SYMMETRIC, **PLAIN}),
    "bfloat16, not normalized": ({"dtype": BRAIN}, PLAIN),
    "float16, symmetric": ({"dtype": HALF}, SYMMETRIC),
    "bfloat16, sum": ({"dtype": BRAIN}, {"reduction": "sum"}),
    "float16, none": ({"dtype": HALF}, {"reduction": "none"}),
    "float32, symmetric, sum": ({"dtype": SINGLE}, {**SYMMETRIC, "reduction": "sum"}),
    "bfloat16, symmetric, none": ({"dtype": BRAIN}, {**SYMMETRIC, "reduction": "none"}),
    "float32, sharp": ({"dtype": SINGLE}, {"temperature": 0.02}),
    "bfloat16, sharp": ({"dtype": BRAIN}, {"temperature": 0.02}),
    "float16, sharp": ({"dtype": HALF}, {"temperature": 0.02}),
    "float16, warm": ({"dtype": HALF}, {"temperature": 1.7}),
    "strided": ({"dtype": BRAIN, "layout": "strided"}, {}),
    "transposed": ({"dtype": BRAIN, "layout": "transposed"}, {}),
    "offset": ({"dtype": BRAIN, "layout": "offset"}, {}),
    "bfloat16 and float32": ({"dtype": BRAIN, "other": SINGLE}, {}),
    "float16 and bfloat16": ({"dtype": HALF, "other": BRAIN}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(kernel_device, form, case):
    drawn, options = CASES[case]
    shape = (37, 9) if form == "tiles" else (9, 6)
    assert_backend_no_worse(loss(**options), vectors(shape, device=kernel_device, **drawn), draws=2)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3), SINGLE), ((1, 1), BRAIN), ((2, 300), BRAIN), ((2, 300), SINGLE), ((33, 17), BRAIN), ((70, 20), SINGLE)],
)
def test_shapes(kernel_device, shape, dtype):
    draws = 1 if shape[1] > 256 else 2
    assert_backend_no_worse(
        loss(symmetric=shape[0] == 1), vectors(shape, dtype=dtype, device=kernel_device), draws=draws
    )


@pytest.mark.parametrize(
    ("options", "split", "dtype"), [({}, 1, SINGLE), (SYMMETRIC, 9, BRAIN), ({"temperature": 0.02}, 2, HALF)]
)
def test_tiles_with_and_without_masks(kernel_device, options, split, dtype):
    """200 vectors a side: tiles without the anchors, their positives or the end among them."""
    with contrastive_tiles(split):
        assert_backend_no_worse(loss(**options), vectors((200, 9), dtype=dtype, device=kernel_device), draws=1)


def test_kernels_take_broadcast_rows_and_gradients(kernel_device, form):
    row = random(1, 6, device=kernel_device).expand(4, -1)
    s = random(4, 6, device=kernel_device, seed=1, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        value = ops.contrastive_loss(row, s, reduction="none", backend=backend)
        results.append((value, torch.autograd.grad(value.sum(), s)[0]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "symmetric"), [(SINGLE, False), (BRAIN, True), (HALF, False)])
def test_kernels_and_rows_of_zero_length(kernel_device, form, symmetric, dtype):
    def make(seed):
        t, s = vectors(dtype=dtype, device=kernel_device)(seed)
        t[1], t[3], s[1], s[4] = 0, 0, 0, 0
        return t, s

    assert_backend_no_worse(loss(symmetric=symmetric), make)
    op = loss(symmetric=symmetric)
    dt, ds = value_and_gradients(lambda *a: op(*a, backend="triton"), make(0))[1]
    for zero in (dt[1], dt[3], ds[1], ds[4]):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_extreme_rows(kernel_device, form, dtype):
    """Very long and very short rows; the gradients of the short ones need not exist in the type."""
    t, s = extreme(12, 9, dtype=dtype).to(kernel_device), random(12, 9, dtype=dtype, device=kernel_device)
    if dtype == torch.bfloat16 and kernel_device == "cpu":
        t[4::6] *= 1024  # the interpreter reads denormal bfloat16 numbers wrongly
    op = loss(reduction="none")
    values, gradients = value_and_gradients(lambda *a: op(*a, backend="triton"), (t, s))
    expected, expected_gradients = value_and_gradients(lambda *a: op(*a, backend="reference"), (t.double(), s.double()))
    assert_close(values[0], expected[0], atol=1e-4, rtol=1e-5)
    assert not any(g.isnan().any() for g in gradients)
    scale = float(expected_gradients[1].abs().max())
    assert_close(gradients[1], expected_gradients[1], atol=2 * scale * max(unit_roundoff(dtype), 1e-5))
    long = [row for row in range(12) if row % 6 < 4]
    largest = expected_gradients[0][long].abs().amax(1, keepdim=True)
    tiny = torch.finfo(dtype).smallest_normal
    assert_close(
        gradients[0][long], expected_gradients[0][long], atol=4 * largest.cpu() * unit_roundoff(dtype) * 64 + tiny
    )


@pytest.mark.parametrize("factor", [2.0**-105, 2.0**100])
def test_kernels_and_the_length_of_a_row(kernel_device, form, factor):
    t, s = vectors(dtype=torch.bfloat16, device=kernel_device)(0)
    expected, expected_gradients = value_and_gradients(lambda *a: ops.contrastive_loss(*a, backend="triton"), (t, s))
    got, gradients = value_and_gradients(lambda *a: ops.contrastive_loss(*a, backend="triton"), (t * factor, s))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(gradients[1], expected_gradients[1])


@pytest.mark.parametrize("grad_output", [1e-30, 0.0, 65536.0])
def test_kernels_scale_by_any_upstream_gradient(kernel_device, form, grad_output):
    """What is rounded to half precision must not depend on how large the gradient that comes in is."""
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


def test_kernels_keep_one_number_an_anchor(kernel_device):
    kept = []
    t, s = (x.requires_grad_() for x in vectors(dtype=torch.bfloat16, device=kernel_device)(0))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.contrastive_loss(t, s, backend="triton")
    assert [t.shape for t in kept] == [(5, 7), (5, 7), (5,)]


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_many_vectors_in_little_memory(symmetric):
    """131,072 vectors: at most 1 GiB beyond inputs and gradients; a few anchors against float64."""
    t, s = (x.requires_grad_() for x in vectors((65_536, 128), dtype=torch.bfloat16, device="cuda")(0))
    op = lambda: ops.contrastive_loss(t, s, symmetric=symmetric, reduction="none", backend="triton")  # noqa: E731
    torch.autograd.grad(op().mean(), (t, s))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = op()
    dt, ds = torch.autograd.grad(value.mean(), (t, s))
    results = sum(x.numel() * x.element_size() for x in (dt, ds))
    assert torch.cuda.max_memory_allocated() - before <= results + 2**30
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
def test_more_elements_than_32_bits_count():
    dim = 1_100_000
    x = torch.randn(2_000, dim, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    value = ops.contrastive_loss(x, x, temperature=0.5, reduction="none", backend="triton")
    few = torch.cat([x[:4], x[-4:]]).double()
    unit = few / few.norm(dim=1, keepdim=True)
    assert value.isfinite().all()
    # Rows at random are nearly orthogonal: each sees itself once more, and 3,998 with a similarity near zero.
    assert_close(value[[0, -1]], float(math.log(math.exp(2) + 3998) - 2 * (unit[0] @ unit[0])), atol=1e-2)
