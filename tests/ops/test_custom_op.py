"""Operator registration, recording of launches, and ops in compiled, exported and mixed-precision code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.ops import custom_op
from dfkd_fast.ops.custom_op import no_second_derivative, operator, record_op_launches, unsupported_reason
from dfkd_fast.testing import assert_close, random

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dfkd_fast.kernels import config, distillation_kl  # noqa: E402, F401 - the second registers heuristics
from dfkd_fast.kernels.common import cast  # noqa: E402


@triton.jit
def rounded(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, cast(tl.load(x + at), y.dtype.element_ty))


@pytest.fixture(scope="module")
def doubled():
    """An operator with two results of different shapes."""

    def allocate(x: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty(x.shape[0])

    def launch(x, shift, y, row):
        torch.add(2 * x, shift, out=y)
        torch.sum(x, 1, out=row)

    return operator("test_doubled", allocate, launch)


def test_operator_passes_opcheck(doubled):
    for layout in ("contiguous", "transposed", "strided"):
        torch.library.opcheck(doubled, (random(3, 4, layout=layout), 1.0))


def test_operator_supports_vmap_over_any_dimension(doubled):
    x = random(3, 4, 5)
    for dim in range(3):
        y, row = torch.func.vmap(lambda v: doubled(v, 1.0), in_dims=dim)(x)
        moved = x.movedim(dim, 0)
        assert torch.equal(y, 2 * moved + 1)
        assert torch.allclose(row, moved.sum(2))


def test_second_derivatives_raise_with_name_of_op():
    x = random(4, requires_grad=True)
    g = torch.ones(4)
    gradient, nothing = no_second_derivative("an_op", (2 * x, None), g, x)
    assert nothing is None
    assert torch.equal(gradient, 2 * x)
    with pytest.raises(
        RuntimeError, match="an_op: fused backends do not support second derivatives; use backend='reference'"
    ):
        gradient.sum().backward()
    with torch.no_grad():
        plain = 2 * x
        assert no_second_derivative("an_op", (plain,), g, x)[0] is plain


def test_unsupported_reasons(monkeypatch):
    x = random(2, 3)
    monkeypatch.setattr(custom_op, "INTERPRETED", True)
    assert unsupported_reason(x, None, x.half()) is None
    assert unsupported_reason(x, x.double()) == "its kernels support float16, bfloat16 and float32, not float64"
    assert unsupported_reason(x.to("meta")) == "its kernels run on CUDA devices, not on meta"
    monkeypatch.setattr(custom_op, "INTERPRETED", False)
    assert unsupported_reason(x) == "its kernels run on CUDA devices, not on cpu"
    monkeypatch.setattr(custom_op, "_TRITON", False)
    assert unsupported_reason(x) == "triton is not installed"
    assert ops.distillation_kl(x, -x).isfinite()
    with pytest.raises(RuntimeError, match="does not support this call of distillation_kl: triton is not installed"):
        ops.distillation_kl(x, -x, backend="triton")


def test_launches_on_meta_tensors_are_recorded():
    x = torch.empty(4096, 1000, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with record_op_launches(80) as launches:
        loss = ops.distillation_kl(x, x.detach(), backend="triton")
        torch.autograd.grad(loss, x, torch.empty_like(loss))
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == ["_forward_kernel", "_sum_kernel", "_backward_kernel"]
    assert launches[0].arguments["num_rows"] == 4096
    assert launches[0].constants["WHOLE_ROW"] is True
    assert not custom_op._recording


class Losses(torch.nn.Module):
    """A loss that calls three ops on the maps and logits of a network."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.features = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, images, targets):
        norm = (torch.zeros(8), torch.ones(8), None, None, 1e-5)
        maps, mean, var = ops.batchnorm_statistics(
            self.features(images), *norm, activation="relu", backend=self.backend
        )
        pooled, _ = ops.max_pool2x2(maps, backend=self.backend)
        logits = self.head(pooled.mean((2, 3)))
        divergence = ops.distillation_kl(logits, targets, temperature=2.0, backend=self.backend)
        return divergence + 0.1 * (mean.square().mean() + (var - 1).square().mean())


@pytest.fixture
def losses():
    """The loss with Triton kernels and with the reference, with the same weights, and its inputs."""
    torch.manual_seed(0)
    fused, reference = Losses("triton"), Losses("reference")
    reference.load_state_dict(fused.state_dict())
    return fused, reference, (random(4, 3, 6, 6), random(4, 5, seed=1))


def test_ops_in_compiled_module_match_reference(kernel_device, losses):
    fused, reference, inputs = losses
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    values = [module(*inputs) for module in (compiled, reference)]
    assert_close(values[0], values[1], atol=1e-6)
    for value in values:
        value.backward()
    for name, weight in reference.named_parameters():
        assert_close(fused.get_parameter(name).grad, weight.grad, atol=1e-6)


def test_ops_in_exported_module_match_reference(kernel_device, losses):
    fused, reference, inputs = losses
    exported = torch.export.export(fused, inputs)
    called = {str(node.target) for node in exported.graph.nodes if "dfkd_fast" in str(node.target)}
    assert called == {
        f"dfkd_fast.{name}.default"
        for name in ("batchnorm_statistics", "batchnorm_statistics_merge", "max_pool2x2", "distillation_kl")
    }
    assert_close(exported.module()(*inputs), reference(*inputs), atol=1e-6)


def test_ops_in_mixed_precision_training_match_reference(kernel_device, losses):
    """Training uses autocast and a gradient scaler; the scaler skips the step with a non-finite loss."""
    *modules, (images, targets) = losses
    histories = []
    for module in modules:
        optimizer, scaler = torch.optim.SGD(module.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        history = []
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = module(images * (float("inf") if step == 2 else 1.0), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(loss.item())
        assert scaler.get_scale() == 512.0
        histories.append(torch.tensor(history))
    assert histories[0][1] < histories[0][0]
    assert histories[0][3] < histories[0][1]
    assert_close(histories[0].nan_to_num(), histories[1].nan_to_num(), atol=1e-2)


def test_tuned_and_forced_launches_override_heuristic(monkeypatch):
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


def test_cast_rounds_bfloat16_to_nearest_in_interpreter(kernel_device):
    """A plain store would truncate in the interpreter."""
    x = random(256, scale=1e3, device=kernel_device)
    x[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.3895e38])
    y = torch.empty_like(x, dtype=torch.bfloat16)
    rounded[(1,)](x, y, BLOCK=256)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7), x.bfloat16().nan_to_num(7))
