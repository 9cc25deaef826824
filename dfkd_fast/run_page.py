"""An HTML page of what the students of one or more runs learned: ``dfkd-fast report``.

Each section of the page is a function of a run. If a section's input is missing, the function raises an error, and the
page shows its message instead.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from dfkd_fast import data as datasets
from dfkd_fast.config import (
    ExperimentConfig,
    GeneratorConfig,
    MHADConfig,
    ModelConfig,
    expand,
    is_factory,
    one_line,
    read,
)
from dfkd_fast.engine import Measures, Predictions, Runtime, build_generator, cost, measure, predictions
from dfkd_fast.engine.state import Normalize
from dfkd_fast.files import write_file
from dfkd_fast.graph import FeatureModel, extract
from dfkd_fast.models import WeightsDescription, create_model, load_weights, read_description, read_metadata
from dfkd_fast.models.weights import resolve
from dfkd_fast.nn import SpatialAttention, freeze_spectral_norm
from dfkd_fast.objectives import FeatureShapes, HighOrderAttentionDistillation
from dfkd_fast.report import read_results
from dfkd_fast.sweep import SweepConfig, accuracies, cell_folder, positions, sweep_table

__all__ = ["write_page"]

log = logging.getLogger(__name__)

_TILE = 128  # height and width of the page's small images, in pixels
_GRID = 640  # width of a grid of images, in pixels
_POINTS = 250  # held-out and synthetic images of the t-SNE, each
_CLASSES = 10  # of the t-SNE
_MAPS, _CAMS, _PAIRS = 4, 8, 10  # images with attention maps and with Grad-CAM, and pairs of confused classes
_CURVE = 400  # points of a curve
_SHOWN = 8  # runs of a sweep
_LIMIT = 8 * 2**20  # bytes of the page
_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError)


class _Run:
    """The files of a run, and what they describe. Attributes are read when they are first used."""

    def __init__(self, folder: Path, runtime: Runtime, root: str | None, trust: bool) -> None:
        self.folder, self.runtime, self.root, self.trust = folder, runtime, root, trust

    def file(self, name: str, reason: str) -> Path:
        """The path of a file in the run's folder. Raises ValueError with the reason if there is none."""
        if not (self.folder / name).is_file():
            raise ValueError(f"there is no {self.folder / name}: {reason}")
        return self.folder / name

    @cached_property
    def settings(self) -> dict[str, Any]:
        found = yaml.safe_load(self.file("config.yaml", "this is not the folder of a run").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{self.folder / 'config.yaml'} must map names to values")
        return found

    @cached_property
    def experiment(self) -> ExperimentConfig:
        return read(ExperimentConfig, self.file("config.yaml", "this is not the folder of a run"))

    @cached_property
    def data(self) -> datasets.ImageData:
        config = self.experiment.data
        if config is None:
            raise ValueError("the run has no data set of held-out images")
        config = replace(config, root=self.root or config.root)
        if config.root is None and datasets.needs_root(config):
            raise ValueError(f"the run has no folder of the data set {config.name!r}: give it with --root")
        return datasets.load(config)

    @cached_property
    def description(self) -> WeightsDescription:
        path = self.file("student.safetensors", "the run has not finished")
        found = read_description(path)
        if None in (found.num_classes, found.image_size, found.mean, found.std):
            raise ValueError(f"the metadata of {path} lacks the student's images or classes")
        return found

    @cached_property
    def normalize(self) -> Normalize:
        mean, std = self.description.mean, self.description.std
        assert mean is not None
        assert std is not None
        return Normalize.of(mean, std, self.runtime.device)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return self.description.classes or self.data.classes

    def _network(self, config: ModelConfig, who: str, weights: Path) -> FeatureModel:
        self._check(config.name, f"the {who}'s network", ("timm", "torchvision"))
        classes, size = self.description.num_classes, self.description.image_size
        assert classes is not None
        assert size is not None
        config = replace(config, weights=str(weights), pretrained=False, new_head=False)
        model = create_model(config, num_classes=classes)
        model = extract(model, stages=config.stages, image_size=size, needs="logits")
        return self.runtime.place(model).eval()  # type: ignore[return-value]

    def _check(self, name: str, what: str, libraries: tuple[str, ...] = ()) -> None:
        if is_factory(name, libraries) and not self.trust:
            raise ValueError(f"{what}, {name}, imports and runs code: if you trust it, set --trust")

    @cached_property
    def student(self) -> FeatureModel:
        if self.experiment.student is None:
            raise ValueError("config.yaml does not name the student's network")
        return self._network(self.experiment.student, "student", self.folder / "student.safetensors")

    @cached_property
    def teacher(self) -> FeatureModel:
        config = self.experiment.teacher
        if config is None or config.weights is None:
            raise ValueError("config.yaml does not name the teacher's weights")
        if config.weights.startswith("hf:"):
            return self._network(config, "teacher", resolve(config.weights))
        # A relative path starts at the folder in which the run was started, which often contains the run.
        folders = [*self.folder.resolve().parents, Path()]
        weights = next((each for folder in folders if (each := folder / expand(config.weights)).is_file()), None)
        if weights is None:
            raise ValueError(f"the teacher's weights, {config.weights}, are missing")
        return self._network(config, "teacher", weights)

    @cached_property
    def generator(self) -> nn.Module:
        path = self.file("generator.safetensors", "the run has not finished, or it trained no generator")
        metadata = read_metadata(path)
        if "generator" not in metadata:
            raise ValueError("the generator was given as a module, so its file does not say how to build it")
        config = GeneratorConfig(**json.loads(metadata["generator"]))
        self._check(config.name, "the generator")
        generator = build_generator(config, int(metadata["image_size"]))
        load_weights(generator, path)
        return self.runtime.place(generator)

    @cached_property
    def attention(self) -> HighOrderAttentionDistillation:
        path = self.file("attention.safetensors", "the student's loss has no attention modules, or the run is older")
        shapes, config = (json.loads(read_metadata(path)[name]) for name in ("shapes", "mhad"))
        term = HighOrderAttentionDistillation(FeatureShapes(**shapes), MHADConfig(**config))
        if term.config.level != "stages":
            raise ValueError("the attention modules are at the penultimate features, which are not maps")
        load_weights(term, path)
        return self.runtime.place(term)  # type: ignore[return-value]

    @torch.no_grad()
    def generate(self, count: int) -> Tensor:
        """Synthetic images (N, 3, H, W) in [-1, 1], like those that the student was trained on."""
        latent_dim: Any = self.generator.latent_dim
        size = self.experiment.distill.loop.batch_size  # whole batches, whose statistics its BatchNorms use
        noise = torch.randn(-(-count // size), size, latent_dim, generator=torch.Generator().manual_seed(0))
        with freeze_spectral_norm(self.generator.train()):
            made = [self.generator(each) for each in noise.to(self.runtime.device)]
        return torch.cat(made)[:count].float()

    def held_out(self, count: int) -> tuple[Tensor, list[int]]:
        """Evenly spaced held-out images (N, 3, H, W), normalized, and their labels."""
        test: Any = self.data.test
        count = min(count, len(test))
        return self.images(index * len(test) // count for index in range(count))

    def images(self, indices: Iterable[int]) -> tuple[Tensor, list[int]]:
        """Held-out images (N, 3, H, W), normalized, and their labels."""
        images, labels = zip(*(self.data.test[index] for index in indices), strict=True)
        return torch.stack(images).to(self.runtime.device), [int(label) for label in labels]

    def examples(self, count: int) -> tuple[Tensor, list[int], str]:
        """Held-out images, or else synthetic ones with the teacher's labels, and the name of the kind."""
        try:
            return *self.held_out(count), "Held-out"
        except _ERRORS:
            images = self.normalize(self.generate(count))
            with torch.no_grad():
                return images, self.teacher(images).logits.argmax(1).tolist(), "Synthetic"

    def picture(self, normalized: Tensor) -> Image.Image:
        """A small image of a normalized one, (3, H, W)."""
        pixels = (normalized - self.normalize.shift[0]) / self.normalize.scale[0] / 2 + 0.5
        return _small(pixels)

    def _predict(self, model: nn.Module) -> Predictions:
        with self.runtime.backends():
            workers = self.experiment.data.workers if self.experiment.data is not None else 0
            count = self.data.num_classes
            return predictions(model, self.data.test, num_classes=count, workers=workers, runtime=self.runtime)

    @cached_property
    def predicted(self) -> Predictions:
        return self._predict(self.student)

    @cached_property
    def teacher_predicted(self) -> Predictions | None:
        try:
            return self._predict(self.teacher)
        except _ERRORS as error:
            log.warning("%s: the teacher is not evaluated: %s", self.folder, one_line(error))
            return None

    @cached_property
    def measures(self) -> Measures:
        return measure(self.predicted, teacher=self.teacher_predicted)

    @cached_property
    def teacher_measures(self) -> Measures | None:
        return measure(self.teacher_predicted) if self.teacher_predicted is not None else None


def _small(pixels: Tensor) -> Image.Image:
    """A small image of pixels (3, H, W) in [0, 1]."""
    array = (pixels.detach().float().nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array)
    sampling = Image.Resampling.NEAREST if image.width < _TILE else Image.Resampling.LANCZOS
    return image.resize((_TILE, _TILE), sampling)


def _heat(values: Tensor, below: Image.Image) -> Image.Image:
    """An image below a map (H, W), which is dark at its smallest value and bright from its 98th percentile on."""
    from matplotlib import colormaps

    found = values.detach().float().cpu()
    low, high = found.min(), found.quantile(0.98)
    scaled = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).numpy()
    smooth = np.asarray(Image.fromarray(scaled).resize(below.size, Image.Resampling.BILINEAR))
    return Image.blend(below, Image.fromarray(colormaps["viridis"](smooth, bytes=True)[..., :3].copy()), 0.6)


def _uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "WEBP", quality=80, method=6)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _tile(image: Image.Image, caption: str, alt: str) -> dict[str, str]:
    return {"src": _uri(image), "caption": caption, "alt": alt}


def _cards(
    titles: Sequence[str],
    pictures: Sequence[Image.Image],
    maps: Mapping[str, Tensor],
    kind: str,
    *,
    ranges: bool = True,
) -> list[dict[str, Any]]:
    """One card per image, with the image and its maps; ``maps`` are (N, H, W) by name."""
    cards = []
    for index, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
        tiles = [_tile(picture, "image", f"{kind} image: {title}")]
        for name, values in maps.items():
            each = values[index]
            caption = f"{name}: {each.min():.3g} to {each.max():.3g}" if ranges else name
            tiles.append(_tile(_heat(each, picture), caption, f"Map of this image: {caption}"))
        cards.append({"title": title, "tiles": tiles})
    return cards


def _thinned(x: Sequence[float], y: Sequence[float | None]) -> dict[str, list[float]]:
    """The known points of a curve; averages of consecutive ones if there are too many."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    size = -(-len(known) // _CURVE) or 1
    parts = [known[start : start + size] for start in range(0, len(known), size)]
    # The label of an average is its last point, so that the curve ends at the end of the run.
    return {
        "x": [part[-1][0] for part in parts],
        "y": [float(f"{statistics.fmean(y for _, y in p):.4g}") for p in parts],
    }


def _curves(run: _Run) -> dict[str, Any]:
    history = read_results(run.file("history.json", "the run has not finished"))
    assert history is not None
    found: dict[str, Any] = {}
    for group, axis in (("epochs", "epoch"), ("rounds", "round")):
        series = history.get(group, {})
        names = sorted((name for name in series if name != axis), key=lambda name: (name != "accuracy", name))
        for name in names:
            curve = _thinned(series[axis], series[name])
            if curve["x"]:
                found[name] = {"axis": axis, **curve}
    if not found:
        raise ValueError("the run has no finished round")
    return found


def _result(run: _Run) -> dict[str, Any]:
    student, teacher = run.measures, run.teacher_measures
    top1 = teacher.top1 if teacher is not None else None
    return {
        **{name: getattr(student, name) for name in ("top1", "top5", "agreement", "images")},
        "teacher": top1,
        "relative": student.top1 / top1 if top1 else None,
    }


def _held_out_grid(run: _Run) -> dict[str, str]:
    images, _ = run.held_out(min(64, run.experiment.distill.loop.batch_size))  # as many as synthetic ones
    size = _GRID // 8
    sheet = Image.new("RGB", (_GRID, -(-len(images) // 8) * size), "white")
    for index, image in enumerate(images):
        sheet.paste(run.picture(image).resize((size - 4, size - 4)), (index % 8 * size + 2, index // 8 * size + 2))
    return _tile(sheet, "Held-out", f"Grid of {len(images)} held-out images")


def _synthetic_grid(run: _Run) -> dict[str, str]:
    pictures = sorted((run.folder / "images").glob("epoch-*.png"))
    if not pictures:
        raise ValueError("the run has no picture of synthetic images")
    epoch = int(pictures[-1].stem.removeprefix("epoch-"))
    with Image.open(pictures[-1]) as image:
        sampling = Image.Resampling.NEAREST if image.width < _GRID else Image.Resampling.LANCZOS
        sheet = image.convert("RGB").resize((_GRID, _GRID * image.height // image.width), sampling)
    return _tile(sheet, f"Synthetic, epoch {epoch}", f"Grid of synthetic images of epoch {epoch}")


def _pictures(run: _Run) -> dict[str, Any]:
    return {"held_out": _attempt(_held_out_grid, run), "synthetic": _attempt(_synthetic_grid, run)}


def _classes(run: _Run) -> dict[str, Any]:
    student, teacher = run.measures, run.teacher_measures
    accuracies = {"student": student.per_class, "teacher": teacher.per_class if teacher is not None else None}
    return {"names": run.classes, "images": student.counts, **accuracies}


def _confused(run: _Run) -> list[dict[str, Any]]:
    labels, predicted = run.predicted.labels, run.predicted.logits.argmax(1)
    cards = []
    for label, other, count in run.measures.confused[:_PAIRS]:
        names = run.classes[label], run.classes[other]
        # A class without held-out images has no example.
        found = [((labels == label) & (predicted == other)).nonzero()[0], *(labels == other).nonzero()[:1]]
        images = run.images(int(index) for index in found)[0]
        texts = (("a mistake", f"{names[0]}, predicted {names[1]}"), ("of the other class", names[1]))
        tiles = [_tile(run.picture(image), *text) for image, text in zip(images, texts, strict=False)]
        cards.append({"title": f"{names[0]} → {names[1]}: {count} of {run.measures.counts[label]}", "tiles": tiles})
    if not cards:
        raise ValueError("the student makes no mistake on the held-out images")
    return cards


@torch.no_grad()
def _penultimate(model: FeatureModel, images: Tensor) -> Tensor:
    if not model.penultimate_dim:
        raise ValueError("the network has no penultimate features, because torch.fx cannot trace it")
    return torch.cat([model(each).penultimate.float().cpu() for each in images.split(64)])


def _embed(features: Tensor) -> list[list[int]]:
    """Coordinates in 0..1000 of a t-SNE of features (N, D)."""
    from sklearn.manifold import TSNE

    if len(features) < 8:
        raise ValueError(f"a t-SNE needs at least 8 images, got {len(features)}")
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(features.numpy())
    low, high = points.min(0), points.max(0)
    return np.round((points - low) / np.maximum(high - low, 1e-12) * 1000).astype(int).tolist()


@torch.no_grad()
def _synthetic(run: _Run) -> tuple[Tensor, Tensor]:
    """Synthetic images, normalized, and the teacher's classes for them, on the CPU."""
    images = run.normalize(run.generate(2 * _POINTS))
    return images, torch.cat([run.teacher(each).logits.argmax(1).cpu() for each in images.split(64)])


def _tsne(run: _Run) -> dict[str, Any]:
    """Points ``[x, y, class, source]`` of each network, for the classes with most images of the first source."""
    sources: dict[str, tuple[Tensor | None, Tensor]] = {}
    notes = []
    for source, read_source in (
        ("synthetic", lambda: _synthetic(run)),
        ("held-out", lambda: (None, run.predicted.labels)),
    ):
        try:
            sources[source] = read_source()
        except _ERRORS as error:
            notes.append(_sentence(error))
    if not sources:
        raise ValueError(notes[-1])
    counts = next(iter(sources.values()))[1].bincount(minlength=len(run.classes))
    kept = counts.argsort(descending=True, stable=True)[:_CLASSES].sort().values
    images, points = [], []
    for source, (made, labels) in sources.items():
        chosen = torch.isin(labels, kept).nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:_POINTS].sort().values]
        images.append(run.images(chosen.tolist())[0] if made is None else made[chosen.to(made.device)])
        points += [[int((kept == label).nonzero()), source] for label in labels[chosen]]
    networks = {}
    for name in ("teacher", "student"):
        embedded = _embed(_penultimate(getattr(run, name), torch.cat(images)))
        networks[name] = [[*place, *point] for place, point in zip(embedded, points, strict=True)]
    return {"classes": [run.classes[label] for label in kept.tolist()], "networks": networks, "notes": notes}


