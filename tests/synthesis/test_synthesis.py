"""Synthesizers: their definitions, pools, and runs that are interrupted, captured or wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dfkd_fast import distill
from dfkd_fast.config import (
    BNConfig,
    DistillConfig,
    InversionContrastConfig,
    ObjectiveConfig,
    SynthesisConfig,
    TargetConfig,
)
from dfkd_fast.engine import DistillResult, DistillState
from dfkd_fast.engine.networks import eager_networks
from dfkd_fast.models import Outputs
from dfkd_fast.synthesis import SYNTHESIZERS, Augment, Pool, Synthesizer, crop_and_flip, to_float, to_uint8, write_pool

from .. import tiny
from ..engine.test_engine import all_equal, eager_engine, graph_engine, run_rounds

BN = ObjectiveConfig(preset="baseline", generator={"kd": 0.0, "bn": 1.0, "target": 0.5, "masked_kl": -0.5})
INVERSION = {"kd": 0.0, "bn": 0.05, "target": 1.0, "variation": 1e-4, "l2": 1e-5, "js": 0.2}
METHODS: dict[str, tuple[dict[str, Any], ObjectiveConfig]] = {
    "online": ({}, ObjectiveConfig(preset="baseline")),
    "momentum": ({}, ObjectiveConfig(preset="baseline")),
    "deep_inversion": (
        {"half": 1, "jitter": 1, "warm_up": 1},
        ObjectiveConfig(preset="baseline", generator=INVERSION, bn=BNConfig(first=10)),
    ),
    "zskd": (
        {},
        ObjectiveConfig(
            preset="baseline", generator={"kd": 0.0, "bn": 0.0, "target": 1.0}, target=TargetConfig(temperature=20.0)
        ),
    ),
    "fast": ({"warm_up": 1}, replace(BN, bn=BNConfig(momentum=0.9))),
    "cmi": (
        {},
        replace(
            BN,
            generator={**BN.generator, "contrast": 0.8},
            contrast=InversionContrastConfig(dim=8, bank_size=24, negatives=16),
        ),
    ),
    "nayer": ({"warm_up": 1, "reset_every": 2}, BN),
}


def config(name: str, out: Path | None = None, **changes: Any) -> DistillConfig:
    options, objective = METHODS[name]
    per_round = changes.pop("per_round", 2)
    synthesis = SynthesisConfig(name=name, options=options, per_round=per_round, pool_size=16)
    base: dict[str, Any] = {"synthesis": synthesis, "objective": objective, "generator_steps": 4}
    return tiny.config(out, **{**base, **changes})


def run(name: str, out: Path, **changes: Any) -> DistillResult:
    return distill(tiny.teacher(), tiny.network(), config(name, out, **changes), progress=False)


def networks(state: DistillState) -> list[nn.Module]:
    return [state.teacher.model, state.student.module.model, state.student.objective]


def test_every_synthesizer_is_tested() -> None:
    assert {*METHODS, "folder"} == set(SYNTHESIZERS)


@pytest.mark.parametrize("name", METHODS)
def test_generator_steps_change_no_network_and_student_steps_no_source(name: str) -> None:
    state = tiny.state(config(name))
    engine = eager_engine(state)
    engine.start_round()
    before = [copy.deepcopy(each.state_dict()) for each in networks(state)]
    for _ in range(4):
        engine.step()
    for module, values in zip(networks(state), before, strict=True):
        assert all(torch.equal(value, values[key]) for key, value in module.state_dict().items())
    sources = [*state.synthesizer.tensors().values(), *state.generator.module.state_dict().values()]
    values = [tensor.clone() for tensor in sources]
    engine.step()
    assert all_equal(sources, values)
    assert state.student.module.model.conv1.weight.grad is None


@pytest.mark.parametrize("name", METHODS)
def test_captured_steps_give_the_same_result(name: str) -> None:
    eager, other = tiny.state(config(name)), tiny.state(config(name))
    traces = []
    for engine in (eager_engine(eager), graph_engine(other)):
        torch.manual_seed(0)  # terms draw from torch's global generator
        traces.append(run_rounds(engine, 3))
    assert all_equal(*traces)
    assert all_equal(eager.mutable_tensors(), other.mutable_tensors())


@pytest.mark.parametrize("name", METHODS)
def test_float16_and_default_dtype_float64(name: str, tmp_path: Path) -> None:
    """Skipped steps of the gradient scaler leave no NaN, and no tensor has torch's default dtype."""
    teacher, student = tiny.teacher(), tiny.network()
    torch.set_default_dtype(torch.float64)
    try:
        changed = config(name, tmp_path, precision="fp16", epochs=1)
        result = distill(teacher, student, changed, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in (result.student, result.generator or nn.Identity()):
        assert all(value.isfinite().all() for value in module.state_dict().values())
    assert {value.dtype for value in result.student.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["generator_step", "student_step"])
@pytest.mark.parametrize("name", METHODS)
def test_interrupted_runs_continue_bit_for_bit(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(name, tmp_path / "whole")
    with monkeypatch.context() as patch:
        tiny.die_before_step(patch, 6, kind)
        with pytest.raises(tiny.Killed):
            run(name, tmp_path / "killed")
    resumed = run(name, tmp_path / "killed", resume=True)
    assert tiny.same_weights(resumed.student, whole.student)
    assert resumed.rounds == whole.rounds
    assert (resumed.generator is None) == (name in ("deep_inversion", "zskd"))
    if whole.generator is not None and resumed.generator is not None:
        assert tiny.same_weights(resumed.generator, whole.generator)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_within_a_synthesis(name: str) -> None:
    state, other = tiny.state(config(name)), tiny.state(config(name))
    engine = eager_engine(state)
    engine.start_round()
    for _ in range(3):  # the second synthesis has begun
        engine.step()
    other.load_state_dict(copy.deepcopy(state.state_dict()))
    for each in (engine, eager_engine(other)):
        torch.manual_seed(0)
        each.start_round()
        while each.state.position.step < state.steps_per_round:
            each.step()
    assert all_equal(state.mutable_tensors(), other.mutable_tensors())


def test_pool_replaces_the_oldest_images() -> None:
    pool = Pool(5, 2, torch.device("cpu"))
    for first in (0, 3):
        pool.add(torch.arange(first, first + 3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2), torch.arange(3))
    assert pool.images[:, 0, 0, 0].tolist() == [5, 1, 2, 3, 4]
    assert pool.labels.tolist() == [2, 1, 2, 0, 1]
    random = torch.Generator().manual_seed(0)
    assert set(pool.draw(200, random).tolist()) == {0, 1, 2, 3, 4}
    part = Pool(5, 2, torch.device("cpu"))
    part.add(torch.ones(2, 3, 2, 2, dtype=torch.uint8), torch.ones(2, dtype=torch.int64))
    assert set(part.draw(200, random).tolist()) == {0, 1}
    again = Pool(8, 2, torch.device("cpu"))
    again.load_state_dict(part.state_dict())
    assert (int(again.count), int(again.position)) == (2, 2)
    with pytest.raises(ValueError, match=r"a pool of shape \(5, 3, 2, 2\) does not fit into \(4, 3, 2, 2\)"):
        Pool(4, 2, torch.device("cpu")).load_state_dict(pool.state_dict())


def test_images_survive_uint8() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(images)), images)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_augmentation_matches_padding_cropping_and_flipping() -> None:
    augment, random = Augment(2, torch.device("cpu")), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 6, 5), dtype=torch.uint8, generator=random)
    (places,) = augment.draw(40, random)
    assert [sorted(set(column.tolist())) for column in places.T] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1]]
    found = augment(images, places)
    for image, (row, column, flip), result in zip(images, places.tolist(), found, strict=True):
        padded = torch.zeros(3, 10, 9, dtype=torch.uint8)
        padded[:, 2:-2, 2:-2] = image
        expected = padded[:, row : row + 6, column : column + 5]
        assert torch.equal(to_uint8(result), expected.flip(2) if flip else expected)
    floating = to_float(images).double().requires_grad_()
    assert torch.equal(augment(floating, places).float(), found)
    assert torch.autograd.gradcheck(lambda x: crop_and_flip(x, places[:2], 2), floating[:2].detach().requires_grad_())
    plain = Augment(None, torch.device("cpu"))
    assert plain.draw(40, random) == ()
    assert torch.equal(to_uint8(plain(images)), images)


