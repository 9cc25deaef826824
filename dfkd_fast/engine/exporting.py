"""Exports a trained student to safetensors and ONNX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkd_fast.config import expand
from dfkd_fast.files import write_file
from dfkd_fast.models import save_weights

__all__ = ["ExportError", "ExportResult", "export"]

_TOLERANCE = 1e-3  # relative to the largest logit; float32 summation order differs in each of tens of layers


class ExportError(RuntimeError):
    """The outputs of the exported graph differ from the network's, or a required package is missing."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The paths of the files, and the largest difference of the logits relative to the largest logit."""

    safetensors: Path
    onnx: Path
    difference: float


def export(
    model: nn.Module, out: str | Path, *, image_size: int, metadata: Mapping[str, str] | None = None
) -> ExportResult:
    """Write ``student.safetensors`` and ``student.onnx``, and check the ONNX outputs against PyTorch on random images.

    The ONNX graph maps float32 ``images`` (N, 3, image_size, image_size), with dynamic N, to ``logits`` (N, classes).

    Args:
        model: a plain classifier. It is moved to the CPU in float32 and eval mode.
        out: output folder.
        image_size: height and width of the images, in pixels.
        metadata: metadata of both files.

    Returns:
        The paths of the files and the largest relative difference.

    Raises:
        ValueError: image_size and the metadata differ.
        ExportError: onnx, onnxscript or onnxruntime is missing, a logit is not finite, or the outputs differ. Then no
            file is written.
        dfkd_fast.files.WriteError: a file could not be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it, but raises a less clear error)
    except ImportError as error:
        raise ExportError(f"ONNX export needs the package {error.name}: pip install 'dfkd-fast[onnx]'") from error
    stored = (metadata or {}).get("image_size", str(image_size))
    if stored != str(image_size):
        raise ValueError(f"image_size is {image_size}, but the metadata says {stored}")
    folder = expand(out)
    folder.mkdir(parents=True, exist_ok=True)
    model = model.cpu().float().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # torch.export would specialize a batch of one to a constant.
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    _check_finite(model, images)
    path = folder / "student.onnx"
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    program.model.metadata_props.update(metadata or {})
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = []
    for count in (2, 5):
        images = torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(count))
        expected = _check_finite(model, images)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        difference, scale = ((each.abs().max()).item() for each in (torch.from_numpy(found) - expected, expected))
        differences.append(difference / scale if scale else difference)
    worst = max(differences, key=lambda value: (math.isnan(value), value))
    if not worst <= _TOLERANCE:
        raise ExportError(
            f"ONNX logits differ from PyTorch's by {worst:.2e} of the largest logit; the limit is {_TOLERANCE}"
        )
    write_file(path, content)
    weights = folder / "student.safetensors"
    save_weights(model, weights, dict(metadata or {}))
    return ExportResult(safetensors=weights, onnx=path, difference=worst)


@torch.inference_mode()
def _check_finite(model: nn.Module, images: Tensor) -> Tensor:
    """Return the network's logits, or raise ExportError if one is not finite."""
    logits = model(images)
    if not logits.isfinite().all():
        broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
        hint = f"these weights are not finite: {', '.join(broken[:5])}" if broken else "its weights are finite"
        raise ExportError(f"the logits of {type(model).__name__} are not finite on random images; {hint}")
    return logits
