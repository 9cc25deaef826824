"""Small calls that together take every CUDA kernel of csrc/, in the words of ``dfkd_fast.ops.extension.launches``.

As a program it runs those of one op, forward and backward, for a tool that watches:

    python tests/cuda/kernel_cases.py OP
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPS", "Sizes", "cases", "run"]

Sizes = dict[str, Any]

OPS = ("contrastive_loss", "spatial_attention", "high_order_attention")

_CONTRAST: tuple[Sizes, ...] = (
    {"count": 129, "dim": 100},
    {"count": 300, "dim": 128, "symmetric": True},
    {"count": 200, "dim": 64, "reduction": "none", "symmetric": True},
    {"count": 200, "dim": 33, "reduction": "none"},
    {"count": 4097, "dim": 64, "symmetric": True, "dtype": "bfloat16"},
)
_SPATIAL: tuple[Sizes, ...] = tuple(
    {"samples": samples, "channels": channels, "maps": maps, "positions": positions, "form": form}
    for samples, channels, maps, positions in (
        *((2, 8, 8, 6), (3, 64, 8, 300), (2, 128, 16, 500)),
        *((2, 256, 32, 200), (1, 72, 40, 200), (1, 136, 64, 1200)),
    )
    for form in ("spatial", "spatial_mean1")
)
_HIGH_ORDER: tuple[Sizes, ...] = (
    *(
        {"positions": positions, "channels": channels, "hidden": channels // 4, "mode": mode, "result": result}
        for channels in (64, 128, 256, 512)
        for positions, mode, result in (
            *((300, "joint", "features"), (150, "joint", "map")),
            *((70, "per_order", "features"), (70, "per_order", "map")),
        )
    ),
    {"positions": 130, "channels": 72, "hidden": 24, "order": 2},
    {"positions": 65, "channels": 24, "hidden": 8, "order": 1, "mode": "per_order"},
    {"positions": 70, "channels": 64, "hidden": 40},
    *(  # enough rows for taller tiles
        {"positions": positions, "channels": channels, "hidden": hidden}
        for positions, channels, hidden in ((17000, 64, 40), (8500, 256, 16), (4300, 512, 16))
    ),
)

_CASES = {"contrastive_loss": _CONTRAST, "spatial_attention": _SPATIAL, "high_order_attention": _HIGH_ORDER}


def cases(op: str) -> Iterator[Sizes]:
    """Those of one op, in both dtypes; the largest in one."""
    for sizes in _CASES[op]:
        for dtype in ("bfloat16", "float16"):
            if sizes.get("dtype", dtype) == dtype:
                yield {**sizes, "dtype": dtype}


def _contrast(tensor: Any, sizes: Sizes) -> tuple[Tensor, list[Tensor]]:
    from dfkd_fast import ops

    sizes = dict(sizes)
    shape = sizes.pop("count"), sizes.pop("dim")
    pair = [tensor(*shape), tensor(*shape)]
    return ops.contrastive_loss(*pair, **sizes, backend="cuda"), pair


def _map(tensor: Any, samples: int, channels: int, positions: int) -> Tensor:
    return tensor(samples, 1, positions, channels).detach().permute(0, 3, 1, 2).requires_grad_()


def _spatial(tensor: Any, sizes: Sizes) -> tuple[Tensor, list[Tensor]]:
    from dfkd_fast import ops

    samples, channels, maps, positions = (sizes[name] for name in ("samples", "channels", "maps", "positions"))
    given = [_map(tensor, samples, channels, positions), _map(tensor, samples, maps, positions)]
    given += [tensor(channels, maps), tensor(channels)]
    return ops.spatial_attention(*given, form=sizes.get("form", "spatial"), backend="cuda"), given


def _high_order(tensor: Any, sizes: Sizes) -> tuple[Tensor, list[Tensor]]:
    from dfkd_fast.ops.high_order_attention import high_order_attention, high_order_attention_map

    channels, hidden, order = sizes["channels"], sizes["hidden"], sizes.get("order", 3)
    given = [_map(tensor, 1, channels, sizes["positions"])]
    given += [tensor(order * (order + 1) // 2, hidden, channels), tensor(order, channels, hidden)]
    function = high_order_attention_map if sizes.get("result") == "map" else high_order_attention
    return function(*given, mode=sizes.get("mode", "joint"), backend="cuda"), given


def run(op: str, sizes: Sizes) -> None:
    """Forward and backward on the GPU. Random numbers are drawn on the CPU: fewer kernels of others are watched."""
    sizes = dict(sizes)
    dtype = getattr(torch, sizes.pop("dtype"))
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(dtype).cuda().requires_grad_()

    make = {"contrastive_loss": _contrast, "spatial_attention": _spatial, "high_order_attention": _high_order}[op]
    out, inputs = make(tensor, sizes)
    grad_output = torch.randn(out.shape, generator=generator).to(out.dtype).cuda()
    gradients = torch.autograd.grad(out, inputs, grad_output)
    torch.cuda.synchronize()
    assert all(torch.isfinite(each.cpu()).all() for each in gradients), (op, sizes)


if __name__ == "__main__":
    for each in cases(sys.argv[1]):
        run(sys.argv[1], each)
    print("done")
