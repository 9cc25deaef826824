"""The commands as a user types them, on tiny networks."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from dfkd_fast.cli import COMMANDS, main
from dfkd_fast.config import ExperimentConfig, ModelConfig, read
from dfkd_fast.models import create_model, read_metadata, save_weights

EXPERIMENT = {
    "data": {"name": "digits", "image_size": 16},
    "teacher": {"name": "resnet8", "options": {"widths": [4, 4, 8, 12]}},
    "student": {"name": "resnet8", "options": {"widths": [4, 4, 6, 8]}},
    "teach": {"epochs": 1, "device": "cpu", "lr": 0.1},
    "distill": {
        "device": "cpu",
        "generator": {"latent_dim": 6, "channels": [8, 8, 8, 8, 8]},
        "objective": {"student": {"sfcl": 1.0}},
        "loop": {"epochs": 1, "rounds_per_epoch": 2, "generator_steps": 1, "student_steps": 1, "batch_size": 8},
    },
}

GENERATOR = json.dumps(EXPERIMENT["distill"]["generator"])  # type: ignore[index]


@pytest.fixture
def experiment(tmp_path: Path) -> str:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT))
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a teacher's weights that `dfkd-fast teach` wrote."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    main(["teach", "--config", str(folder / "experiment.yaml"), "--out", str(folder / "taught")])
    return str(folder / "taught" / "teacher.safetensors")


def test_distill_evaluate_export(
    experiment: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["distill", "--config", experiment, "--teacher.weights", teacher, "--out", "run"])
    student = tmp_path / "run" / "student.safetensors"
    assert read_metadata(student)["model"] == "resnet8"
    assert "agreement" in capsys.readouterr().out

    main(["distill", "--config", experiment, "--teacher.weights", teacher, "--out", "run", "--resume"])

    for data in (["--config", experiment], ["--data.name", "digits", "--data.image_size", "16"]):
        main(["evaluate", "--weights", str(student), *data, "--device", "cpu"])
        assert "360" in capsys.readouterr().out  # held-out images, a fifth of 1,797 scans

    main(["export", "--weights", str(student)])
    assert (tmp_path / "run" / "export" / "student.onnx").is_file()
    assert (tmp_path / "run" / "export" / "student.safetensors").is_file()
    check_card(tmp_path / "run", capsys.readouterr().out)


def check_card(run: Path, shown: str) -> None:
    """The card of a run on digits: its metadata and numbers, and its code, which gives one result twice."""
    card = ModelCard.load(run / "export" / "README.md")
    epochs = json.loads((run / "history.json").read_text())["epochs"]
    assert card.data.library_name == "dfkd-fast"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license is None
    found = [(each.metric_type, each.dataset_name, each.metric_value) for each in card.data.eval_results]
    assert found == [
        ("accuracy", "digits", round(epochs["accuracy"][-1], 6)),
        ("agreement", "synthetic images", round(epochs["agreement"][-1], 6)),
    ]
    for row in (
        "| network | `resnet8`",
        "| teacher | `resnet8` |",
        "| method | `dfkd-fgvc`, images of `online` |",
        "| data set | `digits` |",
        "| image size | 16 x 16 pixels, RGB |",
        "| classes | 10: `0`, `1`, `2`, `3`, `4`, `5`, `6`, `7`, `8`, `9` |",
        f"| accuracy on held-out images | {epochs['accuracy'][-1]:.2%} |",
    ):
        assert row in card.content
    assert "README.md" in shown
    Image.new("RGB", (20, 30), (200, 90, 10)).save(run / "export" / "image.png")
    names: dict[str, Any] = {}
    for code in re.findall(r"(?s)```python\n(.*?)```", card.content):
        with contextlib.chdir(run / "export"):
            exec(code, names)
    assert names["images"].shape == (1, 3, 16, 16)
    with torch.no_grad():
        expected = names["model"](names["images"]).numpy()
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-3, atol=1e-4)  # those of ONNX Runtime


def test_distill_works_without_data(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {name: value for name, value in EXPERIMENT.items() if name != "data"}
    (tmp_path / "no_data.yaml").write_text(yaml.safe_dump(content))
    main(["distill", "--config", str(tmp_path / "no_data.yaml"), "--teacher.weights", teacher, "--out", "run"])
    # Classes, image size and normalization come from the weights file.
    assert (tmp_path / "run" / "student.safetensors").is_file()
    assert "top-1" not in capsys.readouterr().out.rsplit("agreement", 1)[1]
    # A config may name a data set without its folder. The weights file still determines the number of classes.
    content = EXPERIMENT | {"data": {"name": "aircraft", "image_size": 16}}
    (tmp_path / "no_root.yaml").write_text(yaml.safe_dump(content))
    main(["distill", "--config", str(tmp_path / "no_root.yaml"), "--teacher.weights", teacher, "--out", "no_root"])
    assert "no --data.root: the student is not evaluated" in capsys.readouterr().out
    assert read_metadata(tmp_path / "no_root" / "student.safetensors")["num_classes"] == "10"


def test_command_line_overrides_the_config_file(experiment: str, teacher: str, tmp_path: Path) -> None:
    arguments = ["--teacher.weights", teacher, "--out", "run", "--distill.loop.rounds_per_epoch", "1"]
    main(["distill", "--config", experiment, *arguments, "--distill.objective.student.mhad", "3"])
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["distill"]
    again = read(ExperimentConfig, tmp_path / "run" / "config.yaml")  # the written config can be run again
    assert again.teacher.weights == teacher
    assert again.student.options == {"widths": [4, 4, 6, 8]}
    assert again.data.name == "digits"
    assert saved["loop"]["rounds_per_epoch"] == 1
    assert saved["objective"]["student"] == {"sfcl": 1.0, "mhad": 3.0}


def test_teach_fine_tunes_weights_with_other_classes(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(**EXPERIMENT["teacher"])  # type: ignore[arg-type]
    save_weights(create_model(config, num_classes=7), tmp_path / "seven.safetensors", {})
    main(["teach", "--config", experiment, "--teacher.weights", "seven.safetensors", "--out", "taught"])
    assert "top-1" in capsys.readouterr().out
    assert read_metadata(tmp_path / "taught" / "teacher.safetensors")["num_classes"] == "10"
    main(["teach", "--config", experiment, "--teacher.weights", "seven.safetensors", "--out", "taught", "--resume"])
    shown = capsys.readouterr().out
    assert "top-1" in shown
    assert "images/s" not in shown  # the run was finished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--config", "{experiment}"], "--teacher.weights is required"),
        (["distill", "--config", "nowhere"], "no config file 'nowhere'; packaged configs: aircraft"),
        (["evaluate", "--config", "{experiment}", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["teach", "--config", "{experiment}", "--teach.device", "gpu"], "device must be 'auto' or a torch device"),
        (["teach", "--config", "{experiment}", "--teacher.name", "resnet9"], "resnet8"),
        (["teach", "--config", "{experiment}", "--teach.epohcs", "3"], "epohcs"),
        (["teach", "--data.name", "digits"], "--teacher.name is required"),
        (["evaluate", "--weights", "nowhere.safetensors"], "--data.name is required"),
        (["bench", "--nowhere"], "nowhere"),
        (["bench", "--count", "--tune"], "--count takes no --tune, --backends or --shapes"),
    ],
)
def test_user_errors_print_a_short_message_and_exit_with_2(
    experiment: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([word.format(experiment=experiment) for word in arguments])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 4  # without the list of all options


@pytest.fixture
def described(teacher: str, tmp_path: Path) -> Callable[..., str]:
    """Copies the teacher's weights with other metadata; None removes an entry."""

    def save(**changes: str | None) -> str:
        metadata = {**read_metadata(teacher), **changes}
        path = tmp_path / "described.safetensors"
        kept = {name: value for name, value in metadata.items() if value is not None}
        save_file(load_file(teacher), path, metadata=kept)
        return str(path)

    return save


