"""Automatic selection of the fastest measured backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfkd_fast.ops import choices
from dfkd_fast.ops.backend import _registry, dispatch, register
from dfkd_fast.ops.choices import shape_class


def test_shape_classes_round_up_to_powers_of_two() -> None:
    assert shape_class(torch.empty(64, 200)) == (6, 8)
    assert shape_class(torch.empty(65, 256)) == (7, 8)
    assert shape_class(torch.empty(64, 512, 7, 7)) == (12, 9)  # 3,136 positions
    assert shape_class(torch.empty(0, 1)) == (0, 0)


def test_cuda_is_not_selected_without_measurement() -> None:
    assert choices.faster("never_heard_of", torch.zeros(2, 2)) is None
    for op, table in _registry.items():
        if "cuda" in table:
            assert not table["cuda"].automatic(torch.zeros(4, 4), torch.zeros(4, 4)), op


@pytest.mark.parametrize("fastest", ["cuda", "triton", None])
def test_fastest_measured_backend_is_selected(fastest: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "faster", lambda op, x: fastest)
    monkeypatch.setitem(_registry, "adding", {})
    for number, name in enumerate(("cuda", "triton", "reference")):
        register("adding", name, lambda x, number=number: x + number)
    # Triton kernels are never selected on the CPU.
    assert dispatch("adding", None, torch.zeros(())).item() == (0 if fastest == "cuda" else 2)
    assert dispatch("adding", "cuda", torch.zeros(())).item() == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": [{"op": "x"}]}', None])
def test_damaged_table_is_refused_by_name(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    assert choices.read_choices(path) == {}
    if content is None:
        path.symlink_to(path)
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"choices\.json is damaged: .*; install dfkd_fast again"):
        choices.read_choices(path)
