"""Properties of every op, for the reference and the Triton kernels, with the cases in table.py."""

from __future__ import annotations

import inspect
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import assert_close, assert_compiles, random, value_and_gradients, with_layout

from .table import CASES, DTYPES, Case, RecordedOperators, call_norm, high_order, logits, maps, norm, stored

ONE_PER_OP = [name for name in CASES if name.split(",")[0] not in {n.split(",")[0] for n in CASES if n < name}]
# All cases except those that only add tile sizes to an op with a plain case.
DISTINCT = [name for name in CASES if "tiles" not in name or name.split(",")[0] not in CASES]

each_case = pytest.mark.parametrize("name", CASES)


def with_backend(case: Case, backend: str) -> Any:
    return lambda *inputs: case.function(*inputs, backend=backend)


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def to_layout(t: Tensor | None, layout: Any) -> Tensor | None:
    """Return t in a memory layout, if the layout applies."""
    if t is None or t.ndim < (4 if layout == "channels_last" else 2):
        return t
    return with_layout(t, layout).requires_grad_(t.requires_grad)


def assert_equal(found: Any, expected: Any) -> None:
    """Assert bitwise equality."""
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "distillation_kl": {"direction": ("forward", "reverse"), "reduction": ("batchmean", "sum", "mean", "none")},
    "contrastive_loss": {
        **{"symmetric": (0, 1), "normalize": (0, 1), "negatives": ("all", "cross")},
        "reduction": ("mean", "sum", "none"),
    },
    "spatial_attention": {"form": ("spatial", "spatial_mean1", "channel")},
    "high_order_attention": {"mode": ("joint", "per_order")},
    "high_order_attention_map": {"mode": ("joint", "per_order")},
    "high_order_attention_mse": {"mode": ("joint", "per_order")},
    "batch_norm_act": {"activation": ("none", "relu", "leaky_relu")},
    "batchnorm_statistics": {"activation": ("none", "relu", "relu6")},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, dict(zip(OPTIONS.get(name.split(",")[0], ()), values, strict=True)))
        for name in ONE_PER_OP
        for values in itertools.product(*OPTIONS.get(name.split(",")[0], {}).values())
    ],
)
def test_gradcheck_passes_for_first_and_second_derivatives(name, options):
    case = CASES[name]
    shape = (2, 8, 2, 2) if len(case.shapes[0]) == 4 else (4, 3)
    inputs = case.make(shape, dtype=torch.float64, needs_grad=case.needs_grad)(1)
    assert gradcheck(partial(case.function, **options), inputs)
    assert gradgradcheck(partial(case.function, **options), inputs)


