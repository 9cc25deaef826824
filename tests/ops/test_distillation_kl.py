"""distillation_kl against the definition of the divergence, written out in float64, and against torch's kl_div."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from dfkd_fast import ops
from dfkd_fast.testing import (
    assert_backend_no_worse,
    assert_close,
    assert_compiles,
    extreme,
    random,
    unit_roundoff,
    value_and_gradients,
    with_layout,
)

DIRECTIONS = ("forward", "reverse")
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def definition(student, teacher, *, temperature=1.0, direction="forward", reduction="batchmean"):
    """Class by class, from probabilities."""
    rows = []
    for s, t in zip(student, teacher, strict=True):
        q = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        p = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        if direction == "reverse":
            p, q = q, p
        rows.append(torch.stack([p[k] * (torch.log(p[k]) - torch.log(q[k])) for k in range(len(p))]))
    terms = torch.stack(rows) * temperature * temperature
    n, classes = terms.shape
    return {
        "batchmean": terms.sum() / n,
        "sum": terms.sum(),
        "mean": terms.sum() / (n * classes),
        "none": terms,
    }[reduction]


def make(n=4, classes=7, *, dtype=torch.float64, scale=2.0, requires_grad=False):
    fixed = {"dtype": dtype, "scale": scale, "requires_grad": requires_grad}
    return random(n, classes, seed=1, **fixed), random(n, classes, seed=2, **fixed)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("n", "classes", "temperature"), [(1, 1, 1.0), (4, 7, 1.0), (5, 2, 4.0), (3, 33, 0.3), (1, 5, 2)]
)
def test_value_and_gradients_follow_the_formula(n, classes, temperature, direction, reduction):
    inputs = make(n, classes)
    options = {"temperature": temperature, "direction": direction, "reduction": reduction}
    values, gradients = value_and_gradients(lambda *a: ops.distillation_kl(*a, **options), inputs)
    wanted, wanted_gradients = value_and_gradients(lambda *a: definition(*a, **options), inputs)
    assert_close(values[0], wanted[0], atol=1e-13, rtol=1e-12)
    for got, want, name in zip(gradients, wanted_gradients, ("student", "teacher"), strict=True):
        assert_close(got, want, atol=1e-12, rtol=1e-12, name=f"gradient of the {name}'s logits")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck_once_and_twice(direction, reduction):
    op = lambda *a: ops.distillation_kl(*a, temperature=1.5, direction=direction, reduction=reduction)  # noqa: E731
    assert gradcheck(op, make(3, 4, requires_grad=True))
    assert gradgradcheck(op, make(3, 4, requires_grad=True))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_are_those_of_torch(reduction):
    s, t = make()
    wanted = F.kl_div((s / 3).log_softmax(1), (t / 3).log_softmax(1), reduction=reduction, log_target=True) * 9
    assert_close(ops.distillation_kl(s, t, temperature=3, reduction=reduction), wanted, atol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_temperature_squared(direction, reduction):
    options = {"temperature": 3.0, "direction": direction, "reduction": reduction}
    values, gradients = value_and_gradients(lambda *a: ops.distillation_kl(*a, **options, squared=False), make())
    wanted, wanted_gradients = value_and_gradients(lambda *a: definition(*a, **options) / 9, make())
    assert_close(values[0], wanted[0], atol=1e-13, rtol=1e-12)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert_close(got, want, atol=1e-13, rtol=1e-12)


def test_gradient_by_the_derived_formula():
    """The backward that a fused kernel computes, for both sides."""
    s, t = make(5, 6)
    tau, n = 2.5, 5
    _, (ds, dt) = value_and_gradients(lambda *a: ops.distillation_kl(*a, temperature=tau), (s, t))
    g = random(dtype=s.dtype, seed=1, shift=0.5)
    p, q = (t / tau).softmax(1), (s / tau).softmax(1)
    difference = p.log() - q.log()
    row = (p * difference).sum(1, keepdim=True)
    assert_close(ds, g * tau * (q - p) / n, atol=1e-13, name="student")
    assert_close(dt, g * tau * p * (difference - row) / n, atol=1e-13, name="teacher")


def test_reverse_is_forward_exchanged():
    s, t = make()
    reverse = ops.distillation_kl(s, t, direction="reverse", temperature=2.0)
    assert torch.equal(reverse, ops.distillation_kl(t, s, temperature=2.0))


def test_equal_logits_up_to_a_constant_are_no_distance():
    s, _ = make(requires_grad=True)
    for direction in DIRECTIONS:
        loss = ops.distillation_kl(s, s.detach() + 5, direction=direction)
        assert_close(loss, 0.0, atol=1e-14)
        assert_close(torch.autograd.grad(loss, s)[0], 0.0, atol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype, direction):
    s, t = extreme(12, 9, dtype=dtype), extreme(12, 9, dtype=dtype, seed=1).roll(1, 0)
    op = lambda *a: ops.distillation_kl(*a, direction=direction, reduction="sum")  # noqa: E731
    values, gradients = value_and_gradients(op, (s, t))
    assert values[0].isfinite()
    assert values[0] >= 0
    assert not any(g.isnan().any() for g in gradients)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_classes(direction):
    """Minus infinity on both sides is as if the class did not exist, in value and gradients."""
    s, t = make(3, 6)
    keep = [0, 2, 3, 5]
    masked_s, masked_t = s.clone(), t.clone()
    masked_s[:, [1, 4]] = masked_t[:, [1, 4]] = -math.inf
    op = lambda *a: ops.distillation_kl(*a, temperature=2.0, direction=direction)  # noqa: E731
    (value,), gradients = value_and_gradients(op, (masked_s, masked_t))
    (wanted,), wanted_gradients = value_and_gradients(op, (s[:, keep], t[:, keep]))
    assert_close(value, wanted, atol=1e-14)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert_close(got[:, keep], want, atol=1e-14)
        assert_close(got[:, [1, 4]], 0.0, atol=0.0)


def test_a_class_masked_on_one_side():
    s, t = make(2, 4)
    t[0, 1] = -math.inf  # the teacher excludes it: it adds nothing, as in torch
    wanted = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    (value,), gradients = value_and_gradients(ops.distillation_kl, (s, t))
    assert_close(value, wanted, atol=1e-14)
    assert all(g.isfinite().all() for g in gradients)
    assert ops.distillation_kl(t, s) == math.inf  # the student excludes what the teacher expects


def test_empty_batch():
    s, t = make(0, 5, requires_grad=True)
    for reduction in ("batchmean", "mean"):
        assert ops.distillation_kl(s, t, reduction=reduction).isnan()
    assert ops.distillation_kl(s, t, reduction="sum") == 0
    assert ops.distillation_kl(s, t, reduction="none").shape == (0, 5)
    assert torch.autograd.grad(ops.distillation_kl(s, t), s)[0].shape == (0, 5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reduced_precision(dtype, direction):
    """The logits as given are exact; everything after is float32, and only the gradients are rounded back."""
    inputs = make(8, 50, dtype=dtype)
    exact = [t.double() for t in inputs]
    op = lambda *a: ops.distillation_kl(*a, temperature=2.0, direction=direction)  # noqa: E731
    (value,), gradients = value_and_gradients(op, inputs)
    define = lambda *a: definition(*a, temperature=2.0, direction=direction)  # noqa: E731
    (wanted,), wanted_gradients = value_and_gradients(define, exact)
    assert value.dtype == torch.float32
    # log p and log q are near 4, each off by some u of that; p sums to one, and temperature squared is 4.
    single = 64 * unit_roundoff(torch.float32)
    assert_close(value, wanted, atol=single, rtol=single)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert got.dtype == dtype
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # below it float16 rounds to a fixed grid
        assert_close(got, want, atol=single * float(want.abs().max()) + tiny, rtol=unit_roundoff(dtype))


def test_dtypes_may_differ():
    s, t = make()
    assert ops.distillation_kl(s.bfloat16(), t.float()).dtype == torch.float32
    assert ops.distillation_kl(s.half(), t).dtype == torch.float64
    _, gradients = value_and_gradients(ops.distillation_kl, (s.bfloat16(), t.float()))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]


def test_autocast_leaves_the_loss_in_float32():
    s, t = make(dtype=torch.float32)
    wanted = ops.distillation_kl(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.distillation_kl(s, t), wanted)


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_memory_layout_changes_nothing(layout):
    inputs = make(dtype=torch.float32)
    got, got_gradients = value_and_gradients(ops.distillation_kl, [with_layout(t, layout) for t in inputs])
    want, want_gradients = value_and_gradients(ops.distillation_kl, inputs)
    for a, b in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-6, name=layout)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiles_without_graph_breaks(direction):
    calls = [make(n, classes, dtype=torch.float32) for n, classes in ((4, 7), (6, 7), (5, 9))]
    op = lambda *a: ops.distillation_kl(*a, temperature=2.0, direction=direction)  # noqa: E731
    assert_compiles(op, calls, atol=1e-6, rtol=1e-5)


def test_function_transforms():
    s, t = make()
    leaf = t.clone().requires_grad_()
    wanted = torch.autograd.grad(ops.distillation_kl(s, leaf), leaf)[0]
    assert_close(torch.func.grad(ops.distillation_kl, argnums=1)(s, t), wanted, atol=1e-14)
    each = torch.func.vmap(lambda a, b: ops.distillation_kl(a[None], b[None]))(s, t)
    assert_close(each.mean(), ops.distillation_kl(s, t), atol=1e-14)
    curvature = torch.func.hessian(lambda x: ops.distillation_kl(x[None], t[:1]))(s[0])
    q = s[0].softmax(0)
    assert_close(curvature, q.diag() - torch.outer(q, q), atol=1e-13)


def test_arguments_are_checked():
    s, t = make()
    op = ops.distillation_kl
    with pytest.raises(TypeError, match="student_logits must be a tensor, got list"):
        op([[0.0]], t)
    with pytest.raises(TypeError, match=r"teacher_logits must be of dtype .*, got torch.int64"):
        op(s, t.long())
    with pytest.raises(ValueError, match=r"student_logits must have shape \(N, classes\), got \(2, 2, 7\)"):
        op(s.view(2, 2, 7), t)
    with pytest.raises(ValueError, match=r"teacher_logits must have shape .* with N = 4, classes = 7, got \(4, 6\)"):
        op(s, t[:, :6])
    with pytest.raises(ValueError, match="teacher_logits must be on the device of student_logits, cpu, got meta"):
        op(s, t.to("meta"))
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0, got"):
            op(s, t, temperature=wrong)
    with pytest.raises(TypeError, match="temperature must be a number, got NoneType"):
        op(s, t, temperature=None)
    with pytest.raises(ValueError, match="direction must be 'forward' or 'reverse', got 'both'"):
        op(s, t, direction="both")
    with pytest.raises(ValueError, match="reduction must be 'batchmean', 'sum', 'mean' or 'none', got 'avg'"):
        op(s, t, reduction="avg")
    with pytest.raises(ValueError, match="backend must be"):
        op(s, t, backend="numpy")
    with pytest.raises(RuntimeError, match="has no implementation of distillation_kl; it has reference"):
        op(s, t, backend="cuda")


# --- the kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "strided", "transposed", "offset")
SHAPES = {
    "plain": (4, 8),
    "odd": (5, 33),
    "one class": (3, 1),
    "one row": (1, 200),
    "one logit": (1, 1),
    "no rows": (0, 7),
    "more rows than a tile": (70, 20),
}


def fused(**options):
    """The op with options, its backend left open."""
    return lambda *logits, backend="triton": ops.distillation_kl(*logits, **options, backend=backend)


def draws(reduction):
    """A sum is one number a draw: of few draws, the reference's error can be small by luck in all."""
    return 3 if reduction == "none" else 16


