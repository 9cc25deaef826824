"""Figures, tables and result files."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dfkd_fast import report


def text_of(table, width=120):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


class TestImageGrid:
    def test_layout_and_pixel_values(self, tmp_path):
        images = torch.stack([torch.full((3, 4, 6), value) for value in (-1.0, 0.0, 1.0)])
        path = report.save_image_grid(images, tmp_path / "deep" / "grid.png", columns=2)
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (2 * (4 + 2) + 2, 2 * (6 + 2) + 2, 3)
        assert (pixels[2:6, 2:8] == 0).all()
        assert (abs(pixels[2:6, 10:16].astype(int) - 128) <= 1).all()
        assert (pixels[8:12, 2:8] == 255).all()

    def test_clipping_and_non_finite_pixels(self, tmp_path):
        images = torch.zeros(2, 3, 2, 2)
        images[0, :, 0, 0] = 7.0
        images[0, 1, 0, 1] = float("nan")
        images[0, 0, 1, 0] = float("inf")
        pixels = np.asarray(Image.open(report.save_image_grid(images, tmp_path / "grid.png")))[2:4, 2:4]
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels[0, 1].tolist() == [255, 0, 255]
        assert pixels[1, 0].tolist() == [255, 0, 255]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes_and_memory_format(self, tmp_path, dtype):
        images = torch.rand(3, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        assert report.save_image_grid(images, tmp_path / "grid.png").stat().st_size > 0

    @pytest.mark.parametrize(
        ("images", "columns", "error", "words"),
        [
            (torch.zeros(2, 1, 4, 4), 8, ValueError, r"images .*\(2, 1, 4, 4\)"),
            (torch.zeros(0, 3, 4, 4), 8, ValueError, r"images .*\(0, 3, 4, 4\)"),
            (torch.zeros(3, 4, 4), 8, ValueError, "images"),
            (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 8, TypeError, "images .*uint8"),
            (torch.zeros(1, 3, 4, 4), 0, ValueError, "columns .*0"),
        ],
    )
    def test_rejects_invalid_arguments(self, tmp_path, images, columns, error, words):
        with pytest.raises(error, match=words):
            report.save_image_grid(images, tmp_path / "grid.png", columns=columns)
        assert not (tmp_path / "grid.png").exists()


class TestCurves:
    @pytest.mark.parametrize("count", [1, 5, 250])
    def test_gaps_and_long_runs(self, tmp_path, count):
        rounds = {
            "round": list(range(count)),
            "generator/bn": [10.0 ** (3 * i / count) for i in range(count)],
            "student/kd": [math.nan if i % 3 else -1.0 for i in range(count)],
        }
        epochs = {"epoch": [1, 2], "agreement": [0.2, 0.9], "accuracy": [math.nan, 0.8]}
        path = report.save_curves(rounds, epochs, tmp_path / "deep" / "curves.png")
        width, height = Image.open(path).size
        assert width > height > 100

    def test_empty_run(self, tmp_path):
        assert report.save_curves({}, {}, tmp_path / "curves.png").stat().st_size > 0
        assert report.save_curves({"round": [], "a": []}, {"epoch": []}, tmp_path / "b.svg").exists()

    def test_svg_has_term_names_and_final_accuracy(self, tmp_path):
        from matplotlib import rc_context

        with rc_context({"svg.fonttype": "none"}):
            path = report.save_curves(
                {"round": [0, 1], "student/mhad": [2.0, 1.0]}, {"epoch": [1], "accuracy": [0.625]}, tmp_path / "c.svg"
            )
        words = path.read_text()
        assert "student/mhad" in words
        assert "accuracy: 62.5 %" in words

    @pytest.mark.parametrize(
        ("rounds", "epochs", "words"),
        [
            ({"round": [0, 1], "kd": [1.0]}, {}, r"rounds\['kd'\].*1 for 2"),
            ({"kd": [1.0]}, {}, "rounds must have a series 'round'"),
            ({}, {"epoch": [], "accuracy": [1.0]}, r"epochs\['accuracy'\].*1 for 0"),
        ],
    )
    def test_rejects_invalid_arguments(self, tmp_path, rounds, epochs, words):
        with pytest.raises(ValueError, match=words):
            report.save_curves(rounds, epochs, tmp_path / "curves.png")


class TestTable:
    def test_column_order_and_alignment(self):
        table = report.result_table(
            [{"network": "a", "top-1": "9.5%"}, {"network": "b", "top-1": "90.0%", "note": None}], "digits"
        )
        assert [str(column.header) for column in table.columns] == ["network", "top-1", "note"]
        assert [column.justify for column in table.columns] == ["left", "right", "left"]
        printed = text_of(table)
        assert "digits" in printed
        assert re.search(r"b\s+│\s+90.0%", printed)

    def test_markup_in_values_is_escaped(self):
        assert "[bold]x[/] [0]" in text_of(report.result_table([{"[red]path": "[bold]x[/] [0]"}], "[i]title"))

    def test_no_rows(self):
        table = report.result_table([], "nothing")
        assert not table.columns
        assert not table.row_count
        text_of(table)


def test_markdown_table_aligns_numbers_and_escapes_bars():
    rows = [{"name": "a|b", "ms": "1.5"}, {"name": "c", "ms": "12"}]
    assert report.markdown_table(rows) == ["| name | ms |", "|---|---:|", "| a\\|b | 1.5 |", "| c | 12 |"]


class TestResults:
    def test_environment(self):
        block = report.environment()
        assert block["torch"] == torch.__version__
        assert block["device"]["name"]
        assert re.fullmatch(r"[0-9a-f]{12}", block["source"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", block["date"])
        assert block["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", block["commit"])
        json.dumps(block, allow_nan=False)

    def test_slug(self):
        assert report.device_slug("NVIDIA H200") == "nvidia-h200"
        assert report.device_slug("NVIDIA GeForce RTX(TM) 4090 ") == "nvidia-geforce-rtx-tm-4090"

    def test_round_trip_and_non_finite_numbers(self, tmp_path):
        path = tmp_path / "a" / "b.json"
        assert report.read_results(path) is None
        report.write_results(path, {"rows": [{"ms": 1.5, "bad": math.nan, "pair": (1, -math.inf)}]})
        assert report.read_results(path) == {"rows": [{"ms": 1.5, "bad": None, "pair": [1, None]}]}
        assert [file.name for file in path.parent.iterdir()] == ["b.json"]

    def test_failed_write_keeps_the_old_file(self, tmp_path):
        path = report.write_results(tmp_path / "r.json", {"rows": 1})
        with pytest.raises(TypeError):
            report.write_results(path, {"rows": object()})
        assert report.read_results(path) == {"rows": 1}
        assert [file.name for file in tmp_path.iterdir()] == ["r.json"]

    @pytest.mark.parametrize("text", ['{"rows": [1, 2', "[1]", ""])
    def test_rejects_other_files(self, tmp_path, text):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match=r"r\.json is not a result file"):
            report.read_results(tmp_path / "r.json")


def test_images_side_by_side(tmp_path):
    for name, color, size in (("a", (255, 0, 0), (4, 6)), ("b", (0, 0, 255), (3, 2))):
        Image.new("RGB", size, color).save(tmp_path / f"{name}.png")
    path = report.save_beside([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "new" / "both.png", scale=2, gap=5)
    both = Image.open(path)
    assert both.size == (8 + 5 + 6, 12)
    assert [both.getpixel(at) for at in ((0, 11), (7, 0), (8, 0), (13, 3), (18, 4))] == [
        (255, 0, 0),
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
        (255, 255, 255),
    ]
    with pytest.raises(ValueError, match="pictures must be at least one"):
        report.save_beside([], path)
