"""`weight_cast` gives the same weights and gradients as autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.engine.weight_cast import weight_cast
from dfkd_fast.models import Outputs

from .. import tiny


@pytest.mark.parametrize("side", ["student", "generator"])
def test_values_and_gradients_equal_autocast(side: str) -> None:
    state = tiny.state(replace(tiny.config(), precision="bf16"))
    module = state.sides[side].module
    x = torch.randn(6, 3, 16, 16) if side == "student" else torch.randn(6, 6)
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


def test_only_parameters_of_convolutions_and_linear_layers_are_cast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))
    nn.utils.parametrizations.spectral_norm(model[0])
    copies = weight_cast(model, torch.bfloat16)[0]()
    assert [tuple(copy.shape) for copy in copies] == [(4,), (2, 4)]  # autocast casts the computed weight
    assert all(copy.dtype == torch.bfloat16 for copy in copies)


def test_gradients_are_float32_in_the_memory_format_of_the_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.Linear(5, 1, bias=False))
    model.to(memory_format=torch.channels_last)
    weight, unused = model.parameters()
    cast, _ = weight_cast(model, torch.bfloat16)
    copies = cast()
    assert copies[0].is_contiguous(memory_format=torch.channels_last)
    (copies[0].float() * 3).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.stride() == weight.stride()
    assert torch.equal(weight.grad, torch.full_like(weight, 3))
    assert unused.grad is None or not unused.grad.any()
    model.requires_grad_(False)
    assert not any(copy.requires_grad for copy in cast())
