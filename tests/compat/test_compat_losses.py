"""Drop-ins on logits and maps: equal to the originals, or to their definitions where those are on no index."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dfkd_fast.compat import cpsc, datafree, deepinversion, mdistiller, repdistiller
from dfkd_fast.compat import torchdistill as drop_in
from dfkd_fast.testing import assert_close, assert_compiles, random, value_and_gradients

REDUCTIONS = ("batchmean", "sum", "mean", "none")


IO = {
    "student_module_path": "fc",
    "student_module_io": "output",
    "teacher_module_path": "head",
    "teacher_module_io": "input",
}


def io_dicts(student, teacher):
    return {"fc": {"output": student}}, {"head": {"input": teacher}}


WITHOUT_LABELS = drop_in.KDLoss(**IO, temperature=4.0, alpha=0)
WITH_LABELS = drop_in.KDLoss(**IO, temperature=4.0, alpha=0.5)


def assert_same(ours, theirs, *inputs, atol=1e-5):
    """Values, and gradients for a random upstream gradient, within 1e-5 of a magnitude of one."""
    for name, mine, wanted in zip(
        ("value", "gradient"), value_and_gradients(ours, inputs), value_and_gradients(theirs, inputs), strict=True
    ):
        assert len(mine) == len(wanted)
        for a, b in zip(mine, wanted, strict=True):
            if b is not None:
                assert_close(a, b, atol=atol, rtol=1e-5, name=name)


def divergence(student, teacher, temperature):
    """The terms of KL(teacher || student), from probabilities, in float64."""
    q, p = ((x.double() / temperature).softmax(1) for x in (student, teacher))
    return p * (p.log() - q.log())


def reduced(terms, reduction):
    return {
        "batchmean": lambda: terms.sum() / terms.shape[0],
        "sum": terms.sum,
        "mean": terms.mean,
        "none": lambda: terms,
    }[reduction]().float()


def logits(*shape, seed=0, scale=3.0):
    return random(*shape, seed=seed).mul_(scale), random(*shape, seed=seed + 1).mul_(scale)


@given(
    st.integers(1, 7), st.integers(1, 12), st.floats(0.5, 20), st.sampled_from(REDUCTIONS), st.integers(0, 1_000_000)
)
def test_kldiv_is_its_definition(count, classes, temperature, reduction, seed):
    student, teacher = logits(count, classes, seed=seed)

    def definition(s, t):
        return reduced(divergence(s, t, temperature), reduction) * temperature**2

    # The logarithms of probabilities near one half are rounded to 6e-8, and their differences multiplied by T^2.
    atol = 1e-5 * max(1, temperature**2 / 25)
    assert_same(lambda s, t: datafree.kldiv(s, t, temperature, reduction), definition, student, teacher, atol=atol)
    assert_same(datafree.KLDiv(T=temperature, reduction=reduction), definition, student, teacher, atol=atol)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 4, 2)])
def test_kldiv_of_maps_of_logits(shape, reduction):
    assert_same(
        lambda s, t: datafree.kldiv(s, t, T=2.0, reduction=reduction),
        lambda s, t: reduced(divergence(s, t, 2.0), reduction) * 4,
        *logits(*shape),
    )


def test_the_caller_masks_what_kldiv_does_not_reduce():
    student, teacher = logits(6, 10)
    mask = torch.tensor([1.0, 0, 0, 1, 1, 0])
    assert_same(
        lambda s, t: -(datafree.kldiv(s, t, reduction="none").sum(1) * mask).mean(),
        lambda s, t: -(divergence(s, t, 1).float().sum(1) * mask).mean(),
        student,
        teacher,
    )


@pytest.mark.parametrize("temperature", [1, 4, 0.7])
@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, temperature: repdistiller.DistillKL(temperature)(s, t),
        lambda s, t, temperature: mdistiller.kd_loss(s, t, temperature),
        lambda s, t, temperature: datafree.KLDiv(temperature)(s, t),
    ],
    ids=["DistillKL", "kd_loss", "KLDiv"],
)
def test_the_distillation_losses_are_one(loss, temperature):
    assert_same(
        lambda s, t: loss(s, t, temperature),
        lambda s, t: reduced(divergence(s, t, temperature), "batchmean") * temperature**2,
        *logits(5, 9),
    )


def test_kdloss_has_no_temperature():
    assert_same(cpsc.kdloss, lambda s, t: reduced(divergence(s, t, 1), "batchmean"), *logits(5, 9))


def test_of_maps_of_logits_some_mean_over_positions():
    maps = logits(3, 5, 2, 4)
    terms = divergence(*maps, 2.0).float()
    assert_close(mdistiller.kd_loss(*maps, 2.0), terms.sum(1).mean() * 4, atol=1e-5, rtol=1e-5)
    assert_close(repdistiller.DistillKL(2.0)(*maps), terms.sum() / 3 * 4, atol=1e-5, rtol=1e-5)
    assert_close(cpsc.kdloss(*maps), divergence(*maps, 1).float().sum() / 3, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    student, teacher = (x.to(dtype).requires_grad_() for x in logits(8, 100))
    loss = datafree.kldiv(student, teacher, T=4.0)
    loss.backward()
    assert student.grad.dtype == teacher.grad.dtype == dtype
    truth = datafree.kldiv(student.detach().double(), teacher.detach().double(), T=4.0)
    assert_close(loss, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "name", "signature"),
    [
        (datafree, "kldiv", "(logits, targets, T=1.0, reduction='batchmean')"),
        (datafree, "KLDiv", "(T=1.0, reduction='batchmean')"),
        (datafree, "jsdiv", "(logits, targets, T=1.0, reduction='batchmean')"),
        (datafree, "cross_entropy", "(logits, targets, reduction='mean')"),
        (datafree, "class_balance_loss", "(logits)"),
        (datafree, "onehot_loss", "(logits, targets=None)"),
        (datafree, "get_image_prior_losses", "(inputs_jit)"),
        (datafree, "ContrastLoss", "(temperature=0.07, contrast_mode='all', base_temperature=0.07)"),
        (datafree, "DeepInversionHook", "(module, mmt_rate=None)"),
        (datafree, "register_hooks", "(modules)"),
        (deepinversion, "DeepInversionFeatureHook", "(module)"),
        (deepinversion, "get_image_prior_losses", "(inputs_jit)"),
        (cpsc, "kdloss", "(y, teacher_scores)"),
        (cpsc, "SupConLoss", "(temperature=0.07, contrast_mode='all', base_temperature=0.07, device='cuda:0')"),
        (cpsc, "DeepInversionFeatureHook", "(module)"),
        (repdistiller, "DistillKL", "(T)"),
        (repdistiller, "Attention", "(p=2)"),
        (mdistiller, "kd_loss", "(logits_student, logits_teacher, temperature)"),
        (mdistiller, "single_stage_at_loss", "(f_s, f_t, p)"),
        (mdistiller, "at_loss", "(g_s, g_t, p)"),
    ],
)
def test_signatures(module, name, signature):
    found = inspect.signature(getattr(module, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(plain)) == signature


def test_attributes():
    kl = datafree.KLDiv(2.0, "sum")
    assert (kl.T, kl.reduction) == (2.0, "sum")
    assert repdistiller.DistillKL(3).T == 3
    assert repdistiller.Attention().p == 2
    loss = cpsc.SupConLoss(0.1, "one", 0.2, "cpu")
    assert (loss.temperature, loss.contrast_mode, loss.base_temperature, loss.device) == (0.1, "one", 0.2, "cpu")


@pytest.mark.parametrize("call", [datafree.kldiv, datafree.KLDiv(), cpsc.kdloss, repdistiller.DistillKL(1)])
def test_errors_of_logits_are_those_of_pytorch(call):
    with pytest.raises(RuntimeError):
        call(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(IndexError):
        call(torch.zeros(3), torch.zeros(3))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="median"):
        datafree.kldiv(torch.zeros(2, 3), torch.zeros(2, 3), reduction="median")


def test_what_kl_div_broadcasts_is_broadcast():
    student, teacher = logits(4, 6)
    assert_close(
        datafree.kldiv(student, teacher[:1]),
        datafree.kldiv(student, teacher[:1].expand(4, 6).clone()),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_temperature_that_is_learned_gets_its_gradient():
    student, teacher = logits(4, 6)
    assert_same(
        lambda t: datafree.kldiv(student, teacher, T=t),
        lambda t: reduced(divergence(student, teacher, t.double()), "batchmean") * t**2,
        torch.tensor(2.0),
    )


@given(st.sampled_from(REDUCTIONS), st.floats(0.5, 5), st.integers(0, 1_000_000))
def test_jsdiv_is_its_definition(reduction, temperature, seed):
    def definition(s, t):
        p, q = ((x.double() / temperature).softmax(1) for x in (s, t))
        p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, 0.5 * (p + q)))
        return 0.5 * (reduced(m * (m / p).log(), reduction) + reduced(m * (m / q).log(), reduction))

    assert_same(lambda s, t: datafree.jsdiv(s, t, temperature, reduction), definition, *logits(4, 6, seed=seed))


def test_class_balance_and_one_hot():
    scores, _ = logits(7, 5)

    def entropy(x):
        mean = (x.double().exp() / x.double().exp().sum(1, keepdim=True)).mean(0)
        return (mean * mean.log()).sum().float()

    assert_same(datafree.class_balance_loss, entropy, scores)
    largest = scores.argmax(1)
    assert_same(datafree.onehot_loss, lambda x: -x.log_softmax(1)[torch.arange(7), largest].mean(), scores)
    labels = torch.arange(7) % 5
    assert_same(lambda x: datafree.onehot_loss(x, labels), lambda x: F.nll_loss(x.log_softmax(1), labels), scores)
    assert_close(
        datafree.cross_entropy(scores, labels, "none"), F.cross_entropy(scores, labels, reduction="none"), atol=0
    )


def test_image_priors():
    """DataFree gives the absolute differences alone, DeepInversion a pair."""
    images = random(2, 3, 5, 6)

    def pairs(x):
        h, w = x.shape[2:]
        for di, dj in ((0, 1), (1, 0), (1, 1), (1, -1)):
            a = x[:, :, : h - di, max(0, -dj) : w - max(0, dj)]
            b = x[:, :, di:, max(0, dj) : w + min(0, dj)]
            yield a - b

    def absolute(x):
        return sum(d.abs().mean() for d in pairs(x))

    def euclidean(x):
        return sum(d.square().sum().sqrt() for d in pairs(x))

    assert_same(datafree.get_image_prior_losses, absolute, images)
    assert_same(deepinversion.get_image_prior_losses, lambda x: (absolute(x), euclidean(x)), images)
    with pytest.raises(IndexError):
        datafree.get_image_prior_losses(images[0])


def attention_distance(student, teacher, power):
    """From the definition: loops over samples, and average pooling where one map is twice the other."""
    size = min(student.shape[2], teacher.shape[2])
    rows = []
    for x in (student, teacher):
        factor = x.shape[2] // size
        x = F.avg_pool2d(x, factor) if factor > 1 else x
        row = (x**power).mean(1).flatten(1)
        rows.append(torch.stack([r / r.norm() for r in row]))
    return ((rows[0] - rows[1]) ** 2).mean()


@pytest.mark.parametrize("power", [2, 1, 4])
@pytest.mark.parametrize(("size_s", "size_t"), [(4, 4), (8, 4), (4, 8)])
def test_attention_transfer(size_s, size_t, power):
    student, teacher = random(3, 5, size_s, size_s), random(3, 7, size_t, size_t, seed=1)

    def definition(s, t):
        return attention_distance(s, t, power)

    assert_same(lambda s, t: mdistiller.single_stage_at_loss(s, t, power), definition, student, teacher)
    module = repdistiller.Attention(power)
    assert_same(lambda s, t: tuple(module([s, s], [t, t, t])), lambda s, t: (definition(s, t),) * 2, student, teacher)
    assert_same(
        lambda s, t: mdistiller.at_loss([s, s], [t, t], power), lambda s, t: 2 * definition(s, t), student, teacher
    )


def test_attention_transfer_gives_a_list_or_a_sum():
    maps = [random(2, 3, 4, 4), random(2, 5, 2, 2)]
    losses = repdistiller.Attention()(maps, [random(2, 3, 4, 4, seed=2), random(2, 4, 2, 2, seed=3)])
    assert isinstance(losses, list)
    assert [loss.shape for loss in losses] == [(), ()]
    assert repdistiller.Attention().at(maps[0]).shape == (2, 16)
    assert repdistiller.Attention()([], []) == []
    assert mdistiller.at_loss([], [], 2) == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: datafree.kldiv(s, t, 4.0),
        lambda s, t: datafree.kldiv(s, t, 4.0, "none"),
        lambda s, t: datafree.jsdiv(s, t, 4.0),
        lambda s, t: datafree.class_balance_loss(s) + datafree.onehot_loss(t),
        lambda s, t: cpsc.kdloss(s, t),
        lambda s, t: mdistiller.kd_loss(s, t, 4.0),
        lambda s, t: repdistiller.DistillKL(4.0)(s, t),
        lambda s, t: WITHOUT_LABELS(*io_dicts(s, t)),
        lambda s, t: WITH_LABELS(*io_dicts(s, t), torch.arange(4)),
        lambda s, t: mdistiller.single_stage_at_loss(s[:, :, None, None], t[:, :, None, None], 2),
    ],
)
def test_losses_compile(loss):
    assert_compiles(loss, [logits(4, 6)], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def torchdistill():
    return pytest.importorskip("torchdistill.losses.mid_level")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    "weights", [{"alpha": 0.3}, {"alpha": 0.3, "beta": 2.0}, {"alpha": 0}, {"alpha": None, "beta": 1.0}]
)
@pytest.mark.parametrize("labelled", [True, False])
def test_kd_loss_of_torchdistill(weights, temperature, reduction, labelled):
    # (N,) and (N, classes) are added where nothing is reduced.
    shape = (6, 6) if labelled and weights["alpha"] and reduction == "none" else (5, 6)
    student, teacher = logits(*shape)
    targets = torch.arange(shape[0]) % shape[1] if labelled else None
    loss = drop_in.KDLoss(**IO, temperature=temperature, reduction=reduction, **weights)

    def definition(s, t):
        soft = reduced(divergence(s, t, temperature), reduction)
        if not weights["alpha"] or targets is None:
            return soft
        hard = -s.log_softmax(1)[torch.arange(len(s)), targets]
        hard = {"sum": hard.sum, "none": lambda: hard}.get(reduction, hard.mean)()
        return weights["alpha"] * hard + weights.get("beta", 1 - weights["alpha"]) * temperature**2 * soft

    assert_same(lambda s, t: loss(*io_dicts(s, t), targets), definition, student, teacher)


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("arguments", [{"alpha": 0.3}, {"alpha": 0.9, "label_smoothing": 0.1}, {"alpha": 0, "beta": 3}])
@pytest.mark.parametrize("shape", [(6, 6), (2, 5, 3, 3)])
def test_kd_loss_equals_torchdistills(torchdistill, arguments, reduction, shape):
    student, teacher = logits(*shape)
    targets = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if len(shape) > 2 and reduction == "none":
        targets = None
    ours, theirs = (
        kind(**IO, temperature=4.0, reduction=reduction, **arguments) for kind in (drop_in.KDLoss, torchdistill.KDLoss)
    )
    # An attribute both have is the same in both.
    names = ("student_module_path", "teacher_module_io", "temperature", "alpha", "beta", "reduction", "log_target")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same(
        lambda s, t: ours(*io_dicts(s, t), targets, "more", other=1),
        lambda s, t: theirs(*io_dicts(s, t), targets, "more", other=1),
        student,
        teacher,
    )


def test_kd_loss_refuses_what_torchdistills_refuses(torchdistill):
    for kind in (drop_in.KDLoss, torchdistill.KDLoss):
        with pytest.raises(TypeError):
            kind(**IO, temperature=1.0)
        with pytest.raises(TypeError):
            kind(**IO, temperature=1.0, alpha=0.5, unknown=1)
        with pytest.raises(KeyError):
            kind(**IO, temperature=1.0, alpha=0.5)({}, {})
        with pytest.raises(ValueError, match="median"):
            kind(**IO, temperature=1.0, alpha=0, reduction="median")(*io_dicts(*logits(2, 3)))
        with pytest.raises(ValueError, match="other"):
            (drop_in.ATLoss if kind is drop_in.KDLoss else torchdistill.ATLoss)({}, mode="other")


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_at_loss_equals_torchdistills(torchdistill, mode):
    pairs = {
        "first": {"student": {"path": "a", "io": "output"}, "teacher": {"path": "a", "io": "output"}, "weight": 2.5},
        "second": {"student": {"path": "b", "io": "output"}, "teacher": {"path": "b", "io": "input"}},
    }
    ours, theirs = (kind(pairs, mode) for kind in (drop_in.ATLoss, torchdistill.ATLoss))
    assert (ours.at_pairs, ours.mode) == (theirs.at_pairs, theirs.mode)
    tensors = [
        random(3, 4, 5, 6, seed=0),
        random(3, 2, 3, 3, seed=1),
        random(3, 7, 5, 6, seed=2),
        random(3, 2, 3, 3, seed=3),
    ]

    def call(loss):
        return lambda a, b, c, d: loss(
            {"a": {"output": a}, "b": {"output": b}}, {"a": {"output": c}, "b": {"input": d}}, targets=None
        )

    assert_same(call(ours), call(theirs), *tensors)


def test_torchdistills_registry_gives_the_drop_in(torchdistill):
    from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss

    kwargs = {**IO, "temperature": 4.0, "alpha": 0.5}
    assert type(get_mid_level_loss({"key": "KDLoss", "kwargs": kwargs})) is drop_in.KDLoss
    assert type(get_mid_level_loss({"key": "ATLoss", "kwargs": {"at_pairs": {}}})) is drop_in.ATLoss
    # As a configuration of torchdistill's own trainer names it.
    weighted = get_high_level_loss(
        {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kwargs}, "weight": 2.0}}},
        }
    )
    student, teacher = logits(3, 4)
    students, teachers = io_dicts(student, teacher)
    targets = torch.tensor([0, 1, 2])
    total = weighted({"student": students, "teacher": teachers}, {}, targets)
    original = torchdistill.KDLoss(**kwargs)(students, teachers, targets)
    assert_close(total, 2 * original, atol=1e-5, rtol=1e-5)


def test_kd_loss_is_a_kl_div_loss():
    loss = drop_in.KDLoss(**IO, temperature=2.0, alpha=0.25)
    assert isinstance(loss, nn.KLDivLoss)
    assert (loss.reduction, loss.beta, loss.cross_entropy_loss.reduction) == ("batchmean", 0.75, "mean")
