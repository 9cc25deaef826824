"""Backend selection: precedence, errors, threads and torch.compile."""

from __future__ import annotations

import importlib
import inspect
import re
import threading
from types import SimpleNamespace

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.ops.backend import NAMES, VARIABLE, Implementation, _registry, dispatch, register

backend = importlib.import_module("dfkd_fast.ops.backend")  # dfkd_fast.ops.backend is the class


def refuses_small(x):
    return None if x.numel() >= 4 else f"x has {x.numel()} elements, 4 are needed"


@pytest.fixture
def op(monkeypatch):
    """An op that adds 3 on "cuda" (only from 4 elements), 2 on "triton" and 1 on "reference"."""
    table = {
        "reference": Implementation(lambda x: x + 1),
        "triton": Implementation(lambda x: x + 2),
        "cuda": Implementation(lambda x: x + 3, refuses_small),
    }
    monkeypatch.setitem(_registry, "adding", table)
    return lambda x, backend=None: dispatch("adding", backend, x)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def chosen(op, size=4, backend=None):
    return {1: "reference", 2: "triton", 3: "cuda"}[int(op(torch.zeros(size), backend=backend)[0])]


def test_first_supported_backend_is_default(op):
    assert chosen(op) == "cuda"
    assert chosen(op, size=3) == "triton"


def test_argument_overrides_context_and_context_overrides_variable(op, monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert chosen(op) == "reference"
    with ops.backend("triton"):
        assert chosen(op) == "triton"
        assert chosen(op, backend="cuda") == "cuda"
    assert chosen(op) == "reference"
    monkeypatch.setenv(VARIABLE, "")
    assert chosen(op) == "cuda"


def test_contexts_nest_and_exit_on_exceptions(op):
    outer = ops.backend("reference")
    with outer, ops.backend("triton"), outer:
        assert chosen(op) == "reference"
    with ops.backend("reference"):
        with pytest.raises(KeyError), ops.backend("triton"):
            raise KeyError(chosen(op))
        assert chosen(op) == "reference"
    assert chosen(op) == "cuda"


def test_context_applies_only_to_its_thread(op):
    inside, seen = threading.Barrier(2), {}

    def work(name):
        with ops.backend(name):
            inside.wait(timeout=30)
            seen[name] = chosen(op)
            inside.wait(timeout=30)

    with ops.backend("cuda"):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("triton", "reference")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert chosen(op) == "cuda"
    assert seen == {"triton": "triton", "reference": "reference"}


def test_requested_backend_raises_if_unsupported(op, monkeypatch):
    reason = "does not support this call of adding: x has 3 elements, 4 are needed"
    with pytest.raises(RuntimeError, match=f"'cuda', requested by backend, {reason}"):
        chosen(op, size=3, backend="cuda")
    with ops.backend("cuda"), pytest.raises(RuntimeError, match=f"requested by dfkd_fast.ops.backend, {reason}"):
        chosen(op, size=3)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match=f"requested by {VARIABLE}, {reason}"):
        chosen(op, size=3)


def test_unknown_backend_raises(op, monkeypatch):
    expected = "must be 'cuda', 'triton', 'cpu' or 'reference', got 'fast'"
    with pytest.raises(ValueError, match=f"backend {expected}"):
        ops.backend("fast")
    with pytest.raises(ValueError, match=f"backend {expected}"):
        chosen(op, backend="fast")
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{VARIABLE} {expected}"):
        chosen(op)


def test_dispatch_raises_without_supported_backend(monkeypatch):
    monkeypatch.setitem(_registry, "adding", {"cuda": Implementation(lambda x: x, refuses_small)})
    with pytest.raises(RuntimeError, match="no backend of adding supports these arguments"):
        dispatch("adding", None, torch.zeros(1))
    with pytest.raises(
        RuntimeError, match="'reference', requested by backend, does not implement adding; available: cuda"
    ):
        dispatch("adding", "reference", torch.zeros(1))


