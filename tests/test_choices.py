"""What is not measured is not chosen; what is, is the fastest of those measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast.benchmarks import choose
from dfkd_fast.ops import choices
from dfkd_fast.ops.backend import Implementation, _registry, dispatch, register
from dfkd_fast.ops.choices import read_choices, shape_class


def test_classes_are_powers_of_two_upwards() -> None:
    assert shape_class(torch.empty(64, 200)) == (6, 8)
    assert shape_class(torch.empty(65, 256)) == (7, 8)
    assert shape_class(torch.empty(64, 512, 7, 7)) == (12, 9)  # 3,136 positions
    assert shape_class(torch.empty(0, 1)) == (0, 0)


def test_without_a_measurement_nothing_is_chosen() -> None:
    assert choices.faster("never_heard_of", torch.zeros(2, 2)) is None
    for op, table in _registry.items():
        if "cuda" in table:
            assert table["cuda"].faster is not None, op
            assert not table["cuda"].automatic(torch.zeros(4, 4), torch.zeros(4, 4))


@pytest.mark.parametrize("fastest", ["cuda", "triton", None])
def test_the_one_that_is_written_down_is_chosen(fastest: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "faster", lambda op, x: fastest)
    monkeypatch.setitem(_registry, "adding", {})
    for number, name in enumerate(("cuda", "triton", "reference")):
        register("adding", name, lambda x, number=number: x + number)
    # On the CPU Triton's kernels are never chosen.
    assert dispatch("adding", None, torch.zeros(())).item() == (0 if fastest == "cuda" else 2)


def test_a_backend_that_is_not_known_to_be_faster_serves_when_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    known = False
    table = {
        "cuda": Implementation(lambda x: x + 3, faster=lambda x: known),
        "reference": Implementation(lambda x: x + 1),
    }
    monkeypatch.setitem(_registry, "adding", table)

    def adding(x: Tensor, backend: str | None = None) -> float:
        return dispatch("adding", backend, x).item()

    assert adding(torch.zeros(())) == 1
    assert adding(torch.zeros(()), backend="cuda") == 3
    known = True
    assert adding(torch.zeros(())) == 3


def row(case: str, backend: str, which: str, us: float, **more: Any) -> dict[str, Any]:
    fixed = {"op": "contrastive_loss", "dtype": "bfloat16", "l2": "cold", "status": "ok"}
    return {**fixed, "case": case, "backend": backend, "pass": which, "median_us": us, **more}


def test_the_table_is_made_of_measurements_of_triton_and_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfkd_fast.benchmarks.compile_kernels import benchmarks

    cases = [case for case in benchmarks()["contrastive_loss"].cases if case.shapes == "paper"]
    first, second = cases[0].name, cases[1].name
    rows = [
        *(row(first, "cuda", which, 5) for which in ("forward", "backward")),
        *(row(first, "triton", which, us) for which, us in (("forward", 4), ("backward", 8))),
        *(row(first, "triton", "forward", 1, l2=l2) for l2 in ("warm",)),  # of another kind
        *(row(second, "cuda", which, 1) for which in ("forward", "backward")),  # the other one is missing
        row("my own", "cuda", "forward", 1),
    ]
    folder = tmp_path / "results" / "some-gpu"
    folder.mkdir(parents=True)
    environment = {"device": {"name": "Some GPU", "capability": "9.0"}}
    content = {"rows": rows, "environments": [environment], "complete": False, "version": "1"}
    (folder / "ops.json").write_text(json.dumps(content))
    table = tmp_path / "choices.json"
    assert choose.write(tmp_path / "results", table) == 1
    (only,) = json.loads(table.read_text())["rows"]
    assert (only["backend"], only["arch"], only["cuda_over_triton"]) == ("cuda", 90, 0.8333)
    known = read_choices(table)
    assert known == {("contrastive_loss", 90, "bfloat16", tuple(only["shape_class"])): "cuda"}
    slower = [row(second, "triton", which, 0.5) for which in ("forward", "backward")]
    (folder / "ops.json").write_text(json.dumps({**content, "rows": rows + slower}))
    assert choose.write(tmp_path / "results", table) == 1
    (both,) = json.loads(table.read_text())["rows"]  # of one class
    assert (both["backend"], both["cuda_over_triton"], both["cases"]) == ("triton", 1.291, 2)  # sqrt(5 / 6 * 2)
    (folder / "ops.json").write_text(json.dumps({**content, "rows": []}))
    assert choose.write(tmp_path / "results", table) == 0
    assert not table.exists()
    assert read_choices(table) == {}