@contextmanager
def _gated(run: _Run) -> Any:
    """The student's last stage returns its map times the attention that L_MHAD gives it."""
    term = run.attention

    def gate(_: nn.Module, __: Any, features: Tensor) -> Tensor:
        module: Any = term.student_attention[-1]
        attention = module.attention(term.adapters[-1](features))
        # The attention has the teacher's channels; if the student has others, their mean weights the positions.
        return features * (attention if attention.shape == features.shape else attention.mean(1, keepdim=True))

    handle = run.student.model.get_submodule(run.student.stages[-1]).register_forward_hook(gate)
    try:
        yield
    finally:
        handle.remove()


def _grad_cam(run: _Run) -> dict[str, Any]:
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        advice = "" if error.name != "pytorch_grad_cam" else ": pip install 'dfkd-fast[report]'"
        raise ValueError(f"the package grad-cam cannot be imported ({one_line(error)}){advice}") from error
    if not run.student.stages or not run.student.programs:
        raise ValueError("the student has no last map that torch.fx finds")
    images, labels, kind = run.examples(_CAMS)
    targets = [ClassifierOutputTarget(label) for label in labels]
    model = run.student.model

    def maps() -> Tensor:
        with GradCAM(model=model, target_layers=[model.get_submodule(run.student.stages[-1])]) as cam:
            return torch.as_tensor(cam(input_tensor=images, targets=targets))

    found, missing = {"without attention": maps()}, None
    try:
        with _gated(run):
            found["with attention"] = maps()
    except _ERRORS as error:
        missing = _sentence(error)
    pictures, titles = [run.picture(image) for image in images], [run.classes[label] for label in labels]
    return {"cards": _cards(titles, pictures, found, kind, ranges=False), "missing": missing}