def commands(weights: str) -> dict[str, list[str]]:
    """The commands that read a weights file's metadata, without an image size."""
    student = ["--student.name", "resnet8", "--student.options", "{widths: [4, 4, 6, 8]}"]
    options = ["--teacher.name", "resnet8", "--distill.device", "cpu", "--distill.generator", GENERATOR]
    loop = EXPERIMENT["distill"]["loop"]  # type: ignore[index]
    return {
        "evaluate": ["evaluate", "--weights", weights, "--data.name", "digits", "--device", "cpu"],
        "distill": [
            *("distill", "--teacher.weights", weights, "--data.name", "digits", "--out", "run"),
            *(*options, *student, "--distill.loop", json.dumps(loop)),
        ],
        "export": ["export", "--weights", weights],
    }


def test_image_size_and_options_come_from_the_weights_file(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(commands(teacher)["evaluate"])
    shown = re.search(r"top-1\D+([\d.]+%)", capsys.readouterr().out)
    main([*commands(teacher)["evaluate"], "--data.image_size", "16"])
    expected = re.search(r"top-1\D+([\d.]+%)", capsys.readouterr().out)
    assert shown is not None
    assert expected is not None
    assert shown[1] == expected[1]
    main(commands(teacher)["distill"])
    config = read(ExperimentConfig, tmp_path / "run" / "config.yaml")
    assert config.data.image_size == 16
    assert config.teacher.options == {"widths": [4, 4, 8, 12]}
    student, stored = (read_metadata(path) for path in (tmp_path / "run" / "student.safetensors", teacher))
    for name in ("image_size", "mean", "std", "classes", "num_classes"):
        assert student[name] == stored[name], name


def test_evaluate_compares_with_the_teacher(
    experiment: str,
    teacher: str,
    described: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--data.name", "digits", "--device", "cpu"]
    # The weights files name the networks.
    main(["evaluate", "--weights", teacher, *data, "--teacher.weights", teacher, "--json", "new/itself.json"])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "itself.json").read_text())
    assert found["measures"]["images"] == sum(found["measures"]["counts"]) == 360
    assert (found["measures"]["agreement"], found["measures"]["kl"]) == (1, 0)
    assert found["teacher_top1"] == found["measures"]["top1"]
    label, predicted, count = found["measures"]["confused"][0]
    assert re.search(rf"{found['classes'][label]}\W+{found['classes'][predicted]}\W+{count}\W", shown)
    for name in ("agreement with the teacher", "calibration error", "worst classes", "latency", f"{100:.2f}%"):
        assert name in shown, name
    assert found["cost"]["parameters"] == sum(
        value.numel() for name, value in load_file(teacher).items() if not re.search("running|tracked", name)
    )
    assert {"precision", "images_per_s", "environment"} <= found.keys()

    main(["evaluate", "--config", experiment, "--weights", teacher, "--device", "cpu", "--json", "without.json"])
    assert "agreement" not in capsys.readouterr().out
    found = json.loads((tmp_path / "without.json").read_text())
    assert found["teacher"] is found["measures"]["kl"] is None

    student = create_model(ModelConfig(**EXPERIMENT["student"]), num_classes=10)  # type: ignore[arg-type]
    weights = {**student.state_dict(), "fc.weight": torch.full((10, 8), 3e38)}  # the logits overflow
    metadata = {**read_metadata(teacher), "options": json.dumps(EXPERIMENT["student"]["options"])}  # type: ignore[index]
    save_file(weights, tmp_path / "huge.safetensors", metadata=metadata)
    main(["evaluate", "--weights", "huge.safetensors", *data, "--teacher.weights", teacher, "--json", "huge.json"])
    found = json.loads((tmp_path / "huge.json").read_text())["measures"]
    assert (found["not_finite"], found["top1"], found["agreement"], found["ece"], found["kl"]) == (
        360,
        0,
        0,
        None,
        None,
    )

    with pytest.raises(SystemExit):
        main(["evaluate", "--weights", teacher, *data, "--teacher.weights", described(model=None)])
    assert "described.safetensors does not name its network: set --teacher.name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": json.dumps([*"1023456789"])}, ["class 0", "'1'", "'0'"]),
        ({"classes": None, "num_classes": "7"}, ["num_classes", "7", "10"]),
        ({"image_size": "32"}, ["image_size", "16", "32"]),
        ({"mean": "[0.485, 0.456, 0.406]"}, ["mean", "0.485", "0.5"]),
        ({"model": "package:build"}, ["names the network 'package:build'", "set --teacher.name package:build"]),
    ],
)
def test_teacher_of_other_images_or_classes_is_refused(
    changes: dict[str, str | None],
    words: list[str],
    teacher: str,
    described: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*commands(teacher)["evaluate"], "--teacher.weights", described(**changes)])
    assert left.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in ("described.safetensors", *words):
        assert word in error


