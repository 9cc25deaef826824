"""Hooks of DataFree, DeepInversion and CPSC against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfkd_fast.compat import cpsc, datafree, deepinversion
from dfkd_fast.testing import assert_close, random

from .definitions import distance, statistics

HOOKS = {
    "CMI": datafree.DeepInversionHook,
    "Fast-Datafree": lambda module: datafree.DeepInversionHook(module, 0.9),
    "NVlabs": deepinversion.DeepInversionFeatureHook,
    "CPSC": cpsc.DeepInversionFeatureHook,
}


def batchnorm(channels=5, seed=7):
    """A BatchNorm with random running statistics."""
    bn = nn.BatchNorm2d(channels).eval().requires_grad_(False)
    bn.running_mean.copy_(random(channels, seed=seed))
    bn.running_var.copy_(random(channels, seed=seed + 1).abs() + 0.5)
    return bn


def gradient(value, x):
    return torch.autograd.grad(value, x, retain_graph=True)[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((4, 5, 3, 3), torch.float32, "channels_last"),
        ((1, 5, 1, 2), torch.float32, "contiguous"),
        ((2, 5, 1, 1), torch.float32, "contiguous"),
        ((7, 5, 4, 6), torch.float32, "contiguous"),
        ((4, 5, 6, 6), torch.float16, "contiguous"),
        ((4, 5, 6, 6), torch.bfloat16, "contiguous"),
    ],
)
@pytest.mark.parametrize("kind", HOOKS.values(), ids=HOOKS)
def test_r_feature_matches_definition(kind, shape, dtype, layout):
    bn = batchnorm()
    hook = kind(bn)
    x = random(*shape, dtype=dtype, layout=layout, requires_grad=True)
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for scale in (1, 2):
        y = bn(scale * x)
        expected = distance(bn, *statistics(scale * x))
        assert_close(hook.r_feature, expected, atol=1e-5, rtol=1e-5)
        dx = gradient(hook.r_feature, x)
        assert dx.dtype == dtype
        assert_close(dx, gradient(expected, x), atol=1e-5, rtol=rtol)
        assert torch.equal(y, nn.functional.batch_norm(scale * x, bn.running_mean, bn.running_var, bn.weight, bn.bias))


@pytest.mark.parametrize("rate", [0.9, 0.0, 0.25])
def test_momentum_averages_stored_and_batch_statistics(rate):
    bn = batchnorm()
    hook = datafree.DeepInversionHook(bn, rate)
    assert (hook.module, hook.mmt_rate, hook.mmt, hook.tmp_val) == (bn, rate, None, None)
    kept = None
    for step in range(4):
        x = random(3, 5, 4, 4, seed=step).requires_grad_()
        bn(x)
        mean, var = statistics(x)
        mixed = (mean, var)
        if kept is not None:
            mixed = tuple((1 - rate) * new + rate * old for new, old in zip((mean, var), kept, strict=True))
        expected = distance(bn, *mixed)
        assert_close(hook.r_feature, expected, atol=1e-5, rtol=1e-5)
        assert_close(gradient(hook.r_feature, x), gradient(expected, x), atol=1e-5, rtol=1e-5)
        for value, truth in zip(hook.tmp_val, (mean, var), strict=True):
            assert_close(value, truth, atol=1e-5)
            assert value.requires_grad
        # One step skips the update, and the stored statistics must then be unchanged.
        if step != 1:
            hook.update_mmt()
            kept = tuple(v.detach() for v in (mixed if kept is not None else (mean, var)))
        for value, truth in zip(hook.mmt, kept, strict=True):
            assert_close(value, truth, atol=1e-5)
            assert not value.requires_grad


def test_update_mmt_raises_without_rate_or_forward():
    bn = batchnorm()
    hook = datafree.DeepInversionHook(bn)
    bn(random(2, 5, 3, 3))
    with pytest.raises(AttributeError):
        hook.update_mmt()
    with pytest.raises(TypeError):
        datafree.DeepInversionHook(bn, 0.9).update_mmt()


@pytest.mark.parametrize(("name", "kind"), HOOKS.items(), ids=HOOKS)
def test_removed_hook_no_longer_runs(name, kind):
    bn = batchnorm()
    hook = kind(bn)
    with pytest.raises(AttributeError):
        _ = hook.r_feature
    bn(random(2, 5, 3, 3))
    before = hook.r_feature
    assert len(bn._forward_hooks) == 1
    hook.remove() if name in ("CMI", "Fast-Datafree") else hook.close()
    assert not bn._forward_hooks
    bn(random(2, 5, 3, 3, seed=1))
    assert hook.r_feature is before


@pytest.mark.parametrize("kind", HOOKS.values(), ids=HOOKS)
def test_errors_match_pytorch(kind):
    hooked = nn.BatchNorm1d(5).eval()
    kind(hooked)
    with pytest.raises(IndexError):
        hooked(random(4, 5))
    hooked = nn.BatchNorm2d(5, track_running_stats=False)
    kind(hooked)
    with pytest.raises(AttributeError):
        hooked(random(4, 5, 2, 2))


def test_hook_in_training_uses_updated_running_statistics():
    bn = batchnorm().train()
    hook = datafree.DeepInversionHook(bn)
    x = random(4, 5, 3, 3)
    bn(x)
    assert_close(hook.r_feature, distance(bn, *statistics(x)), atol=1e-5, rtol=1e-5)


def test_feature_hooks_store_input_and_output():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    hooks = datafree.register_hooks(network)
    assert [type(hook) for hook in hooks] == [datafree.FeatureHook] * 2
    x = random(2, 3, 8, 8)
    y = network(x)
    assert hooks[0].input is x
    assert hooks[1].output is y
    assert hooks[1].input is hooks[0].output
    assert [hook.module for hook in hooks] == list(network)
    assert repr(hooks[0]) == f"<Feature Hook>: {network[0]}"
    for hook in hooks:
        hook.remove()
    network(random(2, 3, 8, 8, seed=1))
    assert hooks[1].output is y


@pytest.mark.parametrize("kind", [datafree.InstanceMeanHook, datafree.FeatureMeanHook])
def test_instance_mean_hooks_store_means_over_positions(kind):
    module = nn.Conv2d(3, 4, 1)
    hook = kind(module)
    assert repr(hook) == f"<Feature Hook>: {module}"
    x = random(2, 3, 4, 5).requires_grad_()
    module(x)
    assert_close(hook.instance_mean, x.flatten(2).sum(2) / 20, atol=1e-6)
    assert_close(gradient(hook.instance_mean.sum(), x), 1 / 20, atol=1e-6)
    hook.remove()
    assert not module._forward_hooks


@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("dim", [[0, 2, 3], (0, 2, 3), [2, 3], [0], 1])
def test_mean_var_hook_stores_statistics_of_input_or_output(on_input, dim):
    module = nn.Conv2d(3, 4, 1)
    hook = datafree.FeatureMeanVarHook(module, on_input, dim)
    x = random(2, 3, 4, 5).requires_grad_()
    y = module(x)
    expected_var, expected_mean = torch.var_mean(x if on_input else y, dim=dim, unbiased=True)
    for value, expected in ((hook.mean, expected_mean), (hook.var, expected_var)):
        assert_close(value, expected, atol=1e-5)
        assert_close(gradient(value.square().sum(), x), gradient(expected.square().sum(), x), atol=1e-5, rtol=1e-5)
    hook.remove()
    assert hook.output is None
    assert not module._forward_hooks


def test_mean_var_hook_supports_later_in_place_changes():
    module = nn.Conv2d(3, 4, 1)
    hook = datafree.FeatureMeanVarHook(module, on_input=False)
    assert hook.dim == [0, 2, 3]
    x = random(2, 3, 4, 5).requires_grad_()
    torch.relu_(module(x))
    assert_close(gradient(hook.var.sum(), x), gradient(module(x).var([0, 2, 3]).sum(), x), atol=1e-5, rtol=1e-5)
