"""What the host spends on a call of each drop-in beside its original, without a GPU.

At the shapes of a distillation loss a device computes for microseconds, and what a call costs is what Python, autograd
and the launches cost. All but the launches themselves can be measured on any machine. For the drop-in, Triton compiles
its kernels for sm_90 as ever, and a stand-in for its driver launches nothing, so that tensors may lie anywhere. For the
original, PyTorch computes on tensors so small that it is done at once. Each call is a loss and its gradients; of the
drop-in the kernels that would be launched are counted. What a launch costs a host is added to neither side, and the
originals have several times as many.

    python -m dfkd_fast.benchmarks.host_time --out benchmarks/results/cpu/host_time.json && make report
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfkd_fast.benchmarks import originals
from dfkd_fast.benchmarks.common import Clock, Results, stage_arguments
from dfkd_fast.benchmarks.swap_cases import (
    HOOKS,
    SIZES,
    Both,
    Loss,
    Setting,
    averaged,
    hooked,
    installed,
    logits,
    nt_xent,
    self_supervised,
)
from dfkd_fast.compat import cpsc, datafree
from dfkd_fast.report import markdown_table

__all__ = ["KEY", "VERSION", "Case", "cases", "host_section", "main", "stand_in"]

VERSION = "1"
KEY = ("case", "shape")

LOGITS, FEATURES, MAPS = (64, 200), (64, 128), (4, 32, 8, 8)
"""(N, classes), (N, dim) and what a BatchNorm is given: small, since what PyTorch still computes takes the CPU time."""


class _Launcher:
    """In place of what puts a kernel on a stream."""

    launches = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        _Launcher.launches += 1


class _Utilities:
    """What Triton asks its driver about a compiled kernel and the device: an H200's answers."""

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}


class _Driver:
    """A CUDA device of compute capability 9.0 that launches nothing; it has the index of CPU tensors."""

    utils = _Utilities()
    launcher_cls = _Launcher

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Inside, the backend ``triton`` takes CPU tensors and launches nothing: results are not written.

    Raises:
        RuntimeError: Triton is not installed, or runs in its interpreter.
    """
    if not installed("triton"):
        raise RuntimeError("triton is not installed")
    from triton import knobs
    from triton.runtime import driver

    from dfkd_fast.kernels import plans
    from dfkd_fast.ops.backend import _registry

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels would be interpreted, not launched")
    before = {op: table["triton"] for op, table in _registry.items() if "triton" in table}
    plans.forget()
    driver.set_active(_Driver())
    try:
        for op, implementation in before.items():
            _registry[op]["triton"] = replace(implementation, supports=lambda *a, **k: None, interpreted=False)
        yield
    finally:
        for op, implementation in before.items():
            _registry[op]["triton"] = implementation
        driver.set_active(None)  # found anew when it is next asked for; there may be none
        plans.forget()


class _Norm(nn.BatchNorm2d):
    """A BatchNorm without its own work, which is the same on both sides."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class Case(NamedTuple):
    """A drop-in and its original.

    Attributes:
        name: of the drop-in.
        shape: of its inputs.
        few: shape of the original's.
        grads: which of the inputs want a gradient.
        make: makes both.
    """

    name: str
    shape: tuple[int, ...]
    few: tuple[int, ...]
    grads: tuple[bool, ...]
    make: Callable[[], Both]


def _setting(shape: tuple[int, ...]) -> Setting:
    return Setting(device=torch.device("cpu"), dtype=torch.float32, shape=shape, size=SIZES["small"])


def _each(make: Callable[[Setting], Both], shape: tuple[int, ...], few: tuple[int, ...]) -> Both:
    """The drop-in made for one shape, the original for another: some keep labels of as many samples."""
    return make(_setting(shape))[0], make(_setting(few))[1]


def _logits(name: str, setting: Setting) -> Both:
    return logits(setting)[name]()


def _contrast(kind: Any, mode: str) -> Both:
    """Of two views that are stacked and of unit length already."""
    return averaged(kind(contrast_mode=mode)), averaged(originals.Module(originals.contrast_loss, mode=mode))


def _hook(name: str) -> Both:
    *kinds, read = HOOKS[name]

    def side(kind: Any) -> Loss:
        return hooked([_Norm(MAPS[1]).eval().requires_grad_(False)], kind, read, name.endswith("mmt_rate"))

    ours, original = map(side, kinds)
    return ours, original


