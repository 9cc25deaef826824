"""A step moves what it should and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.config import GeneratorConfig, ObjectiveConfig
from dfkd_fast.engine import DistillState, EagerEngine, generator_step, student_step, synthesize

from .. import tiny


def tensors(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": tensor.clone()
        for index, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def moved(before: dict[str, Tensor], *modules: nn.Module) -> set[str]:
    after = tensors(*modules)
    return {name for name in before if not torch.equal(before[name], after[name])}


def no_gradients(*modules: nn.Module) -> bool:
    return all(parameter.grad is None for module in modules for parameter in module.parameters())


@pytest.fixture(params=["dfkd-fgvc", "baseline", "dfad", "dafl", "zskt", "dfq"])
def state(request: pytest.FixtureRequest) -> DistillState:
    return tiny.state(tiny.config(objective=ObjectiveConfig(preset=request.param)))


def test_generator_step_moves_the_generator_alone(state: DistillState) -> None:
    others = (state.teacher.model, state.student.module.model, state.student.objective)
    before, generator = tensors(*others), tensors(state.generator.module)
    flags = [(m, m.training) for m in state.student.module.modules()]
    generator_step(state)
    assert not moved(before, *others)
    assert no_gradients(*others)
    parameters = {f"0.{name}" for name, _ in state.generator.module.named_parameters()}
    assert moved(generator, state.generator.module) & parameters == parameters - frozen_at_start(state)
    assert all(module.training == flag for module, flag in flags)
    assert all(parameter.requires_grad for parameter in state.student.module.parameters())


def frozen_at_start(state: DistillState) -> set[str]:
    """The bias before a softmax over positions has no gradient: the softmax does not see it."""
    return {
        f"0.{name}" for name, _ in state.generator.module.named_parameters() if name.endswith("attention.expand.bias")
    }


def test_student_step_moves_the_student_and_its_helpers_alone(state: DistillState) -> None:
    others = (state.teacher.model, state.generator.module, state.generator.objective)
    frozen = {
        f"0.{name}" for name, parameter in state.student.objective.named_parameters() if not parameter.requires_grad
    }
    before, student, helpers = tensors(*others), tensors(state.student.module.model), tensors(state.student.objective)
    student_step(state)
    assert not moved(before, *others)
    assert no_gradients(*others)
    assert moved(student, state.student.module.model) == set(student)  # every weight, every buffer
    assert moved(helpers, state.student.objective) == set(helpers) - frozen


def test_no_weight_gradient_is_computed_in_frozen_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a moment: the autograd graph of a generator step ends in the generator's weights alone."""
    state = tiny.state()
    seen: set[int] = set()
    backward = Tensor.backward

    def walk(tensor: Tensor, *args: object, **kwargs: object) -> None:
        queue = [tensor.grad_fn]
        while queue:
            node = queue.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if hasattr(node, "variable"):
                seen.add(id(node.variable))
            queue.extend(following for following, _ in node.next_functions)
        backward(tensor)

    visited: set[object] = set()
    monkeypatch.setattr(Tensor, "backward", walk)
    generator_step(state)
    assert seen == {id(parameter) for parameter in state.generator.module.parameters()}
    seen.clear()
    visited.clear()
    student_step(state)
    trained = [*state.student.module.model.parameters(), *state.student.objective.parameters()]
    assert seen == {id(parameter) for parameter in trained if parameter.requires_grad}


@pytest.mark.parametrize("mode", ["batch", "update", "eval"])
def test_students_batchnorms_in_the_generator_step(mode: str) -> None:
    state = tiny.state(tiny.config(student_in_generator_step=mode))
    before = tensors(state.student.module.model)
    generator_step(state)
    changed = moved(before, state.student.module.model)
    assert bool(changed) == (mode == "update")
    assert all("running" in name or "num_batches" in name for name in changed)


