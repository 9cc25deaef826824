"""Runs on several processes: joining them, agreeing on decisions, and files that only one of them writes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dfkd_fast.collectives import Group, current_group, distributed
from dfkd_fast.config import DistillConfig, TeachConfig
from dfkd_fast.engine.interrupt import StopRequest
from dfkd_fast.files import lock_folder

__all__ = [
    "agree_to_stop",
    "broadcast",
    "everyone",
    "is_main",
    "join",
    "locked_folder",
    "on_main",
    "require_divisible",
    "require_equal",
    "restartable",
]

T = TypeVar("T")
C = TypeVar("C", DistillConfig, TeachConfig)

_TIMEOUT_S = 600.0  # after which a collective fails if a process is missing
_NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # makes torchrun start a new store for restarted processes


def _launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def _world() -> Group | None:
    """The default group of ``torch.distributed``, or None with one process."""
    if dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    return Group(world.group_name, dist.get_world_size(), dist.get_rank())


@contextmanager
def join() -> Iterator[Group | None]:
    """Context manager in which the functions of this package run on all processes together.

    If ``torch.distributed`` is initialized, these are the processes of its default group. Otherwise, the processes that
    torchrun has started are connected, by NCCL between GPUs, one per process, and by gloo between CPUs. With one
    process, it does nothing.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine, or PyTorch lacks NCCL.
        ConnectionError: the processes cannot be joined.
    """
    if dist.is_available() and dist.is_initialized():
        with distributed(_world()):
            yield current_group()
        return
    if not _launched():
        yield None
        return
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and not dist.is_nccl_available():
        raise ValueError("several GPUs need a PyTorch with NCCL, but this one is built without it")
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    if cuda:
        torch.cuda.set_device(local)
    timeout = timedelta(seconds=float(os.environ.get("DFKD_FAST_TIMEOUT_S", _TIMEOUT_S)))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    except (ValueError, RuntimeError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"cannot join the other processes at {place}; start them with torchrun: {reason}"
        ) from error
    with distributed(_world()):
        yield current_group()
    dist.destroy_process_group()  # after an error, it could wait for processes that do not exist any more


def restartable(config: C) -> C:
    """Resume the run if torchrun has started this process again after a failure.

    Raises:
        ValueError: torchrun may restart the processes, but ``config.out`` is not set, or restarted processes would wait
            forever, because torchrun 2.11 keeps the addresses of the previous ones in its store.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        if config.out is None:
            raise ValueError(
                "--out is required with torchrun's --max-restarts: a restarted run continues in its folder"
            )
        if os.environ.get(_NEW_STORE) != "1":
            raise ValueError(f"torchrun's --max-restarts needs the environment variable {_NEW_STORE}=1")
    # On another machine than that of the failure, the count does not increase.
    again = any(everyone(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    return replace(config, resume=True) if again else config


def require_divisible(batch_size: int, name: str) -> None:
    """Raise ValueError if the processes cannot have equal parts of a batch."""
    group = current_group()
    if group is not None and batch_size % group.size:
        raise ValueError(f"{name} must be divisible by the number of processes, got {batch_size} and {group.size}")


@contextmanager
def locked_folder(create: Callable[[], Path]) -> Iterator[Path]:
    """Context manager that creates a folder and locks it, in the main process."""
    with ExitStack() as stack:

        def create_and_lock() -> Path:
            folder = create()
            stack.enter_context(lock_folder(folder))
            return folder

        yield on_main(create_and_lock)


def agree_to_stop(ended: bool, stop: StopRequest) -> bool:
    """Whether a process wants to end the run. Also sets ``stop.agreed`` to a signal that any process has received."""
    ends, received = zip(*everyone((ended, stop.received)), strict=True)
    stop.agreed = next(filter(None, received), None)
    return any(ends)


def is_main() -> bool:
    """Whether this process writes the files of the run."""
    group = current_group()
    return group is None or group.rank == 0


def everyone(value: T) -> list[T]:
    """The values of all processes, which can be pickled."""
    group = current_group()
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value)
    return values


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def on_main(call: Callable[[], T]) -> T:
    """Call a function in the main process, and return its result or raise its exception in all processes."""
    if current_group() is None:
        return call()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = call()
        except Exception as error:
            outcome[1] = _picklable(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the main process."""
    if current_group() is not None:
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.detach().copy_(value)


def require_equal(tensors: Iterable[Tensor]) -> None:
    """Check by sums that floating-point tensors are equal in all processes.

    Raises:
        RuntimeError: they differ.
    """
    if current_group() is None:
        return
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    sums = torch.stack([tensor.double().sum().nan_to_num().cpu() for tensor in floating]).tolist()
    first, *others = everyone(sums)
    if wrong := [rank for rank, each in enumerate(others, 1) if each != first]:
        raise RuntimeError(f"the weights of processes {', '.join(map(str, wrong))} differ from those of process 0")
