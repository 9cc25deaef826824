"""Contrastive drop-ins against lightly, pytorch-metric-learning and SupContrast's definition."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dfkd_fast.compat import cpsc, datafree
from dfkd_fast.compat import lightly as drop_in
from dfkd_fast.testing import assert_close, assert_compiles, random

from .definitions import assert_same, nt_xent, sup_con


@pytest.mark.parametrize(
    ("count", "dim", "temperature", "gather_distributed"),
    [(1, 1, 0.1, False), (1, 16, 1, True), (2, 1, 10, True), (2, 2, 0.1, True), (4, 16, 0.1, False), (4, 2, 10, False)],
)
def test_nt_xent_matches_definition(count, dim, temperature, gather_distributed):
    out0, out1 = random(count, dim), random(count, dim, seed=1)
    loss = drop_in.NTXentLoss(temperature, gather_distributed=gather_distributed)
    assert_same(loss, lambda a, b: nt_xent(a, b, temperature), out0, out1)
    assert_close(loss(out0, out1), loss(out1, out0), atol=1e-5)


def test_temperature_may_be_negative_but_not_zero():
    out0, out1 = random(3, 4), random(3, 4, seed=1)
    assert_same(drop_in.NTXentLoss(-1.0), lambda a, b: nt_xent(a, b, -1.0), out0, out1)
    with pytest.raises(ValueError, match="temperature"):
        drop_in.NTXentLoss(temperature=0.0)


def test_gather_distributed_raises_without_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    drop_in.NTXentLoss(gather_distributed=False)
    with pytest.raises(ValueError, match="distributed"):
        drop_in.NTXentLoss(gather_distributed=True)


@pytest.mark.parametrize("size", [-1, (-1, 4), (4, -1), 64, (64,), (4, 4, 4), ()])
def test_invalid_memory_bank_sizes_raise(size):
    with pytest.raises(ValueError, match="emory bank size"):
        drop_in.NTXentLoss(memory_bank_size=size)


@pytest.fixture(scope="module")
def lightly():
    return pytest.importorskip("lightly.loss.ntx_ent_loss")


@given(st.integers(1, 9), st.integers(2, 12), st.floats(0.05, 10), st.integers(0, 1_000_000))
def test_nt_xent_matches_lightly(count, dim, temperature, seed):
    lightly = pytest.importorskip("lightly.loss.ntx_ent_loss")
    fast, original = (kind(temperature) for kind in (drop_in.NTXentLoss, lightly.NTXentLoss))
    assert_same(fast, original, random(count, dim, seed=seed), random(count, dim, seed=seed + 1))


@pytest.mark.parametrize("seed", range(4))
def test_nt_xent_in_one_dimension(lightly, seed):
    """A normalized number has zero gradient. Lightly's gradient is zero only up to the rounding of the norm."""
    vectors = [random(5, 1, seed=2 * seed + i).requires_grad_() for i in range(2)]
    value = drop_in.NTXentLoss(0.05)(*vectors)
    assert_close(value, lightly.NTXentLoss(0.05)(*vectors), atol=1e-5, rtol=1e-5)
    for gradient in torch.autograd.grad(value, vectors):
        assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("size", [(7, 4), (8, 4), (3, 4), [16, 4], (0, 4)])
def test_memory_bank_matches_lightly(lightly, size):
    torch.manual_seed(3)
    fast = drop_in.NTXentLoss(temperature=0.3, memory_bank_size=size)
    torch.manual_seed(3)
    original = lightly.NTXentLoss(temperature=0.3, memory_bank_size=size)
    for name in ("bank", "bank_ptr"):
        assert torch.equal(getattr(fast.memory_bank, name), getattr(original.memory_bank, name))
    for step in range(9):
        count = 1 + step % 5
        vectors = random(count, 4, seed=2 * step), random(count, 4, seed=2 * step + 1)
        if step % 2 == 0:
            assert_same(fast, original, *vectors)
        else:  # the bank is not updated without a gradient
            assert_close(fast(*vectors), original(*vectors), atol=1e-5, rtol=1e-5)
        assert_close(fast.memory_bank.bank, original.memory_bank.bank, atol=1e-6)
        assert torch.equal(fast.memory_bank.bank_ptr, original.memory_bank.bank_ptr)


def test_attributes_match_lightly(lightly):
    fast, original = (kind(0.2, (6, 3), True) for kind in (drop_in.NTXentLoss, lightly.NTXentLoss))
    for name in ("temperature", "gather_distributed", "eps"):
        assert getattr(fast, name) == getattr(original, name)
    for name in ("size", "gather_distributed", "feature_dim_first"):
        assert getattr(fast.memory_bank, name) == getattr(original.memory_bank, name)
    assert dict(fast.named_children()).keys() == dict(original.named_children()).keys()
    assert {n: b.shape for n, b in fast.named_buffers()} == {n: b.shape for n, b in original.named_buffers()}
    assert fast.state_dict() == original.state_dict() == {}
    first, second = (kind.memory_bank(random(2, 3)) for kind in (fast, original))
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
def test_errors_match_lightly(lightly, shape0, shape1, dtype1):
    errors = []
    for kind in (drop_in.NTXentLoss, lightly.NTXentLoss):
        with pytest.raises((ValueError, IndexError, RuntimeError, TypeError)) as caught:
            kind()(torch.ones(shape0), torch.ones(shape1, dtype=dtype1))
        errors.append(caught.type)
    assert errors[0] is errors[1]