@torch.no_grad()
def _attention(run: _Run) -> list[dict[str, Any]]:
    term: Any = run.attention
    images, labels, kind = run.examples(_MAPS)
    teacher, student = (model(images).features[-term.stages :] for model in (run.teacher, run.student))
    stages = json.loads(read_metadata(run.folder / "attention.safetensors")["stages"])
    found = {}
    for index, (t, s) in enumerate(zip(teacher, student, strict=True)):
        module = term.student_attention[index]
        reference = term.teacher_attention[index] if len(term.teacher_attention) else module  # they may share it
        maps = reference.attention(t), module.attention(term.adapters[index](s))
        for who, values in zip(("teacher", "student"), maps, strict=True):
            found[f"{who}, {stages[who][index - term.stages]}"] = values.mean(1)
    return _cards([run.classes[label] for label in labels], [run.picture(image) for image in images], found, kind)


def _gates(run: _Run) -> list[dict[str, Any]]:
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in run.generator.named_modules():
        if isinstance(module, SpatialAttention):

            def keep(gate: Any, inputs: tuple[Tensor, ...], _: Tensor, name: str = name) -> None:
                found[name.removesuffix(".attention")] = gate.attention(inputs[0]).mean(1)

            handles.append(module.register_forward_hook(keep))
    if not handles:
        raise ValueError("the generator has no attention modules")
    images = run.generate(_MAPS)
    for handle in handles:
        handle.remove()
    titles = [f"Image {index + 1}" for index in range(len(images))]
    return _cards(titles, [_small(image / 2 + 0.5) for image in images], found, "Synthetic")


