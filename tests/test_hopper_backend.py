"""The hopper backend without a GPU: what it refuses, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.ops import extension
from dfkd_fast.ops.backend import Unserved


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def contrast(count: int = 200, **options: Any) -> Tensor:
    return ops.contrastive_loss(meta(count, 64), meta(count, 64), backend="hopper", **options)


def spatial(channels: int = 64, **options: Any) -> Tensor:
    maps = meta(1, channels, 2, 2), meta(1, 8, 2, 2)
    return ops.spatial_attention(*maps, meta(channels, 8), backend="hopper", **options)


def high_order(order: int) -> Tensor:
    weights = meta(order * (order + 1) // 2, 16, 64), meta(order, 64, 16)
    return ops.high_order_attention(meta(1, 64, 2, 2), *weights, backend="hopper")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: contrast(128), "more than 256 of them"),
        (lambda: contrast(temperature=0.02), "0.0301"),
        (lambda: contrast(normalize=False), "normalized"),
        (lambda: spatial(form="channel"), "'channel'"),
        (lambda: spatial(60), "60 from 8"),
        (lambda: high_order(4), "not 4 orders"),
    ],
)
def test_what_it_does_not_serve_is_refused_in_words(call: Callable[[], Tensor], said: str) -> None:
    with pytest.raises(Unserved, match=f"'hopper', asked for by backend, cannot serve .*{said}"):
        call()


def test_a_build_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "UNAVAILABLE", None)
    monkeypatch.setattr(extension, "HOPPER", False)
    with pytest.raises(Unserved, match="built without code for sm_90a"):
        contrast()