def test_generator_step_descends_its_objective() -> None:
    """The step is Adam's step along the gradient of alpha * L_BN - L_KD, both terms through the images."""
    state = tiny.state(
        tiny.config(generator=GeneratorConfig(latent_dim=6, channels=(8, 8, 8, 8, 8), spectral_norm=False))
    )
    twin = copy.deepcopy(state.generator.module)
    noise = state.draw(6, torch.Generator().manual_seed(state.config.seed))
    inputs = twin(noise) / 1.0  # mean and deviation are 0.5: the teacher takes the generator's own range
    teacher = state.teacher_statistics
    assert teacher is not None
    t = teacher(inputs)
    student = copy.deepcopy(state.student.module.model).train()
    bn = sum(
        (layer.mean - layer.running_mean).norm() + (layer.var - layer.running_var).norm() for layer in t.statistics
    )
    p = t.logits.softmax(1)
    kd = (p * (p.log() - student(inputs).log_softmax(1))).sum(1).mean()
    (0.3 * bn - kd).backward()
    generator_step(state)
    torch.testing.assert_close(state.trace[0, :2], torch.stack([bn.detach(), kd.detach()]), rtol=1e-4, atol=1e-5)
    for parameter, ours in zip(twin.parameters(), state.generator.module.parameters(), strict=True):
        assert parameter.grad is not None
        clear = parameter.grad.abs() > 1e-4  # Adam's first step is lr * sign(gradient) where the gradient is no noise
        step = (parameter - ours).detach()[clear]
        torch.testing.assert_close(step, 1e-3 * parameter.grad.sign()[clear], rtol=1e-2, atol=1e-6)


def test_synthesis_leaves_the_generator_bit_identical_and_paints_what_it_was_trained_on() -> None:
    state = tiny.state()
    noise = state.draw(6)
    before = tensors(state.generator.module)
    images = synthesize(state, noise)
    assert not moved(before, state.generator.module)
    assert not images.requires_grad
    with torch.no_grad():
        trained_on = copy.deepcopy(state.generator.module)
        for _ in range(50):  # let the power iteration settle, so that one more of it changes nothing visible
            trained_on(noise)
        state.generator.module.load_state_dict(trained_on.state_dict())
        torch.testing.assert_close(synthesize(state, noise), trained_on(noise), rtol=1e-3, atol=1e-4)


def poison(state: DistillState, where: str) -> Callable[[], None]:
    """Make the next loss or gradient not finite; returns what undoes it."""
    if where == "loss":
        state.normalize.shift.fill_(float("nan"))
        return lambda: state.normalize.shift.zero_()
    # The loss is finite, its gradient overflows.
    objective = state.generator.objective.terms["bn"]
    forward = objective.forward

    def steep(teacher: object, student: object) -> Tensor:
        value = forward(teacher, student)  # type: ignore[arg-type]
        value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    objective.forward = steep  # type: ignore[method-assign]

    def undo() -> None:
        objective.forward = forward  # type: ignore[method-assign]

    return undo


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_never_reaches_the_weights(where: str) -> None:
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
    if where == "loss":  # the BatchNorm buffers of the skipped step have no say in the parameters
        assert all(torch.isfinite(p).all() for p in state.generator.module.parameters())


def test_the_first_student_step_may_be_skipped() -> None:
    """Fused SGD makes its momentum buffers in its first step, and leaves them uninitialised where it is skipped."""
    state, twin = tiny.state(), tiny.state()
    for one in (state, twin):
        for norm in one.student.module.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0  # the skipped forward must not show in buffers
    undo = poison(state, "loss")
    student_step(state)
    undo()
    for one in (state, twin):
        one.noise.manual_seed(7)
        one.start_round()
        student_step(one)
    for a, b in zip(state.student.module.model.parameters(), twin.student.module.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_autocast_runs_on_the_cpu() -> None:
    state = tiny.state(replace(tiny.config(), precision="bf16"))
    generator_step(state)
    student_step(state)
    assert torch.isfinite(state.trace[:2]).all()
    assert all(p.dtype == torch.float32 for p in state.student.module.parameters())


def test_students_rate_is_a_cosine_over_the_runs_student_steps() -> None:
    state = tiny.state(tiny.config(epochs=2, rounds_per_epoch=2, student_steps=2))
    engine = EagerEngine(state)
    rates = []
    for _ in range(4):
        state.position.step = state.config.loop.generator_steps
        engine.start_round()
        for _ in range(2):
            engine.student_step()
            rates.append(state.student.optimizer.param_groups[0]["lr"].item())
    expected = 0.025 * (1 + torch.cos(torch.pi * torch.arange(8) / 8))
    torch.testing.assert_close(torch.tensor(rates), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_steps_do_not_wait_for_the_device(precision: str) -> None:
    state = tiny.state(replace(tiny.config(), device="cuda", precision=precision))
    generator_step(state)  # libraries choose their algorithms in the first step
    student_step(state)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generator_step(state)
        student_step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(state.trace).all()


@pytest.mark.gpu
def test_a_seed_draws_the_same_weights_on_every_device() -> None:
    here, there = tiny.state(), tiny.state(replace(tiny.config(), device="cuda"))
    for one, other in (
        (here.generator.module, there.generator.module),
        (here.student.objective, there.student.objective),
    ):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b.cpu())