@pytest.mark.parametrize("name", [n for n in ONE_PER_OP if n not in ("max_unpool2x2", "statistics_distances")])
def test_tensor_arguments_are_checked(name):
    """Errors name the argument with the wrong type, dtype, shape or device."""
    case = CASES[name]
    inputs = [None if t is None else t.detach() for t in case.make(case.shapes[0])(1)]
    parameters = list(inspect.signature(case.function).parameters)[: len(inputs)]
    for i, (argument, given) in enumerate(zip(parameters, inputs, strict=True)):
        wrong: list[tuple[type[Exception], str, Any]] = [
            (TypeError, f"{argument} must be a tensor, got str", "text"),
            (TypeError, f"{argument} must be of dtype .*, got torch.int64", given.long()),
            (TypeError, f"{argument} must be of dtype .*, got torch.complex64", given.to(torch.complex64)),
            (TypeError, f"{argument} must be a dense tensor, got the layout torch.sparse_coo", given.to_sparse()),
            (ValueError, rf"{argument} must have shape \(", given.flatten() if given.ndim > 1 else given[:-1]),
        ]
        if given.ndim > 1:
            wrong.append((ValueError, f"{argument} must have shape .* only N may be 0", given[:, :0]))
        if i > 0:
            first = parameters[0]
            wrong.append((ValueError, f"{argument} must be on the device of {first}, cpu, got meta", given.to("meta")))
            for dim, size in enumerate(given.shape):
                wrong.append((ValueError, "must have (the )?shape", given.narrow(dim, 0, size - 1)))
        for error, message, value in wrong:
            with pytest.raises(error, match=message):
                case.function(*inputs[:i], value, *inputs[i + 1 :])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("distillation_kl", "temperature"), ("contrastive_loss", "temperature")),
        *(("batchnorm_statistics", "eps"), ("spatial_attention", "scale")),
        *(("batch_norm_act", "eps"), ("batch_norm_act", "momentum"), ("batch_norm_act", "negative_slope")),
        *(("batch_norm_act_conv1x1", each) for each in ("eps", "momentum", "negative_slope")),
    ],
)
def test_numeric_options_are_checked(name, option):
    function, inputs = CASES[name].function, CASES[name].make(CASES[name].shapes[0])(1)
    above = option in ("temperature", "eps")
    for wrong in (math.nan, math.inf, 2**63, 10**400, *((0, 0.0, -0.1) if above else ())):
        with pytest.raises(ValueError, match=f"{option} must be a finite number{' above 0' if above else ''}, got"):
            function(*inputs, **{option: wrong})
    for wrong in ("0.1", None, True, torch.tensor(0.1)):
        with pytest.raises(TypeError, match=f"{option} must be a number, got {type(wrong).__name__}"):
            function(*inputs, **{option: wrong})


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in ONE_PER_OP for o in OPTIONS.get(n.split(",")[0], {}) if o not in ("symmetric", "normalize")],
)
def test_choices_are_checked(name, option):
    inputs, (*others, last) = CASES[name].make(CASES[name].shapes[0])(1), OPTIONS[name.split(",")[0]][option]
    for wrong in ("both", None):
        expected = f"{option} must be {', '.join(map(repr, others))} or {last!r}, got {wrong!r}"
        with pytest.raises(ValueError, match=expected):
            CASES[name].function(*inputs, **{option: wrong})


def test_shape_errors_state_the_known_sizes():
    with pytest.raises(ValueError, match=r"positives must have shape \(N, D\) with N = 5, D = 7, got \(4, 7\)"):
        ops.contrastive_loss(random(5, 7), random(4, 7))
    with pytest.raises(ValueError, match=r"residual must have the shape of x, \(3, 5, 4, 2\), got \(3, 5, 2, 4\)"):
        call_norm(*norm()(1)[:5], random(3, 5, 2, 4))
    with pytest.raises(ValueError, match=r"target requires a gradient, .*: pass target.detach\(\)"):
        ops.high_order_attention_mse(*high_order(target=True, needs_grad=(3,))(1))


@each_case
def test_memory_layout_does_not_change_results(name):
    case = CASES[name]
    inputs = case.make(case.shapes[0])(1)
    expected, expected_gradients = value_and_gradients(case.function, inputs)
    for layout in case.layouts:
        laid = [to_layout(t, layout) for t in inputs]
        values, gradients = value_and_gradients(case.function, laid)
        for a, b in zip((*values, *gradients), (*expected, *expected_gradients), strict=True):
            if b is not None:
                assert_close(a, b, atol=case.atol, rtol=case.atol, name=layout)


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name].shapes[0]) == 4])
def test_results_keep_memory_format_of_input(backend_and_device, name):
    """This holds for values in every dtype and, with kernels, for the gradient of the map."""
    case, (backend, device) = CASES[name], backend_and_device
    for number, dtype in enumerate(DTYPES if backend == "triton" else (torch.float64, *DTYPES)):
        layout, form = (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format))[number % 2]
        inputs = case.make(case.shapes[0], dtype=dtype, layout=layout, device=device)(1)
        with case.tiling():
            values, gradients = value_and_gradients(with_backend(case, backend), inputs)
        for result in (*values, *(gradients[:1] if backend == "triton" else ())):
            assert result.ndim < 4 or result.is_contiguous(memory_format=form), (dtype, layout)


@pytest.mark.parametrize("name", DISTINCT)
def test_reference_compiles_without_graph_breaks(name):
    case = CASES[name]
    layout = case.layouts[1]  # channels-last maps
    calls = [case.make(shape, layout=layout)(1) for shape in case.shapes[1:]]
    assert_compiles(case.function, calls, atol=case.atol, rtol=1e-5)


