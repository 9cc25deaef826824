"""What launchers would launch, asked without launching: names and sizes need no GPU, what they take of one does."""

from __future__ import annotations

import itertools
import json
import math
import sys
from typing import Any

import pytest
import torch

from dfkd_fast import doctor
from dfkd_fast.benchmarks.compile_cuda import TABLE
from dfkd_fast.ops import extension
from dfkd_fast.ops.backend import _registry
from dfkd_fast.ops.extension import kernel_name, launches, supported

from .kernel_cases import OPS, cases

pytestmark = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))
hopper = pytest.mark.skipif(not extension.HOPPER, reason=str(extension.unavailable("hopper")))
BACKENDS = ("cuda", pytest.param("hopper", marks=hopper))

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


def test_the_small_contrast_is_one_launch_each_way() -> None:
    (forward,) = launches("contrastive_loss", resources=False, count=64, dim=128)
    (backward,) = launches("contrastive_loss_backward", resources=False, count=64, dim=128)
    assert forward["kernel"] == "small_forward<bfloat16>"
    assert forward["grid"] == (1, 1, 1)
    assert (forward["cluster"], forward["cooperative"]) == (1, False)
    assert backward["kernel"] == "small_backward<bfloat16>"
    assert backward["block"][0] % 32 == 0


def test_options_decide() -> None:
    both = [each["kernel"] for each in launches("high_order_attention_backward", resources=False, **SIZES[OPS[2]])]
    sizes = {**SIZES[OPS[2]], "want_proj": False, "want_out": False}
    alone = [each["kernel"] for each in launches("high_order_attention_backward", resources=False, **sizes)]
    assert len(alone) < len(both)
    assert launches("contrastive_loss", resources=False, count=64, dim=8, dtype=torch.float16)[0]["kernel"] == (
        "small_forward<float16>"
    )


def test_what_is_not_served_is_said() -> None:
    sizes = {"samples": 1, "channels": 8, "maps": 200, "positions": 4}
    assert not supported("spatial_attention", **sizes)
    with pytest.raises(ValueError, match="cuda does not serve spatial_attention"):
        launches("spatial_attention", resources=False, **sizes)
    assert not supported("contrastive_loss", count=8, dim=8, dtype="float32")


