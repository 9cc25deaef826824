"""Registers an op's operators in ``torch.ops.dfkd_fast`` with fake implementations, vmap rules and autograd formulas.

Operators allocate their results and launch a kernel that fills them. They are functional, except that some update
arguments such as running statistics in place. The schema is inferred from the annotations of the allocation function.
The same function is the fake implementation that ``torch.compile`` traces, so the strides of traced and real results
always agree.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "differentiable",
    "empty_map_like",
    "fused_op",
    "is_library_call",
    "library_operator",
    "matmul_dtype",
    "no_second_derivative",
    "operator",
    "record_op_launches",
    "unsupported_reason",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run in the interpreter, on the CPU. Triton also reads the variable once, at import."""

_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_GRADIENTS = "bool[] needs_grad) -> Tensor[]"  # the end of the schema of an operator that computes gradients
_LIBRARY = torch.library.Library("dfkd_fast", "FRAGMENT")

Launcher = Callable[..., None] | str
"""A function that takes an operator's arguments and results and fills the results, or its "module.name" in kernels/."""

_recording: AbstractContextManager[Any] | None = None
_library_calls: set[Any] = set()


@contextmanager
def record_op_launches(arch: int, inside: AbstractContextManager[Any] | None = None) -> Iterator[list[Any]]:
    """Context manager in which ops on meta tensors record their launches; see :mod:`dfkd_fast.kernels.common`.

    Args:
        arch: the architecture to configure launches for, such as 90 for sm_90.
        inside: context in which launchers run, for example a mode that records the operators that they call.
    """
    from dfkd_fast.kernels.common import record_launches

    global _recording
    before, _recording = _recording, inside if inside is not None else nullcontext()
    try:
        with record_launches(arch) as launches:
            yield launches
    finally:
        _recording = before


def _launcher(launch: Launcher) -> Callable[..., None]:
    if not isinstance(launch, str):
        return launch
    module, _, function = launch.partition(".")

    def imported(*arguments: Any) -> None:
        # Imported at the first launch, because Triton may not be installed.
        getattr(importlib.import_module(f"dfkd_fast.kernels.{module}"), function)(*arguments)

    return imported


