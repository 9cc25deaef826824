"""A thousand rounds of the engine on a small configuration: does memory grow, does a round get slower?"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.step_variants import SIZES, Size, make_loop, run_round
from dfkd_fast.benchmarks.timeline import Timeline

__all__ = ["DRIFT", "HOST_BYTES", "endurance", "main", "verdict"]

DRIFT = 0.05  # of the median round: what the clocks of a device move by in a minute, and more than that
HOST_BYTES = 16 * 2**20  # between two samples of resident memory in a steady program: what allocators keep back


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def verdict(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What samples in the order of rounds say, the first tenth of them left out.

    Args:
        samples: each with ``round``, ``round_ms`` (the median since the sample before), ``host_bytes`` and, on a GPU,
            ``allocated_bytes`` and ``reserved_bytes``.

    Returns:
        Growth of each kind of memory from the first to the last sample; ``drift``, the last fifth's median round over
        the first fifth's, less one; the ``slope`` of a line through them, in microseconds a round; and whether all is
        ``steady``: no growth on the device, none on the host beyond :data:`HOST_BYTES`, no drift beyond :data:`DRIFT`.
    """
    kept = samples[len(samples) // 10 :]
    fifth = max(1, len(kept) // 5)
    first, last = (statistics.median(s["round_ms"] for s in part) for part in (kept[:fifth], kept[-fifth:]))
    line = statistics.linear_regression([s["round"] for s in kept], [1e3 * s["round_ms"] for s in kept])
    grown = {
        f"{what}_growth": kept[-1][f"{what}_bytes"] - kept[0][f"{what}_bytes"]
        for what in ("allocated", "reserved", "host")
        if f"{what}_bytes" in kept[0]
    }
    drift = last / first - 1
    on_device = max((grown.get(f"{what}_growth", 0) for what in ("allocated", "reserved")), default=0)
    steady = on_device <= 0 and grown["host_growth"] <= HOST_BYTES and drift <= DRIFT
    return {**grown, "first_ms": first, "last_ms": last, "drift": drift, "slope": line.slope, "steady": steady}


def endurance(size: Size, device: torch.device, *, rounds: int = 1000, every: int = 20) -> dict[str, Any]:
    """Run the project's engine for many rounds.

    Args:
        size: a small experiment; its first batch size is used.
        device: where to run.
        rounds: how many.
        every: rounds between two samples.
    """
    samples: list[dict[str, Any]] = []
    cuda = device.type == "cuda"
    with make_loop("dfkd_fast", size, size.batches[0], device) as (loop, _):
        loop.prepare()
        for _ in range(size.warm_ups):
            run_round(loop, size.steps)
        timeline = Timeline(device)
        for number in range(every, rounds + 1, every):
            timeline.start()
            for _ in range(every):
                timeline.mark()
                run_round(loop, size.steps)
            timeline.mark()
            sample: dict[str, Any] = {"round": number, "round_ms": statistics.median(timeline.intervals_ms())}
            if cuda:
                sample["allocated_bytes"] = torch.cuda.memory_allocated(device)
                sample["reserved_bytes"] = torch.cuda.memory_reserved(device)
            sample["host_bytes"] = _resident_bytes()
            samples.append(sample)
        finite = bool(torch.isfinite(loop.losses()).all())
    found = verdict(samples)
    found["steady"] = found["steady"] and finite
    return {**found, "rounds": rounds, "finite": finite, "engine": loop.name, "status": "ok", "samples": samples}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine on the small configuration and write what was seen to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args(arguments)
    every = max(1, options.rounds // 50)
    found = endurance(SIZES["small"], torch.device(options.device), rounds=options.rounds, every=every)
    options.out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
