"""Each step updates the tensors that it should and no others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from dfkd_fast.config import GeneratorConfig, ObjectiveConfig
from dfkd_fast.engine import DistillState, Runtime, build_state, generator_step, student_step, synthesize
from dfkd_fast.engine.networks import optimized_networks
from dfkd_fast.models import Outputs, extract

from .. import tiny


def tensors(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": tensor.clone()
        for index, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def changed(before: dict[str, Tensor], *modules: nn.Module) -> set[str]:
    after = tensors(*modules)
    return {name for name in before if not torch.equal(before[name], after[name])}


def no_gradients(*modules: nn.Module) -> bool:
    return all(parameter.grad is None for module in modules for parameter in module.parameters())


@pytest.fixture(params=["dfkd-fgvc", "baseline", "dfad", "dafl", "zskt", "dfq"])
def state(request: pytest.FixtureRequest) -> DistillState:
    return tiny.state(tiny.config(objective=ObjectiveConfig(preset=request.param)))


def test_generator_step_changes_only_the_generator(state: DistillState) -> None:
    others = (state.teacher.model, state.student.module.model, state.student.objective)
    before, generator = tensors(*others), tensors(state.generator.module)
    flags = [(m, m.training) for m in state.student.module.modules()]
    generator_step(state)
    assert not changed(before, *others)
    assert no_gradients(*others)
    # The bias in front of the attention's softmax over positions has no gradient.
    names = [name for name, _ in state.generator.module.named_parameters()]
    parameters = {f"0.{name}" for name in names}
    trained = {f"0.{name}" for name in names if not name.endswith("attention.expand.bias")}
    assert changed(generator, state.generator.module) & parameters == trained
    assert all(module.training == flag for module, flag in flags)
    assert all(parameter.requires_grad for parameter in state.student.module.parameters())


def test_student_step_changes_only_the_student_and_its_objective(state: DistillState) -> None:
    others = (state.teacher.model, state.generator.module, state.generator.objective)
    frozen = {
        f"0.{name}" for name, parameter in state.student.objective.named_parameters() if not parameter.requires_grad
    }
    before, student, objective = tensors(*others), tensors(state.student.module.model), tensors(state.student.objective)
    student_step(state)
    assert not changed(before, *others)
    assert no_gradients(*others)
    assert changed(student, state.student.module.model) == set(student)  # every weight, every buffer
    assert changed(objective, state.student.objective) == set(objective) - frozen


def test_autograd_graph_ends_only_in_trained_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight gradient of a frozen network is computed, not even temporarily."""
    state = tiny.state()
    leaves: set[int] = set()
    backward = Tensor.backward

    def walk(tensor: Tensor, *args: object, **kwargs: object) -> None:
        leaves.clear()
        queue, visited = [tensor.grad_fn], set()  # type: ignore[var-annotated]
        while queue:
            node = queue.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            queue.extend(following for following, _ in node.next_functions)
        backward(tensor)

    monkeypatch.setattr(Tensor, "backward", walk)
    generator_step(state)
    assert leaves == {id(parameter) for parameter in state.generator.module.parameters()}
    student_step(state)
    trained = [*state.student.module.model.parameters(), *state.student.objective.parameters()]
    assert leaves == {id(parameter) for parameter in trained if parameter.requires_grad}


@pytest.mark.parametrize("mode", ["batch", "update", "eval"])
def test_generator_step_updates_student_buffers_only_in_update_mode(mode: str) -> None:
    state = tiny.state(tiny.config(student_in_generator_step=mode))
    before = tensors(state.student.module.model)
    generator_step(state)
    names = changed(before, state.student.module.model)
    assert bool(names) == (mode == "update")
    assert all("running" in name or "num_batches" in name for name in names)


