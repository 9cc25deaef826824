"""What patching replaces beside BatchNorms: MHN's order modules, poolings with indices, losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops, patch, unpatch
from dfkd_fast.compat import datafree

from .test_patching import close, everything, images, reasons, same


# Chen et al., "Mixed High-Order Attention Network for Person Re-Identification", ICCV 2019: names of parameters and
# values as in chenbinghui1/MHN, model.py.
class HighDivModule(nn.Module):
    def __init__(self, in_channels: int, order: int = 1, hidden: int | None = None) -> None:
        super().__init__()
        self.order = order
        hidden = hidden or in_channels // 8 * 2
        for r in range(1, order + 1):
            for i in range(1, r + 1):
                self.add_module(f"order{order}_{r}_{i}", nn.Sequential(nn.Conv2d(in_channels, hidden, 1, bias=False)))
            gate = nn.Sequential(nn.Conv2d(hidden, in_channels, 1, bias=False), nn.Sigmoid())
            self.add_module(f"convb{order}_{r}", gate)

    def forward(self, x: Tensor) -> Tensor:
        gates = []
        for r in range(1, self.order + 1):
            product = torch.ones(())
            for i in range(1, r + 1):
                product = product * self.get_submodule(f"order{self.order}_{r}_{i}")(x)
            gates.append(self.get_submodule(f"convb{self.order}_{r}")(F.relu(product)))
        return x * sum(gates) / self.order


PCBHighDivModule = type("PCBHighDivModule", (HighDivModule,), {})


@pytest.mark.parametrize("kind", [HighDivModule, PCBHighDivModule])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_modules_of_mhn(kind: type[HighDivModule], order: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), kind(16, order))
    x = images(2, 6).requires_grad_()
    wanted = model(x)
    gradients = torch.autograd.grad(wanted.square().sum(), [x, *model.parameters()])
    before = everything(model)
    report = patch(model)
    assert [(one.path, one.by) for one in report.replaced] == [
        ("1", f"high_order_attention (order {order}, per_order)")
    ]
    assert report.left == ()
    found = model(x)
    close(found, wanted)
    for a, b in zip(torch.autograd.grad(found.square().sum(), [x, *model.parameters()]), gradients, strict=True):
        close(a, b)
    unpatch(model)
    assert same(everything(model), before)


def test_order_modules_of_someone_else_are_left() -> None:
    class Summed(HighDivModule):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.order

    Summed.__name__ = "HighDivModule"
    hooked = HighDivModule(16, 2)
    hooked.order2_1_1.register_forward_hook(lambda *_: None)
    biased = HighDivModule(16, 2)
    biased.order2_2_1[0] = nn.Conv2d(16, 4, 1)
    gated = HighDivModule(16, 2)
    gated.convb2_2[1] = nn.Tanh()
    more = HighDivModule(16, 2)
    more.norm = nn.BatchNorm2d(16)
    without = HighDivModule(16, 2)
    without.order = None  # type: ignore[assignment]
    for module, why in [
        (Summed(16, 2), "gives other values on the example"),
        (hooked, "a hook watches a part"),
        (biased, "'order2_2_1' is not the layer"),
        (gated, "'convb2_2' is not the layer"),
        (more, "does not have the parts"),
        (without, "without an order"),
    ]:
        report = patch(nn.Sequential(module))
        assert report.replaced == ()
        assert why in reasons(report)["0"], why


class _Hourglass(nn.Module):
    """A decoder that unpools to where its encoder pooled."""

    def __init__(self, size: bool, drop: bool = False) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.unpool = nn.MaxUnpool2d(2, stride=2)
        self.size, self.drop = size, drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x)
        pooled, indices = self.pool(y)
        inner = self.inner(pooled)
        if self.drop:
            inner = F.dropout(inner, 0.5, self.training)
        return self.unpool(inner, indices, output_size=y.size()) if self.size else self.unpool(inner, indices)


@pytest.mark.parametrize(("size", "pixels"), [(True, 9), (False, 8)])
def test_pooling_with_indices(size: bool, pixels: int) -> None:
    """Trainable, in training mode: there is nothing in it that a mode would change."""
    model = _Hourglass(size)
    x = images(2, pixels).requires_grad_()
    wanted = model(x)
    gradients = torch.autograd.grad(wanted.square().sum(), [x, *model.parameters()])
    report = patch(model)
    assert {one.path: one.by for one in report.replaced} == {"pool": "max_pool2x2", "unpool": "max_unpool2x2"}
    found = model(x)
    assert torch.equal(found, wanted)
    for a, b in zip(torch.autograd.grad(found.square().sum(), [x, *model.parameters()]), gradients, strict=True):
        close(a, b)
    if not size:  # torch itself takes no size for a map without a batch
        close(model(x[0]), wanted[0])


def test_poolings_that_are_left() -> None:
    modes = _Hourglass(True, drop=True)
    assert "indices go elsewhere" in reasons(patch(modes))["pool"]
    assert len(patch(modes.eval()).replaced) == 2
    modes.train()
    torch.manual_seed(0)
    found = modes(images(2, 8))
    unpatch(modes)
    torch.manual_seed(0)
    assert torch.equal(modes(images(2, 8)), found)
    wider = _Hourglass(False)
    wider.pool = nn.MaxPool2d(3, 2, padding=1, return_indices=True)
    assert len(reasons(patch(wider))) == 2
    alone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2, return_indices=True))
    assert "indices go elsewhere" in reasons(patch(alone))["1"]


class KLDiv(nn.Module):
    """As a project has it; what is wrong with it is told by ``broken``."""

    def __init__(self, T: float = 1.0, reduction: str = "batchmean", broken: str = "") -> None:
        super().__init__()
        self.T, self.reduction, self.broken = T, reduction, broken

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.broken == "detach":
            targets = targets.detach()
        if self.broken == "scale":
            targets = 2 * targets
        p, q = (targets / self.T).log_softmax(1), (logits / self.T).log_softmax(1)
        return F.kl_div(q, p, reduction=self.reduction, log_target=True) * self.T**2


class SupConLoss(nn.Module):
    """The definition, with labels; of "all" views alone."""

    def __init__(self, temperature: float = 0.07, device: str = "cpu") -> None:
        super().__init__()
        self.temperature, self.contrast_mode, self.base_temperature = temperature, "all", 0.07
        self.device = device

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        count, views = features.shape[:2]
        of = (torch.arange(count) if labels is None else labels).repeat(views)
        vectors = torch.cat(features.unbind(1))
        similarity = vectors @ vectors.T / self.temperature
        itself = torch.eye(len(of), dtype=torch.bool)
        positive = (of[:, None] == of[None]) & ~itself
        chances = similarity - similarity.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)
        loss = -(chances * positive).sum(1) / positive.sum(1)
        return self.temperature / self.base_temperature * loss.mean()


def test_losses_of_projects() -> None:
    model = nn.ModuleDict({"kd": KLDiv(4.0), "contrast": SupConLoss(0.2)})
    student, teacher = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9, requires_grad=True)
    views = F.normalize(torch.randn(5, 2, 7), dim=2).requires_grad_()
    wanted = [model["kd"](student, teacher), model["contrast"](views)]
    gradients = [*torch.autograd.grad(wanted[0], [student, teacher]), *torch.autograd.grad(wanted[1], views)]
    before = everything(model)
    report = patch(model)
    assert {one.path: one.by for one in report.replaced} == {
        "kd": "compat.datafree.KLDiv",
        "contrast": "compat.cpsc.SupConLoss",
    }
    found = [model["kd"](logits=student, targets=teacher), model["contrast"](views)]
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    computed = [*torch.autograd.grad(found[0], [student, teacher]), *torch.autograd.grad(found[1], views)]
    for a, b in zip(computed, gradients, strict=True):
        close(a, b)
    model["kd"].T = 1.0
    close(model["kd"](student, teacher), KLDiv(1.0)(student, teacher))
    model["kd"].T = 4.0
    unpatch(model)
    assert same(everything(model), before)


def test_losses_that_are_others_are_left() -> None:
    more = KLDiv()
    more.head = nn.Linear(3, 3)
    less = SupConLoss()
    del less.contrast_mode
    hooked = KLDiv()
    hooked.register_forward_hook(lambda *_: None)
    for module, why in [
        (KLDiv(broken="detach"), "gives other values"),
        (KLDiv(broken="scale"), "gives other values"),
        (KLDiv(reduction="unknown"), "cannot be tried: ValueError"),
        (more, "does not have the attributes"),
        (less, "does not have the attributes"),
        (hooked, "a hook watches it"),
        (SupConLoss(device="nowhere"), "is for nowhere"),
        (datafree.KLDiv(), "the drop-in itself"),
    ]:
        report = patch(module)
        assert report.replaced == ()
        assert why in reasons(report)[""], why


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_all_compile_without_graph_breaks(kernel_device: str, backend: str) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pools, self.attention, self.kd = _Hourglass(True), HighDivModule(16, 2), KLDiv(2.0)
            self.widen = nn.Conv2d(4, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.attention(self.widen(self.pools(x))).mean((2, 3))
            return self.kd(logits, logits.detach().flip(1))

    model, x = Whole().to(kernel_device), images(2, 6).to(kernel_device)
    wanted = model(x)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    assert len(patch(model).replaced) == 4
    torch.compiler.reset()
    with ops.backend(backend):
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        computed = torch.autograd.grad(found, list(model.parameters()))
    torch.compiler.reset()
    for a, b in zip([found, *computed], [wanted, *gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