def _calibration(run: _Run) -> dict[str, Any]:
    return {"ece": run.measures.ece, "bins": run.measures.reliability}


def _speed(run: _Run) -> dict[str, Any]:
    """Time of the run from its TensorBoard log; pauses and evaluations do not change the median."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0, "images": 1})
    logged = (run.folder / "tensorboard").is_dir() and "student/lr" in events.Reload().Tags()["scalars"]
    times = [each.wall_time for each in events.Scalars("student/lr")] if logged else []
    if len(times) < 2:
        raise ValueError("the TensorBoard log has fewer than two rounds")
    loop = run.experiment.distill.loop
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    images = (loop.generator_steps + loop.student_steps) * loop.batch_size
    total = loop.epochs * loop.rounds_per_epoch * seconds
    return {"round": seconds, "training": total, "speed": images / seconds if seconds > 0 else None}


def _cost(run: _Run) -> dict[str, Any]:
    def of(model: FeatureModel) -> dict[str, Any]:
        return asdict(cost(model.model, run.description.image_size or 0, run.runtime))

    found = {
        "student": _attempt(lambda run: of(run.student), run),
        "teacher": _attempt(lambda run: of(run.teacher), run),
        "training": _attempt(_speed, run),
    }
    return {**found, "device": run.runtime.device.type, "threads": torch.get_num_threads()}


SECTIONS: dict[str, Callable[[_Run], Any]] = {
    "result": _result,
    "curves": _curves,
    "pictures": _pictures,
    "classes": _classes,
    "confused": _confused,
    "tsne": _tsne,
    "grad_cam": _grad_cam,
    "attention": _attention,
    "gates": _gates,
    "calibration": _calibration,
    "cost": _cost,
}
"""The sections of the page that depend on one run."""


def _sentence(error: BaseException) -> str:
    text = (one_line(error) or type(error).__name__).rstrip(".") + "."
    return text if "/" in text.partition(" ")[0] else text[:1].upper() + text[1:]


def _attempt(section: Callable[[_Run], Any], run: _Run) -> dict[str, Any]:
    """The content of a section, or why it is missing."""
    try:
        return {"content": section(run)}
    except _ERRORS as error:
        return {"missing": _sentence(error)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        found |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": json.dumps(value, default=str)}
        )
    return found


def _settings(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """One row per setting, with a value per run; None if a run does not have it."""
    flat = [_flat(run.settings) for run in runs]
    names = [name for name in dict.fromkeys(itertools.chain(*flat)) if name != "distill.out"]  # it always differs
    rows = [{"name": name, "values": [each.get(name) for each in flat]} for name in names]
    return [{**row, "differs": len(set(row["values"])) > 1} for row in rows]


def _charts(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One chart per loss or share, with a series per run."""
    curves = {run["name"]: run["curves"].get("content", {}) for run in runs}
    names = dict.fromkeys(name for each in curves.values() for name in each)
    charts = []
    for name in names:
        series = [{"name": run, "run": i, **each[name]} for i, (run, each) in enumerate(curves.items()) if name in each]
        values = [y for each in series for y in each["y"]]
        share = series[0]["axis"] == "epoch"
        log_scale = not share and min(values) > 0 and max(values) > 100 * min(values)
        charts.append(
            {
                "kind": "line",
                "title": name,
                "axis": series[0]["axis"],
                "series": series,
                "percent": share,
                "log": log_scale,
            }
        )
    return charts