@pytest.mark.parametrize("name", DISTINCT)
def test_kernels_compile_with_dynamic_shapes(kernel_device, name):
    """The calls have several shapes, and another operation comes before the kernel."""
    case = CASES[name]
    calls = [case.make(shape, layout=case.layouts[1], device=kernel_device)(1) for shape in case.shapes[1:]]
    function = with_backend(case, "triton")
    with case.tiling():
        assert_compiles(lambda x, *others: function(2 * x, *others), calls, dynamic=True, atol=1e-6, rtol=1e-6)


def test_kernels_compile_with_inductor(kernel_device):
    """One graph holds all ops, because Inductor is slow. The second call makes shapes dynamic."""
    cases = [CASES[name] for name in ONE_PER_OP]
    calls = []
    for which in (1, 2):
        made = [case.make(case.shapes[which], layout=case.layouts[1], device=kernel_device)(1) for case in cases]
        calls.append([t if t is None else t.detach() for inputs in made for t in inputs])
    counts = [len(inputs) for inputs in made]

    def every_op(*inputs: Tensor) -> tuple[Tensor, ...]:
        given, results = iter(inputs), []
        for case, count in zip(cases, counts, strict=True):
            x, *others = itertools.islice(given, count)
            results += tensors(case.function(2 * x, *others, backend="triton"))
        return tuple(results)

    for call in calls:
        for i, case in enumerate(cases):
            for argument in case.needs_grad:
                call[sum(counts[:i]) + argument].requires_grad_()
    assert_compiles(every_op, calls, backend="inductor", atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DISTINCT)
def test_function_transforms_match_separate_calls(backend_and_device, name):
    """grad, vmap and vmap of grad equal separate calls, with batched and shared arguments."""
    case, (backend, device) = CASES[name], backend_and_device
    dtype, atol = (torch.float64, 1e-11) if backend == "reference" else (torch.float32, 0.0)
    first, second = (
        [None if t is None else t.detach() for t in case.make(case.shapes[1], dtype=dtype, device=device)(seed)]
        for seed in (1, 20)
    )
    function = with_backend(case, backend)

    def total(*inputs: Tensor) -> Tensor:
        return sum(value.square().sum() for value in tensors(function(*inputs)))

    gradients = torch.func.grad(total, argnums=case.needs_grad)
    leaves = [t if t is None else t.clone().requires_grad_(i in case.needs_grad) for i, t in enumerate(first)]
    expected = torch.autograd.grad(total(*leaves), [leaves[i] for i in case.needs_grad])
    for a, b in zip(gradients(*first), expected, strict=True):
        assert_close(a, b, atol=atol, rtol=atol)
    for batched in {case.batched, case.batched[:1]}:
        dims = tuple(0 if i in batched else None for i in range(len(first)))
        pair = [torch.stack([a, b]) if i in batched else a for i, (a, b) in enumerate(zip(first, second, strict=True))]
        other = [b if i in batched else a for i, (a, b) in enumerate(zip(first, second, strict=True))]
        for each in (function, gradients) if batched == case.batched else (function,):
            found = tensors(torch.func.vmap(each, in_dims=dims)(*pair))
            for column, a, b in zip(found, tensors(each(*first)), tensors(each(*other)), strict=True):
                assert_close(column, torch.stack([a, b]), atol=atol, rtol=atol)


@pytest.mark.parametrize("name", [name for name in DISTINCT if CASES[name].autocast])
def test_autocast_does_not_change_results(backend_and_device, name):
    case, (backend, device) = CASES[name], backend_and_device
    inputs = case.make(case.shapes[0], device=device)(1)
    expected = tensors(case.function(*inputs, backend=backend))
    with torch.autocast(device, dtype=torch.bfloat16):
        found = tensors(case.function(*inputs, backend=backend))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert_equal(found, expected)


@each_case
def test_unknown_and_unsupported_backends_raise(name):
    case, op = CASES[name], name.split(",")[0]
    inputs = case.make(case.shapes[0])(1)
    with pytest.raises(ValueError, match="backend must be 'cuda', 'triton', 'cpu' or 'reference', got 'numpy'"):
        case.function(*inputs, backend="numpy")
    with pytest.raises(
        RuntimeError, match=f"'cuda', requested by backend, (does not support this call of|does not implement) {op}"
    ):
        case.function(*inputs, backend="cuda")


ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FEWER_CHECKS = ("test_schema", "test_faketensor")  # those that depend on strides


