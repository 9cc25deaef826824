"""The cuda backend on a GPU, at the shapes of real networks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.ops import extension
from dfkd_fast.ops.backend import UnsupportedError
from dfkd_fast.testing import assert_backend_no_worse, assert_close, assert_compiles

from ..ops.table import RecordedOperators, attention, high_order, vectors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(60),  # for kernels that hang
    pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE)),
]

DTYPES = (torch.bfloat16, torch.float16)


def case(function, make, shape, **options):
    """Returns the op and a function that draws its inputs."""
    made = {"layout": "channels_last"} if len(shape) == 4 else {}
    made |= {"hidden": max(1, shape[1] // 8)} if make is attention else {}
    needs_grad = tuple(range({vectors: 2, attention: 4, high_order: 3}[make]))
    return partial(function, **options), partial(make, shape, device="cuda", needs_grad=needs_grad, **made)


CASES = {
    **{
        f"contrast, {2 * n} vectors": case(ops.contrastive_loss, vectors, (n, d))
        for n, d in ((64, 128), (125, 100), (301, 100), (4096, 128))
    },
    **{
        f"{form} of {shape[1]} maps": case(
            ops.spatial_attention,
            attention,
            shape,
            form=form,
            scale=0.05 * (shape[2] * shape[3] if form == "spatial" else 1),
        )
        for shape in ((8, 256, 28, 28), (4, 128, 56, 56), (8, 64, 112, 112), (3, 192, 9, 7), (3, 40, 15, 17))
        for form in ("spatial", "spatial_mean1", "channel")
    },
    **{
        f"{mode} of {shape[1]} channels": case(ops.high_order_attention, high_order, shape, mode=mode)
        for shape in ((8, 64, 56, 56), (16, 128, 28, 28), (32, 256, 14, 14), (64, 512, 7, 7), (3, 36, 5, 6))
        for mode in ("joint", "per_order")
    },
}
# Too few vectors, a softmax over channels, sizes that are not multiples of 8.
UNSUPPORTED = {
    *("contrast, 128 vectors", "contrast, 250 vectors"),
    *(name for name in CASES if name.startswith("channel of") or " of 40 " in name or " of 36 " in name),
}
SUPPORTED = [name for name in CASES if name not in UNSUPPORTED]


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_errors_are_within_twice_the_references(name, dtype):
    op, make = CASES[name]
    assert_backend_no_worse(op, make(dtype=dtype), backend="cuda", draws=2)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_inputs_raise(name):
    op, make = CASES[name]
    with pytest.raises(UnsupportedError, match="the kernel supports"):
        op(*make(dtype=torch.bfloat16)(0), backend="cuda")


@pytest.mark.parametrize("name", SUPPORTED)
def test_results_are_deterministic_and_equal_in_a_graph(name):
    op, make = CASES[name]
    inputs, others = (make(dtype=torch.bfloat16)(seed) for seed in (0, 10))

    def run():
        out = op(*inputs, backend="cuda")
        return [out, *torch.autograd.grad(out.float().sum(), inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = [tensor.clone() for tensor in run()]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    with torch.no_grad():
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["contrast, 602 vectors", "spatial_mean1 of 192 maps", "joint of 64 channels"])
def test_compiles_without_graph_breaks(name):
    op, make = CASES[name]
    assert_compiles(partial(op, backend="cuda"), [make(dtype=torch.bfloat16)(0)])


@pytest.mark.parametrize("symmetric", [False, True])
def test_memory_of_many_vectors_is_linear(symmetric):
    """131,072 vectors need at most 1 GiB beyond inputs and gradients. Compares some anchors with float64."""
    count = 65_536
    t, s = vectors((count, 128), dtype=torch.bfloat16, device="cuda", needs_grad=(0, 1))(0)

    def run():
        value = ops.contrastive_loss(t, s, symmetric=symmetric, reduction="none", backend="cuda")
        return [value, *torch.autograd.grad(value.mean(), (t, s))]

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value, dt, ds = run()
    results = sum(x.numel() * x.element_size() for x in (dt, ds))
    assert torch.cuda.max_memory_allocated() - before <= results + 2**30
    unit = torch.nn.functional.normalize(torch.cat([t, s]).detach().double())
    some = torch.arange(0, count, 1_021, device="cuda")
    similarity = unit[some] @ unit.T / 0.1
    similarity[torch.arange(len(some), device="cuda"), some] = -torch.inf
    expected = similarity.logsumexp(1) - similarity.gather(1, (some + count)[:, None])[:, 0]
    assert_close(value[some], expected, atol=1e-4)
    assert dt.isfinite().all()
    assert ds.isfinite().all()


@pytest.mark.parametrize(
    ("op", "make"),
    [
        case(ops.contrastive_loss, vectors, (200, 64)),
        case(ops.spatial_attention, attention, (2, 64, 9, 7), form="spatial_mean1"),
        case(ops.high_order_attention, high_order, (2, 64, 9, 7)),
    ],
)
def test_opcheck(op, make):
    inputs = make(dtype=torch.bfloat16)(0)
    for leaves in (inputs, inputs[1:2]):
        with RecordedOperators() as operators:
            out = op(*inputs, backend="cuda")
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert len(operators.calls) == 2
        for function, arguments in operators.calls:
            torch.library.opcheck(function, arguments)


def test_other_layouts_and_misaligned_inputs_are_copied():
    op, make = case(ops.spatial_attention, attention, (3, 64, 6, 5), form="spatial_mean1")
    inputs = [tensor.detach() for tensor in make(dtype=torch.bfloat16)(0)]
    expected = op(*inputs, backend="cuda")
    contiguous = [inputs[0].contiguous(), inputs[1].contiguous(), *inputs[2:]]
    got = op(*contiguous, backend="cuda")
    assert got.is_contiguous()
    assert torch.equal(got, expected)
    misaligned = torch.empty(inputs[0].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:]
    rows = misaligned.view(3, 6, 5, 64).copy_(inputs[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(op(rows, *inputs[1:], backend="cuda"), expected)
