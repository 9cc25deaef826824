"""Small calls that together launch every CUDA kernel, as arguments of ``dfkd_fast.ops.extension.launches``.

As a program, it runs one op's calls, forward and backward. Tests run it under compute-sanitizer:

    python -m tests.cuda.kernel_cases OP
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from dfkd_fast import ops
from dfkd_fast.testing import value_and_gradients

from ..ops.table import attention, high_order, vectors

__all__ = ["OPS", "Sizes", "cases", "run"]

Sizes = dict[str, Any]

_CONTRASTIVE: tuple[Sizes, ...] = (
    {"count": 129, "dim": 100},
    {"count": 300, "dim": 128, "symmetric": True},
    {"count": 200, "dim": 64, "reduction": "none", "symmetric": True},
    {"count": 200, "dim": 33, "reduction": "none"},
    {"count": 4097, "dim": 64, "symmetric": True, "dtype": "bfloat16"},
)
_SPATIAL: tuple[Sizes, ...] = tuple(
    {"samples": samples, "channels": channels, "hidden": maps, "positions": positions, "form": form}
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
_CASES = {"contrastive_loss": _CONTRASTIVE, "spatial_attention": _SPATIAL, "high_order_attention": _HIGH_ORDER}
OPS = tuple(_CASES)


def cases(op: str) -> Iterator[Sizes]:
    """The cases of an op in both dtypes, except the largest, which has only one."""
    for sizes in _CASES[op]:
        for dtype in ("bfloat16", "float16"):
            if sizes.get("dtype", dtype) == dtype:
                yield {**sizes, "dtype": dtype}


def run(op: str, sizes: Sizes, backend: str = "cuda", device: str = "cuda") -> None:
    """Runs forward and backward and checks that all results are finite."""
    sizes = dict(sizes)
    options = {"dtype": getattr(torch, sizes.pop("dtype")), "device": device}
    maps = {"layout": "channels_last", **options}
    if op == "contrastive_loss":
        make = vectors((sizes.pop("count"), sizes.pop("dim")), **options)
        function = partial(ops.contrastive_loss, **sizes)
    elif op == "spatial_attention":
        shape = sizes["samples"], sizes["channels"], 1, sizes["positions"]
        make = attention(shape, hidden=sizes["hidden"], **maps)
        function = partial(ops.spatial_attention, form=sizes["form"])
    else:
        shape = 1, sizes["channels"], 1, sizes["positions"]
        make = high_order(shape, order=sizes.get("order", 3), hidden=sizes["hidden"], **maps)
        map_only = sizes.get("result") == "map"
        high_order_op = ops.high_order_attention_map if map_only else ops.high_order_attention
        function = partial(high_order_op, mode=sizes.get("mode", "joint"))
    values, gradients = value_and_gradients(partial(function, backend=backend), make(0))
    assert all(torch.isfinite(each.cpu()).all() for each in (*values, *gradients) if each is not None), (op, sizes)


if __name__ == "__main__":
    for each in cases(sys.argv[1]):
        run(sys.argv[1], each)
    print("done")