@pytest.mark.parametrize("name", DISTINCT)
def test_operators_pass_opcheck(kernel_device, name):
    """The calls cover forward and backward operators in each layout, with all gradients and with only one."""
    case = CASES[name]
    for number, layout in enumerate(case.layouts[1:]):
        inputs = case.make(case.shapes[0], layout=layout, device=kernel_device)(1)
        some = case.needs_grad[:1] if number else case.needs_grad
        leaves = [t if t is None else t.detach().requires_grad_(i in some) for i, t in enumerate(inputs)]
        with RecordedOperators() as operators:
            values = [value for value in tensors(case.function(*leaves, backend="triton")) if value.requires_grad]
            values = values[-1:] if number else values
            grad_output = [with_layout(v, layout if v.ndim == inputs[0].ndim else "contiguous") for v in values]
            torch.autograd.grad(values, [leaves[i] for i in some], grad_output)
        # The backward of statistics_distances is one product, without an operator.
        assert len(operators.calls) >= (1 if name == "statistics_distances" else 2)
        for function, arguments in operators.calls:
            torch.library.opcheck(function, arguments, test_utils=FEWER_CHECKS if number else ALL_CHECKS)


@each_case
def test_results_are_deterministic(kernel_device, name):
    case = CASES[name]
    inputs = case.make(case.many, dtype=torch.bfloat16, layout=case.layouts[1], device=kernel_device)(1)
    with case.tiling():
        first, second = (value_and_gradients(with_backend(case, "triton"), inputs) for _ in range(2))
    assert_equal((*first[0], *first[1]), (*second[0], *second[1]))


@each_case
def test_gradients_do_not_depend_on_requested_subset(kernel_device, name):
    """A gradient does not depend on which others are requested. Gradients that are not requested are None."""
    case = CASES[name]
    inputs = [t if t is None else t.detach() for t in case.make(case.shapes[0], device=kernel_device)(1)]

    def run(some):
        leaves = [t if t is None else t.detach().requires_grad_(i in some) for i, t in enumerate(inputs)]
        with case.tiling():
            values = tensors(case.function(*leaves, backend="triton"))
            grad_output = [random(*value.shape, device=kernel_device, seed=i) for i, value in enumerate(values)]
            both = [(v, g) for v, g in zip(values, grad_output, strict=True) if v.requires_grad]
            outputs, grad_output = zip(*both, strict=True)
            gradients = iter(torch.autograd.grad(outputs, [leaves[i] for i in some], grad_output))
        return [next(gradients) if i in some else None for i in range(len(inputs))]

    whole = run(case.needs_grad)
    for some in itertools.chain.from_iterable(itertools.combinations(case.needs_grad, n) for n in (1, 2)):
        for i, (a, b) in enumerate(zip(run(some), whole, strict=True)):
            assert torch.equal(a, b) if i in some else a is None
    assert not any(value.requires_grad for value in tensors(case.function(*inputs, backend="triton")))


@pytest.mark.parametrize("name", [name for name in CASES if name != "statistics_distances"])  # it has no batch
def test_empty_batch_matches_reference(kernel_device, name):
    case = CASES[name]
    inputs = case.make((0, *case.shapes[0][1:]), device=kernel_device)(1)
    with case.tiling():
        found, expected = (value_and_gradients(with_backend(case, each), inputs) for each in ("triton", "reference"))
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, atol=0.0)


@each_case
def test_unsupported_dtype_raises_with_reason(kernel_device, name):
    case, op = CASES[name], name.split(",")[0]
    for i in case.batched:
        inputs = case.make(case.shapes[0], device=kernel_device)(1)
        inputs[i] = inputs[i].double()
        with pytest.raises(RuntimeError, match=f"'triton', requested by backend, .* {op}: its kernels .*, not float64"):
            case.function(*inputs, backend="triton")


