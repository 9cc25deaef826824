"""The cuda backend on a GPU: the kernels of csrc/ through torch, at real shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.ops import extension
from dfkd_fast.ops.backend import UnsupportedError
from dfkd_fast.testing import assert_backend_no_worse, assert_close, random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(60),  # a kernel that never ends costs no more
    pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE)),
]

DTYPES = (torch.bfloat16, torch.float16)

Maker = Callable[[int], list[Any]]
Case = tuple[Callable[..., Tensor], Maker]


def contrast(count: int, dim: int, dtype: torch.dtype) -> Case:
    def make(seed: int) -> list[Any]:
        return [random(count, dim, seed=seed + i, dtype=dtype, device="cuda").requires_grad_() for i in range(2)]

    return ops.contrastive_loss, make


def spatial(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> Case:
    n, c, h, w = shape
    k = max(1, c // 8)

    def make(seed: int) -> list[Any]:
        given = {"dtype": dtype, "device": "cuda"}
        maps = [random(n, d, h, w, seed=seed + i, layout="channels_last", **given) for i, d in enumerate((c, k))]
        made = [*maps, random(c, k, seed=seed + 2, scale=k**-0.5, **given), random(c, seed=seed + 3, **given)]
        return [tensor.requires_grad_() for tensor in made]

    scale = 0.05 * (h * w if form == "spatial" else 1)

    def op(*tensors: Tensor, backend: str) -> Tensor:
        return ops.spatial_attention(*tensors, scale=scale, form=form, backend=backend)  # type: ignore[arg-type]

    return op, make


def high_order(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> Case:
    n, c, h, w = shape
    k = max(1, c // 4)

    def make(seed: int) -> list[Any]:
        given = {"dtype": dtype, "device": "cuda"}
        x = random(n, c, h, w, seed=seed, layout="channels_last", **given)
        weights = [random(6, k, c, seed=seed + 1, scale=c**-0.5, **given)]
        weights += [random(3, c, k, seed=seed + 2, scale=k**-0.5, **given)]
        return [tensor.requires_grad_() for tensor in (x, *weights)]

    def op(*tensors: Tensor, backend: str) -> Tensor:
        return ops.high_order_attention(*tensors, mode=mode, backend=backend)  # type: ignore[arg-type]

    return op, make


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "contrast, 128 vectors": lambda dtype: contrast(64, 128, dtype),
    "contrast, 250 vectors": lambda dtype: contrast(125, 100, dtype),
    "contrast, 602 vectors": lambda dtype: contrast(301, 100, dtype),
    "contrast, 8192 vectors": lambda dtype: contrast(4096, 128, dtype),
    **{
        f"{form} of {shape[1]} maps": lambda dtype, shape=shape, form=form: spatial(shape, dtype, form)
        for shape in ((8, 256, 28, 28), (4, 128, 56, 56), (8, 64, 112, 112), (3, 192, 9, 7), (3, 40, 15, 17))
        for form in ("spatial", "spatial_mean1", "channel")
    },
    **{
        f"{mode} of {shape[1]} channels": lambda dtype, shape=shape, mode=mode: high_order(shape, dtype, mode)
        for shape in (
            *((8, 64, 56, 56), (16, 128, 28, 28), (32, 256, 14, 14), (64, 512, 7, 7)),
            *((3, 36, 5, 6),),
        )
        for mode in ("joint", "per_order")
    },
}
# Too few vectors, a softmax over channels, sizes that are no multiples of 8.
UNSERVED = {
    *("contrast, 128 vectors", "contrast, 250 vectors"),
    *(name for name in CASES if name.startswith("channel of") or " of 40 " in name or " of 36 " in name),
}
SERVED = [name for name in CASES if name not in UNSERVED]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", SERVED)
def test_no_worse_than_the_reference(name: str, dtype: torch.dtype) -> None:
    op, make = CASES[name](dtype)
    assert_backend_no_worse(op, make, backend="cuda", draws=2)


@pytest.mark.parametrize("name", sorted(UNSERVED))
def test_what_is_not_served_is_refused_in_words(name: str) -> None:
    op, make = CASES[name](torch.bfloat16)
    with pytest.raises(UnsupportedError, match="the kernel serves"):
        op(*make(0), backend="cuda")


@pytest.mark.parametrize("name", SERVED)
def test_the_same_bits_every_time_and_in_a_graph(name: str) -> None:
    op, make = CASES[name](torch.bfloat16)
    inputs, others = make(0), make(10)

    def work() -> list[Tensor]:
        out = op(*inputs, backend="cuda")
        return [out, *torch.autograd.grad(out.float().sum(), inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = [tensor.clone() for tensor in work()]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(first, work(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = work()
    with torch.no_grad():
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
    graph.replay()
    for a, b in zip(captured, work(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["contrast, 602 vectors", "spatial_mean1 of 192 maps", "joint of 64 channels"])
def test_compiles_without_graph_breaks(name: str) -> None:
    op, make = CASES[name](torch.bfloat16)
    inputs = make(0)

    def work(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out.float().sum(), inputs)]

    plain = work(lambda *tensors: op(*tensors, backend="cuda"))
    compiled = work(torch.compile(lambda *tensors: op(*tensors, backend="cuda"), fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("symmetric", [False, True])
def test_many_vectors_in_little_memory(symmetric: bool) -> None:
    """131,072 vectors: at most 1 GiB beyond inputs and gradients; a few anchors against float64."""
    count = 65_536
    op, make = contrast(count, 128, torch.bfloat16)
    t, s = make(0)

    def work() -> list[Tensor]:
        value = op(t, s, symmetric=symmetric, reduction="none", backend="cuda")
        return [value, *torch.autograd.grad(value.mean(), (t, s))]

    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value, dt, ds = work()
    results = sum(x.numel() * x.element_size() for x in (dt, ds))
    assert torch.cuda.max_memory_allocated() - before <= results + 2**30
    unit = torch.nn.functional.normalize(torch.cat([t, s]).detach().double())
    some = torch.arange(0, count, 1_021, device="cuda")
    similarity = unit[some] @ unit.T / 0.1
    similarity[torch.arange(len(some), device="cuda"), some] = -torch.inf
    wanted = similarity.logsumexp(1) - similarity.gather(1, (some + count)[:, None])[:, 0]
    assert_close(value[some], wanted, atol=1e-4)
    assert dt.isfinite().all()
    assert ds.isfinite().all()


def test_opcheck() -> None:
    library = torch.ops.dfkd_fast

    def check(name: str, *arguments: Any) -> Any:
        given = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        operator = getattr(library, name).default
        torch.library.opcheck(operator, tuple(given))
        return operator(*given)

    t, s = contrast(200, 64, torch.bfloat16)[1](0)
    out, saved = check("contrastive_loss_cuda", t, s, 0.1, False, True, "mean")
    check("contrastive_loss_cuda_backward", out, t, s, 0.1, False, True, "mean", saved, [True, False])
    given = spatial((2, 64, 9, 7), torch.bfloat16, "spatial_mean1")[1](0)
    out, saved = check("spatial_attention_cuda", *given, 0.05, "spatial_mean1")
    check("spatial_attention_cuda_backward", out, *given, 0.05, "spatial_mean1", saved, [True, True, True, False])
    given = high_order((2, 64, 9, 7), torch.bfloat16, "joint")[1](0)
    out = check("high_order_attention_cuda", *given, "joint", "features")
    check("high_order_attention_cuda_backward", out, *given, "joint", "features", [True, False, True])


def test_other_layouts_and_offsets_are_copied_where_they_must_be() -> None:
    op, make = spatial((3, 64, 6, 5), torch.bfloat16, "spatial_mean1")
    inputs = [tensor.detach() for tensor in make(0)]
    wanted = op(*inputs, backend="cuda")
    plain = [inputs[0].contiguous(), inputs[1].contiguous(), *inputs[2:]]
    found = op(*plain, backend="cuda")
    assert found.is_contiguous()
    assert torch.equal(found, wanted)
    shifted = torch.empty(inputs[0].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:]
    rows = shifted.view(3, 6, 5, 64).copy_(inputs[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(op(rows, *inputs[1:], backend="cuda"), wanted)