def _class_table(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row per class name, with the accuracy of each student and of each teacher, and the columns' names."""
    columns: dict[str, dict[str, float | None]] = {}
    counts: dict[str, int] = {}
    for run in runs:
        if (found := run["classes"].get("content")) is None:
            continue
        counts |= dict(zip(found["names"], found["images"], strict=True))
        suffix = f" of {run['name']}" if len(runs) > 1 else ""
        for who in ("student", "teacher"):
            accuracies = dict(zip(found["names"], found[who] or (), strict=False))
            if accuracies and (who == "student" or accuracies not in columns.values()):  # runs may share a teacher
                columns[who + suffix] = accuracies
    if len(columns) == 2 and len(runs) == 1:
        pairs = ((name, columns["student"][name], columns["teacher"][name]) for name in counts)
        columns["difference"] = {name: a - b if a is not None and b is not None else None for name, a, b in pairs}
    rows = [
        {"name": name, "images": count, "values": [each.get(name) for each in columns.values()]}
        for name, count in counts.items()
    ]
    return {"columns": list(columns), "rows": rows}


def _gather(run: _Run, name: str) -> dict[str, Any]:
    config = run.settings
    about = {who: (config.get(who) or {}).get("name") for who in ("student", "teacher", "data")}
    about["method"] = config.get("distill", {}).get("objective", {}).get("preset")
    return {"name": name, **about, **{key: _attempt(section, run) for key, section in SECTIONS.items()}}


def _sweep(folder: Path) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
    """The table and the charts of a sweep, and the names and folders of the runs to show."""
    content = read_results(folder / "results.json")
    if content is None:
        raise ValueError(f"there is no {folder / 'results.json'}: the sweep has not started")
    config, rows = SweepConfig(**content["sweep"]), content["rows"]
    found, where = sweep_table(config, rows), positions(config)
    distilled = [row for row in rows if row.get("agreement") is not None]
    one_column = [row for row in distilled if where[row["cell"]][0] == where[distilled[0]["cell"]][0]]
    runs = [row for row in one_column if row["seed"] == distilled[0]["seed"]]
    charts: dict[str, list[dict[str, Any]]] = {}
    for name, values in accuracies(config, rows).items():
        if values:
            column, row = where[name]
            deviation = statistics.stdev(values.values()) if len(values) > 1 else 0.0
            line = {"name": row, "mean": statistics.fmean(values.values()), "deviation": deviation}
            charts.setdefault(column, []).append(line)
    about = {
        "title": config.title,
        "rows": found,
        "columns": [*found[0]],
        "missing": sum(row["status"] != "done" for row in rows),
        "all": len(rows),
        "charts": charts,
        "shown": min(len(runs), _SHOWN),
        "finished": len(distilled),
    }
    return about, [(row["cell"], cell_folder(folder, row["cell"], row["seed"])) for row in runs[:_SHOWN]]


def write_page(
    runs: Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    device: str = "auto",
    root: str | None = None,
    trust: bool = False,
) -> Path:
    """Write an HTML page of what the students of runs learned, which needs no other file and no network.

    Args:
        runs: folders of :func:`dfkd_fast.distill`. Several become columns, ranked by top-1 accuracy. The folder of a
            sweep adds its table, and the finished distillations of its first column and seed that have any, at most
            eight.
        out: the file.
        device: device of the networks, as in ``DistillConfig.device``.
        root: root folder of the held-out images; None uses that of the run.
        trust: build networks and generators that a run names as ``package.module:factory``, which imports and runs
            code.

    Returns:
        The path of the file.

    Raises:
        ValueError: a folder is not that of a run, or no run is given.
        dfkd_fast.files.WriteError: the file could not be written.
    """
    import jinja2

    if not runs:
        raise ValueError("report needs at least one folder of a run")
    runtime = Runtime.of(device, "fp32", channels_last=False)
    sweeps, named = [], []
    for each in (expand(run) for run in runs):
        if (each / "sweep.db").is_file():
            table, cells = _sweep(each)
            sweeps.append(table)
            named += cells
        else:
            named.append((each.resolve().name, each))
    names, folders = [name for name, _ in named], [folder for _, folder in named]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    opened = [_Run(folder, runtime, root, trust) for folder in folders]
    settings = _settings(opened)  # raises before the long computations if a folder is not that of a run
    gathered = []
    for index, name in enumerate(names):
        gathered.append(_gather(opened[index], name))
        opened[index] = None  # type: ignore[call-overload]  # frees its networks
    results = [each["result"].get("content") for each in gathered]
    order = sorted(range(len(names)), key=lambda index: -results[index]["top1"] if results[index] else 1)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dfkd_fast"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        runs=gathered,
        sweeps=sweeps,
        ranking=[gathered[index] for index in order],
        settings=settings,
        charts=_charts(gathered),
        table=_class_table(gathered),
    )
    content = page.encode()
    if len(content) > _LIMIT:
        log.warning("the page has %.1f MB: give fewer runs", len(content) / 2**20)
    return write_file(out, content)
