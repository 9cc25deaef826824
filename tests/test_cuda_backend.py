"""The cuda backend on a card: the kernels of csrc/ through torch, at real shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.ops import extension
from dfkd_fast.testing import assert_backend_no_worse, random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE)),
]

DTYPES = (torch.bfloat16, torch.float16)

Maker = Callable[[int], list[Any]]


def contrast(count: int, dim: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Maker]:
    def make(seed: int) -> list[Any]:
        return [random(count, dim, seed=seed + i, dtype=dtype, device="cuda").requires_grad_() for i in range(2)]

    return ops.contrastive_loss, make


def spatial(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> tuple[Callable[..., Tensor], Maker]:
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


def high_order(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> tuple[Callable[..., Tensor], Maker]:
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


CASES = {
    "contrast, 128 vectors": lambda dtype: contrast(64, 128, dtype),
    "contrast, 250 vectors": lambda dtype: contrast(125, 100, dtype),
    "contrast, 8192 vectors": lambda dtype: contrast(4096, 128, dtype),
    **{
        f"{form} of {shape[1]} maps": lambda dtype, shape=shape, form=form: spatial(shape, dtype, form)
        for shape in ((8, 256, 28, 28), (8, 64, 112, 112), (3, 40, 15, 17))
        for form in ("spatial", "spatial_mean1", "channel")
    },
    **{
        f"{mode} of {shape[1]} channels": lambda dtype, shape=shape, mode=mode: high_order(shape, dtype, mode)
        for shape in ((8, 64, 56, 56), (64, 512, 7, 7), (3, 36, 5, 6))
        for mode in ("joint", "per_order")
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_the_reference(name: str, dtype: torch.dtype) -> None:
    op, make = CASES[name](dtype)
    assert_backend_no_worse(op, make, backend="cuda", draws=2)


@pytest.mark.parametrize("name", CASES)
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


def test_other_layouts_and_offsets_are_copied_where_they_must_be() -> None:
    op, make = spatial((3, 16, 6, 5), torch.bfloat16, "spatial_mean1")
    inputs = [tensor.detach() for tensor in make(0)]
    wanted = op(*inputs, backend="cuda")
    plain = [inputs[0].contiguous(), inputs[1].contiguous(), *inputs[2:]]
    found = op(*plain, backend="cuda")
    assert found.is_contiguous()
    assert torch.equal(found, wanted)
    shifted = torch.empty(inputs[0].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:]
    rows = shifted.view(3, 6, 5, 16).copy_(inputs[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(op(rows, *inputs[1:], backend="cuda"), wanted)
