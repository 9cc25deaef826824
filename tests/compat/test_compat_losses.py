"""Drop-ins on logits and maps against torchdistill, or against definitions of projects without a package."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dfkd_fast.compat import cpsc, datafree, deepinversion, mdistiller, repdistiller
from dfkd_fast.compat import torchdistill as drop_in
from dfkd_fast.testing import assert_close, assert_compiles, random

from .definitions import (
    REDUCTIONS,
    absolute_variation,
    assert_same,
    attention_distance,
    divergence,
    entropy,
    euclidean_variation,
    jensen_shannon,
    logits,
)

IO = {
    **{"student_module_path": "fc", "student_module_io": "output"},
    **{"teacher_module_path": "head", "teacher_module_io": "input"},
}
MASK, LABELS = torch.tensor([1.0, 0, 0, 1, 1, 0]), torch.arange(6) % 5


def io_dicts(student, teacher):
    return {"fc": {"output": student}}, {"head": {"input": teacher}}


def kd_loss(temperature=4.0, alpha=0.0, labels=None, **options):
    loss = drop_in.KDLoss(**IO, temperature=temperature, alpha=alpha, **options)
    return lambda s, t: loss(*io_dicts(s, t), labels)


def scaled(temperature, reduction="batchmean"):
    return lambda s, t: divergence(s, t, temperature, reduction) * temperature**2


TEMPERATURES, LOGITS, LOGIT_MAPS, IMAGES = (1, 4, 0.7), (5, 9), (3, 5, 2, 4), (2, 3, 5, 6)
# Each drop-in with its definition and the shape of its two inputs.
DROP_INS = {
    **{
        f"kldiv, {reduction}, {shape}": (
            partial(datafree.kldiv, T=2.0, reduction=reduction),
            scaled(2.0, reduction),
            shape,
        )
        for reduction in REDUCTIONS
        for shape in (LOGIT_MAPS, (3, 4, 2))
    },
    "kldiv, masked by the caller": (
        lambda s, t: -(datafree.kldiv(s, t, reduction="none").sum(1) * MASK).mean(),
        lambda s, t: -(divergence(s, t, reduction="none").sum(1) * MASK).mean(),
        (6, 10),
    ),
    "kldiv, broadcast": (lambda s, t: datafree.kldiv(s, t[:1]), lambda s, t: divergence(s, t[:1].expand_as(s)), LOGITS),
    "kldiv, learned temperature": (
        lambda s, t: datafree.kldiv(s, t, T=2 + s[0, 0] / 10),
        lambda s, t: divergence(s, t, 2 + s[0, 0].double() / 10) * (2 + s[0, 0] / 10) ** 2,
        LOGITS,
    ),
    **{f"DistillKL, temperature {tau}": (repdistiller.DistillKL(tau), scaled(tau), LOGITS) for tau in TEMPERATURES},
    **{f"KLDiv, temperature {tau}": (datafree.KLDiv(tau), scaled(tau), LOGITS) for tau in TEMPERATURES},
    **{
        f"kd_loss, temperature {tau}": (partial(mdistiller.kd_loss, temperature=tau), scaled(tau), LOGITS)
        for tau in TEMPERATURES
    },
    "kdloss": (cpsc.kdloss, divergence, LOGITS),
    "kdloss of maps": (cpsc.kdloss, divergence, LOGIT_MAPS),
    "DistillKL of maps": (repdistiller.DistillKL(2.0), scaled(2.0), LOGIT_MAPS),
    "kd_loss of maps, mean over positions": (
        partial(mdistiller.kd_loss, temperature=2.0),
        lambda s, t: divergence(s, t, 2.0, "none").sum(1).mean() * 4,
        LOGIT_MAPS,
    ),
    "class_balance_loss": (lambda s, t: datafree.class_balance_loss(s - t), lambda s, t: entropy(s - t), (7, 5)),
    "cross_entropy": (
        lambda s, t: datafree.cross_entropy(s - t, LABELS, "none"),
        lambda s, t: F.cross_entropy(s - t, LABELS, reduction="none"),
        (6, 5),
    ),
    "onehot_loss": (
        lambda s, t: datafree.onehot_loss(s) + t.sum(),
        lambda s, t: -s.log_softmax(1)[torch.arange(6), s.argmax(1)].mean() + t.sum(),
        (6, 5),
    ),
    "onehot_loss of labels": (
        lambda s, t: datafree.onehot_loss(s, LABELS) + t.sum(),
        lambda s, t: F.nll_loss(s.log_softmax(1), LABELS) + t.sum(),
        (6, 5),
    ),
    "DataFree's image prior": (
        lambda s, t: datafree.get_image_prior_losses(s - t),
        lambda s, t: absolute_variation(s - t),
        IMAGES,
    ),
    "DeepInversion's image priors": (
        lambda s, t: deepinversion.get_image_prior_losses(s - t),
        lambda s, t: (absolute_variation(s - t), euclidean_variation(s - t)),
        IMAGES,
    ),
    "KDLoss without labels": (kd_loss(alpha=0.3), lambda s, t: divergence(s, t, 4.0), (6, 5)),
    "KDLoss with labels": (
        kd_loss(alpha=0.5, labels=LABELS),
        lambda s, t: 0.5 * F.cross_entropy(s, LABELS) + 8 * divergence(s, t, 4.0),
        (6, 5),
    ),
}


@pytest.mark.parametrize("name", DROP_INS)
def test_value_and_gradients_match_definition(name):
    fast, original, shape = DROP_INS[name]
    assert_same(fast, original, *logits(*shape))


@given(
    *(st.integers(1, 7), st.integers(1, 12), st.floats(0.5, 20)),
    *(st.sampled_from(REDUCTIONS), st.integers(0, 1_000_000)),
)
def test_kldiv_matches_definition(count, classes, temperature, reduction, seed):
    # Log-probabilities near one half have rounding errors of 6e-8, which are multiplied by T^2.
    atol = 1e-5 * max(1, temperature**2 / 25)
    definition = lambda s, t: divergence(s, t, temperature, reduction) * temperature**2  # noqa: E731
    inputs = logits(count, classes, seed=seed)
    assert_same(lambda s, t: datafree.kldiv(s, t, temperature, reduction), definition, *inputs, atol=atol)
    assert_same(datafree.KLDiv(T=temperature, reduction=reduction), definition, *inputs, atol=atol)


@given(st.sampled_from(REDUCTIONS), st.floats(0.5, 5), st.integers(0, 1_000_000))
def test_jsdiv_matches_definition(reduction, temperature, seed):
    definition = lambda s, t: jensen_shannon(s, t, temperature, reduction)  # noqa: E731
    assert_same(lambda s, t: datafree.jsdiv(s, t, temperature, reduction), definition, *logits(4, 6, seed=seed))


@pytest.mark.parametrize(
    ("size_s", "size_t", "power"), [(4, 4, 1), (4, 4, 2), (8, 4, 2), (8, 4, 4), (4, 8, 2), (4, 8, 1)]
)
def test_attention_transfer_matches_definition(size_s, size_t, power):
    maps = random(3, 5, size_s, size_s), random(3, 7, size_t, size_t, seed=1)
    definition = lambda s, t: attention_distance(s, t, power)  # noqa: E731
    assert_same(lambda s, t: mdistiller.single_stage_at_loss(s, t, power), definition, *maps)
    module = repdistiller.Attention(power)
    assert_same(lambda s, t: tuple(module([s, s], [t, t, t])), lambda s, t: (definition(s, t),) * 2, *maps)
    assert_same(lambda s, t: mdistiller.at_loss([s, s], [t, t], power), lambda s, t: 2 * definition(s, t), *maps)


def test_losses_compile():
    """All losses in one graph."""
    losses = [
        *(lambda s, t: datafree.kldiv(s, t, 4.0), lambda s, t: datafree.kldiv(s, t, 4.0, "none")),
        *(
            lambda s, t: datafree.jsdiv(s, t, 4.0),
            lambda s, t: datafree.class_balance_loss(s) + datafree.onehot_loss(t),
        ),
        *(cpsc.kdloss, lambda s, t: mdistiller.kd_loss(s, t, 4.0), repdistiller.DistillKL(4.0)),
        *(kd_loss(), kd_loss(alpha=0.5, labels=torch.arange(4))),
        lambda s, t: mdistiller.single_stage_at_loss(s[:, :, None, None], t[:, :, None, None], 2),
    ]
    assert_compiles(lambda s, t: tuple(loss(s, t) for loss in losses), [logits(4, 6)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_match_float64(dtype):
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
def test_signatures_and_attributes_match_originals(module, name, signature):
    function = getattr(module, name)
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == signature
    if inspect.isclass(function) and issubclass(function, nn.Module):
        arguments = {p.name: 3 if p.default is p.empty else p.default for p in parameters}
        assert arguments.items() <= vars(function(**arguments)).items()


@pytest.mark.parametrize("call", [datafree.kldiv, datafree.KLDiv(), cpsc.kdloss, repdistiller.DistillKL(1)])
def test_errors_match_pytorch(call):
    with pytest.raises(RuntimeError):
        call(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(IndexError):
        call(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="median"):
        datafree.kldiv(torch.zeros(2, 3), torch.zeros(2, 3), reduction="median")
    with pytest.raises(IndexError):
        datafree.get_image_prior_losses(torch.zeros(3, 5, 6))


def test_attention_transfer_returns_list_or_sum():
    maps = [random(2, 3, 4, 4), random(2, 5, 2, 2)]
    losses = repdistiller.Attention()(maps, [random(2, 3, 4, 4, seed=2), random(2, 4, 2, 2, seed=3)])
    assert isinstance(losses, list)
    assert [loss.shape for loss in losses] == [(), ()]
    assert repdistiller.Attention().at(maps[0]).shape == (2, 16)
    assert repdistiller.Attention()([], []) == []
    assert mdistiller.at_loss([], [], 2) == 0


@pytest.fixture(scope="module")
def torchdistill():
    return pytest.importorskip("torchdistill.losses.mid_level")


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.9, "label_smoothing": 0.1},
        {"alpha": 0.3, "beta": 2.0},
        {"alpha": 0, "beta": 3},
        {"alpha": None, "beta": 1.0},
    ],
)
@pytest.mark.parametrize("shape", [(6, 6), (2, 5, 3, 3)])
def test_kd_loss_matches_torchdistill(torchdistill, arguments, reduction, shape):
    student, teacher = logits(*shape)
    targets = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if len(shape) > 2 and reduction == "none":
        targets = None
    fast, original = (
        kind(**IO, temperature=4.0, reduction=reduction, **arguments) for kind in (drop_in.KDLoss, torchdistill.KDLoss)
    )
    names = ("student_module_path", "teacher_module_io", "temperature", "alpha", "beta", "reduction", "log_target")
    assert [getattr(fast, name) for name in names] == [getattr(original, name) for name in names]
    assert repr(fast) == repr(original)
    assert fast.state_dict().keys() == original.state_dict().keys()
    assert_same(
        lambda s, t: fast(*io_dicts(s, t), targets, "more", other=1),
        lambda s, t: original(*io_dicts(s, t), targets, "more", other=1),
        student,
        teacher,
    )


def test_errors_match_torchdistill(torchdistill):
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
def test_at_loss_matches_torchdistill(torchdistill, mode):
    pairs = {
        "first": {"student": {"path": "a", "io": "output"}, "teacher": {"path": "a", "io": "output"}, "weight": 2.5},
        "second": {"student": {"path": "b", "io": "output"}, "teacher": {"path": "b", "io": "input"}},
    }
    fast, original = (kind(pairs, mode) for kind in (drop_in.ATLoss, torchdistill.ATLoss))
    assert (fast.at_pairs, fast.mode) == (original.at_pairs, original.mode)
    shapes = ((3, 4, 5, 6), (3, 2, 3, 3), (3, 7, 5, 6), (3, 2, 3, 3))
    tensors = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    def call(loss):
        return lambda a, b, c, d: loss(
            {"a": {"output": a}, "b": {"output": b}}, {"a": {"output": c}, "b": {"input": d}}, targets=None
        )

    assert_same(call(fast), call(original), *tensors)


def test_torchdistill_registry_returns_drop_ins(torchdistill):
    from torchdistill.losses.registry import get_mid_level_loss

    kwargs = {**IO, "temperature": 4.0, "alpha": 0.5}
    assert type(get_mid_level_loss({"key": "KDLoss", "kwargs": kwargs})) is drop_in.KDLoss
    assert type(get_mid_level_loss({"key": "ATLoss", "kwargs": {"at_pairs": {}}})) is drop_in.ATLoss
