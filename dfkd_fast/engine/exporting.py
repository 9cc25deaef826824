"""Exports a trained student to safetensors and ONNX."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkd_fast.files import make_folder, write_file
from dfkd_fast.graph import FeatureModel, unpatch, unwrap
from dfkd_fast.graph.tracing import eval_forward, first_line, image_channels, require_finite, weights_of
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


def _plain_copy(model: nn.Module) -> nn.Module:
    """A float32 copy of the plain network on the CPU in eval mode, without the changes of patch."""
    model = unwrap(model)
    model = copy.deepcopy(unwrap(model.model) if isinstance(model, FeatureModel) else model)
    unpatch(model)
    require_finite(type(model).__name__, weights_of(model))
    return model.cpu().float().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _difference(found: Tensor, expected: Tensor, name: str) -> float:
    """The largest difference, relative to the largest expected magnitude."""
    for what, logits in (("PyTorch", expected), ("ONNX", found)):
        if not logits.isfinite().all():
            raise ExportError(f"the logits of {name} for random images are NaN or infinite in {what}")
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    return error / scale if scale else error  # a new head may have only zeros


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def export(
    model: nn.Module, out: str | Path, *, image_size: int, metadata: Mapping[str, str] | None = None
) -> ExportResult:
    """Write ``student.safetensors`` and ``student.onnx``, and check the ONNX outputs against PyTorch on random images.

    The ONNX graph maps float32 ``images`` (N, C, image_size, image_size), with dynamic N and C = 3 for RGB images, to
    ``logits`` (N, classes).

    Args:
        model: a classifier on any device and in any dtype, also in a wrapper (torch.compile, DataParallel, ...),
            patched, or from :func:`dfkd_fast.models.extract`. It is not changed: a float32 copy on the CPU in eval mode
            is exported.
        out: output folder.
        image_size: height and width of the images, in pixels.
        metadata: metadata of both files.

    Returns:
        The paths of the files and the largest relative difference.

    Raises:
        ExportError: onnx, onnxscript or onnxruntime is missing, torch.onnx cannot export the network, or the outputs
            differ or are not finite. Then no file is written.
        ValueError: the network does not accept the image size, a weight is NaN or infinite, or image_size and the
            metadata differ.
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
    folder = make_folder(out)
    model = _plain_copy(model)
    size = (image_channels(model), image_size, image_size)

    def images(count: int) -> Tensor:
        return torch.randn(count, *size, generator=torch.Generator().manual_seed(count), dtype=torch.float32)

    eval_forward(model, images(2))  # its error is clearer than the exporter's
    path = folder / "student.onnx"
    # An ONNX graph has one namespace. A weight with the name of an input or output gets a prefix.
    taken = not {"images", "logits"}.isdisjoint(weights_of(model))
    try:
        program = torch.onnx.export(
            nn.Sequential(model).eval() if taken else model,
            (images(2),),  # torch.export would specialize a batch of one to a constant
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch.onnx cannot export {type(model).__name__}: {first_line(_cause(error))}") from error
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    program.model.metadata_props.update(metadata or {})
    content = program.model_proto.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common type
        name = type(model).__name__
        raise ExportError(f"onnxruntime cannot load the graph of {name}: {first_line(error)}") from error
    worst = 0.0
    for count in (2, 5):
        with torch.inference_mode():
            expected = model(images(count))
        (found,) = session.run(["logits"], {"images": images(count).numpy()})
        worst = max(worst, _difference(torch.from_numpy(found), expected, type(model).__name__))
    if not worst <= _TOLERANCE:
        raise ExportError(
            f"ONNX logits differ from PyTorch's by {worst:.2e} of the largest logit; the limit is {_TOLERANCE}"
        )
    write_file(path, content)
    weights = folder / "student.safetensors"
    save_weights(model, weights, dict(metadata or {}))
    return ExportResult(safetensors=weights, onnx=path, difference=worst)