def pair(n, classes, device, *, dtypes=(torch.float32,) * 2, layout="contiguous", scale=2.0):
    """Makes both logits from a seed."""
    return lambda seed: [
        random(n, classes, dtype=dtype, layout=layout, device=device, scale=scale, seed=seed + i)
        for i, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_are_no_worse_than_the_reference(kernel_device, shape, dtype):
    inputs = pair(*shape, kernel_device, dtypes=(dtype, dtype))
    for direction, reduction in zip(DIRECTIONS, ("batchmean", "none"), strict=True):
        options = {"temperature": 3.0, "direction": direction, "reduction": reduction}
        assert_backend_no_worse(fused(**options), inputs, draws=draws(reduction))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_take_every_layout_and_option(kernel_device, layout, direction, reduction):
    inputs = pair(5, 33, kernel_device, layout=layout)
    options = {"temperature": 0.5, "direction": direction, "reduction": reduction, "squared": direction == "forward"}
    assert_backend_no_worse(fused(**options), inputs, draws=draws(reduction))


def test_kernels_take_rows_longer_than_a_tile(kernel_device):
    for reduction in ("batchmean", "none"):
        assert_backend_no_worse(fused(reduction=reduction), pair(3, 4_500, kernel_device), draws=4)


def test_kernels_sum_many_rows_over_several_programs(kernel_device):
    assert_backend_no_worse(fused(temperature=2.0), pair(70, 500, kernel_device), draws=4)


@pytest.mark.parametrize("dtypes", [p for p in itertools.product(DTYPES, repeat=2) if p[0] != p[1]])
def test_kernels_take_two_dtypes(kernel_device, dtypes):
    assert_backend_no_worse(fused(), pair(4, 9, kernel_device, dtypes=dtypes), draws=16)


def test_kernels_take_an_upstream_gradient_of_one_number_for_all(kernel_device):
    """What ``sum`` hands back has strides of zero."""
    op = lambda *logits, backend: fused(reduction="none")(*logits, backend=backend).sum()  # noqa: E731
    assert_backend_no_worse(op, pair(4, 9, kernel_device), draws=16)


@pytest.mark.parametrize("side", [0, 1])
def test_kernels_give_one_gradient_alone(kernel_device, side):
    logits = pair(4, 9, kernel_device)(0)
    logits[side].requires_grad_()
    both = value_and_gradients(fused(), [t.detach() for t in logits])[1]
    alone = value_and_gradients(fused(), logits)[1]
    assert alone[1 - side] is None
    assert torch.equal(alone[side], both[side])
    assert not fused()(*(t.detach() for t in logits)).requires_grad


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_stand_extreme_logits(kernel_device, dtype, direction):
    logits = [extreme(12, 9, dtype=dtype), extreme(12, 9, dtype=dtype, seed=1).roll(1, 0)]
    logits = [t.to(kernel_device) for t in logits]
    op = lambda *a, backend: fused(direction=direction, reduction="sum")(*a, backend=backend)  # noqa: E731
    (mine,), gradients = value_and_gradients(lambda *a: op(*a, backend="triton"), logits)
    (want,), wanted = value_and_gradients(lambda *a: op(*a, backend="reference"), logits)
    (truth,), true = value_and_gradients(lambda *a: op(*a, backend="reference"), [t.double() for t in logits])
    assert mine.isfinite() == want.isfinite()
    if mine.isfinite():
        assert_close(mine, truth, atol=2 * abs(float(want - truth)), rtol=4 * unit_roundoff(torch.float32))
    for got, plain, exact in zip(gradients, wanted, true, strict=True):
        assert torch.equal(got.isnan(), plain.isnan())
        size = float(exact.abs().max())
        allowed = 2 * float((plain.double() - exact).abs().max()) + torch.finfo(dtype).eps * size
        assert_close(got, exact, atol=allowed)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kernels_drop_masked_classes(kernel_device, direction):
    logits = pair(3, 6, kernel_device)(0)
    keep = [0, 2, 3, 5]
    masked = [t.clone() for t in logits]
    for t in masked:
        t[:, [1, 4]] = -math.inf
    (value,), gradients = value_and_gradients(fused(direction=direction), masked)
    (wanted,), wanted_gradients = value_and_gradients(fused(direction=direction), [t[:, keep] for t in logits])
    assert_close(value, wanted, atol=1e-6, rtol=1e-6)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert_close(got[:, keep], want, atol=1e-6)
        assert not got[:, [1, 4]].any()


def test_kernels_treat_a_class_masked_on_one_side_as_the_reference(kernel_device):
    s, t = pair(2, 4, kernel_device)(0)
    t[0, 1] = -math.inf
    (value,), gradients = value_and_gradients(fused(), [s, t])
    (wanted,), wanted_gradients = value_and_gradients(lambda *a: fused()(*a, backend="reference"), [s, t])
    assert_close(value, wanted, atol=1e-6)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert_close(got, want, atol=1e-6)
    assert fused()(t, s) == math.inf


def test_equal_logits_are_no_distance_to_the_kernels(kernel_device):
    s = pair(4, 9, kernel_device, scale=100.0)(0)[0]
    (value,), gradients = value_and_gradients(fused(), [s, s.clone()])
    assert value == 0
    assert not any(g.any() for g in gradients)


def test_two_runs_are_equal_to_the_bit(kernel_device):
    logits = pair(70, 500, kernel_device, dtypes=(torch.bfloat16,) * 2)(0)
    runs = [value_and_gradients(fused(), logits) for _ in range(2)]
    for a, b in zip((*runs[0][0], *runs[0][1]), (*runs[1][0], *runs[1][1]), strict=True):
        assert torch.equal(a, b)


def test_a_named_backend_says_why_it_cannot_serve(kernel_device):
    s, t = pair(2, 3, kernel_device)(0)
    for logits in ((s.double(), t), (s, t.double())):
        with pytest.raises(RuntimeError, match=r"cannot serve distillation_kl: its kernels take .*, not float64"):
            fused()(*logits)


@pytest.mark.parametrize("side", [0, 1])
def test_second_derivatives_are_a_clear_error(kernel_device, side):
    logits = [t.requires_grad_() for t in pair(2, 5, kernel_device)(0)]
    gradient = torch.autograd.grad(fused()(*logits), logits, create_graph=True)[side]
    with pytest.raises(RuntimeError, match="distillation_kl: fused backends have no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_opcheck(kernel_device, reduction, layout):
    a, b = pair(3, 5, kernel_device, layout=layout, dtypes=(torch.float32, torch.bfloat16))(0)
    library = torch.ops.dfkd_fast
    torch.library.opcheck(library.distillation_kl.default, (a, b, 2.0, True, reduction))
    out, saved = library.distillation_kl(a, b, 2.0, True, reduction)
    upstream = random(*out.shape, layout=layout if out.ndim else "contiguous", device=kernel_device)
    for want_a, want_b in ((True, True), (True, False), (False, True)):
        arguments = (upstream, a, b, 2.0, True, reduction, saved, [want_a, want_b])
        torch.library.opcheck(library.distillation_kl_backward.default, arguments)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", True)])
def test_kernels_compile_without_graph_breaks(kernel_device, compiler, dynamic):
    calls = [pair(n, classes, kernel_device)(0) for n, classes in ((4, 7), (6, 7), (5, 9))]
    for reduction in ("batchmean", "none") if compiler == "aot_eager" else ("batchmean",):
        op = lambda s, t: fused(temperature=2.0, reduction=reduction)(2 * s, t)  # noqa: B023, E731
        assert_compiles(op, calls, backend=compiler, dynamic=dynamic, atol=1e-6, rtol=1e-5)


def test_function_transforms_of_the_kernels(kernel_device):
    s, t = pair(4, 7, kernel_device)(0)
    leaf = t.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(fused()(s, leaf), leaf)
    assert torch.equal(torch.func.grad(fused(), argnums=1)(s, t), wanted)
    one = lambda a, b: fused()(a[None], b[None])  # noqa: E731
    assert_close(torch.func.vmap(one)(s, t).mean(), fused()(s, t), atol=1e-6)
    each = torch.func.vmap(torch.func.grad(one, argnums=1), in_dims=(0, 0))(s, t)
    assert_close(each / 4, wanted, atol=1e-7)
    shared = torch.func.vmap(one, in_dims=(0, None))(s, t[0])
    assert_close(shared, torch.stack([one(row, t[0]) for row in s]), atol=0)


def test_autocast_leaves_the_kernels_in_float32(kernel_device):
    s, t = pair(4, 7, kernel_device)(0)
    wanted = fused()(s, t)
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        assert torch.equal(fused()(s, t), wanted)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    classes=st.one_of(st.integers(1, 70), st.integers(4_090, 4_200)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layout=st.sampled_from(LAYOUTS),
    direction=st.sampled_from(DIRECTIONS),
    reduction=st.sampled_from(REDUCTIONS),
    temperature=st.sampled_from((0.25, 1.0, 4.0)),
)
def test_sweep(kernel_device, n, classes, dtypes, layout, direction, reduction, temperature):
    options = {"temperature": temperature, "direction": direction, "reduction": reduction}
    inputs = pair(min(n, 3) if classes > 70 else n, classes, kernel_device, dtypes=dtypes, layout=layout)
    assert_backend_no_worse(fused(**options), inputs, draws=draws(reduction))


# --- on a card alone


def on_card(n, classes, *, dtypes=(torch.float32,) * 2):
    """As :func:`pair`, but drawn on the card too: for the largest logits the host would take minutes."""

    def make(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return [(2 * torch.randn(n, classes, device="cuda", generator=generator)).to(dtype) for dtype in dtypes]

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 200), (64, 1000), (4096, 1000), (4096, 32_000)])
def test_the_papers_logits(shape, dtype, direction):
    inputs = on_card(*shape, dtypes=(dtype, dtype))
    few = shape[0] * shape[1] > 2**20
    assert_backend_no_worse(fused(temperature=4.0, direction=direction), inputs, draws=4 if few else 16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 200), (4096, 1000)])
