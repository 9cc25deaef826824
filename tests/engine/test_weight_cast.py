"""`weight_cast` gives the same weights and gradients as autocast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd_fast.engine.networks import optimized_networks
from dfkd_fast.engine.weight_cast import weight_cast
from dfkd_fast.models import Outputs
from dfkd_fast.nn import HighOrderAttention

from .. import tiny


class _Copies(TorchDispatchMode):
    """Records the number of tensors of each ``_foreach_copy_``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.counts.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", ["student", "generator"])
def test_values_and_gradients_equal_autocast(side: str) -> None:
    state = tiny.state(replace(tiny.config(), precision="bf16"))
    module = state.sides[side].module
    x = torch.randn(6, 3, 16, 16) if side == "student" else torch.randn(6, 6)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found: list[list[Tensor]] = []
    ((cast, call),) = weight_cast(torch.bfloat16, module)
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


def test_student_step_casts_student_and_objective_together() -> None:
    """The loss and all gradients equal those of autocast. Frozen weights are cast, but receive no gradient."""
    found, casts = [], []
    for optimized in (False, True):
        state = tiny.state(replace(tiny.config(), precision="bf16"))
        networks = optimized_networks(state).student_step
        student, objective = networks.student, networks.objective
        if not optimized:
            student, objective = state.student.module, state.student.objective
        x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            target = state.teacher(x)
        with _Copies() as copies:
            with torch.autocast("cpu", torch.bfloat16):
                total, values = objective(target, student(x))
            total.backward()
        casts.append(copies.counts)
        parameters = [*state.student.module.parameters(), *state.student.objective.parameters()]
        assert [p.grad is not None for p in parameters] == [p.requires_grad for p in parameters]
        found.append([total, values, *(p.grad for p in parameters if p.grad is not None)])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))
    weights = [
        weight
        for module in (state.student.module.model, state.student.objective)
        for layer in module.modules()
        for weight in layer._parameters.values()
        if isinstance(layer, nn.Conv2d | nn.Linear | HighOrderAttention) and weight is not None
    ]
    assert casts == [[], [len(weights), sum(weight.requires_grad for weight in weights)]]
    assert not all(weight.requires_grad for weight in weights)


def test_a_cast_follows_weights_that_are_loaded_in_place() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)])
    (first, _), (second, call) = weight_cast(torch.bfloat16, *model)
    for value in (1.0, 2.0):
        model.load_state_dict({name: torch.full_like(x, value) for name, x in model.state_dict().items()})
        assert all(copy.requires_grad for copy in first())
        frozen = second()
        assert not any(copy.requires_grad for copy in frozen)
        assert torch.equal(call(frozen, torch.ones(1, 2).bfloat16()), torch.full((1, 2), 3 * value).bfloat16())


def test_only_parameters_of_convolutions_and_linear_layers_are_cast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))
    nn.utils.parametrizations.spectral_norm(model[0])
    copies = weight_cast(torch.bfloat16, model)[0][0]()
    assert [tuple(copy.shape) for copy in copies] == [(4,), (2, 4)]  # autocast casts the computed weight
    assert all(copy.dtype == torch.bfloat16 for copy in copies)


def test_gradients_are_float32_in_the_memory_format_of_the_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.Linear(5, 1, bias=False))
    model.to(memory_format=torch.channels_last)
    weight, unused = model.parameters()
    ((cast, _),) = weight_cast(torch.bfloat16, model)
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
