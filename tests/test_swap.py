"""The stage that sets the examples and the drop-ins beside their originals, and its part of docs/swapping.md."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from dfkd_fast.benchmarks import report, swap, swap_cases
from dfkd_fast.compat import MODULES

CPU = torch.device("cpu")
SMALL = swap_cases.SIZES["small"]

# Nothing is computed by the first, the second is a copy of InstanceMeanHook, the third is inside NTXentLoss; the
# losses of pytorch-metric-learning are the library's own but for what SelfSupervisedLoss makes of them.
INSIDE_OTHERS = {
    "datafree.FeatureHook",
    "datafree.FeatureMeanHook",
    "lightly.MemoryBankModule",
    "metric_learning.NTXentLoss",
    "metric_learning.SupConLoss",
}


def known(size: swap_cases.Size = SMALL) -> dict[tuple[str, ...], swap_cases.Case]:
    return {case.key: case for case in swap_cases.cases(CPU, size)}


def test_every_drop_in_is_compared():
    compared = {key[1].partition(",")[0] for key in known()}
    named = {
        f"{module}.{case.name}"
        for module in MODULES
        if module != "metric_learning" or swap_cases.installed("pytorch-metric-learning")
        for case in importlib.import_module(f"dfkd_fast.compat.{module}").COVERAGE
    }
    assert named - compared <= INSIDE_OTHERS


def test_the_sizes_are_those_that_are_demanded():
    full = list(swap_cases.cases(CPU, swap_cases.SIZES["full"]))
    assert len({case.key for case in full}) == len(full)
    shapes = {kind: {case.shape for case in full if case.kind == kind} for kind in swap.KINDS}
    assert shapes["logits"] == {"256x100", "64x200"}
    assert shapes["features"] == {"256x512", "64x128"}
    assert shapes["BatchNorms"] == {"wrn_40_2 at 256x3x32x32"}
    norms, stages = swap_cases._network(swap_cases.SIZES["full"])
    assert len(norms) == 37
    assert [tuple(shape) for shape in stages] == [(1, 32, 32, 32), (1, 64, 16, 16), (1, 128, 8, 8)]


@pytest.mark.parametrize("dtype", swap_cases.DTYPES)
def test_originals_compute_what_the_drop_ins_compute(dtype):
    for case in known().values():
        if case.dtype != dtype or not case.possible:
            continue
        row = swap._measured(case, CPU, SMALL)
        if row["ratios"]:
            assert row["value_difference"] < (1e-5 if dtype == "float32" else 0.1), case.key
            assert row["gradient_difference"] < (1e-5 if dtype == "float32" else 0.1), case.key
        assert bool(row["ratios"]) == ("reason" not in row)
        assert dtype == "bfloat16" or row["ratios"]


def test_definitions_are_what_the_libraries_compute(monkeypatch):
    """Where lightly or torchdistill is not installed."""
    monkeypatch.setattr(swap_cases, "installed", lambda library: False)
    found = [case for case in known().values() if case.case.startswith(("lightly", "torchdistill"))]
    assert [case.case for case in found if not case.possible] == ["lightly.NTXentLoss, memory bank"] * 2
    for case in found:
        if case.possible and case.dtype == "float32":
            row = swap._measured(case, CPU, SMALL)
            assert row["original"] == "plain PyTorch"
            assert row["value_difference"] < 1e-5, case.key
            assert row["gradient_difference"] < 1e-5, case.key


def test_the_stage_writes_sound_rows_and_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "swap.json"
    arguments = ["--out", str(out), "--device", "cpu", "--size", "small"]
    assert swap.main([*arguments, "--kinds", "example", "logits"]) == 0
    content = json.loads(out.read_text())
    assert not content["complete"]
    rows = {(row["kind"], row["case"], row["dtype"]): row for row in content["rows"]}
    kl = rows["logits", "datafree.kldiv", "float32"]
    assert (kl["backend"], kl["ops"], kl["original"]) == ("reference", ["distillation_kl"], "plain PyTorch")
    assert kl["ours_p10_us"] <= kl["ours_us"] <= kl["ours_p90_us"]
    assert kl["original_p10_us"] <= kl["original_us"] <= kl["original_p90_us"]
    assert kl["ratio"] == pytest.approx(kl["original_us"] / kl["ours_us"], rel=1e-3)
    assert len(kl["ratios"]) == SMALL.turns
    assert rows["logits", "datafree.jsdiv", "float32"]["backend"] == "plain PyTorch"
    loop = rows["example", "plain_dfkd", "float32"]
    assert (loop["shape"], loop["backend"]) == ("4x3x32x32", "reference")
    assert loop["first_loss_difference"] < 1e-5
    assert loop["ours_us"] > 0

    measured = []

    def quick(case, device, size):
        measured.append(case.key)
        if "bank" in case.case:
            raise RuntimeError("no")
        return {name: kl[name] for name in kl if name not in (*swap.KEY, "date", "environment")}

    monkeypatch.setattr(swap, "_measured", quick)
    assert swap.main(arguments) == 1
    content = json.loads(out.read_text())
    assert {key[0] for key in measured} == {"features", "BatchNorms", "stages", "images"}
    missing = known().keys() - {tuple(row[name] for name in swap.KEY) for row in content["rows"]}
    assert {key[1] for key in missing if swap_cases.installed("lightly")} <= {"lightly.NTXentLoss, memory bank"}
    assert not content["complete"]


def test_what_needs_a_library_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(swap_cases, "installed", lambda library: False)
    monkeypatch.setattr(swap, "_measured", lambda case, device, size: {"ratios": [], "reason": "no"})
    monkeypatch.setattr(swap, "_EXAMPLES", tmp_path)
    out = tmp_path / "swap.json"
    assert swap.main(["--out", str(out), "--device", "cpu", "--size", "small"]) == 0
    printed = capsys.readouterr().out
    assert "metric_learning.SelfSupervisedLoss, NTXentLoss: needs pytorch-metric-learning" in printed
    assert "the worked examples: they are not installed" in printed
    content = json.loads(out.read_text())
    assert not content["complete"]
    assert not any(row["case"].startswith("metric_learning") for row in content["rows"])


def test_an_original_that_refuses_a_dtype_has_a_row_without_times():
    def refuses(x):
        raise TypeError("no bfloat16\nhere")

    pair = swap_cases.Pair(
        ours=lambda x: x.sum(), original=refuses, inputs=lambda: (torch.ones(2, requires_grad=True),), source="it"
    )
    row = swap.compare_pair(pair, CPU, SMALL, optional=True)
    assert (row["ours_us"], row["ratios"], row["reason"]) == (None, [], "TypeError: no bfloat16")
    assert swap.verdict(row) == "-"
    with pytest.raises(TypeError):
        swap.compare_pair(pair, CPU, SMALL)


def test_both_are_timed_and_go_first_in_turn():
    order = []
    pair = swap_cases.Pair(
        ours=lambda x: order.append("ours") or x.sum(),
        original=lambda x: order.append("original") or x.sum(),
        inputs=lambda: (torch.ones(2, requires_grad=True),),
        source="it",
    )
    swap.compare_pair(pair, CPU, SMALL)
    changes = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert changes == ["original", "ours", "original", "ours", "original"]  # the first two: are they the same?
    assert order.count("ours") > 2 * SMALL.least


def test_slower_is_slower_in_every_turn():
    assert swap.verdict({"ratios": [0.9, 0.99]}) == "slower"
    assert swap.verdict({"ratios": [0.9, 1.0]}) == "equal"
    assert swap.verdict({"ratios": [1.1, 1.01]}) == "faster"


def made_up() -> dict:
    times = {"ours_us": 50.0, "original_us": 100.0, "ratio": 2.0, "ratios": [1.9, 2.1], "environment": 0}
    drop_in = {**times, "kind": "logits", "case": "datafree.kldiv", "backend": "triton", "original": "plain PyTorch"}
    rows = [
        {**drop_in, "shape": "256x100", "dtype": "float32"},
        {**drop_in, "shape": "64x200", "dtype": "float32", "ratio": 0.8, "ratios": [0.7, 0.9]},
        {**drop_in, "shape": "256x100", "dtype": "bfloat16", "ratio": None, "ratios": [], "backend": None},
        {
            **times,
            "kind": "example",
            "case": "plain_dfkd",
            "shape": "256x3x64x64",
            "dtype": "float32",
            "original_us": 30_000.0,
            "ours_us": 20_000.0,
            "ratio": 1.5,
            "ratios": [1.4, 1.6],
            "first_loss_difference": 1e-7,
            "largest_loss_difference": 2e-5,
        },
    ]
    block = {"device": {"name": "Made Up"}, "torch": "2.11.0", "commit": "0123456789abcdef", "source": "x"}
    return {"complete": False, "rows": rows, "environments": [block]}


def test_the_page_says_what_was_measured(tmp_path: Path, repository: Path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "swapping.md"
    shutil.copyfile(repository / "docs" / "swapping.md", page)

    def section() -> str:
        report.main(root=tmp_path)
        return re.search(r"<!-- begin: swap -->\n(.*)<!-- end: swap -->", page.read_text(), re.DOTALL)[1]

    assert section() == "Nothing has been measured yet.\n"
    folder = tmp_path / "benchmarks" / "results" / "made-up"
    folder.mkdir(parents=True)
    (folder / "swap.json").write_text(json.dumps(made_up()))
    text = section()
    assert text.startswith("### made-up (not complete)\n")
    assert "| plain_dfkd | 256x3x64x64 | 30.00 | 20.00 | 1.50 (1.40 to 1.60) | 1.0e-07 | 2.0e-05 |" in text
    assert "Never slower: **no**. Of 2, faster in every turn: 1, in some: 0, in none: 1." in text
    assert "100.0 / 50.0: 2.00 (1.90 to 2.10)" in text
    assert "**0.80 (0.70 to 0.90)**" in text
    assert "| drop-in | dtype | 256x100 | 64x200 | computed by | original |" in text
    assert "the original does not run" in text
    assert "Measured on: Made Up, torch 2.11.0; commit: 0123456789ab." in text

    content = made_up()
    content["rows"], content["complete"] = content["rows"][:1], True
    (folder / "swap.json").write_text(json.dumps(content))
    text = section()
    assert text.startswith("### made-up\n")
    assert "Never slower: yes." in text
    assert "worked examples" not in text


def test_the_committed_page_is_up_to_date(tmp_path: Path, repository: Path):
    (tmp_path / "benchmarks").symlink_to(repository / "benchmarks")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "swapping.md"
    shutil.copyfile(repository / "docs" / "swapping.md", page)
    report.main(root=tmp_path)
    assert page.read_text() == (repository / "docs" / "swapping.md").read_text()


@pytest.mark.gpu
def test_on_the_card_the_kernels_serve(tmp_path: Path):
    out = tmp_path / "swap.json"
    assert swap.main(["--out", str(out), "--size", "small", "--kinds", "logits", "BatchNorms"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["backend"] for row in rows if row["ratios"]} == {"triton", "plain PyTorch"}