def gather_in_process(rank, folder, batch):
    """Save the loss, its gradients and the first rows of a memory bank of one of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out0, out1 = (x.chunk(2)[rank].clone().requires_grad_() for x in batch)
    value = drop_in.NTXentLoss(0.3, gather_distributed=True)(out0, out1)
    value.backward()
    bank = drop_in.NTXentLoss(0.3, memory_bank_size=(16, 4), gather_distributed=True)
    bank(out0, out1)
    torch.save((value.detach(), out0.grad, out1.grad, bank.memory_bank.bank[:6]), folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes outlive an orderly exit


def test_loss_gathered_from_two_processes_equals_loss_of_whole_batch(tmp_path, repository, monkeypatch):
    """The mean of the two losses is the loss of the batch. The processes sum their gradients."""
    monkeypatch.syspath_prepend(repository)  # the processes import this module
    out0, out1 = random(6, 4), random(6, 4, seed=1)
    torch.multiprocessing.spawn(gather_in_process, (tmp_path, (out0, out1)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    leaves = [x.clone().requires_grad_() for x in (out0, out1)]
    value = nt_xent(*leaves, 0.3)
    assert_close((results[0][0] + results[1][0]) / 2, value, atol=1e-5)
    for i, expected in enumerate(torch.autograd.grad(value, leaves), 1):
        assert_close(torch.cat([result[i] for result in results]) / 2, expected, atol=1e-5)
    for result in results:
        assert_close(result[3], F.normalize(out1), atol=1e-6)


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
def test_sup_con_matches_definition(mode, views, given, positives, temperature, base):
    features = F.normalize(random(5, views, 6), dim=2)

    def definition(x):
        return sup_con(x, positives, temperature, base, mode)

    fast = datafree.ContrastLoss(temperature, mode, base)
    assert_same(lambda x: fast(x, **given), definition, features)
    scalar = cpsc.SupConLoss(temperature, mode, base, device="cpu")
    assert_same(lambda x: scalar(x, **given), lambda x: definition(x).mean(), features)
    assert fast(features, **given).shape == (views if mode == "all" else 1, 5)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("given", [{}, {"labels": LABELS}])
def test_contrast_loss_returns_similarities_on_request(mode, given):
    features = F.normalize(random(5, 2, 3, 2), dim=2)
    loss = datafree.ContrastLoss(0.2, mode)
    value, logits = loss(features, return_logits=True, **given)
    assert_close(value, loss(features, **given), atol=1e-5)
    rows = features.transpose(0, 1).reshape(10, 6)
    assert_close(logits, (rows @ rows.T / 0.2)[: len(logits)], atol=1e-5)
    assert len(logits) == (10 if mode == "all" else 5)


def test_loss_of_anchor_without_positive_is_nan():
    value = datafree.ContrastLoss()(F.normalize(random(3, 1, 4), dim=2), torch.tensor([0, 0, 1]))
    assert value.isnan().tolist() == [[False, False, True]]


def test_long_features_give_finite_loss():
    assert cpsc.SupConLoss()(100 * random(4, 2, 8)).isfinite()


@pytest.mark.parametrize("loss", [datafree.ContrastLoss, cpsc.SupConLoss])
def test_sup_con_raises_errors_of_original(loss):
    features = random(4, 2, 3)
    for error, message, arguments in (
        (ValueError, "n_views", (features[:, 0],)),
        (ValueError, "both", (features, torch.arange(4), torch.eye(4))),
        (ValueError, "Num of labels", (features, torch.arange(3))),
        (IndexError, "no sample", (features[:0],)),
        (RuntimeError, "size", (features, None, torch.eye(3))),
    ):
        with pytest.raises(error, match=message):
            loss()(*arguments)
    with pytest.raises(ValueError, match="Unknown mode"):
        loss(contrast_mode="two")(features)


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("pytorch_metric_learning.losses")


@pytest.fixture(scope="module")
def fast(library):
    return pytest.importorskip("dfkd_fast.compat.metric_learning")


def wrapped(module, name, temperature, symmetric=True, **kwargs):
    return module.SelfSupervisedLoss(getattr(module, name)(temperature=temperature, **kwargs), symmetric=symmetric)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize(
    ("temperature", "symmetric", "count", "dim"),
    [
        *((0.01, True, 7, 5), (0.02, True, 8, 6), (0.03, False, 24, 16), (0.07, True, 24, 16)),
        *((0.07, False, 2, 1), (0.1, True, 8, 6), (0.1, True, 2, 1), (0.1, True, 1, 4)),
        *((0.1, False, 1, 4), (0.5, False, 7, 5), (3, True, 24, 16)),
    ],
)
def test_self_supervised_matches_pytorch_metric_learning(fast, library, name, temperature, symmetric, count, dim):
    views = random(count, dim), random(count, dim, seed=1)
    pair = [wrapped(module, name, temperature, symmetric) for module in (fast, library)]
    if count == 1 and not symmetric:  # there are no negatives, so the loss is 0
        assert [loss(*views).item() for loss in pair] == [0, 0]
        return
    assert_same(*pair, *views)
    if symmetric and dim > 1:  # nearly equal and nearly opposite views
        for sign in (1, -1):
            assert_same(*pair, views[0], sign * views[0] + 1e-3 * views[1])


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_defaults_and_attributes_match_pytorch_metric_learning(fast, library, name):
    fast_loss, original = getattr(fast, name)(), getattr(library, name)()
    assert isinstance(fast_loss, getattr(library, name))
    assert fast_loss.temperature == original.temperature
    assert vars(fast_loss).keys() == vars(original).keys()
    views = random(5, 4), random(5, 4, seed=1)
    assert_same(fast.SelfSupervisedLoss(fast_loss), library.SelfSupervisedLoss(original), *views)
    # Users may replace only the wrapper or only the loss.
    assert_same(library.SelfSupervisedLoss(fast_loss), library.SelfSupervisedLoss(original), *views)
    assert_same(fast.SelfSupervisedLoss(original), library.SelfSupervisedLoss(original), *views)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_labels_pairs_and_options_match_pytorch_metric_learning(fast, library, name):
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.reducers import SumReducer
    from pytorch_metric_learning.regularizers import LpRegularizer

    embeddings, labels = random(10, 4), torch.arange(10) % 3
    pairs = tuple(torch.tensor(i) for i in ([0, 1], [3, 4], [0, 1, 1], [1, 2, 3]))
    changes = {"distance": LpDistance(), "reducer": SumReducer(), "embedding_regularizer": LpRegularizer()}
    for options in ({}, *({key: value} for key, value in changes.items())):
        fast_loss, original = (getattr(module, name)(**options) for module in (fast, library))
        for arguments in ((labels,), (labels, pairs)):
            pair = [lambda x, loss=loss, a=arguments: loss(x, *a) for loss in (fast_loss, original)]
            assert_same(*pair, embeddings)
        views = random(5, 4), random(5, 4, seed=1)
        assert_same(fast.SelfSupervisedLoss(fast_loss), library.SelfSupervisedLoss(original), *views)


def test_other_losses_and_errors_match_pytorch_metric_learning(fast, library):
    views = random(5, 4), random(5, 4, seed=1)
    triplet = library.TripletMarginLoss()
    assert_same(fast.SelfSupervisedLoss(triplet), library.SelfSupervisedLoss(triplet), *views)
    for module in (fast, library):
        with pytest.raises(Exception, match="not supported"):
            module.SelfSupervisedLoss(library.ArcFaceLoss(3, 4))
        for name in ("NTXentLoss", "SupConLoss"):
            loss = getattr(module, name)()
            with pytest.raises(ValueError, match="None"):
                loss(views[0])
            with pytest.raises(ValueError, match="equal number of labels"):
                loss(views[0], torch.arange(4))
            with pytest.raises(ValueError, match="2D"):
                module.SelfSupervisedLoss(loss)(views[0][None].expand(2, 5, 4), views[1][None].expand(2, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(fast, dtype):
    a, b = (F.normalize(random(16, 8, seed=seed)).to(dtype) for seed in (0, 1))
    leaf = a.clone().requires_grad_()
    value = drop_in.NTXentLoss(0.1)(leaf, b)
    value.backward()
    assert leaf.grad.dtype == dtype
    for loss in (value, *(wrapped(fast, name, 0.1)(a, b) for name in ("NTXentLoss", "SupConLoss"))):
        assert_close(loss, nt_xent(a, b, 0.1), atol=1e-5, rtol=1e-5)
    features = torch.stack([a, b], 1)
    truth = sup_con(features, torch.eye(16), 0.1, 0.1, "all").mean()
    assert_close(cpsc.SupConLoss(0.1, base_temperature=0.1)(features), truth, atol=1e-5, rtol=1e-5)


def test_contrastive_losses_compile(fast):
    """All losses in one graph."""
    contrast = datafree.ContrastLoss(contrast_mode="one")
    pairs = [drop_in.NTXentLoss(), drop_in.NTXentLoss(-0.5)]
    pairs += [wrapped(fast, name, 0.1) for name in ("NTXentLoss", "SupConLoss")]

    def every_loss(a, b):
        features = F.normalize(torch.stack([a, b], 1), dim=2)
        labeled = contrast(features, labels=torch.arange(6) % 2)
        return *(loss(a, b) for loss in pairs), cpsc.SupConLoss()(features), contrast(features), labeled

    assert_compiles(every_loss, [(random(6, 4), random(6, 4, seed=1))], atol=1e-5, rtol=1e-5)
