"""What is not measured is not chosen; what is, is the fastest of those measured."""

from __future__ import annotations

import pytest
import torch

from dfkd_fast.ops import choices
from dfkd_fast.ops.backend import _registry, dispatch, register
from dfkd_fast.ops.choices import shape_class


def test_classes_are_powers_of_two_upwards() -> None:
    assert shape_class(torch.empty(64, 200)) == (6, 8)
    assert shape_class(torch.empty(65, 256)) == (7, 8)
    assert shape_class(torch.empty(64, 512, 7, 7)) == (12, 9)  # 3,136 positions
    assert shape_class(torch.empty(0, 1)) == (0, 0)


def test_without_a_measurement_nothing_is_chosen() -> None:
    assert choices.faster("never_heard_of", torch.zeros(2, 2)) is None
    for op, table in _registry.items():
        if "cuda" in table:
            assert not table["cuda"].automatic(torch.zeros(4, 4), torch.zeros(4, 4)), op


@pytest.mark.parametrize("fastest", ["cuda", "triton", None])
def test_the_one_that_is_written_down_is_chosen(fastest: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "faster", lambda op, x: fastest)
    monkeypatch.setitem(_registry, "adding", {})
    for number, name in enumerate(("cuda", "triton", "reference")):
        register("adding", name, lambda x, number=number: x + number)
    # On the CPU Triton's kernels are never chosen.
    assert dispatch("adding", None, torch.zeros(())).item() == (0 if fastest == "cuda" else 2)
    assert dispatch("adding", "cuda", torch.zeros(())).item() == 0
