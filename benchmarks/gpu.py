"""The queue behind ``make gpu``: stages that need a GPU, one after the other until a budget of seconds is spent.

A stage is a command of its own process that appends to one result file, ``OUT/<stage>.json``, as it measures. It is
given the seconds that it may take, stops by itself before they are over, and goes on where its file ends the next time;
a run that is cut loses one row at most. The order: stages without evidence, then those whose evidence is incomplete,
then those whose oldest row is the oldest. Evidence is the file in OUT or, where that is missing, the one committed
under ``benchmarks/results/<device>/``, if it is of the stage's present version. To commit new evidence, copy OUT's
files there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfkd_fast.report import device_slug, read_results, result_table, timestamp

__all__ = ["Evidence", "Outcome", "Stage", "evidence", "main", "run_queue", "run_stage", "stages"]

RESULTS = Path(__file__).resolve().parent / "results"

_MARGIN_S = 20.0  # between the seconds a stage is given and those after which it is stopped
_GRACE_S = 10.0  # between being asked to stop and being killed


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the queue.

    Attributes:
        name: of the stage and, with ``.json``, of its result file.
        version: of what it measures; evidence of another version does not count.
        command: called with ``--out FILE --seconds S`` and, to renew rows, ``--since STAMP``. Exit status 0 says that
            what it wrote is sound; whether that is all is ``complete`` in its file.
        about: what it is for, in a few words.
        limit_s: seconds after which it is stopped.
        least_s: seconds below which beginning it is no use.
        carries: of evidence of another version, the stage itself knows which rows still hold; it counts as begun.
    """

    name: str
    version: str
    command: Sequence[str]
    about: str = ""
    limit_s: float = 480.0
    least_s: float = 45.0
    carries: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a result file holds: nothing (0), a part (1) or all (2), its rows, and the date of the oldest."""

    rank: int
    rows: int = 0
    oldest: str = ""


@dataclass(kw_only=True)
class Outcome:
    """What came of a stage in this session."""

    stage: str
    status: str
    seconds: float = 0.0
    rows: int = 0
    turns: int = 0
    failed: bool = False


@dataclass(kw_only=True)
class _Session:
    out: Path
    committed: Path
    end: float
    since: str = field(default_factory=timestamp)


def evidence(stage: Stage, folder: Path) -> Evidence:
    """What ``folder`` holds for a stage. A file that cannot be read is no evidence, nor is one of another version,
    unless the stage carries its rows over: then it is a part without rows of its own.
    """
    content: dict[str, Any] | None = None
    with contextlib.suppress(ValueError):
        content = read_results(folder / f"{stage.name}.json")
    if content is None:
        return Evidence(rank=0)
    if content.get("version") != stage.version:
        return Evidence(rank=1 if stage.carries and content.get("rows") else 0)
    dates = [row["date"] for row in content["rows"]]
    return Evidence(rank=2 if content["complete"] else 1, rows=len(dates), oldest=min(dates, default=""))


def _known(stage: Stage, session: _Session) -> Evidence:
    """Of OUT, or as committed where OUT holds nothing."""
    here = evidence(stage, session.out)
    return here if here.rank else evidence(stage, session.committed)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a stage and its children to stop, then kill what is left of them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(stage: Stage, out: Path, limit_s: float, *, since: str | None = None) -> tuple[str, float]:
    """Run a stage in a process group of its own.

    Args:
        stage: what to run.
        out: folder of the result files.
        limit_s: seconds after which it is stopped.
        since: renew rows older than this.

    Returns:
        "ok", "timed out" or "failed (exit status N)", and the seconds it took.
    """
    margin = min(_MARGIN_S, 0.2 * limit_s)
    command = [*stage.command, "--out", str(out / f"{stage.name}.json"), "--seconds", f"{limit_s - margin:.1f}"]
    if since is not None:
        command += ["--since", since]
    start = time.monotonic()
    # A group, not a session: whoever ends the queue's session ends its stages too.
    process = subprocess.Popen(command, process_group=0, stdin=subprocess.DEVNULL)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return "timed out", time.monotonic() - start
    finally:
        _stop(process)
    return "ok" if status == 0 else f"failed (exit status {status})", time.monotonic() - start


def run_queue(stages: Sequence[Stage], *, out: Path, committed: Path, budget_s: float) -> list[Outcome]:
    """Work through stages until they are done or the budget is spent.

    A stage that ran out of time with rows gained waits behind the others of its rank and goes on; one that failed, was
    stopped, or gained nothing is left for another session.

    Args:
        stages: the queue.
        out: folder of this session's result files; may hold those of an earlier one.
        committed: folder of the committed ones of this device.
        budget_s: seconds for all.

    Returns:
        One outcome a stage, those that ran first and in that order.
    """
    out.mkdir(parents=True, exist_ok=True)
    session = _Session(out=out, committed=committed, end=time.monotonic() + budget_s)
    outcomes: dict[str, Outcome] = {}
    waiting = {stage.name: stage for stage in stages}
    renew = {stage.name for stage in stages if _known(stage, session).rank == 2}
    no_time: list[Outcome] = []

    def urgency(stage: Stage) -> tuple[int, int, str, int]:
        known, ran = _known(stage, session), outcomes.get(stage.name)
        return known.rank, ran.turns if ran else 0, known.oldest, stages.index(stage)

    while waiting:
        stage = min(waiting.values(), key=urgency)
        limit = min(stage.limit_s, session.end - time.monotonic())
        ran = outcomes.get(stage.name)
        if limit < stage.least_s:
            del waiting[stage.name]
            if ran is None:
                no_time.append(Outcome(stage=stage.name, status="no time left", rows=_known(stage, session).rows))
            continue
        file = out / f"{stage.name}.json"
        if not evidence(stage, out).rank and evidence(stage, committed).rank:
            shutil.copyfile(committed / file.name, file)
        before = evidence(stage, out)
        print(f"--- {stage.name}: {stage.about} (at most {limit:.0f} s)", flush=True)
        status, seconds = run_stage(stage, out, limit, since=session.since if stage.name in renew else None)
        after = evidence(stage, out)
        if ran is None:
            ran = outcomes[stage.name] = Outcome(stage=stage.name, status="")
        ran.seconds += seconds
        ran.turns += 1
        ran.rows = after.rows
        ran.failed = status != "ok"
        if status != "ok":
            ran.status = status
        elif after.rank == 0:
            ran.status, ran.failed = "failed (wrote no result)", True
        else:
            ran.status = "complete" if after.rank == 2 else "partial"
        if ran.status != "partial" or after.rows <= before.rows:
            del waiting[stage.name]
    return [*outcomes.values(), *no_time]


def stages() -> tuple[Stage, ...]:
    """The queue of this repository."""
    from dfkd_fast.benchmarks import (
        ablation,
        bench_step,
        bench_step_parts,
        engine_accuracy,
        gpu_tests,
        ops,
        step_anatomy,
        swap,
    )

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return sys.executable, "-u", "-m", f"dfkd_fast.benchmarks.{name}", *arguments

    # Limits that give each stage a turn within half an hour; those that need more get another.
    return (
        Stage(
            name="tests",
            version=gpu_tests.version(),
            command=module("gpu_tests"),
            about="tests marked gpu",
            limit_s=300,
        ),
        Stage(
            name="ops",
            version=ops.version(),
            command=module("ops"),
            about="every op beside eager PyTorch, torch.compile, public kernels and its floor",
            carries=True,
            limit_s=300,
        ),
        Stage(
            name="swap",
            version=swap.VERSION,
            command=module("swap"),
            about="the examples before and after, each drop-in beside its original",
            least_s=90,
            limit_s=240,
        ),
        Stage(
            name="step",
            version=bench_step.VERSION,
            command=module("bench_step"),
            about="whole rounds: the field's loop, eager, torch.compile, ours",
            least_s=150,
            limit_s=300,
        ),
        Stage(
            name="anatomy",
            version=step_anatomy.VERSION,
            command=module("step_anatomy"),
            about="where a step's time goes, by network and op, before and after",
            least_s=90,
            limit_s=180,
        ),
        Stage(
            name="accuracy",
            version=engine_accuracy.VERSION,
            command=module("engine_accuracy"),
            about="the demo's table on graphs in bf16 beside eager float32",
            least_s=90,
            limit_s=240,
        ),
        Stage(
            name="step_parts",
            version=bench_step_parts.VERSION,
            command=module("bench_step_parts"),
            about="what a training step is made of, part by part",
            limit_s=180,
        ),
        Stage(
            name="ablation",
            version=ablation.VERSION,
            command=module("ablation"),
            about="the table of docs/ablation.md",
            least_s=150,
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the queue on this machine's GPU.

    Returns:
        0; 1 where a stage failed or was stopped; 2 where there is no CUDA device.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages")
    parser.add_argument("--only", nargs="+", default=None, metavar="STAGE", help="these stages alone")
    parser.add_argument("--list", action="store_true", help="say what there is evidence of, and run nothing")
    options = parser.parse_args(arguments)

    queue = stages()
    unknown = set(options.only or ()) - {stage.name for stage in queue}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in queue)}")
    if options.only:
        queue = tuple(stage for stage in queue if stage.name in options.only)

    import torch
    from rich.console import Console

    console = Console()
    if options.list:
        folders = sorted(folder for folder in RESULTS.glob("*") if folder.is_dir())
        words = ("none", "partial", "complete")
        rows = [
            {"device": folder.name, "stage": stage.name, "evidence": words[found.rank], "rows": found.rows}
            for folder in folders
            for stage in queue
            for found in [evidence(stage, folder)]
        ]
        console.print(result_table(rows, "committed evidence, of the present versions"))
        return 0
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device and finds none; `dfkd-fast doctor` says why", file=sys.stderr)
        return 2

    # So that ending the queue ends its present stage: the default action would leave it running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = torch.cuda.get_device_name()
    outcomes = run_queue(queue, out=options.out, committed=RESULTS / device_slug(name), budget_s=options.budget)
    rows = [
        {
            "stage": outcome.stage,
            "status": outcome.status,
            "seconds": f"{outcome.seconds:.0f}" if outcome.turns else None,
            "rows": outcome.rows,
        }
        for outcome in outcomes
    ]
    console.print(result_table(rows, f"{name}: results in {options.out}"))
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