@pytest.mark.parametrize(
    ("command", "more", "changes", "words"),
    [
        ("evaluate", ["--data.image_size", "32"], {}, ["image_size", "16", "32"]),
        ("evaluate", [], {"mean": "[0.485, 0.456, 0.406]"}, ["mean", "0.485", "0.5"]),
        ("evaluate", [], {"std": "[0.229, 0.224, 0.225]"}, ["std", "0.229", "0.5"]),
        ("evaluate", [], {"classes": json.dumps([*"1023456789"])}, ["class 0", "'1'", "'0'"]),
        ("evaluate", [], {"classes": None, "num_classes": "7"}, ["num_classes", "7", "10"]),
        ("evaluate", [], {"num_classes": "7"}, ["num_classes 7", "10 names"]),
        ("evaluate", ["--model.name", "resnet8", "--model.options", "{widths: [2, 4, 8, 12]}"], {}, ["[2,", "[4,"]),
        ("evaluate", [], {"image_size": "16x16"}, ["image_size '16x16'", "not JSON"]),
        ("evaluate", [], {"std": "[0.5, NaN, 0.5]"}, ["std", "one finite number per channel"]),
        ("distill", ["--data.image_size", "32"], {}, ["image_size", "16", "32"]),
        ("distill", ["--distill.image_size", "32"], {}, ["image_size", "16", "32"]),
        ("distill", ["--distill.mean", "[0.1, 0.5, 0.5]"], {}, ["mean", "0.1", "0.5"]),
        ("distill", ["--num_classes", "7"], {}, ["num_classes", "7", "10"]),
        ("distill", [], {"classes": json.dumps([*"1023456789"])}, ["class 0", "'1'", "'0'"]),
        ("export", ["--image_size", "32"], {}, ["image_size", "16", "32"]),
        ("export", ["--num_classes", "7"], {}, ["num_classes", "7", "10"]),
    ],
)
def test_conflicts_with_the_weights_file_name_both_values(
    described: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    command: str,
    more: list[str],
    changes: dict[str, str | None],
    words: list[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*commands(described(**changes))[command], *more])
    assert left.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in ("described.safetensors", *words):
        assert word in error


