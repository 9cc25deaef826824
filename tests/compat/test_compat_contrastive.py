"""Contrastive drop-ins: equal to lightly's and pytorch-metric-learning's losses, and to SupContrast's definition."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dfkd_fast.compat import cpsc, datafree
from dfkd_fast.compat import lightly as drop_in
from dfkd_fast.testing import assert_close, assert_compiles, random

from .definitions import assert_same, bank_nt_xent, nt_xent, sup_con

# As lightly's own tests.


@pytest.mark.parametrize(
    ("count", "dim", "temperature", "gather_distributed"),
    [(1, 1, 0.1, False), (1, 16, 1, True), (2, 1, 10, True), (2, 2, 0.1, True), (4, 16, 0.1, False), (4, 2, 10, False)],
)
def test_nt_xent_is_its_definition(count, dim, temperature, gather_distributed):
    out0, out1 = random(count, dim), random(count, dim, seed=1)
    loss = drop_in.NTXentLoss(temperature, gather_distributed=gather_distributed)
    assert_same(loss, lambda a, b: nt_xent(a, b, temperature), out0, out1)
    assert_close(loss(out0, out1), loss(out1, out0), atol=1e-5)


@pytest.mark.parametrize(
    ("count", "bank", "temperature"),
    [(1, 0, 0.1), (1, 2, 7), (2, 0, 7), (2, 1, 1), (2, 15, 0.1), (16, 0, 1), (16, 15, 7), (16, 17, 0.1)],
)
def test_of_vectors_that_are_all_alike_the_loss_is_that_of_chance(count, bank, temperature):
    lengths = torch.rand(2, count, 1) + 0.1
    out0, out1 = lengths * torch.tensor([1.0, 2.0])
    out0.requires_grad_()
    loss = drop_in.NTXentLoss(temperature, memory_bank_size=(bank, 2) if bank else 0)
    for _ in range(bank // count + 2):
        value = loss(out0, out1).item()
    assert value == pytest.approx(math.log(bank + 1 if bank else 2 * count - 1), abs=1e-5)


def test_the_temperature_may_be_negative_but_not_zero():
    out0, out1 = random(3, 4), random(3, 4, seed=1)
    assert_same(drop_in.NTXentLoss(-1.0), lambda a, b: nt_xent(a, b, -1.0), out0, out1)
    with pytest.raises(ValueError, match="temperature"):
        drop_in.NTXentLoss(temperature=0.0)


@pytest.mark.parametrize("size", [-1, (-1, 4), (4, -1), 64, (64,), (4, 4, 4), ()])
def test_memory_bank_sizes_that_are_refused(size):
    with pytest.raises(ValueError, match="emory bank size"):
        drop_in.NTXentLoss(memory_bank_size=size)


def test_gathering_needs_torch_distributed(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "is_available", lambda: bool(asked.append(1)))
    drop_in.NTXentLoss(gather_distributed=False)
    with pytest.raises(ValueError, match="distributed"):
        drop_in.NTXentLoss(gather_distributed=True)
    assert len(asked) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nt_xent_in_half_precision(dtype):
    out0, out1 = random(16, 8).to(dtype).requires_grad_(), random(16, 8, seed=1).to(dtype)
    value = drop_in.NTXentLoss(0.1)(out0, out1)
    value.backward()
    assert out0.grad.dtype == dtype
    assert_close(value, nt_xent(out0.detach(), out1, 0.1), atol=1e-5, rtol=1e-5)


def test_nt_xent_against_a_memory_bank_is_its_definition():
    loss = drop_in.NTXentLoss(0.2, memory_bank_size=(5, 4))
    out0, out1 = random(2, 4), random(2, 4, seed=1)
    bank = loss.memory_bank.bank.clone()
    assert_close(bank.norm(dim=1), 1.0, atol=1e-6)
    assert_close(loss(out0, out1), bank_nt_xent(out0, out1, bank, 0.2), atol=1e-5)
    assert torch.equal(loss.memory_bank.bank, bank), "written to without a gradient"
    assert_same(loss, lambda a, b: bank_nt_xent(a, b, bank, 0.2), out0, out1)
    assert_close(loss.memory_bank.bank[:2], F.normalize(out1), atol=1e-6)
    assert torch.equal(loss.memory_bank.bank[2:], bank[2:])
    assert loss.memory_bank.bank_ptr.tolist() == [2]
    with torch.no_grad():
        loss(out0.requires_grad_(), out1)
    assert loss.memory_bank.bank_ptr.tolist() == [2]


def test_the_memory_bank_is_no_part_of_what_is_saved():
    assert drop_in.NTXentLoss(memory_bank_size=(5, 4)).state_dict() == {}


@pytest.fixture(scope="module")
def lightly():
    return pytest.importorskip("lightly.loss.ntx_ent_loss")


@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.05, 10), st.integers(0, 1_000_000))
def test_nt_xent_equals_lightlys(count, dim, temperature, seed):
    lightly = pytest.importorskip("lightly.loss.ntx_ent_loss")
    ours, theirs = (kind(temperature) for kind in (drop_in.NTXentLoss, lightly.NTXentLoss))
    assert_same(ours, theirs, random(count, dim, seed=seed), random(count, dim, seed=seed + 1))


@pytest.mark.parametrize("size", [(7, 4), (8, 4), (3, 4), [16, 4], (0, 4)])
def test_a_run_with_a_memory_bank_equals_lightlys(lightly, size):
    losses = []
    for kind in (drop_in.NTXentLoss, lightly.NTXentLoss):
        torch.manual_seed(3)
        losses.append(kind(temperature=0.3, memory_bank_size=size))
    ours, theirs = losses
    for name in ("bank", "bank_ptr"):
        assert torch.equal(getattr(ours.memory_bank, name), getattr(theirs.memory_bank, name))
    for step in range(9):
        count = 1 + step % 5
        assert_same(ours, theirs, random(count, 4, seed=2 * step), random(count, 4, seed=2 * step + 1))
        assert_close(ours.memory_bank.bank, theirs.memory_bank.bank, atol=1e-6)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


def test_attributes_equal_lightlys(lightly):
    ours, theirs = (kind(0.2, (6, 3), True) for kind in (drop_in.NTXentLoss, lightly.NTXentLoss))
    for name in ("temperature", "gather_distributed", "eps"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("size", "gather_distributed", "feature_dim_first"):
        assert getattr(ours.memory_bank, name) == getattr(theirs.memory_bank, name)
    assert dict(ours.named_children()).keys() == dict(theirs.named_children()).keys()
    assert {n: b.shape for n, b in ours.named_buffers()} == {n: b.shape for n, b in theirs.named_buffers()}
    first, second = (kind.memory_bank(random(2, 3)) for kind in (ours, theirs))
    assert [x.shape for x in first] == [x.shape for x in second]


@pytest.mark.parametrize(
    ("shape0", "shape1", "dtype1"),
    [
        ((4, 3), (5, 3), torch.float32),
        ((5, 3), (4, 3), torch.float32),
        ((4, 3), (4, 2), torch.float32),
        ((4, 3), (4,), torch.float32),
        ((4,), (4,), torch.float32),
        ((4, 3), (4, 3), torch.float64),
        ((0, 3), (0, 3), torch.float32),
        ((4, 3), (4, 3), torch.long),
    ],
)
def test_errors_are_lightlys(lightly, shape0, shape1, dtype1):
    errors = []
    for kind in (drop_in.NTXentLoss, lightly.NTXentLoss):
        with pytest.raises((ValueError, IndexError, RuntimeError, TypeError)) as caught:
            kind()(torch.ones(shape0), torch.ones(shape1, dtype=dtype1))
        errors.append(caught.type)
    assert errors[0] is errors[1]


GATHERED = """
import os, sys, torch, torch.distributed as dist
from dfkd_fast.compat.lightly import NTXentLoss
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file + ".store", rank=rank, world_size=2)
out0, out1 = torch.load(file)
out0, out1 = (x.chunk(2)[rank].clone().requires_grad_() for x in (out0, out1))
value = NTXentLoss(0.3, gather_distributed=True)(out0, out1)
value.backward()
bank = NTXentLoss(0.3, memory_bank_size=(16, 4), gather_distributed=True)
bank(out0, out1)
torch.save((value.detach(), out0.grad, out1.grad, bank.memory_bank.bank[:6]), f"{file}.{rank}")
dist.barrier()
os._exit(0)  # gloo's threads are not always joined in time for an orderly exit
"""


def test_two_processes_together_give_the_loss_of_the_whole_batch(tmp_path, repository):
    """The mean of both losses is the loss of the batch, and so are the gradients, which the processes sum."""
    out0, out1 = random(6, 4), random(6, 4, seed=1)
    file = tmp_path / "batch"
    torch.save((out0, out1), file)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GATHERED, str(rank), str(file)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in processes:
        _, problem = process.communicate(timeout=120)
        assert process.returncode == 0, problem.decode()
    results = [torch.load(Path(f"{file}.{rank}")) for rank in range(2)]
    leaves = [x.clone().requires_grad_() for x in (out0, out1)]
    value = nt_xent(*leaves, 0.3)
    assert_close((results[0][0] + results[1][0]) / 2, value, atol=1e-5)
    for i, expected in enumerate(torch.autograd.grad(value, leaves), 1):
        assert_close(torch.cat([result[i] for result in results]) / 2, expected, atol=1e-5)
    for result in results:
        assert_close(result[3], F.normalize(out1), atol=1e-6)


# SupCon


LABELS = torch.tensor([0, 1, 1, 0, 2])
MASK = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1.0]])


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize(
    ("given", "positives", "temperature", "base"),
    [
        ({}, torch.eye(5), 0.07, 0.07),
        ({"labels": LABELS}, (LABELS[:, None] == LABELS).float(), 0.5, 0.07),
        ({"mask": MASK}, MASK, 1, 2.0),
    ],
    ids=["pairs", "labels", "mask"],
)
def test_sup_con_is_its_definition(mode, views, given, positives, temperature, base):
    features = F.normalize(random(5, views, 6), dim=2)

    def definition(x):
        return sup_con(x, positives, temperature, base, mode)

    ours = datafree.ContrastLoss(temperature, mode, base)
    assert_same(lambda x: ours(x, **given), definition, features)
    scalar = cpsc.SupConLoss(temperature, mode, base, device="cpu")
    assert_same(lambda x: scalar(x, **given), lambda x: definition(x).mean(), features)
    assert ours(features, **given).shape == (views if mode == "all" else 1, 5)


@given(st.integers(1, 8), st.integers(1, 9), st.sampled_from(["all", "one"]), st.floats(0.05, 5), st.integers(0, 10**6))
def test_pairs_of_views_of_any_number(count, dim, mode, temperature, seed):
    features = F.normalize(random(count, 2, dim, seed=seed), dim=2)
    ours = datafree.ContrastLoss(temperature, mode, temperature)
    assert_same(ours, lambda x: sup_con(x, torch.eye(count), temperature, temperature, mode), features)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("given", [{}, {"labels": LABELS}])
def test_contrast_loss_returns_the_similarities_that_are_asked_for(mode, given):
    features = F.normalize(random(5, 2, 3, 2), dim=2)
    loss = datafree.ContrastLoss(0.2, mode)
    value, logits = loss(features, return_logits=True, **given)
    assert_close(value, loss(features, **given), atol=1e-5)
    rows = features.transpose(0, 1).reshape(10, 6)
    assert_close(logits, (rows @ rows.T / 0.2)[: len(logits)], atol=1e-5)
    assert len(logits) == (10 if mode == "all" else 5)


def test_an_anchor_without_a_positive_has_no_loss():
    value = datafree.ContrastLoss()(F.normalize(random(3, 1, 4), dim=2), torch.tensor([0, 0, 1]))
    assert value.isnan().tolist() == [[False, False, True]]


def test_features_of_any_length_stay_finite():
    assert cpsc.SupConLoss()(100 * random(4, 2, 8)).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sup_con_in_half_precision(dtype):
    features = F.normalize(random(8, 2, 16), dim=2).to(dtype)
    truth = sup_con(features, torch.eye(8), 0.1, 0.1, "all").mean()
    assert_close(cpsc.SupConLoss(0.1, base_temperature=0.1)(features), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", [datafree.ContrastLoss, cpsc.SupConLoss])
def test_errors_of_sup_con(loss):
    features = random(4, 2, 3)
    with pytest.raises(ValueError, match="n_views"):
        loss()(features[:, 0])
    with pytest.raises(ValueError, match="both"):
        loss()(features, torch.arange(4), torch.eye(4))
    with pytest.raises(ValueError, match="Num of labels"):
        loss()(features, torch.arange(3))
    with pytest.raises(ValueError, match="Unknown mode"):
        loss(contrast_mode="two")(features)
    with pytest.raises(IndexError):
        loss()(features[:0])
    with pytest.raises(RuntimeError):
        loss()(features, mask=torch.eye(3))


# pytorch-metric-learning


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("pytorch_metric_learning.losses")


@pytest.fixture(scope="module")
def ours(theirs):
    return pytest.importorskip("dfkd_fast.compat.metric_learning")


def wrapped(module, name, temperature, symmetric=True, **kwargs):
    return module.SelfSupervisedLoss(getattr(module, name)(temperature=temperature, **kwargs), symmetric=symmetric)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize(
    ("temperature", "symmetric", "count", "dim"),
    [
        *((0.01, True, 7, 5), (0.03, False, 24, 16), (0.07, True, 24, 16), (0.07, False, 2, 1)),
        *((0.1, True, 2, 1), (0.1, True, 1, 4), (0.1, False, 1, 4), (0.5, False, 7, 5), (3, True, 24, 16)),
    ],
)
def test_self_supervised_equals_pytorch_metric_learnings(ours, theirs, name, temperature, symmetric, count, dim):
    views = random(count, dim), random(count, dim, seed=1)
    pair = [wrapped(module, name, temperature, symmetric) for module in (ours, theirs)]
    if count == 1 and not symmetric:  # nothing to compare with: zero, of the first view alone
        assert [loss(*views).item() for loss in pair] == [0, 0]
        return
    assert_same(*pair, *views)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_views_that_agree_or_oppose(ours, theirs, name):
    one = random(8, 6)
    for other in (one + 1e-3 * random(8, 6, seed=1), -one + 1e-3 * random(8, 6, seed=1)):
        for temperature in (0.02, 0.07, 0.1, 1.0):
            pair = [wrapped(module, name, temperature) for module in (ours, theirs)]
            assert_same(*pair, one, other)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_defaults_and_attributes_are_pytorch_metric_learnings(ours, theirs, name):
    mine, original = getattr(ours, name)(), getattr(theirs, name)()
    assert isinstance(mine, getattr(theirs, name))
    assert mine.temperature == original.temperature
    assert vars(mine).keys() == vars(original).keys()
    views = random(5, 4), random(5, 4, seed=1)
    assert_same(ours.SelfSupervisedLoss(mine), theirs.SelfSupervisedLoss(original), *views)
    # Either half may be swapped alone.
    assert_same(theirs.SelfSupervisedLoss(mine), theirs.SelfSupervisedLoss(original), *views)
    assert_same(ours.SelfSupervisedLoss(original), theirs.SelfSupervisedLoss(original), *views)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_labels_pairs_and_options_are_the_librarys_own(ours, theirs, name):
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.reducers import SumReducer
    from pytorch_metric_learning.regularizers import LpRegularizer

    embeddings, labels = random(10, 4), torch.arange(10) % 3
    pairs = tuple(torch.tensor(i) for i in ([0, 1], [3, 4], [0, 1, 1], [1, 2, 3]))
    for options in (
        {},
        {"distance": LpDistance()},
        {"reducer": SumReducer()},
        {"embedding_regularizer": LpRegularizer()},
    ):
        mine, original = (getattr(module, name)(**options) for module in (ours, theirs))
        assert_same(lambda x, loss=mine: loss(x, labels), lambda x, loss=original: loss(x, labels), embeddings)
        assert_same(
            lambda x, loss=mine: loss(x, labels, pairs), lambda x, loss=original: loss(x, labels, pairs), embeddings
        )
        views = random(5, 4), random(5, 4, seed=1)
        assert_same(ours.SelfSupervisedLoss(mine), theirs.SelfSupervisedLoss(original), *views)


def test_other_losses_and_errors_are_pytorch_metric_learnings(ours, theirs):
    views = random(5, 4), random(5, 4, seed=1)
    triplet = theirs.TripletMarginLoss()
    assert_same(ours.SelfSupervisedLoss(triplet), theirs.SelfSupervisedLoss(triplet), *views)
    for module in (ours, theirs):
        with pytest.raises(Exception, match="not supported"):
            module.SelfSupervisedLoss(theirs.ArcFaceLoss(3, 4))
        for name in ("NTXentLoss", "SupConLoss"):
            loss = getattr(module, name)()
            with pytest.raises(ValueError, match="None"):
                loss(views[0])
            with pytest.raises(ValueError, match="equal number of labels"):
                loss(views[0], torch.arange(4))
            with pytest.raises(ValueError, match="2D"):
                module.SelfSupervisedLoss(loss)(views[0][None].expand(2, 5, 4), views[1][None].expand(2, 5, 4))


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_self_supervised_in_half_precision(ours, name):
    views = random(8, 4).bfloat16(), random(8, 4, seed=1).bfloat16()
    assert_close(wrapped(ours, name, 0.1)(*views), nt_xent(*views, 0.1), atol=1e-5, rtol=1e-5)


def test_contrastive_losses_compile(ours):
    """All in one graph."""
    contrast = datafree.ContrastLoss(contrast_mode="one")
    pairs = [drop_in.NTXentLoss(), drop_in.NTXentLoss(-0.5)]
    pairs += [wrapped(ours, name, 0.1) for name in ("NTXentLoss", "SupConLoss")]

    def every_loss(a, b):
        features = F.normalize(torch.stack([a, b], 1), dim=2)
        labelled = contrast(features, labels=torch.arange(6) % 2)
        return *(loss(a, b) for loss in pairs), cpsc.SupConLoss()(features), contrast(features), labelled

    assert_compiles(every_loss, [(random(6, 4), random(6, 4, seed=1))], atol=1e-5, rtol=1e-5)
