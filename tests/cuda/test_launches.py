"""What launchers would launch, asked without launching: names and sizes need no GPU, what they take of one does."""

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

SIZES: dict[str, dict[str, Any]] = {
    "contrastive_loss": {"count": 4096, "dim": 128},
    "spatial_attention": {"samples": 64, "channels": 256, "maps": 32, "positions": 784},
    "high_order_attention": {"positions": 3136, "channels": 512, "hidden": 128},
}


def test_names_are_those_of_the_source() -> None:
    assert kernel_name("void dfkd::(anonymous namespace)::sums<dfkd::bfloat16, 64>(float const*)") == (
        "sums<bfloat16, 64>"
    )
    assert kernel_name("(anonymous namespace)::merge(float const*, dfkd::Sides<float>)") == "merge"
    assert kernel_name("void dfkd::high_order::once<float>(dfkd::Problem<float>)") == "high_order::once<float>"


def test_the_launches_of_a_contrast() -> None:
    forward = launches("contrastive_loss", resources=False, **SIZES[OPS[0]])
    assert [each["kernel"] for each in forward] == [
        "contrastive::prepare<bfloat16>",
        "similarity_sums_wgmma<bfloat16, 128>",
        "merge",
    ]
    assert [each["grid"] for each in forward[1:]] == [(128, 1, 1), (8, 1, 1)]
    assert [each["cluster"] for each in forward] == [1, 1, 8]
    assert not any(each["cooperative"] for each in forward)


def test_options_decide() -> None:
    both = [each["kernel"] for each in launches("high_order_attention_backward", resources=False, **SIZES[OPS[2]])]
    sizes = {**SIZES[OPS[2]], "needs_grad_proj": False, "needs_grad_out": False}
    alone = [each["kernel"] for each in launches("high_order_attention_backward", resources=False, **sizes)]
    assert len(alone) < len(both)
    half = launches("contrastive_loss", resources=False, count=129, dim=8, dtype=torch.float16)
    assert half[1]["kernel"] == "similarity_sums_wgmma<float16, 64>"


@pytest.mark.parametrize(
    ("op", "sizes", "said"),
    [
        (OPS[0], {"count": 128, "dim": 64}, "N of anchors (N, D) is 128; the kernel serves 129 to 8388608"),
        (OPS[0], {"count": 200, "dim": 64, "normalize": False}, "normalize is False; the kernel serves True"),
        (OPS[0], {"count": 200, "dim": 8, "dtype": "float64"}, "dtype must be float16 or bfloat16"),
        (
            OPS[1],
            {"samples": 1, "channels": 64, "maps": 8, "positions": 4, "weight_dtype": torch.float64},
            "dtype of weight must be float32, float16 or bfloat16",
        ),
        (
            OPS[1],
            {"samples": 1, "channels": 8, "maps": 200, "positions": 4},
            "K of hidden (N, K, H, W) is 200; the kernel serves multiples of 8 up to 64",
        ),
        (
            OPS[2],
            {"positions": 8, "channels": 64, "hidden": 16, "order": 4},
            "R of out_weight (R, C, K) is 4; the kernel serves 1 to 3",
        ),
    ],
)
def test_a_launcher_says_what_it_does_not_serve(op: str, sizes: dict[str, Any], said: str) -> None:
    for name in (op, f"{op}_backward"):
        assert unsupported_reason(name, **sizes) == said
        with pytest.raises(ValueError, match=f"{name}: {re.escape(said)}"):
            launches(name, resources=False, **sizes)


def test_blocks_that_wait_for_each_other_need_as_many_multiprocessors() -> None:
    name, sizes = "spatial_attention_backward", SIZES["spatial_attention"]
    assert unsupported_reason(name, num_sms=132, **sizes) is None
    assert unsupported_reason(name, num_sms=114, **sizes) == (
        "spatial_attention_backward takes 132 multiprocessors at once; the device has 114"
    )
    assert unsupported_reason("spatial_attention", num_sms=114, **sizes) is None


def test_wrong_words() -> None:
    with pytest.raises(TypeError, match="needs 'dim'"):
        unsupported_reason("contrastive_loss", count=8)
    with pytest.raises(TypeError, match="takes no 'depth'"):
        unsupported_reason("contrastive_loss", count=8, dim=8, depth=8)
    with pytest.raises(ValueError, match="no op 'pool'"):
        unsupported_reason("pool")
    with pytest.raises(ValueError, match="no reduction 'most'"):
        unsupported_reason("contrastive_loss", count=8, dim=8, reduction="most")
    # A call that failed has ended its record: the next one begins anew.
    assert len(launches("contrastive_loss", resources=False, count=129, dim=8)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_known_of_it() -> None:
    with pytest.raises(RuntimeError, match="needs a GPU and its driver"):
        launches("contrastive_loss", count=129, dim=8)


def test_the_papers_shapes_are_served() -> None:
    """All but the 128 vectors of the contrastive loss, which are Triton's."""
    for op, shapes in doctor._PAPER.items():
        for shape, sizes in shapes.items():
            for name in (op, f"{op}_backward"):
                assert (unsupported_reason(name, **sizes) is None) == (shape != "128 x 128"), (name, shape)


def test_small_cases_take_every_kernel() -> None:
    """What the sanitizer's tests run leaves no kernel out that the operators take."""
    taken = {
        launch["kernel"]
        for op in OPS
        for sizes in cases(op)
        for name in (op, f"{op}_backward")
        for launch in launches(name, resources=False, **sizes)
    }
    name = f"{OPS[2]}_backward"
    asked = {
        launch["kernel"]
        for sizes in cases(OPS[2])
        for way in (1, 2, 3)
        if unsupported_reason(name, **sizes, way=way) is None
        for launch in launches(name, resources=False, **sizes, way=way)
    }
    assert kernels() == taken | asked


@pytest.mark.parametrize("op", OPS)
def test_launches_are_within_what_a_device_can_hold(op: str) -> None:
    for sizes in (*cases(op), *doctor._PAPER[op].values()):
        if unsupported_reason(op, **sizes) is not None:
            continue
        for name in (op, f"{op}_backward"):
            for each in launches(name, resources=False, **sizes):
                assert each["dynamic_shared"] <= 227 * 1024, each
                assert math.prod(each["block"]) <= 1024, each
                assert 1 <= each["cluster"] <= 8, each
                assert each["grid"][0] % each["cluster"] == 0, each
                assert max(each["grid"][1:]) < 2**16, each
                assert not each["cooperative"] or math.prod(each["grid"]) <= 132, each


def test_doctor_shows_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    doctor.launches()
    printed = capsys.readouterr().out
    assert "similarity_sums_wgmma<bfloat16, 128>" in printed
    assert "not supported: N of anchors" in printed
    assert "131,072 x 128" in printed
    assert ("needs a GPU" in printed) != torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_launches_fit_a_multiprocessor(op: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    for name in (op, f"{op}_backward"):
        for each in launches(name, **SIZES[op]):
            assert each["local"] == 0, each
            assert 0 < each["registers"] <= 255, each
            assert each["blocks_per_multiprocessor"] > 0, each
            assert 0 < each["occupancy"] <= 1, each
            assert each["active_clusters"] > 0, each
            if each["cooperative"]:
                blocks = each["grid"][0] * each["grid"][1] * each["grid"][2]
                assert blocks <= each["active_clusters"] * each["cluster"], each
