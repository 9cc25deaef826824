"""What a swap is worth: a stage. The worked examples before and after, and each drop-in beside its original.

A drop-in of `dfkd_fast.compat` and its original run forward and backward on the same inputs, eagerly, in turns that
alternate which of the two goes first. Inputs rotate past the last-level cache. Times are from the first launch to the
last kernel's end, so that where the host is slower than the device they are the host's. The original is the library
where that is installed, else its definition in plain PyTorch (`benchmarks/originals.py`).

Of losses of student and teacher the student's gradient is taken, as in distillation; of two views both gradients.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.benchmarks.common import Clock, Results, Timing, input_sets, stage_arguments, time_calls
from dfkd_fast.benchmarks.swap_cases import SIZES, Case, Pair, Size, cases
from dfkd_fast.report import markdown_table

__all__ = ["KEY", "VERSION", "compare_pair", "main", "swap_section", "verdict"]

VERSION = "1"
KEY = ("kind", "case", "shape", "dtype")

KINDS = {
    "example": "The worked examples",
    "logits": "Of logits",
    "features": "Of two views' features",
    "BatchNorms": "Hooks on every BatchNorm of a network, the forward of the BatchNorms included on both sides",
    "stages": "Of the maps that a network's stages give",
    "images": "Of images",
}
"""What is compared, and the heading of its table."""

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@contextlib.contextmanager
def _recorded() -> Iterator[set[tuple[str, str]]]:
    """The ops that are computed inside the block, each with the backend that computes it."""
    from dfkd_fast.ops.backend import _registry

    served: set[tuple[str, str]] = set()

    def recording(op: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            served.add((op, name))
            return function(*arguments, **options)

        return call

    before = {op: dict(table) for op, table in _registry.items()}
    try:
        for op, table in before.items():
            for name, implementation in table.items():
                _registry[op][name] = replace(implementation, function=recording(op, name, implementation.function))
        yield served
    finally:
        for op, table in before.items():
            _registry[op].update(table)


def _step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A loss, and its gradients for those inputs that require one."""
    value = loss(*inputs)
    return value, torch.autograd.grad(value, [x for x in inputs if x.requires_grad])


def _difference(ours: Tensor, original: Tensor) -> float:
    a, b = ours.detach().double(), original.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-8))


def _turns(ratios: Sequence[float]) -> list[float]:
    return [float(f"{ratio:.4g}") for ratio in ratios]


