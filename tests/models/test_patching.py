"""``patch`` and ``unpatch``: values, gradients, reports, hooks, copies and errors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

import dfkd_fast
from dfkd_fast import ops, patch, unpatch
from dfkd_fast.graph import PatchReport, Replaced, unwrap
from dfkd_fast.models import extract

from . import nets
from .nets import NARROW, NARROW_TIMM, Net, close, images, snapshot


def randomize_batchnorm(model: nn.Module) -> nn.Module:
    return nets.randomize_batchnorm(model).requires_grad_(False)


class _Block(nn.Module):
    """A user's module with all patterns and further arguments."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, affine=i > 0) for i in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, scale: float = 1.0, double: bool = False) -> Tensor:
        y = self.act(self.norms[0](self.conv(x)))
        y = F.relu6(self.norms[1](y) + x)
        z = self.norms[2](y)
        y = torch.relu(z) + self.norms[3](y) * scale
        return 2 * y if double else y


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.ModuleList(_Block(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


# Options, and the numbers of BatchNorms that are replaced and left.
NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "timm:resnet18": (NARROW_TIMM, 9, 4),
    "torchvision:mobilenet_v2": ({"width_mult": 0.25}, 35, 17),
    "wrn_10_1": ({}, 7, 0),
    "resnet8": (NARROW, 7, 2),
    "custom": ({}, 7, 2),
}


def network(name: str = "custom") -> nn.Module:
    torch.manual_seed(0)
    return (
        randomize_batchnorm(_Custom())
        if name == "custom"
        else randomize_batchnorm(nets.network(name, **NETWORKS[name][0]))
    )


def eval_forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the image."""
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum() + logits.square().sum(), x)[0]


def reasons(report: PatchReport) -> dict[str, str]:
    return {left.path: left.why for left in report.left}


@pytest.mark.parametrize("name", NETWORKS)
def test_patch_keeps_values_and_unpatch_restores(name: str) -> None:
    model, x = network(name), images()
    expected, before = eval_forward(model, x), snapshot(model)
    names = list(model.state_dict())
    report = patch(model)
    _, replaced, left = NETWORKS[name]
    assert (len(report.replaced), len(report.left)) == (replaced, left), str(report)
    assert all("no operation to fuse" in why for why in reasons(report).values())
    found = eval_forward(model, x)
    close(found, expected)
    assert list(model.state_dict()) == names
    assert snapshot(model) != before
    assert patch(model) == report
    assert all(map(torch.equal, eval_forward(model, x), found))
    unpatch(model)
    unpatch(model)
    assert snapshot(model) == before
    assert all(map(torch.equal, eval_forward(model, x), expected))


def test_report() -> None:
    report = patch(network())
    block = {"norms.0": "relu", "norms.1": "add+relu6", "norms.2": "relu"}
    fused = {"stem.1": "relu6"} | {f"blocks.{i}.{path}": name for i in range(2) for path, name in block.items()}
    expected = {path: f"batchnorm_statistics ({name})" for path, name in fused.items()}
    assert {one.path: one.by for one in report.replaced} == expected
    assert str(report).splitlines() == [
        "replaced 7, left 2",
        *(f"  {path}: {by}" for path, by in expected.items()),
        "  left blocks.0.norms.3 and 1 more: no operation to fuse follows",
    ]


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), "0"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)), "1"),
    ],
)
def test_small_models_are_patched(model: nn.Module, path: str) -> None:
    x = images(2, 5)
    expected = randomize_batchnorm(model)(x)
    assert patch(model).replaced == (Replaced(path=path, by="batchnorm_statistics (relu)"),)
    close(model(x), expected)


def test_patched_model_follows_later_changes() -> None:
    """Modes, weights, dtype and ``requires_grad`` may change after the patch."""
    model, x = network(), images(4)
    plain, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for tensor in state.values():
        tensor.add_(1)
    patch(model)
    changes: list[Callable[[Any], Any]] = [
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.blocks[0].norms[1].train(),
        lambda m: m.eval().load_state_dict(state),
        lambda m: m.double(),
        lambda m: m.requires_grad_(),
    ]
    for change in changes:
        change(model)
        change(plain)
        x = x.to(model.head.weight)
        close(model(x), plain(x))
        close([t.double() for t in model.state_dict().values()], [t.double() for t in plain.state_dict().values()])
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_training_and_trainable_networks_are_left() -> None:
    both = nn.ModuleDict({"teacher": network(), "student": network().train(), "tuned": network().requires_grad_()})
    before = snapshot(both)
    report = patch(both, example=None)
    assert "an example" in reasons(report)["teacher.stem.1"]  # a ModuleDict cannot be called
    assert report.replaced == ()
    assert reasons(report)["student.stem.1"] == "in training mode: call eval() first"
    assert reasons(report)["tuned.stem.1"].startswith("trainable")
    assert reasons(report)["tuned.blocks.0.norms.0"].startswith("trainable: call requires_grad_(False) first")
    assert snapshot(both) == before
    assert len(patch(both["teacher"]).replaced) == 7
    assert patch(both["student"]).replaced == ()


def test_further_arguments_run_the_original_forward() -> None:
    model = network()
    block, x = model.blocks[0], torch.randn(2, 8, 6, 6)
    expected = block(x), block(x, 3.0), block(x, double=True)
    patch(model)
    close((block(x), block(x, 3.0), block(x, double=True)), expected)
    with pytest.raises(RuntimeError):
        block(x[0, 0])


def test_hooks_see_the_same_tensors() -> None:
    model, x = network(), images()
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((given[0].clone(), output.clone()))

    norm = model.blocks[0].norms[1]
    model.blocks[1].register_forward_hook(hook)
    handle = norm.register_forward_hook(hook)
    model(x)
    report = patch(model)
    assert reasons(report)["blocks.0.norms.1"] == "it has a hook"
    del seen[2:]  # drop the calls that patch made
    model(x)
    handle.remove()
    patch(model)
    del seen[4:]
    norm.register_forward_hook(hook)  # added after the patch
    model(x)
    assert len(seen) == 6
    close([seen[2:4], seen[4:6]], [seen[:2], seen[:2]])


@pytest.mark.parametrize("name", ["timm:resnet18", "wrn_10_1", "resnet8", "custom"])
def test_copies_and_pickles(name: str) -> None:
    """A copy is patched; an unpickled model is not."""
    model, x = network(name), images()
    plain = model(x)
    report = patch(model)
    patched, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), patched)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    assert twin(x).count_nonzero() == 0
    unpatch(twin)
    assert torch.equal(model(x), patched)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), plain)
    assert patch(loaded) == report
    assert torch.equal(loaded(x), patched)


def test_extract_traces_the_original_forward() -> None:
    model, x = network("wrn_10_1"), images()
    expected = model(x)
    patch(model)
    close(extract(model, statistics=True)(x).logits, expected)
    with pytest.raises(TypeError, match="FeatureModel"):
        patch(extract(model))


def relu(m: Any, x: Tensor) -> Tensor:
    return m.act(m.bn(m.conv(x)))


def remember(m: Any, x: Tensor) -> Tensor:
    m.seen.append(x)
    m.last = x
    return relu(m, x)


class _Fill(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        x[0] = x[0] + 1
        return x[0]


def remembers() -> nn.Module:
    model = Net(remember)
    model.seen, model.last = [], None
    return model


def wrapped() -> nn.Module:
    model = Net(relu)
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


def unreached() -> nn.Module:
    model = Net(lambda m, x: x, aside=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    del model.bn, model.bn2
    return model


LEFT: dict[str, Callable[[], nn.Module]] = {
    "sets last, seen": remembers,
    "cannot be traced by torch.fx: TraceError": lambda: Net(lambda m, x: relu(m, x) if x.mean() < 100 else x),
    # A proxy of torch.fx is not a Tensor.
    "returns other values on the example": lambda: Net(lambda m, x: relu(m, x) * (1 if isinstance(x, Tensor) else 2)),
    # torch.fx passes an immutable list.
    "does not run on the example: TypeError": lambda: Net(lambda m, x: m.fill([relu(m, x)]), fill=_Fill()),
    "creates tensors": lambda: Net(lambda m, x: relu(m, x) * torch.tensor(2.0)),
    "not called with exactly one map": lambda: Net(lambda m, x, y: m.act(m.bn(m.conv(x)) + m.conv(y))),
    "set on the instance": wrapped,
    "does not reach": unreached,
    "running statistics": lambda: Net(relu, bn=nn.BatchNorm2d(4, track_running_stats=False)),
    "no operation to fuse": lambda: Net(relu, bn=BatchNormAct2d(4, act_layer=nn.SiLU)),
}


@pytest.mark.parametrize("why", LEFT)
def test_modules_that_cannot_be_fused_are_left(why: str) -> None:
    model, x = randomize_batchnorm(LEFT[why]()), images(2, 8)
    inputs = (x, x) if "one map" in why else (x,)
    expected = model(*inputs)
    if why == "sets last, seen":
        model.seen.clear()
        model.last = None
    before = snapshot(model)
    report = patch(model, example=inputs)
    assert report.replaced == ()
    assert why in report.left[0].why
    assert snapshot(model) == before
    assert torch.equal(model(*inputs), expected)


def hourglass(size: bool, drop: bool = False, pool: nn.Module | None = None) -> nn.Module:
    """A pooling and its unpooling; ``size`` passes the output size, ``drop`` makes the graph depend on the mode."""

    def rule(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        pooled, indices = m.pool(y)
        inner = F.dropout(m.conv2(pooled), 0.5, m.training) if drop else m.conv2(pooled)
        return m.unpool(inner, indices, output_size=y.size()) if size else m.unpool(inner, indices)

    pool = pool or nn.MaxPool2d(2, return_indices=True)
    return Net(rule, pool=pool, unpool=nn.MaxUnpool2d(2, stride=2), bn=nn.Identity(), bn2=nn.Identity())


@pytest.mark.parametrize(("size", "pixels"), [(True, 9), (False, 8)])
def test_pooling_is_replaced_in_training_mode(size: bool, pixels: int) -> None:
    model = hourglass(size)
    x = images(2, pixels).requires_grad_()
    inputs = [x, *model.conv.parameters(), *model.conv2.parameters()]
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    report = patch(model)
    assert {one.path: one.by for one in report.replaced} == {"pool": "max_pool2x2", "unpool": "max_unpool2x2"}
    found = model(x)
    assert torch.equal(found, expected)
    close(torch.autograd.grad(found.square().sum(), inputs), gradients)
    if not size:  # torch accepts no output size without a batch dimension
        close(model(x[0]), expected[0])


def test_other_poolings_are_left() -> None:
    modes = hourglass(True, drop=True)
    assert "only unpoolings" in reasons(patch(modes))["pool"]
    assert len(patch(modes.eval()).replaced) == 2
    modes.train()
    torch.manual_seed(0)
    found = modes(images(2, 8))
    unpatch(modes)
    torch.manual_seed(0)
    assert torch.equal(modes(images(2, 8)), found)
    assert len(reasons(patch(hourglass(False, pool=nn.MaxPool2d(3, 2, padding=1, return_indices=True))))) == 2
    unpaired = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2, return_indices=True))
    assert "only unpoolings" in reasons(patch(unpaired))["1"]


@pytest.mark.parametrize("make", [network, lambda: hourglass(True).requires_grad_(False)], ids=["norms", "pools"])
def test_kernels_match_plain_network_eager_and_compiled(kernel_device: str, make: Callable[[], nn.Module]) -> None:
    model, x = make().to(kernel_device), images(2, 8).to(kernel_device)
    expected = eval_forward(model, x)
    assert patch(model, example=x).replaced
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    for backend, each in (("reference", model), ("triton", model), ("triton", compiled)):
        with ops.backend(backend):
            close(eval_forward(each, x), expected, 2e-5)
    torch.compiler.reset()


class KLDiv(nn.Module):
    """A class with the name of a published loss but another formula."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), targets.softmax(1)) / 2


@pytest.mark.parametrize("model", [nn.ReLU(), KLDiv()])
def test_models_without_known_layers_are_left(model: nn.Module) -> None:
    assert patch(model) == PatchReport()
    assert "forward" not in model.__dict__


def test_errors() -> None:
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            function("resnet18")  # type: ignore[arg-type]
    model = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match="_Custom does not accept the example"):
        patch(model, example=torch.randn(2, 4, 8, 8))
    assert snapshot(model) == before
    assert dfkd_fast.patch is patch