def test_registered_backend_runs_only_on_request(op, monkeypatch):
    monkeypatch.setattr(backend, "_names", list(NAMES))
    register("adding", "mine", lambda x: x + 10, refuses_small)
    assert ops.backends()["adding"] == ("cuda", "triton", "mine", "reference")
    x = torch.zeros(4)
    assert chosen(op) == "cuda"
    with ops.backend("mine"):
        assert int(op(x)[0]) == 10
    monkeypatch.setitem(_registry, "adding", {name: _registry["adding"][name] for name in ("mine", "reference")})
    assert chosen(op) == "reference"
    with pytest.raises(
        RuntimeError, match="'mine', requested by backend, does not support this call of adding: x has 2 elements"
    ):
        op(x[:2], backend="mine")
    with pytest.raises(ValueError, match="backend must be 'cuda', 'triton', 'cpu', 'mine' or 'reference', got 'fast'"):
        ops.backend("fast")


class TestEagerSizes:
    """Automatic selection in eager mode, with stand-ins for CUDA tensors."""

    @pytest.fixture
    def on_gpu(self, monkeypatch):
        streams = {"current": 0, "default": 0}
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["current"])
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["default"])
        return streams

    def small(self, op: str, numel: int) -> bool:
        return backend._small_and_eager(op, SimpleNamespace(is_cuda=True, device="cuda:0", numel=lambda: numel))

    @pytest.mark.parametrize("op", sorted(ops.backends()))
    def test_fused_backend_is_selected_from_minimum_size(self, on_gpu, op):
        size = backend.EAGER_MIN_NUMEL[op]
        assert self.small(op, size - 1)
        assert not self.small(op, size)

    def test_captured_and_compiled_code_selects_fused_backend_at_every_size(self, on_gpu, monkeypatch):
        assert self.small("distillation_kl", 1)
        on_gpu["current"] = 1  # graphs are captured on a side stream
        assert not self.small("distillation_kl", 1)
        on_gpu["current"] = 0
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not self.small("distillation_kl", 1)

    def test_dispatch_uses_minimum_size(self, on_gpu, monkeypatch):
        monkeypatch.setattr(backend, "_small_and_eager", lambda op, x: x.numel() < 100)
        served = []
        table = {name: Implementation(lambda x, name=name: served.append(name)) for name in ("triton", "reference")}
        monkeypatch.setitem(backend._registry, "choosing", table)
        for count in (99, 100):
            backend.dispatch("choosing", None, torch.zeros(count))
        backend.dispatch("choosing", "triton", torch.zeros(99))
        assert served == ["reference", "triton", "triton"]


def test_every_op_has_a_reference():
    listed = ops.backends()
    assert set(listed) == {name for name in ops.__all__ if name not in ("backend", "backends", "merge_statistics")}
    for names in listed.values():
        assert names[-1] == "reference"
        assert list(names) == sorted(names, key=NAMES.index)


@pytest.mark.parametrize("name", ops.backends())
def test_docstrings_list_registered_backends(name):
    documented = re.search(r"(?s)\n *backend: (.*?) or None; see", inspect.getdoc(getattr(ops, name)))
    assert tuple(re.findall(r'``"(\w+)"``', documented[1])) == ops.backends()[name]


def test_interpreter_runs_only_on_request(monkeypatch):
    called = []
    monkeypatch.setitem(_registry, "adding", {"reference": Implementation(lambda x: x + 1)})
    register("adding", "triton", lambda x: called.append(x) or x + 2)
    x = torch.zeros(4)
    assert dispatch("adding", None, x).sum() == 4
    assert not called
    assert dispatch("adding", "triton", x).sum() == 8
    assert dispatch("adding", None, x.to("meta")).device.type == "meta"
    assert len(called) == 2


def test_compiled_function_follows_calling_context(op):
    """A compiled function uses the backend of the context in which it is called."""
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="eager")
    assert chosen(compiled) == "cuda"
    with ops.backend("triton"):
        assert chosen(compiled) == "triton"
    assert chosen(compiled, backend="reference") == "reference"
    assert chosen(compiled) == "cuda"
    assert chosen(compiled, size=2) == "triton"


def test_context_inside_compiled_function(op):
    def both(x):
        with ops.backend("triton"):
            total = op(x)
            with ops.backend("reference"):
                total = total * 10 + op(x)
        return total * 10 + op(x)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(4)).tolist() == both(torch.zeros(4)).tolist() == [213.0] * 4
    assert chosen(op) == "cuda"


def test_compiled_function_follows_context_of_its_thread(op):
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="eager")
    seen = []
    with ops.backend("reference"):
        assert chosen(compiled) == "reference"
        thread = threading.Thread(target=lambda: seen.append(chosen(compiled)))
        thread.start()
        thread.join()
    assert seen == ["cuda"]
