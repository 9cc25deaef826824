"""Small calls that together take every CUDA kernel of csrc/, in the words of ``dfkd_fast.ops.extension.launches``.

As a program it runs those of one op and backend, forward and backward, for a tool that watches:

    python tests/kernel_cases.py OP BACKEND
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

# Of the plain form.
_CONTRAST: tuple[Sizes, ...] = (
    {"count": 0, "dim": 16},
    {"count": 8, "dim": 16, "symmetric": True},
    {"count": 125, "dim": 100, "reduction": "none"},
    *(
        {"count": 129, "dim": dim, "temperature": temperature}
        for dim in (16, 65, 129)  # one slab, two, and what no block holds whole
        for temperature in (0.1, 0.01)
    ),
    {"count": 150, "dim": 40, "symmetric": True, "reduction": "none", "normalize": False},
    {"count": 4097, "dim": 16, "dtype": "bfloat16"},  # more anchors than one block merges
)
_SPATIAL: tuple[Sizes, ...] = (
    *(
        {"samples": 2, "channels": channels, "maps": maps, "positions": positions, "form": form}
        for channels, maps, positions in ((8, 1, 6), (24, 17, 35), (72, 40, 200))
        for form in ("spatial", "spatial_mean1", "channel")
    ),
    {"samples": 1, "channels": 136, "maps": 72, "positions": 60},
    {"samples": 1, "channels": 128, "maps": 72, "positions": 60, "form": "channel"},
)
_HIGH_ORDER: tuple[Sizes, ...] = (
    *(
        {"positions": 30, "channels": channels, "hidden": hidden, "order": order, "mode": mode}
        for channels, hidden in ((16, 8), (72, 9), (136, 34))
        for order in (1, 2, 3, 4)
        for mode in ("joint", "per_order")
    ),
    {"positions": 70, "channels": 64, "hidden": 16, "result": "map"},
    {"positions": 70, "channels": 72, "hidden": 16, "result": "map"},
    {"positions": 8500, "channels": 72, "hidden": 40},  # enough rows for taller tiles
)

# Of the form for sm_90a.
_CONTRAST_HOPPER: tuple[Sizes, ...] = (
    {"count": 129, "dim": 100},
    {"count": 300, "dim": 128, "symmetric": True},
    {"count": 200, "dim": 64, "reduction": "none", "symmetric": True},
    {"count": 200, "dim": 33, "reduction": "none"},
    {"count": 4097, "dim": 64, "symmetric": True, "dtype": "bfloat16"},
)
_SPATIAL_HOPPER: tuple[Sizes, ...] = tuple(
    {"samples": samples, "channels": channels, "maps": maps, "positions": positions, "form": form}
    for samples, channels, maps, positions in (
        *((2, 8, 8, 6), (3, 64, 8, 300), (2, 128, 16, 500)),
        *((2, 256, 32, 200), (1, 72, 40, 200), (1, 136, 64, 1200)),
    )
    for form in ("spatial", "spatial_mean1")
)
_HIGH_ORDER_HOPPER: tuple[Sizes, ...] = (
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

_CASES = {
    ("contrastive_loss", "cuda"): _CONTRAST,
    ("contrastive_loss", "hopper"): _CONTRAST_HOPPER,
    ("spatial_attention", "cuda"): _SPATIAL,
    ("spatial_attention", "hopper"): _SPATIAL_HOPPER,
    ("high_order_attention", "cuda"): _HIGH_ORDER,
    ("high_order_attention", "hopper"): _HIGH_ORDER_HOPPER,
}


def cases(op: str, backend: str) -> Iterator[Sizes]:
    """Those of one op and backend, in both dtypes; the largest in one."""
    for sizes in _CASES[op, backend]:
        for dtype in ("bfloat16", "float16"):
            if sizes.get("dtype", dtype) == dtype:
                yield {**sizes, "dtype": dtype}


def _contrast(tensor: Any, sizes: Sizes, backend: str) -> tuple[Tensor, list[Tensor]]:
    from dfkd_fast import ops

    sizes = dict(sizes)
    shape = sizes.pop("count"), sizes.pop("dim")
    pair = [tensor(*shape), tensor(*shape)]
    return ops.contrastive_loss(*pair, **sizes, backend=backend), pair


def _map(tensor: Any, samples: int, channels: int, positions: int) -> Tensor:
    return tensor(samples, 1, positions, channels).detach().permute(0, 3, 1, 2).requires_grad_()


def _spatial(tensor: Any, sizes: Sizes, backend: str) -> tuple[Tensor, list[Tensor]]:
    from dfkd_fast import ops

    samples, channels, maps, positions = (sizes[name] for name in ("samples", "channels", "maps", "positions"))
    given = [_map(tensor, samples, channels, positions), _map(tensor, samples, maps, positions)]
    given += [tensor(channels, maps), tensor(channels)]
    return ops.spatial_attention(*given, form=sizes.get("form", "spatial"), backend=backend), given


def _high_order(tensor: Any, sizes: Sizes, backend: str) -> tuple[Tensor, list[Tensor]]:
    from dfkd_fast.ops.high_order_attention import high_order_attention, high_order_attention_map

    channels, hidden, order = sizes["channels"], sizes["hidden"], sizes.get("order", 3)
    given = [_map(tensor, 1, channels, sizes["positions"])]
    given += [tensor(order * (order + 1) // 2, hidden, channels), tensor(order, channels, hidden)]
    function = high_order_attention_map if sizes.get("result") == "map" else high_order_attention
    return function(*given, mode=sizes.get("mode", "joint"), backend=backend), given


def run(op: str, backend: str, sizes: Sizes) -> None:
    """Forward and backward on the GPU. Random numbers are drawn on the CPU: fewer kernels of others are watched."""
    sizes = dict(sizes)
    dtype = getattr(torch, sizes.pop("dtype"))
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(dtype).cuda().requires_grad_()

    make = {"contrastive_loss": _contrast, "spatial_attention": _spatial, "high_order_attention": _high_order}[op]
    out, inputs = make(tensor, sizes, backend)
    upstream = torch.randn(out.shape, generator=generator).to(out.dtype).cuda()
    gradients = torch.autograd.grad(out, inputs, upstream)
    torch.cuda.synchronize()
    # Of nothing there is a loss, and it is NaN.
    assert all(torch.isfinite(each.cpu()).all() for each in gradients), (op, backend, sizes)


if __name__ == "__main__":
    for each in cases(*sys.argv[1:3]):
        run(*sys.argv[1:3], each)
    print("done")