@pytest.mark.parametrize(
    ("size", "precision", "attention", "warns"),
    [
        (224, "bf16", "spatial", True),
        (224, "fp32", "spatial", False),
        (32, "bf16", "spatial", False),
        (224, "bf16", "spatial_mean1", False),
    ],
)
def test_a_gate_without_effect_warns(
    size: int, precision: str, attention: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    generator = GeneratorConfig(latent_dim=6, channels=(8, 8, 8, 8, 8), attention=attention)  # type: ignore[arg-type]
    config = tiny.config(image_size=size, generator=generator)
    features = [extract(each, image_size=32) for each in (tiny.teacher().eval(), tiny.network())]
    runtime = Runtime.of("cpu", precision, channels_last=True)  # type: ignore[arg-type]
    build_state(features[0], features[1], config, runtime, image_size=size, mean=tiny.HALF, std=tiny.HALF)
    assert ("'spatial' has no effect at 224 pixels in bfloat16" in caplog.text) == warns
    assert GeneratorConfig().attention == "spatial_mean1"


def test_generator_step_is_an_adam_step_along_its_objective() -> None:
    """The gradient is that of alpha * L_BN - L_KD, and both terms reach the generator through the images."""
    state = tiny.state(
        tiny.config(generator=GeneratorConfig(latent_dim=6, channels=(8, 8, 8, 8, 8), spectral_norm=False))
    )
    twin = copy.deepcopy(state.generator.module)
    noise = state.synthesizer.noise(6, torch.Generator().manual_seed(state.config.seed))
    inputs = twin(noise)  # with a mean and deviation of 0.5, normalization is the identity
    teacher = state.teacher_statistics
    assert teacher is not None
    target = teacher(inputs)
    student = copy.deepcopy(state.student.module.model).train()
    bn = sum(
        (layer.mean - layer.running_mean).norm() + (layer.var - layer.running_var).norm() for layer in target.statistics
    )
    probabilities = target.logits.softmax(1)
    kd = (probabilities * (probabilities.log() - student(inputs).log_softmax(1))).sum(1).mean()
    (0.3 * bn - kd).backward()
    generator_step(state)
    torch.testing.assert_close(state.trace[0, :2], torch.stack([bn.detach(), kd.detach()]), rtol=1e-4, atol=1e-5)
    for expected, found in zip(twin.parameters(), state.generator.module.parameters(), strict=True):
        assert expected.grad is not None
        clear = expected.grad.abs() > 1e-4  # Adam's first step is lr * sign(gradient), and the sign of noise is random
        step = (expected - found).detach()[clear]
        torch.testing.assert_close(step, 1e-3 * expected.grad.sign()[clear], rtol=1e-2, atol=1e-6)


def test_synthesize_preserves_the_generator_and_matches_its_training_images() -> None:
    state = tiny.state()
    noise = state.synthesizer.noise(6)
    before = tensors(state.generator.module)
    images = synthesize(state, noise)
    assert not changed(before, state.generator.module)
    assert not images.requires_grad
    with torch.no_grad():
        twin = copy.deepcopy(state.generator.module)
        for _ in range(50):  # spectral norm's power iteration converges, so one more iteration changes nothing
            twin(noise)
        state.generator.module.load_state_dict(twin.state_dict())
        torch.testing.assert_close(synthesize(state, noise), twin(noise), rtol=1e-3, atol=1e-4)


def poison(state: DistillState, where: str) -> Callable[[], object]:
    """Make the next loss or gradient non-finite, and return a function that undoes it."""
    if where == "loss":
        state.normalize.shift.fill_(float("nan"))
        return lambda: state.normalize.shift.zero_()
    # The loss is finite, but its gradient overflows.
    objective = state.generator.objective.terms["bn"]
    forward = objective.forward

    def overflowing(teacher: object, student: object) -> Tensor:
        value = forward(teacher, student)  # type: ignore[arg-type]
        value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    objective.forward = overflowing  # type: ignore[method-assign]
    return lambda: setattr(objective, "forward", forward)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_step_does_not_change_the_weights(where: str) -> None:
    state = tiny.state()
    parameters = [p.detach().clone() for p in state.generator.module.parameters()]
    undo = poison(state, where)
    generator_step(state)
    assert all(torch.equal(a, b) for a, b in zip(parameters, state.generator.module.parameters(), strict=True))
    row = state.trace[0]
    assert not torch.isfinite(row[:2]).all() if where == "loss" else row[-1] == 0
    undo()
    generator_step(state)
    assert torch.isfinite(state.trace[1]).all()
    assert state.trace[1, -1] == 1
    if where == "loss":  # BatchNorm buffers of the skipped step do not affect the parameters
        assert all(torch.isfinite(p).all() for p in state.generator.module.parameters())


def test_first_student_step_can_be_skipped() -> None:
    """Fused SGD creates its momentum buffers in its first step, and leaves them uninitialized if it is skipped."""
    state, twin = tiny.state(), tiny.state()
    for one in (state, twin):
        for norm in one.student.module.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0  # so that the skipped forward does not change the buffers
    undo = poison(state, "loss")
    student_step(state)
    undo()
    for one in (state, twin):
        one.noise.manual_seed(7)
        one.start_round()
        student_step(one)
    for a, b in zip(state.student.module.model.parameters(), twin.student.module.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("fp32", "tf32", "bf16"))],
)
def test_steps_are_finite_in_every_precision_and_do_not_synchronize(device: str, precision: str) -> None:
    state = tiny.state(replace(tiny.config(), device=device, precision=precision))
    generator_step(state)  # libraries choose their algorithms in the first step
    student_step(state)
    state.runtime.synchronize()
    set_sync_debug_mode = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None
    set_sync_debug_mode("error")
    try:
        generator_step(state)
        student_step(state)
    finally:
        set_sync_debug_mode("default")
    assert torch.isfinite(state.trace).all()
    assert all(p.dtype == torch.float32 for p in state.student.module.parameters())


