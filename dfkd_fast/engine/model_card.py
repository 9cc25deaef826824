"""The model card of an exported network, and the upload to the Hugging Face hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import validate_repo_id

from dfkd_fast.config import ModelConfig, reading
from dfkd_fast.engine.exporting import ExportError
from dfkd_fast.files import write_file
from dfkd_fast.graph.tracing import first_line
from dfkd_fast.models import WeightsDescription

__all__ = ["push_to_hub", "require_login", "write_card"]

log = logging.getLogger(__name__)

_LIBRARY = "dfkd-fast"
_LISTED = 20  # class names
_FILES = ("README.md", "student.safetensors", "student.onnx")


def _read(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file; empty if there is none."""
    if not path.is_file():
        return {}
    with reading(path):
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {first_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _metrics(config: Mapping[str, Any], history: Mapping[str, Any]) -> dict[str, float]:
    """``accuracy`` and ``agreement`` of the epoch whose weights were saved, as far as the history has them."""
    if "distill" not in config:  # a teacher
        return {"accuracy": history["accuracy"]} if history.get("accuracy") is not None else {}
    epochs = history.get("epochs", {})
    names = {"agreement": "agreement", "test_accuracy": "accuracy"}
    criterion = epochs.get(names.get(config["distill"]["loop"]["select"], ""))
    scores = list(range(len(epochs.get("epoch", [])))) if criterion is None else criterion
    if not scores:
        return {}
    best = max(range(len(scores)), key=lambda i: (-1 if scores[i] is None else scores[i], -i))
    found = {name: epochs.get(name, [None] * len(scores))[best] for name in ("accuracy", "agreement")}
    return {name: value for name, value in found.items() if value is not None}


def _evaluations(metrics: Mapping[str, float], data: str | None) -> list[EvalResult]:
    sets = {"accuracy": data or "held-out images", "agreement": "synthetic images"}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=sets[name],
            dataset_name=sets[name],
            metric_type=name,
            metric_name=f"{name} with the teacher" if name == "agreement" else name,
            metric_value=round(value, 6),
        )
        for name, value in metrics.items()
    ]


def _code(model: ModelConfig, description: WeightsDescription, classes: int, size: int, repo: str | None) -> str:
    steps = [f"v2.Resize({round(size * 256 / 224)})", f"v2.CenterCrop({size})"]
    steps += ["v2.ToImage()", "v2.ToDtype(torch.float32, scale=True)"]
    if description.mean and description.std:
        steps.append(f"v2.Normalize({list(description.mean)}, {list(description.std)})")
    transforms = "".join(f"        {step},\n" for step in steps)
    onnx = f'hf_hub_download("{repo}", "student.onnx")' if repo else '"student.onnx"'
    download = "from huggingface_hub import hf_hub_download\n" if repo else ""
    return f"""```python
import torch
from PIL import Image
from torchvision.transforms import v2

transform = v2.Compose(
    [
{transforms}    ]
)
images = transform(Image.open("image.png").convert("RGB"))[None]
```

With PyTorch and `pip install dfkd-fast`:

```python
from dfkd_fast.config import ModelConfig
from dfkd_fast.models import create_model

config = ModelConfig(
    name={model.name!r},
    options={model.options!r},
    weights={f"hf:{repo}" if repo else "student.safetensors"!r},
)
model = create_model(config, num_classes={classes}).eval()
with torch.no_grad():
    logits = model(images)
```

With ONNX Runtime, `pip install onnxruntime`:

```python
import onnxruntime
{download}
session = onnxruntime.InferenceSession({onnx})
(logits,) = session.run(["logits"], {{"images": images.numpy()}})
```
"""


