"""Run an example before and after the swap, and print the difference in speed and in the losses.

python examples/compare.py plain_dfkd --device cuda --steps 30 --size 64 --batch 128 --json swap.json
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dfkd_fast.report import environment, write_results

EXAMPLES = ("plain_dfkd", "deepinversion")
WARM_UP = 3
"""Steps that are not timed: kernels are compiled and chosen in them."""


def load(example: str) -> tuple[ModuleType, ModuleType]:
    """The two scripts of a folder, each found as Python finds it when the script is run."""
    folder = str(Path(__file__).resolve().parent / example)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("before"), importlib.import_module("after")
    finally:
        sys.path.remove(folder)
        for name in ("before", "after", "losses"):  # the next folder has its own
            sys.modules.pop(name, None)


def served_by(device: str) -> str:
    """Which backend computes the ops on a device."""
    named = os.environ.get("DFKD_FAST_BACKEND")
    return named or ("triton" if torch.device(device).type == "cuda" else "reference")


def compare(
    example: str, *, device: str, steps: int, size: int, batch: int, seed: int, turns: int = 2
) -> dict[str, Any]:
    """Both scripts on the same seed, in turns.

    Returns:
        Medians of the seconds a step after the warm-up, and the largest relative difference of two losses of one step,
        beside what was run.
    """
    scripts = load(example)
    options = {"device": device, "steps": steps + WARM_UP, "size": size, "batch": batch, "seed": seed}
    losses: list[list[float]] = [[], []]
    seconds: list[list[float]] = [[], []]
    for _ in range(turns):
        for which, script in enumerate(scripts):
            losses[which], each = script.run(**options)
            seconds[which] += each[WARM_UP:]
    differences = [abs(a - b) / max(abs(a), 1e-8) for a, b in zip(*losses, strict=True)]
    before, after = map(statistics.median, seconds)
    return {
        "example": example,
        "backend": served_by(device),
        **options,
        "steps": steps,
        "warm_up": WARM_UP,
        "turns": turns,
        "before_s": before,
        "after_s": after,
        "first_loss_difference": differences[0],
        "largest_loss_difference": max(differences),
    }


def describe(row: dict[str, Any]) -> str:
    before, after = row["before_s"], row["after_s"]
    lines = [
        f"{row['example']}: {row['turns']} x {row['steps']} steps, {row['batch']} images of {row['size']} x "
        f"{row['size']}, on {row['device']}; ops served by {row['backend']}",
        f"  before  {1e3 * before:8.2f} ms a step (median)",
        f"  after   {1e3 * after:8.2f} ms a step (median), {before / after:.2f} times as fast",
        f"  losses  largest relative difference {row['largest_loss_difference']:.1e}, of rounding that grows with the "
        f"steps; in the first step {row['first_loss_difference']:.1e}",
    ]
    if row["backend"] == "reference":
        lines.append("  The fused kernels run on CUDA devices; here both are plain PyTorch.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=[*EXAMPLES, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help=f"timed steps, after {WARM_UP} to warm up")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=2, help="how often each script is run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and what they were measured with")
    options = vars(parser.parse_args(arguments))
    example, file = options.pop("example"), options.pop("json")
    if min(options["steps"], options["turns"]) < 1:
        parser.error("--steps and --turns must be at least 1")
    rows = []
    for name in EXAMPLES if example == "all" else (example,):
        rows.append(compare(name, **options))
        print(describe(rows[-1]))
    if file is not None:
        write_results(file, {"environment": environment(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
