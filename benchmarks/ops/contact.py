"""First check of the kernels on a device, at the paper's shapes: accuracy, repeatability, capture; both passes.

Each op's kernels are compared with float64, by the rule of the tests: at most twice the error of the reference in the
same dtype. A second run and the replay of a CUDA graph must give the same bits. ``engine`` runs three rounds of a tiny
distillation on the graph engine and on the eager one. ``memcheck`` runs every op at small shapes under
compute-sanitizer.

    python -m dfkd_fast.benchmarks.ops.contact spatial_attention --out checks.json
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Case, Make, tensors
from dfkd_fast.benchmarks.results import Results, parser

__all__ = ["check_case", "check_engine", "main"]

_FACTOR = 2.0
_NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # without PyTorch's allocator, no graph can be captured
_DRAWS = 16  # of inputs, where a result is a single number, whose error can be small or large by chance
_WAITS, _WAIT_S = 4, 10.0  # for memory that other processes hold


def _outputs(case: Case, inputs: Sequence[Any], grad_outputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Results and gradients of a case."""
    results = tensors(case.call(*inputs, backend=backend))
    through = [result for result in results if result.requires_grad]
    leaves = [tensor for tensor in tensors(list(inputs)) if tensor.requires_grad]
    gradients = torch.autograd.grad(through, leaves, list(grad_outputs)) if through else ()
    return [*(result.detach() for result in results), *gradients]


