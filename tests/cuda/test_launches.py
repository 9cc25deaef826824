"""Records what the launchers would launch. Names and sizes need no GPU, register counts and occupancy do."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from dfkd_fast import doctor
from dfkd_fast.ops import extension
from dfkd_fast.ops.extension import kernel_name, kernels, launches, unsupported_reason

from .kernel_cases import OPS, cases

pytestmark = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))

CONTRASTIVE, SPATIAL, HIGH_ORDER = OPS
BOTH = {op: (op, f"{op}_backward") for op in OPS}
SIZES: dict[str, dict[str, Any]] = {
    CONTRASTIVE: {"count": 4096, "dim": 128},
    SPATIAL: {"samples": 64, "channels": 256, "hidden": 32, "positions": 784},
    HIGH_ORDER: {"positions": 3136, "channels": 512, "hidden": 128},
}


def names(op: str, **sizes: Any) -> list[str]:
    return [each["kernel"] for each in launches(op, resources=False, **sizes)]


def test_kernel_names_are_shortened() -> None:
    for name, short in (
        ("void dfkd::(anonymous namespace)::sums<dfkd::bfloat16, 64>(float const*)", "sums<bfloat16, 64>"),
        ("(anonymous namespace)::merge(float const*, dfkd::Sides<float>)", "merge"),
        ("void dfkd::high_order::once<float>(dfkd::Problem<float>)", "high_order::once<float>"),
    ):
        assert kernel_name(name) == short


def test_launches_of_contrastive_loss() -> None:
    found = launches(CONTRASTIVE, resources=False, **SIZES[CONTRASTIVE])
    first, sums, combine = found
    assert first["kernel"] == "contrastive::preprocess<bfloat16>"
    assert (sums["kernel"], sums["grid"]) == ("similarity_sums_wgmma<bfloat16, 128>", (128, 1, 1))
    assert (combine["kernel"], combine["grid"]) == ("combine", (8, 1, 1))
    assert [each["cluster"] for each in found] == [1, 1, 8]
    assert not any(each["cooperative"] for each in found)
    assert "similarity_sums_wgmma<float16, 64>" in names(CONTRASTIVE, count=129, dim=8, dtype=torch.float16)


def test_unneeded_gradients_launch_fewer_kernels() -> None:
    name, sizes = f"{HIGH_ORDER}_backward", SIZES[HIGH_ORDER]
    assert len(names(name, **sizes, needs_grad_proj=False, needs_grad_out=False)) < len(names(name, **sizes))


C, K = "C of out_weight (R, C, K)", "K of out_weight (R, C, K)"
MULTIPLES = "the kernel supports multiples of 8 up to"
REFUSED: dict[str, dict[str, dict[str, Any]]] = {
    CONTRASTIVE: {
        "N of anchors (N, D) is 128; the kernel supports 129 to 8388608": {"count": 128},
        "D of anchors (N, D) is 0; the kernel supports 1 to 128": {"dim": 0},
        "D of anchors (N, D) is 129; the kernel supports 1 to 128": {"dim": 129},
        "dtype must be float16 or bfloat16": {"dtype": "float32"},
        "normalize is False; the kernel supports True": {"normalize": False},
        "temperature is 0.03; the kernel supports 0.03005615 and more": {"temperature": 0.03},
        "temperature is 0; the kernel supports 0.03005615 and more": {"temperature": 0.0},
    },
    SPATIAL: {
        f"C of features (N, C, H, W) is 264; {MULTIPLES} 256": {"channels": 264},
        f"K of hidden (N, K, H, W) is 72; {MULTIPLES} 64": {"hidden": 72},
        "form is 'channel'; the kernel supports 'spatial' and 'spatial_mean1'": {"form": "channel"},
        "dtype must be float16 or bfloat16": {"dtype": "float32"},
        "dtype of weight must be float32, float16 or bfloat16": {"weight_dtype": torch.float64},
    },
    HIGH_ORDER: {
        "dtype must be float16 or bfloat16": {"dtype": torch.float32},
        "R of out_weight (R, C, K) is 4; the kernel supports 1 to 3": {"order": 4},
        f"{C} is 520; {MULTIPLES} 512": {"channels": 520},
        f"{K} is 136; {MULTIPLES} 128": {"hidden": 136},
    },
}


@pytest.mark.parametrize(("op", "reason"), [(op, reason) for op in OPS for reason in REFUSED[op]])
def test_unsupported_arguments_are_refused_with_a_reason(op: str, reason: str) -> None:
    sizes = SIZES[op] | REFUSED[op][reason]
    for name in BOTH[op]:
        assert unsupported_reason(name, **sizes) == reason
        with pytest.raises(ValueError, match=f"{name}: {re.escape(reason)}"):
            launches(name, resources=False, **sizes)


def test_unsupported_forms_of_backward_are_refused() -> None:
    for channels, hidden, mode, form, reason in (
        (64, 16, "joint", 4, "form of the backward is 4"),
        (64, 16, "per_order", 1, "one pass supports joint gates"),
        (256, 16, "per_order", 3, "taller tiles support joint gates"),
        (128, 32, "joint", 3, "more than 128 channels or 32 hidden maps"),
        (136, 16, "joint", 1, "up to 128 channels and 32 hidden maps"),
        (64, 40, "joint", 1, "up to 128 channels and 32 hidden maps"),
    ):
        sizes = {"positions": 2, "channels": channels, "hidden": hidden, "mode": mode, "form": form}
        assert reason in str(unsupported_reason(f"{HIGH_ORDER}_backward", **sizes))


def test_cooperative_launches_need_one_sm_per_block() -> None:
    forward, backward = BOTH[SPATIAL]
    assert unsupported_reason(backward, num_sms=132, **SIZES[SPATIAL]) is None
    reason = "spatial_attention_backward takes 132 multiprocessors at once; the device has 114"
    assert unsupported_reason(backward, num_sms=114, **SIZES[SPATIAL]) == reason
    assert unsupported_reason(forward, num_sms=114, **SIZES[SPATIAL]) is None


def test_wrong_arguments_raise() -> None:
    for error, match, op, options in (
        (TypeError, "needs 'dim'", CONTRASTIVE, {"count": 8}),
        (TypeError, "takes no 'depth'", CONTRASTIVE, {"count": 8, "dim": 8, "depth": 8}),
        (ValueError, "no op 'pool'", "pool", {}),
        (ValueError, "no reduction 'most'", CONTRASTIVE, {"count": 8, "dim": 8, "reduction": "most"}),
    ):
        with pytest.raises(error, match=match):
            unsupported_reason(op, **options)
    # A failed call ends its recording: the next one starts from zero.
    assert len(names(CONTRASTIVE, count=129, dim=8)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_resources_need_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="needs a GPU and its driver"):
        launches(CONTRASTIVE, count=129, dim=8)


def test_the_papers_shapes_are_supported() -> None:
    """All are, except contrastive_loss of 128 vectors, which runs on Triton."""
    for op, shapes in doctor._PAPER.items():
        for shape, sizes in shapes.items():
            for name in BOTH[op]:
                assert (unsupported_reason(name, **sizes) is None) == (shape != "128 x 128"), (name, shape)


def test_small_cases_launch_every_kernel() -> None:
    """With these cases, compute-sanitizer covers all kernels that the operators launch."""
    calls = [(name, sizes) for op in OPS for sizes in cases(op) for name in BOTH[op]]
    backward = f"{HIGH_ORDER}_backward"
    forms = [(backward, {**sizes, "form": form}) for sizes in cases(HIGH_ORDER) for form in (1, 2, 3)]
    calls += [(name, sizes) for name, sizes in forms if unsupported_reason(name, **sizes) is None]
    assert kernels() == {kernel for name, sizes in calls for kernel in names(name, **sizes)}


@pytest.mark.parametrize("op", OPS)
def test_launches_are_within_the_limits_of_a_device(op: str) -> None:
    supported = (s for s in (*cases(op), *doctor._PAPER[op].values()) if unsupported_reason(op, **s) is None)
    for each in (each for s in supported for name in BOTH[op] for each in launches(name, resources=False, **s)):
        assert each["dynamic_shared"] <= 227 * 1024, each
        assert math.prod(each["block"]) <= 1024, each
        assert 1 <= each["cluster"] <= 8, each
        assert each["grid"][0] % each["cluster"] == 0, each
        assert max(each["grid"][1:]) < 2**16, each
        assert not each["cooperative"] or math.prod(each["grid"]) <= 132, each


def test_doctor_prints_launches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    doctor.launches()
    printed = capsys.readouterr().out
    for text in ("similarity_sums_wgmma<bfloat16, 128>", "not supported: N of anchors", "131,072 x 128"):
        assert text in printed
    assert ("needs a GPU" in printed) != torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_launches_fit_a_multiprocessor(op: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    for each in (each for name in BOTH[op] for each in launches(name, **SIZES[op])):
        assert each["local"] == 0, each
        assert 0 < each["registers"] <= 255, each
        assert each["blocks_per_multiprocessor"] > 0, each
        assert 0 < each["occupancy"] <= 1, each
        assert each["active_clusters"] > 0, each
        blocks = math.prod(each["grid"])
        assert not each["cooperative"] or blocks <= each["active_clusters"] * each["cluster"], each
