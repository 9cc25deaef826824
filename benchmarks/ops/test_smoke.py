"""Smoke tests of the kernels on a device, at the paper's shapes: accuracy, determinism and CUDA graph capture.

Results and gradients of each op are compared with float64 under the rule of the tests: at most twice the error of the
reference in the same dtype. A second run and the replay of a CUDA graph must give the same bits. Every op also runs at
irregular shapes under compute-sanitizer.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Case, Make, gradients, tensors
from dfkd_fast.testing import assert_no_worse

_NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # without PyTorch's allocator, no graph can be captured
_DRAWS = 16  # random inputs if a result is a scalar, because the error of a single scalar depends on chance
_ATTEMPTS, _WAIT_S = 4, 10.0  # attempts and seconds between them, while other processes use the memory
_CASES = [(op, case) for op, benchmark in BENCHMARKS.items() for case in benchmark.cases if case.shapes == "paper"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _outputs(case: Case, inputs: Sequence[Any], grad_outputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Return results and gradients of a case."""
    results = tensors(case.call(*inputs, backend=backend))
    return [*(result.detach() for result in results), *gradients(results, inputs, grad_outputs)]


def _replayed(case: Case, inputs: Sequence[Any], grad_outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return results and gradients from the second replay of a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _outputs(case, inputs, grad_outputs, "triton")
        with torch.cuda.graph(graph, stream=stream):
            found = _outputs(case, inputs, grad_outputs, "triton")
    for _ in range(2):
        for tensor in found:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)  # reveals elements that are not written
        graph.replay()
    torch.cuda.synchronize()
    return found


def _assert_same(a: Sequence[Tensor], b: Sequence[Tensor], message: str) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.isnan(), y.isnan()), message
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), message


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def _draw(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> list[list[Tensor]]:
    """Return results and gradients for random inputs: of the kernels, the reference, and the reference in float64."""
    make = Make(device, dtype, seed=case.seed + seed)
    inputs = case.inputs(make)
    outputs = [r for r in tensors(case.call(*inputs, backend="reference")) if r.requires_grad]
    grads = [torch.empty_like(r).copy_(make.tensor(*r.shape, dtype=r.dtype)).detach() for r in outputs]
    actual = _outputs(case, inputs, grads, "triton")
    _assert_same(actual, _outputs(case, inputs, grads, "triton"), "two runs differ")
    if device.type == "cuda" and not seed and _NO_CACHING not in os.environ:
        _assert_same(actual, _replayed(case, inputs, grads), "the replay of a graph differs")
    reference = _outputs(case, inputs, grads, "reference")
    truth = _outputs(case, tree_map_only(Tensor, _double, inputs), [g.double() for g in grads], "reference")
    return [actual, reference, truth]


def check_case(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """Check one case, including CUDA graph capture if the device is CUDA.

    Returns:
        The largest ratio of the root mean square error of a result or gradient to that of the reference.
    """
    draws, ratio = [_draw(case, device, dtype, 0)], 0.0
    if any(result.numel() == 1 for result in draws[0][0]):
        draws += [_draw(case, device, dtype, seed) for seed in range(1, _DRAWS)]
    for index in range(len(draws[0][0])):
        actual, reference, truth = (torch.cat([draw[i][index].flatten() for draw in draws]) for i in range(3))
        name = f"result {index}"
        if actual.is_floating_point():
            ulp = torch.finfo(actual.dtype).eps * float(truth.abs().max())  # of the largest value
            ratio = max(ratio, assert_no_worse(actual, than=reference, truth=truth, floor=ulp, name=name))
        else:
            assert torch.equal(actual, reference), f"{name} differs from the reference"
    return ratio


@needs_cuda
@pytest.mark.parametrize(("op", "case"), _CASES, ids=lambda each: each.name if isinstance(each, Case) else each)
def test_kernels_match_float64_reference(op: str, case: Case, record_property: Any) -> None:
    """Results and gradients in bfloat16. Waits for memory that other processes use."""
    for attempt in range(_ATTEMPTS):
        try:
            record_property("ratio", check_case(case, torch.device("cuda"), torch.bfloat16))
            break
        except torch.OutOfMemoryError:
            if attempt + 1 == _ATTEMPTS:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        time.sleep(_WAIT_S)


@needs_cuda
@pytest.mark.parametrize("op", BENCHMARKS)
def test_memcheck_finds_no_error(op: str) -> None:
    """Runs this file under compute-sanitizer, without PyTorch's caching allocator."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-P", __file__, op]
    subprocess.run(command, env={**os.environ, _NO_CACHING: "1"}, check=True)


if __name__ == "__main__":
    for odd in BENCHMARKS[sys.argv[1]].cases:
        if odd.shapes == "odd":
            check_case(odd, torch.device("cuda"), torch.bfloat16)