def _captured(case: Case, inputs: Sequence[Any], grad_outputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    """The same from the second replay of a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _outputs(case, inputs, grad_outputs, backend)
        with torch.cuda.graph(graph, stream=stream):
            found = _outputs(case, inputs, grad_outputs, backend)
    for _ in range(2):
        for tensor in found:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)  # an element that is not written shows
        graph.replay()
    torch.cuda.synchronize()
    return found


def _ratio(actual: Tensor, reference: Tensor, truth: Tensor, name: str) -> float:
    """Error of a kernel over that of the reference.

    Raises:
        AssertionError: more than twice the reference's error and more than one unit in the last place of the largest
            value, by root mean square or maximum.
    """
    if not actual.is_floating_point():
        assert torch.equal(actual, reference), f"{name} differs from the reference"
        return 0.0
    largest, ratio = float(truth.abs().max()), 0.0
    ulp = torch.finfo(actual.dtype).eps * largest
    mine, other = ((x.double() - truth).abs() for x in (actual, reference))
    for what, error, allowed in (
        ("root mean square", float(mine.square().mean().sqrt()), float(other.square().mean().sqrt())),
        ("largest", float(mine.max()), float(other.max())),
    ):
        ratio = max(ratio, error / max(allowed, 1e-3 * ulp, 1e-300))
        # "not <=" because NaN must fail.
        if not error <= _FACTOR * allowed + ulp:
            raise AssertionError(f"{name}: {what} error {error:.3e}, of the reference {allowed:.3e}")
    return ratio


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def _draw(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Inputs, and output gradients with the strides of the outputs."""
    make = Make(device, dtype, seed=case.seed + seed)
    inputs = case.inputs(make)
    outputs = [r for r in tensors(case.call(*inputs, backend="reference")) if r.requires_grad]
    return inputs, [torch.empty_like(r).copy_(make.tensor(*r.shape, dtype=r.dtype)).detach() for r in outputs]


def check_case(case: Case, device: torch.device, dtype: torch.dtype, *, backend: str = "triton") -> dict[str, Any]:
    """Check one case; CUDA graphs only on CUDA.

    Returns:
        ``ratio``, the largest error over the reference's, of all results and gradients; ``status``, "ok" or the first
        fault; and ``seconds``.
    """
    start, ratio = time.monotonic(), 0.0
    try:
        columns: list[list[list[Tensor]]] = []
        while len(columns) < _DRAWS:
            inputs, grads = _draw(case, device, dtype, len(columns))
            first = _outputs(case, inputs, grads, backend)
            assert all(map(_same, first, _outputs(case, inputs, grads, backend))), "two runs differ"
            if device.type == "cuda" and not columns and _NO_CACHING not in os.environ:
                assert all(map(_same, first, _captured(case, inputs, grads, backend))), "a graph's replay differs"
            reference = _outputs(case, inputs, grads, "reference")
            exact = tree_map_only(Tensor, _double, inputs)
            truth = _outputs(case, exact, [g.double() for g in grads], "reference")
            columns.append([first, reference, truth])
            if all(result.numel() > 1 for result in first):
                break  # only a single number can be exact by luck
        for place in range(len(first)):
            mine, other, true = (torch.cat([draw[i][place].flatten() for draw in columns]) for i in range(3))
            ratio = max(ratio, _ratio(mine, other, true, f"result {place}"))
        status = "ok"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # becomes the row's status; other cases go on
        status = f"{type(error).__name__}: {error}"[:400]
    return {"ratio": ratio, "status": status, "seconds": round(time.monotonic() - start, 2)}


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def check_engine(device: torch.device) -> dict[str, Any]:
    """Three rounds of a tiny distillation, graph engine against eager, float32, the same seed.

    Returns:
        ``difference``, the largest relative difference of a loss, at most 1e-3; and ``status``. On a CPU, where there
        are no graphs, eager is compared with itself.
    """
    from dfkd_fast.benchmarks.step.variants import SIZES, build
    from dfkd_fast.engine import EagerEngine, create_engine
    from dfkd_fast.models import frozen

    size, losses = replace(SIZES["small"], steps=(3, 3)), []
    for engine in (lambda state: create_engine(state), EagerEngine):
        state, teacher = build(size, size.batch, device, precision="fp32")
        with state.runtime.backends(), frozen(teacher):
            running = engine(state)
            running.prepare()
            found = []
            for _ in range(3):
                running.start_round()
                for _ in range(sum(size.steps)):
                    running.step()
                state.runtime.synchronize()
                found.append(state.trace.detach().clone().cpu())
                state.position.round += 1
                state.position.step = 0
            losses.append(torch.stack(found).double())
    ours, eager = losses
    difference = float(((ours - eager).abs() / eager.abs().clamp(min=1e-3)).max())
    status = "ok" if difference <= 1e-3 else f"losses differ by {difference:.2e}"
    return {"difference": difference, "status": status}


def memcheck(op: str) -> dict[str, Any]:
    """Run an op's small cases under compute-sanitizer's memcheck, without PyTorch's caching allocator."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", __spec__.name]
    environment = {**os.environ, _NO_CACHING: "1"}
    done = subprocess.run([*command, op, "--size", "small", "--dtypes", "bfloat16"], env=environment, check=False)
    return {"status": "ok" if done.returncode == 0 else f"exit status {done.returncode}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one op, or the engines; one row per case. Returns 1 where a check failed."""
    command = parser(__doc__, small="awkward shapes, all dtypes", out=False)
    command.add_argument("what", choices=[*BENCHMARKS, "engine", "memcheck"])
    command.add_argument("--dtypes", nargs="+", default=None, choices=["float32", "bfloat16", "float16"])
    command.add_argument("--backend", choices=["triton", "cuda"], default="triton")
    options = command.parse_args(arguments)

    device = torch.device(options.device)
    results = Results(options.out, key=("check",)) if options.out else None
    failed = False

    def add(case: str, dtype: str, found: dict[str, Any], op: str = options.what) -> None:
        nonlocal failed
        failed |= found["status"] != "ok"
        print(f"{op} {case} {dtype}: {found}", flush=True)
        if results:
            results.add({"check": f"{op} {case} {dtype} {options.backend}", **found})

    if options.what == "engine":
        add("three rounds", "float32", check_engine(device))
        return int(failed)
    if options.what == "memcheck":
        for op in BENCHMARKS:
            add("memcheck", "bfloat16", memcheck(op), op)
        return int(failed)
    small = options.size == "small"
    dtypes = options.dtypes or (["float32", "bfloat16", "float16"] if small else ["bfloat16"])
    for case in BENCHMARKS[options.what].cases:
        if case.shapes != ("odd" if small else "paper"):
            continue
        for dtype in dtypes:
            for attempt in range(_WAITS):
                try:
                    found = check_case(case, device, getattr(torch, dtype), backend=options.backend)
                    break
                except torch.OutOfMemoryError as error:
                    found = {"status": f"out of memory: {error}"[:200]}
                gc.collect()
                torch.cuda.empty_cache()
                time.sleep(_WAIT_S if attempt + 1 < _WAITS else 0)
            add(case.name, dtype, found)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
