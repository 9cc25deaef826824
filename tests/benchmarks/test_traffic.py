"""Counts of launches and bytes: against the interpreter's loads and stores, hand-counted cases and committed counts."""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from dfkd_fast.benchmarks import count
from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Case, Make, case_of, gradients, tensors
from dfkd_fast.benchmarks.results import dtype_name
from dfkd_fast.benchmarks.step import fake_cuda
from dfkd_fast.benchmarks.traffic import EagerTraffic, Kernel, launch_traffic, op_traffic, summary
from dfkd_fast.graph import conv2d_act  # noqa: F401 - registers the operator
from dfkd_fast.kernels import common
from dfkd_fast.kernels.common import RecordedLaunch, traffic
from dfkd_fast.kernels.config import Launch
from dfkd_fast.report import read_results, write_results
from dfkd_fast.testing import value_and_gradients

from ..ops.table import CASES

MODULES = {
    "batch_norm_act": ("batch_norm_act",),
    "batch_norm_act_conv1x1": ("batch_norm_act_conv1x1",),
    "batchnorm_statistics": ("batchnorm_statistics", "batchnorm_statistics_bwd"),
    "contrastive_loss": ("contrastive_loss", "contrastive_loss_bwd"),
    "distillation_kl": ("distillation_kl",),
    "high_order_attention": ("high_order_attention",),
    "max_pool2x2": ("max_pool2x2",),
    "spatial_attention": ("spatial_attention",),
    "statistics_distance": ("statistics_distance",),
}
"""The kernels' modules, by the prefix of the cases that launch them."""

SHAPES = {"contrastive_loss": (192, 40), "spatial_attention": (2, 40, 5, 4)}
"""Shapes that launch more kernels than those of the cases. Vectors fill whole tiles, because padding is not counted."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RecordedLaunch, float, float]]:
    """The launches in the interpreter, each with the bytes that it loaded and stored, counting each address once."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    found: list[tuple[RecordedLaunch, float, float]] = []
    touched: dict[str, list[Any]] = {"load": [], "store": []}

    def spy(kind: str, method: Any) -> Any:
        def call(self: Any, pointers: Any, *arguments: Any) -> Any:
            mask = arguments[0 if kind == "load" else 1].data.astype(bool)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            touched[kind].append((np.broadcast_to(pointers.data, mask.shape)[mask].ravel(), max(size, 1)))
            return method(self, pointers, *arguments)

        return call

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        for each in touched.values():
            each.clear()
        result = original(self, *arguments, **keywords)
        launch = RecordedLaunch(
            kernel=self,
            arguments=dict(zip(self.arg_names, arguments, strict=False)),
            config=Launch(),
            constants={name: value for name, value in keywords.items() if name in self.arg_names},
        )
        totals = []
        for each in touched.values():
            sizes = {size for _, size in each}
            totals.append(sum(s * len(np.unique(np.concatenate([a for a, z in each if z == s]))) for s in sizes))
        found.append((launch, *totals))
        return result

    original = InterpretedFunction.run
    for kind, name in (("load", "create_masked_load"), ("store", "create_masked_store")):
        monkeypatch.setattr(InterpreterBuilder, name, spy(kind, getattr(InterpreterBuilder, name)))
    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


@pytest.mark.parametrize("op", MODULES)
def test_declared_traffic_is_what_the_interpreter_loads_and_stores(op, launches):
    cases = [replace(case, many=SHAPES.get(op, case.many)) for name, case in CASES.items() if name.startswith(op)]
    if op == "contrastive_loss":
        cases.append(replace(CASES[op], many=(16, 8)))  # one launch
    for case in cases:
        inputs = case.make(case.many, needs_grad=case.needs_grad)(1)
        with case.tiling():
            value_and_gradients(lambda *given, case=case: case.function(*given, backend="triton"), inputs)
    seen = set()
    for launch, read, written in launches:
        counted = launch_traffic(launch)
        seen.add(launch.kernel.fn.__name__)
        assert counted.read == pytest.approx(read, rel=0.02, abs=0), f"{counted.name} reads"
        assert counted.written == pytest.approx(written, rel=1e-9, abs=0), f"{counted.name} writes"
    modules = [importlib.import_module(f"dfkd_fast.kernels.{module}") for module in MODULES[op]]
    declared = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert declared <= seen