def test_wrong_words() -> None:
    with pytest.raises(TypeError, match="needs 'dim'"):
        supported("contrastive_loss", count=8)
    with pytest.raises(TypeError, match="takes no 'depth'"):
        supported("contrastive_loss", count=8, dim=8, depth=8)
    with pytest.raises(ValueError, match="no op 'pool'"):
        supported("pool")
    with pytest.raises(ValueError, match="no reduction 'most'"):
        supported("contrastive_loss", count=8, dim=8, reduction="most")
    with pytest.raises(ValueError, match="no backend"):
        supported("contrastive_loss", "triton", count=8, dim=8)
    # A call that failed has ended its record: the next one begins anew.
    assert len(launches("contrastive_loss", resources=False, count=8, dim=8)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_known_of_it() -> None:
    with pytest.raises(RuntimeError, match="needs a GPU and its driver"):
        launches("contrastive_loss", count=8, dim=8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_papers_shapes_are_served(backend: str) -> None:
    """All but the 128 vectors, which the plain form has in one launch each way."""
    for op, shapes in doctor._PAPER.items():
        for shape, sizes in shapes.items():
            wanted = (backend, shape) != ("hopper", "128 x 128")
            assert supported(op, backend, **sizes) == supported(f"{op}_backward", backend, **sizes) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_cases_take_every_kernel(backend: str) -> None:
    """Of those that compiled.json lists: what the sanitizer's tests run leaves none out that the operators take."""
    rows = json.loads(TABLE.read_text())["rows"]
    known = {row["kernel"] for row in rows if row["file"].startswith("hopper/") == (backend == "hopper")}
    taken = {
        launch["kernel"]
        for op in OPS
        for sizes in cases(op, backend)
        for name in (op, f"{op}_backward")
        for launch in launches(name, backend, resources=False, **sizes)
    }
    asked = {
        launch["kernel"]
        for sizes in cases(OPS[2], backend)
        for name in (OPS[2], f"{OPS[2]}_backward")
        for way in (1, 2, 3)
        if supported(name, backend, **sizes, way=way)
        for launch in launches(name, backend, resources=False, **sizes, way=way)
    }
    assert not known - taken - asked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_launches_are_within_what_a_device_can_hold(op: str, backend: str) -> None:
    most = 227 * 1024 if backend == "hopper" else 163 * 1024  # of sm_90; of sm_80
    for sizes in (*cases(op, backend), *doctor._PAPER[op].values()):
        for name in (op, f"{op}_backward"):
            for each in launches(name, backend, resources=False, **sizes) if supported(name, backend, **sizes) else ():
                assert each["dynamic_shared"] <= most, each
                assert math.prod(each["block"]) <= 1024, each
                assert 1 <= each["cluster"] <= 8, each
                assert each["grid"][0] % each["cluster"] == 0, each
                assert max(each["grid"][1:]) < 2**16, each
                assert not each["cooperative"] or math.prod(each["grid"]) <= 132, each


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def agree(op: str, sizes: dict[str, Any], said: str | None) -> None:
    for name in (op, f"{op}_backward"):
        assert supported(name, "hopper", **sizes) == (said is None), (name, sizes, said)


@hopper
def test_what_hopper_serves_is_what_its_launchers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """By sizes and options; the device and the dtype are asked for beside."""
    for op in OPS:
        module = sys.modules[f"dfkd_fast.ops.{op}"]
        monkeypatch.setattr(module, "unserved_by_extension", lambda *tensors: None)
    monkeypatch.setattr(sys.modules["dfkd_fast.ops.spatial_attention"], "unserved_processors", lambda x: None)
    served = {op: _registry[op]["hopper"].supports for op in OPS}

    counts, dims, temperatures = (0, 1, 64, 128, 129, 4096), (1, 7, 64, 128, 129, 200), (0.01, 0.03, 0.0302, 0.1, 5.0)
    for count, dim, temperature, normalize, symmetric in itertools.product(
        counts, dims, temperatures, (True, False), (True, False)
    ):
        options = {"temperature": temperature, "normalize": normalize, "symmetric": symmetric, "reduction": "mean"}
        pair = (meta(count, dim), meta(count, dim))
        agree(OPS[0], {"count": count, "dim": dim, **options}, served[OPS[0]](*pair, **options))

    for samples, channels, maps, positions, form in itertools.product(
        (0, 1, 3),
        (1, 8, 12, 64, 256, 264),
        (1, 8, 12, 32, 64, 72),
        (1, 60, 5000),
        ("spatial", "spatial_mean1", "channel"),
    ):
        tensors = (meta(samples, channels, 1, positions), meta(samples, maps, 1, positions), meta(channels, maps))
        sizes = {"samples": samples, "channels": channels, "maps": maps, "positions": positions, "form": form}
        agree(OPS[1], sizes, served[OPS[1]](*tensors, None, scale=1.0, form=form))

    for positions, channels, hidden, order, mode in itertools.product(
        (0, 1, 70, 5000),
        (8, 20, 64, 72, 128, 256, 512, 520),
        (4, 8, 16, 20, 32, 64, 128),
        (1, 2, 3, 4),
        ("joint", "per_order"),
    ):
        factors = order * (order + 1) // 2
        tensors = (meta(1, channels, 1, positions), meta(factors, hidden, channels), meta(order, channels, hidden))
        sizes = {"positions": positions, "channels": channels, "hidden": hidden, "order": order, "mode": mode}
        agree(OPS[2], sizes, served[OPS[2]](*tensors, mode=mode))


def test_doctor_shows_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.launches() == 0
    printed = capsys.readouterr().out
    assert "small_forward<bfloat16>" in printed
    assert "131,072 x 128" in printed
    assert ("needs a GPU" in printed) != torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_launches_fit_a_multiprocessor(op: str, backend: str) -> None:
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    for name in (op, f"{op}_backward"):
        for each in launches(name, backend, **SIZES[op]):
            assert each["local"] == 0, each
            assert 0 < each["registers"] <= 255, each
            assert each["blocks_per_multiprocessor"] > 0, each
            assert 0 < each["occupancy"] <= 1, each
            assert each["active_clusters"] > 0, each
            if each["cooperative"]:
                blocks = each["grid"][0] * each["grid"][1] * each["grid"][2]
                assert blocks <= each["active_clusters"] * each["cluster"], each
