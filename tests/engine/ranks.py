# ruff: noqa: E402
"""One process of test_distributed.py, started by torchrun: ``python -m tests.engine.ranks JOB ...``."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch

SINGLE = torch.float32
if "--float64" in sys.argv:  # before the package is imported, so that its float32 is float64
    torch.set_default_dtype(torch.float64)
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # type: ignore[method-assign]

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd_fast.collectives import Group, distributed
from dfkd_fast.config import DistillConfig
from dfkd_fast.engine import EagerEngine, join, steps
from dfkd_fast.engine.distributed import require_equal

from .. import tiny


class _FoundInf:
    """The attribute of a fused optimizer, which must be float32 also for float64 weights."""

    def __get__(self, optimizer: Any, owner: type) -> Tensor:
        if "inf" not in vars(optimizer):
            raise AttributeError("found_inf")
        return optimizer.inf

    def __set__(self, optimizer: Any, value: Tensor) -> None:
        optimizer.inf = value.to(SINGLE)

    def __delete__(self, optimizer: Any) -> None:
        del optimizer.inf


if "--float64" in sys.argv:  # what PyTorch has only for float32
    steps._all_finite = lambda tensors: torch.stack([each.isfinite().all() for each in tensors]).all().double().view(1)
    torch.optim.Adam.found_inf = torch.optim.SGD.found_inf = _FoundInf()  # type: ignore[attr-defined]


class CountCollectives(TorchDispatchMode):
    """Counts the functional collectives and the numbers that they send."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def train(config: DistillConfig, group: Group | None, rounds: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of each round, and parameters, buffers and states of optimizers afterward."""
    with distributed(group):
        state = tiny.state(config)
        optimizers = [side.optimizer for side in state.sides.values()]
        for optimizer in (*optimizers, *filter(None, [getattr(state.synthesizer, "optimizer", None)])):
            for values in optimizer.state.values():
                values |= {"step": values["step"].to(SINGLE)} if "step" in values else {}
        with state.synchronized():
            engine = EagerEngine(state)
            engine.prepare()
            traces = []
            for _ in range(rounds):
                engine.start_round()
                for _ in range(state.steps_per_round):
                    engine.step()
                state.position.round, state.position.step = state.position.round + 1, 0
                traces.append(state.trace.clone())
        require_equal(state.mutable_tensors())
    tensors = {}
    for name, side in state.sides.items():
        network = side.module.model if name == "student" else side.module
        for part, module in (("", network), ("objective.", side.objective)):
            tensors |= {f"{name}.{part}{key}": value for key, value in module.state_dict().items()}
    tensors |= {f"synthesizer.{key}": value for key, value in state.synthesizer.tensors().items()}
    return traces, tensors


def compare(presets: list[str], group: Group) -> None:
    """Train with all processes and with one, and print the largest differences."""
    for preset in presets:
        config = tiny.config(batch_size=12, epochs=10, **tiny.method(preset))
        found = train(config, group, 20)
        if group.rank:
            continue
        expected = train(config, None, 20)
        losses = max(float((a - b).abs().max()) for a, b in zip(found[0], expected[0], strict=True))
        print(preset, "losses", losses)
        for name, value in expected[1].items():
            difference = (found[1][name].double() - value.double()).abs().max().item() if value.numel() else 0.0
            if difference > 1e-9:
                print(preset, name, difference)


if __name__ == "__main__":
    with join() as joined:
        assert joined is not None
        compare([name for name in sys.argv[1:] if name[:2] != "--"], joined)