def test_a_wrong_declaration_is_detected(launches):
    x, out = torch.ones(5), torch.empty(())
    common.sum_partials(x, out)
    (launch, read, written) = launches.pop()
    assert (read, written) == (20, 4)
    assert summary([launch_traffic(launch)]) == {"launches": 1, "bytes_read": 20, "bytes_written": 4}
    try:
        traffic(writes="x_ptr")(launch.kernel)
        assert launch_traffic(launch).read != read
    finally:
        traffic(writes="out_ptr")(launch.kernel)


def test_a_library_operator_is_one_kernel():
    """It reads the image, weight, bias and residual once, and writes the result once."""
    x, weight, bias, residual = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for shape in ((2, 8, 6, 6), (16, 8, 3, 3), (16,), (2, 16, 6, 6))
    )
    operator, options = torch.ops.dfkd_fast.conv2d_act.default, ([1, 1], [1, 1], [1, 1], 1)
    with EagerTraffic() as eager:
        y = operator(x, weight, bias, residual, *options)
        operator(x, weight, bias, None, *options)
    read = 2 * (x.numel() + weight.numel() + 16)
    written = 2 * y.numel()
    expected = [Kernel("conv2d_act", "eager", read + given, written) for given in (2 * residual.numel(), 0)]
    assert eager.kernels == expected
    assert op_traffic(operator, x, weight, bias, residual, *options) == []  # Inductor's schedule contains it


MAP = 2 * 16 * 8 * 8 * 2
"""Bytes of a map (2, 16, 8, 8) in bfloat16."""
CODES = 2 * 16 * 4 * 4  # one byte per window
VECTOR = 16 * 4  # one float32 value per channel
WEIGHTS = 9 * 16 * 4 * 2  # of high_order_attention: 6 projections and 3 outputs, K = 4
SAVED = 2 * 8 * 8 * (16 + 9 * 4) * 2  # per position: gradients of 16 gates, 3 K products and 6 K hidden values
HIDDEN, WEIGHT = 2 * 2 * 8 * 8 * 2, 16 * 2 * 2  # of spatial_attention, K = 2
SOFTMAX = 2 * VECTOR  # maxima, or sums, per sample and channel
ROWS = 64 * 4  # one float32 value per row

