"""Counts of launches and bytes: against the interpreter's loads and stores, and against hand-counted cases."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from dfkd_fast.benchmarks.traffic import EagerTraffic, Kernel, launch_traffic, op_traffic, summary
from dfkd_fast.graph import conv2d_act  # noqa: F401 - registers the operator
from dfkd_fast.kernels import common
from dfkd_fast.kernels.common import RecordedLaunch, traffic
from dfkd_fast.kernels.config import Launch
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
