"""Each entry of ``COVERAGE`` calls the op that it names and no other."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from dfkd_fast import compat, ops
from dfkd_fast.compat import cpsc, datafree, deepinversion, lightly, mdistiller, repdistiller, torchdistill
from dfkd_fast.testing import random

from .definitions import REDUCTIONS

try:
    from dfkd_fast.compat import metric_learning
except ModuleNotFoundError:
    metric_learning = None

LOGITS = random(4, 6), random(4, 6, seed=1)
MAPS = random(4, 6, 2, 2), random(4, 6, 2, 2, seed=1)
VIEWS = random(4, 2, 8)
PATHS = ("a", "output", "b", "output")


def io_dicts(pair):
    return {"a": {"output": pair[0]}}, {"b": {"output": pair[1]}}


def after_forward(hook, *arguments):
    """Run a BatchNorm with a hook."""
    module = nn.BatchNorm2d(6).eval()
    hook(module, *arguments)
    module(MAPS[0])


def sup_con(kind):
    """Calls of ContrastLoss or SupConLoss, by case."""
    return {
        'two views, no labels, no mask, contrast_mode "all"': lambda: kind()(VIEWS),
        'two views, no labels, no mask, contrast_mode "one"': lambda: kind(contrast_mode="one")(VIEWS),
        "labels": lambda: kind()(VIEWS, torch.tensor([0, 0, 1, 1])),
        "mask": lambda: kind()(VIEWS, mask=torch.eye(4)),
        "another number of views": lambda: kind()(random(4, 3, 8)),
    }


ONE_SHAPE, BN_MAPS = "two (N, classes) tensors of logits", "maps (N, C, H, W)"
ANY_REDUCTION = f"{ONE_SHAPE}, any reduction"
OTHERS, LOGIT_MAPS = "other shapes", "other shapes, such as maps of logits"

CALLS = {
    datafree: {
        ("kldiv", ANY_REDUCTION): lambda: [datafree.kldiv(*LOGITS, 2.0, r) for r in REDUCTIONS],
        ("kldiv", LOGIT_MAPS): lambda: datafree.kldiv(*MAPS),
        ("KLDiv", ANY_REDUCTION): lambda: [datafree.KLDiv(2.0, r)(*LOGITS) for r in REDUCTIONS],
        ("KLDiv", LOGIT_MAPS): lambda: datafree.KLDiv()(*MAPS),
        ("jsdiv", "always"): lambda: datafree.jsdiv(*LOGITS),
        ("cross_entropy", "always"): lambda: datafree.cross_entropy(LOGITS[0], torch.arange(4)),
        ("class_balance_loss", "always"): lambda: datafree.class_balance_loss(LOGITS[0]),
        ("onehot_loss", "always"): lambda: datafree.onehot_loss(LOGITS[0]),
        ("get_image_prior_losses", "always"): lambda: datafree.get_image_prior_losses(MAPS[0]),
        ("DeepInversionHook", BN_MAPS): lambda: after_forward(datafree.DeepInversionHook),
        ("DeepInversionHook", f"{BN_MAPS}, with mmt_rate"): lambda: after_forward(datafree.DeepInversionHook, 0.9),
        ("FeatureMeanVarHook", "always"): lambda: after_forward(datafree.FeatureMeanVarHook),
        ("FeatureHook", "always"): lambda: after_forward(datafree.FeatureHook),
        ("InstanceMeanHook", "always"): lambda: after_forward(datafree.InstanceMeanHook),
        ("FeatureMeanHook", "always"): lambda: after_forward(datafree.FeatureMeanHook),
        **{("ContrastLoss", case): call for case, call in sup_con(datafree.ContrastLoss).items()},
        ("ContrastLoss", "return_logits"): lambda: datafree.ContrastLoss()(VIEWS, return_logits=True),
    },
    deepinversion: {
        ("DeepInversionFeatureHook", BN_MAPS): lambda: after_forward(deepinversion.DeepInversionFeatureHook),
        ("get_image_prior_losses", "always"): lambda: deepinversion.get_image_prior_losses(MAPS[0]),
    },
    cpsc: {
        ("kdloss", ONE_SHAPE): lambda: cpsc.kdloss(*LOGITS),
        ("kdloss", OTHERS): lambda: cpsc.kdloss(*MAPS),
        **{("SupConLoss", case): call for case, call in sup_con(cpsc.SupConLoss).items()},
        ("DeepInversionFeatureHook", BN_MAPS): lambda: after_forward(cpsc.DeepInversionFeatureHook),
    },
    lightly: {
        ("NTXentLoss", "no memory bank, one process"): lambda: lightly.NTXentLoss(0.1, 0, True)(*LOGITS),
        ("NTXentLoss", "memory bank"): lambda: lightly.NTXentLoss(0.1, (8, 6))(*LOGITS),
        ("NTXentLoss", "negative temperature"): lambda: lightly.NTXentLoss(-0.1)(*LOGITS),
        ("MemoryBankModule", "always"): lambda: lightly.MemoryBankModule((8, 6))(LOGITS[0], update=True),
    },
    repdistiller: {
        ("DistillKL", ONE_SHAPE): lambda: repdistiller.DistillKL(4)(*LOGITS),
        ("DistillKL", OTHERS): lambda: repdistiller.DistillKL(4)(*MAPS),
        ("Attention", "always"): lambda: repdistiller.Attention()(MAPS, MAPS),
    },
    mdistiller: {
        ("kd_loss", ONE_SHAPE): lambda: mdistiller.kd_loss(*LOGITS, 4),
        ("kd_loss", OTHERS): lambda: mdistiller.kd_loss(*MAPS, 4),
        ("single_stage_at_loss", "always"): lambda: mdistiller.single_stage_at_loss(*MAPS, 2),
        ("at_loss", "always"): lambda: mdistiller.at_loss(MAPS, MAPS, 2),
    },
    torchdistill: {
        ("KDLoss", ANY_REDUCTION): lambda: [
            torchdistill.KDLoss(*PATHS, 4, alpha=0, reduction=r)(*io_dicts(LOGITS)) for r in REDUCTIONS
        ],
        ("KDLoss", f"{ONE_SHAPE}, with targets"): lambda: torchdistill.KDLoss(*PATHS, 4, alpha=0.5)(
            *io_dicts(LOGITS), torch.arange(4)
        ),
        ("KDLoss", LOGIT_MAPS): lambda: torchdistill.KDLoss(*PATHS, 4, alpha=0.5)(*io_dicts(MAPS)),
        ("ATLoss", "always"): lambda: torchdistill.ATLoss(
            {"pair": {"student": {"path": "a", "io": "output"}, "teacher": {"path": "b", "io": "output"}}}
        )(*io_dicts(MAPS)),
    },
}
if metric_learning is not None:
    wrap, nt_xent = metric_learning.SelfSupervisedLoss, metric_learning.NTXentLoss
    triplet, distance = metric_learning.losses.TripletMarginLoss, metric_learning.distances.LpDistance
    labels = torch.arange(4) % 2
    CALLS[metric_learning] = {
        ("SelfSupervisedLoss", "`symmetric=True`, wraps `NTXentLoss` with its defaults"): lambda: wrap(nt_xent())(
            *LOGITS
        ),
        ("SelfSupervisedLoss", "`symmetric=True`, wraps `SupConLoss` with its defaults"): lambda: wrap(
            metric_learning.SupConLoss()
        )(*LOGITS),
        ("SelfSupervisedLoss", "`symmetric=False`"): lambda: wrap(nt_xent(), symmetric=False)(*LOGITS),
        ("SelfSupervisedLoss", "wraps another loss"): lambda: wrap(triplet())(*LOGITS),
        (
            "SelfSupervisedLoss",
            "a temperature below about 0.03 (`NTXentLoss`) or 0.1 (`SupConLoss`)",
        ): lambda: [wrap(loss)(*LOGITS) for loss in (nt_xent(0.02), metric_learning.SupConLoss(0.05))],
        ("SelfSupervisedLoss", "wraps a loss with another distance, reducer or regularizer"): lambda: wrap(
            nt_xent(distance=distance())
        )(*LOGITS),
        ("NTXentLoss", "labels or pairs"): lambda: nt_xent()(LOGITS[0], labels),
        ("SupConLoss", "labels or pairs"): lambda: metric_learning.SupConLoss()(LOGITS[0], labels),
    }
ELSEWHERE = {
    # test_compat_contrastive.py tests it with two processes.
    (lightly, "NTXentLoss", "negatives gathered from several processes"),
}


@pytest.fixture
def called(monkeypatch):
    """Names of the ops that have been called."""
    seen = []
    for name in ops.backends():
        original = getattr(ops, name)

        def watched(*args, name=name, original=original, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, watched)
    return seen


ENTRIES = [(module, case) for module in CALLS for case in module.COVERAGE if (module, *case[:2]) not in ELSEWHERE]


@pytest.mark.parametrize(
    ("module", "case"),
    ENTRIES,
    ids=[f"{module.__name__.split('.')[-1]}.{case.name}: {case.case}" for module, case in ENTRIES],
)
def test_only_the_op_of_an_entry_is_called(module, case, called):
    CALLS[module][case.name, case.case]()
    assert set(called) == ({case.op} if case.op else set())


@pytest.mark.parametrize("module", CALLS, ids=lambda module: module.__name__.split(".")[-1])
def test_coverage_lists_every_name_once_per_case(module):
    entries = [case[:2] for case in module.COVERAGE]
    assert len(set(entries)) == len(entries)
    assert set(CALLS[module]) == {entry for entry in entries if (module, *entry) not in ELSEWHERE}
    public = set(module.__all__) - {"COVERAGE", "register_hooks"}
    assert {case.name for case in module.COVERAGE} == public
    assert all(isinstance(case, compat.Case) and case.op in (None, *ops.backends()) for case in module.COVERAGE)


def test_modules_are_listed_and_documented():
    assert set(compat.MODULES) == {module.__name__.rpartition(".")[2] for module in CALLS} | {"metric_learning"}
    assert all(f"``{name}``" in compat.__doc__ for name in compat.MODULES)


def test_imports_are_lazy_and_optional(tmp_path):
    """Importing the package imports no module, and the modules import none of the original projects.

    Without its project, the module torchdistill still imports; metric_learning raises an error with the remedy.
    """
    code = (
        "import sys, dfkd_fast.compat as c\n"
        "print([name for name in sys.modules if name.startswith('dfkd_fast.compat.') and name[17] != '_'])\n"
        "import dfkd_fast.compat.lightly, dfkd_fast.compat.datafree, dfkd_fast.compat.cpsc\n"
        "projects = ('lightly', 'pytorch_metric_learning', 'torchdistill', 'torchvision')\n"
        "print([name for name in projects if name in sys.modules])\n"
        "sys.modules.update(dict.fromkeys(('torchdistill', 'pytorch_metric_learning')))\n"
        "import dfkd_fast.compat.torchdistill\n"
        "print('imported')\n"
        "import dfkd_fast.compat.metric_learning\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stdout.split() == ["[]", "[]", "imported"], result.stderr
    assert "pip install pytorch-metric-learning" in result.stderr