class _SupConLoss(nn.Module):
    """Anchors without a positive have no loss, as in the copies since late 2023."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.contrast_mode, self.base_temperature = 0.07, "all", 0.07

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        z = features.flatten(1)
        others = 1 - torch.eye(len(z))
        similarity = z @ z.T / self.temperature
        positives = (labels[:, None] == labels) * others
        log_p = similarity - (similarity.exp() * others).sum(1, keepdim=True).log()
        return -((positives * log_p).sum(1) / positives.sum(1).clamp_min(1)).mean()


def test_a_loss_keeps_its_value() -> None:
    loss, labels = _SupConLoss(), torch.tensor([0, 1, 1, 3])
    features = F.normalize(torch.randn(4, 1, 8), dim=2)
    before = loss(features, labels)
    assert patch(loss).replaced == ()
    assert torch.equal(loss(features, labels), before)


def test_networks_in_wrappers() -> None:
    plain, x = nets.network("resnet8", **NARROW).requires_grad_(False), images(2, 16)
    expected, paths = plain(x), [one.path for one in patch(copy.deepcopy(plain)).replaced]
    for wrap in (partial(torch.compile, backend="eager"), nn.DataParallel, AveragedModel):
        wrapper = wrap(copy.deepcopy(plain)).eval()
        close(wrapper(x), expected)
        for example in (None, x):
            assert [one.path for one in patch(wrapper, example=example).replaced] == paths
            close(wrapper(x), expected)
        unpatch(wrapper)
        assert not any("forward" in module.__dict__ for module in unwrap(wrapper).modules())
    plain.compile(backend="eager")
    assert [one.path for one in patch(plain).replaced] == paths
    parallel = nn.DataParallel(plain)
    parallel.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"nn\.DataParallel on 2 devices is not supported"):
        patch(parallel)


def test_compiled_code_uses_the_fused_ops() -> None:
    model, x, nodes = nets.network("resnet8", **NARROW).requires_grad_(False), images(2, 16), []

    def backend(program: Any, _: Any) -> Any:
        nodes.append(len(program.graph.nodes))
        return program

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    patch(model)
    close(compiled(x), model(x))
    assert nodes[1] > nodes[0]  # the reference of a fused op has more nodes


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_a_patched_network_in_torch_export(strict: bool) -> None:
    model, x = nets.network("resnet8", **NARROW).requires_grad_(False), images(2, 16)
    expected = model(x)
    assert len(patch(model).replaced) == 7
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    close(program.module()(x), expected)
    assert all("dfkd_fast" not in str(node.target) for node in program.graph.nodes)
    close(torch.jit.trace(model, x)(x), expected)
    assert len([module for module in model.modules() if "forward" in module.__dict__]) == 4


def test_other_batchnorms_are_fused() -> None:
    for kind in (nn.SyncBatchNorm, FrozenBatchNorm2d):
        model = Net(lambda m, x: m.act(m.bn(m.conv(x))), bn=kind(4), bn2=kind(4)).eval().requires_grad_(False)
        expected = model(images())
        report = patch(model)
        assert [one.path for one in report.replaced] == ["bn"]
        assert [one.path for one in report.left] == ["bn2"]
        close(model(images()), expected)
