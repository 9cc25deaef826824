"""Launch plans: the third call of a kind computes what the first did, bit for bit, and nothing is planned unsurely."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

import triton.runtime.interpreter as interpreter
from triton import knobs

from dfkd_fast import ops
from dfkd_fast.kernels import config, plans


@dataclass
class Count:
    """Launches that were made, the ordinary way and from plans."""

    ordinary: int = 0
    planned: int = 0


class _Compiled:
    """Stands for what Triton compiled where its interpreter runs: called as that is, with addresses for tensors."""

    function = "function"
    packed_metadata = "metadata"

    def __init__(self, run: Callable[..., Any], kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]):
        self._call, self._kernel, self._arguments, self._options = run, kernel, arguments, options

    def run(self, *call: Any) -> None:
        *grid, stream, function, metadata, launch_metadata, enter, leave = call[:9]
        assert (stream, function, metadata) == (7, self.function, self.packed_metadata)
        assert (launch_metadata, enter, leave) == (None, None, None)
        count = len(self._arguments)
        given, constants = call[9 : 9 + count], call[9 + count :]
        names = self._kernel.arg_names[count:]
        assert list(constants) == [self._options[name] for name in names]
        arguments = [self._at(old, new) for old, new in zip(self._arguments, given, strict=True)]
        self._call(self._kernel, *arguments, grid=tuple(grid), warmup=False, **self._options)

    def _at(self, old: Any, new: Any) -> Any:
        """The tensor at an address, as long as the one that the plan was recorded with."""
        if isinstance(old, tuple):
            each = [self._at(a, b) for a, b in zip(old, new, strict=True)]
            return type(old)(*each) if hasattr(old, "_fields") else tuple(each)
        if not isinstance(old, Tensor):
            assert old == new
            return new
        assert isinstance(new, int)
        storage = old.untyped_storage()
        size = storage.nbytes() - (old.data_ptr() - storage.data_ptr())
        if new == 0:
            return old.new_empty(0)
        return torch.frombuffer((ctypes.c_char * size).from_address(new), dtype=old.dtype)


@pytest.fixture
def count(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    """Counts launches; on the CPU, plans run Triton's interpreter."""
    counted = Count()
    note, fill = plans.note_launch, plans._filled

    def noted(*launched: Any) -> None:
        counted.ordinary += 1
        note(*launched)

    def filled(template: Any, pointers: list[int]) -> list[Any]:
        counted.planned += 1
        return fill(template, pointers)

    monkeypatch.setattr(plans, "note_launch", noted)
    monkeypatch.setattr(plans, "_filled", filled)
    if kernel_device == "cpu":
        run = interpreter.InterpretedFunction.run

        def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> _Compiled:
            with _disable_current_modes():  # the interpreter computes with tensors, which a device would not be seen to
                run(self, *arguments, grid=grid, warmup=warmup, **options)
            return _Compiled(run, self, arguments, options)

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", compiled)
        active = SimpleNamespace(get_current_device=lambda: -1, get_current_stream=lambda index: 7)
        monkeypatch.setattr(plans, "driver", SimpleNamespace(active=active))
    plans.forget()
    yield counted
    plans.forget()