@each_case
def test_second_derivatives_raise(kernel_device, name):
    case, op = CASES[name], name.split(",")[0].removesuffix("_map")
    inputs = case.make(case.shapes[1], device=kernel_device)(1)
    leaves = [t if t is None else t.detach().requires_grad_(i in case.needs_grad) for i, t in enumerate(inputs)]
    total = sum(value.square().sum() for value in tensors(case.function(*leaves, backend="triton")))
    for gradient in torch.autograd.grad(total, [leaves[i] for i in case.needs_grad], create_graph=True):
        with pytest.raises(
            RuntimeError, match=f"{op}: fused backends do not support second derivatives; use backend='reference'"
        ):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.gpu
@each_case
def test_cuda_graph_replays_match_eager(name):
    """A hundred replays would reveal state that one leaves behind for the next."""
    case = CASES[name]
    make = case.make(case.graph, dtype=torch.bfloat16, layout=case.layouts[1], device="cuda")
    inputs = [t if t is None else t.detach().requires_grad_(i in case.needs_grad) for i, t in enumerate(make(1))]
    leaves = [inputs[i] for i in case.needs_grad]

    grad_output = [torch.randn_like(value) for value in tensors(case.function(*inputs, backend="triton"))]

    def step():
        with case.tiling():
            values = tensors(case.function(*inputs, backend="triton"))
            return *values, *torch.autograd.grad(values, leaves, grad_output)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for replay in range(100):
        with torch.no_grad():
            for old, new in zip(inputs, make(10 + replay), strict=True):
                if old is not None:
                    old.copy_(new)
        graph.replay()
        if replay % 33 == 0:
            assert_equal(captured, step())


BF16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
MAP = {**BF16, "layout": "channels_last"}
_SIZE = 2 * 64 * 64 * 56 * 56  # bytes of a BF16 map (64, 64, 56, 56)
# Inputs, function, and bytes allowed beyond results in forward and beyond results and gradients in both passes.
MEMORY: dict[str, tuple[Any, Any, float, float]] = {
    "distillation_kl": (
        *(logits((4096, 32_000), **BF16, needs_grad=(0, 1)), ops.distillation_kl),
        *(5 * 4 * 4096 + 2**16, 2**18),
    ),
    "high_order_attention": (
        *(high_order((64, 64, 56, 56), **MAP, needs_grad=(0,)), ops.high_order_attention),
        *(2**21, _SIZE),
    ),
    "high_order_attention_mse": (
        *(high_order((64, 64, 56, 56), **MAP, target=True, needs_grad=(0,)), ops.high_order_attention_mse),
        *(_SIZE // 8, _SIZE // 8),
    ),
    "batchnorm_statistics": (  # saves one bit per element
        norm((64, 64, 112, 112), **MAP, residual=True, affine=False, needs_grad=(0, 5)),
        CASES["batchnorm_statistics"].function,
        *(_SIZE // 4 + 2**21, _SIZE // 4 + 2**22),
    ),
    "statistics_distance": (*(stored((64, 64, 112, 112), **MAP), ops.statistics_distance), *(2**21, 2**21)),
    "max_pool2x2": (
        *(maps((64, 16, 224, 224), **MAP, needs_grad=(0,)), partial(ops.max_pool2x2, relu=True)),
        *(_SIZE // 20, _SIZE // 20),
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MEMORY)
def test_peak_memory_is_bounded(name):
    make, function, forward_beyond, both_beyond = MEMORY[name]
    inputs = make(1)
    leaves = [t for t in inputs if t is not None and t.requires_grad]

    def run():
        values = tensors(function(*inputs, backend="triton"))
        peak = torch.cuda.max_memory_allocated()
        values = [value for value in values if value.requires_grad]
        return values, peak, torch.autograd.grad(values, leaves, grad_output)

    grad_output = [torch.ones_like(v) for v in tensors(function(*inputs, backend="triton")) if v.requires_grad]
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values, peak, gradients = run()
    results, all_gradients = (sum(t.nbytes for t in column) for column in (values, gradients))
    assert peak - before <= results + forward_beyond
    assert torch.cuda.max_memory_allocated() - before <= results + all_gradients + both_beyond