def cases() -> Iterator[Case]:
    """What ops serve at the shapes of losses, of what the stage ``swap`` compares."""
    few = (1, 4)
    for name in ("datafree.kldiv", "datafree.kldiv, both gradients", "repdistiller.DistillKL", "mdistiller.kd_loss",
                 "torchdistill.KDLoss"):  # fmt: skip
        make = partial(_each, partial(_logits, name), LOGITS, few)
        yield Case(name, LOGITS, few, (True, name.endswith("both gradients")), make)
    few = (2, 4)
    yield Case("lightly.NTXentLoss", FEATURES, few, (True, True), partial(_each, nt_xent, FEATURES, few))
    if installed("pytorch-metric-learning"):
        make = partial(self_supervised, "NTXentLoss")
        yield Case("metric_learning.SelfSupervisedLoss, NTXentLoss", FEATURES, few, (True, True), make)
    views = (FEATURES[0], 2, FEATURES[1])
    for mode, suffix in (("all", ""), ("one", ", one")):
        for name, kind in (("cpsc.SupConLoss", cpsc.SupConLoss), ("datafree.ContrastLoss", datafree.ContrastLoss)):
            yield Case(name + suffix, views, (2, 2, 4), (True,), partial(_contrast, kind, mode))
    for name in HOOKS:
        if "DeepInversion" in name:
            yield Case(name, MAPS, MAPS, (True,), partial(_hook, name))


def _inputs(shape: tuple[int, ...], grads: tuple[bool, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=grad) for grad in grads]


def _microseconds(loss: Loss, inputs: Sequence[Tensor], *, calls: int, repeats: int) -> tuple[float, float]:
    """Of a call and its gradients: the median and the least of some times."""
    wanted = [x for x in inputs if x.requires_grad]
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            torch.autograd.grad(loss(*inputs), wanted)
        times.append(1e6 * (time.perf_counter() - begin) / calls)
    return statistics.median(times), min(times)


def _measured(case: Case, calls: int, repeats: int) -> dict[str, Any]:
    ours, original = case.make()
    inputs, few = _inputs(case.shape, case.grads), _inputs(case.few, case.grads)
    torch.autograd.grad(original(*few), [x for x in few if x.requires_grad])
    with stand_in():
        for _ in range(4):  # compilation, then a plan, then what is repeated
            _Launcher.launches = 0
            torch.autograd.grad(ours(*inputs), [x for x in inputs if x.requires_grad])
        launches = _Launcher.launches
        ours_us, least = _microseconds(ours, inputs, calls=calls, repeats=repeats)
    theirs_us, theirs_least = _microseconds(original, few, calls=calls, repeats=repeats)
    numbers = {"ours_us": ours_us, "ours_least_us": least, "original_us": theirs_us, "original_least_us": theirs_least}
    return {"kernels": launches, **{key: float(f"{value:.4g}") for key, value in numbers.items()}}


def host_section(content: dict[str, Any], folder: str) -> str:
    """The table of docs/swapping.md: the least of the times, since whatever else a machine does adds to a host's.

    Args:
        content: of a ``host_time.json``.
        folder: of its results.
    """
    rows = [
        {
            "drop-in": row["case"],
            "shape": row["shape"],
            "original, us": f"{row['original_least_us']:.0f}",
            "drop-in, us": f"{row['ours_least_us']:.0f}",
            "its kernels": row["kernels"],
        }
        for row in content["rows"]
    ]
    facts = content["environments"][-1]
    commit = (facts["commit"] or "unknown")[:12]
    where = f"{facts['cpu']}, one thread, torch {facts['torch']}, triton {facts['triton']}, commit {commit}"
    return "\n".join([*markdown_table(rows), "", f"`{folder}`: {where}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, as far as time allows."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--calls", type=int, default=200, help="in a row, of which the time is taken together")
    parser.add_argument("--repeats", type=int, default=25, help="of these")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = Clock(options.seconds)
    results = Results(options.out, stage="host_time", version=VERSION, key=KEY)
    work = {(case.name, "x".join(map(str, case.shape))): case for case in cases()}
    for key in results.todo(work, options.since):
        if not clock.fits():
            break
        begin = time.perf_counter()
        row = dict(zip(KEY, key, strict=True)) | _measured(work[key], options.calls, options.repeats)
        results.add(row)
        print(f"{' '.join(key)}: {row['original_us']} us, ours {row['ours_us']}", flush=True)
        clock.took(time.perf_counter() - begin)
    results.finish(complete=not results.todo(work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
