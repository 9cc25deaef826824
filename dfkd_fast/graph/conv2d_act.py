"""``relu(conv(x) + residual)`` of frozen convolutions as one cuDNN kernel, without gradients.

cuDNN adds bias and residual and applies the ReLU to the convolution's float32 sums, and rounds once. Otherwise a second
kernel reads the rounded sums and writes the map again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfkd_fast.graph.fusion import find, fuse
from dfkd_fast.graph.tracing import Trace, all_close, first_line, run
from dfkd_fast.nn.norm import has_hooks
from dfkd_fast.ops.custom_op import library_operator, matmul_dtype

__all__ = ["conv2d_act", "fuse_convolutions"]

log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if not x.is_cuda:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (y if residual is None else y.add_(residual)).relu_()
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1, bias, stride, padding, dilation, groups)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *options: Any) -> Tensor:
    return F.conv2d(x, weight, bias, *options)  # the memory format is that of a plain convolution


_operator = library_operator("conv2d_act", _compute, _fake)


def conv2d_act(conv: nn.Conv2d, x: Tensor, residual: Tensor | None, activation: str = "relu") -> tuple[Tensor]:
    """``relu(conv(x) + residual)``: one cuDNN kernel on CUDA if no gradient is needed, else plain PyTorch.

    Args:
        conv: a convolution that :func:`fuse_convolutions` accepts.
        x: (N, C, H, W).
        residual: None, or a tensor that can be added to the convolution's result.
        activation: only "relu".
    """
    weight, bias, dtype = conv.weight, conv.bias, matmul_dtype(x)
    assert activation == "relu"
    assert bias is not None
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    fusible = x.is_cuda and x.dtype in _DTYPES and not needs_grad
    if residual is not None:  # cuDNN neither broadcasts nor promotes
        fusible = fusible and residual.dtype == dtype and residual.shape[:1] == x.shape[:1]
    if fusible:
        options = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        return (_operator(x.to(dtype), weight.to(dtype), bias.to(dtype), residual, *options),)
    y = conv(x)
    return (F.relu_(y if residual is None else y + residual),)


def _can_fuse(conv: nn.Module | None) -> bool:
    if type(conv) is not nn.Conv2d or has_hooks(conv):
        return False
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and conv.bias is not None


def _milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 20


def _try_kernel(conv: nn.Conv2d, x: Tensor, residual: Tensor | None) -> str | None:
    """Run cuDNN's kernel. Return why the plain convolution is better, or None."""
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return "cuDNN's fused convolutions may not be deterministic"
    fused = partial(conv2d_act, conv, x, residual)
    weight = conv.weight.to(x.dtype)

    def one_pass() -> Tensor:  # the convolution and one pass over its result, as compiled code runs it
        y = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y.relu_() if residual is None else y.add_(residual)

    plain = conv(x)
    plain = F.relu_(plain if residual is None else plain + residual)
    try:
        fused()  # cuDNN chooses an engine
        # Without a residual, torch passes the uninitialized result to cuDNN as residual, with factor 0. The allocator
        # returns the memory that has just been freed, so a kernel that reads the residual returns NaN.
        freed = torch.full_like(plain, torch.nan)
        address = freed.data_ptr()
        del freed
        (found,) = fused()
    except RuntimeError as error:
        return first_line(error)
    if residual is None and found.data_ptr() != address:
        return "it may read uninitialized memory"
    if found.stride() != plain.stride() or not all_close(found, plain, 2e-2):
        return "its result differs"
    one_pass()
    one, two = _milliseconds(fused), _milliseconds(one_pass)
    return None if one <= two else f"it takes {one:.3f} ms instead of {two:.3f} ms"


def _reason_to_keep(conv: nn.Conv2d, x: fx.Node, residual: fx.Node | None, image: Tensor) -> str | None:
    """Try cuDNN's kernel on random tensors like the values of nodes, on the device of ``image``, if that is CUDA."""
    if not image.is_cuda:
        return None
    generator = torch.Generator(image.device).manual_seed(0)

    def like(meta: dict[str, Any]) -> Tensor:
        # An image is cast to the autocast dtype, which all maps have.
        dtype = matmul_dtype(image)
        x = torch.empty_strided(meta["shape"], meta["stride"], dtype=dtype, device=image.device)
        return x.normal_(generator=generator)

    return _try_kernel(conv, like(x.meta), None if residual is None else like(residual.meta))


def fuse_convolutions(root: nn.Module, graph: fx.Graph, image: Tensor, dtype: torch.dtype) -> None:
    """Replace convolutions, with the residual additions and ReLUs that follow them, by :func:`conv2d_act`.

    On CUDA, cuDNN's kernel is tried for each shape. The plain convolution is kept if it raises an error, returns
    another result or is slower.

    Args:
        root: the module of the graph, in eval mode.
        graph: a graph after :func:`dfkd_fast.graph.tracing.run`, which changes.
        image: images of the batch size, device and memory format of later calls.
        dtype: dtype of autocast or of the network.
    """
    trace, reasons, fused = Trace(root, graph, {}, {}), dict[Any, str | None](), 0
    autocast = torch.autocast(image.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))
    with torch.no_grad(), autocast:
        if image.is_cuda:
            run(root, graph, image)
        fusions = [fusion for fusion in find(trace, starts=_can_fuse) if fusion.activation == "relu"]
        for fusion in fusions:
            conv: Any = trace.module(fusion.norm)
            x, residual = fusion.norm.all_input_nodes[0], fusion.residual
            sizes = [(node.meta["shape"], node.meta["stride"]) for node in (x, residual) if node is not None]
            key = (*sizes, conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups)
            if key not in reasons:
                reasons[key] = _reason_to_keep(conv, x, residual, image)
            if reasons[key] is None:
                fuse(graph, fusion, conv2d_act)
                fused += 1
            else:
                log.info("%s is not fused with its ReLU: %s", fusion.norm.target, reasons[key])
    log.info("%d of %d convolutions fused with their ReLUs", fused, len(fusions))
