# ruff: noqa: E402
"""The processes of test_distributed.py, started by torchrun: ``-m tests.engine.ranks JOB ARGUMENT ... [--float64]``."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

SINGLE = torch.float32
if "--float64" in sys.argv:  # before the package is imported, so that its float32 is float64
    torch.set_default_dtype(torch.float64)
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # type: ignore[method-assign]

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd_fast import distill, ops, report
from dfkd_fast.benchmarks.scaling import step_collectives
from dfkd_fast.collectives import Group, current_group, distributed
from dfkd_fast.config import DistillConfig
from dfkd_fast.engine import (
    DistillResult,
    EagerEngine,
    build_generator,
    evaluate,
    join,
    make_images,
    predictions,
    steps,
)
from dfkd_fast.engine.distributed import everyone, require_equal
from dfkd_fast.models.weights import read_tensors
from dfkd_fast.nn.norm import synchronize_batchnorm
from dfkd_fast.objectives import PRESETS

from .. import tiny

T = TypeVar("T")

# Parameters that a normalization cancels: their gradients are rounding errors, which Adam turns into full steps.
CANCELLED = ("expand.bias",)


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
    """Counts the collectives and the numbers that they send."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.calls[func.__name__] += 1
            self.numbers[func.__name__] += args[0].numel()
        return func(*args, **(kwargs or {}))


