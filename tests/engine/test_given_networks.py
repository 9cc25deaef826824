"""``distill`` with networks as users have them: other dtypes and BatchNorms, wrappers, networks that share modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfkd_fast import distill
from dfkd_fast.config import ObjectiveConfig, TeachConfig
from dfkd_fast.engine import DistillResult, export, teach
from dfkd_fast.models import extract

from .. import tiny


class Counting(nn.Module):
    """Counts its calls in a buffer, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny.teacher()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def one_round(teacher: nn.Module, student: nn.Module, out: Path, **changes: Any) -> DistillResult:
    once = {"epochs": 1, "rounds_per_epoch": 1, "generator_steps": 1, "student_steps": 1, "precision": "fp32"}
    return distill(teacher, student, tiny.config(out, **once, **changes), progress=False)


def mobile(norm: Any = nn.BatchNorm2d) -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=5, width_mult=0.1, norm_layer=norm)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=5, depth=1, embed_dim=12, num_heads=2)


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "float16, averaged": lambda: AveragedModel(tiny.teacher().half()),
    "bfloat16, traced": lambda: extract(tiny.teacher().bfloat16(), image_size=tiny.SIZE),
    "compiled": lambda: torch.compile(tiny.teacher(), backend="eager"),
    "counting": Counting,
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(tiny.teacher()),
    "FrozenBatchNorm2d": lambda: mobile(torchvision.ops.FrozenBatchNorm2d),
    "subclass": lambda: mobile(OwnNorm),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_is_used_and_stays_as_it_was(name: str, tmp_path: Path) -> None:
    teacher, student = TEACHERS[name](), tiny.network()
    next(teacher.children()).eval()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    flags = [(module.training, p.requires_grad) for module in teacher.modules() for p in module.parameters()]
    result = one_round(teacher, student, tmp_path, objective=ObjectiveConfig(preset="baseline"))
    assert result.student is student
    assert not tiny.same_weights(student, tiny.network())
    assert set(result.rounds) > {"generator/bn"}
    after = teacher.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert flags == [(module.training, p.requires_grad) for module in teacher.modules() for p in module.parameters()]


def test_the_network_in_a_wrapper_is_trained(tmp_path: Path) -> None:
    student = nn.DataParallel(AveragedModel(tiny.network()))
    result = one_round(tiny.teacher(), student, tmp_path)
    assert result.student is student.module.module
    assert not tiny.same_weights(result.student, tiny.network())


def test_networks_in_distributed_data_parallel(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        teacher, student = (nn.parallel.DistributedDataParallel(each) for each in (tiny.teacher(), tiny.network()))
        result = one_round(teacher, student, tmp_path)
        assert result.student is student.module
        assert not tiny.same_weights(result.student, tiny.network())
        export(student, tmp_path / "export", image_size=tiny.SIZE)
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_is_float32_with_default_dtype_float64(tmp_path: Path) -> None:
    teacher, student = tiny.teacher(), tiny.network()
    torch.set_default_dtype(torch.float64)
    try:
        result = one_round(teacher, student, tmp_path, engine="eager")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in result.generator.parameters()} == {torch.float32}
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_students_of_other_dtypes_are_trained_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    student, buffer = tiny.network().to(dtype), "bn1.running_mean"
    kept = student.get_buffer(buffer)
    result = one_round(tiny.teacher().to(dtype), student, tmp_path)
    saved = load_file(tmp_path / "student.safetensors")
    assert all(each.dtype in (torch.float32, torch.int64) for each in saved.values())
    assert result.student is student
    assert student.get_buffer(buffer) is kept
    for name, tensor in student.state_dict().items():
        assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.int64)
        assert torch.equal(tensor, saved[name].to(tensor.dtype))
    assert not tiny.same_weights(student, tiny.network().to(dtype))


def test_a_failed_run_gives_the_student_back_in_its_dtype(tmp_path: Path) -> None:
    student = tiny.network().double()
    with pytest.raises(ValueError, match="image_size must be set"):
        distill(tiny.teacher(), student, tiny.config(tmp_path, image_size=None), progress=False)
    assert {p.dtype for p in student.parameters()} == {torch.float64}


