"""Weights cast together are the weights that autocast casts one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.engine.weight_cast import cast_together, weight_cast
from dfkd_fast.models import Outputs

from .. import tiny


@pytest.mark.parametrize("which", ["student", "generator"])
def test_values_and_gradients_are_autocasts_bit_for_bit(which: str) -> None:
    state = tiny.state(replace(tiny.config(), precision="bf16"))
    module = state.sides[which].module
    x = torch.randn(6, 3, 16, 16) if which == "student" else torch.randn(6, 6)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found: list[list[Tensor]] = []
    cast, call = weight_cast(module, torch.bfloat16)
    for forward in (module, lambda x: call(cast(), x)):
        module.load_state_dict(before)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = forward(x)
        y = outputs.logits if isinstance(outputs, Outputs) else outputs
        y.float().square().sum().backward()
        buffers = [buffer.clone() for buffer in module.buffers()]
        found.append([y, *(p.grad for p in module.parameters() if p.grad is not None), *buffers])
        module.zero_grad(set_to_none=True)
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))


def test_what_is_cast_and_what_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))
    nn.utils.parametrizations.spectral_norm(model[0])
    copies = weight_cast(model, torch.bfloat16)[0]()
    assert [tuple(copy.shape) for copy in copies] == [(4,), (2, 4)]  # a computed weight is autocast's
    assert all(copy.dtype == torch.bfloat16 for copy in copies)


def test_gradients_come_back_in_the_masters_type_and_layout() -> None:
    master = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    other = torch.randn(5, requires_grad=True)
    copies = cast_together([master, other], torch.bfloat16)
    assert copies[0].is_contiguous(memory_format=torch.channels_last)
    (copies[0].float() * 3).sum().backward()
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert master.grad.stride() == master.stride()
    assert torch.equal(master.grad, torch.full_like(master, 3))
    assert other.grad is None or not other.grad.any()
    assert not any(copy.requires_grad for copy in cast_together([master.detach()], torch.bfloat16))
