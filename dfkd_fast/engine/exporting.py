"""The trained student as files that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dfkd_fast.models import save_weights

__all__ = ["ExportError", "ExportResult", "export"]

_TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order, through tens of layers


class ExportError(RuntimeError):
    """The exported graph does not compute what the network computes, or a package that exports is missing."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Paths of what was written, and the largest relative difference of ONNX logits from PyTorch's."""

    safetensors: Path
    onnx: Path
    difference: float


def export(
    model: nn.Module, out: str | Path, *, image_size: int, metadata: Mapping[str, str] | None = None
) -> ExportResult:
    """Write ``student.safetensors`` and ``student.onnx``, and check the latter against PyTorch on random images.

    The ONNX graph takes ``images``, (N, 3, image_size, image_size) float32 with N free, and gives ``logits``.

    Args:
        model: a plain classifier; exported in eval mode, float32, from the CPU.
        out: folder.
        image_size: height and width.
        metadata: written into the safetensors file.

    Raises:
        ExportError: onnx, onnxscript or onnxruntime is missing, or the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it and says so less clearly)
    except ImportError as error:
        raise ExportError(f"export to ONNX needs the package {error.name}: pip install 'dfkd-fast[onnx]'") from error
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model = model.cpu().float().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # Two images: a batch of one would be taken for a constant.
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
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
        raise ExportError("torch.onnx.export gave no program")
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (2, 5):
        images = torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model(images)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        worst = max(worst, ((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()).item())
    if not worst <= _TOLERANCE:
        raise ExportError(f"the ONNX logits differ from PyTorch's by {worst:.2e} of the largest: over {_TOLERANCE}")
    weights = folder / "student.safetensors"
    save_weights(model, weights, dict(metadata or {}))
    return ExportResult(safetensors=weights, onnx=path, difference=worst)