HOA_BACKWARD = [
    (WEIGHTS + 2 * MAP, MAP + SAVED),  # x and the gradient, or x and the target
    (MAP + SAVED, 4 * 2 * WEIGHTS),  # the weights' gradients of 4 splits in float32
    (4 * 2 * WEIGHTS, WEIGHTS),
]
HAND_COUNTED: dict[str, tuple[Any, list[tuple[int, int]]]] = {
    "batch_norm_act": (
        [2, 16, 8, 8],
        [
            (MAP, 2 * VECTOR + 4),  # means, squared deviations and the count of one chunk
            (MAP + 2 * VECTOR + 4 + 4 * VECTOR, MAP + 4 * VECTOR),  # affine and running statistics; mean and rstd
            (2 * MAP + 4 * VECTOR, 2 * VECTOR),  # affine, mean and rstd; the sums of one chunk
            (2 * MAP + 6 * VECTOR, MAP + 2 * VECTOR),
        ],
    ),
    "batchnorm_statistics": (
        [2, 16, 8, 8],
        [
            (MAP + 4 * VECTOR, MAP + 2 * VECTOR),  # affine and running statistics; mean and variance
            (2 * MAP + 7 * VECTOR, MAP),  # also the mean and the gradients of mean and variance
        ],
    ),
    "contrastive_loss": ([128, 128], [(128 * 128 * 2, ROWS + 4), (128 * 128 * 2 + ROWS + 4, 128 * 128 * 2)]),
    "distillation_kl": (
        [64, 200],
        [
            (2 * 64 * 200 * 2, 5 * ROWS + 4),  # five statistics per row, and the loss
            (2 * 64 * 200 * 2 + 5 * ROWS + 4, 2 * 64 * 200 * 2),
        ],
    ),
    "high_order_attention": ([2, 16, 8, 8], [(MAP + WEIGHTS, MAP), *HOA_BACKWARD]),
    "high_order_attention_mse": (
        [2, 16, 8, 8],
        [
            (2 * MAP + WEIGHTS, 4 * 4),  # an error per program
            (4 * 4, 4),
            (HOA_BACKWARD[0][0] + 4, HOA_BACKWARD[0][1]),
            *HOA_BACKWARD[1:],
        ],
    ),
    "max_pool2x2": ([2, 16, 8, 8], [(MAP, MAP // 4 + CODES), (MAP // 4 + CODES, MAP)]),
    "spatial_attention": (
        [2, 16, 8, 8],
        [
            (HIDDEN + WEIGHT, 2 * SOFTMAX),
            (MAP + HIDDEN + WEIGHT + 2 * SOFTMAX, MAP),
            (2 * MAP + HIDDEN + WEIGHT + 2 * SOFTMAX, SOFTMAX),  # delta
            (2 * MAP + HIDDEN + WEIGHT + 3 * SOFTMAX, MAP + HIDDEN + 2 * 2 * WEIGHT),  # dW per sample in float32
            (2 * 2 * WEIGHT, WEIGHT),
        ],
    ),
    "statistics_distance": (
        [2, 16, 8, 8],
        [
            (MAP, 2 * VECTOR),
            (4 * VECTOR, 2 * VECTOR + 4),  # statistics and running statistics; their gradients, and the distance
            (MAP + 3 * VECTOR + 4, MAP),
        ],
    ),
}
"""A shape of each op, and the bytes that each of its launches reads and writes, forward and backward in bfloat16."""


def count_triton(case: Case, dtype: torch.dtype) -> list[Kernel]:
    def run(*inputs: Any) -> None:
        gradients(tensors(case.call(*inputs, backend="triton")), inputs)

    return op_traffic(run, *case.inputs(Make("meta", dtype)))


@pytest.mark.parametrize("op", BENCHMARKS)
def test_hand_counted_launches(op):
    shape, expected = HAND_COUNTED[op]
    kernels = count_triton(case_of(op, shape, "odd"), torch.bfloat16)
    assert [(kernel.read, kernel.written) for kernel in kernels] == expected
    assert {kernel.source for kernel in kernels} == {"triton"}


X, W, Y = 2 * 8 * 6 * 6 * 2, 16 * 8 * 3 * 3 * 2, 2 * 16 * 6 * 6 * 2
"""Bytes of a bfloat16 convolution's input, weight and output."""


def test_hand_counted_convolution_in_eager_mode_and_compiled():
    def call(x: Any, weight: Any) -> Any:
        return F.conv2d(x, weight, padding=1).relu() + 1

    compiler = fake_cuda._Compiler(code=True)
    with torch._inductor.config.patch(fake_cuda._INDUCTOR), fake_cuda.fake_cuda() as mode, mode:
        x, weight = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((2, 8, 6, 6), (16, 8, 3, 3)))
        x = x.to(memory_format=torch.channels_last)
        with EagerTraffic() as eager:
            call(x, weight)
        torch.compile(call, fullgraph=True, dynamic=False, backend=compiler)(x, weight)
    assert [asdict(kernel) for kernel in eager.kernels] == [
        {"name": "convolution", "source": "eager", "read": X + W, "written": Y},
        {"name": "relu", "source": "eager", "read": Y, "written": Y},
        {"name": "add", "source": "eager", "read": Y, "written": Y},
    ]
    (graph,) = compiler.graphs.values()
    assert graph["kernels"] == [
        {"name": "convolution", "source": "inductor", "read": W, "written": W},  # the weight to channels-last
        {"name": "convolution", "source": "library", "read": X + W, "written": Y},
        {"name": "add+relu", "source": "inductor", "read": Y, "written": Y},
    ]


@pytest.mark.parametrize("op", BENCHMARKS)
def test_kernels_do_not_exceed_the_committed_counts(op, repository):
    rows = read_results(repository / "benchmarks" / "results" / "counted" / "op_counts.json")["rows"]
    committed = {(row["case"], row["dtype"]): row for row in rows if (row["op"], row["backend"]) == (op, "triton")}
    paper = [case for case in BENCHMARKS[op].cases if case.shapes == "paper"]
    assert committed.keys() == {(case.name, dtype_name(dtype)) for case in paper for dtype in case.dtypes}
    for case in paper:
        for dtype in case.dtypes:
            found, before = summary(count_triton(case, dtype)), committed[case.name, dtype_name(dtype)]
            why = f"{case.name}; if intended, run dfkd-fast bench --count {op}"
            assert found["launches"] <= before["launches"], why
            moved = round(found["bytes_read"]) + round(found["bytes_written"])
            assert moved <= before["bytes_read"] + before["bytes_written"], why


def made_up(kernel: dict[str, Any], *, work: dict[str, Any] | None = None, error: str | None = None) -> dict[str, Any]:
    """A report of `fake_cuda.trace` for a step variant, in which one kernel runs twice per step."""
    return {
        "error": error,
        "kernels": {f"{step}{again}": [kernel] for step in count.STEPS for again in ("", " again")},
        "graphs": {f"{step}.teacher.forward": {"kernels": [{**kernel, "source": "library"}]} for step in count.STEPS},
        "work": work,
    }


def test_counting_steps_keeps_other_rows(tmp_path: Path):
    kernel = {"name": "add", "source": "eager", "read": 2.95e9, "written": 2.95e9}
    path = tmp_path / "step_counts.json"
    row = {"step": "generator_step", "variant": "before", "commit": "3ea6f81", "flops": 1.0, "compulsory_bytes": 2.0}
    row |= {"launches": 1, "bytes_read": 1, "bytes_written": 1, "least_us": 1.0, "kernels": [], "environment": 0}
    write_results(path, {"environments": [{}], "rows": [row]})
    work = {step: {"bytes": 5.0, "flops": 780e12} for step in count.STEPS}
    reports = {"eager": made_up(kernel, work=work), "dfkd_fast": made_up(kernel)}
    count.count(variants=["dfkd_fast", "eager"], out=tmp_path, trace=lambda name, code: {name: reports[name]})
    first, *rows = read_results(path)["rows"]
    assert first == row
    assert [(each["variant"], each["step"]) for each in rows] == [
        *(("eager", step) for step in count.STEPS),
        *(("dfkd_fast", step) for step in count.STEPS),
    ]
    last = rows[-1]
    assert (last["launches"], last["bytes_read"], last["bytes_written"]) == (2, 5_900_000_000, 5_900_000_000)
    assert (last["compulsory_bytes"], last["flops"], last["least_us"]) == (5.0, 780e12, 1e6)  # 4 ms of bytes
    assert [(each["region"], each["source"], each["launches"]) for each in last["kernels"]] == [
        ("outside", "eager", 1),
        ("teacher.forward", "library", 1),
    ]
    with pytest.raises(RuntimeError, match=r"(?s)the trace of eager failed:.*why"):
        count.count(variants=["eager"], out=tmp_path, trace=lambda name, code: {name: made_up(kernel, error="why")})


def test_counting_explains_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="nothing to count for conv; there are high_order_attention, "):
        count.count(["conv"])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="counting needs a torch built with CUDA"):
        count.count()
    monkeypatch.setattr(fake_cuda, "C_COMPILER", "no-such-compiler")
    with pytest.raises(RuntimeError, match="counting needs a C compiler, and there is no no-such-compiler; set CC"):
        count.count()
