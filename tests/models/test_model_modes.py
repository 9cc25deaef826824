"""Frozen networks and the modes of their BatchNorms: what moves, what does not, and that all is put back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dfkd_fast.models import batchnorm_mode, frozen

KINDS = {
    "2d": lambda: nn.BatchNorm2d(3),
    "2d cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "2d untracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "2d plain": lambda: nn.BatchNorm2d(3, affine=False),
    "timm": lambda: BatchNormAct2d(3, act_layer=nn.SiLU),
}


def moved(kind: str) -> nn.Module:
    """A BatchNorm of this kind with statistics that are not those it is built with."""
    module = KINDS[kind]()
    if module.running_mean is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
        module.num_batches_tracked.fill_(4)
    return module


def expected(module: nn.Module, x: Tensor, *, stored: bool) -> Tensor:
    """The definition, in float64."""
    x = x.double()
    if stored and module.running_mean is not None:
        mean, var = module.running_mean.double(), module.running_var.double()
    else:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    y = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + module.eps).sqrt()
    if module.weight is not None:
        y = y * module.weight.double().view(1, -1, 1, 1) + module.bias.double().view(1, -1, 1, 1)
    return F.silu(y) if isinstance(module, BatchNormAct2d) else y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["batch", "update", "eval"])
def test_batchnorm_mode(kind: str, training: bool, mode: str) -> None:
    module = moved(kind).train(training)
    before = copy.deepcopy(module)
    x = torch.randn(4, 3, 5, 2) * 2 + 1
    with batchnorm_mode(nn.Sequential(module), mode):  # type: ignore[arg-type]
        y = module(x)
    torch.testing.assert_close(y.double(), expected(before, x, stored=mode == "eval"), rtol=1e-5, atol=1e-5)
    assert module.training is training
    assert module.track_running_stats is before.track_running_stats
    state, old = module.state_dict(), before.state_dict()
    if mode == "update" and module.running_mean is not None:
        reference = before.train()
        reference(x)
        old = reference.state_dict()
        assert state["num_batches_tracked"] == 5
    assert state.keys() == old.keys()
    assert all(torch.equal(value, old[name]) for name, value in state.items())


def test_modes_nest_and_are_put_back_after_an_exception() -> None:
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


def test_gradients_of_batch_mode_are_those_of_training() -> None:
    module, x = moved("2d"), torch.randn(4, 3, 2, 2, requires_grad=True)
    with batchnorm_mode(module.eval(), "batch"):
        (found,) = torch.autograd.grad(module(x).pow(3).sum(), x)
    (expected,) = torch.autograd.grad(module.train()(x).pow(3).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be one of batch, update, eval, got 'train'"):
        with batchnorm_mode(nn.BatchNorm2d(1), "train"):  # type: ignore[arg-type]
            pass


def test_frozen() -> None:
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

    def fail() -> None:
        with frozen(model):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert [p.requires_grad for p in model.parameters()] == before
    loss.backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())