def test_exported_files_contain_the_metadata(teacher: str, tmp_path: Path) -> None:
    main(["export", "--weights", teacher, "--out", "exported"])
    assert read_metadata(tmp_path / "exported" / "student.safetensors") == read_metadata(teacher)
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "student.onnx")
    assert session.get_modelmeta().custom_metadata_map == read_metadata(teacher)


def test_environment_variable_enables_tracebacks(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFKD_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"--teacher.weights"):
        main(["distill", "--config", experiment])


def test_help_lists_the_commands_and_only_the_options_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(sys.executable).with_name("dfkd-fast")
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--config", "--weights", "--data", "--model", "--device"))
    assert not any(option in shown for option in ("--teach.", "--student", "--distill"))


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["a", "b"], {"ops": ["a", "b"]}),
        (["a", "--tune", "--out=x"], {"ops": ["a"], "tune": True, "out": "x"}),
        (["--backends", "triton,peer:x", "a"], {"ops": ["a"], "backends": ["triton", "peer:x"]}),
    ],
)
def test_bench_parses_op_names_and_options(
    words: list[str], changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfkd_fast.benchmarks.ops import bench as module

    called: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "bench", lambda ops, **options: not called.append({"ops": ops, **options}))
    main(["bench", *words])
    defaults = {"ops": None, "shapes": "paper", "out": "runs/bench", "tune": False, "backends": None, "device": "cuda"}
    assert called == [{**defaults, **changed}]