def compare_pair(pair: Pair, device: torch.device, size: Size, *, optional: bool = False) -> dict[str, Any]:
    """Measure a drop-in and its original.

    Args:
        pair: both, and their inputs.
        device: where they run.
        size: how often and how long.
        optional: the original may refuse these inputs; the times are then None, with the ``reason``.
    """
    first = pair.inputs()
    row: dict[str, Any] = {"original": pair.source}
    try:
        wanted = _step(pair.original, first)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        if not optional:
            raise
        nothing = dict.fromkeys(("ours_us", "original_us", "ratio", "backend"))
        return row | nothing | {"ratios": [], "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    with _recorded() as served:
        value, gradients = _step(pair.ours, first)
    row |= {
        "ops": sorted({op for op, _ in served}),
        "backend": ", ".join(sorted({name for _, name in served})) or "plain PyTorch",
        "value_difference": _difference(value, wanted[0]),
        "gradient_difference": max(_difference(a, b) for a, b in zip(gradients, wanted[1], strict=True)),
    }
    del value, gradients, wanted

    moved = sum(x.numel() * x.element_size() for x in first)
    sets = [first, *(pair.inputs() for _ in range(input_sets(moved, device) - 1))]
    losses = {"ours": pair.ours, "original": pair.original}
    timings: dict[str, list[Timing]] = {name: [] for name in losses}
    for turn in range(size.turns):
        for name in sorted(losses, reverse=bool(turn % 2)):
            loss = losses[name]
            timings[name].append(
                time_calls(
                    lambda number, loss=loss: _step(loss, sets[number % len(sets)]),
                    device,
                    seconds=size.seconds,
                    least=size.least,
                )
            )
    for name, each in timings.items():
        for field, unit in (("ms", "us"), ("p10", "p10_us"), ("p90", "p90_us")):
            row[f"{name}_{unit}"] = float(f"{1e3 * statistics.median(getattr(timing, field) for timing in each):.5g}")
    ratios = [theirs.ms / ours.ms for ours, theirs in zip(timings["ours"], timings["original"], strict=True)]
    return row | {"ratio": float(f"{row['original_us'] / row['ours_us']:.4g}"), "ratios": _turns(ratios)}


def _compare_module() -> ModuleType | None:
    """examples/compare.py; None where there are no examples, as in an installed package."""
    if not (_EXAMPLES / "compare.py").exists():
        return None
    spec = importlib.util.spec_from_file_location("dfkd_fast_examples_compare", _EXAMPLES / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare_example(module: ModuleType, example: str, side: int, batch: int, device: str, size: Size) -> dict[str, Any]:
    """Run an example before and after, some times in turns.

    Args:
        module: examples/compare.py.
        example: its name.
        side: of its images.
        batch: their number.
        device: where it runs.
        size: steps, and turns.
    """
    options = {"device": device, "steps": size.steps, "size": side, "batch": batch, "seed": 0, "turns": 1}
    each = [module.compare(example, **options) for _ in range(size.repeats)]
    before, after = (1e6 * statistics.median(row[name] for row in each) for name in ("before_s", "after_s"))
    return {
        "original": "the same script, before",
        "backend": each[0]["backend"],
        "steps": size.steps,
        "ours_us": float(f"{after:.5g}"),
        "original_us": float(f"{before:.5g}"),
        "ratio": float(f"{before / after:.4g}"),
        "ratios": _turns([row["before_s"] / row["after_s"] for row in each]),
        "first_loss_difference": max(row["first_loss_difference"] for row in each),
        "largest_loss_difference": max(row["largest_loss_difference"] for row in each),
    }


def verdict(row: dict[str, Any]) -> str:
    """Whether ours was "slower" or "faster" in every turn; "equal" where turns differ, "-" without an original."""
    if not row["ratios"]:
        return "-"
    if max(row["ratios"]) < 1:
        return "slower"
    return "faster" if min(row["ratios"]) > 1 else "equal"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, as far as time allows."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args(arguments)

    size, device, clock = SIZES[options.size], torch.device(options.device), Clock(options.seconds)
    version = VERSION if options.size == "full" else f"{VERSION}-{options.size}"
    results = Results(options.out, stage="swap", version=version, key=KEY)
    examples = _compare_module()
    work: dict[tuple[Any, ...], Callable[[], dict[str, Any]]] = {}
    # The longest first: the clock lets nothing begin that would take longer than the longest so far.
    if examples is not None:
        for name in examples.EXAMPLES:
            for side, batch in size.examples:
                key = ("example", name, f"{batch}x3x{side}x{side}", "float32")
                work[key] = partial(compare_example, examples, name, side, batch, options.device, size)
    known = list(cases(device, size))
    for case in known:
        if case.possible:
            work[case.key] = partial(_measured, case, device, size)
    left_out = sorted({f"{case.case}: needs {case.needs}" for case in known if not case.possible})
    if examples is None:
        left_out.append("the worked examples: they are not installed with the package")
    if left_out:
        print("Left out:", *left_out, sep="\n  ", flush=True)

    failed = False
    for key in results.todo([key for key in work if key[0] in options.kinds], options.since):
        if not clock.fits():
            break
        start = time.perf_counter()
        try:
            row = work[key]()
        except Exception as error:  # one pair that fails must not hide the others; it has no row, and the stage fails
            failed = True
            print(f"{' '.join(key)}: {type(error).__name__}: {error}", flush=True)
            continue
        row = dict(zip(KEY, key, strict=True)) | row
        results.add(row)
        times = row.get("reason") or f"{row['original_us']:.5g} us, ours {row['ours_us']:.5g}: {verdict(row)}"
        print(f"{' '.join(key)}: {times}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        clock.took(time.perf_counter() - start)
    results.finish(complete=not left_out and not results.todo(work))
    return int(failed)


def _measured(case: Case, device: torch.device, size: Size) -> dict[str, Any]:
    torch.manual_seed(0)
    return compare_pair(case.setup(), device, size, optional=case.dtype != "float32")


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"


def _example_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = [
        {
            "example": row["case"],
            "images": row["shape"],
            "before, ms a step": f"{row['original_us'] / 1e3:.2f}",
            "after, ms a step": f"{row['ours_us'] / 1e3:.2f}",
            "times as fast": _ratio(row),
            "difference of losses, first step": f"{row['first_loss_difference']:.1e}",
            "largest": f"{row['largest_loss_difference']:.1e}",
        }
        for row in rows
    ]
    return ["The worked examples, float32:", "", *markdown_table(found), ""] if found else []


def _drop_in_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One table a kind, a line a drop-in and dtype, a column a shape."""
    lines: list[str] = []
    for kind, title in KINDS.items():
        here = [row for row in rows if row["kind"] == kind]
        shapes = sorted({row["shape"] for row in here})
        table: dict[tuple[str, str], dict[str, Any]] = {}
        for row in here:
            columns = {"drop-in": row["case"], "dtype": row["dtype"], **dict.fromkeys(shapes)}
            entry = table.setdefault((row["case"], row["dtype"]), columns)
            entry[row["shape"]] = "the original does not run"
            if row["ratios"]:
                mark = "**" if verdict(row) == "slower" else ""
                entry[row["shape"]] = f"{row['original_us']:.1f} / {row['ours_us']:.1f}: {mark}{_ratio(row)}{mark}"
            entry["computed by"], entry["original"] = row["backend"], row["original"]
        if table:
            lines += [f"{title}:", "", *markdown_table(list(table.values())), ""]
    return lines


def swap_section(content: dict[str, Any], folder: str) -> str:
    """One device's part of docs/swapping.md.

    Args:
        content: of its ``swap.json``.
        folder: of its results.
    """
    order = {kind: place for place, kind in enumerate(KINDS)}
    rows = sorted(content["rows"], key=lambda row: (order[row["kind"]], row["case"], row["shape"], row["dtype"]))
    examples, drop_ins = ([row for row in rows if (row["kind"] == "example") is which] for which in (True, False))
    compared = [row for row in drop_ins if row["ratios"]]
    slower = [row for row in compared if verdict(row) == "slower"]
    lines = [f"### {folder}" + ("" if content["complete"] else " (not complete)"), "", *_example_lines(examples)]
    if compared:
        judged = {word: sum(verdict(row) == word for row in compared) for word in ("faster", "equal", "slower")}
        lines += [
            "Each drop-in beside its original, forward and backward, in microseconds: original / ours: how many times "
            "as fast, and the least and the most of that in turns that the two took.",
            "",
            f"Never slower: {'**no**' if slower else 'yes'}. Of {len(compared)}, faster in every turn: "
            f"{judged['faster']}, in some: {judged['equal']}, in none: {judged['slower']}.",
            "",
            *_drop_in_lines(drop_ins),
        ]
    where = sorted({f"{block['device']['name']}, torch {block['torch']}" for block in content["environments"]})
    commits = sorted({(block["commit"] or f"sources {block['source']}")[:12] for block in content["environments"]})
    lines.append(f"Measured on: {'; '.join(where)}; commit: {', '.join(commits)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