def normal(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.randn(shape, device=device)


def positive(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.rand(shape, device=device) + 0.5


def half(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.randn(shape, device=device).to(torch.bfloat16)


def channels_last(*shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.randn(shape, device=device).to(memory_format=torch.channels_last)


def _pooled(x: Tensor) -> Tensor:
    y, code = ops.max_pool2x2(x, relu=True, backend="triton")
    return ops.max_unpool2x2(y, code, x.shape[2:], backend="triton")


def _views(both: Tensor) -> Tensor:
    return ops.contrastive_loss(*both.unbind(1), symmetric=True, normalize=False, backend="triton")


def _case(function: Callable[..., Any], *makes: Callable[[str], Tensor], **options: Any) -> Any:
    def call(*inputs: Tensor) -> Any:
        return function(*inputs, **options, backend="triton")

    return call, makes


CASES: dict[str, Any] = {
    "kl": _case(ops.distillation_kl, normal(6, 10), normal(6, 10), temperature=4.0),
    "kl in two launches": _case(ops.distillation_kl, normal(9, 4000), normal(9, 4000)),
    "kl not reduced": _case(ops.distillation_kl, normal(6, 10), half(6, 10), reduction="none"),
    "contrast in one launch": _case(ops.contrastive_loss, half(6, 12), half(6, 12), symmetric=True),
    "contrast": _case(ops.contrastive_loss, normal(35, 20), normal(35, 20)),
    "contrast not reduced": _case(ops.contrastive_loss, normal(35, 20), normal(35, 20), reduction="none"),
    "contrast of views": (_views, (normal(35, 2, 20),)),
    "statistics": _case(ops.channel_statistics, normal(3, 5, 4, 6)),
    "statistics, channels-last": _case(ops.channel_statistics, channels_last(3, 5, 4, 6)),
    "distance of statistics": _case(ops.statistics_distance, normal(3, 8, 4, 6), normal(8), positive(8)),
    "distance of statistics, merged": _case(
        ops.statistics_distance, channels_last(40, 24, 7, 5), normal(24), positive(24)
    ),
    "BatchNorm": (
        lambda x, m, v, w, b, r: ops.batchnorm_statistics(
            x, m.detach(), v.detach(), w, b, 1e-5, activation="relu", residual=r, backend="triton"
        ),
        (normal(2, 8, 4, 4), normal(8), positive(8), normal(8), normal(8), normal(2, 8, 4, 4)),
    ),
    "high order": _case(ops.high_order_attention, normal(2, 8, 3, 4), normal(6, 4, 8), normal(3, 8, 4)),
    "high order, split": _case(ops.high_order_attention, half(1, 520, 1, 2), half(1, 4, 520), half(1, 520, 4)),
    "high order error": (
        lambda x, p, o, t: ops.high_order_attention_mse(x, p, o, t.detach(), backend="triton"),
        (normal(2, 8, 3, 4), normal(6, 4, 8), normal(3, 8, 4), normal(2, 8, 3, 4)),
    ),
    "spatial": _case(ops.spatial_attention, normal(2, 8, 5, 6), normal(2, 4, 5, 6), normal(8, 4)),
    "spatial over channels": _case(
        ops.spatial_attention, normal(2, 8, 5, 6), normal(2, 4, 5, 6), normal(8, 4), normal(8), form="channel"
    ),
    "pool and unpool": (_pooled, (normal(2, 4, 6, 8),)),
}


def _results(call: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """What a call gives, and the gradients of all that it was given."""
    leaves = [x.requires_grad_() for x in inputs]
    out = call(*leaves)
    out = [out] if isinstance(out, Tensor) else list(out)
    wanted = [x for x in out if x.requires_grad]
    torch.manual_seed(1)
    upstream = [torch.randn_like(x) for x in wanted]
    gradients = torch.autograd.grad(wanted, leaves, upstream, allow_unused=True)
    return [x.detach() for x in out] + [g for g in gradients if g is not None]


def _inputs(name: str, device: str) -> tuple[Callable[..., Any], list[Tensor]]:
    call, makes = CASES[name]
    return call, [make(device) for make in makes]


@pytest.mark.parametrize("name", CASES)
def test_a_plan_repeats_what_was_launched(count, kernel_device, name):
    call, makes = CASES[name]
    for _ in range(2):
        before = count.ordinary
        _results(call, [make(kernel_device) for make in makes])
        assert count.ordinary > before
    assert count.planned == 0
    inputs = [make(kernel_device) for make in makes]
    with plans.ordinary():
        expected = _results(call, [x.clone() for x in inputs])
    before = count.ordinary
    got = _results(call, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert count.ordinary == before, "something was launched the ordinary way"
    assert count.planned > 0


def test_one_tensor_for_two_arguments_is_not_recorded(count, kernel_device):
    call = lambda a, b: ops.contrastive_loss(a, b, backend="triton")  # noqa: E731
    make = lambda: torch.randn(35, 20, device=kernel_device)  # noqa: E731
    for _ in range(4):
        x = make()
        call(x, x)
    assert count.planned == 0, "recorded where two arguments could not be told apart"
    call(make(), make())
    x, y = make(), make()
    with plans.ordinary():
        expected, same = call(x, y), call(x, x)
    assert torch.equal(call(x, y), expected)
    assert count.planned > 0
    assert torch.equal(call(x, x), same)


def test_numbers_shapes_and_strides_are_part_of_the_kind(count, kernel_device):
    make = lambda: torch.randn(20, 12, device=kernel_device)  # noqa: E731
    a, b = make(), make()
    kinds = [
        lambda: ops.distillation_kl(a, b, temperature=2.0, backend="triton"),
        lambda: ops.distillation_kl(a, b, temperature=3.0, backend="triton"),
        lambda: ops.distillation_kl(a[:13], b[:13], temperature=2.0, backend="triton"),
        lambda: ops.distillation_kl(a.T, b.T, temperature=2.0, backend="triton"),
        lambda: ops.distillation_kl(a.half(), b, temperature=2.0, backend="triton"),
        lambda: ops.distillation_kl(a, b, temperature=2.0, reduction="sum", backend="triton"),
        lambda: ops.distillation_kl(a, b, temperature=2.0, direction="reverse", reduction="sum", backend="triton"),
    ]
    with plans.ordinary():
        expected = [call() for call in kinds]
    for _ in range(3):
        for call, value in zip(kinds, expected, strict=True):
            assert torch.equal(call(), value)
    assert count.planned > 0


def test_pointers_that_are_not_aligned_go_the_ordinary_way(count, kernel_device):
    call = lambda a, b: ops.distillation_kl(a, b, backend="triton")  # noqa: E731
    make = lambda skip: torch.randn(64 + skip, device=kernel_device)[skip:].view(8, 8)  # noqa: E731
    for _ in range(3):
        call(make(0), make(0))
    planned, ordinary = count.planned, count.ordinary
    assert planned > 0
    x, y = make(1), make(0)
    with plans.ordinary():
        expected = call(x, y)
    assert torch.equal(call(x, y), expected)
    assert count.planned == planned
    assert count.ordinary > ordinary


def _planned(count: Count, device: str) -> Callable[[], int]:
    """Make a plan; what is returned calls once more and counts the launches from it."""
    a, b = torch.randn(7, 9, device=device), torch.randn(7, 9, device=device)

    def again() -> int:
        before = count.planned
        ops.distillation_kl(a, b, backend="triton")
        return count.planned - before

    for _ in range(2):
        again()
    assert again() == 1
    return again


def test_a_forced_configuration_is_followed(count, kernel_device):
    again = _planned(count, kernel_device)
    chosen = config.Launch(tile={"ROWS": 2, "BLOCK": 16}, num_warps=1)
    with config.forced("distillation_kl_alone", chosen):
        assert again() == 0
    with config.asked() as asked:
        assert again() == 0
    assert asked
    assert again() == 1


def test_hooks_of_a_profiler_see_every_launch(count, kernel_device):
    again = _planned(count, kernel_device)
    hook = lambda *_: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert again() == 0
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert again() == 1


def test_each_thread_says_for_itself_whether_it_wants_plans(count, kernel_device):
    again = _planned(count, kernel_device)
    found: list[int] = []
    with plans.ordinary():
        assert again() == 0
        thread = threading.Thread(target=lambda: found.append(again()))
        thread.start()
        thread.join()
    assert found == [1]


def test_the_precision_of_products_is_compared_at_each_call(count, kernel_device, monkeypatch):
    matmul = torch.backends.cuda.matmul
    a, b = (torch.randn(35, 20, device=kernel_device) for _ in range(2))
    call = lambda: ops.contrastive_loss(a, b, backend="triton")  # noqa: E731
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        for _ in range(3):
            call()
        planned, ordinary = count.planned, count.ordinary
        assert planned > 0
        matmul.fp32_precision = "tf32"
        call()
        assert count.planned == planned
        assert count.ordinary > ordinary
        call()
        ordinary = count.ordinary
        call()
        assert count.ordinary == ordinary, "there is a plan for either precision"
        matmul.fp32_precision = "ieee"
        call()
        assert count.ordinary == ordinary
    finally:
        matmul.fp32_precision = before


def test_kinds_that_never_repeat_do_not_fill_the_memory(count, kernel_device, monkeypatch):
    monkeypatch.setattr(plans, "_MOST", 4)
    kept = plans.Plans(lambda x, out: out.zero_())
    for rows in range(1, 20):
        x = torch.randn(rows, 4, device=kernel_device)
        for _ in range(2):
            kept((x,), (x.new_empty(()),))
    assert len(kept._seen) <= 4
    assert len(kept._known) <= 4


@pytest.mark.parametrize(
    ("fill", "expected"),
    [(lambda x, out: out.copy_(x), lambda x: x), (lambda x, out: out.fill_(x.sum().item()), lambda x: x.sum())],
    ids=["computing", "reading"],
)
def test_what_computes_by_other_means_is_never_planned(count, kernel_device, fill, expected):
    kept = plans.Plans(fill)
    for _ in range(5):
        x = torch.randn(5, device=kernel_device)
        out = torch.empty_like(x)
        kept((x,), (out,))
        torch.testing.assert_close(out, expected(x).expand(5))
    assert list(kept._known.values()) == [None]
    assert count.planned == 0


def test_what_cannot_be_watched_is_not_recorded(count, kernel_device):
    """Where dispatch to modes is off, a copy that a launcher makes would pass for a temporary that kernels fill."""
    stored = torch.randn(8, 2, device=kernel_device)
    call = lambda x: ops.statistics_distance(x, stored[:, 0], stored[:, 1], backend="triton")  # noqa: E731
    make = lambda: torch.randn(3, 8, 2, 2, device=kernel_device)  # noqa: E731
    call(make())
    with torch._C._DisableTorchDispatch():
        call(make())
    x = make()
    for _ in range(3):
        with plans.ordinary():
            expected = call(x)
        assert torch.equal(call(x), expected)


def test_one_failure_is_not_for_good(count, kernel_device):
    computes = [False, True, False, False]

    def fill(x: Tensor, out: Tensor) -> None:
        from dfkd_fast.kernels import distillation_kl as kernels

        if computes.pop(0):
            torch.zeros(1, device=x.device)  # as a finaliser might
        kernels.forward(x, x[:], 1.0, True, "batchmean", out, x.new_empty(5, len(x)))

    kept = plans.Plans(fill)
    for _ in range(3):
        x = torch.randn(6, 10, device=kernel_device)
        kept((x,), (x.new_empty(()),))
    assert count.planned == 0
    kept((x,), (x.new_empty(()),))
    assert count.planned == 1


def test_a_tensor_that_has_outlived_its_transform_keeps_its_gradient(kernel_device):
    kept: list[Tensor] = []

    def function(a: Tensor) -> Tensor:
        kept.append(a)
        return a.square().sum()

    x = torch.randn(3, 4, device=kernel_device, requires_grad=True)
    torch.func.grad(function)(x)
    y = torch.randn(3, 4, device=kernel_device)
    gradient = torch.autograd.grad(ops.distillation_kl(kept[0], y, backend="triton"), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(ops.distillation_kl(x, y), x))


@pytest.mark.gpu
def test_the_ordinary_way_holds_for_backward_too(count, kernel_device):
    again = lambda: _results(*_inputs("kl", kernel_device))  # noqa: E731
    for _ in range(3):
        again()
    planned = count.planned
    assert planned > 0
    with plans.ordinary():
        again()
    assert count.planned == planned


def test_a_view_of_shared_memory_is_not_guessed_at(count, kernel_device):
    """Where two arguments lie in one storage, only they themselves can be told apart, not views of them."""
    from dfkd_fast.kernels import contrastive_loss as kernels

    def through_views(first: Tensor, second: Tensor, out: Tensor, saved: Tensor) -> None:
        kernels.forward(first[:], second[:], 0.1, False, True, "mean", out, saved)

    kept = plans.Plans(through_views)
    for turn in range(4):
        both = torch.randn(70, 2, 40, device=kernel_device)
        first, second = both.unbind(1) if turn < 3 else (both[:, 0].clone(), both[:, 1].clone())
        out, saved = both.new_empty(()), both.new_empty(70)
        kept((first, second), (out, saved))
        with plans.ordinary():
            torch.testing.assert_close(out, ops.contrastive_loss(first, second, backend="triton"))
    assert count.planned == 0


def test_the_environment_can_ask_for_the_ordinary_way():
    code = "from dfkd_fast.kernels import plans; print(plans._state.ordinary)"
    for value, expected in (("0", "True"), ("1", "False")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"DFKD_FAST_PLANS": value},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert result.stdout.strip() == expected


@pytest.mark.gpu
def test_a_plan_is_captured_into_a_graph():
    a, b = (torch.randn(70, 40, device="cuda") for _ in range(2))
    call = lambda: ops.contrastive_loss(a, b, backend="triton")  # noqa: E731
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for source in (a, b):
        source.copy_(torch.randn_like(source))
    graph.replay()
    with plans.ordinary():
        assert torch.equal(out, call())
