"""Operators: schema and fake from the allocation, vmap, gradients, second derivatives, recording; uses of users."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.ops import custom_op
from dfkd_fast.ops.custom_op import no_second_derivative, operator, recorded, unsupported_reason
from dfkd_fast.testing import random

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dfkd_fast.kernels import config  # noqa: E402
from dfkd_fast.kernels.common import cast  # noqa: E402


@triton.jit
def rounded(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, cast(tl.load(x + at), y.dtype.element_ty))


@pytest.fixture(scope="module")
def doubled():
    """An operator that doubles and adds: results of two shapes."""

    def allocate(x: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty(x.shape[0])

    def launch(x, shift, y, row):
        torch.add(2 * x, shift, out=y)
        torch.sum(x, 1, out=row)

    return operator("test_doubled", allocate, launch)


def test_an_operator_passes_opcheck(doubled):
    for layout in ("contiguous", "transposed", "strided"):
        torch.library.opcheck(doubled, (random(3, 4, layout=layout), 1.0))


def test_an_operator_under_vmap(doubled):
    x = random(3, 4, 5)
    for dim in range(3):
        y, row = torch.func.vmap(lambda v: doubled(v, 1.0), in_dims=dim)(x)
        moved = x.movedim(dim, 0)
        assert torch.equal(y, 2 * moved + 1)
        assert torch.allclose(row, moved.sum(2))


def test_second_derivatives_are_refused_by_name():
    x = random(4, requires_grad=True)
    g = torch.ones(4)
    gradient, nothing = no_second_derivative("an_op", (2 * x, None), g, x)
    assert nothing is None
    assert torch.equal(gradient, 2 * x)
    with pytest.raises(RuntimeError, match="an_op: fused backends have no second derivative; use backend='reference'"):
        gradient.sum().backward()
    with torch.no_grad():
        plain = 2 * x
        assert no_second_derivative("an_op", (plain,), g, x)[0] is plain


def test_unsupported_reasons(monkeypatch):
    x = random(2, 3)
    monkeypatch.setattr(custom_op, "INTERPRETED", True)
    assert unsupported_reason(x, None, x.half()) is None
    assert unsupported_reason(x, x.double()) == "its kernels take float16, bfloat16 and float32, not float64"
    assert unsupported_reason(x.to("meta")) == "its kernels run on CUDA devices, not on meta"
    monkeypatch.setattr(custom_op, "INTERPRETED", False)
    assert unsupported_reason(x) == "its kernels run on CUDA devices, not on cpu"
    monkeypatch.setattr(custom_op, "_TRITON", False)
    assert unsupported_reason(x) == "triton is not installed"


def test_without_triton_ops_fall_back(monkeypatch):
    monkeypatch.setattr(custom_op, "_TRITON", False)
    x = random(2, 3)
    assert ops.distillation_kl(x, -x).isfinite()
    with pytest.raises(RuntimeError, match="cannot serve distillation_kl: triton is not installed"):
        ops.distillation_kl(x, -x, backend="triton")


def test_launches_are_recorded_on_tensors_without_data():
    x = torch.empty(4096, 1000, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with recorded(80) as launches:
        loss = ops.distillation_kl(x, x.detach(), backend="triton")
        torch.autograd.grad(loss, x, torch.empty_like(loss))
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == ["_forward_kernel", "_sum_kernel", "_backward_kernel"]
    assert launches[0].arguments["count"] == 4096
    assert launches[0].constants["WHOLE"] is True
    assert not custom_op._recording


def test_launch_configurations(monkeypatch):
    sizes = {"classes": 256}
    first, *others = config.candidates("distillation_kl", 90, torch.bfloat16, **sizes)
    assert config.choose("distillation_kl", 90, torch.bfloat16, **sizes) == first
    with config.forced("distillation_kl", others[0]):
        assert config.choose("distillation_kl", 90, torch.bfloat16, **sizes) == others[0]
    name = config.key("distillation_kl", 90, torch.bfloat16, sizes)
    assert name == "distillation_kl/sm_90/bfloat16/classes=256"
    monkeypatch.setattr(config, "_tuned", lambda: {name: config.entry(others[0], "measured")})
    assert config.choose("distillation_kl", 90, torch.bfloat16, **sizes) == others[0]
    assert config.choose("distillation_kl", 80, torch.bfloat16, **sizes) == first
    assert config.shared_memory(86) < config.shared_memory(80) < config.shared_memory(90)


def test_the_interpreter_rounds_bfloat16_to_nearest(kernel_device):
    """Its own stores would cut off."""
    x = random(256, scale=1e3, device=kernel_device)
    x[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.3895e38])
    y = torch.empty_like(x, dtype=torch.bfloat16)
    rounded[(1,)](x, y, BLOCK=256)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7), x.bfloat16().nan_to_num(7))