def test_the_pool_has_the_best_batch_of_each_synthesis() -> None:
    state = tiny.state(config("fast", per_round=1))
    engine, seen = eager_engine(state), []  # type: tuple[Any, list[tuple[float, Tensor]]]
    synthesizer: Any = state.synthesizer
    record = synthesizer.after_forward

    def watch(loss: Tensor) -> Tensor:
        seen.append((loss.item(), to_uint8(synthesizer.module.generator(synthesizer.module.noise).detach())))
        return record(loss)

    synthesizer.after_forward = watch
    engine.start_round()
    for _ in range(4):
        engine.step()
    best = min(seen, key=lambda each: each[0])
    assert int(synthesizer.pool.count) == 6
    assert torch.equal(synthesizer.pool.images[:6], best[1])
    assert torch.equal(synthesizer.pool.labels[:6], synthesizer.labels)


def test_fast_takes_one_meta_step_along_the_summed_gradients() -> None:
    """A plain rendering: the copy and the noise take Adam's steps, and its gradients add up to the generator's."""
    state = tiny.state(config("fast", per_round=1, generator_steps=3))
    generator = copy.deepcopy(state.synthesizer.generator)
    random = torch.Generator().manual_seed(state.config.seed)
    labels = torch.randint(5, (6,), generator=random)
    noise = torch.randn(6, 6, generator=random).requires_grad_()
    twin = copy.deepcopy(generator).train()
    rate = state.config.optimizer.generator_lr
    groups = [{"params": twin.parameters()}, {"params": [noise], "lr": 5 * rate}]
    optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.5, 0.99))
    meta = torch.optim.Adam(generator.parameters(), lr=3 * rate, betas=(0.5, 0.99))
    call = eager_networks(state).generator_step
    for parameter in generator.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        (places,) = state.synthesizer.sampler.draw(6, random)
        inputs = state.normalize(crop_and_flip(twin(noise), places, 4))
        outputs = call.teacher(inputs)
        bn = sum((s.mean - s.running_mean).norm() + (s.var - s.running_var).norm() for s in outputs.statistics)
        loss = bn + 0.5 * nn.functional.cross_entropy(outputs.logits, labels)  # warming up, so not adversarial
        optimizer.zero_grad()
        loss.backward()
        for total, each in zip(generator.parameters(), twin.parameters(), strict=True):
            total.grad += each.grad
        optimizer.step()
    meta.step()
    engine = eager_engine(state)
    engine.start_round()
    for _ in range(3):
        engine.step()
    for (name, expected), found in zip(
        generator.named_parameters(), state.synthesizer.generator.parameters(), strict=True
    ):
        clear = expected.grad.abs() > 1e-5 * max(p.grad.abs().max() for p in generator.parameters())
        torch.testing.assert_close(found[clear], expected[clear], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(state.generator.module.noise, noise, rtol=1e-2, atol=1e-3)


def test_statistics_are_mixed_with_those_of_previous_syntheses() -> None:
    objective = replace(BN, bn=BNConfig(momentum=0.9))
    state = tiny.state(config("fast", objective=objective))
    term: Any = state.generator.objective.terms["bn"]
    engine, call, seen = eager_engine(state), eager_networks(state).generator_step, []  # type: ignore[var-annotated]

    def teacher(images: Tensor) -> Outputs:
        outputs = call.teacher(images)
        seen.append([type(each)(*(value.detach() for value in each)) for each in outputs.statistics])
        return outputs

    engine.networks = replace(engine.networks, generator_step=replace(call, teacher=teacher))
    engine.start_round()
    average = None
    for step in range(4):
        engine.step()
        layers = [[(layer.mean, layer.running_mean), (layer.var, layer.running_var)] for layer in seen[-1]]
        pairs = [pair for layer in layers for pair in layer]
        values = [
            value if average is None else 0.1 * value + 0.9 * old
            for (value, _), old in zip(pairs, average or [None] * len(pairs), strict=True)
        ]
        expected = sum((value - stored).norm() for value, (_, stored) in zip(values, pairs, strict=True))
        torch.testing.assert_close(state.trace[step, 0], expected, rtol=1e-4, atol=1e-4)
        if step in (1, 3):  # the last iteration of a synthesis
            batch = [value for value, _ in pairs]
            average = (
                batch if average is None else [0.9 * old + 0.1 * new for old, new in zip(average, batch, strict=True)]
            )
            torch.testing.assert_close(term.average, torch.cat(average))


def test_momentum_averages_the_generator() -> None:
    state = tiny.state(config("momentum"))
    before = {name: value.clone() for name, value in state.generator.module.state_dict().items()}
    engine = eager_engine(state)
    engine.start_round()
    engine.step()
    now, average = state.generator.module.state_dict(), state.synthesizer.average.state_dict()  # type: ignore[attr-defined]
    for name, value in average.items():
        expected = 0.95 * before[name] + 0.05 * now[name] if value.is_floating_point() else now[name]
        torch.testing.assert_close(value, expected)
    assert not torch.equal(average["paint.weight"], now["paint.weight"])
    images = state.synthesizer.sampler(*state.synthesizer.draw_samples(6))
    assert images.shape == (12, 3, tiny.SIZE, tiny.SIZE)


def test_momentum_weighs_the_images_of_both_generators() -> None:
    synthesis = SynthesisConfig(name="momentum", options={"weights": [3.0, 1.0]}, pool_size=16)
    objective = ObjectiveConfig(preset="baseline")
    state = tiny.state(config("momentum", synthesis=synthesis, objective=objective))
    engine, seen = eager_engine(state), []
    steps = engine.networks.student_step
    student = steps.student

    def record(images: torch.Tensor) -> Outputs:
        outputs: Outputs = student(images)
        seen.append((images, outputs))
        return outputs

    engine.networks = replace(engine.networks, student_step=replace(steps, student=record))
    engine.start_round()
    weight = state.student.module.model.fc.weight
    for _ in range(5):
        before = weight.detach().clone()
        engine.step()
    images, outputs = seen[0]
    assert len(images) == 12
    target, student_log = state.teacher(images).logits.detach().log_softmax(1), outputs.logits.detach().log_softmax(1)
    shares = torch.tensor([1.5] * 6 + [0.5] * 6)[:, None] / 12
    loss = (shares * target.exp() * (target - student_log)).sum()
    torch.testing.assert_close(state.trace[4, 0], loss, rtol=1e-5, atol=1e-6)
    gradient = (shares * (student_log.exp() - target.exp())).T @ outputs.penultimate.detach()
    optimizer = state.config.optimizer
    expected = before - state.student_rate * (gradient + optimizer.student_weight_decay * before)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


def test_zskd_draws_probabilities_around_similar_classes() -> None:
    state = tiny.state(config("zskd", batch_size=400, synthesis=SynthesisConfig(name="zskd", pool_size=400)))
    weight = state.teacher.model.fc.weight.detach().double()
    unit = weight / weight.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    similarity = (similarity - similarity.amin(1, keepdim=True)) / (
        similarity.amax(1, keepdim=True) - similarity.amin(1, keepdim=True)
    )
    synthesizer: Any = state.synthesizer
    torch.testing.assert_close(synthesizer.similarity.double(), similarity, rtol=1e-5, atol=1e-6)
    labels = torch.cat([synthesizer.draw_labels() for _ in range(100)])
    torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))
    # The expectation of a Dirichlet distribution is its concentration divided by the sum.
    concentrations = torch.stack([beta * similarity + 1e-4 for beta in (1.0, 0.1)])
    expected = (concentrations / concentrations.sum(2, keepdim=True)).mean((0, 1))
    torch.testing.assert_close(labels.double().mean(0), expected, rtol=0.1, atol=0.01)
    synthesizer.start()
    synthesizer.after_step()
    images = synthesizer.module()
    assert images.amin((1, 2, 3)).allclose(torch.tensor(-1.0))
    assert images.amax((1, 2, 3)).allclose(torch.tensor(1.0))


