"""`predict` and its command: classes of images in files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dfkd_fast import predict
from dfkd_fast.cli import main
from dfkd_fast.engine import Prediction, write_predictions
from dfkd_fast.models import Outputs, save_weights

from .. import tiny

MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)
SIZES = {"image_size": 8, "mean": MEAN, "std": STD}


class _Brightest(nn.Module):
    """Six logits: twice the mean of each channel, and three constants."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([-1.0, -1.5, -2.0]))

    def forward(self, x: Tensor) -> Outputs:
        assert not self.training
        means = x.mean((2, 3))
        return Outputs(torch.cat([2 * means, self.bias.expand_as(means)], 1), (), means)


def expected(color: tuple[int, int, int]) -> list[float]:
    """The probabilities of :class:`_Brightest` for an image of one color."""
    means = [(value / 255 - m) / s for value, m, s in zip(color, MEAN, STD, strict=True)]
    powers = [math.exp(logit) for logit in [*(2 * each for each in means), -1, -1.5, -2]]
    return [power / sum(powers) for power in powers]


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, tuple[int, int, int]]:
    """Images of one color in a tree, in the order of their paths: five to classify and one that is hidden."""
    colors = {f"photos/{i}.png": (200 - 40 * i, 50 * i, 10 + 30 * i) for i in range(3)}
    colors |= {"photos/deep/er/a.JPEG": (30, 30, 30), "photos/deep/b.bmp": (0, 250, 128)}
    for name, color in (colors | {"photos/.thumbnails/c.png": (0, 0, 0)}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 13), color).save(tmp_path / name, quality=100)
    (tmp_path / "photos/notes.txt").write_text("no image")
    return dict(sorted(colors.items(), key=lambda item: (str(Path(item[0]).parent), item[0])))


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_of_files_and_folders(workers: int, folder: dict[str, tuple[int, int, int]]) -> None:
    model, names = _Brightest().train(), [*"abcdef"]
    found = list(predict(model, ["photos"], classes=names, top=2, batch_size=2, workers=workers, **SIZES))
    assert [str(each.path) for each in found] == [*folder]
    for each, color in zip(found, folder.values(), strict=True):
        best = sorted(zip(expected(color), names, strict=True), key=lambda pair: -pair[0])[:2]
        assert each.classes == tuple(name for _, name in best)
        tolerance = 0.05 if each.path.suffix == ".JPEG" else 1e-5  # JPEG is lossy
        assert each.probabilities == pytest.approx([value for value, _ in best], abs=tolerance)
    assert model.training
    (single,) = predict(model, ["photos/1.png"], top=9, **SIZES)
    assert sorted(single.classes) == [*"012345"]
    assert sum(single.probabilities) == pytest.approx(1)


def test_images_that_cannot_be_read_do_not_end_the_others(folder: dict[str, tuple[int, int, int]]) -> None:
    Path("photos/1.png").write_bytes(Path("photos/1.png").read_bytes()[:40])
    found = list(predict(_Brightest(), ["missing.png", "photos"], batch_size=3, **SIZES))
    errors = {str(each.path): each.error for each in found if each.error}
    assert errors.keys() == {"missing.png", "photos/1.png"}
    assert all(error.startswith(f"cannot read the image {path}: ") for path, error in errors.items())
    good = [each for each in found if each.error is None]
    assert [each.probabilities[0] for each in good] == pytest.approx(
        [max(expected(color)) for name, color in folder.items() if name != "photos/1.png"], abs=0.05
    )


def test_logits_that_are_not_finite_are_errors(folder: dict[str, tuple[int, int, int]]) -> None:
    model = _Brightest()
    model.bias.data.fill_(math.nan)
    assert {each.error for each in predict(model, ["photos/0.png"], **SIZES)} == {
        "the logits of photos/0.png are not finite"
    }


def test_progress_counts_images(folder: dict[str, tuple[int, int, int]]) -> None:
    calls: list[tuple[int, int]] = []
    done = predict(_Brightest(), ["photos"], batch_size=2, progress=lambda *now: calls.append(now[:2]), **SIZES)
    assert next(done).path == Path("photos/0.png")
    assert calls == []  # batches are read when they are needed
    assert len(list(done)) == 4
    assert calls == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        ([], {}, r"no images to classify: no file or folder was given; image files end with \.jpg, "),
        (["empty", "more"], {}, "no images to classify: empty, more; image files end with"),
        (["x.png"], {"top": 0}, "top must be at least 1, got 0"),
        (["$UNSET/x.png"], {}, "the environment variable \\$UNSET is not set"),
    ],
)
def test_arguments_are_checked_at_once(images: list[str], changes: dict[str, int], message: str) -> None:
    for name in ("empty", "more"):
        Path(name).mkdir()
    with pytest.raises(ValueError, match=message):
        predict(_Brightest(), images, **SIZES, **changes)  # type: ignore[arg-type]


