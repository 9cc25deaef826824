"""Traces and compiles whole steps on fake CUDA tensors, without a GPU.

Run as a script, it takes both steps of variants of `benchmarks/step/variants.py` through Dynamo, AOTAutograd and, with
``code``, Inductor's code generation, and writes a report. Nothing is computed: tensors have shapes, strides, dtypes
and a device, but no values. :func:`trace` starts the script in a separate process, because the process of the tests
runs Triton in its interpreter, and because a library must be preloaded (:data:`_NO_ACCELERATOR`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["C_COMPILER", "count_launches", "trace"]

C_COMPILER = os.environ.get("CC", "cc")
_STEPS = ("generator_step", "student_step")

# In a CUDA build of torch, autograd's engine requests CUDA streams, unless these functions find no accelerator.
_NO_ACCELERATOR = """
short _ZN2at11accelerator14getAcceleratorEb(char checked) { return 0; }  /* an empty std::optional<DeviceType> */
char _ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE(char type) { return 0; }
"""


def trace(*variants: str, code: bool = False) -> dict[str, dict[str, Any]]:
    """Trace variants in one process and return a report per variant.

    Args:
        *variants: ``dfkd_fast``, ``compile`` (plain networks and reference ops, compiled), ``peer``, or a fault that
            is injected into ``dfkd_fast`` (:data:`_FAULTS`).
        code: generate code, which takes minutes.

    Returns:
        By variant: ``error`` (a traceback or None), ``regions`` and ``graph_breaks`` (Dynamo's counts),
        ``synchronizations`` of each step outside of compiled regions, and ``graphs``. Each graph, with a name such as
        ``student_step.teacher.forward``, has the ``calls`` of dfkd_fast operators with shapes and strides, the
        ``synchronizations`` and, with ``code``, the generated ``code``.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        library, out = Path(folder) / "no_accelerator.so", Path(folder) / "reports.json"
        command = [C_COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=_NO_ACCELERATOR, text=True, check=True)
        # Hide GPUs, so that the trace is the same on every machine.
        environment |= {"LD_PRELOAD": str(library), "TORCHINDUCTOR_CACHE_DIR": folder, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, str(out), "code" if code else "graphs", *variants]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.exists():
            raise RuntimeError(f"the trace ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


_LAUNCHES = {
    "triton": re.compile(r"\btriton_\w+\.run\("),  # kernels that Inductor writes
    "extern": re.compile(r"\bextern_kernels\.\w+\(|\btorch\.ops\.(?!dfkd_fast\.)\w+\.\w+\.\w+\("),  # libraries
    "dfkd_fast": re.compile(r"\btorch\.ops\.dfkd_fast\.\w+\.\w+\("),
}


def count_launches(code: str) -> dict[str, int]:
    """Count the calls of Inductor's kernels, library functions and dfkd_fast operators in generated code."""
    return {kind: len(pattern.findall(code)) for kind, pattern in _LAUNCHES.items()}


_H100 = SimpleNamespace(
    **{"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"total_memory": 80 << 30, "L2_cache_size": 50 << 20, "max_threads_per_multi_processor": 2048},
    **{"regs_per_multiprocessor": 65536, "shared_memory_per_multiprocessor": 233472},
    **{"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448, "gcnArchName": ""},
)


def _conv_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    formats = [torch._prims_common.suggest_memory_format(tensor) for tensor in (x, weight)]
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Make torch believe that this machine has an H100, and yield a FakeTensorMode that is not yet entered."""
    from torch._dynamo import device_interface
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    device: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "exchange_device": lambda index: 0,
        "maybe_exchange_device": lambda index: 0,
        "get_device_properties": lambda device=None: _H100,
    }
    patches: list[tuple[Any, str, Any]] = [
        # Queries of torch, Dynamo, Inductor and dfkd_fast's ops; Dynamo's interface keeps copies of the functions.
        *((torch.cuda, f"_{name}" if "exchange" in name else name, value) for name, value in device.items()),
        *((device_interface.CudaInterface, name, staticmethod(value)) for name, value in device.items()),
        (device_interface.CudaInterface.Worker, "get_device_properties", staticmethod(device["get_device_properties"])),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        # Optimizers query whether a graph is being captured.
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        # Dynamo saves and restores CUDA's random state around a trace, and queries the current stream.
        (torch.cuda, "get_rng_state", lambda *a: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda *a: None),
        (torch.accelerator, "is_available", lambda: False),
        # cuDNN's choice of a memory format, which the fake convolution queries from the missing device.
        (torch._C, "_select_conv_backend", lambda *a, **k: torch._C._ConvBackend.Cudnn),
        (torch._C, "_conv_determine_backend_memory_format", _conv_format),
        # The architecture that Inductor generates Triton kernels for.
        (driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))),
        # If a device is available, fake tensors first create a real tensor on it.
        (FakeTensorMode, "avoid_device_init", True),
        (fake_tensor, "init_gpu_context", lambda device: None),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield FakeTensorMode()


def _like(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


class _CopyToCuda(TorchFunctionMode):
    """Makes ``copy.deepcopy`` create fake tensors on cuda:0 with the strides of the original."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C.TensorBase.clone:  # of a parameter's data
            return self._fake(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._fake(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))

    def _fake(self, x: Tensor) -> Tensor:
        with self._mode, torch.no_grad():
            return _like(x, torch.device("cuda:0"))


def _require_equal_strides(parameters: list[Tensor], *others: list[Tensor]) -> None:
    """Fused optimizers refuse gradients and buffers whose strides differ from those of their parameters."""
    for other in others:
        for one, two in zip(parameters, other, strict=True):
            pairs = zip(one.shape, one.stride(), two.stride(), strict=False)
            if one.shape == two.shape and any(size != 1 and here != there for size, here, there in pairs):
                raise AssertionError(f"{tuple(one.shape)}: strides {one.stride()} and {two.stride()} in one optimizer")


_COPIES = ("aten::_to_copy", "aten::copy_", "prims::device_put")


def _synchronizes(operator: Any, inputs: Any, result: Any) -> bool:
    """Whether a call makes the host wait, because it reads device values or copies between host and device."""
    devices = {leaf.device.type for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    dynamic = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags)
    # Indexing waits only if an index is a mask, and fake tensors refuse masks.
    if "cuda" in devices and dynamic and operator.name() != "aten::index.Tensor":
        return True
    return operator.name() in _COPIES and devices | {result.device.type} == {"cpu", "cuda"}


class _Synchronizations(TorchDispatchMode):
    """Records operators outside of compiled regions that make the host wait. Reading a device value returns 1."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise Dynamo would not compile inside the mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() == "aten::_local_scalar_dense":
            result: Any = 1.0 if args[0].is_floating_point() else 1
        elif func.name().startswith(("aten::_fused_adam_", "aten::_fused_sgd_")):  # torch has no fakes for them
            _require_equal_strides(*(each for each in args if isinstance(each, list | tuple) and each))
            result = None
        else:
            result = func(*args, **kwargs)
        if _synchronizes(func, (args, kwargs), result):
            self.found.append(str(func))
        return result


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, torch.fx.Node) else node


def _describe(value: Any) -> Any:
    value = _value(value)
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "stride": list(value.stride()), "dtype": str(value.dtype)}
    return [_describe(one) for one in value] if isinstance(value, list | tuple) else str(value)


def _describe_call(node: torch.fx.Node) -> dict[str, Any]:
    """Describe a call of a dfkd_fast operator, with shapes and strides."""
    operator: Any = node.target
    named = zip((argument.name for argument in operator._schema.arguments), node.args, strict=False)
    results = _describe(node)
    return {
        "op": operator.name().partition("::")[2],
        "arguments": {name: _describe(value) for name, value in named},
        "results": results if isinstance(results, list) else [results],
    }


class _Compiler:
    """A backend of torch.compile that stops after AOTAutograd's graphs or after Inductor's code generation.

    Attributes:
        step: the step in progress.
        graphs: the ``graphs`` of the report.
    """

    def __init__(self, code: bool) -> None:
        self.code, self.step = code, ""
        self.graphs: dict[str, dict[str, Any]] = {}

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, inputs, inner_compile=self._inner)

    def _inner(self, module: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        region = torch._guards.TracingContext.get().traced_code[0].co_name.removeprefix("region_")
        name = f"{self.step}.{region}.{'backward' if options.get('is_backward') else 'forward'}"
        assert name not in self.graphs, f"{name} is compiled twice"
        nodes = [node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        self.graphs[name] = {
            "calls": [_describe_call(node) for node in nodes if node.target.namespace == "dfkd_fast"],
            "synchronizations": [
                str(node.target)
                for node in nodes
                if _synchronizes(node.target, tree_map(_value, (node.args, node.kwargs)), _value(node))
            ],
        }
        outputs = [_value(node) for node in module.graph.output_node().args[0]]
        if self.code:
            self.graphs[name]["code"] = _generate(module, inputs, options)

        def run(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            return [_like(x, x.device) if isinstance(x, Tensor) else x for x in outputs]

        run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd then releases the arguments
        return run


def _generate(module: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> str:
    """Return the code that Inductor would load and run."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []

    def keep(lowering: GraphLowering) -> None:
        codes.append(lowering.codegen()[0].value)
        raise InterruptedError("stop before kernels are compiled")

    with mock.patch.object(GraphLowering, "compile_to_module", keep):
        try:
            compile_fx_inner(module, inputs, **options)
        except Exception:
            if not codes:
                raise
    return codes[0]


def _engine(variant: str, size: Any, compiler: _Compiler, stack: contextlib.ExitStack) -> Any:
    """Build the engine of a variant, on fake CUDA tensors until ``stack`` is closed.

    Building the state reads values, which fake tensors lack. It is therefore built on the CPU and then copied.
    """
    from dfkd_fast import ops
    from dfkd_fast.benchmarks.step import variants as step_variants
    from dfkd_fast.benchmarks.step.peer_loop import PeerLoop
    from dfkd_fast.engine import CompiledEngine, Engine, networks
    from dfkd_fast.models import fold_batchnorm, frozen

    cpu, half = torch.device("cpu"), (0.5, 0.5, 0.5)
    # Skip computing BatchNorm statistics, which takes seconds and does not change the trace.
    with mock.patch.object(step_variants, "_with_statistics", lambda model, size, device: model.eval()):
        state, teacher = step_variants.build(size, size.batch, cpu, channels_last=variant != "peer")
    folded = fold_batchnorm(state.teacher, dtype=state.runtime.autocast, image_size=size.image)
    mode = stack.enter_context(fake_cuda())
    with _CopyToCuda(mode):
        state, teacher, folded = copy.deepcopy((state, teacher, folded), {id(state.noise): state.noise})
    state.runtime = replace(state.runtime, device=torch.device("cuda:0"))
    stack.enter_context(mode)
    if variant == "peer":
        # New modules are created on the device, because a fake parameter cannot be moved.
        with torch.device("cuda:0"), mock.patch.object(nn.Module, "to", lambda module, *a, **k: module):
            return PeerLoop(state, mean=half, std=half)
    if variant == "compile":
        stack.enter_context(ops.backend("reference"))
        stack.enter_context(frozen(teacher))
        compiled = networks.eager_networks(state, compile={"backend": compiler})
        return Engine("eager", state, compiled, step_variants._MarkingExecutor())
    stack.enter_context(frozen(teacher))
    with mock.patch.object(networks, "fold_batchnorm", return_value=folded), _CopyToCuda(mode):
        return CompiledEngine(state, backend=compiler)  # type: ignore[arg-type]


def _break_graph(engine: Any) -> None:
    term = engine.state.generator.objective.terms["kd"]
    forward = term.forward

    def broken(*arguments: Any) -> Tensor:
        torch._dynamo.graph_break()
        return forward(*arguments)

    term.forward = broken


def _inject_other_faults(engine: Any) -> None:
    """Synchronize, change shapes between steps, and let an operator's fake ignore the memory format."""
    draw, counts = engine.state.draw, itertools.count()

    def faulty(count: int) -> Tensor:
        noise = draw(count + next(counts))
        noise.sum().item()
        noise.cpu()
        return noise

    engine.state.draw = faulty
    module = importlib.import_module("dfkd_fast.ops.batchnorm_statistics")
    module.new_map = lambda x, dtype=None: torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


# Faults that are injected into a generator step of the small size, to test the checks.
_FAULTS: dict[str, Callable[[Any], None]] = {"graph_break": _break_graph, "other_faults": _inject_other_faults}


def _report(variant: str, code: bool) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    from dfkd_fast.benchmarks.step.variants import SIZES

    torch._dynamo.reset()
    counters.clear()
    compiler, error = _Compiler(code), None
    synchronizations: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
        # The engine sets fallback_random too. Constant folding and shape padding would create real tensors.
        inductor = {"fallback_random": True, "joint_graph_constant_folding": False, "shape_padding": False}
        stack.enter_context(torch._inductor.config.patch(inductor))
        inject = _FAULTS.get(variant)
        engine = _engine(variant, SIZES["small" if inject else "full"], compiler, stack)
        if inject:
            inject(engine)
        try:
            for again in ("", " again"):
                for compiler.step in _STEPS[:1] if inject else _STEPS:
                    with _Synchronizations() as seen:
                        getattr(engine, compiler.step)()
                    synchronizations[compiler.step + again] = seen.found
        except Exception:
            error = traceback.format_exc()
    return {
        "error": error,
        "regions": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
        "synchronizations": synchronizations,
        "graphs": compiler.graphs,
    }


if __name__ == "__main__":
    out, goal, *names = sys.argv[1:]
    Path(out).write_text(json.dumps({name: _report(name, goal == "code") for name in names}))
    # Without a device, the threads of autograd's engine do not end cleanly.
    os._exit(0)