def train(config: DistillConfig, group: Group | None, rounds: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of each round, and parameters, buffers and pools afterward."""
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


def compare(presets: list[str], rounds: int, **tolerance: float) -> None:
    """All processes together must have the losses, weights, buffers and pools of one process."""
    group = current_group()
    for preset in presets:
        config = tiny.config(batch_size=12, epochs=10, **tiny.method(preset))
        found = train(config, group, rounds)
        if group is not None and group.rank == 0:
            expected = train(config, None, rounds)
            torch.testing.assert_close(found[0], expected[0], **tolerance)
            assert found[1].keys() == expected[1].keys()
            for name, value in expected[1].items():
                if not name.endswith(CANCELLED):
                    torch.testing.assert_close(
                        found[1][name], value, msg=lambda text, n=name: f"{n}: {text}", **tolerance
                    )
        print("ok", preset, flush=True)


def check_collectives(presets: list[str]) -> None:
    """A step has the collectives, and sends the numbers, that docs/scaling.md derives from the networks."""
    group = current_group()
    assert group is not None
    for preset in presets:
        state = tiny.state(tiny.config(batch_size=12, **tiny.method(preset)))
        expected = step_collectives(state, group.size, fused=False)
        with state.synchronized():
            engine = EagerEngine(state)
            engine.prepare()
            engine.start_round()
            for step in ("generator_step", "student_step"):
                with CountCollectives() as count:
                    getattr(engine, step)()
                for kind, name in (("all_gather", "all_gather_into_tensor"), ("all_reduce", "all_reduce")):
                    sizes = [each.numbers for each in expected[step] if each.kind == kind]
                    found = count.calls[f"{name}.default"], count.numbers[f"{name}.default"]
                    assert found == (len(sizes), sum(sizes)), (preset, step, kind)
    print("ok collectives", flush=True)


def check_batch_norm() -> None:
    """``ops.batch_norm_act`` of parts of x against ``F.batch_norm`` of x in float64, with gradients."""
    group = current_group()
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        for case, (shape, activation) in enumerate(
            [((12, 5, 6, 7), "leaky_relu"), ((12, 17), "none"), ((12, 9, 3, 3), "relu")]
        ):
            full = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3 for _ in range(3)]
            vectors = [torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2)]
            running = [torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)]
            leaves = [each.clone().requires_grad_() for each in (full[0], *vectors, full[1])]
            x, weight, bias, residual = leaves
            z = F.batch_norm(x, *[each.clone() for each in running], weight, bias, True, 0.3) + residual
            expected = F.relu(z) if activation == "relu" else F.leaky_relu(z, 0.1) if activation != "none" else z
            F.batch_norm(full[0], *running, None, None, True, 0.3)
            grads = torch.autograd.grad(expected, leaves, full[2])
            count = shape[0] // group.size
            rows = slice(group.rank * count, (group.rank + 1) * count)
            layout = torch.channels_last if case == 0 else torch.contiguous_format
            parts = [each[rows].to(dtype).contiguous(memory_format=layout) for each in full]
            own = [parts[0], *(each.to(dtype) for each in vectors), parts[1]]
            for each in own:
                each.requires_grad_()
            buffers = [torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)]
            options: Any = {"activation": activation, "negative_slope": 0.1, "residual": own[3], "momentum": 0.3}
            y, again = ops.batch_norm_act(*own[:3], *buffers, **options, fork=True, group=group, backend=backend)
            found = torch.autograd.grad([y, again], own, [parts[2] / 4, parts[2] * 0.75])
            torch.testing.assert_close(y.double(), expected[rows], **tolerance)
            torch.testing.assert_close([each.double() for each in buffers], running, **tolerance)
            for place in (0, 3):
                torch.testing.assert_close(found[place].double(), grads[place][rows], **tolerance)
            for place in (1, 2):  # of the own loss: the sum over the processes is the gradient
                total = sum(each for each in everyone(found[place].double()))
                torch.testing.assert_close(total, grads[place], **tolerance)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    image = torch.randn(2, 3, 5, 5, generator=generator)
    with synchronize_batchnorm({"network": network}, group):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), network(image))
    assert [int(each.num_batches_tracked) for each in (network[0], network[2])] == [2, 2]
    print("ok batch_norm", flush=True)


def check_evaluation() -> None:
    """Each image counts once, also if the number of images is not a multiple of that of the processes."""
    data, model = tiny.data(21), tiny.network()
    group = current_group()
    found = evaluate(model, data.test, num_classes=5, batch_size=4), predictions(model, data.test, num_classes=5)
    few = evaluate(model, tiny.data(1).test, num_classes=5)
    with distributed(None):
        expected = evaluate(model, data.test, num_classes=5), predictions(model, data.test, num_classes=5)
    assert found[0].images == 21
    assert few.images == 1
    assert found[0].top1 == expected[0].top1
    torch.testing.assert_close(found[1].logits, expected[1].logits)
    assert found[1].labels.equal(expected[1].labels)
    assert current_group() is group
    print("ok evaluation", flush=True)


@contextmanager
def one_process() -> Iterator[None]:
    """Context manager of a process that runs as if it were the only one, while the others wait."""
    with distributed(None):
        yield


def by_one_and_by_all(folder: Path, work: Callable[[Path], T]) -> tuple[T | None, T]:
    """The results of work by the first process, which only it has, and by all together."""
    group, one = current_group(), None
    assert group is not None
    if group.rank == 0:
        with one_process():
            one = work(folder / "one")
    everyone(None)  # the others wait
    return one, work(folder / "all")


def check_runs(folder: Path) -> None:
    """One process starts a run, all resume it, and one resumes it again: it ends like an undisturbed run of one."""
    group = current_group()
    assert group is not None

    def run(name: str, epochs: int, **changes: Any) -> DistillResult:
        config = tiny.config(folder / name, batch_size=12, epochs=epochs, **changes)
        config = replace(config, optimizer=replace(config.optimizer, student_schedule="constant"))
        return distill(tiny.teacher(), tiny.network(), config, data=tiny.data(), progress=False)

    results = []
    for step, name in enumerate(("undisturbed", "changing", "changing", "changing")):
        everyone(None)
        epochs, together = (3 if step in (0, 3) else step), step == 2
        if together:
            results.append(run(name, epochs, resume=True))
        elif group.rank == 0:
            with one_process():
                results.append(run(name, epochs, resume=step > 0))
    if group.rank == 0:
        expected, *_, found = results
        for key, values in expected.rounds.items():
            torch.testing.assert_close(found.rounds[key], values, rtol=1e-3, atol=1e-4)
        assert found.epochs["accuracy"] == pytest.approx(expected.epochs["accuracy"], abs=0.11)  # two of 20 images
        for key, value in expected.student.state_dict().items():
            torch.testing.assert_close(found.student.state_dict()[key], value, rtol=1e-2, atol=1e-3)
        files = {path.name for path in (folder / "changing").iterdir()}
        assert {"student.safetensors", "generator.safetensors", "config.yaml", "history.json"} <= files
    method = tiny.method("mad")
    result = run("best", 1, select="agreement", sync_batchnorm=False, **method)
    assert len({*everyone(result.run_dir)}) == len({*everyone(result.agreement)}) == 1
    require_equal(result.student.state_dict().values())
    with pytest.raises(
        ValueError, match=f"batch_size must be divisible by the number of processes, got 7 and {group.size}"
    ):
        distill(tiny.teacher(), tiny.network(), tiny.config(folder / "odd", batch_size=7), progress=False)
    with pytest.raises(ValueError, match="already contains checkpoints"):  # the first process finds them
        run("best", 1, **method)
    print("ok runs", flush=True)


def check_teaching(folder: Path) -> None:
    def work(out: Path) -> nn.Module:
        model = tiny.network()
        tiny.teach(out, model, epochs=2, ema=0.5, batch_size=12)
        return model

    one, together = by_one_and_by_all(folder, work)
    require_equal(together.state_dict().values())
    if one is not None:
        for key, value in one.state_dict().items():
            torch.testing.assert_close(together.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    print("ok teaching", flush=True)


def check_images(folder: Path) -> None:
    """Pools and images of a trained generator."""
    for name in ("fast", "baseline"):

        def work(out: Path, name: str = name) -> Tensor:
            config = tiny.config(batch_size=12, **tiny.method(name))
            generator = None if name == "fast" else build_generator(config.generator, tiny.SIZE)
            make_images(tiny.teacher(), config, count=16, out=out, generator=generator, progress=False)
            everyone(None)  # the first process writes the file
            return read_tensors(out / "pool.safetensors")["images"].float()

        torch.manual_seed(0)
        one, together = by_one_and_by_all(folder / name, work)
        if one is not None:
            assert (one - together).abs().max() <= 1  # rounding to uint8
    print("ok images", flush=True)


def main(jobs: list[str]) -> None:
    if jobs[0] == "presets":
        compare(jobs[2:] or [*PRESETS], int(jobs[1]), rtol=0, atol=1e-9)
    elif jobs[0] == "run":  # which torchrun restarts if a process is killed
        every = int(jobs[3]) if len(jobs) > 3 else 1
        config = tiny.config(Path(jobs[1]), rounds_per_epoch=int(jobs[2]), epochs=1, checkpoint_every=every)
        distill(tiny.teacher(), tiny.network(), config, progress=False)
    elif jobs[0] in ("fail", "hang"):  # in the last process
        group = current_group()
        assert group is not None

        def fault(*_: Any) -> None:
            if group.rank == group.size - 1:
                time.sleep(1000) if jobs[0] == "hang" else jobs.index("fault")

        distill(tiny.teacher(), tiny.network(), tiny.config(Path(jobs[1])), callbacks=[fault], progress=False)
    else:
        report.save_curves = lambda rounds, epochs, path: Path(path)  # drawing is slow
        check_batch_norm()
        check_collectives(["dfkd-fgvc", "dafl", "adi", "cmi"])
        # Where a gradient is of the size of rounding errors, a step of Adam differs by up to its rate.
        compare(["dfkd-fgvc"], 2, rtol=1e-3, atol=tiny.config().optimizer.generator_lr)
        check_evaluation()
        check_teaching(Path(jobs[1]) / "teach")
        check_images(Path(jobs[1]) / "images")
        check_runs(Path(jobs[1]) / "runs")


if __name__ == "__main__":
    with join() as joined:
        assert joined is not None
        main([argument for argument in sys.argv[1:] if argument != "--float64"])
