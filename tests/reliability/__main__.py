"""Injects faults and fuzzes inputs, and counts what the project survives: ``make reliability``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated

from dfkd_fast.benchmarks.results import Results

from .harness import TARGETS, Tally


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--minutes", type=float, default=30.0, help="time per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat this case of one target")
    parser.add_argument("--jobs", type=int, default=1, help="targets that run at a time, in a process each")
    parser.add_argument("--out", type=Path, help="result file; without it, the counts are only printed")
    return parser


def main() -> int:
    """Run the targets. The exit status is 1 if a case was lost."""
    options = _parser().parse_args()
    targets = options.targets or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        _parser().error(f"unknown targets: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if options.case is not None and len(targets) > 1:
        _parser().error("--case repeats a case of one target")
    if len(targets) > 1:  # in processes, because targets set limits and can crash
        rest = [argument for argument in sys.argv[1:] if argument not in targets]
        command = [sys.executable, "-m", "tests.reliability", *rest]
        with ThreadPoolExecutor(options.jobs) as pool:
            codes = list(pool.map(lambda target: subprocess.run([*command, target]).returncode, targets))
        for target, code in zip(targets, codes, strict=True):
            print(f"{target}: {'passed' if code == 0 else f'failed (exit status {code})'}")
        return int(any(codes))
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_reliability_") as folder:
        seconds, seed, case = 60 * options.minutes, options.seed, options.case
        tally = Tally(targets[0], seconds=seconds, seed=seed, folder=Path(folder), case=case)
        try:
            import_module(f".{tally.target}", __package__).run(tally)
        except Exception:
            tally.lose("harness", traceback.format_exc())
    for row in tally.rows():
        print(f"{row['target']}: {row['kind']}: {row.get('skipped') or row['outcomes']}")
        if options.out is not None and options.case is None:
            Results(options.out, key=("target", "kind", "seed")).add(row)
    return int(any(row.get("lost") for row in tally.rows()))


if __name__ == "__main__":
    sys.exit(main())
