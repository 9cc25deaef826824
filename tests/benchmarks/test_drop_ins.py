"""Drop-ins and originals compute the same, every fused drop-in is compared, and the table has the measured times."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from dfkd_fast.benchmarks.ops import drop_ins as module
from dfkd_fast.benchmarks.ops.drop_ins import MAPS, DropIn, compare, drop_ins, drop_ins_section
from dfkd_fast.compat import MODULES
from dfkd_fast.report import read_results

CPU = torch.device("cpu")

# The losses of pytorch-metric-learning are measured inside SelfSupervisedLoss.
INSIDE_OTHERS = {"metric_learning.NTXentLoss", "metric_learning.SupConLoss"}


def small(drop_in: DropIn) -> tuple[tuple[int, ...], ...]:
    shapes = drop_in.shapes if drop_in.together else drop_in.shapes[:1]
    return tuple((4, *shape[1:]) for shape in shapes)


def test_every_fused_drop_in_is_compared():
    compared = {drop_in.name.partition(",")[0] for drop_in in drop_ins(CPU)}
    named: dict[str, bool] = {}
    for name in MODULES:
        if module._LIBRARIES.get(name) is None or module._library(name):
            for case in importlib.import_module(f"dfkd_fast.compat.{name}").COVERAGE:
                named[f"{name}.{case.name}"] = named.get(f"{name}.{case.name}", False) or case.op is not None
    assert {name for name, op in named.items() if op} - compared <= INSIDE_OTHERS
    assert compared <= named.keys()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_originals_compute_what_the_drop_ins_compute(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(module.Timer, "blocked_autorange", lambda timer, min_run_time: SimpleNamespace(median=1.0))
    refused = set()
    for drop_in in drop_ins(CPU):
        try:
            row = compare(drop_in, small(drop_in), CPU, dtype, turns=1)
        except Exception:
            refused.add(drop_in.name)
        else:
            assert row["difference"] < tolerance, drop_in.name
    assert dtype == torch.bfloat16 or not refused
    assert len(refused) < 5, refused  # originals that do not support bfloat16


def test_libraries_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "_library", lambda name: None)
    found = {drop_in.name: drop_in.source for drop_in in drop_ins(CPU)}
    assert not {name for name in found if name.startswith(("lightly", "metric_learning", "torchdistill"))}
    assert set(found.values()) == {"plain PyTorch"}


def test_drop_in_and_original_take_turns_in_running_first():
    order: list[str] = []

    def loss(name):
        return lambda x: order.append(name) or x.square().sum()

    pair = DropIn(name="x", loss=loss("drop-in"), original=loss("original"), shapes=((2, 3),), inputs=1)
    row = compare(pair, pair.shapes, CPU, torch.float32, turns=4, seconds=0.0)
    changes = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # One call each to compare the values, then turns: original, drop-in, drop-in, original and so on.
    assert changes == ["drop-in", "original"] * 3
    assert len(row["ratios"]) == 4
    assert row["ours_us"] > 0


def test_command_writes_a_row_per_shape_and_dtype(monkeypatch):
    found = [drop_in for drop_in in drop_ins(CPU) if drop_in.name in ("datafree.kldiv", "repdistiller.Attention")]
    monkeypatch.setattr(module, "drop_ins", lambda device: found)
    assert module.main(["--out", "drop_ins.json", "--device", "cpu", "--size", "small"]) == 0
    rows = read_results("drop_ins.json")["rows"]
    maps = ", ".join("x".join(map(str, (4, *shape[1:]))) for shape in MAPS)
    shapes = [("datafree.kldiv", "4x100"), ("datafree.kldiv", "4x200"), ("repdistiller.Attention", maps)]
    assert [(row["drop_in"], row["shape"]) for row in rows] == 2 * shapes
    assert [row["dtype"] for row in rows] == ["float32"] * 3 + ["bfloat16"] * 3


def test_section_has_times_and_number_of_slower_drop_ins():
    block = {"device": {"name": "Made Up"}, "torch": "2.11.0", "commit": "0123456789abcdef", "source": "x"}
    fixed = {"shape": "256x100", "dtype": "float32", "original": "plain PyTorch", "original_us": 100.0}
    rows = [
        {**fixed, "drop_in": "datafree.kldiv", "ours_us": 50.0, "ratios": [1.9, 2.0, 2.1]},
        {**fixed, "drop_in": "datafree.jsdiv", "ours_us": 125.0, "ratios": [0.7, 0.8, 0.9]},
        {**fixed, "drop_in": "cpsc.kdloss", "ours_us": 100.0, "ratios": [0.9, 1.0, 1.1]},
    ]
    text = drop_ins_section({"rows": rows, "environments": [block]}, "made-up")
    assert text.startswith("### made-up\n")
    assert "| datafree.kldiv | 256x100 | float32 | 100.0 | 50.0 | 2.00 x (1.90 to 2.10) | plain PyTorch |" in text
    assert "Slower in every turn: 1 of 3. Measured on Made Up, torch 2.11.0, commit 0123456789ab." in text
