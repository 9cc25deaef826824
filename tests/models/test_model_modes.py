"""``frozen`` and ``batchnorm_mode``: gradients and buffers; leaving restores all flags."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dfkd_fast.models import batchnorm_mode, frozen

KINDS: dict[str, Callable[[], nn.Module]] = {
    "2d": lambda: nn.BatchNorm2d(3),
    "2d cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "2d untracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "2d without affine": lambda: nn.BatchNorm2d(3, affine=False),
    "timm": lambda: BatchNormAct2d(3, act_layer=nn.SiLU),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["batch", "update", "eval"])
def test_batchnorm_mode_matches_torch(kind: str, training: bool, mode: str) -> None:
    """Compares values, gradients and buffers with a BatchNorm in training or eval mode."""
    module = KINDS[kind]()
    if module.running_mean is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
        module.num_batches_tracked.fill_(4)
    before, reference = copy.deepcopy(module), copy.deepcopy(module).train(mode != "eval")
    module.train(training)
    x = (torch.randn(4, 3, 5, 2) * 2 + 1).requires_grad_()
    with batchnorm_mode(nn.Sequential(module), mode):  # type: ignore[arg-type]
        found = module(x)
    expected = reference(x)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert module.training is training
    assert module.track_running_stats is before.track_running_stats
    state, old = module.state_dict(), (reference if mode == "update" else before).state_dict()
    assert state.keys() == old.keys()
    assert all(torch.equal(value, old[name]) for name, value in state.items())


def test_modes_nest_and_are_restored_after_an_exception() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval(), nn.Dropout(), nn.BatchNorm1d(2))

    def flags() -> list[tuple[bool, bool | None]]:
        return [(m.training, getattr(m, "track_running_stats", None)) for m in model]

    def fail() -> None:
        with batchnorm_mode(model, "batch"), batchnorm_mode(model, "eval"):
            assert flags() == [(False, False), (False, False), (True, None), (False, False)]
            raise KeyError("inside")

    before = flags()
    with pytest.raises(KeyError, match="inside"):
        fail()
    assert flags() == before


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be one of batch, update, eval, got 'train'"):
        with batchnorm_mode(nn.BatchNorm2d(1), "train"):  # type: ignore[arg-type]
            pass


def test_frozen_computes_no_weight_gradient_and_restores_flags() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model[2].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    x = torch.randn(2, 3, requires_grad=True)
    with frozen(model):
        loss = model(x).sum()
        with frozen(model):
            pass
        assert not any(p.requires_grad for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before

    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before
    loss.backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())