@pytest.mark.gpu
def test_seed_draws_the_same_weights_on_every_device() -> None:
    cpu, cuda = tiny.state(), tiny.state(replace(tiny.config(), device="cuda"))
    for one, other in (
        (cpu.generator.module, cuda.generator.module),
        (cpu.student.objective, cuda.student.objective),
    ):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b.cpu())


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = tiny.network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(stochastic_depth(F.dropout(x, 0.5, self.training), 0.5, "row", training=self.training))


class Untraceable(FunctionalDropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DROPOUTS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.1, dropout=0.5),
    "timm": lambda: timm.create_model("efficientnet_lite0", num_classes=5, drop_rate=0.5, drop_path_rate=0.5),
    "functional": FunctionalDropout,
    "not traced": Untraceable,
}


@pytest.mark.parametrize("mode", ["batch", "eval"])
@pytest.mark.parametrize("name", DROPOUTS)
def test_the_generator_step_has_no_dropout(name: str, mode: Literal["batch", "eval"]) -> None:
    torch.manual_seed(0)
    config = tiny.config(student_in_generator_step=mode, objective=ObjectiveConfig(preset="dfad"), image_size=32)
    teacher, student = (extract(model, image_size=32, needs="logits") for model in (tiny.teacher(), DROPOUTS[name]()))
    teacher.eval().requires_grad_(False)
    sizes = {"image_size": 32, "mean": tiny.HALF, "std": tiny.HALF}
    state = build_state(teacher, student.train(), config, Runtime.of("cpu", "fp32", channels_last=True), **sizes)
    found = []

    def twice(call: Callable[[Tensor], Outputs]) -> Callable[[Tensor], Outputs]:
        def student(images: Tensor) -> Outputs:
            found.append((call(images).logits, call(images).logits))
            return call(images)

        return student

    networks, before = optimized_networks(state), tensors(student.model)
    generator_step(state, replace(networks.generator_step, student=twice(networks.generator_step.student)))
    assert not changed(before, student.model)
    student_step(state, replace(networks.student_step, student=twice(networks.student_step.student)))
    assert torch.equal(*found[0])
    assert not torch.equal(*found[1])
    assert all(module.training for module in student.modules())
    assert torch.equal(pickle.loads(pickle.dumps(student.eval()))(IMAGES).logits, student(IMAGES).logits)