def test_rows_are_written_as_soon_as_they_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("csv", "json"):
        seen: list[str] = []

        def predictions(seen: list[str] = seen):  # type: ignore[no-untyped-def]
            for name in ("a,b.png", 'c"d.png'):
                yield Prediction(path=Path(name), classes=("Boeing 707, 320", "x"), probabilities=(0.75, 0.25))
                seen.append(capsys.readouterr().out)

        assert write_predictions(predictions(), format=kind) == 0  # type: ignore[arg-type]
        assert all(seen)
        text = "".join(seen) + capsys.readouterr().out
        if kind == "csv":
            assert list(csv.reader(io.StringIO(text))) == [
                ["path", "class", "probability", "class_2", "probability_2"],
                ["a,b.png", "Boeing 707, 320", "0.75", "x", "0.25"],
                ['c"d.png', "Boeing 707, 320", "0.75", "x", "0.25"],
            ]
        else:
            best = {"class": "Boeing 707, 320", "probability": 0.75}
            top = [best, {"class": "x", "probability": 0.25}]
            assert json.loads(text) == [{"path": name, **best, "top": top} for name in ("a,b.png", 'c"d.png')]


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., str]:
    """Writes the weights of a tiny network with metadata."""

    def write(**metadata: str) -> str:
        described = {"model": "resnet8", "options": '{"widths": [4, 4, 6, 8]}', "image_size": "16"}
        described |= {"classes": json.dumps([*"vwxyz"]), "mean": "[0.2, 0.4, 0.6]", "std": "0.5"}
        save_weights(tiny.network(), tmp_path / "w.safetensors", {**described, **metadata})
        return str(tmp_path / "w.safetensors")

    return write


def test_command_uses_the_metadata_of_the_weights(
    weights: Callable[..., str], folder: dict[str, tuple[int, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", "photos/0.png", "photos/2.png", "--weights", weights(), "--top", "3", "--device", "cpu"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    model = tiny.network().eval()
    model.load_state_dict(load_file("w.safetensors"))
    for row, name in zip(rows, ("photos/0.png", "photos/2.png"), strict=True):
        color = [(value / 255 - mean) / 0.5 for value, mean in zip(folder[name], MEAN, strict=True)]
        probabilities = model(torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 16, 16)).softmax(1)[0]
        best = probabilities.topk(3)
        assert (row["path"], row["class"], row["class_2"], row["class_3"]) == (
            name,
            *("vwxyz"[i] for i in best.indices),
        )
        assert float(row["probability"]) == pytest.approx(best.values[0].item(), abs=1e-5)


def test_command_reports_broken_images_and_ends_with_status_1(
    weights: Callable[..., str], folder: dict[str, tuple[int, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos/1.png").write_bytes(b"broken")
    options = ["--weights", weights(), "--format", "json", "--out", "result.json", "--device", "cpu"]
    with pytest.raises(SystemExit) as left:
        main(["predict", "photos", *options])
    assert left.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    rows = json.loads(Path("result.json").read_text())
    assert [row["path"] for row in rows] == [name for name in folder if name != "photos/1.png"]
    assert all(len(row["top"]) == 5 and row["top"][0]["class"] == row["class"] in "vwxyz" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos/deep/er/nothing"], "cannot read the image"),
        ([], "error: no images to classify: no file or folder was given"),
        (["photos", "--image_size", "32"], "image_size is 16 in"),
    ],
)
def test_command_prints_one_line_per_error(
    arguments: list[str],
    message: str,
    weights: Callable[..., str],
    folder: dict[str, tuple[int, int, int]],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["predict", *arguments, "--weights", weights(), "--device", "cpu"])
    error = capsys.readouterr().err or caplog.text
    assert left.value.code == (1 if "nothing" in str(arguments) else 2)
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_weights_without_metadata_need_options(
    folder: dict[str, tuple[int, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tiny.network().state_dict(), "w.pt")
    command = ["predict", "photos/0.png", "--weights", "w.pt", "--model.name", "resnet8", "--device", "cpu"]
    command += ["--model.options", '{"widths": [4, 4, 6, 8]}']
    with pytest.raises(SystemExit):
        main(command)
    assert "set --num_classes and --image_size" in capsys.readouterr().err
    main([*command, "--num_classes", "5", "--image_size", "16"])
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["class"] in "01234"