def test_deep_inversion_shifts_and_flips_the_batch() -> None:
    state = tiny.state(config("deep_inversion"))
    synthesizer: Any = state.synthesizer
    synthesizer.start()
    plain, seen = synthesizer.module(), set()
    first = [synthesizer.module(*synthesizer.draw(6)) for _ in range(20)]
    small = torch.nn.functional.avg_pool2d(plain, 2)
    assert all(torch.equal(each, small) or torch.equal(each, small.flip(3)) for each in first)  # half of 1 pixel is 0
    synthesizer.stage = 1
    for _ in range(60):
        found = synthesizer.module(*synthesizer.draw(6))
        matches = [
            (row, column, flip)
            for row in (-1, 0, 1)
            for column in (-1, 0, 1)
            for flip in (False, True)
            if torch.equal(found, (plain.flip(3) if flip else plain).roll((-row, column if flip else -column), (2, 3)))
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 12
    assert [synthesizer.rate(step) for step in range(2)] == [1.0, 1.0]


def test_deep_inversion_starts_at_half_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has its own schedule, optimizer state and best batch."""
    options = {"half": 3, "jitter": 0, "flip": False, "warm_up": 1}
    state = tiny.state(
        config(
            "deep_inversion",
            synthesis=SynthesisConfig(name="deep_inversion", options=options, pool_size=16),
            generator_steps=5,
        )
    )
    synthesizer: Any = state.synthesizer
    engine, seen = eager_engine(state), []
    forward = synthesizer.module.forward

    def record(*inputs: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = forward(*inputs)
        steps = state.generator.optimizer.state[synthesizer.module.pixels]["step"]
        seen.append((images.shape[2], int(steps), bool(synthesizer.best_loss.isinf())))
        return images

    monkeypatch.setattr(synthesizer.module, "forward", record)
    engine.start_round()
    for _ in range(5):
        engine.step()
    half = tiny.SIZE // 2
    assert seen == [(half, 0, True), (half, 1, False), (half, 2, False), (tiny.SIZE, 0, True), (tiny.SIZE, 1, False)]
    cosine = [1.0, 1.0, 0.5]
    assert [synthesizer.rate(step) for step in range(5)] == pytest.approx([*cosine, 1.0, 1.0])
    assert synthesizer.pool.images[:6].float().std() > 1


@pytest.mark.parametrize(
    ("synthesis", "message"),
    [
        ({"name": "fst"}, r"SynthesisConfig\.name: no synthesizer named 'fst'; did you mean 'fast'"),
        ({"name": "fast", "options": {"warmup": 3}}, r"'fast' has no option warmup; it has noise_rate, warm_up"),
        ({"name": "fast", "pool_size": 5}, "pool_size must be at least the batch size, got 5 and 6"),
        ({"name": "online", "options": {"x": 1}}, "'online' has no option x; it has none"),
        ({"name": "deep_inversion", "options": {"half": 9}}, r"half .*must be .* the . iterations .*, got 9"),
        ({"name": "nayer", "options": {"embeddings": "e.safetensors"}}, r"shape \(5, width\), got \(4, 7\)"),
    ],
)
def test_errors(synthesis: dict[str, Any], message: str) -> None:
    save_file({"embeddings": torch.zeros(4, 7)}, "e.safetensors")
    with pytest.raises(ValueError, match=message):
        tiny.state(config("fast", synthesis=SynthesisConfig(**synthesis)))


def test_generator_steps_fit_the_synthesizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generator_steps must be at least 1 with the synthesizer 'fast', got 0"):
        tiny.state(config("fast", generator_steps=0))
    write_pool(tmp_path, torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    folder = SynthesisConfig(name="folder", options={"folder": str(tmp_path)})
    with pytest.raises(ValueError, match=r"generator_steps must be 0 with the synthesizer 'folder', got 4"):
        tiny.state(config("fast", synthesis=folder))


def test_per_round_divides_the_generator_steps() -> None:
    with pytest.raises(ValueError, match=r"must be a multiple of SynthesisConfig\.per_round, got 4 and 3"):
        config("fast", per_round=3)


def test_a_term_with_labels_needs_a_synthesizer_with_labels() -> None:
    state = tiny.state(config("online", objective=BN))
    with pytest.raises(ValueError, match="term 'target' needs a synthesizer with labels, such as 'fast'"):
        run_rounds(eager_engine(state), 1)


def test_nayer_uses_embeddings_of_a_file(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    save_file({"embeddings": torch.randn(5, 7)}, "e.safetensors")
    options = {"embeddings": "e.safetensors", "warm_up": 0}
    state = tiny.state(config("nayer", synthesis=SynthesisConfig(name="nayer", options=options, pool_size=16)))
    run_rounds(eager_engine(state), 1)
    assert "one-hot" not in caplog.text
    assert state.generator.module.layers[0].in_features == 7
    assert state.synthesizer.labels.tolist()[:5] == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    tiny.state(config("nayer"))
    assert "no file of embeddings: classes have one-hot embeddings" in caplog.text


class Constant(Synthesizer):
    """The smallest synthesizer: one gray value, which is trained."""

    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(()))

        def forward(self, noise: Tensor) -> Tensor:
            return (self.value + 0.1 * noise).tanh()

    generator = None

    def __init__(self, setting: Any, options: Any) -> None:
        super().__init__(setting, options)
        self.module = self.sampler = self.Value()

    def draw(self, count: int) -> tuple[Tensor, ...]:
        return self.draw_samples(count)

    def draw_samples(self, count: int, random: torch.Generator | None = None) -> tuple[Tensor, ...]:
        size = self.setting.image_size
        return (torch.randn(count, 3, size, size, generator=random or self.setting.random),)


def test_own_synthesizer(tmp_path: Path) -> None:
    SYNTHESIZERS.register("constant")(Constant)
    try:
        result = distill(
            tiny.teacher(),
            tiny.network(),
            tiny.config(tmp_path, synthesis=SynthesisConfig(name="constant"), objective=ObjectiveConfig(preset="dfad")),
            progress=False,
        )
        assert result.generator is None
        assert len(result.rounds["generator/l1"]) == 4
    finally:
        del SYNTHESIZERS["constant"]
