"""Run an example before and after the switch, and print the differences in speed and losses.

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
"""Untimed steps, in which kernels are compiled and selected."""


def load(example: str) -> tuple[ModuleType, ModuleType]:
    """Import the two scripts of a folder. Put the folder on the path, as Python does when it runs a script."""
    folder = str(Path(__file__).resolve().parent / example)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("before"), importlib.import_module("after")
    finally:
        sys.path.remove(folder)
        for name in ("before", "after", "losses"):  # the next folder has modules of the same names
            sys.modules.pop(name, None)


def ops_backend(device: str) -> str:
    """The backend of the ops on a device."""
    named = os.environ.get("DFKD_FAST_BACKEND")
    return named or ("triton" if torch.device(device).type == "cuda" else "reference")


def compare(
    example: str, *, device: str, steps: int, size: int, batch: int, seed: int, turns: int = 2
) -> dict[str, Any]:
    """Run both scripts alternately with the same seed.

    Returns:
        The options, the median seconds per step after the warm-up (``before_s`` and ``after_s``), and the relative
        difference of the losses: that of the first step and the largest.
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
        "backend": ops_backend(device),
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
        f"{row['size']}, on {row['device']}; ops run on backend {row['backend']}",
        f"  before  {1e3 * before:8.2f} ms per step (median)",
        f"  after   {1e3 * after:8.2f} ms per step (median), {before / after:.2f} times as fast",
        f"  losses  relative difference {row['first_loss_difference']:.1e} in the first step and at most "
        f"{row['largest_loss_difference']:.1e}; rounding differences grow with the steps",
    ]
    if row["backend"] == "reference":
        lines.append("  The fused kernels need a CUDA device; both scripts ran plain PyTorch.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=[*EXAMPLES, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help=f"number of timed steps, after {WARM_UP} untimed ones")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=2, help="number of runs of each script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results and the environment to FILE")
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