def _vmap_rule(overload: Any) -> Callable[..., Any]:
    """Return a vmap rule that calls the operator once per sample: kernels do not support another batch dimension."""
    mutated = [argument.is_write for argument in overload._schema.arguments]

    def sample(values: Sequence[Any], dims: Sequence[Any], i: int) -> list[Any]:
        return [
            sample(value, dim, i)
            if isinstance(dim, list | tuple)
            else value.select(dim, i)
            if isinstance(dim, int)
            else value
            for value, dim in zip(values, dims, strict=True)
        ]

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        if any(
            isinstance(value, Tensor) and write and dim is None
            for value, dim, write in zip(arguments, in_dims, mutated, strict=True)
        ):
            raise RuntimeError(f"vmap: {overload.name()} would update one tensor for several samples")
        each = [overload(*sample(arguments, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        kind = type(each[0])  # tuple or list, depending on the schema
        stacked = kind(torch.stack(column) for column in zip(*each, strict=True))
        return stacked, kind([0] * len(stacked))

    return rule


def _define(name: str, schema: str, allocate: Callable[..., Any], launch: Launcher) -> Any:
    launcher, gradients = _launcher(launch), schema.endswith(_GRADIENTS)

    def fill(arguments: tuple[Any, ...], results: Any) -> None:
        if gradients:
            launcher(*arguments[:-1], *_spread(results, arguments[-1]))
        else:
            launcher(*arguments, *((results,) if isinstance(results, Tensor) else results))

    def run(*arguments: Any) -> Any:
        results = allocate(*arguments)
        fill(arguments, results)
        for i in mutated:
            if arguments[i] is not None:
                torch.autograd.graph.increment_version(arguments[i])  # as PyTorch's in-place operators do
        return results

    def fake(*arguments: Any) -> Any:
        if (inductor := sys.modules.get("torch._inductor.lowering")) is not None:
            # When Inductor first meets an unlisted operator, it formats the arguments for a log message, with all that
            # computes them. For the last layers of a ResNet, that takes time exponential in the depth.
            inductor.FALLBACK_ALLOW_LIST.add(f"dfkd_fast::{name}")
        results = allocate(*arguments)
        if _recording is not None:
            with _recording:
                fill(arguments, results)
        return results

    overload = _register(name, schema, run, fake)
    mutated = [i for i, argument in enumerate(overload._schema.arguments) if argument.is_write]
    return overload


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _LIBRARY.define(name + schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"dfkd_fast::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.dfkd_fast, name).default
    torch.library.register_vmap(f"dfkd_fast::{name}", _vmap_rule(overload), lib=_LIBRARY)
    return overload


def _spread(gradients: Sequence[Tensor], needs_grad: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Insert None for each gradient that is not needed."""
    found = iter(gradients)
    return tuple(next(found) if need else None for need in needs_grad)


def operator(
    name: str, allocate: Callable[..., Any], launch: Launcher, mutates: Sequence[str] = ()
) -> Callable[..., Any]:
    """Define an operator.

    Args:
        name: name in ``torch.ops.dfkd_fast``.
        allocate: takes the operator's arguments and returns empty results. Its annotations define the schema. It also
            runs on fake tensors and must not read values. If its last argument is ``needs_grad: list[bool]`` and it
            returns ``list[Tensor]``, the results are gradients, and ``needs_grad`` selects which to allocate.
        launch: takes the arguments and the results and fills the results. If these are gradients, it does not receive
            ``needs_grad``, but None for each gradient that is not needed.
        mutates: names of the arguments that the kernels update in place; each may be None.

    Returns:
        The operator. If it computes gradients, it returns None for each one that is not needed.
    """
    schema = torch.library.infer_schema(allocate, mutates_args=mutates)
    overload = _define(name, schema, allocate, launch)
    if not schema.endswith(_GRADIENTS):
        return overload
    return lambda *arguments: _spread(overload(*arguments), arguments[-1])


def library_operator(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator that one call of a library computes, such as a cuDNN convolution.

    It launches none of this project's kernels and is not differentiable. Traffic is counted as for an operator of
    PyTorch.

    Args:
        name: name in ``torch.ops.dfkd_fast``.
        run: computes the results. Its annotations define the schema.
        fake: computes fake results, with the shapes, strides and dtypes of the real ones.
    """
    overload = _register(name, torch.library.infer_schema(run, mutates_args=()), run, fake)
    _library_calls.add(overload)
    return overload


def is_library_call(overload: Any) -> bool:
    """Whether :func:`library_operator` has defined an operator."""
    return overload in _library_calls


class _Once(torch.autograd.Function):
    """The identity on a gradient; its backward raises an error.

    The error of :func:`torch.autograd.function.once_differentiable` names neither the op nor the remedy.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"{ctx.op}: fused backends do not support second derivatives; use backend='reference'")


def no_second_derivative(op: str, gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> tuple[Any, ...]:
    """Return a backward's gradients such that differentiating them raises an error that names the op.

    Args:
        op: name of the public op.
        gradients: the results of the backward.
        *inputs: the tensors that the gradients depend on, grad_output included.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        # An ordinary backward records no graph, and compiled code raises an error for second derivatives.
        return tuple(gradients)
    return tuple(None if g is None else _Once.apply(op, g, *inputs) for g in gradients)


def differentiable(
    name: str,
    forward: Callable[..., Any],
    save: Callable[..., tuple[Sequence[Tensor | None], tuple[Any, ...]]],
    backward: Callable[..., Sequence[Tensor | None]],
    *,
    outputs: int | None = 1,
    signature: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Add a backward to a function of tensors and options, with support for torch.func and torch.compile.

    ``torch.library.register_autograd`` is not used, because its operators raise an error under ``torch.func.grad``.

    Args:
        name: name of the public op, for error messages.
        forward: returns a tensor or a tuple of tensors.
        save: takes the tuples of arguments and results; returns tensors and options for ``backward``.
        backward: takes ``needs_input_grad``, the saved tensors, the options, and the gradient of each differentiable
            result (None if zero); returns the gradients of the leading arguments, and the others receive none.
        outputs: number of differentiable results, which come first; None for all.
        signature: a function with the parameters of ``forward``, if ``forward`` is an operator.

    Returns:
        The differentiable function.
    """

    class Fused(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return forward(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            results = (output,) if isinstance(output, Tensor) else output
            tensors, ctx.options = save(inputs, results)
            ctx.save_for_backward(*tensors)
            if outputs is not None and results[outputs:]:
                ctx.mark_non_differentiable(*results[outputs:])
            if not torch.compiler.is_compiling():  # Dynamo always materializes missing gradients
                ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
            needs, saved, grads = ctx.needs_input_grad, ctx.saved_tensors, grad_outputs[:outputs]
            grad_inputs = backward(needs, saved, ctx.options, *grads)
            grad_inputs = no_second_derivative(name, grad_inputs, *grads, *saved)
            return (*grad_inputs, *[None] * (len(needs) - len(grad_inputs)))

    # If no input needs a gradient, Dynamo calls forward directly, and prepends a context unless the signature has as
    # many parameters as there are arguments.
    vars(Fused)["forward"].__func__.__signature__ = inspect.signature(signature or forward)
    Fused.__name__ = Fused.__qualname__ = "".join(word.capitalize() for word in name.split("_"))
    return Fused.apply


def fused_op(
    name: str,
    allocate: Callable[..., Any],
    *,
    outputs: int = 1,
    saved: Sequence[int] | None = None,
    reads: Sequence[str] | None = None,
    constants: Sequence[str] = (),
    new_gradient: Callable[[Tensor], Tensor] = torch.empty_like,
    **launches: tuple[Launcher, Launcher],
) -> dict[str, Callable[..., Any]]:
    """Declare a differentiable op with a forward and a backward operator per backend.

    ::

        name(<arguments of allocate>) -> (<outputs>, <further results>)
        name_backward(<grad_outputs>, <arguments>, <saved results>, bool[] needs_grad) -> Tensor[]

    Args:
        name: name of the op and of its Triton operator; operators of other backends end in ``_<backend>``.
        allocate: allocates the results of the forward operator; see :func:`operator`.
        outputs: number of results that are returned and differentiable; they come first.
        saved: indices of the results that backward reads; by default, all after the outputs.
        reads: names of the tensors that backward reads; by default, all.
        constants: names of the tensors that backward reads but that receive no gradient.
        new_gradient: allocates the gradient of a tensor.
        **launches: for each backend, the functions that launch the forward and the backward kernels; see ``Launcher``.

    Returns:
        The op's function per backend. It takes the arguments of ``allocate`` and returns the outputs.
    """
    forward_schema = torch.library.infer_schema(allocate, mutates_args=())
    arguments, _, results = forward_schema[1:].partition(") -> ")
    declared = arguments.split(", ")
    names = list(inspect.signature(allocate).parameters)
    count = results.count("Tensor")
    saved = tuple(range(outputs, count)) if saved is None else saved
    tensors = [i for i, text in enumerate(declared) if text.startswith("Tensor")]
    read = [i for i in tensors if reads is None or names[i] in reads]
    passed = [i for i in range(len(names)) if i in read or i not in tensors]  # arguments that backward takes
    with_grad = [i for i in read if names[i] not in constants]
    grad_outputs = [f"Tensor{'?' if outputs > 1 else ''} grad_output{i}" for i in range(outputs)]
    listed = (*grad_outputs, *(declared[i] for i in passed), *(f"Tensor saved{i}" for i in saved), "bool[] needs_grad")
    backward_schema = f"({', '.join(listed)}) -> Tensor[]"
    grad_positions = [outputs + passed.index(i) for i in with_grad]  # in backward's arguments

    def allocate_backward(*given: Any) -> list[Tensor]:
        needs_grad = given[-1]
        return [new_gradient(given[at]) for at, need in zip(grad_positions, needs_grad, strict=True) if need]

    def save(inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Sequence[Any], tuple[Any, ...]]:
        kept = [*(inputs[i] for i in read), *(results[i] for i in saved)]
        return kept, tuple(inputs[i] for i in passed if i not in read)

    def declare(backend: str, launch: Launcher, launch_backward: Launcher) -> Callable[..., Any]:
        operator_name = name if backend == "triton" else f"{name}_{backend}"
        forward = _define(operator_name, forward_schema, allocate, launch)
        operator_backward = _define(f"{operator_name}_backward", backward_schema, allocate_backward, launch_backward)

        def backward(needs: Any, kept: Any, options: Any, *grads: Tensor | None) -> list[Tensor | None]:
            gradients: list[Tensor | None] = [None] * len(names)
            needs_grad = [bool(needs[i]) for i in with_grad]
            if any(needs_grad) and not all(g is None for g in grads):
                tensor, option = iter(kept), iter(options)
                inputs = [next(tensor) if i in read else next(option) for i in passed]
                found = operator_backward(*grads, *inputs, *kept[len(read) :], needs_grad)
                for i, gradient in zip(with_grad, _spread(found, needs_grad), strict=True):
                    gradients[i] = gradient
            return gradients

        apply = differentiable(name, forward, save, backward, outputs=outputs, signature=allocate)

        def call(*args: Any, **kwargs: Any) -> Any:
            results = apply(*args, *(kwargs[each] for each in names[len(args) :]))
            return results if count == 1 else results[0] if outputs == 1 else results[:outputs]

        return call

    return {backend: declare(backend, *pair) for backend, pair in launches.items()}


def empty_map_like(x: Tensor, *, preserve: bool = False) -> Tensor:
    """Allocate a tensor like x: channels-last if x is; else with the strides of x if ``preserve``, or contiguous."""
    if x.ndim == 4 and x.stride(1) == 1 and x.shape[1] != 1 and x.shape[2] * x.shape[3] != 1:
        return torch.empty_like(x, memory_format=torch.channels_last)
    if preserve and not x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: the autocast dtype if autocast is enabled, else that of x."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Return why the Triton kernels do not support these tensors, or None if they do."""
    if not _TRITON:
        return "triton is not installed"
    if _recording is not None:
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            return f"its kernels support float16, bfloat16 and float32, not {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.is_cuda and not (INTERPRETED and tensor.device.type == "cpu"):
            return f"its kernels run on CUDA devices, not on {tensor.device.type}"
        if tensor.is_cuda and INTERPRETED:
            return "TRITON_INTERPRET=1 is set, and the interpreter supports only CPU tensors"
    return None
