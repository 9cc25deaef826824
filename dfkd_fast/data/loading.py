"""A data loader whose batches depend only on the seed, not on the number of workers."""

from __future__ import annotations

import multiprocessing.util
import pickle
import traceback
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
    get_worker_info,
)

from dfkd_fast.collectives import Group

__all__ = ["Loader", "loader"]


class _SeededBatches(Sampler[tuple[int, list[int]]]):
    """Adds a seed from the loader's generator to each batch of indices, and keeps the part of this process."""

    def __init__(self, batches: BatchSampler, generator: torch.Generator, group: Group | None) -> None:
        self.batches = batches
        self.generator = generator
        self.rank, self.processes = (0, 1) if group is None else (group.rank, group.size)
        self.skip = 0  # batches to leave out of the next pass

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        seeds = torch.randint(2**62, (len(self),), generator=self.generator).tolist()
        skip, self.skip = self.skip, 0
        for seed, indices in islice(zip(seeds, self.batches, strict=True), skip, None):
            count = len(indices) // self.processes
            yield seed + self.rank, indices[self.rank * count : (self.rank + 1) * count]


class _Seeded(Dataset[Any]):
    """Returns whole batches. Seeds the global generator for each of them and restores its state afterward.

    In a worker process, an error is returned as the batch.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: tuple[int, list[int]]) -> Any:
        try:
            items = self._items(batch)
            return default_collate(items) if get_worker_info() is None else _shared(items)
        except Exception as error:
            if get_worker_info() is None:
                raise
            return _sendable(error)

    def _items(self, batch: tuple[int, list[int]]) -> list[Any]:
        # torch.manual_seed would also seed CUDA.
        seed, indices = batch
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            fetch = getattr(self.dataset, "__getitems__", None)
            return fetch(indices) if fetch else [self.dataset[index] for index in indices]
        finally:
            torch.random.set_rng_state(state)


def _shared(items: list[Any]) -> Any:
    """The batch in shared memory. Later, an error would lose the batch, and the loader would wait for it forever."""
    try:
        return tree_map_only(Tensor, Tensor.share_memory_, default_collate(items))
    except RuntimeError as error:
        if not str(error).startswith("unable to "):  # torch's errors of shared memory
            raise
        problem = f"cannot share a batch of {len(items)} images with worker processes: {str(error).splitlines()[0]}"
        raise OSError(f"{problem}; try a smaller batch, or 0 workers") from error


def _sendable(error: Exception) -> Exception:
    """The error with the worker's traceback as a note, or an error with the same text if it cannot be pickled."""
    note = "In a worker process:\n" + "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _as_it_is(batch: Any) -> Any:
    return batch


class Loader(DataLoader[Any]):
    """A DataLoader that can repeat a pass, also from its middle.

    Raises the errors of worker processes unchanged; DataLoader would put a traceback into their messages.
    """

    batch_sampler: _SeededBatches  # type: ignore[assignment]

    def get_state(self) -> Tensor:
        """The random state that determines the following passes, a uint8 tensor. Call it between passes."""
        return self.batch_sampler.generator.get_state()

    def set_state(self, state: Tensor, *, skip: int = 0) -> None:
        """Make the next pass the one that followed :meth:`get_state`, without its first ``skip`` batches."""
        self.batch_sampler.generator.set_state(state)
        self.batch_sampler.skip = skip

    def _batches(self) -> Iterator[Any]:
        try:
            if self.num_workers:
                # Workers send tensors through sockets in this folder. If a worker cannot create the folder, its batch
                # is lost, and the loader waits for it forever.
                multiprocessing.util.get_temp_dir()
            yield from super().__iter__()
        except OSError as error:
            if not self.num_workers:
                raise
            problem = f"cannot load images in {self.num_workers} worker processes: {error.strerror or error}"
            raise OSError(f"{problem}; try fewer workers, or 0 workers") from error

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in self._batches():
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    del batch  # a reference cycle with the traceback would delay the end of the workers by 5 s
            yield batch


def loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    workers: int,
    drop_last: bool = False,
    group: Group | None = None,
) -> Loader:
    """Build a loader of batches ``(images, labels)``: float32 (N, 3, H, W) and int64 (N,).

    Order and random transforms depend only on ``seed`` and on the number of earlier passes over this loader. The state
    of PyTorch's global generator has no effect and is left unchanged.

    Args:
        dataset: a map-style dataset, for example ``ImageData.train``.
        batch_size: images per batch.
        shuffle: draw a new order in each pass.
        seed: seed of the order and of the random transforms.
        workers: number of processes, which stay alive between passes; 0 loads in the calling process.
        drop_last: drop an incomplete last batch.
        group: load only this process's part of each batch; the number of processes must divide ``batch_size``.

    Returns:
        The loader; it pins memory if CUDA is available.

    Raises:
        ValueError: batch_size is below 1, workers is negative, or the dataset is empty.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    count = len(dataset)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("dataset must contain at least one image, got none")
    generator = torch.Generator().manual_seed(seed)
    order: Sampler[int] = (
        RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
        if shuffle
        else SequentialSampler(dataset)  # type: ignore[arg-type]
    )
    return Loader(
        _Seeded(dataset),
        collate_fn=_as_it_is,
        batch_sampler=_SeededBatches(BatchSampler(order, batch_size, drop_last), generator, group),  # type: ignore
        num_workers=workers,
        # DataLoader draws a base seed per pass, by default from the global generator.
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
