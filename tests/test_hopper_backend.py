"""The hopper backend beside the cuda one, without a card: who is refused in which words, and how both are reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.benchmarks import measure, ops_report
from dfkd_fast.benchmarks import ops as stage
from dfkd_fast.benchmarks.compile_kernels import benchmarks
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


class Kept:
    """In the place of a result file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def todo(self, keys: Any, since: str | None = None) -> list[Any]:
        return list(keys)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def test_a_case_that_a_backend_does_not_serve_is_a_row_and_no_failure() -> None:
    device = torch.device("cpu")
    case = benchmarks()["contrastive_loss"].cases[0]
    keys = tuple(("contrastive_loss", case.name, "bfloat16", "hopper", which, "cold") for which in measure.PASSES)

    def refuse(*inputs: Tensor) -> Tensor:
        return contrast(2)

    subject = stage.Subject(
        op="contrastive_loss", case=case, dtype=torch.bfloat16, backend="hopper", function=refuse, keys=keys
    )
    kept, said = Kept(), list[str]()

    def trial(*arguments: Any) -> Any:
        return arguments[-1]()

    rates = measure.Ceilings(copy_gbps=4000.0, matmul_tflops=800.0)
    sound = stage.measure([subject], kept, device=device, rates=rates, complain=said.append, trial=trial)  # type: ignore[arg-type]
    assert sound
    assert not said
    assert [row["status"] for row in kept.rows] == ["not served"] * len(keys)
    assert all(row["median_us"] is None for row in kept.rows)


def test_each_form_stands_for_its_own_sources() -> None:
    names = {
        backend: {p.as_posix().rpartition("csrc/")[2] for p in stage._cuda_sources("contrastive_loss", backend)}
        for backend in ("cuda", "hopper")
    }
    assert names["cuda"] < names["hopper"]
    assert {name for name in names["hopper"] - names["cuda"] if "hopper" not in name} == set()


def row(case: str, backend: str, which: str, us: float | None, **more: Any) -> dict[str, Any]:
    fixed = {"op": "contrastive_loss", "dtype": "bfloat16", "l2": "cold", "shapes": "paper", "status": "not served"}
    return {**fixed, "case": case, "backend": backend, "pass": which, "median_us": us, **more}


def test_the_better_of_the_two_stands_beside_triton() -> None:
    times = {
        ("128", "triton"): (4, 4), ("128", "cuda"): (2, 2), ("128", "hopper"): (None, None),
        ("8192", "triton"): (30, 60), ("8192", "cuda"): (30, 70), ("8192", "hopper"): (20, 40),
        ("65536", "triton"): (30, 60), ("65536", "cuda"): (50, 70), ("65536", "hopper"): (40, 60),
        ("131072", "cuda"): (1, 1),
    }  # fmt: skip
    rows = [
        row(case, backend, which, us)
        for (case, backend), each in times.items()
        for which, us in zip(("forward", "backward"), each, strict=True)
    ]
    rows += [row("128", "hopper", "both", 1), row("8192", "cuda", "forward", 1, l2="warm")]
    head, _, line = ops_report._lead_table(rows)
    assert head == "| op | ahead at | mean | with hopper | with cuda |"
    assert line == "| contrastive_loss | 2 of 3 | 1.39 x | 8192 1.50 x, 65536 0.90 x | 128 2.00 x |"
    assert ops_report._lead_table([each for each in rows if each["backend"] != "triton"]) == []
    assert ops_report._cell({**rows[0], "median_us": None}) == "not served"
