"""Traces and compiles steps and ops on fake CUDA tensors, without a GPU.

Run as a program, it takes both steps of variants of :mod:`~dfkd_fast.benchmarks.step.variants` through Dynamo,
AOTAutograd and, with ``code``, Inductor's code generation, and writes a report. Nothing is computed: tensors have
shapes, strides, dtypes and a device, but no values. :func:`trace` starts the program in a separate process, because
tests run Triton in its interpreter, and because a library must be preloaded (:data:`_NO_ACCELERATOR`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Make, gradients, tensors
from dfkd_fast.benchmarks.traffic import EagerTraffic, Kernel, inductor_traffic, op_traffic
from dfkd_fast.collectives import Group, distributed
from dfkd_fast.config import recipe

__all__ = ["C_COMPILER", "trace"]

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
        *variants: ``dfkd_fast``, ``compile`` (plain networks and reference ops, compiled), ``eager`` (the same without
            a compiler), ``peer``, or a fault that is injected into ``dfkd_fast`` (:data:`_FAULTS`); ``distributed``,
            one of four processes at the small size; ``methods:NAME``, another method at the small size; or
            ``ops:NAME``, the benchmark cases of an op with the paper's shapes.
        code: generate code, which takes about a minute per variant.

    Returns:
        By variant of a step: ``error`` (a traceback or None), ``regions`` and ``graph_breaks`` (Dynamo's counts),
        ``synchronizations``, ``collectives`` and ``kernels`` of each step outside of compiled regions, and ``graphs``.
        Each graph, with a name such as ``student_step.teacher.forward``, has the ``calls`` of dfkd_fast operators with
        shapes and strides, the ``synchronizations``, the ``collectives`` and, with ``code``, the generated ``code`` and
        its ``kernels``. ``work`` is that of :func:`dfkd_fast.benchmarks.step.roofline.round_work` by step, for
        ``eager`` only. By op: a list of kernels per case, dtype and source. Kernels have the fields of
        :class:`dfkd_fast.benchmarks.traffic.Kernel`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        library, out = Path(folder) / "no_accelerator.so", Path(folder) / "reports.json"
        command = [C_COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=_NO_ACCELERATOR, text=True, check=True)
        # Hide GPUs, so that the trace is the same on every machine.
        environment |= {"LD_PRELOAD": str(library), "TORCHINDUCTOR_CACHE_DIR": folder, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "dfkd_fast.benchmarks.step.fake_cuda", str(out), "code" if code else "graphs"]
        command += variants
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.exists():
            raise RuntimeError(f"the trace ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


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
        (torch._C, "_select_conv_backend", lambda *a, **k: torch._C._ConvBackend.Cudnn),  # type: ignore[attr-defined]
        (torch._C, "_conv_determine_backend_memory_format", _conv_format),
        # The architecture that Inductor generates Triton kernels for.
        (driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))),
        (torch.utils._foreach_utils, "_foreach_supported_types", [Tensor, nn.Parameter, fake_tensor.FakeTensor]),
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


class _Synchronizations(EagerTraffic):
    """Also records operators outside of compiled regions that make the host wait. Reading a device value returns 1."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.collectives: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_collective(func):
            self.collectives.append(func.__name__)
        if func.name() == "aten::_local_scalar_dense":
            result: Any = 1.0 if args[0].is_floating_point() else 1
        elif func.name().startswith(("aten::_fused_adam_", "aten::_fused_sgd_")):  # torch has no fakes for them
            _require_equal_strides(*(list(each) for each in args if isinstance(each, list | tuple) and each))
            result = None
        elif func.name() == "aten::_standard_gamma":  # nor for this
            result = torch.empty_like(args[0])
        else:
            result = func(*args, **kwargs)
        self.count(func, args, kwargs, result)
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


def _dfkd_fast_call(node: torch.fx.Node) -> tuple[Any, list[Any]] | None:
    """Return the dfkd_fast operator that a node calls and its arguments, or None if it calls another one."""
    operator: Any = node.target
    functionalized = operator is torch.ops.higher_order.auto_functionalized_v2  # the operator writes to arguments
    if functionalized:
        operator = node.args[0]
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace != "dfkd_fast":
        return None
    if not functionalized:
        return operator, [*node.args]
    bases: Any = node.kwargs["_all_bases"]
    arguments = []
    for argument in operator._schema.arguments:
        index: Any = node.kwargs.get(f"_{argument.name}_base_index")
        arguments.append(node.kwargs.get(argument.name) if index is None else bases[index])
    return operator, arguments