def test_a_captured_graph_follows_its_inputs(shape):
    logits = [t.requires_grad_() for t in on_card(*shape, dtypes=(torch.bfloat16,) * 2)(0)]

    def step():
        loss = fused(temperature=4.0)(*logits)
        return loss, *torch.autograd.grad(loss, logits)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in range(1, 101):
        with torch.no_grad():
            for leaf, new in zip(logits, on_card(*shape)(10 * seed), strict=True):
                leaf.copy_(new)
        graph.replay()
        if seed % 33 == 1:
            for a, b in zip(results, step(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.large_memory
def test_more_logits_than_32_bits_count():
    shape = (2**21 + 3, 1_025)
    logits = [torch.empty(shape, dtype=torch.float16, device="cuda").normal_().requires_grad_() for _ in range(2)]
    assert logits[0].numel() > 2**31
    loss = fused(reduction="sum")(*logits)
    gradients = torch.autograd.grad(loss, logits)
    pieces = [slice(start, start + 2**17) for start in range(0, shape[0], 2**17)]
    with torch.no_grad():
        sums = [fused(reduction="sum")(*(t[piece] for t in logits), backend="reference") for piece in pieces]
    assert_close(loss.cpu(), torch.stack(sums).double().sum().cpu(), atol=0, rtol=1e-5)
    for piece in (slice(0, 8), slice(2**20, 2**20 + 8), slice(2**21 - 5, 2**21 + 3)):
        parts = [t.detach()[piece].clone().requires_grad_() for t in logits]
        true = [t.detach().double().requires_grad_() for t in parts]
        wanted = torch.autograd.grad(fused(reduction="sum")(*true, backend="reference"), true)
        for got, want in zip(gradients, wanted, strict=True):
            assert_close(got[piece], want, atol=torch.finfo(torch.float16).eps * float(want.abs().max()))


@pytest.mark.gpu
def test_memory_is_that_of_a_few_numbers_a_row():
    n, classes = 4096, 32_000
    logits = [t.requires_grad_() for t in on_card(n, classes, dtypes=(torch.bfloat16,) * 2)(0)]
    torch.autograd.grad(fused()(*logits), logits)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fused()(*logits)
    assert torch.cuda.max_memory_allocated() - before <= 5 * 4 * n + 2**16
    gradients = torch.autograd.grad(loss, logits)
    assert torch.cuda.max_memory_allocated() - before <= sum(g.numel() * g.element_size() for g in gradients) + 2**18
