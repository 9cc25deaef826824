"""Networks, data and settings of a command, from its options and the metadata of weights files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dfkd_fast.config import DataConfig, DistillConfig, ExperimentConfig, ModelConfig, is_factory

if TYPE_CHECKING:
    from torch import nn

    from dfkd_fast.data import ImageData
    from dfkd_fast.graph import FeatureModel
    from dfkd_fast.models import WeightsDescription

__all__ = [
    "Setup",
    "agreed",
    "build_classifier",
    "build_networks",
    "check_data",
    "described_model",
    "read_setup",
    "required",
    "with_image_size",
]

log = logging.getLogger(__name__)


def required(experiment: ExperimentConfig, name: str) -> Any:
    """Return a field of the experiment, or raise ValueError if it is not given."""
    value = getattr(experiment, name)
    if value is None or not value.name:
        raise ValueError(f"--{name}.name is required: set it on the command line or in the file given by --config")
    return value


def agreed(weights: str, name: str, stored: Any, *given: tuple[str, Any]) -> Any:
    """Return a value of a weights file's metadata, or else the first one that is given as (source, value).

    Raises:
        ValueError: the file's value and one that is given differ.
    """

    def number(value: Any) -> bool:
        return isinstance(value, int | float)

    for source, value in given:
        if stored is None or value is None:
            continue
        if isinstance(stored, tuple):  # normalizations are often rounded to three digits
            pairs = zip(stored, value, strict=False)
            same = len(stored) == len(value) and all(
                math.isclose(a, b, abs_tol=1e-3) if number(a) and number(b) else a == b for a, b in pairs
            )
        else:
            same = stored == value
        if not same:
            raise ValueError(f"{name} is {_short(stored)} in {weights}, but {_short(value)} in {source}")
    values = [stored, *(value for _, value in given)]
    return next((value for value in values if value is not None), None)


def _short(value: Any) -> str:
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def described_model(
    weights: str, model: ModelConfig | None, description: WeightsDescription, option: str = "model"
) -> ModelConfig:
    """Return the network of a weights file: ``model``, or else the one that the metadata names."""
    if model is None or not model.name:
        if description.model is None:
            raise ValueError(f"{weights} does not name its network: set --{option}.name")
        if is_factory(description.model):
            raise ValueError(
                f"{weights} names the network {description.model!r}, which imports and runs code. If you trust it, set "
                f"--{option}.name {description.model}"
            )
        model = replace(model or ModelConfig(), name=description.model)
    if description.model == model.name:
        given = json.loads(json.dumps(model.options)) or None
        model = replace(model, options=agreed(weights, "options", description.options, ("the command", given)) or {})
    elif description.model is not None:
        log.warning("%s is of the network %s; it is loaded into %s", weights, description.model, model.name)
    return replace(model, weights=weights)


def with_image_size(
    weights: str, description: WeightsDescription, data: DataConfig, given: Container[str]
) -> DataConfig:
    """Return the data set with the image size of the weights file, unless the command sets one."""
    size = data.image_size if "data.image_size" in given else None
    size = agreed(weights, "image_size", description.image_size, ("data.image_size", size))
    return data if size is None else replace(data, image_size=size)


def check_data(weights: str, description: WeightsDescription, images: ImageData) -> None:
    """Raise ValueError if the metadata of a weights file does not fit the data."""
    for name in ("num_classes", "image_size", "mean", "std"):
        agreed(weights, name, getattr(description, name), ("the data", getattr(images, name)))
    for index, (stored, found) in enumerate(zip(description.classes or (), images.classes, strict=False)):
        if stored != found:
            raise ValueError(
                f"class {index} is {stored!r} in {weights}, but {found!r} in the data: use data whose classes have the "
                "same names in the same order"
            )


def build_networks(
    experiment: ExperimentConfig, num_classes: int, image_size: int
) -> tuple[FeatureModel, FeatureModel]:
    """Build teacher and student. ``distill.seed`` determines their initial weights."""
    import torch

    from dfkd_fast.models import create_model, extract

    torch.manual_seed(experiment.distill.seed)

    def build(config: ModelConfig) -> FeatureModel:
        return extract(create_model(config, num_classes=num_classes), stages=config.stages, image_size=image_size)

    return build(required(experiment, "teacher")), build(required(experiment, "student"))


def build_classifier(
    weights: str, model: ModelConfig | None, num_classes: int | None, image_size: int | None
) -> tuple[nn.Module, ModelConfig, int, int, WeightsDescription]:
    """Return the network of a weights file, its config, numbers of classes and pixels, and what the file says."""
    from dfkd_fast.models import create_model, read_description

    description = read_description(weights)
    config = described_model(weights, model, description)
    classes = agreed(weights, "num_classes", description.num_classes, ("--num_classes", num_classes))
    size = agreed(weights, "image_size", description.image_size, ("--image_size", image_size))
    if not classes or not size:
        raise ValueError(f"{weights} has no number of classes or image size: set --num_classes and --image_size")
    return create_model(config, num_classes=classes), config, classes, size, description


@dataclass(frozen=True)
class Setup:
    """The networks and the data of a run, with the values that the teacher's weights file determines."""

    data: DataConfig | None
    teacher: ModelConfig
    images: ImageData | None
    classes: int
    config: DistillConfig
    description: WeightsDescription

    @property
    def image_size(self) -> int:
        return self.config.image_size or (self.images.image_size if self.images is not None else 64)


def read_setup(
    experiment: ExperimentConfig, given: Container[str], num_classes: int | None, *, evaluate: bool
) -> Setup:
    """Read the teacher's weights file and, to evaluate, the data."""
    from dfkd_fast import data as datasets
    from dfkd_fast.models import read_description

    data, teacher, config = experiment.data, experiment.teacher, experiment.distill
    if teacher is None or teacher.weights is None:
        raise ValueError(
            "--teacher.weights is required: the file of a trained teacher, for example of `dfkd-fast teach`"
        )
    weights, description = teacher.weights, read_description(teacher.weights)
    teacher = described_model(weights, teacher, description, "teacher")
    if data is not None:
        data = with_image_size(weights, description, data, given)
    unread = data is not None and data.root is None and datasets.needs_root(data)
    if unread and evaluate:
        print("no --data.root: the student is not evaluated")
    images = datasets.load(data) if data is not None and not unread and evaluate else None
    if images is not None:
        check_data(weights, description, images)
    data_classes = images.num_classes if images is not None else None
    stored = (("--num_classes", num_classes), ("the data", data_classes))
    classes = agreed(weights, "num_classes", description.num_classes, *stored)
    classes = classes or (datasets.num_classes(data) if data is not None else None)
    if not classes:
        raise ValueError("--num_classes is required: neither the data nor the teacher's weights file gives it")
    inputs = {
        name: agreed(weights, name, getattr(description, name), (f"distill.{name}", getattr(config, name)))
        for name in ("image_size", "mean", "std")
    }
    if images is None:
        if data is not None and inputs["image_size"] is None:
            inputs["image_size"] = data.image_size
        config = replace(config, **inputs)
    return Setup(data, teacher, images, classes, config, description)