def _describe_call(node: torch.fx.Node, operator: Any, arguments: list[Any]) -> dict[str, Any]:
    """Describe a call of a dfkd_fast operator, with shapes and strides."""
    named = zip((argument.name for argument in operator._schema.arguments), arguments, strict=False)
    results = _describe(node)
    if operator._schema.is_mutable:  # followed by the tensors that the operator has written to
        results = results[: len(operator._schema.returns)]
    return {
        "op": operator.name().partition("::")[2],
        "arguments": {name: _describe(value) for name, value in named},
        "results": results if isinstance(results, list) else [results],
    }


def _is_collective(operator: Any) -> bool:
    return operator.namespace == "_c10d_functional" and not operator.__name__.startswith("wait_tensor")


class _Compiler:
    """A backend of torch.compile that stops after AOTAutograd's graphs or after Inductor's code generation.

    Attributes:
        step: the step in progress.
        graphs: the ``graphs`` of the report.
    """

    def __init__(self, code: bool) -> None:
        self.code, self.step = code, ""
        self.graphs: dict[str, dict[str, Any]] = {}

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        inner: Any = self._inner
        return compile_fx(module, inputs, inner_compile=inner)

    def _inner(self, module: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        region = torch._guards.TracingContext.get().traced_code[0].co_name.removeprefix("region_")
        name = f"{self.step}.{region}.{'backward' if options.get('is_backward') else 'forward'}"
        assert name not in self.graphs, f"{name} is compiled twice"
        nodes = [node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        calls = [(node, call) for node in module.graph.nodes if (call := _dfkd_fast_call(node)) is not None]
        self.graphs[name] = {
            "calls": [_describe_call(node, *call) for node, call in calls],
            "collectives": [node.target.__name__ for node in nodes if _is_collective(node.target)],
            "synchronizations": [
                str(node.target)
                for node in nodes
                if _synchronizes(node.target, tree_map(_value, (node.args, node.kwargs)), _value(node))
            ],
        }
        returned: Any = module.graph.output_node().args[0]
        outputs = [_value(node) for node in returned]
        if self.code:
            self.graphs[name]["code"], kernels = _generate(module, inputs, options)
            for _, (operator, arguments) in calls:
                kernels += op_traffic(operator, *tree_map(_value, arguments))
            self.graphs[name]["kernels"] = [asdict(kernel) for kernel in kernels]

        def run(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            return [_like(x, x.device) if isinstance(x, Tensor) else x for x in outputs]

        run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd then releases the arguments
        return run


def _generate(module: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> tuple[str, list[Kernel]]:
    """Return the code that Inductor would load and run, and its kernels except those of this project."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    codes: list[tuple[str, list[Kernel]]] = []

    def keep(lowering: GraphLowering) -> None:
        codes.append((lowering.codegen()[0].value, inductor_traffic(lowering)))
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
    from dfkd_fast.engine import CompiledEngine, EagerEngine, Engine, networks
    from dfkd_fast.models import fold_batchnorm, frozen

    cpu, half = torch.device("cpu"), (0.5, 0.5, 0.5)
    changes: dict[str, Any] = {"channels_last": variant != "peer"}
    if variant.startswith("methods:"):
        method = recipe(variant.removeprefix("methods:"))
        options = {name: 1 if name == "half" else value for name, value in method.synthesis.options.items()}
        synthesis = replace(method.synthesis, options=options, pool_size=64, per_round=1)
        changes |= {"objective": method.objective, "synthesis": synthesis}
    # Skip computing BatchNorm statistics, which takes seconds and does not change the trace.
    with mock.patch.object(step_variants, "_with_statistics", lambda model, size, device: model.eval()):
        state, teacher = step_variants.build(size, size.batch, cpu, **changes)
    sizes = {"image_size": size.image, "batch_size": size.batch}
    folded = fold_batchnorm(state.teacher, dtype=state.runtime.autocast, **sizes)
    mode = stack.enter_context(fake_cuda())
    with _CopyToCuda(mode):
        state, teacher, folded = copy.deepcopy((state, teacher, folded), {id(state.noise): state.noise})
    state.runtime = replace(state.runtime, device=torch.device("cuda:0"))
    stack.enter_context(mode)
    stack.enter_context(state.synchronized())
    if variant in ("peer", "compile", "eager"):
        stack.enter_context(ops.backend("reference"))
    if variant == "peer":
        # New modules are created on the device, because a fake parameter cannot be moved.
        with torch.device("cuda:0"), mock.patch.object(nn.Module, "to", lambda module, *a, **k: module):
            return PeerLoop(state, mean=half, std=half)
    if variant in ("compile", "eager"):
        stack.enter_context(frozen(teacher))
        if variant == "eager":
            return EagerEngine(state, networks.eager_networks(state))
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
    synthesizer, counts = engine.state.synthesizer, itertools.count()
    draw = synthesizer.noise

    def faulty(count: int) -> Tensor:
        noise = draw(count + next(counts))
        noise.sum().item()
        noise.cpu()
        return noise

    synthesizer.noise = faulty
    module: Any = importlib.import_module("dfkd_fast.ops.batchnorm_statistics")
    module.new_map = lambda x, dtype=None: torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


# Faults that are injected into a generator step of the small size, to test the checks.
_FAULTS: dict[str, Callable[[Any], None]] = {"graph_break": _break_graph, "other_faults": _inject_other_faults}


# The engine sets fallback_random too. Constant folding and shape padding would create real tensors.
_INDUCTOR = {"fallback_random": True, "joint_graph_constant_folding": False, "shape_padding": False}


def _report(variant: str, code: bool) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    from dfkd_fast.benchmarks.step.roofline import round_work
    from dfkd_fast.benchmarks.step.variants import SIZES

    torch._dynamo.reset()
    counters.clear()
    compiler, error, work = _Compiler(code), None, None
    synchronizations: dict[str, list[str]] = {}
    collectives: dict[str, list[str]] = {}
    kernels: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(_INDUCTOR))
        inject = _FAULTS.get(variant)
        method = variant.startswith("methods:")
        # The generator steps of a method with two stages are of both.
        size = replace(SIZES["small"], steps=(3, 2)) if method else SIZES["small" if inject else "full"]
        if variant == "distributed":  # one of four processes; collectives have fakes and need no process group
            size = replace(SIZES["small"], steps=(3, 2))
            stack.enter_context(distributed(Group("of four", 4, 1)))
        engine = _engine(variant, size, compiler, stack)
        staged = method and engine.state.synthesizer.stages > 1
        stack.enter_context(torch._dynamo.config.patch(error_on_recompile=not staged))
        if inject:
            inject(engine)
        try:
            for again in ("", " again"):
                for step in _STEPS[:1] if inject else _STEPS:
                    compiler.step = step + again if staged else step
                    with _Synchronizations() as seen:
                        getattr(engine, step)()
                    synchronizations[step + again] = seen.found
                    collectives[step + again] = seen.collectives
                    kernels[step + again] = [asdict(kernel) for kernel in seen.kernels]
            if variant == "eager":
                with _Synchronizations(), mock.patch.object(engine, "start_round"):  # copies from pinned memory
                    work = dict(zip(_STEPS, map(asdict, round_work(engine)), strict=True))
        except Exception:
            error = traceback.format_exc()
    return {
        "error": error,
        "regions": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
        "synchronizations": synchronizations,
        "collectives": collectives,
        "kernels": kernels,
        "graphs": compiler.graphs,
        "work": work,
    }


def _to_cuda(x: Tensor) -> Tensor:
    return _like(x, torch.device("cuda:0")).requires_grad_(x.requires_grad)


def _run(function: Callable[..., Any], *inputs: Any) -> None:
    """Call a function and compute the gradients of all inputs that require one."""
    gradients(tensors(function(*inputs)), inputs)


def _op_report(op: str) -> dict[str, Any]:
    """Count each case of an op with the paper's shapes: eager reference, torch.compile and this project's kernels."""
    report: dict[str, Any] = {}
    with torch._inductor.config.patch(_INDUCTOR), fake_cuda() as mode, mode:
        for case in (case for case in BENCHMARKS[op].cases if case.shapes == "paper"):
            for dtype in case.dtypes:
                reference = partial(case.call, backend="reference")
                given = case.inputs(Make("meta", dtype))
                inputs = tree_map(lambda x: _to_cuda(x) if isinstance(x, Tensor) else x, given)
                with EagerTraffic() as eager:
                    _run(reference, *inputs)
                compiler = _Compiler(code=True)
                torch._dynamo.reset()
                _run(
                    torch.compile(case.compiled or reference, fullgraph=True, dynamic=False, backend=compiler), *inputs
                )
                compiled = [kernel for graph in compiler.graphs.values() for kernel in graph["kernels"]]
                ours = op_traffic(partial(_run, partial(case.call, backend="triton")), *given)
                report[f"{case.name}/{str(dtype).removeprefix('torch.')}"] = {
                    "eager": [asdict(kernel) for kernel in eager.kernels],
                    "compile": compiled,
                    "triton": [asdict(kernel) for kernel in ours],
                }
    return report


if __name__ == "__main__":
    out, goal, *names = sys.argv[1:]
    reports = {
        name: _op_report(name.removeprefix("ops:")) if name.startswith("ops:") else _report(name, goal == "code")
        for name in names
    }
    Path(out).write_text(json.dumps(reports))
    # Without a device, the threads of autograd's engine do not end cleanly.
    os._exit(0)
