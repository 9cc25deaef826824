"""Loss terms against float64 definitions, in value and gradient; weights, presets and errors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfkd_fast
from dfkd_fast.config import KDConfig, MHADConfig, ObjectiveConfig, SFCLConfig
from dfkd_fast.models import LayerStatistics, Outputs
from dfkd_fast.objectives import (
    PRESETS,
    TERMS,
    ActivationNorm,
    AttentionTransfer,
    Batch,
    BatchNormStatistics,
    ClassBalance,
    Distillation,
    FeatureShapes,
    HighOrderAttentionDistillation,
    ImageNorm,
    JensenShannon,
    LogitDistance,
    MaskedDivergence,
    Objective,
    OneHot,
    SemanticFeatureContrast,
    TargetClass,
    Term,
    TotalVariation,
    generator_objective,
    required_outputs,
    student_objective,
)

F64 = torch.float64
SHAPES = FeatureShapes(teacher_channels=(8, 12), student_channels=(8, 5), teacher_dim=12, student_dim=5)


def outputs(*, channels: tuple[int, ...] = (8, 12), sizes: tuple[int, ...] = (6, 3)) -> Outputs:
    """Random float64 outputs of a network for four images and seven classes, with gradients."""

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.rand(shape, dtype=F64).mul(2).sub(0.5).requires_grad_(grad)

    return Outputs(
        logits=draw(4, 7),
        features=tuple(draw(4, c, size, size) for c, size in zip(channels, sizes, strict=True)),
        penultimate=draw(4, channels[-1]),
        statistics=tuple(LayerStatistics(draw(c), draw(c), draw(c, grad=False), draw(c, grad=False)) for c in channels),
    )


def pair() -> tuple[Outputs, Outputs]:
    """Outputs of a teacher (t in the tests) and of a student (s)."""
    return outputs(), outputs(channels=(8, 5))


# The attributes of a FeatureModel that an objective reads.
TEACHER: Any = SimpleNamespace(feature_channels=(8, 12), penultimate_dim=12)
STUDENT: Any = SimpleNamespace(feature_channels=(8, 5), penultimate_dim=5)


def check(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compares values, and gradients with respect to every input, to the precision of float32 sums."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for got, expected_value in zip(
        torch.autograd.grad(3.0 * found, inputs, allow_unused=True, retain_graph=True),
        torch.autograd.grad(3.0 * expected, inputs, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        assert (got is None) == (expected_value is None)
        if got is not None and expected_value is not None:
            torch.testing.assert_close(got, expected_value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_matches_kl_divergence(direction: str, temperature: float) -> None:
    t, s = outputs(), outputs()
    term = Distillation(KDConfig(temperature=temperature, direction=direction))  # type: ignore[arg-type]
    p, q = ((o.logits / temperature).softmax(1) for o in (t, s))
    if direction == "reverse":
        p, q = q, p
    expected = (p * (p.log() - q.log())).sum() / len(p) * temperature**2
    check(term(t, s), expected, [t.logits, s.logits])


def test_batchnorm_statistics_loss_is_a_sum_of_norms() -> None:
    t = outputs()
    expected = torch.zeros((), dtype=F64)
    for layer in t.statistics:
        expected = expected + (layer.mean - layer.running_mean).square().sum().sqrt()
        expected = expected + (layer.var - layer.running_var).square().sum().sqrt()
    check(BatchNormStatistics()(t, None), expected, [x for layer in t.statistics for x in layer[:2]])
    equal = [layer._replace(running_mean=layer.mean.detach(), running_var=layer.var.detach()) for layer in t.statistics]
    loss = BatchNormStatistics()(t._replace(statistics=equal), None)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, [x for layer in equal for x in layer[:2]]):
        assert not gradient.any()  # the subgradient at zero
    with pytest.raises(ValueError, match="needs BatchNorm2d layers, but the teacher has none"):
        BatchNormStatistics()(t._replace(statistics=()), None)


def test_terms_of_other_methods_match_definitions() -> None:
    t, s = outputs(), outputs()
    check(LogitDistance()(t, s), (t.logits - s.logits).abs().mean(), [t.logits, s.logits])
    check(OneHot()(t, None), -t.logits.log_softmax(1).max(1).values.mean(), [t.logits])
    check(ActivationNorm()(t, None), -t.penultimate.abs().mean(), [t.penultimate])
    mean = t.logits.softmax(1).mean(0)
    check(ClassBalance()(t, None), (mean * mean.log()).sum(), [t.logits])


def test_terms_of_pool_methods_match_definitions() -> None:
    t, s = outputs(), outputs()
    x = torch.randn(4, 3, 5, 6, dtype=F64, requires_grad=True)
    labels = torch.tensor([3, 0, 6, 3])
    chosen = (t.logits / 20).log_softmax(1)[torch.arange(4), labels]
    check(TargetClass(temperature=20.0)(t, None, Batch(x, labels)), -chosen.mean(), [t.logits])
    soft = torch.rand(4, 7, dtype=F64).softmax(1)
    expected = -(soft * t.logits.log_softmax(1)).sum(1).mean()
    check(TargetClass()(t, None, Batch(x, soft)), expected, [t.logits])

    p, q = (o.logits.softmax(1) for o in (t, s))
    same = t.logits.argmax(1) == s.logits.argmax(1)
    if not same.any() or same.all():
        s = s._replace(logits=torch.cat([t.logits[:2].detach() * 2, -t.logits[2:].detach()]).requires_grad_())
        q, same = s.logits.softmax(1), torch.tensor([True, True, False, False])
    expected = sum(((p[i] * (p[i].log() - q[i].log())).sum() for i in range(4) if same[i]), torch.zeros((), dtype=F64))
    check(MaskedDivergence()(t, s), expected / 4, [t.logits, s.logits])

    p, q = ((o.logits / 3).softmax(1).clamp(0.01, 0.99) for o in (t, s))
    m = ((p + q) / 2).clamp(0.01, 0.99)
    js = sum((m * (m / each).log()).sum() / 4 for each in (p, q)) / 2
    check(JensenShannon()(t, s), 1 - js.clamp(0, 1), [t.logits, s.logits])

    neighbors = [(0, 1), (1, 0), (1, 1), (1, -1)]
    expected = torch.zeros((), dtype=F64)
    for down, right in neighbors:
        pairs = [
            x[:, :, i + down, j + right] - x[:, :, i, j]
            for i in range(5 - down)
            for j in range(max(0, -right), 6 - max(0, right))
        ]
        expected = expected + torch.stack(pairs).square().sum().sqrt()
    check(TotalVariation()(t, None, Batch(x, None)), expected, [x])
    check(ImageNorm()(t, None, Batch(x, None)), x.flatten(1).square().sum(1).sqrt().mean(), [x])

    rest, first = BatchNormStatistics()(t, None), BatchNormStatistics()(t._replace(statistics=t.statistics[:1]), None)
    inputs = [each for layer in t.statistics for each in layer[:2]]
    check(BatchNormStatistics(first=10.0)(t, None), (rest + 9 * first).double(), inputs)


def test_attention_transfer_matches_definition() -> None:
    t = outputs()
    s = outputs(channels=(8, 5), sizes=(6, 6))
    expected = torch.zeros((), dtype=F64)
    for x, y in zip(t.features, s.features, strict=True):
        if x.shape[-1] < y.shape[-1]:
            y = y.unflatten(-1, (3, 2)).unflatten(-3, (3, 2)).mean((-1, -3))
        a, b = (z.square().mean(1).flatten(1) for z in (x, y))
        a, b = (m / m.square().sum(1, keepdim=True).sqrt() for m in (a, b))
        expected = expected + (a - b).square().mean()
    check(AttentionTransfer(SHAPES)(t, s), expected, [*t.features, *s.features])


@pytest.mark.parametrize("target", ["features", "attention"])
@pytest.mark.parametrize("average", ["elements", "channels"])
@pytest.mark.parametrize("attention", ["frozen", "shared"])
@pytest.mark.parametrize("stages", [None, 1])
def test_mhad_matches_definition(target: str, average: str, attention: str, stages: int | None) -> None:
    config = MHADConfig(target=target, average=average, teacher=attention, stages=stages)  # type: ignore[arg-type]
    term = HighOrderAttentionDistillation(SHAPES, config).double()
    t, s = outputs(), outputs(channels=(8, 5), sizes=(6, 6))
    expected = torch.zeros((), dtype=F64)
    for index, stage in enumerate([0, 1][-(stages or 2) :]):
        x, y = t.features[stage].detach(), s.features[stage]
        if stage == 1:
            y = y.unflatten(-1, (3, 2)).unflatten(-3, (3, 2)).mean((-1, -3))  # 6 x 6 to 3 x 3
            y = torch.einsum("os,nshw->nohw", term.adapters[index].weight[:, :, 0, 0], y)
        student = term.student_attention[index]
        teacher = student if attention == "shared" else term.teacher_attention[index]
        if target == "attention":
            student, teacher = student.attention, teacher.attention
        error = student(y) - teacher(x).detach()
        squared = error.square().sum()
        expected = expected + squared / (error.numel() if average == "elements" else error.shape[0] * error.shape[1])
    check(term(t, s), expected, [*s.features, *(p for p in term.parameters() if p.requires_grad)])
    assert all(p.requires_grad for p in term.student_attention.parameters())
    assert not any(p.requires_grad for p in term.teacher_attention.parameters())
    adapters = [nn.Identity, nn.Conv2d][-(stages or 2) :]
    assert [type(adapter) for adapter in term.adapters] == adapters
    assert term.adapters[-1].bias is None


@pytest.mark.parametrize("adapter", ["conv", "mlp"])
def test_mhad_of_penultimate_features_matches_definition(adapter: str) -> None:
    config = MHADConfig(level="penultimate", adapter=adapter)  # type: ignore[arg-type]
    term, (t, s) = HighOrderAttentionDistillation(SHAPES, config).double(), pair()
    y = s.penultimate
    layers = [layer for layer in term.adapters.modules() if isinstance(layer, nn.Conv2d)]
    assert [tuple(layer.weight.shape[:2]) for layer in layers] == (
        [(12, 5)] if adapter == "conv" else [(12, 5), (12, 12), (12, 12)]
    )
    for index, layer in enumerate(layers):  # two hidden layers
        y = y @ layer.weight[:, :, 0, 0].T + (0 if layer.bias is None else layer.bias)
        y = y.relu() if index + 1 < len(layers) else y
    student, teacher = (
        module(v[:, :, None, None])[:, :, 0, 0]
        for module, v in (
            (term.student_attention[0], y),
            (term.teacher_attention[0], t.penultimate.detach()),
        )
    )
    check(
        term(t, s),
        (student - teacher).square().mean(),
        [s.penultimate, *(p for p in term.parameters() if p.requires_grad)],
    )
    objective = ObjectiveConfig(mhad=config)
    assert required_outputs(objective) == "penultimate"
    assert required_outputs(ObjectiveConfig()) == "stages"


def test_mhad_pairs_the_deepest_stages() -> None:
    shapes = FeatureShapes(teacher_channels=(4, 8, 8, 12), student_channels=(6, 8, 5), teacher_dim=12, student_dim=5)
    with pytest.raises(ValueError, match="pairs the stages of teacher and student one to one, but they have 4 and 3"):
        HighOrderAttentionDistillation(shapes)
    term = HighOrderAttentionDistillation(shapes, MHADConfig(stages=1))
    assert term.adapters[0].weight.shape == (12, 5, 1, 1)
    with pytest.raises(ValueError, match=r"MHADConfig.stages is 4, but the networks have \(4, 3\) stages"):
        HighOrderAttentionDistillation(shapes, MHADConfig(stages=4))


@pytest.mark.parametrize("symmetric", [False, True])
def test_sfcl_matches_definition(symmetric: bool) -> None:
    tau = 0.2
    term = SemanticFeatureContrast(SHAPES, SFCLConfig(dim=6, temperature=tau, symmetric=symmetric)).double()
    t, s = pair()

    projected = (term.teacher_head(t.penultimate.detach()), term.student_head(s.penultimate))
    vectors = [v / v.norm() for side in projected for v in side]
    count = len(t.penultimate)
    losses = []
    for i in range(2 * count if symmetric else count):
        positive = (i + count) % (2 * count)
        others = torch.stack([vectors[i] @ v / tau for j, v in enumerate(vectors) if j != i])
        losses.append(torch.logsumexp(others, 0) - vectors[i] @ vectors[positive] / tau)
    inputs = [s.penultimate, *term.parameters()]
    check(term(t, s), torch.stack(losses).mean(), inputs)
    assert torch.autograd.grad(term(t, s), t.penultimate, allow_unused=True) == (None,)
    module = dfkd_fast.SemanticFeatureContrast(12, 5, dim=6, temperature=tau, symmetric=symmetric).double()
    module.load_state_dict(term.state_dict())
    assert torch.equal(module(t.penultimate, s.penultimate), term(t, s))
    assert repr(module).startswith(f"SemanticFeatureContrast(\n  temperature=0.2, symmetric={symmetric}")


def test_sfcl_with_a_shared_head() -> None:
    shapes = FeatureShapes(teacher_channels=(8,), student_channels=(8,), teacher_dim=12, student_dim=12)
    torch.manual_seed(0)
    shared = SemanticFeatureContrast(shapes, SFCLConfig(dim=6, head="shared")).double()
    separate = SemanticFeatureContrast(shapes, SFCLConfig(dim=6)).double()
    for head in (separate.teacher_head, separate.student_head):
        head.load_state_dict(shared.student_head.state_dict())
    t, s = outputs(), outputs()
    value, expected = shared(t, s), separate(t, s)
    assert torch.equal(value, expected)
    assert len([*shared.parameters()]) == 4
    found = torch.autograd.grad(value, [*shared.parameters()])
    both = torch.autograd.grad(expected, [*separate.parameters()])
    for gradient, one, other in zip(found, both[:4], both[4:], strict=True):
        torch.testing.assert_close(gradient, one + other, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"a shared head needs .* got 12 \(teacher\) and 5 \(student\): use separate"):
        SemanticFeatureContrast(SHAPES, SFCLConfig(head="shared"))


def test_objective_is_the_weighted_sum() -> None:
    t, s = pair()
    objective = Objective({"kd": Distillation(), "l1": LogitDistance()}, {"kd": 2.0, "l1": -0.5})
    total, values = objective(t, s)
    torch.testing.assert_close(values, torch.stack([Distillation()(t, s), LogitDistance()(t, s)]).detach().float())
    torch.testing.assert_close(total, 2 * values[0] - 0.5 * values[1])
    assert not values.requires_grad
    assert objective.needs == {"student"}
    with pytest.raises(ValueError, match="terms and weights must have the same names"):
        Objective({"kd": Distillation()}, {"l1": 1.0})


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_give_finite_losses_and_gradients(preset: str) -> None:
    config = ObjectiveConfig(preset=preset)  # type: ignore[arg-type]
    g, s = (build(config, TEACHER, STUDENT) for build in (generator_objective, student_objective))
    assert (g.weights, s.weights) == (PRESETS[preset].generator, PRESETS[preset].student)
    teacher, student = outputs(), outputs()
    batch = Batch(torch.rand(4, 3, 5, 5, dtype=F64), torch.tensor([0, 1, 2, 3]), outputs())
    g, s = (build(config, TEACHER, TEACHER) for build in (generator_objective, student_objective))
    for objective in (g.double(), s.double()):
        for term in objective.kinds().values():
            term.allocate(4)
        total, values = objective(teacher, student if "student" in objective.needs else None, batch)
        assert math.isfinite(total.item())
        assert torch.isfinite(values).all()
        total.backward()
    assert teacher.logits.grad is not None


def test_preset_and_config_weights() -> None:
    assert PRESETS["dfkd-fgvc"].generator == {"bn": 0.3, "kd": -1.0}
    assert PRESETS["dfkd-fgvc"].student == {"kd": 1.0, "mhad": 10.0, "sfcl": 8.0}
    config = ObjectiveConfig(generator={"bn": 1.0}, student={"sfcl": 0.0, "mhad": 3.0})
    assert generator_objective(config, TEACHER, STUDENT).weights == {"bn": 1.0, "kd": -1.0}
    assert student_objective(config, TEACHER, STUDENT).weights == {"kd": 1.0, "mhad": 3.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(student={"mhda": 1.0}), "has no term 'mhda'; did you mean 'mhad'"),
        (ObjectiveConfig(student={"bn": 1.0}), "ObjectiveConfig.student has no term 'bn'"),
        (ObjectiveConfig(preset="baseline", student={"kd": 0.0}), "has no term with a nonzero weight"),
        (ObjectiveConfig(preset="other"), "preset: no preset named 'other'; there are dfkd-fgvc"),  # type: ignore[arg-type]
    ],
)
def test_errors(config: ObjectiveConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_objective(config, TEACHER, STUDENT)


def test_registered_terms_declare_sides_and_needs() -> None:
    for registered in TERMS.values():
        term = registered.build(SHAPES, ObjectiveConfig())
        assert set(term.sides) <= {"generator", "student"}
        assert isinstance(term, Term)
        assert term.needs <= {"statistics", "student", "batch"}