def test_bench_counts_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfkd_fast.benchmarks import count as module

    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "count", lambda ops, *, out: called.append((ops, out)))
    main(["bench", "--count"])
    main(["bench", "--count", "distillation_kl", "--out=x"])
    assert called == [(None, module.FOLDER), (["distillation_kl"], "x")]


def test_evaluate_reads_torch_files(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**EXPERIMENT["student"])  # type: ignore[arg-type]
    state = create_model(config, num_classes=10).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "s.pt")
    widths = '{"widths": [4, 4, 6, 8]}'
    main(
        ["evaluate", "--weights", "s.pt", "--config", experiment, "--model.name", "resnet8", "--model.options", widths]
    )
    assert "top-1" in capsys.readouterr().out


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once the module ``evil`` was imported."""
    mark = tmp_path / "imported"
    factory = "def net(num_classes, **options):\n    raise ValueError('the factory ran')\n"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n{factory}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return mark


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("teacher: {name: 'evil:net'}", r"teacher\.name is 'evil:net' in a config file, which imports and runs code"),
        ("teacher: {name: resnet8}\ndistill: {generator: {name: 'evil:net'}}", r"generator\.name is 'evil:net' in a"),
        (
            "teacher: {name: resnet8}\ndistill: {generator: {name: 'torchvision:torch.hub.load'}}",
            r"distill\.generator\.name is 'torchvision:torch\.hub\.load' in a config file",
        ),
        ("teacher: {class_path: evil.Net}", r"unknown field teacher\.class_path"),
        ("distill: {loop: {class_path: evil.Net}}", r"unknown field distill\.loop\.class_path"),
        ("distill: {loop: nested.yaml}", r"distill\.loop must be a mapping of fields, got 'nested\.yaml'"),
        ("config: nested.yaml", "unknown field config"),
        ("seed: !!python/object/apply:evil.net [3]", "could not determine a constructor"),
    ],
)
def test_config_files_run_no_code(
    content: str, message: str, imported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(content)
    Path("nested.yaml").write_text("class_path: evil.Net")
    command = ["distill", "--config", "mine.yaml", "--num_classes", "3"]
    networks = ["--teacher.weights", "t.safetensors", "--student.name", "resnet8"]
    with pytest.raises(SystemExit):
        main([*command, *networks])
    assert re.search(message, capsys.readouterr().err)
    assert not imported.exists()


def test_other_files_with_settings_run_no_code(
    imported: Path, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("grid.yaml").write_text(
        f"title: t\nconfigs: ['{experiment}']\nchanges: {{teacher.name: 'evil:net'}}\naxes: {{a: {{b: {{}}}}}}"
    )
    Path("model.yaml").write_text(f"model: {{name: 'evil:net'}}\n{Path(experiment).read_text()}")
    commands = (
        ["sweep", "grid.yaml", "--dry-run"],
        ["reproduce", "grid.yaml"],
        ["evaluate", "--config", "model.yaml", "--weights", "s.safetensors"],
    )
    for command in commands:
        with pytest.raises(SystemExit):
            main(command)
        assert "is 'evil:net' in a config file, which imports and runs code" in capsys.readouterr().err, command
    assert not imported.exists()


def test_values_of_options_import_no_classes(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nested.yaml").write_text("class_path: evil.Net")
    for option in (["--teacher", "nested.yaml"], ["--teacher.class_path", "evil.Net"], ["--teacher", "evil.Net"]):
        with pytest.raises(SystemExit):
            main(["distill", *option])
        assert "is not allowed" in capsys.readouterr().err
    assert not imported.exists()


def test_factories_run_when_the_command_line_names_them(
    imported: Path, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(
        {"weight": torch.zeros(1)}, "evil.safetensors", {"model": "evil:net", "num_classes": "10", "image_size": "16"}
    )
    for command in (["export"], ["evaluate", "--config", experiment]):
        with pytest.raises(SystemExit):
            main([*command, "--weights", "evil.safetensors"])
        assert "names the network 'evil:net', which imports and runs code. If you trust" in capsys.readouterr().err
    assert not imported.exists()
    with pytest.raises(SystemExit):
        main(["export", "--weights", "evil.safetensors", "--model.name", "evil:net"])
    assert "the factory ran" in capsys.readouterr().err
    imported.unlink()
    Path("mine.yaml").write_text("teacher: {name: 'evil:net', weights: evil.safetensors}")
    with pytest.raises(SystemExit):
        main(["teach", "--config", "mine.yaml", "--teacher.name", "evil:net", "--data.name", "digits"])
    assert "the factory ran" in capsys.readouterr().err


def test_distill_from_a_backbone_and_evaluate_in_bf16(
    experiment: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(**EXPERIMENT["student"])  # type: ignore[arg-type]
    backbone = create_model(config, num_classes=7)
    save_weights(backbone, tmp_path / "backbone.safetensors")
    loop = ["--distill.optimizer.student_lr", "0", "--distill.loop.student_in_generator_step", "eval"]
    networks = ["--teacher.weights", teacher, "--student.weights", "backbone.safetensors"]
    with pytest.raises(SystemExit):
        main(["distill", "--config", experiment, *networks, *loop, "--out", "run"])
    assert "fc.weight" in capsys.readouterr().err
    main(["distill", "--config", experiment, *networks, "--student.new_head", "true", *loop, "--out", "run"])
    student = load_file(tmp_path / "run" / "student.safetensors")
    assert student["conv1.weight"].equal(backbone.conv1.weight)
    assert student["fc.bias"].shape == (10,)
    main(["evaluate", "--config", experiment, "--weights", "run/student.safetensors", "--precision", "bf16"])
    assert "top-1" in capsys.readouterr().out


def test_weights_file_cannot_name_code_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hubconf.py").write_text("open('ran', 'w')")
    options = {"repo_or_dir": ".", "model": "x", "source": "local", "trust_repo": True}
    metadata = {"model": "torch:hub.load", "options": json.dumps(options), "num_classes": "10", "image_size": "16"}
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", metadata=metadata)
    for command in (["evaluate", "--data.name=digits"], ["export"]):
        with pytest.raises(SystemExit):
            main([*command, "--weights=w.safetensors"])
        assert (
            "names the network 'torch:hub.load', which imports and runs code. If you trust" in capsys.readouterr().err
        )
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SystemExit):
        main(
            [
                "export",
                "--weights=w.safetensors",
                "--model.name=timm:resnet18",
                '--model.options={"checkpoint_path": "x"}',
            ]
        )
    assert "ModelConfig.options must not contain 'checkpoint_path'" in capsys.readouterr().err


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("distill:\n  autotune: fa")
    with pytest.raises(SystemExit):
        main(["distill", "--config=c.yaml"])
    assert re.fullmatch(r"error: c\.yaml: .*distill\.autotune.*Got value: fa\n", capsys.readouterr().err)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("dfkd_fast.doctor.doctor", fail)
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert capsys.readouterr().err == "error: not enough memory\n"