def test_teach_trains_other_dtypes_in_float32(tmp_path: Path) -> None:
    model = tiny.network().double()
    config = TeachConfig(epochs=1, batch_size=4, device="cpu", out=str(tmp_path), precision="fp32")
    result = teach(model, tiny.data(), config, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert load_file(result.weights)["fc.weight"].equal(model.fc.weight.float())


@pytest.mark.parametrize("preset", ["dfad", "dafl"])
def test_a_vision_transformer_for_objectives_without_stages(preset: str, tmp_path: Path) -> None:
    objective = ObjectiveConfig(preset=preset)
    student = vit() if preset == "dfad" else tiny.network()
    assert one_round(vit(), student, tmp_path, objective=objective).agreement >= 0


class _Branch(nn.Module):
    """Cannot be traced: it branches on its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny.teacher()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x if x.sum() > 0 else -x)


def test_a_network_that_cannot_be_traced_for_objectives_on_logits(tmp_path: Path) -> None:
    result = one_round(_Branch(), tiny.network(), tmp_path, objective=ObjectiveConfig(preset="dfad"), engine="eager")
    assert result.agreement >= 0
    with pytest.raises(ValueError, match=r"_Branch cannot be traced by torch\.fx"):
        one_round(_Branch(), tiny.network(), tmp_path / "b", objective=ObjectiveConfig(preset="dafl"))


def shared_layer() -> tuple[nn.Module, nn.Module]:
    teacher, student = tiny.network(), tiny.network()
    student.layer1 = teacher.layer2
    return teacher, student


def shared_weight() -> tuple[nn.Module, nn.Module]:
    teacher, student = tiny.network(), tiny.network()
    student.load_state_dict({"fc.bias": teacher.fc.bias}, strict=False, assign=True)
    return teacher, student


def shared_dropout() -> tuple[nn.Module, nn.Module]:
    drop = nn.Dropout()
    return nn.Sequential(tiny.teacher(), drop), nn.Sequential(tiny.network(), drop)


def same_network() -> tuple[nn.Module, nn.Module]:
    model = tiny.network()
    return nn.DataParallel(model), extract(model, image_size=tiny.SIZE)


def grey() -> nn.Module:
    model = tiny.network()
    model.conv1 = nn.Conv2d(1, 4, 3, padding=1)
    return model


def not_finite() -> nn.Module:
    model = tiny.network()
    with torch.no_grad():
        model.fc.bias[1] = torch.nan
        model.bn1.running_var[:2] = torch.inf
    return model


REFUSED: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    r"share modules \(CifarResNet\): the same network": same_network,
    r"module 'layer2' is the student's 'layer1'\. Give the student a copy": shared_layer,
    r"the teacher's 'fc\.bias' is the student's 'fc\.bias'": shared_weight,
    r"share modules \(Dropout\): module '1' is the student's '1'": shared_dropout,
    "student has no weight that requires a gradient": lambda: (tiny.teacher(), tiny.network().requires_grad_(False)),
    r"the teacher takes images with 1 channel\(s\), but the generator makes RGB": lambda: (grey(), tiny.network()),
    r"NaN or infinite: fc\.bias \(1 of 5 values\), bn1\.running_var \(2 of 4": lambda: (not_finite(), tiny.network()),
    r"the teacher only has 0\.bn1, .*set the term's weight to 0": lambda: (untracked(), tiny.network()),
}


def untracked() -> nn.Module:
    model = nn.Sequential(tiny.teacher(), nn.Identity())
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(module.num_features, track_running_stats=False)
            model.get_submodule(path.rpartition(".")[0]).add_module(path.rpartition(".")[2], norm)
    return model


@pytest.mark.parametrize("message", REFUSED)
def test_networks_that_are_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        one_round(*REFUSED[message](), tmp_path)


def test_copies_and_shared_activations_are_accepted(tmp_path: Path) -> None:
    teacher = tiny.teacher()
    student = copy.deepcopy(teacher)
    student.relu = teacher.relu
    one_round(teacher, student, tmp_path)
    assert tiny.same_weights(teacher, tiny.teacher())
