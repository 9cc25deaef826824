"""The page of `dfkd-fast report`: what it gathers, and how it renders in headless Chromium, if that is installed."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dfkd_fast import data, run_page
from dfkd_fast.cli import main
from dfkd_fast.config import DataConfig, ModelConfig, ObjectiveConfig, to_dict
from dfkd_fast.engine import Runtime, distill
from dfkd_fast.models import create_model, load_weights, save_weights
from dfkd_fast.nn import SpatialAttention
from dfkd_fast.sweep import SweepConfig, cell_folder, export

from .. import tiny
from .test_docs_site import OVERLAPS, browser  # noqa: F401 - a fixture

DIGITS = DataConfig(name="digits", image_size=16)
TEACHER, STUDENT = (ModelConfig(name="resnet8", options={"widths": each}) for each in ([4, 4, 8, 12], [4, 4, 6, 8]))


def run(folder: Path, name: str, of: DataConfig, **changes: Any) -> None:
    """Distill an untrained teacher, as the command ``distill`` does. Its weights are next to the run's folder."""
    images = data.load(of)
    torch.manual_seed(0)
    teacher, student = (create_model(each, num_classes=images.num_classes) for each in (TEACHER, STUDENT))
    save_weights(teacher, folder / "teacher.safetensors")
    inputs = {
        "data": to_dict(of),
        "teacher": to_dict(replace(TEACHER, weights="teacher.safetensors")),
        "student": to_dict(STUDENT),
    }
    distill(teacher, student, tiny.config(folder / name, **changes), data=images, inputs=inputs, progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the full method on digits, one of the baseline, and one of given networks without data."""
    folder = tmp_path_factory.mktemp("runs")
    for name, preset in (("full", "dfkd-fgvc"), ("baseline", "baseline")):
        run(folder, name, DIGITS, objective=ObjectiveConfig(preset=preset))
    distill(tiny.teacher(), tiny.network(), tiny.config(folder / "given"), progress=False)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer points, because a t-SNE takes seconds."""
    monkeypatch.setattr(run_page, "_POINTS", 24)


def opened(folder: Path, **options: Any) -> Any:
    runtime = Runtime.of("cpu", "fp32", channels_last=False)
    return run_page._Run(folder, runtime, options.get("root"), options.get("trust", False))


def plain_student(folder: Path) -> torch.nn.Module:
    model = create_model(STUDENT, num_classes=10)
    load_weights(model, folder / "student.safetensors")
    return model.eval()


def test_a_run_saves_the_attention_modules_of_its_last_step(tmp_path: Path) -> None:
    seen = {}

    def keep(_: object, state: Any) -> None:
        seen.update(state.student.objective.kinds()["mhad"].state_dict())

    distill(tiny.teacher(), tiny.network(), tiny.config(tmp_path), callbacks=[keep], progress=False)
    saved = load_file(tmp_path / "attention.safetensors")
    assert saved.keys() == seen.keys()
    assert all(torch.equal(saved[name], value) for name, value in seen.items())
    assert {name.split(".")[0] for name in saved} == {"adapters", "student_attention", "teacher_attention"}


def test_runs_without_attention_modules_save_none(runs: Path) -> None:
    assert (runs / "full" / "attention.safetensors").exists()
    assert not (runs / "baseline" / "attention.safetensors").exists()


@pytest.mark.parametrize("form", ["spatial", "spatial_mean1", "channel"])
def test_the_gate_is_the_factor_of_the_features(form: Any) -> None:
    torch.manual_seed(0)
    module = SpatialAttention(8, reduction=2, scale=0.5, form=form).eval()
    features = torch.randn(2, 8, 4, 4)
    gate = module.attention(features)
    torch.testing.assert_close(gate * features, module(features))
    mean = {"spatial": 1 + 0.5 / 16, "spatial_mean1": 1.5, "channel": 1 + 0.5 / 8}[form]  # of a softmax
    assert gate.mean().item() == pytest.approx(mean, rel=1e-5)


def test_results_are_those_of_the_networks(runs: Path) -> None:
    held_out, run = data.load(DIGITS).test, opened(runs / "full")
    images, labels = torch.stack([image for image, _ in held_out]), torch.tensor([label for _, label in held_out])
    with torch.no_grad():
        predicted = plain_student(runs / "full")(images).argmax(1)
        expected = run.teacher.model(images).argmax(1)
    found = run_page._result(run)
    assert found["top1"] == pytest.approx((predicted == labels).double().mean().item())
    assert found["teacher"] == pytest.approx((expected == labels).double().mean().item())
    assert found["agreement"] == pytest.approx((predicted == expected).double().mean().item())
    assert found["images"] == 360


def test_the_gated_student_multiplies_its_last_map_by_the_attention(runs: Path) -> None:
    """The networks have different numbers of channels, so the factor is the mean of the attention over channels."""
    run, model = opened(runs / "full"), plain_student(runs / "full")
    images = run.held_out(3)[0]
    weights = {name: value.double() for name, value in load_file(runs / "full" / "attention.safetensors").items()}
    maps = []
    model.get_submodule(run.student.stages[-1]).register_forward_hook(lambda *each: maps.append(each[-1].double()))
    with torch.no_grad(), run_page._gated(run):
        model(images)
        found = run.student.model(images)
        plain = maps[0]
        adapted = torch.einsum("nchw,dc->ndhw", plain, weights["adapters.2.weight"][:, :, 0, 0])
        z = torch.einsum("nchw,pkc->pnkhw", adapted, weights["student_attention.2.proj_weight"])
        orders, start = [], 0
        for order, out in enumerate(weights["student_attention.2.out_weight"], 1):
            product = z[start : start + order].prod(0)
            orders.append(torch.einsum("nkhw,ck->nchw", product.relu(), out))
            start += order
        gate = sum(orders).sigmoid().mean(1, keepdim=True)
        head = next(module for module in model.modules() if isinstance(module, torch.nn.Linear)).double()
        expected = head((plain * gate).mean((2, 3)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert not run.student.model.get_submodule(run.student.stages[-1])._forward_hooks


def test_sections_are_reproducible(runs: Path, small: None) -> None:
    names = ["pictures", "tsne", "attention", "gates", "confused"]
    first, second = (
        {name: run_page._attempt(run_page.SECTIONS[name], opened(runs / "full")) for name in names} for _ in range(2)
    )
    assert all("content" in each for each in first.values()), first
    assert first == second
    networks, sources = first["tsne"]["content"]["networks"], {"held-out", "synthetic"}
    assert networks.keys() == {"teacher", "student"}
    for points in networks.values():
        assert len(points) <= 48
        assert {each[3] for each in points} == sources
        assert {each[2] for each in points} <= set(range(10))


def test_a_map_is_dark_at_its_smallest_and_bright_at_its_largest_value() -> None:
    ramp = torch.linspace(2, 5, 8).expand(8, 8)  # grows from left to right
    shown = np.asarray(run_page._heat(ramp, Image.new("RGB", (128, 128)))) @ [0.2126, 0.7152, 0.0722]  # luminance
    assert np.all(np.diff(shown.mean(0)[8:-16]) > -0.5)
    assert shown[:, 0].mean() < 0.2 * shown[:, -1].mean()


def test_data_uris_are_pictures_of_the_images() -> None:
    pixels = torch.zeros(3, 16, 16)
    pixels[0, :, 8:] = 1
    tile = run_page._tile(run_page._small(pixels), "", "")
    content = base64.b64decode(tile["src"].removeprefix("data:image/webp;base64,"))
    found = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert found.shape == (128, 128, 3)
    assert found[64, 30].tolist() == pytest.approx([0, 0, 0], abs=10)
    assert found[64, 98].tolist() == pytest.approx([255, 0, 0], abs=10)


def test_long_curves_are_averaged_and_gaps_left_out() -> None:
    x = list(range(1, 1001))
    curve = run_page._thinned(x, [None if each % 2 else float(each) for each in x])
    assert curve["x"] == list(range(4, 1001, 4))
    assert curve["y"][:2] == [3.0, 7.0]
    assert run_page._thinned([1, 2], [None, 0.5]) == {"x": [2], "y": [0.5]}


def test_settings_that_differ_are_marked(runs: Path) -> None:
    rows = {row["name"]: row for row in run_page._settings([opened(runs / "full"), opened(runs / "baseline")])}
    assert rows["distill.objective.preset"] == {
        "name": "distill.objective.preset",
        "values": ['"dfkd-fgvc"', '"baseline"'],
        "differs": True,
    }
    assert {name for name, row in rows.items() if row["differs"]} == {"distill.objective.preset"}


def test_runs_with_one_teacher_share_its_column() -> None:
    def found(name: str, student: list[Any], teacher: list[Any]) -> dict[str, Any]:
        content = {"names": ["a", "b"], "images": [3, 0], "student": student, "teacher": teacher}
        return {"name": name, "classes": {"content": content}}

    one, two = found("x", [0.5, None], [1.0, None]), found("y", [0.25, None], [1.0, None])
    table = run_page._class_table([one, two])
    assert table["columns"] == ["student of x", "teacher of x", "student of y"]
    assert table["rows"][0] == {"name": "a", "images": 3, "values": [0.5, 1.0, 0.25]}
    assert run_page._class_table([one])["rows"][0]["values"] == [0.5, 1.0, -0.5]
    assert run_page._class_table([{"name": "z", "classes": {"missing": "No data."}}])["rows"] == []


def test_sections_say_why_they_are_missing(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = opened(runs / "given")
    reasons = {name: run_page._attempt(section, given).get("missing") for name, section in run_page.SECTIONS.items()}
    assert reasons["result"] == reasons["classes"] == "Config.yaml does not name the student's network."
    assert reasons["curves"] is reasons["gates"] is None
    baseline = opened(runs / "baseline")
    missing = run_page._attempt(run_page.SECTIONS["attention"], baseline)["missing"]
    assert missing.startswith(f"There is no {runs / 'baseline' / 'attention.safetensors'}: ")
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert "grad-cam cannot be imported" in run_page._attempt(run_page.SECTIONS["grad_cam"], baseline)["missing"]
    unread = opened(runs / "baseline")
    unread.experiment = replace(unread.experiment, data=DataConfig(name="cub200"))
    assert "give it with --root" in run_page._attempt(run_page.SECTIONS["confused"], unread)["missing"]
    with pytest.raises(ValueError, match=r"config\.yaml: this is not the folder of a run"):
        run_page.write_page([tmp_path])


def test_factories_of_a_run_need_trust(runs: Path) -> None:
    config = ModelConfig(name="collections:OrderedDict")
    for trust, error in ((False, "if you trust it, set --trust"), (True, "OrderedDict")):
        run = opened(runs / "full", trust=trust)
        run.experiment = replace(run.experiment, student=config)
        assert error in run_page._attempt(run_page.SECTIONS["result"], run)["missing"]


@pytest.fixture(scope="module")
def swept(runs: Path) -> Path:
    """The folder of a sweep with two rows and columns, of which the first column is missing, as well as a seed."""
    axes: dict[str, Any] = {"data": {"one": {}, "two": {}}, "method": {"full": {}, "baseline": {}}}
    config, rows = SweepConfig(title="Two methods", axes=axes, seeds=[0, 1]), []
    for column, method, seed in itertools.product(axes["data"], axes["method"], config.seeds):
        row = {"cell": f"{column}, {method}", "seed": seed, "overrides": {}, "environment": None, "status": "failed"}
        if column == "two" and (method, seed) != ("baseline", 0):
            shutil.copytree(runs / method, cell_folder(runs / "sweep", row["cell"], seed))
            row |= {"status": "done", "accuracy": 0.5 + 0.1 * seed, "agreement": 0.5}
        rows.append(row)
    (runs / "sweep" / "sweep.db").touch()
    export(runs / "sweep", config, rows)
    return runs / "sweep"


def test_the_runs_of_a_sweep(swept: Path) -> None:
    about, shown = run_page._sweep(swept)
    assert shown == [("two, full", cell_folder(swept, "two, full", 0))]  # the first column and seed with results
    assert (about["missing"], about["all"], about["shown"], about["finished"]) == (5, 8, 1, 3)
    full, baseline = about["charts"]["two"]
    assert (full["name"], full["mean"], full["deviation"]) == ("full", 0.55, pytest.approx(0.1 / 2**0.5))
    assert (baseline["name"], baseline["mean"], baseline["deviation"]) == ("baseline", 0.6, 0.0)


def test_a_sweep_without_results_has_a_page(tmp_path: Path) -> None:
    config = SweepConfig(title="Nothing yet", axes={"method": {"full": {}}}, seeds=[0])
    (tmp_path / "sweep.db").touch()
    row = {"cell": "full", "seed": 0, "overrides": {}, "environment": None, "status": "waiting"}
    export(tmp_path, config, [row])
    text = run_page.write_page([tmp_path], tmp_path / "page.html").read_text()
    assert "1 of 1 runs are missing" in text
    assert "No distillation has finished yet" in text


@pytest.fixture(scope="module")
def pages(runs: Path, swept: Path) -> list[Path]:
    """A page of one run, one of three, of which one has neither networks nor data, and one of a sweep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_page, "_POINTS", 24)
        names = [["full"], ["baseline", "full", "given"], ["sweep"]]
        for index, each in enumerate(names):
            main(["report", *(str(runs / name) for name in each), "--out", str(runs / f"{index}.html")])
    return [runs / f"{index}.html" for index in range(len(names))]


def test_a_page_is_one_file_without_links_to_others(pages: list[Path]) -> None:
    for page in pages:
        text = page.read_text()
        assert len(text) < 2**20
        assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert not re.search(r"@import|url\(", text)
    ranks = re.findall(r'<td class="number">(\S+)</td>\s*<th scope="row">(\w+)</th>', pages[1].read_text())
    tops = {name: run_page._result(opened(pages[1].parent / name))["top1"] for name in ("full", "baseline")}
    expected = sorted(tops, key=lambda name: -tops[name])
    assert [name for _, name in ranks[:3]] == [*expected, "given"] or tops["full"] == tops["baseline"]
    assert [rank for rank, _ in ranks[:3]] == ["1", "2", "\u2013"]


@pytest.mark.slow
def test_a_page_of_200_classes_has_less_than_8_mb(tmp_path: Path) -> None:
    """With random pixels, which compress worse than photographs."""
    rng = np.random.default_rng(0)
    for split, index in itertools.product(("train", "test"), range(400)):
        path = tmp_path / "images" / split / f"class {index % 200:03d}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(path, compress_level=0)
    of = DataConfig(name="folder", root=str(tmp_path / "images"), image_size=128)
    run(tmp_path, "run", of, image_size=128, batch_size=64, epochs=1, rounds_per_epoch=1)
    text = run_page.write_page([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert len(text) < 8 * 2**20
    assert text.count("data:image/webp") > 60  # of all sections
    assert ">class 199<" in text


def problems(page: Any, width: int) -> list[str]:
    """What is wrong with the layout and the contents of the page that is open."""
    wrong = [f"overlap: {each}" for each in page.evaluate(OVERLAPS)]
    if (found := page.evaluate("document.documentElement.scrollWidth")) > width:
        wrong.append(f"{found} pixels wide")
    wrong += page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => `${i.alt} is not shown`)")
    wrong += page.evaluate(
        "[...document.querySelectorAll('.plot')].filter(p => !p.querySelector('polyline, rect, circle, path'))"
        ".map(p => `${p.ariaLabel} is not drawn`)"
    )
    return wrong


def use_by_keyboard(page: Any) -> None:
    """Read values of a chart and sort the table of classes with the keyboard only."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.plot')"):
            break
    values = []
    for key in ("Home", "ArrowRight"):
        page.keyboard.press(key)
        values.append(page.evaluate("document.activeElement.getAttribute('aria-valuetext')"))
        assert page.evaluate("document.activeElement.parentElement.querySelector('.readout').textContent") == values[-1]
    assert values[0].startswith("epoch 1:")
    assert values[1].startswith("epoch 2:")
    column = "[...document.querySelectorAll('.tall tbody tr')].map(r => r.cells[2].dataset.value)"
    page.locator(".tall th:nth-child(3) button").focus()
    for order, reverse in (("ascending", False), ("descending", True)):
        page.keyboard.press("Enter")
        found = [float(each) for each in page.evaluate(column)]
        assert found == sorted(found, reverse=reverse)
        assert page.evaluate("document.querySelector('.tall th:nth-child(3)').ariaSort") == order


@pytest.mark.slow
def test_rendering_in_chromium(browser: Any, pages: list[Path]) -> None:  # noqa: F811
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra 'browser' is not installed")
    wrong: list[str] = []
    for width, scheme, opened_pages in ((390, "dark", pages[::-1]), (1440, "light", pages[:0:-1])):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for path in opened_pages:
            page.goto(path.as_uri(), wait_until="load")
            page.wait_for_function(
                "document.querySelectorAll('.plot').length === document.querySelectorAll('.plot svg').length"
            )
            wrong.extend(f"{path.name} at {width}: {each}" for each in problems(page, width))
            found = axe.Axe().run(page).response
            assert len(found["passes"]) > 20
            serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
            wrong.extend(f"{path.name} at {width}: {each['id']}: {json.dumps(each['nodes'])[:500]}" for each in serious)
        use_by_keyboard(page)
        context.close()
    assert not wrong