def _rows(
    model: ModelConfig, description: WeightsDescription, classes: int, size: int, config: Mapping[str, Any]
) -> dict[str, str]:
    names = [f"`{name}`" for name in (description.classes or ())[:_LISTED]]
    more = f", and {classes - _LISTED} more" if names and classes > _LISTED else ""
    options = f" with {json.dumps(model.options)}" if model.options else ""
    distill = config.get("distill", {})
    normalization = None
    if description.mean and description.std:
        normalization = f"mean {list(description.mean)}, standard deviation {list(description.std)} for RGB in [0, 1]"
    known = {
        "network": f"`{model.name}`{options}",
        "teacher": f"`{config['teacher']['name']}`" if config.get("teacher") else None,
        "method": f"`{distill['objective']['preset']}`, images of `{distill['synthesis']['name']}`"
        if distill
        else None,
        "data set": f"`{config['data']['name']}`" if config.get("data") else None,
        "image size": f"{size} x {size} pixels, RGB",
        "normalization": normalization,
        "classes": f"{classes}{': ' if names else ''}{', '.join(names)}{more}",
    }
    return {name: text for name, text in known.items() if text is not None}


def write_card(
    folder: Path,
    *,
    weights: Path,
    model: ModelConfig,
    description: WeightsDescription,
    num_classes: int,
    image_size: int,
    license: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write ``README.md``, a model card in the format of the Hugging Face hub.

    Method, data set, accuracy and agreement come from ``config.yaml`` and ``history.json`` next to the weights, if they
    are there. A ``README.md`` that is not such a card is kept.

    Args:
        folder: the folder of ``student.safetensors`` and ``student.onnx``.
        weights: the weights file that was exported.
        model: the network.
        description: what the weights file says about the network.
        num_classes: number of classes.
        image_size: height and width of the images, in pixels.
        license: identifier of a license, as in the hub's list.
        repo: ``OWNER/NAME`` on the hub, from which the code of the card then loads the files.

    Returns:
        The path of the card.

    Raises:
        ValueError: ``config.yaml`` or ``history.json`` is damaged.
        dfkd_fast.files.WriteError: the file could not be written.
    """
    config, history = (_read(weights.parent / name) for name in ("config.yaml", "history.json"))
    metrics = _metrics(config, history)
    path = folder / "README.md"
    if path.is_file() and f"library_name: {_LIBRARY}" not in path.read_text(encoding="utf-8", errors="replace"):
        log.warning("%s is not a model card of %s, and is kept", path, _LIBRARY)
        return path
    name = repo.split("/")[1] if repo else model.name
    distilled = "distill" in config
    data = ModelCardData(
        library_name=_LIBRARY,
        license=license,
        pipeline_tag="image-classification",
        tags=["image-classification", *(["knowledge-distillation", "data-free"] if distilled else []), "onnx"],
        model_name=name if metrics else None,
        eval_results=_evaluations(metrics, (config.get("data") or {}).get("name")) or None,
    )
    rows = _rows(model, description, num_classes, image_size, config)
    rows |= {
        {"accuracy": "accuracy on held-out images", "agreement": "agreement with the teacher"}[each]: f"{value:.2%}"
        for each, value in metrics.items()
    }
    cells = [(key, text.replace("|", r"\|")) for key, text in rows.items()]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in cells)])
    how = "distilled from a teacher without real images" if distilled else "trained"
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nAn image classifier, {how} with dfkd_fast.\n\n{table}\n\n## Use\n\n"
    )
    content = str(ModelCard(text + _code(model, description, num_classes, image_size, repo)))
    return write_file(path, content.encode())


def require_login(repo: str) -> None:
    """Check the name of a repository and that there is a token, before work whose result is uploaded.

    Raises:
        ValueError: the name is not ``OWNER/NAME``.
        ExportError: there is no token.
    """
    if repo.count("/") != 1:
        raise ValueError(f"a repository of the Hugging Face hub is OWNER/NAME, got {repo!r}")
    validate_repo_id(repo)
    if get_token() is None:
        raise ExportError(f"the upload to {repo} needs a token: log in with `hf auth login` or set HF_TOKEN")


def push_to_hub(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload an exported network and its card to the Hugging Face hub, and return the address of the commit.

    The repository is created if it does not exist. Other files of the folder are not uploaded.

    Raises:
        ExportError: the upload failed, or the repository exists and is public although ``private`` is set.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ExportError(f"{repo} exists on the Hugging Face hub and is public: choose another name")
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(_FILES), commit_message=f"Export by {_LIBRARY}"
        )
    except ExportError:
        raise
    except Exception as error:  # of the network; they have no common type
        raise ExportError(f"cannot upload to {repo} on the Hugging Face hub: {first_line(error)}") from error
    return str(commit.commit_url)
